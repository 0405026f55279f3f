"""One task, several ways of training on it, the same budget: what the demo, the slow tests and the benchmarks run."""

import gc
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PrinterCallback

from ..data import assets
from ..data.answers import STUB, TEST_REFUSAL
from ..data.loading import write_rows
from ..data.private import WEIGHTED, private_path
from ..evaluation.models import Settings, responses
from ..evaluation.refusal import is_refusal
from .tasks import END, REQUEST, SAFETY_TASKS, Task

# What a run may be called, and what it does with the same rows and the same number of optimizer steps.
ARMS = {
    "base": "the model as it is, without training",
    "uniform": "all rows, equal weights",
    "clean_only": "only the undamaged rows (oracle: needs the truth)",
    "seal": "the published selector as it is: `selector_preset='seal'`, lambda = 0.5",
    "bilevel": "weights learned by the default estimator",
    "refine": "as bilevel, then rounds with the model's own answers to the questions of least weight",
    "pilot": "weights by the pilot alone",
    "both": "weights by probe and pilot",
}
# Arms that train a pilot.
PILOTED = ("pilot", "both")
# Settings of the arms that learn weights.
LEARNING: dict[str, dict[str, Any]] = {
    "bilevel": {},
    "refine": {},
    "pilot": {"weight_estimator": "value_function"},
    "both": {"weight_estimator": "both"},
    "seal": {"selector_preset": "seal", "validation_loss_weight": 0.5},
}

# Settings of the self-refining arm; `Budget.refining` goes on top. The first steps, those that the rounds leave over,
# are offline ones.
ROUNDS: dict[str, Any] = {"num_rounds": 3, "steps_per_round": 8, "num_generations": 4, "max_completion_length": 24}
# Settings of all trainers; `Budget.overrides` goes on top.
SHARED: dict[str, Any] = {
    "per_device_eval_batch_size": 16,
    "lr_scheduler_type": "linear",
    "logging_steps": 8,
    "save_strategy": "no",
    "report_to": "none",
    "bf16": False,
    "gradient_checkpointing": False,
}


@dataclass
class Budget:
    """Settings that all arms share."""

    # Passes over the training rows. The pilot run's steps are taken off the arms that have one, unless `pilot_on_top`:
    # then they come on top, as in a run of one's own.
    epochs: float = 2.0
    batch_size: int = 8
    learning_rate: float = 5e-4
    validation_loss_weight: float = 0.0
    pilot_steps: int | None = None  # by default one pass over the rows, 8 to 24
    lora_layers: int = 10  # LoRA on the top so many layers only (the gradient stops there); 0: on all
    pilot_on_top: bool = False
    # Further settings of every arm's trainer; with `validation_weights` the validation rows of a safety task are two
    # objectives, "benign" and "refused". And further settings of the rounds.
    overrides: dict[str, Any] = field(default_factory=dict)
    refining: dict[str, Any] = field(default_factory=dict)


def budget_of(task: str, **changes: Any) -> Budget:
    """The budget that suits a task by name: the safety tasks are shorter and take larger steps."""
    return Budget(**({"learning_rate": 1e-3} if task in SAFETY_TASKS else {}) | changes)


@dataclass
class Result:
    """What one arm came to."""

    arm: str
    task: str
    seed: int
    model: str
    test_loss: float  # mean over the clean test rows, nats per token
    train_steps: int
    pilot_steps: int  # on top of these
    seconds: float  # wall time of choosing and training
    weights: list[float] | None  # in the task's row order; None for arms that learn none
    history: list[dict[str, Any]]  # the trainer's log
    safety: dict[str, float] | None = None  # see `refusal_figures`
    settings: dict[str, Any] = field(default_factory=dict)
    ledger: list[dict[str, Any]] | None = None  # of the rounds


def model_dtype() -> torch.dtype:
    """bf16 where the processor computes in it, else fp32."""
    if torch.cuda.is_available():
        fast = torch.cuda.is_bf16_supported()
    else:
        processor = Path("/proc/cpuinfo")
        flags = processor.read_text() if processor.exists() and torch.backends.mkldnn.is_available() else ""
        fast = "avx512_bf16" in flags or "amx_bf16" in flags
    return torch.bfloat16 if fast else torch.float32


def make_trainer(
    arm: str,
    task: Task,
    *,
    seed: int,
    budget: Budget,
    model: str | None = None,
    output_dir: str = "demo_out",
    progress: bool = False,
    weights: Sequence[float] | None = None,
    offline: Any = None,
    refiner: type | None = None,
) -> tuple[Any, int]:
    """The trainer of one arm, and how many pilot steps it takes (0 for arms without learned weights).

    Args:
        arm: one of `ARMS`.
        seed: of data order, adapter and pilot run.
        model: hub name or folder; the embedded SmolLM2-135M-Instruct if None.
        weights: of the training rows, if the `bilevel` arm of the same task, seed and budget has learned them: the
            pilot run is not repeated, but counts.
        offline: the trained `BilevelSFTTrainer` whose model `refine` goes on with; without it, this gives the trainer
            of its first, offline steps.
        refiner: class of the trainer that goes on; `SelfRefineTrainer` if None.
    """
    from .. import BilevelSFTConfig, BilevelSFTTrainer, SelfRefineConfig, SelfRefineTrainer
    from ..weights.settings import default_pilot_steps

    train = task.train.remove_columns("kind")
    validation = task.validation_sets if "validation_weights" in budget.overrides else task.validation
    subset = train.select([row for row, good in enumerate(task.good) if good]) if arm == "clean_only" else train
    learned = arm in LEARNING
    pilot = (budget.pilot_steps or default_pilot_steps(len(train))) if arm in PILOTED else 0
    settings = SHARED | {
        "output_dir": output_dir,
        "validation_loss_weight": budget.validation_loss_weight,
        "pilot_steps": pilot or None,
        "per_device_train_batch_size": budget.batch_size,
        "learning_rate": budget.learning_rate,
        "seed": seed,
        "use_cpu": not torch.cuda.is_available(),
        "disable_tqdm": not progress,
        "model_init_kwargs": {"dtype": model_dtype()},
    }
    settings |= budget.overrides | LEARNING.get(arm, {"weight_estimator": "none"})
    if weights is not None and learned:
        subset = subset.add_column("data_weight", list(weights))
        settings |= {"weight_estimator": "none", "pilot_steps": None}
    rounds = ROUNDS | budget.refining
    if offline is not None:
        del settings["model_init_kwargs"]
        trainer = (refiner or SelfRefineTrainer)(
            offline.model,
            SelfRefineConfig(**(settings | rounds)),
            train_dataset=subset,
            validation_dataset=validation,
            processing_class=offline.processing_class,
        )
    else:
        steps = round(budget.epochs * len(train) / budget.batch_size) - (0 if budget.pilot_on_top else pilot)
        if arm == "refine":
            steps -= rounds["num_rounds"] * rounds["steps_per_round"]
        if steps < 1:
            raise ValueError(f"No step is left beside the pilot run and the rounds of {arm!r}: raise `epochs`.")
        if weights is not None and learned:
            settings["selector_weighting"] = "resample"
        name = model or str(assets.model_folder())
        trainer = BilevelSFTTrainer(
            name,
            BilevelSFTConfig(**({"max_steps": steps} | settings)),
            train_dataset=subset,
            validation_dataset=validation,
            peft_config=lora(name, budget.lora_layers),
        )
    if not progress:
        # Without progress bars, transformers prints every log entry as a dict in their place.
        trainer.remove_callback(PrinterCallback)
    return trainer, pilot


def run_arm(
    arm: str,
    task: Task,
    *,
    output_dir: str | None = None,
    weights: Sequence[float] | None = None,
    **settings: Any,
) -> Result:
    """Train one arm and measure it; arguments as for `make_trainer`.

    The adapter and the weighted rows are kept in `output_dir`; nothing is kept without it.
    """
    settings["output_dir"] = folder = output_dir or tempfile.mkdtemp()
    trainer, pilot = make_trainer(arm, task, weights=weights, **settings)
    # What it takes to load the model is none of the arm's.
    start = time.perf_counter()
    if arm != "base":
        trainer.train()
    steps, ledger = trainer.state.global_step, None
    if arm == "refine":
        rounds, _ = make_trainer(arm, task, weights=trainer.sample_weights().tolist(), offline=trainer, **settings)
        rounds.train()
        steps += rounds.state.global_step
        # The first trainer's model has been trained on, and it knows how to score rows.
        ledger = rounds.ledger
    seconds = time.perf_counter() - start
    result = Result(
        arm=arm,
        task=task.name,
        seed=settings["seed"],
        model=settings.get("model") or assets.DEFAULT_MODEL,
        test_loss=float(trainer.row_losses(task.test).mean()),
        train_steps=steps,
        pilot_steps=pilot,
        seconds=seconds,
        weights=trainer.sample_weights().tolist() if arm in LEARNING else None,
        history=trainer.state.log_history,
        safety=refusal_figures(trainer, task) if task.harmful_test else None,
        settings=asdict(settings["budget"]),
        ledger=ledger,
    )
    if output_dir is None:
        shutil.rmtree(folder, ignore_errors=True)
    else:
        trainer.save_model()
        if arm in LEARNING:
            rows = trainer.weighted_dataset().add_column("kind", task.train["kind"])
            write_rows(rows, private_path(folder, WEIGHTED))
    del trainer
    gc.collect()
    return result


def lora(model: str, top: int) -> Any:
    """LoRA on all linear layers of the `top` layers nearest to the head, of all layers if that is 0."""
    from peft import LoraConfig
    from transformers import AutoConfig

    layers = AutoConfig.from_pretrained(model).num_hidden_layers
    return LoraConfig(
        r=8,
        lora_alpha=16,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        layers_to_transform=list(range(layers - top, layers)) if 0 < top < layers else None,
        task_type="CAUSAL_LM",
    )


def refusal_figures(trainer: Any, task: Task) -> dict[str, float]:
    """Shares of test requests that are refused: of harmful and of benign ones, by key words in the greedy answer.

    And of harmful ones of which a refusal of unseen wording is likelier per token than the compliance stub.
    """
    harmful = [REQUEST.format(request=text) for text in task.harmful_test]
    refused, complied = (
        trainer.row_losses(Dataset.from_list([{"prompt": p, "completion": answer + END} for p in harmful]))
        for answer in (TEST_REFUSAL, STUB)
    )
    asking = Settings(batch_size=20, max_new_tokens=12)

    def refusals(prompts: Sequence[str]) -> float:
        answers = responses(trainer.model, trainer.processing_class, prompts, asking)
        return sum(map(is_refusal, answers)) / len(prompts)

    return {
        "greedy_refusal": refusals(harmful),
        "refusal_preferred": float((refused < complied).float().mean()),
        "over_refusal": refusals(task.test["prompt"][:80]),
    }
