"""Write `docs/results.md`, `docs/runs.md` and their plots from the JSON files in `benchmarks/results`.

python -m benchmarks.report
"""

import json
import statistics
from collections.abc import Iterable
from pathlib import Path

from scipy.stats import t as student

from benchmarks import scale, summary
from benchmarks.ablations import SETTINGS as ABLATIONS
from benchmarks.jobs import is_older
from benchmarks.texts import ABOUT, INTRODUCTION, LARGE, READING, REFINE, ROUNDS, RUNS, SMALL, TRUSTED

HERE = Path(__file__).parent
DOCS = HERE.parent / "docs"


def load(name: str, folder: str = "") -> dict[str, dict[int, dict]]:
    """Results of an experiment by arm and seed; with a folder, those made on another machine."""
    arms: dict[str, dict[int, dict]] = {}
    for file in sorted((HERE / "results" / folder / name).glob("*.json")):
        record = json.loads(file.read_text())
        arms.setdefault(record["arm"], {})[record["seed"]] = record
    return arms


def shown(name: str) -> dict[str, dict[int, dict]]:
    """Results of an experiment by arm and seed, each with the gap `recovered`: of today's default where there are any,
    else made on a GPU, else on a CPU. Both ends of the gap are of the same machine, where that has them."""
    machines = {folder: load(name, folder) for folder in ("cpu", "")}
    out: dict[str, dict[int, dict]] = {}
    for arm in sorted({*machines["cpu"], *machines[""]}):
        able = [folder for folder in machines if arm in machines[folder]]
        new = [folder for folder in able if not any(map(is_older, machines[folder][arm].values()))]
        # Results of arms that do not choose by the default never grow old: those of the GPU are more.
        learned = any("good_share" in run for folder in able for run in machines[folder][arm].values())
        folder = (new or able)[0] if learned else able[-1]
        runs, own = machines[folder][arm], machines[folder]
        ends = {end: own.get(end) or machines[""].get(end, {}) for end in ("uniform", "clean_only")}
        gaps = summary.recovered(ends | {arm: runs}, arm)
        out[arm] = {seed: run | {"recovered": gaps[seed]} for seed, run in runs.items() if seed in gaps}
    return out


def marks(records: Iterable[dict]) -> str:
    """† if any of the results has weights that the defaults do not give any more, ‡ if any was made on a CPU."""
    found = list(records)
    on_cpu = any("gpu" not in record.get("machine", {}) for record in found)
    return (" †" if any(map(is_older, found)) else "") + (" ‡" if on_cpu else "")


def mean(values: list[float], digits: int = 3) -> str:
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def per_seed(values: list[float], form: str) -> str:
    return " / ".join(format(value, form) for value in values)


def with_interval(values: list[float], digits: int = 0) -> str:
    """Shares per seed; of three or more also their mean with its 95% interval (Student's t over the seeds)."""
    cell = per_seed(values, f".{digits}%")
    if len(values) < 3 or statistics.stdev(values) == 0:
        return cell
    half = float(student.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / len(values) ** 0.5
    return f"{cell} (mean {statistics.mean(values):.{digits}%} ± {half:.{digits}%})"


def table(name: str, arms: dict[str, dict[int, dict]]) -> list[str]:
    file = HERE / "experiments" / f"{name}.json"
    experiment = json.loads(file.read_text()) if file.exists() else {"arms": []}
    every = [*experiment["arms"], *experiment.get("variants", {}), *experiment.get("budgets", {})]
    # What is gone comes last: its results stay.
    order = [arm for arm in every if arm in arms] + [arm for arm in arms if arm not in every]
    safety = any(record["safety"] for runs in arms.values() for record in runs.values())
    head = ["arm", "seeds", "test loss", "gap recovered", "AUC of weights", "weight on good rows", "steps + pilot"]
    if safety:
        head += [
            "benign loss over clean only",
            "greedy refusal",
            "refusal preferred",
            "over-refusal",
            "rounds kept",
            "seconds",
        ]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for arm in order:
        runs = dict(sorted(arms[arm].items()))
        losses = {seed: run["test_loss"] for seed, run in runs.items()}
        gaps = {} if arm == "base" else summary.recovered(arms, arm)
        auc = ""
        found = [run.get("auc") or run.get("influence_auc") for run in runs.values()]
        if all(found):
            kinds = found[0] if len(found[0]) > 2 else {"all": 0}
            auc = "; ".join(f"{kind} {per_seed([one[kind] for one in found], '.3f')}" for kind in kinds)
        share = [run["good_share"] for run in runs.values() if run.get("good_share") is not None]
        row = [
            arm.replace("_", " ") + ("" if arm in every else " (gone)") + marks(runs.values()),
            ", ".join(map(str, runs)),
            mean(list(losses.values())),
            # A seed without a gap is told, so that the others stay in their places.
            with_interval(list(gaps.values()))
            if len(gaps) == len(losses) or not gaps
            else " / ".join(f"{gaps[seed]:.0%}" if seed in gaps else "no gap" for seed in losses),
            auc,
            per_seed(share, ".0%"),
            "{train_steps} + {pilot_steps}".format(**next(iter(runs.values()))),
        ]
        if safety:
            clean = arms.get("clean_only", {})
            over = [loss / clean[seed]["test_loss"] - 1 for seed, loss in losses.items() if seed in clean]
            row.append(with_interval(over, 1) if arm != "base" else "")
            for key in ("greedy_refusal", "refusal_preferred", "over_refusal"):
                row.append(per_seed([run["safety"][key] for run in runs.values()], ".0%"))
            ledgers = [run["ledger"] for run in runs.values() if run.get("ledger")]
            row.append(" / ".join(f"{sum(e['kept'] for e in ledger)} of {len(ledger)}" for ledger in ledgers))
            row.append(per_seed([run["seconds"] for run in runs.values()], ".0f"))
        lines.append("| " + " | ".join(row) + " |")
    return lines


def about_rounds(arms: dict[str, dict[int, dict]]) -> str:
    ledgers = [run["ledger"] for runs in arms.values() for run in runs.values() if run.get("ledger")]
    entries = [entry for ledger in ledgers for entry in ledger]
    sample = next(iter(arms["refine"].values()))
    offline = sample["train_steps"] - sample["ledger"][-1]["step"]
    kept = f"{sum(entry['kept'] for entry in entries)} of {len(entries)}"
    return REFINE.format(offline=offline, kept=kept) + "\n"


def large_table(estimators: list[str]) -> str:
    """Quality of the weights of thousands of rows."""
    files = sorted((HERE / "results" / "large").glob("*.json"))
    records = [record for record in (json.loads(file.read_text()) for file in files) if "auc" in record]
    groups: dict[tuple[str, int, int], list[dict]] = {}
    for record in sorted(records, key=lambda record: record["seed"]):
        if record["estimator"] in estimators:
            key = (record["task"], -record["rows"], estimators.index(record["estimator"]))
            groups.setdefault(key, []).append(record)
    head = ["task", "rows", "preset", "seeds", "AUC", "of each kind", "weight on good rows", "minutes"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for (task, rows, place), runs in sorted(groups.items()):
        kinds = [kind for kind in runs[0]["auc"] if kind != "all"]
        preset = "balanced" if estimators[place] == "probe" else estimators[place]
        cells = [task, f"{-rows:,}", preset + marks(runs), ", ".join(str(run["seed"]) for run in runs)]
        cells.append(per_seed([run["auc"]["all"] for run in runs], ".3f"))
        cells.append("; ".join(f"{kind} {per_seed([run['auc'][kind] for run in runs], '.3f')}" for kind in kinds))
        cells.append(per_seed([run["good_share"] for run in runs], ".0%"))
        cells.append(per_seed([run["seconds"] / 60 for run in runs], ".0f"))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def trusted() -> list[str]:
    records = [json.loads(file.read_text()) for file in sorted((HERE / "results" / "ablations").glob("*.json"))]
    lines = []
    for setting in ABLATIONS:
        runs = sorted((r for r in records if r["setting"] == setting), key=lambda r: r["seed"])
        if runs:
            worst = [min(value for kind, value in r["auc"].items() if kind != "all") for r in runs]
            aucs = " / ".join(f"{r['auc']['all']:.3f} ({low:.3f})" for r, low in zip(runs, worst, strict=True))
            shares = " / ".join(f"{r['good_share']:.0%}" for r in runs)
            lines.append(f"| {setting}{marks(runs)} | {', '.join(str(r['seed']) for r in runs)} | {aucs} | {shares} |")
    return [TRUSTED.format(table="\n".join(lines))] if lines else []


def all_records() -> list[dict]:
    """Every result that says what it was made with."""
    files = [json.loads(file.read_text()) for file in sorted((HERE / "results").rglob("*.json"))]
    return [record for record in files if isinstance(record, dict) and "versions" in record]


def about_machines(records: list[dict]) -> str:
    """What the results were made on: each processor and each version that occurs in any of them."""
    found: dict[str, set[str]] = {}
    for record in records:
        for package, version in record["versions"].items():
            found.setdefault(package, set()).add(version)
    machines = [record["machine"] for record in records if "machine" in record]
    processors = sorted({each["processor"] for each in machines if "gpu" not in each})
    gpus = sorted({each["gpu"] for each in machines if "gpu" in each})
    versions = ", ".join(f"{package} {' or '.join(sorted(each))}" for package, each in found.items())
    return (
        f"Made on {'; '.join(gpus)}, and on 2 cores of: {'; '.join(processors)}. Versions: {versions}. Each JSON file "
        "names its own; bf16 rounds otherwise on another processor.\n"
    )


def with_table(page: str, name: str, content: str) -> str:
    """A page with a table between the two comments that mark its place.

    Raises:
        ValueError: if the page has no such place.
    """
    begin, end = f"<!-- {name}: made by python -m benchmarks.report -->\n\n", f"\n\n<!-- end of {name} -->"
    before, found, rest = page.partition(begin)
    _, also, after = rest.partition(end)
    if not (found and also):
        raise ValueError(f"No place for the table {name!r}: {begin.strip()} ... {end.strip()}")
    return before + begin + content + end + after


def quoted_tables() -> dict[Path, tuple[str, str]]:
    """Tables that other pages quote: by page, their name and their lines."""
    return {HERE.parent / "README.md": ("headline", large_table(["probe"]))}


def main() -> None:
    chosen = {task: shown(task) for task in summary.TASKS}
    summary.plot(chosen)
    parts = [INTRODUCTION, LARGE.format(table=large_table(["probe", "fast"]))]
    parts.append(SMALL.format(table=summary.section(chosen, marks), qualities=summary.qualities(chosen)))
    parts += [*trusted(), scale.section(), ROUNDS + READING + "\n", about_machines(all_records())]
    (DOCS / "results.md").write_text("\n".join(parts))
    parts = [RUNS]
    for name, about in ABOUT.items():
        for folder, machine in (("", "on a GPU"), ("cpu", "on a CPU")):
            arms = load(name, folder)
            if arms:
                gone = not (HERE / "experiments" / f"{name}.json").exists()
                command = "The settings are gone." if gone else f"`python -m benchmarks.run {name}`"
                lines = "\n".join(table(name, arms))
                parts.append(f"## {name}, {machine}\n\n{about} {command}\n\n{lines}\n")
                if "refine" in arms:
                    parts.append(about_rounds(arms))
    (DOCS / "runs.md").write_text("\n".join(parts))
    for page, (name, content) in quoted_tables().items():
        page.write_text(with_table(page.read_text(), name, content))
    print(f"Wrote {DOCS / 'results.md'}, runs.md and the tables that other pages quote.")


if __name__ == "__main__":
    main()
