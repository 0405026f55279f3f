"""The names that we rely on in TRL, transformers, PEFT and accelerate. A failure says what is missing, and where used.

What they do: `test_contract_behaviour.py`.
"""

import ast
import functools
import importlib
import importlib.metadata
import inspect
from pathlib import Path

import pytest
import transformers
import trl
from packaging.requirements import Requirement
from packaging.version import Version
from peft import LoraConfig
from transformers import Trainer
from trl import GRPOTrainer, ModelConfig, SFTTrainer, TrlParser

from trl_bilevel import BilevelSFTTrainer, SelfRefineTrainer
from trl_bilevel.trainer import checks

pytestmark = pytest.mark.compat

SOURCES = Path(inspect.getfile(BilevelSFTTrainer)).parents[1]
VERSIONS = f"trl {trl.__version__}, transformers {transformers.__version__}"


def requirements():
    found = map(Requirement, importlib.metadata.requires("trl-bilevel") or [])
    return [requirement for requirement in found if requirement.marker is None]


@pytest.mark.parametrize("requirement", requirements(), ids=lambda requirement: requirement.name)
def test_version_is_in_the_stated_range(requirement):
    version = importlib.metadata.version(requirement.name)
    assert requirement.specifier.contains(version, prereleases=True), (
        f"{requirement.name} {version} is outside the range {requirement.specifier} that pyproject.toml states: run "
        "the suite with it, then widen the range."
    )


def imported_names():
    """Every `from library import name` in our sources, those within functions too."""
    found = {}
    for file in sorted(SOURCES.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                library = node.module.split(".")[0]
                if library in ("trl", "transformers", "peft", "accelerate", "datasets"):
                    for alias in node.names:
                        found.setdefault((node.module, alias.name), f"{file.relative_to(SOURCES)}:{node.lineno}")
    return [(module, name, place) for (module, name), place in sorted(found.items())]


@pytest.mark.parametrize(("module", "name", "place"), imported_names())
def test_import(module, name, place):
    if name == "GgufConfig" and Version(transformers.__version__).major < 5:
        pytest.skip("the demo's model is converted by transformers 5")
    try:
        found = hasattr(importlib.import_module(module), name)
    except ImportError:
        found = False
    library = module.split(".")[0]
    version = importlib.metadata.version(library)
    assert found, f"{library} {version} has no `{module}.{name}`, which trl_bilevel/{place} imports."


LOSS = ["model", "inputs", "return_outputs", "num_items_in_batch"]
SIGNATURES = [
    # Overridden by BilevelSFTTrainer.
    (
        SFTTrainer,
        "__init__",
        ["model", "args", "data_collator", "train_dataset", "eval_dataset", "processing_class", ...],
    ),
    (SFTTrainer, "compute_loss", LOSS),
    (SFTTrainer, "_set_signature_columns_if_needed", []),
    (
        SFTTrainer,
        "_prepare_dataset",
        ["dataset", "processing_class", "args", "packing", "formatting_func", "dataset_name"],
    ),
    (SFTTrainer, "training_step", ["args", "kwargs"]),
    (SFTTrainer, "log", ["logs", "start_time"]),
    (Trainer, "training_step", ["model", "inputs", "num_items_in_batch"]),
    (SFTTrainer, "create_model_card", ["model_name", "dataset_name", "tags"]),
    (Trainer, "get_batch_samples", ["epoch_iterator", "num_batches", "device"]),
    (Trainer, "_get_train_sampler", ["train_dataset"]),
    (Trainer, "train", ["resume_from_checkpoint", ...]),
    (Trainer, "save_model", ["output_dir", "_internal_call"]),
    (Trainer, "_load_from_checkpoint", ["resume_from_checkpoint", "model"]),
    # Overridden by SelfRefineTrainer.
    (GRPOTrainer, "__init__", ["model", "reward_funcs", "args", "train_dataset", ...]),
    (GRPOTrainer, "compute_loss", LOSS),
    (GRPOTrainer, "_get_train_sampler", ["dataset"]),
    (GRPOTrainer, "_generate_single_turn", ["prompt_ids", ...]),
    (GRPOTrainer, "_save_checkpoint", ["model", "trial"]),
    (GRPOTrainer, "create_model_card", ["model_name", "dataset_name", "tags"]),
    (Trainer, "evaluate", ["eval_dataset", "ignore_keys", "metric_key_prefix"]),
    # Called by us.
    (SFTTrainer, "_save_checkpoint", ["model", "trial"]),
    (GRPOTrainer, "_tokenize_prompts", ["prompts"]),
    (Trainer, "_prepare_inputs", ["inputs"]),
    (Trainer, "log", ["logs", "start_time"]),
    (TrlParser, "parse_args_and_config", ["args", "return_remaining_strings", "fail_with_unknown_args", ...]),
]


@pytest.mark.parametrize(
    ("owner", "method", "arguments"), SIGNATURES, ids=lambda part: getattr(part, "__name__", None) or str(part)[:20]
)
def test_signature(owner, method, arguments):
    function = getattr(owner, method, None)
    assert function is not None, f"{owner.__name__} has no method `{method}` in {VERSIONS}."
    found = list(inspect.signature(function).parameters)[1:]
    if arguments and arguments[-1] is ...:
        found = [*found[: len(arguments) - 1], ...]
    assert found == arguments, (
        f"{owner.__name__}.{method} takes {found} in {VERSIONS}; trl_bilevel was written for {arguments}."
    )


@pytest.mark.parametrize("ours", [BilevelSFTTrainer, SelfRefineTrainer])
def test_every_override_is_in_the_list(ours):
    parent = next(base for base in ours.__mro__ if base.__module__.startswith("trl."))
    overridden = {name for name, value in vars(ours).items() if inspect.isfunction(value) and hasattr(parent, name)}
    listed = {method for owner, method, _ in SIGNATURES if issubclass(parent, owner)}
    assert overridden <= listed, f"{ours.__name__} overrides {overridden - listed}: add them to SIGNATURES."


@pytest.fixture
def trainer(tiny_model, config, train_rows, validation_rows, tokenizer):
    return BilevelSFTTrainer(
        tiny_model(),
        config(),
        train_dataset=train_rows,
        validation_dataset=validation_rows,
        processing_class=tokenizer,
        peft_config=LoraConfig(target_modules="all-linear"),
    )


def accesses():
    """What the trainer's module reads of `self`, its `args`, `state` and `accelerator`: (path of names, place)."""
    file = SOURCES / "trainer" / "bilevel_sft_trainer.py"
    for node in ast.walk(ast.parse(file.read_text())):
        names = []
        part = node
        while isinstance(part, ast.Attribute):
            names.insert(0, part.attr)
            part = part.value
        if names and isinstance(part, ast.Name) and part.id == "self" and isinstance(node.ctx, ast.Load):
            depth = 2 if names[0] in ("args", "accelerator", "state") else 1
            yield tuple(names[:depth]), f"trainer/{file.name}:{node.lineno}"


def test_what_we_read_of_the_trainer_is_there(trainer):
    trainer.train()
    found = set(accesses())
    assert len(found) > 50
    missing = []
    for path, place in sorted(found, key=lambda entry: entry[1]):
        try:
            functools.reduce(getattr, path, trainer)
        except AttributeError:
            missing.append(f"`{'.'.join(path)}` (trl_bilevel/{place})")
    accelerate = importlib.metadata.version("accelerate")
    assert not missing, f"Gone in {VERSIONS}, accelerate {accelerate}: {missing}"


def test_a_release_that_lacks_something_is_refused_where_it_is_needed():
    """Rows that are drawn by their weights need no log-probabilities of tokens."""

    class Older(SFTTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return 0

    checks.check_contract(SFTTrainer, True, True)
    checks.check_contract(Older, False, True)
    with pytest.raises(ImportError, match="gives no log-probabilities.*selector_weighting='resample'.*trl>=1.16"):
        checks.check_contract(Older, True, False)

    class Odd(SFTTrainer):
        _get_train_sampler = None

    checks.check_contract(Odd, True, False)
    with pytest.raises(ImportError, match="lacks `SFTTrainer._get_train_sampler`"):
        checks.check_contract(Odd, False, True)


def test_arguments_that_we_hand_over():
    """Fields that we set or copy by name."""
    missing = [name for name in ("model_name_or_path", "use_peft", "load_in_4bit") if not hasattr(ModelConfig(), name)]
    assert not missing, f"`trl.ModelConfig` has no {missing} in {VERSIONS}."
