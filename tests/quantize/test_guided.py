"""Guided quantization: streamed gradients against autograd of the whole model, costs and codes against references, resuming."""

import contextlib
import math
from dataclasses import replace

import msgspec
import numpy as np
import pytest
import torch

from cobra_edge.decode.native_operations import best_operations, differentiable_scan
from cobra_edge.errors import InputError, MachineError
from cobra_edge.export import guided, pipeline
from cobra_edge.export.pipeline import export_bundle
from cobra_edge.export.stopwatch import Stopwatch
from cobra_edge.formats.packing import QuantizedTensor
from cobra_edge.formats.recipe import matrix_bits, matrix_names, matrix_weights, uniform_recipe
from cobra_edge.formats.scheme import SCHEMES
from cobra_edge.formats.targets import target_named
from cobra_edge.model.checkpoint import open_checkpoint
from cobra_edge.model.mamba import REFERENCE, Mamba, selective_scan
from cobra_edge.quantize import gradients, sequential
from cobra_edge.quantize.bit_allocation import allocate_by_costs
from cobra_edge.quantize.calibration_data import EmbeddingCache, calibration_suite
from cobra_edge.quantize.costs import expected_costs, unexplained
from cobra_edge.quantize.descent import damp, descend
from cobra_edge.quantize.fisher import fisher_rows
from cobra_edge.quantize.gptq import DAMPING, gptq
from cobra_edge.quantize.gradients import CalibrationPass, collect_guidance, stream_forward
from cobra_edge.quantize.guidance import HEAD, TABLE, Header
from cobra_edge.quantize.moments import WeightedMoments
from cobra_edge.quantize.resume import Resume
from cobra_edge.quantize.sequential import quantize_sequentially
from cobra_edge.quantize.stream_files import StreamFiles
from cobra_edge.quantize.streams import families, quick_products, spans_of
from cobra_edge.suite.line import Line
from cobra_edge.suite.reader import CALIBRATION, read_suite

from ..tolerance import assert_close

QUESTIONS = [Line(p, a, "text") for p, a in (("How are you?", "Well."), ("Count.", "One two three."), ("Why?", "Because."))]
IMAGES = CALIBRATION.parent


def some_lines():
    """Questions about two images, and one about none."""
    lines = [line for line in read_suite(CALIBRATION) if line.image in ("calibration/000.png", "calibration/007.png")]
    return [*lines[:6], *QUESTIONS[:1]]


def header_of(checkpoint, run, rotations=(), groups=4):
    answers = sum(span.answer for span in run.spans)
    return Header(
        1, "0", checkpoint.config.model_id, "m", "d", rotations, len(run.suite.lines), run.positions, answers, groups, 0
    )


def pass_over(checkpoint, lines, directory, operations=REFERENCE):
    suite = calibration_suite(checkpoint, lines, IMAGES)
    spans = spans_of(suite, checkpoint.config.n_visual_tokens, whole=False)
    shape = spans[-1].start + spans[-1].length, checkpoint.config.mamba.d_model
    return CalibrationPass(checkpoint, suite, spans, StreamFiles(directory, shape), operations, lambda *_: None)


def guidance_of(checkpoint, run, rotations=(), groups=4, resume=None):
    stream_forward(run, IMAGES, EmbeddingCache(checkpoint))
    return collect_guidance(run, header_of(checkpoint, run, rotations, groups), resume or Resume(None, b""))


@pytest.fixture
def text(text_only):
    return open_checkpoint(str(text_only))


@pytest.fixture(scope="module")
def mini():
    return open_checkpoint("mini")


@pytest.mark.parametrize(
    ("batch", "seq", "channels", "d_state"),
    [(1, 1, 16, 16), (2, 7, 24, 16), (3, 33, 64, 5), (1, 97, 40, 16), (1, 64, 2048, 16)],
)
def test_the_gradient_of_the_native_scan_is_autograds(batch, seq, channels, d_state):
    g = torch.Generator().manual_seed(batch)
    wide, narrow, state = (batch, seq, channels), (batch, seq, d_state), (batch, channels, d_state)
    shapes = [wide, wide, (channels, d_state), narrow, narrow, (channels,), wide, (channels,), state]
    inputs = [torch.randn(s, generator=g) for s in shapes]
    inputs[2] = -inputs[2].abs() - 0.1
    up, last = torch.randn(wide, generator=g), torch.randn(state, generator=g)
    found = []
    for scan in (selective_scan, differentiable_scan):
        leaves = [x.clone().requires_grad_() for x in inputs]
        out, h = scan(*leaves)
        ((out * up).sum() + (h * last).sum()).backward()
        found.append([x.grad for x in leaves])
    for reference, native in zip(*found, strict=True):
        assert_close(native.numpy(), reference.numpy(), "gradient")


def test_random_signs_have_the_hessian_of_kld_as_covariance():
    logits = torch.tensor([[2.0, 0.0, -1.0, 0.5]])
    p = logits.softmax(-1)[0]
    g = torch.Generator().manual_seed(0)
    v = fisher_rows(logits.expand(200_000, -1), g)
    assert (v.T @ v / len(v) - (torch.diag(p) - p[:, None] * p)).abs().max() < 3e-3  # three standard errors
    assert v.sum(1).abs().max() < 1e-5  # logits may be shifted


def test_families_hold_every_span_once_and_images_come_first(mini):
    suite = calibration_suite(mini, some_lines(), IMAGES)
    spans = spans_of(suite, mini.config.n_visual_tokens, whole=False)
    for most in (1, 100, 10_000):
        seen = [span for family in families(spans, most) for batch in family for span in batch]
        assert sorted(seen, key=lambda s: s.start) == spans
        for family in families(spans, most):
            assert all(len({s.length for s in batch}) == 1 for batch in family)
            read = set()
            for span in (s for batch in family for s in batch):
                assert span.is_image or span.image is None or span.image in read
                read |= {span.image} if span.is_image else set()


def whole_model_gradients(checkpoint, run, seed=0):
    """Return the gradients at every projection's output, by (layer, projection) and row, of the whole model at once."""
    config = checkpoint.config.mamba
    model = Mamba(config)
    tensors = {k: v.float() for k, v in checkpoint.decoder.items()}
    model.load_state_dict(tensors | {"lm_head.weight": tensors["backbone.embedding.weight"]})
    first, found, leaves = run.streams.read(0), {}, []
    hidden, kept = {}, {}
    for i, layer in enumerate(model.backbone.layers):
        for projection in ("in_proj", "x_proj", "out_proj"):

            def keep(_module, _inputs, output, key=(i, projection)):
                output.retain_grad()
                kept.setdefault(key, []).append(output)

            getattr(layer.mixer, projection).register_forward_hook(keep)
    for span in run.spans:
        if span.is_image:
            continue
        before = next((s for s in run.spans if s.is_image and s.image == span.image), None)
        rows = [*(range(*before.rows.indices(1 << 40)[:2]) if before else ()), *range(span.start, span.start + span.length)]
        x = first[rows].clone().requires_grad_()
        leaves.append((rows, x))
        out, _ = model.hidden(x[None])
        hidden |= dict(zip(span.answer_rows, out[0, -span.answer :], strict=True))
    order = [row for span in run.spans for row in span.answer_rows]
    signs, logits = torch.Generator().manual_seed(seed), model.lm_head(torch.stack([hidden[r] for r in order]))
    v = torch.cat([fisher_rows(part.detach(), signs) for part in logits.split(gradients._LOGITS_AT_ONCE)])
    logits.backward(v)
    for key, outputs in kept.items():
        total = torch.zeros(run.positions, outputs[0].shape[-1])
        for (rows, _), output in zip(leaves, outputs, strict=True):
            total[rows] += output.grad[0]  # an image that several lines share gets the sum
        found[key] = total
    stream = torch.zeros_like(first)
    for rows, x in leaves:
        stream[rows] += x.grad
    return found, stream


@pytest.mark.parametrize("operations", [REFERENCE, replace(REFERENCE, scan=differentiable_scan)], ids=["plain", "native"])
def test_streamed_gradients_are_those_of_the_whole_model(mini, tmp_path, operations, monkeypatch):
    monkeypatch.setattr(gradients, "_POSITIONS_AT_ONCE", 100)  # several families
    monkeypatch.setattr(gradients, "quick_products", contextlib.nullcontext)
    monkeypatch.setattr(StreamFiles, "write", exact_write)
    monkeypatch.setattr(StreamFiles, "read", lambda self, index: self.exact[index].clone())
    run = pass_over(mini, some_lines(), tmp_path, operations)
    found = guidance_of(mini, run)
    expected, stream = whole_model_gradients(mini, run)
    answers = found.header.answers
    for (layer, projection), gradient in expected.items():
        squares = gradient.square().reshape(run.positions, 4, -1).mean(-1) / answers
        assert_close(found.weights(layer, projection), squares.numpy(), "statistics")
    text = stream[sum(s.length for s in run.spans if s.is_image) :]
    assert_close(found.tensors[TABLE], (text.T @ text / (answers * mini.config.mamba.vocab)).numpy(), "statistics")


def test_quick_products_end_with_their_block():
    before = torch.get_float32_matmul_precision()
    with contextlib.suppress(KeyError), quick_products():
        assert torch.get_float32_matmul_precision() == "medium"
        raise KeyError
    assert torch.get_float32_matmul_precision() == before


def exact_write(self, index, stream):
    """Keep a stream in float32: what is stored in float16 differs from autograd by more than a tolerance of sums."""
    self.__dict__.setdefault("exact", {})[index] = stream.clone()
    self._write(f"last-{index}.f32", stream)


def test_a_stored_stream_comes_back_to_half_precision(tmp_path):
    files, x = StreamFiles(tmp_path, (5, 3)), torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    assert files.last() is None and files.bytes_to_write(3) == (3 * 2 + 8) * 15
    for index, scale in enumerate((1.0, 1e6)):  # beyond float16
        files.write(index, x * scale)
        assert_close(files.read(index).numpy() / scale, x.numpy(), "rotation", "float16")
    assert files.last() == 1 and files.bytes_to_write(3) == (2 + 8) * 15 and torch.equal(files.read_last(), x * 1e6)
    assert files.bytes_to_write(2) == 0


def correlated(n, rows=400, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(rows, n, generator=g) @ torch.randn(n, n, generator=g) * torch.linspace(0.2, 3, n)


def test_moments_are_their_float64_sums():
    x, w = correlated(700, 50), torch.rand(50, 3, generator=torch.Generator().manual_seed(1))
    moments = WeightedMoments(3, 700)
    moments.add(x[:20], w[:20])
    moments.add(x[20:], w[20:])
    expected = torch.einsum("pk,pi,pj->kij", w.double(), x.double(), x.double())
    assert_close(moments.tensor().numpy(), expected.numpy(), "statistics")


@pytest.mark.parametrize("scheme", ["w3a16-g64", "w4a16-g128", "w8a16-g128"])
def test_the_expected_cost_is_what_gptq_leaves(scheme):
    x = correlated(256)
    moments = torch.stack([x.T @ x / len(x), 3 * x[:200].T @ x[:200] / 200])
    weight = np.random.default_rng(0).standard_normal((64, 256)).astype(np.float32)
    codes = gptq(weight, moments.numpy(), SCHEMES[scheme])
    errors = (codes.dequantize() - weight).reshape(2, 32, 256).astype(np.float64)
    left = 0.5 * np.einsum("koi,kij,koj->", errors, moments.double().numpy(), errors)
    variances = np.stack([unexplained(moment) for moment in moments])
    expected = expected_costs(weight, variances, [scheme, "float16"])
    assert expected["float16"] == 0
    assert 0.8 < expected[scheme] / left < 1.25


def test_rows_that_count_more_cost_more():
    weight, variances = np.ones((4, 64), np.float32), np.ones((1, 64), np.float32)
    weight[0] = 8
    plain = expected_costs(weight, variances, ["w8a16-channel"])["w8a16-channel"]
    ignored = expected_costs(weight, variances, ["w8a16-channel"], np.array([0, 4 / 3, 4 / 3, 4 / 3]))["w8a16-channel"]
    assert plain == pytest.approx(ignored * (64 + 3) / 4, rel=2e-2)


def test_outputs_without_gradients_cost_nothing():
    assert not unexplained(torch.zeros(8, 8)).any()


def test_groups_of_rows_have_moments_of_their_own():
    x, scheme = correlated(128), SCHEMES["w4a16-g64"]
    moments = torch.stack([x.T @ x, x[:100].T @ x[:100]]).numpy()
    weight = np.random.default_rng(0).standard_normal((6, 128)).astype(np.float32)
    found = gptq(weight, moments, scheme, sweeps=1)
    for rows, moment in ((slice(0, 3), moments[0]), (slice(3, 6), moments[1])):
        alone = gptq(weight[rows], moment, scheme, sweeps=1)
        assert np.array_equal(found.codes[rows], alone.codes) and np.array_equal(found.scales[rows], alone.scales)


def test_descent_is_the_naive_one_and_never_worse():
    x, scheme = correlated(150), SCHEMES["w3a16-g64"]
    moment = damp((x.T @ x / len(x)).double(), DAMPING)
    g = torch.Generator().manual_seed(2)
    columns = torch.randn(150, 5, generator=g, dtype=torch.float64)
    steps = torch.rand(150, 5, generator=g, dtype=torch.float64) + 0.2
    steps[7] = 0  # a group of zeros
    start = (columns / steps.clamp_min(1e-9)).round().clamp(-4, 3)
    start[7] = 0

    def objective(codes):
        errors = codes * steps - columns
        return float((errors * (moment @ errors)).sum())

    naive = start.clone()
    for _ in range(2):
        for j in range(150):
            pull = moment[j] @ (naive * steps - columns)
            if steps[j, 0] > 0:
                naive[j] = (naive[j] - pull / (moment[j, j] * steps[j])).round().clamp(-4, 3)
    found = start.clone()
    descend(found, columns, steps, moment, scheme.zero_code, 2)
    assert torch.equal(found, naive) and objective(found) < objective(start)


def test_float_matrices_leave_the_model_as_it_is(text, tmp_path):
    """Without rounding the quantized inputs are the float ones, up to the rounding of streams: no correction moves a weight."""
    run = pass_over(text, QUESTIONS, tmp_path)
    recipe, _ = uniform_recipe(text.config.mamba, SCHEMES["fp16"])
    values = quantize_sequentially(run, guidance_of(text, run), recipe, Resume(None, b""))
    for name, value in values.items():
        assert_close(value.astype(np.float32), text.decoder[name].float().numpy(), "rotation", "float16")


@pytest.mark.parametrize("rotations", [(), ("residual", "out-proj")])
def test_guided_codes_err_less_than_others(mini, tmp_path, rotations):
    """The mean KLD on the calibration lines themselves, by the decoder that ships."""
    from cobra_edge.regress.recipe_eval import RecipeEvaluation

    lines = read_suite(CALIBRATION)[:24]
    run = pass_over(mini, lines, tmp_path, best_operations())
    stream_forward(run, IMAGES, EmbeddingCache(mini))
    differentiable = replace(run, operations=replace(REFERENCE, scan=differentiable_scan))
    guidance = collect_guidance(differentiable, header_of(mini, run, rotations), Resume(None, b""))
    recipe, _ = uniform_recipe(mini.config.mamba, SCHEMES["w4a16-g128"], "guided", rotations)
    values = quantize_sequentially(run, guidance, recipe, Resume(None, b""))
    plain = replace_tensors(
        uniform_recipe(mini.config.mamba, SCHEMES["w4a16-g128"], "rtn", rotations)[0],
        {name: recipe.storage(name) for name in matrix_names(mini.config.mamba)},
    )
    evaluation = RecipeEvaluation(mini, plain, None, lines, IMAGES)
    nearest = evaluation.kld(plain)
    guided_tensors = dict(evaluation._float) | values
    evaluation._tensors = lambda _recipe: guided_tensors
    assert evaluation.kld(plain) < nearest / 4  # seen: a tenth


def test_an_allocation_by_costs_keeps_its_budget(text, tmp_path):
    run = pass_over(text, QUESTIONS, tmp_path)
    config, costs = text.config.mamba, guidance_of(text, run).costs()
    recipe, _ = uniform_recipe(config, SCHEMES["w4a16-g128"], "guided")
    spent = []
    for budget in (4.5, 6.0, 16.0):
        found = allocate_by_costs(config, recipe, costs, budget)
        bits = sum(matrix_bits(config, replace_tensors(recipe, found.tensors)).values()) / matrix_weights(config)
        assert found.bits_per_weight == pytest.approx(bits) and bits <= budget
        assert found.kld is None
        spent.append(found.kld_alone)
    assert spent == sorted(spent, reverse=True) and spent[-1] == 0 and all(map(math.isfinite, spent))
    with pytest.raises(InputError, match="not possible"):
        allocate_by_costs(config, recipe, costs, 1.0)


def replace_tensors(recipe, tensors):
    from cobra_edge.quantize.sensitivity import of_tensors

    return of_tensors(recipe, tensors)


class Stop(Exception):
    """An interruption."""


@pytest.mark.parametrize("stage", ["float layer", "gradients of layer", "quantizing layer"])
def test_an_interrupted_quantization_resumes_to_the_same_codes(text, tmp_path, stage):
    def everything(directory, on_progress, again=False):
        run = replace(pass_over(text, QUESTIONS, directory), on_progress=on_progress)
        recipe, _ = uniform_recipe(text.config.mamba, SCHEMES["w4a16-g128"], "guided")
        guidance = guidance_of(text, run, resume=Resume(directory / "gradients", b"same"))
        return quantize_sequentially(run, guidance, recipe, Resume(directory / "quantized", b"same"))

    steps = []
    whole = everything(tmp_path / "whole", lambda step, done, total: steps.append(step))
    last = [step for step in dict.fromkeys(steps) if step.startswith(stage)][-1]

    def interrupted(step, done, total):
        if step == last and done == total:
            raise Stop

    with pytest.raises(Stop):
        everything(tmp_path / "cut", interrupted)
    again = []
    resumed = everything(tmp_path / "cut", lambda step, done, total: again.append(step))
    assert set(again) < set(steps)  # finished layers are not run again
    for name, value in whole.items():
        other = resumed[name]
        if isinstance(value, QuantizedTensor):
            assert np.array_equal(value.codes, other.codes) and np.array_equal(value.scales, other.scales)
        else:
            assert np.array_equal(value, other)


def test_gradients_that_are_not_finite_name_their_layer(text, tmp_path):
    def broken(*args):
        out, h = selective_scan(*args)
        return out * torch.where(out == out, 1.0, 0.0) + (args[0] * 1e38 - args[0] * 1e38) * 1e38, h

    run = pass_over(text, QUESTIONS, tmp_path)
    stream_forward(run, IMAGES, EmbeddingCache(text))
    bad = replace(run, operations=replace(REFERENCE, scan=broken))
    with pytest.raises(InputError, match=r"gradients below layer \d+ are not finite.*--method gptq"):
        collect_guidance(bad, header_of(text, run), Resume(None, b""))


def test_moments_of_the_head_are_shared_by_rows(text, tmp_path):
    run = pass_over(text, QUESTIONS, tmp_path)
    found = guidance_of(text, run)
    assert np.array_equal(found.row_moment(head=True), found.tensors[HEAD] + found.tensors[TABLE])


def test_an_export_is_guided_and_leaves_nothing_behind(text_only, tmp_path, monkeypatch):
    """What took hours is kept until the bundle is complete: an export that fails after it does not begin again."""
    suite, write = tmp_path / "suite.jsonl", pipeline._write_golden
    suite.write_bytes(b"\n".join(msgspec.json.encode(q) for q in QUESTIONS))
    given = {"method": "guided", "bits": 5.0, "calibration": suite, "golden_lines": 16}

    def failing(*_):
        raise MachineError("no memory")

    monkeypatch.setattr(pipeline, "_write_golden", failing)
    with pytest.raises(MachineError, match="no memory"):
        export_bundle(str(text_only), target_named("cpu"), tmp_path / "bundle", **given)
    assert {p.name for p in tmp_path.iterdir()} == {".bundle.calibration", "suite.jsonl", text_only.name}
    monkeypatch.setattr(pipeline, "_write_golden", write)
    monkeypatch.setattr(gradients._Backward, "layer", failing)
    monkeypatch.setattr(sequential._Sequential, "layer", failing)
    found = export_bundle(str(text_only), target_named("cpu"), tmp_path / "bundle", **given)
    recipe = found.manifest.recipe
    assert (recipe.method, recipe.scheme) == ("guided", "mixed") and recipe.statistics is not None
    assert found.allocation is not None and found.allocation.bits_per_weight <= 5.0
    assert found.manifest.drift.expected_kld is None  # its golden lines are of another set
    assert {p.name for p in tmp_path.iterdir()} == {"bundle", "suite.jsonl", text_only.name}


def test_a_full_disk_is_told_before_the_work(text_only, tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 1 << 10})
    monkeypatch.setattr(guided.shutil, "disk_usage", lambda _path: usage)
    with (
        pytest.raises(MachineError, match="GiB needed for the residual streams"),
        guided.guided_values(
            open_checkpoint(str(text_only)),
            uniform_recipe(open_checkpoint(str(text_only)).config.mamba, SCHEMES["w4a16-g128"])[0],
            None,
            None,
            tmp_path / "bundle",
            None,
            Stopwatch(),
        ),
    ):
        pass


def test_statistics_are_no_gradients(text_only, tmp_path):
    with pytest.raises(InputError, match="collects gradients itself"):
        export_bundle(
            str(text_only), target_named("cpu"), tmp_path / "b", method="guided", statistics=tmp_path / "s.safetensors"
        )
