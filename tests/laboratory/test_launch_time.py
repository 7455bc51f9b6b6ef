"""`python -m bench.launch_time`: what is timed, what is counted, and the table."""

from __future__ import annotations

import sys
import time

import pytest

from bench import launch_time
from bench.launch_time import (
    Install,
    Launch,
    LaunchTimeResult,
    first_output_seconds,
    installed_bytes,
    installs_table,
    launch_time_table,
)
from cobra_edge.bench.spread import spread
from cobra_edge.errors import MachineError

from ..machine_case import MACHINE


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_the_time_ends_with_the_first_output_and_not_with_the_process() -> None:
    assert first_output_seconds(python("import time; time.sleep(0.5); print('x', flush=True)")) >= 0.5
    began = time.perf_counter()
    early = first_output_seconds(python("import time; print('x', flush=True); time.sleep(1)"))
    assert time.perf_counter() - began >= early + 0.5


@pytest.mark.parametrize("code", ["pass", "print('x'); raise SystemExit('broken')"])
def test_a_command_that_fails_or_says_nothing_is_not_measured(code: str) -> None:
    with pytest.raises(MachineError, match="and said: (nothing|broken)"):
        first_output_seconds(python(code))


def test_a_base_install_is_all_that_is_required_and_no_extra() -> None:
    found = installed_bytes("cobra-edge")
    assert {"cobra-edge", "numpy", "onnxruntime", "huggingface-hub"} <= found.keys() and "torch" not in found
    assert list(found.values()) == sorted(found.values(), reverse=True) and found["numpy"] > 10_000_000


def test_table(monkeypatch: pytest.MonkeyPatch) -> None:
    launches = (
        Launch("cobra-edge --help", spread([140.0, 149.0, 160.0]), None),
        Launch("cobra-edge --version", spread([200.0]), None),
        Launch("cobra-edge run", spread([701.0]), spread([1500.0])),
    )
    result = LaunchTimeResult(
        rounds=3,
        launches=launches,
        installs=(Install("wheel", 20.04, 1.236, 209.4),),
        installed_bytes={"a": 100_000_000, "b": 19_000_000},
        machine=MACHINE,
    )
    table = launch_time_table(result)
    assert [row[1:] for row in table.rows] == [
        ["149 (140–160) ms", "not measured", "< 150 ms, reached"],
        ["200 (200–200) ms", "not measured", "–"],
        ["701 (701–701) ms", "1500 (1500–1500) ms", "< 700 ms, **missed**"],
        ["119 MB", "–", "< 120 MB, reached"],
    ]
    assert installs_table(result).rows == [["wheel", "20.0", "1.24", "209"]]


def test_a_machine_that_may_not_drop_its_cache(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setattr(launch_time, "_DROP_CACHES", tmp_path / "none" / "drop_caches")
    assert not launch_time._drop_caches()
