"""Image decoding in child processes, away from the event loop and the decoder thread.

There are two. An address uses one at a time, so a slow image leaves the other to the other clients. Where a client disconnects,
or its deadline passes, its child is killed; the next image starts another.
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
from .errors import ApiError
from .fair_slots import FairSlots
from .image_worker import LENGTH_BYTES, Decoded, Job, Reply, Setup, packed
from .limits import Limits
from .scheduler import shutting_down

log = logging.getLogger(__name__)

_WORKERS = 2
_END_SECONDS = 5.0  # for a child to exit after it has closed its output
_COMMAND = ("-m", "cobra_edge.serve.image_worker")


class ImageDecoder:
    """Decodes images in child processes. For one event loop, on which it must be closed."""

    def __init__(self, transform: ImageTransform, limits: Limits, workers: int = _WORKERS) -> None:
        """Create the decoder; no process is started yet."""
        self._transform = transform
        self._setup = packed(Setup(transform, limits.image_pixels, limits.decode_seconds))
        self._seconds = limits.decode_seconds
        self._slots = FairSlots(workers, max(1, workers - 1))
        self._idle: list[asyncio.subprocess.Process] = []
        self._ended: set[asyncio.Task[int]] = set()
        self._working: set[asyncio.Future[np.ndarray]] = set()
        self._closed = False

    async def start(self) -> None:
        """Start a child before the first image."""
        self._idle.append(await self._spawn())

    async def decode(self, owner: str, *files: bytes) -> np.ndarray:
        """Decode an image file, or several as a contact sheet.

        Args:
            owner: address of the client, for fairness.
            files: contents of the files, untrusted.

        Returns:
            What `ImageTransform.pixels` returns for the image: (1, 3·n_encoders, image_size, image_size) float32 or
            (n_squares, image_size, image_size, 3) uint8.

        Raises:
            ApiError: 400 not an image, too slow, or a crash of the decoder; 413 too many pixels; 503 out of memory, or the
                server shuts down.
        """
        if self._closed:
            raise shutting_down()
        working = asyncio.ensure_future(self._decode(owner, files))
        self._working.add(working)
        try:
            return await working
        except asyncio.CancelledError:
            if self._closed:
                raise shutting_down() from None
            raise
        finally:
            self._working.discard(working)

    async def _decode(self, owner: str, files: tuple[bytes, ...]) -> np.ndarray:
        async with self._slots.hold(owner):
            child = await self._child()
            try:
                reply = await _exchange(child, files)
            except (asyncio.IncompleteReadError, ConnectionError):
                raise self._api_error(await _exit_code(child)) from None
            except BaseException:  # cancelled: a call inside a library cannot be
                self._kill(child)
                raise
            self._idle.append(child)
        if not isinstance(reply, Decoded):
            raise ApiError(reply.status, reply.message, reply.code, "messages")
        dtype = np.uint8 if self._transform.input == "uint8" else np.float32
        return np.frombuffer(bytearray(reply.pixels), dtype).reshape(self._transform.shape)

    def reject_all(self) -> None:
        """Decode no more: running and queued images get 503."""
        self._closed = True
        for working in self._working:
            working.cancel()

    async def close(self) -> None:
        """Reject all images and end the children."""
        self.reject_all()
        await asyncio.gather(*self._working, return_exceptions=True)
        for child in self._idle:
            self._kill(child)
        self._idle.clear()
        await asyncio.gather(*self._ended)

    async def _child(self) -> asyncio.subprocess.Process:
        """Return an idle child, or start one."""
        while self._idle:
            child = self._idle.pop()
            if child.returncode is None:
                return child
        return await self._spawn()

    async def _spawn(self) -> asyncio.subprocess.Process:
        pipe, devnull = asyncio.subprocess.PIPE, asyncio.subprocess.DEVNULL
        # Without stderr, where libraries write warnings about a file: a client could fill the log. In a session of its own, so
        # that Ctrl-C reaches only the server.
        child = await asyncio.create_subprocess_exec(
            sys.executable, *_COMMAND, stdin=pipe, stdout=pipe, stderr=devnull, start_new_session=True
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

    def _api_error(self, code: int) -> ApiError:
        """Return the error for an image that ended the child, by its exit code."""
        if code == -signal.SIGALRM:
            message = (
                f"decoding the image takes more than {self._seconds:g} s; scale it down, or send it as PNG or baseline JPEG"
            )
            return ApiError(400, message, "invalid_image", "messages")
        log.warning("the process that decoded an image ended with code %d", code)
        if code == -signal.SIGKILL:
            message = "the server has no memory for this image; scale it down, or retry later"
            return ApiError(503, message, "out_of_memory", "messages", headers={"Retry-After": "5"})
        return ApiError(400, "the image crashes its decoder; save it again as PNG", "invalid_image", "messages")


async def _exchange(child: asyncio.subprocess.Process, files: tuple[bytes, ...]) -> Reply:
    assert child.stdin is not None and child.stdout is not None
    child.stdin.write(packed(Job(files)))
    await child.stdin.drain()
    length = int.from_bytes(await child.stdout.readexactly(LENGTH_BYTES), "little")
    return msgspec.msgpack.decode(await child.stdout.readexactly(length), type=Reply)


async def _exit_code(child: asyncio.subprocess.Process) -> int:
    """Return the exit code of a child whose output has ended; it is killed after a timeout.

    It is not killed at once: before a signal, Python polls the child and takes its exit code away from asyncio.
    """
    assert child.stdin is not None
    child.stdin.close()
    try:
        return await asyncio.wait_for(child.wait(), _END_SECONDS)
    except asyncio.TimeoutError:
        child.kill()
        return await child.wait()
