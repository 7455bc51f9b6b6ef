"""Downloads: files from the hub and timm's pretrained encoders, with the hub client's progress bars."""

from __future__ import annotations

import errno
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ..errors import MachineError
from ..files.staging import WRITE_ERRORS
from .timm_library import timm_library

_CACHE_ERRORS = (*WRITE_ERRORS, errno.EACCES, errno.EPERM)


def fetch(repository: str, file: str, otherwise: str) -> Path:
    """Return the path of a hub repository's file in the local cache, downloaded if necessary.

    A cached file is used without checking for a newer version: without a network the client would retry for half a minute.

    Args:
        repository: owner and name.
        file: path in it.
        otherwise: what to do if the hub is unreachable, for the message.

    Raises:
        MachineError: the hub is unreachable, or has no such file, or its cache cannot be written.
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
        timm_name: timm's name of the model.
        image_size: in pixels.
        overrides: additional arguments of the architecture.

    Raises:
        MachineError: the hub is unreachable, or its cache cannot be written.
    """
    with _one_error(f"vision weights {timm_name}", "give a directory with --vision-weights"):
        return timm_library().create_model(timm_name, pretrained=True, num_classes=0, img_size=image_size, **overrides)


@contextmanager
def _one_error(what: str, otherwise: str) -> Iterator[None]:
    """Turn any failure into one MachineError, without the client's messages about each retry."""
    loggers = [logging.getLogger(name) for name in ("huggingface_hub", "timm")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    except (MemoryError, TypeError, AttributeError):  # from creating the encoder, not from the hub
        raise
    except Exception as error:  # the hub's client raises a dozen types for "no network" and "no such file"
        raise _failure(what, otherwise, error) from error
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _failure(what: str, otherwise: str, error: Exception) -> MachineError:
    if isinstance(error, OSError) and error.errno in _CACHE_ERRORS:
        from huggingface_hub.constants import HF_HUB_CACHE

        return MachineError(
            f"{what} could not be kept in the hub's cache {HF_HUB_CACHE} ({error.strerror}); "
            "free space there, or set HF_HOME to a directory that can be written"
        )
    reason = (str(error).strip().splitlines() or [""])[0][:200]
    return MachineError(
        f"{what} could not be downloaded from the hub and is not in its cache ({type(error).__name__}: {reason}); "
        f"connect once, or {otherwise}"
    )
