"""How teachers sample: many steps of the probability-flow ODE, with classifier-free guidance.

A causal teacher goes chunk by chunk from two caches, with the prompt and without; a bidirectional one makes a clip at
once. Guidance 1 asks the model once per step, anything else twice. Latents are (b, f, c, y, x).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minwm.diffusion import samplers
from minwm.diffusion.flow import TIMESTEPS
from minwm.errors import InputError
from minwm.models.conditions import Conditions
from minwm.models.context import Full, History
from minwm.models.rollout import ChunkRollout
from minwm.models.transformer import Prompt, Transformer


@dataclass(frozen=True)
class Guidance:
    """What steers a teacher by its prompt.

    prompt: of every stream
    bare:   the prompt that says nothing; needed where `scale` is not 1
    """

    prompt: Prompt
    bare: Prompt | None = None
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.scale != 1 and self.bare is None:
            raise InputError(f"guidance={self.scale}: expected the bare prompt too, or guidance 1")

    @property
    def prompts(self) -> tuple[Prompt, ...]:
        """Those that the model is asked with, in the order that `combine` takes its answers."""
        return (self.prompt,) if self.scale == 1 or self.bare is None else (self.prompt, self.bare)

    def combine(self, answers: Sequence[Tensor]) -> Tensor:
        """One velocity, float32, of the answers to `prompts`."""
        return answers[0].float() if len(answers) == 1 else samplers.guided(answers[0], answers[1], self.scale)


class TeacherRollout:
    """`batch` worlds that a many-step causal model makes chunk by chunk; see `ChunkRollout`."""

    def __init__(
        self, model: Transformer, history: History, latent_shape: Sequence[int], guidance: Guidance, *, batch: int = 1
    ) -> None:
        """latent_shape: (c, y, x) of one latent frame."""
        self._guidance = guidance
        self._rollouts = [ChunkRollout(model, history, latent_shape, batch=batch) for _ in guidance.prompts]

    @property
    def frames(self) -> int:
        """Latent frames committed so far."""
        return self._rollouts[0].frames

    def path(self, noise: Tensor, conditions: Conditions, levels: Sequence[float]) -> Iterator[Tensor]:
        """The next chunk's state at each level, and its end point."""
        guidance = self._guidance

        def predict(x: Tensor, level: float) -> Tensor:
            pairs = zip(self._rollouts, guidance.prompts, strict=True)
            return guidance.combine([rollout.velocity(x, level, prompt, conditions) for rollout, prompt in pairs])

        return samplers.euler_path(predict, noise, levels)

    def denoise(self, noise: Tensor, conditions: Conditions, levels: Sequence[float]) -> Tensor:
        """The next chunk from its noise."""
        *_, end = self.path(noise, conditions, levels)
        return end

    def commit(self, latents: Tensor, conditions: Conditions) -> None:
        """Write the next frames' clean keys and values into both caches, and move on past them."""
        for rollout, prompt in zip(self._rollouts, self._guidance.prompts, strict=True):
            rollout.commit(latents, prompt, conditions)


@torch.no_grad()
def sample_clip(
    model: Transformer,
    noise: Tensor,
    guidance: Guidance,
    conditions: Conditions,
    levels: Sequence[float],
    given: Tensor | None = None,
) -> Tensor:
    """A whole clip (b, f, c, y, x) of a bidirectional model, from noise of that shape.

    guidance: of prompts made with `bidirectional=True`
    given:    (b, g, c, y, x), g < f: the clip's first frames, which the model sees clean and which stay as they are
    """
    if given is None:
        given = noise[:, :0]
    frames, fixed = noise.shape[1], given.shape[1]
    if fixed >= frames:
        raise InputError(f"given: has {fixed} frames, expected fewer than the clip's {frames}")
    made = torch.arange(frames, device=noise.device) >= fixed

    def predict(x: Tensor, level: float) -> Tensor:
        timesteps = (level * TIMESTEPS * made.float()).expand(len(x), -1)
        whole = torch.cat([given, x], dim=1)
        answers = [model(whole, timesteps, prompt, Full(frames), conditions) for prompt in guidance.prompts]
        return guidance.combine(answers)[:, fixed:]

    return torch.cat([given, samplers.euler(predict, noise[:, fixed:], levels)], dim=1)
