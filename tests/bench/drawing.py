"""How all pictures are drawn: a plain style, colours for every eye, bands of one deviation, files."""

import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

# Colours that colour-blind readers can distinguish. Source: Okabe and Ito (2008).
BLUE = "#0072B2"
RED = "#D55E00"
GREEN = "#009E73"
PINK = "#CC79A7"


def new_figure(width: float, height: float, n_panels: int = 1) -> tuple:
    """An empty figure, with its size in inches, and its panel or an array of panels."""
    from matplotlib.figure import Figure  # here because the tables do not need it

    figure = Figure(figsize=(width, height))
    return figure, figure.subplots(1, n_panels)


def draw_band(
    axes, x: Sequence, rows: list, label: str, color: str, linestyle: str = "-", marker: str = ""
) -> None:
    """Draw the means of rows (one row per run), with a band of one standard deviation."""
    columns = list(zip(*rows, strict=True))
    means = [statistics.mean(column) for column in columns]
    axes.plot(x, means, color=color, label=label, linestyle=linestyle, marker=marker)
    if len(rows) > 1:
        deviations = [statistics.stdev(column) for column in columns]
        low = [mean - deviation for mean, deviation in zip(means, deviations, strict=True)]
        high = [mean + deviation for mean, deviation in zip(means, deviations, strict=True)]
        axes.fill_between(x, low, high, color=color, alpha=0.2)


def add_legend(axes, **options) -> None:
    """Add a legend if there are any lines."""
    if axes.get_legend_handles_labels()[0]:
        axes.legend(**options)


def add_plain_style() -> bool:
    """Set the style of all figures. False, with advice, if matplotlib is missing."""
    try:
        import matplotlib
    except ImportError:
        advice = "For pictures: pip install matplotlib, and the same command again"
        print(f"\n{advice}", file=sys.stderr)
        return False
    matplotlib.rcParams["font.size"] = 13
    matplotlib.rcParams["lines.linewidth"] = 2
    matplotlib.rcParams["axes.spines.top"] = False
    matplotlib.rcParams["axes.spines.right"] = False
    matplotlib.rcParams["svg.hashsalt"] = "dpo-st"  # otherwise its ids change each time
    return True


def save_figures(figures: dict, out: Path) -> None:
    """Write figures as PNG and SVG; the same runs give the same SVG, byte for byte."""
    out.mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        figure.tight_layout()
        figure.savefig(out / f"{name}.png", dpi=150)
        figure.savefig(out / f"{name}.svg", metadata={"Date": None})
    print(f"\nPictures in {out}: {', '.join(figures)}")
