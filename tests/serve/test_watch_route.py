"""Watching through the server: the same question about every new image of a directory that the command line names."""

import json
import os
import signal
import threading
import time

import httpx
import pytest
from PIL import Image

import cobra_edge
from cobra_edge.errors import InputError
from cobra_edge.frames.source import Frame, SourceLost
from cobra_edge.serve.watch_sources import SharedSource, watch_sources

from .serve_case import IMAGE, PATIENCE, metric, served, until

QUESTION = "Is there a red circle?"


def put(directory, name, image=IMAGE):
    """Write an image into a directory at once, as a camera's upload does."""
    hidden = directory / f".{name}"
    if isinstance(image, Image.Image):
        image.save(hidden, "PNG")
    else:
        hidden.write_bytes(image if isinstance(image, bytes) else image.read_bytes())
    hidden.rename(directory / name)


@pytest.fixture(scope="module")
def inbox(tmp_path_factory):
    return tmp_path_factory.mktemp("inbox")


@pytest.fixture(scope="module")
def server(mini_bundle, inbox):
    with served(mini_bundle("w4a16-g128"), "--watch", f"inbox={inbox}") as server:
        yield server


def events_of(response):
    """Yield the events of a stream as objects, up to [DONE]."""
    for line in response.iter_lines():
        if line.startswith("data: ") and line != "data: [DONE]":
            yield json.loads(line.removeprefix("data: "))


def watching(url, **fields):
    return httpx.stream("POST", f"{url}/v1/watch", json={"source": "inbox", "prompt": QUESTION} | fields, timeout=PATIENCE)


def feed(directory, names, image=IMAGE, seconds=0.4):
    """Write images one after the other from a thread, so that none replaces another before it was looked at."""

    def write():
        for name in names:
            time.sleep(seconds)
            put(directory, name, image)

    thread = threading.Thread(target=write)
    thread.start()
    return thread


def test_sources_are_listed(server):
    assert httpx.get(f"{server.url}/v1/watch").json() == {"data": [{"id": "inbox"}]}


def test_every_new_image_is_answered_as_the_session_does(server, inbox, mini_bundle):
    same = cobra_edge.load(mini_bundle("w4a16-g128")).ask(IMAGE, QUESTION).read()
    states = metric(server.url, "cobra_edge_state_cache_states")
    with watching(server.url, frames=2) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        events = events_of(response)
        begun = next(events)
        assert begun["source"] == "inbox" and begun["id"].startswith("watch-")
        time.sleep(1.0)  # until the directory is watched
        thread = feed(inbox, ["a.png", "b.png"], seconds=1.0)
        found = list(events)
        thread.join()
    assert [event["answer"] for event in found] == [same, same] and found[-1]["finish_reason"] == "stop"
    assert {event["name"] for event in found} <= {"a.png", "b.png"} and all(event["first_token_ms"] > 0 for event in found)
    assert metric(server.url, "cobra_edge_state_cache_states") == states  # frames do not push out what clients ask again


def test_only_changes_are_told_where_that_is_wanted(server, inbox):
    with watching(server.url, frames=3, on_change=True) as response:
        events = events_of(response)
        next(events)
        time.sleep(1.0)
        thread = feed(inbox, [f"c{i}.png" for i in range(3)], seconds=1.0)
        assert len(list(events)) == 1
        thread.join()


def test_two_clients_watch_one_source(server, inbox):
    with watching(server.url, frames=1) as one, watching(server.url, frames=1, prompt="How many objects are there?") as other:
        streams = [events_of(one), events_of(other)]
        for events in streams:
            next(events)
        time.sleep(1.0)
        put(inbox, "two.png")
        answers = [next(events)["answer"] for events in streams]
    assert answers[0] in ("Yes", "No") and answers[1] not in ("Yes", "No")


@pytest.mark.parametrize(
    ("fields", "status", "code", "message"),
    [
        ({"source": "/etc"}, 404, "source_not_found", "no source '/etc'; sources: inbox"),
        ({"prompt": " "}, 400, "invalid_value", "prompt: the prompt is empty"),
        ({"prompt": "long " * 3000}, 400, "context_length_exceeded", "tokens do not fit after an image"),
        ({"frames": 0}, 400, "invalid_value", "frames: expected 1 or more"),
        ({"model": "other"}, 404, "model_not_found", "other"),
        ({"directory": "/etc"}, 400, "unknown_parameter", "directory: unknown field"),
    ],
)
def test_what_cannot_be_watched_is_refused(server, fields, status, code, message):
    with watching(server.url, **fields) as response:
        error = json.loads(response.read())["error"]
        assert (response.status_code, error["code"]) == (status, code) and message in error["message"]


def test_a_shutdown_ends_watching_at_once(mini_bundle, tmp_path):
    with served(mini_bundle("w4a16-g128"), "--watch", f"inbox={tmp_path}") as server, watching(server.url) as response:
        events = events_of(response)
        next(events)
        os.kill(server.process.pid, signal.SIGTERM)
        assert next(events)["error"]["code"] == "shutting_down"


class Frames:
    """A source of three frames, and then of nothing until it is stopped, or of an error."""

    opened = 0

    def __init__(self, error=None):
        self.error = error

    def frames(self, stop):
        Frames.opened += 1
        yield from (Frame(i, None, 0.0, lambda: Image.new("RGB", (8, 8))) for i in (1, 2, 3))
        if self.error is not None:
            raise self.error
        stop.wait(PATIENCE)


def test_a_source_is_open_while_somebody_watches():
    source, before = SharedSource(Frames), Frames.opened
    with source.watched() as one:
        assert one.take().number in (1, 2, 3) and source.watchers == 1
        with source.watched():
            assert source.watchers == 2 and Frames.opened == before + 1
    until(lambda: source.watchers == 0)
    with source.watched() as again:
        assert again.take() is not None and Frames.opened == before + 2


def test_the_error_of_a_source_goes_to_who_watches_it():
    source = SharedSource(lambda: Frames(InputError("no such thing")))
    with source.watched() as newest, pytest.raises(InputError, match="no such thing"):
        while newest.take() is not None:
            pass


def test_a_lost_source_is_tried_again(monkeypatch):
    monkeypatch.setattr("cobra_edge.frames.reconnect._FIRST_SECONDS", 0.01)
    tries = []

    class Flaky:
        def frames(self, stop):
            tries.append(1)
            if len(tries) < 3:
                raise SourceLost("gone")
            yield Frame(1, "back", 0.0, lambda: Image.new("RGB", (8, 8)))

    with SharedSource(Flaky).watched() as newest:
        assert newest.take().name == "back" and newest.take() is None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["door"], "expected NAME=SOURCE"),
        (["=0"], "expected NAME=SOURCE"),
        (["do/or=0"], "expected NAME=SOURCE"),
        (["a=.", "a=."], "a is named twice"),
    ],
)
def test_a_source_needs_a_name_of_its_own(given, message):
    with pytest.raises(InputError, match=message):
        watch_sources(given)
