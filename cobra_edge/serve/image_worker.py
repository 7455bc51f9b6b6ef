"""A child process of the server that decodes images, one after the other: `python -m cobra_edge.serve.image_worker`.

A file that makes a decoder slow, or crashes it, does so to this process alone, which the server can end at any time; a thread
inside a C library could not be. It ends by itself when its input does, and when a file takes longer than it may.

It reads a `Setup`, then `Job`s, and answers each with a `Decoded` or a `Refused`. Every message is msgpack behind its length.
"""

from __future__ import annotations

import io
import signal
import sys
from typing import BinaryIO

import msgspec
from PIL import Image

from ..errors import InputError, MachineError
from ..inputs.image import DAMAGED, FORMATS, ImageTransform, load_image

LENGTH_BYTES = 8  # of a message, in front of it, little-endian


class Setup(msgspec.Struct, frozen=True):
    """What all jobs have in common.

    Attributes:
        transform: from an image to the pixels that the vision graph takes.
        max_pixels: an image of more is refused.
        max_seconds: an image that takes longer ends the process, by SIGALRM.
    """

    transform: ImageTransform
    max_pixels: int
    max_seconds: float


class Job(msgspec.Struct, frozen=True):
    """An image's file."""

    file: bytes


class Decoded(msgspec.Struct, frozen=True, tag=True):
    """What `ImageTransform.pixels` returned, its bytes in C order."""

    pixels: bytes


class Refused(msgspec.Struct, frozen=True, tag=True):
    """Why there are no pixels; the fields are those of a `errors.Refusal`."""

    status: int
    message: str
    code: str


Reply = Decoded | Refused


def packed(message: msgspec.Struct) -> bytes:
    """Return a message with its length in front."""
    body = msgspec.msgpack.encode(message)
    return len(body).to_bytes(LENGTH_BYTES, "little") + body


def decode(setup: Setup, file: bytes) -> Reply:
    """Decode an image's file and transform it."""
    try:
        return Decoded(setup.transform.pixels(load_image(file, setup.max_pixels, "the image")).tobytes())
    except InputError as error:
        if _has_more_pixels(file, setup.max_pixels):
            message = f"the image has too many pixels, at most {setup.max_pixels:,} pixels are read; scale it down"
            return Refused(413, message, "image_too_large")
        return Refused(400, f"messages: {error}", "invalid_image")
    except MachineError as error:
        return Refused(500, str(error), "decoder_failed")


def _has_more_pixels(file: bytes, max_pixels: int) -> bool:
    """Say whether the head of an image that was refused has more pixels than are read: such a one has a status of its own."""
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
        signal.setitimer(signal.ITIMER_REAL, setup.max_seconds)  # not handled: the signal ends the process, inside C, too
        reply = decode(setup, msgspec.msgpack.decode(body, type=Job).file)
        signal.setitimer(signal.ITIMER_REAL, 0)
        sent.write(packed(reply))
        sent.flush()


if __name__ == "__main__":
    main()
