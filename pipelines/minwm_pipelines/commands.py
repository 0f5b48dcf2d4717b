"""The commands `minwm pipelines …` and `minwm demo`."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

RECIPES = Annotated[Path, typer.Option(help="Folder with data.yaml and a recipe per stage.")]
AUTOENCODER = Annotated[Path, typer.Option(help="Autoencoder folder.")]
BASE = Annotated[Path, typer.Option(help="Folder of the backbone that training starts from.")]
DEMO_RECIPES = Path("recipes/doom/demo")
MODELS = Path("models/wan-doom")


def register(app: typer.Typer) -> None:
    """Add `pipelines` and `demo` to the command line."""
    pipelines = typer.Typer(no_args_is_help=True, help="Train a world model with Kubeflow Pipelines.")
    pipelines.command(name="compile")(compile_yaml)
    pipelines.command(name="run")(run)
    app.add_typer(pipelines, name="pipelines")
    app.command(name="demo")(demo)


def compile_yaml(
    out: Annotated[Path, typer.Option(help="Folder for the YAML.")] = Path("build/pipelines"),
    recipes: RECIPES = DEMO_RECIPES,
    image: Annotated[str | None, typer.Option(help="Container image of the components.")] = None,
    accelerators: Annotated[int, typer.Option(help="GPUs a training step; 0 for none.")] = 1,
    cpu: Annotated[str, typer.Option(help="CPU limit of a training step.")] = "8",
    memory: Annotated[str, typer.Option(help="Memory limit of a training step.")] = "32Gi",
    store_claim: Annotated[str, typer.Option(help="Volume claim that holds the artifact store.")] = "minwm-store",
) -> None:
    """Write the pipeline as YAML, to be uploaded to a cluster."""
    from minwm_pipelines.components import IMAGE
    from minwm_pipelines.pipeline import Cluster, compile_pipeline, make_pipeline
    from minwm_pipelines.recipes import load_recipes

    cluster = Cluster(image=image or IMAGE, accelerators=accelerators, cpu=cpu, memory=memory, store_claim=store_claim)
    path = compile_pipeline(make_pipeline(load_recipes(recipes), cluster), out)
    typer.echo(str(path))


def run(
    out: Annotated[Path, typer.Option(help="Folder for what the run makes.")],
    store: Annotated[Path, typer.Option(help="Folder of the artifact store.")] = Path("runs/store"),
    name: Annotated[str, typer.Option(help="Name of the model in the registry.")] = "wan-doom",
    recipes: RECIPES = DEMO_RECIPES,
    autoencoder: AUTOENCODER = MODELS / "autoencoder",
    base: BASE = MODELS / "base",
    clips: Annotated[int, typer.Option(help="Held-out clips to evaluate on.")] = 8,
) -> None:
    """Run the pipeline on this machine: play, train four stages, evaluate, register."""
    from minwm_pipelines.local import run_locally, world_model_arguments
    from minwm_pipelines.pipeline import Cluster, make_pipeline
    from minwm_pipelines.recipes import load_recipes

    arguments = world_model_arguments(name=name, store=store, autoencoder=autoencoder, base=base, clips=clips)
    result = run_locally(make_pipeline(load_recipes(recipes), Cluster()), arguments, out)
    Console().print(f"{name}@{result.outputs['version']} is registered in {store}", highlight=False)


def demo(
    out: Annotated[Path, typer.Option(help="Folder of the results; what an earlier demo left is replaced.")] = Path(
        "runs/demo"
    ),
    recipes: RECIPES = DEMO_RECIPES,
    autoencoder: AUTOENCODER = MODELS / "autoencoder",
    base: BASE = MODELS / "base",
    world: Annotated[Path | None, typer.Option(help="Make nothing: serve and play this world.")] = None,
    keys: Annotated[str, typer.Option(help="With --world: what is pressed, as for `minwm play`.")] = "w*6,l*3,w*6",
) -> None:
    """Show the whole path: play a game, train, evaluate, register, serve, and play the result live."""
    from minwm_pipelines.demo import play_world, run_demo

    if world is not None:
        play_world(out, world, keys)
        return
    run_demo(out, recipes=recipes, autoencoder=autoencoder, base=base)
