"""The compiled pipeline: what a cluster is handed."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

from minwm.errors import ConfigError
from minwm_pipelines.pipeline import Cluster, compile_pipeline, make_pipeline
from minwm_pipelines.recipes import STAGES, load_recipes

pytestmark = pytest.mark.unit

RECIPES = load_recipes(Path(__file__).parents[3] / "recipes/doom/demo")


def compiled(folder: Path, cluster: Cluster) -> tuple[dict[str, Any], dict[str, Any]]:
    """The pipeline's specification, and what Kubernetes is told beside it."""
    spec, platform = yaml.safe_load_all(compile_pipeline(make_pipeline(RECIPES, cluster), folder).read_text())
    return spec, platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]


def containers(spec: dict[str, Any]) -> dict[str, Any]:
    executors = spec["deploymentSpec"]["executors"].items()
    return {
        name.removeprefix("exec-"): executor["container"] for name, executor in executors if "container" in executor
    }


def test_compiling_twice_gives_equal_files(tmp_path: Path) -> None:
    first = compile_pipeline(make_pipeline(RECIPES, Cluster()), tmp_path / "first")
    second = compile_pipeline(make_pipeline(RECIPES, Cluster()), tmp_path / "second")
    assert first.read_bytes() == second.read_bytes()
    assert [path.name for path in first.parent.iterdir()] == ["world-model.yaml"]


def test_each_stage_starts_from_the_weights_of_the_one_before(tmp_path: Path) -> None:
    spec, _ = compiled(tmp_path, Cluster())
    tasks = spec["root"]["dag"]["tasks"]
    trained = {task["taskInfo"]["name"]: name for name, task in tasks.items() if name.startswith("train-stage")}
    assert tuple(trained) == STAGES

    def source(task: str, artifact: str) -> str:
        return str(tasks[task]["inputs"]["artifacts"][artifact]["taskOutputArtifact"]["producerTask"])

    assert tasks[source(trained["bidirectional"], "backbone")]["taskInfo"]["name"] == "base"
    for before, stage in pairwise(STAGES):
        assert source(trained[stage], "backbone") == trained[before]
    assert source(trained["dmd"], "score") == trained["bidirectional"]
    assert source("assemble-world", "backbone") == trained["dmd"]


def test_nothing_is_registered_before_it_is_evaluated(tmp_path: Path) -> None:
    spec, _ = compiled(tmp_path, Cluster())
    assert "evaluate-world" in spec["root"]["dag"]["tasks"]["register-model"]["dependentTasks"]


def test_every_component_runs_in_the_given_image_and_installs_nothing(tmp_path: Path) -> None:
    spec, _ = compiled(tmp_path, Cluster(image="registry.example/minwm:7"))
    assert len(containers(spec)) == 8
    for name, container in containers(spec).items():
        assert container["image"] == "registry.example/minwm:7", name
        assert "pip install" not in " ".join(container["command"]), name


def test_training_gets_the_clusters_resources_and_shared_memory(tmp_path: Path) -> None:
    cluster = Cluster(cpu="6", memory="20Gi", shared_memory="3Gi", accelerators=2)
    spec, kubernetes = compiled(tmp_path, cluster)
    for name, container in containers(spec).items():
        if not name.startswith("train-stage"):
            assert "resources" not in container, name
            continue
        resources = container["resources"]
        assert (resources["resourceCpuLimit"], resources["resourceMemoryLimit"]) == ("6", "20Gi")
        assert resources["accelerator"]["resourceType"] == "nvidia.com/gpu"
        assert resources["accelerator"]["resourceCount"] == "2"
        (mount,) = kubernetes[f"exec-{name}"]["emptyDirMounts"]
        assert (mount["mountPath"], mount["medium"], mount["sizeLimit"]) == ("/dev/shm", "Memory", "3Gi")


def test_no_accelerator_is_asked_for_where_there_is_none(tmp_path: Path) -> None:
    spec, _ = compiled(tmp_path, Cluster(accelerators=0))
    assert all("accelerator" not in container.get("resources", {}) for container in containers(spec).values())


def test_what_writes_to_the_store_has_its_volume(tmp_path: Path) -> None:
    _, kubernetes = compiled(tmp_path, Cluster(store_claim="claim"))
    mounted = {name for name, settings in kubernetes.items() if "pvcMount" in settings}
    assert mounted == {"exec-make-dataset", "exec-register-model"}
    for name in mounted:
        (mount,) = kubernetes[name]["pvcMount"]
        assert (mount["constant"], mount["mountPath"]) == ("claim", "/store")


def test_recipes_are_the_parameters_defaults(tmp_path: Path) -> None:
    spec, _ = compiled(tmp_path, Cluster())
    parameters = spec["root"]["inputDefinitions"]["parameters"]
    for name, text in RECIPES.items():
        assert parameters[f"{name}_recipe"]["defaultValue"] == text
    assert {name for name, parameter in parameters.items() if not parameter.get("isOptional")} == {
        "autoencoder",
        "base",
    }


def test_a_negative_number_of_accelerators_is_refused() -> None:
    with pytest.raises(ConfigError, match="accelerators: -1, expected 0 or more"):
        Cluster(accelerators=-1)
