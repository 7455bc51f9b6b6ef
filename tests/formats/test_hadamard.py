"""Rotations: Hadamard matrices against their definition, and a rotated decoder against an unrotated one."""

import functools
import json
import shutil

import numpy as np
import pytest

from cobra_edge import inspect
from cobra_edge.bench.random_export import budget_without_limits
from cobra_edge.bundle.reader import MANIFEST, MODEL_CARD, Bundle
from cobra_edge.decode import numpy_reference
from cobra_edge.decode.backends import BACKENDS
from cobra_edge.decode.cpu import CpuDecoder
from cobra_edge.decode.decoder import DecoderOptions
from cobra_edge.decode.numpy_reference import NumpyDecoder
from cobra_edge.errors import InputError
from cobra_edge.export import command as export
from cobra_edge.export.pipeline import export_bundle
from cobra_edge.formats.hadamard import hadamard_factors, hadamard_matrix, rotate, unrotate
from cobra_edge.formats.model_config import MambaConfig
from cobra_edge.formats.recipe import ROTATIONS, Recipe, stored_tensors
from cobra_edge.formats.targets import target_named
from cobra_edge.model.checkpoint import open_checkpoint
from cobra_edge.regress.bundle_tables import describe_rotations
from cobra_edge.terminal.output import run_command

from ..conftest import write_text_only
from ..handmade import INT_SCHEMES, write_bundle
from ..tolerance import assert_close

FACTORS = {
    1: (1, 1),
    2: (1, 2),
    12: (12, 1),
    20: (20, 1),
    44: (44, 1),
    60: (60, 1),
    224: (224, 1),
    384: (12, 32),
    512: (1, 512),
    1536: (12, 128),
    2048: (1, 2048),
    3072: (12, 256),
    4096: (1, 4096),
    5120: (20, 256),
}


@pytest.mark.parametrize(("width", "factors"), FACTORS.items())
def test_the_power_of_two_is_as_large_as_possible(width, factors):
    assert hadamard_factors(width) == factors


@pytest.mark.parametrize("width", FACTORS)
def test_rows_are_orthogonal(width):
    matrix = hadamard_matrix(width)
    assert matrix.dtype == np.float32 and set(np.unique(matrix)) <= {-1.0, 1.0}
    some = np.random.default_rng(width).permutation(width)[:64]
    assert np.array_equal(matrix[some] @ matrix.T, width * np.eye(width)[some])


def test_small_matrices_by_hand():
    assert hadamard_matrix(2).tolist() == [[1, 1], [1, -1]]
    assert hadamard_matrix(4).tolist() == [[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]
    squares = {1, 3, 4, 5, 9}  # modulo 11
    for i in range(11):
        for j in range(11):
            chi = 0 if i == j else 1 if (i - j) % 11 in squares else -1
            assert hadamard_matrix(12)[i + 1, j + 1] == chi + (i == j)
    assert (hadamard_matrix(12)[0] == 1).all() and (hadamard_matrix(12)[1:, 0] == -1).all()


@pytest.mark.parametrize("width", FACTORS)
def test_rotation_equals_the_explicit_matrix(width):
    base, power = FACTORS[width]
    matrix = np.kron(hadamard_matrix(base), hadamard_matrix(power)).astype(np.float64) / np.sqrt(width)
    x = np.random.default_rng(width).standard_normal((2, 3, width)).astype(np.float32)
    kept = x.copy()
    got = rotate(x)
    assert got.dtype == np.float32 and np.array_equal(x, kept)
    assert_close(got, x @ matrix.T, "rotation")
    assert_close(rotate(x[0, 0]), matrix @ x[0, 0], "rotation")
    assert_close(np.linalg.norm(got, axis=-1), np.linalg.norm(x, axis=-1), "rotation")
    assert_close(unrotate(x), x @ matrix, "rotation")
    assert_close(unrotate(got), x, "rotation")


def test_a_strided_view_and_no_rows():
    wide = np.random.default_rng(0).standard_normal((5, 2 * 384)).astype(np.float32)
    assert np.array_equal(rotate(wide[:, ::2]), rotate(wide[:, ::2].copy()))
    assert rotate(wide[:0, :384]).shape == (0, 384)


def test_an_outlier_is_spread_evenly():
    x = np.zeros(5120, np.float32)
    x[77] = 1000
    assert_close(np.abs(rotate(x)), np.full(5120, 1000 / np.sqrt(5120)), "rotation")


@pytest.mark.parametrize("width", [0, -4, 3, 28, 52, 100, 36, 5121])
def test_widths_without_a_hadamard_matrix_are_refused(width):
    with pytest.raises(InputError, match=f"width {width} has no Hadamard matrix here: expected a power of two, or"):
        hadamard_factors(width)


# Widths are 12 · 32 and 12 · 64, so that both factors of the rotations matter, and the transposed rotation differs.
CONFIG = MambaConfig(384, 2, 512, 768, 16, 4, 24, tied=True)
TOKENS = np.random.default_rng(0).integers(0, 512, 70).tolist()
each_backend = pytest.mark.parametrize("backend", [b for b in BACKENDS if b.device == "cpu"], ids=lambda b: b.name)
each_rotation = pytest.mark.parametrize("rotation", [r for r in ROTATIONS if r != "none"])


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return str(write_text_only(tmp_path_factory.mktemp("rotated") / "mamba-tiny", config=CONFIG))


@pytest.fixture(scope="module")
def exported(source, tmp_path_factory):
    """Return the bundle for a scheme and a rotation, exported on first use."""
    root = tmp_path_factory.mktemp("bundles")

    @functools.lru_cache
    def get(scheme, rotation):
        out = root / f"{scheme}-{rotation}"
        given = {"scheme": scheme, "rotation": rotation, "method": "rtn", "golden_lines": 2}
        export_bundle(source, target_named("cpu"), out, budget=budget_without_limits(root), **given)
        return Bundle.open(out)

    return get


def run(bundle, backend):
    """Read tokens at once, then one more; return the embeddings, the logits at every position, and the state."""
    decoder = backend.open(bundle, DecoderOptions(activations="float32"))
    state, embeddings = decoder.new_state(), decoder.embed(TOKENS)
    rows = decoder.forward(embeddings[:-1], state)
    return embeddings, np.concatenate([rows, decoder.step(TOKENS[-1], state)[None]]), state


def logits(bundle, backend):
    return run(bundle, backend)[1]


@each_backend
@each_rotation
@pytest.mark.parametrize("tied", [True, False])
def test_a_rotated_decoder_is_the_same_decoder(source, exported, backend, rotation, tied, tmp_path):
    """With float32 matrices only the order of sums differs; inputs and outputs are not rotated."""
    if not tied:
        config = MambaConfig(384, 2, 512, 768, 16, 4, 24, tied=False)
        source = str(write_text_only(tmp_path / "mamba-untied", config=config))
        export_bundle(source, target_named("cpu"), tmp_path / "untied", scheme="fp16", method="rtn", golden_lines=16)
    model = exported("fp16", "none") if tied else Bundle.open(tmp_path / "untied")
    assert model.manifest.model.mamba.tied == tied
    found = []
    for name in ("none", rotation):
        recipe = Recipe("fp16", "none", dict.fromkeys(model.manifest.recipe.tensors, "float32"), rotations=ROTATIONS[name])
        found.append(run(write_bundle(model, open_checkpoint(source), recipe, tmp_path / name), backend))
    (embeddings, truth, state), (own, got, after) = found
    assert_close(own, embeddings, "decoder")
    assert_close(got, truth, "decoder")
    assert_close(after.ssm, state.ssm, "decoder")
    assert_close(after.conv, state.conv, "decoder")


@each_backend
@each_rotation
def test_rotated_weights_are_rounded_anew(exported, backend, rotation):
    assert_close(logits(exported("fp16", rotation), backend), logits(exported("fp16", "none"), backend), "decoder", "float16")


@each_backend
@pytest.mark.parametrize("scheme", INT_SCHEMES)
def test_quantized_and_rotated_runs_on_every_backend(exported, backend, scheme):
    bundle = exported(scheme, "both")
    truth = next(b for b in BACKENDS if (b.name, b.device) == ("torch", "cpu"))
    assert_close(logits(bundle, backend), logits(bundle, truth), "decoder")


@each_rotation
@pytest.mark.parametrize("activations", ["float32", "int8"])
def test_cuts_and_threads_do_not_change_a_bit_of_a_rotated_decoder(exported, rotation, activations):
    """Rows are rotated by the thread that owns them, at input and output."""
    bundle = exported("w8a16-channel", rotation)  # activations are quantized by token, not by channel
    truth, states = None, []
    for threads in (1, 2, 3):
        decoder = CpuDecoder(bundle, DecoderOptions(threads, activations))
        state, embeddings = decoder.new_state(), decoder.embed(TOKENS)
        parts = [decoder.forward(part, state) for part in np.split(embeddings, [threads, 20 * threads])]
        truth = np.concatenate(parts) if truth is None else truth
        assert np.array_equal(np.concatenate(parts), truth)
        states.append(state)
        again = decoder.new_state()
        assert np.array_equal(decoder.prefill(embeddings, again), truth[-1])
        assert np.array_equal(again.ssm, states[0].ssm) and np.array_equal(again.conv, states[0].conv)


def test_rotation_comes_before_rounding_activations(exported, monkeypatch):
    """The inputs of out_proj and head are rotated, then quantized: the other way they would not be multiples of the scale."""
    seen = []
    real = numpy_reference.round_activations
    monkeypatch.setattr(numpy_reference, "round_activations", lambda x, *of: seen.append((x, real(x, *of))) or seen[-1][1])
    rotated = []
    monkeypatch.setattr(numpy_reference, "rotate", lambda x: rotated.append(rotate(x)) or rotated[-1])
    decoder = NumpyDecoder(exported("w4a16-g128", "both"), DecoderOptions(activations="int8"))
    decoder.prefill(decoder.embed([1, 2, 3]), decoder.new_state())
    assert len(rotated) == 1 + CONFIG.n_layer + 1  # embeddings, the input of every out_proj, that of the head
    assert all(any(x is r for x, _ in seen) for r in rotated[1:])
    assert len(rotated[-1]) == 1  # only the last position gets logits


@each_rotation
def test_the_manifest_the_gpu_and_inspect_say_so(exported, rotation, capfd):
    says = {
        "out-proj": "out_proj rotated by a Hadamard matrix",
        "residual": "residual stream rotated by a Hadamard matrix",
        "both": "residual stream and out_proj rotated by Hadamard matrices",
    }[rotation]
    bundle = exported("fp16", rotation)
    assert bundle.manifest.recipe.rotations == ROTATIONS[rotation]
    assert f"method none, {says}." in bundle.path(MODEL_CARD).read_text(encoding="utf-8")
    assert run_command(inspect.command, [str(bundle.directory)]) == 0
    assert f"recipe: fp16, none, {says}" in " ".join(capfd.readouterr().out.split())


def test_nothing_is_said_where_nothing_is_rotated(exported):
    plain = exported("w4a16-g128", "none")
    assert describe_rotations(plain.manifest.recipe) == "" and plain.manifest.recipe.rotations == ()
    assert "rotated" not in plain.path(MODEL_CARD).read_text(encoding="utf-8")


def test_a_manifest_without_rotations_has_none(exported, tmp_path):
    folder = shutil.copytree(exported("w4a16-g128", "none").directory, tmp_path / "old")
    manifest = json.loads((folder / MANIFEST).read_text())
    del manifest["recipe"]["rotations"]
    (folder / MANIFEST).write_text(json.dumps(manifest))
    assert Bundle.open(folder).manifest.recipe.rotations == ()


def test_export_takes_a_rotation(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = ["--target", "cpu", "--checkpoint", source, "--scheme", "fp16", "--golden-lines", "2"]
    given += ["--budget", str(budget_without_limits(tmp_path))]
    assert run_command(export.command, [*given, "--rotation", "both"]) == 0
    (made,) = (tmp_path / "bundles").iterdir()
    assert made.name == "mamba-tiny-cpu-fp16-rotated" and Bundle.open(made).manifest.recipe.rotations == (
        "residual",
        "out-proj",
    )


def test_a_rotation_that_cannot_be_is_refused(source, tmp_path, capfd):
    odd = str(write_text_only(tmp_path / "mamba-odd", config=MambaConfig(112, 2, 512, 112, 16, 4, 8)))
    given = ["--target", "cpu", "--scheme", "fp16", "--out", str(tmp_path / "out")]
    for checkpoint, rotation, says in (
        (odd, "out-proj", "out_proj's input cannot be rotated: width 112 has no Hadamard matrix"),
        (odd, "residual", "the residual stream cannot be rotated: width 112 has no Hadamard matrix"),
        (source, "in-proj", "--rotation: "),
    ):
        assert run_command(export.command, [*given, "--checkpoint", checkpoint, "--rotation", rotation]) == 2
        assert says in " ".join(capfd.readouterr().err.split()) and not (tmp_path / "out").exists()
    with pytest.raises(InputError, match="unknown rotation 'outproj'; did you mean 'out-proj'"):
        export_bundle(source, target_named("cpu"), tmp_path / "out", method="rtn", rotation="outproj")


@each_rotation
def test_a_manifest_with_a_rotation_that_cannot_be_is_refused(exported, rotation):
    recipe = exported("fp16", rotation).manifest.recipe
    with pytest.raises(InputError, match="cannot be rotated"):
        stored_tensors(MambaConfig(112, 2, 512, 112, 16, 4, 8), recipe)
