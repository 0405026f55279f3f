"""Makes self-refining trainers on a tiny model."""

import pytest
from datasets import Dataset
from peft import LoraConfig

from tests.conftest import base_arguments
from trl_bilevel import SelfRefineConfig, SelfRefineTrainer


@pytest.fixture
def refine_config(tmp_path):
    def make(**overrides):
        settings = base_arguments(tmp_path) | {
            "max_steps": -1,
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 2,
            "num_rounds": 2,
            "steps_per_round": 2,
            "max_completion_length": 10,
            "pilot_learning_rate": 1e-2,
        }
        return SelfRefineConfig(**(settings | overrides))

    return make


@pytest.fixture
def trusted(rows):
    return Dataset.from_list(rows[40:80])


@pytest.fixture
def build(refine_config, tiny_model, train_rows, trusted, tokenizer):
    def make(train=None, validation=None, callbacks=None, adapter=True, **overrides):
        datasets = {k: overrides.pop(k) for k in list(overrides) if k.endswith("_dataset")}
        return SelfRefineTrainer(
            tiny_model(),
            refine_config(**overrides),
            train_rows if train is None else train,
            trusted if validation is None else validation,
            processing_class=tokenizer,
            peft_config=LoraConfig(r=4, target_modules="all-linear") if adapter else None,
            callbacks=callbacks,
            **datasets,
        )

    return make


def facts(trainer):
    """The ledger without the wall time."""
    return [{k: v for k, v in entry.items() if k != "seconds"} for entry in trainer.ledger]
