"""Prompts as worded in Cobra's published evaluation.

Source: vlm_eval/models/prismatic.py of github.com/TRI-ML/vlm-evaluation, without the leading line break, which the model's
prompt template strips. The line of OCR words is that of llava_textvqa_val_v051_ocr.jsonl in
github.com/haotian-liu/LLaVA, which that evaluation reads.
"""

from __future__ import annotations

from collections.abc import Sequence

_SHORT = "Answer the question using a single word or phrase."


def short_answer(question: str) -> str:
    """Ask for a word or a phrase."""
    return f"{question}\n{_SHORT}"


def short_answer_if_any(question: str) -> str:
    """Ask for a word or a phrase, or "Unanswerable"."""
    return short_answer(f"{question}\nWhen the provided information is insufficient, respond with 'Unanswerable'.")


def true_or_false(statement: str) -> str:
    """Ask whether a statement is true."""
    return f'Based on the image, is this statement "True" or "False"? {statement}\nRespond with "True" or "False" directly.'


def with_ocr(question: str, words: Sequence[str]) -> str:
    """Add OCR words in the given order; the line is added even if there are none."""
    return f"{question}\nReference OCR token: {', '.join(words)}"


def box_of_expression(expression: str) -> str:
    """Ask for the bounding box of a described region."""
    return f'Please provide the bounding box coordinate of the region this sentence describes: "{expression}"'
