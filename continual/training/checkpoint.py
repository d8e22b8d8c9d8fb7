"""Write and read checkpoints: trainable weights, strategy memory, the matrix and the stage state.

A checkpoint is a folder: `stage-NN` after a trained stage, or `stage-NN-step-NNNNNNNN` within one,
which also holds the stage state (progress.json, progress.safetensors). It is written completely or
not at all, and its manifest holds the size and SHA-256 of every file. Tensors are stored as
safetensors, everything else as readable JSON; loading a checkpoint never executes code.
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
from continual.io.atomic import write_folder_atomically
from continual.io.untrusted import load_json
from continual.models.model import Model
from continual.models.sharding import gather_on_cpu
from continual.models.weights import restore, snapshot, weights
from continual.results.matrix import Matrix
from continual.strategy.interface import Strategy
from continual.training.serialization import MALFORMED_ERRORS, deserialize_value, serialize_value

NAME_PATTERN = re.compile(r"stage-(\d+)(?:-step-(\d+))?")
FILES = ("weights.safetensors", "memory.safetensors", "memory.json", "matrix.json")
# Checkpoints kept within a stage: the newest, and an older one in case it is damaged.
MAX_STEP_CHECKPOINTS = 2


def save(
    folder: Path,
    model: Model,
    strategy: Strategy,
    matrix: Matrix,
    stage_state: Mapping[str, Any] | None = None,
) -> Path:
    """Write a checkpoint to `folder`, within a stage with its state; return `folder`.

    Only the main process writes; with a sharded model all processes must call. Raises
    ContinualError, with nothing written, if the disk has no room for it.
    """
    from safetensors import SafetensorError

    memory_tensors: dict[str, Tensor] = {}
    values = {"memory.json": serialize_value(strategy.state_dict(), "memory", memory_tensors)}
    tensors = {
        "weights": {name: gather_on_cpu(w) for name, w in snapshot(model).items()},
        "memory": memory_tensors,
    }
    if stage_state is not None:
        tensors["progress"] = {}
        values["progress.json"] = serialize_value(
            dict(stage_state), "progress", tensors["progress"]
        )
    if not is_main_process():
        return folder

    texts = {
        name: json.dumps(value, indent=1, ensure_ascii=False).encode()
        for name, value in values.items()
    }
    texts["matrix.json"] = json.dumps(matrix.to_dict(), indent=1).encode()
    text_bytes = sum(len(text) for text in texts.values())
    tensor_bytes = sum(t.nbytes for group in tensors.values() for t in group.values())
    try:
        with write_folder_atomically(folder, num_bytes=text_bytes + tensor_bytes) as temporary:
            _write_files(temporary, tensors, texts)
    except (OSError, SafetensorError) as e:
        raise ContinualError(
            f"{folder} cannot be written: {e}; see to the space there, and give the same command "
            "again: earlier checkpoints are kept"
        ) from e
    return folder


def _write_files(
    folder: Path, tensors: Mapping[str, dict[str, Tensor]], texts: Mapping[str, bytes]
) -> None:
    """Write all files of a checkpoint, the manifest last."""
    from safetensors.torch import save_file

    for name, group in tensors.items():
        save_file(group, folder / f"{name}.safetensors")
    for name, text in texts.items():
        (folder / name).write_bytes(text)
    manifest = json.dumps(_make_manifest(folder), indent=1)
    (folder / "manifest.json").write_text(manifest, encoding="utf-8")


def _make_manifest(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the size in bytes and the SHA-256 of each file."""
    return {
        p.name: {"bytes": p.stat().st_size, "sha256": _sha256(p)} for p in sorted(folder.iterdir())
    }


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def find_damage(folder: Path) -> str | None:
    """Compare a checkpoint's files with its manifest; return what is wrong, or None."""
    try:
        manifest = load_json(folder / "manifest.json")
        for name, entry in manifest.items():
            path = folder / name
            if Path(name).name != name or path.is_symlink():
                return f"{brief(name)} is not a file of this checkpoint"
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != entry["bytes"] or _sha256(path) != entry["sha256"]:
                return f"{name} is not as it was written"
        missing = sorted(set(FILES) - manifest.keys())
        return f"{', '.join(missing)} missing" if missing else None
    except (OSError, *MALFORMED_ERRORS):
        return "manifest.json is missing or damaged"


def load(
    folder: Path, model: Model, strategy: Strategy | None = None, *, is_verified: bool = False
) -> Matrix:
    """Load a checkpoint into the model, and into the strategy if given; return its matrix.

    With `is_verified` the files are not compared with the manifest again: `find_resume_point` did
    it. Raises MissingError for a folder that is no checkpoint, DataError for one that is damaged or
    does not fit this model or strategy.
    """
    if not folder.is_dir():
        raise MissingError(
            f"{folder}: there is no such checkpoint; name a folder such as RUN/checkpoints/stage-01"
        )
    problem = None if is_verified else find_damage(folder)
    if problem:
        raise DataError(
            f"{folder} is not a complete checkpoint: {problem}; name another, or remove it to "
            "resume from the one before it"
        )
    saved = _load_tensors(folder / "weights.safetensors", model)
    expected_shapes = {name: tuple(w.shape) for name, w in weights(model).items()}
    if expected_shapes != {name: tuple(w.shape) for name, w in saved.items()}:
        raise DataError(
            f"{folder}: its weights belong to another model or adapter than the one configured; "
            "give the same model.* keys as the run that wrote it"
        )
    restore(model, saved)
    if strategy is not None:
        try:
            state = _load_values(folder, "memory", model)
            strategy.load_state_dict({MEMORY_FIELDS.get(k, k): v for k, v in state.items()})
        except MALFORMED_ERRORS as e:
            raise DataError(
                f"{folder}/memory.json does not fit this strategy ({e!r}); resume with the "
                "strategy that wrote it"
            ) from e
    return Matrix.load(folder / "matrix.json")


def load_stage_state(folder: Path, model: Model) -> dict[str, Any]:
    """Return the stage state of a checkpoint within a stage.

    Raises DataError for content that `save` did not write.
    """
    try:
        return dict(_load_values(folder, "progress", model))
    except (OSError, *MALFORMED_ERRORS) as e:
        raise DataError(
            f"{folder}/progress.json cannot be read ({e!r}); remove {folder} to resume from the "
            "one before it"
        ) from e


def load_within_stage(folder: Path, model: Model, strategy: Strategy) -> dict[str, Any]:
    """Restore weights and memory from a verified checkpoint within a stage; return its state."""
    load(folder, model, strategy, is_verified=True)
    return load_stage_state(folder, model)


def _load_values(folder: Path, stem: str, model: Model) -> Any:
    """Read STEM.json with the tensors of STEM.safetensors."""
    vocab_size = model.net.get_input_embeddings().num_embeddings
    tensors = _load_tensors(folder / f"{stem}.safetensors", model)
    return deserialize_value(load_json(folder / f"{stem}.json"), tensors, vocab_size)


def _load_tensors(path: Path, model: Model) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    # A sharded model cuts its shards on the CPU, and then moves them to its device.
    device = "cpu" if model.sharded else str(model.layout.device)
    try:
        tensors = load_file(path, device=device)
    except SafetensorError as e:
        raise DataError(
            f"{path} is damaged ({e}); remove {path.parent} to resume from the one before it"
        ) from e
    # The last bit of a product may depend on the alignment of its operands in memory, and a file
    # may place them anywhere. Copies are aligned as torch aligns all tensors.
    return {name: t.clone() for name, t in tensors.items()}


class ResumePoint(NamedTuple):
    """Where a run can resume."""

    stage_folder: Path | None  # newest complete checkpoint after a trained stage
    step_folder: Path | None  # newest complete checkpoint within the stage that follows
    damage: list[str]  # "path: problem" of each damaged checkpoint that was newer


def find_resume_point(run: Path) -> ResumePoint:
    """Find the newest complete checkpoints of a run folder."""
    newest_first = sorted(_list_checkpoints(run), key=_sort_key, reverse=True)
    damage: list[str] = []

    stage_folder = _first_complete([p for p in newest_first if _is_whole_stage(p)], damage)
    next_stage = stage_number(stage_folder) + 1 if stage_folder else 1
    step_folders = [
        p for p in newest_first if not _is_whole_stage(p) and stage_number(p) == next_stage
    ]
    step_folder = _first_complete(step_folders, damage)
    return ResumePoint(stage_folder, step_folder, damage)


def _first_complete(folders: list[Path], damage: list[str]) -> Path | None:
    """Return the first checkpoint without damage; add the damage of those before it."""
    for folder in folders:
        problem = find_damage(folder)
        if problem is None:
            return folder
        damage.append(f"{folder}: {problem}")
    return None


def _list_checkpoints(run: Path) -> list[Path]:
    """Return all folders with the name of a checkpoint, damaged ones too."""
    return [p for p in (run / "checkpoints").glob("stage-*") if NAME_PATTERN.fullmatch(p.name)]


def _sort_key(folder: Path) -> tuple[int, float]:
    """Return (stage, step) for ordering; after the whole stage the step is infinite."""
    match = NAME_PATTERN.fullmatch(folder.name)
    return stage_number(folder), int(match[2]) if match and match[2] else math.inf


def _is_whole_stage(folder: Path) -> bool:
    return _sort_key(folder)[1] == math.inf


def stage_number(folder: Path) -> int:
    """Return the number of a checkpoint's stage."""
    match = NAME_PATTERN.fullmatch(folder.name)
    return int(match[1]) if match else 0


def prune(run: Path, keep_stages: int | None, newest: Path | None = None) -> None:
    """Remove old checkpoints, and folders that a killed process left half written.

    The newest `keep_stages` trained stages stay (None: all), and the newest two checkpoints within
    the stage that follows. Checkpoints after `newest`, the one just written, were damaged: the run
    resumed before them, so they are removed and not counted.
    """
    for half_written in (run / "checkpoints").glob("*.tmp"):
        shutil.rmtree(half_written)

    folders = _list_checkpoints(run)
    valid = sorted(
        (p for p in folders if newest is None or _sort_key(p) <= _sort_key(newest)), key=_sort_key
    )
    stages = [p for p in valid if _is_whole_stage(p)]
    next_stage = stage_number(stages[-1]) + 1 if stages else 1
    steps = [p for p in valid if not _is_whole_stage(p) and stage_number(p) == next_stage]
    kept = {*stages[-(keep_stages or len(stages) or 1) :], *steps[-MAX_STEP_CHECKPOINTS:]}
    for folder in folders:
        if folder not in kept:
            shutil.rmtree(folder)


def size_bytes(folder: Path, pattern: str = "*") -> int:
    """Return the size in bytes of a checkpoint's files that match the pattern.

    "memory.*" gives the size of the strategy's memory.
    """
    return sum(p.stat().st_size for p in folder.glob(pattern))
