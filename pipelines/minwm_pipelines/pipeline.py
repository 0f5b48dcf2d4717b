"""The pipeline: game play to a registered world model, in four training stages.

Compiled to YAML it runs on a cluster, and `minwm_pipelines.local` runs the same components on this machine.
What a cluster has to offer is fixed when the pipeline is made; recipes and places are its parameters.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from kfp import compiler, dsl, kubernetes
from kfp.dsl.graph_component import GraphComponent

from minwm.errors import ConfigError
from minwm_pipelines import components

NAME = "world-model"
STORE = "/store"


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Where the pipeline runs. Limits are those of a training step; `store_claim` holds the artifact store."""

    image: str = components.IMAGE
    cpu: str = "8"
    memory: str = "32Gi"
    shared_memory: str = "8Gi"
    accelerator: str = "nvidia.com/gpu"
    accelerators: int = 1
    store_claim: str = "minwm-store"

    def __post_init__(self) -> None:
        if self.accelerators < 0:
            raise ConfigError(f"accelerators: {self.accelerators}, expected 0 or more")


class Outputs(NamedTuple):
    """What a run leaves: a stage's record has its log and its model's card; `version` is the registry's number."""

    dataset: dsl.Dataset
    world: dsl.Model
    evaluation: dsl.Artifact
    metrics: dsl.Metrics
    bidirectional_record: dsl.Artifact
    autoregressive_record: dsl.Artifact
    consistency_record: dsl.Artifact
    dmd_record: dsl.Artifact
    version: int


def make_pipeline(recipes: Mapping[str, str], cluster: Cluster) -> GraphComponent:
    """The pipeline, with `recipes` (see `load_recipes`) as its parameters' defaults."""

    @dsl.pipeline(name=NAME, description="Game play to a registered world model.")
    def world_model(
        autoencoder: str,
        base: str,
        name: str = "wan-doom",
        store: str = STORE,
        data_recipe: str = recipes["data"],
        bidirectional_recipe: str = recipes["bidirectional"],
        autoregressive_recipe: str = recipes["autoregressive"],
        consistency_recipe: str = recipes["consistency"],
        dmd_recipe: str = recipes["dmd"],
        evaluation_clips: int = 8,
    ) -> Outputs:
        encoder = _starting_weights(autoencoder, "autoencoder")
        start = _starting_weights(base, "base")
        data = _keeps(
            cluster,
            components.make_dataset(recipe=data_recipe, name=name, store=store, autoencoder=encoder),
        )
        dataset = data.outputs["dataset"]

        def train(recipe: str, label: str, backbone: dsl.Model, **score: dsl.Model) -> dsl.PipelineTask:
            task = components.train_stage(recipe=recipe, dataset=dataset, backbone=backbone, **score)
            return _trains(cluster, task.set_display_name(label))

        bidirectional = train(bidirectional_recipe, "bidirectional", start)
        whole = bidirectional.outputs["model"]
        autoregressive = train(autoregressive_recipe, "autoregressive", whole)
        consistency = train(consistency_recipe, "consistency", autoregressive.outputs["model"])
        dmd = train(dmd_recipe, "dmd", consistency.outputs["model"], score=whole)
        world = _plain(
            cluster,
            components.assemble_world(name=name, dataset=dataset, backbone=dmd.outputs["model"], autoencoder=encoder),
        ).outputs["world"]
        evaluated = _plain(cluster, components.evaluate_world(world=world, dataset=dataset, clips=evaluation_clips))
        registered = _keeps(
            cluster,
            components.register_model(
                name=name,
                store=store,
                world=world,
                base=start,
                autoencoder=encoder,
                metrics=evaluated.outputs["metrics"],
            ),
        ).set_caching_options(False)
        return Outputs(
            dataset=dataset,
            world=world,
            evaluation=evaluated.outputs["evaluation"],
            metrics=evaluated.outputs["metrics"],
            bidirectional_record=bidirectional.outputs["record"],
            autoregressive_record=autoregressive.outputs["record"],
            consistency_record=consistency.outputs["record"],
            dmd_record=dmd.outputs["record"],
            version=registered.outputs["Output"],
        )

    return world_model


def compile_pipeline(pipeline: GraphComponent, folder: Path) -> Path:
    """Write the pipeline as YAML for a cluster; the file. Equal pipelines give equal files."""
    folder.mkdir(parents=True, exist_ok=True)
    path, partial = folder / f"{NAME}.yaml", folder / f".{NAME}.{os.getpid()}.yaml"
    compiler.Compiler().compile(pipeline, str(partial))
    os.replace(partial, path)
    return path


def _starting_weights(uri: str, label: str) -> dsl.Model:
    task = dsl.importer(artifact_uri=uri, artifact_class=dsl.Model, reimport=False)
    return task.set_display_name(label).output


def _plain(cluster: Cluster, task: dsl.PipelineTask) -> dsl.PipelineTask:
    return task.set_container_image(cluster.image)


def _keeps(cluster: Cluster, task: dsl.PipelineTask) -> dsl.PipelineTask:
    """A step that writes to the artifact store."""
    return kubernetes.mount_pvc(_plain(cluster, task), pvc_name=cluster.store_claim, mount_path=STORE)


def _trains(cluster: Cluster, task: dsl.PipelineTask) -> dsl.PipelineTask:
    """A step with a training step's resources; torch's workers share tensors through /dev/shm."""
    _plain(cluster, task).set_cpu_limit(cluster.cpu).set_memory_limit(cluster.memory)
    if cluster.accelerators:
        task.set_accelerator_type(cluster.accelerator).set_accelerator_limit(cluster.accelerators)
    return kubernetes.empty_dir_mount(
        task, volume_name="shm", mount_path="/dev/shm", medium="Memory", size_limit=cluster.shared_memory
    )
