"""`bench vision`: what it measures, refuses and prints."""

import dataclasses

import numpy as np
import pytest

from bench.held_out import Questions
from bench.vision_answers import answer
from bench.vision_tables import answers_table, engine_table, vision_goals_table, vision_table
from cobra_edge.bench.command import command
from cobra_edge.bench.vision import measure_vision, tower_flops
from cobra_edge.bundle.reader import Bundle
from cobra_edge.decode.backends import open_decoder
from cobra_edge.terminal.output import run_command

from ..tolerance import assert_close


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--shape", "cobra-4b"), "did you mean 'cobra-3b'"),
        (("--precision", "fp15"), "--precision: "),
        (("--precision", "fp32", "--engine", "int8"), "--engine int8: of a precision that is not measured"),
        (("--target", "rtx-409"), "did you mean 'rtx-4090'"),
        (("--name", "../x"), "is no name for a result"),
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
    assert tower_flops("cobra-mini") == 2 * total
    assert round(tower_flops("cobra-3b") / 1e9, 1) == 1187.9  # in bench/results, as it was counted by running the model


def test_a_precision_is_measured_and_told(tmp_path):
    steps = []
    found = measure_vision("cobra-mini", ("fp32", "bf16"), (), "rtx-4090", 2, tmp_path, steps.append)
    wide, narrow = found["rows"]
    assert wide["bytes"] == (tmp_path / "fp32" / "vision.onnx").stat().st_size and wide["parity"]["projector"] < 1e-5
    assert wide["latency_ms"]["low"] <= wide["latency_ms"]["median"] and 0 < wide["share_of_matmul_rate"]["median"] < 1.2
    assert 0.03 < wide["run_peak_gib"] < wide["write_peak_gib"] < 4
    assert narrow["bytes"] < 0.6 * wide["bytes"] and "latency_ms" not in narrow
    assert steps[0] == "fp32: write" and steps[-1] == "latency in turns"
    result = {**found, "machine": {"processor": "some processor"}}
    table = vision_table(result).splitlines()
    assert table[-2].startswith("| fp32 | 9.4 |") and "not on a CPU" in table[-1]
    assert engine_table(result) == answers_table(result) == "not measured"


def test_goals_are_judged_by_what_was_measured():
    spread = {"median": 1.4, "low": 1.0, "high": 1.6}
    row = {"precision": "int8", "bytes": 30, "times_fp32": spread, "parity": {"projector": 0.02}}
    wide = {"precision": "fp32", "bytes": 100, "share_of_matmul_rate": {"median": 0.7}, "parity": {"projector": 2e-4}}
    answers = [{"precision": "int8", "kld_mean": {"value": 6e-4}, "kld_mean_max": 5e-4}]
    lines = vision_goals_table({"shape": "full", "rows": [wide, row]}, {"shape": "mini", "rows": [], "answers": answers})
    words = {line.split("|")[1].strip(): line.split("|")[3].strip() for line in lines.splitlines()[2:]}
    assert words == {
        "full size: int8 ≥ 1.5 × as fast as fp32 on a CPU": "**missed**",
        "full size: int8 about a quarter of fp32": "**missed**",
        "full size: fp32 at ≥ 60 % of a large product's rate": "reached",
        "full: fp32 within 1e-04 of torch everywhere": "**missed**",
        "cobra-mini: int8 vision alone within its budget of 5e-04 nats": "**missed**",
    }


def test_each_line_is_answered_after_its_own_image(mini_bundle):
    decoder = open_decoder(Bundle.open(mini_bundle("w4a16-g128")))
    random = np.random.default_rng(0)
    embeddings = random.standard_normal((2, 64, 256), np.float32)
    tokens = (np.array([5, 9, 7], np.int32), np.array([3, 4], np.int32))
    asked = Questions(embeddings, np.array([1, 0], np.int32), ("a", "b"), tokens, np.array([1, 0], np.int32), tokens)
    found = answer(decoder, asked)
    for got, seen, line, start in zip(found, (embeddings[1], embeddings[0]), tokens, (1, 0), strict=True):
        state = decoder.new_state()
        whole = decoder.forward(np.concatenate([seen, decoder.embed(line.tolist())]), state)
        assert_close(got, whole[64 + start :], "decoder")
    again = answer(decoder, dataclasses.replace(asked, image=np.array([0, 0], np.int32)))
    assert not np.allclose(again[0], found[0])
