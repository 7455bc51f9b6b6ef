"""Transcript of a chat as JSON: model, runtimes, image, and the turns as OpenAI chat messages."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import msgspec

from ..bundle.reader import MANIFEST, Bundle, file_sha256
from ..errors import InputError
from ..files.staging import rename_new
from ..inference.session import Session
from .conversation import Conversation


def write_transcript(conversation: Conversation, file: Path) -> None:
    """Write a conversation as JSON, atomically.

    Raises:
        InputError: no turn yet, the file exists, or it cannot be written.
    """
    if not conversation.turns:
        raise InputError("nothing to save; ask a question first")
    if os.path.lexists(file):
        raise InputError(f"{file} already exists; /save under another name")
    content = msgspec.json.format(msgspec.json.encode(transcript(conversation)), indent=2) + b"\n"
    try:
        with tempfile.TemporaryDirectory(dir=file.parent, prefix=f".{file.name}.partial-") as stage:
            staged = Path(stage) / "transcript"
            staged.write_bytes(content)
            rename_new(staged, file)
    except FileExistsError as error:
        raise InputError(f"{file} already exists; /save under another name") from error
    except OSError as error:
        raise InputError(f"{file}: cannot be written ({error.strerror}); /save to a directory that you can write to") from error


def transcript(conversation: Conversation) -> dict[str, Any]:
    """Return the transcript: bundle, runtime, sampling, image, `messages`, and the metrics of `answers`."""
    session, image = conversation.session, conversation.image
    messages = []
    for turn in conversation.turns:
        messages += [{"role": "user", "content": turn.question}, {"role": "assistant", "content": turn.answer.text}]
    return {
        "bundle": _build(session.bundle),
        "runtime": _runtime(session),
        "sampling": conversation.sampling,
        "max_new_tokens": conversation.max_new_tokens,
        "image": image and {"path": str(image.path), "sha256": image.sha256},
        "messages": messages,
        "answers": [{**msgspec.structs.asdict(turn.answer), "remembered": turn.remembered} for turn in conversation.turns],
    }


def _build(bundle: Bundle) -> dict[str, Any]:
    """Describe the bundle as reports of `regress` do."""
    manifest = bundle.manifest
    return {
        "name": bundle.directory.resolve().name,
        "fingerprint": file_sha256(bundle.path(MANIFEST)),
        "model": manifest.model.model_id,
        "source": manifest.source.id,
        "source_sha256": manifest.source.sha256,
        "target": manifest.target,
        "scheme": manifest.recipe.scheme,
        "method": manifest.recipe.method,
        "rotations": manifest.recipe.rotations,
        "vision_precision": None if manifest.model.vision is None else bundle.vision_graph.precision,
    }


def _runtime(session: Session) -> dict[str, Any]:
    return {
        "decoder": session.decoder.name,
        "device": session.decoder.runs_on,
        "activations": session.decoder.activations,
        "vision": None if session.vision is None else session.vision.name,
    }
