"""llama.cpp on the held-out suite: the decoder's weights as GGUF, quantized and evaluated by llama.cpp in a child process."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import msgspec
import numpy as np

from cobra_edge.bench.llamacpp_runner import SCRIPT, Child, started
from cobra_edge.environment.requirements import install_hint
from cobra_edge.errors import MachineError
from cobra_edge.formats.model_config import MambaConfig
from cobra_edge.suite.tokenized import TokenizedSuite

from .stored_bits import StoredBits, gguf_bits

OnLines = Callable[[int], None]  # called with the number of lines that are done
# One thread is fastest for such a small model; answers do not depend on it.
_THREADS = "1"


@dataclass(frozen=True, eq=False)
class RunnerOutput:
    """The logits of a runner, and its size.

    Attributes:
        logits: of each line (n_answer, vocab) float32.
        bits: per weight.
        facts: fields of `QualityRow`: runtime, activations, and so on.
    """

    logits: list[np.ndarray]
    bits: StoredBits
    facts: dict[str, Any] = field(default_factory=dict)


class PeerLibrary(Protocol):
    """Peers of one library: ways to store the weights of the decoder.

    Attributes:
        name: the library.
        peers: bits of a code, by label.
    """

    name: str
    peers: Mapping[str, int]

    def refuses(self) -> str | None:
        """Return why it cannot be measured here, or None."""
        ...

    def answer_in_float(self, suite: TokenizedSuite, on_lines: OnLines) -> list[np.ndarray]:
        """Return the logits with float weights, of each line (n_answer, vocab) float32."""
        ...

    def answer(self, label: str, suite: TokenizedSuite, on_lines: OnLines) -> RunnerOutput:
        """Return the logits of one of its peers, of each line (n_answer, vocab) float32."""
        ...


class LlamaCppLibrary:
    """llama.cpp's file formats; the float form is a GGUF of float32."""

    name = "llama.cpp"
    peers: Mapping[str, int] = {"llama.cpp Q8_0": 8, "llama.cpp Q5_K_M": 5, "llama.cpp Q4_K_M": 4, "llama.cpp Q4_0": 4}

    def __init__(
        self, config: MambaConfig, tensors: Mapping[str, np.ndarray], folder: Path, python: str, script: Path = SCRIPT
    ) -> None:
        """Set the decoder.

        Args:
            config: of the decoder.
            tensors: its weights by state-spaces names, in the shapes of `decoder_shapes`, any float dtype.
            folder: for files.
            python: Python interpreter that has llama-cpp-python and gguf.
            script: of the child process.
        """
        self._config, self._tensors, self._folder, self._command = config, tensors, folder, (python, str(script))
        self._version = ""

    def refuses(self) -> str | None:
        """See `PeerLibrary.refuses`. Raises InputError if the interpreter cannot be started, MachineError if it fails."""
        try:
            self._version = str(self._done("check").get("version", ""))
        except MachineError as error:
            if "No module named" not in str(error):
                raise
            return f"{error}; {install_hint('peers')}, or give --peer-python an environment that has it"
        return None

    def answer_in_float(self, suite: TokenizedSuite, on_lines: OnLines) -> list[np.ndarray]:
        """See `PeerLibrary.answer_in_float`; of each line (n_answer, vocab) float32."""
        return self._answers(self._source(), suite, on_lines)

    def answer(self, label: str, suite: TokenizedSuite, on_lines: OnLines) -> RunnerOutput:
        """See `PeerLibrary.answer`. Raises MachineError if llama.cpp fails."""
        file_type = label.removeprefix(f"{self.name} ")
        file = self._folder / f"{file_type}.gguf"
        self._done("quantize", str(self._source()), str(file), file_type)
        sizes = self._done("sizes", str(file))
        bits = gguf_bits(self._config, {name: size for name, (_, size) in sizes["tensors"].items()}, sizes["file_bytes"])
        facts = {"runtime": self._version, "activations": "llama.cpp's own: int8"}
        return RunnerOutput(self._answers(file, suite, on_lines), bits, facts)

    def _source(self) -> Path:
        file, weights = self._folder / "F32.gguf", self._folder / "weights.npz"
        if not file.is_file():
            arrays: dict[str, Any] = dict(self._tensors)
            np.savez(weights, **arrays)
            self._done("write", str(file), msgspec.json.encode(self._config).decode(), str(weights))
        return file

    def _answers(self, file: Path, suite: TokenizedSuite, on_lines: OnLines) -> list[np.ndarray]:
        sent, goal = self._folder / "questions.npz", self._folder / "logits.npz"
        write_questions(sent, suite)
        goal.unlink(missing_ok=True)
        with started([*self._command, "answer", str(file), str(sent), str(goal), _THREADS]) as child:
            _wait(child, on_lines)
        with np.load(goal, allow_pickle=False) as found:
            logits = found["logits"]
        lengths = [len(line.answer) for line in suite.lines]
        if logits.shape != (sum(lengths), self._config.vocab):
            raise MachineError(
                f"llama.cpp wrote logits of shape {logits.shape}, expected {(sum(lengths), self._config.vocab)}; "
                "is the child of this version?"
            )
        return np.split(logits, np.cumsum(lengths)[:-1])

    def _done(self, *arguments: str) -> dict[str, Any]:
        with started([*self._command, *arguments]) as child:
            return child.answer()


def _wait(child: Child, on_lines: OnLines) -> None:
    while "done" not in (said := child.answer()):
        on_lines(said.get("lines", 0))


def write_questions(file: Path, suite: TokenizedSuite) -> None:
    """Write a suite with its embeddings in the format of `llamacpp.answer`."""
    assert suite.embeddings is not None
    np.savez(
        file,
        embeddings=suite.embeddings,
        image=np.array([-1 if line.image is None else line.image for line in suite.lines], np.int32),
        tokens=np.concatenate([np.array(line.inputs, np.int32) for line in suite.lines]),
        length=np.array([len(line.inputs) for line in suite.lines], np.int32),
        answer_from=np.array([line.answer_from for line in suite.lines], np.int32),
    )
