"""`trl-bilevel sanity`: damage a part of clean rows, and see whether the weights find the damage."""

from __future__ import annotations

import argparse
import random
import sys
from pathlib import Path
from typing import Any

from .show import table

# Of each verdict, the best first: what it means, and what to do next.
VERDICTS = {
    "found": "Weights can be trusted with this kind of damage.",
    "mostly found": "Usable. More trusted rows (64 and more), or a larger model, separate better.",
    "weakly found": "Weights help little. Give more trusted rows that differ from such answers, or a larger model.",
    "not told apart": "Weights are at chance. Give more trusted rows, or a larger model, or remove such rows by other "
    "means.",
    "inverted": "Damaged rows get more weight than good ones. Do not use these weights. Look at the trusted rows: do "
    "some look like this damage? Does --estimator both see it?",
}
# Tokens of a row from its characters: at least so many characters a token, for English and a common tokenizer.
CHARACTERS_PER_TOKEN = 3
# Of fewer rows, half of them damaged, an area under the curve says little.
MIN_ROWS = 32
KIND = "sanity_kind"


def make_parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = argparse.ArgumentParser(
        prog="trl-bilevel sanity",
        epilog="example: trl-bilevel sanity --dataset clean.jsonl --validation trusted.jsonl",
        description="Damages a part of your clean rows in known ways, learns weights as `trl-bilevel sft` does, and "
        "tells how well they separate damaged from good rows. Exit code 1 if a kind of damage is "
        "ranked below chance.",
    )
    parser.add_argument("--dataset", required=True, help="clean rows: hub name, .jsonl/.csv/.parquet file, or folder")
    parser.add_argument("--validation", required=True, help="the trusted rows you mean to use, named in the same ways")
    parser.add_argument("--split", default="train", help="split of both (default: train)")
    parser.add_argument("--model", help="hub name or folder; default: the embedded SmolLM2-135M-Instruct")
    kinds = "lazy, swapped, salad, scrambled, truncated, stub (default: the first three and truncated)"
    default = ["lazy", "swapped", "salad", "truncated"]
    parser.add_argument("--damage", nargs="+", default=default, metavar="KIND", help=kinds)
    parser.add_argument("--rate", type=float, default=0.5, help="share of the rows to damage (default: 0.5)")
    parser.add_argument("--rows", type=int, default=256, help="rows to use, drawn at random (default: 256)")
    parser.add_argument("--max-length", type=int, default=256, help="tokens; longer rows are left out (default: 256)")
    parser.add_argument("--estimator", default="probe", help="weight estimator (default: probe)")
    parser.add_argument("--seed", type=int, default=0, help="draws rows, damage and adapter (default: 0)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the result to FILE")
    return parser


def run(arguments: list[str]) -> int:
    """Damage, weigh, tell; returns the exit code."""
    options = make_parser().parse_args(arguments)
    if options.rows < MIN_ROWS:
        raise ValueError(f"`--rows` must be at least {MIN_ROWS}, got {options.rows}: of fewer, ranks say little.")
    if options.estimator == "none":
        raise ValueError("`--estimator none` learns no weights, so there is nothing to measure: leave it out.")
    from ..data.files import check_folder, write_json

    if options.json is not None:
        check_folder(options.json, "--json")
    from ..data.assets import model_folder
    from ..data.contamination import contaminate
    from ..demo.experiment import model_dtype
    from ..weights.learn import learn_weights
    from .demo import quiet

    quiet()
    clean, validation, left_out = _load(options)
    rows = contaminate(clean, options.rate, options.damage, options.seed, column=KIND)
    print(
        f"{len(rows)} rows, {options.rate:.0%} of them damaged ({', '.join(options.damage)}); {len(validation)} "
        "trusted rows."
    )
    weights = learn_weights(
        options.model or str(model_folder()),
        rows.remove_columns(KIND),
        validation,
        weight_estimator=options.estimator,
        max_length=options.max_length,
        seed=options.seed,
        bf16=False,
        model_init_kwargs={"dtype": model_dtype()},
        disable_tqdm=not sys.stderr.isatty(),
    )
    result = judge(weights.values.tolist(), rows[KIND][:])
    result["settings"] = vars(options)
    result["rows"] = {"clean": len(clean), "validation": len(validation), "left_out_as_too_long": left_out}
    _tell(result)
    if options.json:
        write_json(options.json, result)
    return 0 if result["passed"] else 1


def _load(options: argparse.Namespace) -> tuple[Any, Any, int]:
    """Rows to damage and trusted rows, as prompts and completions, and how many rows are too long."""
    from ..data.contamination import exchange_of
    from ..data.formats import parts
    from ..data.loading import load_rows

    rows, validation = (load_rows(name, split=options.split) for name in (options.dataset, options.validation))
    trusted = {exchange_of(row).question for row in validation}
    kept: list[int] = []
    left_out = 0
    for place in random.Random(f"sanity-{options.seed}").sample(range(len(rows)), len(rows)):
        question, answer = exchange_of(rows[place])
        if len(question) + len(answer) > CHARACTERS_PER_TOKEN * options.max_length:
            left_out += 1
        elif question not in trusted and answer.strip():
            kept.append(place)
        if len(kept) == options.rows:
            break
    if len(kept) < MIN_ROWS:
        raise ValueError(
            f"{len(kept)} of the {len(rows)} rows of {options.dataset!r} can be used ({left_out} are longer than "
            f"--max-length {options.max_length}, the others ask a question of the trusted rows or have no answer); at "
            f"least {MIN_ROWS} are needed. Give more rows, or raise --max-length."
        )
    # The last turn of a conversation is the completion: what is scored is the answer.
    clean, trusted_rows = (
        type(part).from_list([dict(zip(("prompt", "completion"), parts(row), strict=True)) for row in part])
        for part in (rows.select(kept), validation)
    )
    return clean, trusted_rows, left_out


def judge(weights: list[float], kinds: list[str]) -> dict[str, Any]:
    """Area under the ROC curve of the weights (one per row; NaN does not count) per kind of damage, and what it means.

    The run has passed if no area is below 0.5.
    """
    from ..core.statistics import auc_standard_error
    from ..demo.comparison import good_share, ranking_quality

    weighed = [(weight, kind) for weight, kind in zip(weights, kinds, strict=True) if weight == weight]
    weights, kinds = map(list, zip(*weighed, strict=True))
    good = kinds.count("good")
    out: dict[str, Any] = {}
    for kind, auc in ranking_quality(weights, kinds).items():
        count = len(kinds) - good if kind == "all" else kinds.count(kind)
        error = auc_standard_error(auc, good, count)
        out[kind] = {"auc": auc, "standard_error": error, "rows": count, "verdict": verdict_of(auc, error)}
        out[kind]["advice"] = VERDICTS[out[kind]["verdict"]]
    passed = all(entry["auc"] >= 0.5 for entry in out.values())
    return {"kinds": out, "good_rows": good, "good_share": good_share(weights, kinds), "passed": passed}


def verdict_of(auc: float, error: float) -> str:
    """What an area under the curve and its standard error mean: one of `VERDICTS`."""
    signs = (auc >= 0.9, auc >= 0.75, auc - 2 * error > 0.5, auc + 2 * error >= 0.5, True)
    return next(verdict for verdict, sign in zip(VERDICTS, signs, strict=True) if sign)


def _tell(result: dict[str, Any]) -> None:
    entries, good = result["kinds"], result["good_rows"]
    lines = [
        (kind, f"{entry['auc']:.3f} +- {entry['standard_error']:.3f}", entry["verdict"], str(entry["rows"]))
        for kind, entry in entries.items()
    ]
    table(f"Damage, against {good} good rows", ("damage", "AUC", "verdict", "rows"), lines, right=("AUC", "rows"))
    for verdict in dict.fromkeys(entry["verdict"] for entry in entries.values()):
        print(f"{verdict.capitalize()}: {VERDICTS[verdict]}")
    share = good / (good + entries["all"]["rows"])
    print(f"Good rows are {share:.0%} of the rows and have {result['good_share']:.0%} of the weight.")
    if result["passed"]:
        print("Next: trl-bilevel sft with the rows you do not trust, and these trusted rows.")
    else:
        print("A kind of damage is ranked below chance: do not trust the weights on data that may have it.")
