"""From an image file to the input of the vision graph, with pillow and numpy only.

The three resize strategies are those of the published code; each is composed of the same pillow operations that timm's
transform ends in, so the two agree. An image file is untrusted: its format is detected from its first bytes, its structure is
checked (`image_cost`), its size is limited, and so is the CPU time of decoding.
"""

from __future__ import annotations

import io
import struct
import time
import warnings
from pathlib import Path

import msgspec
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ..errors import InputError
from ..formats.model_config import CobraConfig
from ..formats.precision import InputForm
from .image_cost import MAX_PIXELS, jpeg_structure, require_bounded
from .image_format import FORMATS, image_format, why_not_read
from .isolated_decoding import ISOLATED, Limits, decode_isolated

MAX_FILE_BYTES = 256 << 20
MAX_PYTHON_PIXELS = 500_000  # of codings that pillow decodes in Python, at a microsecond per value
DECODING_SECONDS = 10  # of CPU time; the largest images take one or two
__all__ = [
    "DAMAGED",
    "FORMATS",
    "MAX_FILE_BYTES",
    "MAX_PIXELS",
    "ImageTransform",
    "Normalisation",
    "load_image",
    "image_bytes",
]
_JPEG_END = b"\xff\xd9"
# Put before a missing end: where image data are missing too, the decoder reads these bytes, and the image changes.
_FILLER_BYTES = bytes(range(170, 234))
# What pillow raises for damaged files, besides UnidentifiedImageError.
DAMAGED = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    TypeError,
    KeyError,
    OverflowError,
    MemoryError,
    struct.error,
)


class Normalisation(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Means and standard deviations of the channels of one encoder, for values in 0..1."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]


class ImageTransform(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """From an image to the input of the vision graph; image.json of a bundle.

    Attributes:
        image_size: side of an encoder's square input, in pixels.
        resize_strategy: one of `model_config.RESIZE_STRATEGIES`.
        encoders: normalisation of each.
        input: "float32" for normalised pixels, or "uint8" for squares that the graph normalises itself.
    """

    image_size: int
    resize_strategy: str
    encoders: tuple[Normalisation, ...]
    input: InputForm = "float32"

    @classmethod
    def of(cls, config: CobraConfig, form: InputForm = "float32") -> ImageTransform:
        """Return the transform of a model with vision."""
        assert config.vision is not None
        encoders = tuple(Normalisation(e.mean, e.std) for e in config.vision.encoders)
        return cls(config.vision.image_size, config.image_resize_strategy, encoders, form)

    @property
    def n_squares(self) -> int:
        """Number of different squares: letterbox pads with the mean colour of each encoder."""
        return len(self.encoders) if self.resize_strategy == "letterbox" else 1

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Shape of the array that `pixels` returns."""
        if self.input == "uint8":
            return self.n_squares, self.image_size, self.image_size, 3
        return 1, 3 * len(self.encoders), self.image_size, self.image_size

    def pixels(self, image: Image.Image) -> np.ndarray:
        """Transform an RGB image into the input of the vision graph.

        Returns:
            (1, 3·n_encoders, image_size, image_size) float32, normalised per encoder; or, where `input` is "uint8",
            (n_squares, image_size, image_size, 3) uint8.
        """
        squares = np.stack([np.asarray(self.square(image, e)) for e in self.encoders[: self.n_squares]])
        return squares if self.input == "uint8" else self.normalised(squares)

    def normalised(self, squares: np.ndarray) -> np.ndarray:
        """Normalise squares (n_squares, size, size, 3) uint8 per encoder: (1, 3·n_encoders, size, size) float32."""
        parts = []
        for index, encoder in enumerate(self.encoders):
            values = squares[index % self.n_squares].astype(np.float32).transpose(2, 0, 1) / 255
            mean, std = (np.array(v, np.float32)[:, None, None] for v in (encoder.mean, encoder.std))
            parts.append((values - mean) / std)
        return np.concatenate(parts)[None]

    def square(self, image: Image.Image, encoder: Normalisation) -> Image.Image:
        """Resize an RGB image to image_size × image_size; letterbox pads with the encoder's mean colour."""
        size = self.image_size
        if self.resize_strategy == "resize-naive":
            return image.resize((size, size), Image.Resampling.BICUBIC)
        if self.resize_strategy == "letterbox":
            width, height = image.size
            side = max(width, height)
            _require_pixels(side, side, f"{width} × {height} pixels padded to a square")
            left, top = (side - width) // 2, (side - height) // 2
            fill = tuple(int(m * 255) for m in encoder.mean)
            image = ImageOps.expand(image, (left, top, left, top), fill)
        return _shorter_side_and_crop(image, size)


def _require_pixels(width: int, height: int, what: str) -> None:
    if width * height > MAX_PIXELS:
        raise InputError(f"the image: {what} result in {width} × {height}, the maximum is {MAX_PIXELS:,}; crop it")


def _shorter_side_and_crop(image: Image.Image, size: int) -> Image.Image:
    """Resize the shorter side to `size`, then crop the center; rounding as in torchvision."""
    width, height = image.size
    if width <= height:
        wide, high = size, int(size * height / width)
    else:
        wide, high = int(size * width / height), size
    _require_pixels(wide, high, f"{width} × {height} pixels scaled until the shorter side is {size}")
    image = image.resize((wide, high), Image.Resampling.BICUBIC)
    left, top = round((wide - size) / 2), round((high - size) / 2)
    return image.crop((left, top, left + size, top + size))


def load_image(source: Path | bytes | Image.Image, max_pixels: int = MAX_PIXELS, name: str | None = None) -> Image.Image:
    """Decode an image to RGB: EXIF orientation applied, transparency over white, 16 bits reduced to 8.

    A JPEG that lacks only its end marker is accepted.

    Args:
        source: a file, its bytes, or an opened image.
        max_pixels: limit; at most MAX_PIXELS.
        name: of the image in messages; None for the path, or "the image".

    Raises:
        InputError: unknown format, truncated, damaged, too large, or too expensive to decode.
        MachineError: a process for decoding cannot be started.
    """
    name = name or (str(source) if isinstance(source, Path) else "the image")
    if not isinstance(source, Path | bytes | Image.Image):
        raise InputError(f"{name}: a {type(source).__name__}, expected a path, a file's bytes, a pillow image or a numpy array")
    limit = min(max_pixels, MAX_PIXELS)
    opened = image_bytes(source) if isinstance(source, Path) else source
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            warnings.filterwarnings("ignore", category=UserWarning, module="PIL")
            image = _decode(opened, limit, name) if isinstance(opened, bytes) else _load_pixels(opened, limit, name)
            return _to_rgb(ImageOps.exif_transpose(image))
    except UnidentifiedImageError as error:
        raise InputError(f"{name}: truncated or damaged image (header incomplete or damaged)") from error
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise InputError(f"{name}: more than {MAX_PIXELS:,} pixels; scale it down") from error
    except DAMAGED as error:
        raise InputError(f"{name}: truncated or damaged image ({error})") from error


def _decode(data: bytes, limit: int, name: str) -> Image.Image:
    """Decode a file in the format of its first bytes, after a check of its structure."""
    kind = image_format(data)
    why = why_not_read(data, kind)
    if why is not None:
        raise InputError(f"{name}: {why}")
    require_bounded(data, kind, name)
    assert kind is not None
    if kind in ISOLATED:
        return decode_isolated(data, kind, Limits(DECODING_SECONDS, limit), name)
    if kind == "JPEG":
        found = jpeg_structure(data)
        if not found.ended and found.complete:
            return _decode_without_end(data, limit, name)
    return _load_pixels(Image.open(_Timed(data, name), formats=(kind,)), limit, name)


def _decode_without_end(data: bytes, limit: int, name: str) -> Image.Image:
    """Decode a JPEG whose end marker is missing. Raises OSError where more is missing.

    libjpeg fills missing data with grey and reports no error to pillow. So the file is decoded twice, with different bytes
    before the end marker: the image is complete where it does not depend on them.
    """
    images = [
        _load_pixels(Image.open(_Timed(data.rstrip(b"\xff") + gap + _JPEG_END, name), formats=("JPEG",)), limit, name)
        for gap in (b"", _FILLER_BYTES)
    ]
    if images[0].tobytes() != images[1].tobytes():
        raise OSError("its end marker and image data are missing")
    return images[0]


def _load_pixels(image: Image.Image, limit: int, name: str) -> Image.Image:
    width, height = image.size
    if width * height > limit:
        raise InputError(f"{name}: {width} × {height} pixels, the maximum is {limit:,}; scale it down")
    tiles = getattr(image, "tile", [])
    if width * height > MAX_PYTHON_PIXELS and any(tile[0] in Image.DECODERS for tile in tiles):
        raise InputError(
            f"{name}: a {image.format} image in a rare coding, which is slow to decode, of {width} × {height} pixels; the "
            f"maximum is {MAX_PYTHON_PIXELS:,}; save it as PNG"
        )
    image.load()
    return image


class _Timed(io.BytesIO):
    """A file in memory whose `read` raises once the thread has used DECODING_SECONDS of CPU time.

    All loops over a file in pillow's Python code, and all decoders that work in pieces, call `read`.
    """

    def __init__(self, data: bytes, name: str) -> None:
        super().__init__(data)
        self._name, self._until = name, time.thread_time() + DECODING_SECONDS

    def read(self, size: int | None = -1, /) -> bytes:
        if time.thread_time() > self._until:
            raise InputError(f"{self._name}: takes more than {DECODING_SECONDS} s to decode; save it again as JPEG or PNG")
        return super().read(size)


def image_bytes(file: Path) -> bytes:
    """Read an image file, without decoding. Raises InputError for a special, unreadable or too large file."""
    try:
        if file.exists() and not file.is_file():  # a device or a pipe may never end
            raise InputError(f"{file}: not a regular file; give the path of an image")
        with file.open("rb") as stream:
            data = stream.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror}); give the path of an image") from error
    if len(data) > MAX_FILE_BYTES:
        raise InputError(f"{file}: larger than {MAX_FILE_BYTES >> 20} MiB, the maximum; scale the image down")
    return data


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image, np.float64)
        if not np.isfinite(values).all():
            raise ValueError("its values are not finite")
        top = 65535.0 if image.mode.startswith("I") else max(float(values.max(initial=0.0)), 1.0)
        image = Image.fromarray(np.clip(np.rint(values * (255 / top)), 0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        ground = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(ground, image).convert("RGB")
    return image.convert("RGB")
