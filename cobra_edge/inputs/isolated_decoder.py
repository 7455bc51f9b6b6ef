"""Child process that decodes one image: the file on stdin, one line of JSON and the pixels on stdout. See isolated_decoding.

It is run by path and imports nothing of this package, so that it starts fast.
"""

from __future__ import annotations

import io
import json
import sys
from typing import Any

try:
    import resource
except ImportError:  # Windows: the parent's limits on pixels and on the time remain
    resource = None  # type: ignore[assignment]


def _limit(limits: dict[str, int]) -> None:
    if resource is not None:
        resource.setrlimit(resource.RLIMIT_CPU, (limits["cpu_seconds"], limits["cpu_seconds"] + 1))  # SIGXCPU, then SIGKILL
        resource.setrlimit(resource.RLIMIT_AS, (limits["memory_bytes"], limits["memory_bytes"]))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def decode(data: bytes, kind: str, max_pixels: int) -> tuple[dict[str, Any], bytes]:
    """Return the first line of output, and the pixels."""
    from PIL import Image, UnidentifiedImageError

    if kind == "HEIC":
        import pillow_heif  # type: ignore[import-not-found, unused-ignore]

        pillow_heif.register_heif_opener()
        kind = "HEIF"
    Image.MAX_IMAGE_PIXELS = None  # checked below
    try:
        image = Image.open(io.BytesIO(data), formats=(kind,))
    except UnidentifiedImageError:  # its message is only an object address
        return {"error": "header incomplete or damaged"}, b""
    if image.width * image.height > max_pixels:
        return {"too_large": True, "size": image.size}, b""
    image.load()
    exif = image.info.get("exif") or b""  # none for a TIFF, which `load` has rotated
    rgb = image.convert("RGBA") if image.mode in ("P", "PA") or "transparency" in image.info else image
    return {"mode": rgb.mode, "size": rgb.size, "exif": exif.hex()}, rgb.tobytes()


def main(arguments: list[str]) -> None:
    """Decode the file on stdin."""
    kind, limits = arguments[0], json.loads(arguments[1])
    _limit(limits)
    try:
        head, pixels = decode(sys.stdin.buffer.read(), kind, limits["pixels"])
    except Exception as error:  # pillow's plugins raise anything; the parent reports it
        head, pixels = {"error": str(error) or type(error).__name__}, b""
    sys.stdout.buffer.write(json.dumps(head).encode() + b"\n" + pixels)


if __name__ == "__main__":
    main(sys.argv[3:])
