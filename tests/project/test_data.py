"""Included data: targets, budgets, the README's tables."""

import subprocess
import sys
from pathlib import Path

import pytest

from bench.figures import PAGES, with_tables
from cobra_edge.decode.cuda.device import LEAST_CAPABILITY
from cobra_edge.errors import InputError
from cobra_edge.formats.recipe import MIXED
from cobra_edge.formats.scheme import SCHEMES
from cobra_edge.formats.targets import Target, read_toml, target_named, targets
from cobra_edge.regress.budget import judge, read_budget
from cobra_edge.regress.metrics import kl_divergence, top1_agreement
from cobra_edge.regress.report import Figure

ROOT = Path(__file__).parents[2]


def test_every_target_is_whole():
    known = targets()
    assert {"jetson-orin-nano", "jetson-orin-nx", "jetson-agx-orin", "rtx", "cpu"} <= set(known)
    assert sum(t.family == "rtx" and t.name != "rtx" for t in known.values()) >= 3
    assert len(known) == len(list((ROOT / "export" / "targets").glob("*.toml")))
    for name, target in known.items():
        assert target.name == name and target.scheme in SCHEMES
        assert target.memory_gb is None or target.memory_gb > target.system_gb
        assert (target.multiprocessors is not None) == (target.decoder_runtime == "cuda")
        if target.decoder_runtime == "cuda" and target.compute_capability is not None:
            assert tuple(map(int, target.compute_capability.split("."))) >= LEAST_CAPABILITY
    assert target_named("jetson").name == "jetson-orin-nano"
    assert target_named("jetson").memory_bandwidth_gb_s == 68


def test_a_target_file_with_a_typo_is_refused(tmp_path):
    file = tmp_path / "t.toml"
    file.write_text((ROOT / "export" / "targets" / "cpu.toml").read_text() + "memry_gb = 3\n")
    with pytest.raises(InputError, match="memry_gb"):
        read_toml(file, Target)
    file.write_text("name = ")
    with pytest.raises(InputError, match=r"t\.toml"):
        read_toml(file, Target)


def test_the_budget_knows_every_scheme():
    assert set(read_budget().schemes) == {*SCHEMES, MIXED}


def test_a_value_that_is_not_a_number_is_never_within():
    broken = dict.fromkeys(("kld_mean", "top1_agreement"), Figure(float("nan")))
    verdicts = {v.measure: v.within for v in judge(broken, read_budget().limits_of("w4a16-g128"), {})}
    assert verdicts["kld_mean"] is False and verdicts["top1_agreement"] is False


def test_metrics_by_hand():
    import numpy as np

    p = np.log(np.array([[0.5, 0.25, 0.25]]))
    q = np.log(np.array([[0.25, 0.5, 0.25]])) + 7
    assert kl_divergence(p, q)[0] == pytest.approx(0.5 * np.log(2) + 0.25 * np.log(0.5))
    assert kl_divergence(p, p)[0] == 0
    assert not top1_agreement(p, q)[0]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tables_are_made_from_the_results(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert "<!-- table: " in text
    assert with_tables(text) == text, "run: make figures"


def test_the_front_page_is_short() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150 and len(text.encode()) <= 9 * 1024
    assert (ROOT / "docs" / "drift.png").stat().st_size > 5000


def test_the_core_needs_no_torch():
    """Importing the package and everything that runs on a device imports neither torch nor anything of the export extra."""
    program = (
        "import sys, cobra_edge, cobra_edge.run, cobra_edge.inspect, cobra_edge.vision.session\n"
        "import cobra_edge.decode.numpy_reference, cobra_edge.regress.golden\n"
        "import cobra_edge.calibrate, cobra_edge.quantize.statistics\n"
        "print(sorted({'torch', 'timm', 'torchvision', 'onnx', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
