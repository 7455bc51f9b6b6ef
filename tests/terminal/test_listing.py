"""Tables that break no number and no word, at any width that has room for one."""

import io

import pytest
from rich.console import Console

from cobra_edge.terminal.listing import Listing, Row

LISTING = Listing(
    "figures of two runs",
    ("measure", "value", "95 % interval", "why"),
    [
        Row(("kld_mean", "0.0123", "0.0111 – 0.0135", "")),
        Row(
            (
                "accuracy_change.gqa-testdev-balanced",
                "-12.34%",
                "-15.00% – -10.00%",
                "too few images to judge it by its interval",
            )
        ),
        Row(("色と形", "1", "", "x"), "red"),
    ],
    numbers=(1,),
)


def printed(listing: Listing, width: int) -> list[str]:
    stream = io.StringIO()
    Console(file=stream, width=width).print(listing)
    return stream.getvalue().splitlines()


@pytest.mark.parametrize("width", [40, 60, 80, 100, 200])
def test_every_word_is_whole_and_no_line_is_too_long(width):
    lines = printed(LISTING, width)
    words = {word for row in LISTING.rows for text in row.cells for word in text.split()}
    assert words <= {word for line in lines for word in line.split()}
    assert max(map(len, lines)) <= width


def test_a_wide_terminal_has_a_row_on_each_line():
    assert printed(LISTING, 140) == [
        "figures of two runs",
        "measure                                 value  95 % interval      why",
        "kld_mean                               0.0123  0.0111 – 0.0135",
        "accuracy_change.gqa-testdev-balanced  -12.34%  -15.00% – -10.00%  too few images to judge it by its interval",
        "色と形                                      1                     x",
    ]


def test_what_does_not_fit_goes_above_and_below():
    assert printed(LISTING, 80)[3:6] == [
        "accuracy_change.gqa-testdev-balanced",
        "                      -12.34%  -15.00% – -10.00%  too few images to judge it by",
        "                                                  its interval",
    ]
    assert printed(LISTING, 50)[1:5] == [
        "measure                   value  95 % interval",
        "kld_mean                 0.0123  0.0111 – 0.0135",
        "accuracy_change.gqa-testdev-balanced",
        "                        -12.34%  -15.00% – -10.00%",
    ]
    assert "    why too few images to judge it by its interval" in printed(LISTING, 50)


def test_text_is_shown_and_never_interpreted():
    hostile = Listing("[red]t[/red]", ("", ""), [Row(("[bold]a[/bold]", "b\x1b[31m\nc"))])
    assert printed(hostile, 80) == ["[red]t[/red]", "[bold]a[/bold]  b\ufffd[31m c"]
