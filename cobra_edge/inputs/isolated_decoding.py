"""Formats whose decoders cannot be bounded from outside are decoded in a child process, which the kernel ends.

An AV1 or HEVC frame may hide thousands of others, a TIFF may have any other format inside, and their libraries decode a file in
one call. The child may use so much processor time and memory, and if it crashes the caller does not. It costs some 0.1 s.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import msgspec
from PIL import Image

from ..errors import InputError, MachineError

ISOLATED = ("AVIF", "HEIC", "TIFF")
MEMORY_BYTES = 4 << 30  # of address space: 64 megapixels in 16 bits, twice, beside a dozen threads
_WAIT_SECONDS = 120.0  # in which a child uses its processor time up, on a machine that is busy with other things

# The child has the parent's import path, and nothing of this package but the one file: importing all of it takes longer.
_START = "import json, runpy, sys; sys.path[:] = json.loads(sys.argv[1]); runpy.run_path(sys.argv[2], run_name='__main__')"
_CHILD = Path(__file__).with_name("isolated_decoder.py")


class Limits(msgspec.Struct, frozen=True):
    """What a child may use: processor time of all its threads together, address space, pixels."""

    cpu_seconds: int
    pixels: int
    memory_bytes: int = MEMORY_BYTES


class _Decoded(msgspec.Struct, frozen=True):
    """What a child says first, on one line; the pixels follow as `Image.tobytes` gives them."""

    mode: str = ""
    size: tuple[int, int] = (0, 0)
    exif: str = ""  # hexadecimal
    error: str = ""
    too_large: bool = False


def decode_isolated(data: bytes, kind: str, limits: Limits, name: str) -> Image.Image:
    """Decode a file in a process of its own.

    Args:
        data: the file.
        kind: its format, one of ISOLATED.
        limits: what decoding may use.
        name: what messages call it.

    Raises:
        InputError: damaged, too large, or more work than the limits allow. MachineError: no process to be had.
        OSError: as pillow raises for damaged files, with the decoder's reason.
    """
    arguments = [json.dumps(sys.path), str(_CHILD), kind, msgspec.json.encode(limits).decode()]
    try:
        done = subprocess.run(
            [sys.executable, "-c", _START, *arguments],
            input=data,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # libraries write there whatever a file makes them
            timeout=_WAIT_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise InputError(f"{name}: its decoder did not end in {_WAIT_SECONDS:.0f} s; {_SAVE_AGAIN}") from error
    except OSError as error:
        raise MachineError(f"{name}: no process to decode it in ({error.strerror}); close other programs") from error
    if done.returncode == -signal.SIGXCPU:
        raise InputError(f"{name}: takes more than {limits.cpu_seconds} s to decode; {_SAVE_AGAIN}")
    if done.returncode:
        raise InputError(f"{name}: its decoder crashed (exit code {done.returncode}); {_SAVE_AGAIN}")
    head, _, pixels = done.stdout.partition(b"\n")
    said = msgspec.json.decode(head, type=_Decoded)
    if said.too_large:
        raise InputError(f"{name}: {said.size[0]} × {said.size[1]} pixels, at most {limits.pixels:,} are read; scale it down")
    if said.error:
        raise OSError(said.error)
    image = Image.frombytes(said.mode, said.size, pixels)
    if said.exif:
        image.info["exif"] = bytes.fromhex(said.exif)
    return image


_SAVE_AGAIN = "save it again as JPEG or PNG"
