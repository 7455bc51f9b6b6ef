"""`python -m bench.container_size`: which images, what is installed for them, and the table."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from bench.container_size import ContainerSizeResult, container_size_table, images, measured
from cobra_edge.errors import InputError


def test_an_image_inherits_arguments_and_keeps_its_own() -> None:
    found = {image["tags"][0]: image for image in images()}
    thor, jetpack7 = found["cobra-edge:jetpack7-thor"], found["cobra-edge:jetpack7"]
    assert thor["args"]["EXTRAS"] == jetpack7["args"]["EXTRAS"] and thor["args"]["BASE"] != jetpack7["args"]["BASE"]
    assert {platform for image in found.values() for platform in image["platforms"]} == {"linux/amd64", "linux/arm64"}


def test_what_is_installed_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = next(i for i in images() if i["tags"] == ["cobra-edge:jetpack6"])
    with pytest.raises(InputError, match="has no wheel for aarch64"):
        measured(image, "linux/arm64", tmp_path)
    wheel = tmp_path / "cobra_edge-1.0-py3-none-manylinux_2_28_aarch64.whl"
    wheel.touch()
    asked: list[list[str]] = []

    def uv(command: list[str], check: bool) -> None:
        asked.append(command)
        target = Path(command[command.index("--target") + 1])
        (target / "a-1.dist-info").mkdir()
        (target / "a.py").write_text("x" * 1000)

    monkeypatch.setattr(subprocess, "run", uv)
    found = measured(image, "linux/arm64", tmp_path)
    assert (found.installed_bytes, found.distributions) == (1000, 1)
    (command,) = asked
    assert command[-1] == f"{wheel}[jetpack6,serve]" and "aarch64-manylinux_2_35" in command
    assert command[command.index("--python-version") + 1] == "3.10"
    assert container_size_table(ContainerSizeResult(images=(found,))).rows == [
        ["`cobra-edge:jetpack6`", "linux/arm64", f"`{image['args']['BASE']}`", "0", "1"]
    ]
