"""What the loop asks of a training stage.

A stage is one file: a configuration, the networks it trains, `prepare` (samples to a batch) and
`loss`. Put two beside each other and the difference is the method.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from minwm.training.draw import Draw


class Stage(Protocol):
    """One method of training.

    Attributes:
        networks: what is trained, by name; each gets its own optimizer.
        frozen: further networks whose weights the checkpoint must carry (an EMA target, say).
        fixed: networks that never change (a teacher): on the run's device like all, in no checkpoint.
    """

    networks: Mapping[str, nn.Module]
    frozen: Mapping[str, nn.Module]
    fixed: Mapping[str, nn.Module]

    def turns(self, step: int) -> Sequence[str]:
        """The networks updated in this step, in order."""

    def prepare(self, samples: Sequence[Any], draw: Draw) -> Any:
        """Samples of the dataset to the batch that `loss` takes."""

    def loss(self, turn: str, batch: Any, draw: Draw) -> tuple[Tensor, dict[str, float]]:
        """The loss of the network `turn`, and figures to log."""

    def after_step(self, step: int) -> None:
        """Called when the step's updates are done."""

    def export(self, folder: Path, about: Mapping[str, Any]) -> None:
        """Write the model that the next stage, or serving, loads."""
