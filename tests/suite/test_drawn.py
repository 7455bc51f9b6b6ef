"""Drawn images, and the calibration lines about them."""

import numpy as np
import platformdirs
import pytest
from PIL import Image

from cobra_edge.bench.vision_towers import config_of
from cobra_edge.bundle.reader import Bundle
from cobra_edge.export import lines as export_lines
from cobra_edge.export.lines import drawn_lines, golden_lines
from cobra_edge.export.pipeline import export_bundle
from cobra_edge.formats.targets import target_named
from cobra_edge.regress.golden import read_golden
from cobra_edge.suite import drawn_set as drawn_sets
from cobra_edge.suite.drawn_images import SIZE, drawn_image
from cobra_edge.suite.drawn_set import drawn_set

CPU = target_named("cpu")


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return platformdirs.user_cache_path("cobra_edge")


def test_images_are_the_same_each_time_and_all_different():
    first, again = ([np.asarray(drawn_image(i)) for i in range(26)] for _ in range(2))
    assert all((a == b).all() for a, b in zip(first, again, strict=True))
    assert all(a.shape == (SIZE, SIZE, 3) and a.dtype == np.uint8 and a.std() > 5 for a in first)
    assert len({a.tobytes() for a in first}) == 26


def test_kinds_differ_as_photographs_and_print_do():
    """By the share of neighbouring pixels that are nearly equal, and by the spread of brightness."""
    smooth = [(np.abs(np.diff(np.asarray(drawn_image(i).convert("L"), float), axis=1)) < 8).mean() for i in range(24)]
    spread = [np.asarray(drawn_image(i).convert("L"), float).std() for i in range(24)]
    assert np.ptp(smooth) > 0.2 and max(spread) > 3 * min(spread)


def test_images_are_drawn_once(own_cache):
    found = drawn_set(13)
    assert own_cache in found.directory.parents
    files = {f: f.stat().st_mtime_ns for f in found.images()}
    assert len(files) == 13 and {f.name for f in found.directory.iterdir()} == {f.name for f in files}
    assert {f: f.stat().st_mtime_ns for f in drawn_set(13).images()} == files
    assert all(line.answer == "" for line in found.lines) and len(found.lines) == 13 * 4 + 2


@pytest.fixture
def plain_images(own_cache, monkeypatch):
    monkeypatch.setattr(drawn_sets, "drawn_image", lambda index: Image.new("RGB", (1, 1), (index, 0, 0)))


def test_only_models_of_larger_images_get_them(plain_images):
    assert drawn_lines(config_of("cobra-mini")) is None
    found = drawn_lines(config_of("cobra-3b"))
    kept, held_out = found.divided()
    assert len(kept.images()) == 64 and len(held_out.images()) == 16 and not set(kept.images()) & set(held_out.images())


@pytest.mark.parametrize(("in_minutes", "images", "lines"), [(False, 16, 64), (True, 8, 16)])
def test_golden_lines_of_a_large_model_can_be_judged(plain_images, in_minutes, images, lines):
    config = config_of("cobra-3b")
    found = golden_lines(drawn_lines(config).divided()[1], None, config, in_minutes=in_minutes)
    assert (len(found.images()), len(found.lines)) == (images, lines) and len({line.task for line in found.lines}) > 4


def test_an_export_answers_them_and_measures_drift_on_those_held_out(own_cache, tmp_path, monkeypatch, sharing):
    monkeypatch.setattr(export_lines, "_EMBEDDED_PIXELS", 64)
    monkeypatch.setattr(export_lines, "MOST_IMAGES", 16)
    exported = export_bundle("mini", CPU, tmp_path / "bundle", quality="fast", vision_precision="fp32", golden_lines=8)
    suite = read_golden(Bundle.open(exported.directory)).suite
    assert len(suite.lines) == 8 and all(line.line.answer for line in suite.lines)
