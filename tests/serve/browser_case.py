"""A browser for tests of pages: found on this machine, opened, and watched for what it asks for and complains of.

The browser is $CHROMIUM, or a Chromium or Chrome on PATH; without one its tests are skipped, and fail in CI.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, field

import pytest

PROGRAMS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
# no sandbox of its own: in a container, as root, Chromium has none. A camera that shows a test GPU, and is allowed
ARGUMENTS = ["--no-sandbox", "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]


def found_browser() -> str:
    """Return the browser's path; skip without one, or fail where CI must have it."""
    named = os.environ.get("CHROMIUM")
    program = shutil.which(named) if named else next(filter(None, map(shutil.which, PROGRAMS)), None)
    if program is None:
        reason = f"no browser at $CHROMIUM ({named})" if named else f"none of {', '.join(PROGRAMS)} is on PATH"
        reason += "; install one: apt-get install --no-install-recommends chromium-headless-shell, or set CHROMIUM to its path"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)
    return program


@pytest.fixture(scope="module")
def browser():
    program = found_browser()
    sync_api = pytest.importorskip("playwright.sync_api", reason="no playwright; pip install '.[test]'")
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=program, args=ARGUMENTS)
        yield started
        started.close()


@dataclass
class Seen:
    """A page that was opened, and all it asked for and complained of."""

    page: object
    requests: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)


@pytest.fixture
def opened(browser):
    contexts = []

    def open_page(url: str, width: int, scheme: str, **options) -> Seen:
        context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme, **options)
        contexts.append(context)
        seen = Seen(context.new_page())
        seen.page.set_default_timeout(10_000)
        seen.page.on("request", lambda request: seen.requests.append(request.url))
        seen.page.on("requestfailed", lambda request: seen.complaints.append(f"failed: {request.url[:200]} {request.failure}"))
        seen.page.on("console", lambda message: seen.complaints.append(f"{message.type}: {message.text}"))
        seen.page.on("pageerror", lambda error: seen.complaints.append(f"error: {error}"))
        seen.page.goto(url)
        return seen

    yield open_page
    for context in contexts:
        context.close()


def luminance(colour: str) -> float:
    """Return the relative luminance of "rgb(r, g, b)". Source: WCAG 2.1."""
    parts = [int(part) / 255 for part in colour[4:-1].split(",")]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(ink: str, ground: str) -> float:
    dark, light = sorted((luminance(ink), luminance(ground)))
    return (light + 0.05) / (dark + 0.05)
