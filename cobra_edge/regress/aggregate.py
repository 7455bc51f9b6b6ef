"""Line metrics as columns, and the figures made from them by grouping: by image, task, layer and position.

Memory per line: 8 bytes for each of about twenty columns and for each layer; per token of question and answer 24 bytes. Texts
are kept only of the worst lines, and for tasks whose metric has a summary.
"""

from __future__ import annotations

import heapq
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from ..errors import InputError
from ..suite.line import Line
from ..suite.scoring import METRICS
from ..suite.tokenized import TokenizedLine
from . import intervals
from .columns import Columns, grouped, sums
from .intervals import Interval
from .line_metrics import LineMetrics
from .report import Figure, LayerFigures, PositionFigures, TaskFigures, TooFew, WorstLine

WORST = 12
_MIN_SQUARED_NORM = 1e-30  # of a state, so that one of zeros can be divided by
_KLD_QUANTILES = {"kld_median": 0.5, "kld_p90": 0.9, "kld_p99": 0.99}
_PROMPT_QUANTILES = {"prompt_kld_p99": 0.99}

# {measure: (kind, column that is summed, column that the sum is divided by)}
_RATIOS = {
    "kld_mean": ("mean", "kld", "tokens"),
    "prompt_kld_mean": ("mean", "prompt_kld", "prompt_tokens"),
    "top1_agreement": ("share", "agrees", "tokens"),
    "right_change_mean": ("mean change", "right_change", "tokens"),
    "right_change_rms": ("rms change", "right_change_squared", "tokens"),
    "perplexity": ("exp", "nll", "tokens"),
    "perplexity_ratio": ("exp change", "nll_change", "tokens"),
    "vision_error": ("root", "vision_distance", "vision_length"),
    "greedy_match": ("share", "match", "lines"),
    "greedy_prefix": ("share", "prefix", "lines"),
    "length_ratio": ("ratio", "reply_tokens", "reference_reply_tokens"),
}


def _exp(x: float) -> float:
    return math.exp(min(x, 700.0))  # beyond it overflows; every budget is exceeded long before


# {kind: (value from the two sums, interval from the sums of each image)}
_KINDS: dict[str, tuple[Callable[[float, float], float], Callable[[np.ndarray, np.ndarray], Interval]]] = {
    "mean": (lambda a, n: a / n, intervals.mean),
    "mean change": (lambda a, n: a / n, lambda a, n: intervals.mean(a, n, positive=False).within(-1, 1)),  # of probabilities
    "share": (lambda a, n: a / n, intervals.share),
    "ratio": (lambda a, b: a / b, intervals.ratio_of_means),
    "root": (lambda a, n: math.sqrt(a / n), intervals.root_ratio),
    "rms change": (lambda a, n: math.sqrt(a / n), lambda a, n: intervals.root_ratio(a, n).within(0, 1)),
    "exp": (lambda a, n: _exp(a / n), lambda a, n: intervals.mean(a, n).map(_exp)),
    "exp change": (lambda a, n: _exp(a / n), lambda a, n: intervals.mean(a, n, positive=False).map(_exp)),
}
# Images from which an interval is worth giving, by kind: see docs/regress-intervals.md. No number was enough for "ratio".
IMAGES_NEEDED = {
    "mean": 8, "mean change": 8, "share": 8, "share change": 8, "root": 8, "rms change": 16, "exp": 8, "exp change": 8,
    "quantile": 16, "ratio": 130,
}  # fmt: skip


def kind_of(measure: str) -> str:
    """Return how a measure is computed, one of IMAGES_NEEDED."""
    name = measure.partition(".")[0]
    if name in _RATIOS:
        return _RATIOS[name][0]
    kinds = {"state_error": "root", "accuracy": "share", "accuracy_change": "share change"}
    return kinds.get(name, "quantile")


class Aggregate:
    """Metrics of all lines added so far."""

    def __init__(self, needed: Mapping[str, int] = IMAGES_NEEDED) -> None:
        """Begin with no lines; `needed` is how many images an interval of each kind needs, two or more."""
        self._needed = needed
        self._lines, self._tokens = Columns(0), Columns(1)  # second keys: index of the task; position
        self._names: list[str] = []  # of the lines' columns
        self._images: dict[tuple[bool, int], int] = {}
        self._metrics: dict[str, str] = {}  # by task
        self._replies: defaultdict[str, list[tuple[Line, str, str]]] = defaultdict(list)
        self._worst: list[tuple[float, int, WorstLine]] = []

    @property
    def images(self) -> int:
        """Number of images; a line without one counts as one."""
        return len(self._images)

    def total(self, column: str) -> int:
        """Return the sum of a column of counts: "lines", "tokens" (of answers) or "prompt_tokens"."""
        return int(self._column(column).sum())

    def by_line(self, column: str) -> np.ndarray:
        """Return a column, (lines,) float64, in the order in which lines were added."""
        return self._column(column)

    def image_of_lines(self) -> np.ndarray:
        """Return the index of each line's image, (lines,) int64; a line without an image is one of its own."""
        return self._lines.images

    def largest(self, column: str) -> float:
        """Return the maximum of a column: "tail" or "prompt_tail" (probability not kept), "kept" (number of tokens kept)."""
        return float(self._column(column).max())

    def resampled(self, images: Sequence[int]) -> Aggregate:
        """Return the aggregate of a suite of these images, given by index; an image may come several times."""
        found = Aggregate(self._needed)
        found._lines, found._tokens = self._lines.resampled(images), self._tokens.resampled(images)
        found._names, found._metrics = self._names, self._metrics
        found._images = {(False, number): number for number in range(len(images))}
        return found

    def add(self, tokenized: TokenizedLine, metrics: LineMetrics) -> None:
        """Add a line."""
        line, key = tokenized.line, (True, metrics.number) if metrics.image is None else (False, metrics.image)
        columns = _columns(metrics, with_vision=key not in self._images)
        if not self._names:
            self._names, self._lines = list(columns), Columns(len(columns))
        image, self._metrics[line.task] = self._images.setdefault(key, len(self._images)), line.metric
        self._lines.add(image, [list(self._metrics).index(line.task)], columns.values())
        positions = range(-len(metrics.prompt_kld), len(metrics.answer_kld))
        self._tokens.add(image, positions, [*metrics.prompt_kld, *metrics.answer_kld])
        if METRICS[line.metric].summary is not None:
            self._replies[line.task].append((line, metrics.text, metrics.reference_text))
        worst = _worst(line, metrics)
        heapq.heappush(self._worst, (worst.kld_mean, -worst.number, worst))
        if len(self._worst) > WORST:
            heapq.heappop(self._worst)

    def values(self) -> dict[str, float]:
        """Return every measure that has a value, without intervals."""
        return {name: figure.value for name, figure in self._measures(interval=False).items() if figure.value is not None}

    def figures(self) -> dict[str, Figure]:
        """Return every measure that has a value, with its interval. Raises InputError for fewer than two images."""
        if self.images < 2:
            raise InputError(f"an interval needs two or more images, got {self.images}; use a larger suite")
        return self._measures(interval=True)

    def _measures(self, interval: bool) -> dict[str, Figure]:
        found = {name: self._ratio(*of, interval=interval) for name, of in _RATIOS.items() if self._column(of[2]).any()}
        found |= self._quantiles(_KLD_QUANTILES, self._tokens.keys >= 0, interval)
        found |= self._quantiles(_PROMPT_QUANTILES, self._tokens.keys < 0, interval)
        largest = float(self._tokens.values[self._tokens.keys >= 0].max())
        found["kld_max"] = Figure(largest, largest, largest)  # of these lines; no resampled suite can exceed it
        for task in (None, *self._metrics):
            if not self._by_image("lines", task).any():
                continue  # a resampled suite may lack a task
            dot = "" if task is None else f".{task}"
            found[f"accuracy{dot}"] = self._ratio("share", "score", "lines", task, interval)
            found[f"accuracy_change{dot}"] = self._accuracy_change(task, interval)
        layers = {name: self._ratio("root", name, "lines", interval=interval) for name in self._states()}
        return found | {"state_error": max(layers.values(), key=lambda figure: figure.value or 0.0)} | layers

    def layers(self) -> tuple[LayerFigures, ...]:
        """Return the state error of each layer."""
        return tuple(LayerFigures(i, self._ratio("root", name, "lines")) for i, name in enumerate(self._states()))

    def tasks(self) -> tuple[TaskFigures, ...]:
        """Return the figures of each task, by name."""
        return tuple(self._task(task, metric) for task, metric in sorted(self._metrics.items()))

    def _task(self, task: str, metric: str) -> TaskFigures:
        n, score, gained, lost = (self._by_image(name, task).sum() for name in ("lines", "score", "gained", "lost"))
        replies, summary = self._replies[task], METRICS[metric].summary
        return TaskFigures(
            task=task,
            metric=metric,
            lines=int(n),
            score=self._ratio("share", "score", "lines", task),
            reference=float((score - gained + lost) / n),
            change=self._accuracy_change(task),
            kld_mean=self._ratio("mean", "kld", "tokens", task),
            greedy_match=self._ratio("share", "match", "lines", task),
            summary={} if summary is None else summary([(line, text) for line, text, _ in replies]),
            reference_summary={} if summary is None else summary([(line, text) for line, _, text in replies]),
        )

    def positions(self) -> tuple[PositionFigures, ...]:
        """Return the mean KLD at each position; the answer's first token is at 0."""
        first = int(self._tokens.keys.min())
        places = self._tokens.keys - first
        counts = np.bincount(places)
        totals = sums(self._tokens.values[:, 0], places, len(counts))
        return tuple(PositionFigures(int(i) + first, int(counts[i]), float(totals[i] / counts[i])) for i in counts.nonzero()[0])

    def worst(self) -> tuple[WorstLine, ...]:
        """Return the lines of largest mean KLD, worst first."""
        return tuple(line for _, _, line in sorted(self._worst, reverse=True))

    def _ratio(self, kind: str, over: str, of: str, task: str | None = None, interval: bool = True) -> Figure:
        numerators, denominators = self._by_image(over, task), self._by_image(of, task)
        value_of, interval_of = _KINDS[kind]
        counted = denominators > 0  # an image without anything to average over is no part of this sample
        numerators, denominators = numerators[counted], denominators[counted]
        too_few = self._too_few(kind, len(denominators)) if interval else None
        if too_few or not interval:
            return Figure(value_of(float(numerators.sum()), float(denominators.sum())), too_few=too_few)
        return Figure.of(interval_of(numerators, denominators))

    def _accuracy_change(self, task: str | None, interval: bool = True) -> Figure:
        gained, lost, lines = (self._by_image(name, task) for name in ("gained", "lost", "lines"))
        too_few = self._too_few("share change", int((lines > 0).sum())) if interval else None
        if too_few or not interval:
            return Figure(float((gained.sum() - lost.sum()) / lines.sum()), too_few=too_few)
        return Figure.of(intervals.difference_of_shares(gained, lost, lines))

    def _quantiles(self, quantiles: dict[str, float], rows: np.ndarray, interval: bool) -> dict[str, Figure]:
        """Return quantiles of the KLD over some tokens, by measure; none without a token. `rows`: (tokens,) bool."""
        if not rows.any():
            return {}
        klds = self._tokens.values[rows, 0]
        groups = [group for group in grouped(klds, self._tokens.images[rows]) if len(group)]
        too_few = self._too_few("quantile", len(groups)) if interval else None
        if too_few or not interval:
            return {name: Figure(float(np.quantile(klds, q)), too_few=too_few) for name, q in quantiles.items()}
        found = intervals.quantiles(groups, list(quantiles.values()))
        return {name: Figure.of(ends) for name, ends in zip(quantiles, found, strict=True)}

    def _too_few(self, kind: str, images: int) -> TooFew | None:
        """Return why there is no interval of this kind, if so few images have what is averaged."""
        return TooFew(images, self._needed[kind]) if images < self._needed[kind] else None

    def _states(self) -> list[str]:
        return [name for name in self._names if name.startswith("state_error.")]

    def _by_image(self, column: str, task: str | None) -> np.ndarray:
        """Return a column's sum over the lines of each image, (images,) float64: all lines, or those of a task."""
        rows = slice(None) if task is None else self._lines.keys == list(self._metrics).index(task)
        return sums(self._column(column)[rows], self._lines.images[rows], self.images)

    def _column(self, name: str) -> np.ndarray:
        return self._lines.values[:, self._names.index(name)]


def _columns(metrics: LineMetrics, with_vision: bool) -> dict[str, float]:
    """Return a line's columns by name; only one line of an image has the error of its embeddings."""
    right, reference = np.array(metrics.right), np.array(metrics.right_reference)
    change, at = np.exp(right) - np.exp(reference), metrics.diverges_at
    vision = metrics.vision if with_vision and metrics.vision is not None else (0.0, 0.0)
    return {
        "lines": 1.0,
        "kld": sum(metrics.answer_kld),
        "tokens": len(metrics.answer_kld),
        "prompt_kld": sum(metrics.prompt_kld),
        "prompt_tokens": len(metrics.prompt_kld),
        "agrees": sum(metrics.agrees),
        "right_change": change.sum(),
        "right_change_squared": np.square(change).sum(),
        "nll": -right.sum(),
        "nll_change": (reference - right).sum(),
        "vision_distance": vision[0],
        "vision_length": vision[1],
        "match": at is None,
        "prefix": 1.0 if at is None else at / max(len(metrics.reply), len(metrics.reference_reply)),
        # With the end token, so that two empty replies have the ratio 1.
        "reply_tokens": len(metrics.reply) + 1,
        "reference_reply_tokens": len(metrics.reference_reply) + 1,
        "score": metrics.score,
        "gained": max(metrics.score - metrics.reference_score, 0),
        "lost": max(metrics.reference_score - metrics.score, 0),
        "tail": metrics.tail,
        "prompt_tail": metrics.prompt_tail,
        "kept": metrics.kept,
        # Relative to the line's own state: in a ratio of sums one state of large norm would dominate.
        **{f"state_error.{i}": error / max(norm, _MIN_SQUARED_NORM) for i, (error, norm) in enumerate(metrics.states)},
    }


def _worst(line: Line, metrics: LineMetrics) -> WorstLine:
    return WorstLine(
        number=metrics.number,
        task=line.task,
        image=line.image,
        prompt=line.prompt,
        answer=line.answer,
        reference_reply=metrics.reference_text,
        reply=metrics.text,
        kld_mean=sum(metrics.answer_kld) / len(metrics.answer_kld),
        kld_max=max(metrics.answer_kld),
        diverges_at=metrics.diverges_at,
    )
