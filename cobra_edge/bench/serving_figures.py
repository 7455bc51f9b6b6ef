"""Tables of the server (docs/results/server.md), from the results of `cobra-edge bench serve`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from .spread import Spread

NOT_MEASURED = "not measured"
_NO_VALUE = "–"
# How many times sooner a second question about an image should be answered than the first one.
TIMES_FASTER = {"cobra-mini": 10.0, "cobra-3b": 20.0}

# What is asked about, by the part of a result.
_WHAT = {"prefix_reuse": "a small image (112 × 112)", "prefix_reuse_photo": "a photograph (1280 × 720, JPEG)"}

Result = dict[str, Any]


def serving_table(found: Sequence[Result]) -> str:
    """Return what was measured of the server as Markdown, a column for each model."""
    if not found:
        return NOT_MEASURED
    m = found[0]["machine"]
    lines = [
        f"{m['processor']}, {m['cores']} cores, which server and clients share; median (low–high) of rounds, of clients "
        f"median / 95th percentile; commit {m['commit']}.",
        "",
        _line(["", *(_name(result) for result in found)]),
        "|---" * (len(found) + 1) + "|",
    ]
    columns = [measures(result) for result in found]
    names = dict.fromkeys(name for column in columns for name in column)
    lines += [_line([name, *(column.get(name, _NO_VALUE) for column in columns)]) for name in names]
    return "\n".join(lines)


def serving_goals_table(found: Sequence[Result]) -> str:
    """Return the server's goals beside what was measured."""
    lines = [_line(["model", "measure", "goal", "measured"]), "|---|---|---|---|"]
    by_model = {result["model"]: result for result in found}
    for model, least in TIMES_FASTER.items():
        goal = f"at least {least:g} times sooner than the first"
        for part, what in _WHAT.items():
            told = _times(by_model.get(model, {}).get(part), least)
            lines.append(_line([model, f"first token of a second question about {what}", goal, told]))
    return "\n".join(lines)


def measures(result: Result) -> dict[str, str]:
    """Return what a result says, in the order of a table: a value by the name of its measure."""
    return dict(_measures(result))


def _measures(result: Result) -> Iterator[tuple[str, str]]:
    for what, prefix_reuse in _prefix_reuses(result):
        timed = prefix_reuse["client"]
        yield f"first question about {what}, to its first token, ms", _spread(timed["first_ms"])
        yield f"second question about {what}, ms", _spread(timed["second_ms"])
        yield f"times sooner, {what}", _spread(timed["speedup"])
        yield f"times sooner by the server's own clock, {what}", _spread(prefix_reuse["server"]["speedup"])
    if "prefix_reuse" in result:
        yield "a request that asks nothing, a part of each, ms", _spread(result["prefix_reuse"]["http_ms"])
    if load := result.get("load"):
        what = f"{load['clients']} clients, {load['seconds']:.0f} s"
        yield f"{what}: answers a second", f"{load['requests_per_s']:.1f}"
        yield f"{what}: tokens a second", f"{load['tokens_per_s']:.0f}"
        yield f"{what}: to the first token, ms", _tail(load["ttft_ms"])
        yield f"{what}: to the whole answer, ms", _tail(load["latency_ms"])
        counts = ", ".join(f"{count:,} × {status}" for status, count in load["statuses"].items())
        yield f"{what}: statuses, {load['waiting']} may wait", counts
    if memory := result.get("memory"):
        slope = memory["slope_mib_per_1000"]["rss"]
        yield "resident memory when ready, MiB", f"{memory['before_mib']:.0f}"
        yield f"after {memory['warm_up']} requests, MiB", f"{memory['samples'][0]['rss_mib']:.1f}"
        yield f"grown by, in {memory['requests']:,} more, MiB", f"{memory['growth_mib']:+.1f}"
        text = f"{slope['value']:+.2f} ± {slope['standard_error']:.2f}"
        yield "slope of a line through every hundredth, MiB per 1,000 requests", text
    if ended := result.get("shutdown"):
        what = f"SIGTERM under {ended['clients']} clients"
        yield f"{what}: seconds to the end", _spread(ended["seconds"], ".2f")
        counts = ", ".join(f"{count:,} × {status}" for status, count in ended["statuses"].items())
        yield f"{what}: statuses of all requests", counts
        yield f"{what}: requests under way / cut", f"{ended['under_way']} / {ended['cut']}"


def _name(result: Result) -> str:
    weights = ", random weights" if result["weights"] == "random" else ""
    return f"{result['model']}{weights}, {result['scheme']}"


def _prefix_reuses(result: Result) -> list[tuple[str, Result]]:
    return [(what, result[part]) for part, what in _WHAT.items() if part in result]


def _times(prefix_reuse: Result | None, least: float) -> str:
    """Say how many times sooner by the client's clock, which is judged, and by the server's."""
    if prefix_reuse is None:
        return NOT_MEASURED
    times, own = (prefix_reuse[clock]["speedup"]["median"] for clock in ("client", "server"))
    return f"{times:.1f}, {'reached' if times >= least else '**missed**'} ({own:.1f} by the server's own clock)"


def _spread(value: Spread, form: str = ".1f") -> str:
    return f"{value['median']:{form}} ({value['low']:{form}}–{value['high']:{form}})"


def _tail(value: dict[str, float]) -> str:
    return f"{value['median']:.0f} / {value['p95']:.0f}"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
