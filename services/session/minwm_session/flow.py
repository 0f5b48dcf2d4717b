"""A session's flow control: chunks the client granted, and when to give up on a silent one."""

import asyncio

from minwm_session.errors import ProtocolError

MAX_CREDITS = 1024


class IdleError(Exception):
    """No message came and no credit was left for longer than the service waits."""


class Credits:
    """Chunks granted and not yet taken. Times are the event loop's, in seconds."""

    def __init__(self, chunks: int, *, idle_seconds: float) -> None:
        self._left = 0
        self._idle_seconds = idle_seconds
        self._heard_at = asyncio.get_running_loop().time()
        self._changed = asyncio.Event()
        self.grant("open.credits", chunks)

    def heard(self) -> None:
        """The client sent something: it is not idle."""
        self._heard_at = asyncio.get_running_loop().time()

    def grant(self, field: str, chunks: int) -> None:
        """Allow further chunks. Raises ProtocolError, naming `field`, beyond MAX_CREDITS outstanding."""
        if self._left + chunks > MAX_CREDITS:
            raise ProtocolError(field, f"{self._left + chunks} chunks outstanding, expected at most {MAX_CREDITS}")
        self._left += chunks
        self._changed.set()

    async def take(self) -> None:
        """Wait for a credit and use it up.

        Raises IdleError when the wait, and the client's silence, last longer than `idle_seconds`.
        """
        loop = asyncio.get_running_loop()
        waiting_since = loop.time()
        while not self._left:
            self._changed.clear()
            try:
                async with asyncio.timeout_at(max(self._heard_at, waiting_since) + self._idle_seconds):
                    await self._changed.wait()
            except TimeoutError:
                if loop.time() >= self._heard_at + self._idle_seconds:
                    raise IdleError from None
        self._left -= 1
