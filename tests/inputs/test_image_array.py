"""Images as arrays: what is taken, and what is refused with what to do."""

import numpy as np
import pytest

from cobra_edge.errors import InputError
from cobra_edge.inputs.image_array import image_of_array

RGB = np.random.default_rng(0).integers(0, 256, (6, 5, 3)).astype(np.uint8)


def test_the_channel_order_is_explicit():
    assert np.array_equal(np.asarray(image_of_array(RGB)), RGB)
    assert np.array_equal(np.asarray(image_of_array(RGB[..., ::-1], "bgr")), RGB)
    assert np.array_equal(np.asarray(image_of_array(RGB, "bgr")), RGB[..., ::-1])


def test_views_are_taken_and_copied():
    array = RGB.copy()
    image = image_of_array(array[::-2, 1:-1])
    array[:] = 0
    assert np.array_equal(np.asarray(image), RGB[::-2, 1:-1])


def test_grey_is_taken():
    image = image_of_array(RGB[..., 0], "bgr")
    assert image.mode == "RGB" and np.array_equal(np.asarray(image), np.repeat(RGB[..., :1], 3, 2))


@pytest.mark.parametrize(
    ("array", "says"),
    [
        (RGB[None], r"\(1, 6, 5, 3\) .*array\[0\]"),
        (RGB.transpose(2, 0, 1), r"\(3, 6, 5\) .*channels come last: array.transpose\(1, 2, 0\)"),
        (np.zeros((6, 5, 4), np.uint8), r"drop the alpha channel: array\[..., :3\]"),
        (RGB[..., :1], r"array\[..., 0\]"),
        (RGB / np.float32(255), "dtype float32, expected .* uint8; for values from 0 to 1"),
        (RGB.astype(np.uint16), "dtype uint16, expected .* uint8; for 16 bits"),
        (RGB[..., 0] > 3, "dtype bool, expected"),
        (RGB.astype(object), "dtype object, expected"),
        (RGB[0, 0], r"shape \(3,\)"),
        (np.zeros((), np.uint8), r"shape \(\)"),
        (RGB[:0], "no pixels"),
        (np.zeros((0, 0), np.uint8), "no pixels"),
        (np.broadcast_to(np.zeros((1, 1), np.uint8), (9000, 9000)), "9000 × 9000 pixels, the maximum is 64,000,000"),
    ],
)
def test_what_is_no_image_is_refused_with_what_to_do(array, says):
    with pytest.raises(InputError, match=says):
        image_of_array(array)


def test_an_unknown_order():
    with pytest.raises(InputError, match="unknown channel order 'gbr'.*known: rgb, bgr"):
        image_of_array(RGB, "gbr")
