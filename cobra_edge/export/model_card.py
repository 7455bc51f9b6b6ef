"""The model card of a bundle: its source, its size and its drift from the float model."""

from __future__ import annotations

from ..bundle.manifest import Manifest, VisionSource
from ..formats.targets import Target
from ..regress.bundle_tables import describe_rotations, drift_rows
from ..terminal.output import megabytes

_CARD = """\
# {model} for {target}

Made by cobra_edge {version} from `{source}` (sha256 `{sha}`), weights as **{scheme}**, method {method}{rotation}.
{encoders}
| part | size |
|---|---|
| vision graph | {vision} |
| decoder | {decoder} |
| decoding state, any context length | {state} |
| total on the device, system included | {total} |

## Drift from the float model

{drift}

Measured on {measured}. Verify the copy on the device and ask a question:

```
python -m cobra_edge.inspect .
python -m cobra_edge.run . --image IMAGE --prompt "What is in the image?"
```

For capabilities and limitations of the model, see the model card of its checkpoint.
"""


# Descriptions of the source of the vision encoders, by `Source.vision`.
VISION_SOURCES: dict[VisionSource, str] = {
    "checkpoint": "the checkpoint's own, fine-tuned with it (Cobra's load() ignores them)",
    "files": "from files, beside the checkpoint or given with --vision-weights",
    "hub": "as published, from timm's hub",
}


def model_card(manifest: Manifest, target: Target) -> str:
    """Return the card as Markdown."""
    plan, drift = manifest.memory_plan, manifest.drift
    rows = [f"| `{name}` | {value} |" for name, value, _, _ in drift_rows(manifest, [])]
    return _CARD.format(
        model=manifest.model.model_id,
        target=target.title,
        version=manifest.cobra_edge,
        source=manifest.source.id,
        sha=manifest.source.sha256[:16],
        scheme=manifest.recipe.scheme,
        method=manifest.recipe.method,
        encoders="" if manifest.source.vision is None else f"Vision weights: {VISION_SOURCES[manifest.source.vision]}.\n",
        rotation=describe_rotations(manifest.recipe),
        vision=megabytes(plan.vision_bytes),
        decoder=megabytes(plan.decoder_bytes),
        state=megabytes(plan.state_bytes),
        total=megabytes(plan.total_bytes),
        drift="\n".join(["| measure | value |", "|---|---|", *rows]),
        measured="nothing" if drift is None else f"{drift.lines} golden lines with the {drift.runtime} decoder",
    )
