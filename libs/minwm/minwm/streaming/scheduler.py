"""Which sessions advance next: earliest playout deadline first, and fair shares where time is too short for all.

A policy and nothing else: it holds no clock, thread or queue. The caller says who is ready and what time it is,
computes the batch it is given, and says how long that took; times are seconds on any one clock. While every ready
session can be on time, deadlines alone decide (EDF; Liu and Layland, JACM 1973). When not, the earliest deadline
counts among those that are not ahead of their share, as in earliest eligible virtual deadline first (Stoica and
Abdel-Wahab, TR-95-22, 1995), with the accounts of start-time fair queueing (Goyal, Vin and Cheng, SIGCOMM 1996).
"""

import math
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from minwm.errors import ConfigError, InputError

_SMOOTHING = 0.2
"""Weight of the newest measurement in a cost: four fifths of a change are followed after seven batches."""


@dataclass(frozen=True)
class Ready:
    """A session whose next chunk may be computed: its client has granted a credit.

    Sessions with an equal `key` can share a forward (fidelity, cache fill: whatever fixes shapes). The client runs
    out of frames at `deadline`. Raises InputError if that is no finite time.
    """

    session: Hashable
    tenant: str
    key: Hashable
    deadline: float

    def __post_init__(self) -> None:
        if not math.isfinite(self.deadline):
            raise InputError(
                f"deadline of session {self.session!r}: {self.deadline}, expected a finite time in seconds"
            )


@dataclass(frozen=True)
class Batch:
    """Sessions to advance together, one chunk each. `contended`: not every ready session can be on time."""

    sessions: tuple[Ready, ...]
    contended: bool


class BatchCosts:
    """Seconds that a batch takes, by key and size, learned from what batches took.

    Taken for granted: a batch takes no less than a smaller one, and no more than its sessions by themselves. One
    measurement therefore bounds all sizes of its key, and what is known of the others is moved within the bounds:
    estimates follow a device that gets slower also at sizes that are not run any more.
    """

    def __init__(self) -> None:
        self._seconds: dict[Hashable, dict[int, float]] = {}

    def observe(self, key: Hashable, size: int, seconds: float) -> None:
        """A batch of `size` took `seconds`. Raises InputError unless both are positive and finite."""
        if size < 1 or not 0 < seconds < math.inf:
            raise InputError(f"a batch of {size} that took {seconds} s: expected a positive size and finite time")
        known = self._seconds.setdefault(key, {})
        smooth = known[size] = known.get(size, seconds) + _SMOOTHING * (seconds - known.get(size, seconds))
        for other, cost in known.items():
            ratio = other / size
            known[other] = min(max(cost, smooth * min(1, ratio)), smooth * max(1, ratio))

    def estimate(self, key: Hashable, size: int) -> float:
        """Seconds of a batch of `size`; rises with size.

        Sizes never run cost what others allow at most; a key never run costs what the dearest one costs, and
        nothing as long as nothing was ever run: warm up first.
        """
        if key not in self._seconds:
            return max((self.estimate(known, size) for known in self._seconds), default=0.0)
        known = self._seconds[key]
        return known[size] if size in known else min(cost * max(1, size / other) for other, cost in known.items())


class _Accounts:
    """How far members are ahead of the least served one that wants service, in seconds over weight.

    Who wanted none while the others went on comes back level with the least served: nobody saves up.
    """

    def __init__(self) -> None:
        self._ahead: dict[Hashable, float] = {}

    def settle(self, wanting: Iterable[Hashable]) -> None:
        least = min(map(self.ahead, wanting))
        self._ahead = {member: ahead - least for member, ahead in self._ahead.items() if ahead > least}

    def ahead(self, member: Hashable) -> float:
        return self._ahead.get(member, 0.0)

    def charge(self, member: Hashable, seconds: float) -> None:
        self._ahead[member] = self.ahead(member) + seconds


class DeadlineScheduler:
    """The policy of one device.

    Below capacity, with room for a batch in flight, everybody is on time and weights make no difference. Above it
    tenants share compute by weight, however many sessions they have, and a tenant's sessions share equally. Who
    asks for less than that gets what it asks for, and is on time but for the odd chunk when time gets short: until
    then nobody's use is held against anybody. A session that is late waits, past its deadline, for at most

        4 C ((n + 1) W / w + m)

    seconds: C the longest batch, n the ready sessions of its tenant, w its tenant's weight, W and m the
    weights and the number of the tenants that are ready. A batch in flight is not interrupted: keep
    `largest_batch` so small that the largest one takes well under a chunk's playing time.
    """

    def __init__(self, weights: Mapping[str, float], largest_batch: int) -> None:
        """weights: of tenants; those not named have weight 1. Raises ConfigError for what is not positive."""
        for tenant, weight in weights.items():
            if not 0 < weight < math.inf:
                raise ConfigError(f"weight of tenant {tenant!r}: {weight}, expected a positive finite number")
        if largest_batch < 1:
            raise ConfigError(f"largest_batch: {largest_batch}, expected at least 1")
        self.costs = BatchCosts()
        self._weights = dict(weights)
        self._largest_batch = largest_batch
        self._tenants = _Accounts()
        self._sessions: dict[str, _Accounts] = {}

    def pick(self, ready: Sequence[Ready], now: float) -> Batch | None:
        """The batch to compute next: one key, at most the largest size; None when nobody is ready.

        Raises InputError when a session is there twice, or `now` is no finite time.
        """
        if not math.isfinite(now):
            raise InputError(f"now: {now}, expected a finite time in seconds")
        twice = [session for session, count in Counter(one.session for one in ready).items() if count > 1]
        if twice:
            raise InputError(f"ready: session {twice[0]!r} is there twice, expected each once")
        if not ready:
            return None
        queue = sorted(ready, key=lambda one: one.deadline)
        if self._all_on_time(queue, now):
            return Batch(self._batch(queue, now), contended=False)
        return Batch(self._batch(self._eligible(queue, now), now), contended=True)

    def observe(self, batch: Batch, seconds: float) -> None:
        """What computing `batch` took. Tenants and sessions are charged for it if others had to wait too long."""
        size = len(batch.sessions)
        self.costs.observe(batch.sessions[0].key, size, seconds)
        if not batch.contended:
            return
        for one in batch.sessions:
            self._tenants.charge(one.tenant, seconds / size / self._weight(one.tenant))
            self._sessions.setdefault(one.tenant, _Accounts()).charge(one.session, seconds / size)

    def load(self, streams: Iterable[tuple[Hashable, float]]) -> float:
        """The part of the device's time that streams, each (key, seconds of play a chunk), need to keep up.

        Streams of one key are taken to share batches as large as they can be. Above 1 nothing helps; leave room
        below it for jitter, and for the batch in flight when a session becomes ready.
        """
        streams = list(streams)
        counts = Counter(key for key, _ in streams)
        sizes = {key: min(count, self._largest_batch) for key, count in counts.items()}
        return sum(self.costs.estimate(key, sizes[key]) / sizes[key] / play for key, play in streams)

    def _weight(self, tenant: str) -> float:
        return self._weights.get(tenant, 1.0)

    def _all_on_time(self, queue: Sequence[Ready], now: float) -> bool:
        """Whether everybody meets the deadline when batches follow each other in the order of `queue`."""
        while queue:
            batch = self._batch(queue, now)
            now += self.costs.estimate(batch[0].key, len(batch))
            if any(one.deadline < now for one in batch):
                return False
            taken = {one.session for one in batch}
            queue = [one for one in queue if one.session not in taken]
        return True

    def _eligible(self, queue: Sequence[Ready], now: float) -> list[Ready]:
        """Who is not ahead of the share of tenant and session by more than a chunk, those still to be saved first."""
        self._tenants.settle(one.tenant for one in queue)
        self._sessions = {one.tenant: self._sessions.get(one.tenant, _Accounts()) for one in queue}
        for tenant, sessions in self._sessions.items():
            sessions.settle(one.session for one in queue if one.tenant == tenant)
        alone = {one.key: self.costs.estimate(one.key, 1) for one in queue}
        eligible = [
            one
            for one in queue
            if self._tenants.ahead(one.tenant) * self._weight(one.tenant) <= alone[one.key]
            and self._sessions[one.tenant].ahead(one.session) <= alone[one.key]
        ]
        return sorted(eligible, key=lambda one: now + alone[one.key] > one.deadline)

    def _batch(self, queue: Sequence[Ready], now: float) -> tuple[Ready, ...]:
        """The first of `queue` and those behind it that share its key, as long as that costs nobody a deadline.

        Whoever is not in the batch is thought to come right after it.
        """
        key = queue[0].key
        mates = [one for one in queue if one.key == key][: self._largest_batch]
        alone = {one.key: self.costs.estimate(one.key, 1) for one in queue}
        latest = {one.session: one.deadline - alone[one.key] for one in queue}
        end = math.inf
        for size, joining in enumerate(mates):
            longer = now + self.costs.estimate(key, size + 1)
            del latest[joining.session]
            if any(end <= time < longer for time in latest.values()):
                return tuple(mates[:size])
            latest[joining.session] = joining.deadline
            end = longer
        return tuple(mates)
