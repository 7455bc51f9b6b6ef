"""`regress --explain`: every measure has its meaning, where a reader asks for it."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from cobra_edge.regress.command import command
from cobra_edge.regress.gates import GATES
from cobra_edge.regress.measures import MEASURES, TELLING
from cobra_edge.regress.outputs.explain import explanations
from cobra_edge.terminal.output import run_command


def test_one_measure_without_a_bundle(capfd):
    assert run_command(command, ["--explain", "kld_mean"]) == 0
    said = capfd.readouterr().out
    for words in ("kld_mean: KLD, mean", "nats; lower is better", "KL(reference ‖ build)", "kld_mean = { max = LIMIT }"):
        assert words in said
    assert "kld_p99:" not in said


def test_every_measure(capfd):
    assert run_command(command, ["--explain"]) == 0
    said = capfd.readouterr().out
    assert [line.partition(":")[0] for line in said.splitlines() if not line.startswith(" ")] == list(MEASURES)


def test_a_part_has_its_key_in_quotes(capfd):
    assert run_command(command, ["--explain", "accuracy.color"]) == 0
    assert '"accuracy.color" = { min = LIMIT }' in capfd.readouterr().out


def test_an_unknown_measure_is_refused_with_a_hint(capfd):
    assert run_command(command, ["--explain", "kld_meen"]) == 2
    assert "did you mean 'kld_mean'" in capfd.readouterr().err


@pytest.mark.parametrize("width", [60, 80])
def test_no_word_is_broken(width):
    narrow = io.StringIO()
    for listing in explanations("prompt_kld_change"):
        Console(file=narrow, width=width).print(listing)
    assert set(MEASURES["prompt_kld_change"].description.split()) <= set(narrow.getvalue().split())


def test_every_measure_says_what_it_is_and_what_to_do():
    assert {measure.gate for measure in MEASURES.values()} == set(GATES) and set(TELLING) < set(MEASURES)
    for measure in MEASURES.values():
        words = (measure.label, measure.unit, measure.description, measure.reaction)
        assert all(text and not text.endswith(".") for text in words), measure.name
