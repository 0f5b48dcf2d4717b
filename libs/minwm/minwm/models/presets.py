"""Named configurations: an architecture together with how it is meant to be run."""

from dataclasses import dataclass, replace

from minwm.diffusion.flow import schedule
from minwm.errors import ConfigError
from minwm.models.context import History
from minwm.models.hunyuan import HunyuanConfig
from minwm.models.wan import WanConfig


@dataclass(frozen=True, kw_only=True)
class WorldConfig:
    """What a backbone's `config.json` holds.

    shift: of the noise schedule, in training and sampling
    levels: noise levels by number of sampling steps
    """

    preset: str
    architecture: WanConfig | HunyuanConfig
    history: History
    shift: float
    levels: dict[int, tuple[float, ...]]

    def sampling_levels(self, steps: int) -> tuple[float, ...]:
        """Noise levels for `steps` steps. Raises ConfigError for a count the model was not made for."""
        if steps not in self.levels:
            raise ConfigError(f"steps={steps}: {self.preset} samples in one of {sorted(self.levels)} steps")
        return self.levels[steps]


def preset_names() -> tuple[str, ...]:
    """Every preset, small ones first."""
    return tuple(_PRESETS)


def preset(name: str) -> WorldConfig:
    """The configuration of a named preset. Raises ConfigError, listing the names, for another."""
    if name not in _PRESETS:
        raise ConfigError(f"preset {name!r}: unknown, expected one of {', '.join(_PRESETS)}")
    return _PRESETS[name]


def _world(
    name: str,
    architecture: WanConfig | HunyuanConfig,
    *,
    history: History = History(chunk=4, window=20),  # noqa: B008 (frozen)
    shift: float = 5.0,
    steps: tuple[int, ...] = (4, 50),
) -> WorldConfig:
    levels = {count: tuple(schedule(count, shift)) for count in steps}
    return WorldConfig(preset=name, architecture=architecture, history=history, shift=shift, levels=levels)


_DOOM = WanConfig(
    dim=320,
    layers=6,
    heads=5,
    ffn_dim=1280,
    text_dim=128,
    text_length=64,
    byte_text=True,
    conditions=("camera_prope",),
)
_WAN_SMALL = WanConfig(dim=1536, layers=30, heads=12, ffn_dim=8960)
_WAN_LARGE = WanConfig(dim=5120, layers=40, heads=40, ffn_dim=13824)
_HUNYUAN = HunyuanConfig(dim=2048, layers=54, heads=16, mlp_dim=8192)
# Few-step weights of minWM and HY-WorldPlay see a cache's past as attention by position left it.
_HUNYUAN_CAMERA = replace(_HUNYUAN, conditions=("camera_prope",), prope_history="compat")
_HUNYUAN_ACTION = replace(_HUNYUAN_CAMERA, conditions=("camera_prope", "action_timestep"), action_labels="released")

_PRESETS = {
    config.preset: config
    for config in (
        _world("wan-doom", _DOOM, history=History(chunk=2, window=16), shift=3.0, steps=(1, 2, 4, 8)),
        _world("wan2.1-t2v-1.3b", _WAN_SMALL),
        _world("wan2.1-t2v-14b", _WAN_LARGE),
        _world("minwm-wan2.1-1.3b", replace(_WAN_SMALL, conditions=("camera_prope",))),
        _world("hunyuanvideo-1.5-8b", replace(_HUNYUAN, text_timestep="frames")),
        _world("minwm-hunyuanvideo-1.5-8b", _HUNYUAN_CAMERA),
        _world("minwm-hunyuanvideo-1.5-8b-action", _HUNYUAN_ACTION),
        _world("hy-worldplay-8b", _HUNYUAN_ACTION),
    )
}
