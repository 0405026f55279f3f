"""Judges that score one response at a time: a reward model, and stand-ins for where there is none."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..data.assets import minilm_folder
from ..data.formats import turns
from . import models
from .preference import FIRST, SECOND, UNDECIDED, PairwiseJudge, ask_both_orders
from .refusal import load_object
from .rows import Row, question, row_of


@dataclass(frozen=True)
class Scorer:
    """Scores responses one by one, so that order plays no role.

    Attributes:
        score: rows (with prompts and reference answers) and responses to a score per response; larger is better.
        note (`str`): what the scores are, for every output.
        stand_in (`bool`): whether they merely stand in for a judgement of quality.
    """

    score: Callable[[Sequence[Row], Sequence[str]], list[float]]
    note: str
    stand_in: bool = True


def verdicts(
    judge: PairwiseJudge | Scorer, rows: Sequence[Row], model: Sequence[str], baseline: Sequence[str]
) -> tuple[list[int], list[int]]:
    """Verdicts in both orders (see `ask_both_orders`); of a scorer, the response of the higher score is better."""
    if not isinstance(judge, Scorer):
        return ask_both_orders(judge, [turns(row.prompt) for row in rows], model, baseline)
    pairs = list(zip(judge.score(rows, model), judge.score(rows, baseline), strict=True))
    forward, backward = (
        [UNDECIDED if pair[0] == pair[1] else better if pair[0] > pair[1] else worse for pair in pairs]
        for better, worse in ((FIRST, SECOND), (SECOND, FIRST))
    )
    return forward, backward


def find_judge(name: str, settings: models.Settings) -> Callable[[], PairwiseJudge | Scorer]:
    """What loads a judge, once the models have left the memory; what is wrong with it is found at once.

    Args:
        name (`str`): `"reward:NAME"` (a reward model on the hub or in a folder), `"embedding"` or `"embedding:NAME"`
            (similarity to the reference; MiniLM-L6 fetched from a package by default), or `"PACKAGE.MODULE:OBJECT"`
            (a `PairwiseJudge`).
        settings (`Settings`): of the evaluation.

    Raises:
        ValueError: if there is no such judge, or the reward model has more than one output.
    """
    kind, _, rest = name.partition(":")
    if kind == "embedding":
        folder = rest or str(minilm_folder())
        return lambda: similarity(folder, settings, rest or "MiniLM-L6-v2")
    if not rest:
        raise ValueError(
            f"Unknown judge {name!r}; known: reward:NAME, embedding, embedding:NAME or PACKAGE.MODULE:OBJECT."
        )
    if kind != "reward":
        judge = load_object(name, "judge")
        return lambda: judge
    from transformers import AutoConfig

    try:
        outputs = AutoConfig.from_pretrained(rest).num_labels
    except (OSError, ValueError) as error:
        raise ValueError(f"Could not load the reward model {rest!r}: {error}") from error
    if outputs != 1:
        raise ValueError(
            f"The reward model {rest!r} has {outputs} outputs, not one: it is a classifier of another kind."
        )
    return lambda: reward_model(rest, settings)


def reward_model(name: str, settings: models.Settings) -> Scorer:
    """Scores of a reward model: `AutoModelForSequenceClassification` with one output."""
    from transformers import AutoTokenizer, pipeline

    # Of a text that is too long, the end holds the response.
    tokenizer = AutoTokenizer.from_pretrained(name, truncation_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    chats = bool(tokenizer.chat_template)
    classify = pipeline(
        "text-classification",
        model=name,
        tokenizer=tokenizer,
        device_map=models.device(),
        batch_size=settings.batch_size,
        function_to_apply="none",
        add_special_tokens=not chats,
        truncation=True,
        max_length=min(settings.max_length, tokenizer.model_max_length),
    )
    classify.model.config.get_text_config().pad_token_id = tokenizer.pad_token_id

    def score(rows: Sequence[Row], responses: Sequence[str]) -> list[float]:
        texts: list[Any] = []
        for row, response in zip(rows, responses, strict=True):
            if chats:
                said = row_of(question(row.prompt, tokenizer), response)
                texts.append(tokenizer.apply_chat_template([*said.prompt, *said.completion], tokenize=False))
            else:
                texts.append({"text": turns(row.prompt), "text_pair": response})
        return [found["score"] for found in classify(texts)]

    return Scorer(score, f"reward model {name}", stand_in=False)


def similarity(folder: str, settings: models.Settings, name: str) -> Scorer:
    """Stand-in for a judge: cosine similarity of a response to the row's reference answer, by sentence embeddings.

    Args:
        folder (`str`): hub name or folder of an encoder whose embeddings are means over tokens.
    """
    from transformers import AutoModel, AutoTokenizer

    model = AutoModel.from_pretrained(folder, device_map=models.device()).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)

    @torch.no_grad()
    def embed(texts: list[str]) -> torch.Tensor:
        tokens = tokenizer(texts, return_tensors="pt", padding=True, truncation=True, max_length=256).to(model.device)
        mask = tokens["attention_mask"].unsqueeze(-1)
        means = (model(**tokens).last_hidden_state * mask).sum(1) / mask.sum(1)
        return torch.nn.functional.normalize(means.float(), dim=-1)

    def score(rows: Sequence[Row], responses: Sequence[str]) -> list[float]:
        out: list[float] = []
        for pairs in models.in_batches(list(zip(rows, responses, strict=True)), settings, "Judging"):
            references = embed([turns(row.completion) for row, _ in pairs])
            out += (embed([text for _, text in pairs]) * references).sum(-1).tolist()
        return out

    return Scorer(score, f"stand-in, no judge of quality: embedding similarity to the reference ({name})")
