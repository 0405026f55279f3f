"""Peak memory of a run, and what saves some: the arithmetic of docs/planning.md as pure functions of numbers.

Saved activations follow what the eager code of transformers' Llama family saves for the backward. `n` is the number
of tokens of a micro-batch.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from ..weights.language_model import LOGIT_TOKENS
from ..weights.pilot import BATCH_ROWS, BATCH_TOKENS
from ..weights.settings import PILOT_ROWS
from .shapes import ModelShape, RunShape
from .work import ATTENTION_INPUTS, pilot_shape

TEXTS: dict[str, Any] = yaml.safe_load((Path(__file__).parent / "text" / "plan.yaml").read_text())
GIB = 2**30
# What a CUDA process takes beside tensors, and the part that fragmentation leaves unused. Assumed, not measured here.
CUDA_CONTEXT, FRAGMENTATION = 700 * 2**20, 0.05
# Rows of the selector: an fp32 weight, and a bit more per row in training.
SELECTOR_BYTES_PER_ROW = 8
# Sets of the pilot's adapters, each with two AdamW states and a gradient, all of it in fp32.
PILOT_SETS, PILOT_BYTES = 2, 16
# Families whose saved activations the formulas describe.
DESCRIBED = ("llama", "mistral", "qwen2", "qwen3", "smollm3")
# States of an optimizer per value; their dtype is the parameter's unless the name says otherwise.
# Adafactor's row and column means are next to nothing.
STATES = dict(adamw=2, adam=2, lion=1, rmsprop=1, adagrad=1, sgd=0, ademamix=3, stable=2, adafactor=0)  # noqa: C408
# Bytes of 8-bit states per value and state: the value, and an fp32 scale per block of 256.
EIGHT_BIT = 1 + 4 / 256
# Tokens of a tile of TRL's fused LM head, and bytes per entry that it holds beside the tile, without Triton: forward,
# backward.
TILE_TOKENS, TILE_BESIDE = 4096, (13, 29)
# Layers of which the first one's input is saved for all.
READ_WITH = dict.fromkeys(ATTENTION_INPUTS, "q_proj") | {"up_proj": "gate_proj"}
FLOAT = 4
# Bytes by component.
Parts = dict[str, int]
# What `plan --json` says of a saving (its settings as the config file writes them), and model and run after it.
Saving = tuple[dict[str, Any], ModelShape, RunShape]


class MemoryPlan(NamedTuple):
    """Estimated memory of a run on one device, in bytes."""

    total_bytes: int  # that the device needs to have
    tensor_bytes: int  # of tensors at the peak: what an allocator counts
    reserve_bytes: int  # beside tensors: CUDA context and fragmentation, assumed; 0 on a CPU
    host_bytes: int  # of a paged optimizer's states, which may leave the device
    peak: str  # the moment of most memory
    moments: dict[str, Parts]  # at which memory may peak
    notes: list[str]  # what the figures leave out or take for granted

    def fits(self, gibibytes: float) -> bool:
        """Whether it fits a device of so much memory."""
        return self.total_bytes <= gibibytes * GIB


def weight_memory(model: ModelShape, run: RunShape) -> int:
    """Bytes of the base model's weights, as they are held."""
    linear = model.linear_parameters
    rest = (model.parameters - linear) * model.weight_bytes
    if run.quantisation is None:
        return rest + linear * model.weight_bytes
    if run.quantisation == "8bit":
        # One fp32 scale per output.
        return rest + linear + sum(4 * layer.outputs * layer.number for layer in model.linears)
    # One per 64 weights, fp32 or in 8 bits.
    return round(rest + linear / 2 + linear / 64 * (EIGHT_BIT if run.quantisation == "4bit_nested" else FLOAT))


def state_bytes(name: str, model: ModelShape) -> tuple[int, int]:
    """Bytes of an optimizer's states on the device, and of those that may be paged out to the host."""
    plain = name.removeprefix("paged_")
    states = STATES.get(plain.split("_")[0])
    if states is None:
        raise ValueError(
            f"`optim={name!r}` is not known to the planner, which knows names that start with {', '.join(STATES)}. "
            "Plan with the one of them that is nearest."
        )
    size = states * model.trainable_bytes
    if "8bit" in plain:
        # transformers keeps the states of embeddings in fp32.
        exempt = model.vocabulary * model.hidden if model.embedding_trained else 0
        size = round(states * (EIGHT_BIT * (model.trainable - exempt) + 4 * exempt))
    elif "bnb" in plain or plain.endswith("32bit") or plain != name:
        size = 4 * states * model.trainable
    return (0, size) if plain != name else (size, 0)


def _compute_bytes(model: ModelShape, run: RunShape) -> int:
    """Bytes per value that the linear layers compute with; quantised ones use the model's own dtype."""
    return 2 if run.casts else model.weight_bytes


def _layer_saved(model: ModelShape, run: RunShape, n: int) -> int:
    """Bytes that one decoder layer saves for its backward, its input among them."""
    k = _compute_bytes(model, run)
    width, kv_width = model.heads * model.head_size, model.key_value_heads * model.head_size
    # Norms compute in fp32; the input is saved as such, and the normalised values if the norm's weight is trained.
    normed = 2 * model.hidden + (width + kv_width if model.head_norms else 0)
    saved = normed * (FLOAT + (model.weight_bytes if model.norms_trained else 0))
    # Queries, keys, values, output; keys and values are repeated for all heads where a mask or `eager` asks it.
    repeated = run.attention == "eager" or (run.attention == "sdpa" and run.padded)
    saved += k * 2 * (width + (width if repeated else kv_width))
    # Log-sum-exp of flash kernels; in `eager`, softmax in fp32 and its result in the compute dtype.
    saved += model.heads * (run.tokens * (FLOAT + k % FLOAT) if run.attention == "eager" else FLOAT)
    # Gate, its activation, and what it is multiplied by.
    saved += 3 * model.intermediate * k + _inputs(model, run, k)
    return n * saved + run.casts * (model.weight_bytes == FLOAT) * 2 * sum(x.inputs * x.outputs for x in model.linears)


def _inputs(model: ModelShape, run: RunShape, k: int) -> int:
    """Bytes per token that weight gradients need: inputs of trained layers and of adapters, outputs of `lora_A`."""
    wanted = 2 if run.autocast else model.adapter_bytes
    saved, shared = 0, {}
    for layer in model.linears:
        # Norms give the model's dtype, the other layers that of compute.
        source = k if layer.name in ("o_proj", "down_proj") else model.weight_bytes
        if layer.trained and source != k:
            saved += layer.inputs * k  # autocast casts for every layer anew
        # PEFT casts to the adapter's fp32, and autocast back: a copy of its own, although the dtypes agree.
        if layer.rank and (run.dropout or wanted != source or (run.casts and model.adapter_bytes != source)):
            saved += layer.inputs * wanted
        elif layer.rank or (layer.trained and source == k):
            shared[READ_WITH.get(layer.name, layer.name)] = layer.inputs * source
        if layer.rank and run.dropout:
            saved += layer.inputs * (1 if run.device == "cuda" else model.adapter_bytes)  # its mask
        saved += layer.rank * wanted
    # What attention has saved already is not counted twice.
    return saved + sum(size for name, size in shared.items() if name != "o_proj")


def _head(model: ModelShape, run: RunShape, n: int) -> tuple[int, int]:
    """Working space of the fused LM head, forward and backward: one tile, never the logits of all tokens."""
    k = 2 if run.autocast else model.weight_bytes
    tokens, width = min(n, TILE_TOKENS), min(model.vocabulary, run.tile_width)
    tile = tokens * run.tile_width * k + (width * model.hidden * k if run.autocast and model.weight_bytes == 4 else 0)
    forward, backward = (tile + (0 if run.device == "cuda" else tokens * width * beside) for beside in TILE_BESIDE)
    # The gradients in fp32 of the states, and of the weight if it is trained.
    return forward, backward + FLOAT * model.hidden * (n + (model.vocabulary if model.head_trained else 0))


def _training(
    model: ModelShape, run: RunShape, held: Parts, rows: int, name: str, head_space: tuple[int, int]
) -> dict[str, Parts]:
    """Moments of forward and backward; `head_space` is the LM head's working space in these."""
    n = rows * run.tokens
    layer = _layer_saved(model, run, n)
    # Of every layer its input and of one layer all, which is computed again; or all of every layer.
    kept, again = (n * model.hidden * model.weight_bytes, layer) if run.checkpointing else (layer, 0)
    norm = FLOAT + (model.weight_bytes if model.norms_trained else 0)
    # Layers, the final norm, and the states that the LM head reads.
    saved = model.layers * kept + n * model.hidden * (norm + 2 * model.weight_bytes)
    mask = rows * run.tokens**2 if run.padded and run.attention in ("sdpa", "eager") else 0
    # With checkpointing, autocast keeps the casts of trained weights until the forward ends.
    trained = model.copied_bytes // FLOAT if model.adapter_bytes else model.trainable
    cast = 2 * trained * (run.checkpointing and run.casts and model.weight_bytes == FLOAT)
    before = model.trainable_bytes if run.accumulation > 1 else 0
    head = model.vocabulary * model.hidden * model.weight_bytes if model.head_trained else 0
    # Gradients on their way through a layer, and its largest weight dequantised.
    k = _compute_bytes(model, run)
    feed = 2 * n * (model.hidden * model.weight_bytes + model.intermediate * k)
    working = max(feed, 2 * n * run.tokens * model.heads * FLOAT) if run.attention == "eager" else feed
    working += k * max(x.inputs * x.outputs for x in model.linears) if run.quantisation is not None else 0
    last = working + (head if model.embedding_trained else 0)
    # What is saved, gradients, working space.
    moments = {
        "LM head, forward": (saved + cast, before, head_space[0]),
        "LM head, backward": (saved, before, head_space[1]),
        "backward of the last layer": (saved + again, max(before, head), working),
        "backward of the first layer": (kept + again, model.trainable_bytes, last),
    }
    return {
        f"{name}: {what}": held | {"activations": activations + mask, "gradients": gradients, "working space": space}
        for what, (activations, gradients, space) in moments.items()
    }


def _without_gradient(
    model: ModelShape, run: RunShape, held: Parts, rows: int, head_space: int, adapters: bool = False
) -> Parts:
    """Parts of a forward without gradient; with `adapters` beside those that the model has."""
    n, scores = rows * run.tokens, 3 * run.tokens * model.heads * FLOAT if run.attention == "eager" else 0
    states = n * model.hidden * model.weight_bytes
    # Gate, up and what is made of both; and what an adapter adds to one of them.
    wide = 3 + (adapters or model.adapter_bytes > 0)
    layer = max(wide * n * model.intermediate * _compute_bytes(model, run) + 2 * states, n * scores)
    return held | {"working space": states + max(layer, head_space + states)}


def _pilot(model: ModelShape, run: RunShape, held: Parts) -> dict[str, Parts]:
    """Moments of the pilot run, which has adapters of its own, whatever the run trains, and of its scoring."""
    top = pilot_shape(model)
    held = held | {"pilot run": PILOT_SETS * PILOT_BYTES * top.adapter_parameters}
    run = replace(run, accumulation=1, dropout=0.0)
    read = min(BATCH_ROWS, max(1, BATCH_TOKENS // run.tokens))
    rows = min(read, PILOT_ROWS)
    if run.training_rows is not None:
        read = min(read, run.training_rows)
    # Logits of a few positions, in fp32 too, log-probabilities, their gradient.
    k = 2 if run.autocast else model.weight_bytes
    space = min(LOGIT_TOKENS, rows * run.tokens) * model.vocabulary * (k + (2 if k == FLOAT else 3) * FLOAT)
    scoring = _without_gradient(model, run, held, read, space, adapters=True)
    return _training(top, run, held, rows, "pilot run", (space, space)) | {"scoring of rows": scoring}


def estimate_memory(model: ModelShape, run: RunShape) -> MemoryPlan:
    """The peak memory of a run; a `ValueError` if its optimizer is not known.

    Pure arithmetic, no tensor is made. It follows the sources of TRL 1.16, transformers 5.23, PEFT 0.21 and
    bitsandbytes 0.50; docs/planning.md compares with measurements.
    """
    fixed = {"weights": weight_memory(model, run)}
    if model.adapter_bytes or model.trainable < model.parameters:
        fixed["adapters and trained copies"] = model.trainable_bytes if model.adapter_bytes else model.copied_bytes
    if run.estimator != "none" and run.training_rows:
        fixed["selector"] = SELECTOR_BYTES_PER_ROW * run.training_rows
    states, paged = state_bytes(run.optimizer, model) if run.trains else (0, 0)
    moments: dict[str, Parts] = {}
    if run.trains:
        running = fixed | {"optimizer states": states}
        if run.estimator == "sparse_centred":
            # A second set of trained parameters and its two AdamW states.
            running["tracker"] = 3 * model.trainable_bytes
        if run.processes > 1:
            running["DDP buckets"] = model.trainable_bytes
        rows = run.rows - (-run.joined // (run.accumulation * run.processes))
        moments = _training(model, run, running, rows, "training", _head(model, run, rows * run.tokens))
        # Fused and bitsandbytes steps need no space; the others a temporary per value, as all are stepped at once.
        small = "fused" in run.optimizer or "bit" in run.optimizer or run.optimizer.startswith("sgd")
        space = 0 if small or run.device == "cpu" else model.trainable_bytes
        moments["training: optimizer step"] = running | {"gradients": model.trainable_bytes, "working space": space}
        if run.evaluates:
            space = _head(model, run, run.evaluation_rows * run.tokens)[0]
            moments["evaluation"] = _without_gradient(model, run, running, run.evaluation_rows, space)
    if run.pilots:
        moments |= _pilot(model, run, fixed)
    if run.probes:
        rows = min(BATCH_ROWS, max(1, BATCH_TOKENS // run.tokens), run.training_rows or BATCH_ROWS)
        moments["reading of rows"] = _without_gradient(model, run, fixed, rows, 0)
    peak = max(moments, key=lambda name: sum(moments[name].values()))
    tensors = sum(moments[peak].values())
    reserve = CUDA_CONTEXT + round(FRAGMENTATION * tensors) if run.device == "cuda" else 0
    facts = {"described": ", ".join(DESCRIBED), "family": model.family, "context": CUDA_CONTEXT / GIB}
    names = ["family"] if model.family not in DESCRIBED else []
    names += ["dtype"] if run.quantisation is not None and model.weight_bytes == FLOAT else []
    names += ["cuda"] if run.device == "cuda" else []
    notes = [TEXTS["notes"][name].format(**facts, fragmentation=FRAGMENTATION) for name in names]
    return MemoryPlan(tensors + reserve, tensors, reserve, paged, peak, moments, notes)


def savings(model: ModelShape, run: RunShape, adapted: ModelShape | None = None) -> list[Saving]:
    """What can be changed, most saving first; only what saves at least 1% of the whole.

    `adapted` is the model with LoRA adapters, for runs that fine-tune all parameters.
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

    Empty if it fits as it is; `None` if no combination was found.
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
    if (run.pilots or run.probes) and run.trains:
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
    if adapted is not None and not frozen:
        yield "LoRA adapters", {"use_peft": True, "lora_target_modules": "all-linear"}, adapted, {}
    if run.optimizer.startswith("adamw"):
        if "8bit" not in run.optimizer:
            yield "8-bit AdamW", {"optim": "adamw_bnb_8bit"}, model, {"optimizer": "adamw_bnb_8bit"}
        if run.device == "cuda":
            yield "paged 8-bit AdamW", {"optim": "paged_adamw_8bit"}, model, {"optimizer": "paged_adamw_8bit"}
