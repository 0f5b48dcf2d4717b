"""Flow matching (Lipman et al. 2023; rectified flow): x_σ = (1 − σ)·x0 + σ·ε, velocity ε − x0.

σ runs from 1 (noise) to 0 (data); a model is told the timestep 1000·σ. Levels are float32 or
better throughout: bf16 cannot tell neighbouring timesteps apart.
"""

import torch
from torch import Tensor

TIMESTEPS = 1000.0


def warp(sigma: Tensor, shift: float) -> Tensor:
    """Move noise levels in [0, 1] towards 1: s·σ / (1 + (s − 1)·σ)."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def schedule(steps: int, shift: float) -> list[float]:
    """The `steps` noise levels at which a sampler calls the model, warped, from 1 downwards."""
    uniform = torch.linspace(1, 0, steps + 1, dtype=torch.float64)[:-1]
    levels: list[float] = warp(uniform, shift).tolist()
    return levels


def add_noise(clean: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """x_σ for data and noise (b, f, …) at levels (b, f)."""
    level = expand(sigma, clean)
    return (1 - level) * clean + level * noise


def velocity(clean: Tensor, noise: Tensor) -> Tensor:
    """The regression target ε − x0."""
    return noise - clean


def to_clean(noisy: Tensor, predicted_velocity: Tensor, sigma: Tensor) -> Tensor:
    """x0 = x_σ − σ·v in float32, for tensors (b, f, …) at levels (b, f)."""
    return noisy.float() - expand(sigma, noisy) * predicted_velocity.float()


def expand(sigma: Tensor, like: Tensor) -> Tensor:
    """Levels (b, f) with trailing axes of size one, to broadcast over `like` (b, f, …)."""
    return sigma.reshape(*sigma.shape, *[1] * (like.ndim - sigma.ndim))
