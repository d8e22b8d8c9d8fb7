"""Runs of four stages, killed (SIGKILL) at random instants and given again until they end: the same
end, bit for bit.

`python -m benchmarks.crash [--kills 50] [--strategies NAME ...] [--seed 0] [--out PATH]`. So many
kills for each strategy of conf/strategy and one composition: half at an instant drawn uniformly
over the time that the whole run takes, the others aimed at a checkpoint, a scoring or the report
being written. One run is killed again and again until it ends; then its matrix, steps and tokens,
its predictions, and the adapter weights and strategy memory of each stage must equal those of the
run that was left alone, and another run begins. The table says where the kills hit, by what they
left on disk.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = (
    "1"  # the order of a sum, and so its last bit, depends on the number of threads
)
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import argparse
import json
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

RESULT = Path(__file__).parent / "results" / "crash-cpu.md"
STRATEGIES = Path(__file__).parents[1] / "conf" / "strategy"
COMPOSED = "[replay,ewc]"
TASKS = ("first", "last", "loud", "both")
WORDS = ("red", "blue", "green", "gold", "grey", "pink", "teal", "plum")
AIMS = ("any", "checkpoint", "any", "scoring", "any", "report")
PLACES = ("setting up", "training", "checkpoint", "scoring", "report")


@dataclass(frozen=True)
class Kill:
    """When a run is to be killed: so many seconds after the first moment that `there` holds."""

    there: Callable[[], bool]
    seconds: float


def write_work(root: Path) -> list[str]:
    """A stream of four tasks and a small random Llama, written into `root`; returns the keys of a
    run on them.
    """
    from benchmarks.works import write_small

    parts = (("train", range(24)), ("dev", range(24, 26)), ("test", range(26, 32)))
    rows = {task: {split: [_row(task, i) for i in part] for split, part in parts} for task in TASKS}
    return [
        *write_small(root, rows),
        "model.adapter=lora",
        "train.epochs=3",
        "train.batch_size=6",
        "train.log_every_steps=1",
        "train.lr=0.003",
        "checkpoint.every_steps=2",
    ]


def _row(task: str, i: int) -> dict[str, str]:
    words = [WORDS[i % 8], WORDS[(i * 3 + i // 8 + 1) % 8]]
    answers = {
        "first": words[0],
        "last": words[-1],
        "loud": words[0].upper(),
        "both": " ".join(words[::-1]),
    }
    return {
        "instruction": f"Give the {task} word.",
        "input": " ".join(words),
        "output": answers[task],
    }


def child(work: Callable[[], None], log: Path) -> int:
    """Fork a process that does this and ends, what it says in `log`; returns its number.

    It has all that this process imported: to import it anew would take longer than a run.
    """
    if number := os.fork():
        return number
    code = 1
    try:
        with log.open("a") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        work()
        code = 0
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(code)


def start(out: Path, keys: Sequence[str]) -> int:
    """A run in a process of its own; returns its number."""

    def work() -> None:
        from rich.console import Console

        from continual.cli.main import compose_config
        from continual.runs.run import run

        run(compose_config("run", [*keys, f"out={out}"]), Console(stderr=True))

    return child(work, out.with_suffix(".log"))


def finish(number: int, out: Path) -> None:
    """Wait for a process; raises RuntimeError with what it said where it failed."""
    if code := os.waitpid(number, 0)[1]:
        raise RuntimeError(
            f"a run in {out} ended with {code}:\n{out.with_suffix('.log').read_text()[-4000:]}"
        )


def killed(number: int, kill: Kill) -> bool:
    """Kill the process when it is time; False where it ended before that."""
    due = None
    while True:
        if os.waitpid(number, os.WNOHANG)[0]:
            return False
        if due is None and kill.there():
            due = time.monotonic() + kill.seconds
        if due is not None and time.monotonic() >= due:
            os.kill(number, signal.SIGKILL)
            return os.WIFSIGNALED(os.waitpid(number, 0)[1])
        time.sleep(0.0002)


def aimed(out: Path, aim: str, whole: float, rng: random.Random) -> Kill:
    """An instant of that kind."""
    if aim == "checkpoint":
        skip, names = (
            rng.randrange(6),
            set[str](),
        )  # of those that this process writes, the one after so many
        since = time.time()

        def writing() -> bool:
            names.update(half_written(out, since))
            return len(names) > skip

        return Kill(writing, rng.uniform(0, 0.004))
    if aim == "scoring":
        stage = max(0, rows(out)) + rng.randrange(2)
        return Kill(
            lambda: any((out / f"predictions/stage-{stage:02d}").glob("*")), rng.uniform(0, 0.1)
        )
    if aim == "report":
        return Kill(lambda: rows(out) > stages(out), rng.uniform(0, 0.5))
    return Kill(lambda: True, rng.uniform(0, whole))


def rows(out: Path) -> int:
    """The rows of the matrix so far."""
    try:
        return len(json.loads((out / "matrix.json").read_text())["stages"])
    except FileNotFoundError:
        return 0


def stages(out: Path) -> int:
    """How many stages the run has: one where its tasks are joint."""
    path = out / "config.yaml"
    return 1 if path.exists() and "arrangement: joint" in path.read_text() else len(TASKS)


def begun(out: Path) -> int:
    """How often the run went so far as to train or score."""
    path = out / "events.jsonl"
    return path.read_text().count('"event": "start"') if path.exists() else 0


def half_written(out: Path, since: float) -> list[str]:
    """The checkpoints that are being written, or were when the process ended that began then."""
    found = []
    for path in (out / "checkpoints").glob("*.tmp"):
        with suppress(FileNotFoundError):
            found += [path.name] if path.stat().st_mtime > since else []
    return found


def place(out: Path, starts: int, since: float) -> str:
    """What the kill interrupted, by what it left; `starts` is `begun` before that process, `since`
    its start.
    """
    if begun(out) == starts:
        return "setting up"
    if half_written(out, since):
        return "checkpoint"
    if rows(out) > stages(out):
        return "report"
    trained = len([p for p in (out / "checkpoints").glob("stage-*") if "step" not in p.name])
    return "scoring" if rows(out) <= trained else "training"


def differences(whole: Path, other: Path) -> Iterator[str]:
    """What is not the same, to the bit, at the ends of two runs."""
    one, two = (json.loads((out / "matrix.json").read_text()) for out in (whole, other))
    for key in one.keys() - {"cost"}:
        if one[key] != two[key]:
            yield f"{key} of the matrix"
    for key in ("steps", "tokens", "skipped_steps"):
        if one["cost"][key] != two["cost"][key]:
            yield f"cost.{key}: {one['cost'][key]} and {two['cost'][key]}"
    kept = ("predictions/*/[!.]*", "checkpoints/*/weights.safetensors", "checkpoints/*/memory.*")
    files = [
        sorted(p.relative_to(out) for pattern in kept for p in out.glob(pattern))
        for out in (whole, other)
    ]
    if files[0] != files[1] or not files[0]:
        yield f"files: {sorted(map(str, set(files[0]) ^ set(files[1])))}"
    for path in set(files[0]) & set(files[1]):
        if (whole / path).read_bytes() != (other / path).read_bytes():
            yield str(path)
    if not (other / "report.html").is_file():
        yield "report.html is missing"


@dataclass
class Told:
    """What happened to one strategy's runs."""

    strategy: str
    places: Counter[str]
    runs: int = 0
    equal: int = 0

    @property
    def kills(self) -> int:
        """In all its runs."""
        return self.places.total()


def survive(root: Path, strategy: str, keys: Sequence[str], kills: int, rng: random.Random) -> Told:
    """Kill runs so many times, and let the last one end; raises RuntimeError where a run cannot go
    on.
    """
    from benchmarks.works import NEEDED

    keys, whole = [*keys, f"strategy={strategy}", *NEEDED.get(strategy, [])], root / "whole"
    began = time.monotonic()
    finish(start(whole, keys), whole)
    took = time.monotonic() - began
    told = Told(strategy, Counter())
    while told.kills < kills:
        out = root / f"run-{told.runs}"
        while told.kills < kills and not (out / "finished").exists():
            starts, since = begun(out), time.time()
            kill = aimed(out, AIMS[told.kills % len(AIMS)], took, rng)
            if killed(start(out, keys), kill):
                told.places[place(out, starts, since)] += 1
        finish(start(out, keys), out)
        found = list(differences(whole, out))
        for line in found:
            print(f"{strategy}, {out}: {line}", flush=True)
        told.runs, told.equal = told.runs + 1, told.equal + (not found)
        if not found:
            shutil.rmtree(out)
    return told


def table(told: Sequence[Told]) -> str:
    """One row a strategy, and all of them."""
    heads = ["strategy", "kills", *PLACES, "runs ended", "equal"]
    total = Told(
        "all",
        sum((t.places for t in told), Counter()),
        sum(t.runs for t in told),
        sum(t.equal for t in told),
    )
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    lines += [
        "| "
        + " | ".join(
            map(
                str,
                [
                    t.strategy,
                    t.kills,
                    *(t.places[p] for p in PLACES),
                    t.runs,
                    f"{t.equal} of {t.runs}",
                ],
            )
        )
        + " |"
        for t in (*told, total)
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Kill as the command line asks; exits with 1 where a run ended in anything else."""
    names = [*sorted(p.stem for p in STRATEGIES.glob("*.yaml")), COMPOSED]
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.crash",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--kills", type=int, default=50, metavar="N", help="for each strategy")
    parser.add_argument(
        "--strategies", nargs="+", default=names, metavar="NAME", help="all there are, if not given"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--out", type=Path, default=RESULT, metavar="PATH", help="where the table goes"
    )
    asked = parser.parse_args()
    import torch

    from benchmarks.common import machine
    from continual.tracking import events

    for name in (
        "continual.runs.run",
        "continual.reports.plots",
        "continual.reports.pages",
        "streams.folder",
        "peft",
        *(f"strategies.{p.stem}" for p in (STRATEGIES.parents[1] / "strategies").glob("[!_]*.py")),
    ):
        import_module(name)  # for the children
    torch.set_num_threads(1)
    events.silence_libraries()
    began, told = time.monotonic(), []
    with tempfile.TemporaryDirectory() as folder_name:
        keys = write_work(Path(folder_name))
        for name in asked.strategies:
            root = Path(folder_name) / name.strip("[]").replace(",", "-")
            root.mkdir()
            told.append(
                survive(root, name, keys, asked.kills, random.Random(f"{asked.seed}/{name}"))
            )
            print(
                f"{name}: {told[-1].kills} kills, {told[-1].equal} of {told[-1].runs} runs equal",
                flush=True,
            )
            asked.out.write_text(
                f"# crash\n\n{__doc__.strip()}\n\nIn {time.monotonic() - began:.0f} s, seed "
                f"{asked.seed}, on {machine()}.\n\n{table(told)}"
            )
    print(asked.out.read_text())
    sys.exit(any(t.equal < t.runs for t in told))


if __name__ == "__main__":
    main()
