"""timm, imported when it is needed: that takes seconds, for nothing where a model is text-only."""

from __future__ import annotations

import sys
from types import ModuleType


def timm_library() -> ModuleType:
    """Import and return timm, without the wandb that it takes where that is installed.

    timm takes it for its training logs alone. wandb takes a second more, and at once reads along with what the process prints.
    """
    if "wandb" in sys.modules or "timm" in sys.modules:
        import timm
    else:
        sys.modules["wandb"] = None  # type: ignore[assignment]  # Python's mark for "not to be found"
        try:
            import timm
        finally:
            del sys.modules["wandb"]
    return timm
