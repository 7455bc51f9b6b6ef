"""Closed sets scored by choices: the reply is the most probable answer, of the float model and of the build."""

import json
import re

import msgspec
import pytest

from cobra_edge.bundle.reader import Bundle
from cobra_edge.errors import InputError
from cobra_edge.inference.session import Session
from cobra_edge.model.checkpoint import open_checkpoint
from cobra_edge.regress.float_reference import float_predictions, float_vision
from cobra_edge.regress.predictions import predictions
from cobra_edge.regress.run_command import regress
from cobra_edge.regress.runner import measure
from cobra_edge.regress.suite_selection import select_suite
from cobra_edge.suite.line import Line
from cobra_edge.suite.reader import HELDOUT, read_suite
from cobra_edge.suite.scoring import METRICS
from cobra_edge.terminal.output import run_command

from .regress_lines import run_of, write_lines


@pytest.fixture(scope="module")
def lines():
    """Return questions of two answers about four images: yes or no as in POPE, true or false as in VSR."""
    seen = [line for line in read_suite(HELDOUT) if line.answer in ("Yes", "No") and line.image in IMAGES]
    asked = [msgspec.structs.replace(line, task="pope", metric="yes-no") for line in seen]
    told = [
        Line(f"{line.prompt} True or false?", str(line.answer == "Yes"), "vsr", line.image, metric="vsr") for line in seen[::3]
    ]
    return sorted(asked + told, key=lambda line: line.image)


IMAGES = [f"heldout/{i:03}.png" for i in range(4)]


@pytest.fixture(scope="module")
def suite_file(lines, tmp_path_factory):
    return write_lines(tmp_path_factory.mktemp("closed"), lines)


@pytest.fixture(scope="module")
def report(mini_bundle, suite_file):
    run = run_of(mini_bundle("w4a16-g128"), "mini", suite=suite_file, scoring="choices")
    return measure(run, None, None, None).report


def chosen_by(session, lines):
    """Return the best choice of each line as a session tells it."""
    return [session.choose(HELDOUT.parent / line.image, line.prompt, METRICS[line.metric].choices).best.text for line in lines]


def test_a_build_is_scored_by_what_a_session_chooses(mini_bundle, suite_file, lines, report):
    bundle = Bundle.open(mini_bundle("w4a16-g128"))
    session = Session(bundle)
    suite = select_suite(bundle, None, suite_file, scoring="choices")
    said = [session.codec.decode(p.reply) for p in predictions(session, suite)]
    assert said == chosen_by(session, lines) and set(said) >= {"Yes", "No", "True"}
    for task in report.tasks:
        of_task = [(line, text) for line, text in zip(lines, said, strict=True) if line.task == task.task]
        right = [METRICS[task.metric].score(text, line) for line, text in of_task]
        assert task.score.value == pytest.approx(sum(right) / len(right))
    assert report.suite.scoring == "choices"


def test_the_float_model_chooses_the_same_way(mini_bundle, suite_file, lines):
    bundle = Bundle.open(mini_bundle("fp16"))
    suite, checkpoint = select_suite(bundle, None, suite_file, scoring="choices"), open_checkpoint("mini")
    codec, _ = bundle.text()
    found = float_predictions(checkpoint, suite.lines, float_vision(checkpoint, suite), replies_end_with=codec.end_id)
    assert [codec.decode(p.reply) for p in found] == chosen_by(Session(bundle), lines)


def test_another_scoring_is_another_suite(mini_bundle, suite_file):
    bundle = Bundle.open(mini_bundle("fp16"))
    one, other = (select_suite(bundle, None, suite_file, scoring=scoring) for scoring in ("reply", "choices"))
    assert one.sha256() != other.sha256()


def test_it_is_said(mini_bundle, suite_file, capsys):
    bundle = str(mini_bundle("w8a16-g128"))
    arguments = [bundle, "--baseline", str(mini_bundle("fp16")), "--suite", str(suite_file), "--scoring", "choices"]
    code = run_command(regress, [*arguments, "--attribution-lines", "0"])
    assert code in (0, 1) and "scored by the most probable choice" in " ".join(capsys.readouterr().out.split())
    run_command(regress, [*arguments, "--attribution-lines", "0", "--json"])
    assert json.loads(capsys.readouterr().out)["suite"]["scoring"] == "choices"


def test_golden_lines_have_no_choices(mini_bundle, suite_file):
    for suite in (None, suite_file):
        with pytest.raises(InputError, match=re.escape("--scoring choices: the golden lines hold generated replies")):
            measure(run_of(mini_bundle("w8a16-g128"), "fp16", suite=suite, scoring="choices"), None, None, None)


def test_open_answers_are_refused_with_the_line(mini_bundle, lines, tmp_path):
    mixed = write_lines(tmp_path, [*lines[:2], msgspec.structs.replace(lines[2], metric="exact")])
    with pytest.raises(
        InputError, match=r"line 3: answers of metric exact are open; --scoring choices takes .* vsr and yes-no"
    ):
        select_suite(Bundle.open(mini_bundle("fp16")), None, mixed, scoring="choices")
