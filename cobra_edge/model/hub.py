"""What comes over the network: files of the hub and timm's pretrained encoders, with the hub client's own progress bars."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import timm

from ..errors import MachineError


def fetch(repository: str, file: str, otherwise: str) -> Path:
    """Return the path of a hub repository's file in the local cache, downloaded when it is not there yet.

    What is in the cache is taken without asking for a newer one: without a network the client would try for half a minute.

    Args:
        repository: owner and name.
        file: path in it.
        otherwise: what to do where the hub cannot be reached, for the message.

    Raises:
        MachineError: the hub cannot be reached, or has no such file.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    with suppress(LocalEntryNotFoundError, OSError):
        return Path(hf_hub_download(repository, file, local_files_only=True))
    with _one_error(f"{file} of {repository}", otherwise):
        return Path(hf_hub_download(repository, file))


def fetch_encoder(timm_name: str, image_size: int, overrides: Mapping[str, Any]) -> Any:
    """Return timm's pretrained Vision Transformer for square images of image_size pixels.

    Args:
        timm_name: which.
        image_size: in pixels.
        overrides: further arguments of the architecture.

    Raises:
        MachineError: the hub cannot be reached.
    """
    with _one_error(f"vision weights {timm_name}", "give a directory with --vision-weights"):
        return timm.create_model(timm_name, pretrained=True, num_classes=0, img_size=image_size, **overrides)


@contextmanager
def _one_error(what: str, otherwise: str) -> Iterator[None]:
    """Turn whatever goes wrong into one MachineError, without the clients' own reports of each retry."""
    loggers = [logging.getLogger(name) for name in ("huggingface_hub", "timm")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    except MemoryError:  # building an encoder may meet it; the hub is not at fault
        raise
    except Exception as error:  # the hub's client raises a dozen types for "no network" and "no such file"
        reason = (str(error).strip().splitlines() or [""])[0][:200]
        raise MachineError(
            f"{what} could not be fetched from the hub and is not in its cache ({type(error).__name__}: {reason}); "
            f"connect once, or {otherwise}"
        ) from error
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
