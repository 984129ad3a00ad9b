"""Draws the figures: one SVG each, the same for the same figures, readable on light and dark pages."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["draw"]

#: Of middling brightness, told apart by those who see few colours too, and by their marks.
COLOURS = ("#2f7ed8", "#e07b39", "#2a9d73", "#b05cc6", "#c9a227", "#d1495b")
MARKS = ("o", "s", "^", "D", "v", "P")
#: Of text and lines.
INK, GRID = "#808890", "#80889055"

#: Text stays text, and what is random or of the day in an SVG does not change from run to run.
STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "celery-coalesce",
    "font.family": "sans-serif",
    "font.size": 11,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": INK,
    "ytick.color": INK,
}


def draw(figures: Mapping[str, Any], directory: Path) -> None:
    """Write a figure for each result that has an x axis, as ``scale-<name>.svg``.

    Args:
        figures: What :func:`benchmarks.speed.scale.measure` returned.
        directory: Where they go; made if it is not there.

    Raises:
        SystemExit: There is no matplotlib.
    """
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError:
        raise SystemExit("figures are drawn with matplotlib: pip install matplotlib") from None
    directory.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context(STYLE):
        for name, figure in figures.items():
            if "x" in figure:
                drawing = Figure(figsize=(7, 3.8), layout="constrained")
                _plot(drawing.subplots(), figure)
                path = directory / f"scale-{name}.svg"
                drawing.savefig(path, transparent=True, metadata={"Date": None})


def _plot(axes: Any, figure: Mapping[str, Any]) -> None:
    """Draw one figure's series over its sizes."""
    for number, (what, values) in enumerate(figure["series"].items()):
        look = {"color": COLOURS[number % len(COLOURS)], "marker": MARKS[number % len(MARKS)]}
        axes.plot(figure["x"], values, label=what, linewidth=1.8, markersize=5, **look)
    axes.set_xscale("log")
    axes.set_xticks(figure["x"], [f"{size:,}" for size in figure["x"]])
    axes.minorticks_off()
    # Room above the lines: what does not grow lies flat, well above 0.
    axes.set_ylim(0, 1.25 * max(max(values) for values in figure["series"].values()))
    axes.set_xlabel(figure["xlabel"])
    axes.set_ylabel(figure["ylabel"])
    axes.set_title(figure["title"], loc="left", fontsize=12)
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False, fontsize=10)
