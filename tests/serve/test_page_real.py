"""The page of the server with a model behind it: what it shows is what the model says."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

import cobra_edge

from .browser_case import browser, opened
from .page_server import DEMO, answered, complaints, show_demo

__all__ = ["browser", "opened"]  # fixtures

FIRST, SECOND = "Describe the image.", "Which shapes are there?"


@pytest.fixture(scope="module")
def bundle(mini_bundle):
    return mini_bundle("w4a16-g128")


@pytest.fixture(scope="module")
def server(bundle):
    """A server as people start it; yields its address."""
    command = [sys.executable, "-m", "cobra_edge.serve", str(bundle), "--port", "0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    line = process.stdout.readline()
    assert line.startswith("listening on "), process.communicate()
    yield line.split()[-1]
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors


def test_a_conversation_about_an_image(bundle, server, opened):
    seen = opened(server + "/", 1280, "light")
    page = seen.page
    page.locator("#model", has_text="cobra").wait_for()
    show_demo(page)
    session = cobra_edge.load(bundle)
    first = session.ask(DEMO, FIRST)
    shown = answered(page, FIRST)
    assert shown.locator(".answer").text_content() == first.read()
    image = first.visual_tokens
    words = f"Not cached: {first.prompt_tokens + image} prompt tokens read, {image} of the image."
    assert shown.locator(".cache .words").text_content() == words
    assert f"{len(first.tokens)} tokens" in shown.locator(".metrics").text_content()

    shown = answered(page, SECOND)
    assert shown.locator(".answer").text_content()
    assert "Cached conversation" in shown.locator(".cache .words").text_content()

    page.click("#new")
    show_demo(page)
    other = session.ask(DEMO, SECOND)
    shown = answered(page, SECOND)
    assert shown.locator(".answer").text_content() == other.read()
    words = f"Cached image: {image} of {other.prompt_tokens + image} prompt tokens."
    assert shown.locator(".cache .words").text_content() == words
    assert complaints(seen) == []
    assert {url.partition("://")[2].split("/")[0] for url in seen.requests if url.startswith("http")} == {server.split("/")[2]}


def test_a_refusal_of_the_server_in_its_own_words(server, opened):
    page = opened(server + "/", 1280, "light").page
    page.locator("#model", has_text="cobra").wait_for()
    page.fill("#question", "x" * 100_000)
    page.keyboard.press("Enter")
    page.locator(".failure .title", has_text="The server rejected the request").wait_for()
    assert "100,000 characters" in page.locator(".failure .words").text_content()
