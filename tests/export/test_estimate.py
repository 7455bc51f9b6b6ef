"""The time that an export is told to take before it begins."""

import msgspec
import pytest

from cobra_edge.export.estimate import Load, Rates, estimates, measured_rates, seconds_of, time_line
from cobra_edge.export.options import ExportOptions
from cobra_edge.export.plan import plan_export
from cobra_edge.formats.method import METHODS
from cobra_edge.formats.targets import target_named
from cobra_edge.model.checkpoint import open_checkpoint

RATES = Rates(position_seconds=1e-4, flops=1e11, exact_flops=3e10)
READ, GOLDEN = Load(10_000, 100), Load(500, 4)


@pytest.fixture(scope="module")
def mini():
    return open_checkpoint("mini")


def seconds(config, method="guided", calibration=READ, golden=GOLDEN, rates=RATES, **more):
    return seconds_of(METHODS[method], config, calibration, golden, rates, **more)


def test_what_does_more_takes_longer(mini):
    config = mini.config
    assert 10 < seconds(config, "rtn") < seconds(config, "gptq") < seconds(config, "guided")
    assert seconds(config, "rtn") == seconds(config, "rtn", calibration=Load(0, 0))  # it reads no calibration data
    assert seconds(config) < seconds(config, calibration=Load(20_000, 100))
    assert seconds(config) < seconds(config, calibration=Load(10_000, 200))
    assert seconds(config) < seconds(config, calibration=Load(10_000, 100, unanswered=400))
    assert seconds(config, "rtn") < seconds(config, "rtn", golden=Load(500, 4, unanswered=4))
    assert seconds(config) < seconds(config, golden=Load(5_000, 4)) and seconds(config) < seconds(config, int8_images=40)


def test_time_is_in_proportion_to_layers_and_rates(mini):
    """Beyond what an endlessly fast machine takes, without images."""
    text = msgspec.structs.replace(mini.config, vision=None, projector=None)
    deep = msgspec.structs.replace(text, mamba=msgspec.structs.replace(text.mamba, n_layer=2 * text.mamba.n_layer))
    read, golden = Load(10_000, 0), Load(500, 0)

    def beyond(config, rates=RATES):
        return seconds(config, "gptq", read, golden, rates) - seconds(config, "gptq", read, golden, Rates(0.0, 1e30, 1e30))

    assert beyond(deep) / beyond(text) == pytest.approx(2, rel=0.1)  # the embedding does not double
    assert beyond(text) / beyond(
        text, Rates(RATES.position_seconds / 2, RATES.flops * 2, RATES.exact_flops * 2)
    ) == pytest.approx(2)


def test_rates_are_of_this_machine(mini):
    rates = measured_rates(mini)
    assert 1e-8 < rates.position_seconds < 1e-2
    assert 1e8 < rates.flops < 1e14 and 1e8 < rates.exact_flops < 1e14


def test_every_quality_is_told_unless_a_flag_chose(tmp_path):
    checkpoint, plan = plan_export("mini", target_named("cpu"), tmp_path / "b", ExportOptions(golden_lines=16))
    found = estimates(checkpoint, plan)
    assert list(found) == ["best", "balanced", "fast"] and found["fast"] < found["balanced"] < found["best"]
    checkpoint, plan = plan_export("mini", target_named("cpu"), tmp_path / "b", ExportOptions(method="awq", golden_lines=16))
    assert list(estimates(checkpoint, plan)) == ["awq"]


def test_a_line_for_people():
    found = {"best": 9000.0, "balanced": 3240.0, "fast": 40.0}
    assert time_line(found, "best") == (
        "time on this machine: best about 2 h 30 min, balanced about 54 min, fast about 40 s; this is --quality best"
    )
    assert time_line({"awq": 61.0}, None) == "time on this machine: awq about 61 s"
