"""Telemetry of the libraries we use, switched off before any of them is imported.

The package imports this module first, so whatever else of ours is imported comes later, and so do the libraries. The switches
are environment variables: processes that we start inherit them. What does use the network, and when: docs/privacy.md.
"""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import MutableMapping

log = logging.getLogger(__name__)

# Variable, value. Only reports about the user are switched off, nothing that somebody asked a library to do.
SWITCHES = {
    "ORT_DISABLE_TELEMETRY": "1",  # onnxruntime from 1.29 on: a device id in the user's cache, and uploads
    "HF_HUB_DISABLE_TELEMETRY": "1",  # huggingface-hub, and transformers and timm through it
    "HF_HUB_DISABLE_UPDATE_CHECK": "1",  # huggingface-hub's command asks the package index for a newer one
    "HF_UPDATE_DOWNLOAD_COUNTS": "0",  # datasets, evaluate: a request for each data set opened, local files included
    "WANDB_ERROR_REPORTING": "false",  # wandb, which lmms-eval installs
    "GRADIO_ANALYTICS_ENABLED": "False",
    "RAY_USAGE_STATS_ENABLED": "0",
    "DO_NOT_TRACK": "1",  # a convention that several libraries follow
}


def switch_off_telemetry(environment: MutableMapping[str, str] = os.environ) -> None:
    """Set SWITCHES in an environment, whatever they were set to; an onnxruntime imported earlier is warned about."""
    was_off = environment.get("ORT_DISABLE_TELEMETRY", "").lower() not in ("", "0", "false")
    environment.update(SWITCHES)
    version = str(getattr(sys.modules.get("onnxruntime"), "__version__", ""))
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if not was_off and numbers is not None and tuple(map(int, numbers.groups())) >= (1, 29):
        log.warning(
            "onnxruntime %s was imported before cobra_edge, so its telemetry is on and cannot be switched off in this process; "
            "import cobra_edge first, or set ORT_DISABLE_TELEMETRY=1",
            version,
        )


switch_off_telemetry()
