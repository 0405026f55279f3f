"""`trl-bilevel demo`: several ways of training on the same contaminated rows, at the same number of steps."""

from __future__ import annotations

import argparse
import logging
import time
import warnings
from pathlib import Path
from typing import Any

from .show import table, terminal


def make_parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = argparse.ArgumentParser(
        prog="trl-bilevel demo",
        epilog="example: trl-bilevel demo --task safety --arms base,uniform,bilevel,refine",
        description="Trains a small real model on real text, part of it damaged, in several ways at the same budget, "
        "and shows what bilevel selection gains. Without options: SmolLM2-135M-Instruct and Python's docstrings.",
    )
    tasks = "quality, boilerplate, scrambled, truncated, safety, safety_scarce or safety_unanswered"
    parser.add_argument("--task", default="quality", help=tasks)
    parser.add_argument("--model", help="hub name or folder; default: the embedded SmolLM2-135M-Instruct")
    parser.add_argument("--dataset", help="hub name or file with question-answer rows, damaged as the task says")
    parser.add_argument("--arms", default="uniform,bilevel,clean_only", help="what to train, separated by commas")
    parser.add_argument("--output", type=Path, default=Path("demo_out"), help="folder for everything that is made")
    parser.add_argument("--epochs", type=float, default=2.0, help="passes over the training rows")
    parser.add_argument("--seed", type=int, default=0, help="draws rows, damage, order and adapter")
    return parser


def quiet() -> None:
    """Only what a command itself says is shown: no notices of libraries, and no progress of data sets."""
    from datasets import disable_progress_bars

    logging.getLogger("transformers").setLevel(logging.ERROR)
    warnings.simplefilter("ignore", FutureWarning)
    disable_progress_bars()


def run(arguments: list[str]) -> None:
    """Train, compare, show, save."""
    options = make_parser().parse_args(arguments)
    from ..data.files import write_json
    from ..data.loading import load_rows
    from ..demo.comparison import extreme_rows, summarise
    from ..demo.experiment import ARMS, budget_of, run_arm
    from ..demo.tasks import conversational, make_task, question_answer_rows
    from ..report import write_report

    quiet()
    arms, start = options.arms.split(","), time.perf_counter()
    unknown = [arm for arm in arms if arm not in ARMS]
    if unknown:
        raise ValueError(f"Unknown arm(s) {unknown}; known: {', '.join(ARMS)}.")
    rows = question_answer_rows(load_rows(options.dataset)) if options.dataset else None
    shown = make_task(options.task, options.seed, rows=rows)
    task = conversational(shown) if options.model else shown
    if options.model is None:
        print("Fetching and converting the model (first time only) ...")
    good = sum(task.good)
    print(
        f"Task {task.name}: {len(task.train)} training rows, {good} good and {len(task.train) - good} "
        f"damaged; {len(task.validation)} trusted validation rows; {len(task.test)} clean test rows.",
    )
    results: list[Any] = []
    for number, arm in enumerate(arms, 1):
        print(f"{number}/{len(arms)} {arm.replace('_', ' ')}: {ARMS[arm]}")
        result = run_arm(
            arm,
            task,
            seed=options.seed,
            model=options.model,
            budget=budget_of(options.task, epochs=options.epochs),
            output_dir=str(options.output / arm),
            progress=terminal() is not None,
            # The rounds build on the weights of the offline arm, if it has run.
            weights=next((done.weights for done in results if done.arm == "bilevel" and arm == "refine"), None),
        )
        results.append(result)
        print(f"    test loss {result.test_loss:.4f} after {result.seconds:.0f} s")
    summary = summarise(results, task.train["kind"])
    write_json(options.output / "results.json", results)
    write_json(options.output / "summary.json", summary)
    _show(summary)
    learned = [result for result in results if result.weights]
    for title, lines in extreme_rows(shown, learned[0].weights) if learned else ():
        table(title, ("weight", "truth", "question", "answer"), lines, cut=("question", "answer"))
    _conclude(summary, learned)
    print(f"\nDone in {(time.perf_counter() - start) / 60:.1f} minutes. In {options.output}:")
    print("  summary.json, results.json, and per arm a folder with the adapter")
    for result in learned:
        folder, uniform = options.output / result.arm, options.output / "uniform"
        report = write_report(folder, baseline=uniform if "uniform" in arms else None)
        print(f"  {report}: what the weights did, which rows carry them, and why. Open it in a browser.")
        print(f"    trl-bilevel export {folder} --top-k {len(task.train) // 4} --output best.jsonl")
    print("Your own data: trl-bilevel sft --help")


def _show(summary: dict[str, dict[str, Any]]) -> None:
    def share(value: float | None, form: str = ".0%") -> str:
        return "" if value is None else f"{value:{form}}"

    columns = ["", "test loss", "gap recovered", "AUC of weights", "weight on good rows", "time"]
    rows = [
        (
            arm.replace("_", " "),
            f"{row['test_loss']:.4f}",
            share(row.get("gap_recovered")),
            share(row.get("auc", {}).get("all"), ".3f"),
            share(row.get("good_share")),
            f"{row['seconds']:.0f} s",
        )
        for arm, row in summary.items()
    ]
    table("Same rows, same number of steps", columns, rows, right=columns[1:])
    for arm, row in summary.items():
        if "auc" in row:
            parts = ", ".join(f"{kind} {value:.3f}" for kind, value in row["auc"].items())
            print(f"AUC of {arm}'s weights, good rows against: {parts}")
    columns = ["", "refuses harmful", "prefers refusal", "refuses benign", "benign loss"]
    rates = ("greedy_refusal", "refusal_preferred", "over_refusal")
    safety = [
        (arm.replace("_", " "), *(share(row["safety"][name]) for name in rates), f"{row['test_loss']:.4f}")
        for arm, row in summary.items()
        if "safety" in row
    ]
    if safety:
        table("Safety and what it costs", columns, safety, right=columns[1:])


def _conclude(summary: dict[str, dict[str, Any]], learned: list[Any]) -> None:
    gap = summary[learned[0].arm].get("gap_recovered") if learned else None
    if gap is None:
        return
    if gap != gap:
        print("\nClean rows alone were no better than the mixture here: nothing for selection to win.")
    elif gap > 0:
        print(f"\nSelection won back {gap:.0%} of what the damaged rows cost, not knowing which they are.")
    else:
        print("\nSelection did not help here. docs/limits.md says when that is to be expected.")
