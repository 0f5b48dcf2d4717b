"""Named configurations: an architecture together with how it is meant to be run."""

from dataclasses import dataclass

from minwm.diffusion.flow import schedule
from minwm.errors import ConfigError
from minwm.models.context import History
from minwm.models.wan import WanConfig


@dataclass(frozen=True, kw_only=True)
class WorldConfig:
    """What a backbone's `config.json` holds.

    shift: of the noise schedule, in training and sampling
    levels: noise levels by number of sampling steps
    """

    preset: str
    architecture: WanConfig
    history: History
    shift: float
    levels: dict[int, tuple[float, ...]]

    def sampling_levels(self, steps: int) -> tuple[float, ...]:
        """Noise levels for `steps` steps. Raises ConfigError for a count the model was not made for."""
        if steps not in self.levels:
            raise ConfigError(f"steps={steps}: {self.preset} samples in one of {sorted(self.levels)} steps")
        return self.levels[steps]


def preset(name: str) -> WorldConfig:
    """The configuration of a named preset. Raises ConfigError, listing the names, for another."""
    if name not in _PRESETS:
        raise ConfigError(f"preset {name!r}: unknown, expected one of {', '.join(sorted(_PRESETS))}")
    return _PRESETS[name]


def _levels(shift: float) -> dict[int, tuple[float, ...]]:
    return {steps: tuple(schedule(steps, shift)) for steps in (1, 2, 4, 8)}


_PRESETS = {
    "wan-doom": WorldConfig(
        preset="wan-doom",
        architecture=WanConfig(dim=320, layers=6, heads=5, ffn_dim=1280),
        history=History(chunk=2, window=16),
        shift=3.0,
        levels=_levels(3.0),
    )
}
