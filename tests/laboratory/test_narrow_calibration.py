"""`python -m bench.narrow_calibration`: its sets, one of them measured, and the table."""

import platformdirs
from msgspec import structs

from bench import narrow_calibration
from bench.narrow_calibration import NarrowResult, calibration_sets, measured, narrow_table
from cobra_edge.suite.line_set import LineSet

from ..machine_case import MACHINE


def test_each_set_is_narrow_in_one_way(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(narrow_calibration, "_DRAWN", 12)
    whole, fewer, existence, captions, drawn = calibration_sets().values()
    assert whole.lines == LineSet.embedded(more=True).lines and len(whole.images()) == 200
    assert len(fewer.images()) == 40 and {line.task for line in fewer.lines} == {line.task for line in whole.lines}
    assert {line.task for line in existence.lines} == {"existence"} and len(existence.images()) == 200
    assert {line.task for line in captions.lines} == {"caption"} and len(captions.images()) == 200
    assert platformdirs.user_cache_path("cobra_edge") in drawn.directory.parents and not any(d.answer for d in drawn.lines)


def test_a_set_is_measured_and_told():
    few = LineSet.embedded().about(4)
    (row,) = measured({"four images": few}, quality="balanced", golden_lines=64)
    assert (row.lines, row.images) == (len(few.lines), 4)
    assert 1e-5 < row.kld_mean.low < row.kld_mean.value < row.kld_mean.high < 1e-2 and len(row.by_task) == 5
    table = narrow_table(NarrowResult(rows=(row, structs.replace(row, label="the same")), machine=MACHINE))
    assert [cells[0] for cells in table.rows] == ["four images", "the same"]
    assert len(table.rows[0]) == len(table.columns) == 9
