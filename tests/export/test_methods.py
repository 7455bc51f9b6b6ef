"""Export by every method, end to end: where statistics come from, what is refused, and what it is worth."""

import shutil

import numpy as np
import pytest

from cobra_edge.bundle.reader import DECODER, MODEL_CARD, Bundle
from cobra_edge.calibrate import command as calibrate
from cobra_edge.decode.cpu import CpuDecoder
from cobra_edge.decode.decoder import DecoderOptions
from cobra_edge.decode.numpy_reference import NumpyDecoder
from cobra_edge.errors import InputError
from cobra_edge.export import command as export_module
from cobra_edge.export.pipeline import export_bundle
from cobra_edge.formats.method import METHODS
from cobra_edge.formats.packing import QuantizedTensor
from cobra_edge.formats.scheme import SCHEMES
from cobra_edge.formats.targets import target_named
from cobra_edge.model.checkpoint import open_checkpoint
from cobra_edge.quantize.statistics import projection_of, read_statistics
from cobra_edge.terminal.output import run_command

from ..conftest import MINI, write_text_only
from ..tolerance import assert_close, distance

CALIBRATION = MINI / "calibration.jsonl"
TOLD = "no --statistics given: collecting them from the embedded calibration set"
TOKENS = np.random.default_rng(0).integers(0, 512, 40).tolist()


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_text_only(tmp_path_factory.mktemp("methods") / "mamba-tiny")


@pytest.fixture(scope="module")
def statistics(source):
    """Return the file of the small model's statistics."""
    file = source.parent / "statistics.safetensors"
    assert run_command(calibrate.command, ["--checkpoint", str(source), "--out", str(file)]) == 0
    return file


@pytest.fixture(scope="module")
def mini_statistics(tmp_path_factory):
    """Return the file of cobra-mini's statistics, of the whole set that ships."""
    file = tmp_path_factory.mktemp("mini") / "statistics.safetensors"
    assert run_command(calibrate.command, ["--checkpoint", "mini", "--out", str(file)]) == 0
    return file


@pytest.fixture
def export(source, tmp_path, capfd):
    """Return a function that runs `export` on the small model: (exit code, its bundle's directory, stderr on one line)."""
    budget = tmp_path / "budget.toml"  # four bits of random weights drift far, whatever the method
    budget.write_text("".join(f"[schemes.{scheme}]\n" for scheme in SCHEMES))
    capfd.readouterr()

    def call(*arguments, name="bundle"):
        out = tmp_path / "out" / name
        given = ["--target", "cpu", "--checkpoint", str(source), "--golden-lines", "16"]
        given += [] if "--scheme" in arguments or "--bits" in arguments else ["--scheme", "w4a16-g128"]
        given += [] if {"--quality", "--method"} & set(arguments) else ["--quality", "fast"]
        given += ["--budget", str(budget), "--out", str(out), *map(str, arguments)]
        code = run_command(export_module.command, given)
        return code, out, " ".join(capfd.readouterr().err.split())

    return call


def run_rounded(decoder_class, bundle):
    """Return the logits of some tokens (seq, vocab) with activations rounded to int8."""
    decoder = decoder_class(bundle, DecoderOptions(activations="int8"))
    return decoder.forward(decoder.embed(TOKENS), decoder.new_state())


def leftovers(directory):
    """Return the names of what is in a directory, hidden files too; nothing is in one that is not there."""
    return sorted(f.name for f in directory.iterdir()) if directory.exists() else []


def test_without_statistics_the_embedded_set_is_used_and_said(export, source, statistics):
    code, out, err = export("--method", "gptq")
    assert code == 0 and TOLD in err
    recipe = Bundle.open(out).manifest.recipe
    checkpoint = open_checkpoint(str(source))
    found = read_statistics(statistics, checkpoint.config, checkpoint.sha256())
    assert (recipe.method, recipe.statistics) == ("gptq", found.fingerprint())
    assert leftovers(out.parent) == ["bundle"]  # nothing of the statistics beside it
    code, again, err = export("--method", "gptq", "--statistics", statistics, name="again")
    assert code == 0 and TOLD not in err
    assert (again / DECODER).read_bytes() == (out / DECODER).read_bytes()


def test_calibration_data_of_one_s_own(export, tmp_path):
    lines = CALIBRATION.read_text().splitlines()
    images = shutil.copytree(MINI / "calibration", tmp_path / "calibration")
    (images.parent / "own.jsonl").write_text("\n".join(lines[::5]))
    code, out, err = export("--method", "gptq", "--calibration", images.parent / "own.jsonl")
    assert code == 0 and TOLD not in err
    _, other, _ = export("--method", "gptq", name="other")
    one, two = (Bundle.open(b).manifest.recipe.statistics for b in (out, other))
    assert one is not None and two is not None and one != two


def test_rounding_to_nearest_needs_no_statistics(export):
    code, out, err = export()
    recipe = Bundle.open(out).manifest.recipe
    assert code == 0 and TOLD not in err and (recipe.method, recipe.statistics) == ("rtn", None)


def test_every_method_makes_other_codes_and_says_its_name(export, statistics, tmp_path):
    made, few = {}, tmp_path / "few.jsonl"
    few.write_text("".join(f'{{"prompt": "What is {n}?", "answer": "It is {n}.", "task": "text"}}\n' for n in range(8)))
    for method in METHODS:
        given = ("--statistics", statistics) if METHODS[method].needs_statistics else ()
        given = ("--calibration", few) if METHODS[method].needs_gradients else given
        code, out, _ = export("--method", method, *given, name=method)
        bundle = Bundle.open(out)
        assert code == 0 and bundle.manifest.recipe.method == method
        assert f"method {method}" in bundle.path(MODEL_CARD).read_text(encoding="utf-8")
        made[method] = (out / DECODER).read_bytes()
    assert len(set(made.values())) == len(METHODS)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--method", "awq", "--clip-activations", "99.9"), "percentiles are of inputs without AWQ's scales"),
        (("--method", "awq-gptq", "--clip-activations", "99.9"), "percentiles are of inputs without AWQ's scales"),
        (("--scheme", "bnb-nf4", "--method", "gptq"), "bnb-nf4: bitsandbytes makes its codes; omit --method"),
        (("--scheme", "bnb-int8", "--clip-activations", "99"), "bnb-int8: bitsandbytes makes its codes; omit --method"),
        (("--method", "gptq", "--statistics", "/nowhere.safetensors"), "/nowhere.safetensors: no such file"),
        (("--method", "gptq", "--statistics", MINI / "tokenizer.json"), "tokenizer.json"),
        (("--method", "gptq", "--calibration", "/nowhere.jsonl"), "cannot be read"),
        (("--scheme", "fp16", "--method", "gptq"), "fp16: weights stay float16, so no method applies; omit --method gptq"),
        (("--statistics", MINI / "tokenizer.json"), "method rtn uses no statistics; omit it, or use --method gptq"),
        (("--target", "jetson", "--calibration", CALIBRATION), "nothing is calibrated, method rtn uses no statistics"),
        (
            ("--target", "jetson", "--method", "gptq", "--statistics", "x", "--calibration", CALIBRATION),
            "nothing is calibrated, --statistics is",
        ),
        (("--method", "guided", "--bits", "4", "--sensitivity", "x"), "method guided allocates bits by costs of its own"),
        (("--activations", "int8"), "--activations applies to --bits only"),
        (("--vision-precision", "fp16"), "mamba-tiny is a text-only model without vision; omit --vision-precision"),
        (("--vision-input", "uint8"), "text-only model without vision; omit --vision-input"),
        (("--vision-weights", MINI / "vision"), "text-only model without vision; omit --vision-weights"),
        (("--clip-activations", "0"), "--clip-activations: "),
        (("--clip-activations", "100.5"), "--clip-activations: "),
    ],
)
def test_what_cannot_be_is_refused(export, arguments, says):
    code, out, err = export(*arguments)
    assert code == 2 and says in err and "Traceback" not in err
    assert leftovers(out.parent) == []


def test_statistics_of_another_model_are_refused(export, mini_statistics):
    for method in ("gptq", "awq"):
        code, out, err = export("--method", method, "--statistics", mini_statistics)
        assert code == 2 and "statistics of another model: cobra-mini" in err and "calibrate again with this checkpoint" in err
        assert leftovers(out.parent) == []


def test_an_unknown_method_is_refused_by_name(source, tmp_path):
    with pytest.raises(InputError, match="unknown method 'gptk'; did you mean 'gptq'"):
        export_bundle(str(source), target_named("cpu"), tmp_path / "out", method="gptk")


@pytest.mark.parametrize("method", ["rtn", "gptq"])
@pytest.mark.parametrize("rotation", ["none", "both"])
def test_clips_are_written_and_rounded_activations_run_with_them(export, source, statistics, method, rotation):
    given, of = ["--scheme", "w4a8", "--method", method, "--rotation", rotation], ["--statistics", statistics]
    code, out, _ = export(*given, *of, "--clip-activations", "99")
    bundle, free = Bundle.open(out), Bundle.open(export(*given, *(() if method == "rtn" else of), name="free")[1])
    assert code == 0 and bundle.manifest.recipe.activation_percentile == 99
    checkpoint = open_checkpoint(str(source))
    found = read_statistics(statistics, checkpoint.config, checkpoint.sha256())
    clipped = {n: t for n, t in bundle.decoder_tensors().items() if isinstance(t, QuantizedTensor)}
    assert len(clipped) == 1 + 4 * checkpoint.config.mamba.n_layer
    for name, tensor in clipped.items():
        layer, projection = projection_of(name)
        turned = rotation == "both" and projection in ("in_proj", "out_proj", "head")
        expected = found.percentile(layer, projection, tensor.scheme.group(tensor.shape[1]), 99, rotated=turned)
        assert tensor.clips is not None and (tensor.clips > 0).all() and np.array_equal(tensor.clips, expected)
        assert np.array_equal(tensor.codes, free.decoder_tensors()[name].codes)  # weights know nothing of it
    got, unclipped = run_rounded(CpuDecoder, bundle), run_rounded(CpuDecoder, free)
    assert_close(got, run_rounded(NumpyDecoder, bundle), "decoder", "int8")
    assert distance(got, unclipped)[0] > 0.1


def test_gptq_of_a_rotated_mini_drifts_less_than_half_as_far(mini_bundle, mini_statistics, sharing, tmp_path):
    given = {"scheme": "w4a16-g128", "rotation": "both", "statistics": mini_statistics, "golden_lines": 48}
    with sharing():
        made = export_bundle("mini", target_named("jetson"), tmp_path / "gptq", method="gptq", **given)
    plain = Bundle.open(mini_bundle("w4a16-g128")).manifest
    assert (plain.recipe.method, plain.recipe.rotations) == ("rtn", ())
    drift, floor = made.manifest.drift, plain.drift
    assert drift.positions == floor.positions
    assert drift.measures["kld_mean"] < 0.5 * floor.measures["kld_mean"]


def test_the_default_directory_says_the_method(source, statistics, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = {"method": "awq-gptq", "rotation": "residual", "statistics": statistics, "golden_lines": 16}
    made = export_bundle(str(source), target_named("cpu"), scheme="w4a16-g64", **given)
    assert made.directory.name == "mamba-tiny-cpu-w4a16-g64-awq-gptq-rotated"
