"""Line plots as SVG, to be read on light and dark pages alike."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

_INK = "#767676"  # grey is read on both
_HUES = ("#3b82c4", "#d9822b", "#4c9f70", "#9a6fc4")
_MARKED = 40  # points up to which each is marked
_BESIDE = 24  # letters up to which two names fit beside each other

Line = tuple[str, Any, Any]
"""Name, x, y."""


@dataclass(frozen=True)
class Axes:
    """One plot. band: bounds of y that are shaded."""

    x_label: str
    y_label: str
    lines: Sequence[Line]
    band: tuple[float, float] | None = None


def plot(name: str, axes: Sequence[Axes]) -> str:
    """An SVG of plots below each other; `name` makes its inner identifiers its own."""
    import matplotlib as mpl  # takes a second, and only pages draw
    from matplotlib.figure import Figure

    settings: dict[Any, Any] = dict.fromkeys(
        ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), _INK
    )
    settings |= {"svg.fonttype": "none", "svg.hashsalt": name, "font.size": 9, "font.family": "sans-serif"}
    buffer = io.StringIO()
    with mpl.rc_context(settings):
        figure = Figure(figsize=(4.2, 2.1 * len(axes)), layout="constrained")
        for place, one in enumerate(axes):
            _draw(figure.add_subplot(len(axes), 1, place + 1), one)
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return buffer.getvalue()


def _draw(area: Any, axes: Axes) -> None:
    for hue, (label, x, y) in zip(_HUES, axes.lines, strict=False):
        area.plot(x, y, color=hue, label=label, linewidth=1.4, marker="." if len(x) < _MARKED else "")
    if axes.band is not None:
        area.axhspan(*axes.band, color=_INK, alpha=0.15, linewidth=0)
    area.set_xlabel(axes.x_label)
    area.set_ylabel(axes.y_label)
    area.spines[["top", "right"]].set_visible(False)
    area.patch.set_visible(False)
    if len(axes.lines) > 1:
        columns = 2 if max(len(label) for label, *_ in axes.lines) <= _BESIDE else 1
        area.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=columns)
