"""Checkpoints of every stage, size and encoder, in the layouts of several trainers."""

import pytest
import torch
from safetensors.torch import save_file

from cobra_edge.errors import CheckpointError, InputError, MachineError
from cobra_edge.formats.model_config import projector_shapes
from cobra_edge.model.backbones import LANGUAGE_BACKBONES, VISION_BACKBONES
from cobra_edge.model.checkpoint import open_checkpoint

from ..conftest import MINI_MAMBA, random_tensors


def parts_of(run):
    """Return {part.name: tensor} with the names of the original's module."""
    llm = {f"llm_backbone.llm.{k}": v for k, v in run.decoder.items()}
    return llm | {f"projector.{k}": v for k, v in run.projector.items()}


def nested(run):
    return {"projector": run.projector, "llm_backbone": {f"llm.{k}": v for k, v in run.decoder.items()}}


def under(prefix, tensors):
    return {prefix + name: tensor for name, tensor in tensors.items()}


def inside(marker, tensors):
    """Return the tensors with a wrapper's component in their names, as from FSDP and activation checkpointing."""
    return {
        name.replace(".layers.", f".layers.{marker}.").replace("projector.0", f"{marker}.projector.0"): t
        for name, t in tensors.items()
    }


@pytest.mark.parametrize(
    "wrapped",
    [
        lambda run: parts_of(run),
        lambda run: under("module.", parts_of(run)),
        lambda run: under("_orig_mod.", parts_of(run)),
        lambda run: under("module._orig_mod.", parts_of(run)),
        lambda run: {"model": parts_of(run)},
        lambda run: {"model_state_dict": parts_of(run), "optimizer_state_dict": {"state": {}}, "epoch": 3},
        lambda run: {"model_state_dict": nested(run)},
        lambda run: {"module": parts_of(run), "global_steps": 7},
        lambda run: {"state_dict": under("model.", parts_of(run)), "pytorch-lightning_version": "2.4.0", "callbacks": {}},
        lambda run: {"state_dict": under("vlm.module.", parts_of(run)), "global_step": 7},
        lambda run: {"model": {part: inside("_fsdp_wrapped_module", t) for part, t in nested(run).items()}},
        lambda run: {"model": {part: under("module.", t) for part, t in nested(run).items()}},
        lambda run: under("_orig_mod.", inside("_checkpoint_wrapped_module", parts_of(run))),
    ],
)
def test_what_trainers_put_around_the_weights_is_seen_through(run_directory, tmp_path, wrapped):
    source = run_directory.write(tmp_path / "run")
    torch.save(wrapped(run_directory), source / "checkpoints" / "latest-checkpoint.pt")
    opened = open_checkpoint(str(source))
    assert opened.config.mamba == MINI_MAMBA
    assert all(torch.equal(v, opened.decoder[k]) for k, v in run_directory.decoder.items())
    assert all(torch.equal(v, opened.projector[k]) for k, v in run_directory.projector.items())


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "llm."])
def test_a_bare_mamba_that_was_wrapped_opens(text_only, prefix):
    from safetensors.torch import load_file

    # copied: safetensors before 0.5 maps the file, which is overwritten here
    tensors = {name: tensor.clone() for name, tensor in load_file(text_only / "model.safetensors").items()}
    save_file(under(prefix, tensors), text_only / "model.safetensors")
    opened = open_checkpoint(str(text_only))
    assert all(torch.equal(v, opened.decoder[k]) for k, v in tensors.items())


def test_two_tensors_of_one_name_are_refused(run_directory, tmp_path):
    source = run_directory.write(tmp_path / "run")
    both = parts_of(run_directory) | under("module.", parts_of(run_directory))
    torch.save(both, source / "checkpoints" / "latest-checkpoint.pt")
    with pytest.raises(CheckpointError, match="two tensors are named llm_backbone"):
        open_checkpoint(str(source))


def test_mamba_2_is_told_by_its_tensors_and_by_its_name(run_directory, text_only, tmp_path):
    save_file(
        {"backbone.layers.0.mixer.dt_bias": torch.zeros(8), "backbone.layers.0.mixer.A_log": torch.zeros(8)},
        text_only / "model.safetensors",
    )
    with pytest.raises(CheckpointError, match=r"a Mamba-2 decoder.*only Mamba-1 decoders"):
        open_checkpoint(str(text_only))
    (text_only / "config.json").write_text('{"model_type": "mamba2"}')
    with pytest.raises(CheckpointError, match=r"model_type 'mamba2'.*only Mamba-1 decoders"):
        open_checkpoint(str(text_only))
    run_directory.config["model"]["llm_backbone_id"] = "mamba2-2.7b"
    with pytest.raises(InputError, match=r"'mamba2-2.7b' is a Mamba-2.*only Mamba-1 decoders"):
        open_checkpoint(str(run_directory.write(tmp_path / "run")))


POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'4d7a2146' * 8}\nsize 5544\n"


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin", "tokenizer.json"])
def test_a_git_lfs_pointer_is_told(text_only, file):
    if file == "pytorch_model.bin":
        (text_only / "model.safetensors").unlink()
    (text_only / file).write_text(POINTER)
    with pytest.raises(CheckpointError, match=rf"{file}: a Git LFS pointer.*git lfs pull"):
        open_checkpoint(str(text_only))


def test_an_align_checkpoint_is_told(run_directory, tmp_path):
    source = run_directory.write(tmp_path / "run")
    torch.save({"model": {"projector": run_directory.projector}}, source / "checkpoints" / "latest-checkpoint.pt")
    with pytest.raises(CheckpointError, match=r"only a projector, as after stage align.*stage finetune"):
        open_checkpoint(str(source))


def test_a_run_without_its_latest_checkpoint_names_what_is_there(run_directory, tmp_path):
    source = run_directory.write(tmp_path / "run")
    file = source / "checkpoints" / "latest-checkpoint.pt"
    file.rename(file.with_name("step-000100-epoch-01-loss=0.5000.pt"))
    with pytest.raises(CheckpointError, match=r"no weights; .*step-000100-epoch-01-loss=0.5000\.pt, to that name"):
        open_checkpoint(str(source))
    with pytest.raises(CheckpointError, match="is a file; give the run directory"):
        open_checkpoint(str(source / "config.json"))


def test_names_of_the_hub_are_those_of_the_originals_load(monkeypatch):
    from cobra_edge.model import checkpoint

    asked = []
    monkeypatch.setattr(checkpoint, "_open_hub", lambda name: asked.append(name) or open_checkpoint("mini"))
    for name in ("cobra+3b", "Cobra-DINOSigLIP 3B"):
        open_checkpoint(name)
    assert asked == ["cobra+3b", "cobra+3b"]
    for name in ("cobra-base+3b", "cobra-siglip+3b", "cobra-ldpnet+3b", "cobra-one-epoch+3b"):
        with pytest.raises(CheckpointError, match=r"is a training configuration .*'cobra\+3b'.* directory of a run"):
            open_checkpoint(name)


def test_a_directory_or_a_file_may_be_given_as_tokenizer(text_only, tmp_path):
    (tmp_path / "t").mkdir()
    (text_only / "tokenizer.json").rename(tmp_path / "t" / "tokenizer.json")
    for given in (tmp_path / "t", tmp_path / "t" / "tokenizer.json"):
        assert open_checkpoint(str(text_only), tokenizer=given).tokenizer_file() == tmp_path / "t" / "tokenizer.json"
    with pytest.raises(CheckpointError, match="--tokenizer .*does not exist"):
        open_checkpoint(str(text_only), tokenizer=tmp_path)
    with pytest.raises(CheckpointError, match="--vision-weights .*is a file"):
        open_checkpoint(str(text_only), vision_weights=text_only / "config.json")


def test_without_a_tokenizer_and_a_hub_the_option_is_named(text_only, monkeypatch):
    import huggingface_hub

    def unreachable(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", unreachable)
    (text_only / "tokenizer.json").unlink()
    with pytest.raises(MachineError, match=r"tokenizer\.json of .* could not be downloaded.*--tokenizer"):
        open_checkpoint(str(text_only)).tokenizer_file()


@pytest.mark.parametrize("size", ["130m", "370m", "790m", "1.4b", "2.8b"])
@pytest.mark.parametrize(("tuned", "style"), [("", "base"), ("-zephyr", "zephyr")])
def test_every_mamba_1_has_the_sizes_that_were_published(size, tuned, style):
    """Parameter counts of the model cards, with the tied head counted once."""
    found = LANGUAGE_BACKBONES[f"mamba-{size}{tuned}"]
    published = {"130m": 129e6, "370m": 372e6, "790m": 793e6, "1.4b": 1372e6, "2.8b": 2768e6}[size]
    assert found.mamba.n_parameters == pytest.approx(published, rel=0.003) and found.prompt_style == style


@pytest.mark.parametrize("backbone", VISION_BACKBONES)
def test_run_directories_of_every_vision_backbone_open(run_directory, tmp_path, backbone):
    width = VISION_BACKBONES[backbone].feature_dim
    run_directory.config["model"] |= {"vision_backbone_id": backbone, "arch_specifier": "no-align-gelu-mlp"}
    run_directory.projector = random_tensors(projector_shapes("gelu-mlp", width, 256))
    opened = open_checkpoint(str(run_directory.write(tmp_path / "run")))
    assert (opened.config.vision.backbone_id, opened.vision_source) == (backbone, "hub")


def test_a_crop_of_another_kind_is_refused(run_directory, tmp_path):
    run_directory.config["model"] |= {"vision_backbone_id": "clip-vit-b", "image_resize_strategy": "letterbox"}
    with pytest.raises(InputError, match="clip-vit-b with image_resize_strategy 'letterbox' is not supported"):
        open_checkpoint(str(run_directory.write(tmp_path / "run")))


# Fine-tuned encoders.


def tuned(run, seed=0):
    """Return a tower with random weights, and its tensors as in a full finetune, including the unused ones."""
    import timm

    torch.manual_seed(seed)
    tower = {}
    for e, name in zip(VISION_BACKBONES["dinosiglip-vit-mini-112px"].encoders, ("dino", "siglip"), strict=True):
        vit = timm.create_model(e.timm_name, num_classes=0, img_size=112, **e.overrides)
        tower |= under(f"{name}_featurizer.", vit.state_dict())
    run.config["stage"] = "full-finetune"
    return tower


def write_tuned(run, directory, tower):
    source = run.write(directory)
    torch.save({"model": nested(run) | {"vision_backbone": tower}}, source / "checkpoints" / "latest-checkpoint.pt")
    return source


def test_encoders_that_were_trained_along_are_used(run_directory, tmp_path):
    from cobra_edge.model.cobra import load_vision

    tower = tuned(run_directory)
    source = write_tuned(run_directory, tmp_path / "run", tower)
    (source / "vision").mkdir()  # the published ones may lie beside it
    opened = open_checkpoint(str(source))
    assert (opened.vision_source, opened.vision_weights) == ("checkpoint", None)
    loaded = load_vision(opened).tower
    for encoder, name in zip(loaded.encoders, ("dino", "siglip"), strict=True):
        for key, value in encoder.vit.state_dict().items():
            assert torch.equal(value, tower[f"{name}_featurizer.{key}"]), key
    other = write_tuned(run_directory, tmp_path / "other", tuned(run_directory, 1))
    assert open_checkpoint(str(other)).sha256() != opened.sha256()
    given = open_checkpoint(str(source), vision_weights=source / "vision")
    assert (given.vision_source, given.tower) == ("files", {})  # the option takes precedence


def test_a_single_encoder_that_was_trained_along_is_used(run_directory, tmp_path, monkeypatch):
    from cobra_edge.formats.model_config import VisionConfig
    from cobra_edge.model.cobra import load_vision

    single = VisionConfig("siglip-mini", VISION_BACKBONES["dinosiglip-vit-mini-112px"].encoders[1:], 112)
    monkeypatch.setitem(VISION_BACKBONES, "siglip-mini", single)
    run_directory.config["model"] |= {"vision_backbone_id": "siglip-mini", "arch_specifier": "gelu-mlp"}
    run_directory.projector = random_tensors(projector_shapes("gelu-mlp", 128, 256))
    own = "siglip_featurizer."
    tower = {f"featurizer.{k[len(own) :]}": v for k, v in tuned(run_directory).items() if k.startswith(own)}
    vit = load_vision(open_checkpoint(str(write_tuned(run_directory, tmp_path / "run", tower)))).tower.encoders[0].vit
    assert torch.equal(vit.blocks[0].attn.qkv.weight, tower["featurizer.blocks.0.attn.qkv.weight"])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t.pop("dino_featurizer.blocks.1.attn.qkv.weight"), "missing tensors .*blocks.1.attn.qkv.weight"),
        (lambda t: t.update({"siglip_featurizer.lora": torch.zeros(1)}), "unexpected tensors .*lora"),
        (lambda t: t.update({"clip_featurizer.x": torch.zeros(1)}), "clip_featurizer.x, expected names that begin with dino_"),
        (lambda t: t.update({"dino_featurizer.cls_token": torch.zeros(1, 1, 7)}), r"cls_token has shape \(1, 1, 7\)"),
        (lambda t: t.update({"dino_featurizer.cls_token": torch.full((1, 1, 128), float("nan"))}), "cls_token: contains NaN"),
    ],
)
def test_encoders_that_do_not_fit_are_named(run_directory, tmp_path, change, says):
    from cobra_edge.model.cobra import load_vision

    tower = tuned(run_directory)
    change(tower)
    source = write_tuned(run_directory, tmp_path / "run", tower)
    with pytest.raises(InputError, match=says):
        load_vision(open_checkpoint(str(source)))


def test_a_full_finetune_without_its_encoders_is_told(run_directory, tmp_path, caplog):
    run_directory.config["stage"] = "full-finetune"
    source = run_directory.write(tmp_path / "run")
    open_checkpoint(str(source))
    assert "stage full-finetune, but the checkpoint has no vision_backbone" in caplog.text
    caplog.clear()
    (source / "vision").mkdir()
    open_checkpoint(str(source))
    run_directory.config["stage"] = "finetune"
    open_checkpoint(str(run_directory.write(tmp_path / "other")))
    assert not caplog.records


def test_what_keeps_encoders_from_loading_is_found_before(run_directory, tmp_path):
    """Checking only names and shapes gives the same refusals as loading, without reading a value."""
    from cobra_edge.model.vision import check_tower

    tower = tuned(run_directory)
    opened = open_checkpoint(str(write_tuned(run_directory, tmp_path / "run", tower)))
    check_tower(opened.config.vision, None, opened.tower)
    del opened.tower["dino_featurizer.cls_token"]
    with pytest.raises(CheckpointError, match="cls_token"):
        check_tower(opened.config.vision, None, opened.tower)
    with pytest.raises(CheckpointError, match="not on a hub.*--vision-weights"):
        check_tower(opened.config.vision, None)
    with pytest.raises(CheckpointError, match="not found"):
        check_tower(opened.config.vision, tmp_path)
    check_tower(VISION_BACKBONES["clip-vit-b"], None)
