"""`python -m bench.rivals`: shapes, files, long states, and a comparison with a stand-in for llama.cpp. No speed is judged."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import gguf
import msgspec
import numpy as np
import pytest

from bench import rivals as module
from bench.rival_gguf import write_rival
from bench.rival_shapes import Decoder, Rivals, System, read_rivals
from bench.rivals import rivals
from bench.rivals_result import (
    OURS,
    RivalsResult,
    crossing,
    crossings,
    crossings_table,
    memory_table,
    rivals_sentences,
    short,
    speed_table,
)
from cobra_edge.bench.llamacpp import longer_state
from cobra_edge.decode.native.library import why_not
from cobra_edge.errors import InputError
from cobra_edge.terminal.output import run_command

SMALL = {"layers": 3, "width": 256, "vocab": 512, "tied": False}
TRANSFORMER = SMALL | {"heads": 4, "kv_heads": 2, "head_size": 64, "feed_forward": 512}
DECODERS = {
    "mamba": Decoder(architecture="mamba", **SMALL | {"width": 512, "tied": True}),
    "llama": Decoder(architecture="llama", **TRANSFORMER),
    "phi2": Decoder(architecture="phi2", **TRANSFORMER | {"kv_heads": 4}),
    "qwen2vl": Decoder(architecture="qwen2vl", **TRANSFORMER | {"tied": True}, rope_sections=(8, 12, 12, 0)),
    "qwen3vl": Decoder(architecture="qwen3vl", **TRANSFORMER | {"tied": True}, rope_sections=(12, 10, 10, 0)),
    "lfm2": Decoder(architecture="lfm2", **TRANSFORMER | {"tied": True}, attention_layers=(1,)),
}
CHILD = """
import json, sys
if sys.argv[1] == "check":
    print(json.dumps({"done": "check"})); sys.exit()
print(json.dumps({"version": "stand-in 1", "weights_bytes": 1}), flush=True)
filled = 0
for line in sys.stdin:
    order = json.loads(line)
    if "fill" in order:
        filled = order["fill"]
        print(json.dumps({"done": "fill"}), flush=True)
    elif "memory" in order:
        print(json.dumps({"state_bytes": 10 * order["memory"]}), flush=True)
    else:
        count = order.get("prefill") or order.get("question") or order["steps"]
        print(json.dumps({"seconds": 1e-6 * count * (1 + filled * filled)}), flush=True)
"""


def test_published_shapes_have_the_published_sizes() -> None:
    """Parameters, in 10⁹ without vectors, and KiB of float16 cache a token, counted from each model's own config."""
    expected = {
        "mamba-2.8b": (2.77, 0),
        "phi-2": (2.78, 320),
        "tinyllama-1.1b": (1.10, 22),
        "mobilellama-1.4b": (1.36, 192),
        "mobilellama-2.7b": (2.70, 320),
        "vicuna-7b": (6.74, 512),
        "qwen2_5-3b": (3.09, 36),
        "qwen3-2b": (1.72, 112),
        "smollm2-1.7b": (1.81, 192),
        "lfm2-1.2b": (1.17, 12),
    }
    known = read_rivals().decoders
    for name, (billions, kib) in expected.items():
        found = sum(np.prod(t.shape) for t in known[name].tensors().values()) / 1e9
        assert found == pytest.approx(billions, abs=0.011), name
        assert known[name].cache_bytes(1) == kib * 1024, name


@pytest.mark.parametrize("name", DECODERS)
def test_a_file_has_the_tensors_that_its_shape_counts(name: str, tmp_path: Path) -> None:
    decoder = DECODERS[name]
    file = write_rival(decoder, tmp_path / "new" / "r.gguf")
    read = gguf.GGUFReader(file)
    assert {t.name: (tuple(int(n) for n in reversed(t.shape)), t.tensor_type.name) for t in read.tensors} == {
        name: (tensor.shape, tensor.format) for name, tensor in decoder.tensors().items()
    }
    assert sum(int(t.n_bytes) for t in read.tensors) == decoder.weights_bytes()
    weights = next(t for t in read.tensors if t.name.endswith(("ssm_in.weight", "ffn_up.weight")))
    assert gguf.dequantize(weights.data, weights.tensor_type).std() == pytest.approx(0.02, rel=0.1)
    assert [f.name for f in file.parent.iterdir()] == ["r.gguf"]
    before = file.stat().st_mtime_ns
    assert write_rival(decoder, file).stat().st_mtime_ns == before


@pytest.mark.parametrize("place", [False, True])
def test_a_longer_state_keeps_the_form_of_a_short_one(place: bool) -> None:
    """Cells as llama.cpp writes them, two layers of keys of 8 bytes and values of 4, then a recurrent state."""

    def state(tokens: int, fill: bool) -> bytes:
        cells = [[i, 1, *([i, i, 7] if place else []), 0] for i in range(tokens)]
        head = np.array([-5, 0, 1, tokens, *(word for cell in cells for word in cell), 0, 2], np.int32).tobytes()
        for row in (8, 8, 4, 4):
            rows = np.arange(tokens * row, dtype=np.uint8) if fill else np.zeros(tokens * row, np.uint8)
            head += np.int32(1).tobytes() + np.int64(row).tobytes() + rows.tobytes()
        return head + b"recurrent"

    template = np.frombuffer(state(3, fill=True), np.uint8)
    assert longer_state(template, 3, 9).tobytes() == state(9, fill=False)
    with pytest.raises(RuntimeError, match="unknown form"):
        longer_state(np.array([-5, 0, 1, 3, *range(5, 40)], np.int32).view(np.uint8), 3, 9)
    recurrent = np.arange(64, dtype=np.uint8)
    assert (longer_state(recurrent, 3, 9) == recurrent).all()


def test_where_a_cache_makes_a_rival_slower() -> None:
    assert crossing(10.0, (64, 1024), (8.0, 7.0)) == 0
    assert crossing(10.0, (64, 1024), (30.0, 20.0)) is None
    assert crossing(10.0, (0, 1000, 3000), (20.0, 40 / 3, 20 / 3)) == pytest.approx(1000 + 2000 * 0.025 / 0.075)


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Run in an empty directory, with small decoders and a stand-in for llama.cpp."""
    script = tmp_path / "child.py"
    script.write_text(CHILD)
    systems = {
        OURS: System(decoder="mamba", image_tokens=20, trained_context=2048),
        "LLaVA-Phi": System(decoder="phi2", image_tokens=30, trained_context=2048),
        "TinyLLaVA-3.1B": System(decoder="phi2", image_tokens=40, trained_context=2048),
    }
    monkeypatch.setattr(module, "read_rivals", lambda: Rivals(decoders=DECODERS, systems=systems))
    monkeypatch.setattr(module, "SCRIPT", script)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.skipif(why_not() is not None, reason=f"no native decoder: {why_not()}")
def test_a_comparison_from_end_to_end(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = [
        "--peer-python",
        sys.executable,
        "--rounds",
        "2",
        "--context",
        "64",
        "--context",
        "128",
        "--threads",
        "1",
        "--plot",
        "plot.png",
    ]
    assert run_command(rivals, [*given, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((small / "bench" / "results" / "rivals.json").read_text())
    result = msgspec.json.decode((small / "bench" / "results" / "rivals.json").read_bytes(), type=RivalsResult)
    assert [(row.decoder, row.runtime) for row in result.decoders] == [
        ("mamba", "cobra_edge int8"), ("mamba", "llama.cpp Q4_0"), ("phi2", "llama.cpp Q4_0")
    ]  # fmt: skip
    ours, _, phi = result.decoders
    assert ours.state_bytes[64] == ours.state_bytes[128] > 0 and phi.state_bytes == {64: 640, 128: 1280}
    assert phi.decode_tok_s[64].median == pytest.approx(1e6 / 4097) and phi.version == "stand-in 1"
    assert set(phi.first_token_seconds) == {62, 72} and set(phi.follow_up_seconds) == {30, 40}
    assert [row[0] for row in speed_table(result).rows] == [
        "**Cobra-3.5B, cobra_edge int8**", "Cobra-3.5B, llama.cpp Q4_0", "LLaVA-Phi", "TinyLLaVA-3.1B"
    ]  # fmt: skip
    assert len(memory_table(result).rows) == 3 and len(crossings_table(result).rows) == len(crossings(result)) == 2
    said = rivals_sentences(result)
    assert "Slower at 128: LLaVA-Phi, TinyLLaVA-3.1B." in said or "LLaVA-Phi (" in said
    assert "caches there 0 to 0" in said and "By one framework, llama.cpp, Cobra-3.5B decodes 1.00 times" in said
    assert (small / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_what_cannot_be_compared_is_refused_before_files_are_written(
    small: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--peer-python", sys.executable]
    assert run_command(rivals, [*given, "--rival", "LLaVA-Pi"]) == 2
    assert "did you mean 'LLaVA-Phi'" in capsys.readouterr().err
    monkeypatch.setattr(module, "available_bytes", lambda: 1 << 30)
    assert run_command(rivals, given) == 3
    assert "mamba does not fit: needs 2 GiB, 1 GiB are available" in " ".join(capsys.readouterr().err.split())
    assert not (small / "bundles").exists()


def test_a_table_of_shapes_is_checked(tmp_path: Path) -> None:
    file = tmp_path / "rivals.toml"
    file.write_text('[decoders]\n[systems.A]\ndecoder = "b"\nimage_tokens = 1\ntrained_context = 1\n')
    with pytest.raises(InputError, match="A: decoder 'b' is not there"):
        read_rivals(file)
    file.write_text("[decoders")
    with pytest.raises(InputError, match="not TOML"):
        read_rivals(file)


def test_lengths_are_written_short() -> None:
    assert [short(n) for n in (64, 1024, 65536)] == ["64", "1k", "64k"]
