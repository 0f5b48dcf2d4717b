"""The page of one evaluation: figures, curves and videos, beside the folder that `evaluate` wrote.

One file without scripts or outside requests, in light and dark; it shows what lies in the folder. What was not measured
says so.
"""

import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from jinja2 import ChainableUndefined, Environment, PackageLoader

from minwm.evaluation.plots import Axes, plot

_LABELS = {"psnr": "PSNR, dB", "ssim": "SSIM", "perceptual": "perceptual distance"}


def write_page(path: Path, result: Mapping[str, Any], media: Path) -> None:
    """Write the page of what `evaluate` found to `path`; its plots go to `media`, where it left its pictures.

    `media` lies beside the page.
    """
    plots = {}
    for name, axes in _plots(result).items():
        (media / f"{name}.svg").write_text(plot(name, [axes]))
        plots[name] = f"{name}.svg"
    html = render("evaluation.html.j2", media=quote(media.name), plots=plots, hardware=hardware(), **result)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(html)
    os.replace(partial, path)


def render(template: str, **content: Any) -> str:
    """A template of this package filled in; what a mapping lacks is undefined in it too, and shown as not measured."""
    environment = Environment(
        loader=PackageLoader("minwm.evaluation"), autoescape=True, undefined=ChainableUndefined, trim_blocks=True
    )
    return environment.get_template(template).render(**content)


def curve_axes(measure: str, table: Mapping[str, Any], fps: float) -> Axes:
    """A measure's curves by source, over the time since the last given frame."""
    return Axes(
        "seconds after the last given frame",
        _LABELS[measure],
        [
            (source.replace("_", " "), (np.arange(len(curve)) + 1) / fps, curve)
            for source, curve in table["per_frame"].items()
        ],
    )


def hardware() -> dict[str, str]:
    """This machine: `cpu`, `cores` (those this process may use), `memory`; what /proc does not tell is absent."""
    found = {"cores": str(len(os.sched_getaffinity(0))), "system": f"{platform.system()} {platform.machine()}"}
    for path, key, name in (("/proc/cpuinfo", "model name", "cpu"), ("/proc/meminfo", "MemTotal", "memory")):
        if Path(path).is_file():
            rows = (line.partition(":") for line in Path(path).read_text().splitlines())
            values = [value.strip() for label, _, value in rows if label.strip() == key]
            found |= {name: values[0]} if values else {}
    if "memory" in found:
        found["memory"] = f"{int(found['memory'].removesuffix(' kB')) / 2**20:.1f} GiB"
    return found


def _plots(result: Mapping[str, Any]) -> dict[str, Axes]:
    """Everything drawn, by the name of its file."""
    fps, walks = result["world"]["fps"], result["long"]
    quality = result["quality"]
    axes = {measure: curve_axes(measure, quality[measure], fps) for measure in _LABELS if measure in quality}
    for name, curve in walks.get("per_second", {}).items():
        low, high = walks["range"][name]
        axes[name] = Axes("second", name, [("generated", np.arange(len(curve)) + 0.5, curve)], (low, high))
    if walks:
        shares = walks["in_range_per_second"]
        axes["in-range"] = Axes("second", "frames in range", [("generated", np.arange(len(shares)) + 0.5, shares)])
    return axes
