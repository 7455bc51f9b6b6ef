"""Speed of the CUDA kernels on paper: the arithmetic, its tables, and that what is kept was made of today's budget."""

from __future__ import annotations

import numpy as np
import pytest

from bench.cuda_paper import DEVICES, RESULT, CudaPaperResult, Device, cuda_paper, on_paper, paper, prompt_launches, token_of
from bench.cuda_paper_tables import paper_table, token_table
from bench.kernel_budget import Used, read_budget
from bench.speed_model import shape_config
from cobra_edge.bench.results import read_result
from cobra_edge.decode.cuda.decoder import CudaDecoder
from cobra_edge.decode.cuda.device import first_gpu
from cobra_edge.formats.model_config import MambaConfig
from cobra_edge.terminal.output import run_command

from ..emulated.driver import plugged_in
from ..emulated.weights import random_weights


@pytest.fixture(scope="module")
def config():
    return shape_config("cobra-3b")


def test_what_is_kept_was_made_of_todays_budget():
    kept = read_result(RESULT, CudaPaperResult)
    assert kept == paper(read_budget()), "python -m bench.cuda_paper"
    assert kept.measured is False


def test_a_token_is_its_bytes_and_its_instructions(config):
    budget = read_budget()
    token = token_of("w4a16-g128", config, budget)
    assert 1.5e9 < token.moved_bytes < 1.7e9 and token.launches == 64 * 4 + 3
    # Codes are all but scales, states and what is small; each byte is half of two weights.
    assert token.warp_instructions == pytest.approx(
        config.mamba.n_parameters / 2 * budget["gemv_w4"].instructions / 32, rel=0.02
    )
    assert token_of("w8a16-g128", config, budget).moved_bytes > 1.8 * token.moved_bytes


def test_the_slower_of_memory_and_instructions_is_the_bound(config):
    budget = read_budget()
    token = token_of("w4a16-g128", config, budget)
    slow_memory, slow_issue = (Device("a GPU", "rtx", 8, clock, gb_s, 1024) for clock, gb_s in ((2.0, 50.0), (0.1, 1000.0)))
    assert on_paper(slow_memory, token, config, budget).bound == "memory"
    found = on_paper(slow_issue, token, config, budget)
    assert found.bound == "issue"
    assert found.tokens_per_second[0] == found.tokens_per_second[1] == pytest.approx(1e3 / (found.issue_ms + found.launches_ms))


def test_a_kernel_of_more_instructions_is_slower_on_paper(config):
    budget = read_budget()
    fat = {k: v if v.instructions is None else Used(v.registers, 9 * v.instructions) for k, v in budget.items()}
    lean_row, fat_row = (
        on_paper(DEVICES[0], token_of("w4a16-g128", config, b), config, b) for b in (budget, fat)
    )  # fmt: skip
    assert fat_row.tokens_per_second[1] < lean_row.tokens_per_second[1] and fat_row.prompt_ms[0] > lean_row.prompt_ms[0]
    assert (fat_row.bound, fat_row.prompt_bound) == ("issue", "issue")


@pytest.mark.parametrize("rotation", ["none", "both"])
@pytest.mark.parametrize("tokens", [24, 300])
def test_launches_of_a_prompt_are_those_that_the_decoder_makes(tokens, rotation, tmp_path):
    mamba = MambaConfig(384, 3, 512, 768, 16, 4, 24)
    weights = random_weights(mamba, "w4a16-g128", rotation)
    with plugged_in(tmp_path) as driver:
        driver.run_no_kernels()
        decoder = CudaDecoder(weights)
        state, embeddings = decoder.new_state(), np.zeros((tokens, mamba.d_model), np.float32)
        before = driver.launches
        decoder.prefill(embeddings, state)
        entering = weights.recipe.rotates_residual
        expected = prompt_launches(mamba, weights.recipe, tokens, first_gpu().multiprocessors)
        assert driver.launches - before == expected + entering


def test_no_product_of_one_token_is_bound_by_instructions_anywhere(config):
    for row in paper(read_budget()).predicted:
        assert row.bound == "memory", row


def test_tables_have_a_row_a_device_and_what_others_published():
    result = read_result(RESULT, CudaPaperResult)
    table = paper_table(result)
    assert [row[0] for row in table.rows] == [d.name for d in DEVICES]
    published = "\n".join(row[-1] for row in table.rows)
    for anchor in result.published:
        assert published.count(anchor.what) == 1, anchor
    assert [row[0] for row in token_table(result).rows] == [t.scheme for t in result.tokens]


def test_the_command_writes_the_result(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert run_command(cuda_paper, []) == 0
    assert read_result(tmp_path / RESULT, CudaPaperResult) == paper(read_budget())
