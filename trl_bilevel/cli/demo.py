"""`trl-bilevel demo`: several ways of training on the same contaminated rows, at the same number of steps."""

from __future__ import annotations

import argparse
import logging
import time
import warnings
from pathlib import Path
from typing import Any

from .show import say, table, terminal


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
    parser.add_argument("--epochs", type=float, default=2.0, help="passes over the training rows, pilot run included")
    parser.add_argument("--seed", type=int, default=0, help="draws rows, damage, order and adapter")
    return parser


def run(arguments: list[str]) -> None:
    """Train, compare, show, save."""
    options = make_parser().parse_args(arguments)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    warnings.simplefilter("ignore", FutureWarning)
    from datasets import disable_progress_bars

    from ..data import assets
    from ..data.loading import load_rows
    from ..data.private import WEIGHTED, find_private
    from ..demo.comparison import extreme_rows, plot, summarise, write_results
    from ..demo.experiment import ARMS, REFINING, budget_of, run_arm
    from ..demo.tasks import conversational, make_task, question_answer_rows
    from ..report import write_report

    disable_progress_bars()
    arms = options.arms.split(",")
    unknown = [arm for arm in arms if arm not in ARMS]
    if unknown:
        raise ValueError(f"Unknown arm(s) {unknown}; known: {', '.join(ARMS)}.")
    start = time.perf_counter()
    if options.model is None:
        say("Fetching and converting the model (first time only) ...")
        assets.model_folder()
    rows = question_answer_rows(load_rows(options.dataset)) if options.dataset else None
    task = make_task(options.task, options.seed, rows=rows)
    shown = task
    if options.model is not None:
        task = conversational(task)
    good = sum(task.good)
    say(
        f"Task {task.name}: {len(task.train)} training rows, {good} good and {len(task.train) - good} "
        f"damaged; {len(task.validation)} trusted validation rows; {len(task.test)} clean test rows.",
        "bold",
    )
    results = []
    weights: list[float] | None = None
    for number, arm in enumerate(arms, 1):
        say(f"{number}/{len(arms)} {arm.replace('_', ' ')}: {ARMS[arm]}", "bold")
        result = run_arm(
            arm,
            task,
            seed=options.seed,
            model=options.model,
            budget=budget_of(options.task, epochs=options.epochs),
            output_dir=str(options.output / arm),
            progress=terminal() is not None,
            # The rounds build on the weights of the offline arm, if it has run.
            weights=weights if arm in REFINING else None,
        )
        results.append(result)
        weights = result.weights if arm == "bilevel" else weights
        say(f"    test loss {result.test_loss:.4f} after {result.seconds:.0f} s")

    kinds = task.train["kind"]
    summary = summarise(results, kinds)
    write_results(options.output, results, summary)
    plot(options.output / "demo.png", results, kinds)
    _show(summary)
    for result in results:
        if result.ledger:
            _show_rounds(result.arm, result.ledger)
            _show_responses(options.output / result.arm)
    learned = next((result for result in results if result.weights is not None), None)
    if learned is not None and learned.weights is not None:
        _show_rows(*extreme_rows(shown, learned.weights))
    _conclude(summary)
    say(f"\nDone in {(time.perf_counter() - start) / 60:.1f} minutes. In {options.output}:")
    say("  demo.png (plots), summary.json, results.json, and per arm a folder with the adapter")
    if learned is not None:
        best = options.output / learned.arm
        report = write_report(best, baseline=options.output / "uniform" if "uniform" in arms else None)
        say(f"  {report}: what the weights did, which rows carry them, and why. Open it in a browser.")
        say(f"  {find_private(best, WEIGHTED)}: every row with its weight. The best quarter of them as JSON lines:")
        say(f"    trl-bilevel export {best} --top-k {len(task.train) // 4} --output best.jsonl")
    say("Your own data: trl-bilevel sft --help")


def _show(summary: dict[str, dict[str, Any]]) -> None:
    columns: tuple[str, ...] = ("", "test loss", "gap recovered", "AUC of weights", "weight on good rows", "time")
    rows = [
        (
            arm.replace("_", " "),
            f"{row['test_loss']:.4f}",
            "" if row.get("gap_recovered") is None else f"{row['gap_recovered']:.0%}",
            f"{row['auc']['all']:.3f}" if "auc" in row else "",
            f"{row['good_share']:.0%}" if "good_share" in row else "",
            f"{row['seconds']:.0f} s",
        )
        for arm, row in summary.items()
    ]
    table("Same rows, same number of steps", columns, rows, right=columns[1:])
    for arm, row in summary.items():
        if "auc" in row:
            parts = ", ".join(f"{kind} {value:.3f}" for kind, value in row["auc"].items())
            say(f"AUC of {arm}'s weights, good rows against: {parts}")
    rates = ("greedy_refusal", "refusal_preferred", "over_refusal")
    safety = [
        (arm.replace("_", " "), *(f"{row['safety'][name]:.0%}" for name in rates), f"{row['test_loss']:.4f}")
        for arm, row in summary.items()
        if "safety" in row
    ]
    if safety:
        columns = ("", "refuses harmful", "prefers refusal", "refuses benign", "benign loss")
        table("Safety and what it costs", columns, safety, right=columns[1:])


def _show_rounds(arm: str, ledger: list[dict[str, Any]]) -> None:
    columns = ("round", "questions", "responses", "score (mean, spread)", "selection loss", "decision")
    rows = [
        (
            *(str(entry[name]) for name in columns[:3]),
            f"{entry['score_mean']:+.3f}, {entry['score_std_within_group']:.3f}",
            f"{entry['incoming_loss']:.4f} -> {entry['trained_loss']:.4f} (+- {entry['standard_error']:.4f})",
            "kept" if entry["kept"] else "rolled back",
        )
        for entry in ledger
    ]
    table(f"Rounds of {arm.replace('_', ' ')}", columns, rows, right=columns)


def _show_responses(folder: Path) -> None:
    """The question of the last round whose responses differ most in weight."""
    import pandas as pd

    from ..data.private import RESPONSES, find_private
    from ..demo.tasks import plain

    files = sorted(find_private(folder, RESPONSES).glob("*.parquet"))
    if not files:
        return
    rows = pd.read_parquet(files[-1])
    spread = rows.groupby("sample_id")["weight"].std()
    if not spread.notna().any():
        return
    rows = rows[rows["sample_id"] == spread.idxmax()].sort_values("weight", ascending=False)
    said = [
        (f"{weight:.3f}", " ".join(str(response).split()))
        for weight, response in zip(rows["weight"], rows["response"], strict=True)
    ]
    table("A question of the last round, and its responses", ("weight", "response"), said, cut=("response",))
    say(f"The question: {' '.join(plain(rows['prompt'].iloc[0]).split())}")


def _conclude(summary: dict[str, dict[str, Any]]) -> None:
    if "refine" in summary and "bilevel" in summary and "safety" in summary["refine"]:
        first, second = (summary[arm]["safety"]["greedy_refusal"] for arm in ("bilevel", "refine"))
        change = summary["refine"]["test_loss"] - summary["bilevel"]["test_loss"]
        refusal = f"left the refusal of harmful requests at {second:.0%}"
        if first != second:
            refusal = f"changed the refusal of harmful requests from {first:.0%} to {second:.0%}"
        say(f"\nAnswering anew {refusal}, and the loss on benign rows changed by {change:+.4f} nats per token.")
    learned = next((row for row in summary.values() if "auc" in row), None)
    if learned is None or "gap_recovered" not in learned:
        return
    gap = learned["gap_recovered"]
    if gap != gap:
        say("\nClean rows alone were no better than the mixture here: nothing for selection to win.")
    elif gap > 0:
        say(f"\nSelection won back {gap:.0%} of what the damaged rows cost, not knowing which they are.", "bold")
    else:
        say("\nSelection did not help here. docs/limits.md says when that is to be expected.")


def _show_rows(low: list[Any], high: list[Any]) -> None:
    columns = ("weight", "truth", "question", "answer")
    for title, rows in (("Ten rows of least weight", low), ("Ten rows of most weight", high)):
        # The questions differ in their ends: show those.
        lines = [(f"{w:.3f}", kind, q if len(q) <= 30 else f"...{q[-27:]}", answer) for w, kind, q, answer in rows]
        table(title, columns, lines, cut=columns[2:])
