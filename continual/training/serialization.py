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

VALUES: Mapping[str, type[Any]] = {"ReplayBuffer": ReplayBuffer}  # what memory may hold


def to_json(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
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
    if type(value).__name__ in VALUES:
        return {
            "value": type(value).__name__,
            "fields": {
                f.name: to_json(getattr(value, f.name), f"{name}/{f.name}", tensors)
                for f in fields(value)
            },
        }
    if isinstance(value, dict):
        return {"dict": [[k, to_json(v, f"{name}/{k}", tensors)] for k, v in value.items()]}
    if isinstance(value, list | tuple):
        return [to_json(v, f"{name}/{i}", tensors) for i, v in enumerate(value)]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ContinualError(
        f"strategy memory {name} is a {type(value).__name__}, which no checkpoint can hold; keep "
        "tensors, numbers, texts, lists, dicts, generators, encoded examples or "
        f"{', '.join(VALUES)}"
    )


# What comes out of values, or of tensors, that no run has written.
MALFORMED = (
    KeyError,
    ValueError,
    TypeError,
    AttributeError,
    IndexError,
    OverflowError,
    RuntimeError,
)


def _example(e: Mapping[str, Any], words: int) -> Encoded:
    ids, response = tuple(map(int, e["ids"].split())), tuple(r == "1" for r in e["response"])
    if not all(
        isinstance(e[key], kind) for key, kind in (("id", str), ("text", str), ("task", int))
    ):
        raise TypeError("an example's id and text are no texts, or its task is no number")
    if len(ids) != len(response) or not any(response) or e["task"] < 0:
        raise ValueError(f"the ids, response or task of the example {brief(e['id'])} cannot be")
    if not all(0 <= i < words for i in ids):
        raise ValueError(
            f"the example {brief(e['id'])} has ids that are not among the model's {words:,}"
        )
    return Encoded(e["id"], e["task"], ids, response, e["text"])


def from_json(value: Any, tensors: Mapping[str, Tensor], words: int) -> Any:
    """What `to_json` was given, of examples whose ids are below `words`; raises one of MALFORMED
    for anything else.
    """
    if isinstance(value, list):
        return [from_json(v, tensors, words) for v in value]
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
        return _example(value["example"], words)
    if "value" in value:
        return VALUES[value["value"]](
            **{k: from_json(v, tensors, words) for k, v in value["fields"].items()}
        )
    return {k: from_json(v, tensors, words) for k, v in value["dict"]}
