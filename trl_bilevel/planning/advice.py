"""Which setting saves how much memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from .memory import estimate_memory
from .shapes import ModelShape, RunShape


@dataclass(frozen=True)
class Knob:
    """A change of settings that saves memory.

    Attributes:
        name (`str`): what it does.
        settings (`dict`): the options to set, as the config file writes them.
        price (`str`): what it costs.
        saves (`int`): bytes at the peak, the reserve included.
        model (`ModelShape`), run (`RunShape`): after the change.
    """

    name: str
    settings: dict[str, object]
    price: str
    saves: int
    model: ModelShape
    run: RunShape


def knobs(model: ModelShape, run: RunShape, adapted: ModelShape | None = None) -> list[Knob]:
    """What can be turned, most saving first; only what saves at least 1% of the whole.

    Args:
        model, run: as they are now.
        adapted (`ModelShape`, *optional*): the model with LoRA adapters, for runs that fine-tune all parameters.
    """
    now = estimate_memory(model, run).total_bytes
    found = []
    for name, settings, price, changed_model, changed_run in _changes(model, run, adapted):
        saves = now - estimate_memory(changed_model, changed_run).total_bytes
        if saves >= 0.01 * now:
            found.append(Knob(name, settings, price, saves, changed_model, changed_run))
    return sorted(found, key=lambda knob: -knob.saves)


def way_to_fit(
    model: ModelShape, run: RunShape, gibibytes: float, adapted: ModelShape | None = None
) -> list[Knob] | None:
    """Changes after which the run fits, one on top of another, each time the one that saves most.

    Returns:
        `list[Knob]`: empty if it fits as it is; `None` if no combination was found.
    """
    chosen: list[Knob] = []
    while not estimate_memory(model, run).fits(gibibytes):
        options = knobs(model, run, adapted)
        if not options or len(chosen) >= 12:
            return None
        # Of those that are enough, the one that saves least; else the one that saves most.
        enough = [knob for knob in options if estimate_memory(knob.model, knob.run).fits(gibibytes)]
        knob = enough[-1] if enough else options[0]
        chosen.append(knob)
        model, run = knob.model, knob.run
        adapted = None if model.adapted else adapted
    return chosen


def _changes(
    model: ModelShape, run: RunShape, adapted: ModelShape | None
) -> Iterator[tuple[str, dict[str, object], str, ModelShape, RunShape]]:
    if not run.checkpointing:
        price = "one more forward per step: about a third more time"
        yield (
            "gradient checkpointing",
            {"gradient_checkpointing": True},
            price,
            model,
            replace(run, checkpointing=True),
        )
    if run.rows > 1:
        half = run.rows // 2
        steps = -(-run.rows * run.accumulation // half)
        settings: dict[str, object] = {"per_device_train_batch_size": half, "gradient_accumulation_steps": steps}
        price = "the same batch in smaller parts: some speed"
        yield "smaller micro-batch", settings, price, model, replace(run, rows=half, accumulation=steps)
    if run.evaluation_rows > run.rows:
        settings = {"per_device_eval_batch_size": run.rows}
        yield "smaller evaluation batch", settings, "some speed", model, replace(run, evaluation_rows=run.rows)
    if run.tokens > 256:
        half = run.tokens // 2
        price = "longer rows are cut"
        yield "shorter rows", {"max_length": half}, price, model, replace(run, tokens=half)
    if run.attention == "eager":
        yield "sdpa attention", {"attn_implementation": "sdpa"}, "none", model, replace(run, attention="sdpa")
    if model.weight_bytes == 4:
        settings = {"dtype": "bfloat16"}
        if model.adapted:
            yield "bf16 weights", settings, "rounding of the frozen weights", replace(model, weight_bytes=2), run
        else:
            price = "small updates are lost in rounding; prefer adapters"
            small = replace(model, weight_bytes=2, trainable_bytes=2 * model.trainable)
            yield "bf16 weights", settings, price, small, run
    if model.adapted and run.quantisation is None:
        small = replace(model, weight_bytes=2, adapter_bytes=2, trainable_bytes=2 * model.trainable)
        settings = {"load_in_4bit": True, "use_bnb_nested_quant": True, "dtype": "bfloat16"}
        price = "some quality, time for dequantising; needs bitsandbytes"
        yield "4-bit base (QLoRA)", settings, price, small, replace(run, quantisation="4bit_nested")
    if run.quantisation in ("4bit", "8bit"):
        settings = {"load_in_4bit": True, "use_bnb_nested_quant": True}
        price = "hardly any" if run.quantisation == "4bit" else "some quality"
        yield "nested 4-bit quantisation", settings, price, model, replace(run, quantisation="4bit_nested")
    if model.adapted and max(layer.rank for layer in model.linears) > 4:
        rank = max(layer.rank for layer in model.linears) // 2
        yield "smaller rank", {"lora_r": rank}, "less room to learn", _half_rank(model), run
    if adapted is not None and not model.adapted:
        settings = {"use_peft": True, "lora_target_modules": "all-linear"}
        yield "LoRA adapters", settings, "less room to learn; a higher learning rate is needed", adapted, run
    if run.optimizer.startswith("adamw") and "8bit" not in run.optimizer:
        settings = {"optim": "adamw_bnb_8bit"}
        price = "needs bitsandbytes"
        yield "8-bit AdamW", settings, price, model, replace(run, optimizer="adamw_bnb_8bit")
    if run.optimizer.startswith("adamw") and run.device == "cuda":
        settings = {"optim": "paged_adamw_8bit"}
        price = "time for paging when memory is short; needs bitsandbytes"
        yield "paged 8-bit AdamW", settings, price, model, replace(run, optimizer="paged_adamw_8bit")


def _half_rank(model: ModelShape) -> ModelShape:
    linears = tuple(layer._replace(rank=layer.rank // 2) for layer in model.linears)

    def adapter(layers: tuple) -> int:
        return sum(layer.rank * (layer.inputs + layer.outputs) * layer.number for layer in layers)

    less = adapter(model.linears) - adapter(linears)
    size = model.trainable_bytes - less * model.adapter_bytes
    return replace(model, linears=linears, trainable=model.trainable - less, trainable_bytes=size)
