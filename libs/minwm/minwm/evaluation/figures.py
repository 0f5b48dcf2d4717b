"""The figures of an evaluation that decisions are taken on: by name, each with its value and the clips behind it.

A figure that was not measured has the value null and says why. Names end in the seconds at which, or in which, they
hold; directions are shares of chunks, errors are per latent frame.
"""

from collections.abc import Iterator, Mapping
from typing import Any

Figure = dict[str, Any]
"""`value`, with `clips` (`chunks` too where these count) or `rounds` of timing; or null and `missing`, the reason."""

ALWAYS = {
    "turn_direction": "needs a judge",
    "move_direction": "needs a judge",
    "rotation_error_deg": "needs a judge",
    "estimator_rotation_error_deg": "needs a judge",
    "psnr_1s": "needs rollouts of a second",
    "psnr_1s_repeat_last": "needs rollouts of a second",
    "in_range_60s": "needs long walks of 60 s",
    "fewstep_over_teacher": "needs a judge, and the teacher or its record",
}


def figures(result: Mapping[str, Any]) -> dict[str, Figure]:
    """Every figure of what `evaluate` found, those of ALWAYS first."""
    found = dict([*_controllability(result), *_quality(result), *_long(result), *_speed(result)])
    absent = {name: {"value": None, "clips": 0, "missing": reason} for name, reason in ALWAYS.items()}
    return {**absent, **found}


def metrics(result: Mapping[str, Any]) -> dict[str, float]:
    """The measured figures and the control margin, flat, as the registry keeps them."""
    control = result["control"]
    measured = {name: figure["value"] for name, figure in result["figures"].items() if figure["value"] is not None}
    return {"control_margin": control["margin"], "control_margin_error": control["standard_error"], **measured}


def _controllability(result: Mapping[str, Any]) -> Iterator[tuple[str, Figure]]:
    found = result["controllability"]
    for source, prefix in (("generated", ""), ("real", "estimator_")):
        if found:
            yield from _directions(prefix, "", found[source]["directions"], found["clips"])
            for name in ("rotation_error_deg", "relative_rotation_error", "translation_error"):
                if found[source][name] is not None:
                    yield prefix + name, {"value": found[source][name], "clips": found["clips"]}


def _quality(result: Mapping[str, Any]) -> Iterator[tuple[str, Figure]]:
    quality, clips = result["quality"], len(result["clips"])
    for measure in ("psnr", "ssim", "perceptual"):
        for row in quality.get(measure, {}).get("at", ()):
            for source, value in row.items():
                if source != "seconds":
                    yield f"{measure}_{row['seconds']:g}s{_suffix(source)}", {"value": value, "clips": clips}
    yield from _frechet(quality["frechet"], ("generated", "repeat_last", "autoencoder"))
    beside = result["teacher"]
    if beside and beside["frechet"]:
        yield from _frechet(beside["frechet"], ("teacher",))
        yield "fewstep_over_teacher", {"value": beside["fewstep_over_teacher"], "clips": beside["clips"]}


def _frechet(table: Mapping[str, Any], sources: tuple[str, ...]) -> Iterator[tuple[str, Figure]]:
    for source in sources if table else ():
        name = f"frechet_{table['seconds']:.2g}s{_suffix(source)}"
        yield name, {"value": table[source], "clips": table["clips"]}


def _long(result: Mapping[str, Any]) -> Iterator[tuple[str, Figure]]:
    found = result["long"]
    if not found:
        return
    low, high = found["sections"]["last"]
    shares, clips = found["in_range"], found["clips"]
    yield f"in_range_{found['seconds']:g}s", {"value": shares["all"], "clips": clips}
    yield f"in_range_{low:g}_{high:g}s", {"value": shares["last"], "clips": clips}
    yield "in_range_real", {"value": shares["real"], "clips": len(result["clips"])}
    seen = ("", found["directions"], clips), ("estimator_", found["true_directions"], clips - found["scripted"])
    for prefix, sections, behind in seen:
        for section, directions in sections.items():
            low, high = found["sections"][section]
            yield from _directions(prefix, f"_{low:g}_{high:g}s", directions, behind)


def _speed(result: Mapping[str, Any]) -> Iterator[tuple[str, Figure]]:
    found = result["speed"]
    for way in found.get("ways", ()):
        for name in ("first_frame_seconds", "frames_per_second"):
            yield f"{name}_{way['name']}", {"value": way[name], "rounds": found["rounds"]}
    if found:
        yield "bidirectional_over_ours", {"value": found["bidirectional_over_ours"], "rounds": found["rounds"]}


def _directions(prefix: str, suffix: str, directions: Mapping[str, Any], clips: int) -> Iterator[tuple[str, Figure]]:
    for kind in ("turn", "move"):
        share = directions[kind]
        if share["chunks"]:
            yield f"{prefix}{kind}_direction{suffix}", {**share, "clips": clips}


def _suffix(source: str) -> str:
    return "" if source == "generated" else f"_{source}"
