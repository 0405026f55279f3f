"""What the experiment files ask for, and what their results come to."""

from dataclasses import fields

import pytest

from benchmarks.arms import ARMS, REFINING
from benchmarks.run import experiments, jobs_of
from benchmarks.summary import recovered
from trl_bilevel.demo.experiment import Budget
from trl_bilevel.demo.tasks import TASKS


@pytest.mark.parametrize("experiment", experiments(), ids=lambda each: each["name"])
def test_experiments_ask_for_what_there_is(experiment):
    assert experiment["task"] in TASKS
    arms = {job.arguments[1] for job in jobs_of(experiment)}
    assert arms <= {*ARMS, "dattri"}
    names = {field.name for field in fields(Budget)}
    assert experiment["budget"].keys() <= names
    for each in experiment.get("budgets", {}).values():
        assert each["arm"] in {*ARMS, "dattri"} - {*REFINING} and each["changes"].keys() <= names


def test_a_budget_of_its_own_is_a_run_of_its_own():
    (experiment,) = experiments(["quality"])
    found = {job.target.stem: job.arguments[1] for job in jobs_of(experiment, seeds=[1])}
    assert found["pilot_on_top-seed1"] == "pilot" and found["clean_only_short-seed1"] == "clean_only"
    assert found["bilevel-seed1"] == "bilevel"


def test_the_gap_is_that_between_uniform_and_clean():
    def runs(**losses):
        return {arm: {seed: {"test_loss": loss} for seed, loss in enumerate(values)} for arm, values in losses.items()}

    arms = runs(uniform=(3.0, 2.0, 3.0), clean_only=(2.0, 2.5, 2.5), other=(2.25, 2.0, 3.5, 1.0))
    # The second seed has no gap, the fourth no ends.
    assert recovered(arms, "other") == {0: 0.75, 2: -1.0}
    assert recovered(arms, "uniform") == {0: 0.0, 2: 0.0} and recovered(arms, "clean_only") == {0: 1.0, 2: 1.0}
    assert recovered(arms, "not run") == {}
