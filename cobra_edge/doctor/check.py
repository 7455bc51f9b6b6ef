"""The result of a check."""

from __future__ import annotations

from typing import Literal

import msgspec

Verdict = Literal["ok", "warning", "missing"]


class Check(msgspec.Struct, frozen=True, kw_only=True):
    """One line of the report. What was found is in the fields of the check's own type, None where it is not known.

    Attributes:
        verdict: "ok"; "warning" for what works worse than it could; "missing" for what this machine cannot use.
        text: what there is; or why not, and what to do.
    """

    verdict: Verdict = "ok"
    text: str
