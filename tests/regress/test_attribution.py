"""Attribution: a fault is found where it was planted, and what nothing was taken from the build of does not drift."""

import shutil

import msgspec
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from cobra_edge.bundle.reader import DECODER, VISION, Bundle
from cobra_edge.decode.decoder import DecoderOptions
from cobra_edge.export.pipeline import export_bundle
from cobra_edge.formats.targets import target_named
from cobra_edge.inference.session import Session
from cobra_edge.inputs.image import load_image
from cobra_edge.model.checkpoint import open_checkpoint
from cobra_edge.regress.attribution import _float_decoder, _PartEvaluation, attribution
from cobra_edge.regress.baseline import open_baseline
from cobra_edge.regress.float_tensors import dense, float_tensors
from cobra_edge.suite.line import Line
from cobra_edge.suite.reader import HELDOUT, read_suite
from cobra_edge.suite.tokenized import tokenized_suite
from cobra_edge.vision.graph.emulation import open_emulated
from cobra_edge.vision.graph.split import open_split

from ..conftest import MINI, write_text_only
from ..tolerance import assert_close

ONE = DecoderOptions(threads=1)
BUILDS = {
    "plain": {"scheme": "w4a16-g128"},
    "rotated gptq": {"scheme": "w4a16-g128", "method": "gptq", "rotation": "both"},
    "awq": {"scheme": "w4a16-g128", "method": "awq"},
    "int8 activations": {"scheme": "w8a8"},
    "fp16": {"scheme": "fp16"},
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Return a function that exports a text-only checkpoint by name of a build; `tiny.source` is the checkpoint."""
    root = tmp_path_factory.mktemp("attribution")
    source, tokenized, made = write_text_only(root / "mamba-tiny"), root / "calibration.jsonl", {}
    lines = [Line(line.prompt, line.answer, line.task) for line in read_suite(HELDOUT)[::20]]
    tokenized.write_bytes(b"\n".join(map(msgspec.json.encode, lines)))

    def get(name):
        if name not in made:
            calibration = {"calibration": tokenized} if "method" in BUILDS[name] else {}
            given = {"golden_lines": 16, "method": "rtn", **calibration, **BUILDS[name]}
            made[name] = export_bundle(str(source), target_named("cpu"), root / name.replace(" ", "-"), **given).directory
        return made[name]

    get.source = str(source)
    return get


def opened(directory, baseline, lines=6):
    """Return a session, its baseline, and a suite of some held-out lines, without images where the model sees none."""
    bundle = Bundle.open(directory)
    session = Session(bundle, options=ONE)
    codec, template = bundle.text()
    sees = bundle.manifest.model.vision is not None
    numbered = list(enumerate(read_suite(HELDOUT)[: lines * 20 : 20], 1))
    suite = tokenized_suite("s", numbered, HELDOUT.parent.joinpath, codec, template, sees=sees, skipped={})
    return session, open_baseline(str(baseline), bundle, lambda other: Session(other, options=ONE)), suite


def named(found):
    return {part.name: part for part in (*found.parts, *found.layers, *found.tensors)}


@pytest.mark.parametrize("name", ["plain", "rotated gptq", "awq", "int8 activations"])
@pytest.mark.parametrize("baseline", ["checkpoint", "fp16"])
def test_the_baselines_tensors_in_the_builds_form_are_the_baseline(tiny, name, baseline):
    """Folded, rotated and scaled as the build's: with nothing of the build put in, nothing drifts."""
    session, reference, suite = opened(tiny(name), tiny.source if baseline == "checkpoint" else tiny("fp16"))
    decoder, tensors, why = _float_decoder(session, reference)
    assert why == "" and all(value.dtype == np.float32 for value in tensors.values())
    found = _PartEvaluation(suite, list(reference.predictions(suite, 0))).part("float", decoder, [None] * len(suite.lines))
    assert found.kld_mean < 1e-6 and found.top1_agreement == 1
    build = session.bundle.decoder_tensors()
    off = {n: np.square(dense(build[n]) - tensors[n]).sum() / np.square(tensors[n]).sum() for n in tensors}
    assert max(off.values()) < 0.2**2, off  # each is what the build's was rounded from


@pytest.mark.parametrize("name", ["plain", "rotated gptq", "awq", "int8 activations"])
def test_a_fault_is_found_where_it_was_planted(tiny, tmp_path, name):
    fault = "backbone.layers.1.mixer.in_proj.weight"
    broken = shutil.copytree(tiny(name), tmp_path / "broken")
    tensors = load_file(broken / DECODER)
    tensors[f"{fault}.scales"] = (tensors[f"{fault}.scales"].astype(np.float32) * 3).astype(tensors[f"{fault}.scales"].dtype)
    save_file(tensors, broken / DECODER)
    session, reference, suite = opened(tiny(name), tiny.source)
    whole = attribution(session, reference, suite, ONE)
    bundle = Bundle(broken, session.bundle.manifest)
    found = attribution(Session(bundle, options=ONE), reference, suite, ONE)
    assert found.lines == 6 and len(found.layers) == 2
    assert found.layers[0].name == "layer 1" and found.tensors[0].name == fault
    assert found.layers[0].kld_mean > 3 * found.layers[1].kld_mean and found.tensors[0].kld_mean > 3 * found.tensors[1].kld_mean
    before, after = named(whole), named(found)
    assert after["layer 0"] == before["layer 0"] and after["layer 1"].kld_mean > 3 * before["layer 1"].kld_mean
    assert after["everything"] == msgspec.structs.replace(after["decoder"], name="everything")  # nothing is seen
    klds = [part.kld_mean for part in found.tensors]
    assert klds == sorted(klds, reverse=True)


def test_rounded_activations_are_a_part(tiny):
    session, reference, suite = opened(tiny("int8 activations"), tiny.source)
    parts = named(attribution(session, reference, suite, ONE))
    assert 0 < parts["decoder, float activations"].kld_mean < parts["decoder"].kld_mean
    session, reference, suite = opened(tiny("plain"), tiny.source)
    assert "decoder, float activations" not in named(attribution(session, reference, suite, ONE))


def test_golden_lines_have_no_layers_to_try(tiny_bundle):
    bundle = Bundle.open(tiny_bundle)
    session, reference = Session(bundle, options=ONE), open_baseline("fp16", bundle, Session)
    found = attribution(session, reference, reference.golden.suite, ONE)
    assert [part.name for part in found.parts] == ["everything", "decoder", "layers and tensors"]
    assert found.parts[0].kld_mean > 0 and found.layers == found.tensors == ()
    last = found.parts[-1]
    assert last.kld_mean is None and last.note == (
        "golden lines contain no weights; give --baseline with the checkpoint or an fp16 bundle"
    )


def test_a_rotated_baseline_has_none_either(tiny):
    session, reference, suite = opened(tiny("plain"), tiny("rotated gptq"))
    found = attribution(session, reference, suite, ONE)
    assert (
        found.layers == ()
        and "rotated or scaled; give --baseline with the checkpoint or a plain fp16 bundle" in found.parts[-1].note
    )


def test_float_tensors_of_a_plain_build_are_the_models_own(tiny):
    bundle = Bundle.open(tiny("plain"))
    weights = open_checkpoint(tiny.source).decoder
    found = float_tensors(bundle, bundle.decoder_tensors(), lambda name: weights[name].float().numpy())
    assert set(found) == set(bundle.decoder_tensors())
    for name in ("backbone.embedding.weight", "backbone.layers.1.mixer.out_proj.weight"):
        assert np.array_equal(found[name], weights[name].numpy())


# --- vision -------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def narrow(mini_bundle):
    """Return an fp16 bundle whose vision graph is int8: all drift is the graph's."""
    return mini_bundle("fp16", vision_precision="int8")


@pytest.mark.parametrize("baseline", ["checkpoint", "bundle"])
def test_drift_of_vision_is_found_in_vision(narrow, mini_bundle, baseline):
    session, reference, suite = opened(narrow, "mini" if baseline == "checkpoint" else mini_bundle("fp16"), lines=8)
    parts = named(attribution(session, reference, suite, ONE))
    assert parts["decoder"].kld_mean < 1e-9 < parts["vision tower and projector"].kld_mean
    assert parts["everything"].kld_mean == pytest.approx(parts["vision tower and projector"].kld_mean, rel=0.2)
    alone = [parts[name].kld_mean for name in ("vision tower", "projector")]
    assert all(0 < kld < 3 * parts["everything"].kld_mean for kld in alone) and max(alone) > 0.1 * parts["everything"].kld_mean


def test_golden_lines_cannot_tell_vision_from_the_decoder_s_weights(narrow):
    bundle = Bundle.open(narrow)
    reference = open_baseline("fp16", bundle, Session)
    found = named(attribution(Session(bundle, options=ONE), reference, reference.golden.suite.part(4), ONE))
    assert found["decoder"].kld_mean < 1e-8 < found["everything"].kld_mean
    assert (
        found["vision tower and projector"].kld_mean is None
        and "contain no weights" in found["vision tower and projector"].note
    )


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_both_parts_are_the_graph(narrow, mini_bundle, precision):
    """As a device computes it: sixteen-bit graphs emulated, also where the CPU would run them wider."""
    bundle = Bundle.open(mini_bundle("fp16") if precision == "fp16" else narrow)
    pixels = bundle.image().pixels(load_image(MINI / "demo.png"))
    whole = open_emulated(bundle.path(VISION), bundle.manifest.model, bundle.manifest.vision).embed(pixels)
    with open_split(bundle) as split:
        features = split.features(pixels)
        assert len(features) == 2 and all(f.ndim == 3 for f in features)
        found = split.projected(features)
        doubled = split.projected([2 * f for f in features])
    assert_close(found, whole.reshape(found.shape), "onnx")
    assert not np.allclose(doubled, found, rtol=0.1)
