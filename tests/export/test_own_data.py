"""Calibration on the user's own images: what an export and `calibrate` make of a folder, and what they refuse."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from msgspec import structs

from cobra_edge.bundle.reader import Bundle
from cobra_edge.calibrate import command as calibrate
from cobra_edge.errors import InputError
from cobra_edge.export import command as export_module
from cobra_edge.export import lines as lines_module
from cobra_edge.export import pipeline
from cobra_edge.export.answers import answers_file, with_answers
from cobra_edge.export.lines import affordable
from cobra_edge.export.plan import ExportOptions, plan_export
from cobra_edge.formats.targets import target_named
from cobra_edge.model.checkpoint import open_checkpoint
from cobra_edge.quantize import own_answers
from cobra_edge.quantize.calibration_data import EmbeddingCache
from cobra_edge.quantize.statistics import read_header
from cobra_edge.regress.golden import read_golden
from cobra_edge.suite.line import Line
from cobra_edge.suite.line_set import LineSet
from cobra_edge.suite.reader import CALIBRATION, HELDOUT
from cobra_edge.terminal.output import run_command

IMAGES = sorted((CALIBRATION.parent / "calibration").glob("*.png"))


@pytest.fixture
def folder(tmp_path):
    """Return a function that makes a folder of some images."""

    def make(n):
        (tmp_path / "photos").mkdir()
        for image in IMAGES[:n]:
            shutil.copy(image, tmp_path / "photos" / image.name)
        return tmp_path / "photos"

    return make


def planned(source, out, **options):
    return plan_export(str(source), target_named("cpu"), out, ExportOptions(**options))


def test_a_folder_calibrates_and_its_held_out_images_become_golden_lines(folder, tmp_path, capfd):
    photos, out = folder(16), tmp_path / "out" / "b"
    budget = tmp_path / "budget.toml"
    budget.write_text("[schemes.w4a16-g128]\n")
    given = ["--target", "cpu", "--method", "gptq", "--scheme", "w4a16-g128", "--calibration", photos, "--budget", budget]
    code = run_command(export_module.command, [*map(str, given), "--out", str(out)])
    err = " ".join(capfd.readouterr().err.split())
    assert code == 0, err
    assert "8 of 16 images are held out of calibration, drift is measured on them" in err
    assert "answers by the float model" in err
    golden = read_golden(Bundle.open(out))
    assert len(golden.suite.images) == 8 and len(golden.suite.lines) <= 32
    assert all(line.line.answer and line.image is not None for line in golden.suite.lines)
    assert [p.name for p in out.parent.iterdir()] == ["b"], "answers of a finished export are removed"


def test_answers_are_generated_for_what_is_read(folder, tmp_path, monkeypatch):
    """Int8 vision reads calibration images alone: only golden lines are answered. A given golden suite has answers."""
    asked = []
    monkeypatch.setattr(
        own_answers, "own_answers", lambda _, lines, *__: asked.append(lines.lines) or [[40]] * len(lines.lines)
    )
    photos = folder(16)
    checkpoint, plan = planned("mini", tmp_path / "b", calibration=photos, quality="fast")
    cache = EmbeddingCache(checkpoint)
    found = with_answers(checkpoint, plan, cache)
    assert asked.pop() == plan.golden.lines and found.calibration is plan.calibration
    assert all(line.answer for line in found.golden.lines)
    checkpoint, plan = planned("mini", tmp_path / "b", calibration=photos, method="gptq", golden=CALIBRATION)
    found = with_answers(checkpoint, plan, cache)
    assert asked.pop() == plan.calibration.lines and found.golden is plan.golden and len(found.calibration.images()) == 16
    checkpoint, plan = planned("mini", tmp_path / "b", calibration=CALIBRATION, method="gptq")
    assert with_answers(checkpoint, plan, cache) is plan and not asked, "lines with answers need none"
    assert len(plan.golden.images()) == 8 and not {*plan.golden.images()} & {*plan.calibration.images()}


def test_drift_is_foretold_for_given_answers_of_the_set_that_it_is_measured_on(folder, tmp_path):
    photos = folder(16)
    foretold = {
        "embedded": {},
        "a folder": {"calibration": photos},
        "other golden lines": {"golden": CALIBRATION},
        "other calibration lines": {"calibration": CALIBRATION, "golden": HELDOUT},
    }
    found = {name: pipeline._foretells(planned("mini", tmp_path / "b", **given)[1]) for name, given in foretold.items()}
    assert found == {"embedded": True, "a folder": False, "other golden lines": False, "other calibration lines": False}
    assert pipeline._foretells(planned("mini", tmp_path / "b", calibration=CALIBRATION)[1])  # some of it is held out


@pytest.mark.parametrize("side", ["to calibrate on", "held out to measure drift on"])
def test_a_side_without_any_answer_is_refused(folder, tmp_path, monkeypatch, side):
    checkpoint, plan = planned("mini", tmp_path / "b", calibration=folder(16), method="gptq")
    golden = {line.image for line in plan.golden.lines}
    wanted = side == "to calibrate on"

    def answers(_checkpoint, lines, *_):
        return [[40] if (line.image in golden) is wanted else [] for line in lines.lines]

    monkeypatch.setattr(own_answers, "own_answers", answers)
    with pytest.raises(InputError, match=f"answers to all lines {side} are empty; add images, or give answers"):
        with_answers(checkpoint, plan, EmbeddingCache(checkpoint))


def test_finished_answers_are_kept_beside_the_bundle(folder, tmp_path):
    checkpoint, plan = planned("mini", tmp_path / "out" / "b", calibration=folder(16), quality="fast")
    found = with_answers(checkpoint, plan, EmbeddingCache(checkpoint))
    kept = json.loads(answers_file(plan.directory).read_bytes())
    assert len(kept["tokens"]) == len(plan.golden.lines) >= len(found.golden.lines) > 0


def test_of_a_small_folder_nothing_is_held_out(folder, tmp_path, capfd):
    _, plan = planned("mini", tmp_path / "b", calibration=folder(15), method="gptq")
    assert len(plan.calibration.images()) == 15 and plan.golden.name == HELDOUT.name
    said = " ".join(capfd.readouterr().err.split())
    assert "fewer than 16 different images, so none is held out and drift is measured on others; add images" in said


def test_what_a_folder_is_refused_for(folder, tmp_path, text_only):
    photos = folder(2)
    _, plan = planned("mini", tmp_path / "b", calibration=photos, method="gptq", golden=CALIBRATION)
    assert len(plan.calibration.images()) == 2
    with pytest.raises(InputError, match="mamba-tiny is a text-only model that cannot answer them; give lines without images"):
        planned(text_only, tmp_path / "b", calibration=photos, method="gptq", golden=CALIBRATION)
    with pytest.raises(InputError, match="--skip-bad is for images and lines of --calibration; omit it"):
        planned("mini", tmp_path / "b", skip_bad=True)
    (photos / "bad.jpg").write_bytes(b"no image")
    with pytest.raises(InputError, match="1 of 3 images cannot be read: bad.jpg: .*; remove them, or give --skip-bad"):
        planned("mini", tmp_path / "b", calibration=photos, method="gptq")


def test_calibrate_takes_a_folder(folder, tmp_path, capfd):
    photos, out = folder(2), tmp_path / "s.safetensors"
    (photos / "bad.jpg").write_bytes(b"no image")
    given = ["--checkpoint", "mini", "--data", str(photos), "--out", str(out)]
    assert run_command(calibrate.command, given) == 2 and "or give --skip-bad" in " ".join(capfd.readouterr().err.split())
    assert run_command(calibrate.command, [*given, "--skip-bad", "--lines", "4"]) == 0, capfd.readouterr().err
    assert 0 < read_header(out).lines <= 4
    assert {p.name for p in tmp_path.iterdir()} == {"photos", "s.safetensors"}


def test_calibrate_refuses_images_for_a_text_only_model(folder, text_only, tmp_path, capfd):
    given = ["--checkpoint", str(text_only), "--data", str(folder(1)), "--out", str(tmp_path / "s")]
    assert run_command(calibrate.command, given) == 2
    assert "questions about images without answers, and mamba-tiny is a text-only model" in " ".join(
        capfd.readouterr().err.split()
    )


def test_skip_bad_without_data_is_refused(tmp_path, capfd):
    assert run_command(calibrate.command, ["--checkpoint", "mini", "--out", str(tmp_path / "s"), "--skip-bad"]) == 2
    assert "--skip-bad is for images and lines of --data; omit it" in " ".join(capfd.readouterr().err.split())


@pytest.mark.parametrize(("positions", "images"), [(64 * 200, 200), (64 * 7 + 63, 7), (1, 1)])
def test_images_beyond_what_a_pass_can_read_are_left_out(positions, images, monkeypatch, capfd):
    """Whole images with all of their lines, evenly spaced; lines without an image stay."""
    monkeypatch.setattr(lines_module, "MOST_VISUAL_POSITIONS", positions)
    config, every = open_checkpoint("mini").config, LineSet.embedded(more=True)
    every = replace(every, lines=[*every.lines, Line("Why?", "Because.", "text")])
    found = affordable(every, config, gradients=True)
    kept = [image.name for image in found.images()]
    assert len(kept) == images and found.lines[-1].image is None
    assert [line for line in every.lines if line.image is None or Path(line.image).name in kept] == list(found.lines)
    assert kept == [every.images()[i * 200 // images].name for i in range(images)]
    assert (f"{images} of 200 images are used" in capfd.readouterr().err) is (images < 200)


def test_statistics_of_answered_lines_read_all_images(monkeypatch):
    monkeypatch.setattr(lines_module, "MOST_STATISTICS_POSITIONS", 64 * 7)
    config, every = open_checkpoint("mini").config, LineSet.embedded()
    assert affordable(every, config, gradients=False) is every
    asked = replace(every, lines=[structs.replace(line, answer="") for line in every.lines])
    assert len(affordable(asked, config, gradients=False).images()) == 7
