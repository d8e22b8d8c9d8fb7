"""What Avalanche is shown of us: examples as tensors, a model as a module, a stream as a benchmark
of experiences.

Shapes: E examples, T positions, S response positions, V vocabulary. What Avalanche calls a pattern
is an example: x (E, 2, T) holds its token ids and what each is, y (E, T) the ids to be predicted, t
(E,) its task's index. The model gives logits (S, V) for x, and the criterion takes their targets
out of y.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any
from unittest.mock import patch

import torch
from hydra.utils import get_object
from torch import Tensor
from torch.nn import CrossEntropyLoss, Module, Parameter

from continual.data.template import Encoder, index_tasks
from continual.data.types import Encoded, Example, Stream, Task
from continual.errors import ConfigError
from continual.models.loss import forward, number_examples
from continual.models.model import Model
from continual.models.weights import weights

PROMPT, RESPONSE = 1, 2  # what a token is; padding is 0
IGNORE_INDEX = -100  # in y: there is nothing to predict
SEQUENCE_TYPES: Mapping[str, Any] = {"list": list, "tuple": tuple, "set": set}


def to_tensors(examples: Sequence[Encoded], causal: bool, min_width: int = 0) -> list[Tensor]:
    """[x (E, 2, T), y (E, T), t (E,)] of examples, padded to the longest of them, or to `longest`."""
    width = max([min_width, *(len(e.ids) for e in examples)])
    x, y = (
        torch.zeros(len(examples), 2, width, dtype=torch.long),
        torch.full((len(examples), width), IGNORE_INDEX),
    )
    for i, e in enumerate(examples):
        ids, response = torch.tensor(e.ids), torch.tensor(e.response_mask)
        x[i, 0, : len(ids)], x[i, 1, : len(ids)] = ids, torch.where(response, RESPONSE, PROMPT)
        y[i, : len(ids)] = torch.where(response, ids, IGNORE_INDEX)
    if causal:
        y[:, 0] = IGNORE_INDEX  # a causal model predicts nothing for a first token
    return [x, y, torch.tensor([e.task_index for e in examples])]


def to_examples(x: Tensor) -> list[Encoded]:
    """The examples that x (E, 2, T) holds."""
    return [
        Encoded(
            str(i), 0, tuple(ids[kind > 0].tolist()), tuple((kind[kind > 0] == RESPONSE).tolist())
        )
        for i, (ids, kind) in enumerate(x)
    ]


class AvalancheModel(Module):
    """A model as Avalanche sees one: x (E, 2, T) to logits (S, V), and trainable parameters alone,
    by our names.
    """

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """The logits that predict the responses, example after example."""
        return forward(self.model, number_examples(self.model, to_examples(x)))

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Parameter]]:
        """What is trained, under the names that checkpoints have."""
        yield from ((n, w) for n, w in weights(self.model).items() if isinstance(w, Parameter))

    def train(self, mode: bool = True) -> AvalancheModel:
        """With or without dropout."""
        self.model.net.train(mode)
        super().train(mode)
        return self


class Criterion(CrossEntropyLoss):
    """The cross-entropy of logits (S, V) and the targets in y."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Of y (E, T), or of its S targets alone."""
        return super().forward(input, target[target != IGNORE_INDEX])


@dataclass(frozen=True, eq=False)
class EncodedDataset:
    """Examples as a data set for torch's loaders; `flat` leaves of y the targets alone, as
    Avalanche's metrics need.
    """

    examples: Sequence[Encoded]
    causal: bool
    flat_targets: bool = False

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, i: int) -> Encoded:
        return self.examples[i]

    def collate_fn(self, rows: Sequence[Encoded]) -> list[Tensor]:
        """A batch, of one width for all of the data set: what is kept of several can be joined."""
        x, y, t = to_tensors(rows, self.causal, self.max_tokens)
        return [x, y[y != IGNORE_INDEX] if self.flat_targets else y, t]

    @cached_property
    def max_tokens(self) -> int:
        """The tokens of the longest example."""
        return max(len(e.ids) for e in self.examples)


def make_benchmark(stream: Stream, encoder: Encoder, split: str = "test") -> Any:
    """An Avalanche benchmark: an experience a stage in `train_stream`, an experience a task in
    `test_stream`.

    Its strategies take Shown(model) as their model and Criterion() as their criterion; accuracies
    are those of single tokens after the right ones. Raises DataError for a row that cannot be
    learned.
    """
    index = index_tasks(stream)

    def rows(task: Task[Example], part: str) -> Sequence[Encoded]:
        return encoder.encode_all(
            task.get_split(part), lambda e: encoder.encode_example(e, index[e.task])
        )

    return make_benchmark_from_examples(
        not encoder.seq2seq,
        train=[rows(s, "train") for s in stream.stages],
        test=[rows(t, split) for t in stream.tasks],
    )


def make_benchmark_from_examples(causal: bool, **streams: Sequence[Sequence[Encoded]]) -> Any:
    """An Avalanche benchmark of these streams, each of some experiences' examples; their tasks are
    task labels.
    """
    dataset, attribute = (
        import_avalanche("benchmarks.utils.AvalancheDataset"),
        import_avalanche("benchmarks.utils.DataAttribute"),
    )

    def experience(examples: Sequence[Encoded]) -> Any:
        rows = EncodedDataset(examples, causal, flat_targets=True)
        tasks = attribute([e.task_index for e in examples], "targets_task_labels")
        return dataset([rows], data_attributes=[tasks], collate_fn=rows.collate_fn)

    made = {name: [experience(examples) for examples in parts] for name, parts in streams.items()}
    return import_avalanche("benchmarks.with_task_labels")(
        import_avalanche("benchmarks.benchmark_from_datasets")(**made)
    )


@cache
def import_avalanche(path: str) -> Any:
    """Something of Avalanche's; raises ConfigError where it is not installed."""
    try:
        # It makes a logger where it is imported, and refuses that to all of several processes but
        # the first.
        with patch("torch.distributed.is_initialized", lambda: False):
            return get_object(f"avalanche.{path}")
    except ImportError as e:
        raise ConfigError(
            f"strategy=avalanche needs Avalanche ({e}); install the extra avalanche-lib"
        ) from e


def copy_shared_tensors(value: Any, live: Iterable[Tensor]) -> Any:
    """The value with copies of tensors that share their memory with `live` ones; dicts, lists,
    ParamData in place.
    """
    return _copy_shared_tensors(value, {t.untyped_storage().data_ptr() for t in live})


def _copy_shared_tensors(value: Any, storages: set[int]) -> Any:
    if isinstance(value, Tensor):
        return value.clone() if value.untyped_storage().data_ptr() in storages else value
    if isinstance(value, import_avalanche("training.utils.ParamData")):
        value.data = _copy_shared_tensors(value.data, storages)
    elif isinstance(value, dict):
        value.update({k: _copy_shared_tensors(v, storages) for k, v in value.items()})
    elif isinstance(value, list):
        value[:] = [_copy_shared_tensors(v, storages) for v in value]
    elif isinstance(value, tuple):
        return tuple(_copy_shared_tensors(v, storages) for v in value)
    return value


def serialize_state(value: Any, name: str) -> Any:
    """What a plugin keeps under this name, as values of a checkpoint; raises ConfigError for what
    none can hold.
    """
    kind = "dict" if isinstance(value, dict) else type(value).__name__
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Tensor):
        return {"kind": "Tensor", "data": value.detach(), "device": str(value.device)}
    if isinstance(value, import_avalanche("training.utils.ParamData")):
        return {
            "kind": kind,
            "name": value.name,
            "data": value.data.detach(),
            "device": str(value.data.device),
        }
    if kind == "dict":
        return {
            "kind": kind,
            "items": [
                [serialize_state(k, name), serialize_state(v, f"{name}.{k}")]
                for k, v in value.items()
            ],
        }
    if kind in SEQUENCE_TYPES:
        items = sorted(value, key=repr) if kind == "set" else value
        return {
            "kind": kind,
            "items": [serialize_state(v, f"{name}[{i}]") for i, v in enumerate(items)],
        }
    raise ConfigError(
        f"{name} is a {kind}, which no checkpoint can hold, and so a run could not go on with "
        "it; a plugin may keep tensors, ParamData, numbers and texts, in lists, sets and dicts"
    )


def deserialize_state(value: Any) -> Any:
    """What `kept` was given."""
    if not isinstance(value, dict):
        return value
    if value["kind"] in SEQUENCE_TYPES:
        return SEQUENCE_TYPES[value["kind"]](deserialize_state(v) for v in value["items"])
    if value["kind"] == "dict":
        return {deserialize_state(k): deserialize_state(v) for k, v in value["items"]}
    data = value["data"].to(value["device"])
    return (
        data
        if value["kind"] == "Tensor"
        else import_avalanche("training.utils.ParamData")(
            value["name"], init_tensor=data, device=data.device
        )
    )
