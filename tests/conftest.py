"""Settings and small parts that the whole test tree shares: tiny random models, clips, episodes and a world."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pytest
import torch
from hypothesis import settings
from numpy.typing import NDArray
from torch import nn

from minwm.data.clips import Clip, frames_to_mp4
from minwm.data.episode import Episode
from minwm.diffusion.flow import schedule
from minwm.geometry.camera import relative_viewmats
from minwm.geometry.live import CameraVelocity, Speeds, advance
from minwm.models.autoencoder import Autoencoder, AutoencoderConfig
from minwm.models.backbones import Backbone, new_model, save_backbone
from minwm.models.checkpoints import save_autoencoder
from minwm.models.conditions import ConditionName, Conditions, first_image
from minwm.models.context import History
from minwm.models.hunyuan import HunyuanConfig
from minwm.models.hunyuan_text import HunyuanText
from minwm.models.presets import WorldConfig
from minwm.models.prope import Cameras
from minwm.models.text import Embedded
from minwm.models.wan import WanConfig
from minwm.models.worlds import WorldCard, save_world

# A busy machine makes a test slow, not wrong: pytest-timeout catches what hangs.
settings.register_profile("minwm", deadline=None, print_blob=True)
settings.load_profile("minwm")

HEIGHT, WIDTH, FPS = 32, 48, 17.5
CHANNELS = 4


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Threads only get in each other's way on tensors as small as the tests'."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def randomise(model: nn.Module, seed: int) -> None:
    """Move every parameter off its initial value: what starts as zero or one must not hide a mistake."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=random))


class NewBackbone(Protocol):
    """See the fixture `new_backbone`."""

    def __call__(
        self,
        history: History = ...,
        *,
        seed: int = 0,
        kind: str = "wan",
        conditions: tuple[ConditionName, ...] = ("camera_prope",),
        **architecture: Any,
    ) -> Backbone: ...


def tiny_architecture(kind: str, **changes: Any) -> WanConfig | HunyuanConfig:
    """Two layers, two heads of 16 channels, latents of 4 channels."""
    if kind == "wan":
        sizes: dict[str, Any] = {"ffn_dim": 48, "frequencies": 32, "text_dim": 8, "text_length": 12, "byte_text": True}
        return WanConfig(**{"dim": 32, "layers": 2, "heads": 2, "channels": CHANNELS, **sizes, **changes})
    sizes = {"mlp_dim": 48, "frequencies": 32, "axes": (4, 6, 6), "refiner_layers": 1, "text_dim": 10, "text_length": 7}
    sizes |= {"glyph_dim": 6, "glyph_hidden": 12, "glyph_length": 4, "vision_dim": 8, "vision_length": 3}
    return HunyuanConfig(**{"dim": 32, "layers": 2, "heads": 2, "channels": CHANNELS, **sizes, **changes})


@pytest.fixture(scope="session")
def new_backbone() -> NewBackbone:
    """Makes tiny backbones with random weights: latents have 4 channels and even sides."""

    def make(
        history: History = History(chunk=2, window=4),  # noqa: B008 (frozen)
        *,
        seed: int = 0,
        kind: str = "wan",
        conditions: tuple[ConditionName, ...] = ("camera_prope",),
        **changes: Any,
    ) -> Backbone:
        config = WorldConfig(
            preset="tiny",
            architecture=tiny_architecture(kind, conditions=conditions, **changes),
            history=history,
            shift=3.0,
            levels={steps: tuple(schedule(steps, 3.0)) for steps in (1, 2, 4)},
        )
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = new_model(config.architecture)
        randomise(model, seed)
        return Backbone(model, config)

    return make


def random_text(config: WanConfig | HunyuanConfig, batch: int, seed: int = 0) -> Any:
    """What the backbone's `prompt` takes, at random; streams differ in length."""
    random = torch.Generator().manual_seed(seed)

    def embedded(length: int, width: int, least: int) -> Embedded:
        lengths = torch.randint(least, length + 1, (batch, 1), generator=random)
        return Embedded(torch.randn(batch, length, width, generator=random), torch.arange(length) < lengths)

    if isinstance(config, WanConfig):
        if config.byte_text:
            return torch.randint(1, 257, (batch, config.text_length), generator=random)
        return embedded(config.text_length, config.text_dim, 1)
    return HunyuanText(
        language=embedded(config.text_length, config.text_dim, 1),
        glyphs=embedded(config.glyph_length, config.glyph_dim, 0),
        vision=embedded(config.vision_length, config.vision_dim, 0),
    )


@pytest.fixture(scope="session")
def new_text() -> Callable[..., Any]:
    """`random_text(architecture, batch, seed=0)`."""
    return random_text


@pytest.fixture
def tiny_backbone(new_backbone: NewBackbone) -> Backbone:
    """Chunks of 2, window 4."""
    return new_backbone()


@pytest.fixture
def tiny_autoencoder() -> Autoencoder:
    """Random weights, and statistics that are not those of an uncalibrated one."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Autoencoder(AutoencoderConfig(latent_channels=CHANNELS, widths=(6, 8, 10)))
        model.calibrate(torch.randn(CHANNELS), 0.5 + torch.rand(CHANNELS))
    return model.eval().requires_grad_(False)


@pytest.fixture
def tiny_world(tmp_path: Path, tiny_backbone: Backbone, tiny_autoencoder: Autoencoder) -> Path:
    """The folder of a world model `tiny`: 32×48 pixels, chunks of 8 frames, start images `hall` and `yard`."""
    parts, world = tmp_path / "parts", tmp_path / "tiny-world"
    parts.mkdir()
    save_backbone(parts / "backbone", tiny_backbone, {})
    save_autoencoder(parts / "autoencoder", tiny_autoencoder)
    card = WorldCard(
        name="tiny",
        height=HEIGHT,
        width=WIDTH,
        fps=FPS,
        intrinsics=(0.5, 0.75, 0.5, 0.5),
        speeds=Speeds(move=4.0, turn=70.0),
        steps=2,
    )
    pictures = np.random.default_rng(0).integers(0, 256, (2, HEIGHT, WIDTH, 3), np.uint8)
    save_world(
        world, card, parts / "backbone", parts / "autoencoder", dict(zip(("hall", "yard"), pictures, strict=True))
    )
    return world


def _velocity(values: NDArray[np.float64]) -> CameraVelocity:
    forward, right, up, yaw, pitch = values.tolist()
    return CameraVelocity(forward=forward, right=right, up=up, yaw=yaw, pitch=pitch)


def random_walk(random: np.random.Generator, frames: int) -> NDArray[np.float64]:
    """Poses (frames, 4, 4) of a camera that moves and turns at random, starting anywhere."""
    pose = advance(np.eye(4), _velocity(random.normal(0, 30, 5)), 1.0)
    poses = []
    for _ in range(frames):
        pose = advance(pose, _velocity(random.normal(0, (2, 2, 1, 40, 20))), 0.2)
        poses.append(pose)
    return np.stack(poses)


@pytest.fixture
def new_cameras() -> Callable[[int, int], Cameras]:
    """Makes cameras (batch, frames) that move and turn in every direction, each stream with its own intrinsics."""

    def make(batch: int, frames: int) -> Cameras:
        random = np.random.default_rng(3)
        viewmats = np.stack([relative_viewmats(random_walk(random, frames)) for _ in range(batch)])
        intrinsics = random.uniform(0.4, 0.9, (batch, 4)).astype(np.float32)
        return Cameras.track(torch.from_numpy(viewmats), torch.from_numpy(intrinsics))

    return make


@pytest.fixture
def new_conditions(new_cameras: Callable[[int, int], Cameras]) -> Callable[[int, int], Conditions]:
    """Makes every signal of (batch, frames): cameras, actions, and a first image of 4×6 latents."""

    def make(batch: int, frames: int) -> Conditions:
        random = torch.Generator().manual_seed(4)
        actions = torch.randint(0, 81, (batch, frames), generator=random)
        image = first_image(torch.randn(batch, CHANNELS, 4, 6, generator=random))
        return Conditions(cameras=new_cameras(batch, frames), actions=actions, image=image)

    return make


@pytest.fixture(scope="session")
def new_clips() -> Callable[[int, int], list[Clip]]:
    """Makes `count` random clips of `frames` latent frames (4 × 4 × 6)."""

    def make(count: int, frames: int) -> list[Clip]:
        random = np.random.default_rng(7)
        picture = random.integers(0, 256, (1, HEIGHT, WIDTH, 3), np.uint8)
        return [
            Clip(
                name=f"clip-{number}",
                episode=f"episode-{number}",
                split="train",
                caption=f"scene {number}",
                latents=random.standard_normal((frames, CHANNELS, 4, 6)).astype(np.float16),
                poses=random_walk(random, frames),
                intrinsics=random.uniform(0.4, 0.9, 4).astype(np.float32),
                actions=random.integers(0, 81, frames),
                frames=frames_to_mp4(picture.repeat(4 * frames, axis=0), FPS),
                notes={},
            )
            for number in range(count)
        ]

    return make


@pytest.fixture
def new_episodes() -> Callable[[int, int], list[Episode]]:
    """Makes `count` random episodes of `frames` RGB frames (32×48), whose player is blocked nowhere."""

    def make(count: int, frames: int) -> list[Episode]:
        random = np.random.default_rng(11)
        episodes = []
        for number in range(count):
            right, turn = random.uniform(1, 4), random.uniform(20, 90)
            pose, poses = np.eye(4), []
            for _ in range(frames):
                pose = advance(pose, CameraVelocity(right=right, yaw=turn), 1 / FPS)
                poses.append(pose)
            episodes.append(
                Episode(
                    name=f"episode-{number}",
                    frames=random.integers(0, 256, (frames, HEIGHT, WIDTH, 3), np.uint8),
                    poses=np.stack(poses),
                    intrinsics=np.array([0.5, 0.75, 0.5, 0.5], np.float32),
                    commands=np.tile(np.array([0.0, right, turn], np.float32), (frames, 1)),
                    labels=[["GreenTorch"] if frame % 2 else [] for frame in range(frames)],
                    scene="maze:E1M1",
                    fps=FPS,
                )
            )
        return episodes

    return make
