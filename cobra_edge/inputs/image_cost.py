"""Bounds on the cost of decoding, from the structure of an image file, before a decoder runs.

The number of pixels bounds the work of a decoder only where each is visited a few times. A progressive JPEG of 100 kB may have
a thousand scans over all pixels; a PNG thousands of compressed profiles, a GIF millions of comments. Such structure is counted
here, by reading markers and lengths only, in time linear in the file size.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field

from ..errors import InputError

MAX_PIXELS = 64_000_000  # a 64-megapixel photograph; anything larger is a mistake or a decompression bomb
# The usual progressive colour JPEG has 10 scans, of 14 components in all.
_JPEG_SCANS, _JPEG_SEGMENTS, _JPEG_VISITS = 200, 10_000, 20 * MAX_PIXELS
_PNG_DATA, _PNG_OTHERS, _PNG_COMPRESSED = 100_000, 10_000, 64  # chunks; libpng writes 8 KiB of data in each
_GIF_BLOCKS = 4096  # extensions before the first frame, 255 bytes each
_PPM_HEADER_BYTES, _PPM_COMMENTS = 4096, 1000  # pillow reads both byte by byte

# A marker that is not a restart; stuffed 0xFF, fill bytes and garbage before it are skipped, as by libjpeg.
_MARKER = re.compile(rb"\xff([\x01-\xcf\xd8-\xfe])")
_EOI, _SOS = 0xD9, 0xDA
_ALONE = {0x01, 0xD8}  # markers without a length
_SEQUENTIAL, _PROGRESSIVE = {0xC0, 0xC1}, {0xC2}
_FRAMES = set(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}


@dataclass
class JpegStructure:
    """Structure of a JPEG, from its markers.

    Attributes:
        ended: whether the end marker (FF D9) is present.
        kind: marker of the frame header, 0xC0 … 0xCF, or None.
        components: identifiers of the frame's components.
        pixels: number of pixels of the frame.
        scans, segments: their numbers.
        visits: sample visits of all scans; subsampled components count as full ones.
        seen: by component, the coefficients (0: DC) present, and the number of low bits of each still missing.
    """

    ended: bool = False
    kind: int | None = None
    components: list[int] = field(default_factory=list)
    pixels: int = 0
    scans: int = 0
    segments: int = 0
    visits: int = 0
    seen: dict[int, dict[int, int]] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        """Whether the scans contain every bit of every coefficient of all components."""
        wanted = set(range(64)) if self.kind in _PROGRESSIVE else {0}
        return bool(self.components) and all(
            wanted <= (got := self.seen.get(c, {})).keys() and not any(got.values()) for c in self.components
        )


def require_bounded(data: bytes, kind: str | None, name: str) -> None:
    """Reject a file whose structure needs excessive work to decode.

    Args:
        data: content of the file.
        kind: format, see `image_format`; formats without a check pass.
        name: of the image in messages.

    Raises:
        InputError: too many scans, segments, chunks or blocks, or a JPEG in a rare coding.
    """
    check = _CHECKS.get(kind or "")
    why = None if check is None else check(data)
    if why is not None:
        raise InputError(f"{name}: {why}; save it again as a plain {kind}")


def jpeg_structure(data: bytes) -> JpegStructure:
    """Parse the markers of a JPEG, to its end or to the limits.

    Source: ITU-T T.81, B.1 and B.2
    """
    found, at = JpegStructure(), 2
    while found.segments <= _JPEG_SEGMENTS and found.scans <= _JPEG_SCANS:
        match = _MARKER.search(data, at)
        if match is None:
            break
        marker, at = match[1][0], match.end()
        if marker == _EOI:
            found.ended = True
            break
        if marker in _ALONE:
            continue
        length = int.from_bytes(data[at : at + 2], "big")
        body, at = data[at + 2 : at + length], at + max(length, 2)
        found.segments += 1
        if marker in _FRAMES:
            _note_frame(found, marker, body)
        elif marker == _SOS:
            _note_scan(found, body)
    return found


def _note_frame(found: JpegStructure, marker: int, body: bytes) -> None:
    found.kind = marker
    found.pixels = max(found.pixels, int.from_bytes(body[1:3], "big") * int.from_bytes(body[3:5], "big"))
    found.components = list(body[6::3])


def _note_scan(found: JpegStructure, body: bytes) -> None:
    n = body[0] if body else 0
    components, (first, last, bits) = body[1 : 1 + 2 * n : 2], (body[1 + 2 * n : 4 + 2 * n] + b"\0\0\0")[:3]
    found.scans += 1
    found.visits += found.pixels * max(len(components), 1)
    for component in components:
        coefficients = found.seen.setdefault(component, {})
        for index in range(first, min(last, 63) + 1) if found.kind in _PROGRESSIVE else (0,):
            coefficients[index] = bits & 15 if found.kind in _PROGRESSIVE else 0


def _jpeg(data: bytes) -> str | None:
    found = jpeg_structure(data)
    if found.kind is not None and found.kind not in _SEQUENTIAL | _PROGRESSIVE:
        return "a JPEG in a rare coding (lossless, hierarchical or arithmetic)"
    if found.segments > _JPEG_SEGMENTS:
        return f"a JPEG of more than {_JPEG_SEGMENTS:,} segments"
    if found.scans > _JPEG_SCANS:
        return f"a JPEG of more than {_JPEG_SCANS} scans"
    if found.visits > _JPEG_VISITS:
        return f"a JPEG of {found.scans} scans over {found.pixels:,} pixels, which takes too long to decode"
    return None


def _png(data: bytes) -> str | None:
    """Count chunks. Source: PNG specification, 5.3."""
    at, n_data, n_others, n_compressed, n_profiles = 8, 0, 0, 0, 0
    while at + 8 <= len(data):
        length, kind = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8]
        n_data += kind == b"IDAT"
        n_others += kind != b"IDAT"
        n_compressed += kind in (b"iCCP", b"zTXt", b"iTXt")
        n_profiles += kind == b"iCCP"
        if n_profiles > 1:
            return "a PNG of more than one colour profile"
        if n_compressed > _PNG_COMPRESSED:
            return f"a PNG of more than {_PNG_COMPRESSED} compressed texts"
        if n_data > _PNG_DATA or n_others > _PNG_OTHERS:
            return f"a PNG of more than {_PNG_DATA:,} data chunks or {_PNG_OTHERS:,} others"
        if kind == b"IEND":
            break
        at += 12 + length
    return None


def _gif(data: bytes) -> str | None:
    """Count the blocks before the first frame, the only one decoded. Source: GIF89a, sections 15 to 26."""
    if len(data) < 13:
        return None
    at, blocks = 13 + (3 << ((data[10] & 7) + 1) if data[10] & 0x80 else 0), 0
    while at < len(data) and data[at] not in b",;" and blocks <= _GIF_BLOCKS:
        is_extension, blocks = data[at] == 0x21, blocks + 1
        at += 1
        if not is_extension:  # garbage, which pillow skips byte by byte
            continue
        at += 1  # its label
        while at < len(data) and data[at] and blocks <= _GIF_BLOCKS:
            at += 1 + data[at]
            blocks += 1
        at += 1
    return f"a GIF of more than {_GIF_BLOCKS:,} blocks before its first frame" if blocks > _GIF_BLOCKS else None


def _ppm(data: bytes) -> str | None:
    """Count comments. Source: netpbm manual pages ppm(5), pgm(5), pbm(5)."""
    numbers = re.sub(rb"#[^\r\n]*[\r\n]?", b" ", data[:_PPM_HEADER_BYTES]).split(maxsplit=4)
    if len(data) > _PPM_HEADER_BYTES and len(numbers) < (3 if data[1:2] in b"14" else 4):
        return f"a PPM whose header is longer than {_PPM_HEADER_BYTES:,} bytes"
    if data[1:2] in b"123" and data.count(b"#") > _PPM_COMMENTS:
        return f"a PPM of more than {_PPM_COMMENTS:,} comments"
    return None


_CHECKS: dict[str, Callable[[bytes], str | None]] = {"JPEG": _jpeg, "PNG": _png, "GIF": _gif, "PPM": _ppm}
