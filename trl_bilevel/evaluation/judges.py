"""Judges that score one response at a time: a reward model, and stand-ins for where there is none."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch

from ..data.assets import minilm_folder
from . import models
from .preference import FIRST, SECOND, UNDECIDED, PairwiseJudge, ask_both_orders
from .refusal import load_object
from .rows import Row, answered, plain, question

KINDS = "reward:NAME, embedding, loss:NAME or PACKAGE.MODULE:OBJECT"


class Scorer(Protocol):
    """Scores responses one by one, so that order plays no role.

    Attributes:
        note (`str`): what the scores are, for every output.
        stand_in (`bool`): whether they merely stand in for a judgement of quality.
    """

    note: str
    stand_in: bool

    def score(self, rows: Sequence[Row], responses: Sequence[str]) -> list[float]:
        """A score per response `[n]`, larger is better; the rows hold the prompts and the reference answers."""
        ...


class RewardModel:
    """Scores of a reward model: `AutoModelForSequenceClassification` with one output.

    Args:
        name (`str`): hub name or folder.
        settings (`Settings`): batch size, longest input, progress.

    Raises:
        ValueError: if it cannot be loaded, or has more than one output.
    """

    stand_in = False

    def __init__(self, name: str, settings: models.Settings):
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        _reward_config(name)
        self.note = f"reward model {name}"
        self.settings = settings
        self.model = AutoModelForSequenceClassification.from_pretrained(
            name, dtype="auto", device_map=models.device()
        ).eval()
        # Of a text that is too long, the end holds the response.
        self.tokenizer = AutoTokenizer.from_pretrained(name, truncation_side="left")
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.model.config.get_text_config().pad_token_id = self.tokenizer.pad_token_id

    def score(self, rows: Sequence[Row], responses: Sequence[str]) -> list[float]:
        """The model's output for each prompt with its response `[n]`."""
        chats = bool(self.tokenizer.chat_template)
        texts: list[Any] = []
        for row, response in zip(rows, responses, strict=True):
            if chats:
                whole = answered(question(row.prompt, self.tokenizer), response)
                texts.append(self.tokenizer.apply_chat_template([*whole.prompt, *whole.completion], tokenize=False))
            else:
                texts.append((plain(row.prompt), response))
        limit = min(self.settings.max_length, self.tokenizer.model_max_length)

        def forward(batch: list[Any]) -> torch.Tensor:
            inputs = [batch] if chats else [list(part) for part in zip(*batch, strict=True)]
            tokens = self.tokenizer(
                *inputs,
                return_tensors="pt",
                padding=True,
                truncation=True,
                max_length=limit,
                add_special_tokens=not chats,
            )
            return self.model(**tokens.to(self.model.device)).logits[:, 0]

        return _in_batches(forward, texts, self.settings)


class EmbeddingSimilarity:
    """Stand-in for a judge: cosine similarity of a response to the row's reference answer, by sentence embeddings.

    Args:
        folder (`str`): hub name or folder of an encoder whose embeddings are means over tokens.
        settings (`Settings`): batch size, progress.
    """

    stand_in = True

    def __init__(self, folder: str, settings: models.Settings, name: str | None = None):
        from transformers import AutoModel, AutoTokenizer

        self.note = f"stand-in, no judge of quality: embedding similarity to the reference ({name or folder})"
        self.settings = settings
        self.model = AutoModel.from_pretrained(folder, device_map=models.device()).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)

    def score(self, rows: Sequence[Row], responses: Sequence[str]) -> list[float]:
        """Cosine similarity `[n]` of each response to its row's reference, in [-1, 1]."""
        texts = [*responses, *(plain(row.completion) for row in rows)]
        vectors = np.array(_in_batches(self._embed, texts, self.settings)).reshape(2, len(rows), -1)
        return [float(value) for value in (vectors[0] * vectors[1]).sum(-1)]

    def _embed(self, texts: list[str]) -> torch.Tensor:
        tokens = self.tokenizer(texts, return_tensors="pt", padding=True, truncation=True, max_length=256)
        tokens = tokens.to(self.model.device)
        states = self.model(**tokens).last_hidden_state
        mask = tokens["attention_mask"].unsqueeze(-1)
        return torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)


class ModelLoss:
    """Stand-in for a judge: the likelihood of a response under a given model, per token; an empty one scores least.

    Args:
        name (`str`): hub name or folder of the model, or folder of an adapter.
        settings (`Settings`): loading, batch size, progress.
    """

    stand_in = True

    def __init__(self, name: str, settings: models.Settings):
        self.note = f"stand-in, no judge of quality: likelihood under {name}"
        self.settings = settings
        self.model, self.tokenizer = models.load_model(name, settings.load)

    def score(self, rows: Sequence[Row], responses: Sequence[str]) -> list[float]:
        """Minus the mean loss per token `[n]`, in nats."""
        written = [
            answered(question(row.prompt, self.tokenizer), text) for row, text in zip(rows, responses, strict=True)
        ]
        found = models.losses(self.model, self.tokenizer, written, self.settings, "Judging")
        means = found.sums / np.maximum(found.counts, 1)
        return [-float(mean) if text else -float("inf") for mean, text in zip(means, responses, strict=True)]


SCORERS = (RewardModel, EmbeddingSimilarity, ModelLoss)


class ScorePairs:
    """A pairwise judge from a scorer: the response of the higher score; undecided if they are equal.

    Args:
        scorer (`Scorer`): gives the scores.
        rows (`list[Row]` `[n]`): what the pairs that `judge` is given belong to, in their order.
    """

    def __init__(self, scorer: Scorer, rows: Sequence[Row]):
        self.scorer = scorer
        self.rows = rows

    def judge(self, prompts: list[str], completions: list[list[str]]) -> list[int]:
        """0, 1 or -1 for each pair `[n]`."""
        first, second = (self.scorer.score(self.rows, [pair[place] for pair in completions]) for place in (0, 1))
        return [UNDECIDED if a == b else FIRST if a > b else SECOND for a, b in zip(first, second, strict=True)]


def verdicts(
    judge: PairwiseJudge | Scorer, rows: Sequence[Row], model: Sequence[str], baseline: Sequence[str]
) -> tuple[list[int], list[int]]:
    """Verdicts in both orders (see `ask_both_orders`); a scorer, blind to order, is asked once."""
    if isinstance(judge, SCORERS):
        pairs = [[a, b] for a, b in zip(model, baseline, strict=True)]
        forward = ScorePairs(judge, rows).judge([], pairs)
        return forward, [{FIRST: SECOND, SECOND: FIRST, UNDECIDED: UNDECIDED}[verdict] for verdict in forward]
    return ask_both_orders(judge, [plain(row.prompt) for row in rows], model, baseline)  # type: ignore[arg-type]


def load_judge(name: str, settings: models.Settings) -> PairwiseJudge | Scorer:
    """A judge from the command line.

    Args:
        name (`str`): `"reward:NAME"` (a reward model on the hub or in a folder), `"embedding"` or `"embedding:NAME"`
            (similarity to the reference; MiniLM-L6 fetched from a package by default), `"loss:NAME"` (likelihood under
            a model), or `"PACKAGE.MODULE:OBJECT"` (a `PairwiseJudge`).
        settings (`Settings`): of the evaluation.

    Raises:
        ValueError: if there is no such judge.
    """
    kind, _, rest = name.partition(":")
    if kind == "embedding":
        return (
            EmbeddingSimilarity(rest, settings)
            if rest
            else EmbeddingSimilarity(str(minilm_folder()), settings, "MiniLM-L6-v2")
        )
    check_judge(name)
    if kind in ("reward", "loss"):
        return RewardModel(rest, settings) if kind == "reward" else ModelLoss(rest, settings)
    return load_object(name, "judge")  # type: ignore[return-value]


def check_judge(name: str) -> None:
    """Find what is wrong with a judge before the models are run; arguments and errors as for `load_judge`."""
    kind, _, rest = name.partition(":")
    if name == "embedding":
        minilm_folder()
    elif not rest:
        raise ValueError(f"Unknown judge {name!r}; known: {KINDS}.")
    elif kind == "reward":
        _reward_config(rest)
    elif kind not in ("embedding", "loss"):
        load_object(name, "judge")


def _reward_config(name: str) -> None:
    from transformers import AutoConfig

    try:
        outputs = AutoConfig.from_pretrained(name).num_labels
    except (OSError, ValueError) as error:
        raise ValueError(f"Could not load the reward model {name!r}: {error}") from error
    if outputs != 1:
        raise ValueError(
            f"The reward model {name!r} has {outputs} outputs, not one: it is a classifier of another kind."
        )


def _in_batches(
    function: Callable[[list[Any]], torch.Tensor], items: Sequence[Any], settings: models.Settings
) -> list[Any]:
    out: list[Any] = []
    with torch.no_grad():
        for start in settings.bar(range(0, len(items), settings.batch_size), "Judging"):
            out += function(list(items[start : start + settings.batch_size])).float().cpu().tolist()
    return out
