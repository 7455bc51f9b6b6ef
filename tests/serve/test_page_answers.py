"""Questions and answers on the web page: streaming, stop, errors, cached prefix, copying."""

from __future__ import annotations

import base64
import json

import pytest

from cobra_edge.serve.errors import ApiError

from .browser_case import browser, opened
from .page_server import DEMO, MODEL, Said, answered, ask, fake, show_demo, visit

__all__ = ["browser", "fake", "opened", "visit"]  # fixtures


def test_an_answer_appears_piece_by_piece(fake, visit):
    page = visit().page
    fake.answers = [Said(hold=(0, 1, 2))]
    turn = ask(page, "What is this?")
    turn.locator(".waiting").wait_for()
    assert turn.locator(".answer").text_content() == ""
    for expected in ("A green star", "A green star and a ", "A green star and a cross."):
        fake.go_on.release()
        turn.locator(".answer", has_text=expected).wait_for()
        assert turn.locator(".answer").text_content() == expected
        assert not turn.locator(".waiting").is_visible()
    turn.locator(".foot").wait_for()
    (body,) = fake.asked
    assert body == {
        "model": MODEL,
        "messages": [{"role": "user", "content": "What is this?"}],
        "stream": True,
        "stream_options": {"include_usage": True},
    }


@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("cut", [1, 3])
def test_events_may_be_cut_anywhere(fake, visit, cut, line_end):
    page = visit().page
    pieces = ("Ein grüner Stern ", "🐍 蛇 ", "data: {}\n\n[DONE]")
    fake.answers = [Said(pieces, cut=cut, line_end=line_end)]
    assert answered(page, "?").locator(".answer").text_content() == "".join(pieces)


EVENTS = """async ([bytes, cuts]) => {
    const { events } = await import("/page/events.js");
    const read = async (cut) => {
        const stream = new ReadableStream({ start(to) {
            for (const part of [bytes.slice(0, cut), bytes.slice(cut)]) to.enqueue(new Uint8Array(part));
            to.close();
        }});
        const all = [];
        for await (const data of events(stream)) all.push(data);
        return all;
    };
    return Promise.all(cuts.map(read));
}"""


def test_events_are_read_as_the_standard_has_it(visit):
    page = visit().page
    stream = (
        ": remark\r\n\r\ndata: één\r\ndata:  zwei\r\nid: 1\r\n\r\n\ndata:3\r\rdata\n\nevent: x\ndata: 🐍\n\ndata: cut off\n"
    )
    got = page.evaluate(EVENTS, [list(stream.encode()), list(range(len(stream.encode()) + 1))])
    assert len(got) == len(stream.encode()) + 1
    assert all(data == ["één\n zwei", "3", "🐍"] for data in got)


def test_stop_stops_the_server_too_and_the_conversation_goes_on(fake, visit):
    page = visit().page
    fake.answers = [Said(hold=(1,))]
    turn = ask(page, "What is this?")
    turn.locator(".answer").get_by_text("A green star").wait_for()
    assert not page.locator("#ask").is_visible()
    page.click("#stop")
    turn.locator(".ending").get_by_text("Stopped.", exact=True).wait_for()
    assert fake.aborted.wait(5)
    assert turn.locator(".answer").text_content() == "A green star" and not turn.locator(".failure").is_visible()
    answered(page, "And now?")
    assert [message["content"] for message in fake.asked[1]["messages"]] == ["What is this?", "A green star", "And now?"]


def test_the_cached_prefix_is_shown(fake, visit):
    page = visit().page
    fake.answers = [
        Said(),
        Said(remembered="image", cached=64, ttft_ms=1234.0, tpot_ms=None),
        Said(remembered="conversation", cached=80, tpot_ms=250.0, finish="length"),
    ]
    turns = [answered(page, f"question {number}") for number in range(3)]
    assert [turn.locator(".metrics").text_content() for turn in turns] == [
        "3 tokens · 40 tokens/s · first token after 180\u00a0ms",
        "3 tokens · first token after 1.2\u00a0s",
        "3 tokens · 4 tokens/s · first token after 180\u00a0ms",
    ]
    assert [turn.locator(".cache .words").text_content() for turn in turns] == [
        "Not cached: 83 prompt tokens read, 64 of the image.",
        "Cached image: 64 of 83 prompt tokens.",
        "Cached conversation: 80 of 83 prompt tokens.",
    ]
    shares = [turn.locator(".share").evaluate("e => e.firstChild.offsetWidth / e.offsetWidth") for turn in turns]
    assert shares == pytest.approx([0, 64 / 83, 80 / 83], abs=0.02)
    assert [turn.locator(".ending").text_content() for turn in turns] == ["", "", "Cut at the limit of 3 tokens."]


def test_what_people_and_models_say_stays_text(fake, visit):
    seen = visit()
    evil = '<img src=x onerror="document.title=1"><script>document.title=2</script><b>bold</b>&amp;'
    fake.answers = [Said((evil,)), ApiError(400, evil, "invalid_value")]
    turn = answered(seen.page, evil)
    assert turn.locator(".answer").text_content() == turn.locator(".question .words").text_content() == evil
    failed = ask(seen.page, "?")
    failed.locator(".failure").wait_for()
    assert failed.locator(".failure .words").text_content() == evil
    assert seen.page.locator("#turns :is(img, script, b)").count() == 0
    assert seen.page.locator(".list .title").text_content() == evil
    assert seen.page.title() == "Cobra Edge"


ERRORS = [
    (
        ApiError(400, "top_p is 7; expected at most 1", "invalid_value", "top_p"),
        "The server rejected the request",
        "top_p is 7",
    ),
    (ApiError(413, "the body is too large", "body_too_large"), "The request is too large", "the body is too large"),
    (ApiError(429, "32 wait", "queue_full", headers={"Retry-After": "7"}), "The server is busy", "32 wait. Try again in 7 s."),
    (
        ApiError(503, "stopping.", "shutting_down", headers={"Retry-After": "2"}),
        "The server is not ready",
        "stopping. Try again in 2 s.",
    ),
    (ApiError(500, "it broke", "internal_error"), "The server failed", "it broke"),
]


@pytest.mark.parametrize(("error", "title", "words"), ERRORS, ids=[str(error.status) for error, _, _ in ERRORS])
def test_errors_are_shown_and_can_be_retried(fake, visit, error, title, words):
    page = visit().page
    fake.answers = [error]
    turn = ask(page, "What is this?")
    turn.locator(".failure").wait_for()
    assert turn.locator(".failure .title").text_content() == title
    assert words in turn.locator(".failure .words").text_content()
    wait = error.headers.get("Retry-After")
    assert turn.locator(".retry").text_content() == (f"Try again ({wait} s)" if wait else "Try again")
    assert title in page.locator("#status").text_content()
    turn.locator(".retry").click()
    page.locator(".foot").wait_for()
    assert page.locator(".turn").count() == 1 and not page.locator(".failure").is_visible()
    assert fake.asked[1] == fake.asked[0]


def test_the_wait_is_counted_down(fake, visit):
    page = visit().page
    fake.answers = [ApiError(429, "busy", "queue_full", headers={"Retry-After": "2"})]
    ask(page, "?").get_by_role("button", name="Try again (2 s)").wait_for()
    page.get_by_role("button", name="Try again (1 s)").wait_for()
    page.get_by_role("button", name="Try again", exact=True).wait_for()


@pytest.mark.parametrize(
    ("said", "title", "words"),
    [
        (Said(("A green",), error="the decoder failed"), "The answer was aborted", "the decoder failed"),
        (Said(("A green",), breaks=True), "The answer is incomplete", "closed the connection"),
    ],
    ids=["error", "end"],
)
def test_an_answer_that_breaks_off_keeps_what_came(fake, visit, said, title, words):
    page = visit().page
    fake.answers = [said]
    turn = ask(page, "What is this?")
    turn.locator(".failure").wait_for()
    assert turn.locator(".answer").text_content() == "A green"
    assert turn.locator(".failure .title").text_content() == title
    assert words in turn.locator(".failure .words").text_content()
    answered(page, "Another question")
    assert [message["content"] for message in fake.asked[1]["messages"]] == ["Another question"]  # no half answers are sent


def test_a_server_that_is_gone(fake, visit):
    page = visit().page
    page.route("**/v1/**", lambda route: route.abort())
    ask(page, "?").get_by_text("The server cannot be reached").wait_for()
    page.reload()
    page.locator("#model").get_by_text("The server cannot be reached").wait_for()
    page.unroute("**/v1/**")
    page.locator(".retry").click()
    page.locator(".foot").wait_for()
    assert page.locator("#model").text_content() == MODEL
    page.route("**/v1/**", lambda route: route.abort())
    page.reload()
    page.locator("#model").get_by_text("The server cannot be reached").wait_for()
    page.unroute("**/v1/**")
    page.locator("#again-models").click()
    page.locator("#model").get_by_text(MODEL).wait_for()
    assert not page.locator("#again-models").is_visible()


def test_a_model_that_is_served_no_more_is_asked_for_again(fake, visit):
    seen = visit()
    fake.answers = [ApiError(404, "no such model", "model_not_found")]
    turn = ask(seen.page, "?")
    turn.get_by_text("Unknown model").wait_for()
    turn.locator(".retry").click()
    turn.locator(".foot").wait_for()
    assert [url.rpartition("/")[2] for url in seen.requests if "/v1/" in url] == [
        "models",
        "completions",
        "models",
        "completions",
    ]


def test_a_proxy_that_speaks_no_json(fake, visit):
    page = visit().page
    page.route("**/v1/chat/**", lambda route: route.fulfill(status=502, body="<h1>Bad gateway</h1>"))
    ask(page, "?").get_by_text("Status 502").wait_for()


def test_a_key_is_asked_for_and_kept_in_the_tab(fake, opened):
    fake.key = "sésame 🐍"
    page = opened(fake.url + "/", 1280, "light").page
    page.get_by_role("dialog").get_by_label("API key").fill("wrong")
    page.keyboard.press("Enter")
    page.locator("#model").get_by_text("The server requires an API key").wait_for()
    ask(page, "What is this?")
    page.get_by_role("dialog").get_by_label("API key").fill(fake.key)
    page.keyboard.press("Enter")
    page.locator(".foot").wait_for()  # the question was asked again
    assert page.locator(".turn").count() == 1 and len(fake.asked) == 1
    assert page.locator("#model").text_content() == MODEL
    page.reload()
    page.locator("#model").get_by_text(MODEL).wait_for()
    assert page.evaluate("Object.keys(localStorage).length") == 0 and page.evaluate("document.cookie") == ""
    other = page.context.new_page()
    other.goto(fake.url + "/")
    other.get_by_role("dialog").wait_for()
    other.keyboard.press("Escape")
    ask(other, "?").get_by_text("The server requires an API key").wait_for()
    other.locator("#ask-key-close").click()
    assert not other.locator("#ask-key").is_visible() and other.locator(".failure").is_visible()


def test_settings_are_sent_where_they_are_given(fake, visit):
    page = visit().page
    page.click("summary")
    for name, value in {"temperature": "0.7", "top_p": "0.9", "max_tokens": "12", "seed": "-3"}.items():
        page.fill(f"#{name}", value)
    page.reload()
    page.locator("#model").get_by_text(MODEL).wait_for()
    answered(page, "?")
    assert {key: fake.asked[0][key] for key in ("temperature", "top_p", "max_tokens", "seed")} == {
        "temperature": 0.7,
        "top_p": 0.9,
        "max_tokens": 12,
        "seed": -3,
    }
    page.click("summary")
    page.fill("#temperature", "3")
    page.click("summary")
    page.fill("#question", "kept")
    page.keyboard.press("Enter")
    assert page.locator("#temperature").is_visible() and page.evaluate("document.activeElement.id") == "temperature"
    assert page.input_value("#question") == "kept" and len(fake.asked) == 1


def test_the_image_goes_with_the_first_question_byte_for_byte(fake, visit):
    page = visit().page
    show_demo(page)
    answered(page, "What is this?")
    answered(page, "How many?")
    url = "data:image/png;base64," + base64.b64encode(DEMO.read_bytes()).decode()
    image = {"type": "image_url", "image_url": {"url": url}}
    first = {"role": "user", "content": [image, {"type": "text", "text": "What is this?"}]}
    assert fake.asked[0]["messages"] == [first]
    said = {"role": "assistant", "content": "A green star and a cross."}
    assert fake.asked[1]["messages"] == [first, said, {"role": "user", "content": "How many?"}]


def test_conversations_are_listed_kept_over_a_reload_and_gone_with_the_tab(fake, visit):
    page = visit().page
    show_demo(page)
    answered(page, "about the demo")
    page.click("#new")
    assert page.locator("#welcome").is_visible() and page.evaluate("document.activeElement.id") == "question"
    fake.answers = [Said(("Nothing.",))]
    answered(page, "about nothing")
    titles = page.locator(".list .title")
    assert titles.all_text_contents() == ["about nothing", "about the demo"]
    assert page.locator(".list [aria-current] .title").text_content() == "about nothing"
    assert page.locator(".list img").count() == 1
    page.reload()
    assert titles.all_text_contents() == ["about nothing", "about the demo"]
    page.locator(".list .open", has_text="about the demo").click()
    assert page.locator(".answer").all_text_contents() == ["A green star and a cross."]
    assert (
        page.locator("#current-image-view").get_attribute("src")
        == fake.asked[0]["messages"][0]["content"][0]["image_url"]["url"]
    )
    answered(page, "and?")
    assert fake.asked[2]["messages"][0] == fake.asked[0]["messages"][0]
    assert page.context.new_page().goto(fake.url + "/").ok
    assert page.context.pages[1].locator(".list li").count() == 0


def test_a_conversation_is_deleted_and_brought_back(fake, visit):
    page = visit().page
    answered(page, "one")
    page.click("#new")
    answered(page, "two")
    page.get_by_role("button", name="Delete “two”").click()
    assert page.locator(".question .words").all_text_contents() == ["one"]
    page.click("#notice-undo")
    assert page.locator(".list .title").all_text_contents() == ["two", "one"]
    assert page.locator(".question .words").all_text_contents() == ["two"]
    for name in ("two", "one"):
        page.get_by_role("button", name=f"Delete “{name}”").click()
    page.reload()
    assert page.locator("#welcome").is_visible() and page.locator(".list li").count() == 0


def test_a_deleted_image_is_kept_nowhere(visit):
    page = visit().page
    show_demo(page)
    answered(page, "one")
    kept = "Object.keys(sessionStorage).filter(key => key.startsWith('cobra-edge.image.')).length"
    assert page.evaluate(kept) == 1
    page.get_by_role("button", name="Delete “one”").click()
    assert page.evaluate(kept) == 0
    page.click("#notice-undo")
    assert page.evaluate(kept) == 1


def test_deleting_a_conversation_stops_its_answer(fake, visit):
    page = visit().page
    fake.answers = [Said(hold=(1,))]
    ask(page, "one").locator(".answer").get_by_text("A green star").wait_for()
    page.get_by_role("button", name="Delete “one”").click()
    assert fake.aborted.wait(5)
    page.locator("#ask").wait_for()
    assert page.locator("#welcome").is_visible()


def test_an_answer_goes_on_while_another_conversation_is_looked_at(fake, visit):
    page = visit().page
    fake.answers = [Said(hold=(1,))]
    ask(page, "one").locator(".answer").get_by_text("A green star").wait_for()
    page.click("#new")
    assert page.locator("#stop").is_visible() and page.locator(".turn").count() == 0
    fake.go_on.release()
    page.locator("#ask").wait_for()
    page.locator(".list .open").click()
    assert page.locator(".answer").text_content() == "A green star and a cross."


def test_a_page_left_in_the_middle_says_so_and_asks_again(fake, visit):
    page = visit().page
    fake.answers = [Said(hold=(1,))]
    ask(page, "one").locator(".answer").get_by_text("A green star").wait_for()
    page.reload()
    page.get_by_text("Interrupted").wait_for()
    page.locator(".retry").click()
    page.locator(".foot").wait_for()
    assert page.locator(".answer").all_text_contents() == ["A green star and a cross."]


TRANSCRIPT = f"""Image: demo.png (112 × 112)

You: What is this?

{MODEL}: A green star and a cross.

You: How many?

{MODEL}: Three.
"""


def test_answers_and_conversations_are_copied(fake, visit):
    page = visit(permissions=["clipboard-read", "clipboard-write"]).page
    show_demo(page)
    turn = answered(page, "What is this?")
    fake.answers = [Said(("Three.",))]
    answered(page, "How many?")
    turn.locator(".copy").click()
    turn.get_by_text("Copied", exact=True).wait_for()
    assert page.evaluate("navigator.clipboard.readText()") == "A green star and a cross."
    page.click("#copy-all")
    page.locator("#copy-all").get_by_text("Copied", exact=True).wait_for()
    assert page.evaluate("navigator.clipboard.readText()") == TRANSCRIPT
    assert page.locator("#status").text_content() == "Copied"
    page.locator("#copy-all").get_by_text("Copy conversation").wait_for()


def test_copying_where_pages_get_no_clipboard(fake, visit):
    page = visit(permissions=["clipboard-read", "clipboard-write"]).page
    turn = answered(page, "What is this?")
    page.evaluate("navigator.clipboard.writeText('before')")
    page.evaluate("() => { navigator.clipboard.writeText = () => Promise.reject(new Error('no')); }")
    turn.locator(".copy").click()
    turn.get_by_text("Copied", exact=True).wait_for()
    assert page.evaluate("navigator.clipboard.readText()") == "A green star and a cross."
    page.evaluate("() => { document.execCommand = () => false; }")
    turn.locator(".copy").click()
    turn.get_by_text("Could not copy", exact=True).wait_for()


def test_a_broken_store_is_no_broken_page(fake, visit):
    page = visit().page
    for stored in ("{", json.dumps({"a": 1}), json.dumps([1, {"id": "1"}])):
        page.evaluate("value => sessionStorage.setItem('cobra-edge.conversations', value)", stored)
        page.reload()
        page.locator("#model").get_by_text(MODEL).wait_for()
        answered(page, "?")
