"""Parsing: a byte order mark is skipped everywhere, and errors begin with our own message."""

import json
import shutil
import unicodedata

import msgspec
import pytest

from cobra_edge.bundle.reader import MANIFEST, Bundle
from cobra_edge.errors import InputError
from cobra_edge.files.parsing import ParseError, parse_json, parse_toml, utf8_text
from cobra_edge.model.checkpoint import open_checkpoint
from cobra_edge.regress.budget import read_budget
from cobra_edge.regress.outputs.history import append_history, read_history
from cobra_edge.regress.outputs.write import report_json
from cobra_edge.regress.report import read_report
from cobra_edge.suite.benchmarks.json_files import read_json, read_json_by_key, read_json_lines
from cobra_edge.suite.reader import name_on_disk, numbered_lines, read_suite

from ..bundle.test_reader import rehash
from ..conftest import MINI
from ..regress.regress_reports import make_report

MARK = b"\xef\xbb\xbf"
LINE = json.dumps({"prompt": "Is it red?", "answer": "Yes", "task": "colour"}).encode()


def test_a_mark_is_skipped():
    assert parse_json(MARK + b'{"a": 1}') == {"a": 1} == parse_toml(MARK + b"a = 1")
    assert utf8_text(MARK + "é".encode()) == "é"
    assert parse_json(MARK + b"[1]", list[int]) == [1]


@pytest.mark.parametrize(
    ("parse", "content", "says"),
    [
        (parse_json, b"{no", "not JSON ("),
        (parse_json, b"", "not JSON ("),
        (parse_json, b"[" * 100_000, "not JSON ("),
        (parse_json, b'"\xff"', "not UTF-8 (byte 1:"),
        (parse_json, '{"a": 1}'.encode("utf-16"), "not UTF-8 but UTF-16; save it as UTF-8"),
        (lambda content: parse_json(content, list[int]), b'["a"]', "does not match the schema ("),
        (lambda content: parse_json(content, int), b'"\xff"', "not UTF-8 ("),
        (parse_toml, b"[a", "not TOML ("),
        (parse_toml, b"a = '\xff'", "not UTF-8 ("),
        (parse_toml, "a = 1".encode("utf-16"), "not UTF-8 but UTF-16"),
    ],
)
def test_what_is_wrong_is_said_in_our_own_words_first(parse, content, says):
    with pytest.raises(ParseError) as caught:
        parse(content)
    assert str(caught.value).startswith(says)


def test_suites_with_a_mark_are_read(tmp_path):
    file = tmp_path / "suite.jsonl"
    file.write_bytes(MARK + b"\r\n" + LINE + b"\r\n" + LINE)
    assert [number for number, _ in numbered_lines(file)] == [2, 3]
    file.write_bytes(MARK + LINE + b"\n")
    assert read_suite(file)[0].prompt == "Is it red?"
    for bad, says in (
        (b"\xff", "line 2: not UTF-8"),
        (b"{no", "line 2: not JSON"),
        (b"{}", "line 2: does not match the schema"),
    ):
        file.write_bytes(MARK + LINE + b"\n" + bad + b"\n")
        with pytest.raises(InputError, match=says):
            read_suite(file)


def test_answers_of_a_suite_are_as_in_training(tmp_path):
    file = tmp_path / "suite.jsonl"
    file.write_text(json.dumps({"prompt": "a", "answer": "\n Ye<image>s ", "task": "t"}))
    assert read_suite(file)[0].answer == "Yes"
    file.write_text(json.dumps({"prompt": "a", "answer": "<image>", "task": "t"}))
    with pytest.raises(InputError, match="line 1: answer is empty"):
        read_suite(file)


def test_budgets_reports_histories_and_benchmarks_with_a_mark_are_read(tmp_path):
    file = tmp_path / "a file"
    file.write_bytes(MARK + b"[schemes.fp16]\nkld_mean = {max = 1.0}\n")
    assert read_budget(file).schemes["fp16"]["kld_mean"].max == 1.0
    report = make_report()
    file.write_bytes(MARK + report_json(report))
    assert read_report(file) == report
    history = tmp_path / "history.jsonl"
    append_history(history, report)
    history.write_bytes(MARK + history.read_bytes())
    append_history(history, report)
    assert len(read_history(history)) == 2
    file.write_bytes(MARK + b'{"a": 1}\n')
    assert read_json(file, dict[str, int]) == {"a": 1} and list(read_json_by_key(file, int)) == [("a", 1)]
    assert list(read_json_lines(file, dict[str, int])) == [(1, {"a": 1})]


def test_a_budget_with_a_mark_is_updated(tmp_path):
    from cobra_edge.regress.report import Figure
    from cobra_edge.regress.update_budget import update_budget

    file = tmp_path / "budget.toml"
    file.write_bytes(MARK + b"# kept\n[schemes.fp16]\nkld_mean = {max = 1.0}\n")
    update_budget(file, "fp16", {"kld_mean": Figure(0.5)}, {}, 0.25)
    assert "# kept" in file.read_text(encoding="utf-8") and read_budget(file).schemes["fp16"]["kld_mean"].max == 0.625


def test_manifests_and_prompts_with_a_mark_are_read(tiny_bundle, tmp_path):
    bundle = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    (bundle / "prompt.json").write_bytes(MARK + (bundle / "prompt.json").read_bytes())
    rehash(bundle, "prompt.json")
    (bundle / MANIFEST).write_bytes(MARK + (bundle / MANIFEST).read_bytes())
    opened = Bundle.open(bundle)
    assert opened.text()[0].end_id == 0 and isinstance(msgspec.structs.asdict(opened.manifest), dict)


def test_a_checkpoints_config_with_a_mark_is_read(tmp_path):
    copy = shutil.copytree(MINI, tmp_path / "mini")
    (copy / "config.json").write_bytes(MARK + (copy / "config.json").read_bytes())
    assert open_checkpoint(str(copy)).config == open_checkpoint(str(MINI)).config


@pytest.mark.parametrize("written", ["NFC", "NFD"])
@pytest.mark.parametrize("on_disk", ["NFC", "NFD"])
def test_images_are_found_whichever_way_their_names_are_composed(tmp_path, written, on_disk):
    folder, name = unicodedata.normalize(on_disk, "Übung"), unicodedata.normalize(on_disk, "café.png")
    (tmp_path / folder).mkdir()
    (tmp_path / folder / name).write_bytes(b"an image")
    file = tmp_path / "suite.jsonl"
    image = unicodedata.normalize(written, "Übung/café.png")
    file.write_text(json.dumps({**json.loads(LINE), "image": image}, ensure_ascii=False), encoding="utf-8")
    (line,) = read_suite(file)
    assert line.image == f"{folder}/{name}"


def test_a_name_that_is_nowhere_stays_as_it_came(tmp_path):
    for name in ("café.png", "../x/./y", "a\0b", "", "/nowhere/é"):
        assert name_on_disk(tmp_path, name) == name
