"""Convert memory values to readable JSON and tensors, and back; reading never executes code."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from torch import Tensor

from continual.data.types import Encoded
from continual.errors import ContinualError, brief
from continual.models.sharding import gather_on_cpu
from continual.strategy.replay_buffer import ReplayBuffer

# Classes that memory may hold; their names are in checkpoints.
SERIALIZABLE_CLASSES: Mapping[str, type[Any]] = {"ReplayBuffer": ReplayBuffer}

# Errors that values or tensors raise if no run has written them.
MALFORMED_ERRORS = (
    KeyError,
    ValueError,
    TypeError,
    AttributeError,
    IndexError,
    OverflowError,
    RuntimeError,
)


def serialize_value(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """Return a memory value as JSON, and add its tensors to `tensors`.

    `name` is the path of the value. A tensor is stored under its path, which stands in the JSON in
    its place. Raises ContinualError for a value of a type that checkpoints cannot hold.
    """
    if isinstance(value, Tensor):
        tensors[name] = gather_on_cpu(value).clone()
        return {"tensor": name}
    if isinstance(value, random.Random):
        return {"random": value.getstate()}
    if isinstance(value, Encoded):
        return {
            "example": {
                "id": value.id,
                "task": value.task_index,
                "text": value.text,
                "ids": " ".join(map(str, value.ids)),
                "response": "".join("01"[bit] for bit in value.response_mask),
            }
        }
    if type(value).__name__ in SERIALIZABLE_CLASSES:
        return {
            "value": type(value).__name__,
            "fields": {
                f.name: serialize_value(getattr(value, f.name), f"{name}/{f.name}", tensors)
                for f in fields(value)
            },
        }
    if isinstance(value, dict):
        return {"dict": [[k, serialize_value(v, f"{name}/{k}", tensors)] for k, v in value.items()]}
    if isinstance(value, list | tuple):
        return [serialize_value(v, f"{name}/{i}", tensors) for i, v in enumerate(value)]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ContinualError(
        f"strategy memory {name} is a {type(value).__name__}, which no checkpoint can hold; use "
        "tensors, numbers, texts, lists, dicts, generators, encoded examples or "
        f"{', '.join(SERIALIZABLE_CLASSES)}"
    )


def _parse_example(e: Mapping[str, Any], vocab_size: int) -> Encoded:
    """Return the example that `serialize_value` wrote; raise if it is not valid."""
    ids = tuple(int(token) for token in e["ids"].split())
    response = tuple(bit == "1" for bit in e["response"])
    types = {"id": str, "text": str, "task": int}
    if not all(isinstance(e[key], kind) for key, kind in types.items()):
        raise TypeError("an example's id and text are no texts, or its task is no number")
    if len(ids) != len(response) or not any(response) or e["task"] < 0:
        raise ValueError(f"the ids, response or task of the example {brief(e['id'])} cannot be")
    if not all(0 <= i < vocab_size for i in ids):
        raise ValueError(
            f"the example {brief(e['id'])} has ids that are not among the model's {vocab_size:,}"
        )
    return Encoded(e["id"], e["task"], ids, response, e["text"])


def deserialize_value(value: Any, tensors: Mapping[str, Tensor], vocab_size: int) -> Any:
    """Return the value that `serialize_value` was given.

    The token ids of examples must be below `vocab_size`. Raises one of MALFORMED_ERRORS for
    anything that `serialize_value` did not write.
    """
    if isinstance(value, list):
        return [deserialize_value(v, tensors, vocab_size) for v in value]
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        return tensors[value["tensor"]]
    if "random" in value:
        version, state, gauss = value["random"]
        rng = random.Random()
        rng.setstate((version, tuple(state), gauss))
        return rng
    if "example" in value:
        return _parse_example(value["example"], vocab_size)
    if "value" in value:
        return SERIALIZABLE_CLASSES[value["value"]](
            **{k: deserialize_value(v, tensors, vocab_size) for k, v in value["fields"].items()}
        )
    return {k: deserialize_value(v, tensors, vocab_size) for k, v in value["dict"]}
