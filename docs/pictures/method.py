"""Draws docs/pictures/method.svg: `python docs/pictures/method.py [FILE]`. Schematic: nothing in it is measured."""

import sys
from pathlib import Path

import matplotlib as mpl
import numpy as np

mpl.use("svg")
import matplotlib.pyplot as plt

TRUSTED, MIXED, MODEL, INK = "#2a9d6f", "#7a7a7a", "#3f6fb5", "#1f2933"


def box(ax, x: float, y: float, text: str, colour: str, width: float = 1.9, height: float = 0.8) -> None:
    """A box with a text in it; `x`, `y` is its lower left corner."""
    ax.add_patch(mpl.patches.FancyBboxPatch((x, y), width, height, "round,pad=0.06", fc="white", ec=colour, lw=1.6))
    ax.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=8.5, color=INK)


def arrow(ax, start: tuple[float, float], end: tuple[float, float], colour: str = INK) -> None:
    """From one point to another."""
    style = {"arrowstyle": "-|>", "color": colour, "lw": 1.2, "shrinkA": 3, "shrinkB": 3}
    ax.annotate("", end, start, arrowprops=style)


def draw_flow(ax) -> None:
    """From rows to weights."""
    box(ax, 0, 2.1, "training rows\n(many, mixed)", MIXED)
    box(ax, 0, 0.3, "trusted rows\n(a few dozen)", TRUSTED)
    box(ax, 2.9, 1.2, "hidden states\nlower half of the model", MODEL, 2.5)
    box(ax, 6.4, 2.1, "likeness\nlike trusted rows?", TRUSTED, 2.0)
    box(ax, 6.4, 0.3, "match\nanswer fits question?", MIXED, 2.0)
    box(ax, 9.3, 1.2, "score", INK, 0.9)
    box(ax, 11.0, 1.2, "weight\nmean 1", INK, 0.9)
    box(ax, 12.7, 1.2, "training visits\nrows by weight", MODEL, 1.7)
    arrow(ax, (1.95, 2.4), (2.85, 1.8), MIXED)
    arrow(ax, (1.95, 0.8), (2.85, 1.4), TRUSTED)
    arrow(ax, (5.45, 1.8), (6.35, 2.4))
    arrow(ax, (5.45, 1.4), (6.35, 0.8))
    arrow(ax, (8.45, 2.4), (9.25, 1.8))
    arrow(ax, (8.45, 0.8), (9.25, 1.4))
    arrow(ax, (10.25, 1.6), (10.95, 1.6))
    arrow(ax, (11.95, 1.6), (12.65, 1.6))
    ax.text(7.4, 3.15, "probe: two linear classifiers", ha="center", fontsize=8.5, color=INK, style="italic")
    ax.set(xlim=(-0.2, 14.6), ylim=(-0.1, 3.5))
    ax.axis("off")


def draw_calibration(ax) -> None:
    """How scores become weights."""
    score = np.linspace(-3, 4, 300)

    def bell(centre: float, width: float = 0.8):
        return np.exp(-(((score - centre) / width) ** 2) / 2) / width

    mixture, trusted = 0.6 * bell(-0.8) + 0.4 * bell(1.5), bell(1.5)
    weight = trusted / mixture
    plateau = 1.5 - 0.67 * 0.8
    weight[score > plateau] = weight[np.searchsorted(score, plateau)]
    ax.plot(score, mixture, color=MIXED, label="density of training rows' scores")
    ax.plot(score, trusted, color=TRUSTED, label="of trusted rows' scores, by fits that have not seen them")
    flat = "weight: their ratio, flat from the lower quartile of trusted scores on"
    ax.plot(score, weight / 2, color=MODEL, lw=2, label=flat)
    ax.set(xlabel="score", yticks=[], xticks=[], ylim=(0, 1.95))
    ax.legend(frameon=False, fontsize=8, loc="upper left")
    ax.spines[["top", "right", "left"]].set_visible(False)


def main(target: Path) -> None:
    """Draw both parts into one file."""
    mpl.rcParams.update({"svg.hashsalt": "method", "font.family": "DejaVu Sans", "svg.fonttype": "path"})
    figure, (flow, calibration) = plt.subplots(2, 1, figsize=(9.5, 4.8), height_ratios=[3, 2.4], layout="constrained")
    draw_flow(flow)
    draw_calibration(calibration)
    figure.savefig(target, metadata={"Date": None}, facecolor="white")
    plt.close(figure)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_suffix(".svg"))
