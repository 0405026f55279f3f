"""Cost against reliability, estimator by estimator: a table and plots from the results of the other benchmarks."""

import json
from collections.abc import Mapping
from pathlib import Path

HERE = Path(__file__).parent
DOCS = HERE.parent / "docs"
TASKS = ("quality", "boilerplate", "truncated", "scrambled", "safety")
# Estimator: arm of the experiments, pilots of `benchmarks.estimators`, line of the counted cost.
ESTIMATORS = {
    "value_function": ("bilevel", "value_function", "balanced"),
    "lookahead": ("lookahead", "lookahead, K = 12", "balanced, lookahead"),
    "alignment": ("alignment", "alignment", "balanced, alignment"),
    "loss": ("loss", "", None),
}
AT = 10_000
Runs = Mapping[str, Mapping[str, Mapping[int, dict]]]

TEXT = """## Cost against reliability

Each estimator in the default way of use (a pilot run, calibrated weights): FLOPs of a two-epoch run over {at:,} rows
against `SFTTrainer`'s (counted, see below), and AUC of its weights on every task, per seed; on the quality task also
that of the kind of damage that it sees worst. `loss` is the published score. Empty: not run. In brackets: of a pilot
run alone. `python -m benchmarks.run quality boilerplate truncated scrambled safety; python -m benchmarks.estimators`

{table}

![Cost against reliability](cost_reliability.png)
"""


def line_through(counts: Mapping[str, int]) -> tuple[float, float]:
    """Constant and slope of a cost by number of rows, from the smallest and the largest counted."""
    low, high = min(counts, key=int), max(counts, key=int)
    slope = (counts[high] - counts[low]) / (int(high) - int(low))
    return counts[low] - slope * int(low), slope


def cost_ratio(flops: Mapping[str, Mapping[str, int]], name: str | None, rows: int) -> float | None:
    """FLOPs of a run over `rows` rows, as a multiple of `SFTTrainer`'s; None if it was not counted."""
    if len(flops.get(name or "", {})) < 2:
        return None
    (fixed, slope), (plain, plain_slope) = line_through(flops[name]), line_through(flops["SFTTrainer"])
    return (fixed + slope * rows) / (plain + plain_slope * rows)


def counted() -> dict[str, dict[str, int]]:
    file = HERE / "results" / "cost.json"
    return json.loads(file.read_text())["flops"] if file.exists() else {}


def auc(run: dict) -> tuple[float, float]:
    """Of the weights over all damaged rows, and over the kind of damage that they see worst."""
    kinds = run["auc"]
    return kinds["all"], min(value for kind, value in kinds.items() if kind != "all")


def found(runs: Runs, task: str, name: str) -> dict[int, tuple[dict, bool]]:
    """Results of an estimator by seed, and whether they are of a whole run."""
    arm, setting, _ = ESTIMATORS[name]
    out: dict[int, tuple[dict, bool]] = {}
    for file in (HERE / "results" / "estimators").glob(f"{task}-{setting}-seed*.json"):
        record = json.loads(file.read_text())
        out[record["seed"]] = (record, False)
    out |= {seed: (run, True) for seed, run in runs[task].get(arm, {}).items()}
    return dict(sorted(out.items()))


def table(runs: Runs) -> str:
    """Estimators by task; `runs` by task, arm and seed."""
    head = ["estimator", "FLOPs", *(f"{task}" for task in TASKS), "quality, worst kind"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for name, (_, _, setting) in ESTIMATORS.items():
        ratio = cost_ratio(counted(), setting, AT)
        cells = [name, "" if ratio is None else f"{ratio:.3f}x"]
        for task, kind in [*((task, 0) for task in TASKS), ("quality", 1)]:
            values = [(auc(run)[kind], whole) for run, whole in found(runs, task, name).values()]
            cells.append(" / ".join(f"{value:.3f}" if whole else f"({value:.3f})" for value, whole in values))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def section(runs: Runs) -> str:
    """The table with what it shows."""
    return TEXT.format(at=AT, table=table(runs))


def plots(runs: Runs) -> None:
    """`docs/cost_reliability.png`, `docs/cost_rows.png`."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(TASKS), figsize=(15, 3.2), sharey=True, constrained_layout=True)
    for axis, task in zip(axes, TASKS, strict=True):
        for marker, (name, (_, _, setting)) in zip("osD^", ESTIMATORS.items(), strict=True):
            ratio = cost_ratio(counted(), setting, AT)
            values = [auc(run)[0] for run, _ in found(runs, task, name).values()]
            if ratio is not None and values:
                axis.plot([ratio] * len(values), values, marker, label=name, alpha=0.8)
        axis.axhline(0.5, color="grey", linewidth=0.8, linestyle=":")
        axis.set(title=task, xlabel=f"FLOPs at {AT:,} rows (SFT = 1)", ylim=(0.4, 1.02), xlim=(1.0, 1.12))
    axes[0].set_ylabel("AUC of weights, per seed")
    axes[0].legend()
    figure.savefig(DOCS / "cost_reliability.png", dpi=110)
    plt.close(figure)

    figure, axis = plt.subplots(figsize=(6, 3.6), constrained_layout=True)
    sizes = [round(10 ** (3 + step / 8)) for step in range(33)]
    for name in ("reliable", "balanced", "fast"):
        if name in counted():
            axis.plot(sizes, [cost_ratio(counted(), name, size) for size in sizes], label=name)
    axis.axhline(1.1, color="grey", linewidth=0.8, linestyle=":")
    axis.set(xscale="log", xlabel="training rows", ylabel="FLOPs of a run (SFT = 1)")
    axis.legend()
    figure.savefig(DOCS / "cost_rows.png", dpi=110)
    plt.close(figure)
