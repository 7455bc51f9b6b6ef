"""Where watched images come from: snapshot URLs, streams that come back, pipelines, directories with other files."""

import base64
import http.server
import io
import json
import os
import threading
import time

import cv2
import numpy as np
import pytest
from PIL import Image

from cobra_edge.errors import InputError, MachineError
from cobra_edge.frames import directory as directory_module
from cobra_edge.frames import reconnect as reconnecting
from cobra_edge.frames import snapshots
from cobra_edge.frames.camera import Camera
from cobra_edge.frames.directory import ImageDirectory
from cobra_edge.frames.reconnect import Reconnecting
from cobra_edge.frames.source import Frame, SourceLost, grab_frames
from cobra_edge.frames.unreadable import Unreadable, UnreadableImages
from cobra_edge.inputs.image_format import FORMATS
from cobra_edge.terminal.output import run_command
from cobra_edge.watch import command as watch
from cobra_edge.watch.answers import frame_answers

from ..conftest import MINI
from .test_watch import Capture, Fake, device  # noqa: F401 # a fixture

PNG = (MINI / "demo.png").read_bytes()
WAIT = 20  # seconds, after which something hangs


def saved_jpeg(image):
    file = io.BytesIO()
    image.save(file, "JPEG")
    return file.getvalue()


def jpeg():
    return saved_jpeg(Image.new("RGB", (64, 48), "red"))


class Handler(http.server.BaseHTTPRequestHandler):
    """A camera: /snap.jpg, a stream of some frames, and addresses that are wrong."""

    snapshot, kind, password, stream_frames = jpeg(), "image/jpeg", None, 4
    asked: list[str] = []

    def log_message(self, *_):
        pass

    def do_GET(self):
        Handler.asked.append(self.path)
        if self.password is not None and self.headers.get("Authorization") != self.password:
            self.send_response(401)
            self.send_header("WWW-Authenticate", 'Basic realm="camera"')
            self.end_headers()
        elif self.path == "/snap.jpg":
            self.answer(self.kind, self.snapshot)
        elif self.path == "/page":
            self.answer("text/html; charset=utf-8", b"<html>")
        elif self.path == "/stream":
            self.send_response(200)
            self.send_header("Content-Type", "multipart/x-mixed-replace; boundary=frame")
            self.end_headers()
            head = b"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: %d\r\n\r\n" % len(self.snapshot)
            try:
                for _ in range(self.stream_frames):
                    self.wfile.write(head + self.snapshot + b"\r\n")
            except OSError:
                pass  # who looked first whether it is a stream has left
        else:
            self.send_error(404)

    def answer(self, kind, body):
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def camera_url(monkeypatch):
    """Return the address of that camera, on loopback."""
    monkeypatch.setattr(Handler, "asked", [])
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


def some(source, n):
    """Return the first n frames of a source."""
    stop, frames = threading.Event(), []
    for frame in source.frames(stop):
        frames.append(frame)
        if len(frames) == n:
            stop.set()
            break
    return frames


@pytest.mark.parametrize("kind", ["image/jpeg", "application/octet-stream"])
def test_a_url_that_answers_one_image_is_polled(camera_url, monkeypatch, capfd, kind):
    monkeypatch.setattr(Handler, "kind", kind)
    frames = some(Camera(f"{camera_url}/snap.jpg", 0.01), 3)
    assert [frame.number for frame in frames] == [1, 2, 3] and Handler.asked == ["/snap.jpg"] * 4  # one to see what it is
    assert frames[0].image().size == (64, 48)
    assert f"watching {camera_url}/snap.jpg, one image every 0.01 s" in capfd.readouterr().err


def test_a_snapshot_that_lacks_its_end_is_read_and_a_broken_one_is_errors_once(camera_url, monkeypatch):
    monkeypatch.setattr(Handler, "snapshot", jpeg()[:-2])
    assert some(Camera(f"{camera_url}/snap.jpg"), 1)[0].image().getpixel((9, 9))[0] > 200
    monkeypatch.setattr(Handler, "snapshot", jpeg()[:-20])
    reports, enough = [], threading.Event()
    unreadable = UnreadableImages(reports.append)
    monkeypatch.setattr(
        unreadable, "add", lambda image, add=unreadable.add: (add(image), unreadable.count > 2 and enough.set())
    )

    class Some:
        def frames(self, stop):
            for frame in Camera(f"{camera_url}/snap.jpg", 0.01).frames(stop):
                if enough.is_set():
                    return
                yield frame

    with grab_frames(Some()) as newest:
        assert list(frame_answers(Fake(), "?", newest, 32, unreadable)) == []
    assert len(reports) == 1 < unreadable.count
    assert reports[0].error.startswith(f"{camera_url}/snap.jpg: truncated or damaged image")


def test_a_user_and_a_password(camera_url, monkeypatch, capfd):
    monkeypatch.setattr(Handler, "password", "Basic " + base64.b64encode(b"me:s@cret").decode())
    with_user = camera_url.replace("//", "//me:s%40cret@")
    assert len(some(Camera(f"{with_user}/snap.jpg", 0.01), 2)) == 2
    for where in (camera_url, camera_url.replace("//", "//me:wrong-secret@")):
        with pytest.raises(SourceLost, match=r"returns status 401 .*; give user and password") as error:
            some(Camera(f"{where}/snap.jpg"), 1)
        assert "secret" not in str(error.value)
    assert "cret" not in capfd.readouterr().err


def test_answers_that_are_no_image(camera_url):
    with pytest.raises(SourceLost, match=r"/nowhere: returns status 404 \(.*\); check its URL"):
        some(Camera(f"{camera_url}/nowhere"), 1)
    with pytest.raises(InputError, match="/page: returns a web page; give the URL of its stream"):
        some(Camera(f"{camera_url}/page"), 1)
    with pytest.raises(InputError, match="not a URL"):
        Camera("http://[camera/snap.jpg")
    with pytest.raises(InputError, match="not a URL"):
        Camera("http://camera:port/snap.jpg")


def test_a_snapshot_is_bounded_in_bytes_and_time(camera_url, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(snapshots, "_MAX_BYTES", 100)
        with pytest.raises(SourceLost, match="the response exceeds"):
            some(Camera(f"{camera_url}/snap.jpg"), 1)
    monkeypatch.setattr(snapshots, "_WHOLE_SECONDS", -1.0)
    with pytest.raises(SourceLost, match="takes more than"):
        some(Camera(f"{camera_url}/snap.jpg"), 1)


def test_a_stream_that_ends_is_opened_again(camera_url, monkeypatch, capfd):
    """Through OpenCV, as a stream of JPEGs over HTTP."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (240, 320, 3)).astype(np.uint8))
    monkeypatch.setattr(Handler, "snapshot", saved_jpeg(noise))
    with pytest.raises(SourceLost, match="/stream: lost after 4 frames"):
        some(Camera(f"{camera_url}/stream"), 5)
    monkeypatch.setattr(reconnecting, "_FIRST_SECONDS", 0.01)
    frames = some(Reconnecting(Camera(f"{camera_url}/stream")), 6)
    assert [frame.number for frame in frames] == [1, 2, 3, 4, 5, 6]
    assert "/stream: lost after 4 frames; check its cable or network; retrying in 0 s" in capfd.readouterr().err


class Stop:
    """An event that remembers how long it was waited for."""

    def __init__(self):
        self.waited = []

    def is_set(self):
        return len(self.waited) > 8

    def wait(self, seconds):
        self.waited.append(seconds)


class Failing:
    """A source that gives frames in some of its tries, and fails in all."""

    def __init__(self, tries, error=SourceLost):
        self.tries, self.error = iter(tries), error

    def frames(self, stop):
        for number in range(1, next(self.tries, 0) + 1):
            yield Frame(number, None, 0.0, lambda: None)
        raise self.error("gone")


def test_waits_grow_until_a_frame_comes():
    stop = Stop()
    frames = Reconnecting(Failing([0, 0, 0, 2, 1])).frames(stop)
    assert [frame.number for frame in frames] == [1, 2, 3]
    assert stop.waited == [1, 2, 4, 1, 1, 2, 4, 8, 16]


@pytest.mark.parametrize("error", [InputError, MachineError, KeyError])
def test_only_a_source_that_went_away_is_tried_again(error):
    frames = Reconnecting(Failing([1, 1], error)).frames(Stop())
    assert next(frames).number == 1
    with pytest.raises(error, match="gone"):
        next(frames)


def test_a_source_that_is_not_there_yet(tmp_path):
    with pytest.raises(SourceLost, match="no camera /dev/video77"):
        Camera("77")
    with pytest.raises(SourceLost, match="77: cannot be opened"):
        some(Camera("77", must_be_there=False), 1)
    with pytest.raises(InputError, match="no such video"):  # a name that is wrong will not come
        Camera("nowhere.mp4", must_be_there=False)


def test_reconnect_through_the_command(monkeypatch, capfd):
    monkeypatch.setattr(reconnecting, "_FIRST_SECONDS", 0.0)
    monkeypatch.setattr(watch.Opening, "load", lambda self: Fake())
    tries, opened = [], []

    class Coming:
        def __init__(self, where, poll_seconds, must_be_there):
            opened.append((where, poll_seconds, must_be_there))

        def frames(self, stop):
            tries.append(1)
            if len(tries) > 2:
                image = Image.new("RGB", (4, 4))
                image.info["number"] = 7
                yield Frame(1, None, time.perf_counter(), lambda: image)
                return
            raise SourceLost("camera: went away")

    monkeypatch.setattr(watch, "Camera", Coming)
    arguments = ["BUNDLE", "--camera", "0", "--prompt", "?", "--json"]
    assert run_command(watch.command, [*arguments, "--reconnect", "--poll-seconds", "0.5"]) == 0
    out, err = capfd.readouterr()
    assert json.loads(out.splitlines()[0])["answer"] == "? 7" and err.count("retrying in") == 2
    tries.clear()
    assert run_command(watch.command, arguments) == 3
    assert opened == [("0", 0.5, False), ("0", 1.0, True)]


# GStreamer

PIPELINE = "nvarguscamerasrc ! nvvidconv ! video/x-raw,format=BGRx ! videoconvert ! video/x-raw,format=BGR ! appsink drop=1"


def test_a_pipeline_is_opened_with_gstreamer(device, monkeypatch, capfd):  # noqa: F811
    monkeypatch.setattr(cv2.videoio_registry, "hasBackend", lambda backend: backend == cv2.CAP_GSTREAMER)
    frames = some(Camera(PIPELINE), 2)
    assert device.asked == [(PIPELINE, cv2.CAP_GSTREAMER)] and frames[0].image().size == (4, 4)
    secret = "rtspsrc location=rtsp://me:one-secret@camera/live user-pw=two-secret ! decodebin ! appsink"
    some(Camera(secret), 1)
    assert device.asked[-1] == (secret, cv2.CAP_GSTREAMER)
    assert "secret" not in capfd.readouterr().err
    monkeypatch.setattr(Capture, "opened", False)
    with pytest.raises(SourceLost, match="appsink drop=1: cannot be opened; test it with gst-launch-1.0"):
        some(Camera(PIPELINE), 1)


def test_a_pipeline_without_gstreamer_or_without_its_end(monkeypatch, capfd):
    monkeypatch.setattr(cv2.videoio_registry, "hasBackend", lambda backend: False)
    assert run_command(watch.command, ["BUNDLE", "--prompt", "?", "--camera", PIPELINE]) == 3
    assert "has no GStreamer" in capfd.readouterr().err
    for where in ("v4l2src ! videoconvert", "v4l2src ! appsink ! fakesink"):
        assert run_command(watch.command, ["BUNDLE", "--prompt", "?", "--camera", where]) == 2
        assert "does not end in appsink" in capfd.readouterr().err


def test_passwords_in_a_query_are_not_printed():
    name = Camera("http://camera/snap.cgi?user=me&pwd=secret&loginpass=kept&size=1").name
    assert name == "http://camera/snap.cgi?user=me&pwd=…&loginpass=kept&size=1"
    assert Camera("rtsp://me:p@ss@camera/").name == "rtsp://camera/"


# Directories


def stable_directory(tmp_path, monkeypatch, seconds=0.0):
    """Return a directory whose files are judged after so many seconds, and what it tells."""
    monkeypatch.setattr(directory_module, "_SETTLED_SECONDS", seconds)
    reports = []
    return ImageDirectory(tmp_path, UnreadableImages(reports.append)), reports


def look_at(source, *files):
    return source._newest({str(file) for file in files} | source._recheck())


def test_files_that_are_no_image_are_errors_once_each(tmp_path, monkeypatch):
    source, reports = stable_directory(tmp_path, monkeypatch)
    contents = {"cut.jpg": jpeg()[:-20], "phone.heic": b"\0\0\0\x1cftypheic" + bytes(16), "empty.png": b"", "tool.dng": b"raw"}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    os.mkdir(tmp_path / "folder.png")
    (tmp_path / "notes.txt").write_text("not looked at")
    assert look_at(source, *tmp_path.iterdir()) is None and reports == []
    for _ in range(3):
        assert look_at(source) is None
    assert sorted(image.name for image in reports) == ["cut.jpg", "empty.png", "folder.png", "phone.heic", "tool.dng"]
    assert all(image.frame is None and str(tmp_path / image.name) in image.error for image in reports)
    assert any("a HEIC image" in image.error for image in reports)
    (tmp_path / "cut.jpg").write_bytes(jpeg())
    assert look_at(source, tmp_path / "cut.jpg")[0] == "cut.jpg"
    (tmp_path / "cut.jpg").write_bytes(jpeg()[:-30])
    look_at(source, tmp_path / "cut.jpg")
    look_at(source)
    assert source._unreadable.count == 6 and len(reports) == 5  # counted, reports before


def test_a_file_that_no_image_can_be_is_errors_although_a_newer_one_is_taken(tmp_path, monkeypatch):
    source, reports = stable_directory(tmp_path, monkeypatch)
    for index, (name, content) in enumerate(
        [("a.heic", b"\0\0\0\x1cftypheic" + bytes(16)), ("b.jpg", jpeg()), ("c.jpg", jpeg())]
    ):
        (tmp_path / name).write_bytes(content)
        os.utime(tmp_path / name, (1000 + index, 1000 + index))
    name, _, older = look_at(source, *tmp_path.iterdir())
    assert (name, older) == ("c.jpg", 1)
    look_at(source)
    assert [image.name for image in reports] == ["a.heic"]


def test_a_file_that_is_being_written_is_tried_again_without_a_word(tmp_path, monkeypatch):
    source, reports = stable_directory(tmp_path, monkeypatch, seconds=1000.0)
    file, content = tmp_path / "slow.jpg", jpeg()
    for part in (100, 200, len(content) - 9):
        file.write_bytes(content[:part])
        assert look_at(source, file) is None
    file.write_bytes(content)
    assert look_at(source)[0] == "slow.jpg"  # nobody reports that it has changed
    file.write_bytes(content[:100])
    look_at(source, file)
    file.unlink()
    look_at(source)
    assert reports == [] and source._unreadable.count == 0 and not source._pending


def test_a_file_that_is_never_at_rest_is_errors(tmp_path, monkeypatch):
    source, reports = stable_directory(tmp_path, monkeypatch, seconds=1000.0)
    monkeypatch.setattr(directory_module, "_CHANGING_SECONDS", 0.0)
    for size in (100, 120):
        (tmp_path / "latest.jpg").write_bytes(jpeg()[:size])
        look_at(source)
        look_at(source, tmp_path / "latest.jpg")
    assert [image.name for image in reports] == ["latest.jpg"]


@pytest.mark.parametrize("kind", ["MPO", *(kind for kind in FORMATS if kind == "AVIF")])
def test_rarer_endings_are_frames(tmp_path, monkeypatch, kind):
    source, _ = stable_directory(tmp_path, monkeypatch)
    file = tmp_path / f"a.{kind.lower()}"
    Image.open(MINI / "demo.png").convert("RGB").save(file, kind)
    assert look_at(source, file)[0] == file.name


@pytest.mark.parametrize("as_json", [True, False])
def test_unreadable_files_through_the_command(tmp_path, monkeypatch, capfd, as_json):
    monkeypatch.setattr(directory_module, "_SETTLED_SECONDS", 0.0)
    session = Fake()
    session.look = lambda _: 1
    monkeypatch.setattr(watch.Opening, "load", lambda self: session)
    watching, reports = threading.Event(), threading.Event()
    monkeypatch.setattr(directory_module, "tell", lambda text: watching.set())
    real = UnreadableImages.add
    monkeypatch.setattr(UnreadableImages, "add", lambda self, image: (real(self, image), reports.set()))

    def write():
        assert watching.wait(WAIT)
        (tmp_path / "phone.heic").write_bytes(b"\0\0\0\x1cftypheic" + bytes(16))
        assert reports.wait(WAIT)
        (tmp_path / ".good").write_bytes(PNG)
        os.rename(tmp_path / ".good", tmp_path / "good.png")

    thread = threading.Thread(target=write)
    thread.start()
    arguments = ["BUNDLE", "--directory", str(tmp_path), "--prompt", "?", "--frames", "1", *(["--json"] if as_json else [])]
    assert run_command(watch.command, arguments) == 0
    thread.join()
    out, err = capfd.readouterr()
    if as_json:
        report, answer, last = map(json.loads, out.splitlines())
        assert (report["frame"], report["name"]) == (None, "phone.heic") and "a HEIC image" in report["error"]
        assert answer["name"] == "good.png" and last["summary"]["unreadable"] == 1 and err == ""
    else:
        assert f"{tmp_path / 'phone.heic'}: a HEIC image" in err
        assert "1 frames answered, 0 dropped, 1 images unreadable" in out


def test_what_was_errors_is_remembered_for_so_many_names():
    reports = []
    unreadable = UnreadableImages(reports.append)
    for index in range(3000):
        unreadable.add(Unreadable(None, f"{index}.jpg", "cut"))
        unreadable.add(Unreadable(None, f"{index}.jpg", "cut"))
    assert unreadable.count == 6000 and len(reports) == 3000 and len(unreadable._errors) == 1024
