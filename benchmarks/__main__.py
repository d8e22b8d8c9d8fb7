"""Run the benchmarks: `python -m benchmarks [NAME ...] [--json PATH] [--data DIR] [--gpu]`.

Each writes its table to benchmarks/results/NAME-cpu.md or NAME-gpu.md and prints it. Without --data
(a stream folder with the tasks agnews, MNLI, dbpedia, amazon and yelp) rows of random tokens stand
in, of the same lengths.

`plan`, which holds the plans of whole runs to the runs, is run where it is named. More are run by
themselves: `python -m benchmarks.crash` kills runs at random instants, `python -m benchmarks.soak`
learns 200 tasks in one stream, `python -m benchmarks.strategies` measures the table of
strategies, and `python -m benchmarks.leaderboard DIR` writes docs/leaderboard.md from a comparison.
"""

from __future__ import annotations

import argparse
import importlib
import json
import time
from pathlib import Path

from benchmarks import common

SPEED = ("sft", "fisher", "maml", "answer", "overhead")
NAMES = (*SPEED, "plan")
RESULTS = Path(__file__).parent / "results"


def main() -> None:
    """Run what the command line names."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "names",
        nargs="*",
        metavar="NAME",
        help=f"of {', '.join(NAMES)}; all but plan if none is given",
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="write all rows here too")
    parser.add_argument(
        "--data", type=Path, metavar="DIR", help="a stream folder; without it rows are synthetic"
    )
    parser.add_argument(
        "--gpu", action="store_true", help="the set of larger models in bf16, on a GPU"
    )
    asked = parser.parse_args()
    if strange := [n for n in asked.names if n not in NAMES]:
        parser.error(f"no benchmark {', '.join(strange)}; there are {', '.join(NAMES)}")
    common.ASKED.data, common.ASKED.gpu = asked.data, asked.gpu
    rows: list[common.Row] = []
    for name in asked.names or SPEED:
        try:
            rows += one(name)
        except ModuleNotFoundError as missing:
            parser.exit(
                2,
                f"{name} needs {missing.name}, which is not installed; the peers are extras of "
                "pyproject.toml: bench, avalanche-lib, learn2learn\n",
            )
        if asked.json:  # after each, so that a benchmark that fails takes no other's rows with it
            asked.json.write_text(json.dumps(rows, indent=1) + "\n")


def one(name: str) -> list[common.Row]:
    """Run one benchmark, write and print its table."""
    module = importlib.import_module(f"benchmarks.{name}")
    began = time.perf_counter()
    rows: list[common.Row] = module.run()
    seconds = time.perf_counter() - began
    text = (
        f"# {name}\n\n{module.__doc__.strip()}\n\nMeasured in {seconds:.0f} s on "
        f"{common.machine()}.\n\n{common.table(rows)}"
    )
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}-{common.ASKED.device.type}.md").write_text(text)
    print(text, flush=True)
    return rows


if __name__ == "__main__":
    main()
