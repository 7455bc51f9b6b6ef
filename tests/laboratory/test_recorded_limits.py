"""`python -m bench.recorded_limits`: what is measured, the limits that follow, and the tables."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from bench import recorded_limits
from bench.builds import PLAIN, Build
from bench.recorded_limits import LIMITS, NAME, decoders, exported, parts, runs_of
from bench.recorded_limits_result import (
    Alarms,
    Change,
    Foretold,
    RecordedLimitsResult,
    alarms_table,
    changes_table,
    foretold_table,
    gate_limits_text,
)
from cobra_edge.bench.results import RESULTS, read_result
from cobra_edge.decode.backends import open_decoder
from cobra_edge.decode.decoder import DecoderOptions
from cobra_edge.regress.gates import gate_limits
from cobra_edge.regress.golden import read_golden

from ..machine_case import MACHINE

RESULT = RecordedLimitsResult(
    changes=(
        Change("a", "numpy", "other", "float32", 638, 0.1, 0.002, 0.0),
        Change("a", "native", "same", "float32", 638, 0.0411, 0.05, 0.004),
        Change("b", "numpy", "other", "int8", 638, 0.3, 0.2, 0.01),
    ),
    runs=(Alarms(8, "int8", ("absolute",)), Alarms(8, "int8", ()), Alarms(64, "float32", ())),
    foretold=(Foretold("a", 1e-4, 2e-4, 1.9), Foretold("b", 1e-5, 4e-6, 0.25)),
    machine=MACHINE,
)


def test_limits_are_three_times_the_largest_difference() -> None:
    text = gate_limits_text(RESULT)
    assert "[recorded.other.float32]\nkld_change = { max = 0.3 }\nprompt_kld_change = { max = 0.15 }" in text
    assert "[recorded.same.float32]\nkld_change = { max = 0.13 }\nprompt_kld_change = { max = 0.15 }" in text
    assert "reply_change = { max = 0.012 }" in text and "[recorded.other.int8]" in text and "same.int8" not in text
    assert "kld_over_expected = { max = 5.7, min = 0.083 }" in text


def test_tables() -> None:
    assert len(changes_table(RESULT).rows) == 3 and len(foretold_table(RESULT).rows) == 2
    table = alarms_table(RESULT)
    assert [row[:3] for row in table.rows] == [["8", "2", "1"], ["64", "1", "0"]]
    assert "1 of 3 runs of good builds failed (33.3%)" in table.notes[0]


def test_a_build_is_measured_by_a_runtime_and_judged_on_parts_of_its_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = exported(Build("w4a16-g128", PLAIN | {"scheme": "w4a16-g128"}, "jetson"), tmp_path, golden_lines=24)
    golden = read_golden(bundle)
    sizes = [(images, len(rows)) for images, rows in parts(golden.suite, 0)]
    assert sizes[-1] == (len(golden.suite.images), 24) and all(images <= rows for images, rows in sizes)
    assert [images for images, _ in sizes[:4]] == [8] * 4
    monkeypatch.setattr(recorded_limits, "decoders", lambda b: [("numpy", open_decoder(b, "cpu", "numpy", DecoderOptions(1)))])
    ((change, runs),) = runs_of(bundle, "w4")
    assert (change.build, change.runtime, change.kind) == ("w4", "numpy", "other")
    assert (change.activations, change.lines) == ("float32", 24)
    assert 0 < change.kld_change < gate_limits().recorded["other"]["float32"]["kld_change"].max and len(runs) == len(sizes)  # type: ignore[operator]
    assert all("recorded" not in run.failed for run in runs)


def test_every_runtime_of_this_machine_is_measured(mini_bundle, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    from cobra_edge.bundle.reader import Bundle

    opened = recorded_limits.open_decoder
    monkeypatch.setattr(
        recorded_limits,
        "open_decoder",
        lambda b, device, kernels, o: kernels if device == "cuda" else opened(b, device, kernels, o),
    )
    names = [name for name, _ in decoders(Bundle.open(mini_bundle("w4a16-g128")))]
    assert names[-3:] == ["numpy", "torch", "CUDA, emulated"] and "native, scalar, 2 threads" in names


def test_the_limits_that_ship_are_those_that_were_measured() -> None:
    result = read_result(RESULTS / f"{NAME}.json", RecordedLimitsResult)
    assert LIMITS.read_text(encoding="utf-8") == gate_limits_text(result)
    assert np.isfinite([row.ratio for row in result.foretold]).all()
