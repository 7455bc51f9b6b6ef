"""Suites: valid lines, refused and skipped ones, and that written suites are read back."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from cobra_edge.errors import InputError
from cobra_edge.suite.line import Line
from cobra_edge.suite.line_set import LineSet
from cobra_edge.suite.reader import LONGEST_LINE_BYTES, BadLine, missing_image, read_suite, write_suite

GOOD: dict[str, Any] = {"prompt": "Is it red?", "answer": "Yes", "task": "colour"}


def suite(directory: Path, *lines: dict[str, Any] | str | bytes) -> Path:
    file = directory / "suite.jsonl"
    texts = (line if isinstance(line, str | bytes) else json.dumps(line) for line in lines)
    file.write_bytes(b"".join((text.encode() if isinstance(text, str) else text) + b"\n" for text in texts))
    return file


def test_a_line_of_old_has_the_defaults(tmp_path):
    (line,) = read_suite(suite(tmp_path, GOOD))
    assert line == Line("Is it red?", "Yes", "colour", None, (), "exact", None)


def test_every_field_is_read(tmp_path):
    (tmp_path / "a.png").write_bytes(b"an image")
    answers = ["red", "red", "pink", "red"]
    (line,) = read_suite(suite(tmp_path, GOOD | {"image": "a.png", "answers": answers, "metric": "vqa", "id": "17"}))
    assert line == Line("Is it red?", "Yes", "colour", "a.png", tuple(answers), "vqa", "17")


def test_line_separators_of_unicode_end_no_line(tmp_path):
    file = suite(tmp_path, json.dumps(GOOD | {"prompt": "a\u2028b\x85c"}, ensure_ascii=False), "", GOOD)
    assert [line.prompt for line in read_suite(file)] == ["a\u2028b\x85c", "Is it red?"]


def test_the_last_line_may_lack_its_end_and_ends_may_be_of_windows(tmp_path):
    file = tmp_path / "suite.jsonl"
    file.write_bytes(json.dumps(GOOD).encode() + b"\r\n" + json.dumps(GOOD).encode())
    assert len(read_suite(file)) == 2


REFUSALS: list[tuple[dict[str, Any] | str | bytes, str]] = [
    ("not json", "not JSON"),
    ("[1, 2]", "does not match the schema"),
    ({"prompt": "a", "answer": "b"}, "task is empty or missing"),
    (GOOD | {"colour": "red"}, "does not match the schema.*`colour`"),
    (GOOD | {"answer": 1}, r"does not match the schema.*answer"),
    (GOOD | {"answers": "Yes"}, r"does not match the schema.*answers"),
    (GOOD | {"answers": ["Yes", None]}, r"\$.answers\[1\]"),
    (GOOD | {"prompt": " \n"}, "prompt is empty"),
    (GOOD | {"answer": ""}, "answer is empty"),
    (GOOD | {"task": ""}, "task is empty"),
    (GOOD | {"metric": "vqa2"}, "metric 'vqa2' is unknown; did you mean 'vqa'"),
    (GOOD | {"metric": "yes-no", "answer": "maybe"}, "metric yes-no takes yes or no"),
    (GOOD | {"metric": "vsr"}, "metric vsr takes True or False"),
    (GOOD | {"metric": "vqa", "answers": ["Yes"] * 3}, "3 answers; metric vqa takes 4 or more"),
    (GOOD | {"metric": "box-iou", "answers": ["[0.5, 0, 0.2, 1]"]}, r"metric box-iou takes \[x1, y1, x2, y2\]"),
    (GOOD | {"image": "nowhere.png"}, "image nowhere.png does not exist"),
    (GOOD | {"image": "."}, "is not a regular file"),
    (GOOD | {"image": "a" * 5000}, "does not exist"),
    (GOOD | {"image": "a\0b"}, "does not exist"),
    (GOOD | {"prompt": "a" * LONGEST_LINE_BYTES}, "longer than 1048576 bytes"),
    (b'{"prompt": "\xff", "answer": "b", "task": "c"}', "not UTF-8"),
]


@pytest.mark.parametrize(("line", "says"), REFUSALS)
def test_a_bad_line_is_refused_with_its_number(tmp_path, line, says):
    file = suite(tmp_path, GOOD, "", line, GOOD)
    with pytest.raises(InputError, match=f"suite.jsonl, line 3: .*{says}"):
        read_suite(file)


@pytest.mark.parametrize(("line", "says"), REFUSALS)
def test_a_bad_line_is_passed_over_where_a_list_is_given(tmp_path, line, says):
    bad = [BadLine(99, "of another file")]
    lines = read_suite(suite(tmp_path, GOOD, "", line, GOOD), bad=bad)
    assert len(lines) == 2 and [b.number for b in bad] == [99, 3]
    assert re.search(says, bad[1].reason)


def test_good_lines_leave_the_list_empty(tmp_path):
    bad: list[BadLine] = []
    assert len(read_suite(suite(tmp_path, GOOD), bad=bad)) == 1 and not bad


def test_nothing_left_is_refused_though_lines_may_be_bad(tmp_path):
    bad: list[BadLine] = []
    with pytest.raises(InputError, match="suite.jsonl: none of its 2 lines is valid; line 2: not JSON"):
        read_suite(suite(tmp_path, "", "x", "y"), bad=bad)
    assert [b.number for b in bad] == [2, 3]


@pytest.mark.parametrize("bad", [None, []])
def test_an_empty_suite_is_refused(tmp_path, bad):
    with pytest.raises(InputError, match="no lines"):
        read_suite(suite(tmp_path, "", " "), bad=bad)


@pytest.mark.parametrize("bad", [None, []])
def test_what_cannot_be_read_is_refused(tmp_path, bad):
    for file in (tmp_path / "nowhere.jsonl", tmp_path):
        with pytest.raises(InputError, match="cannot be read"):
            read_suite(file, bad=bad)


def test_a_pipe_is_no_image(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert missing_image(tmp_path, "pipe") == "image pipe is not a regular file"


def test_a_line_that_is_too_long_is_read_in_pieces_and_the_next_is_whole(tmp_path):
    bad: list[BadLine] = []
    lines = read_suite(suite(tmp_path, "x" * (3 * LONGEST_LINE_BYTES + 7), GOOD, "y" * (2 * LONGEST_LINE_BYTES)), bad=bad)
    assert [line.prompt for line in lines] == ["Is it red?"] and [b.number for b in bad] == [1, 3]


def test_what_is_written_is_read_again(tmp_path):
    (tmp_path / "a.png").write_bytes(b"an image")
    lines = [
        Line("Is it red?", "Yes", "colour"),
        Line("Où?\u2028\n", "là", "place", "a.png", ("là", "ici", "là", "là"), "textvqa", "é/1"),
    ]
    file = tmp_path / "new" / "suite.jsonl"
    moved = Line("q", "a", "t", "../a.png")
    assert write_suite(file, iter([*lines[:1], moved])) == 2 and read_suite(file) == [lines[0], moved]
    assert write_suite(tmp_path / "suite.jsonl", lines) == 2 and read_suite(tmp_path / "suite.jsonl") == lines
    assert LineSet.of_suite(tmp_path / "suite.jsonl").images() == [tmp_path / "a.png"]


def test_defaults_are_not_written(tmp_path):
    write_suite(tmp_path / "suite.jsonl", [Line(**GOOD)])
    assert json.loads((tmp_path / "suite.jsonl").read_text()) == GOOD


def interrupted():
    yield Line(**GOOD)
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("lines", "error", "says"),
    [
        ([], InputError, "no lines to write"),
        ([Line(**GOOD), Line("q", "", "t")], InputError, "line 2: answer is empty"),
        ([Line("q", "a" * LONGEST_LINE_BYTES, "t")], InputError, "line 1: longer than"),
        (interrupted(), KeyboardInterrupt, None),
    ],
)
def test_a_suite_is_written_whole_or_not_at_all(tmp_path, lines, error, says):
    file = suite(tmp_path, GOOD)
    with pytest.raises(error, match=says):
        write_suite(file, lines)
    assert read_suite(file) == [Line(**GOOD)] and os.listdir(tmp_path) == ["suite.jsonl"]
