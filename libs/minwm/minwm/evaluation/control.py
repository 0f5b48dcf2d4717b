"""Whether training learned control: the loss on held-out clips with their own camera poses and with another clip's.

Both losses are the autoregressive stage's (teacher forcing), on the same windows, noise and noise levels, so their
difference is the poses' alone. Generates nothing: a model whose pictures are still bad can already show it.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from minwm.data.clips import Clip
from minwm.diffusion import flow
from minwm.errors import DataError, TrainingError
from minwm.models.backbones import Backbone
from minwm.models.conditions import Conditions
from minwm.models.context import teacher_forcing
from minwm.precision import native_dtype
from minwm.randomness import generator
from minwm.training.autoregressive import denoise_given_clean
from minwm.training.batch import Batch, WindowConfig, cut_windows
from minwm.training.draw import Draw

SIGNIFICANT = 2.0  # standard errors
_SAME_MOTION_DECIMALS = 3  # of viewmats: a thousandth of a world unit is standing still


@dataclass(frozen=True, kw_only=True)
class ControlMargin:
    """How much worse the model predicts when it is told another clip's camera path.

    margin:           (loss_shuffled − loss_true) / loss_true
    standard_error:   of the margin, from the clips' mean paired differences
    true_lower_share: share of pairs in which the true poses give the lower loss
    """

    loss_true: float
    loss_shuffled: float
    margin: float
    standard_error: float
    true_lower_share: float
    clips: int
    pairs: int

    @property
    def learned(self) -> bool:
        """Whether the margin is above zero by more than two standard errors."""
        return self.margin > SIGNIFICANT * self.standard_error

    def verdict(self) -> str:
        """The result in plain language."""
        figures = f"{self.margin:+.2%} ± {self.standard_error:.2%} (one standard error, {self.clips} held-out clips)"
        if self.learned:
            return f"The model uses the camera: told another clip's path, its loss changes by {figures}."
        if self.margin < -SIGNIFICANT * self.standard_error:
            return f"Wrong way round: told another clip's path, the model's loss falls, by {figures}."
        return f"No control shown: told another clip's path, the loss changes by {figures}, which may be chance."


def control_margin(
    backbone: Backbone,
    clips: Sequence[Clip],
    *,
    seed: int = 0,
    levels: int = 6,
    batch_size: int = 4,
    frames: int = 8,
    progress: Callable[[int], None] | None = None,
) -> ControlMargin:
    """Measure the margin on windows of `frames` latent frames, one of every clip at each of `levels` noise levels.

    The levels are spread evenly over those of training, so the mean is its loss. `progress` is told how many
    levels are done. Raises DataError for fewer than two clips or clips shorter than a window, TrainingError for a
    model whose loss is not finite.
    """
    if len(clips) < 2:
        raise DataError(f"control margin: got {len(clips)} clips, expected at least 2 to exchange poses between")
    true, shuffled = [], []
    for number in range(levels):
        draw = Draw(seed, number, range(len(clips)))
        windows = cut_windows(clips, draw, WindowConfig(frames=frames, prompt_dropout=0.0), backbone.encode)
        noise = draw.normal("noise", windows.latents.shape[1:])
        level = flow.warp(torch.tensor((number + 0.5) / levels), backbone.config.shift)
        own = windows.conditions
        assert own.cameras is not None, "windows are cut with their cameras"
        true.append(_losses(backbone, windows, own, noise, level, batch_size))
        donors = derangement(own.cameras.viewmats, generator(seed, number, "donors"))
        other = _exchange(own, donors)
        shuffled.append(_losses(backbone, windows, other, noise, level, batch_size))
        if progress is not None:
            progress(number + 1)
    return _summary(np.stack(true), np.stack(shuffled))


def derangement(viewmats: Tensor, random: torch.Generator) -> Tensor:
    """For each window of viewmats (b, f, 4, 4), b > 1, the window (b,) whose poses it gets, never its own.

    A permutation in which as few windows as possible get poses equal to their own.
    """
    rounded = viewmats.double().round(decimals=_SAME_MOTION_DECIMALS) + 0.0  # no negative zeros
    motions = [window.numpy().tobytes() for window in rounded]
    sizes = Counter(motions)
    places = {motion: place for place, motion in enumerate(sizes)}
    order = sorted(torch.randperm(len(motions), generator=random).tolist(), key=lambda i: places[motions[i]])
    # Equal motions stand together, so a step as long as the largest group leaves every group that can be left.
    largest = max(sizes.values())
    grouped = torch.tensor(order)
    donors = torch.empty_like(grouped)
    donors[grouped] = grouped.roll(-(largest if largest < len(order) else 1))
    return donors


@torch.no_grad()
def _losses(
    backbone: Backbone, windows: Batch, conditions: Conditions, noise: Tensor, level: Tensor, batch_size: int
) -> NDArray[np.float64]:
    """The loss of every window (b,) at one noise level, steered by these."""
    model = backbone.model
    context = teacher_forcing(noise.shape[1], backbone.config.history)
    losses, quick = [], native_dtype(noise.device) is torch.bfloat16
    for first in range(0, len(noise), batch_size):
        part = slice(first, first + batch_size)
        clean, drawn = windows.latents[part], noise[part]
        sigma = level.expand(clean.shape[:2])
        with torch.autocast(clean.device.type, torch.bfloat16, enabled=quick):
            predicted = denoise_given_clean(
                model,
                flow.add_noise(clean, drawn, sigma),
                clean,
                sigma,
                model.prompt(windows.text[part]),
                conditions.streams(part),
                context,
            )
        losses.append((predicted.double() - flow.velocity(clean, drawn)).square().flatten(1).mean(1))
    return torch.cat(losses).numpy()


def _exchange(own: Conditions, donors: Tensor) -> Conditions:
    """Each window with another's path and actions, its own lens and first image."""
    assert own.cameras is not None, "windows are cut with their cameras"
    cameras = dataclasses.replace(own.cameras.streams(donors), intrinsics=own.cameras.intrinsics)
    return dataclasses.replace(own.streams(donors), cameras=cameras, image=own.image)


def _summary(true: NDArray[np.float64], shuffled: NDArray[np.float64]) -> ControlMargin:
    """The figures of losses (levels, clips). Levels of one clip are not independent, so clips make the error."""
    if not (np.isfinite(true).all() and np.isfinite(shuffled).all()):
        raise TrainingError("control margin: the model's loss on held-out clips is not finite, expected a number")
    clips = true.shape[1]
    loss = float(true.mean())
    differences = (shuffled - true).mean(0)
    return ControlMargin(
        loss_true=loss,
        loss_shuffled=float(shuffled.mean()),
        margin=float(differences.mean()) / loss,
        standard_error=float(differences.std(ddof=1)) / clips**0.5 / loss,
        true_lower_share=float((true < shuffled).mean()),
        clips=clips,
        pairs=true.size,
    )
