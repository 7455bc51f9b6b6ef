"""Vision tower and projectors against timm and plain torch functions."""

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F

from cobra_edge.formats.model_config import PROJECTOR_KINDS, EncoderConfig, VisionConfig, projector_kind, projector_shapes
from cobra_edge.model.backbones import VISION_BACKBONES, vision_backbone
from cobra_edge.model.projector import Projector
from cobra_edge.model.vision import VisionTower

from ..tolerance import assert_close

MINI = VISION_BACKBONES["dinosiglip-vit-mini-112px"]


@torch.inference_mode()
def test_features_are_those_of_timms_second_to_last_block():
    torch.manual_seed(0)
    tower, parts = VisionTower(MINI).eval(), []
    pixels = torch.randn(2, 6, 112, 112)
    for index, (encoder, config) in enumerate(zip(tower.encoders, MINI.encoders, strict=True)):
        vit = timm.create_model(config.timm_name, num_classes=0, img_size=112, **config.overrides).eval()
        vit.load_state_dict(encoder.vit.state_dict(), strict=False)
        layer = len(vit.blocks) - 2
        assert layer == len(encoder.vit.blocks) - 1
        part = pixels[:, 3 * index : 3 * index + 3]
        parts.append(vit.get_intermediate_layers(part, n={layer})[0])
    assert_close(tower(pixels).numpy(), torch.cat(parts, dim=-1).numpy(), "vision")


def test_published_encoders_have_the_sizes_the_config_says():
    published = {(e.timm_name, b.image_size): (e, b) for b in VISION_BACKBONES.values() for e in b.encoders if e.on_hub}
    assert len(published) == 12
    for (name, size), (config, backbone) in published.items():
        with torch.device("meta"):
            vit = timm.create_model(name, num_classes=0, img_size=size)
        assert (vit.embed_dim, len(vit.blocks), vit.num_prefix_tokens) == (config.embed_dim, config.depth, config.n_prefix)
        assert (vit.patch_embed.num_patches, vit.patch_embed.patch_size[0]) == (backbone.n_patches, config.patch_size)
        assert (vit.pretrained_cfg["mean"], vit.pretrained_cfg["std"]) == (config.mean, config.std)
        assert vit.pretrained_cfg["interpolation"] == "bicubic"


@pytest.mark.parametrize("name", ["vit_base_patch16_clip_224.openai", "vit_large_patch16_224.augreg_in21k_ft_in1k"])
@torch.inference_mode()
def test_other_encoders_features_are_those_of_timm_too(name):
    """With a class token, CLIP's norm before the blocks and its activation: as in the original's calls of timm."""
    small = {"embed_dim": 64, "depth": 3, "num_heads": 2} | ({"act_layer": "quick_gelu"} if "clip" in name else {})
    of = next(e for b in VISION_BACKBONES.values() for e in b.encoders if e.timm_name == name)
    assert ("act_layer" in of.overrides) == ("clip" in name)
    config = EncoderConfig(name, 64, of.patch_size, 3, of.n_prefix, of.mean, of.std, small)
    torch.manual_seed(0)
    vit = timm.create_model(name, num_classes=0, img_size=64, **small).eval()
    whole = vit.get_intermediate_layers(pixels := torch.randn(2, 3, 64, 64), n={1})[0]
    tower = VisionTower(VisionConfig("test", (config,), 64)).eval()
    tower.encoders[0].vit.load_state_dict(vit.state_dict(), strict=False)
    assert_close(tower(pixels).numpy(), whole.numpy(), "vision")


def test_fused_clip_has_the_activation_that_it_was_trained_with():
    """The original sets quick_gelu if CLIP is alone, but not next to DINOv2: checkpoints are run as they were trained."""
    fused, alone = (VISION_BACKBONES[n].encoders[-1] for n in ("dinoclip-vit-l-336px", "clip-vit-l-336px"))
    assert fused.timm_name == alone.timm_name and (fused.overrides, alone.overrides) == ({}, {"act_layer": "quick_gelu"})


def _by_hand(kind, x, w):
    if kind == "linear":
        return F.linear(x, w["projector.weight"], w["projector.bias"])
    x = F.linear(x, w["projector.0.weight"], w["projector.0.bias"])
    x = F.linear(0.5 * x * (1 + torch.erf(x / 2**0.5)), w["projector.2.weight"], w["projector.2.bias"])
    if kind == "fused-gelu-mlp":
        x = F.linear(F.gelu(x), w["projector.4.weight"], w["projector.4.bias"])
    if kind == "fused-ldpnet":
        grid = F.adaptive_avg_pool2d(x.transpose(1, 2).unflatten(2, (27, 27)), (14, 14))
        peg = F.conv2d(grid, w["projector.4.peg.0.weight"], w["projector.4.peg.0.bias"], padding=1, groups=grid.shape[1])
        x = (grid + peg).flatten(2).transpose(1, 2)
    return x


@pytest.mark.parametrize("kind", PROJECTOR_KINDS)
@torch.inference_mode()
def test_projector(kind):
    torch.manual_seed(0)
    projector = Projector(kind, 24, 16)
    weights = projector.state_dict()
    assert {k: tuple(v.shape) for k, v in weights.items()} == projector_shapes(kind, 24, 16)
    x = torch.randn(2, 729, 24)
    out = projector(x)
    assert out.shape == (2, 196 if kind == "fused-ldpnet" else 729, 16)
    assert_close(out.numpy(), _by_hand(kind, x, weights).numpy(), "vision")


@pytest.mark.parametrize("kind", PROJECTOR_KINDS)
@pytest.mark.parametrize("prefix", ["", "no-align+", "no-align-"])
def test_arch_specifier(kind, prefix):
    assert projector_kind(prefix + kind) == kind


def test_backbones_agree_with_the_published_numbers():
    published = vision_backbone("dinosiglip-vit-so-384px")
    assert (published.feature_dim, published.n_patches) == (2176, 729)
    assert np.allclose(published.encoders[1].mean, 0.5)


def small(kind, encoders=MINI.encoders, size=112):
    """Return a model with random weights and a projector of a kind, and its config."""
    from cobra_edge.formats.model_config import CobraConfig, MambaConfig, VisionConfig
    from cobra_edge.model.cobra import VisionModel

    torch.manual_seed(1)
    vision = VisionConfig("test", encoders, size)
    config = CobraConfig("test", vision, kind, MambaConfig(64, 1, 512, 128, 16, 4, 4))
    return VisionModel(VisionTower(vision), Projector(kind, vision.feature_dim, 64)).eval(), config
