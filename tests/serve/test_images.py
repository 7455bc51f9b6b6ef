"""Images are decoded in child processes: what is no image is refused, and what takes long, or crashes, harms nobody else."""

from __future__ import annotations

import asyncio
import io
import json
import signal
import socket
from dataclasses import replace
from typing import Any
from urllib.parse import urlsplit

import httpx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cobra_edge.inputs.image import ImageTransform, Normalisation, load_image
from cobra_edge.serve import image_decoding
from cobra_edge.serve.errors import ApiError
from cobra_edge.serve.fair_slots import FairSlots
from cobra_edge.serve.image_decoding import ImageDecoder
from cobra_edge.serve.image_worker import Decoded, Failed, Setup, decode
from cobra_edge.serve.limits import Limits

from .serve_case import IMAGE, PATIENCE, data_uri, image_part, metric, question, served, until

LIMITS = Limits(image_pixels=1000)
TRANSFORMS = [
    ImageTransform(16, strategy, (Normalisation((0.5,) * 3, (0.5,) * 3), Normalisation((0.4,) * 3, (0.2,) * 3)), form)
    for strategy in ("resize-naive", "letterbox")
    for form in ("float32", "uint8")
]
# A worker to which a file that begins so is one that takes for ever, or one that crashes it.
_STUBBORN = """
import os, signal
from cobra_edge.serve import image_worker
decode = image_worker.decode
def stubborn(setup, files):
    if files[0].startswith(b"SLOW"):
        signal.pause()
    if files[0].startswith(b"CRASH"):
        os.abort()
    return decode(setup, files)
image_worker.decode = stubborn
image_worker.main()
"""


def image(width: int = 8, height: int = 8, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), "red").save(file, kind)
    return file.getvalue()


def refused(file: bytes) -> Failed:
    got = decode(Setup(TRANSFORMS[0], LIMITS.image_pixels, 1.0), [file])
    assert isinstance(got, Failed)
    return got


def run(work: Any, limits: Limits = LIMITS) -> Any:
    """Run a coroutine that takes an `ImageDecoder`."""

    async def all_of_it() -> Any:
        images = ImageDecoder(TRANSFORMS[0], limits)
        try:
            return await asyncio.wait_for(work(images), PATIENCE)
        finally:
            await images.close()

    return asyncio.run(all_of_it())


@pytest.fixture
def stubborn(monkeypatch):
    monkeypatch.setattr(image_decoding, "_COMMAND", ("-c", _STUBBORN))


@pytest.mark.parametrize("transform", TRANSFORMS, ids=lambda t: f"{t.resize_strategy}-{t.input}")
def test_a_child_decodes_as_this_process_would(transform: ImageTransform):
    async def decoded() -> list[np.ndarray]:
        images = ImageDecoder(transform, Limits())
        await images.start()
        try:
            return [await images.decode("me", file) for file in (IMAGE.read_bytes(), image(kind="JPEG"))]
        finally:
            await images.close()

    for got, file in zip(asyncio.run(decoded()), (IMAGE.read_bytes(), image(kind="JPEG")), strict=True):
        same = transform.pixels(load_image(file))
        assert (got.dtype, got.shape) == (same.dtype, same.shape) and np.array_equal(got, same)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM"])
def test_formats_that_are_read(kind: str):
    assert isinstance(decode(Setup(TRANSFORMS[0], 1000, 1.0), [image(kind=kind)]), Decoded)


def test_too_many_pixels_are_refused_by_the_header():
    assert isinstance(decode(Setup(TRANSFORMS[0], 1000, 1.0), [image(40, 25)]), Decoded)
    got = refused(image(41, 25))
    assert (got.status, got.code) == (413, "image_too_large") and "the maximum is 1,000 pixels" in got.message


def test_a_decompression_bomb_is_refused_by_the_header():
    for header in (b"P6 60000 60000 255\n", b"P6 10000 10000 255\n"):  # pillow refuses the one, and only warns of the other
        assert (refused(header).status, refused(header).code) == (413, "image_too_large")


@pytest.mark.parametrize("file", [b"", b"hello", b"<svg xmlns='http://www.w3.org/2000/svg'/>", image()[:20], b"%PDF-1.4"])
def test_what_is_no_image_is_refused(file: bytes):
    got = refused(file)
    assert (got.status, got.code) == (400, "invalid_image")


@pytest.mark.filterwarnings("ignore::UserWarning")
@settings(max_examples=100, deadline=None)
@given(st.sampled_from(["PNG", "JPEG", "WEBP", "BMP", "GIF", "PPM"]), st.data())
def test_a_damaged_image_is_read_or_refused_and_nothing_else(kind: str, data: Any):
    file = bytearray(image(kind=kind))
    for place in data.draw(st.lists(st.integers(0, min(len(file), 200) - 1), min_size=1, max_size=4)):
        file[place] = data.draw(st.integers(0, 255))
    got = decode(Setup(TRANSFORMS[0], 1000, 1.0), [bytes(file)])
    assert isinstance(got, Decoded) or got.code in ("invalid_image", "image_too_large")


def test_one_addresss_slow_image_leaves_the_others_theirs(stubborn):
    async def work(images: ImageDecoder) -> None:
        slow = [asyncio.create_task(images.decode("slow", b"SLOW")) for _ in range(3)]
        await asyncio.sleep(0)
        for _ in range(3):
            assert (await images.decode("me", image())).shape == TRANSFORMS[0].shape
        assert not any(task.done() for task in slow)
        for task in slow:
            task.cancel()
        await asyncio.gather(*slow, return_exceptions=True)
        assert (await images.decode("slow", image())).shape == TRANSFORMS[0].shape  # its turn comes again

    run(work)


def test_who_gives_up_ends_the_child_that_works_for_it(stubborn):
    async def work(images: ImageDecoder) -> int | None:
        await images.start()
        (child,) = images._idle
        task = asyncio.create_task(images.decode("me", b"SLOW"))
        while images._idle:
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return await child.wait()

    assert run(work) == -signal.SIGKILL


def test_an_image_that_takes_too_long_is_refused_by_its_own_child(stubborn):
    async def work(images: ImageDecoder) -> None:
        with pytest.raises(ApiError, match=r"takes more than 0.05 s; scale it down") as caught:
            await images.decode("me", b"SLOW")
        assert (caught.value.status, caught.value.code) == (400, "invalid_image")

    run(work, replace(LIMITS, decode_seconds=0.05))


def test_an_image_that_crashes_its_child_is_refused_and_the_next_is_decoded(stubborn, caplog):
    async def work(images: ImageDecoder) -> None:
        with pytest.raises(ApiError, match="the image crashes its decoder") as caught:
            await images.decode("me", b"CRASH")
        assert (caught.value.status, caught.value.code) == (400, "invalid_image")
        assert (await images.decode("me", image())).shape == TRANSFORMS[0].shape

    run(work)
    assert f"code {-signal.SIGABRT}" in caplog.text


def test_a_child_that_was_ended_from_outside_is_replaced(stubborn):
    async def work(images: ImageDecoder) -> None:
        await images.start()
        (child,) = images._idle
        child.kill()
        await child.wait()
        assert (await images.decode("me", image())).shape == TRANSFORMS[0].shape

    run(work)


def test_when_the_server_shuts_down_what_is_decoded_and_what_waits_is_refused(stubborn):
    async def work(images: ImageDecoder) -> None:
        slow = [asyncio.create_task(images.decode("me", b"SLOW")) for _ in range(3)]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        images.reject_all()
        got = await asyncio.gather(*slow, images.decode("me", image()), return_exceptions=True)
        assert [(error.status, error.code) for error in got] == [(503, "shutting_down")] * 4

    run(work)


def test_slots_are_given_in_turns_and_nobody_has_more_than_its_own():
    async def work() -> list[str]:
        slots, order, gate = FairSlots(2, 1), [], asyncio.Event()

        async def one(owner: str, name: str) -> None:
            async with slots.hold(owner):
                order.append(name)
                await gate.wait()

        first = [asyncio.create_task(one("greedy", f"greedy {i}")) for i in range(3)]
        await asyncio.sleep(0)
        assert order == ["greedy 0"]  # the second slot is free, but not its
        modest = asyncio.create_task(one("modest", "modest"))
        late = [asyncio.create_task(one("late", "late")), asyncio.create_task(one("gone", "gone"))]
        await asyncio.sleep(0)
        assert order == ["greedy 0", "modest"]
        late[1].cancel()
        gate.set()
        await asyncio.gather(*first, modest, late[0])
        assert not slots._held and not slots._waiting
        return order

    order = asyncio.run(work())
    assert order.index("late") < order.index("greedy 2") and "gone" not in order


def test_a_slow_image_keeps_no_answer_waiting_and_its_deadline_ends_it(mini_bundle):
    """The server's own view: text, another image and the signs of life, while one image is decoded for ever."""
    changed = f"from cobra_edge.serve import image_decoding\nimage_decoding._COMMAND = ('-c', {_STUBBORN!r})\n"
    with served(mini_bundle("w4a16-g128"), changed=changed) as server:

        def post(image: bytes | None, **headers: str) -> httpx.Response:
            parts = [] if image is None else [image_part(data_uri(image))]
            asked = {"model": "cobra-mini", "messages": [question("How many objects are there?", *parts)]}
            return httpx.post(f"{server.url}/v1/chat/completions", json=asked, headers=headers, timeout=PATIENCE)

        asked = {"model": "cobra-mini", "messages": [question("What?", image_part(data_uri(b"SLOW")))]}
        body = json.dumps(asked).encode()
        at = urlsplit(server.url)
        with socket.create_connection((at.hostname, at.port), timeout=PATIENCE) as slow:
            slow.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n")
            slow.sendall(b"Content-Length: %d\r\n\r\n" % len(body) + body)
            assert post(None).status_code == 200
            assert httpx.get(f"{server.url}/healthz").status_code == 200
            slow.setblocking(False)
            with pytest.raises(BlockingIOError):  # it is still decoded
                slow.recv(1)
        until(lambda: metric(server.url, 'cobra_edge_requests_total{status="499"}') == 1, "its departure")
        late = post(b"SLOW", **{"X-Deadline-Seconds": "0.5"})
        assert (late.status_code, late.json()["error"]["code"]) == (504, "deadline_exceeded")
        assert post(IMAGE.read_bytes()).json()["choices"][0]["message"]["content"] == "4"


def test_an_image_that_is_forgotten_between_two_looks_is_decoded_after_all(mini_bundle):
    """The event loop asks whether an image is remembered; when its turn comes the state may have been given up."""
    changed = "from cobra_edge.serve.prefix_cache import PrefixCache\nPrefixCache.holds = lambda cache, keys: True\n"
    with served(mini_bundle("w4a16-g128"), changed=changed) as server:
        asked = {"model": "cobra-mini", "messages": [question("How many objects are there?", image_part())]}
        for stream in (False, True):
            got = httpx.post(f"{server.url}/v1/chat/completions", json=asked | {"stream": stream}, timeout=PATIENCE)
            assert got.status_code == 200 and '"content":"4"' in got.text
        assert metric(server.url, 'cobra_edge_requests_total{status="200"}') == 2
