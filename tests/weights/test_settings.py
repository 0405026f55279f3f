"""What presets say, and what wins over them."""

import pytest

from trl_bilevel.weights.settings import PRESETS, PilotSettings, WeightSettings


def resolved(**given):
    settings = WeightSettings(**given)
    settings.resolve()
    return settings


@pytest.mark.parametrize("name", PRESETS)
def test_presets(name):
    settings = resolved(selector_preset=name)
    preset = PRESETS[name]
    assert (settings.weight_estimator, settings.matches) == (preset.estimator, preset.matches)
    assert settings.published == preset.published


def test_what_is_given_by_its_name_wins():
    settings = resolved(selector_preset="fast", weight_estimator="both", pilot_steps=9)
    assert (settings.weight_estimator, settings.pilot_steps, settings.matches) == ("both", 9, False)
    assert resolved(selector_preset=None).selector_preset == "balanced"
    assert not resolved(selector_preset="seal", weight_estimator="none").published


def test_resolving_twice_changes_nothing():
    settings = resolved(selector_preset="fast")
    before = WeightSettings(**vars(settings))
    settings.resolve()
    assert settings == before


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"weight_estimator": "magic"}, "`weight_estimator` must be one of 'probe', 'value_function', 'both', 'none'"),
        ({"weight_estimator": "loss"}, "`selector_preset='seal'`"),
        ({"weight_estimator": "both", "selector_preset": "paper"}, "Leave one of them out"),
        ({"pilot_learning_rate": float("nan")}, "`pilot_learning_rate` must be a finite number"),
        ({"weight_estimator": "lookahead"}, "'lookahead'` is gone.*Use 'probe'"),
        ({"pilot_steps": 32}, "`pilot_steps=32` has no meaning with `weight_estimator='probe'`.*trains no pilot"),
        ({"pilot_steps": -1, "weight_estimator": "both"}, "`pilot_steps` must be at least 1, got -1"),
        ({"filter_rate": -0.1}, "`filter_rate` must lie in"),
    ],
)
def test_what_cannot_work(given, message):
    with pytest.raises(ValueError, match=message):
        resolved(**given)


def test_both_trainers_share_the_pilots():
    names = set(PilotSettings.__dataclass_fields__)
    assert names < set(WeightSettings.__dataclass_fields__)
