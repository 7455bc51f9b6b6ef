"""A Mamba decoder in float64 that knows every trick of `quantize.transforms`, written out: the reference for what is stored.

Rotations are explicit matrices, norms are folded by the formulas, nothing is shared with the package but `hadamard_matrix`.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from cobra_edge.formats.hadamard import hadamard_matrix
from cobra_edge.formats.model_config import MambaConfig

Weights = Mapping[str, np.ndarray]


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def orthonormal(width: int) -> np.ndarray:
    """Return R (width, width) float64."""
    return hadamard_matrix(width).astype(np.float64) / np.sqrt(width)


def float64(tensors: Mapping) -> dict[str, np.ndarray]:
    """Return torch tensors as float64 arrays."""
    return {name: tensor.double().numpy() for name, tensor in tensors.items()}


def transformed(weights: Weights, config: MambaConfig, rotations: tuple[str, ...], scales: Weights) -> dict[str, np.ndarray]:
    """Return the weights folded, rotated and scaled, all float64.

    Args:
        weights: the model's own.
        config: its sizes.
        rotations: as `Recipe.rotations`.
        scales: of the inputs of in_proj and dt_proj, by the matrix's name.
    """
    stored = dict(weights)
    stream, inner = orthonormal(config.d_model), orthonormal(config.d_inner)
    for i in range(config.n_layer):
        norm, mixer = f"backbone.layers.{i}.norm.weight", f"backbone.layers.{i}.mixer."
        in_proj, x_proj, dt_proj, out_proj = (f"{mixer}{part}_proj.weight" for part in ("in", "x", "dt", "out"))
        if "residual" in rotations:
            stored[in_proj] = stored[in_proj] @ np.diag(stored[norm]) @ stream.T
            stored[norm] = np.ones(config.d_model)
            stored[out_proj] = stream @ stored[out_proj]
        if "out-proj" in rotations:
            stored[out_proj] = stored[out_proj] @ inner.T
        if in_proj in scales:
            stored[in_proj] = stored[in_proj] @ np.diag(scales[in_proj])
            stored[norm] = stored[norm] / scales[in_proj]
        if dt_proj in scales:
            stored[dt_proj] = stored[dt_proj] @ np.diag(scales[dt_proj])
            low, rest = stored[x_proj][: config.dt_rank], stored[x_proj][config.dt_rank :]
            stored[x_proj] = np.concatenate([np.diag(1 / scales[dt_proj]) @ low, rest])
    for table in ("backbone.embedding.weight", "lm_head.weight"):
        if "residual" in rotations and table in stored:
            stored[table] = stored[table] @ stream.T
    return stored


def naive_logits(weights: Weights, config: MambaConfig, tokens: list[int], rotations: tuple[str, ...] = ()) -> np.ndarray:
    """Read tokens one after the other, and rotate where a runtime has to; returns (seq, vocab) float64."""
    c, head = config, weights.get("lm_head.weight", weights["backbone.embedding.weight"])
    stream = orthonormal(c.d_model) if "residual" in rotations else np.eye(c.d_model)
    inner = orthonormal(c.d_inner) if "out-proj" in rotations else np.eye(c.d_inner)
    history, h = np.zeros((c.n_layer, c.d_conv, c.d_inner)), np.zeros((c.n_layer, c.d_inner, c.d_state))
    logits = []
    for token in tokens:
        x = weights["backbone.embedding.weight"][token]  # already rotated, where the stream is
        for i in range(c.n_layer):
            p = {k.split(f"layers.{i}.")[1]: v for k, v in weights.items() if f"layers.{i}." in k}
            unit = x / np.sqrt((x**2).mean() + c.norm_eps)
            fresh, z = np.split(p["mixer.in_proj.weight"] @ (unit * p["norm.weight"]), 2)
            history[i] = np.concatenate([history[i, 1:], fresh[None]])
            u = silu((history[i] * p["mixer.conv1d.weight"][:, 0].T).sum(0) + p["mixer.conv1d.bias"])
            low, b, k = np.split(p["mixer.x_proj.weight"] @ u, [c.dt_rank, c.dt_rank + c.d_state])
            delta = np.logaddexp(0, p["mixer.dt_proj.weight"] @ low + p["mixer.dt_proj.bias"])
            h[i] = np.exp(delta[:, None] * -np.exp(p["mixer.A_log"])) * h[i] + (delta * u)[:, None] * b
            y = (h[i] @ k + p["mixer.D"] * u) * silu(z)
            x = x + p["mixer.out_proj.weight"] @ (inner @ y)
        own = stream.T @ x
        final = own / np.sqrt((own**2).mean() + c.norm_eps) * weights["backbone.norm_f.weight"]
        logits.append(head @ (stream @ final))
    return np.array(logits)


def random_scales(weights: Weights, seed: int = 0) -> dict[str, np.ndarray]:
    """Return scales from 1/8 to 8 for every in_proj and dt_proj, float64; each is a float32 too."""
    rng = np.random.default_rng(seed)
    names = [n for n in weights if n.endswith(("in_proj.weight", "dt_proj.weight"))]
    drawn = {n: np.exp2(rng.uniform(-3, 3, weights[n].shape[1])) for n in names}
    return {n: values.astype(np.float32).astype(np.float64) for n, values in drawn.items()}
