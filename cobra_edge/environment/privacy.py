"""Disable the telemetry of libraries before any of them is imported.

The package imports this module first, before its other modules and their libraries. The switches are environment variables, so
child processes inherit them. docs/privacy.md lists what uses the network, and when.
"""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import MutableMapping

log = logging.getLogger(__name__)

# {variable: value}. Only usage reports are disabled, nothing that the user requests from a library.
SWITCHES = {
    "ORT_DISABLE_TELEMETRY": "1",  # onnxruntime 1.29 and later: a device id in the user's cache, and uploads
    "HF_HUB_DISABLE_TELEMETRY": "1",  # huggingface-hub, also through transformers and timm
    "HF_HUB_DISABLE_UPDATE_CHECK": "1",  # huggingface-hub's command checks the package index for updates
    "HF_UPDATE_DOWNLOAD_COUNTS": "0",  # datasets, evaluate: a request for each dataset opened, including local files
    "WANDB_ERROR_REPORTING": "false",  # wandb, which lmms-eval installs
    "GRADIO_ANALYTICS_ENABLED": "False",
    "RAY_USAGE_STATS_ENABLED": "0",
    "DO_NOT_TRACK": "1",  # a convention of several libraries
}


def switch_off_telemetry(environment: MutableMapping[str, str] = os.environ) -> None:
    """Set SWITCHES in an environment, overriding any values; warn if onnxruntime was imported earlier."""
    was_off = environment.get("ORT_DISABLE_TELEMETRY", "").lower() not in ("", "0", "false")
    environment.update(SWITCHES)
    version = str(getattr(sys.modules.get("onnxruntime"), "__version__", ""))
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if not was_off and numbers is not None and tuple(map(int, numbers.groups())) >= (1, 29):
        log.warning(
            "onnxruntime %s was imported before cobra_edge, so its telemetry is on and cannot be disabled in this process; "
            "import cobra_edge first, or set ORT_DISABLE_TELEMETRY=1",
            version,
        )


switch_off_telemetry()
