"""Quality: every scheme on the held-out suite of cobra-mini, through the runtime that ships."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import Progress

from ..assemble import export_bundle
from ..bundle import Bundle
from ..decode.decoder import ACTIVATIONS, DecoderOptions
from ..regress.accuracy import LineResult, run_suite
from ..regress.metrics import kl_divergence, top1_agreement
from ..regress.suite import HELDOUT, read_suite
from ..scheme import SCHEMES
from ..session import load
from ..tables import bits_per_weight
from ..targets import target_named

REFERENCE = "fp16"  # cobra-mini is float16 as it ships, so this build has its weights bit for bit


def measure_schemes(folder: Path, bar: Progress) -> list[dict[str, Any]]:
    """Export cobra-mini by each scheme into `folder`, run the suite, and return one row a scheme and form of activations.

    The reference comes first; its weights are not quantized, so its activations have one form.
    """
    lines = read_suite(HELDOUT)
    reference: list[LineResult] = []
    rows = []
    for scheme in SCHEMES:
        assert reference or scheme == REFERENCE
        exported = export_bundle("mini", target_named("cpu"), folder / scheme, scheme=scheme)
        bundle = Bundle.open(exported.directory)
        for activations in ACTIVATIONS if scheme != REFERENCE else ("float32",):
            task = bar.add_task(f"held-out suite, {scheme}, {activations} activations", total=len(lines))
            session = load(bundle, options=DecoderOptions(activations=activations))
            found = list(run_suite(session, lines, HELDOUT.parent, lambda task=task: bar.advance(task)))  # type: ignore[misc]
            reference = reference or found
            named = {"scheme": scheme, "activations": activations, "decoder": session.decoder.name}
            rows.append(named | _row(bits_per_weight(bundle.manifest), found, reference))
    return rows


def _row(bits: float, found: list[LineResult], reference: list[LineResult]) -> dict[str, Any]:
    pairs = list(zip(reference, found, strict=True))
    kld = np.concatenate([kl_divergence(a.logits, b.logits) for a, b in pairs])
    agree = np.concatenate([top1_agreement(a.logits, b.logits) for a, b in pairs])
    tasks = sorted({r.line.task for r in found})
    caption = np.concatenate([r.nll for r in found if r.line.task == "caption"])
    return {
        "bits_per_weight": round(bits, 3),
        "lines": len(found),
        "answer_tokens": len(kld),
        "kld_mean": float(kld.mean()),
        "kld_p99": float(np.quantile(kld, 0.99)),
        "top1_agreement": float(agree.mean()),
        "accuracy": {t: float(np.mean([r.right for r in found if r.line.task == t])) for t in tasks},
        "lines_by_task": {t: sum(r.line.task == t for r in found) for t in tasks},
        "caption_perplexity": float(np.exp(caption.mean())),
    }
