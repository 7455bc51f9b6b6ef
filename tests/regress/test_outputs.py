"""What becomes of a report: each output says what the report says, and nothing in a report can break out of it."""

from __future__ import annotations

import base64
import html.parser
import importlib.resources
import io
import re
import subprocess
import sys
import xml.etree.ElementTree
from pathlib import Path

import junitparser
import msgspec
import pytest
from PIL import Image
from rich.console import Console

from cobra_edge.errors import InputError, MachineError
from cobra_edge.regress import report as r
from cobra_edge.regress.measures import MEASURES, format_value
from cobra_edge.regress.outputs.badge import report_badge
from cobra_edge.regress.outputs.difference import diff_reply
from cobra_edge.regress.outputs.history import Entry
from cobra_edge.regress.outputs.html import report_html
from cobra_edge.regress.outputs.images import embed_image
from cobra_edge.regress.outputs.junit import report_junit
from cobra_edge.regress.outputs.markdown import LIMIT, escaped, report_markdown
from cobra_edge.regress.outputs.plots import report_plots
from cobra_edge.regress.outputs.rows import all_figures, headline, measure_rows, not_taken_rows
from cobra_edge.regress.outputs.terminal import report_tables
from cobra_edge.regress.outputs.write import FILES, check_directory, report_json, write_outputs
from cobra_edge.regress.report import read_report

from .regress_reports import (
    HOSTILE,
    bare_report,
    figure,
    held_report,
    hostile_report,
    image,
    images,
    make_report,
    worst_line,
)


def printed(report: r.Report, colours: bool = False, everything: bool = False, width: int = 200) -> str:
    stream = io.StringIO()
    console = Console(file=stream, width=width, force_terminal=colours, color_system="standard" if colours else None)
    for table in report_tables(report, everything):
        console.print(table)
    return stream.getvalue()


class Reader(html.parser.HTMLParser):
    """Collects the tags of a page with their attributes, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


# the words


@pytest.mark.parametrize(
    ("report", "expected"),
    [
        (make_report(), "FAILED: 1 of 5 limits exceeded, 1 not judged: kld_mean, prompt_kld_p99"),
        (held_report(), "PASSED: all 2 limits held"),
        (held_report(verdicts=held_report().verdicts[:1]), "PASSED: the one limit held"),
        (held_report(verdicts=()), "NOT JUDGED: budget default.toml has no limits"),
        (bare_report(), "NOT JUDGED: no budget"),
        (bare_report(passed=False), "FAILED: no budget, and the run did not pass"),
    ],
)
def test_headline(report, expected):
    assert headline(report) == expected


def unjudged_report() -> r.Report:
    few = r.TooFew(4, 16)
    measures = make_report().measures | {"kld_mean": r.Figure(0.0123, too_few=few)}
    verdict = r.Verdict("kld_mean", "max", 0.02, None, False, f"{few}: use a larger suite, or export with more --golden-lines")
    return make_report(measures=measures, verdicts=(verdict, *held_report().verdicts[1:]), not_taken={}, passed=False)


def test_too_few_images_are_said_in_words_in_every_output(tmp_path):
    report, words = unjudged_report(), "too few to judge (4 images; 16 needed)"
    (row,) = (row for row in measure_rows(report) if row.name == "kld_mean")
    assert (row.value, row.interval, row.limits, row.failed) == ("0.0123", words, (("≤ 0.02", "NOT JUDGED"),), True)
    assert headline(report) == "FAILED: 1 of 2 limits not judged: kld_mean"
    assert (
        words in printed(report) and words in report_markdown(report) and words in Reader(report_html(report, {}, report)).text
    )
    assert f"could not be judged: {words}".encode() in report_junit(report)
    assert "**NOT JUDGED**" in report_markdown(report) and not any("the limit of" in what for what, _ in not_taken_rows(report))
    (tmp_path / "report.json").write_bytes(report_json(report))
    assert read_report(tmp_path / "report.json") == report
    assert str(r.TooFew(1, 8)) == "too few to judge (1 image; 8 needed)"


def test_a_report_that_contradicts_itself_has_not_passed():
    assert headline(make_report(passed=True)).startswith("FAILED")
    assert headline(held_report(passed=False)).startswith("FAILED")


def test_rows_have_each_measure_once_with_all_its_limits():
    rows = {row.name: row for row in measure_rows(make_report())}
    whole = [name for name in MEASURES if name in make_report().measures or name == "prompt_kld_p99"]
    first = ["kld_mean", "prompt_kld_p99", "top1_agreement", "accuracy.color", "accuracy_change", "greedy_match"]
    assert list(rows)[:6] == first and sorted(rows) == sorted([*whole, "accuracy.color"])
    kld = rows["kld_mean"]
    assert (kld.value, kld.interval, kld.floors) == ("0.0123", "0.0111 – 0.0135", ("2.1e-6", "0.00014"))
    assert kld.limits == (("≤ 0.02", "held"), ("≤ 0.005 (floor)", "FAILED")) and kld.failed
    assert rows["accuracy.color"].value == "74.00%" and not rows["accuracy.color"].failed
    assert rows["prompt_kld_p99"].value == "not measured" and rows["prompt_kld_p99"].failed
    assert rows["kld_median"].limits == () and not rows["kld_median"].failed


def test_measures_come_in_the_tables_order_whatever_the_files_is():
    shuffled = dict(sorted(make_report().measures.items(), reverse=True))
    assert list(all_figures(make_report(measures=shuffled))) == list(all_figures(make_report()))


def test_layers_are_shown_where_they_fail_and_counted_where_they_hold():
    layers = {f"state_error.{i}": figure(0.01 * (i + 1)) for i in range(12)}
    limits = tuple(r.Verdict(name, "max", 0.1, f.high, f.high <= 0.1) for name, f in layers.items())
    report = make_report(measures=dict(sorted({**make_report().measures, **layers}.items())), verdicts=limits)
    assert [name for name in all_figures(report) if "state_error." in name] == list(layers)
    rows = [row for row in measure_rows(report) if row.limits]
    assert [(row.name, row.value, row.failed) for row in rows] == [
        ("state_error.9", "0.1", True),
        ("state_error.10", "0.11", True),
        ("state_error.11", "0.12", True),
        ("state_error.LAYER", "", False),
    ]
    for text in (Reader(report_html(report, {}, report)).text, report_markdown(report, report), printed(report)):
        assert "state_error.LAYER" in text and "9 layers, a limit each" in text


def test_an_unknown_measure_is_refused_with_a_hint():
    with pytest.raises(InputError, match="did you mean 'kld_mean'"):
        measure_rows(make_report(measures={"kld_meen": figure(1.0)}))


def test_what_could_not_be_taken_is_said_once_with_its_reason():
    assert list(not_taken_rows(make_report())) == [
        ("prompt_kld_p99", "the baseline keeps no question tokens"),
        ("attribution to head", "the head is tied to the embedding"),
    ]
    silent = make_report(not_taken={}, attribution=None)
    assert list(not_taken_rows(silent)) == [("the limit of prompt_kld_p99", silent.verdicts[-1].note)]


@pytest.mark.parametrize(
    ("reply", "other", "expected"),
    [
        ("a red circle here", "a green circle here", ("a ", "red", " circle here", 0)),
        ("a red circle", "a red", ("a red", " circle", "", 0)),
        ("a red", "a red circle", ("a red", "", "", 0)),
        ("redder", "redden", ("", "redder", "", 0)),
        ("same", "same", ("", "", "same", 0)),
        ("", "something", ("", "", "", 0)),
        ("a a a", "a a", ("a a", " a", "", 0)),
    ],
)
def test_parted(reply, other, expected):
    got = diff_reply(reply, other)
    assert (got.before, got.changed, got.after, got.omitted) == expected


def test_parted_long_texts_keep_the_place_where_they_part():
    same, mine = "x " * 5000, "mine " * 1000
    got = diff_reply(same + mine + "end " * 1000, same + "other " + "end " * 1000)
    shown = got.before + got.changed + got.after
    assert got.before.startswith("…") and got.changed.startswith("mine mine") and got.changed.endswith("…")
    assert len(shown) < 1200 and got.omitted == len(same + mine + "end " * 1000) - len(shown.replace("…", ""))


@pytest.mark.parametrize("words", ["aa bb", "ab ba ab", "x", " lead", "tail ", "ü ß"])
@pytest.mark.parametrize("others", ["aa cc", "ab ab", "", " lead", "tail", "ü ss"])
def test_parted_loses_nothing(words, others):
    got = diff_reply(words, others)
    assert got.before + got.changed + got.after == words


# the terminal


def test_terminal_names_runtime_baseline_figures_and_verdict():
    text = printed(make_report(), everything=True)
    for expected in (
        "FAILED: 1 of 5 limits exceeded, 1 not judged",
        "decoder native, AVX2, vision by onnxruntime CPU, activations float32, on cpu, 4 threads",
        "checkpoint mini, computed by torch, float32, at most 64 most probable tokens kept",
        "omitted probability at most 0.0031 on answers and 0.4 on questions",
        "0.0111 – 0.0135",
        "2.1e-6",
        "caption      40    70.00%",
        "backbone.layers.5.mixer.in_proj.weight",
        "a small green circle",
        "suite line 17",
        "the image is missing",
        "vision tower, projector: by onnxruntime",
    ):
        assert expected in text, expected


def test_terminal_shows_three_of_the_worst_lines():
    assert re.findall(r"^line (\d+)", printed(make_report()), re.MULTILINE) == ["3", "4", "5"]


def test_terminal_reddens_what_failed_and_nothing_else():
    red = [line[len("\x1b[31m") :] for line in printed(make_report(), colours=True).splitlines() if "\x1b[31m" in line]
    assert [line.split()[0] for line in red] == ["gate", "kld_mean", "FAILED", "prompt_kld_p99"]
    assert "\x1b[31m" not in printed(held_report(), colours=True)


def test_terminal_text_from_files_is_inert():
    text = printed(hostile_report(), colours=True)
    assert "[red]@octocat[/red]" in text
    assert "\x1b[31m\x00" not in text and "\x00" not in text and "\u202e" not in text
    assert len(text) < 100_000


def test_terminal_of_next_to_nothing():
    text = printed(bare_report())
    assert "NOT JUDGED: no budget" in text and "logits are not finite" in text and "no vision" in text
    assert "decoder native, AVX2, no vision" in text and "\ntask" not in text and "\nline" not in text


def real_sized() -> r.Report:
    """Return a report with the longest names and numbers that a run of published benchmarks has."""
    full = make_report()
    names = ("gqa-testdev-balanced", "refcoco-unc-testA-localization", "ocid-ref-multi-object-free-form", *map(str, range(9)))
    tasks = tuple(
        msgspec.structs.replace(full.tasks[0], task=name, lines=12578, change=r.Figure(-0.1234, -0.1434, -0.1034))
        for name in names
    )
    verdicts = tuple(r.Verdict(f"accuracy_change.{name}", "min", -0.1, -0.1434, False) for name in names[:3])
    measures = {**full.measures, "right_change_mean": r.Figure(-1.23e-3, -3.45e-3, 6.78e-4), "kld_max": figure(12345.678)}
    gates = {
        "recorded": "the baseline is not the golden lines of the bundle, which the recorded drift is of",
        "against": "nothing to compare with was given (--against)",
        "expected": "no statistics foretold the drift of this recipe: only the method guided does",
    }
    return make_report(
        tasks=tasks, measures=measures, verdicts=full.verdicts + verdicts, not_judged=gates,
        noise_floor={"fp16": {name: 2.345e-6 for name in measures}, "bf16": {name: 1.234e-4 for name in measures}},
    )  # fmt: skip


def words_of(text: str) -> set[str]:
    return set(text.split())


@pytest.mark.parametrize("width", [60, 80])
@pytest.mark.parametrize("everything", [False, True])
def test_a_narrow_terminal_breaks_no_word_and_no_number(width, everything):
    lines = printed(real_sized(), everything=everything, width=width).splitlines()
    wide = printed(real_sized(), everything=everything, width=400)
    assert words_of(wide) <= words_of(" ".join(lines))
    assert max(map(len, lines)) <= width
    for word in ("accuracy_change.refcoco-unc-testA-localization", "-14.34%", "1.23e+4" if everything else "kld_mean"):
        assert word in words_of(" ".join(lines)) or f"({word}" in words_of(" ".join(lines))


def test_the_verdict_is_first_then_the_gates_then_eight_measures():
    lines = printed(real_sized(), width=80).splitlines()
    assert lines[0].startswith("cobra-mini-x86-cpu-w4a16-g128: FAILED: 4 of 8 limits exceeded, 1 not judged")
    gates = [line.split()[1] for line in lines if line.startswith("gate ")]
    assert gates == ["absolute", "recorded", "against", "expected"]
    assert any(re.fullmatch(r"\d+ more measures: --all, or --report DIRECTORY", line) for line in lines)
    assert "more measures" not in printed(real_sized(), everything=True)
    rows = measure_rows(real_sized())
    assert [row.failed for row in rows] == sorted((row.failed for row in rows), reverse=True)


# Markdown


def test_markdown_begins_with_the_verdict_and_has_the_figures():
    text = report_markdown(make_report())
    assert text.startswith("**FAILED: 1 of 5 limits exceeded, 1 not judged")
    assert (
        "| `kld_mean` | 0.0123 | 0.0111 – 0.0135 | ≤ 0.02<br>≤ 0.005 (floor) | held<br>**FAILED** |" in text
        and "| `kld_mean` | 2.1e-6 | 0.00014 |" in text
    )
    assert "| <code>color</code> | <code>exact</code> | 40 | 74.00% | 76.00% | -2.00% | -5.00% – +1.00% | 0.008 |" in text
    assert text.count("<details>") == text.count("</details>") == 5 + 12
    assert "<summary>11 more measures</summary>" in text and "* `kld_mean`: KLD, mean (nats), lower is better" in text


def test_markdown_compares_with_the_previous_report():
    before = make_report(measures={**make_report().measures, "kld_mean": figure(0.008)})
    assert "1 worse, 0 better" in report_markdown(make_report(), before)
    other = make_report(build=msgspec.structs.replace(make_report().build, model="other`model"))
    assert "Not compared with the previous report: reports of other&#96;model" in report_markdown(make_report(), other)


def test_markdown_says_the_change_before_the_measures():
    before = make_report(measures={**make_report().measures, "kld_mean": figure(0.008)}, commit="abcdef0123456789")
    ratio = {**make_report().measures, "kld_ratio": r.Figure(1.5375, 1.4, 1.7)}
    head = report_markdown(make_report(measures=ratio), before).partition("| measure | value |")[0]
    assert f"Compared with <code>{before.build.name}</code> at commit <code>abcdef012345</code>: KLD × 1.538 (1.400" in head
    alone = {**ratio, "kld_ratio": r.Figure(1.5375, too_few=r.TooFew(3, 8))}
    assert "KLD × 1.538 (too few to judge (3 images; 8 needed)), " in report_markdown(make_report(measures=alone), before)


@pytest.mark.parametrize(
    ("report", "word"), [(make_report(), "failed"), (held_report(), "passed"), (bare_report(), "not judged")]
)
def test_a_badge_says_verdict_and_drift_and_loads_nothing(report, word):
    badge = xml.etree.ElementTree.fromstring(report_badge(report))
    kld = report.measures["kld_mean"].value
    said = word if kld is None else f"{word}, KLD {format_value('kld_mean', kld)}"
    assert badge.get("aria-label") == f"drift: {said}"
    drawn = [text.text for text in badge.iter("{http://www.w3.org/2000/svg}text")]
    assert drawn == ["drift", said]
    assert not re.search("href|url\\(h|script|style", report_badge(report))


def test_markdown_of_hostile_texts():
    text = report_markdown(hostile_report(), hostile_report())
    for alive in ("<script", "@octocat", "`x`", "\x1b", "\x00", "\u202e", "*b*", "www.example", "[red]"):
        assert alive not in text, alive
    assert "@\u200boctocat" in text
    for line in text.splitlines():
        if line.startswith("| "):
            assert line.endswith(" |"), line
    rows = [line for line in text.splitlines() if "| held |" in line or "no limit |" in line]
    assert rows and {line.count("|") for line in rows} == {6}


def test_markdown_escapes_what_it_says_it_does():
    assert escaped("a|b`c<d>&\ne@f*_# g: h:i [j](k)") == (
        "a&#124;b&#96;c&#60;d&#62;&#38; ⏎ e@\u200bf&#42;&#95;&#35; g: h&#58;i &#91;j&#93;(k)"
    )


def test_markdown_never_passes_githubs_limit():
    tasks = tuple(msgspec.structs.replace(make_report().tasks[0], task=f"{i} {'<' * 200}") for i in range(500))
    worst = tuple(worst_line(i, reply="|" * 100_000, reference_reply="<" * 100_000, prompt="@" * 50_000) for i in range(300))
    skipped = dict.fromkeys(range(1, 2000), "&" * 500)
    suite = msgspec.structs.replace(make_report().suite, skipped=skipped)
    text = report_markdown(make_report(tasks=tasks, worst=worst, suite=suite))
    assert LIMIT * 0.8 < len(text) <= LIMIT
    assert "sections were omitted because of the length limit of a comment" in text and text.startswith("**FAILED")
    assert text.count("<details>") == text.count("</details>")


def test_markdown_keeps_failed_rows_where_there_are_too_many():
    many = tuple(r.Verdict(f"accuracy.t{i}", "min", 0.5, 0.4 if i == 199 else 0.6, i != 199) for i in range(200))
    text = report_markdown(make_report(verdicts=many))
    assert "accuracy.t199" in text and "accuracy.t99<" not in text and "149 more rows are in report.json" in text


# JUnit


def test_junit_has_a_case_for_each_limit():
    suite = next(iter(junitparser.JUnitXml.fromstring(report_junit(make_report()))))
    assert [case.name for case in suite] == [
        "kld_mean max",
        "kld_mean max_times_floor",
        "top1_agreement min",
        "accuracy.color min",
        "prompt_kld_p99 max",
    ]
    assert {case.classname for case in suite} == {"heldout.cobra-mini-x86-cpu-w4a16-g128"}
    assert (suite.tests, suite.failures, suite.errors, suite.skipped) == (5, 2, 0, 0)
    failed = {case.name: case.result[0].message for case in suite if case.result}
    assert failed == {
        "kld_mean max_times_floor": "0.0135 exceeds ≤ 0.005 (floor) (40 times the floor in fp16)",
        "prompt_kld_p99 max": "could not be judged: the baseline keeps no question tokens",
    }
    assert suite.time == 61.5
    properties = {p.name: p.value for p in suite.properties()}
    assert properties["kld_median"] == "0.0041" and properties["scheme"] == "w4a16-g128"


def test_junit_fails_what_could_not_be_judged_even_if_it_says_within():
    verdict = r.Verdict("kld_mean", "max", 0.02, None, True, "logits are not finite")
    suite = next(iter(junitparser.JUnitXml.fromstring(report_junit(held_report(verdicts=(verdict,))))))
    assert suite.failures == 1


def test_junit_without_a_budget_is_one_skipped_case():
    suite = next(iter(junitparser.JUnitXml.fromstring(report_junit(bare_report()))))
    (case,) = suite
    assert case.name == "budget" and suite.skipped == 1 and suite.failures == 0
    assert case.result[0].message == "not judged: no budget"


def test_junit_is_xml_whatever_the_texts_are():
    hostile = hostile_report()
    everything = "".join(map(chr, [*range(0x300), 0xFFFE, 0xFFFF, 0xD800, 0x1FFFE]))
    noted = r.Verdict("kld_mean", "max", 0.02, None, False, everything)
    tree = xml.etree.ElementTree.fromstring(report_junit(msgspec.structs.replace(hostile, verdicts=(noted,))))
    assert "<script>alert(1)</script>" in next(tree.iter("testcase")).attrib["classname"]
    assert "ÿ" in next(tree.iter("failure")).attrib["message"]


# HTML


def test_html_has_every_figure_of_the_report():
    report = make_report()
    page = Reader(report_html(report, images()))
    rows = measure_rows(report)
    for row in rows:
        for text in (row.name, row.value, row.interval, *row.floors, *(limit for limit, _ in row.limits)):
            assert text in page.text, text
    for expected in (
        headline(report),
        report.build.fingerprint,
        report.suite.sha256,
        "omitted probability at most 0.0031 on answers",
        "vision tower, projector: by onnxruntime",
        "2026-03-01",
    ):
        assert expected in page.text, expected
    assert "line 17: the image is missing" in page.text and "f1 0.8 (reference 0.82)" in page.text


def test_html_has_headings_captions_and_names_for_images():
    page = Reader(report_html(make_report(), images(), make_report()))
    assert len(page.of("h1")) == 1
    assert [name for name, _ in page.tags if name in ("h2", "h3")][:4] == ["h2", "h2", "h2", "h2"]
    assert len(page.of("table")) == len([of for of in page.of("div") if of.get("class") == "scroll" and of["aria-label"]]) >= 3
    keys = [link for link in page.of("a") if link.get("class") == "key"]
    assert keys and all(": " in link["title"] for link in keys)
    assert len(page.of("img")) == 12 and all(image["alt"] for image in page.of("img"))
    assert len(page.of("svg")) == 6 and all(svg["role"] == "img" and svg["aria-label"] for svg in page.of("svg"))
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {a["href"][1:] for a in page.of("a")} <= set(ids)


def test_html_needs_nothing_from_elsewhere():
    page = Reader(report_html(make_report(), images(), make_report()))
    policy = next(meta["content"] for meta in page.of("meta") if meta.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; style-src 'unsafe-inline'; img-src data:;")
    assert not page.of("script") and not page.of("iframe") and not page.of("object")
    for tag, attributes in page.tags:
        for name in ("src", "href", "xlink:href", "action"):
            assert attributes.get(name, "data:").startswith(("data:", "#")), (tag, attributes)
        assert not any(name.startswith("on") for name in attributes), (tag, attributes)


def test_html_of_hostile_texts_has_the_tags_of_harmless_ones():
    hostile, harmless = hostile_report(), make_report()
    harmless = msgspec.structs.replace(
        harmless,
        worst=(worst_line(0, reply="word " * 300, reference_reply="word " * 200 + "else"), *harmless.worst),
        not_taken={"kld_p99": "a", "other": "b"},
    )
    hostile_page = report_html(hostile, {HOSTILE: image()}, hostile)
    ours = {tag for tag, _ in Reader(report_html(harmless, images(), harmless)).tags}
    assert {tag for tag, _ in Reader(hostile_page).tags} <= ours
    assert "<script" not in hostile_page and "alert(1)&lt;/script&gt;" in hostile_page and "{{ 7*7 }}" in hostile_page
    for control in "\x00\x1b\u202e":
        assert control not in hostile_page


def test_html_marks_where_replies_part():
    page = report_html(make_report(), images())
    assert page.count("<mark>red</mark>") == page.count("<mark>green</mark>") == 11
    assert "the replies are equal" in page and "the replies diverge at token 6" in page
    tokens = make_report(worst=(worst_line(0, reply="same", reference_reply="same", diverges_at=2),))
    assert "the texts are equal, the tokens diverge at 2" in report_html(tokens, {})


def test_html_says_which_images_are_missing():
    given = images(3) | {"scene-0001.png": b"nothing for a page", "scene-0002.png": image()[:90]}
    text = Reader(report_html(make_report(), given)).text
    assert "the image scene-0001.png cannot be shown: the image: not an image; expected one of PNG" in text
    assert "the image scene-0002.png cannot be shown: the image: truncated or damaged" in text
    assert "the image scene-0003.png is missing" in text
    assert len(Reader(report_html(make_report(), given)).of("img")) == 1


def test_html_stays_small_with_a_dozen_photographs():
    given = images(12, side=1600, noisy=True)
    assert sum(map(len, given.values())) > 12e6
    page = report_html(make_report(), given, make_report())
    assert len(page.encode()) < 1.5e6
    assert len(Reader(page).of("img")) == 12


def test_html_of_next_to_nothing():
    page = Reader(report_html(bare_report(), {}))
    assert not page.of("svg") and not page.of("img")
    for said in (
        "No plots: ",
        "The report lists no lines",
        "Attribution was not measured",
        "logits are not finite",
    ):
        assert said in page.text


def test_html_compares_with_the_previous_report():
    before = make_report(measures={**make_report().measures, "kld_mean": figure(0.008)})
    page = Reader(report_html(make_report(), {}, before))
    assert "Worse measures: 1, better: 0." in page.text and "+0.0043" in page.text
    other = make_report(build=msgspec.structs.replace(make_report().build, model="other"))
    assert "Not compared: reports of other and cobra-mini" in Reader(report_html(make_report(), {}, other)).text
    assert "Since the previous report" not in Reader(report_html(make_report(), {})).text


def test_html_is_the_same_each_time():
    assert report_html(make_report(), images(), make_report()) == report_html(make_report(), images(), make_report())
    program = (
        "import hashlib; from tests.regress.regress_reports import *; from cobra_edge.regress.outputs.html import report_html;"
        "print(hashlib.sha256(report_html(make_report(), images(), make_report()).encode()).hexdigest())"
    )
    root = Path(__file__).parents[2]
    runs = [subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=True) for _ in "12"]
    assert runs[0].stdout == runs[1].stdout


# plots and images


def test_plots_are_svg_in_the_pages_colours():
    plots = report_plots(make_report())
    assert [plot.caption.split(",")[0].split(":")[0] for plot in plots] == [
        "kld_mean by token position",
        "state_error by layer",
        "kld_mean by task",
        "kld_mean with only this part of the build",
        "kld_mean with only this layer of the build",
        "kld_mean with only this tensor of the build",
    ]
    names: list[str] = []
    for plot in plots:
        tree = xml.etree.ElementTree.fromstring(plot.svg)
        assert tree.tag.endswith("svg") and "viewBox" in tree.attrib
        names += [element.attrib["id"] for element in tree.iter() if "id" in element.attrib]
        assert "var(--accent)" in plot.svg and "currentColor" in plot.svg
        assert "#0102" not in plot.svg and "#000000" not in plot.svg and "mathdefault" not in plot.svg
        assert len(plot.svg) < 60_000
    assert len(names) == len(set(names))


def test_the_plot_by_task_is_logarithmic_and_marks_what_has_too_few_images():
    values = {"a": figure(1e-4), "b": figure(0.1), "c": r.Figure(0.3), "zero": r.Figure(0.0, 0.0, 0.0)}
    tasks = tuple(msgspec.structs.replace(make_report().tasks[0], task=t, kld_mean=of) for t, of in values.items())
    (plot,) = report_plots(bare_report(tasks=tasks))
    texts = [text.text for text in xml.etree.ElementTree.fromstring(plot.svg).iter() if text.tag.endswith("text")]
    assert {"0.001", "0.01", "0.1"} <= set(texts) and [text for text in texts if text in values] == ["b", "a", "zero", "c"]
    assert plot.caption.endswith("Hollow: too few images for an interval. Below 5e-05 at the edge.")


def test_plots_take_nothing_as_a_formula_and_no_glyph_as_a_reason_to_warn():
    tasks = tuple(msgspec.structs.replace(make_report().tasks[0], task=name) for name in ("$\\frac{1}{$", "色と形", "a & <b>"))
    (plot,) = [p for p in report_plots(make_report(tasks=tasks)) if "by task" in p.caption]
    texts = [element.text for element in xml.etree.ElementTree.fromstring(plot.svg).iter() if element.tag.endswith("text")]
    assert {"$\\frac{1}{$", "色と形", "a & <b>"} <= set(texts)


def test_plots_of_zeros_and_of_one_point():
    zeros = make_report(
        positions=(r.PositionFigures(0, 1, 0.0),),
        layers=(r.LayerFigures(0, r.Figure(0.0, 0.0, 0.0)), r.LayerFigures(1, r.Figure(None))),
        tasks=(msgspec.structs.replace(make_report().tasks[0], kld_mean=r.Figure(0.0, 0.0, 0.0)),),
        attribution=r.Attribution(1, (r.Part("decoder", 0.0, 1.0), r.Part("head", None, None, "tied"))),
    )
    assert len(report_plots(zeros)) == 4


@pytest.mark.parametrize("decades", [1.2, 2.2, 3, 7, 20])
def test_a_logarithmic_axis_has_numbers_that_can_be_read(decades):
    positions = tuple(r.PositionFigures(at, 1, 0.1 * 10 ** (-decades * at / 9)) for at in range(10))
    plot = report_plots(bare_report(positions=positions))[0]
    texts = [
        element.text or "" for element in xml.etree.ElementTree.fromstring(plot.svg).iter() if element.tag.endswith("text")
    ]
    places = texts[: texts.index("kld_mean (nats)")]
    numbers = [float(text) for text in places[places.index("token, 0: first of the answer") + 1 :]]
    assert 3 <= len(numbers) <= 9 and numbers == sorted(set(numbers))


def test_plots_say_how_many_bars_are_left_out():
    (plot,) = [p for p in report_plots(make_report()) if "this tensor" in p.caption]
    assert plot.caption.endswith("The worst 12 of 30.")
    assert "layers.11.in_proj" in plot.svg and "layers.12.in_proj" not in plot.svg


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_a_small_image_is_shown_as_it_is(kind):
    content = image(kind=kind)
    shown = embed_image("any-name.txt", {"any-name.txt": content})
    assert shown.uri == f"data:image/{kind.lower()};base64,{base64.b64encode(content).decode()}"
    assert (shown.width, shown.height) == (112, 112)


def test_a_large_image_is_shown_smaller():
    shown = embed_image("a", {"a": image(1600, noisy=True)})
    assert shown.uri is not None and shown.uri.startswith("data:image/jpeg;base64,")
    small = Image.open(io.BytesIO(base64.b64decode(shown.uri.partition(",")[2])))
    assert small.size == (shown.width, shown.height) == (512, 512)


def test_an_image_of_another_format_is_shown_as_jpeg():
    shown = embed_image("a.png", {"a.png": image(kind="WEBP")})
    assert shown.uri is not None and shown.uri.startswith("data:image/jpeg;base64,")
    assert base64.b64decode(shown.uri.partition(",")[2]).startswith(b"\xff\xd8\xff")


def test_an_image_of_too_many_pixels_is_not_shown():
    stream = io.BytesIO()
    Image.new("1", (9000, 9000)).save(stream, "PNG")
    assert "9000 × 9000 pixels, the maximum is 64,000,000" in embed_image("a", {"a": stream.getvalue()}).why_not


# files


def test_report_json_is_read_back_as_it_was(tmp_path):
    for report in (make_report(), bare_report(), hostile_report()):
        (tmp_path / "report.json").write_bytes(report_json(report))
        assert read_report(tmp_path / "report.json") == report


def test_report_json_is_the_same_whatever_order_names_came_in():
    report = make_report()
    other = make_report(
        measures=dict(reversed(report.measures.items())), noise_floor=dict(reversed(report.noise_floor.items()))
    )
    assert report_json(report) == report_json(other)


def test_report_json_refuses_a_number_that_json_has_not():
    with pytest.raises(InputError, match=r"worst\[0\]\.kld_mean.*not_taken"):
        report_json(make_report(worst=(worst_line(0, kld_mean=float("nan")),)))


def test_files_are_written_and_others_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "report.md").write_text("old")
    write_outputs(tmp_path, make_report(), images())
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*FILES, "notes.txt"])
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert (tmp_path / "report.md").read_text(encoding="utf-8").startswith("**FAILED")
    assert read_report(tmp_path / "report.json") == make_report()


def test_nothing_is_written_where_one_file_cannot_be_made(tmp_path):
    (tmp_path / "report.md").write_text("old")
    with pytest.raises(InputError):
        write_outputs(tmp_path, make_report(worst=(worst_line(0, kld_max=float("inf")),)), {})
    assert [path.name for path in tmp_path.iterdir()] == ["report.md"]
    assert (tmp_path / "report.md").read_text() == "old"


def test_a_directory_that_is_a_file_is_refused_before_anything_is_measured(tmp_path):
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(InputError, match="cannot be written .* give a writable directory"):
            check_directory(place)


def test_a_directory_of_a_files_name_is_refused(tmp_path):
    (tmp_path / "report.md").mkdir()
    with pytest.raises(InputError, match="is a directory, expected a file"):
        check_directory(tmp_path)


def test_a_directory_is_made_and_left_empty_by_the_check(tmp_path):
    check_directory(tmp_path / "a" / "b")
    assert list((tmp_path / "a" / "b").iterdir()) == []


@pytest.mark.parametrize("library", ["jinja2", "matplotlib", "junitparser"])
def test_a_missing_library_is_named_before_anything_is_measured(tmp_path, monkeypatch, library):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(MachineError, match=rf"needs {library}; install it with: pip install '\.\[regress\]'"):
        check_directory(tmp_path)


def test_tables_json_and_markdown_need_no_library_of_the_extra(tmp_path, monkeypatch):
    for library in ("jinja2", "matplotlib", "junitparser"):
        monkeypatch.setitem(sys.modules, library, None)
    write_outputs(tmp_path, make_report(), {}, make_report(), files=("report.json", "report.md"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.json", "report.md"]
    assert printed(make_report())


def test_templates_are_part_of_the_package():
    templates = importlib.resources.files("cobra_edge.regress.outputs") / "templates"
    assert {"base.html.j2", "report.html.j2", "compare.html.j2", "comparison.html.j2", "style.css"} <= {
        entry.name for entry in templates.iterdir()
    }


# documentation


@pytest.mark.parametrize(
    "struct", [r.Report, r.Build, r.Baseline, r.Suite, r.Runtime, r.TaskFigures, r.WorstLine, r.Verdict, Entry]
)
def test_every_field_is_documented(struct):
    page = (Path(__file__).parents[2] / "docs" / "regress-report.md").read_text(encoding="utf-8")
    missing = [name for name in struct.__struct_fields__ if f"`{name}`" not in page]
    assert not missing
