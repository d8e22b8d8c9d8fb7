"""Memory values as JSON that people can read, and tensors beside it; nothing that is read back can
run code.
"""

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

SERIALIZABLE_CLASSES: Mapping[str, type[Any]] = {
    "ReplayBuffer": ReplayBuffer
}  # what memory may hold


def serialize_value(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """JSON for a memory value; tensors are put aside under their path, shown in their place.

    Raises ContinualError for a value of a kind that no checkpoint can hold.
    """
    if isinstance(value, Tensor):
        tensors[name] = gather_on_cpu(value).clone()
        return {"tensor": name}
    if isinstance(value, random.Random):
        return {"random": value.getstate()}
    if isinstance(value, Encoded):
        ids, response = " ".join(map(str, value.ids)), "".join("01"[r] for r in value.response_mask)
        return {
            "example": {
                "id": value.id,
                "task": value.task_index,
                "text": value.text,
                "ids": ids,
                "response": response,
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
        f"strategy memory {name} is a {type(value).__name__}, which no checkpoint can hold; keep "
        "tensors, numbers, texts, lists, dicts, generators, encoded examples or "
        f"{', '.join(SERIALIZABLE_CLASSES)}"
    )


# What comes out of values, or of tensors, that no run has written.
MALFORMED_ERRORS = (
    KeyError,
    ValueError,
    TypeError,
    AttributeError,
    IndexError,
    OverflowError,
    RuntimeError,
)


def _parse_example(e: Mapping[str, Any], vocab_size: int) -> Encoded:
    ids, response = tuple(map(int, e["ids"].split())), tuple(r == "1" for r in e["response"])
    if not all(
        isinstance(e[key], kind) for key, kind in (("id", str), ("text", str), ("task", int))
    ):
        raise TypeError("an example's id and text are no texts, or its task is no number")
    if len(ids) != len(response) or not any(response) or e["task"] < 0:
        raise ValueError(f"the ids, response or task of the example {brief(e['id'])} cannot be")
    if not all(0 <= i < vocab_size for i in ids):
        raise ValueError(
            f"the example {brief(e['id'])} has ids that are not among the model's {vocab_size:,}"
        )
    return Encoded(e["id"], e["task"], ids, response, e["text"])


def deserialize_value(value: Any, tensors: Mapping[str, Tensor], vocab_size: int) -> Any:
    """What `to_json` was given, of examples whose ids are below `words`; raises one of MALFORMED
    for anything else.
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
