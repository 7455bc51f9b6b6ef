"""The number of threads of a process: the same in all its libraries, which do not spin."""

import os
import subprocess
import sys

import pytest
import torch

from cobra_edge import run, sensitivity
from cobra_edge.bench import command as bench
from cobra_edge.bench.decode_command import decode
from cobra_edge.bundle.reader import Bundle
from cobra_edge.calibrate import command as calibrate
from cobra_edge.chat import command as chat
from cobra_edge.decode.cpu import CpuDecoder
from cobra_edge.decode.decoder import DecoderOptions
from cobra_edge.environment import threads
from cobra_edge.environment.threads import default_threads, physical_cores, use_threads
from cobra_edge.export import command as export
from cobra_edge.regress import run_command as regress
from cobra_edge.regress.adapters import lm_eval_command as lm_eval_command
from cobra_edge.regress.adapters import lmms_eval_command as lmms_eval_command
from cobra_edge.serve import command as serve
from cobra_edge.terminal.output import run_command
from cobra_edge.vision.session import runtime_options
from cobra_edge.watch import command as watch

COMPUTING = {
    "export": export.command,
    "calibrate": calibrate.command,
    "sensitivity": sensitivity.command,
    "run": run.command,
    "chat": chat.command,
    "watch": watch.command,
    "serve": serve.command,
    "regress": regress.regress,
    "lm-eval": lm_eval_command.lm_eval,
    "lmms-eval": lmms_eval_command.lmms_eval,
    "bench": bench.command,
    "bench decode": decode,
}


@pytest.fixture(autouse=True)
def restored(monkeypatch):
    """Restore the environment and torch's threads."""
    for name in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", *threads._SPINNING):
        monkeypatch.setenv(name, "")  # so that it is restored
        monkeypatch.delenv(name)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Return a function that fakes a machine: the siblings of its CPUs, and files of its cgroup."""
    monkeypatch.setattr(threads, "_SIBLINGS", str(tmp_path / "cpu{}"))
    monkeypatch.setattr(threads, "_CGROUP", tmp_path)

    def pretend(siblings, **files):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(len(siblings))), raising=False)
        for cpu, text in enumerate(siblings):
            (tmp_path / f"cpu{cpu}").write_text(text)
        for name, text in files.items():
            path = tmp_path / name.replace("__", "/").replace("_dot_", ".")
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)

    return pretend


def test_siblings_of_a_core_count_once(machine):
    machine(["0,2", "1,3", "0,2", "1,3"])
    assert physical_cores() == default_threads() == 2


@pytest.mark.parametrize(
    ("quota", "cores"),
    [
        ("max 100000", 4),
        ("200000 100000", 2),
        ("150000 100000", 2),
        ("1000 100000", 1),
        ("900000 100000", 4),
        ("odd", 4),
        ("0 0", 4),
    ],
)
def test_a_containers_quota_is_kept(machine, quota, cores):
    machine(["0", "1", "2", "3"], cpu_dot_max=quota)
    assert physical_cores() == cores


@pytest.mark.parametrize(("quota", "cores"), [("-1", 4), ("250000", 3), ("x", 4)])
def test_the_quota_of_an_older_control_group_too(machine, quota, cores):
    machine(["0", "1", "2", "3"], cpu__cpu_dot_cfs_quota_us=quota, cpu__cpu_dot_cfs_period_us="100000")
    assert physical_cores() == cores


@pytest.mark.parametrize(("asked", "found"), [("3", 3), ("3,2", 3), ("", 4), ("0", 4), ("many", 4), ("99", 4), ("²", 4)])
def test_fewer_are_taken_where_the_environment_says_so(machine, monkeypatch, asked, found):
    machine(["0", "1", "2", "3"])
    monkeypatch.setenv("OMP_NUM_THREADS", asked)
    assert default_threads() == found


def test_one_number_for_all(machine, tiny_bundle, caplog):
    machine(["0", "1", "2", "3"])
    for wanted, count in ((3, 3), (None, 3), (1, 1)):  # an explicit setting is kept
        use_threads(wanted)
        assert default_threads() == torch.get_num_threads() == runtime_options().intra_op_num_threads == count
        assert os.environ["OMP_NUM_THREADS"] == str(count)  # for children
        with caplog.at_level("INFO"):
            CpuDecoder(Bundle.open(tiny_bundle), DecoderOptions())
        assert f", {count} threads, " in caplog.text.splitlines()[-1]
    assert runtime_options(2).intra_op_num_threads == 2


def test_no_thread_of_a_library_spins_for_long(monkeypatch):
    assert runtime_options().get_session_config_entry("session.intra_op.allow_spinning") == "0"
    use_threads(None)
    assert {name: os.environ[name] for name in threads._SPINNING} == threads._SPINNING
    for name in threads._SPINNING:
        monkeypatch.delenv(name)
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    use_threads(None)
    assert os.environ["GOMP_SPINCOUNT"] == "7"  # an explicit setting is kept
    monkeypatch.delenv("GOMP_SPINCOUNT")
    monkeypatch.delenv("KMP_BLOCKTIME")
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    use_threads(None)
    assert "GOMP_SPINCOUNT" not in os.environ


@pytest.mark.parametrize("name", COMPUTING)
def test_every_command_that_computes_takes_a_number(name):
    (option,) = [p for p in COMPUTING[name].params if p.name == "threads"]
    assert option.opts == ["--threads"] and option.help.startswith("Threads on a processor") and option.callback is not None


@pytest.mark.parametrize("number", ["0", "-1", "1025", "two"])
@pytest.mark.parametrize("name", ["export", "calibrate", "sensitivity", "run", "regress", "bench"])
def test_a_number_that_cannot_be_is_refused(name, number, capfd):
    assert run_command(COMPUTING[name], ["--threads", number]) == 2
    assert "--threads" in capfd.readouterr().err


AS_EXPORT_DOES = """
import os, sys
from cobra_edge.export import command as export
assert "torch" not in sys.modules and "OMP_NUM_THREADS" not in os.environ
from cobra_edge.terminal.output import run_command
assert run_command(export.command, ["--target", "cpu", "--checkpoint", "/nowhere", "--threads", "1"]) == 2
import torch
print(torch.get_num_threads(), os.environ["GOMP_SPINCOUNT"])
"""


def test_a_command_settles_it_before_torch_is_imported():
    """OpenMP reads the spin time once, when it is loaded."""
    child = subprocess.run([sys.executable, "-c", AS_EXPORT_DOES], capture_output=True, text=True, check=False)
    assert child.stdout.split() == ["1", "2000"], child.stderr
