"""The containers' recipes and the service, as far as they can be checked without Docker and without a running systemd."""

from __future__ import annotations

import configparser
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from cobra_edge.serve.command import command as serve

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "export" / "containers"
RECIPES = sorted(FOLDER.glob("*.Dockerfile"))
KNOWN = {"ARG", "FROM", "ENV", "RUN", "WORKDIR", "COPY", "VOLUME", "EXPOSE", "ENTRYPOINT", "CMD"}


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def instructions(recipe: Path) -> list[tuple[str, str]]:
    """Return (instruction, arguments), continued lines joined, comments dropped."""
    lines = [line for line in recipe.read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(word, rest) for line in joined.splitlines() if line.strip() for word, _, rest in [line.partition(" ")]]


def copied(recipe: Path) -> list[str]:
    given = [rest.split() for word, rest in instructions(recipe) if word == "COPY" and not rest.startswith("--from=")]
    return [source for words in given for source in words[:-1]]


def test_there_is_a_recipe_for_each_jetpack() -> None:
    assert [r.name for r in RECIPES] == ["jetpack6.Dockerfile", "jetpack7.Dockerfile"]
    told = (FOLDER / "README.md").read_text()
    for recipe in RECIPES:
        base = dict(instructions(recipe))["ARG"].removeprefix("BASE=")
        assert recipe.name in told and base in told


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: r.stem)
def test_a_recipe_is_well_formed(recipe: Path) -> None:
    found = instructions(recipe)
    assert {word for word, _ in found} <= KNOWN
    assert found[0][0] == "ARG" and re.fullmatch(r"BASE=[a-z0-9./-]+:[a-z0-9.-]+", found[0][1])
    stages = [rest for word, rest in found if word == "FROM"]
    assert stages == ["${BASE} AS wheel", "${BASE}"]
    assert all(rest.count('"') % 2 == 0 and rest.count("'") % 2 == 0 for _, rest in found)
    assert ("ENV", "XDG_CACHE_HOME=/cache") in found and ("VOLUME", "/cache") in found


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: r.stem)
def test_what_is_copied_is_there_and_suffices_for_the_build(recipe: Path) -> None:
    sources = copied(recipe)
    assert sources and all((ROOT / s).exists() for s in sources)
    cmake = (ROOT / "CMakeLists.txt").read_text()
    needed = [*re.findall(r"add_subdirectory\((\S+)\)", cmake), "CMakeLists.txt", "pyproject.toml", "cobra_edge"]
    needed += [d for found in re.findall(r"install\(DIRECTORY ([^)]*?) DESTINATION", cmake) for d in found.split()]
    needed += [project()["readme"], *project()["license-files"]]
    assert [n for n in needed if n not in sources and not any(n.startswith(f"{s}/") for s in sources)] == []


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: r.stem)
def test_python_and_extras_are_those_of_the_package(recipe: Path) -> None:
    text = recipe.read_text()
    (wanted,) = re.findall(r"sys\.version_info\[:2\] == \((\d+), (\d+)\)", text)
    (least,) = re.findall(r">=(\d+)\.(\d+)", project()["requires-python"])
    assert tuple(map(int, wanted)) >= tuple(map(int, least))
    (extras,) = re.findall(r"\.whl\)\[([\w,]+)\]", text)
    assert extras.split(",") == [recipe.stem, "serve"]
    assert set(extras.split(",")) <= project()["optional-dependencies"].keys()
    (entry,) = [rest for word, rest in instructions(recipe) if word == "ENTRYPOINT"]
    assert Path(entry.strip('["]')).name in project()["scripts"]


def unit() -> configparser.ConfigParser:
    text = re.sub(r"\\\n\s*", "", (FOLDER / "cobra-edge.service").read_text())
    parsed = configparser.ConfigParser(interpolation=None, delimiters=("=",))
    parsed.optionxform = str  # type: ignore[assignment, method-assign]
    parsed.read_string(text)
    return parsed


def environment() -> dict[str, str]:
    lines = (FOLDER / "environment.example").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))  # type: ignore[misc]


def started() -> list[str]:
    """Return the words of the unit's command, variables filled in as systemd does."""
    known = environment() | {"CREDENTIALS_DIRECTORY": "/run/credentials/c", "STATE_DIRECTORY": "/var/lib/cobra-edge"}
    words = []
    for word in unit()["Service"]["ExecStart"].split():
        split = re.fullmatch(r"\$(\w+)", word)
        words += shlex.split(known[split[1]]) if split else [re.sub(r"\$\{(\w+)\}", lambda m: known[m[1]], word)]
    return words


def composed() -> dict[str, Any]:
    return yaml.safe_load((FOLDER / "compose.yaml").read_text())


def understood(words: list[str]) -> dict[str, Any]:
    """Return what `serve` makes of these words. Raises click's errors for those it does not know."""
    return serve.make_context("serve", list(words)).params


def seconds(told: str) -> float:
    number, unit = re.fullmatch(r"(\d+)(s|m|)", told).groups()  # type: ignore[union-attr]
    return float(number) * (60 if unit == "m" else 1)


def test_the_unit_starts_the_server_with_options_that_it_has() -> None:
    program, verb, *words = started()
    assert (program, verb) == ("/opt/cobra-edge/bin/cobra-edge", "serve")
    given = understood(words)
    assert str(given["bundle"]) == "/srv/cobra-edge/bundle" and given["port"] == 8000 and given["host"] == "127.0.0.1"
    assert str(given["api_key_file"]) == "/run/credentials/c/api-key"
    assert str(given["state_dir"]) == "/var/lib/cobra-edge"
    assert given["grace"] + 10 <= seconds(unit()["Service"]["TimeoutStopSec"])


def test_the_unit_keeps_its_key_state_and_engines_where_it_may() -> None:
    service = unit()["Service"]
    assert service["LoadCredential"].partition(":")[0] == "api-key"
    assert service["Environment"] == f"XDG_CACHE_HOME=/var/cache/{service['CacheDirectory']}"
    assert service["StateDirectory"] == "cobra-edge" and service["DynamicUser"] == "yes"
    told = (FOLDER / "README.md").read_text()
    for file in (service["EnvironmentFile"], service["LoadCredential"].partition(":")[2], environment()["COBRA_EDGE_BUNDLE"]):
        assert file in told


def test_the_unit_leaves_the_card_reachable() -> None:
    service = unit()["Service"]
    # Each of these takes devices away, or what drivers do with memory; ProtectClock by allowing the clock alone.
    taken = {"PrivateDevices", "DevicePolicy", "DeviceAllow", "ProtectClock", "MemoryDenyWriteExecute", "PrivateUsers"}
    assert taken.isdisjoint(service)
    assert service["SupplementaryGroups"].split() == ["video", "render"]


def test_systemd_finds_nothing_in_the_unit(tmp_path: Path) -> None:
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("no systemd-analyze on this machine")
    program, here = "/opt/cobra-edge/bin/cobra-edge", tmp_path / "cobra-edge.service"
    text = (FOLDER / "cobra-edge.service").read_text()
    assert text.count(program) == 1
    here.write_text(text.replace(program, shutil.which("true") or ""))
    done = subprocess.run([analyze, "verify", "--man=no", str(here)], capture_output=True, text=True)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
    here.write_text(here.read_text().replace("ProtectHome=yes", "ProtectHomes=yes"))
    done = subprocess.run([analyze, "verify", "--man=no", str(here)], capture_output=True, text=True)
    assert "ProtectHomes" in done.stderr  # else the lines above would show nothing


def test_the_compose_file_starts_the_server_with_options_that_it_has() -> None:
    service = composed()["services"]["serve"]
    verb, *words = service["command"]
    given = understood(words)
    assert verb == "serve" and str(given["bundle"]) == "/bundle"
    assert given["grace"] + 10 <= seconds(service["stop_grace_period"])
    assert service["ports"] == [f"127.0.0.1:8000:{given['port']}"]
    (key,) = service["secrets"]
    assert str(given["api_key_file"]) == f"/run/secrets/{key}" and key in composed()["secrets"]
    targets = {v["target"] if isinstance(v, dict) else v.partition(":")[2]: v for v in service["volumes"]}
    assert targets.keys() == {"/bundle", "/cache", str(given["state_dir"])}
    assert targets["/bundle"]["read_only"] and targets["/bundle"]["source"].startswith("${BUNDLE:?")
    assert {v.partition(":")[0] for v in service["volumes"] if isinstance(v, str)} == composed()["volumes"].keys()


def test_the_container_is_restricted_and_looked_after() -> None:
    service = composed()["services"]["serve"]
    assert service["init"] and service["read_only"] and service["runtime"] == "nvidia"
    assert service["cap_drop"] == ["ALL"] and service["security_opt"] == ["no-new-privileges:true"]
    kind, program, flag, code = service["healthcheck"]["test"]
    assert (kind, program, flag) == ("CMD", "/opt/cobra-edge/bin/python", "-c") and "/readyz" in code
    compile(code, "healthcheck", "exec")
    for release in ("jetpack6", "jetpack7"):
        assert (ROOT / service["build"]["dockerfile"].replace("${JETPACK:-jetpack6}", release)).is_file()
    assert (FOLDER / service["build"]["context"]).resolve() == ROOT


def test_every_volume_is_the_image_s() -> None:
    targets = {v.partition(":")[2] for v in composed()["services"]["serve"]["volumes"] if isinstance(v, str)}
    for recipe in RECIPES:
        assert {rest for word, rest in instructions(recipe) if word == "VOLUME"} == targets
