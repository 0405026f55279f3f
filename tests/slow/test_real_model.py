"""SmolLM2-135M-Instruct on real text: does selection select, and does it help?

One seed here; three seeds, more arms and all tasks are in `benchmarks` (their results are under version control).
"""

import json
from pathlib import Path

import pytest
import torch

from tests.conftest import first_ratios, watch_first_step
from trl_bilevel.data import assets
from trl_bilevel.demo.comparison import good_share, ranking_quality
from trl_bilevel.demo.experiment import Budget, make_trainer, run_arm
from trl_bilevel.demo.tasks import make_task

pytestmark = pytest.mark.slow
EXPERIMENTS = Path(__file__).parents[2] / "benchmarks" / "experiments"
RESULTS = EXPERIMENTS.parent / "results"


@pytest.fixture(scope="module", autouse=True)
def model():
    assets.model_folder()


def learned_weights(task, seed, budget):
    """The default estimator's weights, without the training that follows; some 10 seconds on a CPU."""
    trainer, _ = make_trainer("bilevel", task, seed=seed, budget=budget)
    trainer.choose_weights()
    return trainer.sample_weights().tolist()


def test_quality_weights_find_every_kind_of_damage():
    task = make_task("quality", seed=0)
    weights = learned_weights(task, 0, Budget())
    auc = ranking_quality(weights, task.train["kind"])
    print(auc)
    assert auc["all"] >= 0.92
    assert min(auc[kind] for kind in ("lazy", "salad", "swapped")) >= 0.80
    assert good_share(weights, task.train["kind"]) > 0.5


@pytest.mark.parametrize("kind", ["truncated", "scrambled"])
def test_weights_find_answers_that_are_spoiled(kind):
    """Cut off in the middle, or of the same words in another order: about the right thing, and wrong all the same."""
    task = make_task(kind, seed=0)
    weights = learned_weights(task, 0, Budget())
    auc = ranking_quality(weights, task.train["kind"])
    print(auc)
    assert auc[kind] >= 0.95
    assert good_share(weights, task.train["kind"]) > 0.85


def test_safety_weights_find_the_stubs():
    task = make_task("safety", seed=0)
    weights = learned_weights(task, 0, Budget())
    assert ranking_quality(weights, task.train["kind"])["stub"] >= 0.97


def test_responses_are_trained_as_they_were_sampled(tmp_path):
    """A real tokenizer and prompts of different lengths: ids, masks and off-policy ratios right after generation."""
    task = make_task("safety", seed=0)
    overrides = {"model_init_kwargs": {"dtype": torch.float32}, "per_device_train_batch_size": 4}
    refining = {"num_rounds": 1, "steps_per_round": 2, "max_completion_length": 12, "question_strategy": "all"}
    settings = {"seed": 0, "output_dir": str(tmp_path), "weights": [1.0] * len(task.train)}
    settings["budget"] = Budget(overrides=overrides, refining=refining)
    offline, _ = make_trainer("refine", task, **settings)
    trainer, _ = make_trainer("refine", task, **settings, offline=offline)
    found = watch_first_step(trainer)
    trainer.train()
    out, prompts = found["batch"], found["prompts"]
    assert float((first_ratios(found) - 1).abs().max()) < 1e-5
    assert len({len(prompt) for prompt in prompts}) > 1
    for row, prompt in enumerate(prompts):
        assert out["prompt_ids"][row][out["prompt_mask"][row].bool()].tolist() == prompt
        # No token of the response is lost before its end, and none counts after it.
        mask = out["completion_mask"][row].tolist()
        length = sum(mask)
        assert mask == [1] * length + [0] * (len(mask) - length)
        end = trainer.processing_class.eos_token_id
        assert end not in out["completion_ids"][row][: length - 1].tolist()


def recorded_loss(arm):
    """Test loss of an arm without selection, as the benchmarks measured it on a CPU with the same budget and seed."""
    return json.loads((RESULTS / "cpu" / "boilerplate" / f"{arm}-seed0.json").read_text())["test_loss"]


def test_boilerplate_gap_is_recovered():
    """At equal budget. CI has no time to train both ends of the gap again: machines differ by .003 there
    (docs/results.md), the margin leaves .026."""
    task, experiment = make_task("boilerplate", seed=0), json.loads((EXPERIMENTS / "boilerplate.json").read_text())
    result = run_arm("bilevel", task, seed=0, budget=Budget(**experiment["budget"]))
    uniform, clean = recorded_loss("uniform"), recorded_loss("clean_only")
    print(uniform, result.test_loss, clean)
    assert ranking_quality(result.weights, task.train["kind"])["lazy"] >= 0.95
    assert uniform - result.test_loss >= 0.8 * (uniform - clean)
