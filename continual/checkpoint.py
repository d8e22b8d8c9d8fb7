"""All or nothing on disk: trainable weights, strategy memory and the matrix so far, at the end of a stage.

Tensors go to safetensors, everything else to JSON that people can read; nothing that is read back can run code.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from torch import Tensor

from continual.data import Encoded
from continual.errors import ContinualError, DataError, MissingError
from continual.files import flush
from continual.matrix import Matrix
from continual.memory import ReplayBuffer
from continual.model import Model
from continual.strategy import Strategy
from continual.weights import restore, snapshot, weights

VALUES: Mapping[str, type[Any]] = {"ReplayBuffer": ReplayBuffer}  # what memory may hold


def save(folder: Path, model: Model, strategy: Strategy, matrix: Matrix) -> Path:
    """Write `folder` whole: into a temporary sibling, flushed to disk, then renamed; returns it."""
    from safetensors.torch import save_file

    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    tensors: dict[str, Tensor] = {}
    memory = _to_json(strategy.state_dict(), "memory", tensors)
    save_file({n: w.contiguous().cpu() for n, w in snapshot(model).items()}, temporary / "weights.safetensors")
    save_file(tensors, temporary / "memory.safetensors")
    (temporary / "memory.json").write_text(json.dumps(memory, indent=1, ensure_ascii=False), encoding="utf-8")
    (temporary / "matrix.json").write_text(json.dumps(matrix.to_json(), indent=1), encoding="utf-8")
    for path in temporary.iterdir():
        flush(path)
    flush(temporary)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)
    flush(folder.parent)
    return folder


def load(folder: Path, model: Model, strategy: Strategy | None = None) -> Matrix:
    """Give the model, and the strategy if there is one, what `save` wrote; returns the matrix of that time.

    Raises MissingError where a file is missing, DataError where one does not fit this model or strategy.
    """
    missing = [n for n in ("weights.safetensors", "memory.safetensors", "memory.json", "matrix.json")
               if not (folder / n).is_file()]
    if missing:
        raise MissingError(f"{folder} is no whole checkpoint: {', '.join(missing)} missing; name a folder such as "
                           "RUN/checkpoints/stage-01")
    saved = _tensors(folder / "weights.safetensors", model)
    wanted = {n: tuple(w.shape) for n, w in weights(model).items()}
    if wanted != {n: tuple(w.shape) for n, w in saved.items()}:
        raise DataError(f"{folder}: its weights are of another model or adapter than the one configured; give the same "
                        "model.* keys as the run that wrote it")
    restore(model, saved)
    if strategy is not None:
        tensors = _tensors(folder / "memory.safetensors", model)
        try:
            strategy.load_state_dict(_from_json(json.loads((folder / "memory.json").read_text("utf-8")), tensors))
        except (json.JSONDecodeError, UnicodeDecodeError) as e:
            raise DataError(f"{folder}/memory.json is damaged ({e}); remove {folder} to go on from the stage before "
                            "it") from e
        except (KeyError, ValueError, TypeError) as e:
            raise DataError(f"{folder}/memory.json does not fit this strategy ({e!r}); resume with the strategy that "
                            "wrote it") from e
    return Matrix.load(folder / "matrix.json")


def _tensors(path: Path, model: Model) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path, device=str(model.layout.device))
    except SafetensorError as e:
        raise DataError(f"{path} is damaged ({e}); remove {path.parent} to go on from the stage before it") from e


def latest(run: Path) -> Path | None:
    """The newest checkpoint of a run folder; a half-written one has no such name."""
    found = [p for p in (run / "checkpoints").glob("stage-*") if p.name[6:].isdigit()]
    return max(found, key=lambda p: int(p.name[6:]), default=None)


def size(folder: Path, pattern: str = "*") -> int:
    """The bytes of a checkpoint's files, or of those that match: "memory.*" is what the strategy keeps."""
    return sum(p.stat().st_size for p in folder.glob(pattern))


def _to_json(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """JSON for a memory value; tensors are put aside under their path, shown in their place."""
    if isinstance(value, Tensor):
        tensors[name] = value.detach().contiguous().clone().cpu()
        return {"tensor": name}
    if isinstance(value, random.Random):
        return {"random": value.getstate()}
    if isinstance(value, Encoded):
        ids, response = " ".join(map(str, value.ids)), "".join("01"[r] for r in value.response)
        return {"example": {"id": value.id, "task": value.task, "text": value.text, "ids": ids, "response": response}}
    if type(value).__name__ in VALUES:
        return {"value": type(value).__name__,
                "fields": {f.name: _to_json(getattr(value, f.name), f"{name}/{f.name}", tensors)
                           for f in fields(value)}}
    if isinstance(value, dict):
        return {"dict": [[k, _to_json(v, f"{name}/{k}", tensors)] for k, v in value.items()]}
    if isinstance(value, list | tuple):
        return [_to_json(v, f"{name}/{i}", tensors) for i, v in enumerate(value)]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ContinualError(f"strategy memory {name} is a {type(value).__name__}, which no checkpoint can hold; keep "
                         f"tensors, numbers, texts, lists, dicts, generators, encoded examples or {', '.join(VALUES)}")


def _from_json(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_from_json(v, tensors) for v in value]
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
        e = value["example"]
        response = tuple(r == "1" for r in e["response"])
        return Encoded(e["id"], e["task"], tuple(map(int, e["ids"].split())), response, e["text"])
    if "value" in value:
        return VALUES[value["value"]](**{k: _from_json(v, tensors) for k, v in value["fields"].items()})
    return {k: _from_json(v, tensors) for k, v in value["dict"]}
