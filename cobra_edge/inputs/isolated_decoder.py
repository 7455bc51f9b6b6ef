"""The process that decodes one image: the file on stdin, one line of JSON and the pixels on stdout. See isolated_decoding.

Run by path: nothing of this package is imported, so that it starts quickly.
"""

from __future__ import annotations

import io
import json
import resource
import sys
from typing import Any


def _limit(limits: dict[str, int]) -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (limits["cpu_seconds"], limits["cpu_seconds"] + 1))  # SIGXCPU, then SIGKILL
    resource.setrlimit(resource.RLIMIT_AS, (limits["memory_bytes"], limits["memory_bytes"]))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def decode(data: bytes, kind: str, max_pixels: int) -> tuple[dict[str, Any], bytes]:
    """Return what the first line says, and the pixels."""
    from PIL import Image, UnidentifiedImageError

    if kind == "HEIC":
        import pillow_heif  # type: ignore[import-not-found, unused-ignore]

        pillow_heif.register_heif_opener()
        kind = "HEIF"
    Image.MAX_IMAGE_PIXELS = None  # counted here
    try:
        image = Image.open(io.BytesIO(data), formats=(kind,))
    except UnidentifiedImageError:  # whose message has nothing but an address
        return {"error": "it ends, or breaks, in its header"}, b""
    if image.width * image.height > max_pixels:
        return {"too_large": True, "size": image.size}, b""
    image.load()
    exif = image.info.get("exif") or b""  # a TIFF has none here, it is turned by `load`
    shown = image.convert("RGBA") if image.mode in ("P", "PA") or "transparency" in image.info else image
    return {"mode": shown.mode, "size": shown.size, "exif": exif.hex()}, shown.tobytes()


def main(arguments: list[str]) -> None:
    """Decode what is on stdin."""
    kind, limits = arguments[0], json.loads(arguments[1])
    _limit(limits)
    try:
        said, pixels = decode(sys.stdin.buffer.read(), kind, limits["pixels"])
    except Exception as error:  # whatever a plugin of pillow's raises: this process has no other way to say it
        said, pixels = {"error": str(error) or type(error).__name__}, b""
    sys.stdout.buffer.write(json.dumps(said).encode() + b"\n" + pixels)


if __name__ == "__main__":
    main(sys.argv[3:])
