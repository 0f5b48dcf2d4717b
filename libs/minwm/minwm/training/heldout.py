"""The loss on held-out samples: fixed samples, fixed draws, no gradient, so that two steps can be compared."""

import torch

from minwm.errors import ConfigError
from minwm.training.draw import Draw
from minwm.training.loader import Samples, on_device, prepare
from minwm.training.parallel import Processes
from minwm.training.run import RunConfig
from minwm.training.stage import Stage

_STEP = -1  # what the draws are keyed with: no step of training


class HeldOut:
    """Up to `run.validate_samples` samples, spread evenly over the held-out ones.

    Raises ConfigError when there are fewer than one for each data rank.
    """

    def __init__(self, stage: Stage, samples: Samples, run: RunConfig, processes: Processes) -> None:
        count = min(run.validate_samples, len(samples))
        count -= count % processes.data_size
        if count < 1:
            raise ConfigError(
                f"run.validate_every={run.validate_every}: the dataset has {len(samples)} held-out samples, "
                f"run.validate_samples is {run.validate_samples}; expected at least {processes.data_size}"
            )
        self._stage, self._samples, self._run, self._processes = stage, samples, run, processes
        self._places = [number * len(samples) // count for number in range(count)]
        self._numbers = processes.share(range(count))

    @torch.no_grad()
    def losses(self) -> dict[str, float]:
        """The mean loss of every trained network."""
        size = max(1, self._run.batch_size // self._run.accumulation // self._processes.data_size)
        totals = dict.fromkeys(self._stage.networks, 0.0)
        for first in range(0, len(self._numbers), size):
            numbers = self._numbers[first : first + size]
            chosen = [self._samples[self._places[number]] for number in numbers]
            batch = prepare(self._stage, chosen, Draw(self._run.seed, _STEP, numbers, self._processes.device))
            content = on_device(batch.content, self._processes.device)
            for name in totals:
                with self._run.precision(self._processes.device):
                    loss, _ = self._stage.loss(name, content, batch.draw)
                totals[name] += loss.item() * len(numbers) / len(self._numbers)
        return {name: self._processes.mean(total) for name, total in totals.items()}
