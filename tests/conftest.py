"""A tiny model and tokenizer made on the spot: no download, no hub."""

import functools
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
import trl
from datasets import Dataset, disable_progress_bars
from packaging.version import Version
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from trl_bilevel.data.assets import docstrings

pytest_plugins = ["tests.errors_table"]

CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}"
    "{{ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


# Tests of training run on a GPU by `TRL_BILEVEL_TEST_DEVICE=cuda` (`make test-gpu`), else on the CPU.
ON_GPU = os.environ.get("TRL_BILEVEL_TEST_DEVICE") == "cuda"
# What two ways of computing the same may differ by after some steps; a GPU adds in another order for another shape.
ROUNDING = 1e-3 if ON_GPU else 1e-5

LAZY = "I do not know, sorry."

# Minutes long: started first, so that no process is left alone with one of them at the end.
LONGEST = ("test_boilerplate_gap_is_recovered", "test_killed_in_any_phase")


def pytest_configure(config):
    torch.set_num_threads(1)
    disable_progress_bars()


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem):
    """With a TRL that cannot weight losses, a test that needs it is skipped; with ours, it fails."""
    try:
        return (yield)
    except ImportError as error:
        if "trl>=1.16" in str(error) and Version(trl.__version__) < Version("1.16"):
            pytest.skip(f"this release of TRL cannot: {error}")
        raise


def pytest_collection_modifyitems(items):
    if Version(trl.__version__) < Version("1.16"):
        older = pytest.mark.skip(reason=f"trl {trl.__version__} gives no log-probabilities of single tokens")
        for item in items:
            if item.get_closest_marker("log_probs"):
                item.add_marker(older)
    items.sort(
        key=lambda item: next((n for n, name in enumerate(LONGEST) if item.name.startswith(name)), len(LONGEST))
    )


def make_tokenizer():
    """A byte-level BPE tokenizer with a chat template that marks what the assistant says."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    special = ["<|pad|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator([row["description"] for row in docstrings()], trainer)
    out = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|im_end|>", pad_token="<|pad|>")
    out.chat_template = CHAT_TEMPLATE
    return out


def make_tiny_model(tokenizer, **overrides):
    """A Llama of two narrow layers; the same values on every call."""
    torch.manual_seed(0)
    settings = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 256,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    return LlamaForCausalLM(LlamaConfig(**(settings | overrides)))


@pytest.fixture(scope="session")
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def tiny_model(tokenizer):
    return functools.partial(make_tiny_model, tokenizer)


@pytest.fixture(scope="session")
def rows():
    """Prompt-completion rows of varying length."""
    return [
        {"prompt": f"What does `{row['name']}` do?\n", "completion": row["description"]} for row in docstrings()[:120]
    ]


@pytest.fixture(scope="session")
def mixed_rows(rows):
    """40 of them; every second answer is boilerplate, so that there is something to choose by."""
    return [row | {"completion": LAZY} if n % 2 else row for n, row in enumerate(rows[:40])]


@pytest.fixture
def train_rows(mixed_rows):
    return Dataset.from_list(mixed_rows)


@pytest.fixture
def validation_rows(rows):
    return Dataset.from_list(rows[40:60])


@pytest.fixture
def config(tmp_path):
    """Makes a config for CPU, fp32, without files; keyword arguments go on top."""
    from trl_bilevel import BilevelSFTConfig

    def make(**overrides):
        return BilevelSFTConfig(**(base_arguments(tmp_path) | overrides))

    return make


def base_arguments(folder):
    """Arguments of SFTConfig and BilevelSFTConfig alike."""
    return {
        "output_dir": str(folder / "out"),
        "per_device_train_batch_size": 8,
        "max_steps": 6,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": not ON_GPU,
        "bf16": False,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "max_length": 128,
    }


def losses(trainer):
    """The training losses a trainer logged, step by step."""
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def parameters(trainer):
    """Copies of the trainable parameters."""
    return [p.detach().clone() for p in trainer.model.parameters() if p.requires_grad]


def watch_first_step(trainer):
    """Notes what a self-refining trainer generates, and the policy's forward of the first micro-batch after it.

    Returns:
        `dict`, filled by training: `batch` (TRL's generation batch), `prompts` (token ids), `ids` and `logps` (of the
        micro-batch).
    """
    found = {}
    generate, forward = trainer._generate_and_score_completions, trainer._get_per_token_logps_and_entropies

    def generating(inputs):
        found["batch"] = generate(inputs)
        found["prompts"] = trainer._tokenize_prompts([row["prompt"] for row in inputs])[0]
        return found["batch"]

    def passing(model, ids, mask, keep, **kwargs):
        out = forward(model, ids, mask, keep, **kwargs)
        if "batch" in found and "ids" not in found:
            found.update(ids=ids, logps=out[0].detach())
        return out

    trainer._generate_and_score_completions = generating
    trainer._get_per_token_logps_and_entropies = passing
    return found


def first_ratios(found):
    """Off-policy ratios of the responses' tokens in the first micro-batch after generation."""
    batch = found["batch"]
    whole = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    ratios = []
    for row, logps in zip(found["ids"], found["logps"], strict=True):
        # TRL has shuffled the responses, and cut padding that the micro-batch does not need.
        number = (whole[:, -len(row) :] == row).all(1).nonzero()[0, 0]
        mask = batch["completion_mask"][number][: len(logps)].bool()
        ratios.append((logps - batch["old_per_token_logps"][number][: len(logps)])[mask].exp())
    return torch.cat(ratios)
