"""What presets say, and what wins over them."""

import pytest

from trl_bilevel.weights.settings import PRESETS, PilotSettings, WeightSettings, lookahead_steps


def resolved(**given):
    settings = WeightSettings(**given)
    settings.resolve()
    return settings


@pytest.mark.parametrize("name", PRESETS)
def test_presets(name):
    settings = resolved(selector_preset=name)
    preset = PRESETS[name]
    assert (settings.weight_estimator, settings.pilot_scored_rows) == (preset.estimator, preset.scored_rows)
    assert (settings.feature_depth, settings.published) == (preset.feature_depth, preset.published)


def test_what_is_given_by_its_name_wins():
    settings = resolved(selector_preset="fast", pilot_scored_rows=0, weight_estimator="value_function")
    assert (settings.pilot_scored_rows, settings.weight_estimator, settings.feature_depth) == (
        0,
        "value_function",
        0.1,
    )
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
        (
            {"weight_estimator": "magic"},
            "`weight_estimator` must be one of 'value_function', 'lookahead', 'probe', 'none'",
        ),
        ({"weight_estimator": "loss"}, "`selector_preset='seal'`"),
        ({"weight_estimator": "lookahead", "selector_preset": "paper"}, "Leave one of them out"),
        ({"pilot_learning_rate": float("nan")}, "`pilot_learning_rate` must be a finite number"),
        ({"pilot_steps": -1}, "`pilot_steps` must be at least 1, got -1"),
        ({"pilot_scored_rows": 15}, "at least 16, got 15"),
        ({"pilot_scored_rows": -1}, "at least 16, got -1"),
        ({"filter_rate": -0.1}, "`filter_rate` must lie in"),
    ],
)
def test_what_cannot_work(given, message):
    with pytest.raises(ValueError, match=message):
        resolved(**given)


def test_both_trainers_share_the_pilots():
    names = set(PilotSettings.__dataclass_fields__)
    assert names < set(WeightSettings.__dataclass_fields__)
    assert [lookahead_steps(n) for n in (1, 8, 9, 24)] == [4, 4, 4, 12]
