"""How much of the gap between uniform mixing and clean data each way to choose rows recovers, at a glance."""

import statistics
from collections.abc import Mapping
from pathlib import Path

DOCS = Path(__file__).parent.parent / "docs"
TASKS = ("quality", "boilerplate", "truncated", "scrambled", "safety", "truncated_large", "scrambled_large")
# As in the tables of the tasks: what a run of your own does first, then the same with the pilot's steps taken off.
ARMS = (
    "bilevel_on_top",
    "bilevel",
    "lookahead",
    "alignment",
    "dattri",
    "dattri_short",
    "perplexity",
    "seal",
    "loss",
    "seal_two_stage",
    "random_subset",
    "validation_only",
    "clean_only_short",
)
# Of the plot: arms that a user can choose between, and a floor under what is far worse than no choice.
PLOTTED = ("bilevel_on_top", "bilevel", "dattri", "perplexity", "seal", "loss", "seal_two_stage", "random_subset")
FLOOR = -1.0
# What README says of each task.
HEADLINE = {
    "quality": "quality: 3/4 of the answers lazy, swapped or word salad",
    "boilerplate": "boilerplate: half of the answers are one of four sentences",
    "truncated": "truncated: half of the answers stop after a third",
    "scrambled": "scrambled: half of the answers have their words shuffled",
    "safety": "safety: 2/3 of harmful requests complied with; loss of benign rows",
    "truncated_large": "truncated, 1,280 rows",
    "scrambled_large": "scrambled, 1,280 rows",
}
Runs = Mapping[str, Mapping[int, dict]]

TEXT = """## At a glance

Gap recovered, mean of three seeds: 0% is uniform mixing, 100% training on the undamaged rows alone. The tables below
have each seed, their spread, and more arms. `bilevel on top` and `dattri` have the pilot's steps, or as many of
training before gradients are taken, on top of the others' steps, as a user would; in the rows `bilevel`, `lookahead`,
`alignment`, `loss` and `dattri short` they are taken off; `clean only short` is clean data in the steps left. Empty:
not run.

{table}

![Gap recovered, per seed](gap.png)

{reading}
"""


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


def headline(runs: Mapping[str, Runs]) -> str:
    """README's table: losses and gap as in a run of one's own, and with the pilot's steps taken off."""
    head = ["task", "uniform mixing", "bilevel", "clean only (oracle)", "gap recovered, per seed"]
    head += ["the same, pilot's steps taken off", "AUC of weights, per seed"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for task, about in HEADLINE.items():
        arms = runs[task]
        if not {"uniform", "clean_only", "bilevel"} <= arms.keys():
            continue
        own = "bilevel_on_top" if "bilevel_on_top" in arms else "bilevel"
        losses = [
            statistics.mean(run["test_loss"] for run in arms[arm].values()) for arm in ("uniform", own, "clean_only")
        ]
        # Where only the run with the pilot's steps taken off was made, its loss is shown.
        shares = [recovered(arms, arm).values() if arm in arms else () for arm in ("bilevel_on_top", "bilevel")]
        aucs = [run["auc"]["all"] for _, run in sorted(arms["bilevel"].items())]
        cells = [about, *(f"{loss:.3f}" for loss in losses)]
        cells[2] = f"**{cells[2]}**"
        cells += [" / ".join(f"{share:.0%}" for share in each) for each in shares]
        cells.append(" / ".join(f"{auc:.3f}" for auc in aucs))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def section(runs: Mapping[str, Runs], reading: str) -> str:
    """The table; `runs` by task, arm and seed."""
    lines = ["| arm | " + " | ".join(TASKS) + " |", "|---" * (len(TASKS) + 1) + "|"]
    for arm in ARMS:
        shares = [recovered(runs[task], arm).values() for task in TASKS]
        cells = [f"{statistics.mean(each):.0%}" if each else "" for each in shares]
        lines.append(f"| {arm.replace('_', ' ')} | " + " | ".join(cells) + " |")
    return TEXT.format(table="\n".join(lines), reading=reading)


def plot(runs: Mapping[str, Runs]) -> None:
    """`docs/gap.png`: a dot per seed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(TASKS), figsize=(16, 3.4), sharey=True, constrained_layout=True)
    order = list(reversed(PLOTTED))
    for axis, task in zip(axes, TASKS, strict=True):
        for place, arm in enumerate(order):
            shares = list(recovered(runs[task], arm).values())
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
