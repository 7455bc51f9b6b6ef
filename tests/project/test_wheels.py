"""runtimes/wheels.py: what it refuses to call a wheel of ours. Building one takes minutes and is `make wheels`."""

import importlib.util
import sys
import zipfile

import pytest

from cobra_edge.decode.cuda.library import kernels_file
from cobra_edge.version import __version__

from ..conftest import ROOT
from ..emulated.driver import write_kernels

spec = importlib.util.spec_from_file_location("wheels", ROOT / "runtimes" / "wheels.py")
wheels = importlib.util.module_from_spec(spec)
sys.modules["wheels"] = wheels  # dataclasses look there
spec.loader.exec_module(wheels)
X86, ARM, MAC, WINDOWS = wheels.PLATFORMS


def wheel(folder, tag, names, kernels=None):
    file = folder / f"cobra_edge-{__version__}-py3-none-{tag}.whl"
    with zipfile.ZipFile(file, "w") as opened:
        for name in names:
            opened.writestr(name, (kernels or kernels_file().read_bytes()) if name == wheels._KERNELS else b"")
    return file


def fits(tag):
    return lambda *command, **variables: f'is consistent with the following platform tag:\n"{tag}".'


@pytest.mark.parametrize("found", ["manylinux_2_17_aarch64", "manylinux_2_27_aarch64", "manylinux_2_28_aarch64"])
def test_a_wheel_that_has_what_a_device_needs(tmp_path, monkeypatch, capsys, found):
    monkeypatch.setattr(wheels, "_run", fits(found))
    wheels.check(ARM, wheel(tmp_path, ARM.tag, wheels.needed(ARM)))
    assert capsys.readouterr().out.endswith(f" MB, {len(wheels.needed(ARM))} files\n")


@pytest.mark.parametrize(
    ("platform", "tag", "more", "less", "found", "says"),
    [
        (X86, X86.tag, set(), {X86.native}, X86.tag, "lacks cobra_edge/decode/native/libcobra_cpu.so"),
        (
            MAC,
            MAC.tag,
            set(),
            {MAC.native},
            MAC.tag,
            "lacks cobra_edge/decode/native/libcobra_cpu.dylib",
        ),
        (X86, X86.tag, {"tests/conftest.py"}, set(), X86.tag, "holds tests/conftest.py"),
        (X86, "linux_x86_64", set(), set(), X86.tag, "is not for every Python on manylinux_2_17_x86_64"),
        (X86, X86.tag, set(), set(), "manylinux_2_34_x86_64", "needs manylinux_2_34_x86_64, expected manylinux_2_17_x86_64"),
        (ARM, ARM.tag, set(), set(), "linux_aarch64", "needs linux_aarch64"),
    ],
)
def test_a_wheel_that_would_not_serve_is_refused(tmp_path, monkeypatch, platform, tag, more, less, found, says):
    monkeypatch.setattr(wheels, "_run", fits(found))
    with pytest.raises(SystemExit, match=says):
        wheels.check(platform, wheel(tmp_path, tag, wheels.needed(platform) - less | more))


@pytest.mark.parametrize("oldest", ["macosx_11_0_arm64", "macosx_10_15_arm64"])
def test_a_library_of_macos_serves_its_system(tmp_path, monkeypatch, oldest):
    monkeypatch.setattr(wheels, "_needs_of_macos", lambda library: oldest)
    wheels.check(MAC, wheel(tmp_path, MAC.tag, wheels.needed(MAC)))


def test_a_wheel_without_the_native_decoder(tmp_path, capsys):
    wheels.check(WINDOWS, wheel(tmp_path, WINDOWS.tag, wheels.needed(WINDOWS)))
    assert not [name for name in wheels.needed(WINDOWS) if "native" in name or "kernels" in name]


@pytest.mark.parametrize("needs", ["macosx_11_1_arm64", "macosx_12_0_arm64", "a signature", "the libraries /tmp/x.dylib"])
def test_a_library_that_macos_would_not_load_is_refused(tmp_path, monkeypatch, needs):
    monkeypatch.setattr(wheels, "_needs_of_macos", lambda library: needs)
    with pytest.raises(SystemExit, match=f"needs {needs}, expected macosx_11_0_arm64 or older"):
        wheels.check(MAC, wheel(tmp_path, MAC.tag, wheels.needed(MAC)))


def test_kernels_that_a_device_would_refuse_are_found_when_the_wheel_is_made(tmp_path, monkeypatch):
    monkeypatch.setattr(wheels, "_run", fits(X86.tag))
    with pytest.raises(SystemExit, match="has kernels that cannot be read"):
        wheels.check(X86, wheel(tmp_path, X86.tag, wheels.needed(X86), kernels_file().read_bytes()[:-9]))
    few = write_kernels(tmp_path / "few.xz", ("sm_80", "sm_87"))
    with pytest.raises(SystemExit, match="has kernels for sm_80, sm_87, expected sm_80, sm_86, "):
        wheels.check(X86, wheel(tmp_path, X86.tag, wheels.needed(X86), few.read_bytes()))


def test_a_wheel_that_is_too_large_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(wheels, "_run", fits(X86.tag))
    monkeypatch.setattr(wheels, "_MOST_BYTES", 10)
    with pytest.raises(SystemExit, match="expected at most 10"):
        wheels.check(X86, wheel(tmp_path, X86.tag, wheels.needed(X86)))


def test_what_is_needed_is_named_as_it_lies_in_the_tree():
    profiles = {file.name for file in (ROOT / "export" / "targets").iterdir()}
    assert {name.rsplit("/", 1)[1] for name in wheels.needed(ARM) if "/targets/" in name} <= profiles
