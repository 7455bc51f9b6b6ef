"""Doctor: its report on this machine and on others that are made up, as a table and as JSON."""

import json
import os
import subprocess
import sys

import pytest

from cobra_edge.cli import command
from cobra_edge.doctor import host, jetson, libraries, vision
from cobra_edge.doctor.check import Check
from cobra_edge.doctor.gpu import GpuCheck, check_gpu
from cobra_edge.doctor.host import check_cache, check_memory, check_processor
from cobra_edge.doctor.installation import version_text
from cobra_edge.doctor.jetson import check_jetson, jetpack
from cobra_edge.doctor.libraries import check_libraries
from cobra_edge.doctor.report import checks, examine
from cobra_edge.doctor.requirements import requirements
from cobra_edge.doctor.vision import check_onnxruntime, check_tensorrt, check_tensorrt_rtx
from cobra_edge.environment import available_memory
from cobra_edge.terminal.output import run_command
from cobra_edge.version import __version__

from ..emulated.driver import plugged_in


@pytest.fixture(autouse=True)
def little_to_read(monkeypatch):
    monkeypatch.setattr(host, "_READS", 1)
    monkeypatch.setattr(host, "_MEASURED_PART", 1 << 14)


class TestReport:
    def test_a_machine_and_a_bundle_on_it(self, tiny_bundle, capsys):
        assert run_command(command, ["doctor", str(tiny_bundle), "--json"]) == 0
        report = json.loads(capsys.readouterr().out)
        assert report["version"] == __version__ and report["processor"]["kernels"][-1] == "scalar"
        assert report["memory"]["total_bytes"] > report["memory"]["available_bytes"] > 0
        bundle = report["bundle"]
        assert [c["name"] for c in bundle["decoder"]["choices"] if c["refuses"] is None][0] == bundle["speed"]["decoder"]
        assert bundle["speed"]["decode_tok_s"] > 0 and bundle["speed"]["predicted_tok_s"] > 0
        assert bundle["memory"]["needed_bytes"] > 0

    def test_the_table_names_every_check(self, tiny_bundle, capsys):
        assert run_command(command, ["doctor", str(tiny_bundle)]) == 0
        printed, report = capsys.readouterr().out, examine(None)
        names = [name for name, _ in checks(report)]
        assert names == ["processor", "memory", "GPU", "onnxruntime", "TensorRT", "TensorRT for RTX", "libraries", "cache"]
        missing = [name for name in [*names, "decoder", "memory", "speed"] if f"\n{name} " not in printed]
        assert not missing and len(printed.splitlines()) < 40

    def test_without_a_bundle(self, capsys):
        assert run_command(command, ["doctor", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["bundle"] is None

    def test_a_bundle_that_is_none_is_refused_before_anything_is_measured(self, tmp_path, monkeypatch, capsys):
        monkeypatch.setattr("cobra_edge.doctor.report.check_memory", lambda: pytest.fail("measured"))
        assert run_command(command, ["doctor", str(tmp_path)]) == 2
        assert "is not a bundle" in capsys.readouterr().err

    def test_a_bundle_without_room_cannot_run(self, tiny_bundle, monkeypatch, capsys):
        monkeypatch.setattr("cobra_edge.doctor.bundle.available_bytes", lambda: 1000)
        assert run_command(command, ["doctor", str(tiny_bundle), "--json"]) == 3
        bundle = json.loads(capsys.readouterr().out)["bundle"]
        assert bundle["memory"]["verdict"] == "missing" and "close other programs" in bundle["memory"]["text"]
        assert bundle["speed"] is None

    def test_a_bundle_that_nothing_runs(self, tiny_bundle, monkeypatch, capsys):
        refusing = [b for b in host_backends() if b.name == "torch"]
        refusing = [type(b)(b.name, b.device, lambda _: "not here", b.open) for b in refusing]
        monkeypatch.setattr("cobra_edge.doctor.bundle.BACKENDS", refusing)
        assert run_command(command, ["doctor", str(tiny_bundle), "--json"]) == 3
        found = json.loads(capsys.readouterr().out)["bundle"]["decoder"]
        assert found["verdict"] == "missing" and found["text"] == (
            "nothing runs it here; not torch on cuda: not here; not torch on cpu: not here"
        )


def host_backends():
    from cobra_edge.decode.backends import BACKENDS

    return BACKENDS


class TestHost:
    def test_kernels(self, monkeypatch):
        monkeypatch.setattr(host, "kernel_names", lambda: ["avx2", "scalar"])
        assert check_processor().verdict == "ok" and "avx2, scalar" in check_processor().text
        monkeypatch.setattr(host, "kernel_names", lambda: ["scalar"])
        found = check_processor()
        assert found.verdict == "warning" and "plain C++" in found.text

    def test_no_native_library(self, monkeypatch):
        monkeypatch.setattr(host, "why_not", lambda: "it is incomplete")
        found = check_processor()
        assert (found.verdict, found.kernels) == ("missing", ()) and "it is incomplete" in found.text
        assert check_memory().read_bytes_per_s is None

    def test_memory_of_a_system_that_reports_nothing(self, monkeypatch, tmp_path):
        monkeypatch.setattr(available_memory, "_MEMINFO", tmp_path / "none")
        monkeypatch.setattr(host, "why_not", lambda: "none")
        assert check_memory().text == "the system does not report it"

    def test_cache(self, monkeypatch, tmp_path):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "new"))
        found = check_cache()
        assert (found.verdict, found.bytes) == ("ok", 0) and found.free_bytes > 0
        there = tmp_path / "new" / "cobra_edge" / "engines"
        there.mkdir(parents=True)
        (there / "x.engine").write_bytes(b"x" * 300)
        assert check_cache().bytes == 300

    def test_a_cache_that_is_a_file(self, monkeypatch, tmp_path):
        (tmp_path / "cobra_edge").write_text("")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        found = check_cache()
        assert found.verdict == "warning" and "XDG_CACHE_HOME" in found.text

    def test_a_full_disk(self, monkeypatch, tmp_path):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        monkeypatch.setattr(host, "_LITTLE_DISK_BYTES", 1 << 62)
        assert "free some space" in check_cache().text


class TestGpu:
    def test_none(self, monkeypatch):
        monkeypatch.setattr("cobra_edge.doctor.gpu.why_no_driver", lambda: "there is no NVIDIA driver")
        assert check_gpu() == GpuCheck(verdict="missing", text="there is no NVIDIA driver")

    def test_one(self, tmp_path, monkeypatch):
        from cobra_edge.bench import gpu as measured

        monkeypatch.setattr(measured, "_READ_BYTES", 1 << 16)
        with plugged_in(tmp_path):
            found = check_gpu()
            assert found.verdict == "ok" and (found.compute_capability, found.driver_cuda) == ("8.9", "13.0")
            assert found.copy_bytes_per_s > 0 and found.name in found.text

    def test_one_that_is_too_old(self, tmp_path):
        from ..emulated.driver import RTX_4090

        with plugged_in(tmp_path) as gpu:
            gpu.plug_in(RTX_4090.replace("8.9", "7.5"))
            found = check_gpu()
            assert found.verdict == "missing" and "compute capability" in found.text and found.driver_cuda == "13.0"


@pytest.fixture
def orin(tmp_path, monkeypatch):
    """Return a function that makes this machine an Orin with a power mode and the lowest frequencies of its two clusters."""

    def make(mode, lowest, release="# R36 (release), REVISION: 4.3, GCID: 1, BOARD: generic"):
        (tmp_path / "release").write_text(release)
        (tmp_path / "model").write_bytes(b"NVIDIA Jetson Orin Nano Developer Kit\0")
        for i, frequency in enumerate(lowest):
            policy = tmp_path / "cpufreq" / f"policy{i}"
            policy.mkdir(parents=True)
            (policy / "scaling_min_freq").write_text(f"{frequency}\n")
            (policy / "scaling_max_freq").write_text("1728000\n")
        program = tmp_path / "bin" / "nvpmodel"
        program.parent.mkdir()
        program.write_text(f"#!/bin/sh\n[ $1 = -q ] && echo '{mode}' && echo 0\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
        monkeypatch.setattr(jetson, "_RELEASE", tmp_path / "release")
        monkeypatch.setattr(jetson, "_MODEL", tmp_path / "model")
        monkeypatch.setattr(jetson, "_CLOCKS", tmp_path / "cpufreq")

    return make


class TestJetson:
    def test_another_machine(self):
        assert check_jetson() is None and jetpack() is None

    def test_a_slow_mode_is_told_with_the_commands(self, orin):
        orin("NV Power Mode: 15W", ["729600", "1728000"])
        found = check_jetson()
        assert (found.verdict, found.power_mode, found.fixed_clocks) == ("warning", "15W", False)
        assert found.release == "36.4.3" and found.model == "NVIDIA Jetson Orin Nano Developer Kit"
        assert "nvpmodel -m 0" in found.text and "jetson_clocks" in found.text and jetpack() == "jetpack6"

    def test_all_it_has(self, orin):
        orin("NV Power Mode: MODE_MAXN_SUPER", ["1728000"])
        found = check_jetson()
        assert (found.verdict, found.power_mode, found.fixed_clocks) == ("ok", "MAXN_SUPER", True)

    def test_a_system_that_says_little(self, orin):
        orin("NVPM ERROR: no permission", [])
        found = check_jetson()
        assert (found.verdict, found.power_mode, found.fixed_clocks) == ("ok", None, None)

    def test_a_release_that_is_unknown(self, orin):
        orin("", [], "# R99 (release), REVISION: 1.0")
        assert jetpack() is None and check_jetson().release == "99.1.0"


class TestLibraries:
    def test_as_tested(self):
        found = check_libraries()
        assert found.verdict == "ok" and found.lacking == ()
        assert {"numpy", "msgspec", "packaging"} <= {x.name for x in found.installed if x.allowed}

    def test_what_is_declared_for_this_python(self):
        names = [r.name for r in requirements()]
        assert len(names) == len(set(names)) and ("tomli" in names) == (sys.version_info < (3, 11))
        optional = {r.name: r.optional for r in requirements()}
        assert not optional["onnxruntime"] and optional["torch"]

    @pytest.mark.parametrize(
        ("version", "verdict", "told"),
        [
            ("0.1", "warning", "numpy 0.1 (>=1.26 is needed)"),
            ("99.0", "ok", "numpy 99.0 (tested "),
            ("99.0rc1", "ok", "numpy 99.0rc1 (tested "),
            (None, "warning", "numpy is not installed"),
        ],
    )
    def test_another_version(self, monkeypatch, version, verdict, told):
        known = libraries.installed_version
        monkeypatch.setattr(libraries, "installed_version", lambda name: version if name == "numpy" else known(name))
        found = check_libraries()
        assert found.verdict == verdict and told in found.text

    @pytest.mark.parametrize("pins", [None, b"\xff\xfe"])
    def test_a_python_that_was_not_tested(self, monkeypatch, tmp_path, pins):
        monkeypatch.setattr(libraries, "constraints", lambda: tmp_path)
        if pins:
            (tmp_path / f"python{'.'.join(map(str, sys.version_info[:2]))}.txt").write_bytes(pins)
        assert "no versions were tested on Python" in check_libraries().text


class TestVision:
    def test_onnxruntime(self):
        found = check_onnxruntime()
        assert found.verdict == "ok" and "CPU" in found.providers

    def test_none_is_installed(self, monkeypatch):
        monkeypatch.setattr(vision.importlib.util, "find_spec", lambda name: None)
        assert {c().verdict for c in (check_onnxruntime, check_tensorrt, check_tensorrt_rtx)} == {"missing"}

    def test_engines_without_a_gpu(self):
        assert (check_tensorrt().verdict, check_tensorrt_rtx().verdict) == ("missing", "missing")


class TestVersion:
    def test_it_names_kernels_and_libraries_in_few_imports(self):
        code = (
            "import sys; from cobra_edge.cli import command; command(['--version'], standalone_mode=False); "
            "print([m for m in ('numpy', 'onnxruntime', 'torch') if m in sys.modules])"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        assert done.startswith(f"cobra-edge, version {__version__}\n") and done.endswith("[]\n")
        assert "scalar" in done and "sm_87" in done and "msgspec " in done and "providers:    cpu" in done

    def test_a_damaged_installation_says_what_is_missing(self, monkeypatch):
        from cobra_edge.doctor import installation

        monkeypatch.setattr(installation, "why_not", lambda: "there is no native library")
        monkeypatch.setattr(installation.importlib.util, "find_spec", lambda name: None)
        assert "there is no native library" in version_text() and "onnxruntime is not installed" in version_text()


def test_every_verdict_has_a_style():
    from typing import get_args

    from cobra_edge.doctor.check import Verdict
    from cobra_edge.doctor.command import _STYLES

    assert tuple(_STYLES) == get_args(Verdict) and Check(text="x").verdict == "ok"
