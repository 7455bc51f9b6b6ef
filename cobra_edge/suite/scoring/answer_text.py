"""Normalization of answers of the VQA family: punctuation, number words, articles, contractions.

Source: vqaEval.py of github.com/GT-Vision-Lab/VQA; its copies for TextVQA and VizWiz differ as noted below. Oddities are
those of the scripts; published figures depend on them.
"""

from __future__ import annotations

import re

_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")
_PERIODS_REMOVED = 32  # the script hands re.UNICODE, which is 32, to re.sub where the largest count belongs
_NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBERS = {"none": "0"} | {word: str(number) for number, word in enumerate(_NUMBER_WORDS)}
_ARTICLES = {"a", "an", "the"}
_STEMS = {
    "n't": "ai are ca could did does do had has have is might must need ought sha should was were wo would",
    "n't've": "could had might should would",
    "'ve": "could might must not should they we what where who would you",
    "'d": "he how it someone something there they where who you",
    "'d've": "he it she somebody someone something there they we who y'all you",
    "'ll": "how it somebody someone something they what who why y'all you",
    "'re": "there they what why you",
    "'s": "he how somebody someone that there what when where who why",
    "": "'ow's'at 'twas ma'am o'clock y'all",
}
# VizWiz's script was once saved with curly apostrophes, which meet no annotator's straight ones; these two kinds escaped.
_STRAIGHT_WORDS = {"ain't", "aren't", "can't", "could've", "couldn't", "we've", "where's", "who've"}
_STRAIGHT_SPELLINGS = {"couldn'tve", "hadn'tve"}


def _contractions() -> dict[str, str]:
    """Return the word for each spelling of it that lacks one apostrophe; those with a capital I are never met and left out."""
    words = [stem + ending for ending, stems in _STEMS.items() for stem in stems.split()]
    found = {word[:i] + word[i + 1 :]: word for word in words for i in range(len(word)) if word[i] == "'"}
    return found | {"somebody'd": "somebodyd"}


def _curled(text: str, straight: set[str]) -> str:
    return text if text in straight else text.replace("'", "’")


CONTRACTIONS = _contractions()
VIZWIZ_CONTRACTIONS = {
    _curled(spelling, _STRAIGHT_SPELLINGS): _curled(word, _STRAIGHT_WORDS) for spelling, word in CONTRACTIONS.items()
}


def without_punctuation(text: str) -> str:
    """Remove marks next to a space, or all marks if a number contains a comma; replace the others by a space."""
    number, cleaned = _COMMA_IN_NUMBER.search(text) is not None, text
    for mark in _MARKS:
        beside_space = f"{mark} " in text or f" {mark}" in text
        cleaned = cleaned.replace(mark, "" if number or beside_space else " ")
    return _PERIOD.sub("", cleaned, count=_PERIODS_REMOVED)


def plain_words(text: str, contractions: dict[str, str] = CONTRACTIONS) -> str:
    """Return lower-case text with digits for number words, without articles, and with apostrophes in contractions."""
    words = (_NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(contractions.get(word, word) for word in words if word not in _ARTICLES)


def one_line(text: str) -> str:
    """Return the text stripped and on one line."""
    return text.replace("\n", " ").replace("\t", " ").strip()


def vqa_reply(text: str, contractions: dict[str, str] = CONTRACTIONS) -> str:
    """Normalize a reply as VQA does; VizWiz has other contractions."""
    return plain_words(without_punctuation(one_line(text)), contractions)


def text_vqa_answer(text: str) -> str:
    """Normalize a reply or an answer as TextVQA does: as VQA, with the possessive 's split off.

    Source: EvalAIAnswerProcessor of github.com/facebookresearch/mmf.
    """
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return vqa_reply(text)
