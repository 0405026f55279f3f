"""Which setting saves how much memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

from .memory import estimate_memory
from .shapes import ModelShape, RunShape


class Saving(NamedTuple):
    """A change of settings that saves memory."""

    name: str
    price: str  # what it costs
    settings: dict[str, Any]  # the options to set, as the config file writes them
    model: ModelShape  # after the change, as `run`
    run: RunShape
    saves: int = 0  # bytes at the peak, the reserve included

    def told(self) -> dict[str, Any]:
        """What `plan --json` says of it."""
        return {"name": self.name, "settings": self.settings, "saves_bytes": self.saves, "price": self.price}


def savings(model: ModelShape, run: RunShape, adapted: ModelShape | None = None) -> list[Saving]:
    """What can be changed, most saving first; only what saves at least 1% of the whole.

    Args:
        model, run: as they are now.
        adapted (`ModelShape`, *optional*): the model with LoRA adapters, for runs that fine-tune all parameters.
    """
    now = estimate_memory(model, run).total_bytes
    found = [
        x._replace(saves=now - estimate_memory(x.model, x.run).total_bytes) for x in _changes(model, run, adapted)
    ]
    return sorted((x for x in found if x.saves >= 0.01 * now), key=lambda saving: -saving.saves)


def way_to_fit(
    model: ModelShape, run: RunShape, gibibytes: float, adapted: ModelShape | None = None
) -> list[Saving] | None:
    """Changes after which the run fits, one on top of another: the least that is enough, else the one that saves most.

    Returns:
        `list[Saving]`: empty if it fits as it is; `None` if no combination was found.
    """
    chosen: list[Saving] = []
    while not estimate_memory(model, run).fits(gibibytes):
        options = savings(model, run, adapted)
        if not options:
            return None
        enough = [option for option in options if estimate_memory(option.model, option.run).fits(gibibytes)]
        chosen.append(enough[-1] if enough else options[0])
        model, run = chosen[-1].model, chosen[-1].run
    return chosen


def _changes(model: ModelShape, run: RunShape, adapted: ModelShape | None) -> Iterator[Saving]:
    def change(name: str, price: str, settings: dict[str, Any], to: ModelShape = model, **changes: Any) -> Saving:
        return Saving(name, price, settings, to, replace(run, **changes))

    frozen = bool(model.adapter_bytes) or not run.trains
    if not run.checkpointing:
        price = "one more forward per step: about a third more time"
        yield change("gradient checkpointing", price, {"gradient_checkpointing": True}, checkpointing=True)
    if run.rows > 1:
        half = run.rows // 2
        steps = -(-run.rows * run.accumulation // half)
        settings: dict[str, Any] = {"per_device_train_batch_size": half, "gradient_accumulation_steps": steps}
        price = "the same batch in smaller parts: some speed"
        yield change("smaller micro-batch", price, settings, rows=half, accumulation=steps)
    if run.pilots and run.trains:
        price = "choose them before, on a larger device: `trl-bilevel rank`"
        yield change("weights chosen beforehand", price, {"weight_estimator": "none"}, estimator="none")
    if run.evaluation_rows > run.rows:
        settings = {"per_device_eval_batch_size": run.rows}
        yield change("smaller evaluation batch", "some speed", settings, evaluation_rows=run.rows)
    if run.tokens > 256:
        half = run.tokens // 2
        yield change("shorter rows", "longer rows are cut", {"max_length": half}, tokens=half)
    if run.attention == "eager":
        yield change("sdpa attention", "none", {"attn_implementation": "sdpa"}, attention="sdpa")
    small = replace(model, weight_bytes=2, trainable_bytes=2 * model.trainable)
    if model.weight_bytes == 4:
        price = "rounding of the frozen weights" if frozen else "small updates are lost in rounding; prefer adapters"
        to = replace(model, weight_bytes=2) if frozen else small
        yield change("bf16 weights", price, {"dtype": "bfloat16"}, to)
    if frozen and run.quantisation != "4bit_nested":
        price = "some quality, time for dequantising; needs bitsandbytes"
        settings = {"load_in_4bit": True, "use_bnb_nested_quant": True, "dtype": "bfloat16"}
        # TRL makes the adapters bf16, too.
        to = replace(small, adapter_bytes=min(2, model.adapter_bytes))
        yield change("4-bit base (QLoRA)", price, settings, to, quantisation="4bit_nested")
    rank = max((layer.rank for layer in model.linears), default=0)
    if rank > 4:
        linears = tuple(layer._replace(rank=layer.rank // 2) for layer in model.linears)
        less = model.adapter_parameters - replace(model, linears=linears).adapter_parameters
        size = model.trainable_bytes - less * model.adapter_bytes
        to = replace(model, linears=linears, trainable=model.trainable - less, trainable_bytes=size)
        yield change("smaller rank", "less room to learn", {"lora_r": rank // 2}, to)
    if adapted is not None and not frozen:
        price = "less room to learn; a higher learning rate is needed"
        yield change("LoRA adapters", price, {"use_peft": True, "lora_target_modules": "all-linear"}, adapted)
    if run.optimizer.startswith("adamw") and "8bit" not in run.optimizer:
        settings = {"optim": "adamw_bnb_8bit"}
        yield change("8-bit AdamW", "needs bitsandbytes", settings, optimizer="adamw_bnb_8bit")
    if run.optimizer.startswith("adamw") and run.device == "cuda":
        price = "time for paging when memory is short; needs bitsandbytes"
        yield change("paged 8-bit AdamW", price, {"optim": "paged_adamw_8bit"}, optimizer="paged_adamw_8bit")
