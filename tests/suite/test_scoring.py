"""Metrics against cases worked by hand from the published rules."""

from __future__ import annotations

import pytest

from cobra_edge.suite.line import Line
from cobra_edge.suite.scoring import METRICS
from cobra_edge.suite.scoring.answer_text import (
    CONTRACTIONS,
    VIZWIZ_CONTRACTIONS,
    text_vqa_answer,
    vqa_reply,
    without_punctuation,
)
from cobra_edge.suite.scoring.boxes import box_of, intersection_over_union

TEN = ("red",) * 5 + ("dark red",) * 3 + ("blue", "maroon")


def score(metric: str, reply: str, answer: str, answers: tuple[str, ...] = ()) -> float:
    return METRICS[metric].score(reply, Line("?", answer, "t", None, answers, metric))


def test_the_table_names_its_metrics_and_their_sources():
    assert list(METRICS) == ["exact", "yes-no", "vsr", "vqa", "vizwiz", "textvqa", "gqa", "box-iou"]
    assert all(name == metric.name and len(metric.source) > 20 for name, metric in METRICS.items())
    assert [name for name, metric in METRICS.items() if metric.summary is not None] == ["yes-no"]


@pytest.mark.parametrize(
    ("reply", "expected"), [("Small", 1), ("  Small\n", 1), ("tiny", 1), ("small", 0), ("Small.", 0), ("", 0), ("Sma", 0)]
)
def test_exact(reply, expected):
    assert score("exact", reply, "Small", ("tiny", "little ")) == expected


@pytest.mark.parametrize(
    ("reply", "is_yes"),
    [
        ("yes", True),
        ("No", False),
        ("no, there is none", False),
        ("No.", False),
        ("There is not", False),
        ("There isn't", True),  # no word of the three
        ("Yes. There is no doubt", True),  # only the first sentence counts
        ("I see nothing", True),
        ("NO", True),
        ("No!", True),
        ("No\nYes", True),  # words end at spaces only
        ("n,o", False),  # commas are removed first
        ("", True),
    ],
)
def test_yes_or_no_as_pope_takes_it(reply, is_yes):
    assert score("yes-no", reply, "yes") == is_yes
    assert score("yes-no", reply, "no") == (not is_yes)
    assert score("yes-no", reply, "No") == (not is_yes)


def test_figures_of_yes_and_no():
    replies = [("yes", "yes")] * 4 + [("yes", "no")] * 2 + [("no", "yes")] * 1 + [("no", "no")] * 3
    pairs = [(Line("?", label, "t", metric="yes-no"), reply) for reply, label in replies]
    summary = METRICS["yes-no"].summary
    assert summary is not None
    assert summary(pairs) == pytest.approx(
        {"accuracy": 0.7, "precision": 4 / 6, "recall": 4 / 5, "f1": 2 * (4 / 6) * (4 / 5) / (4 / 6 + 4 / 5), "yes_share": 0.6}
    )


@pytest.mark.parametrize(
    ("replies", "expected"),
    [
        ([], {}),
        ([("no", "no")], {"accuracy": 1, "yes_share": 0}),
        ([("no", "yes")], {"accuracy": 0, "recall": 0, "yes_share": 0}),
        ([("yes", "no")], {"accuracy": 0, "precision": 0, "yes_share": 1}),
    ],
)
def test_figures_that_are_not_defined_are_left_out(replies, expected):
    summary = METRICS["yes-no"].summary
    assert summary is not None
    assert summary([(Line("?", label, "t"), reply) for reply, label in replies]) == expected


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("True", 1),
        ("true.", 1),
        ("It is TRUE", 1),
        ("False", 0),
        ("false, not true", 0),
        ("untrue", 0),
        ("yes", 0),
        ("", 0),
    ],
)
def test_true_or_false(reply, expected):
    assert score("vsr", reply, "True") == expected


def test_neither_word_is_wrong_for_both():
    assert score("vsr", "perhaps", "True") == score("vsr", "perhaps", "False") == 0
    assert score("vsr", "FALSE", "False") == 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Red", "red"),
        ("  a  dog\tand\nthe cat ", "dog and cat"),
        ("an", ""),
        ("Two", "2"),
        ("none", "0"),
        ("ten men", "10 men"),
        ("eleven", "eleven"),
        ("1,000", "1000"),  # a comma in a number: every mark goes
        ("1,000 t-shirts", "1000 tshirts"),
        ("t-shirt", "t shirt"),  # else a mark that no space is beside becomes one
        ("yes,no", "yes no"),
        ("yes, no", "yes no"),
        ("well-known -", "wellknown"),  # one with a space beside it goes wherever else it stands
        ("a/b", "b"),  # "a b", of which the article goes
        ("U.S.A.", "usa"),
        ("3.5", "3.5"),
        ("3.", "3"),
        ("it is 3.5.", "it is 3.5"),
        (".5", ".5"),
        ("dont", "don't"),
        ("couldntve", "couldntve"),  # only spellings that lack one apostrophe are known
        ("couldnt've", "couldn't've"),
        ("couldn'tve", "couldn't've"),
        ("shes", "shes"),
        ("lets", "lets"),
        ("somebody'd", "somebodyd"),
        ("'ow'sat", "'ow's'at"),
        ("yalld've", "yalld've"),
        ("y'alld've", "y'all'd've"),
        ("youll see", "you'll see"),
        ("dog's", "dog's"),
        ("what?!", "what"),
        ("50%", "50%"),
        ("a:b", "a:b"),
        ("." * 40 + "x", "." * 8 + "x"),  # the script removes 32 periods and no more
    ],
)
def test_a_reply_in_the_form_of_vqa(text, expected):
    assert vqa_reply(text) == expected


def test_contractions():
    assert len(CONTRACTIONS) == 114  # the script's 120, less four with a capital I and two that map to themselves
    assert all(spelling.replace("'", "") == word.replace("'", "") for spelling, word in CONTRACTIONS.items())
    assert VIZWIZ_CONTRACTIONS["dont"] == "don’t" and VIZWIZ_CONTRACTIONS["cant"] == "can't"
    assert len(VIZWIZ_CONTRACTIONS) == len(CONTRACTIONS)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Dog's", "dog 's"),  # a possessive stands apart
        ("what's", "what 's"),
        ("1,000", "1000"),
        ("a,b", "ab"),  # commas and question marks go, whatever is beside them
        ("who?me", "whome"),
        ("t-shirt", "t shirt"),
        ("The Two", "2"),
        ("dont", "don't"),
    ],
)
def test_an_answer_in_the_form_of_textvqa(text, expected):
    assert text_vqa_answer(text) == expected


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("red", 1.0),  # 5 others, or 4 where one of them is left out
        ("Red.", 1.0),
        ("dark red", 0.7 * 1 + 0.3 * 2 / 3),
        ("blue", 0.9 * 1 / 3),
        ("the maroon", 0.9 * 1 / 3),
        ("green", 0.0),
        ("", 0.0),
    ],
)
@pytest.mark.parametrize("metric", ["vqa", "vizwiz", "textvqa"])
def test_annotators_left_out_one_at_a_time(metric, reply, expected):
    assert score(metric, reply, "red", TEN) == pytest.approx(expected)


def test_four_of_ten_agree():
    assert score("vqa", "x", "x", ("x",) * 4 + tuple("abcdef")) == 1.0
    assert score("vqa", "x", "x", ("x",) * 3 + tuple("abcdefg")) == pytest.approx(0.9)
    assert score("vqa", "x", "x", ("x",) * 2 + tuple("bcdefghi")) == pytest.approx((2 / 3 * 8 + 1 / 3 * 2) / 10)


def naive_leave_one_out(reply: str, answers: tuple[str, ...]) -> float:
    accuracies = []
    for left_out in range(len(answers)):
        others = [answer for i, answer in enumerate(answers) if i != left_out]
        accuracies.append(min(1.0, sum(answer == reply for answer in others) / 3))
    return sum(accuracies) / len(accuracies)


@pytest.mark.parametrize("n", [4, 5, 9, 10, 11])
def test_any_number_of_annotators(n):
    for same in range(n + 1):
        answers = ("x",) * same + tuple(f"other{i}" for i in range(n - same))
        assert score("vqa", "x", "x", answers) == pytest.approx(naive_leave_one_out("x", answers))


def test_where_the_three_differ():
    hyphens = ("t-shirt",) * 5 + ("shirt",) * 5
    assert score("vqa", "t-shirt", "t-shirt", hyphens) == 1  # answers lose their marks where annotators differ
    assert score("vqa", "t-shirt", "t-shirt", ("t-shirt",) * 10) == 0  # and keep them where they agree: as in the script
    assert score("vizwiz", "t-shirt", "t-shirt", hyphens) == 0  # answers are as they are
    assert score("textvqa", "t-shirt", "t-shirt", ("t-shirt",) * 10) == 1  # reply and answers go the same way
    numbers = ("two",) * 5 + ("three",) * 5
    assert score("vqa", "two", "two", numbers) == 0  # number words of answers are not made digits
    assert score("textvqa", "two", "two", numbers) == 1
    capitals = ("Coca Cola",) * 5 + ("coke",) * 5
    assert score("vqa", "Coca Cola", "Coca Cola", capitals) == score("vizwiz", "Coca Cola", "Coca Cola", capitals) == 0
    assert score("textvqa", "coca cola", "Coca Cola", capitals) == 1
    curly = ("don't",) * 5 + ("do not",) * 5
    assert score("vqa", "dont", "don't", curly) == 1 and score("vizwiz", "dont", "don't", curly) == 0
    assert score("vizwiz", "Unanswerable", "unanswerable", ("unanswerable",) * 6 + ("dog",) * 4) == 1


def test_answers_lose_punctuation_only():
    assert without_punctuation("The Red, one.") == "The Red one"


@pytest.mark.parametrize(
    ("reply", "answer", "expected"),
    [
        ("Yes.", "yes", 1),
        (" on the left!\n", "on the left", 1),
        ("T-shirt", "tshirt", 1),
        ("t-shirt", "t-shirt", 0),  # only the reply is normalised
        ("the left", "left", 0),
        ("yes", "Yes", 0),
    ],
)
def test_gqa(reply, answer, expected):
    assert score("gqa", reply, answer) == expected


@pytest.mark.parametrize(
    ("text", "box"),
    [
        ("[0.1, 0.2, 0.3, 0.4]", (0.1, 0.2, 0.3, 0.4)),
        ("It is at [0,.5,1.,1].", (0, 0.5, 1, 1)),
        ("[ 1e-05 , 0 , 1 , 1 ]", (1e-5, 0, 1, 1)),
        ("[1, 2] then [0.1, 0.2, 0.3, 0.4]", (0.1, 0.2, 0.3, 0.4)),
        ("[0.1, 0.2, 0.3, 1.4]", None),
        ("[0.3, 0.2, 0.1, 0.4]", None),
        ("[0.1, 0.2, 0.1, 0.4]", None),
        ("[-0.1, 0.2, 0.3, 0.4]", None),
        ("[0.1, 0.2, 0.3]", None),
        ("[0.1, 0.2, 0.3, 0.4, 0.5]", None),
        ("[nan, 0, 1, 1]", None),
        ("[0, 0, 1, " + "9" * 400 + "]", None),
        ("0.1, 0.2, 0.3, 0.4", None),
        ("", None),
    ],
)
def test_boxes_in_text(text, box):
    assert box_of(text) == box


def test_intersection_over_union():
    whole, half = (0.0, 0.0, 1.0, 1.0), (0.0, 0.0, 0.5, 1.0)
    assert intersection_over_union(whole, whole) == 1 and intersection_over_union(whole, half) == 0.5
    assert intersection_over_union(half, (0.25, 0.0, 0.75, 1.0)) == pytest.approx(1 / 3)
    assert intersection_over_union(half, (0.5, 0.0, 1.0, 1.0)) == 0
    assert intersection_over_union((0.0, 0.0, 0.2, 0.2), (0.5, 0.5, 1.0, 1.0)) == 0  # apart both ways is no overlap


@pytest.mark.parametrize(
    ("reply", "expected"),
    [("[0, 0, 0.5, 1]", 1), ("[0, 0, 0.49, 1]", 0), ("[0, 0, 1, 1]", 1), ("a cat", 0), ("[0, 0, 500, 400]", 0)],
)
def test_half_of_the_union_is_enough(reply, expected):
    assert score("box-iou", reply, "[0.0, 0.0, 0.0, 0.0]", ("[0.0, 0.0, 1.0, 1.0]",)) == expected


def test_a_long_reply_is_searched_in_no_time():
    assert box_of("[" + "1" * 20_000) is None and box_of("[" * 20_000 + " " * 20_000) is None
