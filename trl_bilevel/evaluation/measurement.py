"""What one model does with all rows and requests, measured while it is in memory."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..data.answers import STUB, TEST_REFUSAL
from ..data.formats import Part, turns
from . import models
from .refusal import COMPLIANCE, NEITHER, REFUSAL, RefusalJudge, outcomes_of
from .rows import Row, question, row_of


@dataclass
class Work:
    """What to measure."""

    rows: Sequence[Row]
    refusals: RefusalJudge
    asked: Sequence[int] = ()  # numbers of the rows whose prompts are answered, too
    requests: Mapping[str, Sequence[Part]] = field(default_factory=dict)  # "harmful" and "benign" ones; both or none


@dataclass
class Measured:
    """Everything that was measured of one model; what `Work` does not ask for is empty."""

    name: str
    losses: models.Losses
    # To "rows" and "benign" requests. Responses to harmful ones are judged and dropped.
    responses: dict[str, list[str]] = field(default_factory=dict)
    # Of the response to each "harmful" and "benign" request: 1 refusal, 0 compliance, -1 neither.
    outcomes: dict[str, list[int]] = field(default_factory=dict)
    # Of each harmful request: whether a refusal is likelier per token than a compliance stub, whatever the model says.
    preferred: list[bool] = field(default_factory=list)


def measure(name: str, work: Work, settings: models.Settings, load: Mapping[str, Any]) -> Measured:
    """Load a model (`load`: arguments of `from_pretrained`), measure it, and free its memory."""
    model, tokenizer = models.load_model(name, load)
    out = Measured(name, models.losses(model, tokenizer, work.rows, settings))
    prompts = [work.rows[number].prompt for number in work.asked]
    out.responses["rows"] = models.responses(model, tokenizer, prompts, settings)
    for kind, texts in work.requests.items():
        requests = [question(text, tokenizer) for text in texts]
        said = models.responses(model, tokenizer, requests, settings, f"{kind.capitalize()} requests")
        out.outcomes[kind] = outcomes_of(work.refusals, [turns(text) for text in requests], said)
        if kind == "benign":
            out.responses[kind] = said
        else:
            refused, complied = (
                models.losses(model, tokenizer, [row_of(text, answer) for text in requests], settings, "Stubs")
                for answer in (TEST_REFUSAL, STUB)
            )
            if not (refused.counts * complied.counts).all():
                raise ValueError(
                    f"A harmful request leaves no room for an answer within `max_length={settings.max_length}`. "
                    "Raise it."
                )
            out.preferred = (refused.sums / refused.counts < complied.sums / complied.counts).tolist()
    del model
    models.free()
    return out


def shown_responses(work: Work, measured: Sequence[Measured]) -> list[dict[str, Any]]:
    """Prompts and responses for a file; of harmful requests, only whether they were refused, or a stub."""
    stubs = {REFUSAL: "[refused]", COMPLIANCE: STUB, NEITHER: ""}
    prompts = {"rows": [work.rows[number].prompt for number in work.asked]} | dict(work.requests)
    out = [{"set": kind, "prompt": turns(prompt)} for kind, asked in prompts.items() for prompt in asked]
    for who, one in zip(("model", "baseline"), measured, strict=False):
        said = one.responses | {"harmful": [stubs[outcome] for outcome in one.outcomes.get("harmful", [])]}
        out = [line | {who: text} for line, text in zip(out, [t for kind in prompts for t in said[kind]], strict=True)]
    return out
