"""Write `docs/results.md` and its plots from the JSON files in `benchmarks/results`.

python -m benchmarks.report
"""

import json
import statistics
from collections.abc import Iterable
from pathlib import Path

from scipy.stats import t as student

from benchmarks import pareto, scale, summary
from benchmarks.ablations import SETTINGS as ABLATIONS
from benchmarks.cost import SETTINGS as COUNTED
from benchmarks.estimators import PRESETS, SETTINGS
from benchmarks.jobs import is_older
from benchmarks.texts import (
    ABLATION,
    ABOUT,
    COMPARED,
    ESTIMATORS,
    INTRODUCTION,
    OLDER,
    READING,
    REFINE,
    SAFETY,
    SAME,
    TRANSFER,
    YARDSTICK,
)
from trl_bilevel.planning.shapes import RunShape

DEPTH = RunShape.read_depth

HERE = Path(__file__).parent
SIZES = (1_088, 10_000, 100_000, 1_000_000)
DOCS = HERE.parent / "docs"


def load(name: str, folder: str = "") -> dict[str, dict[int, dict]]:
    """Results of an experiment by arm and seed; with a folder, those made on another machine."""
    arms: dict[str, dict[int, dict]] = {}
    for file in sorted((HERE / "results" / folder / name).glob("*.json")):
        record = json.loads(file.read_text())
        arms.setdefault(record["arm"], {})[record["seed"]] = record
    return arms


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


def about_safety() -> list[str]:
    safety = load("safety")
    runs = {
        "short": safety.get("clean_only_short", {}),
        "taken_off": safety["bilevel"],
        "on_top": safety.get("bilevel_on_top", {}),
    }
    if any(len(found) < 3 for found in runs.values()):
        return []
    over = {
        name: statistics.mean(
            run["test_loss"] / safety["clean_only"][seed]["test_loss"] - 1 for seed, run in found.items()
        )
        for name, found in runs.items()
    }
    refusals, own, whole = (
        per_seed([run["safety"]["over_refusal"] for _, run in sorted(found.items())], ".0%") for found in runs.values()
    )
    return [SAFETY.format(**over, refusals=refusals, own=own, whole=whole) + "\n"]


def about_rounds(arms: dict[str, dict[int, dict]]) -> str:
    ledgers = [run["ledger"] for runs in arms.values() for run in runs.values() if run.get("ledger")]
    entries = [entry for ledger in ledgers for entry in ledger]
    sample = next(iter(arms["refine"].values()))
    offline = sample["train_steps"] - sample["ledger"][-1]["step"]
    kept = f"{sum(entry['kept'] for entry in entries)} of {len(entries)}"
    return REFINE.format(offline=offline, kept=kept) + "\n"


def amortised() -> list[str]:
    parts = []
    for file in sorted((HERE / "results" / "amortised").glob("*.json")):
        record = json.loads(file.read_text())
        entries = list(record["predicted"].values())
        counts = sorted({entry["scored"] for entry in entries})
        lines = ["| features after | " + " | ".join(f"{count} scored" for count in counts) + " |"]
        lines.append("|---" * (len(counts) + 1) + "|")
        for depth in sorted({entry["depth"] for entry in entries}):
            found = {entry["scored"]: entry for entry in entries if entry["depth"] == depth}
            cells = [f"{found[count]['auc']:.3f}, {found[count]['good_share']:.0%}" for count in counts]
            lines.append(f"| {depth:.0%} of the layers | " + " | ".join(cells) + " |")
        parts.append(
            "## Weights of rows that were not scored\n\n"
            f"Task {record['task']}{marks([record])}, seed {record['seed']}: AUC, and share of weight on good rows, "
            f"of weights predicted for the other rows of the {record['rows']:,} (mean of 4 draws). Scored themselves, "
            f"all rows have {record['auc_scored']['all']:.3f}, "
            f"{record['good_share_scored']:.0%}. The default reads features after {DEPTH:.0%} of the layers, and "
            f"scores 512 rows. `python -m benchmarks.amortised`\n\n" + "\n".join(lines) + "\n"
        )
    return parts


def cost() -> list[str]:
    file = HERE / "results" / "cost.json"
    if not file.exists():
        return []
    record = json.loads(file.read_text())
    plain = pareto.line_through(record["flops"]["SFTTrainer"])
    lines = ["| settings | " + " | ".join(f"{rows:,} rows" for rows in SIZES) + " | any number |"]
    lines.append("|---" * (len(SIZES) + 2) + "|")
    for name, counts in record["flops"].items():
        if name not in COUNTED:
            continue
        fixed, slope = pareto.line_through(counts)
        cells = [f"{pareto.cost_ratio(record['flops'], name, rows):.3f}x" for rows in SIZES]
        lines.append(
            f"| {name} | " + " | ".join(cells) + f" | {slope / plain[1]:.3f}x + {fixed / plain[1]:,.0f} rows |"
        )
    from_rows = {
        name: pareto.rows_for(record["flops"], name, ratio) for name, ratio in (("balanced", 1.1), ("fast", 1.05))
    }
    counted = ", ".join(sorted({size for counts in record["flops"].values() for size in counts}, key=int))
    return [
        "## Cost of selection\n\nFLOPs of a whole two-epoch run over those of `SFTTrainer` on the same rows, "
        "everything included (pilot run, scoring, prediction, validation rows), on a Llama of ten layers with LoRA, "
        f"gradient checkpointing on, batch {record['batch']}, {record['validation_rows']} validation rows. A run "
        "costs a constant (the pilot, the scored rows), given here in rows' worth of plain training, and so much per "
        f"row; counted with {counted} rows of 50 tokens, computed for the others. `balanced` costs no more than 1.10x "
        f"from {from_rows['balanced']:,} rows on, `fast` no more than 1.05x from {from_rows['fast']:,}. PyTorch's "
        "counter does not see attention kernels on a CPU, nor products in place (a third of the LM head), on either "
        "side. The pilot's steps come on top here, while the tables above take them off most arms. "
        "`python -m benchmarks.cost`"
        "\n\n" + "\n".join(lines) + "\n\n![Cost by number of rows](cost_rows.png)\n"
    ]


def speed() -> list[str]:
    file = HERE / "results" / "speed.json"
    if not file.exists():
        return []
    record = json.loads(file.read_text())

    def median(side: str, key: str) -> float:
        return statistics.median(run[key] for run in record["runs"][side])

    lines = ["| settings | seconds per step | ratio | peak memory (of all runs) | ratio |", "|---" * 5 + "|"]
    for side in record["runs"]:
        peaks = [run["peak_bytes"] / 2**20 for run in record["runs"][side]]
        spread = f"{statistics.median(peaks):,.0f} MiB ({min(peaks):,.0f} to {max(peaks):,.0f})"
        cells = [f"{median(side, 'median_step_seconds'):.2f}", spread]
        keys = ("median_step_seconds", "peak_bytes")
        ratios = [f"{median(side, key) / median('SFTTrainer', key):.3f}x" for key in keys]
        lines.append(f"| {side} | {cells[0]} | {ratios[0]} | {cells[1]} | {ratios[1]} |")
    repeats, processor = len(record["runs"]["SFTTrainer"]), record["machine"]["processor"]
    return [
        f"## Step time and memory\n\nSmolLM2-135M-Instruct, LoRA, bf16, gradient checkpointing, {record['batch']} "
        f"rows of {record['tokens_per_row']} tokens per step, on {processor}: medians of {repeats} runs of "
        f"{record['steps']} steps, each a process of its own, alternating. Peak memory is that of the process while "
        "it trains, with a short pilot run (8 steps, 32 of 128 rows scored; its time is in no step). (With lambda = "
        "0.5 the validation rows join every fourth step, which a median does not see.) `python -m benchmarks.speed`"
        "\n\n" + "\n".join(lines) + "\n"
    ]


def speed_of_processes() -> list[str]:
    file = HERE / "results" / "speed_processes.json"
    if not file.exists():
        return []
    record = json.loads(file.read_text())
    keys = ("median_step_seconds", "peak_bytes", "selector_bytes_per_step", "gradient_bytes_per_step")
    medians = {
        side: [statistics.median(run[key] for run in runs) for key in keys] for side, runs in record["runs"].items()
    }
    plain, count, processor = medians["SFTTrainer"], record["processes"], record["machine"]["processor"]
    repeats = len(record["runs"]["SFTTrainer"])
    lines = [
        "| settings | seconds per step | ratio | peak memory | ratio | selector's bytes per step | gradients' |",
        "|---" * 7 + "|",
    ]
    for side, (seconds, peak, selector, gradient) in medians.items():
        lines.append(
            f"| {side} | {seconds:.2f} | {seconds / plain[0]:.3f}x | {peak / 2**20:,.0f} MiB | {peak / plain[1]:.3f}x "
            f"| {selector:,.0f} | {gradient:,.0f} |"
        )
    return [
        f"## Step time and memory of {count} processes\n\nThe same under DDP (gloo) on {processor}, "
        f"{record['batch']} rows per process, figures of the first: medians of {repeats} alternating runs of "
        f"{record['steps']} steps. Bytes are those that a process exchanges in a training step; calibrated weights "
        f"need one exchange of all scores, after the pilot run. `python -m benchmarks.speed "
        f"--processes {count} --repeats {repeats} --steps {record['steps']}`\n\n" + "\n".join(lines) + "\n"
    ]


def estimators() -> list[str]:
    records = [json.loads(file.read_text()) for file in sorted((HERE / "results" / "estimators").glob("*.json"))]
    # Those of presets have a table of their own.
    records = [record for record in records if record["setting"] not in PRESETS]
    if not records:
        return []
    lines = [
        "| task | seed | setting | AUC | weight on good rows | effective sample size among them |",
        "|---" * 6 + "|",
    ]
    order = [*SETTINGS, *sorted({r["setting"] for r in records} - SETTINGS.keys())]
    for r in sorted(records, key=lambda r: (r["task"], r["seed"], order.index(r["setting"]))):
        name = r["setting"] + ("" if r["setting"] in SETTINGS else " (gone)")
        auc = "; ".join(f"{kind} {value:.3f}" for kind, value in r["auc"].items())
        share = f"{r['good_share']:.0%} | {r['ess_good']:.0%}"
        lines.append(f"| {r['task']} | {r['seed']} | {name}{marks([r])} | {auc} | {share} |")
    return [ESTIMATORS.format(table="\n".join(lines))]


def ablations() -> list[str]:
    records = [json.loads(file.read_text()) for file in sorted((HERE / "results" / "ablations").glob("*.json"))]
    lines = []
    for setting in ABLATIONS:
        runs = sorted((r for r in records if r["setting"] == setting), key=lambda r: r["seed"])
        if runs:
            worst = [min(value for kind, value in r["auc"].items() if kind != "all") for r in runs]
            aucs = " / ".join(f"{r['auc']['all']:.3f} ({low:.3f})" for r, low in zip(runs, worst, strict=True))
            shares = " / ".join(f"{r['good_share']:.0%}" for r in runs)
            lines.append(f"| {setting}{marks(runs)} | {', '.join(str(r['seed']) for r in runs)} | {aucs} | {shares} |")
    return [ABLATION.format(table="\n".join(lines))] if lines else []


def transfer() -> list[str]:
    records = [json.loads(file.read_text()) for file in sorted((HERE / "results" / "transfer").glob("*.json"))]
    lines = []
    for record in records:
        arms, seed = load(record["task"]), record["seed"]
        uniform, clean, own = (arms.get(arm, {}).get(seed) for arm in ("uniform", "clean_only", "bilevel"))
        if not (uniform and clean and own):
            continue
        gap = uniform["test_loss"] - clean["test_loss"]
        shares = [f"{(uniform['test_loss'] - run['test_loss']) / gap:.0%}" for run in (record, own)]
        aucs = [f"{run['auc']['all']:.3f}" for run in (record, own)]
        lines.append(
            f"| {record['task']}{marks([record, own])} | {seed} | {aucs[0]} | {shares[0]} | {aucs[1]} | {shares[1]} |"
        )
    return [TRANSFER.format(table="\n".join(lines))] if lines else []


def yardstick() -> list[str]:
    parts = []
    for file in sorted((HERE / "results" / "yardstick").glob("*.json")):
        record = json.loads(file.read_text())
        steps = list(record["auc"])
        head = ["signal", "cost", *(f"after {step} steps" for step in steps)]
        lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
        for signal in record["auc"][steps[0]]:
            cost = record["scoring_cost"][signal.replace("alignment, cosine", "alignment")]
            kinds = [record["auc"][step][signal] for step in steps]
            worst = [min(value for kind, value in auc.items() if kind != "all") for auc in kinds]
            cells = [f"{auc['all']:.2f} ({low:.2f})" for auc, low in zip(kinds, worst, strict=True)]
            lines.append(f"| {signal} | {cost:.2f} | " + " | ".join(cells) + " |")
        title = f"{record['model']}, {record['task']}, seed {record['seed']}"
        parts.append(f"**{title}**, {record['rows']} rows\n\n" + "\n".join(lines) + "\n")
    return [YARDSTICK, *parts] if parts else []


def same_on_cpu() -> list[str]:
    """Runs made on both machines, side by side."""
    lines = []
    for name in ABOUT:
        here, there = load(name), load(name, "cpu")
        for arm in (arm for arm in here if arm in there):
            seeds = sorted(here[arm].keys() & there[arm].keys())
            pairs = [[side[arm][seed] for seed in seeds] for side in (here, there)]
            losses = [per_seed([run["test_loss"] for run in runs], ".3f") for runs in pairs]
            found = [[run.get("auc") or run.get("influence_auc") for run in runs] for runs in pairs]
            aucs = [per_seed([auc["all"] for auc in side], ".3f") if all(side) else "" for side in found]
            cells = [name, arm.replace("_", " "), ", ".join(map(str, seeds)), *losses, *aucs]
            lines.append("| " + " | ".join(cells) + " |")
    return [SAME.format(table="\n".join(lines))] if lines else []


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
    return {
        HERE.parent / "README.md": ("headline", summary.headline({task: load(task) for task in summary.HEADLINE})),
        DOCS / "estimators.md": ("estimators", pareto.table({task: load(task) for task in pareto.TASKS})),
    }


def main() -> None:
    records = all_records()
    parts = [INTRODUCTION, *([OLDER] if any(map(is_older, records)) else [])]
    chosen = {task: load(task) for task in summary.TASKS}
    parts.append(summary.section(chosen, COMPARED))
    summary.plot(chosen)
    for name, about in ABOUT.items():
        arms = load(name)
        if arms:
            lines = "\n".join(table(name, arms))
            gone = not (HERE / "experiments" / f"{name}.json").exists()
            command = "The settings are gone." if gone else f"`python -m benchmarks.run {name}`"
            parts.append(f"## {name}\n\n{about} {command}\n\n{lines}\n")
            if "refine" in arms:
                parts.append(about_rounds(arms))
            if name == "refine_levers":
                parts.append(READING + "\n")
            if name == "safety":
                parts += about_safety()
    runs = {task: load(task) for task in pareto.TASKS}
    parts.append(pareto.section(runs, load("quality_large")))
    pareto.plots(runs)
    parts += yardstick() + estimators() + ablations() + transfer() + amortised() + cost() + [scale.section()] + speed()
    parts += speed_of_processes()
    selector = HERE / "results" / "selector_scale.json"
    if selector.exists():
        record = json.loads(selector.read_text())
        rows = [
            f"| {int(size):,} | {record['median_microseconds'][size]} | {record['ratio_to_smallest'][size]} | "
            f"{record['bytes_per_row'][size]} |"
            for size in record["median_microseconds"]
        ]
        parts.append(
            f"## Cost of a selector update\n\nBatch of {record['batch']} rows, medians of {record['rounds']} "
            "alternating rounds. `python -m benchmarks.selector_scale`\n\n"
            "| rows | microseconds | ratio | bytes held per row |\n"
            "|---|---|---|---|\n" + "\n".join(rows) + "\n"
        )
    parts += same_on_cpu()
    parts.append(about_machines(records))
    (DOCS / "results.md").write_text("\n".join(parts))
    for page, (name, content) in quoted_tables().items():
        page.write_text(with_table(page.read_text(), name, content))
    print(f"Wrote {DOCS / 'results.md'} and the tables that other pages quote.")


if __name__ == "__main__":
    main()
