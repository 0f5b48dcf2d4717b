"""The steps of the pipeline as Kubeflow components. Each calls the library with paths, and nothing else.

A component's source is all that a cluster gets of it, hence the imports inside; the image holds the rest.
Every component reports progress in lines such as `Training autoregressive: 3/20`.
"""

from kfp import dsl

IMAGE = "minwm:0.1.0"


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def make_dataset(
    recipe: str, name: str, store: str, autoencoder: dsl.Input[dsl.Model], dataset: dsl.Output[dsl.Dataset]
) -> None:
    """Play the game, annotate, encode, write shards; keep them in the artifact store as `datasets/NAME/DIGEST`."""
    from pathlib import Path

    from minwm.artifacts.store import DirectoryStore
    from minwm.data.build import build_clips
    from minwm.data.doom import record
    from minwm.models.checkpoints import load_autoencoder
    from minwm.precision import native_dtype
    from minwm.progress import progress_bar
    from minwm_pipelines.recipes import data_recipe

    config = data_recipe(recipe)
    folder = Path(dataset.path)
    with progress_bar("Playing and encoding", config.game.episodes) as report:
        report(0)
        encoder = load_autoencoder(Path(autoencoder.path), native_dtype())
        manifest = build_clips(record(config.game), encoder, folder, config.clips, report)
    DirectoryStore(Path(store)).put_folder(f"datasets/{name}/{manifest.digest()}", folder)
    dataset.metadata.update(digest=manifest.digest(), samples=manifest.samples, clips=manifest.about["clips"])


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def train_stage(
    recipe: str,
    dataset: dsl.Input[dsl.Dataset],
    backbone: dsl.Input[dsl.Model],
    model: dsl.Output[dsl.Model],
    record: dsl.Output[dsl.Artifact],
    score: dsl.Input[dsl.Model] = None,
) -> None:
    """Train one stage from `backbone`'s weights; `record` has `log.jsonl`, a line per step, and the model's card."""
    import shutil
    from pathlib import Path
    from tempfile import TemporaryDirectory

    from minwm.progress import progress_bar
    from minwm.training.recipe import run_recipe
    from minwm_pipelines.recipes import stage_recipe

    config = stage_recipe(
        recipe, Path(dataset.path), Path(backbone.path), Path(score.path) if score is not None else None
    )
    target = Path(model.path)
    with (
        progress_bar(f"Training {config.stage}", config.run.steps) as report,
        TemporaryDirectory(dir=target.parent) as run,
    ):
        report(0)
        run_recipe(config, Path(run), lambda done, total, figures: report(done))
        Path(record.path, "model").mkdir(parents=True)
        shutil.move(Path(run, "log.jsonl"), record.path)
        shutil.copy(Path(run, "model/config.json"), Path(record.path, "model"))
        shutil.move(Path(run, "model"), target)
    stage = {"recipe": config.stage, "steps": config.run.steps}
    model.metadata.update(dataset=dataset.metadata["digest"], stages=[*backbone.metadata.get("stages", []), stage])


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def assemble_world(
    name: str,
    dataset: dsl.Input[dsl.Dataset],
    backbone: dsl.Input[dsl.Model],
    autoencoder: dsl.Input[dsl.Model],
    world: dsl.Output[dsl.Model],
) -> None:
    """Put together what can be served: weights, the card, and start pictures cut from held-out clips."""
    from pathlib import Path

    from minwm.progress import progress_bar
    from minwm_pipelines.assembly import assemble

    with progress_bar("Assembling the world", 1) as report:
        report(0)
        assemble(Path(world.path), name, Path(backbone.path), Path(autoencoder.path), Path(dataset.path))
        report(1)
    world.metadata.update(backbone.metadata)


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def evaluate_world(
    world: dsl.Input[dsl.Model],
    dataset: dsl.Input[dsl.Dataset],
    clips: int,
    metrics: dsl.Output[dsl.Metrics],
    evaluation: dsl.Output[dsl.Artifact],
) -> None:
    """Measure control and quality on held-out clips; `evaluation` has videos and figures, `metrics` the numbers."""
    from pathlib import Path

    from minwm.evaluation.evaluate import EvaluationConfig, evaluate
    from minwm.models.worlds import load_world
    from minwm.progress import progress_bar

    figures = evaluate(
        load_world(Path(world.path)),
        Path(dataset.path),
        Path(evaluation.path),
        EvaluationConfig(clips=clips),
        bars=lambda title, total: progress_bar(f"Evaluating {title}", total),
    )
    for name, value in figures["metrics"].items():
        metrics.log_metric(name, value)


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def register_model(
    name: str,
    store: str,
    world: dsl.Input[dsl.Model],
    base: dsl.Input[dsl.Model],
    autoencoder: dsl.Input[dsl.Model],
    metrics: dsl.Input[dsl.Metrics],
) -> int:
    """Make the world the next version of the model `name` in the registry; returns the version's number."""
    from pathlib import Path

    from minwm import __version__
    from minwm.artifacts.registry import Lineage, ModelRegistry, TrainedStage
    from minwm.artifacts.store import DirectoryStore, folder_digest
    from minwm.progress import progress_bar

    with progress_bar("Registering", 1) as report:
        report(0)
        lineage = Lineage(
            dataset=world.metadata["dataset"],
            parents=tuple(folder_digest(Path(start.path)) for start in (base, autoencoder)),
            stages=tuple(
                TrainedStage(recipe=stage["recipe"], steps=int(stage["steps"])) for stage in world.metadata["stages"]
            ),
            code_version=__version__,
        )
        registry = ModelRegistry(DirectoryStore(Path(store)))
        version = registry.register(name, Path(world.path), lineage, metrics.metadata)
        report(1)
    return version.version
