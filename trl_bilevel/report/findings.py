"""The summary in words: did selection help, how many rows carry the weight, what to look at."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..core.statistics import effective_sample_size, rows_carrying
from .charts import CARRIED
from .compare import Comparison
from .rows import Category
from .run import WEIGHTED_FILE, Run
from .text import duration, signed

# Above this effective sample size, nothing has been selected; below the other, few rows carry the training.
NEARLY_UNIFORM, NEARLY_COLLAPSED = 0.98, 0.1
# Trusted rows that calibration should have held back; a category's share of the weight that is worth a word.
FEW_TRUSTED, STARVED = 8, 0.5
COSTLY = 0.3


class Verdict(NamedTuple):
    """The answer to "did selection help?"; `tone` is "good", "bad" or "neutral"."""

    tone: str
    title: str
    text: str


class Card(NamedTuple):
    """A number of the summary, and what it means."""

    label: str
    value: str
    text: str


class Finding(NamedTuple):
    """Something to look at: `level` is "warning" or "note", `target` the section of the report that shows it."""

    level: str
    title: str
    text: str
    target: str | None = None


def verdict(run: Run, comparisons: Sequence[Comparison], baseline: str | None) -> Verdict:
    """The first thing a reader sees."""
    if run.ledger:
        return _rounds_verdict(run)
    if not run.finished:
        step = max((entry["step"] for entry in run.history), default=0)
        title = f"This run was interrupted at step {step}" if step else "This run was interrupted"
        return Verdict("neutral", title, "What follows is what it had written by then.")
    if run.ranked:
        return _ranked_verdict(run)
    if run.record and not run.learned:
        given = run.told("weights", "given")
        what = "the weights were given in the column data_weight" if given else "all rows count the same"
        title = "No weights were learned in this run"
        return Verdict("neutral", title, f"By its settings, {what}. It can be the baseline of another run's report.")
    if comparisons:
        return _compared(comparisons)
    if len(run.live) and effective_sample_size(run.live) > NEARLY_UNIFORM:
        return Verdict(
            "neutral",
            "Nothing was selected: the weights are nearly equal",
            "The scores gave no reason to prefer some rows. The run was close to plain fine-tuning.",
        )
    known = f"{baseline} has no loss that this run has too. " if baseline else ""
    return Verdict(
        "neutral",
        "Weights were learned; whether they helped is not measured",
        f"{known}To know, train once more with weight_estimator none and everything else equal, then run: "
        f"trl-bilevel report {run.name} --baseline UNIFORM_RUN",
    )


def _ranked_verdict(run: Run) -> Verdict:
    file = Path(run.told("rows_file", otherwise=WEIGHTED_FILE)).name
    text = (
        "Weights were all that was asked for, so whether they help is not known yet. Read the rows at both ends. Then "
        f"train on {file}, whose column data_weight counts: trl-bilevel sft --dataset_name {file} --weight_estimator "
        f"none; or take the best rows to another tool: trl-bilevel export {file} --top-k N --output best.jsonl"
    )
    if len(run.live) and effective_sample_size(run.live) > NEARLY_UNIFORM:
        text = f"The weights are nearly equal: the scores gave no reason to prefer some rows. {text}"
    return Verdict("neutral", "The rows have weights; nothing was trained", text)


def _rounds_verdict(run: Run) -> Verdict:
    kept = [entry for entry in run.ledger if entry.get("kept")]
    count = len(run.ledger)
    if not kept:
        text = "No round lowered the loss on the selection rows: the model is the one that the run started from."
        return Verdict("bad", f"None of {count} rounds helped", text)
    first, last = run.ledger[0].get("incoming_loss"), kept[-1].get("trained_loss")
    text = "Rounds that did not help were rolled back."
    if first is not None and last is not None:
        text = f"Loss on the selection rows, which chose the model: {first:.4f} → {last:.4f}. {text}"
    error = kept[-1].get("standard_error") or 0.0
    small = all(abs(e.get("difference") or 0.0) <= 2 * (e.get("standard_error") or 0.0) for e in kept)
    if small and error:
        text += " No single round changed it by more than two standard errors: this may be noise."
    return Verdict("neutral" if small else "good", f"{len(kept)} of {count} rounds were kept", text)


def _compared(comparisons: Sequence[Comparison]) -> Verdict:
    main = comparisons[0]
    titles = {
        "helped": ("good", "Selection helped"),
        "hurt": ("bad", "Selection did not help"),
        "unclear": ("neutral", "No clear difference to uniform mixing"),
    }
    parts = []
    for each in comparisons:
        error = "" if each.standard_error is None else f" ± {each.standard_error:.4f}"
        parts.append(
            f"Loss on the {each.rows}: {each.run:.4f}; with uniform weights {each.baseline:.4f} "
            f"({signed(each.difference)}{error})."
        )
    if main.flattered:
        parts.append("It is flattered: those rows chose the weights. An eval_dataset would tell more.")
    elif len(comparisons) > 1 and main.outcome != comparisons[1].outcome:
        parts.append("The two do not say the same: trust the first.")
    if main.warnings:
        parts.append("With care: " + " ".join(main.warnings))
    return Verdict(*titles[main.outcome], " ".join(parts))


def cards(run: Run) -> list[Card]:
    """The numbers of the summary."""
    out = []
    if len(run.live):
        count = rows_carrying(run.live, CARRIED)
        text = (
            f"of {len(run.live):,} rows, that is {count / len(run.live):.0%}; with equal weights it is {CARRIED:.0%}."
        )
        out.append(Card(f"Rows that carry {CARRIED:.0%} of the weight", f"{count:,}", text))
        size = f"{effective_sample_size(run.live):.0%}"
        out.append(Card("Effective sample size", size, "of the rows; equal weights have 100%."))
    losses, evals = run.validation_points(), run.points("eval_loss")
    selection = [e for e in run.ledger if isinstance(e.get("incoming_loss"), int | float)]
    if selection:
        last = next((e["trained_loss"] for e in reversed(selection) if e.get("kept")), selection[0]["incoming_loss"])
        text = f"from {selection[0]['incoming_loss']:.3f} before the first round, in nats per token."
        out.append(Card("Loss on the selection rows", f"{last:.3f}", text))
    elif len(losses) > 1:
        (_, first), (step, last) = losses[0], losses[-1]
        text = f"from {first:.3f} before training, in nats per token, at step {step}."
        out.append(Card("Loss on trusted rows", f"{last:.3f}", text))
    elif evals:
        out.append(Card("Eval loss", f"{evals[-1][1]:.3f}", f"nats per token, at step {evals[-1][0]}."))
    total = run.told("seconds", "total")
    if total:
        share = run.told("seconds", "selection", otherwise=0.0) / total
        text = f"{share:.0%} of it for choosing the weights." if run.learned else "No time went into weights."
        out.append(Card("Time", duration(total), text))
    return out


def findings(run: Run, categories: Sequence[Category], comparisons: Sequence[Comparison]) -> list[Finding]:
    """What to look at, what may be wrong first."""
    found = [*_about_weights(run), *_about_scores(run), *_about_categories(categories)]
    found += [*_about_training(run), *_about_rounds(run)]
    found += [Finding("note", "Not in this report", text) for text in run.missing]
    if len(run.live):
        text = (
            "If rows of least weight look good to you, or rows of most weight bad, the trusted rows may not say what "
            "you mean: add trusted rows like those that were misjudged."
        )
        found.append(Finding("note", "Read the rows at both ends", text, "rows"))
    return sorted(found, key=lambda finding: finding.level != "warning")


def _about_weights(run: Run) -> Iterator[Finding]:
    if not len(run.live):
        return
    ess = effective_sample_size(run.live)
    if ess < NEARLY_COLLAPSED:
        text = f"The effective sample size is {ess:.1%} of the rows: the model may learn these few by heart."
        yield Finding("warning", "Few rows carry the training", text, "weights")
    elif ess > NEARLY_UNIFORM and run.learned:
        text = "More trusted rows, or more pilot_steps, may show a difference; or the rows are all of a kind."
        yield Finding("note", "The weights are nearly equal", text, "weights")
    weights = run.weights if run.weights is not None else run.live
    dropped = int(np.isnan(weights).sum())
    if dropped:
        text = f"{dropped:,} of {len(weights):,} rows have nothing to learn from within max_length, and no weight."
        yield Finding("note", "Rows were dropped in preparation", text, "rows")
    zero = int((run.live == 0).sum())
    if zero:
        text = f"{zero:,} rows have weight 0: the gate (filter_rate) took them out, or they were given no weight."
        yield Finding("note", "Rows without any weight", text, "rows")


def _about_scores(run: Run) -> Iterator[Finding]:
    trusted = run.trusted_scores
    if run.scores is None or not len(trusted):
        return
    if len(trusted) < FEW_TRUSTED:
        text = (
            f"The weights rest on the scores of {len(trusted)} trusted rows that the pilot had not seen (a quarter of "
            "them). A few dozen more trusted rows make them steadier."
        )
        yield Finding("warning", "Few trusted rows", text, "scores")
    scores = run.scores[~np.isnan(run.scores)]
    above = float((scores >= np.median(trusted)).mean()) if len(scores) else 0.0
    if above > 0.5:
        text = f"{above:.0%} of the training rows score at least as high as the middle trusted row."
        yield Finding("note", "Training rows score no worse than trusted ones", text, "scores")
    below = float((scores < trusted.min()).mean()) if len(scores) else 0.0
    if below >= 0.05:
        text = f"{below:.0%} of the scored rows score below every trusted row that was held back."
        yield Finding("note", "Rows unlike any trusted row", text, "scores")


def _about_categories(categories: Sequence[Category]) -> Iterator[Finding]:
    for category in categories:
        for share in category.shares:
            if share.of_rows >= 0.05 and share.of_weight < STARVED * share.of_rows:
                text = f"{category.column} = {share.value}: {share.of_rows:.0%} of the rows, "
                text += f"{share.of_weight:.0%} of the weight."
                yield Finding("note", "A kind of rows that counts little", text, "categories")


def _about_training(run: Run) -> Iterator[Finding]:
    losses = run.points("eval_loss")
    if len(losses) > 2:
        step, best = min(losses, key=lambda point: point[1])
        if losses[-1][1] > 1.02 * best:
            text = f"It was least at step {step} ({best:.4f}) and ended at {losses[-1][1]:.4f}: train for less."
            yield Finding("warning", "The eval loss rose again", text, "losses")
    share = run.told("seconds", "selection", otherwise=0.0) / (run.told("seconds", "total") or np.inf)
    if share > COSTLY and not run.ranked:
        text = f"{share:.0%} of the time. The pilot costs the same for any run: in a longer one it is a small part."
        yield Finding("note", "Choosing the weights took long", text, "cost")
    if run.record and not run.finished:
        how = "Give the command again" if run.ranked else "Resume it with --resume_from_checkpoint True"
        yield Finding("warning", "The run did not finish", f"{how}, then make the report again.")


def _about_rounds(run: Run) -> Iterator[Finding]:
    for entry in run.ledger:
        cut, count = entry.get("responses_cut") or 0, entry.get("responses") or 0
        if count and cut / count > 0.3:
            text = f"Round {entry.get('round')}: {cut} of {count} responses were cut at max_completion_length."
            yield Finding("warning", "Responses were cut", text, "rounds")
            break
    spread = [e.get("weight_std_within_group") for e in run.ledger]
    if spread and all(isinstance(std, int | float) and std < 0.1 for std in spread):
        text = "Responses to a question got nearly the same weight, so they taught little: lower the temperature."
        yield Finding("warning", "Responses hardly differ in weight", text, "rounds")
