"""Matplotlib figures as inline SVG: colours and fonts of the page, no dates, no random ids, no scripts.

Figures are drawn in marker colours, which are then replaced by the page's variables, so that one figure serves light and dark
themes. Text stays text, and names from outside are never parsed as formulas.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from html import escape
from typing import TYPE_CHECKING, Any, Literal

from ...terminal.output import plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, GRID, MAIN, SECOND = "#010203", "#010204", "#010205", "#010206"
_PAGE_COLOURS = {INK: "currentColor", GRID: "var(--line)", MAIN: "var(--accent)", SECOND: "var(--second)"}
_STYLE = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
}
_PAGE_STYLE = _STYLE | {
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": GRID,
}


@contextmanager
def style(in_page: bool = True) -> Iterator[None]:
    """Set the style for drawing and saving, independent of matplotlibrc; the viewer finds glyphs that the font lacks."""
    import matplotlib

    wanted: Any = _PAGE_STYLE if in_page else _STYLE
    with matplotlib.rc_context(), warnings.catch_warnings():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(wanted)
        warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)
        warnings.filterwarnings("ignore", message="Matplotlib currently does not support", category=UserWarning)
        yield


def axes_of(width: float, height: float) -> tuple[Figure, Axes]:
    """Return an empty figure and its axes, without the global state of pyplot; sizes in inches."""
    from matplotlib.figure import Figure

    figure = Figure((width, height), layout="constrained")
    return figure, figure.subplots()


def logarithmic(axes: Axes, name: Literal["x", "y"] = "y", ends: tuple[float, float] | None = None) -> None:
    """Make an axis logarithmic, with plain tick labels: formulas such as matplotlib's powers of ten are not drawn."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set(**{f"{name}scale": "log"})
    if ends is not None:
        axes.set(**{f"{name}lim": ends})
    axis = axes.yaxis if name == "y" else axes.xaxis
    low, high = axis.get_view_interval()
    few = (1.0, 2.0, 5.0) if high < 300 * low else (1.0,)
    axis.set_major_locator(LogLocator(subs=few, numticks=9))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def inline_svg(figure: Figure, name: str, title: str) -> str:
    """Return a figure as an SVG element for a page.

    Args:
        figure: drawn inside `style`.
        name: unique in the page; salts the ids inside.
        title: for screen readers.
    """
    import matplotlib

    stream = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = stream.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<defs>\s*<style[^>]*>.*?</style>\s*</defs>", "", svg, count=1, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.DOTALL)
    box = re.search(r'viewBox="[^"]*"', svg)
    assert box is not None
    opening = f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" {box[0]}'
    opening += f' role="img" aria-label="{escape(plain(title))}">'
    svg = opening + svg[svg.index(">") + 1 :]
    for marker, colour in _PAGE_COLOURS.items():
        svg = svg.replace(marker, colour)
    return re.sub(r"'DejaVu Sans'[^;\"]*", "inherit-font", svg).replace("inherit-font", "system-ui, sans-serif").strip()


def save(figure: Figure, file: Any, kind: str) -> None:
    """Write a figure to a file of its own, with the same bytes for the same figure. Raises OSError as the file system does."""
    import matplotlib

    metadata: dict[str, Any] = {"Date": None, "Creator": None} if kind == "svg" else {"Software": None}
    with matplotlib.rc_context({"svg.hashsalt": "cobra_edge"}):
        figure.savefig(file, format=kind, dpi=120, metadata=metadata)
