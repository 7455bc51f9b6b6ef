"""Answers whose tokens are chosen on the GPU: per token one number comes back to the host, not a vocabulary of logits."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import torch

from ...errors import InputError
from ..sampling import NOT_FINITE, Sampling
from .kernels.choice import choose_token
from .state import on_stream
from .step import Step, captured

_KEPT = 4  # graphs of that many ways to sample


class Chooser:
    """Chooses the next token from a step's logits and makes it the step's token.

    How tokens are sampled is part of a captured graph, so there is one for each way; the seed is not part of it.
    """

    def __init__(self, step: Step, stream: torch.cuda.Stream | None) -> None:
        """Take the step whose logits and token are meant."""
        self._step, self._stream = step, stream
        device = step.logits.device
        self._uniform = torch.zeros(1, dtype=torch.float64, device=device)
        self._not_finite = torch.zeros(1, dtype=torch.int32, device=device)
        self._graphs: dict[Sampling, Callable[[], None]] = {}

    def __call__(self, sampling: Sampling, uniform: float) -> int:
        """Choose, and return the token. Raises InputError when logits are not finite.

        Args:
            sampling: how; its seed is not used.
            uniform: a number of [0, 1) that decides where there is a choice.
        """
        choose = self._graph(msgspec.structs.replace(sampling, seed=0))
        if sampling.temperature:
            self._uniform.fill_(uniform)
        self._not_finite.zero_()
        choose()
        found = torch.cat([self._step.token, self._not_finite.to(torch.int64)]).cpu()
        token, not_finite = found.tolist()
        if not_finite:
            raise InputError(NOT_FINITE)
        return int(token)

    def _graph(self, sampling: Sampling) -> Callable[[], None]:
        if sampling not in self._graphs:
            if len(self._graphs) == _KEPT:
                self._graphs.pop(next(iter(self._graphs)))
            step = self._step

            def run() -> None:
                choose_token(step.logits, sampling, self._uniform, step.token, self._not_finite)

            with on_stream(self._stream):
                self._graphs[sampling] = captured(run, self._stream)
        return self._graphs[sampling]
