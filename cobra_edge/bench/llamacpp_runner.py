"""llama.cpp as a runner: a child process (`llamacpp.py`) that answers in lines of JSON.

Its library may be installed in another environment, so the child imports nothing of this package.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec
from rich.progress import Progress

from ..environment.requirements import install_hint
from ..errors import InputError, MachineError
from ..formats.model_config import MambaConfig
from .decode_result import RunnerFacts

PEERS = ("llama.cpp",)
SCRIPT = Path(__file__).with_name("llamacpp.py")
# llama.cpp's format of about the same bits per weight; it quantizes activations to int8.
_FILE_TYPES = {3: "Q3_K_S", 4: "Q4_0", 8: "Q8_0", 16: "F16"}
_ENDING_SECONDS = 10.0


class Child:
    """A process that answers each line with one line. Use `started`, which always ends it."""

    def __init__(self, process: subprocess.Popen[str], words: Any) -> None:
        """Take the process and the file that its stderr is written to."""
        self._process, self._words = process, words

    def answer(self) -> dict[str, Any]:
        """Return the next answer. Raises MachineError if it is an error or not a JSON object, or if the process has ended."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            raise MachineError(f"llama.cpp ended with exit code {code}{self._last_words()}; try its command by hand")
        try:
            found = json.loads(line)
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise MachineError(f"llama.cpp answered {line.strip()[:200]!r}, expected one JSON object per line")
        if "error" in found:
            raise MachineError(f"llama.cpp: {found['error']}")
        return found

    def ask(self, **order: int) -> dict[str, Any]:
        """Send one order and return its answer. Raises MachineError as `answer` does."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # the process has ended; `answer` reports its last message
            self._process.stdin.write(json.dumps(order) + "\n")
            self._process.stdin.flush()
        return self.answer()

    def _last_words(self) -> str:
        self._words.seek(0)
        lines = self._words.read().decode(errors="replace").strip().splitlines()
        return f" ({lines[-1][:300]})" if lines else ""


@contextmanager
def started(command: Sequence[str]) -> Iterator[Child]:
    """Start a child process and end it with the block. Raises InputError if it cannot be started."""
    with tempfile.TemporaryFile() as words:
        try:
            process = subprocess.Popen(
                list(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=words, text=True, encoding="utf-8"
            )
        except OSError as error:
            raise InputError(
                f"{command[0]}: cannot be started ({error.strerror}); give the path of a Python interpreter"
            ) from error
        try:
            yield Child(process, words)
        finally:
            _end(process)


def _end(process: subprocess.Popen[str]) -> None:
    process.terminate()
    try:
        process.wait(_ENDING_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for pipe in (process.stdin, process.stdout):
        assert pipe is not None
        with suppress(BrokenPipeError):  # a request that was not read
            pipe.close()


def check_peer(command: Sequence[str]) -> None:
    """Check that the libraries are there.

    Args:
        command: an interpreter that has llama-cpp-python, and SCRIPT.

    Raises:
        InputError: the interpreter cannot be started. MachineError: a library is missing.
    """
    try:
        with started([*command, "check"]) as child:
            child.answer()
    except MachineError as error:
        if "No module named" not in str(error):
            raise
        raise MachineError(
            f"llama-cpp-python is not installed in {command[0]} ({error}); {install_hint('peers')} there, "
            "or name an environment that has it with --peer-python"
        ) from error


class LlamaCpp:
    """llama.cpp on a GGUF of the same shape, a `Runner`."""

    def __init__(self, child: Child, file_type: str, threads: int, context: int) -> None:
        """Wait for the child's first line. Raises MachineError if it is not valid."""
        facts = child.answer()
        self.name = f"llama.cpp {file_type}"
        self.contexts: tuple[int, ...] = (context,)
        try:
            self.weights_bytes = int(facts["weights_bytes"])
        except (KeyError, TypeError, ValueError) as error:
            raise MachineError(f"llama.cpp's first line has no weights_bytes: {facts}; is it this version's child?") from error
        activations = "float16" if file_type == "F16" else "int8"
        self._facts = RunnerFacts(
            version=facts.get("version"),
            built_for=facts.get("built_for"),
            file_type=file_type,
            activations=activations,
            threads=threads,
        )
        self._child = child

    def facts(self) -> RunnerFacts:
        """See `Runner.facts`."""
        return self._facts

    def _seconds(self, **order: int) -> float:
        answer = self._child.ask(**order)
        seconds = answer.get("seconds")
        if not isinstance(seconds, float) or not seconds > 0:
            raise MachineError(f"llama.cpp answered {answer} to {order}, expected seconds")
        return seconds

    def prefill(self, tokens: int) -> float:
        """See `Runner.prefill`."""
        return self._seconds(prefill=tokens)

    def steps(self, count: int, context: int) -> float:
        """See `Runner.steps`; the context is prefilled in every call."""
        self.prefill(context)
        return self._seconds(steps=count)


class LlamaCppFiles:
    """The GGUF files of one shape, and the command that makes them."""

    def __init__(self, shape: str, mamba: MambaConfig, directory: Path, command: Sequence[str]) -> None:
        """Take what the files depend on.

        Args:
            shape: its name.
            mamba: its sizes.
            directory: of the files; made if it does not exist.
            command: an interpreter that has llama-cpp-python, and SCRIPT.
        """
        self._stem, self._mamba, self._directory, self._command = f"bench-{shape}", mamba, directory, tuple(command)

    def check(self, weight_bits: Iterable[int]) -> None:
        """Check formats and libraries before gigabytes are written.

        Raises:
            InputError: llama.cpp has no format of these bits; the interpreter cannot be started.
            MachineError: a library is missing.
        """
        for bits in weight_bits:
            if bits not in _FILE_TYPES:
                raise InputError(f"llama.cpp has no {bits}-bit format here; known: {sorted(_FILE_TYPES)}; omit --peer")
        check_peer(self._command)

    def file(self, weight_bits: int, bar: Progress) -> tuple[Path, str]:
        """Return the GGUF of these bits per weight, and its type; it is made once."""
        source = self._made("F16", bar, lambda goal: ("write", goal, self._sizes()))
        file_type = _FILE_TYPES[weight_bits]
        if file_type == "F16":
            return source, file_type
        return self._made(file_type, bar, lambda goal: ("quantize", str(source), goal, file_type)), file_type

    @contextmanager
    def opened(self, file: Path, file_type: str, threads: int, context: int) -> Iterator[LlamaCpp]:
        """Yield the runner with its file open; raises as `started` and `LlamaCpp` do."""
        with started([*self._command, "serve", str(file), str(threads)]) as child:
            yield LlamaCpp(child, file_type, threads, context)

    def _sizes(self) -> str:
        return msgspec.json.encode(self._mamba).decode()

    def _made(self, file_type: str, bar: Progress, command: Callable[[str], tuple[str, ...]]) -> Path:
        goal = self._directory / f"{self._stem}-{file_type}.gguf"
        if goal.is_file():
            return goal
        task = bar.add_task(f"{goal.name} for llama.cpp", total=1)
        self._directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self._directory, prefix=f".{goal.name}.partial-") as stage:
            staged = Path(stage) / goal.name
            self._done(*command(str(staged)))
            staged.rename(goal)
        bar.advance(task)
        return goal

    def _done(self, *arguments: str) -> None:
        with started([*self._command, *arguments]) as child:
            child.answer()
