"""Frames of a camera, a stream or a video file, through OpenCV."""

from __future__ import annotations

import functools
import logging
import math
import os
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..errors import InputError, MachineError
from ..requirements import install_hint
from ..terminal import tell
from .frames import Frame

_TIMEOUT_MS = 10_000  # of a stream that does not open, or gives no more frames
_PLAUSIBLE_RATES = (0.01, 1000.0)
_USUAL_RATE = 25.0  # where a file does not say its own


class Camera:
    """A device by its number or path, a stream by its URL, or a video file, which plays at its own rate and ends."""

    def __init__(self, where: str) -> None:
        """Check that there can be such a source; it is opened when its frames are wanted.

        Raises:
            InputError: no such file. MachineError: no such device, or no OpenCV.
        """
        self.name = re.sub(r"//[^/@]*@", "//", where)  # without the user and the password of a stream
        self._where: str | int = int(where) if where.isdecimal() and where.isascii() else where
        self.is_stream, self.is_file = "://" in where, Path(where).is_file()
        if not self.is_stream and not self.is_file:
            device = Path(f"/dev/video{self._where}") if isinstance(self._where, int) else Path(where)
            if not device.is_char_device():
                _refuse_device(device)
        self._cv2 = _opencv()

    def frames(self, stop: threading.Event) -> Iterator[Frame]:
        """See `FrameSource`. A frame counts as captured when OpenCV hands it over, or when a file's frame is due."""
        capture = self._opened()
        try:
            width, height = (capture.get(p) for p in (self._cv2.CAP_PROP_FRAME_WIDTH, self._cv2.CAP_PROP_FRAME_HEIGHT))
            tell(f"watching {self.name}, {width:.0f} × {height:.0f} pixels")
            rate = _rate(capture.get(self._cv2.CAP_PROP_FPS))
            number, began = 0, 0.0
            while not stop.is_set():
                there, pixels = capture.read()
                if not there:
                    self._end(number)
                    return
                began = began or time.perf_counter()
                if self.is_file:
                    stop.wait(max(0.0, began + number / rate - time.perf_counter()))
                number += 1
                yield Frame(number, None, time.perf_counter(), functools.partial(_picture, pixels))
                del pixels  # not kept while the next ones are waited for
        finally:
            capture.release()

    def _opened(self) -> Any:
        cv2 = self._cv2
        if self.is_stream and cv2.CAP_FFMPEG in cv2.videoio_registry.getStreamBackends():
            limits = [cv2.CAP_PROP_OPEN_TIMEOUT_MSEC, _TIMEOUT_MS, cv2.CAP_PROP_READ_TIMEOUT_MSEC, _TIMEOUT_MS]
            capture = cv2.VideoCapture(self._where, cv2.CAP_FFMPEG, limits)
        else:
            capture = cv2.VideoCapture(self._where)
        if not capture.isOpened():
            if self.is_file:
                raise InputError(f"{self.name}: not a video that OpenCV reads; convert it, for example to MP4")
            raise MachineError(f"{self.name}: cannot be opened; check that it is there, free, and that you may use it")
        if not self.is_file:
            capture.set(cv2.CAP_PROP_BUFFERSIZE, 1)  # older frames are of no use; not every camera obeys
        return capture

    def _end(self, number: int) -> None:
        """Say what it means that there is no further frame."""
        if not self.is_file:
            raise MachineError(f"{self.name}: went away after {number} frames; check its cable or its network")
        if number == 0:
            raise InputError(f"{self.name}: no frame in it can be read; convert it, for example to MP4")


def _picture(pixels: np.ndarray) -> Image.Image:
    """Turn what OpenCV gives, (height, width, 3) uint8 as blue, green, red, into a picture."""
    return Image.fromarray(np.ascontiguousarray(pixels[..., ::-1]))


def _rate(said: float) -> float:
    """Return the frames a second that a file claims, or the usual ones where that is no rate."""
    low, high = _PLAUSIBLE_RATES
    return said if math.isfinite(said) and low <= said <= high else _USUAL_RATE


def _refuse_device(device: Path) -> None:
    if device.is_absolute() and device.parts[1] == "dev":
        here = ", ".join(sorted(str(d) for d in Path("/dev").glob("video*"))) or "none"
        raise MachineError(f"there is no camera {device}; here: {here}")
    raise InputError(f"{device}: no such video; give a device's number, /dev/videoN, a URL or a file")


def _opencv() -> Any:
    """Import OpenCV, told before not to write to stderr by itself. Raises MachineError where it is missing."""
    if not logging.getLogger().isEnabledFor(logging.INFO):
        os.environ.setdefault("OPENCV_LOG_LEVEL", "SILENT")
        os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
    try:
        import cv2
    except ImportError as error:
        raise MachineError(f"--camera needs OpenCV ({error}); install it with: {install_hint('watch')}") from error
    return cv2
