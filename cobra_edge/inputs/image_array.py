"""Images as arrays, as from cameras and OpenCV."""

from __future__ import annotations

import numpy as np
from PIL import Image

from ..errors import InputError
from ..terminal.suggestions import near_matches
from .image_cost import MAX_PIXELS

CHANNEL_ORDERS = ("rgb", "bgr")


def image_of_array(array: np.ndarray, channel_order: str = "rgb") -> Image.Image:
    """Copy an array into an RGB image.

    Args:
        array: (height, width, 3) uint8, or (height, width) uint8 for grey; strided views are fine.
        channel_order: "rgb", or "bgr" as in OpenCV.

    Raises:
        InputError: wrong shape or dtype, unknown channel order, or more than MAX_PIXELS.
    """
    require_channel_order(channel_order)
    _require_image(array)
    height, width = array.shape[:2]
    if height * width > MAX_PIXELS:
        raise InputError(f"the array: {width} × {height} pixels, the maximum is {MAX_PIXELS:,}; scale it down")
    if array.ndim == 2:
        return Image.fromarray(np.ascontiguousarray(array)).convert("RGB")
    return Image.fromarray(np.ascontiguousarray(array[..., ::-1] if channel_order == "bgr" else array))


def require_channel_order(channel_order: str) -> None:
    """Raise InputError unless the channel order is one of CHANNEL_ORDERS."""
    if channel_order not in CHANNEL_ORDERS:
        raise InputError(f"unknown channel order {channel_order!r}{near_matches(str(channel_order), CHANNEL_ORDERS)}")


def _require_image(array: np.ndarray) -> None:
    shape = array.shape
    got, advice = f"an array of shape {shape} and dtype {array.dtype}", ""
    if array.ndim == 4 and shape[0] == 1:
        advice = "; pass one image of the batch: array[0]"
    elif array.ndim == 3 and shape[0] in (1, 3) and shape[2] not in (1, 3, 4):
        advice = "; channels come last: array.transpose(1, 2, 0)"
    elif array.ndim == 3 and shape[2] == 4:
        advice = "; drop the alpha channel: array[..., :3]"
    elif array.ndim == 3 and shape[2] == 1:
        advice = "; drop the channel axis: array[..., 0]"
    elif array.dtype == np.bool_ or array.dtype.kind == "f":
        advice = "; for values from 0 to 1: (array * 255).round().astype(np.uint8)"
    elif array.dtype.kind in "iu":
        advice = "; for 16 bits: (array >> 8).astype(np.uint8)"
    of_image = array.ndim == 2 or (array.ndim == 3 and shape[2] == 3)
    if not of_image or array.dtype != np.uint8:
        raise InputError(f"{got}, expected (height, width, 3) or (height, width) uint8{advice}")
    if not array.size:
        raise InputError(f"{got}: no pixels; was the camera read before it was ready?")
