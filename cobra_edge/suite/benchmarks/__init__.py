"""Readers of published benchmarks, from local files to lines of a suite.

Prompts are worded as in Cobra's published evaluation, which is that of Prismatic VLMs (`prompts.py`).
"""

from __future__ import annotations

from .gqa import GQA
from .pope import POPE
from .reader import Reader, Sources
from .refcoco import REFCOCO
from .textvqa import TEXT_VQA
from .vizwiz import VIZWIZ
from .vqa import VQA
from .vsr import VSR

READERS: dict[str, Reader] = {r.name: r for r in (POPE, VSR, VQA, GQA, VIZWIZ, TEXT_VQA, REFCOCO)}

__all__ = ["READERS", "Reader", "Sources"]
