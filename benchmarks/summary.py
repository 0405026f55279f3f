"""How much of the gap between uniform mixing and clean data each way to choose rows recovers, at a glance."""

import statistics
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

DOCS = Path(__file__).parent.parent / "docs"
TASKS = ("quality", "boilerplate", "truncated", "scrambled", "safety")
# The default, what a practitioner would try first, and what others publish. The arms of earlier versions come last.
ARMS = (
    "bilevel",
    "bilevel_trusted",
    "trusted_thrice",
    "both",
    "pilot_on_top",
    "pilot",
    "dattri",
    "perplexity",
    "seal",
    "seal_two_stage",
    "random_subset",
    "validation_only",
)
# Of the plot: arms that a user can choose between, and a floor under what is far worse than no choice.
PLOTTED = ("bilevel", "trusted_thrice", "pilot_on_top", "dattri", "perplexity", "seal", "random_subset")
FLOOR = -1.0
# What README says of each task.
HEADLINE = {
    "quality": "quality: 3/4 of the answers lazy, swapped or word salad",
    "boilerplate": "boilerplate: half of the answers are one of four sentences",
    "truncated": "truncated: half of the answers stop after a third",
    "scrambled": "scrambled: half of the answers have their words shuffled",
    "safety": "safety: 2/3 of harmful requests complied with; loss of benign rows",
}
Runs = Mapping[str, Mapping[int, dict]]


def recovered(arms: Runs, arm: str) -> dict[int, float]:
    """Share of the gap in test loss between `uniform` and `clean_only` that an arm recovers, by seed.

    Seeds without both of them, or without a gap, are left out.
    """
    found = {}
    for seed, run in sorted(arms.get(arm, {}).items()):
        ends = [arms.get(other, {}).get(seed) for other in ("uniform", "clean_only")]
        if ends[0] and ends[1] and ends[0]["test_loss"] > ends[1]["test_loss"]:
            gap = ends[0]["test_loss"] - ends[1]["test_loss"]
            found[seed] = (ends[0]["test_loss"] - run["test_loss"]) / gap
    return found


def section(runs: Mapping[str, Runs], mark: Callable[[Iterable[dict]], str]) -> str:
    """The table; `runs` by task, arm and seed; `mark` gives the marks of some results."""
    lines = ["| arm | " + " | ".join(TASKS) + " |", "|---" * (len(TASKS) + 1) + "|"]
    for arm in ARMS:
        shares = [[run["recovered"] for run in runs[task].get(arm, {}).values()] for task in TASKS]
        cells = [f"{statistics.mean(each):.0%} ({len(each)})" if each else "" for each in shares]
        if any(cells):
            marks = mark(run for task in TASKS for run in runs[task].get(arm, {}).values())
            lines.append(f"| {arm.replace('_', ' ')}{marks} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def qualities(runs: Mapping[str, Runs]) -> str:
    """How well the weights of the default tell good rows from damaged ones: AUC of each kind, per seed."""
    lines = ["| task | AUC, per seed | of each kind | weight on good rows |", "|---|---|---|---|"]
    for task, about in HEADLINE.items():
        found = [run for _, run in sorted(runs[task].get("bilevel", {}).items())]
        if not found:
            continue
        every = " / ".join(f"{run['auc']['all']:.3f}" for run in found)
        kinds = [kind for kind in found[0]["auc"] if kind != "all"]
        each = "; ".join(f"{kind} " + " / ".join(f"{run['auc'][kind]:.3f}" for run in found) for kind in kinds)
        shares = " / ".join(f"{run['good_share']:.0%}" for run in found)
        lines.append(f"| {about} | {every} | {each} | {shares} |")
    return "\n".join(lines)


def plot(runs: Mapping[str, Runs]) -> None:
    """`docs/gap.png`: a dot per seed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(TASKS), figsize=(16, 3.4), sharey=True, constrained_layout=True)
    order = list(reversed(PLOTTED))
    for axis, task in zip(axes, TASKS, strict=True):
        for place, arm in enumerate(order):
            shares = [run["recovered"] for run in runs[task].get(arm, {}).values()]
            # What lies below the floor is drawn on it, as an arrow.
            for value in shares:
                marker = "<" if value < FLOOR else "o"
                color = "tab:blue" if arm.startswith("bilevel") else "dimgrey"
                axis.plot(max(value, FLOOR), place, marker, color=color, alpha=0.8)
        for end, style in ((0.0, ":"), (1.0, "-")):
            axis.axvline(end, color="grey", linewidth=0.8, linestyle=style)
        axis.set(title=task, xlim=(FLOOR - 0.1, 1.3), xticks=[-1, 0, 1], xticklabels=["-100%", "0%", "100%"])
    axes[0].set_yticks(range(len(order)), [arm.replace("_", " ") for arm in order])
    figure.savefig(DOCS / "gap.png", dpi=110)
    plt.close(figure)
