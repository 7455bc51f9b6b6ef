"""Suggestions for unknown names: similar spelling, abbreviations, synonyms."""

from __future__ import annotations

from collections.abc import Iterable

_MAX_SUGGESTIONS = 3

# Synonyms of options, with the names that other tools use; without leading dashes.
OPTION_SYNONYMS: tuple[frozenset[str], ...] = tuple(
    frozenset(words.split())
    for words in (
        "image picture pic photo img image-path image-file input camera",
        "directory dir folder images pictures",
        "prompt question text query message instruction",
        "checkpoint model weights ckpt source pretrained model-path",
        "out output output-dir out-dir outfile destination save-to",
        "max-new-tokens max-tokens max-length n-predict num-predict",
        "device gpu cuda cpu",
        "target platform hardware device-profile",
        "scheme quant quantization quantize dtype format outtype",
        "threads cores num-threads n-threads jobs workers",
        "data dataset suite calibration-data questions",
        "force overwrite yes",
        "debug verbose log-level trace",
        "api-key-file api-key token key",
        "decoder-kernels kernels backend decoder",
        "vision-runtime runtime provider",
        "json json-output output-format",
        "state-dir cache-dir state-cache-mib",
        "deadline timeout",
        "seed random-seed",
    )
)

COMMAND_SYNONYMS: tuple[frozenset[str], ...] = tuple(
    frozenset(words.split())
    for words in (
        "export convert quantize quantise",
        "run ask generate infer inference predict describe",
        "chat talk repl",
        "watch stream camera monitor",
        "serve server api serving",
        "regress test eval evaluate check validate verify compare",
        "inspect info show describe list",
        "bench benchmark perf speed",
        "build compile engine",
        "calibrate calibration statistics",
    )
)


def close_matches(got: str, known: Iterable[str], synonyms: Iterable[frozenset[str]] = ()) -> list[str]:
    """Return up to three known names similar to `got`, the most similar first.

    Similar is a spelling with at most one edit per three characters, a prefix or a longer form of a name, and a word of the
    same row of `synonyms`. A transposition is one edit, and one edit is always allowed.
    """
    known = list(dict.fromkeys(known))
    word = _plain(got)
    allowed = max(len(word) // 3, int(len(word) > 1))
    distances = {name: _edits(word, _plain(name), allowed) for name in known}
    near = sorted((name for name in known if distances[name] <= allowed), key=lambda name: distances[name])
    near = [name for name in near if distances[name] <= distances[near[0]] + 1]
    same = [name for name in known if any({word, _plain(name)} <= row for row in synonyms)]
    longer = [name for name in known if len(word) > 1 and _plain(name).startswith(word)]
    shorter = [name for name in known if len(_plain(name)) > 2 and word.startswith(_plain(name))]
    return list(dict.fromkeys([*(n for n in near if distances[n] <= 1), *same, *longer, *near, *shorter]))[:_MAX_SUGGESTIONS]


def meant(close: Iterable[str], quote: str = "'") -> str:
    """Return "; did you mean 'rtx' or 'rtx-4090'?", or "" where nothing is similar."""
    names = " or ".join(f"{quote}{name}{quote}" for name in close)
    return f"; did you mean {names}?" if names else ""


def _plain(name: str) -> str:
    return name.strip("-").lower().replace("_", "-")


def _edits(a: str, b: str, limit: int) -> int:
    """Return the edit distance of a and b, a transposition counted as one; above `limit` it may be any larger number.

    Source: optimal string alignment (restricted Damerau-Levenshtein distance).
    """
    if abs(len(a) - len(b)) > limit:
        return limit + 1
    before, last = list(range(len(b) + 1)), list(range(len(b) + 1))
    for i in range(1, len(a) + 1):
        row = [i]
        for j in range(1, len(b) + 1):
            edits = min(last[j] + 1, row[j - 1] + 1, last[j - 1] + (a[i - 1] != b[j - 1]))
            if i > 1 and j > 1 and a[i - 1] == b[j - 2] and a[i - 2] == b[j - 1]:
                edits = min(edits, before[j - 2] + 1)
            row.append(edits)
        if min(row) > limit:
            return limit + 1
        before, last = last, row
    return last[-1]


def near_matches(got: str, known: Iterable[str]) -> str:
    """Return the end of a message about an unknown name, such as "; did you mean 'rtx'? known: …"."""
    known = list(known)
    return f"{meant(close_matches(got, known)) or ';'} known: {', '.join(known)}"
