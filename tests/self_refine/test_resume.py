"""A resumed run ends as one that was left alone; another shape of rounds is refused."""

import pytest
import torch

from tests.conftest import parameters
from tests.errors_table import CHECKPOINTS
from tests.self_refine.conftest import facts


@pytest.mark.parametrize("step", [1, 2, pytest.param(3, marks=pytest.mark.compat)])
def test_resume_at_any_step_of_a_round(build, step, tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 1, "num_rounds": 2}
    whole = build(output_dir=str(tmp_path / "a"), **settings)
    whole.train()
    resumed = build(output_dir=str(tmp_path / "b"), **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / f"checkpoint-{step}"))
    assert facts(resumed) == facts(whole)
    assert all(torch.equal(a, b) for a, b in zip(parameters(resumed), parameters(whole), strict=True))
    assert torch.equal(resumed.explicit_weights(), whole.explicit_weights())


def test_resume_after_the_patience_has_ended(build, tmp_path):
    settings = {"num_rounds": 5, "patience": 2, "learning_rate": 3.0, "adapter": False}
    whole = build(output_dir=str(tmp_path / "a"), save_strategy="steps", save_steps=1, **settings)
    whole.train()
    last = max((tmp_path / "a").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    resumed = build(output_dir=str(tmp_path / "b"), **settings)
    resumed.train(resume_from_checkpoint=str(last))
    assert [entry["step"] for entry in whole.ledger] == [2, 4]
    assert facts(resumed) == facts(whole)
    assert all(torch.equal(a, b) for a, b in zip(parameters(resumed), parameters(whole), strict=True))
    # A run of its own starts with fresh patience.
    whole.train()
    assert len(whole.ledger) == 4


@pytest.mark.bad_input(CHECKPOINTS, "`resume_from_checkpoint` in a round, with other `steps_per_round`")
def test_resume_with_rounds_of_another_shape_is_refused(refused, build, tmp_path):
    build(output_dir=str(tmp_path / "a"), save_strategy="steps", save_steps=1).train()
    other = build(output_dir=str(tmp_path / "b"), steps_per_round=4)
    with refused("steps_per_round: 2 then, 4 now"):
        other.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-1"))
