"""Every Prometheus metric of the session service, in base units, without labels that name a session."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

# Dense around one chunk period plus one chunk's compute, where the action-to-frame objective lies.
_LATENCY_BUCKETS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 1.0, 1.25, 1.5, 2.0, 3.0, 5.0, 10.0)
_STAGE_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.0, 5.0)


class Metrics:
    """The metrics of one replica, registered with `registry`."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.time_to_first_frame = Histogram(
            "minwm_time_to_first_frame_seconds",
            "From `open` (or the first credit, if later) to the first chunk handed to the stream.",
            buckets=_LATENCY_BUCKETS,
            registry=registry,
        )
        self.action_to_frame = Histogram(
            "minwm_action_to_frame_seconds",
            "From a control's acceptance to the first chunk that applies it handed to the stream.",
            buckets=_LATENCY_BUCKETS,
            registry=registry,
        )
        self.chunk_duration = Histogram(
            "minwm_chunk_duration_seconds",
            "Time a chunk spends in a stage: denoise, decode, encode, or context (off the action-to-frame path).",
            ["stage"],
            buckets=_STAGE_BUCKETS,
            registry=registry,
        )
        self.warm_up = Gauge(
            "minwm_warm_up_seconds",
            "Time the engine was warmed up for, before the replica was ready.",
            registry=registry,
        )
        self.sessions = Gauge("minwm_sessions", "Open sessions.", registry=registry)
        self.slots = Gauge("minwm_session_slots", "Session slots that are free or used.", ["state"], registry=registry)
        self.chunks = Counter("minwm_chunks_total", "Chunks handed to streams.", registry=registry)
        self.ends = Counter(
            "minwm_session_ends_total",
            "Sessions ended, by reason: closed, disconnected, idle or error.",
            ["reason"],
            registry=registry,
        )
        self.credit_stall = Counter(
            "minwm_credit_stall_seconds_total", "Time sessions waited for their client's credit.", registry=registry
        )

    def count_sessions(self, *, used: int, free: int) -> None:
        """Set the gauges after a session came or went."""
        self.sessions.set(used)
        self.slots.labels("used").set(used)
        self.slots.labels("free").set(free)
