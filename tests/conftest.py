"""Fixtures: small checkpoints written fresh, and bundles of cobra-mini exported once a session."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import platformdirs
import pytest
from filelock import FileLock

import cobra_edge.environment.privacy  # noqa: F401  # before torch and all else that may report

# isort: split
import torch

from cobra_edge.export.pipeline import export_bundle
from cobra_edge.formats.model_config import MambaConfig, decoder_shapes, projector_shapes
from cobra_edge.formats.targets import target_named
from cobra_edge.model.torch_device import why_no_torch_gpu

from .export_case import sharing_exports

ROOT = Path(__file__).parents[1]
MINI = ROOT / "cobra_edge" / "mini"
MINI_MAMBA = MambaConfig(256, 4, 512, 512, 16, 4, 16)
TINY_MAMBA = MambaConfig(128, 2, 512, 256, 16, 4, 8)


# Marked `slow`, and left out by `make quick`: files, or single tests, by the beginnings of their node ids.
SLOW = (
    "tests/bench/",
    "tests/calibrate/test_calibrate.py",
    "tests/calibration/test_fusion.py",
    "tests/calibration/test_lessons.py",
    "tests/calibration/test_training.py",
    "tests/decode/test_contract.py",
    "tests/decode/test_native.py",
    "tests/emulated/",
    "tests/environment/test_threads.py::test_a_command_settles_it_before_torch_is_imported",
    "tests/export/",
    "tests/formats/test_onnx_file.py::test_graphs_of_bundles_are_plain",
    "tests/formats/test_onnx_file.py::test_what_exports_write_is_plain",
    "tests/laboratory/",
    "tests/model/test_checkpoint.py::test_offline_is_said_in_one_line",
    "tests/project/test_action.py",
    "tests/project/test_base_install.py",
    "tests/project/test_ci_examples.py",
    "tests/project/test_docs.py",
    "tests/project/test_privacy.py",
    "tests/project/test_site.py",
    "tests/project/test_workflow.py",
    "tests/quantize/test_sensitivity.py",
    "tests/regress/test_attribution.py",
    "tests/regress/test_gates.py",
    "tests/regress/test_golden.py",
    "tests/regress/test_lm_eval.py",
    "tests/regress/test_lmms_eval.py",
    "tests/regress/test_outputs.py::test_html_is_the_same_each_time",
    "tests/regress/test_outputs.py::test_html_stays_small_with_a_dozen_photographs",
    "tests/regress/test_outputs.py::test_markdown_never_passes_githubs_limit",
    "tests/regress/test_regress.py",
    "tests/regress/test_report_browser.py",
    "tests/serve/test_connections.py",
    "tests/serve/test_faults.py",
    "tests/serve/test_openai_clients.py",
    "tests/serve/test_page",
    "tests/serve/test_prefix_cache.py",
    "tests/serve/test_schema.py",
    "tests/vision/",
)

# Files that take a processor for a minute or more though their tests are few: begun last, one of them would go on alone.
LONG = (
    "tests/regress/test_gates.py",
    "tests/calibration/test_training.py",
    "tests/calibrate/test_calibrate.py",
    "tests/project/test_base_install.py",
    "tests/bench/test_vision.py",
    "tests/emulated/test_sanitizers.py",
    "tests/laboratory/test_gpu_rehearsal.py",
    "tests/emulated/test_mini.py",
    "tests/calibration/test_fusion.py",
    "tests/regress/test_lmms_eval.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what is SLOW. Put long files first, then those of many tests: processes take them in this order."""
    for item in items:
        if item.nodeid.startswith(SLOW):
            item.add_marker(pytest.mark.slow)
    tests_of = Counter(item.path for item in items)
    items.sort(key=lambda item: (not item.nodeid.startswith(LONG), -tests_of[item.path], item.path))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what is marked "gpu" where there is no GPU: from one place, so that the summary counts it in one line."""
    if item.get_closest_marker("gpu") is not None:
        reason = why_no_torch_gpu()
        if reason is not None:
            pytest.skip(f"no GPU to test on: {reason}")


def random_tensor(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Return values a working decoder could have."""
    if name.endswith("A_log"):
        return torch.log(torch.arange(1.0, shape[1] + 1)).repeat(shape[0], 1)
    if name.endswith(("norm.weight", "norm_f.weight", ".D")):
        return 1 + 0.1 * torch.randn(shape)
    return torch.randn(shape) * (shape[-1] ** -0.5 if len(shape) > 1 else 0.1)


def random_tensors(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return {name: random_tensor(name, shape) for name, shape in shapes.items()}


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Keep what is remembered of bundles out of the user's own cache; processes that a test starts inherit it."""
    directory = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        # pip's stays where it is: without it the test of the base install would download everything each time.
        patch.setenv("PIP_CACHE_DIR", os.environ.get("PIP_CACHE_DIR", str(platformdirs.user_cache_path("pip"))))
        patch.setenv("XDG_CACHE_HOME", str(directory))
        yield directory


@dataclass
class RunDirectory:
    """The pieces of an original run directory, to be broken in one place and written."""

    config: dict[str, Any] = field(
        default_factory=lambda: {
            "model": {
                "model_id": "cobra-test",
                "arch_specifier": "no-align+fused-gelu-mlp",
                "vision_backbone_id": "dinosiglip-vit-mini-112px",
                "llm_backbone_id": "mamba-mini-zephyr",
                "image_resize_strategy": "resize-naive",
                "llm_max_length": 256,
            }
        }
    )
    decoder: dict[str, torch.Tensor] = field(default_factory=lambda: random_tensors(decoder_shapes(MINI_MAMBA)))
    projector: dict[str, torch.Tensor] = field(
        default_factory=lambda: random_tensors(projector_shapes("fused-gelu-mlp", 256, 256))
    )

    def write(self, directory: Path) -> Path:
        (directory / "checkpoints").mkdir(parents=True)
        (directory / "config.json").write_text(json.dumps(self.config))
        llm = {f"llm.{k}": v for k, v in self.decoder.items()}
        llm["llm.lm_head.weight"] = self.decoder["backbone.embedding.weight"]
        model = {"projector": self.projector, "llm_backbone": llm}
        torch.save({"model": model}, directory / "checkpoints" / "latest-checkpoint.pt")
        return directory


@pytest.fixture
def run_directory() -> RunDirectory:
    return RunDirectory()


def write_text_only(directory: Path, seed: int = 0, config: MambaConfig = TINY_MAMBA) -> Path:
    """Write a bare Mamba in the state-spaces layout, with cobra-mini's tokenizer."""
    from safetensors.torch import save_file

    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps({"d_model": config.d_model, "n_layer": config.n_layer}))
    save_file(random_tensors(decoder_shapes(config), seed), directory / "model.safetensors")
    (directory / "tokenizer.json").write_bytes((MINI / "tokenizer.json").read_bytes())
    return directory


@pytest.fixture
def text_only(tmp_path: Path) -> Path:
    return write_text_only(tmp_path / "mamba-tiny")


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a text-only bundle: quick to make, for tests of the bundle itself. Do not change it; copy it."""
    root = tmp_path_factory.mktemp("tiny")
    source = write_text_only(root / "mamba-tiny")
    return export_bundle(
        str(source), target_named("cpu"), root / "bundle", scheme="w8a16-g128", method="rtn", golden_lines=16
    ).directory


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the directory of all processes that test side by side; names in it are the callers' affair."""
    root = tmp_path_factory.getbasetemp()
    return root.parent if "PYTEST_XDIST_WORKER" in os.environ else root


@pytest.fixture(scope="session")
def sharing(shared: Path) -> Callable[[], AbstractContextManager[None]]:
    """Return a context in which exports of cobra-mini share what knows no scheme: see `sharing_exports`."""
    return sharing_exports(shared / "exports")


@pytest.fixture(scope="session")
def default_bundle(shared: Path, sharing: Callable[[], AbstractContextManager[None]]) -> Path:
    """Return what an export for a Jetson makes of cobra-mini without any option, made when it is first asked for."""
    out = shared / "default"
    with FileLock(f"{out}.lock"), sharing():
        if not out.exists():
            export_bundle("mini", target_named("jetson"), out)
    return out


@pytest.fixture(scope="session")
def mini_bundle(shared: Path, sharing: Callable[[], AbstractContextManager[None]]) -> Callable[..., Path]:
    """Return cobra-mini's bundle of a scheme, and of options of an export, made when it is first asked for; 48 golden lines.

    Processes that test side by side share them. Do not change one; copy it.
    """

    def get(scheme: str, **options: Any) -> Path:
        out = shared / "-".join(["mini", scheme, *(Path(str(option)).name for option in options.values())])
        with FileLock(f"{out}.lock"), sharing():
            if not out.exists():  # an export that fails leaves nothing
                export_bundle(
                    "mini", target_named("jetson"), out, scheme=scheme, **{"golden_lines": 48, "method": "rtn"} | options
                )
        return out

    return get
