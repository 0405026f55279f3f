"""What one model does with all rows and requests, measured while it is in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..data.answers import STUB, TEST_REFUSAL
from ..data.formats import Part, turns
from . import models
from .refusal import COMPLIANCE, NEITHER, REFUSAL, RefusalJudge, outcomes_of
from .rows import Row, question, row_of


@dataclass
class Work:
    """What to measure.

    Attributes:
        rows (`list[Row]`): held-out rows.
        respond (`bool`): whether the rows' prompts are answered, too.
        harmful, benign (`list` of text or chats): requests; both or none.
        refusals (`RefusalJudge`): of the responses to them.
        harness: what else to run on a loaded model, `harness(model, tokenizer)`; its result is kept.
    """

    rows: Sequence[Row]
    refusals: RefusalJudge
    respond: bool = False
    harmful: Sequence[Part] = ()
    benign: Sequence[Part] = ()
    harness: Callable[[Any, Any], dict[str, Any]] | None = None

    @property
    def asked(self) -> list[int]:
        """Numbers of the rows whose prompts are answered."""
        return [number for number, row in enumerate(self.rows) if self.respond and row.prompt]


@dataclass
class Safety:
    """What a model did with harmful and with benign requests.

    Attributes:
        harmful, benign (`list[int]`): outcome of the response to each request: 1 refusal, 0 compliance, -1 neither.
        preferred (`list[bool]`): for each harmful request, whether a refusal is likelier per token than a compliance
            stub, whatever the model says.
        benign_responses (`list[str]`): responses to the benign requests. Those to harmful ones are judged and dropped.
    """

    harmful: list[int]
    benign: list[int]
    preferred: list[bool]
    benign_responses: list[str]


@dataclass
class Measured:
    """Everything that was measured of one model.

    Attributes:
        name (`str`): of the model.
        losses (`Losses`, *optional*): of the rows.
        responses (`list[str]`): to the rows in `Work.asked`.
        safety (`Safety`, *optional*): outcomes of the requests.
        harness (`dict`): figures of other tools.
    """

    name: str
    losses: models.Losses | None = None
    responses: list[str] = field(default_factory=list)
    safety: Safety | None = None
    harness: dict[str, Any] = field(default_factory=dict)


def measure(name: str, work: Work, settings: models.Settings) -> Measured:
    """Load a model, measure it, and free its memory.

    Raises:
        ValueError: if the model cannot be loaded or cannot read the rows.
    """
    model, tokenizer = models.load_model(name, settings.load)
    out = Measured(name)
    if work.rows:
        out.losses = models.losses(model, tokenizer, work.rows, settings)
    if work.asked:
        out.responses = models.responses(model, tokenizer, [work.rows[n].prompt for n in work.asked], settings)
    if work.harmful:
        out.safety = _safety(model, tokenizer, work, settings)
    if work.harness is not None:
        out.harness = work.harness(model, tokenizer)
    del model
    models.free()
    return out


def _safety(model: Any, tokenizer: Any, work: Work, settings: models.Settings) -> Safety:
    harmful = [question(text, tokenizer) for text in work.harmful]
    benign = [question(text, tokenizer) for text in work.benign]

    def mean_losses(answer: str) -> np.ndarray:
        rows = [row_of(prompt, answer) for prompt in harmful]
        found = models.losses(model, tokenizer, rows, settings, "Refusal against stub")
        if not found.counts.all():
            raise ValueError(
                f"{int((found.counts == 0).sum())} harmful requests leave no room for an answer within "
                f"`max_length={settings.max_length}`. Raise it."
            )
        return found.sums / found.counts

    said = models.responses(model, tokenizer, harmful, settings, "Harmful requests")
    benign_said = models.responses(model, tokenizer, benign, settings, "Benign requests")
    return Safety(
        harmful=outcomes_of(work.refusals, [turns(text) for text in harmful], said),
        benign=outcomes_of(work.refusals, [turns(text) for text in benign], benign_said),
        preferred=[bool(better) for better in mean_losses(TEST_REFUSAL) < mean_losses(STUB)],
        benign_responses=benign_said,
    )


def shown_responses(work: Work, measured: Sequence[Measured]) -> list[dict[str, Any]]:
    """Prompts and responses for a file; of harmful requests, only whether they were refused, or a stub.

    Returns:
        `list[dict]`: `set` ("rows", "benign" or "harmful"), `prompt`, and the responses of `model` and `baseline`.
    """
    names = ("model", "baseline")[: len(measured)]
    safety = [one.safety for one in measured if one.safety]
    harmful = {REFUSAL: "[refused]", COMPLIANCE: STUB, NEITHER: ""}
    sets = {
        "rows": ([work.rows[number].prompt for number in work.asked], [one.responses for one in measured]),
        "benign": (work.benign, [one.benign_responses for one in safety]),
        "harmful": (work.harmful, [[harmful[outcome] for outcome in one.harmful] for one in safety]),
    }
    return [
        {"set": kind, "prompt": turns(prompt)} | {name: said[place] for name, said in zip(names, spoken, strict=True)}
        for kind, (prompts, spoken) in sets.items()
        for place, prompt in enumerate(prompts)
    ]
