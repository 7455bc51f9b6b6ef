"""Frame source for a camera, stream, GStreamer pipeline or video file (OpenCV), or a snapshot URL (without OpenCV)."""

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
from .snapshots import Snapshots
from .source import Frame, SourceLost

_TIMEOUT_MS = 10_000  # to open a stream, or to read a frame of it
_PLAUSIBLE_RATES = (0.01, 1000.0)
_DEFAULT_RATE = 25.0  # where a file has no valid frame rate
_PIPELINE, _APPSINK = re.compile(r"\s!\s"), re.compile(r"!\s+appsink\b[^!]*$")
_USER = re.compile(r"(?<=//)[^/\s]*@")  # user and password in a URL
_PASSWORD = re.compile(
    r"\b(user-pw|pwd|pw|pass|password|passwd)=[^&\s]+", re.IGNORECASE
)  # of GStreamer's rtspsrc, or in a query


class Camera:
    """A device (number or path), stream or snapshot URL, GStreamer pipeline, or video file.

    A file is played at its own frame rate and ends; the other sources do not end.
    """

    def __init__(self, where: str, poll_seconds: float = 1.0, must_be_there: bool = True) -> None:
        """Validate the source; `frames` opens it.

        Args:
            where: the source, see above.
            poll_seconds: interval of requests to a snapshot URL.
            must_be_there: raise SourceLost now for a missing device, not in `frames`.

        Raises:
            InputError: no such file, or a pipeline without appsink.
            SourceLost: no such device.
            MachineError: OpenCV is missing, or has no GStreamer.
        """
        self.name = _redacted(where)
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
                _raise_no_device(device, must_be_there)
        if self._snapshots is None:
            _opencv()

    def frames(self, stop: threading.Event) -> Iterator[Frame]:
        """See `FrameSource`. The capture time is when OpenCV returns the frame; of a file, when the frame is due."""
        if self._snapshots is not None and self._snapshots.answer_images():
            yield from self._snapshots.frames(stop)
            return
        cv2 = _opencv()
        capture = self._open(cv2)
        try:
            width, height = (capture.get(p) for p in (cv2.CAP_PROP_FRAME_WIDTH, cv2.CAP_PROP_FRAME_HEIGHT))
            tell(f"watching {self.name}, {width:.0f} × {height:.0f} pixels")
            rate = _rate(capture.get(cv2.CAP_PROP_FPS))
            number, began = 0, 0.0
            while not stop.is_set():
                there, pixels = capture.read()
                if not there:
                    self._raise_at_end(number)
                    return
                began = began or time.perf_counter()
                if self.is_file:
                    stop.wait(max(0.0, began + number / rate - time.perf_counter()))
                number += 1
                yield Frame(number, None, time.perf_counter(), functools.partial(image_of_array, pixels, "bgr"))
                del pixels  # not kept while waiting for the next frame
        finally:
            capture.release()

    def _open(self, cv2: Any) -> Any:
        if self.is_pipeline:
            capture = cv2.VideoCapture(self._where, cv2.CAP_GSTREAMER)
        elif self.is_stream and cv2.CAP_FFMPEG in cv2.videoio_registry.getStreamBackends():
            limits = [cv2.CAP_PROP_OPEN_TIMEOUT_MSEC, _TIMEOUT_MS, cv2.CAP_PROP_READ_TIMEOUT_MSEC, _TIMEOUT_MS]
            capture = cv2.VideoCapture(self._where, cv2.CAP_FFMPEG, limits)
        else:
            capture = cv2.VideoCapture(self._where)
        if not capture.isOpened():
            if self.is_file:
                raise InputError(f"{self.name}: not a video that OpenCV can read; convert it, for example to MP4")
            advice = "check that it is connected, not in use, and that you have permission"
            if self.is_pipeline:
                advice = "test it with gst-launch-1.0 and fakesink in place of appsink"
            raise SourceLost(f"{self.name}: cannot be opened; {advice}")
        if not self.is_file:
            capture.set(cv2.CAP_PROP_BUFFERSIZE, 1)  # only the newest frame is of use; not every driver supports it
        return capture

    def _require_gstreamer(self) -> None:
        if _APPSINK.search(self.name) is None:
            raise InputError(
                f"{self.name}: the pipeline does not end in appsink; end it with ! videoconvert ! video/x-raw,format=BGR ! "
                "appsink drop=true max-buffers=1"
            )
        cv2 = _opencv()
        if not cv2.videoio_registry.hasBackend(cv2.CAP_GSTREAMER):
            raise MachineError(
                f"{self.name}: this OpenCV ({cv2.__version__}) has no GStreamer support, like all wheels from the package "
                "index; use the one of JetPack or your distribution (python3-opencv), or give /dev/videoN or a URL"
            )

    def _raise_at_end(self, number: int) -> None:
        """Raise the error for the end of the frames, which is none for a file with frames."""
        if not self.is_file:
            raise SourceLost(f"{self.name}: lost after {number} frames; check its cable or network")
        if number == 0:
            raise InputError(f"{self.name}: contains no readable frame; convert it, for example to MP4")


def _redacted(where: str) -> str:
    """Return a source's name without passwords."""
    return _PASSWORD.sub(r"\1=…", _USER.sub("", where))


def _rate(claimed: float) -> float:
    """Return the frame rate (1/s) that a file claims, or a default where it is implausible."""
    low, high = _PLAUSIBLE_RATES
    return claimed if math.isfinite(claimed) and low <= claimed <= high else _DEFAULT_RATE


def _raise_no_device(device: Path, must_be_there: bool) -> None:
    if device.is_absolute() and device.parts[1:2] == ("dev",):
        if not must_be_there:
            return
        found = ", ".join(sorted(str(d) for d in Path("/dev").glob("video*"))) or "none"
        raise SourceLost(f"no camera {device}; found: {found}")
    raise InputError(
        f"{device}: no such video source; give a device number, a path, a URL or a GStreamer pipeline (… ! appsink)"
    )


def _opencv() -> Any:
    """Import OpenCV with its own logging to stderr disabled. Raises MachineError where it is missing."""
    if not logging.getLogger().isEnabledFor(logging.INFO):
        os.environ.setdefault("OPENCV_LOG_LEVEL", "SILENT")
        os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
    try:
        import cv2
    except ImportError as error:
        raise MachineError(f"--camera needs OpenCV ({error}); install it with: {install_hint('watch')}") from error
    return cv2
