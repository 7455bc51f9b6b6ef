"""Compared lines added up, image by image, and the figures made from the sums.

What stays in memory is about a kilobyte an image, whatever was read: lines are forgotten once they are counted.
"""

from __future__ import annotations

import heapq
import math
from collections import defaultdict
from collections.abc import Callable, Sequence

import numpy as np

from ..suite.line import Line
from ..suite.scoring import METRICS
from ..suite.tokenized import TokenizedLine
from . import intervals
from .intervals import Interval
from .line_metrics import LineMetrics
from .report import Figure, LayerFigures, PositionFigures, TaskFigures, WorstLine

WORST = 12
_SILENCE = 1e-30  # a state's squared length is at least this
_KLD_QUANTILES = {"kld_median": 0.5, "kld_p90": 0.9, "kld_p99": 0.99}
_PROMPT_QUANTILES = {"prompt_kld_p99": 0.99}

# {measure: (how the sums become it, what is summed, over what)}
_OF_SUMS = {
    "kld_mean": ("mean", "kld", "tokens"),
    "prompt_kld_mean": ("mean", "prompt_kld", "prompt_tokens"),
    "top1_agreement": ("share", "agrees", "tokens"),
    "right_change_mean": ("mean", "right_change", "tokens"),
    "right_change_rms": ("root", "right_change_squared", "tokens"),
    "perplexity": ("exp", "nll", "tokens"),
    "perplexity_ratio": ("exp", "nll_change", "tokens"),
    "vision_error": ("root", "vision_distance", "vision_length"),
    "greedy_match": ("share", "alike", "lines"),
    "greedy_prefix": ("share", "prefix", "lines"),
    "length_ratio": ("ratio", "reply_tokens", "reference_reply_tokens"),
}


def _exp(x: float) -> float:
    return math.exp(min(x, 700.0))  # beyond, a float has no room; the budget's limit is long passed


_POINTS: dict[str, Callable[[float, float], float]] = {
    "mean": lambda a, n: a / n,
    "share": lambda a, n: a / n,
    "ratio": lambda a, b: a / b,
    "root": lambda a, n: math.sqrt(a / n),
    "exp": lambda a, n: _exp(a / n),
}
_INTERVALS: dict[str, Callable[[np.ndarray, np.ndarray], Interval]] = {
    "mean": intervals.mean,
    "share": intervals.share,
    "ratio": intervals.ratio_of_means,
    "root": intervals.root_ratio,
    "exp": lambda a, n: intervals.mean(a, n).map(_exp),
}


def kind_of(measure: str) -> str:
    """Return how a measure is made of its images: "mean", "share", "change", "ratio", "root", "exp" or "quantile"."""
    name = measure.partition(".")[0]
    kinds = {"state_error": "root", "accuracy": "share", "accuracy_change": "change"}
    return kinds.get(name) or (_OF_SUMS[name][0] if name in _OF_SUMS else "quantile")


class Aggregate:
    """Sums over the lines so far.

    Attributes:
        lines, answer_tokens, prompt_tokens: how many.
        tail_mass_max, prompt_tail_mass_max: largest tail of the reference's distributions, on answers and on questions.
        kept_max: how many tokens of a distribution are kept at most.
    """

    def __init__(self) -> None:
        """Begin with nothing."""
        self.lines, self.answer_tokens, self.prompt_tokens, self.kept_max = 0, 0, 0, 0
        self.tail_mass_max, self.prompt_tail_mass_max = 0.0, 0.0
        self._sums: dict[tuple[bool, int], defaultdict[str, float]] = {}
        self._klds: dict[tuple[bool, int], list[np.ndarray]] = defaultdict(list)
        self._prompt_klds: dict[tuple[bool, int], list[np.ndarray]] = defaultdict(list)
        self._positions: defaultdict[int, list[float]] = defaultdict(lambda: [0.0, 0.0])
        self._metrics: dict[str, str] = {}
        self._said: defaultdict[str, list[tuple[Line, str, str]]] = defaultdict(list)
        self._worst: list[tuple[float, int, WorstLine]] = []
        self._layers = 0

    @property
    def images(self) -> int:
        """How many images; a line without one counts as one."""
        return len(self._sums)

    def drawn(self, groups: Sequence[int]) -> Aggregate:
        """Return the aggregate of a suite made of these images, by their place in this one's; one may come several times."""
        found, keys = Aggregate(), list(self._sums)
        for at, group in enumerate(groups):
            key = keys[group]
            found._sums[False, at], found._klds[False, at] = self._sums[key], self._klds[key]
            found._prompt_klds[False, at] = self._prompt_klds[key]
        found._metrics, found._layers = self._metrics, self._layers
        return found

    def add(self, tokenized: TokenizedLine, line: LineMetrics) -> None:
        """Count a line."""
        group = (True, line.number) if line.image is None else (False, line.image)
        new = group not in self._sums
        sums, task = self._sums.setdefault(group, defaultdict(float)), tokenized.line.task
        right, reference = np.array(line.right), np.array(line.right_reference)
        change = np.exp(right) - np.exp(reference)
        alike, kld = line.diverges_at is None, sum(line.answer_kld)
        counted = {
            "kld": kld,
            "tokens": len(line.answer_kld),
            "prompt_kld": sum(line.prompt_kld),
            "prompt_tokens": len(line.prompt_kld),
            "agrees": sum(line.agrees),
            "right_change": change.sum(),
            "right_change_squared": np.square(change).sum(),
            "nll": -right.sum(),
            "nll_change": (reference - right).sum(),
            "alike": alike,
            "prefix": _part_alike(line),
            # The end token is said too: two empty answers have one length.
            "reply_tokens": len(line.reply) + 1,
            "reference_reply_tokens": len(line.reference_reply) + 1,
            "score": line.score,
            "gained": max(line.score - line.reference_score, 0),
            "lost": max(line.reference_score - line.score, 0),
            "lines": 1,
        }
        of_task = ("kld", "tokens", "alike", "score", "gained", "lost", "lines")
        counted |= {f"{name}:{task}": counted[name] for name in of_task}
        # Each line's relative to its own state: summed first, one loud state would speak for all.
        counted |= {f"state:{i}": distance / max(length, _SILENCE) for i, (distance, length) in enumerate(line.states)}
        if new and line.vision is not None:
            counted |= {"vision_distance": line.vision[0], "vision_length": line.vision[1]}
        for name, value in counted.items():
            sums[name] += float(value)
        self._klds[group].append(np.array(line.answer_kld))
        self._prompt_klds[group].append(np.array(line.prompt_kld))
        for at, value in enumerate([*line.prompt_kld, *line.answer_kld], -len(line.prompt_kld)):
            self._positions[at][0] += value
            self._positions[at][1] += 1
        self._layers, self._metrics[task] = len(line.states), tokenized.line.metric
        if METRICS[tokenized.line.metric].summary is not None:
            self._said[task].append((tokenized.line, line.text, line.reference_text))
        self.lines += 1
        self.answer_tokens += len(line.answer_kld)
        self.prompt_tokens += len(line.prompt_kld)
        self.tail_mass_max, self.kept_max = max(self.tail_mass_max, line.tail), max(self.kept_max, line.kept)
        self.prompt_tail_mass_max = max(self.prompt_tail_mass_max, line.prompt_tail)
        heapq.heappush(self._worst, (kld / len(line.answer_kld), -line.number, _worst(tokenized, line)))
        if len(self._worst) > WORST:
            heapq.heappop(self._worst)

    def values(self) -> dict[str, float]:
        """Return every measure that could be taken, without intervals."""
        found = {}
        for name, (how, over, of) in _OF_SUMS.items():
            a, b = self._column(over), self._column(of)
            if b.sum() > 0:
                found[name] = _POINTS[how](float(a.sum()), float(b.sum()))
        for quantiles, groups in ((_KLD_QUANTILES, self._klds), (_PROMPT_QUANTILES, self._prompt_klds)):
            values = _joined(groups)
            if len(values):
                found |= {name: float(np.quantile(values, q)) for name, q in quantiles.items()}
        found["kld_max"] = float(_joined(self._klds).max())
        for task in (None, *self._metrics):
            of, dot = ("", "") if task is None else (f":{task}", f".{task}")
            score, gained, lost, n = (float(self._column(f"{name}{of}").sum()) for name in ("score", "gained", "lost", "lines"))
            found |= {f"accuracy{dot}": score / n, f"accuracy_change{dot}": (gained - lost) / n}
        layers = [_POINTS["root"](float(self._column(f"state:{i}").sum()), self.lines) for i in range(self._layers)]
        return found | {"state_error": max(layers)} | {f"state_error.{i}": error for i, error in enumerate(layers)}

    def figures(self) -> dict[str, Figure]:
        """Return every measure that could be taken, with its interval. Raises InputError for fewer than two images."""
        found = {}
        for name, (how, over, of) in _OF_SUMS.items():
            if self._column(of).sum() > 0:
                found[name] = self._interval(how, over, of)
        for quantiles, groups in ((_KLD_QUANTILES, self._klds), (_PROMPT_QUANTILES, self._prompt_klds)):
            filled = [values for group in groups.values() if len(values := np.concatenate(group))]
            if self._one_of_several(len(filled)):
                found |= {name: Figure(float(np.quantile(filled[0], q))) for name, q in quantiles.items()}
            elif filled:
                ends = intervals.quantiles(filled, list(quantiles.values()))
                found |= {name: Figure.of(interval) for name, interval in zip(quantiles, ends, strict=True)}
        largest = float(_joined(self._klds).max())
        found["kld_max"] = Figure(largest, largest, largest)  # of these lines; nothing drawn from them can exceed it
        layers = self.layers()
        found |= {f"state_error.{layer.layer}": layer.state_error for layer in layers}
        found["state_error"] = max((layer.state_error for layer in layers), key=lambda figure: figure.value or 0.0)
        for task in (None, *self._metrics):
            dot = "" if task is None else f".{task}"
            found[f"accuracy{dot}"], found[f"accuracy_change{dot}"] = self._accuracy(task)
        return found

    def layers(self) -> tuple[LayerFigures, ...]:
        """Return each layer's state error."""
        return tuple(LayerFigures(i, self._interval("root", f"state:{i}", "lines")) for i in range(self._layers))

    def tasks(self) -> tuple[TaskFigures, ...]:
        """Return each task's figures, by name."""
        found = []
        for task, metric in sorted(self._metrics.items()):
            n, scored, gained, lost = (self._column(f"{name}:{task}").sum() for name in ("lines", "score", "gained", "lost"))
            score, change = self._accuracy(task)
            said, summary = self._said[task], METRICS[metric].summary
            found.append(
                TaskFigures(
                    task=task,
                    metric=metric,
                    lines=int(n),
                    score=score,
                    reference=float((scored - gained + lost) / n),
                    change=change,
                    kld_mean=self._interval("mean", f"kld:{task}", f"tokens:{task}"),
                    greedy_match=self._interval("share", f"alike:{task}", f"lines:{task}"),
                    summary={} if summary is None else summary([(line, text) for line, text, _ in said]),
                    reference_summary={} if summary is None else summary([(line, text) for line, _, text in said]),
                )
            )
        return tuple(found)

    def positions(self) -> tuple[PositionFigures, ...]:
        """Return the mean KLD at each place, the answer's first token at 0."""
        return tuple(PositionFigures(at, int(n), total / n) for at, (total, n) in sorted(self._positions.items()))

    def worst(self) -> tuple[WorstLine, ...]:
        """Return the lines of largest mean KLD, worst first."""
        return tuple(line for _, _, line in sorted(self._worst, reverse=True))

    def _accuracy(self, task: str | None) -> tuple[Figure, Figure]:
        """Return accuracy and its change, of a task or of all lines."""
        of = "" if task is None else f":{task}"
        gained, lost, lines = (self._column(f"{name}{of}") for name in ("gained", "lost", "lines"))
        accuracy = self._interval("share", f"score{of}", f"lines{of}")
        if self._one_of_several(int((lines > 0).sum())):
            return accuracy, Figure(float((gained.sum() - lost.sum()) / lines.sum()))
        return accuracy, Figure.of(intervals.difference_of_shares(gained, lost, lines))

    def _interval(self, how: str, over: str, of: str) -> Figure:
        counts = self._column(of)
        counted = counts > 0  # an image that has none of what is averaged is no part of this sample
        sums, counts = self._column(over)[counted], counts[counted]
        if self._one_of_several(len(counts)):
            return Figure(_POINTS[how](float(sums.sum()), float(counts.sum())))
        return Figure.of(_INTERVALS[how](sums, counts))

    def _one_of_several(self, images: int) -> bool:
        """Return whether only one of the suite's images has what is averaged: a figure, but no telling how sure."""
        return images == 1 < self.images

    def _column(self, name: str) -> np.ndarray:
        return np.array([sums.get(name, 0.0) for sums in self._sums.values()])


def _joined(groups: dict[tuple[bool, int], list[np.ndarray]]) -> np.ndarray:
    return np.concatenate([k for group in groups.values() for k in group])


def _part_alike(line: LineMetrics) -> float:
    """Return the share of the longer free answer that comes before the first difference."""
    at = line.diverges_at
    return 1.0 if at is None else at / max(len(line.reply), len(line.reference_reply))


def _worst(tokenized: TokenizedLine, line: LineMetrics) -> WorstLine:
    return WorstLine(
        number=line.number,
        task=tokenized.line.task,
        image=tokenized.line.image,
        prompt=tokenized.line.prompt,
        answer=tokenized.line.answer,
        reference_reply=line.reference_text,
        reply=line.text,
        kld_mean=sum(line.answer_kld) / len(line.answer_kld),
        kld_max=max(line.answer_kld),
        diverges_at=line.diverges_at,
    )
