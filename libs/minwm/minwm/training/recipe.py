"""Recipes: YAML that says which stage to train, on what, from which weights, and for how long.

stage: autoregressive
data: runs/demo/data          # a dataset folder
backbone: models/wan-doom/base   # a model folder, or `preset:NAME` for random weights
history: {chunk: 1, window: 16}   # frame by frame; chunk, window and sink are the model's own if not given
conditions: [camera_prope, action_timestep]   # what steers it; as the model has them if not given
encoders: {folder: published/wan, cache: runs/embeddings}   # of prompts, for backbones that take embeddings
run: {steps: 30, batch_size: 4}
optimizers: {generator: {learning_rate: 1e-4}}
method: {window: {frames: 8}}    # the stage's own configuration
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from minwm.config import build, load_yaml
from minwm.data.clips import KIND as CLIPS
from minwm.data.clips import ClipReader, load_clips
from minwm.data.episode import KIND as EPISODES
from minwm.data.episode import EpisodeReader
from minwm.data.shards import ShardReader
from minwm.errors import ConfigError
from minwm.models.backbones import Backbone, load_backbone, new_backbone, with_conditions
from minwm.models.conditions import ConditionName
from minwm.models.context import History
from minwm.models.prompts import EncodersConfig, prompt_encoder
from minwm.models.transformer import Transformer
from minwm.training.autoencoder import AutoencoderStage, AutoencoderStageConfig
from minwm.training.autoregressive import Autoregressive, AutoregressiveConfig
from minwm.training.batch import WindowConfig
from minwm.training.bidirectional import Bidirectional, BidirectionalConfig
from minwm.training.consistency import Consistency, ConsistencyConfig
from minwm.training.decoder import DecoderStage, DecoderStageConfig
from minwm.training.dmd import DMD, DMDConfig
from minwm.training.engine import OptimizerConfig
from minwm.training.judge import JudgeStage, JudgeStageConfig, load_play
from minwm.training.loader import Cached, Samples
from minwm.training.loop import Progress, train
from minwm.training.metrics import Work
from minwm.training.ode import Ode, OdeConfig
from minwm.training.parallel import Processes, join
from minwm.training.run import RunConfig
from minwm.training.sequence import split_sequence
from minwm.training.stage import Stage
from minwm.training.trajectories import SamplingConfig, Trajectory, load_trajectories, write_trajectories

PRESET = "preset:"
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One training run."""

    stage: str
    data: Path
    run: RunConfig
    optimizers: dict[str, OptimizerConfig]
    backbone: str = ""
    conditions: tuple[ConditionName, ...] | None = None
    history: History | None = None
    encoders: EncodersConfig | None = None
    method: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.stage not in _STAGES:
            raise ConfigError(f"stage: {self.stage!r} is unknown, expected one of {', '.join(sorted(_STAGES))}")
        if self.stage not in _WITHOUT_BACKBONE and not self.backbone:
            raise ConfigError(f"backbone: is required by stage {self.stage!r}: a model folder or preset:NAME")


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe, with `key.path=value` overrides applied. Raises ConfigError for whatever is wrong in it."""
    return build(Recipe, load_yaml(path, overrides))


def run_recipe(recipe: Recipe, folder: Path, progress: Progress | None = None) -> Path:
    """Train; the exported model's folder.

    A run folder's checkpoint fits only the recipe and the dataset it was made with; `data` may lie elsewhere, and
    what does not decide the numbers (steps, checkpoints, logging, accumulation, processes) may change.
    """
    processes = join(recipe.run.parallel)  # before the stage, whose averages are spread over them
    job = _STAGES[recipe.stage](_Request(recipe, processes))
    about = {"stage": recipe.stage, "data": str(recipe.data), "from": recipe.backbone, "dataset": job.digest}
    rest = {field.name: getattr(recipe, field.name) for field in fields(recipe) if field.name not in _APART}
    identity = {**rest, "encoders": recipe.encoders and str(recipe.encoders.folder), "dataset": job.digest}
    train(
        job.stage,
        job.samples,
        recipe.run,
        recipe.optimizers,
        folder,
        about,
        progress,
        processes=processes,
        heldout=job.heldout,
        identity=identity,
        work=_work(recipe, job),
    )
    return folder / "model"


@dataclass(frozen=True, kw_only=True)
class TrajectoriesRecipe:
    """What `minwm trajectories` samples for the stage `ode`: from an autoregressive model, on a dataset of clips."""

    data: Path
    backbone: str
    sampling: SamplingConfig
    conditions: tuple[ConditionName, ...] | None = None
    history: History | None = None
    encoders: EncodersConfig | None = None


def load_trajectories_recipe(path: Path, overrides: Sequence[str] = ()) -> TrajectoriesRecipe:
    """Read a recipe of trajectories. Raises ConfigError for whatever is wrong in it."""
    return build(TrajectoriesRecipe, load_yaml(path, overrides))


def run_trajectories(recipe: TrajectoriesRecipe, folder: Path, progress: Callable[[int], None] | None = None) -> None:
    """Sample trajectories to a new folder. Raises DataError for one that holds a dataset."""
    clips, manifest = load_clips(recipe.data, "train")
    about = {"from": recipe.backbone, "data": str(recipe.data), "dataset": manifest.digest()}
    write_trajectories(_backbone(recipe, recipe.sampling.seed), clips, recipe.sampling, folder, about, progress)


def _backbone(recipe: Recipe | TrajectoriesRecipe, seed: int) -> Backbone:
    if recipe.backbone.startswith(PRESET):
        backbone = new_backbone(recipe.backbone.removeprefix(PRESET), seed)
    else:
        backbone = load_backbone(Path(recipe.backbone))
    if recipe.conditions is not None:
        backbone = with_conditions(backbone, recipe.conditions, seed)
    if recipe.history is not None:
        backbone = replace(backbone, config=replace(backbone.config, history=recipe.history))
    if recipe.encoders is not None:
        backbone = replace(backbone, encoder=prompt_encoder(recipe.encoders, backbone.config.architecture))
    return backbone


@dataclass(frozen=True)
class _Request:
    """A recipe, and the processes that are to run it."""

    recipe: Recipe
    processes: Processes

    def method(self, config: type[T]) -> T:
        """The stage's own configuration."""
        return build(config, self.recipe.method, "method")

    def backbone(self) -> Backbone:
        """The one to train."""
        return self._split(_backbone(self.recipe, self.recipe.run.seed))

    def score(self, folder: Path) -> Backbone:
        """One to train with."""
        return self._split(load_backbone(folder))

    def _split(self, backbone: Backbone) -> Backbone:
        if self.processes.sequence_group is not None:
            split_sequence(backbone.model, self.processes.sequence_group)
        return backbone


@dataclass(frozen=True, kw_only=True)
class _Job:
    """A stage, and what it is trained on."""

    stage: Stage
    samples: Samples
    heldout: Samples
    digest: str


def _autoencoder(request: _Request) -> _Job:
    recipe = request.recipe
    stage = AutoencoderStage(request.method(AutoencoderStageConfig), recipe.run.seed)
    shards = ShardReader(recipe.data, EPISODES, verify=recipe.run.verify_data)
    episodes = Cached(EpisodeReader(shards), lambda episode: episode.frames.nbytes, recipe.run.cache_gb * 2**30)
    return _Job(stage=stage, samples=episodes, heldout=(), digest=shards.manifest.digest())


def _judge(request: _Request) -> _Job:
    config = request.method(JudgeStageConfig)
    plays, digest = load_play(request.recipe.data, config.heldout_every)
    return _Job(stage=JudgeStage(config, plays, request.recipe.run.seed), samples=plays, heldout=(), digest=digest)


def _on_clips(make: Callable[[_Request], Stage], *, video: bool = False) -> Callable[[_Request], _Job]:
    def prepare(request: _Request) -> _Job:
        stage, run = make(request), request.recipe.run
        shards = ShardReader(request.recipe.data, CLIPS, verify=run.verify_data)
        heldout = ClipReader(shards, "heldout", video=video) if run.validate_every else ()
        clips = ClipReader(shards, "train", video=video)
        return _Job(stage=stage, samples=clips, heldout=heldout, digest=shards.manifest.digest())

    return prepare


def _work(recipe: Recipe, job: _Job) -> Work | None:
    """What a step comes to, for stages that train a transformer."""
    from minwm.training.dry_run import plan  # which stands on this module

    generator = job.stage.networks.get("generator")
    if not isinstance(generator, Transformer):
        return None
    sample, patch = job.samples[0], generator.architecture.patch
    if isinstance(sample, Trajectory):
        frames, _, rows, columns = sample.clean.shape
    else:
        window = build(WindowConfig, recipe.method.get("window", {}), "method.window")
        frames, (rows, columns) = window.frames, window.crop or sample.latents.shape[-2:]
    tokens = recipe.run.batch_size * frames * (rows // patch[0]) * (columns // patch[1])
    return Work(tokens=tokens, flops=plan(recipe, (rows, columns)).flops)


def _dmd(request: _Request) -> Stage:
    config = request.method(DMDConfig)
    return DMD(config, request.backbone(), request.score(config.score))


def _ode(request: _Request) -> _Job:
    config = request.method(OdeConfig)
    trajectories = load_trajectories(request.recipe.data)
    stage = Ode(config, request.backbone(), trajectories)
    return _Job(stage=stage, samples=trajectories.samples, heldout=(), digest=trajectories.digest)


_WITHOUT_BACKBONE = ("autoencoder", "decoder", "judge")
_APART = ("data", "run", "optimizers", "encoders")  # of the recipe: what decides the numbers otherwise, or in part
_STAGES: dict[str, Callable[[_Request], _Job]] = {
    "autoencoder": _autoencoder,
    "judge": _judge,
    "decoder": _on_clips(lambda r: DecoderStage(r.method(DecoderStageConfig), r.recipe.run.seed), video=True),
    "bidirectional": _on_clips(lambda r: Bidirectional(r.method(BidirectionalConfig), r.backbone())),
    "autoregressive": _on_clips(lambda r: Autoregressive(r.method(AutoregressiveConfig), r.backbone())),
    "consistency": _on_clips(lambda r: Consistency(r.method(ConsistencyConfig), r.backbone())),
    "ode": _ode,
    "dmd": _on_clips(_dmd),
}
