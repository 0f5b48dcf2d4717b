"""The decoder's stage: windows aligned with their latents, what counts, and a decoder that learns."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from minwm.config import build
from minwm.data.clips import KIND, Clip, frames_to_mp4
from minwm.data.shards import ShardWriter, read_manifest
from minwm.data.video import decode_video
from minwm.errors import ConfigError, DataError
from minwm.models.autoencoder import DecoderConfig
from minwm.models.checkpoints import load_decoder
from minwm.models.layout import LatentLayout
from minwm.training.decoder import DecoderStage, DecoderStageConfig
from minwm.training.draw import Draw
from minwm.training.engine import OptimizerConfig
from minwm.training.loop import RunConfig, train
from minwm.training.recipe import load_recipe, run_recipe

pytestmark = pytest.mark.unit

NewClips = Callable[[int, int], list[Clip]]
LEADING = LatentLayout(channels=4, pixels=8, leading=True)
LAYOUTS = [LatentLayout(channels=4, pixels=pixels, leading=leading) for pixels in (8, 16) for leading in (True, False)]
RECIPE = Path(__file__).parents[3] / "recipes/decoder.yaml"


def named(layout: LatentLayout) -> str:
    return f"{layout.pixels}-pixels-{'leading' if layout.leading else 'even'}"


def stage_of(
    layout: LatentLayout,
    *,
    latent_frames: int = 3,
    warm: int = 1,
    edge_weight: float = 1.0,
    widths: tuple[int, int, int] = (6, 8, 10),
) -> DecoderStage:
    model = DecoderConfig(layout=layout, widths=widths)
    config = DecoderStageConfig(model=model, latent_frames=latent_frames, warm=warm, edge_weight=edge_weight)
    return DecoderStage(config, 0)


def counting_clip(clip: Clip, layout: LatentLayout, *, begins: bool) -> Clip:
    """A clip whose latent frame k holds k, and whose RGB frames tell their place in the stream by their brightness.

    Frames of latent frame k are 4k … 4k + 3; a stream of a leading layout begins with frame 3.
    """
    f = len(clip.latents)
    places = np.arange(4 * f)[3 if begins else 0 :]
    frames = np.broadcast_to(6 * places[:, None, None, None], (len(places), 2 * layout.pixels, 3 * layout.pixels, 3))
    latents = np.broadcast_to(np.arange(f)[:, None, None, None], (f, 4, 2, 3))
    return replace(clip, latents=latents.astype(np.float16), frames=frames_to_mp4(frames.astype(np.uint8), 16.0))


@pytest.mark.parametrize("layout", LAYOUTS, ids=named)
@pytest.mark.parametrize("warm", [0, 1, 2])
def test_windows_are_the_frames_of_their_latents_and_count_after_the_warm_ones_or_from_a_stream_s_beginning(
    new_clips: NewClips, layout: LatentLayout, warm: int
) -> None:
    size, starts = 3, set()
    clip = new_clips(1, 6)[0]
    for begins in {False, layout.leading}:
        samples = [counting_clip(clip, layout, begins=begins)] * 20
        batch = stage_of(layout, latent_frames=size, warm=warm).prepare(samples, Draw(0, 0, range(20)))
        assert batch.latents.shape == (20, size, 4, 2, 3)
        assert batch.frames.shape == (20, layout.rgb_frames(size), 3, 2 * layout.pixels, 3 * layout.pixels)
        for latents, frames, counted in zip(batch.latents, batch.frames, batch.counted, strict=True):
            start = int(latents[0, 0, 0, 0])
            places = (frames.mean((1, 2, 3)) * 255 / 6).round().int().tolist()
            assert places == list(range(4 * start, 4 * (start + size)))[3 if layout.leading else 0 :]
            first = 0 if begins and start == 0 else 4 * (start + warm)
            assert [place for place, counts in zip(places, counted, strict=True) if counts] == [
                place for place in places if place >= first
            ]
            starts.add(start)
    assert starts == {0, 1, 2, 3}, "every start"


@pytest.mark.parametrize("layout", LAYOUTS, ids=named)
def test_what_counts_by_default_is_decoded_as_in_the_whole_stream(layout: LatentLayout) -> None:
    config = DecoderStageConfig(model=DecoderConfig(layout=layout, widths=(4, 4, 4)))
    model = DecoderStage(config, 0).model.double()
    size, warm = config.latent_frames, config.warm
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)  # fresh weights hardly remember

    reached = []  # whether the first frame before those that count differs: a rectifier may block one window's past

    @settings(max_examples=10)
    @given(seed=st.integers(0, 2**31), start=st.integers(1, 6))
    def in_any_window(seed: int, start: int) -> None:
        random = torch.Generator().manual_seed(seed)
        latents = torch.randn(1, start + size, 4, 2, 2, generator=random, dtype=torch.float64)
        with torch.no_grad():
            stream, _ = model.decode(latents)
            window, _ = model.decode(latents[:, start:])
        steady = 4 * (size - warm)
        torch.testing.assert_close(window[:, -steady:], stream[:, -steady:], rtol=1e-10, atol=1e-10)
        before = -steady - 4  # the first frame of the last latent frame that doesn't count
        reached.append((window[:, before] - stream[:, before]).abs().max() > 1e-6)

    in_any_window()
    assert any(reached), "no warm one is in vain"


def test_loss_is_the_counted_pictures_and_their_edges_absolute_error(new_clips: NewClips) -> None:
    stage, draw = stage_of(LEADING, latent_frames=4, warm=2, edge_weight=0.7), Draw(0, 0, range(3))
    batch = stage.prepare(new_clips(3, 6), draw)
    with torch.no_grad():
        loss, figures = stage.loss("decoder", batch, draw)
        error = (stage.model.decode(batch.latents)[0] - batch.frames)[:, -8:].double()
    across = (error[..., 1:] - error[..., :-1]).abs().mean()
    down = (error[..., 1:, :] - error[..., :-1, :]).abs().mean()
    assert float(loss) == pytest.approx(float(error.abs().mean() + 0.7 * (across + down)), rel=1e-5)
    assert figures["psnr"] == pytest.approx(float(10 * torch.log10(1 / error.square().mean())), rel=1e-4)


def coded_clips(new_clips: NewClips, layout: LatentLayout, count: int, frames: int) -> list[Clip]:
    """Clips of slowly changing shades, whole streams, and latents that tell each picture's shades by a fixed code."""
    random = torch.Generator().manual_seed(5)
    code, size = torch.tensor([1.0, -0.5, 0.3, 2.0]), layout.rgb_frames(frames)
    clips = []
    for clip in new_clips(count, frames):
        shades = 2 * torch.rand(1, 1, 2, 1, 2, generator=random) - 0.5
        pictures = F.interpolate(shades.clamp(0, 1), (size, 16, 32), mode="trilinear")[0, 0]
        last = pictures[0 if layout.leading else 3 :: 4]
        latents = code[:, None, None] * (2 * F.avg_pool2d(last[:, None], layout.pixels) - 1)
        video = (pictures[..., None].expand(-1, -1, -1, 3) * 255).byte().numpy()
        clips.append(replace(clip, latents=latents.numpy().astype(np.float16), frames=frames_to_mp4(video, 16.0)))
    return clips


@pytest.mark.parametrize("layout", [LEADING, replace(LEADING, pixels=16)], ids=named)
def test_a_short_training_lowers_the_loss_and_shows_a_new_clip_better_than_the_mean_shade(
    tmp_path: Path, new_clips: NewClips, layout: LatentLayout
) -> None:
    *clips, new = coded_clips(new_clips, layout, 9, 3)
    stage = stage_of(layout, latent_frames=2, warm=1, edge_weight=0.0, widths=(8, 12, 16))
    run = RunConfig(steps=80, batch_size=4, engine="torch", bf16=False)
    train(stage, clips, run, {"decoder": OptimizerConfig(learning_rate=3e-3)}, tmp_path / "run", {})
    losses = [json.loads(line)["decoder_loss"] for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert np.mean(losses[-10:]) < 0.5 * np.mean(losses[:3])
    with torch.no_grad():
        frames, _ = load_decoder(tmp_path / "run/model").decode(torch.from_numpy(new.latents).float()[None])
    truth = torch.from_numpy(decode_video(new.frames, where="new")).permute(0, 3, 1, 2) / 255
    assert (frames[0] - truth).square().mean() < 0.3 * truth.var()


def test_the_example_recipe_s_decoder_is_for_wan_s_latents() -> None:
    recipe = load_recipe(RECIPE)
    config = build(DecoderStageConfig, recipe.method, "method")
    assert config.model.layout == LatentLayout(channels=16, pixels=8, leading=True)
    assert DecoderStage(config, recipe.run.seed).networks.keys() == recipe.optimizers.keys()


def test_a_recipe_trains_a_decoder_that_says_where_it_came_from(tmp_path: Path, new_clips: NewClips) -> None:
    with ShardWriter(tmp_path / "data", KIND) as writer:
        for clip in new_clips(2, 6):
            writer.add(clip.name, clip.to_files())
    recipe = yaml.safe_load(RECIPE.read_text()) | {"data": str(tmp_path / "data")}
    recipe["run"] = {"steps": 2, "batch_size": 2, "engine": "torch"}
    recipe["method"] = {"latent_frames": 3, "warm": 2}
    recipe["method"]["model"] = {"layout": {"channels": 4, "pixels": 8, "leading": True}, "widths": [6, 8, 10]}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    model = run_recipe(load_recipe(tmp_path / "recipe.yaml"), tmp_path / "run")
    assert load_decoder(model).layout == LEADING
    about = json.loads((model / "config.json").read_text())["about"]
    assert about["stage"] == "decoder"
    assert about["dataset"] == read_manifest(tmp_path / "data", KIND).digest()


@pytest.mark.parametrize("warm", [-1, 3])
def test_a_window_of_which_nothing_counts_is_refused(warm: int) -> None:
    with pytest.raises(ConfigError, match=f"warm={warm}: expected 0 to 2"):
        stage_of(LEADING, latent_frames=3, warm=warm)


@pytest.mark.parametrize(
    ("layout", "complaint"),
    [
        (LatentLayout(channels=16, pixels=8, leading=True), "clip clip-0: latents have 4 channels, expected 16"),
        (LatentLayout(channels=4, pixels=16, leading=True), "clip clip-0: frames are 32x48, expected 64x96"),
    ],
)
def test_clips_of_another_layout_are_refused(new_clips: NewClips, layout: LatentLayout, complaint: str) -> None:
    with pytest.raises(DataError, match=complaint):
        stage_of(layout).prepare(new_clips(1, 5), Draw(0, 0, range(1)))


def test_clips_whose_frames_are_not_those_of_their_latents_are_refused(new_clips: NewClips) -> None:
    clip = new_clips(1, 5)[0]
    six = [0, 0, 1, 2, 3, 4]
    longer = replace(clip, latents=clip.latents[six], poses=clip.poses[six], actions=clip.actions[six])
    with pytest.raises(DataError, match="clip clip-0: has 20 frames, expected 24 or 21 for 6 latent frames"):
        stage_of(LEADING).prepare([longer], Draw(0, 0, range(1)))
    with pytest.raises(DataError, match="has 20 frames, expected 24 for 6 latent frames"):
        stage_of(replace(LEADING, leading=False)).prepare([longer], Draw(0, 0, range(1)))
    with pytest.raises(DataError, match="clip clip-0: has 5 latent frames, windows need 6"):
        stage_of(LEADING, latent_frames=6).prepare([clip], Draw(0, 0, range(1)))
