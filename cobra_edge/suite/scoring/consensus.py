"""Replies compared with the answers of several annotators.

A reply scores min(k / 3, 1) if k annotators gave it, averaged over leaving out one annotator at a time.
Source: Antol et al., "VQA: Visual Question Answering", ICCV 2015, and the scripts that each metric names.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .answer_text import VIZWIZ_CONTRACTIONS, text_vqa_answer, vqa_reply, without_punctuation
from .metric import Metric, accepted

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..line import Line

_AGREEING = 3
_FEWEST_ANSWERS = _AGREEING + 1  # with fewer, even a unanimous answer scores less than 1


def _share(reply: str, answers: Sequence[str]) -> float:
    same, n = answers.count(reply), len(answers)
    left_one_of_them, left_another = min((same - 1) / _AGREEING, 1.0), min(same / _AGREEING, 1.0)
    return (same * left_one_of_them + (n - same) * left_another) / n


def _vqa(reply: str, line: Line) -> float:
    """Remove punctuation from answers, and only if annotators differ."""
    answers = accepted(line)
    if len(set(answers)) > 1:
        answers = tuple(without_punctuation(answer) for answer in answers)
    return _share(vqa_reply(reply), answers)


def _vizwiz(reply: str, line: Line) -> float:
    """Compare with the answers unchanged."""
    return _share(vqa_reply(reply, VIZWIZ_CONTRACTIONS), accepted(line))


def _text_vqa(reply: str, line: Line) -> float:
    return _share(text_vqa_answer(reply), [text_vqa_answer(answer) for answer in accepted(line)])


def _needs_annotators(line: Line) -> str | None:
    if len(line.answers) >= _FEWEST_ANSWERS:
        return None
    return f"{len(line.answers)} answers; metric {line.metric} takes {_FEWEST_ANSWERS} or more, those of all annotators"


VQA = Metric("vqa", _vqa, None, "vqaEval.py of github.com/GT-Vision-Lab/VQA (Goyal et al., CVPR 2017)", _needs_annotators)
VIZWIZ = Metric(
    "vizwiz", _vizwiz, None, "the evaluation script of vizwiz.org's VQA task (Gurari et al., CVPR 2018)", _needs_annotators
)
TEXT_VQA = Metric(
    "textvqa",
    _text_vqa,
    None,
    "TextVQAAccuracyEvaluator of github.com/facebookresearch/mmf (Singh et al., CVPR 2019)",
    _needs_annotators,
)
