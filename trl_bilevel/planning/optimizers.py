"""What optimizers keep per trained parameter, by the names that transformers gives them."""

from __future__ import annotations

from .shapes import ModelShape

# Bytes of 8-bit states per value and state: the value, and an fp32 scale per block of 256.
EIGHT_BIT = 1 + 4 / 256
# States per value; their dtype is the parameter's unless the name says otherwise.
STATES = {"adamw": 2, "adam": 2, "lion": 1, "rmsprop": 1, "adagrad": 1, "sgd": 0, "ademamix": 3, "stable": 2}


def state_bytes(name: str, model: ModelShape) -> tuple[int, int]:
    """Bytes of an optimizer's states on the device, and of those that may be paged out to the host.

    Raises:
        ValueError: if the optimizer is not known.
    """
    plain = name.removeprefix("paged_")
    if plain == "adafactor":
        # Row and column means in place of a full second moment.
        size = 4 * sum((x.inputs + x.outputs) * x.number for x in model.linears if x.trained)
        size += 4 * sum((x.inputs + x.outputs + 2 * x.rank) * x.number for x in model.linears if x.rank)
        return size, 0
    states = STATES.get(plain.split("_")[0])
    if states is None:
        raise ValueError(
            f"`optim={name!r}` is not known to the planner, which knows names that start with "
            f"{', '.join([*STATES, 'adafactor'])}. Plan with the one of them that is nearest."
        )
    if "8bit" in plain:
        # transformers keeps the states of embeddings in fp32.
        exempt = model.vocabulary * model.hidden if model.embedding_trained else 0
        size = round(states * (EIGHT_BIT * (model.trainable - exempt) + 4 * exempt))
    elif "bnb" in plain or plain.endswith("32bit") or name.startswith("paged_"):
        size = 4 * states * model.trainable
    else:
        size = states * model.trainable_bytes
    return (0, size) if name.startswith("paged_") else (size, 0)


def step_bytes(name: str, model: ModelShape, device: str) -> int:
    """Working space of an optimizer step.

    Fused and bitsandbytes ones need none; the others a temporary per value on a GPU, where torch steps all parameters
    at once.
    """
    if "fused" in name or "bit" in name or name.startswith("sgd") or device == "cpu":
        return 0
    return model.trainable_bytes
