"""`bench vision`: what it measures, refuses and prints."""

import dataclasses

import numpy as np
import pytest
from msgspec import structs

from bench.vision_answers import answer
from bench.vision_goals import MiniVisionResult, VisionAnswers, answers_table, vision_goals_table
from cobra_edge.bench.command import command
from cobra_edge.bench.spread import Spread
from cobra_edge.bench.tables import markdown
from cobra_edge.bench.vision import measure_vision
from cobra_edge.bench.vision_result import VisionResult, VisionRow, engine_table, vision_table, vision_tables
from cobra_edge.bench.vision_towers import config_of
from cobra_edge.bundle.reader import Bundle
from cobra_edge.decode.backends import open_decoder
from cobra_edge.model.tower_flops import tower_flops
from cobra_edge.regress.intervals import Interval
from cobra_edge.suite.line import Line
from cobra_edge.suite.tokenized import TokenizedLine, TokenizedSuite
from cobra_edge.terminal.output import run_command

from ..machine_case import MACHINE
from ..tolerance import assert_close


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--shape", "cobra-4b"), "did you mean 'cobra-3b'"),
        (("--precision", "fp15"), "--precision: "),
        (("--precision", "fp32", "--engine", "int8"), "--engine int8: this precision is not measured"),
        (("--target", "rtx-409"), "did you mean 'rtx-4090'"),
        (("--name", "../x"), "is not a valid result name"),
    ],
)
def test_bad_options(arguments, says, capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run_command(command, ["vision", *arguments]) == 2
    assert says in " ".join(capfd.readouterr().err.split()) and not list(tmp_path.iterdir())


def test_operations_of_an_image_are_counted_by_hand():
    """Cobra-mini: 64 patches, in the first encoder 5 tokens more; two encoders of four blocks, 128 wide; a projector."""
    total = 0
    for tokens in (69, 64):
        total += 64 * 3 * 14 * 14 * 128  # patch embedding
        total += 4 * (tokens * 12 * 128 * 128 + 2 * tokens * tokens * 128)
    total += 64 * (256 * 1024 + 1024 * 256 + 256 * 256)
    assert tower_flops(config_of("cobra-mini")) == 2 * total
    # In bench/results, as it was counted by running the model.
    assert round(tower_flops(config_of("cobra-3b")) / 1e9, 1) == 1187.9


def test_a_precision_is_measured_and_told(tmp_path):
    steps = []
    found = measure_vision("cobra-mini", ("fp32", "bf16"), (), "rtx-4090", 2, tmp_path, steps.append)
    wide, narrow = found.rows
    assert wide.bytes == (tmp_path / "fp32" / "vision.onnx").stat().st_size and wide.parity["projector"] < 1e-5
    assert wide.latency_ms.low <= wide.latency_ms.median and 0 < wide.share_of_matmul_rate.median < 1.2
    assert 0.03 < wide.run_peak_gib < wide.write_peak_gib < 4
    assert narrow.bytes < 0.6 * wide.bytes and narrow.latency_ms is None
    assert steps[0] == "fp32: write" and steps[-1] == "latency"
    result = VisionResult(**structs.asdict(found), machine=MACHINE)
    table = markdown([vision_table(result)]).splitlines()
    assert table[-2].startswith("| fp32 | 9.4 |") and "not on a CPU" in table[-1]
    assert not engine_table(result).rows and len(list(vision_tables(result))) == 1


def test_goals_are_judged_by_what_was_measured():
    def row(precision, size, parity, **measured):
        cost = {"wide": {}, "files": {}, "write_seconds": 1.0, "write_peak_gib": 1.0}
        return VisionRow(precision=precision, bytes=size, parity={"projector": parity}, **cost, **measured)

    rows = (
        row("fp32", 100, 2e-4, share_of_matmul_rate=Spread(0.7, 0.7, 0.7)),
        row("int8", 30, 0.02, times_fp32=Spread(1.4, 1, 2)),
    )
    shared = {"gflops": 1.0, "matmul_gflops_per_second": Spread(1, 1, 1), "threads": 1, "rounds": 1, "machine": MACHINE}
    full = VisionResult(shape="full", rows=rows, **shared)
    drift = Interval(6e-4, 5e-4, 7e-4)
    figures = {"kld_p99": drift, "top1_agreement": drift, "perplexity_ratio": drift, "accuracy": {}, "caption_perplexity": None}
    answers = VisionAnswers(
        precision="int8", runtime="x", kld_mean=drift, kld_mean_max=5e-4, lines=1, images=1, answer_tokens=1, **figures
    )
    mini = MiniVisionResult(shape="mini", rows=(), answers=(answers,), **shared)
    words = {cells[0]: cells[2] for cells in vision_goals_table(full, mini).rows}
    assert "| int8 | x | 6.0e-04 (5.0e-04–7.0e-04) | 5e-04, **exceeded** |" in markdown([answers_table(mini)])
    assert words == {
        "full size: int8 ≥ 1.5 × as fast as fp32 on a CPU": "**missed**",
        "full size: int8 about a quarter of fp32": "**missed**",
        "full size: fp32 at ≥ 60 % of the rate of a large matmul": "reached",
        "full: fp32 within 1e-04 of torch": "**missed**",
        "cobra-mini: int8 vision alone within its budget of 5e-04 nats": "**missed**",
    }


def test_each_line_is_answered_after_its_own_image(mini_bundle):
    decoder = open_decoder(Bundle.open(mini_bundle("w4a16-g128")))
    random = np.random.default_rng(0)
    embeddings = random.standard_normal((2, 64, 256), np.float32)
    lines = [
        TokenizedLine(1, Line("q", "a", "a"), (5, 9), [7, 0], 1),
        TokenizedLine(2, Line("q", "a", "b"), (3,), [4, 0], 0),
    ]
    suite = TokenizedSuite("by hand", lines, ["0.png", "1.png"], lambda image: b"", {}, embeddings)
    found = answer(decoder, suite)
    for got, seen, tokens, start in zip(found, (embeddings[1], embeddings[0]), ([5, 9, 7], [3, 4]), (1, 0), strict=True):
        state = decoder.new_state()
        whole = decoder.forward(np.concatenate([seen, decoder.embed(tokens)]), state)
        assert_close(got, whole[64 + start :], "decoder")
    again = answer(decoder, dataclasses.replace(suite, lines=[dataclasses.replace(line, image=0) for line in lines]))
    assert not np.allclose(again[0], found[0])
