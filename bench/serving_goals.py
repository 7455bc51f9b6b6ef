"""The goals of the server."""

from __future__ import annotations

from collections.abc import Sequence

from cobra_edge.bench.serving_result import IMAGES, ServedPrefixReuse, ServeResult
from cobra_edge.bench.tables import NOT_MEASURED, Table, judged

# Speedup of a second question about an image over the first one.
SPEEDUP = {"cobra-mini": 10.0, "cobra-3b": 20.0}


def serving_goals_table(results: Sequence[ServeResult]) -> Table:
    """Return goals and measurements; the client's clock is judged."""
    by_model = {result.model: result for result in results}
    rows = []
    for model, least in SPEEDUP.items():
        for part, kind in IMAGES.items():
            reuse: ServedPrefixReuse | None = getattr(by_model.get(model), part, None)
            measure = f"time to first token, second question about {kind}"
            rows.append([model, measure, f"at least {least:g} times shorter than for the first question", _cell(reuse, least)])
    return Table(["model", "measure", "goal", "speedup"], rows)


def _cell(reuse: ServedPrefixReuse | None, least: float) -> str:
    if reuse is None:
        return NOT_MEASURED
    times = reuse.client.speedup.median
    return f"{judged(times, times >= least, '.1f')} ({reuse.server.speedup.median:.1f} by the server's own clock)"
