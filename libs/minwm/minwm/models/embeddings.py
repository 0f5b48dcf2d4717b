"""Embeddings of prompts, computed once and kept in a folder.

A file is named by a digest of the encoder's identity and the prompt, so states never outlive the weights they
came from. It holds the states without padding, and appears whole: any number of processes may share a folder.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Protocol

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from minwm.errors import CheckpointError
from minwm.models.text import Embedded

FORMAT = 1  # raised when the same prompts and weights come to mean other states


class TextEncoder(Protocol):
    """Prompts to states, which are real at the beginning of a row, and zero and masked behind it."""

    @property
    def identity(self) -> str:
        """A digest of everything, but the prompt, that decides the states."""

    @property
    def length(self) -> int:
        """Tokens that a row is padded to."""

    def encode(self, prompts: Sequence[str]) -> Embedded:
        """States (b, length, c) and mask (b, length) of at least one prompt."""


class EmbeddingCache:
    """A `TextEncoder` that runs another one only for prompts whose states are not yet in `folder`.

    Encoders may share a folder. Nothing is ever removed from it.
    """

    def __init__(self, folder: Path, encoder: TextEncoder) -> None:
        self._folder, self._encoder = folder, encoder
        self.identity, self.length = encoder.identity, encoder.length

    def encode(self, prompts: Sequence[str]) -> Embedded:
        """States (b, length, c) and mask (b, length), on the CPU; what is missing is computed in one batch.

        Raises CheckpointError for a file that is damaged, and what the encoder raises.
        """
        paths = {prompt: self._path(prompt) for prompt in prompts}
        missing = [prompt for prompt, path in paths.items() if not path.exists()]
        if missing:
            self._write([paths[prompt] for prompt in missing], self._encoder.encode(missing))
        return padded([self._read(paths[prompt]) for prompt in prompts], self.length)

    def _path(self, prompt: str) -> Path:
        key = hashlib.sha256(json.dumps([FORMAT, self.identity, prompt]).encode())
        return self._folder / f"{key.hexdigest()}.safetensors"

    def _write(self, paths: Sequence[Path], embedded: Embedded) -> None:
        """Each row aside, then renamed; of several writers of one prompt the last one's stays."""
        self._folder.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=self._folder, prefix=".partial-") as aside:
            for path, states, mask in zip(paths, embedded.states, embedded.mask, strict=True):
                save_file({"states": states[mask].cpu()}, Path(aside, path.name))
                os.replace(Path(aside, path.name), path)

    def _read(self, path: Path) -> Tensor:
        """States (l, c)."""
        try:
            states = load_file(path).get("states")
        except SafetensorError as error:
            raise CheckpointError(f"{path}: damaged ({error}); delete it to have it computed again") from error
        if states is None or states.ndim != 2 or len(states) > self.length:
            found = "no states" if states is None else f"states of shape {tuple(states.shape)}"
            raise CheckpointError(f"{path}: holds {found}, expected (l, c) with at most {self.length} tokens")
        return states


def padded(rows: Sequence[Tensor], length: int) -> Embedded:
    """Rows of states (l, c), each of its own length up to `length`, as states (b, length, c) and their mask."""
    states = pad_sequence(list(rows), batch_first=True)
    counts = torch.tensor([[len(row)] for row in rows], device=states.device)
    mask = torch.arange(length, device=states.device) < counts
    return Embedded(F.pad(states, (0, 0, 0, length - states.shape[1])), mask)
