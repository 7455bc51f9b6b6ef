"""The CUDA kernels as every architecture gets them: registers, spills, and instructions within runtimes/cuda/budget.toml."""

from __future__ import annotations

import re

import pytest

from bench.kernel_budget import BUDGET, Used, compiler, current_kernels, disassembled, read_budget, used, written
from bench.sass import Kernel, cost, opcode
from cobra_edge.decode.cuda.tiles import TILES
from cobra_edge.errors import InputError, MachineError


@pytest.fixture(scope="module")
def kernels():
    return disassembled(current_kernels())


def exported():
    """Return the names of all kernels, as the sources define them for the emulator."""
    text = "".join(file.read_text() for file in compiler().source_files())
    text = re.sub(r"\\\n", " ", text)
    names = set()
    for name in re.findall(r"COBRA_EXPORT\((\w+(?:##\w+)*)\)", text):
        names.add(name)
    return names


def test_every_architecture_has_every_kernel(kernels):
    assert set(kernels) == set(compiler().ARCHITECTURES)
    for name in {n for n in exported() if "##" not in n and n != "name"}:
        assert all(name in of for of in kernels.values()), name
    assert len({frozenset(of) for of in kernels.values()}) == 1


def test_no_kernel_spills(kernels):
    spilling = {(a, k.name): k.spills for a, of in kernels.items() for k in of.values() if k.spills}
    assert not spilling


def test_a_block_of_each_product_fits_every_gpu(kernels):
    """65536 registers a multiprocessor, given to warps in eights a thread, and 99 KiB of shared memory a block."""
    for of in kernels.values():
        for bits, tiles in TILES.items():
            for tile in tiles:
                registers = -(-of[f"gemm_w{bits}_{tile.name}"].registers // 8) * 8
                assert registers * tile.threads <= 65536 and tile.shared_bytes <= 99 << 10, tile


def test_every_kernel_is_within_its_budget(kernels):
    budget, found = read_budget(), used(kernels)
    assert set(found) == set(budget), "python -m bench.kernel_budget --write"
    over = {name: why for name, row in found.items() if (why := row.exceeds(budget[name]))}
    assert not over, over


def test_registers_are_those_that_the_compiler_names(kernels):
    made = compiler()
    nvrtc = made.Nvrtc()
    image = nvrtc.compile("sm_87", b'#include "embed_rows.cu"\n')
    assert nvrtc.compile("sm_87", b'#include "embed_rows.cu"\n').data == image.data  # the same bytes from the same sources
    said = dict(re.findall(r"entry function '(\w+)'.*?Used (\d+) registers", image.log, re.DOTALL))
    assert said and all(kernels["sm_87"][name].registers == int(n) for name, n in said.items())


def test_products_of_codes_issue_fewer_instructions_than_a_gpu_has_time_for(kernels):
    """An Orin Nano issues 8 instructions a byte at full bandwidth, an H200 6.9: what reads codes for one token stays below."""
    for of in kernels.values():
        for name in ("gemv_w4", "gemv_w4_split", "gemv_w8", "gemv_w8_split", "gemv_w3", "gemv_w3_split", "gemv_w16"):
            found = cost(of[name])
            assert found is not None and found.instructions < 6.9, name


def test_products_of_many_tokens_are_bound_by_tensor_cores(kernels):
    """A scheduler is busy for eight cycles with one m16n8k16, in which it issues eight instructions."""
    for of in kernels.values():
        for name in ("gemm_w4_large", "gemm_w3_large", "gemm_w8_large", "gemm_w16_large"):
            found = cost(of[name])
            assert found is not None and found.instructions < 8 * found.tensor, name


def kernel(name, body, registers=40):
    return Kernel(name, tuple(body), ((1, len(body) - 1),), registers)


def test_more_instructions_more_registers_and_spills_are_seen():
    load = "LDG.E.EF.128 R4, [R2.64]"
    lean = kernel("gemv_w4", ["MOV", load, "IDP", "BRA"])
    fat = kernel("gemv_w4", ["MOV", load, "IDP", "IDP", "STL [R1], R2", "LDL R2, [R1]", "BRA"], 60)
    assert cost(lean).instructions == 3 / 16 and (lean.spills, fat.spills) == (0, 2)
    budget = used({"sm_87": {"gemv_w4": lean}})["gemv_w4"]
    now = used({"sm_80": {"gemv_w4": lean}, "sm_87": {"gemv_w4": fat}})["gemv_w4"]
    assert budget.exceeds(budget) is None
    assert "60 registers, the budget is 40" in now.exceeds(budget)
    assert "instructions" in Used(40, now.instructions).exceeds(budget)
    assert opcode("HMMA.16816.F32 R0") == "HMMA"


def test_a_kernel_without_its_loop_is_an_error():
    with pytest.raises(MachineError, match="main loop of gemm_w4_large"):
        cost(kernel("gemm_w4_large", ["MOV", "BRA"]))


def test_a_budget_is_read_as_it_is_written(tmp_path):
    file = tmp_path / "budget.toml"
    file.write_text(written({"gemv_w4": Used(80, 3.2345), "rotate": Used(20)}))
    assert read_budget(file) == {"gemv_w4": Used(80, 3.24), "rotate": Used(20)}
    file.write_text("[gemv_w4]\nregister = 3\n")
    with pytest.raises(InputError, match="no budget of kernels"):
        read_budget(file)
    assert BUDGET.is_file()


def test_where_there_is_no_compiler_the_package_is_named(monkeypatch, tmp_path):
    made = compiler()
    monkeypatch.setattr(made.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(made.CompileError, match="pip install nvidia-cuda-nvrtc-cu12.*-DCOBRA_CUDA=OFF"):
        made.Nvrtc()


def test_what_does_not_compile_is_told_with_the_compilers_words(tmp_path):
    made = compiler()
    (tmp_path / "broken.cu").write_text('extern "C" __global__ void broken() { return 1; }\n')
    with pytest.raises(made.CompileError, match="NVRTC failed.*\n(.*\n)*.*broken.cu"):
        made.compile_all(tmp_path, ("sm_87",))
