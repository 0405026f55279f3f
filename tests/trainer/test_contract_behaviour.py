"""What TRL, transformers, PEFT and accelerate do that we rely on. A failure says which release changed it.

The names: `test_contract.py`.
"""

import inspect
from pathlib import Path

import pytest
import torch
import transformers
import trl
from accelerate import Accelerator
from datasets import Dataset
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer, pack_dataset
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from tests.conftest import ON_GPU, base_arguments
from trl_bilevel.data.batches import concatenate_batches
from trl_bilevel.data.identity import SAMPLE_ID, SEGMENTS, SampleIdCollator
from trl_bilevel.trainer.checkpoints import LAST_FILE

pytestmark = pytest.mark.compat

VERSIONS = f"trl {trl.__version__}, transformers {transformers.__version__}"


@pytest.fixture
def sft(tiny_model, train_rows, tokenizer, tmp_path):
    """Makes trainers of TRL's, with a small adapter."""

    def make(trainer_class=SFTTrainer, **overrides):
        return trainer_class(
            tiny_model(),
            SFTConfig(**base_arguments(tmp_path) | overrides),
            train_dataset=train_rows,
            processing_class=tokenizer,
            peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"]),
        )

    return make


# Batches and the loss


@pytest.mark.log_probs
def test_the_fused_head_gives_what_the_weights_multiply(sft):
    trainer = sft()
    batch = trainer._prepare_inputs(trainer.data_collator([trainer.train_dataset[i] for i in range(3)]))
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
    outputs = trainer.model(**inputs, use_cache=False, fused_lm_head=True)
    missing = [name for name in ("log_probs", "label_mask", "entropy", "is_top1") if not hasattr(outputs, name)]
    assert not missing, f"`model(..., fused_lm_head=True)` gives no {missing} in {VERSIONS}."
    assert outputs.log_probs.shape == outputs.label_mask.shape == (3, batch["input_ids"].shape[1] - 1)
    assert torch.equal(outputs.label_mask.bool(), batch["labels"][:, 1:] != -100)
    assert (outputs.log_probs[~outputs.label_mask.bool()] == 0).all(), "log_probs are not zero where ignored"
    logits = trainer.model(**{**inputs, "labels": None}).logits[:, :-1].log_softmax(-1)
    expected = logits.gather(-1, batch["labels"][:, 1:].clamp(min=0).unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(outputs.log_probs, expected * outputs.label_mask, atol=1e-4, rtol=1e-4)


@pytest.mark.log_probs
def test_compute_loss_only_calls_the_model_and_sums_log_probs():
    """TRL is handed a model with scaled log-probabilities; it must use them for the loss only."""
    body = inspect.getsource(SFTTrainer.compute_loss)
    assert "outputs = model(**inputs, fused_lm_head=True)" in body, "TRL calls the model in another way"
    assert "per_token_loss = -outputs.log_probs" in body, "TRL builds the loss in another way"
    for used in ("outputs.label_mask", "outputs.entropy", "outputs.is_top1"):
        assert used in body


@pytest.mark.log_probs
def test_padding_free_batches_hold_what_we_join():
    """Two batches that are joined are the batch of all their rows."""
    rows = [{"input_ids": list(range(5, 5 + n)), "labels": [-100, *range(6, 5 + n)]} for n in (3, 1, 4, 2)]
    collator = SampleIdCollator(DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True), merges=True)
    rows = [row | {SAMPLE_ID: number} for number, row in enumerate(rows)]
    whole = collator(rows)
    known = {"input_ids", "labels", "position_ids", "seq_idx", SAMPLE_ID, SEGMENTS}
    known |= {f"{name}_{side}" for name in ("cu_seq_lens", "max_length") for side in "qk"}
    assert set(whole) == known, "TRL's collator gives other inputs: see data.batches.concatenate_batches"
    joined = concatenate_batches(collator(rows[:2]), collator(rows[2:]), 0)
    for name, value in whole.items():
        assert torch.equal(torch.as_tensor(joined[name]), torch.as_tensor(value)), name


def test_the_packer_carries_our_numbers():
    rows = Dataset.from_dict({"input_ids": [[1, 2], [3]], "labels": [[1, 2], [3]], SAMPLE_ID: [[7, 7], [8]]})
    packed = pack_dataset(rows, 4, "bfd")
    assert packed[0] == {
        "input_ids": [1, 2, 3],
        "labels": [1, 2, 3],
        SAMPLE_ID: [7, 7, 8],
        "seq_lengths": [2, 1],
    }, "TRL's packer drops or reorders columns: see data.packing"


# The training loop


class Events(TrainerCallback):
    """Makes a trainer class that notes what is called, in order."""

    def __init__(self):
        self.names = []

    def on_train_begin(self, *args, **kwargs):
        self.names.append("on_train_begin")

    def of(self, *methods, base=SFTTrainer):
        def noting(name):
            def call(trainer, *args, **kwargs):
                self.names.append(name)
                return getattr(base, name)(trainer, *args, **kwargs)

            return call

        return type("Noting", (base,), {name: noting(name) for name in methods})


def test_a_step_is_one_window_of_batches(sft):
    """The window of an optimizer step is drawn first, and counts the tokens that the loss is divided by."""
    events, counted = Events(), []
    base = events.of("training_step")

    class Watching(base):
        def get_batch_samples(self, *args, **kwargs):
            events.names.append("get_batch_samples")
            batches, num_items = super().get_batch_samples(*args, **kwargs)
            counted.append((sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches), int(num_items)))
            return batches, num_items

    trainer = sft(Watching, max_steps=2, gradient_accumulation_steps=2, per_device_train_batch_size=2)
    trainer.add_callback(events)
    assert trainer.model_accepts_loss_kwargs, f"Losses are not normalised over the window in {VERSIONS}."
    trainer.train()
    step = ["get_batch_samples", "training_step", "training_step"]
    assert events.names == ["on_train_begin", *step, *step], f"The training loop of {VERSIONS} has another order."
    assert all(tokens == num_items for tokens, num_items in counted), "`num_items_in_batch` counts something else"


def test_a_checkpoint_is_loaded_before_training_begins_and_ends_with_its_state(sft, tmp_path):
    events = Events()
    saving = ("save_model", "_save_optimizer_and_scheduler", "_save_rng_state")
    trainer = sft(events.of(*saving), save_strategy="steps", save_steps=2, max_steps=4, save_total_limit=1)
    seen = []

    class WatchState(TrainerCallback):
        """Notes when the state is written; `train` makes it anew."""

        def on_train_begin(self, args, state, control, **kwargs):
            write = state.save_to_json

            def writing(path):
                events.names.append(Path(path).name)
                seen.append(sorted(folder.name for folder in Path(path).parents[1].glob("checkpoint-*")))
                write(path)

            state.save_to_json = writing

    trainer.add_callback(WatchState())
    trainer.train()
    assert events.names[:4] == [*saving, LAST_FILE], f"{LAST_FILE} is not the last file of a checkpoint in {VERSIONS}"
    assert seen[1] == ["checkpoint-2", "checkpoint-4"], "the older checkpoint goes before the newer one is complete"
    folder = tmp_path / "out" / "checkpoint-4"
    files = {file.name for file in folder.iterdir()}
    needed = {"rng_state.pth", LAST_FILE, "optimizer.pt", "adapter_model.safetensors"}
    assert needed <= files, f"A checkpoint of {VERSIONS} has no {needed - files}."

    events = Events()
    resumed = sft(events.of("_load_from_checkpoint", "get_batch_samples"), max_steps=5)
    resumed.add_callback(events)
    resumed.train(resume_from_checkpoint=str(folder))
    assert events.names[:2] == ["_load_from_checkpoint", "on_train_begin"]


# Generation


def test_rounds_of_grpo(tiny_model, train_rows, tokenizer, tmp_path):
    """How the reward is asked for, what becomes of it, and when responses are generated."""
    asked, generated = [], []

    def reward(prompts, completions, completion_ids, sample_id, **kwargs):
        asked.append((list(prompts), list(sample_id)))
        assert len(prompts) == len(completions) == len(completion_ids) == len(sample_id)
        assert all(isinstance(token, int) for ids in completion_ids for token in ids)
        return [float(number % 5) for number in range(len(prompts))]

    class Watching(GRPOTrainer):
        def _generate_and_score_completions(self, inputs):
            out = super()._generate_and_score_completions(inputs)
            generated.append((self._step, out["advantages"].clone()))
            return out

    settings = base_arguments(tmp_path)
    del settings["max_length"]
    settings |= {"max_steps": 4, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    settings |= {"num_generations": 2, "steps_per_generation": 4, "max_completion_length": 4}
    questions = train_rows.select_columns(["prompt"]).add_column(SAMPLE_ID, list(range(len(train_rows))))
    trainer = Watching(
        tiny_model(),
        reward,
        GRPOConfig(**settings, scale_rewards="none", beta=0.0, remove_unused_columns=False),
        questions,
        processing_class=tokenizer,
    )
    # As for `implicit_weight_scope="round"`.
    trainer.num_generations = trainer.args.generation_batch_size
    trainer.train()
    assert [step for step, _ in generated] == [0, 4], f"GRPOTrainer counts micro-batches otherwise in {VERSIONS}."
    assert trainer._step == 8
    assert len(trainer._buffered_inputs) == 4 and all(isinstance(part, dict) for part in trainer._buffered_inputs)
    prompts, numbers = asked[0]
    assert prompts == [questions[number]["prompt"] for number in numbers], "columns of the questions do not arrive"
    assert numbers[::2] == numbers[1::2], "the responses of a question do not follow one another"
    rewards = torch.tensor([float(number % 5) for number in range(8)])
    torch.testing.assert_close(generated[0][1].cpu(), rewards - rewards.mean(), atol=1e-5, rtol=1e-5)
    assert trainer._tokenize_prompts(["a b"])[0] == [tokenizer("a b")["input_ids"]]


@pytest.mark.log_probs
def test_grpo_scales_its_loss_itself():
    assert GRPOTrainer.loss_is_scaled_for_ga is True, f"Transformers scales the loss of GRPOTrainer in {VERSIONS}."


# Adapters, processes, quantisation


def test_adapters_are_plain_layers(sft):
    """`weights.adapters` goes by the layers beneath them; `trainer.checks` looks into the model."""
    model = sft().model
    adapted = [(name, module) for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
    assert adapted and all(type(module.base_layer) is nn.Linear for _, module in adapted), "LoRA is built otherwise"
    assert all(module.in_features == module.base_layer.in_features for _, module in adapted)
    assert model.active_peft_config.is_prompt_learning is False
    assert len(model.get_base_model().get_decoder().layers) == 2
    assert model.config.get_text_config().hidden_size == 32


def test_accelerate_takes_lists_of_tensors():
    accelerator = Accelerator(cpu=not ON_GPU)
    values = [torch.arange(3, device=accelerator.device), torch.rand(3, device=accelerator.device)]
    for found in (accelerator.gather(values),):
        assert all(torch.equal(a, b) for a, b in zip(found, values, strict=True))
    assert "reduction" in inspect.signature(accelerator.reduce).parameters
    reason = "this release of accelerate knows no tensor, context or sequence parallelism"
    config = pytest.importorskip("accelerate.parallelism_config", reason=reason).ParallelismConfig
    missing = [name for name in ("tp_enabled", "cp_enabled", "sp_enabled") if not hasattr(config, name)]
    assert not missing, f"accelerate's `ParallelismConfig` has no {missing}: see trainer.checks."


def test_bitsandbytes_still_repacks_on_cpus():
    """Fails when the workaround in `weights.quantization` has no effect any more, or is no longer needed."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    assert "support_avx512bf16_for_cpu" in inspect.getsource(bitsandbytes.nn.Linear4bit), "see weights.quantization"
