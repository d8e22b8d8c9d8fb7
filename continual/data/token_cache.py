"""The rows that a run learns, tokenised once: their ids lie in one file beside the run, which a
resumed run reads.

The file is safetensors, with R rows of N tokens and B bytes of text in all: ids (N,) int32;
response (N,) bool; text (B,) uint8; rows (R, 3) int32: each one's tokens (0: unfit), bytes, and
whether its input was shortened.
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

from continual.data.template import TEMPLATES, Encoder, index_tasks, no_rows_message
from continual.data.types import Encoded, Example, Stream, Task
from continual.distributed.processes import main_process_first
from continual.errors import DataError, gathered
from continual.io.atomic import write_atomically

CACHE_SCHEMA = 2  # of the file and of how rows are encoded
IGNORED_TOKENIZER_KEYS = (
    "is_local",
    "local_files_only",
    "name_or_path",
)  # of a tokenizer's configuration, not of its ids
CACHE_DTYPES = {
    "ids": torch.int32,
    "response": torch.bool,
    "rows": torch.int32,
    "text": torch.uint8,
}


@dataclass(frozen=True)
class TokenCache:
    """The stream's rows as ids; only what is asked for is held as examples.

    `place` is each example's row; `parts` are the file's tensors and `ends` (R + 1, 2) where each
    row's tokens and text begin and end in them.
    """

    encoder: Encoder
    stream: Stream
    include_dev: bool
    row_index: dict[Example, int]
    tensors: dict[str, Tensor]
    offsets: Tensor

    def encode_stage(self, stage: Task[Example]) -> Task[Encoded]:
        """The stage encoded; its shortened and skipped rows are counted by the encoder."""
        return self.encoder.encode_task(
            stage,
            index_tasks(self.stream),
            include_dev=self.include_dev,
            encode_rows=self._load_rows,
        )

    def sample_rows(self, n: int) -> list[Encoded]:
        """At most `n` rows from all over the stream, not counted."""
        fit = [e for e, row in self.row_index.items() if self.tensors["rows"][row, 0]]
        return [self._load_row(e, 0) for e in fit[:: max(1, len(fit) // n)][:n]]

    def count_tokens(self, examples: Sequence[Example]) -> list[tuple[int, bool]]:
        """The tokens that each takes (0: it does not fit), and whether its input was shortened; not
        counted.
        """
        rows = self.tensors["rows"][[self.row_index[e] for e in examples]].tolist()
        return [(tokens, bool(shortened)) for tokens, _, shortened in rows]

    def _load_rows(self, examples: Sequence[Example]) -> tuple[Encoded, ...]:
        index, found = index_tasks(self.stream), []
        for example in examples:
            tokens, _, shortened = self.tensors["rows"][self.row_index[example]].tolist()
            if not tokens:
                self.encoder.skipped.append(example.id)
                continue
            if shortened:
                self.encoder.shortened.append(example.id)
            found.append(self._load_row(example, index[example.task]))
        return tuple(found)

    def _load_row(self, example: Example, task_index: int) -> Encoded:
        row = self.row_index[example]
        (token, letter), (token_end, letter_end) = self.offsets[row : row + 2].tolist()
        ids, response = (
            tuple(self.tensors[part][token:token_end].tolist()) for part in ("ids", "response")
        )
        text = bytes(self.tensors["text"][letter:letter_end].tolist()).decode("utf-8", "replace")
        return Encoded(example.id, task_index, ids, response, text)


def load_or_tokenize(
    path: Path, encoder: Encoder, stream: Stream, *, include_dev: bool
) -> TokenCache:
    """The train rows of all stages, and their dev rows if asked: from `path`, or made and written
    there.

    A file that is damaged or was made of other rows, or by another tokenizer or template, is made
    anew. Raises DataError naming all rows that cannot be learned, or with data.on_unusable=skip all
    stages of which nothing is left.
    """
    place: dict[Example, int] = {}
    for stage in stream.stages:
        for example in (*stage.train, *(stage.dev if include_dev else ())):
            place.setdefault(example, len(place))
    key = _cache_key(encoder, place)
    with main_process_first():
        parts = _load_valid(path, key, encoder, len(place))
        if parts is None:
            _save_tensors(path, key, _tokenize_rows(encoder, stream, place))
            parts = _load_tensors(path)[1]
    return TokenCache(encoder, stream, include_dev, place, parts, _row_offsets(parts["rows"]))


def _tokenize_rows(
    encoder: Encoder, stream: Stream, row_index: dict[Example, int]
) -> dict[str, Tensor]:
    """All rows, tokenised; they are counted when their stage comes."""
    skipped, known = len(encoder.skipped), len(encoder.shortened)
    ids, response, text, rows = array("i"), bytearray(), bytearray(), array("i")
    for made in encoder.iter_encoded(list(row_index), lambda e: encoder.encode_example(e, 0)):
        written = made.text.encode("utf-8", "replace") if made else b""
        rows.extend((len(made.ids) if made else 0, len(written), len(encoder.shortened) > known))
        del encoder.shortened[known:]
        if made:
            ids.extend(made.ids)
            response += bytes(made.response_mask)
            text += written
    del encoder.skipped[skipped:]
    if empty := [s.name for s in stream.stages if not any(rows[3 * row_index[e]] for e in s.train)]:
        raise DataError(gathered([no_rows_message(name) for name in empty]))
    found: dict[str, Any] = {"ids": ids, "response": response, "rows": rows, "text": text}
    parts = {name: torch.frombuffer(part, dtype=CACHE_DTYPES[name]) for name, part in found.items()}
    return {**parts, "rows": parts["rows"].view(-1, 3)}


def _save_tensors(path: Path, key: str, parts: dict[str, Tensor]) -> None:
    from safetensors.torch import save

    write_atomically(path, save(parts, {"key": key, "digest": _hash_tensors(parts)}))


def _load_tensors(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """What `_save` wrote: the tensors are read from disk where they are used."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        names = list(file.keys())
        return file.metadata() or {}, {name: file.get_tensor(name) for name in names}


def _load_valid(path: Path, key: str, encoder: Encoder, n: int) -> dict[str, Tensor] | None:
    """The tensors at `path` where they are those of this key's `n` rows; says what is wrong with
    them if not.
    """
    from safetensors import SafetensorError

    if not path.exists():
        return None
    try:
        told, parts = _load_tensors(path)
        if (
            told.get("key") == key
            and _is_valid(parts, encoder, n)
            and told.get("digest") == _hash_tensors(parts)
        ):
            return parts
        other = "other rows, or of another tokenizer, template or length"
        fault = "is damaged" if told.get("key") == key else f"is of {other}"
    except (SafetensorError, OSError) as e:
        fault = f"is damaged ({e})"
    print(f"{path} {fault}; the rows are tokenised again", file=sys.stderr)
    return None


def _is_valid(parts: dict[str, Tensor], encoder: Encoder, n: int) -> bool:
    """Whether the numbers can be this encoder's rows: as many, of such lengths, of its words, with
    a response each.
    """
    if {name: part.dtype for name, part in parts.items()} != CACHE_DTYPES:
        return False
    ids, response, text, rows = (parts[name] for name in ("ids", "response", "text", "rows"))
    if (
        rows.shape != (n, 3)
        or not len(ids)
        or any(part.dim() != 1 for part in (ids, response, text))
    ):
        return False
    least, most = (
        (0 if encoder.on_unusable == "skip" else 1),
        max(encoder.tokenizer.get_vocab().values()),
    )
    if (
        rows.min() < 0
        or rows[:, 0].min() < least
        or rows[:, 0].max() > encoder.max_tokens
        or ids.min() < 0
        or (ids.max() > most)
    ):
        return False
    ends = _row_offsets(rows)
    if ends[-1].tolist() != [len(ids), len(text)] or len(response) != len(ids):
        return False
    learned = torch.cat([torch.zeros(1, dtype=torch.int32), response.cumsum(0, dtype=torch.int32)])[
        ends[:, 0]
    ].diff()
    return bool((learned > 0).eq(rows[:, 0] > 0).all())


def _row_offsets(rows: Tensor) -> Tensor:
    """(R + 1, 2) where each row's tokens and text begin; the last is where all end."""
    return torch.cat([torch.zeros(1, 2, dtype=torch.long), rows[:, :2].long().cumsum(0)])


def _hash_tensors(parts: dict[str, Tensor]) -> str:
    """A hash of the tensors' shapes and values."""
    made = hashlib.sha256()
    for name in sorted(parts):
        made.update(f"{name} {tuple(parts[name].shape)} ".encode())
        made.update(parts[name].contiguous().numpy().data)
    return made.hexdigest()


def _cache_key(encoder: Encoder, rows: dict[Example, int]) -> str:
    """A hash of everything that the ids depend on."""
    import transformers

    made = hashlib.sha256()
    template = repr(TEMPLATES.get(encoder.template, encoder.template))
    head = [
        CACHE_SCHEMA,
        transformers.__version__,
        template,
        encoder.max_tokens,
        encoder.seq2seq,
        encoder.on_unusable,
    ]
    made.update(json.dumps(head).encode())
    with tempfile.TemporaryDirectory() as folder:
        encoder.tokenizer.save_pretrained(folder)
        for path in sorted(p for p in Path(folder).rglob("*") if p.is_file()):
            told = path.read_bytes()
            if (
                path.name == "tokenizer_config.json"
            ):  # it also tells where this copy was loaded from
                told = json.dumps(
                    {k: v for k, v in json.loads(told).items() if k not in IGNORED_TOKENIZER_KEYS}
                ).encode()
            made.update(f"\n{path.name} {len(told)}\n".encode() + told)
    for e in rows:
        texts = [e.instruction, e.input, e.outputs[:1], [(m.role, m.content) for m in e.messages]]
        made.update(b"\n" + json.dumps(texts).encode())
    return made.hexdigest()
