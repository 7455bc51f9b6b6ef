"""Decoding in a child process with limits on CPU time and memory, for formats whose cost cannot be bounded beforehand.

An AV1 or HEVC frame may contain thousands of others, a TIFF any other format, and their libraries decode a file in one call. A
crash affects only the child. The process costs about 0.1 s.
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
MEMORY_BYTES = 4 << 30  # address space: 64 megapixels of 16 bits, twice, and a dozen threads
_WAIT_SECONDS = 120.0  # wall time in which a child uses up its CPU time on a busy machine

# The child gets the parent's import path and runs one file: importing the package would take longer.
_START = "import json, runpy, sys; sys.path[:] = json.loads(sys.argv[1]); runpy.run_path(sys.argv[2], run_name='__main__')"
_CHILD = Path(__file__).with_name("isolated_decoder.py")


class Limits(msgspec.Struct, frozen=True):
    """Limits of a child: CPU time of all threads, address space, pixels."""

    cpu_seconds: int
    pixels: int
    memory_bytes: int = MEMORY_BYTES


class _Decoded(msgspec.Struct, frozen=True):
    """First line of a child's output, JSON; then follow the pixels, as `Image.tobytes` returns them."""

    mode: str = ""
    size: tuple[int, int] = (0, 0)
    exif: str = ""  # hexadecimal
    error: str = ""
    too_large: bool = False


def decode_isolated(data: bytes, kind: str, limits: Limits, name: str) -> Image.Image:
    """Decode a file in a child process.

    Args:
        data: content of the file.
        kind: its format, one of ISOLATED.
        limits: of the child.
        name: of the image in messages.

    Raises:
        InputError: damaged, too large, or beyond the limits.
        MachineError: the process cannot be started.
        OSError: damaged; raised like pillow's errors, with the decoder's reason.
    """
    arguments = [json.dumps(sys.path), str(_CHILD), kind, msgspec.json.encode(limits).decode()]
    try:
        done = subprocess.run(
            [sys.executable, "-c", _START, *arguments],
            input=data,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # libraries write warnings about the file
            timeout=_WAIT_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise InputError(f"{name}: its decoder did not finish in {_WAIT_SECONDS:.0f} s; {_SAVE_AGAIN}") from error
    except OSError as error:
        raise MachineError(f"{name}: cannot start a process to decode it ({error.strerror}); close other programs") from error
    if done.returncode == -signal.SIGXCPU:
        raise InputError(f"{name}: takes more than {limits.cpu_seconds} s to decode; {_SAVE_AGAIN}")
    if done.returncode:
        raise InputError(f"{name}: its decoder crashed (exit code {done.returncode}); {_SAVE_AGAIN}")
    head, _, pixels = done.stdout.partition(b"\n")
    result = msgspec.json.decode(head, type=_Decoded)
    if result.too_large:
        raise InputError(f"{name}: {result.size[0]} × {result.size[1]} pixels, the maximum is {limits.pixels:,}; scale it down")
    if result.error:
        raise OSError(result.error)
    image = Image.frombytes(result.mode, result.size, pixels)
    if result.exif:
        image.info["exif"] = bytes.fromhex(result.exif)
    return image


_SAVE_AGAIN = "save it again as JPEG or PNG"
