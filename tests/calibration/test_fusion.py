"""The fusion study: variants differ in one thing, resume, are ordinary run directories, and are measured as they read."""

import json
from functools import partial

import msgspec
import numpy as np
import pytest
import torch

from calibration import fusion
from calibration.fusion_reading import answer_mark
from calibration.fusion_result import FusionResult
from calibration.fusion_variants import VARIANTS, variant_named
from calibration.train_language import MAMBA, draw_conversation, hidden_image_last
from calibration.train_mini import TOKENIZER
from cobra_edge.bench.results import read_result
from cobra_edge.bundle.reader import Bundle
from cobra_edge.decode.native_operations import differentiable_operations
from cobra_edge.export.pipeline import export_bundle
from cobra_edge.inference.session import Session
from cobra_edge.model.checkpoint import open_checkpoint
from cobra_edge.model.mamba import Mamba
from cobra_edge.suite.reader import HELDOUT, read_suite
from cobra_edge.terminal.output import run_command

from ..regress.regress_lines import write_lines


def test_every_variant_is_a_run_directory_of_its_own():
    assert len({variant.vision.backbone_id for variant in VARIANTS.values()}) == 3 and len(VARIANTS) == 14
    assert len({json.dumps(variant.config) for variant in VARIANTS.values()}) == len(VARIANTS)


def test_an_unknown_variant_is_refused_with_near_matches(capsys):
    assert run_command(fusion.fusion, ["--variant", "siglip-liner"]) == 2
    assert "unknown variant 'siglip-liner'; did you mean" in " ".join(capsys.readouterr().err.split())


def test_encoders_are_those_of_cobra_mini():
    whole = fusion.tower_of(variant_named("dinosiglip-linear"))
    for name, index in (("dinov2-linear", 0), ("siglip-linear", 1)):
        alone = fusion.tower_of(variant_named(name)).encoders[0].state_dict()
        assert all(torch.equal(value, whole.encoders[index].state_dict()[key]) for key, value in alone.items())


def test_an_image_among_the_tokens_is_read_where_it_belongs():
    torch.manual_seed(0)
    model = Mamba(MAMBA, differentiable_operations())
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    tokens, visual, places = torch.randint(0, MAMBA.vocab, (2, 7)), torch.randn(2, 3, MAMBA.d_model), [2, 5]
    with torch.no_grad():
        found = hidden_image_last(model, visual, tokens, places)
        for row, at in enumerate(places):
            embedded = model.embed(tokens[row])
            whole, _ = model.hidden(torch.cat([embedded[:at], visual[row], embedded[at:]])[None])
            assert torch.allclose(found[row], torch.cat([whole[0, :at], whole[0, at + 3 :]]), atol=1e-5)


def test_training_and_measuring_put_the_image_at_the_same_place(mini_bundle):
    import random

    from tokenizers import Tokenizer

    from calibration.scenes import draw_scene

    session, rng = Session(Bundle.open(mini_bundle("fp16"))), random.Random(0)
    scene, tail = draw_scene(rng, "train"), answer_mark(session)
    for tasks in (("existence",), ("attribute", "count")):
        conversation = draw_conversation(rng, Tokenizer.from_file(str(TOKENIZER)), scene, tasks)
        assert tuple(conversation.tokens[conversation.image_at :][: len(tail)]) == tail
        assert not any(conversation.answered[: conversation.image_at + len(tail)])


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Train two variants for two steps each, and measure them on lines about four images."""
    root = tmp_path_factory.mktemp("fusion")
    seen = [f"heldout/{i:03}.png" for i in range(9)]
    suite = write_lines(root / "suite", [next(line for line in read_suite(HELDOUT) if line.image == name) for name in seen])
    names = ["siglip-fused-ldpnet", "dinosiglip-fused-gelu-mlp-image-last"]
    arguments = [argument for name in names for argument in ("--variant", name)]
    arguments += [
        "--suite",
        str(suite),
        "--steps",
        "2",
        "--batch",
        "1",
        "--workers",
        "1",
        "--log-every",
        "1",
        "--quality",
        "fast",
    ]
    arguments += ["--out", str(root / "runs"), "--plot", str(root / "fusion.png")]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setattr(fusion, "export_bundle", partial(export_bundle, vision_precision="fp32"))  # int8 takes a minute more
        assert run_command(fusion.fusion, arguments) == 0
    return root, names, arguments


def test_variants_are_trained_measured_and_told(study, monkeypatch, capsys):
    root, names, arguments = study
    result = read_result(root / "bench" / "results" / "fusion.json", FusionResult)
    assert [row.variant for row in result.rows] == names and [row.visual_tokens for row in result.rows] == [16, 64]
    ldp, last = result.rows
    assert ldp.kld_quality is not None and ldp.kld_quality.value == ldp.kld_fast.value > 0
    assert (
        last.kld_quality is None and 0 < last.kld_fast.value < 1 and all(np.isfinite(row.bundle_bytes) for row in result.rows)
    )
    assert (root / "fusion.png").stat().st_size > 5000
    monkeypatch.chdir(root)
    monkeypatch.setattr(fusion, "measured", None)  # nothing is trained or measured again
    assert run_command(fusion.fusion, [*arguments, "--json"]) == 0
    again = msgspec.json.decode(capsys.readouterr().out, type=FusionResult)
    assert again.rows == result.rows


def test_other_settings_do_not_mix(study, monkeypatch, capsys):
    root, _, arguments = study
    monkeypatch.chdir(root)
    changed = ["3" if before == "--steps" else after for before, after in zip(["", *arguments], arguments, strict=False)]
    assert run_command(fusion.fusion, changed) == 2
    assert "of 2 steps and fast, expected 3 and fast; give the same" in " ".join(capsys.readouterr().err.split())


def test_a_variant_is_a_checkpoint_that_export_takes(study):
    root, names, _ = study
    opened = open_checkpoint(str(root / "runs" / f"{names[0]}-0" / "checkpoint"))
    assert opened.config.projector == "fused-ldpnet" and opened.config.n_visual_tokens == 16
