"""The charts of a report: what is drawn, and listed as numbers. What they say is in `words.toml`."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup

from ..core.statistics import effective_sample_size, evenly_spaced, rows_carrying
from .findings import CARRIED, WORDS
from .rows import Category
from .run import Run
from .svg import SIZE, Draw, render
from .text import clean, fill

Points = Sequence[tuple[int, float]]
# Rows of a table of numbers; bars of a histogram.
TABLE_ROWS, BINS = 25, 36


class Chart:
    """What is drawn, and the same as rows of numbers.

    Its entry in `words.toml` (`words`, or that of its name) has a title, what it says, and the header of the numbers,
    if that is not given; `facts` fill them in.
    """

    def __init__(
        self,
        name: str,
        section: str,
        draw: Draw,
        rows: list[list[str]],
        facts: dict[str, Any],
        words: str | None = None,
        header: Sequence[str] | None = None,
        size: tuple[float, float] = SIZE,
    ):
        said = WORDS["chart"][words or name]
        self.name, self.section, self.draw, self.rows, self.size = name, section, draw, rows, size
        self.title, self.text = fill(said["title"], facts), fill(said["text"], facts)
        self.header = header or [fill(text, facts) for text in said["header"]]

    @property
    def svg(self) -> Markup:
        """Inline SVG."""
        return render(self.draw, self.name, f"{self.title}. {self.text}", self.size)


def charts(run: Run, categories: Sequence[Category], baseline: Run | None) -> Iterator[Chart]:
    """All charts that the run has numbers for."""
    if len(run.live):
        yield weight_histogram(run.live)
        yield concentration(run.live)
    if run.scores is not None and np.isfinite(run.scores).any():
        yield score_histogram(run.scores[np.isfinite(run.scores)], run.trusted_scores)
    for number, category in enumerate(categories):
        yield category_shares(number, category)
    yield from _losses(run, baseline)
    decided = [e for e in run.ledger if None not in (e.get("incoming_loss"), e.get("trained_loss"))]
    if decided:
        yield rounds_chart(decided, run.ledger)


def weight_histogram(weights: np.ndarray) -> Chart:
    """How many rows have which weight."""
    counts, edges = np.histogram(weights, bins=BINS, range=(0.0, max(1.05, float(weights.max()))))

    def draw(axes: Any, colours: dict[str, str]) -> None:
        axes.stairs(counts, edges, fill=True, color=colours["main"], label="training rows")
        axes.axvline(1.0, color=colours["other"], linestyle="--", linewidth=1.2, label="uniform")
        axes.set(xlabel="weight (the mean is 1)", ylabel="rows", xlim=(0, edges[-1]))
        axes.legend(loc="upper right")

    facts = {"light": (weights < 0.1).mean(), "heavy": (weights > 1).mean()}
    return Chart("weights", "weights", draw, _bins(counts, edges, 2), facts)


def concentration(weights: np.ndarray) -> Chart:
    """Share of the weight that the heaviest rows hold."""
    held = np.concatenate([[0.0], np.cumsum(np.sort(weights)[::-1])])
    held = held / held[-1] if held[-1] > 0 else held
    count = len(weights)
    index = evenly_spaced(count + 1, 201)
    carrying = rows_carrying(weights, CARRIED)

    def draw(axes: Any, colours: dict[str, str]) -> None:
        axes.plot([0, 100], [0, 100], color=colours["other"], linestyle="--", linewidth=1.2, label="uniform")
        axes.fill_between(100 * index / count, 100 * held[index], color=colours["main"], alpha=0.15, linewidth=0)
        axes.plot(100 * index / count, 100 * held[index], color=colours["main"], label="this run")
        x = 100 * carrying / count
        axes.plot([x, x, 0], [0, 100 * CARRIED, 100 * CARRIED], color=colours["muted"], linewidth=0.9, linestyle=":")
        axes.plot([x], [100 * CARRIED], "o", color=colours["main"])
        axes.set(xlabel="rows, heaviest first (%)", ylabel="share of the weight (%)", xlim=(0, 100), ylim=(0, 102))
        axes.legend(loc="lower right")

    facts = {"carrying": carrying, "count": count, "carried": CARRIED, "ess": effective_sample_size(weights)}
    rows = [[f"{s:.0%}", f"{held[round(s * count)]:.1%}"] for s in (0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1)]
    return Chart("concentration", "weights", draw, rows, facts)


def score_histogram(scores: np.ndarray, trusted: np.ndarray) -> Chart:
    """Scores of training rows, and of the trusted rows that were held back."""
    low, high = np.quantile(scores, [0.005, 0.995])
    if len(trusted):
        low, high = min(low, trusted.min()), max(high, trusted.max())
    if high <= low:
        low, high = low - 0.5, high + 0.5
    counts, edges = np.histogram(np.clip(scores, low, high), np.linspace(low, high, BINS + 1))
    top = max(1, counts.max())
    middle = float(np.median(trusted)) if len(trusted) else np.nan

    def draw(axes: Any, colours: dict[str, str]) -> None:
        axes.stairs(counts, edges, fill=True, color=colours["main"], label="training rows")
        if len(trusted):
            axes.plot(
                trusted, np.full(len(trusted), -0.05 * top), "|", color=colours["trusted"], markersize=11,
                markeredgewidth=1.8, label="trusted rows, held back", clip_on=False,
            )  # fmt: skip
            axes.axvline(middle, color=colours["trusted"], linewidth=1.2, linestyle="--")
        axes.set(xlabel="score (higher: training on the row helps the trusted rows more)", ylabel="rows")
        axes.set_ylim(bottom=-0.1 * top if len(trusted) else 0)
        axes.legend(loc="upper left")

    facts = {"scores": scores, "middle": np.median(scores), "trusted": trusted}
    facts |= {"trusted_middle": middle, "reach": (scores >= middle).mean()}
    return Chart("scores", "scores", draw, _bins(counts, edges, 3), facts)


def category_shares(number: int, category: Category) -> Chart:
    """Share of the rows and of the weight, by the values of a column."""
    shares = category.shares
    places = np.arange(len(shares))

    def draw(axes: Any, colours: dict[str, str]) -> None:
        for offset, part, role, label in ((-0.19, "of_rows", "other", "rows"), (0.19, "of_weight", "main", "weight")):
            sizes = 100 * np.array([getattr(share, part) for share in shares])
            axes.barh(places + offset, sizes, 0.36, color=colours[role], label=f"share of the {label}")
        names = [share.value if len(share.value) <= 28 else f"{share.value[:27]}…" for share in shares]
        axes.set_yticks(places, names)
        axes.tick_params(axis="y", length=0, labelcolor=colours["ink"])
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.grid(axis="x")
        axes.set(xlabel="%")
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)

    most, least = (choose(shares, key=lambda share: share.mean) for choose in (max, min))
    facts = {"column": category.column, "most": most, "least": least}
    rows = [[s.value, f"{s.rows:,}", f"{s.of_rows:.1%}", f"{s.of_weight:.1%}", f"{s.mean:.3f}"] for s in shares]
    size = (SIZE[0], 1.2 + 0.32 * len(shares))
    return Chart(f"category_{number}", "categories", draw, rows, facts, words="category", size=size)


def _losses(run: Run, baseline: Run | None) -> Iterator[Chart]:
    for name in ("eval_loss", "validation_loss", "loss"):
        mine, other = (
            [] if r is None else r.validation_points() if name == "validation_loss" else r.points(name)
            for r in (run, baseline)
        )
        if mine:
            lines = {"this run": (mine, "main", "-")} | ({"uniform": (other, "other", "--")} if other else {})
            yield _lines(name, lines, {"mine": mine, "other": other})
    sets = {name: run.validation_points(name) for name in run.told("data", "validation", otherwise={})}
    sets = {clean(name, 40): points for name, points in sets.items() if len(points) > 1}
    if len(sets) > 1:
        roles, styles = ("main", "trusted", "warn", "other"), ("-", "--", ":", "-.")
        lines = {name: (points, roles[n % 4], styles[n // 4 % 4]) for n, (name, points) in enumerate(sets.items())}
        yield _lines("validation_sets", lines, {"sets": sets})


def rounds_chart(decided: Sequence[dict[str, Any]], ledger: Sequence[dict[str, Any]]) -> Chart:
    """Selection loss of both candidates of each round that has them."""
    entries = [(e["round"], e["incoming_loss"], e["trained_loss"], bool(e.get("kept"))) for e in decided]
    places, before, after, kept = (np.array(column) for column in zip(*entries, strict=True))

    def draw(axes: Any, colours: dict[str, str]) -> None:
        axes.plot(places, before, "o", color=colours["other"], label="before")
        ends = ((kept, "trusted", "-", "^", "after, kept"), (~kept, "warn", ":", "x", "after, rolled back"))
        for chosen, role, line, marker, label in ends:
            part = places[chosen], before[chosen], after[chosen]
            axes.vlines(*part, color=colours[role], linewidth=1.5, linestyle=line)
            axes.plot(part[0], part[2], marker, color=colours[role], markersize=8, label=label)
        axes.set_xticks(places[:: max(1, len(places) // 12)])
        axes.ticklabel_format(axis="y", useOffset=False)
        axes.set(xlabel="round", ylabel="selection loss, nats per token")
        axes.margins(x=0.1, y=0.2)
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3)

    rows = [[str(x), f"{a:.4f}", f"{b:.4f}", "kept" if good else "rolled back"] for x, a, b, good in entries]
    facts = {"kept": sum(bool(e.get("kept")) for e in ledger), "rounds": len(ledger)}
    return Chart("rounds", "rounds", draw, rows, facts)


def _lines(name: str, lines: Mapping[str, tuple[Points, str, str]], facts: dict[str, Any]) -> Chart:
    """Losses by optimizer step: of each line its points, the role of its colour, and its style."""

    def draw(axes: Any, colours: dict[str, str]) -> None:
        for label, (points, role, style) in lines.items():
            x, y = zip(*points, strict=True)
            marker = "o" if len(x) < 15 else ""
            axes.plot(x, y, style, color=colours[role], label=label, marker=marker, markersize=4)
        axes.set(xlabel="optimizer step", ylabel="nats per token")
        axes.ticklabel_format(axis="y", useOffset=False)
        axes.xaxis.get_major_locator().set_params(integer=True)
        if len(lines) > 1:
            axes.legend(loc="upper right")

    values = [dict(points) for points, _, _ in lines.values()]
    steps = sorted({step for points in values for step in points})
    shown = [steps[n] for n in evenly_spaced(len(steps), TABLE_ROWS)]
    rows = [[str(step), *(f"{points[step]:.4f}" if step in points else "" for points in values)] for step in shown]
    header = ["Optimizer step", *(f"{label}, nats per token" for label in lines)]
    return Chart(name, "losses", draw, rows, facts, header=header)


def _bins(counts: np.ndarray, edges: np.ndarray, digits: int) -> list[list[str]]:
    """The bars of a histogram that are not empty."""
    bins = zip(counts, edges[:-1], edges[1:], strict=True)
    return [[f"{a:.{digits}f} to {b:.{digits}f}", f"{count:,}"] for count, a, b in bins if count]
