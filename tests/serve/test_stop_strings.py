"""Stop strings: a text in pieces is cut where the whole text would have been."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cobra_edge.errors import InputError
from cobra_edge.serve.stop_strings import StopStrings

FEW = st.text("abé\n", max_size=24)  # few letters, so that strings overlap themselves and each other


def cut(text, stops):
    """Return a whole text's part before the stop string that begins first, and whether there is one."""
    begins = [at for at in range(len(text)) if any(text[at:].startswith(stop) for stop in stops)]
    return (text[: begins[0]], True) if begins else (text, False)


@st.composite
def pieces(draw):
    """Return a text as pieces, some of them empty."""
    text = draw(FEW)
    at = sorted(draw(st.lists(st.integers(0, len(text)), max_size=8)))
    return [text[i:j] for i, j in zip([0, *at], [*at, len(text)], strict=True)]


@given(pieces(), st.lists(st.text("abé\n", min_size=1, max_size=6), max_size=4))
@example(["a", "a", "ab", "c"], ["aab"])
@example(["xab", "c"], ["bc", "abcd"])
@example(["xab", "cd"], ["bc", "abcd"])
def test_a_text_in_pieces_is_cut_where_the_whole_one_is(given_pieces, stops):
    text, came, shown, cutter = "".join(given_pieces), "", "", StopStrings(stops)
    expected, found = cut(text, stops)
    for piece in given_pieces:
        came += piece
        shown += cutter.feed(piece)
        assert expected.startswith(shown)  # nothing that a later piece makes a part of a stop string
        if not cutter.found:  # what is held back has a reason
            held = came.removeprefix(shown)
            assert not held or any(stop.startswith(held) and stop != held for stop in stops)
    assert (shown + cutter.rest(), cutter.found) == (expected, found)
    assert (cutter.feed("more"), cutter.rest()) == ("", "") or not found


def test_text_goes_on_at_once_where_nothing_begins():
    cutter = StopStrings(["User:"])
    assert [cutter.feed(piece) for piece in ("Hello ", "Us", "er", "s.", " U", "ser:", " hi")] == [
        "Hello ",
        "",
        "",
        "Users.",
        " ",
        "",
        "",
    ]
    assert cutter.found and cutter.rest() == ""


def test_a_beginning_that_stays_one_is_shown_at_the_end():
    cutter = StopStrings(["###"])
    assert (cutter.feed("a ##"), cutter.rest(), cutter.found) == ("a ", "##", False)


def test_a_stop_string_within_the_open_beginning_of_a_longer_one_counts_at_the_end():
    cutter = StopStrings(["abcd", "bc"])
    assert (cutter.feed("xabc"), cutter.found) == ("x", False)
    assert (cutter.rest(), cutter.found) == ("a", True)


def test_without_stop_strings_everything_is_shown():
    cutter = StopStrings([])
    assert (cutter.feed("all of "), cutter.feed("it"), cutter.rest(), cutter.found) == ("all of ", "it", "", False)


def test_an_empty_stop_string_is_refused():
    with pytest.raises(InputError, match="stop string is empty"):
        StopStrings(["end", ""])
