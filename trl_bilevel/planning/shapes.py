"""What the arithmetic needs to know of a model and of a run: plain numbers, no tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from ..weights.settings import ESTIMATORS, PRESETS

QUANTISATIONS = ("4bit", "4bit_nested", "8bit")
# Presets whose weights move while the model trains; the last one trains a second set of parameters, a tracker.
MOVING = tuple(name for name, preset in PRESETS.items() if preset.published)


class Linear(NamedTuple):
    """A linear layer of every decoder layer.

    Attributes:
        name (`str`): as in the model, `"q_proj"` say.
        inputs, outputs (`int`): widths.
        number (`int`): how many of them the model has (one per decoder layer).
        rank (`int`): rank of its LoRA adapter, 0 without one.
        trained (`bool`): whether its own weight is trained.
    """

    name: str
    inputs: int
    outputs: int
    number: int
    rank: int = 0
    trained: bool = False


@dataclass(frozen=True)
class ModelShape:
    """The numbers of a decoder model with the adapters it is trained with.

    Attributes:
        family (`str`): `model_type` of its config.
        vocabulary, hidden, layers, heads, key_value_heads, head_size (`int`): as usual.
        linears (`tuple[Linear, ...]`): the linear layers of the decoder.
        parameters (`int`): of the base model, tied ones once, adapters not counted.
        trainable (`int`): trained parameters, adapters and modules to save counted.
        trainable_bytes (`int`): bytes of these.
        copied_bytes (`int`): bytes of trained copies of the base model's modules (`modules_to_save`), part of it.
        adapter_bytes (`int`): bytes per value of the adapters, 0 without.
        weight_bytes (`int`): bytes per value of the base model where it is not quantised.
        tied (`bool`): whether the LM head is the embedding.
        head_trained, embedding_trained, norms_trained (`bool`): what else is trained.
        head_norms (`bool`): whether queries and keys are normalised per head (Qwen3).
    """

    family: str
    vocabulary: int
    hidden: int
    layers: int
    heads: int
    key_value_heads: int
    head_size: int
    linears: tuple[Linear, ...]
    parameters: int
    trainable: int
    trainable_bytes: int
    copied_bytes: int
    adapter_bytes: int
    weight_bytes: int
    tied: bool
    head_trained: bool
    embedding_trained: bool
    norms_trained: bool
    head_norms: bool = False

    @property
    def linear_parameters(self) -> int:
        """Weights of the decoder's linear layers, which quantisation makes smaller."""
        return sum(layer.inputs * layer.outputs * layer.number for layer in self.linears)

    @property
    def adapter_parameters(self) -> int:
        """Parameters of the LoRA adapters."""
        return sum(layer.rank * (layer.inputs + layer.outputs) * layer.number for layer in self.linears)

    @property
    def adapted(self) -> bool:
        """True with LoRA adapters."""
        return self.adapter_bytes > 0


@dataclass(frozen=True)
class RunShape:
    """The numbers of a run, on one device.

    Attributes:
        rows (`int`): training rows of a micro-batch (`per_device_train_batch_size`).
        tokens (`int`): tokens of its longest row, prompt included.
        mean_tokens (`float`, *optional*): tokens of a row on average, for the work of a run; `tokens` by default.
        scored_tokens (`float`, *optional*): those of them that the loss counts; all but the first by default.
        accumulation (`int`): micro-batches of an optimizer step.
        processes (`int`): with their own device each (DDP).
        autocast (`bool`): mixed precision (`bf16=True` or `fp16=True`).
        quantisation (`str`, *optional*): of the decoder's linear layers, one of `QUANTISATIONS`.
        checkpointing (`bool`): gradient checkpointing; reentrant or not makes no difference here.
        attention (`str`): `"sdpa"`, `"eager"` or another implementation that never holds the scores of all pairs.
        padded (`bool`): whether rows of a batch differ in length, so that attention needs a mask.
        dropout (`float`): of the adapters.
        optimizer (`str`): `optim` as transformers names it.
        device (`str`): `"cuda"` or `"cpu"`.
        training_rows (`int`, *optional*): of the data set; `None` if it is not known.
        epochs (`float`), max_steps (`int`): length of the run; `max_steps` counts if above 0.
        validation_rows (`int`): trusted rows.
        joins (`bool`): whether the model is trained on trusted rows, too (`validation_loss_weight` above 0).
        evaluation_rows (`int`): rows of a batch without gradient (`per_device_eval_batch_size`).
        evaluates (`bool`): whether such batches come in mid-training.
        estimator (`str`): `weight_estimator`, or the preset where weights move in training: of `ESTIMATORS`, `MOVING`,
            or `"none"`.
        pilot_steps (`int`, *optional*), scored_rows (`int`, 0: all): of the pilot run, over all processes.
        read_depth (`float`): share of the layers through which rows that are not scored are read.
        tile_width (`int`): entries of the vocabulary in a tile of TRL's fused LM head, a constant of TRL.
    """

    rows: int
    tokens: int
    mean_tokens: float | None = None
    scored_tokens: float | None = None
    accumulation: int = 1
    processes: int = 1
    autocast: bool = False
    quantisation: str | None = None
    checkpointing: bool = True
    attention: str = "sdpa"
    padded: bool = True
    dropout: float = 0.0
    optimizer: str = "adamw_torch_fused"
    device: str = "cuda"
    training_rows: int | None = None
    epochs: float = 3.0
    max_steps: int = -1
    validation_rows: int = 32
    joins: bool = False
    evaluation_rows: int = 8
    evaluates: bool = False
    estimator: str = "none"
    pilot_steps: int | None = None
    scored_rows: int = 512
    read_depth: float = 0.3
    tile_width: int = 32768

    def __post_init__(self) -> None:
        for name in ("rows", "tokens", "accumulation", "processes"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        known = {
            "quantisation": (*QUANTISATIONS, None),
            "device": ("cuda", "cpu"),
            "estimator": (*ESTIMATORS, *MOVING, "none"),
        }
        for name, values in known.items():
            if getattr(self, name) not in values:
                raise ValueError(f"`{name}` must be one of {values}, got {getattr(self, name)!r}.")

    @property
    def pilots(self) -> bool:
        """True if a pilot run chooses the weights before the first step."""
        return self.estimator in ESTIMATORS

    @property
    def rows_scored(self) -> int:
        """Training rows that the pilot scores; 0 for all of an unknown number."""
        known = self.training_rows
        return min(self.scored_rows or known or 0, known or self.scored_rows)

    @property
    def rows_per_step(self) -> int:
        """Training rows of an optimizer step, over all processes."""
        return self.rows * self.accumulation * self.processes

    @property
    def joined_per_step(self) -> int:
        """Trusted rows of an optimizer step, over all processes."""
        return max(1, self.rows_per_step // 4) if self.joins else 0

    @property
    def joined_rows(self) -> int:
        """Trusted rows that join a micro-batch, at most."""
        return -(-self.joined_per_step // (self.accumulation * self.processes))

    @property
    def steps(self) -> int | None:
        """Optimizer steps of the run; `None` if they are not known."""
        if self.max_steps > 0:
            return self.max_steps
        if self.training_rows is None:
            return None
        return max(1, round(self.training_rows * self.epochs / self.rows_per_step))
