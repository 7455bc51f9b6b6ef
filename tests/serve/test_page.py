"""The page of the server: what it is served with, and how it is for people with other screens, colours and hands."""

from __future__ import annotations

import re

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from cobra_edge.serve.errors import ApiError
from cobra_edge.serve.page_route import page_paths, page_router

from .browser_case import browser, contrast, luminance, opened
from .page_server import MODEL, Said, answered, ask, complaints, fake, show_demo, visit

__all__ = ["browser", "fake", "opened", "visit"]  # fixtures


@pytest.fixture(scope="module")
def client():
    app = FastAPI()
    app.include_router(page_router())
    return TestClient(app)


@pytest.mark.parametrize("path", page_paths())
def test_every_file_is_served_with_its_headers(client, path):
    answer = client.get(path)
    kind = {"css": "css", "js": "javascript"}.get(path.rpartition(".")[2], "html")
    assert (answer.status_code, answer.headers["content-type"]) == (200, f"text/{kind}; charset=utf-8")
    assert answer.content == page_paths()[path].read_bytes()
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["referrer-policy"] == "no-referrer"
    assert answer.headers["permissions-policy"] == "camera=(self), microphone=(), geolocation=()"
    assert answer.headers["cross-origin-opener-policy"] == answer.headers["cross-origin-resource-policy"] == "same-origin"
    policy = dict(part.split(" ", 1) for part in answer.headers["content-security-policy"].split("; "))
    assert policy == {
        "default-src": "'none'",
        "script-src": "'self'",
        "style-src": "'self'",
        "img-src": "'self' data: blob:",
        "media-src": "'self' blob:",
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    head = client.head(path)
    assert (head.status_code, head.headers["etag"], head.headers["content-length"]) == (
        200,
        answer.headers["etag"],
        str(len(answer.content)),
    )


def test_what_a_browser_has_is_not_sent_again(client):
    first = client.get("/page/style.css")
    assert first.headers["cache-control"] == "no-cache"
    tag = first.headers["etag"]
    again = client.get("/page/style.css", headers={"If-None-Match": f'"other", W/{tag}'})
    assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", tag)
    assert client.get("/page/style.css", headers={"If-None-Match": '"other"'}).status_code == 200
    assert client.get("/page/script.js").headers["etag"] != tag


def test_the_page_is_no_part_of_the_schema_and_nothing_else_is_served(client):
    assert client.get("/openapi.json").json()["paths"] == {}
    for path in ("/page/", "/page/index.html", "/page/../page_route.py", "/page/%2e%2e/page_route.py"):
        assert client.get(path).status_code == 404
    assert client.post("/").status_code == 405


def test_nothing_said_can_become_markup_and_nothing_is_inline():
    for path, file in page_paths().items():
        text = file.read_text(encoding="utf-8")
        for forbidden in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "setHTML", "eval(", "new Function"):
            assert forbidden not in text, path
    inline = r'<script(?![^>]*\bsrc=)|<style|\sstyle=|\son[a-z]+=|(?:src|href)="(?:https?:)?//'
    assert re.findall(inline, page_paths()["/"].read_text(encoding="utf-8")) == []


def sticking_out(page) -> list[str]:
    """Return what is wider than the window, or can be scrolled sideways."""
    return page.evaluate(
        """() => [...document.querySelectorAll("html, body, body *")].filter(e =>
            e.getBoundingClientRect().right > innerWidth + 1
            || (e.scrollWidth > e.clientWidth + 1 && ["auto", "scroll"].includes(getComputedStyle(e).overflowX))
            || (e === document.documentElement && e.scrollWidth > innerWidth)).map(e => e.outerHTML.slice(0, 100))"""
    )


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [320, 1280])
def test_nothing_is_asked_for_elsewhere_nothing_complained_of_nothing_too_wide(fake, visit, width, scheme):
    seen = visit(width, scheme)
    page = seen.page
    assert sticking_out(page) == []
    show_demo(page)
    assert sticking_out(page) == []
    fake.answers = [Said(("W" * 200, " https://example.com/" + "a" * 200))]
    answered(page, "What is this? " + "Q" * 200)
    assert sticking_out(page) == []
    if width == 320:
        page.click("#drawer")
    page.click("summary")
    assert page.locator("#key").is_visible() and sticking_out(page) == []
    assert {url.split("/")[2] for url in seen.requests if not url.startswith(("data:", "blob:"))} == {fake.url.split("/")[2]}
    assert len(seen.requests) > len(page_paths())
    assert complaints(seen) == []


def test_both_colour_schemes_can_be_read(fake, visit):
    grounds = {}
    for scheme in ("light", "dark"):
        page = visit(1280, scheme).page
        show_demo(page)
        fake.answers = [
            Said(hold=(1,)),
            Said(finish="length"),
            ApiError(429, "busy", "queue_full", headers={"Retry-After": "3"}),
        ]
        ask(page, "one")
        page.locator("#stop").wait_for()
        stop_pair = pairs(page, ["#stop"])
        fake.go_on.release()
        page.locator(".foot").wait_for()
        answered(page, "two")
        ask(page, "three").locator(".failure").wait_for()
        page.set_input_files("#file", {"name": "a.txt", "mimeType": "text/plain", "buffer": b"a"})
        page.locator("#notice").wait_for()
        page.click("summary")
        names = [
            "body",
            ".brand",
            "#new",
            ".list .open",
            ".list .delete",
            ".storage-note",
            "summary",
            "form label",
            "form label small",
            "#key",
            "#model",
            "#copy-all",
            "#current-image .name",
            "#current-image .rule",
            ".question",
            ".answer",
            ".ending",
            ".metrics",
        ]
        names += [".cache", ".copy", ".failure .title", ".failure .words", ".retry", "#question", ".keys", "#ask", "#notice p"]
        colours = [*stop_pair, *pairs(page, names), *pairs(page, ["#question"], "::placeholder")]
        for name, ink, ground in colours:
            assert contrast(ink, ground) >= 4.5, (scheme, name, ink, ground)  # WCAG 2.1, 1.4.3
        grounds[scheme] = luminance(colours[1][2])
    assert grounds["dark"] < 0.05 < 0.8 < grounds["light"]


def pairs(page, names: list[str], part: str | None = None) -> list[tuple[str, str, str]]:
    """Return the ink and the ground of each selector's first element as the browser paints them."""
    return page.evaluate(
        """([names, part]) => names.map(name => {
            let e = document.querySelector(name);
            const ink = getComputedStyle(e, part).color;
            const clear = c => c === "rgba(0, 0, 0, 0)";
            while (clear(getComputedStyle(e).backgroundColor)) e = e.parentElement;
            return [name, ink, getComputedStyle(e).backgroundColor];
        })""",
        [names, part],
    )


def test_everything_can_be_reached_and_is_seen_when_it_has_the_focus(visit):
    page = visit().page
    show_demo(page)
    answered(page, "What is this?")
    page.reload()
    page.locator("#model").get_by_text(MODEL).wait_for()
    reached = []
    for _ in range(40):
        page.keyboard.press("Tab")
        name, outline = page.evaluate(
            """() => {
                const e = document.activeElement;
                const outlined = e.id === "question" ? e.form : e;
                return [e.id || e.className || e.tagName, getComputedStyle(outlined).outlineStyle];
            }"""
        )
        if name == "BODY":
            break
        reached.append(name)
        assert outline != "none", name
    for name in ("skip", "new", "open", "quiet icon delete", "SUMMARY", "copy-all", "quiet copy", "question", "ask"):
        assert name in reached, (name, reached)
    assert reached.count("quiet icon") == 2  # image and camera
    assert "file" not in reached  # its buttons stand for it


def test_a_conversation_by_keyboard_alone(fake, visit):
    page = visit().page
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")  # skips to the question
    page.keyboard.type("first line")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("second line")
    page.keyboard.press("Enter")
    page.locator(".foot").wait_for()
    assert fake.asked[0]["messages"] == [{"role": "user", "content": "first line\nsecond line"}]
    assert page.evaluate("document.activeElement.id") == "question"
    page.keyboard.press("Enter")  # nothing to ask
    page.keyboard.type("  ")
    page.keyboard.press("Enter")
    assert page.locator(".turn").count() == 1
    fake.answers = [Said(hold=(1,))]
    page.keyboard.type("again")
    for _ in range(5):
        if page.evaluate("document.activeElement.id") == "ask":
            break
        page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    page.locator("#stop").wait_for()
    assert page.evaluate("document.activeElement.id") == "stop"  # the focus is not lost with the button that went
    page.locator(".turn").nth(1).locator(".answer").get_by_text("A green star").wait_for()
    page.keyboard.press("Escape")
    page.get_by_text("Stopped.", exact=True).wait_for()
    assert fake.aborted.wait(5)
    assert page.evaluate("document.activeElement.id") == "question"


def test_enter_that_chooses_a_character_asks_nothing(fake, visit):
    page = visit().page
    page.fill("#question", "蛇")
    for composing in (True, False):
        page.evaluate(
            """isComposing => document.getElementById("question").dispatchEvent(
                new KeyboardEvent("keydown", { key: "Enter", isComposing, bubbles: true, cancelable: true }))""",
            composing,
        )
        assert page.locator(".turn").count() == (0 if composing else 1)


def test_a_screen_reader_hears_an_answer_once_and_whole(fake, visit):
    page = visit().page
    fake.answers = [Said(hold=(1, 2))]
    turn = ask(page, "What is this?")
    turn.locator(".answer").get_by_text("A green star").wait_for()
    assert page.locator("#status").text_content() == ""
    assert turn.locator(".answer").evaluate("e => e.closest('[aria-live], [role=status], [role=log], [role=alert]')") is None
    fake.go_on.release(2)
    turn.locator(".foot").wait_for()
    assert page.locator("#status").text_content() == "Answer: A green star and a cross."
    assert page.locator("#status").get_attribute("aria-live") == "polite"


def test_every_control_has_a_name(visit):
    page = visit().page
    show_demo(page)
    answered(page, "What is this?")
    unnamed = page.evaluate(
        """() => [...document.querySelectorAll("button, input, textarea, dialog, nav, aside, section")]
            .filter(e => !(e.ariaLabel || e.textContent.trim() || e.labels?.length)).map(e => e.outerHTML)"""
    )
    assert unnamed == []


def test_less_motion_where_it_is_wished(fake, visit):
    for motion, animated in (("reduce", "none"), ("no-preference", "breathe")):
        page = visit(reduced_motion=motion).page
        fake.answers = [Said(hold=(0,))]
        turn = ask(page, "What is this?")
        turn.locator(".waiting").wait_for()
        assert turn.locator(".waiting .mark").evaluate("e => getComputedStyle(e).animationName") == animated
        fake.go_on.release()
        turn.locator(".foot").wait_for()


def test_the_menu_lies_over_the_page_on_a_phone(visit):
    page = visit(360).page
    answered(page, "What is this?")
    assert not page.locator("#new").is_visible()
    page.click("#drawer")
    assert page.locator("#drawer").get_attribute("aria-expanded") == "true" and page.locator("#new").is_visible()
    assert page.locator("main").evaluate("e => e.inert")
    page.keyboard.press("Escape")
    assert not page.locator("#new").is_visible() and not page.locator("main").evaluate("e => e.inert")
    page.click("#drawer")
    page.set_viewport_size({"width": 1280, "height": 800})  # the phone is turned
    page.locator("#drawer").wait_for(state="hidden")
    assert not page.locator("main").evaluate("e => e.inert")
