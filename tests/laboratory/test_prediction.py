"""Predicted speed: the calculation, its inputs, and published measurements to compare with."""

import json

import pytest

from bench import __main__ as commands
from bench.predictions import off_cell, prediction_table, span
from bench.speed_model import (
    ASSUMED,
    READ_OF_SHEET,
    Checked,
    Efficiency,
    Known,
    checked,
    devices,
    efficiency_of,
    predict,
    shape_config,
    token_ms,
)
from cobra_edge.bench.roofline import token_bytes
from cobra_edge.bench.tables import markdown
from cobra_edge.formats.recipe import uniform_recipe
from cobra_edge.formats.scheme import scheme_named
from cobra_edge.terminal.output import run_command

COBRA = shape_config("cobra-3b")


def measured(rate, bandwidth=4000.0, launches=1000):
    """A GPU's result in which a token moves 1 GB of weights and half a GB of state, read and written."""
    figures = {"decode_at_64_tok_s": {"low": rate * 0.9, "median": rate, "high": rate}}
    runner = {"scheme": "w4a16-g128", "launches_per_token": launches, "weights_bytes": 10**9, "figures": figures}
    peer = {"scheme": "bnb-nf4", "launches_per_token": None, "weights_bytes": 1, "figures": {}}
    row = {
        "contexts": [64],
        "state_bytes": 5 * 10**8,
        "limits": {"read_gb_s": {"median": bandwidth}},
        "runners": [peer, runner],
    }
    return {"gpu": {"name": "NVIDIA Something"}, "rows": [row]}


def test_a_token_is_its_bytes_over_what_is_reached_of_the_bandwidth_and_its_launches():
    assert token_ms(10**9, 100.0, Efficiency(0.5, 1.0, ""), 1000, 2.0) == (12.0, 22.0)


def test_the_bytes_of_a_published_shape_are_exact():
    recipe, _ = uniform_recipe(COBRA.mamba, scheme_named("fp16"))
    c = COBRA.mamba
    layer = 2 * (3 * 5120 * 2560 + 192 * 5120 + 5120 * 160) + 4 * (2560 + 5120 * (4 + 1) + 5120 + 5120 * 16 + 5120)
    state = 64 * 5120 * 20 * 4
    assert token_bytes(COBRA, recipe) == 64 * layer + 4 * 2560 + 2 * c.vocab * 2560 + 2 * state


def test_a_measured_efficiency_is_carried_over_without_its_launches():
    # 2 GB in 1 ms, of which 1000 launches of 1.5 µs would be more than all: the bound is the bandwidth.
    assert efficiency_of("w4a16-g128", [measured(1000.0)]).high == READ_OF_SHEET
    found = efficiency_of("w4a16-g128", [measured(400.0)])  # 2.5 ms, 1.5 of them launching: 2 GB in 1 ms of 4000 GB/s
    assert found.high == pytest.approx(READ_OF_SHEET * 0.5) and found.low < found.high
    assert "carried over from NVIDIA Something, measured" in found.known_from
    assert efficiency_of("fp16", [measured(400.0)]) is ASSUMED and efficiency_of("bnb-nf4", [measured(400.0)]) is ASSUMED


def test_fewer_bits_a_wider_memory_and_fewer_launches_are_faster():
    nano, nx = devices(["jetson-orin-nano", "jetson-orin-nx"])
    slow = predict(nano, "fp16", COBRA, ASSUMED)
    assert slow.lacks is not None and "does not fit" in slow.lacks and slow.launches == 259
    four, wider = predict(nano, "w4a16-g128", COBRA, ASSUMED), predict(nx, "w4a16-g128", COBRA, ASSUMED)
    fewer = predict(nx, "w4a16-g128", COBRA, ASSUMED, launches=10)
    rates = [p.tokens_per_second for p in (slow, four, wider, fewer)]
    assert rates == sorted(rates) and four.lacks is None and fewer.launches == 10
    assert wider.low_ms - fewer.low_ms == pytest.approx(249 * 3e-3)


def test_devices_are_gpus_that_the_kernels_are_compiled_for():
    names = [t.name for t in devices()]
    assert {"jetson-orin-nano", "jetson-orin-nx", "jetson-agx-orin", "rtx-4060", "rtx-4090", "rtx-5090"} <= set(names)
    assert "rtx-2060" not in names and "cpu" not in names and "rtx" not in names


def test_the_sum_holds_against_what_is_published():
    found = checked()
    assert [c.known.ms for c in found] == pytest.approx([103.6, 60.2, 10.1], abs=0.05)
    assert all(abs(c.off) < 0.05 for c in found)


def test_a_measurement_outside_of_the_prediction_says_on_which_side():
    known = Known("x", "rtx-4090", "fp16", 12.0, 7, 5.0)
    assert [off_cell(Checked(known, *ends)) for ends in ((11.0, 13.0), (8.0, 10.0), (15.0, 20.0))] == [
        "within",
        "20.0% slower",
        "20.0% faster",
    ]
    assert span(1.2, 1.4, ".0f") == "1" and span(1.0, 2.0, ".0f") == "1–2"


def test_the_table_calls_every_figure_predicted_and_names_where_its_efficiency_is_from():
    alone, carried = (markdown([prediction_table(found)]) for found in ([], [measured(400.0)]))
    assert alone.count("predicted tok/s") == 3 and "does not fit" in alone
    assert alone.count("assumption: what published kernels reach") == 1 and "measured)" not in alone
    assert carried.count("carried over from NVIDIA Something, measured") == 1 and carried.count("assumption:") == 1


def test_the_command_prints_predictions_and_keeps_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run_command(commands.command, ["predict", "--target", "rtx-4090", "--scheme", "w4a16-g128", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    (one,) = shown["predicted"]
    assert one["target"] == "rtx-4090" and one["predicted_tok_s"][0] < one["predicted_tok_s"][1] and len(shown["checked"]) == 3
    assert run_command(commands.command, ["predict"]) == 0
    assert "predicted and not measured" in capsys.readouterr().out and list(tmp_path.iterdir()) == []


def test_the_command_takes_the_results_that_are_there(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    results = tmp_path / "bench" / "results"
    results.mkdir(parents=True)
    (results / "gpu-decode-x.json").write_text(json.dumps(measured(400.0)))
    assert run_command(commands.command, ["predict"]) == 0
    assert "carried over from NVIDIA Something" in capsys.readouterr().out
    (results / "gpu-decode-x.json").write_text("{")
    assert run_command(commands.command, ["predict"]) == 2
    assert "delete the file or measure it again" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--target", "rtx-2060"], "no prediction for target 'rtx-2060'; known: "),
        (["--scheme", "w4a16"], "did you mean"),
        (["--shape", "cobra-4b"], "did you mean"),
    ],
)
def test_what_cannot_be_predicted_is_refused(options, message, capsys):
    assert run_command(commands.command, ["predict", *options]) == 2
    assert message in capsys.readouterr().err
