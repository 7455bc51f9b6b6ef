"""Metrics that score replies: the published rules of benchmarks, with differences documented."""

from __future__ import annotations

from .boxes import BOX_IOU
from .consensus import TEXT_VQA, VIZWIZ, VQA
from .exact import EXACT, GQA
from .metric import Metric
from .two_answers import VSR, YES_NO

METRICS: dict[str, Metric] = {m.name: m for m in (EXACT, YES_NO, VSR, VQA, VIZWIZ, TEXT_VQA, GQA, BOX_IOU)}

__all__ = ["METRICS", "Metric"]
