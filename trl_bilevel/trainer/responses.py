"""The responses of a round: their scores, their weights, and the books that a person can read."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object
from torch import Tensor

from ..core.implicit import implicit_weights, question_weights
from ..data.identity import SAMPLE_ID
from . import refine_setup
from .errors import NonFiniteScoreError
from .rounds import write_responses

if TYPE_CHECKING:
    from .self_refine_trainer import SelfRefineTrainer

logger = logging.getLogger(__name__)

# Weights of mean one that spread by less than this are as good as equal.
FLAT = 0.1


def weigh(
    trainer: SelfRefineTrainer,
    prompts: list[Any],
    completions: list[Any],
    completion_ids: list[list[int]],
    sample_ids: list[int],
    own_scores: Tensor,
) -> list[float]:
    """Weights of this process's responses; statistics go to the ledger, all responses to a parquet file.

    Args:
        trainer: of the run.
        prompts, completions: as TRL hands them to a reward function (text or messages), the G responses of a question
            after one another.
        completion_ids: sampled token ids.
        sample_ids: question of each response.
        own_scores (`Tensor` float32 `[n]`): of these responses.

    Returns:
        `list[float]`: implicit weight times explicit weight of the question; NaN for a response that is left out.
    """
    args, gather = trainer.args, trainer.accelerator.gather
    device, generations, group = trainer.accelerator.device, trainer.args.num_generations, trainer.num_generations
    assert generations is not None
    ends = {*trainer.eos_token_ids, trainer._tokenizer.pad_token_id}
    # A back end may give nothing at all.
    cut = torch.tensor([bool(ids) and ids[-1] not in ends for ids in completion_ids])
    if trainer.mask_truncated_completions:
        own_scores = own_scores.masked_fill(cut, torch.nan)
    scores = gather(own_scores.to(device)).cpu()
    ids = gather(torch.tensor(sample_ids, device=device)).cpu()
    explicit = trainer.explicit_weights()[ids]
    weights = implicit_weights(scores, group, args.implicit_weight_temperature)
    weight_spread = _spread_within(weights, group)
    if args.question_weighting:
        weights = weights * question_weights(explicit[::generations]).repeat_interleave(generations)
    texts = [gather_object([refine_setup.text_of(part) for part in parts]) for parts in (prompts, completions)]
    cuts = gather_object(cut.tolist())
    lengths = gather_object([len(part) for part in completion_ids])
    known = scores[~torch.isnan(scores)]
    if bool((~torch.isfinite(scores) & ~(torch.tensor(cuts) & trainer.mask_truncated_completions)).any()):
        raise NonFiniteScoreError(
            f"Responses of round {len(trainer.ledger)} have a NaN or infinite score. Lower `learning_rate` or "
            "`pilot_learning_rate`, or use bf16 in place of fp16."
        )
    spread = _spread_within(scores, group)
    trainer.rounds.generation = {
        "questions": len(ids) // generations,
        "responses": len(ids),
        "responses_cut": sum(cuts),
        "responses_empty": sum(not text.strip() for text in texts[1]),
        "score_mean": float(known.mean()),
        "score_std": float(known.std(unbiased=False)),
        "score_std_within_group": spread,
        "weight_std_within_group": weight_spread,
    }
    if len(known) == 0:
        logger.warning(
            f"Round {len(trainer.ledger)}: every response was cut at `max_completion_length` and left out "
            "(`mask_truncated_completions=True`). Raise it: nothing is learned from these responses."
        )
    elif weight_spread < FLAT and (args.response_estimator != "value_function" or trainer.ledger):
        # A tracker equals the model in the first round.
        logger.warning(
            f"Round {len(trainer.ledger)}: the responses' weights hardly differ (standard deviation "
            f"{weight_spread:.3f} around 1), so the responses have next to no effect: their scores spread by "
            f"{spread:.4f} nats per token, and `implicit_weight_temperature` is {args.implicit_weight_temperature:g}. "
            f"Lower it{'' if args.response_estimator == 'value_function' else ', raise `lookahead_steps`'}, or train "
            "offline first."
        )
    if trainer.accelerator.is_main_process:
        rows = {"prompt": texts[0], "response": texts[1], "tokens": lengths, "cut": cuts}
        rows |= {SAMPLE_ID: ids.tolist(), "score": scores.tolist(), "weight": weights.tolist()}
        rows |= {"question_weight": explicit.tolist()}
        write_responses(args.output_dir, len(trainer.ledger), rows)
    start = trainer.accelerator.process_index * len(prompts)
    return weights[start : start + len(prompts)].tolist()


@contextmanager
def parameters_kept(model: torch.nn.Module) -> Iterator[None]:
    """Put parameters and buffers back afterwards, as they were.

    For continuous batching TRL turns the whole model into bf16 in place, and leaves it so: optimizer, snapshot and
    tracker would then hold other dtypes than the model.
    """
    parameters = [(p, p.data) for p in model.parameters()]
    buffers = [(m, name, b) for m in model.modules() for name, b in m.named_buffers(recurse=False)]
    try:
        yield
    finally:
        for parameter, data in parameters:
            if parameter.data.dtype != data.dtype:
                parameter.data = data
        for module, name, buffer in buffers:
            if getattr(module, name).dtype != buffer.dtype:
                setattr(module, name, buffer)


def _spread_within(values: Tensor, group: int) -> float:
    """Mean over the groups of the standard deviation within a group; groups with a response left out do not count."""
    spread = values.view(-1, group).std(-1, unbiased=False)
    return float(spread[~torch.isnan(spread)].mean())


@torch.no_grad()
def score(trainer: SelfRefineTrainer, prompt_ids: list[list[int]], completion_ids: list[list[int]]) -> Tensor:
    """Score of every response of this process, float32 `[n]` on the CPU, on the token ids that were sampled."""
    trainer.scoring_host.step = trainer.state.global_step
    with torch.enable_grad():
        trainer.estimator.prepare_scoring()
    training = trainer.model.training
    trainer.model.eval()
    rows = [
        {"input_ids": [*prompt, *answer], "labels": [-100] * len(prompt) + list(answer), SAMPLE_ID: -1}
        for prompt, answer in zip(prompt_ids, completion_ids, strict=True)
    ]
    collate, size = trainer.offline.trainer.data_collator, trainer.args.per_device_train_batch_size
    scores = [
        trainer.estimator.response_scores(collate(rows[start : start + size])).float().cpu()
        for start in range(0, len(rows), size)
    ]
    trainer.model.train(training)
    return torch.cat(scores)
