"""Every stage trains every backbone, steered by whatever it was built with."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from minwm.data.clips import Clip
from minwm.models.backbones import Backbone, load_backbone, save_backbone
from minwm.models.context import History
from minwm.training.autoregressive import Autoregressive, AutoregressiveConfig
from minwm.training.batch import WindowConfig
from minwm.training.bidirectional import Bidirectional, BidirectionalConfig
from minwm.training.consistency import Consistency, ConsistencyConfig
from minwm.training.dmd import DMD, DMDConfig
from minwm.training.draw import Draw
from minwm.training.stage import Stage

pytestmark = pytest.mark.unit

NewBackbone = Callable[..., Backbone]
WINDOW = WindowConfig(frames=4)
STAGES: dict[str, Callable[[Backbone, Path], Stage]] = {
    "bidirectional": lambda b, _: Bidirectional(BidirectionalConfig(window=WINDOW), b),
    "autoregressive": lambda b, _: Autoregressive(AutoregressiveConfig(window=WINDOW), b),
    "consistency": lambda b, _: Consistency(ConsistencyConfig(window=WINDOW, guidance=2.0), b),
    "dmd": lambda b, folder: DMD(
        DMDConfig(window=WINDOW, score=folder, steps=(2,), guidance=2.0, context_chunks=0), b, load_backbone(folder)
    ),
}


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("wan", {"byte_text": False, "conditions": ("camera_plucker", "action_attention", "first_image")}),
        ("wan", {"conditions": ("camera_prope", "camera_attention")}),
        ("hunyuan", {"conditions": ("camera_prope", "action_timestep")}),
        ("hunyuan", {"conditions": ("camera_prope",), "prope_history": "compat"}),
    ],
    ids=["wan", "wan-camera", "hunyuan", "hunyuan-compat"],
)
@pytest.mark.parametrize("stage", STAGES)
def test_a_step_moves_every_part_of_the_network(
    new_backbone: NewBackbone,
    new_text: Callable[..., Any],
    new_clips: Callable[[int, int], list[Clip]],
    tmp_path: Path,
    kind: str,
    changes: dict[str, Any],
    stage: str,
) -> None:
    backbone = new_backbone(History(chunk=2, window=4), kind=kind, **changes)

    def encode(prompts: Sequence[str]) -> Any:
        return new_text(backbone.config.architecture, len(prompts))

    backbone = replace(backbone, encoder=encode)
    save_backbone(tmp_path / "score", backbone, {})
    made, draw = STAGES[stage](backbone, tmp_path / "score"), Draw(0, 0, range(2))
    batch = made.prepare(new_clips(2, 6), draw)
    with torch.autocast("cpu", torch.bfloat16):  # as the loop runs it
        loss, _ = made.loss("generator", batch, draw)
    loss.backward()  # type: ignore[no-untyped-call]
    assert torch.isfinite(loss)
    for name, parameter in backbone.model.named_parameters():
        text_after_the_last_block = name.startswith("double_blocks.1.txt_")
        assert parameter.grad is not None or text_after_the_last_block, name
