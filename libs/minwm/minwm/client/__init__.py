"""The client of the session service: sessions over gRPC, frames decoded, latencies measured at this end."""

from minwm.client.session import (
    ClientSession,
    ModelInfo,
    PlayedChunk,
    ReceivedChunk,
    ServerTimings,
    SessionClient,
)

__all__ = ["ClientSession", "ModelInfo", "PlayedChunk", "ReceivedChunk", "ServerTimings", "SessionClient"]
