"""Images are decoded by child processes, away from the event loop and the decoder's thread.

There are two. An address uses one of them at a time, so an image that takes long leaves the other to everybody else. A client
that goes away, or whose deadline passes, ends the child that works for it; the next image starts another.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
from contextlib import suppress

import msgspec
import numpy as np

from ..inputs.image import ImageTransform
from .errors import Refusal
from .fair_slots import FairSlots
from .image_worker import LENGTH_BYTES, Decoded, Job, Reply, Setup, packed
from .limits import Limits
from .scheduler import shutting_down

log = logging.getLogger(__name__)

_WORKERS = 2
_END_SECONDS = 5.0  # for a child to end when it has closed its output
_COMMAND = ("-m", "cobra_edge.serve.image_worker")


class ImageDecoder:
    """Decodes images in child processes. For one event loop; `close` it there."""

    def __init__(self, transform: ImageTransform, limits: Limits, workers: int = _WORKERS) -> None:
        """Start nothing yet."""
        self._transform = transform
        self._setup = packed(Setup(transform, limits.image_pixels, limits.decode_seconds))
        self._seconds = limits.decode_seconds
        self._slots = FairSlots(workers, max(1, workers - 1))
        self._idle: list[asyncio.subprocess.Process] = []
        self._ended: set[asyncio.Task[int]] = set()
        self._working: set[asyncio.Future[np.ndarray]] = set()
        self._closed = False

    async def start(self) -> None:
        """Start a child before the first image needs it."""
        self._idle.append(await self._started())

    async def decode(self, owner: str, file: bytes) -> np.ndarray:
        """Return what `ImageTransform.pixels` makes of an image's file, of its shape and dtype.

        Args:
            owner: whose turn it is: an address.
            file: of any content.

        Raises:
            Refusal: 400 for what is no image, takes too long or breaks the decoder; 413 for one of too many pixels; 503 where
                there is no memory for it, or the server shuts down.
        """
        if self._closed:
            raise shutting_down()
        working = asyncio.ensure_future(self._decode(owner, file))
        self._working.add(working)
        try:
            return await working
        except asyncio.CancelledError:
            if self._closed:
                raise shutting_down() from None
            raise
        finally:
            self._working.discard(working)

    async def _decode(self, owner: str, file: bytes) -> np.ndarray:
        async with self._slots.hold(owner):
            child = await self._child()
            try:
                reply = await _exchange(child, file)
            except (asyncio.IncompleteReadError, ConnectionError):
                raise self._refusal(await _exit_code(child)) from None
            except BaseException:  # cancelled: what runs inside a library hears of nothing
                self._kill(child)
                raise
            self._idle.append(child)
        if not isinstance(reply, Decoded):
            raise Refusal(reply.status, reply.message, reply.code, "messages")
        dtype = np.uint8 if self._transform.input == "uint8" else np.float32
        return np.frombuffer(bytearray(reply.pixels), dtype).reshape(self._transform.shape)

    def refuse(self) -> None:
        """Decode no more: what is being decoded, or waits to be, is refused."""
        self._closed = True
        for working in self._working:
            working.cancel()

    async def close(self) -> None:
        """End all children."""
        self.refuse()
        await asyncio.gather(*self._working, return_exceptions=True)
        for child in self._idle:
            self._kill(child)
        self._idle.clear()
        await asyncio.gather(*self._ended)

    async def _child(self) -> asyncio.subprocess.Process:
        """Return a child that waits for work."""
        while self._idle:
            child = self._idle.pop()
            if child.returncode is None:
                return child
        return await self._started()

    async def _started(self) -> asyncio.subprocess.Process:
        pipe, nothing = asyncio.subprocess.PIPE, asyncio.subprocess.DEVNULL
        # Libraries write to stderr what they think of a file: any client could fill the log. Ctrl-C reaches the server alone.
        child = await asyncio.create_subprocess_exec(
            sys.executable, *_COMMAND, stdin=pipe, stdout=pipe, stderr=nothing, start_new_session=True
        )
        assert child.stdin is not None
        child.stdin.write(self._setup)
        return child

    def _kill(self, child: asyncio.subprocess.Process) -> None:
        with suppress(ProcessLookupError):
            child.kill()
        ending = asyncio.create_task(_exit_code(child))
        self._ended.add(ending)
        ending.add_done_callback(self._ended.discard)

    def _refusal(self, code: int) -> Refusal:
        """Return what a client is told whose image ended the child, by its exit code."""
        if code == -signal.SIGALRM:
            message = (
                f"decoding the image takes more than {self._seconds:g} s; scale it down, or send it as PNG or baseline JPEG"
            )
            return Refusal(400, message, "invalid_image", "messages")
        log.warning("an image ended the process that decoded it, with code %d", code)
        if code == -signal.SIGKILL:
            message = "the server has no memory left for this image; scale it down, or ask again later"
            return Refusal(503, message, "out_of_memory", "messages", headers={"Retry-After": "5"})
        return Refusal(400, "the image breaks the program that decodes it; save it again, as PNG", "invalid_image", "messages")


async def _exchange(child: asyncio.subprocess.Process, file: bytes) -> Reply:
    assert child.stdin is not None and child.stdout is not None
    child.stdin.write(packed(Job(file)))
    await child.stdin.drain()
    length = int.from_bytes(await child.stdout.readexactly(LENGTH_BYTES), "little")
    return msgspec.msgpack.decode(await child.stdout.readexactly(length), type=Reply)


async def _exit_code(child: asyncio.subprocess.Process) -> int:
    """Return the exit code of a child whose output has ended; it is killed where it does not end with that.

    Not killed at once: before a signal Python looks whether the child has ended, and takes its exit code from asyncio.
    """
    assert child.stdin is not None
    child.stdin.close()
    try:
        return await asyncio.wait_for(child.wait(), _END_SECONDS)
    except asyncio.TimeoutError:
        child.kill()
        return await child.wait()
