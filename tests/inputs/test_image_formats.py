"""Which image files are read, which are named, and what decoding one may cost."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cobra_edge.errors import InputError, MachineError
from cobra_edge.inputs import image as image_module
from cobra_edge.inputs.image import load_image
from cobra_edge.inputs.image_cost import JpegStructure, jpeg_structure, require_bounded
from cobra_edge.inputs.image_format import FORMATS, image_endings, image_format
from cobra_edge.inputs.isolated_decoding import Limits, decode_isolated

from ..conftest import MINI

SCENE = Image.open(MINI / "demo.png").convert("RGB")
HEIC = b"\0\0\0\x1cftypheic\0\0\0\0mif1heicmiaf" + bytes(64)


def saved(kind, image=SCENE, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def error_message(data):
    with pytest.raises(InputError) as caught:
        load_image(data)
    return str(caught.value)


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_is_detected_by_its_first_bytes(kind):
    data = saved(kind)
    assert image_format(data) == kind
    assert np.abs(np.asarray(load_image(data), float) - np.asarray(SCENE, float)).mean() < 20  # GIF has 256 colours


def test_of_an_mpo_the_first_image_is_read():
    other = Image.new("RGB", SCENE.size, "blue")
    read = load_image(saved("MPO", save_all=True, append_images=[other]))
    assert np.abs(np.asarray(read, float) - np.asarray(SCENE, float)).mean() < 5
    assert {".mpo", ".avif", ".heic", ".jpg", ".png"} <= image_endings() and ".pdf" not in image_endings()


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (HEIC, "a HEIC image, .*pip install pillow-heif, or convert it to JPEG or PNG"),
        (b"\0\0\0\x20ftypmif1\0\0\0\0mif1heixmiaf" + bytes(64), "a HEIC image"),
        (b"\0\0\0\x20ftypisom\0\0\2\0isomiso2avc1mp41", "a video"),
        (b"\0\0\0\x0cJXL \r\n\x87\n", "JPEG XL"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "an SVG drawing"),
        (b'<?xml version="1.0"?>\n<!-- made by hand -->\n<svg/>', "an SVG drawing"),
        (b"<!DOCTYPE html><html>", "a web page"),
        (b"%PDF-1.7", "a PDF document"),
        (b"", "an empty file"),
        (b"\0\0\0\x0cftyp", "a video"),  # cut off within its brands
        (b"P7\nWIDTH 1\n", "expected one of PNG, JPEG"),
        (b"\x89PNG\r\n\x1a\n", "truncated or damaged"),
        (b"II*\0\x08\0\0\0\xff\xff", "truncated or damaged"),
    ],
)
def test_what_is_not_read_is_named(data, says):
    with pytest.raises(InputError, match=f"^the image: .*{says}"):
        load_image(data)


def test_avif_without_support_is_named(monkeypatch):
    monkeypatch.setattr("cobra_edge.inputs.image_format.FORMATS", ("PNG",))
    assert "an AVIF image, which this version of pillow does not support; pip install" in error_message(
        b"\0\0\0\x14ftypavif\0\0\0\0mif1"
    )


# JPEG


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("kept", [1, 0])
def test_a_jpeg_that_lacks_only_its_end_is_read(progressive, kept):
    whole = saved("JPEG", quality=95, progressive=progressive)
    cut = load_image(whole[: len(whole) - 2 + kept])
    assert np.array_equal(np.asarray(cut), np.asarray(load_image(whole)))


@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_that_lacks_more_is_refused_where_that_can_be_seen(progressive):
    """A few last bits of a progressive JPEG refine coefficients by so little that no pixel need change."""
    whole = saved("JPEG", quality=95, progressive=progressive)
    wanted, refused = np.asarray(load_image(whole), int), 0
    for lost in [*range(3, 12), 100, 1000, 2000]:
        try:
            read = np.asarray(load_image(whole[:-lost]), int)
        except InputError as error:
            assert "truncated" in str(error)
            refused += 1
        else:
            assert progressive and lost < 12 and np.abs(read - wanted).max() < 8
    assert refused >= 8


def test_a_progressive_jpeg_cut_between_two_scans_is_refused():
    whole = saved("JPEG", progressive=True)
    last = whole.rfind(b"\xff\xda")
    last = whole.rfind(b"\xff\xc4", 0, last)  # with its tables
    assert jpeg_structure(whole).complete and not jpeg_structure(whole[:last]).complete
    assert "truncated" in error_message(whole[:last])


def test_scans_without_end_are_refused_before_they_are_decoded(monkeypatch):
    whole = saved("JPEG", progressive=True)
    scan = whole[whole.rfind(b"\xff\xda") : -2]
    assert load_image(whole).size == SCENE.size
    monkeypatch.setattr(Image, "open", None)
    assert "a JPEG of more than 200 scans; save it again" in error_message(whole[:-2] + scan * 200 + whole[-2:])
    hidden = whole[:-2] + b"\xff\xfe\0\4\xff\xd9" + scan * 200 + whole[-2:]  # an end that is none, in a comment
    assert "more than 200 scans" in error_message(hidden)


def jpeg_of(width, height, kind=0xC2, scans=1, segments=0):
    """Return the markers of a JPEG without an image."""
    frame = bytes([0xFF, kind]) + struct.pack(">HBHHB", 11, 8, height, width, 1) + b"\1\x11\0"
    scan = b"\xff\xda" + struct.pack(">HB", 8, 1) + b"\1\0\1\x3f\0"
    return b"\xff\xd8" + b"\xff\xfe\0\2" * segments + frame + scan * scans + b"\xff\xd9"


def test_what_scans_cost_is_counted_with_their_pixels():
    require_bounded(jpeg_of(8000, 8000, scans=20), "JPEG", "it")
    require_bounded(jpeg_of(1000, 1000, scans=200), "JPEG", "it")
    with pytest.raises(InputError, match="21 scans over 64,000,000 pixels"):
        require_bounded(jpeg_of(8000, 8000, scans=21), "JPEG", "it")
    with pytest.raises(InputError, match="more than 10,000 segments"):
        require_bounded(jpeg_of(8, 8, segments=20_000), "JPEG", "it")


@pytest.mark.parametrize("kind", [0xC3, 0xC5, 0xC9, 0xCA, 0xCF])
def test_rare_codings_of_jpeg_are_refused(kind):
    assert "in a rare coding" in error_message(jpeg_of(8, 8, kind))


def test_fill_bytes_and_stuffed_ones_are_no_markers():
    found = jpeg_structure(
        b"\xff\xd8\xff\xff\xfe\0\4\xff\xda" + jpeg_of(8, 8)[2:-2] + b"\xff\0\xff\xd3" * 9 + b"\xff\xff\xd9\xff\xda"
    )
    assert found.ended and (found.scans, found.segments, found.components) == (1, 3, [1])
    assert jpeg_structure(b"\xff\xd8\xff\xda") == JpegStructure(scans=1, segments=1, seen={})


# Others


def chunk(kind, data=b""):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_with(*chunks):
    whole = saved("PNG")
    return whole[:33] + b"".join(chunks) + whole[33:]


PROFILE, TEXT = chunk(b"iCCP", b"p\0\0" + zlib.compress(bytes(1000))), chunk(b"zTXt", b"t\0\0" + zlib.compress(bytes(1000)))


def test_chunks_of_a_png_are_counted(monkeypatch):
    assert load_image(png_with(PROFILE, TEXT, *[chunk(b"abCd")] * 1000)).size == SCENE.size
    monkeypatch.setattr(Image, "open", None)
    assert "more than one colour profile" in error_message(png_with(PROFILE, PROFILE))
    assert "more than 64 compressed texts" in error_message(png_with(*[TEXT] * 65))
    assert "10,000 others" in error_message(png_with(chunk(b"abCd") * 10_001))
    assert "100,000 data chunks" in error_message(png_with(chunk(b"IDAT") * 100_001))


def test_blocks_before_a_frame_of_a_gif_are_counted(monkeypatch):
    whole = saved("GIF")
    start = whole.index(b"\x21\xf9") if b"\x21\xf9" in whole else whole.index(b",\0\0\0\0")
    comment = b"\x21\xfe" + b"\2hi" * 1000 + b"\0"
    assert load_image(whole[:start] + comment + whole[start:]).size == SCENE.size
    monkeypatch.setattr(Image, "open", None)
    for many in (b"\x21\xfe" + b"\2hi" * 5000 + b"\0", b"\x21\xfe\0" * 5000, b"x" * 5000):
        assert "a GIF of more than 4,096 blocks" in error_message(whole[:start] + many + whole[start:])


def test_what_pillow_decodes_in_python_is_small():
    small, large = b"P6 40 40 254\n" + b"\x7f" * 4800, b"P6 1000 1000 254\n" + bytes(3_000_000)
    assert load_image(small).getpixel((3, 3)) == (128, 128, 128)  # 127 of 254
    for data in (large, b"P3 1000 1000 255\n" + b"1 " * 3_000_000, rle_bitmap(1000, 1000)):
        assert "in a rare coding, which is slow to decode, of 1000 × 1000 pixels; the maximum is 500,000" in error_message(data)
    assert load_image(rle_bitmap(8, 2)).size == (8, 2)
    assert load_image(b"P6 1000 1000 255\n" + bytes(3_000_000)).size == (1000, 1000)


def rle_bitmap(width, height):
    row = bytes([min(width, 255), 0, 0, 0])
    header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, 0, 0, 0, 256, 0)
    return b"BM" + struct.pack("<IHHI", 0, 0, 0, 54 + 1024) + header + bytes(1024) + row * height


def test_comments_of_a_ppm_are_counted():
    assert load_image(b"P3 # one\n2 # two\n 1 255 # three\n1 2 3 4 5 6\n").getpixel((1, 0)) == (4, 5, 6)
    assert "header is longer than 4,096 bytes" in error_message(b"P6 #" + b"c" * 5000 + b"\n1 1 255\n123")
    assert "more than 1,000 comments" in error_message(b"P3 9 9 255\n" + b"#\n" * 2000)


def test_decoding_has_so_much_processor_time(monkeypatch):
    now = iter(range(0, 1000, 6))
    monkeypatch.setattr(image_module.time, "thread_time", lambda: next(now))
    assert "takes more than 10 s to decode" in error_message(saved("PNG"))


# In a process of its own

PLUGIN = """
from PIL import Image, ImageFile

class HeifImageFile(ImageFile.ImageFile):
    format = "HEIF"

    def _open(self):
        self._size, self._mode = (3, 2), "RGB"
        self.tile = [("raw", (0, 0, 3, 2), len(self.fp.read()) - 18, ("RGB", 0, 1))]
        exif = Image.Exif()
        exif[0x0112] = 6
        self.info["exif"] = exif.tobytes()

def register_heif_opener():
    Image.register_open("HEIF", HeifImageFile)
"""


@pytest.fixture
def heif(monkeypatch, tmp_path):
    """Return a function that installs a stand-in of pillow-heif with some source."""
    monkeypatch.syspath_prepend(tmp_path)

    def install(source):
        (tmp_path / "pillow_heif.py").write_text(source)

    return install


def test_heic_is_read_where_pillow_heif_is(heif):
    heif(PLUGIN)
    pixels = bytes(range(18))
    read = load_image(HEIC + pixels)
    assert read.size == (2, 3)
    upright = np.rot90(np.frombuffer(pixels, np.uint8).reshape(2, 3, 3), -1)  # orientation 6: turned clockwise
    assert np.array_equal(np.asarray(read), upright)
    with pytest.raises(InputError, match="3 × 2 pixels, the maximum is 5"):
        load_image(HEIC + pixels, max_pixels=5)


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("def register_heif_opener():\n    while True: pass", "takes more than 1 s to decode; save it again"),
        ("import os\ndef register_heif_opener():\n    os.abort()", "its decoder crashed"),
        ("def register_heif_opener():\n    raise RuntimeError('no such codec')", r"damaged image \(no such codec\)"),
        ("def register_heif_opener():\n    bytearray(1 << 40)", "damaged image"),
        ("import sys\ndef register_heif_opener():\n    sys.stderr.write('x' * 10**6); raise OSError('noise')", "noise"),
    ],
    ids=["endless", "crash", "refused", "memory", "noise"],
)
def test_a_decoder_in_its_own_process_is_bounded(heif, monkeypatch, capfd, source, says):
    heif(source)
    monkeypatch.setattr(image_module, "DECODING_SECONDS", 1)
    with pytest.raises(InputError, match=says):
        load_image(HEIC)
    assert capfd.readouterr() == ("", "")


def test_a_process_cannot_be_started(monkeypatch):
    monkeypatch.setattr("cobra_edge.inputs.isolated_decoding.sys.executable", str(Path("/nowhere/python")))
    with pytest.raises(MachineError, match="it: cannot start a process to decode it"):
        decode_isolated(saved("TIFF"), "TIFF", Limits(1, 10), "it")
