"""Local tasks for the benchmark harnesses: lines of the held-out suite as files, and the same lines computed directly."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import numpy as np

from cobra_edge.inference.session import Session
from cobra_edge.suite.line import Line
from cobra_edge.suite.reader import HELDOUT, read_suite

LINES = read_suite(HELDOUT)
CHOICES = ["Yes", "No"]
YES_OR_NO = [line for line in LINES if line.answer in CHOICES][:12]
# Of each kind, two images; a caption in full is more than the task lets be written.
SEEN = [line for line in LINES if line.image in ("heldout/000.png", "heldout/001.png")]
LIMIT = 16


def image(line: Line) -> Path:
    assert line.image is not None
    return HELDOUT.parent / line.image


def write_lines(directory: Path) -> None:
    """Write what the tasks read: questions without images, and questions with them."""
    bare = [{"question": line.prompt, "answer": line.answer} for line in YES_OR_NO]
    seen = [{"question": line.prompt, "answer": line.answer, "image": str(image(line))} for line in SEEN]
    for name, lines in (("choice", bare), ("seen", seen)):
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_task(directory: Path, name: str, options: dict[str, Any], functions: dict[str, str]) -> None:
    """Write a task as YAML (JSON is YAML, but for `!function`) over NAME.jsonl of the same directory."""
    task = {
        "task": f"mini_{name}",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(directory / f"{name}.jsonl")}, "cache_dir": str(directory / "cache")},
        "test_split": "test",
        "doc_to_target": "answer",
        "metadata": {"version": 2.0},
        **options,
    }
    text = "".join(f"{key}: {json.dumps(value)}\n" for key, value in task.items())
    text += "".join(f"{key}: !function {value}\n" for key, value in functions.items())
    (directory / f"{name}.yaml").write_text(text)


def metric(name: str) -> list[dict[str, Any]]:
    return [{"metric": name, "aggregation": "mean", "higher_is_better": True}]


def logits_of(session: Session, prompt: list[int], answer: list[int], seen: Path | None = None) -> np.ndarray:
    """Return the logits before each token of an answer (answer, vocab), read in one piece."""
    state = session.decoder.new_state() if seen is None else session.look(seen)
    embeddings = session.decoder.embed([*prompt, *answer[:-1]])
    return session.decoder.forward(embeddings, state)[len(prompt) - 1 :]


def log_p(logits: np.ndarray, tokens: list[int]) -> np.ndarray:
    """Return log p of each token (tokens,) of logits (tokens, vocab), the long way."""
    wide = logits.astype(np.float64)
    return np.array(
        [row[token] - np.log(np.exp(row - row.max()).sum()) - row.max() for row, token in zip(wide, tokens, strict=True)]
    )


def likelihood(session: Session, line: Line, answer: str, seen: bool) -> tuple[float, bool]:
    """Return log p of an answer and whether it is what greedy choice gives."""
    prompt = session.codec.encode(session.template.first_turn(line.prompt))
    tokens = session.codec.encode(answer)
    logits = logits_of(session, prompt, tokens, image(line) if seen else None)
    return float(log_p(logits, tokens).sum()), bool((logits.argmax(-1) == tokens).all())


def accuracy_of_choices(session: Session) -> float:
    """Return how often the right one of the two choices is the likelier one."""
    right = 0
    for line in YES_OR_NO:
        found = [likelihood(session, line, choice, seen=False)[0] for choice in CHOICES]
        right += CHOICES[int(np.argmax(found))] == line.answer
    return right / len(YES_OR_NO)


def answers(session: Session) -> list[str]:
    """Return the answer to each question about an image."""
    return [session.ask(image(line), line.prompt, max_new_tokens=LIMIT).read() for line in SEEN]


class Wire:
    """A network that takes note of who wants to use it, and refuses."""

    def __init__(self) -> None:
        self.wanted: list[str] = []
        self._connect = socket.socket.connect

    def cut(self) -> None:
        """Take the network away from this process, for good."""
        socket.socket.connect = lambda that, address: self.connect(that, address)  # type: ignore[method-assign]
        socket.getaddrinfo = self.getaddrinfo

    def connect(self, that: socket.socket, address: Any) -> None:
        if that.family == socket.AF_UNIX:
            self._connect(that, address)
            return
        self.wanted.append(f"connect to {address}")
        raise OSError("no network in a test")

    def getaddrinfo(self, host: Any, *_rest: Any, **_more: Any) -> Any:
        self.wanted.append(f"look up {host}")
        raise OSError("no network in a test")
