"""Kernels compiled for GPUs that are not here: what is compiled once, what it takes, what a GPU refuses."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from types import SimpleNamespace

import pytest

triton = pytest.importorskip("triton")

from cobra_edge.decode.cuda.kernels.compiling import (  # noqa: E402
    CAPABILITIES,
    SHARED_LIMITS,
    Compiled,
    compile_launches,
    why_not,
)
from cobra_edge.decode.cuda.kernels.launch import recording  # noqa: E402
from cobra_edge.errors import InputError  # noqa: E402
from tests.decode.cuda.compiled_case import compiled_by_a_child, record  # noqa: E402


def test_a_kernel_is_compiled_once_for_types_specialisation_and_constants():
    rows = compiled_by_a_child("total", "8.7")
    # Three lengths share the first, which no length specialises; a stride of 1, other sizes, an address that 16 does not divide
    # and other types do not.
    assert [row["launches"] for row in rows] == [3, 1, 1, 1, 1]
    assert [row["constants"]["BLOCK"] for row in rows] == [128, 256, 128, 128, 128]
    assert rows[0]["types"] == ["*fp16", "*fp32", "i32"]  # a stride of 1 is a constant
    assert rows[2]["types"] == ["*fp16", "*fp32", "i32", "i32"] and rows[4]["types"][0] == "*fp32"
    assert [row["num_warps"] for row in rows] == [4, 4, 4, 4, 8]


def test_every_kind_of_gpu_can_be_compiled_for():
    rows = compiled_by_a_child("total", *CAPABILITIES)
    assert {row["capability"] for row in rows} == set(CAPABILITIES) and len(rows) == 5 * len(CAPABILITIES)
    for row in rows:
        assert row["kernel"] == "total" and row["why_not"] is None
        assert 8 <= row["registers"] <= 64 and row["spilled_bytes"] == 0 and 0 < row["shared_bytes"] <= 1024


def test_a_kernel_that_takes_too_much_is_found():
    rows = {(row["kernel"], row["capability"]): row for row in compiled_by_a_child("greedy", "8.0", "8.9")}
    for capability in ("8.0", "8.9"):  # 32,768 values of 64 threads: four times a thread's registers
        assert rows["greedy", capability]["spilled_bytes"] > 1000 and rows["greedy", capability]["why_not"] is None
        assert rows["staged", capability]["shared_bytes"] >= 6 * 2 * 64 * 64 * 2
        assert rows["staged", capability]["spilled_bytes"] == 0
    assert rows["staged", "8.0"]["why_not"] is None
    taken = rows["staged", "8.9"]["shared_bytes"]
    assert rows["staged", "8.9"]["why_not"] == f"{taken} bytes of shared memory, a block has {99 * 1024}"


FITTING = Compiled("k", (), {}, "8.9", 255, SHARED_LIMITS["8.9"], 0, 8, 1)


def test_what_fits_to_the_last_byte_is_not_refused():
    assert why_not(FITTING) is None


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"shared_bytes": 99 * 1024 + 1}, "101377 bytes of shared memory, a block has 101376"),
        ({"registers": 256}, "256 registers a thread, it has 255"),
        ({"num_warps": 16}, "131072 registers a block, a multiprocessor has 65536"),
    ],
)
def test_each_limit(change, reason):
    assert why_not(replace(FITTING, **change)) == reason


def test_an_unknown_capability_is_named_with_those_that_are_known():
    with pytest.raises(InputError, match=r"unknown compute capability '8.8'.*8.9"):
        compile_launches([], "8.8")


def test_triton_is_as_before_afterwards():
    from triton.runtime.driver import driver

    before = driver._active
    assert compile_launches([], "9.0") == []
    assert driver._active is None or driver._active is before


def test_a_kernel_that_triton_refuses_is_an_error_with_its_sizes():
    with pytest.raises(AssertionError, match=r"MachineError: Triton cannot compile total\(BLOCK=100, num_warps=4\) for 8.7"):
        compiled_by_a_child("broken", "8.7")


@pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="there is a GPU: kernels are not interpreted")
def test_interpreted_kernels_say_that_they_cannot_be_compiled():
    with pytest.raises(InputError, match="total is interpreted and cannot be compiled; unset TRITON_INTERPRET"):
        compile_launches(record("total"), "8.7")


def test_recording_leaves_nothing_behind_where_it_is_interrupted():
    with pytest.raises(KeyboardInterrupt), recording():
        raise KeyboardInterrupt
    with recording() as launches:
        assert launches == []


def test_a_child_shows_what_went_wrong():
    with pytest.raises(AssertionError, match="unknown compute capability"):
        compiled_by_a_child("total", "1.0")


def test_a_tool_that_says_nothing_is_an_error(monkeypatch):
    from cobra_edge.decode.cuda.kernels import compiling
    from cobra_edge.errors import MachineError

    silent = subprocess.CompletedProcess([], 0, stdout="", stderr="no such file")
    monkeypatch.setattr(compiling, "subprocess", SimpleNamespace(run=lambda *a, **k: silent))
    with pytest.raises(MachineError, match="does not say what a kernel takes; it said: no such file"):
        compiling._resources(b"")
