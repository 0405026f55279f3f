"""Which setting saves how much memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from .memory import TEXTS, estimate_memory
from .shapes import ModelShape, RunShape

# What `plan --json` says of a saving, and model and run after it.
Saving = tuple[dict[str, Any], ModelShape, RunShape]


def savings(model: ModelShape, run: RunShape, adapted: ModelShape | None = None) -> list[Saving]:
    """What can be changed, most saving first; only what saves at least 1% of the whole.

    Args:
        model, run: as they are now.
        adapted (`ModelShape`, *optional*): the model with LoRA adapters, for runs that fine-tune all parameters.

    Returns:
        For each, its `name`, `settings` as the config file writes them, `saves_bytes` at the peak and `price`; then
        model and run after it.
    """
    now, found = estimate_memory(model, run).total_bytes, []
    for name, settings, other, changes in _changes(model, run, adapted):
        after = replace(run, **changes)
        saves = now - estimate_memory(other, after).total_bytes
        if saves >= 0.01 * now:
            told = {"name": name, "settings": settings, "saves_bytes": saves, "price": TEXTS["prices"][name]}
            found.append((told, other, after))
    return sorted(found, key=lambda saving: -saving[0]["saves_bytes"])


def way_to_fit(
    model: ModelShape, run: RunShape, gibibytes: float, adapted: ModelShape | None = None
) -> list[Saving] | None:
    """Changes after which the run fits, one on top of another: the least that is enough, else the one that saves most.

    Returns:
        As `savings`: empty if it fits as it is; `None` if no combination was found.
    """
    chosen: list[Saving] = []
    while not estimate_memory(model, run).fits(gibibytes):
        options = savings(model, run, adapted)
        if not options:
            return None
        enough = [option for option in options if estimate_memory(*option[1:]).fits(gibibytes)]
        chosen.append(enough[-1] if enough else options[0])
        _, model, run = chosen[-1]
    return chosen


def _changes(
    model: ModelShape, run: RunShape, adapted: ModelShape | None
) -> Iterator[tuple[str, dict[str, Any], ModelShape, dict[str, Any]]]:
    """Names, settings, the model after it, and what changes of the run."""
    frozen = model.adapter_bytes > 0 or not run.trains
    small = replace(model, weight_bytes=2, trainable_bytes=2 * model.trainable)
    half, settings = run.rows // 2, dict[str, Any]()
    if not run.checkpointing:
        yield "gradient checkpointing", {"gradient_checkpointing": True}, model, {"checkpointing": True}
    if half:
        steps = -(-run.rows * run.accumulation // half)
        settings = {"per_device_train_batch_size": half, "gradient_accumulation_steps": steps}
        yield "smaller micro-batch", settings, model, {"rows": half, "accumulation": steps}
    if run.pilots and run.trains:
        yield "weights chosen beforehand", {"weight_estimator": "none"}, model, {"estimator": "none"}
    if run.evaluation_rows > run.rows:
        settings = {"per_device_eval_batch_size": run.rows}
        yield "smaller evaluation batch", settings, model, {"evaluation_rows": run.rows}
    if run.tokens > 256:
        yield "shorter rows", {"max_length": run.tokens // 2}, model, {"tokens": run.tokens // 2}
    if run.attention == "eager":
        yield "sdpa attention", {"attn_implementation": "sdpa"}, model, {"attention": "sdpa"}
    if model.weight_bytes == 4:
        to = replace(model, weight_bytes=2) if frozen else small
        yield f"bf16 weights{', frozen' if frozen else ''}", {"dtype": "bfloat16"}, to, {}
    if frozen and run.quantisation != "4bit_nested":
        settings = {"load_in_4bit": True, "use_bnb_nested_quant": True, "dtype": "bfloat16"}
        settings |= {"load_in_8bit": False} if run.quantisation == "8bit" else {}
        # TRL makes the adapters bf16, too.
        to = replace(small, adapter_bytes=min(2, model.adapter_bytes))
        yield "4-bit base (QLoRA)", settings, to, {"quantisation": "4bit_nested"}
    rank = max(layer.rank for layer in model.linears)
    if rank > 4:
        linears = tuple(layer._replace(rank=layer.rank // 2) for layer in model.linears)
        less = model.adapter_parameters - replace(model, linears=linears).adapter_parameters
        size = model.trainable_bytes - less * model.adapter_bytes
        to = replace(model, linears=linears, trainable=model.trainable - less, trainable_bytes=size)
        yield "smaller rank", {"lora_r": rank // 2}, to, {}
    if adapted is not None and not frozen:
        yield "LoRA adapters", {"use_peft": True, "lora_target_modules": "all-linear"}, adapted, {}
    if run.optimizer.startswith("adamw"):
        if "8bit" not in run.optimizer:
            yield "8-bit AdamW", {"optim": "adamw_bnb_8bit"}, model, {"optimizer": "adamw_bnb_8bit"}
        if run.device == "cuda":
            yield "paged 8-bit AdamW", {"optim": "paged_adamw_8bit"}, model, {"optimizer": "paged_adamw_8bit"}
