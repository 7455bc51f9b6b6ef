"""Out of memory: one line says for what, how much is needed and what to do; the exit code is 3."""

import errno
import json
import shutil
import subprocess
import sys

import pytest
import torch

from cobra_edge.bundle.memory_plan import memory_for
from cobra_edge.bundle.reader import DECODER, MANIFEST, Bundle, file_sha256
from cobra_edge.errors import MachineError

# The limit is set right before the step under test, to the current size plus a small margin: set at the start, it would hit the
# last import.
PROGRAM = """
import resource, sys
from cobra_edge import run
from cobra_edge.bundle import reader
from cobra_edge.decode import cpu
from cobra_edge.terminal.output import run_command

def tight(owner, name):
    real = getattr(owner, name)
    def step(*arguments):
        pages = int(open("/proc/self/statm").read().split()[0])
        limit = pages * resource.getpagesize() + {room}
        resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))
        return real(*arguments)
    setattr(owner, name, step)

tight({step})
sys.exit(run_command(run.command, [sys.argv[1], "--prompt", "{word} " * {words}, "--decoder-kernels", "{kernels}"]))
"""


def pad_decoder(bundle, n_bytes):
    """Append data that the header does not declare: they are mapped before they can be detected."""
    with (bundle / DECODER).open("r+b") as stream:
        stream.truncate((bundle / DECODER).stat().st_size + n_bytes)
    edit(bundle, lambda m: m["files"].update({DECODER: entry(bundle / DECODER)}))


def entry(file):
    return {"bytes": file.stat().st_size, "sha256": file_sha256(file)}


def edit(bundle, change):
    data = json.loads((bundle / MANIFEST).read_text())
    change(data)
    (bundle / MANIFEST).write_text(json.dumps(data))


def ask(bundle, step, *, room=0, words=1, kernels="native"):
    program = PROGRAM.format(step=step, room=room, word="red", words=words, kernels=kernels)
    done = subprocess.run([sys.executable, "-c", program, bundle], capture_output=True, text=True, timeout=120)
    assert "Traceback" not in done.stderr and done.stdout == ""
    (line,) = done.stderr.splitlines()
    return done.returncode, line


@pytest.fixture
def bundle(tiny_bundle, tmp_path):
    return shutil.copytree(tiny_bundle, tmp_path / "bundle")


@pytest.mark.parametrize("kernels", ["native", "numpy"])
def test_no_room_for_the_weights(bundle, kernels):
    pad_decoder(bundle, 64 << 20)
    code, line = ask(bundle, 'reader.Bundle, "decoder_tensors"', room=32 << 20, kernels=kernels)
    assert code == 3
    assert line.startswith(
        f"error: no memory for opening the decoder of {bundle}; the decoder of mamba-tiny as w8a16-g128 takes"
    )
    assert "GB (weights" in line and "export with fewer bits" in line


def test_no_room_for_a_prompt(bundle):
    edit(bundle, lambda m: m["model"].update(max_length=1 << 20))
    code, line = ask(bundle, 'cpu.CpuDecoder, "embed"', room=32 << 20, words=250_000)
    assert code == 3
    assert "no memory for prefilling a prompt of" in line and "raise this process's limit" in line


def test_no_thread_left(bundle):
    """A limit on the number of processes causes the same error."""
    step = 'reader.Bundle, "decoder_tensors"'
    program = PROGRAM.format(step=step, room=6 << 20, word="red", words=1, kernels="native")
    program = program.replace('"--decoder-kernels"', '"--threads", "64", "--decoder-kernels"')
    done = subprocess.run([sys.executable, "-c", program, bundle], capture_output=True, text=True, timeout=120)
    assert done.returncode == 3 and "Traceback" not in done.stderr
    assert "cannot start another thread" in done.stderr or "no memory for opening" in done.stderr


def said(bundle, error):
    """Return the message that replaces an error raised while something is read."""
    with pytest.raises(MachineError) as told, memory_for("reading a prompt", Bundle.open(bundle).manifest):
        raise error
    assert told.value.__cause__ is error
    return str(told.value)


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("CUDA error: out of memory\nCUDA kernel errors might")],
)
def test_no_room_on_a_gpu(bundle, monkeypatch, error):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (210_000_000, 12_880_000_000))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "GeForce Test 3060")
    message = said(bundle, error)
    assert message.startswith(
        "no memory for reading a prompt on GeForce Test 3060, where 0.21 of 12.88 GB are free; the decoder of mamba-tiny"
    )
    assert message.endswith(": close other programs on the GPU, or export with fewer bits")

    def fails():
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(torch.cuda, "mem_get_info", fails)
    assert said(bundle, error).startswith("no memory for reading a prompt on the GPU; the decoder of mamba-tiny")


def test_no_room_for_a_tensor_on_the_processor(bundle):
    with pytest.raises(RuntimeError) as real:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert said(bundle, real.value).startswith("no memory for reading a prompt; the decoder of mamba-tiny")


@pytest.mark.parametrize("error", [OSError(errno.ENOMEM, "Cannot allocate memory"), MemoryError()])
def test_no_room_as_python_says_it(bundle, error):
    assert "raise this process's limit" in said(bundle, error)


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOENT, "No such file"), RuntimeError("CUDA error: an illegal memory access"), KeyError("x")]
)
def test_what_is_not_for_want_of_memory_stays_what_it_is(bundle, error):
    with pytest.raises(type(error)) as told, memory_for("reading a prompt", Bundle.open(bundle).manifest):
        raise error
    assert told.value is error
