"""report.html in a browser: no requests, no errors, nothing wider than a phone.

Which browser that is says browser_case.py; without one these tests are skipped, and fail in CI.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from cobra_edge.regress.outputs.compare import compare
from cobra_edge.regress.outputs.html import comparison_html
from cobra_edge.regress.outputs.write import write_outputs

from ..serve.browser_case import browser, contrast, found_browser, luminance, opened
from .regress_reports import HOSTILE, bare_report, figure, held_report, hostile_report, image, images, make_report

__all__ = ["browser", "opened"]  # fixtures


def write(tmp_path: Path, kind: str) -> Path:
    """Write one of the pages."""
    full = make_report()
    before = held_report(measures={**full.measures, "kld_mean": figure(0.008), "accuracy": figure(0.6, 0.02)})
    if kind == "comparison":
        (tmp_path / "report.html").write_text(comparison_html(compare(before, full)), encoding="utf-8")
    elif kind == "hostile":
        write_outputs(tmp_path, hostile_report(), {HOSTILE: image()}, hostile_report())
    elif kind == "bare":
        write_outputs(tmp_path, bare_report(), {}, hostile_report())
    else:
        given = images(10) | {"scene-0003.png": image(900, noisy=True), "scene-0010.png": b"damaged"}
        given["scene-0001.png"] = image(kind="JPEG")
        write_outputs(tmp_path, full, given, before)
    return tmp_path / "report.html"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
@pytest.mark.parametrize("kind", ["full", "hostile", "bare", "comparison"])
def test_page(tmp_path, opened, kind, width, scheme):
    file = write(tmp_path, kind)
    seen = opened(file.as_uri(), width, scheme)
    seen.page.screenshot(path=tmp_path / f"{kind}-{width}-{scheme}.png", full_page=True)
    assert seen.complaints == []
    assert [url for url in seen.requests if not url.startswith("data:")] == [file.as_uri()]
    assert seen.page.evaluate("document.documentElement.scrollWidth") <= width
    images = seen.page.evaluate("[...document.images].map(i => [i.complete, i.naturalWidth, i.naturalHeight, i.clientWidth])")
    assert len(images) == {"full": 10, "hostile": 11, "bare": 0, "comparison": 0}[kind]
    assert all(complete and min(sizes) > 0 for complete, *sizes in images)
    drawings = seen.page.evaluate("[...document.querySelectorAll('svg')].map(s => s.getBoundingClientRect().toJSON())")
    assert len(drawings) == (6 if kind in ("full", "hostile") else 0)
    assert all(box["width"] > 250 and box["height"] > 80 and box["right"] <= width for box in drawings)


def test_dark_is_dark_and_both_can_be_read(tmp_path, opened):
    file = write(tmp_path, "full")
    grounds = {}
    for scheme in ("light", "dark"):
        page = opened(file.as_uri(), 1280, scheme).page
        colours = page.evaluate(
            """() => ["body", "section", ".verdict", ".badge.held", ".badge.failed", ".soft", "td small", "th small", ".key",
                      "mark", "nav a", "dt", ".bad th", "svg text", ".note"].map(s => {
                let e = document.querySelector(s), ink = getComputedStyle(e);
                const clear = c => c === "rgba(0, 0, 0, 0)";
                let color = e.namespaceURI.includes("svg") ? ink.fill : ink.color;
                while (clear(getComputedStyle(e).backgroundColor)) e = e.parentElement;
                return [s, color, getComputedStyle(e).backgroundColor];
            })"""
        )
        for name, ink, ground in colours:
            assert contrast(ink, ground) >= 4.5, (scheme, name, ink, ground)  # WCAG 2.1, 1.4.3
        grounds[scheme] = luminance(colours[0][2])
    assert grounds["dark"] < 0.05 < 0.8 < grounds["light"]


def test_a_wide_table_scrolls_by_itself(tmp_path, opened):
    page = opened(write(tmp_path, "full").as_uri(), 360, "light").page
    boxes = page.evaluate("[...document.querySelectorAll('.scroll')].map(b => [b.clientWidth, b.scrollWidth, b.tabIndex])")
    assert boxes and all(shown <= 360 and reachable == 0 for shown, _, reachable in boxes)
    assert any(whole > shown for shown, whole, _ in boxes)


def test_every_table_fits_a_desktop(tmp_path, opened):
    page = opened(write(tmp_path, "full").as_uri(), 1280, "light").page
    page.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true; })")
    boxes = page.evaluate("[...document.querySelectorAll('.scroll')].map(b => [b.clientWidth, b.scrollWidth])")
    assert len(boxes) >= 4 and all(whole <= shown for shown, whole in boxes)


def test_what_is_folded_is_printed(tmp_path, opened):
    page = opened(write(tmp_path, "full").as_uri(), 794, "light").page
    heights = "[...document.querySelectorAll('details .scroll')].map(b => b.checkVisibility({contentVisibilityAuto: true}))"
    assert not any(page.evaluate(heights))
    page.emulate_media(media="print")
    page.wait_for_function(f"{heights}.every(shown => shown)")  # style is applied with the next frame
    assert page.evaluate("document.documentElement.scrollWidth") <= 794
    boxes = page.evaluate("[...document.querySelectorAll('.scroll')].map(b => [b.clientWidth, b.scrollWidth])")
    assert all(whole <= shown for shown, whole in boxes)


def test_the_meaning_of_a_measure_is_a_key_away(tmp_path, opened):
    page = opened(write(tmp_path, "full").as_uri(), 1280, "light").page
    page.focus("a.key[href='#m-kld_mean']")
    page.keyboard.press("Enter")
    assert page.evaluate("document.querySelector(':target').innerText").startswith("kld_mean KLD, mean (nats)")
    assert page.evaluate("document.querySelector(':target').getBoundingClientRect().top") < 800


def test_text_in_plots_can_be_read_on_a_phone(tmp_path, opened):
    page = opened(write(tmp_path, "full").as_uri(), 360, "light").page
    heights = page.evaluate("[...document.querySelectorAll('svg text')].map(t => t.getBoundingClientRect().height)")
    assert len(heights) > 50 and min(heights) >= 8


def test_nothing_can_be_loaded_or_run_by_what_a_model_says(tmp_path, opened):
    file = write(tmp_path, "full")
    added = '<script>document.title = "run"</script><img src="https://example.com/a.png"><p onclick="1" id="hook"></p></main>'
    file.write_text(file.read_text(encoding="utf-8").replace("</main>", added), encoding="utf-8")
    seen = opened(file.as_uri(), 1280, "light")
    assert seen.page.title() != "run"
    assert len([text for text in seen.complaints if "Content Security Policy" in text]) >= 2


def test_without_a_browser_it_is_skipped_and_in_ci_it_fails(monkeypatch):
    monkeypatch.setenv("CHROMIUM", "/nowhere/chromium")
    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(pytest.skip.Exception, match="apt-get install"):
        found_browser()
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="apt-get install"):
        found_browser()
