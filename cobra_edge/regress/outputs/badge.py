"""A report as a badge: the verdict and the mean KLD in an SVG of 20 pixels height that loads nothing; needs no library."""

from __future__ import annotations

from xml.sax.saxutils import escape

from ..measures import format_value
from ..report import Report

_LABEL = "drift"
_COLORS = {"passed": "#2e7d32", "failed": "#c62828", "not judged": "#616161"}  # white text on them has a contrast above 5
_CHARACTER, _MARGIN = 6.5, 6  # pixels; `textLength` makes text of any font as wide as that


def report_badge(report: Report) -> str:
    """Return the content of badge.svg. Raises InputError if the mean KLD is not a measure of the report's version."""
    word = "not judged" if report.passed and not report.verdicts else "passed" if report.passed else "failed"
    figure = report.measures.get("kld_mean")
    value = "" if figure is None or figure.value is None else f", KLD {format_value('kld_mean', figure.value)}"
    text = escape(word + value)
    left, right = (len(part) * _CHARACTER + 2 * _MARGIN for part in (_LABEL, word + value))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + right:g}" height="20" role="img" '
        f'aria-label="{_LABEL}: {text}"><title>{_LABEL}: {text}</title>'
        f'<clipPath id="round"><rect width="{left + right:g}" height="20" rx="3"/></clipPath><g clip-path="url(#round)">'
        f'<rect width="{left:g}" height="20" fill="#424242"/>'
        f'<rect x="{left:g}" width="{right:g}" height="20" fill="{_COLORS[word]}"/></g>'
        f'<g fill="#fff" font-family="Verdana,DejaVu Sans,sans-serif" font-size="11">{_text(_MARGIN, _LABEL)}'
        f"{_text(left + _MARGIN, word + value)}</g></svg>\n"
    )


def _text(x: float, text: str) -> str:
    return f'<text x="{x:g}" y="14" textLength="{len(text) * _CHARACTER:g}">{escape(text)}</text>'
