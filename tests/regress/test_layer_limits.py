"""Each layer's state has a figure, and a limit that asks for no less drift than the reference itself has."""

from __future__ import annotations

from pathlib import Path

from cobra_edge.regress.budget import read_budget
from cobra_edge.regress.outputs.rows import all_figures
from cobra_edge.regress.report import Figure
from cobra_edge.regress.update_budget import update_budget

from .regress_reports import make_report


def test_every_layer_of_a_report_has_a_figure() -> None:
    report = make_report()
    figures = all_figures(report)
    assert {name: f for name, f in figures.items() if name.startswith("state_error.")} == {
        f"state_error.{layer.layer}": layer.state_error for layer in report.layers
    }


def test_a_layers_limit_is_not_below_the_noise_floor_of_the_worst_layer(tmp_path: Path) -> None:
    figures = {"state_error.0": Figure(1e-7, 1e-7, 2e-7), "state_error.1": Figure(0.1, 0.09, 0.2)}
    update_budget(tmp_path / "budget.toml", "fp16", figures, {"state_error": 5e-4}, 0.0)
    limits = read_budget(tmp_path / "budget.toml").limits_of("fp16")
    assert (limits["state_error.0"].max, limits["state_error.1"].max) == (5e-4, 0.2)


def test_the_noise_of_a_ratio_counts_to_both_sides_of_one(tmp_path: Path) -> None:
    figures = {"perplexity_ratio": Figure(1 + 1e-8, 1 - 1e-8, 1 + 2e-8)}
    update_budget(tmp_path / "budget.toml", "fp16", figures, {"perplexity_ratio": 1 - 5e-6}, 0.0)
    most = read_budget(tmp_path / "budget.toml").limits_of("fp16")["perplexity_ratio"].max
    assert most is not None and 1 + 5e-6 <= most <= 1 + 5.1e-6
