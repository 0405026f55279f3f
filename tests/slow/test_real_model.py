"""SmolLM2-135M-Instruct on real text: does selection select, and does it help?

One seed here; three seeds, more arms and all tasks are in `benchmarks` (their results are under version control).
"""

import pytest
import torch

from trl_bilevel.demo import assets
from trl_bilevel.demo.comparison import good_share, ranking_quality
from trl_bilevel.demo.experiment import Budget, make_trainer, run_arm
from trl_bilevel.demo.tasks import make_task

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def model():
    assets.model_folder()


def learned_weights(task, seed, budget):
    """The default estimator's weights, without the training that follows."""
    trainer, _ = make_trainer("bilevel", task, seed=seed, budget=budget)
    trainer.start_selection()
    return trainer.sample_weights().tolist()


def test_quality_weights_find_every_kind_of_damage():
    task = make_task("quality", seed=0)
    weights = learned_weights(task, 0, Budget())
    auc = ranking_quality(weights, task.train["kind"])
    print(auc)
    assert auc["all"] >= 0.88
    assert min(auc[kind] for kind in ("lazy", "salad", "swapped")) >= 0.75
    assert good_share(weights, task.train["kind"]) > 0.5


def test_safety_weights_find_the_stubs():
    task = make_task("safety", seed=0)
    weights = learned_weights(task, 0, Budget())
    assert ranking_quality(weights, task.train["kind"])["stub"] >= 0.97


def test_boilerplate_gap_is_recovered():
    task = make_task("boilerplate", seed=0)
    budget = Budget(epochs=3)
    results = {arm: run_arm(arm, task, seed=0, budget=budget) for arm in ("uniform", "clean_only", "bilevel")}
    loss = {arm: result.test_loss for arm, result in results.items()}
    print(loss)
    assert ranking_quality(results["bilevel"].weights, task.train["kind"])["lazy"] >= 0.95
    assert loss["uniform"] - loss["bilevel"] >= 0.8 * (loss["uniform"] - loss["clean_only"])
    assert torch.isfinite(torch.tensor(list(loss.values()))).all()
