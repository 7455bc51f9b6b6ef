"""llama.cpp as a peer: a Mamba as GGUF, timed or evaluated in a child process.

    python llamacpp.py check                                   # versions of the libraries
    python llamacpp.py write F16.gguf '{"d_model": …}'         # random weights
    python llamacpp.py write F32.gguf '{"d_model": …}' W.npz   # these weights, named as in the state-spaces layout
    python llamacpp.py quantize F16.gguf Q4_0.gguf Q4_0
    python llamacpp.py sizes Q4_0.gguf                         # bytes of the file and of each tensor in it
    python llamacpp.py answer Q4_0.gguf QUESTIONS.npz LOGITS.npz THREADS   # see `answer`
    python llamacpp.py serve Q4_0.gguf THREADS [LONGEST]       # reads one JSON object per line, see `serve`

Each prints one JSON object per line, `serve` its facts first, `answer` its progress; an error is {"error": …}.

This file imports nothing of the package, since llama.cpp may be installed in another environment. While other runners are timed
the process waits for a line, so its threads are asleep.
"""

from __future__ import annotations

import ctypes
import json
import re
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

_UBATCH = 512  # llama.cpp's default; longer prompts are split
_LONGEST_PROMPT = 4096
_LINES_A_REPORT = 32
_CELLS, _PLAIN_CELL = 4, 3  # words of a state before its cells, and of a cell without a place in a picture
_TEMPLATE_TOKENS = 64  # read to learn how a state is stored
# Tensors of the state-spaces layout by their name in a GGUF.
_OUTER = {
    "backbone.embedding.weight": "token_embd.weight",
    "backbone.norm_f.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_INNER = {
    "norm.weight": "attn_norm.weight",
    "mixer.in_proj.weight": "ssm_in.weight",
    "mixer.conv1d.weight": "ssm_conv1d.weight",
    "mixer.conv1d.bias": "ssm_conv1d.bias",
    "mixer.x_proj.weight": "ssm_x.weight",
    "mixer.dt_proj.weight": "ssm_dt.weight",
    "mixer.dt_proj.bias": "ssm_dt.bias",
    "mixer.A_log": "ssm_a",
    "mixer.D": "ssm_d",
    "mixer.out_proj.weight": "ssm_out.weight",
}


def random_tensors(sizes: dict[str, Any]) -> dict[str, np.ndarray]:
    """Return tensors by GGUF name: matrices (out, in) float16, vectors (n,) float32; all layers have the same values."""
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
    outer = {
        "token_embd.weight": matrix(sizes["vocab"], d_model),
        "output_norm.weight": np.ones(d_model, np.float32),
    }
    return outer | {f"blk.{i}.{name}": values for i in range(sizes["n_layer"]) for name, values in layer.items()}


def translated(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return a decoder of the state-spaces layout in that of a GGUF: renamed, float32, A instead of A_log.

    Shapes stay, but for conv1d.weight: (d_inner, 1, d_conv) becomes (d_inner, d_conv).

    Raises:
        ValueError: a tensor does not exist in a GGUF of a Mamba.
    """
    found = {}
    for name, values in tensors.items():
        layer = re.fullmatch(r"backbone\.layers\.(\d+)\.(.+)", name)
        inner = _INNER.get(layer[2]) if layer else None
        goal = f"blk.{layer[1]}.{inner}" if layer and inner else _OUTER.get(name)
        if goal is None:
            raise ValueError(f"{name} does not exist in a GGUF of a Mamba; known: {sorted([*_OUTER, *_INNER])}")
        wide = values.astype(np.float32)
        if goal.endswith("ssm_a"):
            wide = -np.exp(wide)
        found[goal] = wide[:, 0] if goal.endswith("ssm_conv1d.weight") else wide
    return found


def write_gguf(file: Path, sizes: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
    """Write a Mamba as GGUF.

    Args:
        file: to write.
        sizes: d_model, n_layer, vocab, d_inner, d_state, d_conv, dt_rank, and norm_eps unless it is 1e-5.
        tensors: by GGUF name, (out, in) or (n,), float16 or float32; without output.weight the head is tied.
    """
    import gguf

    half = tensors["token_embd.weight"].dtype == np.float16
    writer = gguf.GGUFWriter(file, "mamba")
    writer.add_name("bench")
    writer.add_context_length(1 << 20)
    writer.add_embedding_length(sizes["d_model"])
    writer.add_feed_forward_length(0)
    writer.add_head_count(0)
    writer.add_block_count(sizes["n_layer"])
    writer.add_ssm_conv_kernel(sizes["d_conv"])
    writer.add_ssm_inner_size(sizes["d_inner"])
    writer.add_ssm_state_size(sizes["d_state"])
    writer.add_ssm_time_step_rank(sizes["dt_rank"])
    writer.add_layer_norm_rms_eps(sizes.get("norm_eps", 1e-5))
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16 if half else gguf.LlamaFileType.ALL_F32)
    writer.add_ssm_dt_b_c_rms(False)
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(sizes["vocab"])
    for name, values in tensors.items():
        writer.add_tensor(name, np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def sizes_of(file: Path) -> dict[str, Any]:
    """Return file_bytes of a GGUF, and tensors {name: [type, bytes]}."""
    import gguf

    tensors = {t.name: [t.tensor_type.name, int(t.n_bytes)] for t in gguf.GGUFReader(file).tensors}
    return {"file_bytes": file.stat().st_size, "tensors": tensors}


def _quiet() -> Any:
    """Disable llama.cpp's log; keep the callback alive as long as the library is used."""
    import llama_cpp

    callback = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(callback, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    return callback


def quantize(source: Path, goal: Path, file_type: str) -> None:
    """Quantize a GGUF as llama.cpp's own tool does. Raises RuntimeError if it fails."""
    import llama_cpp

    kept = _quiet()
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{file_type}")
    code = llama_cpp.llama_model_quantize(str(source).encode(), str(goal).encode(), ctypes.byref(parameters))
    if code:
        raise RuntimeError(f"llama.cpp could not write {goal} (code {code})")
    del kept


def longer_state(template: np.ndarray, tokens: int, context: int) -> np.ndarray:
    """Return the state of one sequence after a longer context, with zeros for the added keys and values.

    Args:
        template: a state of llama.cpp's, (bytes,) uint8, after `tokens` tokens: a mark, the sequence, the number of streams, of
            cells; each cell's position, number of sequences, place in a picture and token where there is one, and sequence;
            whether values are transposed; the number of layers; keys of all and then values, as type, bytes of a row, rows.
            What follows, the state of recurrent layers, has one size.
        tokens: at least 2.
        context: not shorter.

    Returns:
        (bytes,) uint8; pages that hold zeros alone take no memory until they are written.

    Raises:
        RuntimeError: the template is in another form.
    """
    words = template[: len(template) // 4 * 4].view(np.int32)
    if len(words) <= _CELLS or words[_CELLS - 1] != tokens:
        return template.copy()  # no cells: a recurrent state has one size
    sizes = [n for n in range(3, 12) if all(words[_CELLS + i * n] == i for i in range(tokens))]
    if not sizes:
        raise RuntimeError("the cells of llama.cpp's state are in an unknown form")
    cell = sizes[0]
    end = _CELLS + tokens * cell
    transposed, layers = words[end], int(words[end + 1])
    if transposed or not 0 < layers < 1000:
        raise RuntimeError("llama.cpp's state holds transposed values, or is in an unknown form")
    parts: list[tuple[int, int, int]] = []  # begin in the template, bytes of the heading, bytes of a row
    at = 4 * (end + 2)
    for _ in range(2 * layers):
        row = int(template[at + 4 : at + 12].view(np.int64)[0])
        parts.append((at, 12, row))
        at += 12 + tokens * row
    added = context - tokens
    state = np.zeros(len(template) + added * (4 * cell + sum(row for _, _, row in parts)), np.uint8)
    state[: 4 * _CELLS] = template[: 4 * _CELLS]
    state[4 * (_CELLS - 1) : 4 * _CELLS] = np.array([context], np.int32).view(np.uint8)
    cells = np.repeat(words[None, end - cell : end], context, 0)
    cells[:, 0] = np.arange(context)
    if cell > _PLAIN_CELL:
        cells[:, 2:4] = np.arange(context)[:, None]  # of text, the place in a picture is the position
    to = 4 * _CELLS + cells.nbytes
    state[4 * _CELLS : to] = cells.view(np.uint8).ravel()
    state[to : to + 8] = template[4 * end : 4 * end + 8]
    to += 8
    for begin, heading, row in parts:
        state[to : to + heading] = template[begin : begin + heading]
        to += heading + context * row
    state[to:] = template[at:]
    return state


def _address(values: np.ndarray) -> Any:
    return values.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))


class Peer:
    """An open GGUF."""

    def __init__(self, file: Path, threads: int, longest: int = _LONGEST_PROMPT) -> None:
        """Open the file with llama.cpp's defaults, these threads and room for the longest context.

        Raises:
            RuntimeError: it cannot be opened, or the context does not fit.
        """
        import llama_cpp

        self._api, self._kept = llama_cpp, _quiet()
        self._model = llama_cpp.llama_model_load_from_file(str(file).encode(), llama_cpp.llama_model_default_params())
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot open {file}")
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx, settings.n_batch, settings.n_ubatch = longest, _LONGEST_PROMPT, _UBATCH
        settings.n_threads = settings.n_threads_batch = threads
        self._context = llama_cpp.llama_init_from_model(self._model, settings)
        if not self._context:
            raise RuntimeError(f"llama.cpp cannot hold a context of {longest} tokens of {file}")
        self._vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._random = np.random.default_rng(1)

    def facts(self) -> dict[str, Any]:
        """Return version, instruction sets of the build, and size of the weights."""
        return {
            "version": _version(),
            "built_for": self._api.llama_print_system_info().decode().strip(),
            "weights_bytes": int(self._api.llama_model_size(self._model)),
        }

    def _decode(self, count: int) -> np.ndarray:
        tokens = (self._api.llama_token * count)(*self._random.integers(0, self._vocab, count).tolist())
        code = self._api.llama_decode(self._context, self._api.llama_batch_get_one(tokens, count))
        if code:
            raise RuntimeError(f"llama_decode failed with {code}")
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
        """Prefill this many tokens from an empty state; returns seconds."""
        self._api.llama_memory_clear(self._api.llama_get_memory(self._context), True)
        return self._checked(count, 1)

    def steps(self, count: int) -> float:
        """Decode this many tokens; returns seconds."""
        return self._checked(1, count)

    def question(self, context: int, count: int) -> float:
        """Read this many tokens after a context of that length; returns seconds."""
        self.fill(context)
        return self._checked(count, 1)

    def fill(self, context: int) -> None:
        """Set the state to that after this many tokens, without reading them: keys and values of the cache are zeros.

        The time of a token depends on how many there are, not on what they hold.

        Raises:
            RuntimeError: the library stores its cache in another form than is known here.
        """
        api = self._api
        self.prefill(_TEMPLATE_TOKENS)
        if context == _TEMPLATE_TOKENS:
            return
        size = api.llama_state_seq_get_size(self._context, 0)
        template = np.zeros(size, np.uint8)
        api.llama_state_seq_get_data(self._context, _address(template), size, 0)
        state = longer_state(template, _TEMPLATE_TOKENS, context)
        api.llama_memory_clear(api.llama_get_memory(self._context), True)
        if not api.llama_state_seq_set_data(self._context, _address(state), len(state), 0):
            raise RuntimeError(f"llama.cpp does not take a state of {context} tokens")

    def memory(self, context: int) -> dict[str, int]:
        """Return the bytes of the state after a context of that length."""
        self.fill(context)
        return {"state_bytes": self._api.llama_state_seq_get_size(self._context, 0)}

    def read(self, rows: np.ndarray, start: int, answer_from: int) -> np.ndarray:
        """Read positions and return the logits of those from `answer_from` on, (n, vocab) float32.

        Args:
            rows: (seq, d_model) float32 embeddings, or (seq,) int32 tokens.
            start: number of positions read before; 0 resets the state.
            answer_from: the first of these positions whose logits are wanted.
        """
        api, count = self._api, len(rows)
        if start == 0:
            api.llama_memory_clear(api.llama_get_memory(self._context), True)
        batch = api.llama_batch_init(count, rows.shape[1] if rows.ndim == 2 else 0, 1)
        try:
            batch.n_tokens = count
            data = np.ascontiguousarray(rows)
            ctypes.memmove(batch.embd if rows.ndim == 2 else batch.token, data.ctypes.data, data.nbytes)
            for i in range(count):
                batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = start + i, 1, 0
                batch.logits[i] = i >= answer_from
            code = api.llama_decode(self._context, batch)
            if code:
                raise RuntimeError(f"llama_decode failed with {code}")
        finally:
            api.llama_batch_free(batch)
        wanted = max(0, count - answer_from)
        if not wanted:
            return np.empty((0, self._vocab), np.float32)
        return np.ctypeslib.as_array(api.llama_get_logits(self._context), (wanted, self._vocab)).copy()


def answer(file: Path, questions: Path, goal: Path, threads: int) -> None:
    """Read each line and write the logits of its answer positions, (all of them, vocab) float32, as `logits` of an npz.

    Args:
        file: a GGUF.
        questions: an npz: embeddings (images, n_visual, d_model) float32; image (lines,) int32, -1 for none; tokens of
            all lines, int32; length (lines,) int32, tokens per line; answer_from (lines,) int32, the first token of a line
            whose logits are wanted.
        goal: file for the logits.
        threads: their number.
    """
    peer, found = Peer(file, threads), []
    with np.load(questions, allow_pickle=False) as asked:
        images, tokens, first = asked["embeddings"], asked["tokens"].astype(np.int32), asked["answer_from"]
        lines = list(zip(asked["image"], asked["length"], first, strict=True))
    end = 0
    for number, (image, length, answer_from) in enumerate(lines, 1):
        seen = 0
        if image >= 0:
            seen = len(images[image])
            peer.read(images[image], 0, seen - 1)  # one row of logits: some builds refuse a batch without any
        found.append(peer.read(tokens[end : end + length], seen, int(answer_from)))
        end += int(length)
        if number % _LINES_A_REPORT == 0:
            _say({"lines": number})
    np.savez(goal, logits=np.concatenate(found))


def serve(file: Path, threads: int, longest: int = _LONGEST_PROMPT) -> None:
    """Open the file, print its facts, then answer each line of stdin.

    An order is {"prefill": tokens}, from an empty state, {"steps": tokens}, {"question": tokens, "context": tokens before it},
    each answered by {"seconds": …}; {"fill": tokens}, see `Peer.fill`; or {"memory": tokens}, see `Peer.memory`.
    """
    peer = Peer(file, threads, longest)
    _say(peer.facts())
    for line in sys.stdin:
        order = json.loads(line)
        if "question" in order:
            _say({"seconds": peer.question(order["context"], order["question"])})
        elif "prefill" in order:
            _say({"seconds": peer.prefill(order["prefill"])})
        elif "steps" in order:
            _say({"seconds": peer.steps(order["steps"])})
        elif "memory" in order:
            _say(peer.memory(order["memory"]))
        else:
            peer.fill(order["fill"])
            _say({"done": "fill"})


def _version() -> str:
    from importlib.metadata import version

    return f"llama-cpp-python {version('llama-cpp-python')}"


def _say(said: dict[str, Any]) -> None:
    print(json.dumps(said), flush=True)


def main(arguments: list[str]) -> None:
    """Run one of the commands of the module's docstring."""
    command, *rest = arguments
    said: dict[str, Any] = {"done": command}
    try:
        if command == "check":
            import gguf  # noqa: F401 - only whether it is there
            import llama_cpp  # noqa: F401

            said["version"] = _version()
        elif command == "write":
            sizes = json.loads(rest[1])
            if len(rest) > 2:
                with np.load(rest[2], allow_pickle=False) as given:
                    tensors = translated(dict(given))
            else:
                tensors = random_tensors(sizes)
            write_gguf(Path(rest[0]), sizes, tensors)
        elif command == "quantize":
            quantize(Path(rest[0]), Path(rest[1]), rest[2])
        elif command == "sizes":
            said |= sizes_of(Path(rest[0]))
        elif command == "answer":
            answer(Path(rest[0]), Path(rest[1]), Path(rest[2]), int(rest[3]))
        else:
            serve(Path(rest[0]), *map(int, rest[1:]))
            return
        _say(said)
    except (ImportError, RuntimeError, OSError, AttributeError, ValueError, KeyError) as error:
        _say({"error": f"{type(error).__name__}: {error}"})


if __name__ == "__main__":
    main(sys.argv[1:])
