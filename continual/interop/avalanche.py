"""Show our data to Avalanche: examples as tensors, a model as a module, a stream as a benchmark.

Shapes: E examples, T positions, S response positions, V vocabulary. An example is a "pattern" of
Avalanche's: x (E, 2, T) holds its token ids and the kind of each token, y (E, T) the ids to be
predicted, t (E,) the index of its task. The model computes logits (S, V) for x, and the criterion
takes their targets out of y.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import torch
from hydra.utils import get_object
from torch import Tensor
from torch.nn import CrossEntropyLoss, Module, Parameter

from continual.data.template import Encoder, index_tasks, usable_examples
from continual.data.types import Encoded, Example, Stream, Task
from continual.errors import ConfigError
from continual.models.loss import forward, number_examples
from continual.models.model import Model
from continual.models.weights import weights

# The kind of a token; padding is 0.
PROMPT = 1
RESPONSE = 2

IGNORE_INDEX = -100  # in y, where nothing is predicted
SEQUENCE_TYPES: Mapping[str, Any] = {"list": list, "tuple": tuple, "set": set}


def to_tensors(examples: Sequence[Encoded], causal: bool, min_width: int = 0) -> list[Tensor]:
    """Return [x (E, 2, T), y (E, T), t (E,)], padded to the longest example or to `min_width`."""
    width = max([min_width, *(len(e.ids) for e in examples)])
    x = torch.zeros(len(examples), 2, width, dtype=torch.long)
    y = torch.full((len(examples), width), IGNORE_INDEX)
    for i, e in enumerate(examples):
        n = len(e.ids)
        ids = torch.tensor(e.ids)
        response = torch.tensor(e.response_mask)
        x[i, 0, :n] = ids
        x[i, 1, :n] = torch.where(response, RESPONSE, PROMPT)
        y[i, :n] = torch.where(response, ids, IGNORE_INDEX)
    if causal:
        y[:, 0] = IGNORE_INDEX  # a causal model does not predict the first token
    return [x, y, torch.tensor([e.task_index for e in examples])]


def to_examples(x: Tensor) -> list[Encoded]:
    """Return the examples that x (E, 2, T) holds."""
    examples = []
    for i, (ids, kind) in enumerate(x):
        is_token = kind > 0
        response_mask = tuple((kind[is_token] == RESPONSE).tolist())
        examples.append(Encoded(str(i), 0, tuple(ids[is_token].tolist()), response_mask))
    return examples


class AvalancheModel(Module):
    """A model as Avalanche expects it: maps x (E, 2, T) to logits (S, V).

    Its parameters are the trainable ones, under our names.
    """

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits that predict the responses, example after example."""
        return forward(self.model, number_examples(self.model, to_examples(x)))

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Parameter]]:
        """Yield the trainable parameters, under the names that checkpoints have."""
        yield from ((n, w) for n, w in weights(self.model).items() if isinstance(w, Parameter))

    def train(self, mode: bool = True) -> AvalancheModel:
        """Switch dropout on or off."""
        self.model.net.train(mode)
        super().train(mode)
        return self


class Criterion(CrossEntropyLoss):
    """The cross-entropy of logits (S, V) and the targets in y."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Compute the mean loss; `target` is y (E, T), or only its S targets."""
        return super().forward(input, target[target != IGNORE_INDEX])


@dataclass(frozen=True, eq=False)
class EncodedDataset:
    """Examples as a data set for torch's loaders.

    With `flat_targets` a batch's y holds the targets only, as Avalanche's metrics need.
    """

    examples: Sequence[Encoded]
    causal: bool
    flat_targets: bool = False

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, i: int) -> Encoded:
        return self.examples[i]

    def collate_fn(self, rows: Sequence[Encoded]) -> list[Tensor]:
        """Build a batch, as wide as the whole data set, so that parts of several can be joined."""
        x, y, t = to_tensors(rows, self.causal, self.max_tokens)
        return [x, y[y != IGNORE_INDEX] if self.flat_targets else y, t]

    @cached_property
    def max_tokens(self) -> int:
        """The number of tokens of the longest example."""
        return max(len(e.ids) for e in self.examples)


def make_benchmark(stream: Stream, encoder: Encoder, split: str = "test") -> Any:
    """Build an Avalanche benchmark of a stream.

    `train_stream` has one experience per stage, `test_stream` one per task. Avalanche's strategies
    take AvalancheModel(model) as their model and Criterion() as their criterion; accuracies are
    those of single tokens, each after the right ones. Raises DataError for a row that cannot be
    learned.
    """
    index = index_tasks(stream)

    def rows(task: Task[Example], part: str) -> Sequence[Encoded]:
        return usable_examples(encoder.encode_examples(task.get_split(part), index))

    return make_benchmark_from_examples(
        not encoder.seq2seq,
        train=[rows(s, "train") for s in stream.stages],
        test=[rows(t, split) for t in stream.tasks],
    )


def make_benchmark_from_examples(causal: bool, **streams: Sequence[Sequence[Encoded]]) -> Any:
    """Build an Avalanche benchmark of named streams, each a list of experiences' examples.

    The examples' tasks are the task labels.
    """
    dataset = import_avalanche("benchmarks.utils.AvalancheDataset")
    attribute = import_avalanche("benchmarks.utils.DataAttribute")

    def experience(examples: Sequence[Encoded]) -> Any:
        rows = EncodedDataset(examples, causal, flat_targets=True)
        tasks = attribute([e.task_index for e in examples], "targets_task_labels")
        return dataset([rows], data_attributes=[tasks], collate_fn=rows.collate_fn)

    datasets = {name: [experience(part) for part in parts] for name, parts in streams.items()}
    benchmark = import_avalanche("benchmarks.benchmark_from_datasets")(**datasets)
    return import_avalanche("benchmarks.with_task_labels")(benchmark)


@cache
def import_avalanche(path: str) -> Any:
    """Import a name of Avalanche's; raises ConfigError if Avalanche is not installed."""
    try:
        with _without_process_group():
            return get_object(f"avalanche.{path}")
    except ImportError as e:
        raise ConfigError(
            f"strategy=avalanche needs Avalanche ({e}); install the extra avalanche-lib"
        ) from e


@contextmanager
def _without_process_group() -> Iterator[None]:
    """Let torch say that there is one process, and restore its answer afterwards.

    Avalanche creates a logger when it is imported, and raises in all processes but the first.
    """
    original = torch.distributed.is_initialized
    torch.distributed.is_initialized = lambda: False
    try:
        yield
    finally:
        torch.distributed.is_initialized = original


def copy_shared_tensors(value: Any, live: Iterable[Tensor]) -> Any:
    """Return the value with copies of the tensors that share memory with `live` ones.

    Dicts, lists and ParamData are changed in place.
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
    """Convert a plugin's value to one that a checkpoint can hold.

    `name` is its place in the plugin, for the ConfigError about a type that no checkpoint holds.
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
        f"{name} is a {kind}, which no checkpoint can hold, so the run could not be resumed; "
        "a plugin may keep tensors, ParamData, numbers and texts, in lists, sets and dicts"
    )


def deserialize_state(value: Any) -> Any:
    """Return the value that `serialize_state` converted."""
    if not isinstance(value, dict):
        return value
    if value["kind"] in SEQUENCE_TYPES:
        return SEQUENCE_TYPES[value["kind"]](deserialize_state(v) for v in value["items"])
    if value["kind"] == "dict":
        return {deserialize_state(k): deserialize_state(v) for k, v in value["items"]}
    data = value["data"].to(value["device"])
    if value["kind"] == "Tensor":
        return data
    param_data = import_avalanche("training.utils.ParamData")
    return param_data(value["name"], init_tensor=data, device=data.device)
