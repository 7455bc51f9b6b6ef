"""llama.cpp as a peer: a Mamba of the same shape and random weights as GGUF, timed in a process of its own.

    python llamacpp.py check                                   # are the libraries there?
    python llamacpp.py write F16.gguf '{"d_model": …}'         # random weights
    python llamacpp.py quantize F16.gguf Q4_0.gguf Q4_0
    python llamacpp.py serve Q4_0.gguf THREADS                 # one JSON object a line: {"prefill": 256}, {"steps": 16}

Each answers with one JSON object a line, `serve` with its facts first; what goes wrong is {"error": …}.

The file stands alone, it imports nothing of this package: a peer may live in an environment of its own. Its process waits for
a line while others are timed, so that its threads are asleep then.
"""

from __future__ import annotations

import ctypes
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

_UBATCH = 512  # llama.cpp's default; a longer prompt is read in pieces of it
_LONGEST_PROMPT = 4096


def write_float16(file: Path, sizes: dict[str, int]) -> None:
    """Write a Mamba of random weights as float16 GGUF; every layer has the same values, which no speed depends on.

    Args:
        file: where.
        sizes: d_model, n_layer, vocab, d_inner, d_state, d_conv, dt_rank.
    """
    import gguf

    d_model, inner, state, rank = sizes["d_model"], sizes["d_inner"], sizes["d_state"], sizes["dt_rank"]
    random = np.random.default_rng(0)

    def normal(*shape: int, scale: float = 0.02) -> np.ndarray:
        return random.standard_normal(shape, np.float32) * np.float32(scale)

    def matrix(*shape: int) -> np.ndarray:
        return normal(*shape).astype(np.float16)

    layer = {
        "attn_norm.weight": np.ones(d_model, np.float32),
        "ssm_in.weight": matrix(2 * inner, d_model),
        "ssm_conv1d.weight": normal(inner, sizes["d_conv"], scale=0.3),
        "ssm_conv1d.bias": normal(inner),
        "ssm_x.weight": matrix(rank + 2 * state, inner),
        "ssm_dt.weight": matrix(inner, rank),
        "ssm_dt.bias": normal(inner),
        "ssm_a": -np.tile(np.arange(1, state + 1, dtype=np.float32), (inner, 1)),
        "ssm_d": np.ones(inner, np.float32),
        "ssm_out.weight": matrix(d_model, inner),
    }
    writer = gguf.GGUFWriter(file, "mamba")
    writer.add_name("random")
    writer.add_context_length(1 << 20)
    writer.add_embedding_length(d_model)
    writer.add_feed_forward_length(0)
    writer.add_head_count(0)
    writer.add_block_count(sizes["n_layer"])
    writer.add_ssm_conv_kernel(sizes["d_conv"])
    writer.add_ssm_inner_size(inner)
    writer.add_ssm_state_size(state)
    writer.add_ssm_time_step_rank(rank)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_ssm_dt_b_c_rms(False)
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(sizes["vocab"])
    writer.add_tensor("token_embd.weight", matrix(sizes["vocab"], d_model))
    writer.add_tensor("output_norm.weight", np.ones(d_model, np.float32))
    for i in range(sizes["n_layer"]):
        for name, values in layer.items():
            writer.add_tensor(f"blk.{i}.{name}", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _quiet() -> Any:
    """Silence llama.cpp's log; the callback has to be kept as long as the library is used."""
    import llama_cpp

    callback = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(callback, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    return callback


def quantize(source: Path, goal: Path, file_type: str) -> None:
    """Quantize a GGUF as llama.cpp's own tool would. Raises RuntimeError when it refuses."""
    import llama_cpp

    kept = _quiet()
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{file_type}")
    code = llama_cpp.llama_model_quantize(str(source).encode(), str(goal).encode(), ctypes.byref(parameters))
    if code:
        raise RuntimeError(f"llama.cpp could not write {goal} (code {code})")
    del kept


class Peer:
    """An opened GGUF."""

    def __init__(self, file: Path, threads: int) -> None:
        """Open the file with llama.cpp's defaults but for the threads. Raises RuntimeError when it cannot be opened."""
        import llama_cpp

        self._api, self._kept = llama_cpp, _quiet()
        self._model = llama_cpp.llama_model_load_from_file(str(file).encode(), llama_cpp.llama_model_default_params())
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot open {file}")
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx, settings.n_batch, settings.n_ubatch = _LONGEST_PROMPT, _LONGEST_PROMPT, _UBATCH
        settings.n_threads = settings.n_threads_batch = threads
        self._context = llama_cpp.llama_init_from_model(self._model, settings)
        self._vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._random = np.random.default_rng(1)

    def facts(self) -> dict[str, Any]:
        """Return what this build is and what it opened."""
        from importlib.metadata import version

        return {
            "version": f"llama-cpp-python {version('llama-cpp-python')}",
            "built_for": self._api.llama_print_system_info().decode().strip(),
            "weights_bytes": int(self._api.llama_model_size(self._model)),
        }

    def _decode(self, count: int) -> np.ndarray:
        tokens = (self._api.llama_token * count)(*self._random.integers(0, self._vocab, count).tolist())
        code = self._api.llama_decode(self._context, self._api.llama_batch_get_one(tokens, count))
        if code:
            raise RuntimeError(f"llama_decode ended with {code}")
        logits = self._api.llama_get_logits(self._context)
        return np.ctypeslib.as_array(logits, (self._vocab,))

    def _checked(self, work: int, times: int) -> float:
        began = time.perf_counter()
        for _ in range(times):
            logits = self._decode(work)
        seconds = time.perf_counter() - began
        if not np.isfinite(logits).all():
            raise RuntimeError("llama.cpp's logits are not finite")
        return seconds

    def prefill(self, count: int) -> float:
        """Read so many tokens from an empty state; returns seconds."""
        self._api.llama_memory_clear(self._api.llama_get_memory(self._context), True)
        return self._checked(count, 1)

    def steps(self, count: int) -> float:
        """Read so many tokens one by one, logits each time; returns seconds."""
        return self._checked(1, count)


def serve(file: Path, threads: int) -> None:
    """Open the file, say what it is, then time what each line of stdin asks for until there are no more."""
    peer = Peer(file, threads)
    _say(peer.facts())
    for line in sys.stdin:
        order = json.loads(line)
        _say({"seconds": peer.prefill(order["prefill"]) if "prefill" in order else peer.steps(order["steps"])})


def _say(answer: dict[str, Any]) -> None:
    print(json.dumps(answer), flush=True)


def main(arguments: list[str]) -> None:
    """Do what the module's docstring shows."""
    verb, *rest = arguments
    try:
        if verb == "check":
            import gguf  # noqa: F401 - only whether it is there
            import llama_cpp  # noqa: F401
        elif verb == "write":
            write_float16(Path(rest[0]), json.loads(rest[1]))
        elif verb == "quantize":
            quantize(Path(rest[0]), Path(rest[1]), rest[2])
        else:
            serve(Path(rest[0]), int(rest[1]))
            return
        _say({"done": verb})
    except (ImportError, RuntimeError, OSError, AttributeError) as error:
        _say({"error": f"{type(error).__name__}: {error}"})


if __name__ == "__main__":
    main(sys.argv[1:])
