"""`minwm models list` and `minwm models describe`."""

import pytest
import torch
import typer
from typer.testing import CliRunner

from minwm.errors import ConfigError
from minwm.models import preset_commands
from minwm.models.costs import parameters
from minwm.models.presets import preset, preset_names

pytestmark = pytest.mark.unit


def run(*arguments: str) -> str:
    """What a terminal of 80 columns shows. Raises what the command raises."""
    app = typer.Typer()
    preset_commands.register(app)
    result = CliRunner(env={"COLUMNS": "80"}).invoke(app, ["models", *arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def figures(output: str) -> dict[str, str]:
    """Left and right column of a table."""
    cells = ([cell.strip() for cell in line.strip("│").split("│")] for line in output.splitlines() if "│" in line)
    return {row[0]: row[1] for row in cells}


def value(figure: str) -> float:
    """A number with its unit, in bytes, FLOP or seconds."""
    scale = {"kB": 1e3, "MB": 1e6, "GB": 1e9, "GFLOP": 1e9, "TFLOP": 1e12}
    number, unit = figure.split()[:2]
    return float(number.replace(",", "")) * scale.get(unit, 1)


def test_every_preset_is_listed_with_its_size_and_its_conditions() -> None:
    shown = run("list").split()
    places = [shown.index(name) for name in preset_names()]
    for name, place, end in zip(preset_names(), places, [*places[1:], None], strict=True):
        entry, architecture = shown[place:end], preset(name).architecture
        assert entry[1:3] == [f"{parameters(architecture) / 1e6:,.1f}", "M"]
        assert set(architecture.conditions or ("none",)) <= set(entry)
    assert "…" not in "".join(shown), "a column is cut"


def test_the_doom_preset_is_described_as_it_runs() -> None:
    shown = figures(run("describe", "wan-doom"))
    config = preset("wan-doom")
    cache = config.architecture.cache_geometry(12, 16, config.history).bytes(torch.bfloat16)
    assert shown["a session's key/value cache"] == f"{cache / 1e6:.1f} MB"
    assert shown["weights"] == "23.0 MB"
    assert shown["window"] == "16 latent frames of 48 tokens"
    assert shown["a chunk"] == "2 latent frames, 8 frames"


def test_memory_follows_precision_and_window_and_flops_follow_steps() -> None:
    shape = ("describe", "minwm-wan2.1-1.3b", "--height", "96", "--width", "160")
    usual = figures(run(*shape))
    assert usual["weights"] == "3.0 GB"
    wide = figures(run(*shape, "--dtype", "float32", "--window", "40", "--steps", "9"))
    assert wide["weights"] == "6.0 GB"
    for row, times in (("a session's key/value cache", 4), ("a session's prompt", 2)):
        assert value(wide[row]) == pytest.approx(times * value(usual[row]), rel=0.02), row
    assert wide["window"] == "40 latent frames of 60 tokens"
    assert value(wide["a chunk, 9 + 1 forwards"]) == pytest.approx(10 * value(wide["a forward, full window"]), rel=0.02)


def test_speed_is_told_for_a_device_that_is_named_by_its_flops() -> None:
    shown = figures(run("describe", "minwm-wan2.1-1.3b", "--tflops", "500"))
    chunk = value(shown["a chunk, 4 + 1 forwards"])
    seconds, rate = (value(part) for part in shown["at 500 TFLOP/s"].split(", "))
    assert seconds == pytest.approx(chunk / 500e12, rel=0.01)
    assert rate == pytest.approx(16 / seconds, rel=0.01)


def test_a_preset_that_cannot_stream_says_so() -> None:
    assert "can't stream as it is" in run("describe", "hunyuanvideo-1.5-8b")
    assert "can't stream" not in run("describe", "hy-worldplay-8b")


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_can_be_described(name: str) -> None:
    assert name in run("describe", name)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("wan-dom",), "preset 'wan-dom': unknown, expected one of wan-doom"),
        (("wan-doom", "--height", "100"), "height=100: expected a positive multiple of 16 pixels"),
        (("hy-worldplay-8b", "--width", "840"), "width=840: expected a positive multiple of 16 pixels"),
        (("wan-doom", "--height", "0"), "height=0: expected a positive multiple of 16 pixels"),
        (("wan-doom", "--window", "1"), "window=1, sink=0: expected 1 <= chunk <= window"),
        (("wan-doom", "--tflops", "0"), "--tflops=0: expected a positive number"),
    ],
)
def test_what_does_not_fit_is_refused(arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run("describe", *arguments)
