"""Checkpoints: every supported layout, and every refusal."""

import errno
import json
import os
import pickle
import subprocess
import sys
import zipfile

import pytest
import torch
from safetensors.torch import save_file

from cobra_edge.errors import CheckpointError, InputError, MachineError
from cobra_edge.formats.model_config import MambaConfig, decoder_shapes, projector_shapes
from cobra_edge.model.backbones import LANGUAGE_BACKBONES, LanguageBackbone
from cobra_edge.model.checkpoint import open_checkpoint

from ..conftest import MINI_MAMBA, TINY_MAMBA, RunDirectory, random_tensors, write_text_only


def test_names_are_those_of_the_published_checkpoint():
    published = MambaConfig(2560, 64, 50280, 5120, 16, 4, 160)
    assert abs(published.n_parameters - 2.768e9) < 1e7
    mixer = "in_proj.weight conv1d.weight conv1d.bias x_proj.weight dt_proj.weight dt_proj.bias A_log D out_proj.weight"
    expected = {"backbone.embedding.weight", "backbone.norm_f.weight"}
    for i in range(64):
        expected.add(f"backbone.layers.{i}.norm.weight")
        expected |= {f"backbone.layers.{i}.mixer.{name}" for name in mixer.split()}
    assert set(decoder_shapes(published)) == expected
    projector = projector_shapes("fused-gelu-mlp", 2176, 2560)
    assert set(projector) == {f"projector.{i}.{part}" for i in (0, 2, 4) for part in ("weight", "bias")}
    assert projector["projector.0.weight"] == (8704, 2176)
    assert "projector.4.peg.0.weight" in projector_shapes("fused-ldpnet", 2176, 2560)


def test_original_run_directory(run_directory, tmp_path):
    opened = open_checkpoint(str(run_directory.write(tmp_path / "run")))
    assert opened.config.mamba == MINI_MAMBA
    assert opened.config.projector == "fused-gelu-mlp"
    assert (opened.config.n_visual_tokens, opened.config.max_length, opened.config.prompt_style) == (64, 256, "zephyr")
    assert torch.equal(opened.decoder["backbone.norm_f.weight"], run_directory.decoder["backbone.norm_f.weight"])


def test_safetensors_is_the_same(run_directory, tmp_path):
    pickled = open_checkpoint(str(run_directory.write(tmp_path / "run")))
    other = tmp_path / "other" / "checkpoints"
    other.mkdir(parents=True)
    (tmp_path / "other" / "config.json").write_text(json.dumps(run_directory.config))
    flat = {f"llm_backbone.llm.{k}": v for k, v in run_directory.decoder.items()}
    flat |= {f"projector.{k}": v for k, v in run_directory.projector.items()}
    save_file(flat, other / "latest-checkpoint.safetensors")
    opened = open_checkpoint(str(tmp_path / "other"))
    assert opened.config == pickled.config
    assert all(torch.equal(v, opened.decoder[k]) for k, v in pickled.decoder.items())


@pytest.mark.parametrize(
    ("kind", "backbone", "width", "n_visual_tokens"),
    [
        ("linear", "dinosiglip-vit-mini-112px", 256, 64),
        ("gelu-mlp", "dinosiglip-vit-mini-112px", 256, 64),
        ("fused-gelu-mlp", "dinosiglip-vit-mini-112px", 256, 64),
        ("fused-ldpnet", "siglip-vit-so400m-384px", 1152, 196),
    ],
)
def test_every_projector_opens(run_directory, tmp_path, kind, backbone, width, n_visual_tokens):
    run_directory.config["model"] |= {"arch_specifier": kind, "vision_backbone_id": backbone}
    run_directory.projector = random_tensors(projector_shapes(kind, width, 256))
    opened = open_checkpoint(str(run_directory.write(tmp_path / "run")))
    assert opened.config.projector == kind
    assert opened.config.n_visual_tokens == n_visual_tokens


def test_a_tower_of_few_patches_is_pooled_to_half_of_their_grid(run_directory, tmp_path):
    run_directory.config["model"]["arch_specifier"] = "no-align+fused-ldpnet"
    run_directory.projector = random_tensors(projector_shapes("fused-ldpnet", 256, 256))
    assert open_checkpoint(str(run_directory.write(tmp_path / "run"))).config.n_visual_tokens == 16


def test_bare_mamba_in_both_layouts(text_only, tmp_path):
    from transformers import MambaConfig as TheirConfig
    from transformers import MambaForCausalLM

    assert open_checkpoint(str(text_only)).config.mamba == TINY_MAMBA
    theirs = TheirConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, layer_norm_epsilon=1e-6)
    MambaForCausalLM(theirs).save_pretrained(tmp_path / "hf")
    opened = open_checkpoint(str(tmp_path / "hf"))
    assert (opened.config.mamba.d_inner, opened.config.mamba.tied, opened.config.mamba.norm_eps) == (64, True, 1e-6)
    assert opened.config.vision is None and opened.config.n_visual_tokens == 0


def test_an_untied_head_is_noticed(run_directory, tmp_path):
    source = run_directory.write(tmp_path / "run")
    file = source / "checkpoints" / "latest-checkpoint.pt"
    data = torch.load(file, weights_only=True)
    data["model"]["llm_backbone"]["llm.lm_head.weight"] = torch.randn(512, 256)
    torch.save(data, file)
    opened = open_checkpoint(str(source))
    assert not opened.config.mamba.tied and "lm_head.weight" in opened.decoder


def break_config(key, value):
    def change(run: RunDirectory) -> None:
        run.config["model"][key] = value

    return change


def drop(run: RunDirectory) -> None:
    del run.decoder["backbone.layers.2.mixer.x_proj.weight"]


def extra(run: RunDirectory) -> None:
    run.decoder["backbone.layers.1.mixer.lora.weight"] = torch.zeros(3)


def reshape(run: RunDirectory) -> None:
    run.decoder["backbone.layers.2.mixer.D"] = torch.zeros(7)


def narrow_projector(run: RunDirectory) -> None:
    run.projector["projector.2.weight"] = torch.zeros(256, 999)


def integers(run: RunDirectory) -> None:
    run.decoder["backbone.layers.0.norm.weight"] = torch.zeros(256, dtype=torch.int64)


def fewer_layers(run: RunDirectory) -> None:
    run.decoder = {k: v for k, v in run.decoder.items() if ".layers.3." not in k}


def not_a_mamba(run: RunDirectory) -> None:
    run.decoder = {"backbone.embedding.weight": torch.zeros(8, 8)}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (drop, r"missing backbone\.layers\.2\.mixer\.x_proj\.weight"),
        (extra, r"unexpected backbone\.layers\.1\.mixer\.lora\.weight"),
        (reshape, r"layers\.2\.mixer\.D has shape \(7,\), expected \(512,\)"),
        (narrow_projector, r"projector\.2\.weight has shape \(256, 999\)"),
        (integers, "expected a float type"),
        (fewer_layers, "tensors have n_layer 3; config.json says mamba-mini-zephyr, which has n_layer 4"),
        (not_a_mamba, "not a Mamba-1 decoder"),
        (break_config("arch_specifier", "no-align+fused-gelu"), "did you mean 'fused-gelu-mlp'"),
        (break_config("vision_backbone_id", "dinosiglip-vit-so-384"), "did you mean 'dinosiglip-vit-so-384px'"),
        (break_config("llm_backbone_id", "mamba-2.8b-zephir"), "did you mean 'mamba-2.8b-zephyr'"),
        (break_config("image_resize_strategy", "resize-naiv"), "did you mean 'resize-naive'"),
        (break_config("llm_max_length", "long"), "llm_max_length"),
        (break_config("llm_backbone_id", 5), "lacks llm_backbone_id"),
        (break_config("arch_specifier", "linear"), "projector: missing"),
    ],
)
def test_what_does_not_fit_is_named(run_directory, tmp_path, change, says):
    change(run_directory)
    with pytest.raises(InputError, match=says):
        open_checkpoint(str(run_directory.write(tmp_path / "run")))


class Evil:
    def __reduce__(self):
        return os.system, ("touch hacked",)


def test_a_pickle_that_would_run_code_is_refused(run_directory, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = run_directory.write(tmp_path / "run")
    file = source / "checkpoints" / "latest-checkpoint.pt"
    for protocol in ("zip", "legacy"):
        if protocol == "zip":
            torch.save({"model": {"projector": Evil(), "llm_backbone": {}}}, file)
        else:
            file.write_bytes(pickle.dumps(Evil()))
        with pytest.raises(CheckpointError, match=r"refused|not a zip-format"):
            open_checkpoint(str(source))
    assert not (tmp_path / "hacked").exists()


@pytest.mark.parametrize("keep", [0, 100, 0.5, 0.99])
@pytest.mark.parametrize("kind", ["pt", "safetensors"])
def test_truncated(run_directory, text_only, tmp_path, keep, kind):
    if kind == "pt":
        source = run_directory.write(tmp_path / "run")
        file = source / "checkpoints" / "latest-checkpoint.pt"
    else:
        source, file = text_only, text_only / "model.safetensors"
    size = int(file.stat().st_size * keep) if keep < 1 else keep
    os.truncate(file, size)
    with pytest.raises(CheckpointError, match=r"truncated|not a complete"):
        open_checkpoint(str(source))


def test_corrupt_inside(run_directory, tmp_path):
    source = run_directory.write(tmp_path / "run")
    file = source / "checkpoints" / "latest-checkpoint.pt"
    with zipfile.ZipFile(file) as archive:
        member = next(i for i in archive.infolist() if i.filename.endswith("data.pkl"))
    data = bytearray(file.read_bytes())
    data[member.header_offset + 80 : member.header_offset + 120] = b"\xff" * 40
    file.write_bytes(data)
    with pytest.raises(CheckpointError):
        open_checkpoint(str(source))


@pytest.mark.parametrize("content", ["", "{", "[]", '{"model": 3}', '{"model": {}}'])
def test_broken_config(run_directory, tmp_path, content):
    source = run_directory.write(tmp_path / "run")
    (source / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        open_checkpoint(str(source))


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"hidden_size": 999}, "hidden_size 999, the tensors of model.safetensors say 128"),
        ({"vocab_size": 999}, "vocab_size 999, the tensors of model.safetensors say 512"),
        ({"vocab_size": 510, "pad_vocab_size_multiple": 4}, None),
        ({"ssm_cfg": {"d_state": 32}}, "d_state 32, the tensors of model.safetensors say 16"),
        ({"ssm_cfg": {"layer": "Mamba2"}}, "layer 'Mamba2', expected 'Mamba1'"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu', expected 'silu'"),
        ({"model_type": "falcon_mamba"}, "model_type 'falcon_mamba', expected 'mamba'"),
        ({"model_type": "mamba", "hidden_act": "silu", "ssm_cfg": {}, "time_step_rank": "auto"}, None),
    ],
)
def test_bare_config_that_disagrees(text_only, config, says):
    (text_only / "config.json").write_text(json.dumps(config))
    if says is None:
        assert open_checkpoint(str(text_only)).config.mamba == TINY_MAMBA
        return
    with pytest.raises(CheckpointError, match=says):
        open_checkpoint(str(text_only))


def test_a_registry_name_promises_every_size(run_directory, tmp_path):
    other = MambaConfig(256, 4, 512, 512, 8, 4, 16)
    run_directory.decoder = random_tensors(decoder_shapes(other))
    with pytest.raises(
        CheckpointError, match="tensors have d_state 8; config.json says mamba-mini-zephyr, which has d_state 16"
    ):
        open_checkpoint(str(run_directory.write(tmp_path / "run")))


def test_empty_directory_and_unknown_name(tmp_path):
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        open_checkpoint(str(tmp_path))
    with pytest.raises(CheckpointError, match=r"did you mean 'cobra\+3b'"):
        open_checkpoint("cobra-3b")
    (tmp_path / "config.json").write_text('{"model": {}}')
    with pytest.raises(CheckpointError, match="no weights"):
        open_checkpoint(str(tmp_path))


def test_vision_weights_and_tokenizer_that_are_not_there(text_only, tmp_path):
    with pytest.raises(CheckpointError, match="--tokenizer"):
        open_checkpoint(str(text_only), tokenizer=tmp_path / "nowhere.json")
    with pytest.raises(CheckpointError, match="--vision-weights"):
        open_checkpoint(str(text_only), vision_weights=tmp_path / "nowhere")


def serve_from(monkeypatch, directory):
    """Serve the hub client's files from a directory, with an empty cache; return its requests."""
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    asked = []

    def fake(repository, file, local_files_only=False):
        if local_files_only:
            raise LocalEntryNotFoundError("not cached")
        asked.append((repository, file))
        return str(directory / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fake)
    return asked


def test_hub_names_are_fetched_from_their_place(run_directory, tmp_path, monkeypatch):
    run_directory.config["model"]["llm_backbone_id"] = "mamba-2.8b-zephyr"
    run_directory.write(tmp_path / "cobra+3b")
    asked = serve_from(monkeypatch, tmp_path)
    monkeypatch.setitem(
        LANGUAGE_BACKBONES, "mamba-2.8b-zephyr", LanguageBackbone(MINI_MAMBA, "zephyr", "xiuyul/mamba-2.8b-zephyr")
    )
    (tmp_path / "tokenizer.json").write_text("{}")
    opened = open_checkpoint("cobra+3b")
    assert opened.tokenizer_file() == tmp_path / "tokenizer.json"
    assert asked == [
        ("han1997/cobra", "cobra+3b/config.json"),
        ("han1997/cobra", "cobra+3b/checkpoints/latest-checkpoint.pt"),
        ("xiuyul/mamba-2.8b-zephyr", "tokenizer.json"),
    ]
    assert opened.source_id == "cobra+3b"


def test_what_is_in_the_hubs_cache_is_taken_without_asking(tmp_path, monkeypatch):
    import huggingface_hub

    from cobra_edge.model.hub import fetch

    monkeypatch.setattr(
        huggingface_hub, "hf_hub_download", lambda r, f, local_files_only=False: str(tmp_path / f"{local_files_only}")
    )
    assert fetch("a/b", "c", "") == tmp_path / "True"


def test_encoders_come_from_timms_hub_by_their_published_names(monkeypatch):
    import timm

    from cobra_edge.formats.model_config import EncoderConfig, VisionConfig
    from cobra_edge.model.vision import load_tower

    real, asked = timm.create_model, []

    def fake(name, **arguments):
        asked.append((name, arguments.pop("pretrained")))
        return real(name, **arguments)

    monkeypatch.setattr(timm, "create_model", fake)
    half = (0.5, 0.5, 0.5)
    config = VisionConfig("test", (EncoderConfig("vit_tiny_patch16_224", 192, 16, 12, 1, half, half),), 64)
    tower = load_tower(config, None)
    assert asked == [("vit_tiny_patch16_224", True)]
    assert tower(torch.zeros(1, 3, 64, 64)).shape == (1, 16, 192) and not tower.training

    def unreachable(name, **_):
        raise OSError("no route to host")

    monkeypatch.setattr(timm, "create_model", unreachable)
    with pytest.raises(MachineError, match=r"vision weights vit_tiny_patch16_224 could not be downloaded .*no route to host"):
        load_tower(config, None)

    def refuses_an_argument(name, **_):
        raise TypeError

    monkeypatch.setattr(timm, "create_model", refuses_an_argument)
    with pytest.raises(TypeError):  # not told as a download that failed
        load_tower(config, None)


def test_a_hub_that_is_switched_off_is_said(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(MachineError, match=r"^cobra\+3b/config\.json of han1997/cobra could not be downloaded"):
        open_checkpoint("cobra+3b")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES])
def test_a_cache_that_cannot_be_written_is_not_called_a_download(monkeypatch, number):
    import huggingface_hub

    def download(*_args, local_files_only=False):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    with pytest.raises(MachineError, match=r"could not be kept in the hub's cache .*HF_HOME") as caught:
        open_checkpoint("cobra+3b")
    assert os.strerror(number) in str(caught.value) and "download" not in str(caught.value)


def test_offline_is_said_in_one_line(tmp_path):
    environment = os.environ | {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    impatient = (
        "import time; time.sleep = lambda _: None; from cobra_edge.export.command import main; main()"  # between the retries
    )
    command = [sys.executable, "-c", impatient, "--target", "cpu", "--checkpoint", "cobra+3b"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.returncode == MachineError.exit_code
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: cobra+3b/config.json of han1997/cobra could not be downloaded")
    assert not (tmp_path / "bundles").exists()


def test_vision_weights_are_checked(run_directory, tmp_path):
    from cobra_edge.model.cobra import load_vision
    from cobra_edge.model.vision import VisionTower, encoder_file

    source = run_directory.write(tmp_path / "run")
    opened = open_checkpoint(str(source))
    with pytest.raises(CheckpointError, match="not on a hub"):
        load_vision(opened)
    (source / "vision").mkdir()
    opened = open_checkpoint(str(source))
    with pytest.raises(CheckpointError, match="not found"):
        load_vision(opened)
    tower = VisionTower(opened.config.vision)
    files = [source / "vision" / encoder_file(opened.config.vision, i) for i in range(2)]
    for encoder, file in zip(tower.encoders, files, strict=True):
        save_file(encoder.vit.state_dict(), file)
    load_vision(opened)
    weights = tower.encoders[0].vit.state_dict()
    save_file({k: v for k, v in weights.items() if k != "pos_embed"}, files[0])
    with pytest.raises(CheckpointError, match="pos_embed"):
        load_vision(opened)
    save_file(weights | {"pos_embed": torch.zeros(1, 3, 128)}, files[0])
    with pytest.raises(CheckpointError, match=r"pos_embed has shape \(1, 3, 128\)"):
        load_vision(opened)
    files[0].write_bytes(b"garbage")
    with pytest.raises(CheckpointError, match="not a readable safetensors"):
        load_vision(opened)


def test_same_seed_same_hash(tmp_path):
    first = open_checkpoint(str(write_text_only(tmp_path / "a", 1)))
    again = open_checkpoint(str(write_text_only(tmp_path / "b", 1)))
    other = open_checkpoint(str(write_text_only(tmp_path / "c", 2)))
    assert first.sha256() == again.sha256() != other.sha256()


@pytest.mark.parametrize("model_id", ["../../x", "/etc/x", "a/b", "", ".hidden", "x" * 200, "a\n"])
def test_a_name_that_would_leave_the_output_directory(run_directory, tmp_path, model_id):
    run_directory.config["model"]["model_id"] = model_id
    with pytest.raises(InputError, match="model_id .* is invalid"):
        open_checkpoint(str(run_directory.write(tmp_path / "run")))


def test_a_directory_of_any_name_opens(text_only):
    odd = text_only.rename(text_only.parent / "my model (1)")
    assert open_checkpoint(str(odd)).config.model_id == "my-model-1-"


def test_a_sharded_mamba_is_joined(text_only):
    from safetensors.torch import load_file

    whole = open_checkpoint(str(text_only))
    tensors = load_file(text_only / "model.safetensors")
    (text_only / "model.safetensors").unlink()
    names, table = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"], {}
    for index, file in enumerate(names):
        shard = {k: v for i, (k, v) in enumerate(tensors.items()) if i % 2 == index}
        save_file(shard, text_only / file)
        table |= dict.fromkeys(shard, file)
    index_file = text_only / "model.safetensors.index.json"
    index_file.write_text(json.dumps({"weight_map": table}))
    opened = open_checkpoint(str(text_only))
    assert opened.config == whole.config and len(opened.files) == 2
    assert all(torch.equal(opened.decoder[k], v) for k, v in whole.decoder.items())
    (text_only / names[1]).unlink()
    with pytest.raises(CheckpointError, match="model-00002-of-00002.safetensors missing"):
        open_checkpoint(str(text_only))
    index_file.write_text(json.dumps({"weight_map": {"a": "../../etc/x.safetensors"}}))
    with pytest.raises(CheckpointError, match="expected safetensors files next to it"):
        open_checkpoint(str(text_only))


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ({}, "not a Mamba-1 decoder"),
        ({"projector.0.weight": torch.zeros(2, 2)}, "not a Mamba-1 decoder"),
        ({3: torch.zeros(2)}, "expected a dict of tensors by name"),
        ({"model": {3: {}}}, "expected {'model'"),
        ({"model": {"llm_backbone": {7: torch.zeros(1)}}}, "expected {'model'"),
        ([1, 2], "expected a dict of tensors by name, got list"),
        ({"backbone.embedding.weight": torch.zeros(1, 1).expand(1 << 20, 128)}, "not a plain dense tensor"),
        ({"backbone.embedding.weight": torch.zeros(4, 4).to_sparse()}, "not a plain dense tensor"),
        ({"backbone.embedding.weight": torch.zeros(4, 4, device="meta")}, "not a plain dense tensor"),
    ],
)
@pytest.mark.filterwarnings("ignore:Sparse", "ignore:Validating sparse")
def test_tables_that_are_no_model(text_only, data, says):
    (text_only / "model.safetensors").unlink()
    torch.save(data, text_only / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=says):
        open_checkpoint(str(text_only))


def test_damaged_pickles_never_crash(run_directory, tmp_path):
    """Any byte of the pickle inside the archive may be wrong: the result is one of our errors, or a checkpoint."""
    import random

    source = run_directory.write(tmp_path / "run")
    file = source / "checkpoints" / "latest-checkpoint.pt"
    with zipfile.ZipFile(file) as archive:
        member = next(i for i in archive.infolist() if i.filename.endswith("data.pkl"))
    data, rng = file.read_bytes(), random.Random(0)
    start = data.index(archive.NameToInfo[member.filename].filename.encode(), member.header_offset) + len(member.filename)
    refused = 0
    for _ in range(60):
        broken = bytearray(data)
        for _ in range(rng.randint(1, 4)):
            broken[start + rng.randrange(member.file_size)] = rng.randrange(256)
        file.write_bytes(broken)
        try:
            open_checkpoint(str(source))
        except InputError:
            refused += 1
    assert refused > 30


def test_encoders_trained_at_another_resolution_are_resampled(run_directory, tmp_path):
    """The published DINOv2 has 37 × 37 position embeddings, the tower needs 27 × 27; compared with timm's own resampling."""
    import timm

    from cobra_edge.model.cobra import load_vision
    from cobra_edge.model.vision import encoder_file

    source = run_directory.write(tmp_path / "run")
    (source / "vision").mkdir()
    vision, vits = open_checkpoint(str(source)).config.vision, []
    for index, e in enumerate(vision.encoders):
        torch.manual_seed(index)
        vit = timm.create_model(e.timm_name, num_classes=0, img_size=154, **e.overrides)
        save_file(vit.state_dict(), source / "vision" / encoder_file(vision, index))
        vits.append(vit)
    tower = load_vision(open_checkpoint(str(source))).tower
    for e, encoder, vit in zip(vision.encoders, tower.encoders, vits, strict=True):
        vit.set_input_size(img_size=112)
        assert encoder.vit.pos_embed.shape == (1, 64, e.embed_dim)
        torch.testing.assert_close(encoder.vit.pos_embed, vit.pos_embed)
