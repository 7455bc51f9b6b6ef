"""A contact sheet: images in order, whole, numbered."""

import numpy as np
import pytest
from PIL import Image

from cobra_edge.inputs.contact_sheet import MOST_IMAGES, contact_sheet

COLORS = [(200, 16 * i, 255 - 16 * i) for i in range(MOST_IMAGES)]


@pytest.mark.parametrize("count", [2, 3, 4, 5, 9, 16])
def test_images_come_in_rows(count):
    images = [Image.new("RGB", (640, 480), color) for color in COLORS[:count]]
    sheet, columns = contact_sheet(iter(images), count, 384), int(np.ceil(np.sqrt(count)))
    assert sheet.size == (384, 384)
    cell = 384 // columns
    for index, color in enumerate(COLORS[:count]):
        middle = (index % columns * cell + cell // 2, index // columns * cell + cell // 2)
        assert sheet.getpixel(middle) == color
    assert images[0].size == (640, 480)  # not changed


def test_a_whole_image_is_shown_and_nothing_is_enlarged():
    tall = Image.new("RGB", (10, 100), "red")
    pixels = np.asarray(contact_sheet([tall, tall], 2, 224))
    assert (pixels == (255, 0, 0)).all(-1).sum() > 2 * 900  # less what the labels cover


def test_every_image_has_a_number():
    sheets = [np.asarray(contact_sheet([Image.new("RGB", (112, 112), "gray")] * n, n, 224)) for n in (3, 4)]
    assert (sheets[1][:28, :28] == 0).all(-1).any()  # a label's ground
    assert not (sheets[0][:28, :28] == sheets[0][:28, 112:140]).all()  # 1 and 2
