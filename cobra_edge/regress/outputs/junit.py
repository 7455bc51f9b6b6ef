"""A report as JUnit XML for CI systems: one test case per limit of the budget."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...terminal.output import plain
from ..measures import format_value
from ..report import Report, Verdict
from .libraries import require
from .rows import all_figures, describe_verdict, format_limit

if TYPE_CHECKING:
    from junitparser import TestCase


def report_junit(report: Report) -> bytes:
    """Return the content of the file. Measures are properties of the suite; without a budget, the one case is skipped.

    Raises:
        MachineError: junitparser is not installed. InputError: the report has an unknown measure.
    """
    require("junit.xml", "junitparser")
    from junitparser import JUnitXml, Skipped, TestCase, TestSuite

    of = plain(f"{report.suite.name}.{report.build.name}")
    suite = TestSuite(of)
    suite.timestamp = plain(report.times.began)
    for name, value in _properties(report).items():
        suite.add_property(plain(name), plain(value))
    cases = [_case(of, verdict) for verdict in report.verdicts]
    why_not = {f"gate {name}": why for name, why in report.not_judged.items()}
    if not cases and not why_not:
        why_not = {"budget": "no budget" if report.budget is None else f"budget {report.budget} has no limits"}
    for name, why in why_not.items():
        skipped = TestCase(name, of)
        skipped.result = [Skipped(plain(f"not judged: {why}"))]
        cases.append(skipped)
    suite.add_testcases(cases)
    xml = JUnitXml(plain(f"cobra_edge.regress {report.build.name}"))
    xml.add_testsuite(suite)
    xml.update_statistics()  # type: ignore[no-untyped-call]
    suite.time = xml.time = report.times.seconds  # of the whole run, not the sum over cases
    content: bytes = xml.tostring()  # type: ignore[no-untyped-call]
    return content


def _properties(report: Report) -> dict[str, str]:
    build, runtime = report.build, report.runtime
    about = {
        "cobra_edge": report.cobra_edge,
        "commit": report.commit or "",
        "fingerprint": build.fingerprint,
        "scheme": build.scheme,
        "target": build.target,
        "decoder": runtime.decoder,
        "vision": runtime.vision or "",
        "baseline": report.baseline.name,
    }
    return about | {name: format_value(name, figure.value) for name, figure in all_figures(report).items()}


def _case(of: str, verdict: Verdict) -> TestCase:
    from junitparser import Failure, TestCase

    case = TestCase(plain(f"{verdict.measure} {verdict.rule}"), of)
    if not verdict.within or verdict.judged is None:
        failure = Failure(plain(describe_verdict(verdict)), "drift" if verdict.judged is not None else "not judged")
        failure.text = plain(f"{verdict.measure}: {describe_verdict(verdict)}; limit: {format_limit(verdict)}")
        case.result = [failure]
    return case
