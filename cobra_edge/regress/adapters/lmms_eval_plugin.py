"""The entry point `lmms_eval.models`: tells lmms-eval where the model `cobra-edge` is, without importing it."""

from __future__ import annotations

from typing import Any


def manifest() -> Any:
    """Return lmms-eval's description of the model."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest("cobra-edge", simple_class_path="cobra_edge.regress.adapters.lmms_eval.CobraEdgeLMM")
