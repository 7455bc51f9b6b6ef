"""How numbers are written for people."""

import pytest

from cobra_edge.bench.decode_result import figure_cell
from cobra_edge.bench.spread import Spread
from cobra_edge.terminal.output import figure


@pytest.mark.parametrize(
    ("value", "written"),
    [
        (None, "not measured"),
        (12_163.4, "12,160"),
        (9_999.6, "10,000"),
        (999.96, "1,000"),
        (1_234_567.0, "1,235,000"),
        (-54_321.0, "-54,320"),
        (123.456, "123.5"),
        (1.0, "1"),
        (0.000123456, "0.0001235"),
        (2.5e-7, "2.5e-07"),
        (float("nan"), "nan"),
    ],
)
def test_figures_have_four_digits_and_no_exponent_where_they_are_large(value, written):
    assert figure(value) == written


def test_spreads_of_a_bench_are_written_alike():
    spread = Spread(12_163.4, 9_870.4, 98_765.0)
    assert figure_cell("prefill_256_tok_s", spread) == "12,160 (9,870–98,760)"
    assert figure_cell("peak_macs_per_s", spread.scaled(1e9)) == "12,160 (9,870–98,760)"
    assert figure_cell("decode_share", Spread(0.25, 0.1, 0.5)) == "25.0% (10.0%–50.0%)"
