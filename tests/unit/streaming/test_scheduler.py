"""The scheduler of a replica: deadlines below capacity, shares by weight above it, and nobody left out."""

import math
import random
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minwm.errors import ConfigError, InputError
from minwm.streaming.scheduler import Batch, BatchCosts, DeadlineScheduler, Ready

pytestmark = pytest.mark.unit

PLAY = 0.5  # seconds of play a chunk
DEPTH = 3  # chunks a client lets the service be ahead


@dataclass
class Client:
    """Plays what it has, and grants a credit whenever less than `DEPTH` chunks are buffered.

    It is ready as of `opened`, wants its first chunk `PLAY` seconds later, and starts to play when it has it;
    a late chunk stops the picture, and everything after moves by as much.
    """

    name: str
    tenant: str
    key: Hashable = "key"
    opened: float = 0.0
    closed: float = math.inf
    dry: float = 0.0
    granted: float = 0.0

    def __post_init__(self) -> None:
        self.dry, self.granted = self.opened + PLAY, self.opened

    def receive(self, now: float, first: bool) -> None:
        self.dry = (now if first else max(now, self.dry)) + PLAY
        self.granted = max(now, self.dry - (DEPTH - 1) * PLAY)


@dataclass(frozen=True)
class Served:
    """One chunk of one client: its part of the batch's time, and when it was there."""

    client: Client
    seconds: float
    start: float
    done: float
    deadline: float

    @property
    def late(self) -> float:
        return max(0.0, self.done - self.deadline)


@dataclass
class Device:
    """A chunk takes `cost[key]`; of a batch, `fixed` is paid once and the rest by session, give or take `jitter`."""

    cost: dict[Hashable, float]
    fixed: float = 0.0
    jitter: float = 0.05
    seed: int = 0
    draws: random.Random = field(init=False)

    def __post_init__(self) -> None:
        self.draws = random.Random(self.seed)

    def mean(self, key: Hashable, size: int) -> float:
        return self.cost[key] * (self.fixed + (1 - self.fixed) * size)

    def compute(self, batch: Batch) -> float:
        wobble = self.draws.uniform(1 - self.jitter, 1 + self.jitter)
        return self.mean(batch.sessions[0].key, len(batch.sessions)) * wobble


def simulate(scheduler: DeadlineScheduler, clients: Sequence[Client], device: Device, until: float) -> list[Served]:
    """Every chunk served before `until`, in order; the scheduler is warmed up first."""
    for key in device.cost:
        for size in range(1, 9):
            scheduler.costs.observe(key, size, device.mean(key, size))
    now, served, started = 0.0, list[Served](), set[str]()
    by_name = {client.name: client for client in clients}
    while now < until:
        there = [client for client in clients if now < client.closed]
        ready = [Ready(c.name, c.tenant, c.key, c.dry) for c in there if c.granted <= now]
        batch = scheduler.pick(ready, now)
        if batch is None:
            now = min((client.granted for client in there), default=until)
            continue
        start, now = now, now + (took := device.compute(batch))
        scheduler.observe(batch, took)
        for one in batch.sessions:
            client = by_name[str(one.session)]
            served.append(Served(client, took / len(batch.sessions), start, now, one.deadline))
            client.receive(now, client.name not in started)
            started.add(client.name)
    return served


def tenants_of(sizes: dict[str, int], key: Hashable = "key", **changes: float) -> list[Client]:
    return [Client(f"{tenant}{i}", tenant, key, **changes) for tenant, size in sizes.items() for i in range(size)]


def compute_by(served: Sequence[Served], part: Callable[[Client], str], since: float = 0.0) -> dict[str, float]:
    seconds: dict[str, float] = {}
    for one in served:
        if one.start >= since:
            seconds[part(one.client)] = seconds.get(part(one.client), 0.0) + one.seconds
    return {name: value / sum(seconds.values()) for name, value in seconds.items()}


def tenant(client: Client) -> str:
    return client.tenant


def water_filling(demands: dict[str, float], weights: dict[str, float]) -> dict[str, float]:
    """Weighted max-min fair shares of one device, by bisection on the level."""
    low, high = 0.0, 1e3
    for _ in range(100):
        level = (low + high) / 2
        full = sum(min(demands[name], level * weights[name]) for name in demands) > 1
        low, high = (low, level) if full else (level, high)
    return {name: min(demands[name], low * weights[name]) for name in demands}


@settings(max_examples=25)
@given(st.data())
def test_below_capacity_no_deadline_is_missed_whatever_the_weights(data: st.DataObject) -> None:
    keys = data.draw(st.lists(st.floats(0.2, 1.0), min_size=1, max_size=3))
    counts = data.draw(st.lists(st.integers(1, 6), min_size=len(keys), max_size=len(keys)))
    weights = data.draw(st.lists(st.floats(0.05, 20), min_size=2, max_size=2))
    largest, fixed = data.draw(st.integers(1, 8)), data.draw(st.floats(0, 0.5))
    device = Device(dict(enumerate(keys)), fixed)
    longest = max(device.mean(key, largest) for key in device.cost)
    need = sum(count * cost for count, cost in zip(counts, keys, strict=True)) + longest
    device.cost = {
        key: 0.9 * PLAY * cost / need for key, cost in device.cost.items()
    }  # with room for a batch in flight
    draw = random.Random(data.draw(st.integers(0, 99)))
    clients = [
        Client(f"{key}-{i}", draw.choice("ab"), key, opened=draw.uniform(0, 3))
        for key, count in enumerate(counts)
        for i in range(count)
    ]
    served = simulate(DeadlineScheduler(dict(zip("ab", weights, strict=True)), largest), clients, device, 20.0)
    assert {one.client.name for one in served} == {client.name for client in clients}
    assert max(one.late for one in served) == 0


def test_a_load_that_only_batches_carry_is_carried_and_is_known_to_fit() -> None:
    device = Device({"key": 0.05}, fixed=0.8)  # 24 singles would take 1.2 s in every 0.5 s
    scheduler = DeadlineScheduler({}, largest_batch=8)
    clients = [Client(f"{i}", f"{i % 5}", opened=i / 10) for i in range(24)]
    served = simulate(scheduler, clients, device, 30.0)
    assert scheduler.load([("key", PLAY)] * 24) == pytest.approx(3 * 0.05 * 2.4 / PLAY, rel=0.1)
    assert max(one.late for one in served) == 0


@settings(max_examples=8)
@given(
    sessions=st.lists(st.integers(1, 8), min_size=2, max_size=4),
    weights=st.lists(st.floats(0.5, 4), min_size=4, max_size=4),
    largest=st.integers(1, 4),
)
def test_above_capacity_compute_is_shared_by_weight(sessions: list[int], weights: list[float], largest: int) -> None:
    counts = dict(zip("abcd", sessions, strict=False))
    weight = {name: weights[i] for i, name in enumerate(counts)}
    cost = 1.5 * PLAY / sum(sessions)  # half as much again as there is
    expected = water_filling({name: count * cost / PLAY for name, count in counts.items()}, weight)
    largest = min(largest, max(1, int(0.25 * PLAY / cost)))
    served = simulate(DeadlineScheduler(weight, largest), tenants_of(counts), Device({"key": cost}), 150.0)
    shares = compute_by(served, tenant, since=10.0)
    assert shares == pytest.approx(expected, abs=0.03)


def test_sessions_of_a_tenant_share_equally_though_their_chunks_cost_differently() -> None:
    clients = [Client(f"{key}{i}", "a", key) for key in ("dear", "cheap") for i in range(4)]
    served = simulate(DeadlineScheduler({}, 2), clients, Device({"dear": 0.3, "cheap": 0.1}), 200.0)
    shares = compute_by(served, lambda client: client.name)
    assert shares == pytest.approx({client.name: 1 / 8 for client in clients}, abs=0.01)


@pytest.mark.parametrize("sessions", [{"a": 1, "b": 20}, {"a": 3, "b": 3, "c": 15}])
def test_no_session_starves(sessions: dict[str, int]) -> None:
    weights = {"a": 1.0, "b": 5.0, "c": 0.2}
    device, largest = Device({"key": 0.1}), 4
    clients = tenants_of(sessions)
    served = simulate(DeadlineScheduler(weights, largest), clients, device, 300.0)
    longest, total = device.mean("key", largest) * 1.05, sum(weights[name] for name in sessions)
    for client in clients:
        bound = 4 * longest * ((sessions[client.tenant] + 1) * total / weights[client.tenant] + len(sessions))
        late = [one.late for one in served if one.client is client]
        assert late, f"{client.name} was never served"
        assert max(late) <= bound, client.name


@pytest.mark.parametrize(("key", "cost"), [("key", 0.04), ("other", 0.04), ("other", 0.1), ("other", 0.2)])
def test_a_greedy_tenant_does_not_hurt_one_that_stays_within_its_share(key: str, cost: float) -> None:
    clients = [Client("lone", "modest", key), *tenants_of({"greedy": 20})]
    served = simulate(DeadlineScheduler({}, 4), clients, Device({"key": 0.04, "other": cost}), 60.0)
    assert max(one.late for one in served if one.client.tenant == "modest") == 0, f"needs {cost / PLAY:.0%} of a half"
    assert max(one.late for one in served if one.client.tenant == "greedy") > 1


def test_one_that_can_never_keep_up_costs_the_others_next_to_nothing() -> None:
    clients = [Client("hopeless", "greedy", "huge"), *tenants_of({"b": 2, "c": 3})]
    served = simulate(DeadlineScheduler({}, 2), clients, Device({"huge": 0.6, "key": 0.04}), 200.0)
    late = [one.late > 0 for one in served if one.client.tenant != "greedy"]
    assert sum(late) / len(late) < 0.01, "the objective: at most one chunk in a hundred"
    hopeless = compute_by(served, lambda client: client.name)["hopeless"]
    assert hopeless == pytest.approx(0.6, abs=0.02), "it gets what the others leave"


def test_a_tenant_that_was_idle_comes_back_without_a_monopoly() -> None:
    late_comer = tenants_of({"late": 10}, opened=100.0)
    clients = [*tenants_of({"busy": 10}), *late_comer]
    served = simulate(DeadlineScheduler({}, 2), clients, Device({"key": 0.1}), 140.0)
    after = [one for one in served if 100.0 <= one.start < 105.0]
    assert compute_by(after, tenant) == pytest.approx({"busy": 0.5, "late": 0.5}, abs=0.1)


def test_spare_time_that_was_used_is_not_held_against_anybody() -> None:
    clients = [*tenants_of({"busy": 4}), *tenants_of({"late": 10, "busy-": 6}, opened=100.0)]
    for client in clients:
        client.tenant = client.tenant.rstrip("-")
    served = simulate(DeadlineScheduler({}, 2), clients, Device({"key": 0.1}), 140.0)
    after = [one for one in served if 100.5 <= one.start < 106.0]
    assert compute_by(after, tenant) == pytest.approx({"busy": 0.5, "late": 0.5}, abs=0.1)


def test_a_simulation_repeats_exactly() -> None:
    def run() -> list[tuple[str, float]]:
        served = simulate(DeadlineScheduler({"a": 2}, 4), tenants_of({"a": 5, "b": 9}), Device({"key": 0.06}), 20.0)
        return [(one.client.name, one.done) for one in served]

    assert run() == run()


ready_sets = st.lists(
    st.builds(
        Ready,
        session=st.integers(0, 99),
        tenant=st.sampled_from("abc"),
        key=st.sampled_from(["fast", "slow"]),
        deadline=st.floats(9.5, 14.0),
    ),
    min_size=1,
    max_size=12,
    unique_by=lambda one: one.session,
)


def warm(largest: int = 4, fixed: float = 0.5) -> tuple[DeadlineScheduler, Device]:
    scheduler, device = DeadlineScheduler({"a": 3}, largest), Device({"fast": 0.2, "slow": 0.7}, fixed)
    for key in device.cost:
        for size in range(1, largest + 1):
            scheduler.costs.observe(key, size, device.mean(key, size))
    return scheduler, device


@settings(max_examples=50)
@given(ready_sets)
def test_a_batch_has_one_key_and_fits_and_makes_no_member_late_that_was_first(ready: list[Ready]) -> None:
    scheduler, device = warm()
    batch = scheduler.pick(ready, 10.0)
    assert batch is not None
    assert len({one.key for one in batch.sessions}) == 1
    assert 1 <= len({one.session for one in batch.sessions}) == len(batch.sessions) <= 4
    assert set(batch.sessions) <= set(ready)
    first = min(batch.sessions, key=lambda one: one.deadline)
    alone, together = (10.0 + device.mean(first.key, size) for size in (1, len(batch.sessions)))
    if any(one.deadline >= alone for one in batch.sessions):
        met = min((one for one in batch.sessions if one.deadline >= alone), key=lambda one: one.deadline)
        assert together <= met.deadline, "its mates made it late"
    if not batch.contended:
        assert first.deadline == min(one.deadline for one in ready)


@settings(max_examples=50)
@given(ready_sets)
def test_the_most_urgent_session_goes_first_as_long_as_nobody_was_served_too_much(ready: list[Ready]) -> None:
    scheduler, device = warm()
    batch = scheduler.pick(ready, 10.0)
    savable = [one for one in ready if 10.0 + device.mean(one.key, 1) <= one.deadline]
    urgent = min(savable or ready, key=lambda one: one.deadline)
    assert batch is not None
    assert batch.sessions[0].deadline == urgent.deadline


@pytest.mark.parametrize(("slack", "size"), [(2.0, 4), (1.15, 2), (0.95, 1)])
def test_a_batch_does_not_grow_where_that_makes_another_key_late(slack: float, size: int) -> None:
    scheduler, _ = warm(fixed=0.0)  # fast: 0.2 each, slow: 0.7
    fast = [Ready(i, "a", "fast", 10.9 + i) for i in range(4)]
    batch = scheduler.pick([Ready("slow", "b", "slow", 10.0 + slack), *fast], 10.0)
    assert batch == Batch(tuple(fast[:size]), contended=False)


def test_nobody_ready_nothing_picked() -> None:
    assert DeadlineScheduler({}, 4).pick([], 0.0) is None


@given(st.lists(st.tuples(st.integers(1, 8), st.floats(0.01, 10)), min_size=1, max_size=30))
def test_costs_rise_with_size_and_never_exceed_singles(observed: list[tuple[int, float]]) -> None:
    costs = BatchCosts()
    for size, seconds in observed:
        costs.observe("key", size, seconds)
    estimates = [costs.estimate("key", size) for size in range(1, 11)]
    for size, (cost, larger) in enumerate(pairwise(estimates), start=1):
        assert cost <= larger * (1 + 1e-9)
        assert larger / (size + 1) <= cost / size * (1 + 1e-9)
    assert costs.estimate("unknown", 2) == costs.estimate("key", 2), "an unknown key is taken for the dearest"


def test_costs_follow_a_device_that_gets_slower_also_at_sizes_that_are_not_run() -> None:
    costs = BatchCosts()
    for size in (1, 4):
        costs.observe("key", size, 0.1 * size)
    for _ in range(30):
        costs.observe("key", 4, 1.2)
    assert costs.estimate("key", 4) == pytest.approx(1.2, rel=0.01)
    assert costs.estimate("key", 1) == pytest.approx(0.3, rel=0.01)


def test_load_is_compute_over_playing_time() -> None:
    scheduler, _ = warm(largest=2, fixed=0.5)  # fast: 0.2 alone, 0.3 for two
    assert scheduler.load([]) == 0
    assert scheduler.load([("fast", 0.5)]) == pytest.approx(0.4)
    assert scheduler.load([("fast", 0.5)] * 4) == pytest.approx(4 * 0.15 / 0.5)
    assert scheduler.load([("fast", 0.5), ("slow", 2.0)]) == pytest.approx(0.4 + 0.35)


@pytest.mark.parametrize("weight", [0.0, -1.0, math.inf, math.nan])
def test_a_weight_that_is_no_weight_is_refused(weight: float) -> None:
    with pytest.raises(ConfigError, match="weight of tenant 'a'"):
        DeadlineScheduler({"a": weight}, 4)


def test_a_batch_of_nobody_is_refused() -> None:
    with pytest.raises(ConfigError, match="largest_batch: 0"):
        DeadlineScheduler({}, 0)


@pytest.mark.parametrize("time", [math.nan, math.inf, -math.inf])
def test_times_that_are_not_finite_are_refused(time: float) -> None:
    with pytest.raises(InputError, match="deadline of session 's'"):
        Ready("s", "a", "key", time)
    with pytest.raises(InputError, match="now"):
        DeadlineScheduler({}, 4).pick([], time)


@pytest.mark.parametrize(("size", "seconds"), [(0, 1.0), (1, 0.0), (1, -1.0), (1, math.nan), (1, math.inf)])
def test_a_measurement_that_is_none_is_refused(size: int, seconds: float) -> None:
    with pytest.raises(InputError, match="a batch of"):
        BatchCosts().observe("key", size, seconds)


def test_a_session_that_is_ready_twice_is_refused() -> None:
    with pytest.raises(InputError, match="session 's' is there twice"):
        DeadlineScheduler({}, 4).pick([Ready("s", "a", "key", 1.0), Ready("s", "a", "key", 2.0)], 0.0)
