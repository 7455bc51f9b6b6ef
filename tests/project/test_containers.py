"""The container recipes and the systemd unit, as far as they can be checked without Docker and a running systemd."""

from __future__ import annotations

import configparser
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement

from bench.container_size import images
from cobra_edge.serve.command import command as serve
from cobra_edge.serve.limits import Limits

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "export" / "containers"
RECIPE = FOLDER / "Dockerfile"
IMAGES = {image["tags"][0].partition(":")[2]: image for image in images()}


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def instructions() -> list[tuple[str, str]]:
    """Return (instruction, arguments), continued lines joined, comments dropped."""
    lines = [line for line in RECIPE.read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(word, rest) for line in joined.splitlines() if line.strip() for word, _, rest in [line.partition(" ")]]


def test_each_image_is_told_with_its_base() -> None:
    told = (FOLDER / "README.md").read_text()
    for image in IMAGES:
        target = IMAGES[image]
        (tag,) = target["tags"]
        assert f"| `{tag}` | " in told and f"| `{target['args']['BASE']}` |" in told
        assert (ROOT / target["context"] / target["dockerfile"]).resolve() == RECIPE
        assert target["args"].keys() == {rest.partition("=")[0] for word, rest in instructions() if word == "ARG"}


def test_the_arguments_of_the_recipe_alone_are_those_of_the_cpu() -> None:
    defaults = dict(rest.replace('"', "").split("=") for word, rest in instructions() if word == "ARG")
    assert defaults == IMAGES["cpu"]["args"]


@pytest.mark.parametrize("image", IMAGES)
def test_constraints_and_extras_are_those_of_the_package(image: str) -> None:
    arguments, declared = IMAGES[image]["args"], project()["optional-dependencies"]
    assert (ROOT / "constraints" / f"{arguments['CONSTRAINTS']}.txt").is_file()
    extras = arguments["EXTRAS"].split(",")
    assert set(extras) <= declared.keys() and "serve" in extras
    assert ("tensorrt" in arguments["NEEDS"]) == (arguments["CONSTRAINTS"] in extras)  # a Jetson's
    if image != "cpu":
        assert [Requirement(text).name for text in declared[arguments["CONSTRAINTS"]]] == ["cuda-bindings"]


def test_the_image_has_no_rights_and_no_files_of_the_checkout() -> None:
    found = instructions()
    *_, last = (at for at, (word, _) in enumerate(found) if word == "FROM")
    assert [rest for word, rest in found if word == "COPY"] == ["--from=install /opt/cobra-edge /opt/cobra-edge"]
    user = next(at for at, (word, _) in enumerate(found) if word == "USER")
    assert user > last and found[user][1] == "10001:10001" and "RUN" not in [word for word, _ in found[user:]]
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert [line for line in ignored if line.startswith("!")] == ["!constraints", "!dist", "!dist/*.whl"] and "*" in ignored
    (entry,) = [json.loads(rest) for word, rest in found if word == "ENTRYPOINT"]
    assert Path(entry[0]).name in project()["scripts"]


def test_an_image_that_lacks_something_is_not_built() -> None:
    """What the last stage runs is run here, in this installation."""
    (check,) = [rest for word, rest in instructions() if word == "RUN" and "read_kernels" in rest]
    python, *arguments = shlex.split(check)
    assert python == "/opt/cobra-edge/bin/python" and arguments[-1] == "${NEEDS}"
    for needs, code in (("onnxruntime", 0), ("onnxruntime,no_such_module", 1)):
        done = subprocess.run([sys.executable, *arguments[:-1], needs], capture_output=True, text=True, cwd=ROOT)
        assert (done.returncode, "no_such_module is missing" in done.stderr) == (code, bool(code)), done.stderr


def test_the_wheel_of_the_machine_is_installed_with_the_extras(tmp_path: Path) -> None:
    """The scripts of the first stage are run, with a stand-in for Python that tells what it is asked for."""
    scripts = [rest for word, rest in instructions()[: instructions().index(("FROM", "${BASE}"))] if word == "RUN"]
    machine = os.uname().machine
    for place in ("dist", "constraints", "bin", "opt"):
        (tmp_path / place).mkdir()
    for processor in (machine, "other"):
        (tmp_path / "dist" / f"cobra_edge-9.9-py3-none-manylinux_2_28_{processor}.whl").touch()
    says, venv = tmp_path / "said", f'mkdir -p "$4/bin"; cp "{tmp_path}/bin/pip" "$4/bin/pip"'
    for name, text in {"python3": f'[ "$1" = -c ] || {{ {venv}; }}', "pip": f'printf "%s\\n" "$*" >> "{says}"'}.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "CONSTRAINTS": "jetpack6", "EXTRAS": "jetpack6,serve"}
    environment["PYTHON"] = "3.10"
    for script in scripts:
        body = re.sub(r"--mount=\S+\s*", "", script)
        body = re.sub(r"(?<=[\s\"(])/(?=(dist|constraints|opt)/)", f"{tmp_path}/", body)
        done = subprocess.run(["bash", "-o", "pipefail", "-euc", body], env=environment, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")
    pinned = f"install --no-cache-dir --only-binary :all: --constraint {tmp_path}/constraints/jetpack6.txt"
    wheel = f"{tmp_path}/dist/cobra_edge-9.9-py3-none-manylinux_2_28_{machine}.whl"
    assert says.read_text().splitlines() == [f"{pinned} pip", f"{pinned} {wheel}[jetpack6,serve]"]


def unit() -> configparser.ConfigParser:
    text = re.sub(r"\\\n\s*", "", (FOLDER / "cobra-edge.service").read_text())
    parsed = configparser.ConfigParser(interpolation=None, delimiters=("=",), strict=False)  # Environment= may be given twice
    parsed.optionxform = str  # type: ignore[assignment, method-assign]
    parsed.read_string(text)
    return parsed


def environment() -> dict[str, str]:
    lines = (FOLDER / "environment.example").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))  # type: ignore[misc]


def started() -> list[str]:
    """Return the words of the unit's command, with variables expanded as by systemd."""
    known = environment() | {"CREDENTIALS_DIRECTORY": "/run/credentials/c", "STATE_DIRECTORY": "/var/lib/cobra-edge"}
    words = []
    for word in unit()["Service"]["ExecStart"].split():
        split = re.fullmatch(r"\$(\w+)", word)
        words += shlex.split(known[split[1]]) if split else [re.sub(r"\$\{(\w+)\}", lambda m: known[m[1]], word)]
    return words


def composed(**variables: str) -> dict[str, Any]:
    """Return the compose file with variables that have a default expanded."""
    text = (FOLDER / "compose.yaml").read_text()
    return yaml.safe_load(re.sub(r"\$\{(\w+):-(\w+)\}", lambda m: variables.get(m[1], m[2]), text))


def understood(words: list[str]) -> dict[str, Any]:
    """Return the parsed options of `serve`. Raises click's errors for unknown ones."""
    return serve.make_context("serve", list(words)).params


def seconds(told: str) -> float:
    number, unit = re.fullmatch(r"(\d+)(s|m|)", told).groups()  # type: ignore[union-attr]
    return float(number) * (60 if unit == "m" else 1)


def test_the_unit_starts_the_server_with_options_that_it_has() -> None:
    program, command, *words = started()
    assert (program, command) == ("/opt/cobra-edge/bin/cobra-edge", "serve")
    given = understood(words)
    assert str(given["bundle"]) == "/srv/cobra-edge/bundle" and given["port"] == 8000 and given["host"] == "127.0.0.1"
    assert str(given["api_key_file"]) == "/run/credentials/c/api-key"
    assert str(given["state_dir"]) == "/var/lib/cobra-edge"
    assert given["grace"] + 10 <= seconds(unit()["Service"]["TimeoutStopSec"])


def test_the_unit_keeps_its_key_state_and_engines_where_it_may() -> None:
    service = unit()["Service"]
    assert service["LoadCredential"].partition(":")[0] == "api-key"
    assert (
        f"\nEnvironment=XDG_CACHE_HOME=/var/cache/{service['CacheDirectory']}\n" in (FOLDER / "cobra-edge.service").read_text()
    )
    assert service["StateDirectory"] == "cobra-edge" and service["DynamicUser"] == "yes"
    told = (FOLDER / "README.md").read_text()
    for file in (service["EnvironmentFile"], service["LoadCredential"].partition(":")[2], environment()["COBRA_EDGE_BUNDLE"]):
        assert file in told


def test_the_unit_leaves_the_gpu_reachable() -> None:
    service = unit()["Service"]
    # Each of these blocks devices, or drivers' use of memory; ProtectClock by allowing only the clock.
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
    assert "ProtectHomes" in done.stderr  # otherwise the checks above would be vacuous


def test_the_compose_file_starts_the_server_with_options_that_it_has() -> None:
    service = composed()["services"]["serve"]
    command, *words = service["command"]
    given = understood(words)
    assert command == "serve" and str(given["bundle"]) == "/bundle"
    assert given["device"] == "cuda"  # a GPU out of reach is an error, not a slow answer
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
    assert service["init"] and service["read_only"] and service["runtime"] == "nvidia" and service["group_add"] == ["video"]
    assert service["cap_drop"] == ["ALL"] and service["security_opt"] == ["no-new-privileges:true"]
    (check,) = [rest for word, rest in instructions() if word == "HEALTHCHECK"]
    program, flag, code = json.loads(check.partition("CMD ")[2])
    assert (program, flag) == ("/opt/cobra-edge/bin/python", "-c") and "127.0.0.1:8000/readyz" in code
    compile(code, "healthcheck", "exec")


def test_images_of_the_compose_file_are_those_that_are_built() -> None:
    built = {tag for image in IMAGES for tag in IMAGES[image]["tags"]}
    assert {composed(IMAGE=image)["services"]["serve"]["image"] for image in IMAGES} == built
    assert composed()["services"]["serve"]["image"] in built
    on_cpu = composed(IMAGE="cpu", DEVICE="cpu", RUNTIME="runc")["services"]["serve"]
    assert understood(on_cpu["command"][1:])["device"] == "cpu" and on_cpu["runtime"] == "runc"
    assert "IMAGE=cpu DEVICE=cpu RUNTIME=runc" in (FOLDER / "README.md").read_text()


def test_nothing_reports_to_its_maker() -> None:
    assert "\nEnvironment=ORT_DISABLE_TELEMETRY=1\n" in (FOLDER / "cobra-edge.service").read_text()
    *_, last = (at for at, (word, _) in enumerate(instructions()) if word == "FROM")
    assert ("ENV", "ORT_DISABLE_TELEMETRY=1") in instructions()[last:]


def test_all_clients_of_the_container_are_one_address_that_may_have_all() -> None:
    given = understood(composed()["services"]["serve"]["command"][1:])
    assert given["requests_per_address"] == given["active"] + given["waiting"]
    assert given["connections_per_address"] == Limits().connections


def blocks() -> list[str]:
    """Return the commands of the page, one string per block."""
    found = re.findall(r"^```\n(.*?)^```$", (FOLDER / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    return [block for block in found if not block.startswith("[Service]")]


STAND_INS = {
    "sudo": 'exec "$@"',
    "docker": 'printf "%s\\n" "${BUNDLE-}" "${API_KEY_FILE-}" "$@" --end-- >> "$SAID"',
    "systemctl": "exit 0",
    "journalctl": "exit 0",
    "python3": 'mkdir -p "$4/bin" && printf "#!/bin/sh\\n" > "$4/bin/pip" && chmod +x "$4/bin/pip"',
}


def followed(block: str, tmp_path: Path) -> list[list[str]]:
    """Run the commands of a block in a copy of the repository's files, under a temporary root.

    Returns:
        For each call of Docker: BUNDLE, API_KEY_FILE and the arguments.
    """
    root, here, programs, said = (tmp_path / name for name in ("root", "repository", "programs", "said"))
    for directory in (root, programs, here / "bundles" / "my-cobra", here / "export"):
        directory.mkdir(parents=True, exist_ok=True)
    (here / "bundles" / "my-cobra" / "manifest.json").write_text("{}")
    shutil.copytree(FOLDER, here / "export" / "containers", dirs_exist_ok=True)
    for name, text in STAND_INS.items():
        (programs / name).write_text(f"#!/bin/sh\n{text}\n")
        (programs / name).chmod(0o755)
    (root / "etc" / "systemd" / "system").mkdir(parents=True, exist_ok=True)
    script = re.sub(r"(?<=[ =])/(?=(opt|srv|etc)/)", f"{root}/", block).replace(" -o 10001", "")  # the owner needs root
    environment = {"PATH": f"{programs}:{os.environ['PATH']}", "SAID": str(said)}
    done = subprocess.run(["bash", "-eu", "-c", script], cwd=here, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    words = said.read_text().split("\n") if said.exists() else []
    calls: list[list[str]] = [[]]
    for word in words[:-1]:
        if word == "--end--":
            calls.append([])
        else:
            calls[-1].append(word)
    return calls[:-1]


def test_the_page_s_commands_run_one_after_the_other_and_again(tmp_path: Path) -> None:
    build, compose, service = blocks()
    built = followed(build, tmp_path / "build")
    assert [words[2] for words in built] == ["buildx", "volume", "run", "run"] and built[0][-1] in IMAGES
    for words in built:
        for mount in (words[at + 1] for at, word in enumerate(words) if word == "-v" and words[at + 1].startswith("/")):
            assert Path(mount.split(":")[0]).is_dir()  # Docker would create missing directories, as root
    for _ in range(2):
        *_, (bundle, key, *words) = followed(compose, tmp_path / "compose")
        assert words[:2] == ["compose", "-f"] and (tmp_path / "compose" / "repository" / words[2]).is_file()
        assert Path(bundle).is_absolute() and (Path(bundle) / "manifest.json").is_file()
        assert Path(key).is_absolute() and re.fullmatch(r"[0-9a-f]{64}\n", Path(key).read_text())
        assert Path(key).stat().st_mode & 0o777 == 0o400 and "-m 400 -o 10001" in compose
    for _ in range(2):
        followed(service, tmp_path / "service")
        root = tmp_path / "service" / "root"
        laid = {str(file.relative_to(root)) for file in root.rglob("*") if file.is_file()}
        assert laid == {
            "opt/cobra-edge/bin/pip",
            "srv/cobra-edge/bundle/manifest.json",
            "etc/cobra-edge/environment",
            "etc/cobra-edge/api-key",
            "etc/systemd/system/cobra-edge.service",
        }
        (root / "srv" / "cobra-edge" / "bundle" / "of-the-old-one").touch()  # must be gone when it is replaced


def test_paths_in_the_compose_file_s_own_words_are_absolute() -> None:
    (said,) = re.findall(r"^#   (BUNDLE=\S+ API_KEY_FILE=\S+) docker", (FOLDER / "compose.yaml").read_text(), re.MULTILINE)
    assert said == 'BUNDLE="$PWD/bundles/my-cobra" API_KEY_FILE=/etc/cobra-edge/api-key'


def test_every_volume_is_the_image_s() -> None:
    targets = {v.partition(":")[2] for v in composed()["services"]["serve"]["volumes"] if isinstance(v, str)}
    assert {rest for word, rest in instructions() if word == "VOLUME"} == targets
    assert ("ENV", "XDG_CACHE_HOME=/cache") in instructions()
