"""`python -m bench.container_size dist`: what each container adds to its base, from the files that it installs.

uv installs the wheel and its libraries for the container's platform into a directory; nothing of it is run.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import click
import msgspec

from cobra_edge.bench.results import save_result
from cobra_edge.bench.tables import Table, print_result
from cobra_edge.errors import InputError, MachineError
from cobra_edge.terminal.option_groups import Command, option
from cobra_edge.terminal.output import debug_option, main_of, print_json, progress

ROOT = Path(__file__).resolve().parents[1]
NAME = "container-size"
BAKE = ROOT / "export" / "containers" / "docker-bake.json"
# By Docker's platform: the wheel's processor, and uv's name of the platform.
PLATFORMS = {
    "linux/amd64": ("x86_64", "x86_64-manylinux_2_28"),
    "linux/arm64": ("aarch64", "aarch64-manylinux_2_35"),
}


class ContainerSize(msgspec.Struct, frozen=True):
    """What an image has beyond its base: bytes of files, and how many distributions."""

    image: str
    platform: str
    base: str
    installed_bytes: int
    distributions: int


class ContainerSizeResult(msgspec.Struct, frozen=True, kw_only=True):
    """`python -m bench.container_size`."""

    bench: str = "container_size"
    images: tuple[ContainerSize, ...]


@click.command(cls=Command, epilog="Example: python -m bench.container_size dist")
@click.argument("wheels", type=click.Path(path_type=Path, exists=True, file_okay=False))
@option("--json", "as_json", group="output", is_flag=True, help="Print one JSON object instead of a table.")
@debug_option
def container_size(wheels: Path, as_json: bool) -> None:
    """Install the wheels of WHEELS, as the containers do, for their platforms, and count the bytes."""
    if shutil.which("uv") is None:
        raise MachineError("uv is missing; pip install uv")
    with progress() as bar:
        wanted = [(image, platform) for image in images() for platform in image["platforms"]]
        task, found = bar.add_task("containers", total=len(wanted)), []
        for image, platform in wanted:
            found.append(measured(image, platform, wheels))
            bar.advance(task)
    result = ContainerSizeResult(images=tuple(found))
    file = save_result(NAME, result)
    if as_json:
        print_json(result)
    else:
        print_result([container_size_table(result)], file)


def images() -> list[dict[str, Any]]:
    """Return the images of docker-bake.json: targets with a tag, each with what it inherits."""
    targets = json.loads(BAKE.read_text(encoding="utf-8"))["target"]

    def whole(name: str) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for above in targets[name].get("inherits", []):
            found |= whole(above)
        return found | targets[name] | {"args": found.get("args", {}) | targets[name].get("args", {})}

    return [whole(name) for name in targets if "tags" in targets[name]]


def measured(image: dict[str, Any], platform: str, wheels: Path) -> ContainerSize:
    """Install an image's files into a directory and count them. Raises InputError without its wheel."""
    processor, name = PLATFORMS[platform]
    arguments, (tag,) = image["args"], image["tags"]
    wheel = next(wheels.glob(f"cobra_edge-*_{processor}.whl"), None)
    if wheel is None:
        raise InputError(f"{wheels}: has no wheel for {processor}; make wheels")
    pins = ROOT / "constraints" / f"{arguments['CONSTRAINTS']}.txt"
    with tempfile.TemporaryDirectory() as folder:
        install = ["uv", "pip", "install", "--quiet", "--target", folder, "--only-binary", ":all:", "--constraint", str(pins)]
        install += ["--python-platform", name, "--python-version", arguments["PYTHON"]]
        subprocess.run([*install, f"{wheel}[{arguments['EXTRAS']}]"], check=True)
        files = [file for file in Path(folder).rglob("*") if file.is_file()]
        total = sum(file.stat().st_size for file in files)
        return ContainerSize(tag, platform, arguments["BASE"], total, len(list(Path(folder).glob("*.dist-info"))))


def container_size_table(result: ContainerSizeResult) -> Table:
    """Return what each image adds to its base."""
    rows = [
        [f"`{i.image}`", i.platform, f"`{i.base}`", f"{i.installed_bytes / 1e6:.0f}", str(i.distributions)]
        for i in result.images
    ]
    return Table(("image", "platform", "base", "added, MB", "distributions"), rows)


if __name__ == "__main__":
    main_of(container_size)()
