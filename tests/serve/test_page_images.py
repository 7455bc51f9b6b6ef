"""Images come to the page of the server: chosen, dropped, pasted, taken; sent as they are, or drawn smaller."""

from __future__ import annotations

import base64
import io

import pytest
from PIL import Image

from cobra_edge.serve.errors import ApiError

from .browser_case import browser, opened
from .page_server import DEMO, MODEL, answered, ask, fake, show_demo, visit

__all__ = ["browser", "fake", "opened", "visit"]  # fixtures

GIVE = """([kind, target, bytes, name, type, texts]) => {
    const data = new DataTransfer();
    for (const format of texts ?? []) data.setData(format, "text");
    if (bytes) data.items.add(new File([new Uint8Array(bytes)], name, { type }));
    else data.setData("text/plain", name);
    const init = { bubbles: true, cancelable: true };
    const event = kind === "paste"
        ? new ClipboardEvent("paste", { ...init, clipboardData: data })
        : new DragEvent(kind, { ...init, dataTransfer: data });
    return document.querySelector(target).dispatchEvent(event);
}"""


def image_file(width: int, height: int, kind: str = "PNG", colour: str = "teal") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), colour).save(file, kind)
    return file.getvalue()


def noise(width: int, height: int) -> bytes:
    file = io.BytesIO()
    Image.effect_noise((width, height), 90).save(file, "PNG")
    return file.getvalue()


def choose(page, data: bytes, name: str = "a.png", kind: str = "image/png") -> None:
    page.set_input_files("#file", {"name": name, "mimeType": kind, "buffer": data})


def sent(fake, index: int = -1) -> tuple[str, bytes]:
    """Return the type and the bytes of the image in a request."""
    head, _, data = fake.asked[index]["messages"][0]["content"][0]["image_url"]["url"].partition(",")
    return head, base64.b64decode(data)


def test_chosen(fake, visit):
    page = visit().page
    with page.expect_file_chooser() as chooser:
        page.locator("#welcome [data-action=choose]").click()
    chooser.value.set_files(DEMO)
    page.locator("#current-image-size", has_text="112 × 112").wait_for()
    assert page.evaluate("document.activeElement.id") == "question"
    assert page.locator("#status").text_content() == "Image demo.png, 112 by 112. Ask about it."
    page.get_by_role("button", name="What stands out?").click()
    page.locator(".foot").wait_for()
    assert sent(fake) == ("data:image/png;base64", DEMO.read_bytes())
    assert fake.asked[0]["messages"][0]["content"][1]["text"] == "What stands out?"
    assert not page.locator("#suggestions").is_visible()


@pytest.mark.parametrize("kind", ["paste", "drop"])
def test_pasted_and_dropped(fake, visit, kind):
    page = visit().page
    if kind == "drop":
        assert page.evaluate(GIVE, ["dragenter", "#welcome", list(DEMO.read_bytes()), "demo.png", "image/png"])
        assert page.locator("#drop").is_visible()
        assert not page.evaluate(GIVE, ["dragover", "#welcome", list(DEMO.read_bytes()), "demo.png", "image/png"])
    target = "#question" if kind == "paste" else "#welcome"
    assert not page.evaluate(GIVE, [kind, target, list(DEMO.read_bytes()), "demo.png", "image/png"])  # handled
    page.locator("#current-image-name", has_text="demo.png").wait_for()
    assert not page.locator("#drop").is_visible()
    answered(page, "What is this?")
    assert sent(fake) == ("data:image/png;base64", DEMO.read_bytes())


@pytest.mark.parametrize(
    ("texts", "image"),
    [(["text/plain"], True), (["text/html"], True), (["text/plain", "text/html"], False)],
    ids=["a file", "an image of a page", "a piece of a document"],
)
def test_what_is_pasted_with_an_image(visit, texts, image):
    page = visit().page
    left = page.evaluate(GIVE, ["paste", "#question", list(DEMO.read_bytes()), "demo.png", "image/png", texts])
    assert left is not image
    if image:
        page.locator("#current-image-name", has_text="demo.png").wait_for()


def test_pasted_text_stays_text_and_a_dropped_address_is_no_image(visit):
    page = visit().page
    assert page.evaluate(GIVE, ["paste", "#question", None, "some text", ""])  # left to the browser
    assert not page.evaluate(GIVE, ["drop", "#welcome", None, "https://example.com/a.png", ""])
    page.locator("#notice-words", has_text="not an image file").wait_for()
    assert page.locator("#welcome").is_visible()


def test_dragging_across_elements_and_away(visit):
    page = visit().page
    for kind, target in (("dragenter", "main"), ("dragenter", "#welcome"), ("dragleave", "main")):
        page.evaluate(GIVE, [kind, target, list(DEMO.read_bytes()), "demo.png", "image/png"])
    assert page.locator("#drop").is_visible()
    page.evaluate(GIVE, ["dragleave", "#welcome", list(DEMO.read_bytes()), "demo.png", "image/png"])
    assert not page.locator("#drop").is_visible()


@pytest.mark.parametrize(
    ("name", "kind", "data"), [("notes.txt", "text/plain", b"hello"), ("broken.png", "image/png", b"\x89PNG\r\n\x1a\n")]
)
def test_what_is_no_image_is_said(fake, visit, name, kind, data):
    page = visit().page
    choose(page, data, name, kind)
    page.locator("#notice-words", has_text=f"{name} is not an image that this browser can show").wait_for()
    page.get_by_role("button", name="Dismiss").click()
    assert not page.locator("#notice").is_visible() and page.locator("#welcome").is_visible()


@pytest.mark.parametrize(("kind", "suffix"), [("PNG", "png"), ("JPEG", "jpeg"), ("WEBP", "webp")])
def test_an_image_at_the_limit_is_not_touched(fake, visit, kind, suffix):
    page = visit().page
    data = image_file(2048, 100, kind)
    choose(page, data, f"a.{suffix}", f"image/{suffix}")
    answered(page, "What is this?")
    assert sent(fake) == (f"data:image/{suffix};base64", data)


@pytest.mark.parametrize(("kind", "sent_as"), [("PNG", "PNG"), ("JPEG", "JPEG"), ("WEBP", "PNG")])
def test_a_larger_image_is_scaled_down(fake, visit, kind, sent_as):
    page = visit().page
    choose(page, image_file(1024, 4096, kind), "tall", f"image/{kind.lower()}")
    page.locator("#current-image-size", has_text="512 × 2048, scaled down from 1024 × 4096").wait_for()
    answered(page, "What is this?")
    head, data = sent(fake)
    scaled = Image.open(io.BytesIO(data))
    assert (head, scaled.format, scaled.size) == (f"data:image/{sent_as.lower()};base64", sent_as, (512, 2048))
    assert max(abs(a - b) for a, b in zip(scaled.convert("RGB").getpixel((260, 1000)), (0, 128, 128), strict=True)) <= 3


def test_a_format_that_only_the_browser_reads_is_drawn_anew(fake, visit):
    page = visit().page
    drawing = (
        b'<svg xmlns="http://www.w3.org/2000/svg" width="40" height="30"><rect width="40" height="30" fill="#ff0000"/></svg>'
    )
    choose(page, drawing, "a.svg", "image/svg+xml")
    page.locator("#current-image-size", has_text="40 × 30, sent as PNG").wait_for()
    answered(page, "What is this?")
    image = Image.open(io.BytesIO(sent(fake)[1]))
    assert (image.format, image.size, image.convert("RGB").getpixel((20, 15))) == ("PNG", (40, 30), (255, 0, 0))


def test_before_a_question_another_image_takes_the_first_ones_place(fake, visit):
    page = visit().page
    show_demo(page)
    choose(page, image_file(30, 20), "other.png")
    page.locator("#current-image-name", has_text="other.png").wait_for()
    assert page.locator(".list li").count() == 1
    answered(page, "What is this?")
    assert sent(fake)[1] == image_file(30, 20)


@pytest.mark.parametrize("first", [True, False], ids=["after an image", "after none"])
def test_after_a_question_it_begins_a_new_conversation(fake, visit, first):
    page = visit().page
    if first:
        show_demo(page)
    answered(page, "one")
    choose(page, image_file(30, 20), "other.png")
    page.locator("#notice-words", has_text="the model takes one image per conversation").wait_for()
    assert page.locator(".turn").count() == 0 and page.locator(".list li").count() == 2
    answered(page, "two")
    assert len(fake.asked[1]["messages"]) == 1 and sent(fake)[1] == image_file(30, 20)


def test_the_camera_is_on_no_longer_than_its_window(fake, visit):
    page = visit(permissions=["camera"]).page
    page.evaluate(
        """() => {
            const get = navigator.mediaDevices.getUserMedia.bind(navigator.mediaDevices);
            window.streams = [];
            navigator.mediaDevices.getUserMedia = async (wish) => {
                const stream = await get(wish);
                window.streams.push(stream);
                return stream;
            };
        }"""
    )
    live = "window.streams.flatMap(s => s.getTracks()).filter(t => t.readyState === 'live').length"
    page.locator("#welcome [data-action=camera]").click()
    page.locator("#shutter:enabled").wait_for()
    assert page.locator("#viewfinder").is_visible() and page.evaluate(live) == 1
    page.keyboard.press("Escape")
    page.locator("#camera").wait_for(state="hidden")
    page.wait_for_function(f"{live} === 0")  # the browser closes a dialog first and tells it afterwards
    page.locator(".tools [data-action=camera]").click()
    page.locator("#shutter:enabled").wait_for()
    assert page.evaluate("document.activeElement.id") == "shutter"
    page.click("#shutter")
    page.locator("#current-image-name", has_text="camera.jpg").wait_for()
    page.wait_for_function(f"{live} === 0")
    assert page.evaluate("window.streams.length") == 2
    answered(page, "What is this?")
    image = Image.open(io.BytesIO(sent(fake)[1]))
    red, green, blue = image.resize((1, 1)).getpixel((0, 0))  # the test image is green
    assert image.format == "JPEG" and green > 80 > max(red, blue)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        ("NotAllowedError", "Access to the camera was denied"),
        ("NotFoundError", "No camera was found"),
        ("NotReadableError", "in use by another program"),
        ("AbortError", "does not start (AbortError)"),
        (None, "only on localhost or over HTTPS"),
    ],
)
def test_no_camera_is_said(visit, error, words):
    page = visit().page
    page.evaluate(
        """name => Object.defineProperty(navigator, "mediaDevices", { value: name && {
            getUserMedia: () => Promise.reject(new DOMException("no", name)) } })""",
        error,
    )
    page.locator("#welcome [data-action=camera]").click()
    page.locator("#camera-words", has_text=words).wait_for()
    assert page.locator("#shutter").is_disabled() and not page.locator("#viewfinder").is_visible()
    page.click("#camera-close")
    assert not page.locator("#camera").is_visible()


def test_an_image_too_large_to_keep_is_there_until_the_reload(fake, visit):
    page = visit().page
    large = noise(2000, 1800)
    assert len(large) > 3_000_000
    show_demo(page)
    answered(page, "small")
    page.click("#new")
    choose(page, large, "large.png")
    page.locator("#notice-words", has_text="storage is full").wait_for()
    answered(page, "large")
    assert sent(fake)[1] == large
    fake.answers = [ApiError(500, "it broke", "internal_error")]
    ask(page, "again").locator(".failure").wait_for()
    page.reload()
    page.locator("#model").get_by_text(MODEL).wait_for()
    assert page.locator(".list .title").all_text_contents() == ["large", "small"]
    assert page.locator(".answer:visible").count() == 1 and page.locator("#question").is_disabled()
    page.locator(".retry:visible").click()  # not without its image
    page.locator("#notice-words", has_text="Choose it again").wait_for()
    assert [body["messages"][-1]["content"] for body in fake.asked[2:]] == ["again"]
    assert "Choose it again" in page.locator("#question").get_attribute("placeholder")
    assert page.locator("#current-image-view").evaluate("e => e.naturalWidth") == 320  # its thumbnail
    page.locator(".list .open", has_text="small").click()
    answered(page, "still there")
    assert sent(fake)[1] == DEMO.read_bytes()


def test_the_oldest_images_give_way(fake, visit):
    page = visit().page
    for number in range(3):
        choose(page, noise(1100, 1200), f"{number}.png")
        page.locator("#current-image-name", has_text=f"{number}.png").wait_for()
        answered(page, f"question {number}")
    page.reload()
    page.locator("#model").get_by_text(MODEL).wait_for()
    kept = []
    for number in range(3):
        page.locator(".list .open", has_text=f"question {number}").click()
        kept.append(page.locator("#question").is_enabled())
    assert kept == [False, True, True]
