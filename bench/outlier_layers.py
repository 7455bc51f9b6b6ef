"""A layer with random weights and outlier channels, as trained Mambas have them.

Distributions:

* Matrices are normal with variance 1 / inputs, the norm's weight is uniform in 0.5..1.5, biases are normal times 0.1, A_log is
  that of a newly initialised Mamba.
* The residual stream is s ⊙ (M z) with z standard normal, independent for each position. Column k of M (d_model, d_model) is
  normal times k^-½, and rows are scaled to length 1: channels are correlated, and the eigenvalues of their covariance fall
  about as 1 / k. s is 1, except for a random share of outlier channels, where it is log-uniform in 20..60.
* D, the gain from the convolution directly to the input y of out_proj, is 1, except for the same share of its channels, where
  it is log-uniform in 20..60: these channels of y are outliers by about as much, and no quantized weight depends on it.

Every layer has its own stream, so outliers are equally strong in front of each. Weights do not compensate for outlier channels,
as they partly do after training: outliers carry most of the energy of a matmul's output.
"""

from __future__ import annotations

import msgspec
import numpy as np
import torch
from torch import Tensor

from cobra_edge.bench.random_checkpoint import OUTLIERS, outlier_gains
from cobra_edge.formats.model_config import MambaConfig, decoder_shapes
from cobra_edge.model.mamba import Block

_PREFIX = "backbone.layers.0."


class OutlierLayer:
    """The weights of one layer, and a source of residual streams.

    Attributes:
        config: of a decoder with this layer alone.
        outlier_channels: which inputs of in_proj and out_proj are outliers, by site, (in,) bool.
    """

    def __init__(self, config: MambaConfig, seed: int, outliers: float = OUTLIERS) -> None:
        """Draw weights and outlier channels.

        Args:
            config: of a decoder.
            seed: of all random values.
            outliers: share of outlier channels.
        """
        self.config = config = msgspec.structs.replace(config, n_layer=1)
        self._random = torch.Generator().manual_seed(seed)
        shapes = {name: shape for name, shape in decoder_shapes(config).items() if name.startswith(_PREFIX)}
        self._tensors = {name: self._drawn(name, shape) for name, shape in shapes.items()}
        gains = outlier_gains(config.d_inner, outliers, self._random)
        self._tensors[f"{_PREFIX}mixer.D"] = gains
        self._stream_gains = outlier_gains(config.d_model, outliers, self._random)
        self.outlier_channels = {"in_proj": (self._stream_gains > 1).numpy(), "out_proj": (gains > 1).numpy()}
        falling = torch.arange(1.0, config.d_model + 1).rsqrt()
        mixing = torch.randn(config.d_model, config.d_model, generator=self._random) * falling
        self._mixing = mixing / mixing.norm(dim=1, keepdim=True)

    def tensor(self, name: str) -> np.ndarray:
        """Return a tensor of the layer in its shape of `decoder_shapes`, float32."""
        return self._tensors[name].numpy()

    def streams(self, positions: int) -> Tensor:
        """Draw new residual streams, (positions, d_model) float32."""
        noise = torch.randn(positions, self.config.d_model, generator=self._random)
        return (noise @ self._mixing.T).mul_(self._stream_gains)

    def block(self, replaced: dict[str, np.ndarray] | None = None) -> Block:
        """Return the layer as a module; `replaced` overrides tensors by name, each (out, in) or (n,) float32."""
        others = {name: torch.from_numpy(values) for name, values in (replaced or {}).items()}
        with torch.device("meta"):
            block = Block(self.config)
        weights = {name.removeprefix(_PREFIX): others.get(name, values) for name, values in self._tensors.items()}
        block.load_state_dict(weights, assign=True)
        return block.requires_grad_(False)

    def _drawn(self, name: str, shape: tuple[int, ...]) -> Tensor:
        if name.endswith("A_log"):
            return torch.log(torch.arange(1.0, shape[1] + 1)).repeat(shape[0], 1)
        if name.endswith("norm.weight"):
            return torch.rand(shape, generator=self._random) + 0.5
        return torch.randn(shape, generator=self._random).mul_(0.1 if len(shape) == 1 else shape[-1] ** -0.5)


def outlier_ratio(x: np.ndarray) -> float:
    """Return the RMS of the largest channel of x (positions, n) float32 over that of the median channel."""
    levels = np.sqrt((x * x).mean(axis=0))
    return float(levels.max() / np.median(levels))


def kurtosis(x: np.ndarray) -> float:
    """Return E[v⁴] / E[v²]² over the channels of x (positions, n) float32, averaged over positions: 3 if normal."""
    squares = x.astype(np.float64) ** 2
    return float(((squares**2).mean(axis=1) / squares.mean(axis=1) ** 2).mean())
