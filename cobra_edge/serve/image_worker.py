"""Child process of the server that decodes images, one after the other: `python -m cobra_edge.serve.image_worker`.

A file that slows down or crashes a decoder affects only this process, which the server can kill at any time; a thread inside a
C library cannot be killed. The process exits at the end of its input, and where a file exceeds its time.

It reads a `Setup`, then `Job`s, and answers each with a `Decoded` or a `Failed`. A message is its length, then msgpack.
"""

from __future__ import annotations

import io
import signal
import sys
from collections.abc import Iterator, Sequence
from typing import BinaryIO

import msgspec
from PIL import Image

from ..errors import InputError, MachineError
from ..inputs.contact_sheet import contact_sheet
from ..inputs.image import DAMAGED, FORMATS, ImageTransform, load_image

LENGTH_BYTES = 8  # of the length before a message, little-endian


class Setup(msgspec.Struct, frozen=True):
    """Parameters of all jobs.

    Attributes:
        transform: from an image to the input of the vision graph.
        max_pixels: limit of an image.
        max_seconds: limit for one job, enforced by SIGALRM, which ends the process.
    """

    transform: ImageTransform
    max_pixels: int
    max_seconds: float


class Job(msgspec.Struct, frozen=True):
    """The contents of image files, one or more; several become a contact sheet."""

    files: tuple[bytes, ...]


class Decoded(msgspec.Struct, frozen=True, tag=True):
    """The bytes, in C order, of what `ImageTransform.pixels` returned."""

    pixels: bytes


class Failed(msgspec.Struct, frozen=True, tag=True):
    """Why there are no pixels; the fields are those of `errors.ApiError`."""

    status: int
    message: str
    code: str


Reply = Decoded | Failed


def packed(message: msgspec.Struct) -> bytes:
    """Return a message with its length before it."""
    body = msgspec.msgpack.encode(message)
    return len(body).to_bytes(LENGTH_BYTES, "little") + body


def decode(setup: Setup, files: Sequence[bytes]) -> Reply:
    """Decode and transform an image file, or several as a contact sheet."""
    file = files[0]

    def images() -> Iterator[Image.Image]:
        nonlocal file
        for number, file in enumerate(files, 1):
            yield load_image(file, setup.max_pixels, "the image" if len(files) == 1 else f"image {number}")

    try:
        image = next(images()) if len(files) == 1 else contact_sheet(images(), len(files), setup.transform.image_size)
        return Decoded(setup.transform.pixels(image).tobytes())
    except InputError as error:
        if _has_more_pixels(file, setup.max_pixels):
            message = f"the image has too many pixels, the maximum is {setup.max_pixels:,} pixels; scale it down"
            return Failed(413, message, "image_too_large")
        return Failed(400, f"messages: {error}", "invalid_image")
    except MachineError as error:
        return Failed(500, str(error), "decoder_failed")


def _has_more_pixels(file: bytes, max_pixels: int) -> bool:
    """Whether the header of a rejected image has more pixels than the limit, which has its own status."""
    try:
        with Image.open(io.BytesIO(file), formats=FORMATS) as image:
            return image.size[0] * image.size[1] > max_pixels
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        return True
    except DAMAGED:
        return False


def _read(stream: BinaryIO) -> bytes:
    """Return the next message; empty at the end of the input."""
    length = int.from_bytes(stream.read(LENGTH_BYTES), "little")
    return stream.read(length)


def main() -> None:
    """Decode until the input ends."""
    received, sent = sys.stdin.buffer, sys.stdout.buffer
    setup = msgspec.msgpack.decode(_read(received), type=Setup)
    while body := _read(received):
        signal.setitimer(
            signal.ITIMER_REAL, setup.max_seconds
        )  # without a handler the signal ends the process, inside C code too
        reply = decode(setup, msgspec.msgpack.decode(body, type=Job).files)
        signal.setitimer(signal.ITIMER_REAL, 0)
        sent.write(packed(reply))
        sent.flush()


if __name__ == "__main__":
    main()
