"""Calibration: statistics against a naive reference, carried states, resuming, what is refused; and data that never overlap."""

import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as load_torch
from safetensors.torch import save_file as save_torch

from calibration.make_suites import draw_suite
from calibration.scenes import Scene, draw_scene
from cobra_edge.calibrate import command as calibrate
from cobra_edge.decode.native_operations import best_operations, causal_conv, selective_scan
from cobra_edge.environment.requirements import install_hint
from cobra_edge.errors import InputError
from cobra_edge.files.staging import held
from cobra_edge.formats.hadamard import rotate
from cobra_edge.formats.model_config import MambaConfig
from cobra_edge.inputs.text import PromptTemplate, TextCodec
from cobra_edge.model.checkpoint import open_checkpoint
from cobra_edge.model.cobra import load_vision
from cobra_edge.model.mamba import REFERENCE
from cobra_edge.model.mamba import causal_conv as plain_conv
from cobra_edge.model.mamba import selective_scan as plain_scan
from cobra_edge.quantize import calibration, calibration_data
from cobra_edge.quantize.calibration import collect_statistics
from cobra_edge.quantize.calibration_data import calibration_suite
from cobra_edge.quantize.resume import remove_resume_directory
from cobra_edge.quantize.statistics import (
    BINS,
    LAYER_PROJECTIONS,
    histogram_of,
    pack_second_moment,
    projection_of,
    projections,
    read_header,
    read_statistics,
    statistics_tensors,
    unpack_second_moment,
    write_statistics,
)
from cobra_edge.suite.line import Line
from cobra_edge.suite.reader import read_suite, spread
from cobra_edge.terminal.output import run_command

from ..conftest import MINI, write_text_only
from ..tolerance import assert_close

DATA = MINI / "calibration.jsonl"
QUESTIONS = [Line(p, a, "text") for p, a in (("How are you?", "Well."), ("Count.", "One two three."), ("Why?", "Because."))]


def a_few_lines():
    """Nine questions about three images, and one about none."""
    lines = read_suite(DATA)
    chosen = [line for line in lines if line.image in ("calibration/000.png", "calibration/007.png", "calibration/039.png")]
    return [*chosen[::2][:9], Line("What is two and two?", "Four.", "text")]


def silu(x):
    return x / (1 + np.exp(-x))


def naive_inputs(checkpoint, lines, visual):
    """Return {(layer, projection): every position's input, float64}: whole sequences, token by token, nothing shared.

    The positions of an image are listed for the first line that asks about it, and left out of the others'.
    """
    c = checkpoint.config.mamba
    w = {name: tensor.double().numpy() for name, tensor in checkpoint.decoder.items()}
    codec = TextCodec.open(checkpoint.tokenizer_file(), c.vocab)
    template = PromptTemplate(checkpoint.config.prompt_style)
    found, seen = {}, set()
    for line in lines:
        tokens = codec.encode(template.first_turn(line.prompt)) + codec.answer(line.answer)
        image = visual.get(line.image, np.zeros((0, c.d_model)))
        skipped = len(image) if line.image in seen else 0
        seen.add(line.image)
        stream = np.concatenate([image, w["backbone.embedding.weight"][tokens]])
        for i in range(c.n_layer):
            p = {k.split(f"layers.{i}.")[1]: v for k, v in w.items() if f"layers.{i}." in k}
            history, h = np.zeros((c.d_conv, c.d_inner)), np.zeros((c.d_inner, c.d_state))
            for t, x in enumerate(stream):
                unit = x / np.sqrt((x**2).mean() + c.norm_eps)
                inner, z = np.split(p["mixer.in_proj.weight"] @ (unit * p["norm.weight"]), 2)
                history = np.concatenate([history[1:], inner[None]])
                u = silu((history * p["mixer.conv1d.weight"][:, 0].T).sum(0) + p["mixer.conv1d.bias"])
                low, b, k = np.split(p["mixer.x_proj.weight"] @ u, [c.dt_rank, c.dt_rank + c.d_state])
                delta = np.log1p(np.exp(p["mixer.dt_proj.weight"] @ low + p["mixer.dt_proj.bias"]))
                h = np.exp(delta[:, None] * -np.exp(p["mixer.A_log"])) * h + (delta * u)[:, None] * b
                y = (h @ k + p["mixer.D"] * u) * silu(z)
                stream[t] = x + p["mixer.out_proj.weight"] @ y
                if t >= skipped:
                    for projection, value in zip(LAYER_PROJECTIONS, (unit, u, low, y), strict=True):
                        found.setdefault((i, projection), []).append(value)
        final = stream[skipped:]
        found.setdefault((None, "head"), []).extend(final / np.sqrt((final**2).mean(-1, keepdims=True) + c.norm_eps))
    return {projection: np.array(values) for projection, values in found.items()}


def assert_same_as_naive(statistics, naive):
    assert set(naive) == set(projections(statistics.config))
    for (layer, projection), inputs in naive.items():
        assert len(inputs) == statistics.header.positions
        expected = inputs.T @ inputs / len(inputs)
        assert_close(statistics.diagonal(layer, projection), np.diagonal(expected), "statistics")
        # Correlations are float16: their rounding, as a share of the product of two inputs' magnitudes.
        root = np.sqrt(np.diagonal(expected))
        difference = np.abs(statistics.second_moment(layer, projection) - expected)
        assert (difference <= 5e-4 * np.outer(root, root)).all(), (layer, projection)


def test_statistics_of_a_text_only_model_are_those_of_a_naive_one(text_only):
    checkpoint = open_checkpoint(str(text_only))
    statistics = collect_statistics(checkpoint, QUESTIONS, text_only)
    assert_same_as_naive(statistics, naive_inputs(checkpoint, QUESTIONS, {}))


def visual_embeddings(checkpoint, lines):
    from cobra_edge.inputs.image import ImageTransform, load_image

    model, transform = load_vision(checkpoint), ImageTransform.of(checkpoint.config)
    names = {line.image for line in lines if line.image}
    with torch.inference_mode():
        return {n: model(torch.from_numpy(transform.pixels(load_image(MINI / n))))[0].double().numpy() for n in names}


@pytest.fixture(scope="module")
def mini():
    return open_checkpoint("mini")


@pytest.fixture(scope="module")
def mini_naive(mini):
    return naive_inputs(mini, a_few_lines(), visual_embeddings(mini, a_few_lines()))


@pytest.fixture(scope="module")
def mini_statistics(mini):
    return collect_statistics(mini, a_few_lines(), MINI, operations=best_operations())


def test_lines_that_go_on_from_their_image_give_what_whole_sequences_give(mini_statistics, mini_naive):
    """An image's positions count once, though lines share it; the naive reference reads every line from its beginning."""
    assert mini_statistics.header.positions == len(mini_naive[None, "head"])
    assert_same_as_naive(mini_statistics, mini_naive)


def test_histograms_are_of_what_enters_the_products(mini, mini_statistics, mini_naive):
    """100 per cent is the largest magnitude of a group: with the norm's weight unrotated, without it where it is folded."""
    norm = mini.decoder["backbone.layers.1.norm.weight"].numpy()
    final = mini.decoder["backbone.norm_f.weight"].numpy()
    unit, y, head = (mini_naive[s].astype(np.float32) for s in ((1, "in_proj"), (1, "out_proj"), (None, "head")))
    u, low = (mini_naive[s].astype(np.float32) for s in ((1, "x_proj"), (1, "dt_proj")))
    expected = {
        (1, "in_proj"): (unit * norm, rotate(unit)),
        (1, "x_proj"): (u, u),
        (1, "dt_proj"): (low, low),
        (1, "out_proj"): (y, rotate(y)),
        (None, "head"): (head * final, rotate(head * final)),
    }
    for (layer, projection), bases in expected.items():
        group = min(32, bases[0].shape[1])
        for rotated, values in enumerate(bases):
            largest = np.abs(values).reshape(len(values), -1, group).max(axis=(0, 2))
            got = mini_statistics.percentile(layer, projection, group, 100, rotated=bool(rotated))
            assert_close(got, largest, "statistics")


def test_native_operations_give_the_same_statistics(mini, mini_statistics):
    if best_operations() is REFERENCE:
        pytest.skip("the native part is missing")
    plain = collect_statistics(mini, a_few_lines(), MINI, operations=REFERENCE)
    for layer, projection in projections(plain.config):
        assert_close(mini_statistics.diagonal(layer, projection), plain.diagonal(layer, projection), "statistics")
        assert_close(
            mini_statistics.second_moment(layer, projection), plain.second_moment(layer, projection), "statistics", "float16"
        )


@pytest.mark.parametrize("seq", [1, 3, 63])
def test_native_operations_are_those_of_the_model(seq):
    torch.manual_seed(seq)
    batch, inner, state = 3, 48, 16
    x, weight, bias, carried = (torch.randn(*s) for s in ((batch, seq, 2 * inner), (inner, 4), (inner,), (batch, inner, 4)))
    before = carried.clone()
    got = causal_conv(x.chunk(2, -1)[0], carried, weight, bias)
    assert_close(got.numpy(), plain_conv(x.chunk(2, -1)[0], before, weight, bias).numpy(), "scan")
    assert torch.equal(carried, before)
    u, dt = torch.randn(2, batch, seq, inner)
    B, C = torch.randn(2, batch, seq, state)
    inputs = (u, dt, -torch.rand(inner, state), B, C, torch.randn(inner), x.chunk(2, -1)[1], torch.randn(inner))
    h = torch.randn(batch, inner, state)
    before = h.clone()
    for ours, theirs in zip(selective_scan(*inputs, h), plain_scan(*inputs, before), strict=True):
        assert_close(ours.numpy(), theirs.numpy(), "scan")
    assert torch.equal(h, before)


def test_a_second_moment_comes_back_whole():
    x = np.random.default_rng(0).standard_normal((50, 33)).astype(np.float32) * np.exp(np.linspace(-9, 9, 33, dtype=np.float32))
    x[:, 5] = 0  # a dead input
    moment = x.T @ x / 50
    back = unpack_second_moment(*pack_second_moment(np.tril(moment)))
    assert back.dtype == np.float32 and np.array_equal(back, back.T)
    assert np.array_equal(np.diagonal(back), np.diagonal(moment)) and not back[5].any()
    root = np.sqrt(np.diagonal(moment))
    assert (np.abs(back - moment) <= 5e-4 * np.outer(root, root)).all()


@pytest.mark.parametrize("n", [16, 32, 80])
def test_histograms_count_every_magnitude(n):
    x = np.random.default_rng(n).standard_normal((300, n)).astype(np.float32)
    x[:, 3] *= 1e4
    peak, counts = histogram_of(x)
    groups = -(-n // 32)
    assert peak.shape == (groups,) and counts.shape == (groups, BINS)
    top = np.abs(x).max()
    edges = top * 2.0 ** ((np.arange(BINS) - (BINS - 1)) / 8)
    for g in range(groups):
        own = np.abs(x[:, 32 * g : 32 * g + 32])
        assert peak[g] == own.max() and counts[g].sum() == own.size
        below = np.array([(own <= edge).sum() for edge in edges])
        assert np.abs(np.cumsum(counts[g]) - below).max() <= 1  # a value on an edge


def test_percentiles_grow_and_bound(mini_statistics, mini_naive):
    y = np.abs(mini_naive[2, "out_proj"])
    for group in (32, 128, 512):
        of = y.reshape(len(y), -1, group).transpose(1, 0, 2).reshape(512 // group, -1)
        before = np.zeros(len(of), np.float32)
        for percentile in (1, 50, 90, 99, 99.9, 99.99, 100):
            bound = mini_statistics.percentile(2, "out_proj", group, percentile, rotated=False)
            exact = np.quantile(of, percentile / 100, axis=1, method="inverted_cdf")
            assert bound.dtype == np.float32 and bound.shape == (512 // group,)
            assert (bound >= before).all()
            if percentile >= 50:  # far below lies the open bin
                assert (bound >= exact * (1 - 1e-5)).all() and (bound <= exact * 2 ** (1 / 8) * (1 + 1e-5)).all()
            before = bound
        assert (before >= of.max(axis=1) * (1 - 1e-5)).all()


@pytest.mark.parametrize(
    ("group", "percentile", "says"),
    [(48, 99, "groups of 48"), (16, 99, "groups of 16"), (1024, 99, "groups of 1024"), (32, 0, "0"), (32, 101, "101")],
)
def test_bounds_that_cannot_be_are_refused(mini_statistics, group, percentile, says):
    with pytest.raises(InputError, match=says):
        mini_statistics.percentile(0, "out_proj", group, percentile, rotated=False)


def test_a_width_without_a_hadamard_matrix_has_no_rotated_bounds(tmp_path):
    source = write_text_only(tmp_path / "odd", config=MambaConfig(96, 1, 512, 1184, 16, 4, 8))  # 32 · 37
    statistics = collect_statistics(open_checkpoint(str(source)), QUESTIONS, tmp_path)
    assert (statistics.percentile(0, "out_proj", 32, 100, rotated=False) > 0).all()
    with pytest.raises(InputError, match="no Hadamard matrix"):
        statistics.percentile(0, "out_proj", 32, 100, rotated=True)


def test_names_of_matrices_give_projections():
    assert projection_of("backbone.layers.12.mixer.x_proj.weight") == (12, "x_proj")
    assert projection_of("lm_head.weight") == projection_of("backbone.embedding.weight") == (None, "head")
    assert projection_of("backbone.layers.12.mixer.conv1d.weight") is None


@pytest.fixture
def called(tmp_path, capfd):
    """Call the command; returns its exit code, stdout and stderr."""

    def call(*arguments):
        code = run_command(calibrate.command, [str(a) for a in arguments])
        out, err = capfd.readouterr()
        return code, out, " ".join(err.split())

    return call


def test_the_command_writes_what_a_reader_takes(called, text_only, tmp_path):
    out = tmp_path / "made" / "s.safetensors"
    code, said, err = called("--checkpoint", text_only, "--data", DATA, "--lines", "7", "--out", out, "--json")
    told = json.loads(said)
    checkpoint = open_checkpoint(str(text_only))
    assert code == 0 and told["lines"] == 7 and told["model_sha256"] == checkpoint.sha256()
    assert "7 lines with" in err and "at least 128 lines and 1024 positions are recommended" in err
    assert [f.name for f in out.parent.iterdir()] == [out.name]
    statistics = read_statistics(out, checkpoint.config, checkpoint.sha256())
    again = collect_statistics(checkpoint, spread(read_suite(DATA), 7), MINI, operations=best_operations())
    assert statistics.header == again.header and statistics.fingerprint() == again.fingerprint()
    for tensor in statistics_tensors(checkpoint.config.mamba):
        assert np.array_equal(statistics.tensors[tensor.name], again.tensors[tensor.name])
    code, _, err = called("--checkpoint", text_only, "--out", out)
    assert code == 2 and "--force" in err
    code, said, _ = called("--checkpoint", text_only, "--out", out, "--force")
    assert code == 0 and "193 lines" in said


def test_two_runs_do_not_share_what_is_finished(called, text_only, tmp_path):
    out = tmp_path / "s"
    with held(tmp_path / "s.partial"):
        code, _, err = called("--checkpoint", text_only, "--out", out)
    assert code == 2 and "s.partial: in use by another process" in err
    assert [f.name for f in tmp_path.iterdir() if f != text_only] == []


def test_statistics_that_appear_meanwhile_are_kept(called, text_only, tmp_path, monkeypatch):
    real, out = calibration.collect_statistics, tmp_path / "s.safetensors"

    def late(*arguments, **options):
        out.write_text("mine")
        return real(*arguments, **options)

    monkeypatch.setattr(calibration, "collect_statistics", late)
    code, _, err = called("--checkpoint", text_only, "--lines", "5", "--out", out)
    assert code == 2 and "s-2.safetensors" in err and out.read_text() == "mine"
    assert read_header(tmp_path / "s-2.safetensors").lines == 5


def test_the_example_of_the_help_is_complete(called):
    code, said, _ = called("--help")
    example = " ".join(said.split()).partition("Example: ")[2]
    assert code == 0 and example == "cobra-edge calibrate --checkpoint mini --out statistics.safetensors"


def test_enough_lines_are_not_warned_of(mini, caplog):
    calibration._warn_if_few(
        calibration.Header(1, "0", "m", "0", "0", lines=193, positions=4 * mini.config.mamba.d_inner), mini.config.mamba
    )
    assert not caplog.records


def test_a_broken_line_is_numbered(called, text_only, tmp_path):
    data = tmp_path / "d.jsonl"
    good = '{"prompt": "Who?", "answer": "I.", "task": "text"}\n'
    data.write_text(good + '{"answer": "I."}\n')
    code, _, err = called("--checkpoint", text_only, "--data", data, "--out", tmp_path / "s")
    assert code == 2 and "line 2" in err and not (tmp_path / "s.partial").exists()
    data.write_text(good + good + good.replace("Who?", " "))
    code, _, err = called("--checkpoint", text_only, "--data", data, "--out", tmp_path / "s")
    assert code == 2 and "line 3" in err and "empty" in err


def test_a_question_that_gives_no_tokens_is_numbered(text_only):
    checkpoint = open_checkpoint(str(text_only))
    with pytest.raises(InputError, match="calibration data, line 4: the prompt is empty"):
        calibration_suite(checkpoint, [*QUESTIONS, Line(" ", "I.", "text")], text_only)
    with pytest.raises(InputError, match="line 1: the answer '' has no tokens"):
        calibration_suite(checkpoint, [Line("Who?", "", "text")], text_only)


def test_a_full_disk_is_reported_beforehand(called, text_only, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: shutil._ntuple_diskusage(1 << 40, 1 << 40, 1 << 20))
    code, _, err = called("--checkpoint", text_only, "--out", tmp_path / "s")
    assert code == 3 and "GiB needed" in err and not (tmp_path / "s.partial").exists()


def with_tensor(source, name, change):
    file = source / "model.safetensors"
    tensors = load_torch(file)
    tensors[name] = change(tensors[name])
    save_torch(tensors, file)
    return open_checkpoint(str(source))


def test_weights_and_activations_that_are_not_finite_are_named(text_only):
    name = "backbone.layers.1.mixer.D"
    checkpoint = with_tensor(text_only, name, lambda d: d.index_fill(0, torch.tensor([3]), float("nan")))
    with pytest.raises(InputError, match=r"backbone\.layers\.1\.mixer\.D: contains NaN"):
        collect_statistics(checkpoint, QUESTIONS, text_only)
    checkpoint = with_tensor(text_only, name, lambda d: torch.full_like(d, 3e38))
    with pytest.raises(InputError, match=r"backbone\.layers\.1\.mixer\.out_proj: its input contains NaN"):
        collect_statistics(checkpoint, QUESTIONS, text_only)


def test_visual_embeddings_that_are_not_finite_are_named(mini, monkeypatch):
    monkeypatch.setattr(
        calibration_data, "load_vision", lambda _c: lambda pixels: torch.full((len(pixels), 64, 256), float("inf"))
    )
    with pytest.raises(InputError, match=r"000\.png: its visual embeddings hold NaN or infinity"):
        collect_statistics(mini, a_few_lines(), MINI)


def test_a_machine_without_the_libraries_is_told(called, text_only, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    code, _, err = called("--checkpoint", text_only, "--out", tmp_path / "s")
    assert code == 3 and install_hint("export") in err


@pytest.mark.parametrize("pattern", ["part-0.*", "streams-2.*"])
def test_a_damaged_part_is_told(text_only, tmp_path, pattern):
    checkpoint, resume = open_checkpoint(str(text_only)), tmp_path / "resume"
    collect_statistics(checkpoint, QUESTIONS, tmp_path, resume_directory=resume)
    (file,) = resume.glob(pattern)
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(InputError, match="not a complete safetensors file.*remove .*resume and calibrate again"):
        collect_statistics(checkpoint, QUESTIONS, tmp_path, resume_directory=resume)


def interrupt_after(stage, done_at_least):
    def on_progress(name, done, _total):
        if name == stage and done >= done_at_least:
            raise KeyboardInterrupt

    return on_progress


@pytest.mark.parametrize(("stage", "done"), [("images", 1), ("layer 1 of 4", 1), ("layer 3 of 4", 200), ("layer 4 of 4", 1)])
def test_an_interrupted_calibration_ends_with_the_same_file(mini, tmp_path, stage, done):
    whole, resumed, resume = tmp_path / "whole", tmp_path / "resumed", tmp_path / "resume"
    lines = a_few_lines()
    write_statistics(collect_statistics(mini, lines, MINI), whole)
    with pytest.raises(KeyboardInterrupt):
        collect_statistics(mini, lines, MINI, resume_directory=resume, on_progress=interrupt_after(stage, done))
    stages = []
    statistics = collect_statistics(
        mini, lines, MINI, resume_directory=resume, on_progress=lambda name, *_: stages.append(name)
    )
    write_statistics(statistics, resumed)
    assert stages[0] == stage  # what was finished is not done again
    assert whole.read_bytes() == resumed.read_bytes()


def test_a_killed_calibration_goes_on(tmp_path):
    """Killed without a chance to tidy up, in the middle; the same command then says nothing of starting over."""
    source, out, whole = tmp_path / "m", tmp_path / "s", tmp_path / "whole"
    write_text_only(source, config=MambaConfig(128, 12, 512, 256, 16, 4, 8))
    command = [sys.executable, "-m", "cobra_edge.calibrate", "--checkpoint", str(source), "--data", str(DATA)]
    subprocess.run([*command, "--out", whole], check=True, capture_output=True)
    resume, deadline = tmp_path / "s.partial", time.monotonic() + 120
    child = subprocess.Popen([*command, "--out", out], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (resume / "streams-1.safetensors").is_file() and child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    os.kill(child.pid, signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL and not out.exists()
    done = subprocess.run([*command, "--out", out], check=True, capture_output=True, text=True)
    assert "starting over" not in done.stderr and "layer 1 of" not in done.stderr and not resume.exists()
    assert out.read_bytes() == whole.read_bytes()


def test_other_inputs_start_over(text_only, tmp_path, caplog):
    checkpoint, resume = open_checkpoint(str(text_only)), tmp_path / "resume"
    collect_statistics(checkpoint, QUESTIONS, tmp_path, resume_directory=resume)
    with caplog.at_level(logging.WARNING):
        fewer = collect_statistics(checkpoint, QUESTIONS[:2], tmp_path, resume_directory=resume)
    assert "starting over" in caplog.text
    assert fewer.fingerprint() == collect_statistics(checkpoint, QUESTIONS[:2], tmp_path).fingerprint()


def test_a_removal_that_was_interrupted_is_taken_up(text_only, tmp_path, monkeypatch):
    """Whichever file it stopped before, the next run goes on or begins, and ends with the same."""
    checkpoint, resume = open_checkpoint(str(text_only)), tmp_path / "resume"
    expected = collect_statistics(checkpoint, QUESTIONS, tmp_path, resume_directory=resume).fingerprint()
    files, real = len(list(resume.iterdir())), Path.unlink
    for before in range(files):
        left = before

        def unlink(self, missing_ok=False):
            nonlocal left
            if left == 0:
                raise KeyboardInterrupt
            left -= 1
            real(self, missing_ok)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(Path, "unlink", unlink)
            remove_resume_directory(resume)
        assert collect_statistics(checkpoint, QUESTIONS, tmp_path, resume_directory=resume).fingerprint() == expected
    remove_resume_directory(resume)
    assert not resume.exists()


def test_a_directory_of_somebody_else_is_left_alone(text_only, tmp_path):
    resume = tmp_path / "resume"
    resume.mkdir()
    (resume / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="not an interrupted calibration"):
        collect_statistics(open_checkpoint(str(text_only)), QUESTIONS, tmp_path, resume_directory=resume)
    assert (resume / "thesis.txt").read_text() == "mine"


@pytest.fixture
def written(text_only, tmp_path):
    """Statistics of the text-only model: the file, and the checkpoint."""
    checkpoint, file = open_checkpoint(str(text_only)), tmp_path / "s.safetensors"
    write_statistics(collect_statistics(checkpoint, QUESTIONS, tmp_path), file)
    return file, checkpoint


def test_statistics_of_another_model_are_refused(written):
    file, checkpoint = written
    with pytest.raises(
        InputError, match=rf"{checkpoint.sha256()[:12]}.*expected cobra-other \(abcdef012345…\); calibrate again"
    ):
        config = type(checkpoint.config)("cobra-other", None, None, checkpoint.config.mamba)
        read_statistics(file, config, "abcdef0123456789")


def rewritten(file, change=lambda tensors: None, header=None):
    """Write the file again, its tensors changed, with its own header or another text."""
    tensors, own = load_file(file), header if header is not None else read_text(file)
    change(tensors)
    save_file(tensors, file, {"statistics": own})


def read_text(file):
    raw = file.read_bytes()
    return json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])["__metadata__"]["statistics"]


def put(name, value):
    return lambda tensors: tensors.__setitem__(name, value)


DT = "backbone.layers.0.mixer.dt_proj"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t.pop(f"{DT}.peak"), "missing tensors"),
        (put("more", np.zeros(1, np.float32)), "unexpected tensors"),
        (put(f"{DT}.diagonal", np.ones(9, np.float32)), r"expected float32\(8,\)"),
        (put(f"{DT}.diagonal", np.ones(8, np.float16)), r"expected float32\(8,\)"),
    ],
)
def test_a_file_with_other_tensors_is_refused(written, change, says):
    file, checkpoint = written
    rewritten(file, change)
    with pytest.raises(InputError, match=says):
        read_statistics(file, checkpoint.config, checkpoint.sha256())


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("diagonal", np.full(8, np.nan, np.float32), "mean squares"),
        ("diagonal", np.full(8, -1, np.float32), "mean squares"),
        ("correlation", np.full(36, np.nan, np.float16), "beyond -1..1"),
        ("correlation", np.full(36, 1.5, np.float16), "beyond -1..1"),
        ("peak", np.full((2, 1), np.inf, np.float32), "an invalid histogram"),
        ("peak", np.full((2, 1), -1, np.float32), "an invalid histogram"),
        ("histogram", np.full((2, 1, BINS), -1, np.int32), "an invalid histogram"),
        ("histogram", np.zeros((2, 1, BINS), np.int32), "no magnitudes"),
    ],
)
def test_values_that_cannot_be_are_refused_where_they_are_read(written, name, value, says):
    file, checkpoint = written
    rewritten(file, put(f"{DT}.{name}", value))
    statistics = read_statistics(file, checkpoint.config, checkpoint.sha256())
    with pytest.raises(InputError, match=says):
        statistics.second_moment(0, "dt_proj")
        statistics.percentile(0, "dt_proj", 8, 99, rotated=False)


def test_a_file_with_another_header_is_refused(written, tmp_path):
    file, checkpoint = written
    whole = file.read_bytes()
    for broken, says in (
        (lambda: rewritten(file, header="{}"), "its header is invalid"),
        (lambda: rewritten(file, header=read_text(file).replace('"schema_version":1', '"schema_version":9')), "expected 1"),
        (lambda: save_file(load_file(file), file), "not statistics"),
        (lambda: file.write_bytes(whole[:-1]), "not a complete safetensors file"),
        (lambda: file.unlink(), "no such file"),
    ):
        file.write_bytes(whole)
        assert read_header(file).model_sha256 == checkpoint.sha256()
        broken()
        with pytest.raises(InputError, match=says):
            read_statistics(file, checkpoint.config, checkpoint.sha256())


# What was trained on, what is calibrated with, and what is held out.


def scene_objects(split):
    return {scene.things for scene in draw_suite(split, 0)[0]}


def test_shipped_images_and_questions_of_the_suites_are_disjoint():
    """Decoded pixels, not files, are compared; and no image is repeated within a suite either."""
    from PIL import Image

    pixels = {
        split: [Image.open(f).convert("RGB").tobytes() for f in sorted((MINI / split).glob("*.png"))]
        for split in ("calibration", "calibration-more", "heldout")
    }
    assert [len(of) for of in pixels.values()] == [40, 160, 130]
    assert len({p for of in pixels.values() for p in of}) == 330
    asked = {split: {line.image for line in read_suite(MINI / f"{split}.jsonl")} for split in pixels}
    for split, images in asked.items():
        assert images == {f"{split}/{f.name}" for f in (MINI / split).glob("*.png")}


def test_training_rejects_every_scene_of_the_suites():
    """Certain, not probable: where such a scene comes up, draw_scene passes it over, whatever its background."""
    from calibration import scenes

    for split in ("calibration", "heldout"):
        for things in scene_objects(split):
            for clutter_seed in (0, 1, 2**32 - 1):
                assert Scene(things, clutter_seed).split == split
    forbidden = [Scene(things, 0) for split in ("calibration", "heldout") for things in sorted(scene_objects(split), key=repr)]
    allowed = draw_scene(random.Random("allowed"), "train")
    queue = [*forbidden, allowed]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scenes, "_any_scene", lambda *_: queue.pop(0))
        assert draw_scene(random.Random(0), "train") == allowed
    assert not queue


def test_training_calls_nothing_but_the_rejecting_draw():
    """Every scene of the training code comes from draw_scene(…, "train"): there is no other way to one."""
    import ast

    makers = ("Scene", "_any_scene", "draw_scene")
    files = [
        f for f in (Path(__file__).parents[2] / "calibration").glob("*.py") if f.name not in ("scenes.py", "make_suites.py")
    ]
    assert {"train_mini.py", "tokenizer.py", "train_vision.py", "train_language.py"} <= {f.name for f in files}
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", getattr(node.func, "attr", "")) in makers:
                assert node.func.id == "draw_scene" and node.args[1].value == "train", f"{file.name}:{node.lineno}"


def test_the_first_batches_of_training_hold_none_of_the_suites_scenes():
    """A sample of the very streams a run with seed 0 draws from; that all others do not either is what rejection is for."""
    forbidden = scene_objects("calibration") | scene_objects("heldout")
    assert len(forbidden) == 330
    for stage in ("vision", "language"):
        for step in range(40):
            for worker in range(2):
                rng = random.Random(f"0/{stage}/{step}/{worker}")
                assert not forbidden & {draw_scene(rng, "train").things for _ in range(8)}
