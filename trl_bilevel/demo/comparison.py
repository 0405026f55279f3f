"""Arms of one task side by side: figures, and the rows at both ends."""

from collections.abc import Sequence
from typing import Any

from ..core.statistics import gap_recovered
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


def extreme_rows(task: Task, weights: Sequence[float], count: int = 10) -> list[tuple[str, list[Any]]]:
    """The rows of least and of most weight as `(weight, kind, question, answer)`, under a title each."""
    order = sorted(range(len(weights)), key=weights.__getitem__)
    out = []
    for title, places in (("least", order[:count]), ("most", order[: -count - 1 : -1])):
        rows = [task.train[place] for place in places]
        # The questions differ in their ends: show those.
        lines = [
            (f"{weights[place]:.3f}", row["kind"], f"...{plain(row['prompt'])[-27:]}", plain(row["completion"]))
            for place, row in zip(places, rows, strict=True)
        ]
        out.append((f"Ten rows of {title} weight", lines))
    return out
