"""Image format by the first bytes of a file: the supported formats, and advice for others."""

from __future__ import annotations

import importlib.util
import re

from PIL import Image

try:
    from PIL import AvifImagePlugin  # pillow 11.3 and later
except ImportError:
    _HAS_AVIF = False
else:
    _HAS_AVIF = AvifImagePlugin.SUPPORTED

# The supported formats; no other plugin of pillow is used. MPO (several JPEGs in a file, from stereo cameras and phones) is
# JPEG to pillow; its first image is decoded.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM", *(("AVIF",) if _HAS_AVIF else ()))
HEIC = "HEIC"

_MAGIC = (
    (re.compile(rb"\x89PNG\r\n\x1a\n"), "PNG"),
    (re.compile(rb"\xff\xd8\xff"), "JPEG"),
    (re.compile(rb"GIF8[79]a"), "GIF"),
    (re.compile(rb"RIFF....WEBP", re.DOTALL), "WEBP"),
    (re.compile(rb"BM"), "BMP"),
    (re.compile(rb"II[*+]\0|MM\0[*+]"), "TIFF"),
    (re.compile(rb"P[1-6f]\s"), "PPM"),
)
_CONVERT = "convert it to JPEG or PNG"
_OTHERS = (
    (re.compile(rb"\xff\x0a|\0\0\0\x0cJXL "), "JPEG XL", _CONVERT),
    (re.compile(rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51"), "JPEG 2000", _CONVERT),
    (re.compile(rb"\0\0[\x01\x02]\0"), "a Windows icon", _CONVERT),
    (re.compile(rb"8BPS"), "a Photoshop document", _CONVERT),
    (re.compile(rb"%PDF-"), "a PDF document", "render the page to PNG"),
    (re.compile(rb"\s*(<\?xml[^>]*>\s*)?(<!--.*?-->\s*)?<svg", re.DOTALL), "an SVG drawing", "render it to PNG"),
    (re.compile(rb"\s*(<!doctype html|<html)", re.IGNORECASE), "a web page", "save the image itself"),
    (
        re.compile(rb"\x1aE\xdf\xa3|RIFF....AVI |....ftyp", re.DOTALL),
        "a video",
        "extract a frame, or watch it with --camera",
    ),
)
_RAW = {".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf", ".rw2"}  # camera raw; some begin like TIFF
_AVIF_BRANDS = {b"avif", b"avis"}
_HEIC_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs"}


def image_format(data: bytes) -> str | None:
    """Return the format by a file's first bytes: one of FORMATS, "AVIF" even where pillow lacks it, HEIC, or None."""
    head = data[:64]
    for pattern, name in _MAGIC:
        if pattern.match(head):
            return name
    brands = _brands(head)
    if brands & _AVIF_BRANDS:
        return "AVIF"
    return HEIC if brands & _HEIC_BRANDS else None


def why_not_read(data: bytes, kind: str | None) -> str | None:
    """Return why a file of a format (see `image_format`) is not supported, and what to do; None where it is."""
    if kind in FORMATS or (kind == HEIC and reads_heic()):
        return None
    if kind == "AVIF":
        return f"an AVIF image, which this version of pillow does not support; pip install 'pillow>=11.3', or {_CONVERT}"
    if kind == HEIC:
        return f"a HEIC image, which pillow alone does not support; pip install pillow-heif, or {_CONVERT}"
    for pattern, name, advice in _OTHERS:
        if pattern.match(data[:1024]):
            return f"{name}, not a supported image; {advice}"
    what = "not an image" if data else "not an image but an empty file"
    return f"{what}; expected one of {', '.join(FORMATS)}"


def reads_heic() -> bool:
    """Whether pillow-heif, the HEIC plugin of pillow, is installed."""
    return importlib.util.find_spec("pillow_heif") is not None


def _brands(head: bytes) -> set[bytes]:
    """Return the brands of an ISO base media file, which AVIF, HEIC and MP4 are. Source: ISO/IEC 14496-12, 4.3."""
    if head[4:8] != b"ftyp":
        return set()
    box = head[: int.from_bytes(head[:4], "big")]
    return {box[8:12], *(box[at : at + 4] for at in range(16, len(box) - 3, 4))}


def image_endings() -> frozenset[str]:
    """Return the suffixes, such as ".jpg", of image files: supported formats, and others with advice."""
    known = {ending for ending, name in Image.registered_extensions().items() if name in {*FORMATS, "MPO"}}
    return frozenset(known | {".avif", ".heic", ".heif", ".hif", ".jxl", ".jp2", ".psd", ".svg", ".ico"} | _RAW)
