"""The file of compiled kernels: what a GPU gets of it, and what becomes of a damaged one."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import lzma
import struct
import sys
from pathlib import Path

import pytest

from cobra_edge.decode.cuda import library
from cobra_edge.decode.cuda.library import Image, KernelLibrary, Refused, read_kernels
from cobra_edge.errors import MachineError

ROOT = Path(__file__).parents[3]


def compiler():
    """Return runtimes/cuda/compile.py, which is no part of a package."""
    spec = importlib.util.spec_from_file_location("compile_kernels", ROOT / "runtimes" / "cuda" / "compile.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def images(*names):
    made = compiler()
    text = b"//\n.version 8.5\n.target sm_80\n\0"
    return [made.Image(n, text if n.startswith("compute") else f"cubin of {n}".encode() * 9, "") for n in names]


ALL = ("sm_80", "sm_86", "sm_87", "sm_89", "sm_90", "compute_80")


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "kernels.xz"
    path.write_bytes(compiler().packed(images(*ALL), "of these sources"))
    return path


def test_what_is_written_is_read(file):
    found = read_kernels(file)
    assert [str(i) for i in found.images] == list(ALL) and found.sources == "of these sources"
    assert found.images[2].data == b"cubin of sm_87" * 9 and found.images[-1].ptx_version == "8.5"
    assert compiler().packed(images(*ALL), "of these sources") == file.read_bytes()


@pytest.mark.parametrize(
    "capability, integrated, expected",
    [
        ((8, 7), True, ["sm_87", "compute_80"]),
        ((8, 6), False, ["sm_86", "compute_80"]),
        ((9, 0), False, ["sm_90", "compute_80"]),
        ((8, 8), False, ["sm_86", "sm_80", "compute_80"]),  # discrete, no cubin of its own: not a Jetson's
        ((8, 8), True, ["compute_80"]),
        ((12, 0), False, ["compute_80"]),
        ((11, 0), True, ["compute_80"]),
        ((7, 5), False, []),
    ],
)
def test_a_gpu_gets_its_own_cubin_then_ptx(file, capability, integrated, expected):
    assert [str(i) for i in read_kernels(file).candidates(capability, integrated=integrated)] == expected


def test_an_older_minor_version_only_where_the_exact_one_is_missing(file):
    whole = read_kernels(file)
    assert [str(i) for i in whole.candidates((8, 9), integrated=False)] == ["sm_89", "compute_80"]
    without = KernelLibrary(tuple(i for i in whole.images if str(i) != "sm_89"), "")
    assert [str(i) for i in without.candidates((8, 9), integrated=False)] == ["sm_86", "sm_80", "compute_80"]


def test_the_first_that_the_driver_takes_is_loaded(file):
    asked = []

    def load(image: Image) -> str:
        asked.append(str(image))
        if image.kind == "cubin":
            raise Refused("no kernel image")
        return "module"

    assert read_kernels(file).load((8, 7), load, title="Orin", integrated=True) == "module" and asked == ["sm_87", "compute_80"]


def refuse(image: Image) -> None:
    raise Refused("the provided PTX was compiled with an unsupported toolchain")


@pytest.mark.parametrize("capability, needed", [((8, 6), "CUDA 12 (driver 525"), ((12, 0), "CUDA 12.5 (driver 555)")])
def test_the_driver_that_is_needed_is_named(file, capability, needed):
    with pytest.raises(MachineError) as caught:
        read_kernels(file).load(capability, refuse, title="RTX 5090", integrated=False)
    said = str(caught.value)
    assert needed in said and "RTX 5090" in said and "update the driver" in said and caught.value.exit_code == 3


def test_a_gpu_before_ampere_is_told_so(file):
    with pytest.raises(MachineError, match=r"RTX 2080 \(compute capability 7.5\) is too old.*8.0 or later"):
        read_kernels(file).load((7, 5), refuse, title="RTX 2080", integrated=False)


def test_every_cut_and_every_flipped_byte_is_noticed(file):
    good = file.read_bytes()
    for n in range(0, len(good), 7):
        file.write_bytes(good[:n])
        with pytest.raises(MachineError, match="damaged"):
            read_kernels(file)
    for n in range(0, len(good), 7):
        file.write_bytes(good[:n] + bytes([good[n] ^ 0x41]) + good[n + 1 :])
        with pytest.raises(MachineError, match="damaged"):
            read_kernels(file)
    file.write_bytes(good + b"more")
    with pytest.raises(MachineError, match="damaged.*behind its end.*install cobra-edge again"):
        read_kernels(file)


def entry(**changes):
    good = {"name": "sm_80", "kind": "cubin", "size": 3, "sha256": hashlib.sha256(b"abc").hexdigest()}
    return {**good, **changes}


@pytest.mark.parametrize(
    "index, body, said",
    [
        ({"format": 2, "sources": "", "images": [entry()]}, b"abc", "has format 2, expected 1"),
        ({"format": 1, "sources": "", "images": []}, b"", "do not fit"),
        ({"format": 1, "sources": "", "images": [entry(size=-1)]}, b"", "sm_80 is not what it was"),
        ({"format": 1, "sources": "", "images": [entry(size=1 << 60)]}, b"abc", "sm_80 is not what it was"),
        ({"format": 1, "sources": "", "images": [entry()]}, b"abd", "sm_80 is not what it was"),
        ({"format": 1, "sources": "", "images": [entry()]}, b"abcd", "do not fit"),
        ({"format": 1, "sources": "", "images": [entry(name="sm_80a")]}, b"abc", "is no architecture"),
        ({"format": 1, "sources": "", "images": [entry(kind="exe")]}, b"abc", "index is unreadable"),
        ([], b"", "index is unreadable"),
    ],
)
def test_an_index_that_lies_is_refused(tmp_path, index, body, said):
    text = json.dumps(index).encode()
    path = tmp_path / "kernels.xz"
    path.write_bytes(lzma.compress(b"CobraGPU" + struct.pack("<I", len(text)) + text + body))
    with pytest.raises(MachineError, match=said):
        read_kernels(path)


@pytest.mark.parametrize("plain", [b"", b"CobraGP", b"CobraGPU\1", b"CobraGPU\xff\xff\xff\xff{}", b"x" * 40])
def test_what_is_no_file_of_kernels_is_refused(tmp_path, plain):
    path = tmp_path / "kernels.xz"
    path.write_bytes(lzma.compress(plain))
    with pytest.raises(MachineError, match="damaged"):
        read_kernels(path)


def test_a_build_without_kernels_says_which_option_it_was(monkeypatch):
    monkeypatch.setattr(library, "kernels_file", lambda: None)
    assert "-DCOBRA_CUDA=OFF" in library.why_no_kernels()
    with pytest.raises(MachineError, match="-DCOBRA_CUDA=OFF; install it again without that option") as caught:
        read_kernels()
    assert caught.value.exit_code == 3
