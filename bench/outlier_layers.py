"""A layer with random weights and planted outliers: channels far louder than the others, as trained Mambas have them.

What is drawn, exactly:

* Matrices are normal with variance 1 / inputs, the norm's weight is uniform in 0.5..1.5, biases are normal times 0.1, A_log is
  that of a fresh Mamba.
* The residual stream is s ⊙ (M z) with z standard normal, drawn for each position by itself. Column k of M (d_model, d_model)
  is normal times k^-½ and rows are scaled to length 1: channels are correlated, and the eigenvalues of their covariance fall
  about as 1 / k. s is 1 but for the share of loud channels, picked by chance, where it is log-uniform in 20..60.
* D, the gain of the direct way from the convolution to out_proj's input y, is 1 but for as large a share of its channels, where
  it is log-uniform in 20..60: those channels of y are louder by about as much, and no quantized weight is changed for it.

Every layer has a stream of its own, drawn anew: the outliers are equally strong in front of each. Nothing makes up for the loud
channels in the weights behind them, as training does in part: they make most of the energy of what a product gives.
"""

from __future__ import annotations

import math

import msgspec
import numpy as np
import torch
from torch import Tensor

from cobra_edge.formats.model_config import MambaConfig, decoder_shapes
from cobra_edge.model.mamba import Block

OUTLIERS = 0.03
OUTLIER_GAINS = (20.0, 60.0)
_PREFIX = "backbone.layers.0."


class OutlierLayer:
    """The weights of one layer and a source of residual streams in front of it.

    Attributes:
        config: sizes of a decoder that has this layer alone.
        loud: which inputs of in_proj and of out_proj are loud, by site, (in,) bool.
    """

    def __init__(self, config: MambaConfig, seed: int, outliers: float = OUTLIERS) -> None:
        """Draw weights and loud channels.

        Args:
            config: sizes of a decoder, of which this is a layer.
            seed: of everything that is drawn.
            outliers: share of the channels that are loud.
        """
        self.config = config = msgspec.structs.replace(config, n_layer=1)
        self._random = torch.Generator().manual_seed(seed)
        shapes = {name: shape for name, shape in decoder_shapes(config).items() if name.startswith(_PREFIX)}
        self._tensors = {name: self._drawn(name, shape) for name, shape in shapes.items()}
        gains = self._gains(config.d_inner, outliers)
        self._tensors[f"{_PREFIX}mixer.D"] = gains
        self._gains_of_channels = self._gains(config.d_model, outliers)
        self.outlier_channels = {"in_proj": (self._gains_of_channels > 1).numpy(), "out_proj": (gains > 1).numpy()}
        falling = torch.arange(1.0, config.d_model + 1).rsqrt()
        mixing = torch.randn(config.d_model, config.d_model, generator=self._random) * falling
        self._mixing = mixing / mixing.norm(dim=1, keepdim=True)

    def tensor(self, name: str) -> np.ndarray:
        """Return a tensor of the layer, float32."""
        return self._tensors[name].numpy()

    def streams(self, positions: int) -> Tensor:
        """Draw residual streams, (positions, d_model) float32; every call draws others."""
        noise = torch.randn(positions, self.config.d_model, generator=self._random)
        return (noise @ self._mixing.T).mul_(self._gains_of_channels)

    def block(self, replaced: dict[str, np.ndarray] | None = None) -> Block:
        """Return the layer as a module, with other values (of the same shapes) in the place of those that are named."""
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

    def _gains(self, width: int, share: float) -> Tensor:
        """Return ones, and log-uniform gains for a share of the channels, (width,) float32."""
        gains, low, high = torch.ones(width), *(math.log(bound) for bound in OUTLIER_GAINS)
        loud = torch.randperm(width, generator=self._random)[: round(share * width)]
        gains[loud] = torch.exp(low + (high - low) * torch.rand(len(loud), generator=self._random))
        return gains


def outlier_ratio(x: np.ndarray) -> float:
    """Return how many times louder the outlier_ratio channel of x (positions, n) is than the median one, by root mean square."""
    levels = np.sqrt((x * x).mean(axis=0))
    return float(levels.max() / np.median(levels))


def kurtosis(x: np.ndarray) -> float:
    """Return the mean over positions of E[v⁴] / E[v²]² over the channels of x (positions, n): 3 where they are normal."""
    squares = x.astype(np.float64) ** 2
    return float(((squares**2).mean(axis=1) / squares.mean(axis=1) ** 2).mean())
