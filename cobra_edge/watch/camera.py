"""Frames of a camera, a stream, a GStreamer pipeline or a video file, through OpenCV; of a snapshot URL, without it."""

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

from ..environment.requirements import install_hint
from ..errors import InputError, MachineError
from ..inputs.image_array import image_of_array
from ..terminal.output import tell
from .frames import Frame, SourceGone
from .snapshots import Snapshots

_TIMEOUT_MS = 10_000  # of a stream that does not open, or gives no more frames
_PLAUSIBLE_RATES = (0.01, 1000.0)
_USUAL_RATE = 25.0  # where a file does not say its own
_PIPELINE, _APPSINK = re.compile(r"\s!\s"), re.compile(r"!\s+appsink\b[^!]*$")
_USER = re.compile(r"(?<=//)[^/\s]*@")  # of a URL, with the password
_PASSWORD = re.compile(r"\b(user-pw|pwd|pw|pass|password|passwd)=[^&\s]+", re.IGNORECASE)  # of GStreamer's rtspsrc; in a query


class Camera:
    """A device by its number or path, a stream or snapshot by its URL, a GStreamer pipeline, or a video file.

    A file plays at its own rate and ends; the others go on until they go away.
    """

    def __init__(self, where: str, poll_seconds: float = 1.0, must_be_there: bool = True) -> None:
        """Check that there can be such a source; it is opened when its frames are wanted.

        Args:
            where: see above.
            poll_seconds: between two requests, where a URL answers with one image.
            must_be_there: whether a device that is missing is refused now, and not when its frames are wanted.

        Raises:
            InputError: no such file, or a pipeline without appsink. SourceGone: no such device. MachineError: no OpenCV, or
            one without GStreamer.
        """
        self.name = _without_secrets(where)
        self._where: str | int = int(where) if where.isdecimal() and where.isascii() else where
        self.is_file = Path(where).is_file()
        self.is_pipeline = not self.is_file and _PIPELINE.search(where) is not None
        self.is_stream = not self.is_pipeline and "://" in where
        self._snapshots: Snapshots | None = None
        if self.is_pipeline:
            self._require_gstreamer()
        elif self.is_stream:
            if where.lower().startswith(("http://", "https://")):
                self._snapshots = Snapshots(where, self.name, poll_seconds)
        elif not self.is_file:
            device = Path(f"/dev/video{self._where}") if isinstance(self._where, int) else Path(where)
            if not device.is_char_device():
                _refuse_device(device, must_be_there)
        if self._snapshots is None:
            _opencv()

    def frames(self, stop: threading.Event) -> Iterator[Frame]:
        """See `FrameSource`. A frame counts as captured when OpenCV hands it over, or when a file's frame is due."""
        if self._snapshots is not None and self._snapshots.answer_images():
            yield from self._snapshots.frames(stop)
            return
        cv2 = _opencv()
        capture = self._opened(cv2)
        try:
            width, height = (capture.get(p) for p in (cv2.CAP_PROP_FRAME_WIDTH, cv2.CAP_PROP_FRAME_HEIGHT))
            tell(f"watching {self.name}, {width:.0f} × {height:.0f} pixels")
            rate = _rate(capture.get(cv2.CAP_PROP_FPS))
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
                yield Frame(number, None, time.perf_counter(), functools.partial(image_of_array, pixels, "bgr"))
                del pixels  # not kept while the next ones are waited for
        finally:
            capture.release()

    def _opened(self, cv2: Any) -> Any:
        if self.is_pipeline:
            capture = cv2.VideoCapture(self._where, cv2.CAP_GSTREAMER)
        elif self.is_stream and cv2.CAP_FFMPEG in cv2.videoio_registry.getStreamBackends():
            limits = [cv2.CAP_PROP_OPEN_TIMEOUT_MSEC, _TIMEOUT_MS, cv2.CAP_PROP_READ_TIMEOUT_MSEC, _TIMEOUT_MS]
            capture = cv2.VideoCapture(self._where, cv2.CAP_FFMPEG, limits)
        else:
            capture = cv2.VideoCapture(self._where)
        if not capture.isOpened():
            if self.is_file:
                raise InputError(f"{self.name}: not a video that OpenCV reads; convert it, for example to MP4")
            advice = "check that it is there, free, and that you may use it"
            if self.is_pipeline:
                advice = "try it with gst-launch-1.0, with fakesink in place of appsink"
            raise SourceGone(f"{self.name}: cannot be opened; {advice}")
        if not self.is_file:
            capture.set(cv2.CAP_PROP_BUFFERSIZE, 1)  # older frames are of no use; not every camera obeys
        return capture

    def _require_gstreamer(self) -> None:
        if _APPSINK.search(self.name) is None:
            raise InputError(
                f"{self.name}: a pipeline that does not end in appsink; end it in ! videoconvert ! video/x-raw,format=BGR ! "
                "appsink drop=true max-buffers=1"
            )
        cv2 = _opencv()
        if not cv2.videoio_registry.hasBackend(cv2.CAP_GSTREAMER):
            raise MachineError(
                f"{self.name}: this OpenCV ({cv2.__version__}) has no GStreamer, as those from the package index have none; "
                "use JetPack's or your distribution's (python3-opencv), or give /dev/videoN or a URL"
            )

    def _end(self, number: int) -> None:
        """Say what it means that there is no further frame."""
        if not self.is_file:
            raise SourceGone(f"{self.name}: went away after {number} frames; check its cable or its network")
        if number == 0:
            raise InputError(f"{self.name}: no frame in it can be read; convert it, for example to MP4")


def _without_secrets(where: str) -> str:
    """Return a source's name as it may be printed."""
    return _PASSWORD.sub(r"\1=…", _USER.sub("", where))


def _rate(said: float) -> float:
    """Return the frames a second that a file claims, or the usual ones where that is no rate."""
    low, high = _PLAUSIBLE_RATES
    return said if math.isfinite(said) and low <= said <= high else _USUAL_RATE


def _refuse_device(device: Path, must_be_there: bool) -> None:
    if device.is_absolute() and device.parts[1:2] == ("dev",):
        if not must_be_there:
            return
        here = ", ".join(sorted(str(d) for d in Path("/dev").glob("video*"))) or "none"
        raise SourceGone(f"there is no camera {device}; here: {here}")
    raise InputError(
        f"{device}: no such video; give a device's number, /dev/videoN, a URL, a file, or a GStreamer pipeline (… ! appsink)"
    )


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
