import pytest

from trl_bilevel.planning.shapes import KNOWN, find_config, known_name, model_shape


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("Llama-3-8B", 8_030_261_248),
        ("SmolLM2-1.7B", 1_711_376_384),
        ("SmolLM2-135M", 134_515_008),
        ("Qwen3-1.7B", 1_720_574_976),
    ],
)
def test_built_in_models_have_as_many_parameters_as_published(name, parameters):
    config, source = find_config(name)
    assert source == "table" and model_shape(config).parameters == parameters


def test_all_built_in_models_are_tested():
    (mark,) = test_built_in_models_have_as_many_parameters_as_published.pytestmark
    assert {name for name, _ in mark.args[1]} == set(KNOWN)


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("meta-llama/Meta-Llama-3-8B-Instruct", "Llama-3-8B"),
        ("HuggingFaceTB/SmolLM2-1.7B", "SmolLM2-1.7B"),
        ("Qwen/Qwen3-1.7B-Base", "Qwen3-1.7B"),
        ("meta-llama/Llama-3.1-8B", None),
    ],
)
def test_names_that_mean_a_built_in_model(name, known):
    assert known_name(name) == known


def test_hub_that_cannot_be_reached():
    assert find_config("meta-llama/Meta-Llama-3-8B")[1] == "table"
    with pytest.raises(ValueError, match="no config of the model 'nobody/nothing'"):
        find_config("nobody/nothing")


def test_folder_without_weights(small_config, tmp_path):
    small_config.save_pretrained(tmp_path)
    config, source = find_config(str(tmp_path))
    assert source == "folder" and model_shape(config, dtype="bfloat16").weight_bytes == 2


def test_norms_of_heads_are_seen():
    assert model_shape(find_config("Qwen3-1.7B")[0]).head_norms
    assert not model_shape(find_config("Llama-3-8B")[0]).head_norms
