"""What an export chooses where no flag does, and what it departs from where the drift would exceed the budget."""

from types import SimpleNamespace

import msgspec
import pytest

from cobra_edge.bundle.manifest import Drift, VisionGraph
from cobra_edge.bundle.reader import Bundle
from cobra_edge.errors import InputError
from cobra_edge.export.fallbacks import measured_within_budget
from cobra_edge.export.memory_plan import plan_memory
from cobra_edge.export.options import ExportOptions, choose
from cobra_edge.export.pipeline import export_bundle
from cobra_edge.export.plan import plan_export
from cobra_edge.formats.model_config import MambaConfig
from cobra_edge.formats.recipe import matrix_weights
from cobra_edge.formats.targets import target_named, targets
from cobra_edge.quantize.bit_allocation import least_bits
from cobra_edge.regress.budget import Limit

from ..conftest import write_text_only

CPU, JETSON = target_named("cpu"), target_named("jetson")
LINES = [{"prompt": f"What is {n}?", "answer": f"It is {n}.", "task": "text"} for n in range(8)]


@pytest.mark.parametrize(
    ("given", "method", "rotation", "bits", "scheme"),
    [
        ({}, "guided", "out-proj", JETSON.bits, JETSON.scheme),
        ({"quality": "balanced"}, "gptq", "out-proj", None, JETSON.scheme),
        ({"quality": "fast"}, "rtn", "none", None, JETSON.scheme),
        ({"bits": 3.5}, "guided", "out-proj", 3.5, JETSON.scheme),
        ({"scheme": "w8a16-g128"}, "guided", "out-proj", None, "w8a16-g128"),
        ({"rotation": "none"}, "guided", "none", JETSON.bits, JETSON.scheme),
        ({"method": "gptq"}, "gptq", "none", None, JETSON.scheme),
        ({"method": "rtn", "bits": 4.0, "rotation": "both"}, "rtn", "both", 4.0, JETSON.scheme),
        ({"scheme": "fp16"}, "rtn", "none", None, "fp16"),
        ({"scheme": "bnb-nf4", "quality": "fast"}, "rtn", "none", None, "bnb-nf4"),
    ],
)
def test_flags_replace_what_the_quality_chooses(given, method, rotation, bits, scheme):
    found = choose(ExportOptions(**given), JETSON)
    assert (found.method, found.rotation, found.bits, found.scheme) == (method, rotation, bits, scheme)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"quality": "best", "method": "gptq"}, "--quality best chooses the method, --method gptq does too"),
        ({"quality": "best", "scheme": "fp16"}, "--quality best: no method applies to fp16"),
        ({"quality": "finest"}, "unknown quality 'finest'"),
    ],
)
def test_a_quality_without_effect_is_refused(given, says):
    with pytest.raises(InputError, match=says):
        choose(ExportOptions(**given), JETSON)


def test_a_cpu_rounds_activations_and_vision_and_a_gpu_does_not():
    assert (CPU.scheme, CPU.vision_precision) == ("w4a8", "int8")
    assert all(t.scheme == "w4a16-g128" and t.vision_precision == "fp16" for t in targets().values() if t is not CPU)


@pytest.fixture
def plan():
    """Return a plan whose budget allows a KLD of 1e-3."""
    return SimpleNamespace(options=ExportOptions(), precision="int8", limits=lambda _: {"kld_mean": Limit(max=1e-3)})


@pytest.fixture
def draft(tiny_bundle):
    """Return a manifest with both kinds of int8."""
    manifest = Bundle.open(tiny_bundle).manifest
    recipe = msgspec.structs.replace(manifest.recipe, activations="int8")
    return msgspec.structs.replace(manifest, recipe=recipe, vision=VisionGraph("int8"))


@pytest.mark.parametrize(
    ("beyond", "given", "ends_as", "tells"),
    [
        (set(), {}, ("int8", "int8"), []),
        ({("int8", "int8")}, {}, ("float32", "int8"), ["with int8 activations"]),
        ({("int8", "int8"), ("float32", "int8")}, {}, ("float32", "fp32"), ["with int8 activations", "with int8 vision"]),
        ({("int8", "int8")}, {"activations": "int8"}, ("int8", "fp32"), ["with int8 vision"]),
        ({("int8", "int8")}, {"scheme": "w4a8", "vision_precision": "int8"}, ("int8", "int8"), []),
    ],
)
def test_int8_that_no_flag_asked_for_gives_way_to_the_budget(plan, draft, capfd, beyond, given, ends_as, tells):
    plan.options = ExportOptions(**given)

    def state(manifest):
        return manifest.recipe.activations, manifest.vision.precision

    def measure(manifest):
        return Drift("native", "onnxruntime", 1, 1, {"kld_mean": 2e-3 if state(manifest) in beyond else 1e-4})

    def with_vision(manifest, precision):
        return msgspec.structs.replace(manifest, vision=VisionGraph(precision))

    found = measured_within_budget(plan, draft, measure, with_vision)
    assert state(found.draft) == ends_as and bool(found.exceeded()) == (ends_as in beyond)
    said = capfd.readouterr().err.split("beyond the drift budget ")[1:]
    assert len(said) == len(tells) and all(text.startswith(what) for text, what in zip(said, tells, strict=True))


def test_what_a_model_cannot_have_is_replaced_and_said(tmp_path, capfd):
    """Width 112 has no Hadamard matrix and fits no scheme of 4 bits."""
    odd = write_text_only(tmp_path / "mamba-odd", config=MambaConfig(112, 2, 512, 112, 16, 4, 8))
    suite, budget = tmp_path / "suite.jsonl", tmp_path / "budget.toml"
    suite.write_bytes(b"\n".join(map(msgspec.json.encode, LINES)))
    budget.write_text("[schemes.mixed]\n")
    found = export_bundle(str(odd), CPU, tmp_path / "b", calibration=suite, budget=budget, golden_lines=16)
    recipe, said = found.manifest.recipe, " ".join(capfd.readouterr().err.split())
    assert (recipe.method, recipe.rotations) == ("guided", ())
    assert "width 112 has no Hadamard matrix" in said and "this model needs" in said
    assert found.allocation.bits_per_weight > CPU.bits


def test_the_directory_is_named_after_the_quality(text_only, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = export_bundle(str(text_only), CPU, quality="fast", golden_lines=16)
    assert found.directory.name == "mamba-tiny-cpu-fast"


def test_a_budget_that_a_target_has_no_memory_for_is_refused_before_any_work(text_only, tmp_path):
    """The smallest recipe would fit; what the bits allow does not."""
    checkpoint, plan = plan_export(str(text_only), CPU, tmp_path / "b", ExportOptions(bits=5.0, golden_lines=16))
    config = checkpoint.config.mamba
    smallest, room = plan_memory(checkpoint.config, plan.recipe, CPU).total_bytes, 8.0 - least_bits(config, plan.recipe)
    small = msgspec.structs.replace(CPU, memory_gb=(smallest + room * matrix_weights(config) / 16) / 1e9)
    plan_export(str(text_only), small, tmp_path / "b", ExportOptions(bits=5.0, golden_lines=16))
    with pytest.raises(InputError, match="mamba-tiny as mixed does not fit"):
        plan_export(str(text_only), small, tmp_path / "b", ExportOptions(bits=8.0, golden_lines=16))
