"""runtimes/wheels.py: what it refuses to call a wheel of ours. Building one takes minutes and is `make wheels`."""

import importlib.util
import sys
import zipfile

import pytest

from cobra_edge.version import __version__

from ..conftest import ROOT

spec = importlib.util.spec_from_file_location("wheels", ROOT / "runtimes" / "wheels.py")
wheels = importlib.util.module_from_spec(spec)
sys.modules["wheels"] = wheels  # dataclasses look there
spec.loader.exec_module(wheels)
X86, ARM = wheels.PLATFORMS


def wheel(folder, tag, names):
    file = folder / f"cobra_edge-{__version__}-py3-none-{tag}.whl"
    with zipfile.ZipFile(file, "w") as opened:
        for name in names:
            opened.writestr(name, "")
    return file


def fits(tag):
    return lambda *command, **variables: f'is consistent with the following platform tag:\n"{tag}".'


@pytest.mark.parametrize("found", ["manylinux_2_17_aarch64", "manylinux_2_27_aarch64", "manylinux_2_28_aarch64"])
def test_a_wheel_that_has_what_a_device_needs(tmp_path, monkeypatch, capsys, found):
    monkeypatch.setattr(wheels, "_run", fits(found))
    wheels.check(ARM, wheel(tmp_path, ARM.tag, wheels._NEEDED))
    assert capsys.readouterr().out.endswith(f" MB, {len(wheels._NEEDED)} files\n")


@pytest.mark.parametrize(
    ("platform", "tag", "names", "found", "says"),
    [
        (X86, X86.tag, set(), X86.tag, "lacks cobra_edge/decode/native/libcobra_cpu.so"),
        (X86, X86.tag, {"tests/conftest.py"}, X86.tag, "holds tests/conftest.py"),
        (X86, "linux_x86_64", set(), X86.tag, "is not for every Python on manylinux_2_17_x86_64"),
        (X86, X86.tag, set(), "manylinux_2_34_x86_64", "needs the platform manylinux_2_34_x86_64"),
        (ARM, ARM.tag, set(), "linux_aarch64", "needs the platform linux_aarch64"),
    ],
)
def test_a_wheel_that_would_not_serve_is_refused(tmp_path, monkeypatch, platform, tag, names, found, says):
    monkeypatch.setattr(wheels, "_run", fits(found))
    given = names | (wheels._NEEDED - {wheels._LIBRARY} if "lacks" in says else wheels._NEEDED)
    with pytest.raises(SystemExit, match=says):
        wheels.check(platform, wheel(tmp_path, tag, given))


def test_a_wheel_that_is_too_large_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(wheels, "_run", fits(X86.tag))
    monkeypatch.setattr(wheels, "_MOST_BYTES", 10)
    with pytest.raises(SystemExit, match="expected at most 10"):
        wheels.check(X86, wheel(tmp_path, X86.tag, wheels._NEEDED))


def test_what_is_needed_is_named_as_it_lies_in_the_tree():
    profiles = {file.name for file in (ROOT / "export" / "targets").iterdir()}
    assert {name.rsplit("/", 1)[1] for name in wheels._NEEDED if "/targets/" in name} <= profiles
