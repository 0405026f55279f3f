"""Judges of pairs: a reward model, or one of the user's own, asked in both orders so that a bias for one cancels."""

from collections.abc import Callable, Sequence
from typing import Any

from ..data.formats import turns
from .models import Settings, device
from .refusal import PairwiseJudge, load_object
from .rows import Row, question, row_of
from .statistics import FIRST, SECOND, UNDECIDED


class RewardModel:
    """Scores of a reward model: `AutoModelForSequenceClassification` with one output. Order plays no role."""

    def __init__(self, name: str, settings: Settings):
        from transformers import AutoTokenizer, pipeline

        self.note = f"reward model {name}"
        # Of a text that is too long, the end holds the response.
        self.tokenizer = AutoTokenizer.from_pretrained(name, truncation_side="left")
        self.tokenizer.pad_token = self.tokenizer.pad_token or self.tokenizer.eos_token
        self.classify = pipeline(
            "text-classification",
            model=name,
            tokenizer=self.tokenizer,
            device_map=device(),
            batch_size=settings.batch_size,
            function_to_apply="none",
            # A chat template writes them itself.
            add_special_tokens=not self.tokenizer.chat_template,
            truncation=True,
            max_length=min(settings.max_length, self.tokenizer.model_max_length),
        )
        self.classify.model.config.get_text_config().pad_token_id = self.tokenizer.pad_token_id

    def score(self, rows: Sequence[Row], responses: Sequence[str]) -> list[float]:
        """The model's output for each row's prompt with its response `[n]`; larger is better."""
        texts: list[Any] = []
        for row, response in zip(rows, responses, strict=True):
            said = row_of(question(row.prompt, self.tokenizer), response)
            if self.tokenizer.chat_template:
                texts.append(self.tokenizer.apply_chat_template([*said.prompt, *said.completion], tokenize=False))
            else:
                texts.append({"text": turns(row.prompt), "text_pair": response})
        return [found["score"] for found in self.classify(texts)]


def verdicts(
    judge: PairwiseJudge | RewardModel, rows: Sequence[Row], model: Sequence[str], baseline: Sequence[str]
) -> tuple[list[int], list[int]]:
    """Verdicts in both orders (see `ask_both_orders`); a reward model prefers the response of the higher score."""
    if not isinstance(judge, RewardModel):
        return ask_both_orders(judge, [turns(row.prompt) for row in rows], model, baseline)
    pairs = list(zip(judge.score(rows, model), judge.score(rows, baseline), strict=True))
    forward = [UNDECIDED if a == b else FIRST if a > b else SECOND for a, b in pairs]
    return forward, [{FIRST: SECOND, SECOND: FIRST}.get(verdict, UNDECIDED) for verdict in forward]


def ask_both_orders(
    judge: PairwiseJudge, prompts: Sequence[str], model: Sequence[str], baseline: Sequence[str]
) -> tuple[list[int], list[int]]:
    """A judge's verdicts with the model's response first, and with the baseline's response first."""
    out = []
    for first, second in ((model, baseline), (baseline, model)):
        pairs = [[a, b] for a, b in zip(first, second, strict=True)]
        verdicts = [int(verdict) for verdict in judge.judge(list(prompts), pairs)]
        if len(verdicts) != len(pairs):
            raise ValueError(f"{type(judge).__name__}.judge gave {len(verdicts)} verdicts for {len(pairs)} pairs.")
        out.append(verdicts)
    return out[0], out[1]


def find_judge(name: str, settings: Settings) -> Callable[[], PairwiseJudge | RewardModel]:
    """What loads a judge, once the models have left the memory; what is wrong with its name is found at once."""
    kind, _, rest = name.partition(":")
    if not rest:
        raise ValueError(f"Unknown judge {name!r}; known: reward:NAME or PACKAGE.MODULE:OBJECT.")
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
    return lambda: RewardModel(rest, settings)
