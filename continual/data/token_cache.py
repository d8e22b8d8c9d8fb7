"""Tokenize the training rows of a run once, into one file that a resumed run reads again.

The file is safetensors. For R rows with N tokens and B bytes of text in all it holds: ids (N,)
int32; response (N,) bool; text (B,) uint8; rows (R, 3) int32, which are each row's number of
tokens (0: unusable) and of bytes, and whether its input was shortened.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from continual.data.template import (
    TEMPLATES,
    Encoder,
    Encoding,
    index_tasks,
    make_encoded_task,
    no_rows_message,
    usable_examples,
)
from continual.data.types import Encoded, Example, Stream, Task
from continual.distributed.processes import main_process_first
from continual.errors import DataError, gathered
from continual.io.atomic import write_atomically

CACHE_SCHEMA = 2  # version of the file and of how rows are encoded
# Keys of a tokenizer's configuration that say where it was loaded from; the ids do not depend on it.
IGNORED_TOKENIZER_KEYS = ("is_local", "local_files_only", "name_or_path")
CACHE_DTYPES = {
    "ids": torch.int32,
    "response": torch.bool,
    "rows": torch.int32,
    "text": torch.uint8,
}


@dataclass(frozen=True)
class TokenCache:
    """Give access to the stream's rows as ids, without holding all of them as examples.

    `row_index` is each example's row; `tensors` are those of the file; `offsets` (R + 1, 2) are
    the positions where each row's tokens and text begin.
    """

    encoder: Encoder
    stream: Stream
    include_dev: bool
    row_index: dict[Example, int]
    tensors: dict[str, Tensor]
    offsets: Tensor

    def encode_stage(self, stage: Task[Example]) -> tuple[Task[Encoded], list[Encoding]]:
        """Return the encoded stage, and the encoding of each of its rows.

        Raises DataError if no train row is left.
        """
        train = self._load_encodings(stage.train)
        if not any(x.encoded for x in train):
            raise DataError(no_rows_message(stage.name))
        dev = self._load_encodings(stage.dev) if self.include_dev else []
        task = make_encoded_task(
            stage, usable_examples(train), usable_examples(dev), index_tasks(self.stream)
        )
        return task, [*train, *dev]

    def sample_rows(self, n: int) -> list[Encoded]:
        """Return at most `n` usable rows, evenly spread over the stream."""
        usable = [e for e, row in self.row_index.items() if self.tensors["rows"][row, 0]]
        step = max(1, len(usable) // n)
        return [self._load_row(e, 0) for e in usable[::step][:n]]

    def count_tokens(self, examples: Sequence[Example]) -> list[tuple[int, bool]]:
        """Return each example's number of tokens (0: unusable) and whether its input was cut."""
        rows = self.tensors["rows"][[self.row_index[e] for e in examples]].tolist()
        return [(tokens, bool(shortened)) for tokens, _, shortened in rows]

    def _load_encodings(self, examples: Sequence[Example]) -> list[Encoding]:
        """Load the rows of these examples; the file does not hold the reason of unusable ones."""
        task_indices = index_tasks(self.stream)
        encodings = []
        for example in examples:
            tokens, _, shortened = self.tensors["rows"][self.row_index[example]].tolist()
            if tokens:
                encoded = self._load_row(example, task_indices[example.task])
                encodings.append(Encoding(example.id, encoded, shortened=bool(shortened)))
            else:
                reason = f"{example.location}: the row was not usable when it was tokenized"
                encodings.append(Encoding(example.id, None, reason=reason))
        return encodings

    def _load_row(self, example: Example, task_index: int) -> Encoded:
        row = self.row_index[example]
        (token_start, text_start), (token_end, text_end) = self.offsets[row : row + 2].tolist()
        ids = self.tensors["ids"][token_start:token_end].tolist()
        response_mask = self.tensors["response"][token_start:token_end].tolist()
        text = bytes(self.tensors["text"][text_start:text_end].tolist())
        return Encoded(
            example.id,
            task_index,
            tuple(ids),
            tuple(response_mask),
            text.decode("utf-8", "replace"),
        )


def load_or_tokenize(
    path: Path, encoder: Encoder, stream: Stream, *, include_dev: bool
) -> TokenCache:
    """Load the train rows of all stages from `path`, and their dev rows on request, or write them.

    A file that is damaged, or that belongs to other rows or another tokenizer or template, is
    written again. Raises DataError naming all rows that cannot be learned, or with
    data.on_unusable=skip all stages without a usable row.
    """
    row_index: dict[Example, int] = {}
    for stage in stream.stages:
        for example in (*stage.train, *(stage.dev if include_dev else ())):
            row_index.setdefault(example, len(row_index))

    key = _cache_key(encoder, row_index)
    with main_process_first():
        tensors = _load_valid(path, key, encoder, len(row_index))
        if tensors is None:
            _save_tensors(path, key, _tokenize_rows(encoder, stream, row_index))
            tensors = _load_tensors(path)[1]
    offsets = _row_offsets(tensors["rows"])
    return TokenCache(encoder, stream, include_dev, row_index, tensors, offsets)


def _tokenize_rows(
    encoder: Encoder, stream: Stream, row_index: dict[Example, int]
) -> dict[str, Tensor]:
    """Tokenize all rows into the file's tensors; raises DataError as `load_or_tokenize` does."""
    ids = array("i")
    response = bytearray()
    text = bytearray()
    rows = array("i")
    unusable = []
    for example in row_index:
        encoding = encoder.encode_example(example, 0)
        encoded = encoding.encoded
        if encoded is None:
            rows.extend((0, 0, False))
            unusable.append(encoding)
            continue
        text_bytes = encoded.text.encode("utf-8", "replace")
        rows.extend((len(encoded.ids), len(text_bytes), encoding.shortened))
        ids.extend(encoded.ids)
        response += bytes(encoded.response_mask)
        text += text_bytes
    encoder.check_usable(unusable)

    empty = [s.name for s in stream.stages if not any(rows[3 * row_index[e]] for e in s.train)]
    if empty:
        raise DataError(gathered([no_rows_message(name) for name in empty]))

    buffers: dict[str, Any] = {"ids": ids, "response": response, "rows": rows, "text": text}
    tensors = {
        name: torch.frombuffer(buffer, dtype=CACHE_DTYPES[name]) for name, buffer in buffers.items()
    }
    return {**tensors, "rows": tensors["rows"].view(-1, 3)}


def _save_tensors(path: Path, key: str, tensors: dict[str, Tensor]) -> None:
    from safetensors.torch import save

    write_atomically(path, save(tensors, {"key": key, "digest": _hash_tensors(tensors)}))


def _load_tensors(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Return metadata and tensors; the tensors' values are read from disk when they are used."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        names = list(file.keys())
        return file.metadata() or {}, {name: file.get_tensor(name) for name in names}


def _load_valid(path: Path, key: str, encoder: Encoder, num_rows: int) -> dict[str, Tensor] | None:
    """Load the tensors at `path` if they are those of this key; else print why not, return None."""
    from safetensors import SafetensorError

    if not path.exists():
        return None
    try:
        metadata, tensors = _load_tensors(path)
        same_key = metadata.get("key") == key
        if (
            same_key
            and _is_valid(tensors, encoder, num_rows)
            and metadata.get("digest") == _hash_tensors(tensors)
        ):
            return tensors
        fault = (
            "is damaged"
            if same_key
            else "is of other rows, or of another tokenizer, template or length"
        )
    except (SafetensorError, OSError) as error:
        fault = f"is damaged ({error})"
    print(f"{path} {fault}; the rows are tokenized again", file=sys.stderr)
    return None


def _is_valid(tensors: dict[str, Tensor], encoder: Encoder, num_rows: int) -> bool:
    """Check that the numbers can be rows of this encoder.

    That is `num_rows` rows of possible lengths, with ids in the vocabulary, and each with a
    response.
    """
    if {name: tensor.dtype for name, tensor in tensors.items()} != CACHE_DTYPES:
        return False
    ids = tensors["ids"]
    response = tensors["response"]
    text = tensors["text"]
    rows = tensors["rows"]
    if any(tensor.dim() != 1 for tensor in (ids, response, text)):
        return False
    if rows.shape != (num_rows, 3) or not len(ids):
        return False

    min_tokens = 0 if encoder.on_unusable == "skip" else 1
    if rows.min() < 0 or rows[:, 0].min() < min_tokens or rows[:, 0].max() > encoder.max_tokens:
        return False
    if ids.min() < 0 or ids.max() > max(encoder.tokenizer.get_vocab().values()):
        return False

    offsets = _row_offsets(rows)
    if offsets[-1].tolist() != [len(ids), len(text)] or len(response) != len(ids):
        return False

    # Response tokens before each position, so that a difference of two is the count of a row.
    zero = torch.zeros(1, dtype=torch.int32)
    running_count = torch.cat([zero, response.cumsum(0, dtype=torch.int32)])
    response_tokens = running_count[offsets[:, 0]].diff()
    return bool((response_tokens > 0).eq(rows[:, 0] > 0).all())


def _row_offsets(rows: Tensor) -> Tensor:
    """Return (R + 1, 2): where each row's tokens and text begin; the last row is where all end."""
    return torch.cat([torch.zeros(1, 2, dtype=torch.long), rows[:, :2].long().cumsum(0)])


def _hash_tensors(tensors: dict[str, Tensor]) -> str:
    """Hash the tensors' names, shapes and values."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name} {tuple(tensors[name].shape)} ".encode())
        digest.update(tensors[name].contiguous().numpy().data)
    return digest.hexdigest()


def _cache_key(encoder: Encoder, rows: dict[Example, int]) -> str:
    """Hash everything that the ids depend on: encoder, tokenizer, versions and the rows' text."""
    import transformers

    digest = hashlib.sha256()
    settings = [
        CACHE_SCHEMA,
        transformers.__version__,
        repr(TEMPLATES.get(encoder.template, encoder.template)),
        encoder.max_tokens,
        encoder.seq2seq,
        encoder.on_unusable,
    ]
    digest.update(json.dumps(settings).encode())

    with tempfile.TemporaryDirectory() as folder:
        encoder.tokenizer.save_pretrained(folder)
        for path in sorted(p for p in Path(folder).rglob("*") if p.is_file()):
            content = path.read_bytes()
            if path.name == "tokenizer_config.json":
                config = json.loads(content)
                kept = {k: v for k, v in config.items() if k not in IGNORED_TOKENIZER_KEYS}
                content = json.dumps(kept).encode()
            digest.update(f"\n{path.name} {len(content)}\n".encode() + content)

    for e in rows:
        texts = [e.instruction, e.input, e.outputs[:1], [(m.role, m.content) for m in e.messages]]
        digest.update(b"\n" + json.dumps(texts).encode())
    return digest.hexdigest()
