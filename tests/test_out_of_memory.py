"""Where memory runs out, one line says for what, how much it takes and what to do; the exit code is 3."""

import json
import shutil
import subprocess
import sys

import pytest

from cobra_edge.bundle import DECODER, MANIFEST, file_sha256

# The limit comes down right before the step in question, to what the process has by then and some room for small things: from
# the start it would hit whatever import comes last.
PROGRAM = """
import resource, sys
from cobra_edge import bundle, run
from cobra_edge.decode import cpu
from cobra_edge.terminal import run_command

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
    """Give the file a tail beyond what its header says: mapped before anybody can look."""
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
    code, line = ask(bundle, 'bundle.Bundle, "decoder_tensors"', room=32 << 20, kernels=kernels)
    assert code == 3
    assert line.startswith(
        f"error: no memory for opening the decoder of {bundle}; the decoder of mamba-tiny as w8a16-g128 takes"
    )
    assert "GB (weights" in line and "export with fewer bits" in line


def test_no_room_for_a_prompt(bundle):
    edit(bundle, lambda m: m["model"].update(max_length=1 << 20))
    code, line = ask(bundle, 'cpu.CpuDecoder, "embed"', room=32 << 20, words=250_000)
    assert code == 3
    assert "no memory for reading a prompt of" in line and "raise this process's limit" in line


def test_no_thread_left(bundle):
    """A limit on processes looks like this too."""
    step = 'bundle.Bundle, "decoder_tensors"'
    program = PROGRAM.format(step=step, room=6 << 20, word="red", words=1, kernels="native")
    program = program.replace('"--decoder-kernels"', '"--threads", "64", "--decoder-kernels"')
    done = subprocess.run([sys.executable, "-c", program, bundle], capture_output=True, text=True, timeout=120)
    assert done.returncode == 3 and "Traceback" not in done.stderr
    assert "no more threads to be had" in done.stderr or "no memory for opening" in done.stderr
