"""Sizes from a manifest are bounded before anything is allocated: a small bundle takes little memory."""

import subprocess
import sys

import msgspec
import numpy as np
import pytest

from cobra_edge.bundle.reader import DECODER, GOLDEN, MANIFEST, PROMPT, TOKENIZER, Bundle, file_entries
from cobra_edge.decode.backends import BACKENDS
from cobra_edge.errors import InputError
from cobra_edge.formats import hadamard
from cobra_edge.formats.hadamard import LARGEST_PALEY_ORDER, LARGEST_WRITTEN_OUT, hadamard_factors, hadamard_matrix
from cobra_edge.formats.model_config import EncoderConfig, MambaConfig, VisionConfig
from cobra_edge.formats.recipe import Recipe, stored_tensors
from cobra_edge.formats.safetensors_file import SafetensorsWriter
from cobra_edge.inference.session import load
from cobra_edge.regress import predictions
from cobra_edge.suite.line import Line
from cobra_edge.suite.tokenized import TokenizedLine

# Orders of Paley matrices that would take 0.4 MB to 17 GB.
PALEY = (312, 648, 16364, 65520)


@pytest.mark.parametrize("width", [*PALEY, 2 * 312])
def test_a_paley_matrix_is_no_larger_than_published_models_need(width, monkeypatch):
    monkeypatch.setattr(hadamard, "_paley", lambda order: pytest.fail(f"made a matrix of order {order}"))
    with pytest.raises(InputError, match=f"at most {LARGEST_PALEY_ORDER} with q prime"):
        hadamard_matrix(width)
    config = MambaConfig(8, 1, 8, width, 1, 2, 1)
    with pytest.raises(InputError, match="out_proj's input cannot be rotated: width"):
        stored_tensors(config, Recipe("fp16", "none", {}, rotations=("out-proj",)))


def test_a_matrix_is_not_written_out_however_wide(monkeypatch):
    monkeypatch.setattr(np, "kron", lambda *_: pytest.fail("began to write it out"))
    for order in (2 * LARGEST_WRITTEN_OUT, 65536):
        assert hadamard_factors(order) == (1, order)
        with pytest.raises(InputError, match=rf"order {order} would take .* GB, the limit is order {LARGEST_WRITTEN_OUT}"):
            hadamard_matrix(order)


def wide_bundle(folder, config, rotations):
    """Write a bundle with a decoder of zeros and ones, the demo's tokenizer and trivial golden lines."""
    tiny = Bundle.open(folder.parent / "tiny")
    folder.mkdir()
    recipe = Recipe("fp16", "none", dict.fromkeys(tiny.manifest.recipe.tensors, "float16"), rotations=rotations)
    plan = [t for entries in stored_tensors(config, recipe).values() for t in entries]
    with SafetensorsWriter(folder / DECODER, plan) as writer:
        for t in plan:
            writer.write(t.name, np.zeros(t.shape, t.dtype))
    for name in (TOKENIZER, PROMPT, GOLDEN):
        (folder / name).write_bytes(tiny.path(name).read_bytes())
    model = msgspec.structs.replace(tiny.manifest.model, mamba=config)
    manifest = msgspec.structs.replace(tiny.manifest, model=model, recipe=recipe, files=file_entries(folder))
    (folder / MANIFEST).write_bytes(msgspec.json.encode(manifest))
    return folder


READ = """
import resource, sys
from cobra_edge.bundle.reader import Bundle
from cobra_edge.decode.backends import open_decoder
from cobra_edge.errors import CobraEdgeError
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    decoder = open_decoder(Bundle.open(sys.argv[1]), "cpu", sys.argv[2])
    decoder.step(3, decoder.new_state())
except CobraEdgeError as error:
    print("refused", str(error)[:60], file=sys.stderr)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.parametrize("kernels", ["native", "numpy", "torch"])
def test_a_wide_rotation_takes_memory_in_proportion(tiny_bundle, tmp_path, kernels):
    """For d_inner 65,536 a materialized R would take 17 GB. The bundle has 3 MB, its activations of 128 tokens some 130 MB."""
    (tmp_path / "tiny").symlink_to(tiny_bundle)
    config = MambaConfig(8, 1, 512, 65536, 1, 2, 1)
    folder = wide_bundle(tmp_path / "wide", config, ("residual", "out-proj"))
    assert sum(f.stat().st_size for f in folder.iterdir()) < 8 << 20
    child = subprocess.run([sys.executable, "-c", READ, folder, kernels], capture_output=True, text=True, check=True)
    assert int(child.stdout) < 400 << 10, child  # KiB
    assert ("materializes rotations" in child.stderr or "refused" in child.stderr) == (kernels == "torch")


def test_what_torch_would_write_out_is_refused_by_its_row(tiny_bundle, tmp_path):
    (tmp_path / "tiny").symlink_to(tiny_bundle)
    bundle = Bundle.open(wide_bundle(tmp_path / "wide", MambaConfig(8, 1, 512, 16384, 1, 2, 1), ("out-proj",)))
    for backend in BACKENDS:
        if backend.name == "torch":
            assert "one of 16384 channels is too large" in backend.refuses(bundle)
    plain = Bundle.open(wide_bundle(tmp_path / "plain", MambaConfig(8, 1, 512, 16384, 1, 2, 1), ()))
    assert all(b.refuses(plain) is None for b in BACKENDS if (b.name, b.device) == ("torch", "cpu"))


ENCODER = EncoderConfig("vit", 128, 14, 5, 0, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("embed_dim", 0),
        ("embed_dim", 2**40),
        ("patch_size", 0),
        ("depth", 0),
        ("depth", 10**9),
        ("n_prefix", -1),
        ("n_prefix", 2**60),
    ],
)
def test_an_encoder_that_cannot_be(field, value):
    with pytest.raises(InputError, match=f"{field} is {value}, expected"):
        VisionConfig("v", (msgspec.structs.replace(ENCODER, **{field: value}),), 112)


def test_more_patches_than_any_model_has():
    with pytest.raises(InputError, match="16777216 patches per image"):
        VisionConfig("v", (msgspec.structs.replace(ENCODER, patch_size=1),), 4096)
    with pytest.raises(InputError, match="in patches of 113"):
        VisionConfig("v", (msgspec.structs.replace(ENCODER, patch_size=113),), 112)


def test_a_line_whose_logits_would_fill_the_memory(tiny_bundle, monkeypatch):
    session = load(tiny_bundle)
    monkeypatch.setattr(predictions, "_MAX_LOGITS", 512 * 9)
    for n, refused in ((8, False), (9, True)):
        asked = TokenizedLine(7, Line("q", "a", "t"), tuple(range(n)), [5, session.codec.end_id], None)
        if refused:
            with pytest.raises(InputError, match="line 7: 10 tokens with logits over a vocabulary of 512; the limit is 9"):
                predictions.read_line(session, asked, None, session.decoder.new_state())
        else:
            assert len(predictions.read_line(session, asked, None, session.decoder.new_state()).log_probs) == 9
