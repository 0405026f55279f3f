"""Arms of one task side by side: figures, table, plots, the rows at both ends."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..core.statistics import gap_recovered
from ..data.files import write_json
from .experiment import Result
from .tasks import Task, plain


def ranking_quality(weights: Sequence[float], kinds: Sequence[str]) -> dict[str, float]:
    """Area under the ROC curve of the weights, undamaged rows against each kind of damage, and against all of them."""
    from sklearn.metrics import roc_auc_score

    out = {}
    for kind in [*sorted(set(kinds) - {"good"}), "all"]:
        pairs = [(k == "good", w) for k, w in zip(kinds, weights, strict=True) if k in ("good", kind) or kind == "all"]
        out[kind] = float(roc_auc_score([good for good, _ in pairs], [weight for _, weight in pairs]))
    return out


def good_share(weights: Sequence[float], kinds: Sequence[str]) -> float:
    """Share of the total weight that undamaged rows hold."""
    return sum(w for w, k in zip(weights, kinds, strict=True) if k == "good") / sum(weights)


def summarise(results: Sequence[Result], kinds: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Per arm: test loss, share of the gap between uniform mixing and clean-only won back, ranking quality."""
    loss = {result.arm: result.test_loss for result in results}
    out: dict[str, dict[str, Any]] = {}
    for result in results:
        row: dict[str, Any] = {"test_loss": result.test_loss, "seconds": result.seconds}
        if "uniform" in loss and "clean_only" in loss:
            row["gap_recovered"] = gap_recovered(loss["uniform"], result.test_loss, loss["clean_only"])
        if result.weights is not None:
            row["auc"] = ranking_quality(result.weights, kinds)
            row["good_share"] = good_share(result.weights, kinds)
        if result.safety is not None:
            row["safety"] = result.safety
        out[result.arm] = row
    return out


def write_results(folder: Path, results: Sequence[Result], summary: dict[str, Any]) -> None:
    """`results.json` (everything) and `summary.json` (the figures of the table)."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "results.json", results)
    write_json(folder / "summary.json", summary)


def plot(path: Path, results: Sequence[Result], kinds: Sequence[str]) -> None:
    """One PNG: where the weights went, training loss, and test loss of every arm."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(14, 4.2), constrained_layout=True)
    learned = next((result for result in results if result.weights is not None), None)
    if learned is not None and learned.weights is not None:
        names = ["good", *sorted(set(kinds) - {"good"})]
        groups = [[w for w, k in zip(learned.weights, kinds, strict=True) if k == name] for name in names]
        left.boxplot(groups, tick_labels=names, showfliers=True, medianprops={"color": "black"})
        left.axhline(1.0, color="grey", linewidth=0.8, linestyle="--")
        left.set(title="Learned weight by what was done to the row", ylabel="weight (uniform = 1)")
    for result in results:
        points = [(entry["step"], entry["loss"]) for entry in result.history if "loss" in entry]
        middle.plot([s for s, _ in points], [loss for _, loss in points], label=result.arm.replace("_", " "))
    middle.set(title="Training loss (each on its own rows)", xlabel="optimizer step", ylabel="nats per token")
    middle.legend()
    names = [result.arm.replace("_", " ") for result in results]
    values = [result.test_loss for result in results]
    bars = right.barh(names, values, color="tab:blue")
    right.bar_label(bars, fmt=" %.3f")
    spread = max(values) - min(values) or 1.0
    right.set_xlim(min(values) - spread, max(values) + 0.6 * spread)
    right.invert_yaxis()
    right.set(title="Test loss on clean rows (lower is better)", xlabel="nats per token")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def extreme_rows(task: Task, weights: Sequence[float], count: int = 10) -> tuple[list[Any], list[Any]]:
    """The `count` rows of least and of most weight, as `(weight, kind, question, answer)`."""
    order = sorted(range(len(weights)), key=weights.__getitem__)
    rows = [
        (weights[i], task.train[i]["kind"], plain(task.train[i]["prompt"]), plain(task.train[i]["completion"]))
        for i in [*order[:count], *order[-count:][::-1]]
    ]
    return rows[:count], rows[count:]
