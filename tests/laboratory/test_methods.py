"""`python -m bench.methods`: outliers, errors, and that rotation with GPTQ reduces them."""

import json
import math

import msgspec
import numpy as np
import pytest
import torch
from msgspec import structs

from bench import __main__ as commands
from bench import figures
from bench.method_errors import (
    SITES,
    VARIANTS,
    calibrate_layer,
    errors_of,
    held_out_activations,
    matrix_name,
    mixer_output,
    quantize_layer,
    restored,
)
from bench.methods_result import MethodMeasures, MethodsResult, Minutes, methods_tables
from bench.methods_run import REAL_POSITIONS, measure_methods
from bench.outlier_layers import OutlierLayer, kurtosis, outlier_ratio
from cobra_edge.bench.random_checkpoint import OUTLIER_GAINS
from cobra_edge.bench.shapes import shape_named
from cobra_edge.bench.tables import markdown
from cobra_edge.formats.hadamard import rotate
from cobra_edge.formats.model_config import MambaConfig
from cobra_edge.terminal.output import run_command

from ..machine_case import MACHINE
from ..tolerance import assert_close

SMALL = MambaConfig(256, 8, 64, 512, 16, 4, 16)


@pytest.fixture(scope="module")
def layer():
    return OutlierLayer(SMALL, seed=0)


@pytest.fixture(scope="module")
def took(layer):
    return calibrate_layer(layer, 512)


@pytest.fixture(scope="module")
def held_out(layer):
    return held_out_activations(layer, 512)


@pytest.fixture(scope="module")
def result():
    measures = measure_methods(SMALL, 1, 512, 512, 0.03, lambda: None)
    return MethodsResult(**structs.asdict(measures), model="small", machine=MACHINE)


def test_outliers_are_where_they_were_planted(layer, held_out):
    streams = layer.streams(512).numpy()
    levels = np.sqrt((streams**2).mean(axis=0))
    assert layer.outlier_channels["in_proj"].sum() == round(0.03 * 256) and layer.outlier_channels["out_proj"].sum() == round(
        0.03 * 512
    )
    assert ((levels > OUTLIER_GAINS[0] / 2) == layer.outlier_channels["in_proj"]).all() and levels.max() < OUTLIER_GAINS[
        1
    ] * 1.5
    for site in ("in_proj", "out_proj"):
        x, outliers = held_out.inputs[site], layer.outlier_channels[site]
        levels = np.sqrt((x**2).mean(axis=0))
        assert levels[outliers].min() > 5 * np.median(levels[~outliers]) and outlier_ratio(x) > 15
        assert kurtosis(x) > 15 and kurtosis(rotate(x)) < 5 and outlier_ratio(rotate(x)) < 3


def test_without_outliers_no_channel_is_larger():
    plain = OutlierLayer(SMALL, seed=0, outliers=0)
    found = held_out_activations(plain, 512)
    assert not plain.outlier_channels["in_proj"].any() and (plain.tensor("backbone.layers.0.mixer.D") == 1).all()
    assert outlier_ratio(found.inputs["in_proj"]) < 4 and kurtosis(plain.streams(512).numpy()) < 4


def test_every_draw_is_another_and_a_seed_is_the_same_layer(layer):
    assert not torch.equal(layer.streams(4), layer.streams(4))
    again = OutlierLayer(SMALL, seed=0)
    assert np.array_equal(again.tensor(matrix_name("in_proj")), layer.tensor(matrix_name("in_proj")))
    assert not np.array_equal(OutlierLayer(SMALL, seed=1).tensor(matrix_name("in_proj")), layer.tensor(matrix_name("in_proj")))


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda c: c.name)
def test_what_is_stored_is_brought_back(layer, took, variant):
    quantize = quantize_layer(variant, layer, took.statistics).quantizer
    for site in SITES:
        back = restored(site, quantize.transformed(matrix_name(site)), quantize)
        assert_close(back, layer.tensor(matrix_name(site)), "rotation")
    if variant.method.startswith("awq"):
        assert np.ptp(quantize.scales[matrix_name("in_proj")]) > 0.1  # else nothing was brought back


def test_errors_are_those_of_the_matrices(layer, took, held_out):
    result = quantize_layer(VARIANTS[0], layer, took.statistics)
    errors, name = errors_of(result, layer, held_out), matrix_name("x_proj")
    x, weight, stored = (a.astype(np.float64) for a in (held_out.inputs["x_proj"], layer.tensor(name), result.stored["x_proj"]))
    naive = math.sqrt(((x @ stored.T - x @ weight.T) ** 2).sum() / ((x @ weight.T) ** 2).sum())
    assert errors["x_proj"] == pytest.approx(naive, rel=1e-4) and errors["layer"] > errors["out_proj"] / 2
    assert_close(mixer_output(layer.block(), held_out.streams, layer.config), held_out.output, "product")


def test_rotation_with_gptq_reduces_the_errors_of_outliers(result):
    errors = {row.method: {site: e.median for site, e in row.errors.items()} for row in result.rows}
    best = errors["rotation both, gptq"]
    for worse in ("rtn, largest-value scales", "rtn, least-error scales", "gptq"):
        for site in ("in_proj", "out_proj", "layer"):
            assert best[site] < 0.8 * errors[worse][site], (worse, site)
    assert list(errors) == [c.name for c in VARIANTS]


def test_one_scale_per_position_loses_the_inlier_channels(result):
    inlier = {(r.form, r.clipped_at, r.site): r.inlier.median for r in result.activations}
    assert len(inlier) == len(result.activations) == 12
    for site in ("in_proj", "out_proj"):
        naive, grouped, rotated = (
            inlier[form, None, site] for form in ("one scale per position", "groups of 128", "groups of 128, rotation both")
        )
        assert rotated < grouped < naive and rotated < naive / 2


def test_minutes_are_those_of_all_layers(result):
    calibration = result.calibration
    for row in result.rows:
        minutes, layer_seconds = row.total_minutes, row.seconds_per_layer.median
        tables = 2 * 64 / 1024 if not SMALL.tied else 64 / 1024
        expected = 8 * layer_seconds + tables * row.seconds_per_matrix["in_proj"].median
        assert minutes.quantize == pytest.approx(expected / 60)
        streaming, finishing = (getattr(calibration, f"{part}_seconds_per_layer").median for part in ("streaming", "finishing"))
        wanted = 0 if "rtn" in row.method else 8 * (streaming * REAL_POSITIONS / 512 + finishing) / 60
        assert minutes.calibrate == pytest.approx(wanted)
        assert minutes.both == pytest.approx(minutes.calibrate + minutes.quantize)
    assert result.peak_gib > 0.1 and "from 1 of 8 layers" in result.extrapolated


def test_tables_are_made_from_the_result(result, tmp_path, monkeypatch):
    first = result.rows[0]
    errors = first.errors | {"out_proj": structs.replace(first.errors["out_proj"], median=0.1236)}
    first = structs.replace(first, total_minutes=Minutes(0.0, 91.0, 91.0), errors=errors)
    kept = structs.replace(result, peak_gib=17.0, rows=(first, *result.rows[1:]))
    shown = markdown(methods_tables(kept))
    assert shown.count("\n|---|") == 3 and "12.36%" in shown and "extrapolated from 1 of 8 layers" in shown
    assert shown.count("**missed**") == 2 and "17.0 GiB, **missed**" in shown
    monkeypatch.setattr(figures, "RESULTS", tmp_path)
    text = "<!-- table: methods -->\nold\n<!-- end -->"
    assert "not measured" in figures.with_tables(text)
    (tmp_path / "methods-cobra-3b.json").write_bytes(msgspec.json.encode(kept))
    assert shown in figures.with_tables(text)


def test_the_command_keeps_and_prints_what_was_measured(result, tmp_path, monkeypatch, capsys):
    called = []
    measures = MethodMeasures(**{name: getattr(result, name) for name in MethodMeasures.__struct_fields__})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("bench.methods_run.measure_methods", lambda *given: called.append(given) or measures)
    given = ["methods", "--shape", "cobra-mini", "--layers", "1", "--positions", "512", "--outliers", "0.1"]
    assert run_command(commands.command, [*given, "--json"]) == 0
    kept = json.loads((tmp_path / "bench" / "results" / "methods-cobra-mini.json").read_text())
    assert (
        json.loads(capsys.readouterr().out) == kept
        and kept["machine"]["cores"]
        and kept["rows"] == [*msgspec.to_builtins(result.rows)]
    )
    assert called[0][:5] == (shape_named("cobra-mini").mamba, 1, 512, 1024, 0.1)
    assert run_command(commands.command, [*given, "--name", "other"]) == 0
    shown = capsys.readouterr().out
    assert "rotation both, gptq" in shown and "wrote bench/results/other.json" in shown


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--shape", "cobra-3"], "unknown shape 'cobra-3'; did you mean 'cobra-3b'"),
        (["--shape", "cobra-3b", "--layers", "65"], "--layers 65: cobra-3b has 64"),
        (["--positions", "1000"], "1000 is not a multiple of 512"),
        (["--name", "../x"], "is not a valid result name"),
    ],
)
def test_what_does_not_fit_is_refused_before_any_work(tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    assert run_command(commands.command, ["methods", *options]) == 2
    assert message in capsys.readouterr().err and list(tmp_path.iterdir()) == []


def test_help_has_an_example(capsys):
    assert run_command(commands.command, ["methods", "--help"]) == 0
    assert "Example:\n  python -m bench.methods --shape cobra-3b --layers 2" in capsys.readouterr().out
