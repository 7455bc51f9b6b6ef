"""An export sees each image once in float32, and hashes the checkpoint once."""

import hashlib
import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest

from cobra_edge.export import command as export_module
from cobra_edge.formats.scheme import SCHEMES
from cobra_edge.inputs.image import ImageTransform, load_image
from cobra_edge.model import checkpoint as checkpoint_module
from cobra_edge.model.checkpoint import open_checkpoint
from cobra_edge.model.cobra import load_vision
from cobra_edge.model.vision import Encoder
from cobra_edge.quantize import bit_allocation
from cobra_edge.quantize.sensitivity import SCHEMA_VERSION, Sensitivity, candidates, write_sensitivity
from cobra_edge.regress import float_reference
from cobra_edge.suite.reader import CALIBRATION, HELDOUT, read_suite
from cobra_edge.terminal.output import run_command

from ..conftest import MINI, MINI_MAMBA

N_IMAGES = 3


def hash_of(pixels):
    return hashlib.sha256(pixels.tobytes()).hexdigest()


@pytest.fixture
def seen(monkeypatch):
    """Count what enters encoders in float32, by a hash of the pixels; the noise floor's models compute in 16 bits."""
    counts, real, narrow = Counter(), Encoder.forward, list[Encoder]()

    def counted(encoder, pixels):
        if not any(encoder is other for other in narrow) and type(pixels).__name__ == "Tensor":  # not those of a tracer
            counts.update(hash_of(image.numpy()) for image in pixels.detach())
        return real(encoder, pixels)

    def load_narrow(checkpoint):
        model = load_vision(checkpoint)
        narrow.extend(model.tower.encoders)
        return model

    monkeypatch.setattr(Encoder, "forward", counted)
    monkeypatch.setattr(float_reference, "load_vision", load_narrow)
    return counts


@pytest.fixture
def hashed(monkeypatch):
    """Count how often a checkpoint's files are hashed."""
    passes = []
    counting = SimpleNamespace(sha256=lambda: passes.append(1) or hashlib.sha256())
    monkeypatch.setattr(checkpoint_module, "hashlib", counting)
    return passes


def write_suite(file, lines):
    """Write lines with whole paths of their images."""
    rows = [msgspec.to_builtins(line) | {"image": str(MINI / line.image)} for line in lines]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def lines_of(suite, n_images):
    """Return the lines about a suite's first images, of which each has several."""
    lines = read_suite(suite)
    names = list(dict.fromkeys(line.image for line in lines))[:n_images]
    return [line for line in lines if line.image in names]


def write_made_up_sensitivity(file, checkpoint):
    """Write sensitivities of cobra-mini by which a scheme costs less the later it stands in the table."""
    kld = {name: {s: 1 / (1 + i) for i, s in enumerate(fits)} for name, fits in candidates(MINI_MAMBA).items()}
    of = {"method": "gptq", "rotations": (), "activations": "float32", "activation_percentile": None}
    header = Sensitivity(SCHEMA_VERSION, "0", "cobra-mini", checkpoint.sha256(), lines=1, positions=1, kld=kld, **of)
    write_sensitivity(header, file)


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_each_image_is_seen_once_and_the_checkpoint_hashed_once(seen, hashed, tmp_path, capfd, monkeypatch, precision):
    """Golden lines, int8 calibration, statistics and bit allocation share embeddings; one image is in both suites."""
    checkpoint = open_checkpoint("mini")
    golden, calibration = (tmp_path / f"{name}.jsonl" for name in ("golden", "calibration"))
    write_suite(calibration, lines_of(CALIBRATION, N_IMAGES))
    write_suite(golden, [*lines_of(HELDOUT, N_IMAGES), *lines_of(CALIBRATION, 1)])
    write_made_up_sensitivity(tmp_path / "s.json", checkpoint)
    (tmp_path / "budget.toml").write_text("".join(f"[schemes.{name}]\n" for name in (*SCHEMES, "mixed")))
    monkeypatch.setattr(bit_allocation, "_MOST_MEASURED", 1)
    hashed.clear()
    given = [
        "--target",
        "cpu",
        "--method",
        "gptq",
        "--bits",
        "8",
        "--activations",
        "float32",
        "--vision-precision",
        precision,
        "--golden",
        golden,
    ]
    given += ["--calibration", calibration, "--sensitivity", tmp_path / "s.json", "--budget", tmp_path / "budget.toml"]
    assert run_command(export_module.command, [*map(str, given), "--out", str(tmp_path / "b")]) == 0, capfd.readouterr().err
    transform = ImageTransform.of(checkpoint.config)
    images = {line.image for file in (golden, calibration) for line in read_suite(file)}
    expected = [hash_of(part) for i in images for part in transform.pixels(load_image(Path(i)))[0].reshape(2, 3, 112, 112)]
    assert len(set(expected)) == 2 * 2 * N_IMAGES  # two encoders
    assert {h: seen[h] for h in expected} == dict.fromkeys(expected, 1)
    assert len(hashed) == 1
