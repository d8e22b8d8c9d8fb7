"""All or nothing on disk: trainable weights, strategy memory, the matrix so far and, within a
stage, its progress.

A checkpoint is a folder, `stage-NN` of a trained stage or `stage-NN-step-NNNNNNNN` of one under
way. It is written beside, flushed to disk and renamed; its manifest has the size and SHA-256 of
every file. Tensors go to safetensors, everything else to JSON that people can read; nothing that is
read back can run code.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from continual.config.renamed import MEMORY_FIELDS
from continual.distributed.processes import is_main_process
from continual.errors import ContinualError, DataError, MissingError, brief
from continual.io.atomic import flush_to_disk
from continual.io.untrusted import load_json
from continual.models.model import Model
from continual.models.sharding import gather_on_cpu
from continual.models.weights import restore, snapshot, weights
from continual.results.matrix import Matrix
from continual.strategy.interface import Strategy
from continual.training.serialization import MALFORMED_ERRORS, deserialize_value, serialize_value

NAME_PATTERN = re.compile(r"stage-(\d+)(?:-step-(\d+))?")
MAX_STEP_CHECKPOINTS = (
    2  # of the stage under way this many are kept: an older one for when the newest is damaged
)


def save(
    folder: Path,
    model: Model,
    strategy: Strategy,
    matrix: Matrix,
    stage_state: Mapping[str, Any] | None = None,
) -> Path:
    """Write `folder` whole, with the stage's `progress` if it is under way; returns it.

    Of several processes the first writes, and where the model is in shards all must call. Raises
    ContinualError, with nothing written, where the disk has not the space.
    """
    from safetensors import SafetensorError

    kept: dict[str, Tensor] = {}
    memory = {"memory.json": serialize_value(strategy.state_dict(), "memory", kept)}
    tensors = {"weights": {n: gather_on_cpu(w) for n, w in snapshot(model).items()}, "memory": kept}
    if stage_state is not None:
        tensors["progress"] = {}
        memory["progress.json"] = serialize_value(
            dict(stage_state), "progress", tensors["progress"]
        )
    if not is_main_process():
        return folder
    texts = {
        name: json.dumps(value, indent=1, ensure_ascii=False).encode()
        for name, value in memory.items()
    }
    texts["matrix.json"] = json.dumps(matrix.to_json(), indent=1).encode()
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        _check_disk_space(
            folder.parent,
            sum(map(len, texts.values()))
            + sum(t.nbytes for part in tensors.values() for t in part.values()),
        )
        _write_files(temporary, tensors, texts)
    except (OSError, SafetensorError) as e:
        shutil.rmtree(temporary, ignore_errors=True)
        raise ContinualError(
            f"{folder} cannot be written: {e}; see to the space there, and give the same command "
            "again: earlier checkpoints are kept"
        ) from e
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)
    flush_to_disk(folder.parent)
    return folder


def _write_files(
    folder: Path, tensors: Mapping[str, dict[str, Tensor]], texts: Mapping[str, bytes]
) -> None:
    """All files and their manifest, flushed to disk."""
    from safetensors.torch import save_file

    for name, part in tensors.items():
        save_file(part, folder / f"{name}.safetensors")
    for name, text in texts.items():
        (folder / name).write_bytes(text)
    (folder / "manifest.json").write_text(
        json.dumps(_make_manifest(folder), indent=1), encoding="utf-8"
    )
    for path in folder.iterdir():
        flush_to_disk(path)
    flush_to_disk(folder)


def _check_disk_space(folder: Path, size: int) -> None:
    if (free := shutil.disk_usage(folder).free) < size + 2**20:
        raise OSError(f"it takes {size / 1e6:,.1f} MB, and the disk has {free / 1e6:,.1f} MB left")


def _make_manifest(folder: Path) -> dict[str, dict[str, Any]]:
    """Each file's size in bytes and SHA-256."""
    return {
        p.name: {"bytes": p.stat().st_size, "sha256": _sha256(p)} for p in sorted(folder.iterdir())
    }


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def find_damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint's files, by its manifest; None where it is whole."""
    try:
        manifest = load_json(folder / "manifest.json")
        for name, told in manifest.items():
            path = folder / name
            if Path(name).name != name or path.is_symlink():
                return f"{brief(name)} is no file of the checkpoint's own"
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != told["bytes"] or _sha256(path) != told["sha256"]:
                return f"{name} is not as it was written"
        missing = {
            "weights.safetensors",
            "memory.safetensors",
            "memory.json",
            "matrix.json",
        } - manifest.keys()
        return f"{', '.join(sorted(missing))} missing" if missing else None
    except (OSError, *MALFORMED_ERRORS):
        return "manifest.json is missing or damaged"


def load(
    folder: Path, model: Model, strategy: Strategy | None = None, *, is_verified: bool = False
) -> Matrix:
    """Give the model, and the strategy if there is one, what `save` wrote; returns the matrix of
    that time.

    A folder that `find` has `found` was read and found whole, and is not looked through again.
    Raises MissingError for a folder that is no checkpoint, DataError for one that is damaged or
    does not fit this model or strategy.
    """
    if not folder.is_dir():
        raise MissingError(
            f"{folder}: there is no such checkpoint; name a folder such as RUN/checkpoints/stage-01"
        )
    if not is_verified and (problem := find_damage(folder)):
        raise DataError(
            f"{folder} is no whole checkpoint: {problem}; name another, or remove it to go on "
            "from the one before it"
        )
    saved = _load_tensors(folder / "weights.safetensors", model)
    wanted = {n: tuple(w.shape) for n, w in weights(model).items()}
    if wanted != {n: tuple(w.shape) for n, w in saved.items()}:
        raise DataError(
            f"{folder}: its weights are of another model or adapter than the one configured; "
            "give the same model.* keys as the run that wrote it"
        )
    restore(model, saved)
    if strategy is not None:
        try:
            state = _load_values(folder, "memory", model)
            strategy.load_state_dict({MEMORY_FIELDS.get(n, n): v for n, v in state.items()})
        except MALFORMED_ERRORS as e:
            raise DataError(
                f"{folder}/memory.json does not fit this strategy ({e!r}); resume with the "
                "strategy that wrote it"
            ) from e
    return Matrix.load(folder / "matrix.json")


def load_stage_state(folder: Path, model: Model) -> dict[str, Any]:
    """How far the stage under way was; raises DataError for what `save` did not write."""
    try:
        return dict(_load_values(folder, "progress", model))
    except (OSError, *MALFORMED_ERRORS) as e:
        raise DataError(
            f"{folder}/progress.json cannot be read ({e!r}); remove {folder} to go on from the "
            "one before it"
        ) from e


def _load_values(folder: Path, stem: str, model: Model) -> Any:
    words = model.net.get_input_embeddings().num_embeddings
    return deserialize_value(
        load_json(folder / f"{stem}.json"),
        _load_tensors(folder / f"{stem}.safetensors", model),
        words,
    )


def _load_tensors(path: Path, model: Model) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        found = load_file(
            path, device="cpu" if model.sharded else str(model.layout.device)
        )  # cut before it moves
        # A file's bytes stand anywhere, and the last bit of a product may depend on where: copies
        # stand as torch's do.
        return {n: t.clone() for n, t in found.items()}
    except SafetensorError as e:
        raise DataError(
            f"{path} is damaged ({e}); remove {path.parent} to go on from the one before it"
        ) from e


class ResumePoint(NamedTuple):
    """Where a run can go on: its newest whole trained stage, the stage after it under way, and what
    was passed over.
    """

    stage_folder: Path | None
    step_folder: Path | None
    damage: list[str]


def find_resume_point(run: Path) -> ResumePoint:
    """The newest whole checkpoints of a run folder; a half-written one has no such name."""
    order = sorted(_list_checkpoints(run), key=_sort_key, reverse=True)
    damaged: list[str] = []

    def first(candidates: list[Path]) -> Path | None:
        for path in candidates:
            if (problem := find_damage(path)) is None:
                return path
            damaged.append(f"{path}: {problem}")
        return None

    trained = first([p for p in order if _sort_key(p)[1] == math.inf])
    after = stage_number(trained) + 1 if trained else 1
    return ResumePoint(
        trained,
        first([p for p in order if _sort_key(p)[1] < math.inf and stage_number(p) == after]),
        damaged,
    )


def _list_checkpoints(run: Path) -> list[Path]:
    """All that is named as a checkpoint, whole or not."""
    return [p for p in (run / "checkpoints").glob("stage-*") if NAME_PATTERN.fullmatch(p.name)]


def _sort_key(folder: Path) -> tuple[int, float]:
    """How far a run had come: its stage, and the step in it; a trained stage is behind all its
    steps.
    """
    match = NAME_PATTERN.fullmatch(folder.name)
    return stage_number(folder), int(match[2]) if match and match[2] else math.inf


def stage_number(folder: Path) -> int:
    """The number of a checkpoint's stage."""
    match = NAME_PATTERN.fullmatch(folder.name)
    return int(match[1]) if match else 0


def prune(run: Path, keep_stages: int | None, newest: Path | None = None) -> None:
    """Leave the newest `keep` trained stages (None: all), and of the stage under way the newest
    two; nothing half.

    What is further than `newest`, the one just written, was damaged and passed over: it goes, and
    counts for nothing.
    """
    for half in (run / "checkpoints").glob("*.tmp"):  # of a process that was killed
        shutil.rmtree(half)
    found = _list_checkpoints(run)
    sound = sorted(
        (p for p in found if newest is None or _sort_key(p) <= _sort_key(newest)), key=_sort_key
    )
    trained = [p for p in sound if _sort_key(p)[1] == math.inf]
    after = stage_number(trained[-1]) + 1 if trained else 1
    within = [p for p in sound if _sort_key(p)[1] < math.inf and stage_number(p) == after]
    kept = {*trained[-(keep_stages or len(trained) or 1) :], *within[-MAX_STEP_CHECKPOINTS:]}
    for path in found:
        if path not in kept:
            shutil.rmtree(path)


def size_bytes(folder: Path, pattern: str = "*") -> int:
    """The bytes of a checkpoint's files, or of those that match: "memory.*" is what the strategy
    keeps.
    """
    return sum(p.stat().st_size for p in folder.glob(pattern))
