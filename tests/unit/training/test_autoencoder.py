"""Stage 0: windows, the loss by its words, and latents that come out normalised in the end."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from minwm.data.episode import Episode
from minwm.errors import ConfigError, DataError
from minwm.models.autoencoder import AutoencoderConfig
from minwm.models.checkpoints import load_autoencoder
from minwm.training.autoencoder import AutoencoderStage, AutoencoderStageConfig, reconstruction_loss
from minwm.training.draw import Draw
from minwm.training.engine import OptimizerConfig
from minwm.training.loop import RunConfig, train

pytestmark = pytest.mark.unit

NewEpisodes = Callable[[int, int], list[Episode]]
CONFIG = AutoencoderStageConfig(
    model=AutoencoderConfig(latent_channels=4, widths=(6, 8, 10)), latent_frames=2, edge_weight=0.7, latent_weight=0.05
)


def test_a_window_is_a_piece_of_its_episode_mirrored_half_of_the_time(new_episodes: NewEpisodes) -> None:
    episodes = new_episodes(40, 11)
    batch = AutoencoderStage(CONFIG, 0).prepare(episodes, Draw(0, 0, range(40)))
    assert batch.shape == (40, 8, 3, 32, 48)
    found = set()
    for episode, window in zip(episodes, batch, strict=True):
        pixels = (window.permute(0, 2, 3, 1) * 255).round().byte().numpy()
        for start in range(4):
            for mirrored in (False, True):
                truth = episode.frames[start : start + 8, :, :: -1 if mirrored else 1]
                if np.array_equal(pixels, truth):
                    found.add((start, mirrored))
    assert len(found) == 8, "every start, both ways"


def test_a_sample_is_a_piece_of_the_picture_where_a_crop_is_asked_for(new_episodes: NewEpisodes) -> None:
    episodes = new_episodes(60, 8)
    stage = AutoencoderStage(replace(CONFIG, crop=(16, 40)), 0)
    corners = set()
    for episode, window in zip(episodes, stage.prepare(episodes, Draw(0, 0, range(60))), strict=True):
        pixels = (window.permute(0, 2, 3, 1) * 255).round().byte().numpy()
        places = ((y, x) for y in range(17) for x in range(9))
        corners |= {
            (y, x)
            for y, x in places
            for piece in [episode.frames[:8, y : y + 16, x : x + 40]]
            if np.array_equal(pixels, piece) or np.array_equal(pixels, piece[:, :, ::-1])
        }
    assert len(corners) > 30
    assert {y for y, _ in corners} >= {0, 16} and {x for _, x in corners} == set(range(9)), "up to every edge"


def test_a_crop_must_fit_the_picture_and_the_latents(new_episodes: NewEpisodes) -> None:
    with pytest.raises(ConfigError, match="crop="):
        replace(CONFIG, crop=(12, 16))
    with pytest.raises(DataError, match="crop=64x16: frames are only 32x48"):
        AutoencoderStage(replace(CONFIG, crop=(64, 16)), 0).prepare(new_episodes(1, 8), Draw(0, 0, range(1)))


def test_training_goes_on_from_a_saved_autoencoder(new_episodes: NewEpisodes, tmp_path: Path) -> None:
    episodes = new_episodes(4, 12)
    first = load_autoencoder(trained(tmp_path, episodes, 2))
    stage = AutoencoderStage(AutoencoderStageConfig(start=tmp_path / "model"), 9)
    assert stage.model.config == CONFIG.model
    torch.testing.assert_close(stage.model.state_dict(), first.state_dict(), rtol=0, atol=0)
    assert all(weight.requires_grad for weight in stage.model.parameters())


def test_loss_is_the_picture_s_and_its_edges_absolute_error_and_the_latents_size(new_episodes: NewEpisodes) -> None:
    stage, draw = AutoencoderStage(CONFIG, 0), Draw(0, 0, range(2))
    batch = stage.prepare(new_episodes(2, 8), draw)
    with torch.no_grad():
        loss, figures = stage.loss("autoencoder", batch, draw)
        latents, _ = stage.model.encode(batch)
        error = (stage.model.decode(latents)[0] - batch).double()
    across = (error[..., 1:] - error[..., :-1]).abs().mean()
    down = (error[..., 1:, :] - error[..., :-1, :]).abs().mean()
    size = latents.double().square().mean()
    assert float(loss) == pytest.approx(float(error.abs().mean() + 0.7 * (across + down) + 0.05 * size), rel=1e-5)
    assert figures["psnr"] == pytest.approx(float(10 * torch.log10(1 / error.square().mean())), rel=1e-4)
    assert figures["latent_rms"] == pytest.approx(float(size.sqrt()), rel=1e-4)


def test_what_is_decoded_is_noisy_by_as_much_as_asked_for(new_episodes: NewEpisodes) -> None:
    episodes, draw = new_episodes(3, 8), Draw(0, 0, range(3))

    def loss(noise: float) -> float:
        stage = AutoencoderStage(replace(CONFIG, latent_noise=noise), 0)
        with torch.no_grad():
            return float(stage.loss("autoencoder", stage.prepare(episodes, draw), draw)[0])

    assert loss(0.5) == loss(0.5) != loss(0.0)
    stage = AutoencoderStage(CONFIG, 0)
    batch = stage.prepare(episodes, draw)
    with torch.no_grad():
        latents, _ = stage.model.encode(batch)
        frames, _ = stage.model.decode(latents + 0.5 * draw.normal("latent noise", latents.shape[1:]))
        expected, _ = reconstruction_loss(frames - batch, CONFIG.edge_weight)
    assert loss(0.5) == pytest.approx(float(expected + CONFIG.latent_weight * latents.square().mean()), rel=1e-6)


def trained(
    folder: Path, episodes: list[Episode], steps: int, *, interrupt_at: int | None = None, rate: float = 1e-3
) -> Path:
    def progress(done: int, of: int, figures: dict[str, float]) -> None:
        if done == interrupt_at:
            raise KeyboardInterrupt

    run = RunConfig(steps=steps, batch_size=2, engine="torch", bf16=False, checkpoint_every=2)
    optimizers = {"autoencoder": OptimizerConfig(learning_rate=rate)}
    train(AutoencoderStage(CONFIG, 0), episodes, run, optimizers, folder, {}, progress)
    return folder / "model"


def test_an_interrupted_run_exports_the_same_model_and_statistics(new_episodes: NewEpisodes, tmp_path: Path) -> None:
    episodes = new_episodes(3, 10)
    whole = trained(tmp_path / "whole", episodes, 5)
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "run", episodes, 5, interrupt_at=3)
    for _ in range(2):  # goes on; and a finished run may be started again
        resumed = trained(tmp_path / "run", episodes, 5)
        assert (resumed / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert json.loads((resumed / "config.json").read_text())["about"]["steps"] == 5


@pytest.mark.parametrize("steps", [10, 60])
def test_the_exported_model_s_latents_are_normalised(new_episodes: NewEpisodes, tmp_path: Path, steps: int) -> None:
    """However short the run; here one that hardly moves the model, whose latents' moments are its average ones."""
    episodes = new_episodes(2, 8)
    model = load_autoencoder(trained(tmp_path / "run", episodes, steps, rate=1e-6))
    frames = torch.from_numpy(np.stack([episode.frames for episode in episodes])).permute(0, 1, 4, 2, 3) / 255
    with torch.no_grad():
        latents, _ = model.encode(frames)
    assert latents.mean((0, 1, 3, 4)).abs().max() < 0.1
    assert (latents.std((0, 1, 3, 4)) - 1).abs().max() < 0.1


def test_a_loss_without_gradient_leaves_the_statistics_alone(new_episodes: NewEpisodes) -> None:
    stage, draw = AutoencoderStage(CONFIG, 0), Draw(0, 0, range(2))
    batch = stage.prepare(new_episodes(2, 8), draw)
    with torch.no_grad():
        stage.loss("autoencoder", batch, draw)
    assert stage.frozen["moments"].state_dict()["count"] == 0
    stage.loss("autoencoder", batch, draw)
    assert stage.frozen["moments"].state_dict()["count"] == 1
