"""Watch: the newest frame is answered, others are dropped and counted, memory stays, and every end has its summary."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from PIL import Image

import cobra_edge
from cobra_edge.environment.requirements import install_hint
from cobra_edge.errors import InputError, MachineError
from cobra_edge.frames import camera as camera_module
from cobra_edge.frames.camera import Camera
from cobra_edge.frames.directory import ImageDirectory
from cobra_edge.frames.source import Frame, Newest, grab_frames
from cobra_edge.frames.unreadable import Unreadable, UnreadableImages
from cobra_edge.terminal.output import run_command
from cobra_edge.watch import command as watch
from cobra_edge.watch import summary as summary_module
from cobra_edge.watch.answers import FrameAnswer, frame_answers
from cobra_edge.watch.summary import Aggregate

from ..conftest import MINI

IMAGE = MINI / "demo.png"
WHAT, HOW_MANY = "What is in the image?", "How many objects are there?"
WAIT = 20  # seconds, after which something hangs


@pytest.fixture(scope="module")
def bundle(mini_bundle):
    return str(mini_bundle("w4a16-g128"))


@pytest.fixture(scope="module")
def session(bundle):
    return cobra_edge.load(bundle)


def write_video(file, images, rate):
    """Write an MJPG avi of images of one size."""
    writer = cv2.VideoWriter(str(file), cv2.VideoWriter_fourcc(*"MJPG"), rate, images[0].size)
    for image in images:
        writer.write(np.ascontiguousarray(np.asarray(image.convert("RGB"))[..., ::-1]))
    writer.release()
    return file


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    """Return one second of one image, 60 frames a second."""
    return write_video(tmp_path_factory.mktemp("video") / "demo.avi", [Image.open(IMAGE)] * 60, 60)


class Fake:
    """A session whose answers take as long as `busy` takes; it says which image it was asked about."""

    def __init__(self, busy=lambda number: None):
        self.busy = busy

    def look(self, image):
        if image.info.get("hostile"):
            raise InputError("the image: 9999 × 1 pixels, too wide")
        return image.info["number"]

    def ask(self, state, prompt, max_new_tokens=256):
        if not prompt:
            raise InputError("the prompt is empty; ask something")
        if state is not None:
            self.busy(state)
        return SimpleNamespace(ttft_ms=1.5, finish="end", read=lambda: f"{prompt} {state}")


def frame(number, **info):
    image = Image.new("RGB", (8, 8))
    image.info = {"number": number, **info}
    return Frame(number, None, time.perf_counter(), lambda: image)


class Frames:
    """A source of what a function yields."""

    def __init__(self, given):
        self.given = given

    def frames(self, stop):
        yield from self.given(stop)


def watched(source, session, prompt="?", unreadable=None):
    with grab_frames(source) as newest:
        return list(frame_answers(session, prompt, newest, 32, unreadable or UnreadableImages(pytest.fail)))


def test_the_holder_has_the_newest_and_says_how_it_ended():
    newest = Newest()
    newest.put("old")
    newest.put("new")
    newest.end(MachineError("gone"))
    assert newest.take() == "new"
    for _ in range(2):
        with pytest.raises(MachineError, match="gone"):
            newest.take()
    done = Newest()
    threading.Timer(0.05, done.put, ["late"]).start()
    assert done.take() == "late"
    threading.Timer(0.05, done.end).start()
    assert done.take() is None


def test_a_fast_source_drops_what_comes_while_an_answer_is_given():
    begun, come = threading.Event(), threading.Event()

    def given(stop):
        yield frame(1)
        assert begun.wait(WAIT)
        for number in range(2, 6):
            yield frame(number)
        come.set()

    def busy(number):
        begun.set()
        assert come.wait(WAIT)

    answers = watched(Frames(given), Fake(busy))
    assert [(a.frame, a.dropped, a.answer) for a in answers] == [(1, 0, "? 1"), (5, 3, "? 5")]


def test_a_slow_source_drops_nothing():
    answered = threading.Semaphore(1)

    def given(stop):
        for number in range(1, 6):
            assert answered.acquire(timeout=WAIT)
            yield frame(number)

    with grab_frames(Frames(given)) as newest:
        answers = []
        for answer in frame_answers(Fake(), "?", newest, 32, UnreadableImages(pytest.fail)):
            answers.append(answer)
            answered.release()
    assert [a.frame for a in answers] == [1, 2, 3, 4, 5] and not any(a.dropped for a in answers)


def test_one_frame_is_alive_while_an_answer_is_given():
    """Besides the one that waits nothing is kept, neither of the frame that is asked about nor of those that were let go."""
    made, counts = [], []
    begun, come = threading.Event(), threading.Event()

    def given(stop):
        yield noted(1)
        assert begun.wait(WAIT)
        for number in range(2, 200):
            yield noted(number)
        come.set()
        assert not stop.wait(0.1)

    def noted(number):
        new = frame(number)
        made.extend([weakref.ref(new), weakref.ref(new.image())])
        return new

    def alive():
        return sum(reference() is not None for reference in made)

    def busy(number):
        if number == 1:
            assert alive() == 0  # asked about by its state alone
        begun.set()
        assert come.wait(WAIT)
        deadline = time.monotonic() + WAIT  # the grab_frames thread may be about to let go of its own
        while alive() > 2 and time.monotonic() < deadline:
            time.sleep(0.001)
        counts.append(alive())

    answers = watched(Frames(given), Fake(busy))
    assert [a.frame for a in answers] == [1, 199] and counts == [2, 0]  # a frame and its image


def test_latencies_are_from_the_capture():
    def given(stop):
        late = frame(1)
        yield Frame(1, "a.png", late.captured - 2.0, late.image)

    (answer,) = watched(Frames(given), Fake(lambda number: time.sleep(0.1)))
    assert answer.first_token_ms > 2001.5 and answer.answer_ms > 2100
    assert answer.answer_ms - answer.first_token_ms > 98  # what came after the first token is none of its
    assert (answer.name, answer.finish) == ("a.png", "end")


def test_an_image_that_cannot_be_looked_at_is_errors_and_counts_as_dropped():
    answered = threading.Semaphore(1)

    def given(stop):
        yield frame(1, hostile=True)
        time.sleep(0.1)
        yield frame(2)
        assert answered.acquire(timeout=WAIT)

    reports = []
    unreadable = UnreadableImages(reports.append)
    answers = watched(Frames(given), Fake(), unreadable=unreadable)
    assert [(a.frame, a.dropped) for a in answers] == [(2, 1)]
    assert reports == [Unreadable(1, None, "the image: 9999 × 1 pixels, too wide")] and unreadable.count == 1


def test_the_source_is_errors_to_stop():
    stopped = threading.Event()

    def given(stop):
        yield frame(1)
        if stop.wait(WAIT):
            stopped.set()

    with grab_frames(Frames(given)) as newest:
        assert next(frame_answers(Fake(), "?", newest, 32, UnreadableImages(pytest.fail))).frame == 1
    assert stopped.is_set()


def test_the_aggregate(monkeypatch):
    monkeypatch.setattr(summary_module, "LATENCIES_KEPT", 100)
    aggregate = Aggregate()
    assert aggregate.summary(0).answer_ms is None and aggregate.summary(0).resident_bytes_start is None
    aggregate = Aggregate()
    for number in range(1, 151):
        first = None if number == 150 else float(number)
        aggregate.add(FrameAnswer(number, None, "", "end", first, 2.0 * number, 2))
    got = aggregate.summary(7)
    assert (got.answered, got.dropped, got.unreadable) == (150, 300, 7)
    assert got.answer_ms.median == pytest.approx(201) and got.answer_ms.p95 == pytest.approx(
        2 * np.percentile(range(51, 151), 95)
    )
    assert got.first_token_ms.median == pytest.approx(np.median(range(50, 150)))
    assert got.resident_bytes_start > 1 << 20 and got.resident_bytes_end > 1 << 20


@pytest.fixture
def command(monkeypatch, capfd):
    """Return what the command says about frames of a fake camera: its exit code, rows or records, and stderr."""

    def call(given, *arguments, session=None):
        monkeypatch.setattr(watch.Opening, "load", lambda self: session or Fake())
        monkeypatch.setattr(watch, "Camera", lambda *where, **how: Frames(given))
        code = run_command(watch.command, ["BUNDLE", "--camera", "0", *arguments])
        out, err = capfd.readouterr()
        return code, out.splitlines(), err

    return call


def one_by_one(*numbers, then=None):
    """Return frames that wait until those before them must have been answered."""

    def given(stop):
        for number in numbers:
            yield frame(number)
            stop.wait(0.1)
        if then is not None:
            raise then

    return given


def test_rows_and_their_summary(command):
    code, rows, _ = command(one_by_one(1, 4), "--prompt", "Who?")
    assert code == 0
    assert rows[0].split() == ["frame", "dropped", "first", "token", "ms", "answer", "ms", "answer"]
    assert [row.split()[:2] + row.split()[4:] for row in rows[1:3]] == [["1", "0", "Who?", "1"], ["4", "2", "Who?", "4"]]
    assert rows[3] == "2 frames answered, 2 dropped, 0 images unreadable"
    assert rows[4].startswith("from capture to first token: median ") and rows[5].startswith("resident memory: ")


def test_a_cut_answer_is_marked(command):
    session = Fake()
    session.ask = lambda state, prompt, max_new_tokens=256: SimpleNamespace(
        ttft_ms=1.5, finish="length", read=lambda: "four\nof"
    )
    _, rows, _ = command(one_by_one(1), "--prompt", "?", session=session)
    assert rows[1].endswith("  four of … [cut]")
    _, rows, _ = command(one_by_one(1), "--prompt", "?", "--json", session=session)
    assert (json.loads(rows[0])["answer"], json.loads(rows[0])["finish"]) == ("four\nof", "length")


def test_only_changes_are_printed(command):
    session = Fake()
    session.look = lambda image: image.info["number"] // 3  # 0, 0, 1, 1, 1, 2, 0
    code, rows, _ = command(one_by_one(1, 2, 3, 4, 5, 6, 7), "--prompt", "?", "--on-change", "--json", session=session)
    records = [json.loads(row) for row in rows]
    assert code == 0 and [r["frame"] for r in records[:-1]] == [1, 3, 6]
    assert records[-1]["summary"]["answered"] == 7


def test_it_stops_after_so_many_frames(command):
    def endless(stop):
        number = 0
        while not stop.wait(0.001):
            number += 1
            yield frame(number)

    code, rows, _ = command(endless, "--prompt", "?", "--json", "--frames", "3")
    assert code == 0 and len(rows) == 4 and json.loads(rows[-1])["summary"]["answered"] == 3


def test_a_camera_that_goes_away_has_its_summary_first(command):
    code, rows, err = command(one_by_one(1, then=MachineError("camera: went away")), "--prompt", "?")
    assert code == 3 and "1 frames answered, 0 dropped, 0 images unreadable" in rows and err == "error: camera: went away\n"


def test_a_prompt_that_cannot_be_asked_is_known_before_the_first_frame(command):
    def never(stop):
        raise AssertionError("the camera was opened")
        yield

    code, rows, err = command(never, "--prompt", "")
    assert (code, rows) == (2, []) and err.startswith("error: the prompt is empty")


@pytest.mark.parametrize("sources", [[], ["--camera", "0", "--directory", "."]])
def test_one_source_is_wanted(sources, capfd):
    assert run_command(watch.command, ["BUNDLE", "--prompt", "?", *sources]) == 2
    assert "give either --camera or --directory" in capfd.readouterr().err


def test_frames_of_a_video_are_its_images_at_its_pace(tmp_path):
    shown = Image.open(IMAGE).convert("RGB")
    colours = [shown, Image.new("RGB", shown.size, (250, 10, 30))]
    file = write_video(tmp_path / "two.avi", colours * 10, 20)
    came = [(f.number, f.captured, f.image()) for f in Camera(str(file)).frames(threading.Event())]
    assert [number for number, _, _ in came] == list(range(1, 21))
    for (_, _, image), wanted in zip(came, colours * 10, strict=True):
        assert image.mode == "RGB" and np.abs(np.asarray(image, float) - np.asarray(wanted, float)).mean() < 4
    times = np.array([captured for _, captured, _ in came])
    due = times[0] + np.arange(20) / 20
    assert (times >= due - 1e-3).all() and times[-1] - times[0] < 3


class Capture:
    """Stands in for a device of OpenCV's: three frames, then none; `opened` says whether it opens at all."""

    opened, asked, released = True, [], 0

    def __init__(self, *where):
        Capture.asked.append(where)
        self.left = 3

    def isOpened(self):
        return self.opened

    def get(self, _property):
        return 0.0

    def set(self, _property, _value):
        return False

    def read(self):
        self.left -= 1
        return self.left >= 0, np.zeros((4, 4, 3), np.uint8)

    def release(self):
        Capture.released += 1


@pytest.fixture
def device(monkeypatch):
    monkeypatch.setattr(Capture, "asked", [])
    monkeypatch.setattr(Capture, "released", 0)
    monkeypatch.setattr(cv2, "VideoCapture", Capture)
    monkeypatch.setattr(camera_module.Path, "is_char_device", lambda self: str(self) in ("/dev/video3", "/dev/null"))
    return Capture


@pytest.mark.parametrize("where", ["3", "/dev/video3", "rtsp://user:secret@camera/live"])
def test_a_device_or_a_stream_that_goes_away(device, where, capfd):
    frames = Camera(where).frames(threading.Event())
    assert [next(frames).number for _ in range(3)] == [1, 2, 3]
    with pytest.raises(MachineError, match="lost after 3 frames") as error:
        next(frames)
    assert device.released == 1 and "secret" not in f"{error.value}{capfd.readouterr().err}"
    ((opened, *options),) = device.asked
    assert opened == (3 if where == "3" else where)
    assert options[:1] == ([cv2.CAP_FFMPEG] if "://" in where else [])


def test_a_stream_that_is_silent_is_not_waited_for_without_end(device):
    next(Camera("rtsp://camera/live").frames(threading.Event()))
    ((_, _, options),) = device.asked
    limits = dict(zip(options[::2], options[1::2], strict=True))
    assert limits == {cv2.CAP_PROP_OPEN_TIMEOUT_MSEC: 10_000, cv2.CAP_PROP_READ_TIMEOUT_MSEC: 10_000}


def test_a_camera_that_does_not_open(device, monkeypatch):
    monkeypatch.setattr(Capture, "opened", False)
    with pytest.raises(MachineError, match="rtsp://camera/: cannot be opened"):
        next(Camera("rtsp://me:secret@camera/").frames(threading.Event()))


def test_sources_that_are_none(tmp_path, monkeypatch):
    with pytest.raises(MachineError, match="no camera /dev/video77; found: "):
        Camera("77")
    with pytest.raises(MachineError, match="no camera /dev/nothing"):
        Camera("/dev/nothing")
    with pytest.raises(InputError, match=r"nowhere.mp4: no such video source; give a device number"):
        Camera("nowhere.mp4")
    (tmp_path / "text.mp4").write_text("not a video")
    with pytest.raises(InputError, match="text.mp4: not a video that OpenCV can read"):
        next(Camera(str(tmp_path / "text.mp4")).frames(threading.Event()))
    with pytest.raises(InputError, match="none: no such directory"):
        ImageDirectory(tmp_path / "none", UnreadableImages(pytest.fail))


@pytest.mark.parametrize(("name", "arguments"), [("cv2", ["--camera", str(IMAGE)]), ("watchfiles", ["--directory", "."])])
def test_a_library_that_is_not_installed(monkeypatch, capfd, name, arguments):
    monkeypatch.setitem(sys.modules, name, None)
    assert run_command(watch.command, ["BUNDLE", "--prompt", "?", *arguments]) == 3
    assert f"install it with: {install_hint('watch')}" in capfd.readouterr().err


def test_a_video_through_the_command(bundle, session, video):
    """What OpenCV reads is answered as the same image is in Python, and memory does not grow with the frames."""
    command = [sys.executable, "-m", "cobra_edge", "watch", bundle, "--camera", video, "--prompt", HOW_MANY, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=os.environ | {"OMP_NUM_THREADS": "1"})
    *records, last = map(json.loads, done.stdout.splitlines())
    assert done.returncode == 0 and done.stderr == f"watching {video}, 112 × 112 pixels\n"
    (image,) = (f.image() for f, _ in zip(Camera(str(video)).frames(threading.Event()), range(1), strict=False))
    assert {r["answer"] for r in records} == {session.ask(image, HOW_MANY).read()}
    frames = [r["frame"] for r in records]
    assert frames[-1] == 60 and [r["dropped"] for r in records] == list(np.diff([0, *frames]) - 1)
    assert all(0 < r["first_token_ms"] <= r["answer_ms"] for r in records)
    summary = last["summary"]
    assert (summary["answered"], summary["answered"] + summary["dropped"]) == (len(records), 60)
    assert summary["answer_ms"]["median"] == pytest.approx(np.median([r["answer_ms"] for r in records]))
    assert len(records) > 2 and summary["resident_bytes_end"] - summary["resident_bytes_start"] < 16 << 20


class Watching:
    """The real command, watching a directory."""

    def __init__(self, bundle, folder, *arguments):
        command = [sys.executable, "-m", "cobra_edge", "watch", bundle, "--directory", folder, "--prompt", HOW_MANY, *arguments]
        self.child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def __enter__(self):
        assert self.child.stderr.readline().startswith("watching ")
        return self

    def __exit__(self, *_error):
        self.child.kill()
        self.child.communicate()

    def record(self):
        return json.loads(self.child.stdout.readline())


def test_a_directory_through_the_command(bundle, session, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    content = IMAGE.read_bytes()
    Image.new("RGB", (64, 64), "white").save(tmp_path / "white.png")
    white = (tmp_path / "white.png").read_bytes()
    (folder / "before.png").write_bytes(content)  # was there before: no frame
    expected = session.ask(IMAGE, HOW_MANY).read()
    with Watching(bundle, folder, "--json") as watching:
        with (folder / "slow.png").open("wb") as slow:
            slow.write(content[: len(content) // 2])
            slow.flush()
            time.sleep(0.3)
            slow.write(content[len(content) // 2 :])
        first = watching.record()
        assert (first["frame"], first["name"], first["answer"], first["dropped"]) == (1, "slow.png", expected, 0)
        (folder / "notes.txt").write_text("not an image")
        (folder / ".hidden.png").write_bytes(content)
        os.rename(folder / ".hidden.png", folder / "moved.png")
        assert watching.record()["name"] == "moved.png"
        os.chmod(folder / "moved.png", 0o600)  # not written anew
        (tmp_path / "outside.png").write_bytes(content)
        (folder / "link.png").symlink_to(tmp_path / "outside.png")
        assert watching.record()["name"] == "link.png"
        (folder / "slow.png").write_bytes(white)
        again = watching.record()
        assert (again["name"], again["dropped"]) == ("slow.png", 0) and again["frame"] == 4
        watching.child.send_signal(signal.SIGTERM)
        watching.child.send_signal(signal.SIGINT)
        out, err = watching.child.communicate(timeout=WAIT)
        assert json.loads(out)["summary"]["answered"] == 4
        assert watching.child.returncode == 130 and err.strip() == "interrupted"


def test_a_directory_that_goes_away(bundle, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    with Watching(bundle, folder) as watching:
        folder.rmdir()
        out, err = watching.child.communicate(timeout=WAIT)
        assert watching.child.returncode == 3 and "0 frames answered, 0 dropped" in out
        assert err == f"error: {folder}: removed after 0 images; watch it again when it exists\n"


def test_of_files_that_come_together_the_newest_whole_one_is_taken(tmp_path):
    for index, name in enumerate(("old.png", "new.png", "broken.png", "older.png")):
        file = tmp_path / name
        Image.new("RGB", (8, 8), (index * 50, 0, 0)).save(file)
        os.utime(file, (1000 - 1000 * (name == "older.png") + index, 1000 - 1000 * (name == "older.png") + index))
    broken = (tmp_path / "broken.png").read_bytes()
    (tmp_path / "broken.png").write_bytes(broken[:40])
    os.utime(tmp_path / "broken.png", (5000, 5000))
    source = ImageDirectory(tmp_path, UnreadableImages(pytest.fail))
    paths = [str(file) for file in tmp_path.iterdir()]
    name, image, older = source._newest(paths)
    assert (name, image.getpixel((0, 0)), older) == ("new.png", (50, 0, 0), 2)
    assert source._newest(paths) is None  # nothing was written since
    (tmp_path / "broken.png").write_bytes(broken)
    name, _, older = source._newest(paths)
    assert (name, older) == ("broken.png", 0)
    assert source._newest([str(tmp_path / "gone.png")]) is None
    (tmp_path / "fake.jpg").write_text("not an image")
    assert source._newest([str(tmp_path / "fake.jpg")]) is None


def test_a_file_that_is_written_while_it_is_read_is_passed_over(tmp_path, monkeypatch):
    file = tmp_path / "torn.png"
    Image.new("RGB", (4, 4)).save(file)

    def slowly(path):
        Image.new("RGB", (9, 9)).save(file)
        return Image.new("RGB", (4, 4))

    source = ImageDirectory(tmp_path, UnreadableImages(pytest.fail))
    with monkeypatch.context() as patch:
        patch.setattr("cobra_edge.frames.directory.load_image", slowly)
        assert source._newest([str(file)]) is None
    assert source._newest([str(file)])[1].size == (9, 9)


def test_what_is_known_of_files_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr("cobra_edge.frames.directory._KNOWN_FILES", 3)
    source = ImageDirectory(tmp_path, UnreadableImages(pytest.fail))
    for index in range(6):
        Image.new("RGB", (4, 4)).save(tmp_path / f"{index}.png")
        assert source._newest([str(tmp_path / f"{index}.png")]) is not None
    assert list(source._known) == ["3.png", "4.png", "5.png"]
