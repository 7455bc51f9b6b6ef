"""Image transforms against timm's own, and images that are hostile or merely odd."""

import io
import struct
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import timm.data
from PIL import Image, ImageOps
from torchvision import transforms
from torchvision.transforms import functional as TVF

from cobra_edge.errors import InputError
from cobra_edge.inputs.image import ImageTransform, Normalisation, load_image
from cobra_edge.model.backbones import IMAGENET_MEAN, IMAGENET_STD, VISION_BACKBONES

PUBLISHED = VISION_BACKBONES["dinosiglip-vit-so-384px"]


def photo(width, height):
    """Return an image with gradients, edges and noise."""
    rng = np.random.default_rng(width)
    y, x = np.mgrid[:height, :width]
    base = np.stack([x * 255 / width, y * 255 / height, 127 + 127 * np.sin(x / 7) * np.cos(y / 5)], -1)
    base[height // 3 : height // 2, width // 4 : width // 2] = 255
    return Image.fromarray(np.clip(base + rng.normal(0, 20, base.shape), 0, 255).astype(np.uint8))


def timms_transform(encoder, strategy):
    """Return timm's evaluation transform, its resize adapted to the strategy as the published code does."""
    config = timm.data.resolve_data_config({}, pretrained_cfg=timm.get_pretrained_cfg(encoder.timm_name).to_dict())
    config["input_size"] = (3, 384, 384)
    chain = timm.data.create_transform(**config, is_training=False).transforms
    resize = 384 if strategy != "resize-naive" else (384, 384)
    chain = [transforms.Resize(resize, interpolation=chain[0].interpolation), *chain[1:]]
    if strategy == "letterbox":
        fill = tuple(int(m * 255) for m in encoder.mean)

        def pad(image):
            side = max(image.size)
            left, top = int((side - image.width) / 2), int((side - image.height) / 2)
            return TVF.pad(image, [left, top, left, top], fill=fill)

        chain = [pad, *chain]
    return transforms.Compose(chain)


@pytest.mark.parametrize("strategy", ["resize-naive", "resize-crop", "letterbox"])
@pytest.mark.parametrize("size", [(640, 480), (301, 517), (384, 384), (90, 91), (1200, 133)])
def test_transform_agrees_with_timm(strategy, size):
    image = photo(*size)
    ours = ImageTransform(384, strategy, tuple(Normalisation(e.mean, e.std) for e in PUBLISHED.encoders))
    pixels = ours.pixels(image)
    assert pixels.shape == ours.shape and pixels.dtype == np.float32
    for index, encoder in enumerate(PUBLISHED.encoders):
        theirs = timms_transform(encoder, strategy)(image).numpy()
        std = np.array(encoder.std)[:, None, None]
        grey_levels = np.abs(pixels[0, 3 * index : 3 * index + 3] - theirs) * std * 255
        assert grey_levels.max() <= 1.0


def encoded(image, fmt="PNG", **options):
    stream = io.BytesIO()
    image.save(stream, fmt, **options)
    return stream.getvalue()


def test_good_odd_images():
    red = Image.new("RGB", (8, 4), (200, 10, 10))
    assert load_image(encoded(red.quantize(4))).getpixel((0, 0)) == (200, 10, 10)
    clear = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    assert load_image(encoded(clear)).getpixel((1, 1)) == (255, 255, 255)
    half = Image.new("LA", (4, 4), (0, 128))
    assert load_image(encoded(half)).getpixel((1, 1)) == (127, 127, 127)
    deep = Image.fromarray(np.full((4, 4), 257 * 77, np.uint16))
    assert load_image(encoded(deep)).getpixel((0, 0)) == (77, 77, 77)
    cmyk = Image.new("CMYK", (4, 4), (0, 255, 255, 0))
    assert load_image(encoded(cmyk, "TIFF")).mode == "RGB"
    palette = Image.new("P", (4, 4))
    palette.info["transparency"] = 0
    assert load_image(encoded(palette, transparency=0)).getpixel((0, 0)) == (255, 255, 255)
    assert load_image(encoded(Image.new("1", (4, 4), 1))).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_undone(kind, orientation):
    wide = photo(40, 20)
    exif = Image.Exif()
    exif[0x0112] = orientation  # 5 to 8 are turned by 90 degrees
    file = encoded(wide, kind, exif=exif)
    turned = load_image(file)
    assert turned.size == ((20, 40) if orientation >= 5 else (40, 20))
    assert np.array_equal(np.asarray(turned), np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(file)))))


def bomb(width, height):
    """Return a tiny PNG that claims to be enormous."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 9)) + chunk(b"IEND", b"")


def odd_exif():
    """Return the EXIF data of a camera that lies on its side, and says its width as a fraction, which pillow cannot write."""

    def entry(tag, kind, value):
        return struct.pack(">HHI", tag, kind, 1) + value

    orientation, width = entry(0x0112, 3, struct.pack(">HH", 6, 0)), entry(0x0100, 5, struct.pack(">I", 38))
    return b"Exif\0\0MM\0*\0\0\0\x08" + struct.pack(">H", 2) + width + orientation + struct.pack(">III", 0, 7, 2)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "not an image"),
        (b"not an image at all", "not an image"),
        (encoded(photo(64, 64))[:900], "truncated"),
        (encoded(photo(64, 64), "JPEG")[:700], "truncated"),
        (encoded(photo(64, 64), "JPEG", exif=odd_exif()), "damaged"),
        (bomb(60_000, 60_000), "pixels"),
        (bomb(9_000, 9_000), "pixels"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
    ],
    ids=["empty", "text", "cut png", "cut jpeg", "odd exif", "bomb", "small bomb", "postscript"],
)
def test_bad_images_are_refused(data, says, tmp_path):
    file = tmp_path / "image.bin"
    file.write_bytes(data)
    for source in (data, file):
        with pytest.raises(InputError, match=says):
            load_image(source)


def test_a_flipped_byte_never_crashes():
    data = bytearray(encoded(photo(32, 32)))
    for position in range(0, len(data), 37):
        broken = data.copy()
        broken[position] ^= 0xFF
        try:
            image = load_image(bytes(broken))
        except InputError:
            continue
        assert image.mode == "RGB"


def test_missing_file(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        load_image(tmp_path / "nowhere.png")


def test_transform_of_a_config_keeps_encoder_order():
    config = SimpleNamespace(vision=PUBLISHED, image_resize_strategy="letterbox")
    transform = ImageTransform.of(config)
    assert [e.mean for e in transform.encoders] == [e.mean for e in PUBLISHED.encoders]


@pytest.mark.parametrize("strategy", ["resize-crop", "letterbox"])
def test_a_sliver_is_refused_before_it_is_blown_up(strategy):
    """An image of few pixels and an extreme shape would become a square of gigabytes."""
    transform = ImageTransform(384, strategy, (Normalisation(IMAGENET_MEAN, IMAGENET_STD),))
    with pytest.raises(InputError, match="crop it"):
        transform.pixels(Image.new("RGB", (200_000, 1)))


def test_an_image_of_floats_that_are_none():
    values = np.full((4, 4), np.nan, np.float32)
    with pytest.raises(InputError, match="not finite"):
        load_image(Image.fromarray(values))
