"""Peak memory of a run, by component: the arithmetic of docs/planning.md as a pure function."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from ..weights.language_model import LOGIT_TOKENS
from ..weights.pilot import BATCH_ROWS, BATCH_TOKENS
from ..weights.settings import PILOT_ROWS
from . import activations, work
from .models import DESCRIBED
from .optimizers import state_bytes, step_bytes
from .shapes import ModelShape, RunShape

GIB = 2**30
# What a CUDA process takes beside tensors: context, cuBLAS workspaces. Assumed, not measured here.
CUDA_CONTEXT = 700 * 2**20
# Part of the caching allocator's memory that fragmentation leaves unused. Assumed, not measured here.
FRAGMENTATION = 0.05
# Rows of the selector: an fp32 weight, and a bit more per row in training.
SELECTOR_BYTES_PER_ROW = 8


@dataclass(frozen=True)
class Moment:
    """One of the moments at which memory may peak.

    Attributes:
        name (`str`): what is going on.
        parts (`dict[str, int]`): bytes by component.
    """

    name: str
    parts: dict[str, int]

    @property
    def total(self) -> int:
        """Bytes in all."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class MemoryPlan:
    """Estimated memory of a run on one device.

    Attributes:
        moments (`list[Moment]`): the moments that were looked at.
        reserve (`int`): bytes beside tensors: CUDA context and fragmentation, assumed; 0 on a CPU.
        host_bytes (`int`): bytes of a paged optimizer's state, which may leave the device.
        notes (`list[str]`): what the figures leave out or take for granted.
    """

    moments: list[Moment]
    reserve: int
    host_bytes: int = 0
    notes: list[str] = field(default_factory=list)

    @property
    def peak(self) -> Moment:
        """The moment of most memory."""
        return max(self.moments, key=lambda moment: moment.total)

    @property
    def tensor_bytes(self) -> int:
        """Bytes of tensors at the peak: what an allocator counts."""
        return self.peak.total

    @property
    def total_bytes(self) -> int:
        """Bytes that the device needs to have."""
        return self.tensor_bytes + self.reserve

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
    blocks = linear / 64
    scales = blocks * (1 + 4 / 256) if run.quantisation == "4bit_nested" else blocks * 4
    return round(rest + linear / 2 + scales)


def estimate_memory(model: ModelShape, run: RunShape) -> MemoryPlan:
    """The peak memory of a run.

    Pure arithmetic, no tensor is made. Sources: the sources of TRL 1.16, transformers 5.23, PEFT 0.21 and
    bitsandbytes 0.50; docs/planning.md compares with measurements.

    Args:
        model (`ModelShape`): see `models.model_shape`.
        run (`RunShape`): see `settings.run_shape`.

    Returns:
        `MemoryPlan`: bytes, for one device of `run.processes`.
    """
    full = model.trainable == model.parameters and not model.adapted
    fixed = {"weights": weight_memory(model, run)}
    if not full:
        fixed["adapters and trained copies"] = model.trainable_bytes if model.adapted else model.copied_bytes
    states, paged = state_bytes(run.optimizer, model)
    if run.estimator != "none" and run.training_rows:
        fixed["selector"] = SELECTOR_BYTES_PER_ROW * run.training_rows
    running = fixed | {"optimizer states": states}
    if run.estimator == "sparse_centred":
        # A second set of trained parameters and its two AdamW states.
        running["tracker"] = 3 * model.trainable_bytes
    if run.processes > 1:
        running["DDP buckets"] = model.trainable_bytes
    n = (run.rows + run.joined_rows) * run.tokens
    head = (activations.head_forward(model, run, n), activations.head_backward(model, run, n))
    moments = _training(model, run, running, run.rows + run.joined_rows, "training", head)
    step = {"gradients": model.trainable_bytes, "working space": step_bytes(run.optimizer, model, run.device)}
    moments.append(Moment("training: optimizer step", running | step))
    if run.evaluates:
        space = activations.head_forward(model, run, run.evaluation_rows * run.tokens)
        moments.append(_without_gradient(model, run, running, run.evaluation_rows, "evaluation", space))
    if run.pilots:
        moments += _pilot(model, run, fixed)
    reserve = 0
    if run.device == "cuda":
        reserve = CUDA_CONTEXT + round(FRAGMENTATION * max(moment.total for moment in moments))
    return MemoryPlan(moments, reserve, paged, _notes(model, run))


def _pilot(model: ModelShape, run: RunShape, fixed: dict[str, int]) -> list[Moment]:
    """Moments of the pilot run, which has adapters of its own, whatever the run trains, and of its scoring."""
    top = work.pilot_shape(model)
    held = fixed | {"pilot run": work.PILOT_SETS * work.PILOT_BYTES * top.adapter_parameters}
    run = replace(run, accumulation=1, dropout=0.0)
    read = min(BATCH_ROWS, max(1, BATCH_TOKENS // run.tokens))
    rows = min(read, PILOT_ROWS)
    if run.training_rows is not None:
        # Scored rows and the others are read apart.
        read = min(read, max(run.rows_scored, run.training_rows - run.rows_scored))
    space = activations.positions_working(model, run, min(LOGIT_TOKENS, rows * run.tokens))
    return [
        *_training(top, run, held, rows, "pilot run", (space, space)),
        _without_gradient(model, run, held, read, "scoring of rows", space),
    ]


def _training(
    model: ModelShape, run: RunShape, held: dict[str, int], rows: int, name: str, head_space: tuple[int, int]
) -> list[Moment]:
    """Moments of forward and backward; `head_space` is the LM head's working space in these."""
    n = rows * run.tokens
    layer = activations.layer_saved(model, run, n)
    kept = activations.layer_input(model, n) if run.checkpointing else layer
    saved = model.layers * kept + activations.head_saved(model, n)
    mask = rows * run.tokens**2 if run.padded and run.attention in ("sdpa", "eager") else 0
    weights = 0
    if run.autocast and model.weight_bytes == 4 and run.quantisation is None and run.checkpointing:
        # Autocast keeps the casts of trained weights until the forward ends.
        weights = 2 * (model.trainable if not model.adapted else model.copied_bytes // 4)
    before = model.trainable_bytes if run.accumulation > 1 else 0
    head = model.vocabulary * model.hidden * model.weight_bytes if activations.head_is_trained(model) else 0
    one_layer = layer if run.checkpointing else 0
    working = activations.layer_working(model, run, n)
    # The input of a layer that is recomputed is there already.
    if run.checkpointing and model.weight_bytes == 4:
        one_layer -= activations.layer_input(model, n)
    first = layer if not run.checkpointing else kept + one_layer
    last = working + (head if model.embedding_trained else 0)
    # What is saved, gradients, working space.
    moments = {
        "LM head, forward": (saved + weights, before, head_space[0]),
        "LM head, backward": (saved, before, head_space[1]),
        "backward of the last layer": (saved + one_layer, max(before, head), working),
        "backward of the first layer": (first, model.trainable_bytes, last),
    }
    return [
        Moment(
            f"{name}: {what}",
            held | {"activations": activation + mask, "gradients": gradients, "working space": space},
        )
        for what, (activation, gradients, space) in moments.items()
    ]


def _without_gradient(
    model: ModelShape, run: RunShape, held: dict[str, int], rows: int, name: str, head_space: int
) -> Moment:
    n = rows * run.tokens
    states = activations.layer_input(model, n)
    space = max(activations.layer_forward(model, run, n) + states, head_space + 2 * states)
    return Moment(name, held | {"working space": space})


def _notes(model: ModelShape, run: RunShape) -> list[str]:
    notes = []
    if model.family not in DESCRIBED:
        notes.append(
            f"Activations follow the formulas for {', '.join(DESCRIBED)}; {model.family!r} may save more or less. "
            "Weights, gradients and optimizer states are counted exactly."
        )
    if run.quantisation is not None and model.weight_bytes == 4:
        notes.append(
            "The quantised layers compute in fp32 here, since `dtype` is float32: set `dtype: bfloat16` to halve "
            "what is not quantised and the activations."
        )
    if run.device == "cuda":
        notes.append(
            f"Computed, not measured on a GPU. Assumed: {CUDA_CONTEXT / GIB:.1f} GiB for the CUDA context, "
            f"{FRAGMENTATION:.0%} lost to fragmentation, every row as long as the longest, every token scored."
        )
    return notes
