"""Fuzz the readers of files that others may have written: `python -m benchmarks.fuzz [READER ...]
[--seconds N]`.

Whatever the bytes, a reader returns or raises a ContinualError, soon and in bounded memory. This
drives them by atheris (`pip install atheris`), which seeks bytes that reach new lines of theirs;
tests/test_fuzz.py drives the same ones by hypothesis. A finding is written to --out as one file,
named after the reader and what came out of it; it prints how many executions each reader had.
"""

from __future__ import annotations

import argparse
import collections
import json
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROW = {"instruction": "Say it.", "input": "red", "output": ["red"], "id": "a"}
MATRIX: dict[str, Any] = {
    "schema": 1,
    "stream": "s",
    "order": "o",
    "strategy": "naive",
    "seed": 0,
    "tasks": ["a", "b"],
    "metrics": {"a": "exact_match", "b": "exact_match"},
    "stages": ["base", "a", "b"],
    "scores": [[0.0, 0.0], [1.0, 0.5], [0.5, 1.0]],
    "counts": [1, 1],
    "cost": {"seconds": 1.0},
    "summary": {},
}
ANSWER = {"id": "a", "prompt": "Say it.", "answer": "red", "references": ["red"], "score": 1.0}
STEP = {
    "event": "step",
    "time": 1.0,
    "stage": 1,
    "task": "a",
    "step": 5,
    "steps": 9,
    "loss": 0.5,
    "lr": 0.1,
    "tokens": 9,
    "seconds": 1.0,
    "notes": {"weight/a": 0.5},
}
EXAMPLE = {"example": {"id": "e", "task": 0, "text": "x", "ids": "1 2", "response": "01"}}
BUFFER = {
    "capacity": 1,
    "kind": "balanced",
    "seed": 0,
    "tasks": {"dict": [["a", [EXAMPLE]]]},
    "seen": 1,
    "rng": {"random": [3, [1] * 625, None]},
}


def _put(folder: Path, name: str, raw: bytes) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(raw)
    return path


def _page(folder: Path) -> None:
    """All that a report reads and writes of a run, and its tables."""
    from continual.reports import write
    from continual.reports.pages import build_run_page
    from continual.results.run_folder import Run, group_runs
    from continual.results.tables import TABLES, build_table

    run = Run.load(folder)
    write.render_page(build_run_page(run))
    for what in TABLES:
        build_table(group_runs([run]), what)


def _in_run(name: str) -> Callable[[Path, bytes], None]:
    """A reader of one file of a run folder whose other files are sound."""

    def read(folder: Path, raw: bytes) -> None:
        _put(folder, "matrix.json", json.dumps(MATRIX).encode())
        path = _put(folder, name, raw)
        try:
            _page(folder)
        finally:
            path.unlink()

    return read


def rows(folder: Path, raw: bytes) -> None:
    """Rows of a stream folder."""
    from streams.rows import load_jsonl

    load_jsonl(_put(folder, "train.jsonl", raw), "t")


def stream(folder: Path, raw: bytes) -> None:
    """The index of a stream folder."""
    from streams.folder import load_folder as read

    _put(folder, "a/train.jsonl", json.dumps(ROW).encode())
    _put(folder, "stream.json", raw)
    read(path=str(folder), seed=0)


def config(folder: Path, raw: bytes) -> None:
    """The configuration of a run folder, as a report and as a resumed run read it."""
    from continual.config.run_config import read_config
    from continual.errors import ContinualError
    from continual.results.run_folder import Run

    path = _put(folder, "config.yaml", raw)
    try:
        told = Run(folder, None).settings  # type: ignore[arg-type]
        assert isinstance(told, dict)
    except ContinualError:
        pass
    read_config(path)


def curve(folder: Path, raw: bytes) -> None:
    """The curve of an adaptation."""
    from continual.reports import write
    from continual.reports.adaptations import build_adaptation_page
    from continual.results.curve import Curve

    _put(folder, "curve.json", raw)
    write.render_page(build_adaptation_page([Curve.load(folder)]))


def manifest(folder: Path, raw: bytes) -> None:
    """The manifest of a checkpoint."""
    from continual.training.checkpoint import find_damage

    _put(folder, "manifest.json", raw)
    assert find_damage(folder)


def _progress(folder: Path, told: bytes, tensors: bytes) -> None:
    from continual.training.checkpoint import load_stage_state

    _put(folder, "progress.json", told)
    _put(folder, "progress.safetensors", tensors)
    net = SimpleNamespace(get_input_embeddings=lambda: SimpleNamespace(num_embeddings=9))
    load_stage_state(
        folder, SimpleNamespace(layout=SimpleNamespace(device="cpu"), sharded=False, net=net)
    )  # type: ignore[arg-type]


def memory(folder: Path, raw: bytes) -> None:
    """The values of a checkpoint: memory.json and progress.json are of one form."""
    _progress(folder, raw, TENSORS)


def tensors(folder: Path, raw: bytes) -> None:
    """The tensors of a checkpoint."""
    _progress(folder, b'{"dict": [["x", {"tensor": "x"}]]}', raw)


HEAD = b'{"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
TENSORS = len(HEAD).to_bytes(8, "little") + HEAD + bytes(4)


def _json(value: Any) -> bytes:
    return json.dumps(value).encode()


# Each reader, with a file that it reads.
READERS: dict[str, tuple[Callable[[Path, bytes], None], bytes]] = {
    "rows": (
        rows,
        _json(ROW)
        + b"\n"
        + _json({"prompt": "x", "answer": "y"})
        + b"\n"
        + _json(
            {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}
        )
        + b"\n",
    ),
    "stream": (
        stream,
        _json(
            {
                "stream": "s",
                "orders": {"o": ["a"]},
                "tasks": [
                    {
                        "name": "a",
                        "dir": "a",
                        "category": "c",
                        "metric": "exact_match",
                        "labels": ["x"],
                    }
                ],
            }
        ),
    ),
    "matrix": (_in_run("matrix.json"), _json(MATRIX)),
    "events": (
        _in_run("events.jsonl"),
        b"\n".join(
            map(
                _json,
                (
                    STEP,
                    {"event": "data", "skipped": 2},
                    {"event": "stage", "stage": 1, "task": "a", "seconds": 1.0, "tokens": 3},
                    {"event": "checkpoint", "stage": 1, "bytes": 9, "memory_bytes": 9},
                ),
            )
        ),
    ),
    "predictions": (_in_run("predictions/stage-02/a.jsonl"), _json(ANSWER) + b"\n"),
    "config": (
        config,
        b"seed: 0\nout: runs/x\nmodel:\n  _target_: continual.models.loading.load_pretrained\n  lr: 1.0e-3\n  a: [1, 'b']\n",
    ),
    "curve": (
        curve,
        _json(
            {
                "schema": 1,
                "task": "a",
                "metric": "exact_match",
                "start": "base",
                "points": [{"shots": 1, "step": 0, "score": 0.5}],
            }
        ),
    ),
    "manifest": (manifest, _json({"memory.json": {"bytes": 2, "sha256": "0"}})),
    "memory": (
        memory,
        _json(
            {
                "dict": [
                    ["n", [1, 2.5, None, True, "x", {"tensor": "x"}]],
                    ["b", {"value": "ReplayBuffer", "fields": BUFFER}],
                ]
            }
        ),
    ),
    "tensors": (tensors, TENSORS),
}
WORDS = (
    "1e999999",
    "NaN",
    "-Infinity",
    "9" * 20,
    "\\u0000",
    "\\ud800",
    "null",
    "true",
    "{}",
    "[]",
    '""',
    "${oc.env:HOME}",
    "!!python/object/apply:os.system",
    "&a [",
    "*a",
    "_target_",
    "../..",
    "/etc/passwd",
    *ROW,
    *MATRIX,
    *STEP,
    *ANSWER,
    "tensor",
    "random",
    "example",
    "value",
    "fields",
    "dict",
    "dtype",
    "data_offsets",
)


def attempt(name: str, folder: Path, raw: bytes) -> Exception | None:
    """What came out of the reader that should not: any exception but ours."""
    from continual.errors import ContinualError

    try:
        READERS[name][0](folder, raw)
    except ContinualError:
        pass
    except Exception as e:
        return e
    return None


def main() -> None:
    """Fuzz the readers that the command line names, all at once: the first byte picks one."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.fuzz",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "names", nargs="*", metavar="READER", help=f"of {', '.join(READERS)}; all if none is given"
    )
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--out", type=Path, default=Path("findings"), metavar="DIR")
    asked = parser.parse_args()
    if strange := [n for n in asked.names if n not in READERS]:
        parser.error(f"no reader {', '.join(strange)}; there are {', '.join(READERS)}")
    import atheris

    names, counts, seen = asked.names or list(READERS), collections.Counter[str](), set[str]()
    with atheris.instrument_imports(include=["continual", "streams", "yaml"]):
        from continual.reports import pages, write  # noqa: F401
        from continual.runs import run  # noqa: F401
        from continual.training import checkpoint  # noqa: F401
        from streams import folder  # noqa: F401

    scratch = tempfile.mkdtemp()

    def one(data: bytes) -> None:
        name = names[data[0] % len(names)] if data else names[0]
        counts[name] += 1
        if e := attempt(name, Path(scratch) / name, data[1:]):
            at = traceback.extract_tb(e.__traceback__)[-1]
            told = f"{name}-{type(e).__name__}-{Path(at.filename).name}-{at.lineno}"
            if told not in seen:
                seen.add(told)
                _put(asked.out, told, data[1:])
                print(f"found {told}: {e}", flush=True)
        if counts.total() % 500 == 0:
            print(f"executions {dict(counts)}; findings {len(seen)}", flush=True)

    for i, name in enumerate(names):
        _put(Path(scratch), f"corpus/{name}", bytes([i]) + READERS[name][1])
    (Path(scratch) / "words").write_text(
        "".join(f"{json.dumps(w)}\n" for w in WORDS if w.isascii() and "\\" not in w)
    )
    atheris.Setup(
        [
            sys.argv[0],
            f"{scratch}/corpus",
            f"-dict={scratch}/words",
            f"-max_total_time={asked.seconds}",
            "-max_len=2000",
            "-timeout=60",
            "-rss_limit_mb=4096",
            f"-artifact_prefix={scratch}/",
            "-verbosity=0",
        ],
        one,
    )
    atheris.Fuzz()


if __name__ == "__main__":
    main()
