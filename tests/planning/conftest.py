import pytest
from transformers import LlamaConfig

# Large enough that a layer's activations are to be seen beside the weights.
SIZES = {
    "vocab_size": 1360,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
    "pad_token_id": 0,
    "eos_token_id": 1,
}


@pytest.fixture
def small_config():
    return LlamaConfig(**SIZES)
