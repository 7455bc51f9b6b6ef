"""What an export is refused for is refused before its first stage; what it takes is listed."""

import json

import msgspec
import pytest
import torch
from safetensors.torch import load_file, save_file

from cobra_edge import sensitivity
from cobra_edge.bench.random_export import budget_without_limits
from cobra_edge.bundle.reader import MODEL_CARD, Bundle
from cobra_edge.calibrate import command as calibrate
from cobra_edge.export import command as export_module
from cobra_edge.export import pipeline as assemble
from cobra_edge.formats.method import METHODS
from cobra_edge.formats.quality import DEFAULT_QUALITY, QUALITIES
from cobra_edge.formats.recipe import ROTATIONS
from cobra_edge.formats.scheme import SCHEMES
from cobra_edge.formats.targets import targets
from cobra_edge.model.backbones import VISION_BACKBONES
from cobra_edge.model.checkpoint import open_checkpoint
from cobra_edge.quantize.sensitivity import Sensitivity, write_sensitivity
from cobra_edge.terminal.output import run_command

from ..conftest import MINI

PLAIN = ["--quality", "fast", "--scheme", "w8a16-g128", "--vision-precision", "fp32"]


@pytest.fixture
def export(tmp_path, capfd, monkeypatch):
    """Run an export of cobra-mini that must not begin: (exit code, stderr on one line)."""
    for stage in ("staged_directory", "write_vision"):
        monkeypatch.setattr(assemble, stage, lambda *_, **__: pytest.fail("the first stage began"))

    def run(*arguments, source="mini"):
        given = ["--target", "cpu", "--checkpoint", str(source), "--out", str(tmp_path / "out" / "b"), *map(str, arguments)]
        code = run_command(export_module.command, given)
        assert not (tmp_path / "out").exists()
        return code, " ".join(capfd.readouterr().err.split())

    return run


@pytest.fixture
def statistics(text_only, tmp_path, capfd):
    """Statistics of another model."""
    file, data = tmp_path / "statistics.safetensors", tmp_path / "few.jsonl"
    data.write_text('{"prompt": "Who?", "answer": "I.", "task": "text"}\n')
    assert run_command(calibrate.command, ["--checkpoint", str(text_only), "--data", str(data), "--out", str(file)]) == 0
    capfd.readouterr()
    return file


def test_files_of_another_model_are_refused_before_any_stage(export, statistics, tmp_path):
    code, err = export("--method", "gptq", "--statistics", statistics)
    assert code == 2 and "statistics of another model: mamba-tiny" in err
    header = {"schema_version": 1, "cobra_edge": "0", "model_id": "other", "model_sha256": "abc", "lines": 1, "positions": 1}
    choices = {"method": "rtn", "rotations": (), "activations": "float32", "activation_percentile": None, "kld": {}}
    write_sensitivity(Sensitivity(**header, **choices), tmp_path / "s.json")
    code, err = export("--method", "rtn", "--bits", "4.3", "--sensitivity", tmp_path / "s.json")
    assert code == 2 and "sensitivities of another model: other" in err
    ours = {"model_sha256": open_checkpoint("mini").sha256(), "activations": "float32"}
    write_sensitivity(Sensitivity(**header | ours, **{k: v for k, v in choices.items() if k not in ours}), tmp_path / "s.json")
    code, err = export("--method", "rtn", "--bits", "4.3", "--sensitivity", tmp_path / "s.json")
    assert code == 2 and "scanned with activations 'float32', this export has 'int8'" in err
    code, err = export("--method", "rtn", "--bits", "4.3", "--activations", "float32", "--sensitivity", tmp_path / "s.json")
    assert code == 2 and "has 0 matrices" in err


def test_data_that_cannot_be_read_are_refused_before_any_stage(export, tmp_path):
    data = tmp_path / "d.jsonl"
    data.write_text('{"answer": "I."}\n')
    code, err = export("--method", "gptq", "--calibration", data)
    assert code == 2 and "d.jsonl, line 1" in err
    data.write_text('{"prompt": "Who?", "answer": "I.", "task": "text"}\n')
    code, err = export("--vision-precision", "int8", "--calibration", data)
    assert code == 2 and "calibrated on images, the suite has none" in err


def test_encoders_that_do_not_fit_are_refused_before_any_stage(export, run_directory, tmp_path):
    source = run_directory.write(tmp_path / "run")
    (source / "tokenizer.json").write_bytes((MINI / "tokenizer.json").read_bytes())
    code, err = export(source=source)
    assert code == 2 and "not on a hub" in err and "--vision-weights" in err
    code, err = export("--vision-weights", tmp_path, source=source)
    assert code == 2 and "vit_small_patch14_reg4_dinov2.lvd142m.safetensors not found" in err


def test_every_choice_is_listed(capfd):
    assert run_command(export_module.command, ["--list"]) == 0
    said = capfd.readouterr().out
    assert run_command(export_module.command, ["--list", "--json"]) == 0
    listed = json.loads(capfd.readouterr().out)
    assert {t["name"] for t in listed["targets"]} == set(targets())
    assert {t["default_of"] for t in listed["targets"]} >= {"jetson"}
    assert [s["name"] for s in listed["schemes"]] == list(SCHEMES)
    assert (list(listed["methods"]), list(listed["rotations"])) == (list(METHODS), list(ROTATIONS))
    assert list(listed["qualities"]) == list(QUALITIES) and DEFAULT_QUALITY in QUALITIES
    assert listed["checkpoints"] == ["mini", "cobra+3b", "Cobra-DINOSigLIP 3B"]
    for name in (*targets(), *SCHEMES, *QUALITIES, *METHODS, *ROTATIONS):
        assert f" {name} " in said
    assert run_command(export_module.command, []) == 2
    err = capfd.readouterr().err
    assert "Missing option '--target'" in err and "--list" in err


def test_a_scan_refuses_what_it_would_not_look_at(text_only, statistics, tmp_path, capfd):
    given = ["--checkpoint", str(text_only), "--out", str(tmp_path / "s.json"), "--method", "rtn"]
    assert run_command(sensitivity.command, [*given, "--statistics", str(statistics)]) == 2
    assert "method rtn uses no statistics" in " ".join(capfd.readouterr().err.split())
    assert run_command(sensitivity.command, [*given, "--vision-weights", str(MINI / "vision")]) == 2
    assert "text-only model without vision; omit --vision-weights" in " ".join(capfd.readouterr().err.split())
    assert run_command(sensitivity.command, [*given, "--calibration", "/nowhere.jsonl"]) == 2
    assert "cannot be read" in " ".join(capfd.readouterr().err.split()) and not (tmp_path / "s.json").exists()


def test_encoders_that_were_trained_along_make_the_graph(run_directory, tmp_path, capfd):
    """A full finetune of cobra-mini: its graph is that of torch with the checkpoint's encoders, and the bundle says so."""
    mini = open_checkpoint("mini")
    names = [f"{e.timm_name}.safetensors" for e in VISION_BACKBONES["dinosiglip-vit-mini-112px"].encoders]
    towers = zip(("dino", "siglip"), (load_file(MINI / "vision" / name) for name in names), strict=True)
    tower = {f"{family}_featurizer.{k}": v for family, tensors in towers for k, v in tensors.items()}
    tower["dino_featurizer.patch_embed.proj.weight"] *= 0.5
    run_directory.decoder, run_directory.projector = dict(mini.decoder), dict(mini.projector)
    run_directory.config["stage"] = "full-finetune"
    source = run_directory.write(tmp_path / "run")
    (source / "tokenizer.json").write_bytes((MINI / "tokenizer.json").read_bytes())
    file = source / "checkpoints" / "latest-checkpoint.pt"
    parts = torch.load(file, weights_only=True)["model"]
    torch.save({"model": parts | {"vision_backbone": tower}}, file)
    out = tmp_path / "b"
    given = ["--target", "cpu", "--checkpoint", str(source), *PLAIN, "--golden-lines", "2", "--out", str(out)]
    given += ["--budget", str(budget_without_limits(tmp_path))]
    assert run_command(export_module.command, given) == 0
    bundle = Bundle.open(out)
    assert bundle.manifest.source.vision == "checkpoint" and bundle.manifest.vision.parity["encoder 0"] < 1e-4
    assert "vision weights: the checkpoint's own" in capfd.readouterr().err
    assert "Vision weights: the checkpoint's own" in bundle.path(MODEL_CARD).read_text(encoding="utf-8")


def test_bundles_from_before_the_source_of_vision_was_written_open(tiny_bundle):
    manifest = json.loads((tiny_bundle / "manifest.json").read_text())
    del manifest["source"]["vision"]
    assert msgspec.convert(manifest, type(Bundle.open(tiny_bundle).manifest)).source.vision is None


def test_a_clip_like_encoder_is_exported(run_directory, tmp_path, capfd, monkeypatch):
    """A class token, a norm before the blocks, quick GELU: the graph is that of torch."""
    from cobra_edge.formats.model_config import VisionConfig
    from cobra_edge.model.vision import VisionTower

    clip = VISION_BACKBONES["clip-vit-b"].encoders[0]
    sizes = {"embed_dim": 64, "depth": 3, "num_heads": 2}
    small = msgspec.structs.replace(clip, embed_dim=64, depth=3, overrides=clip.overrides | sizes)
    vision = VisionConfig("clip-mini", (small,), 112)
    monkeypatch.setitem(VISION_BACKBONES, "clip-mini", vision)
    run_directory.config["model"] |= {"vision_backbone_id": "clip-mini", "arch_specifier": "no-align-linear"}
    run_directory.projector = {"projector.weight": torch.randn(256, 64) / 8, "projector.bias": torch.zeros(256)}
    source = run_directory.write(tmp_path / "run")
    (source / "tokenizer.json").write_bytes((MINI / "tokenizer.json").read_bytes())
    (source / "vision").mkdir()
    torch.manual_seed(0)
    save_file(VisionTower(vision).encoders[0].vit.state_dict(), source / "vision" / f"{small.timm_name}.safetensors")
    given = ["--target", "cpu", "--checkpoint", str(source), *PLAIN, "--golden-lines", "16", "--scheme", "fp16"]
    assert run_command(export_module.command, [*given, "--out", str(tmp_path / "b"), "--json"]) in (0, 1)
    graph = json.loads(capfd.readouterr().out)["manifest"]["vision"]
    assert graph["parity"]["projector"] < 1e-4
