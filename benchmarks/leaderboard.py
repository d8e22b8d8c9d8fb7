"""The leaderboard: what comparisons came to, with 95% intervals, as docs/leaderboard.md.

`python -m benchmarks.leaderboard DIR ...` writes it from comparison folders, which `continual
compare` made, a table for each stream; what people have written under its last heading stays.
`python -m benchmarks.leaderboard --tuned DIR ...` prints what searches (`continual compare
experiment=tune`) found, as the key `strategy_defaults` of conf/experiment/leaderboard.yaml.

Intervals are Student's, over the runs of a strategy (continual/results/uncertainty.py).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from benchmarks.common import machine
from continual.io import untrusted
from continual.reports.figures import (
    NO_VALUE,
    SUMMARY_INFO,
    format_bytes,
    format_percent,
    format_seconds,
)
from continual.results import comparison
from continual.results.matrix import mean_or_none
from continual.results.run_folder import Run, RunGroup, find_runs, group_runs
from continual.results.uncertainty import interval_over_runs
from continual.runs.compare import SEARCH_RESULT_FILE

COLUMNS = (
    "average_performance",
    "forgetting",
    "backward_transfer",
    "forward_transfer",
    "learning_accuracy",
)
PATH = Path(__file__).parents[1] / "docs" / "leaderboard.md"
SAID = "\n## What the figures say\n"
FLOOR, CEILINGS = "naive", ("joint", "per_task")


def main() -> None:
    """Write or print what the command line asks for."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.leaderboard",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "folders", nargs="+", type=Path, metavar="DIR", help="folders of continual compare"
    )
    parser.add_argument(
        "--tuned", action="store_true", help="they are searches: print what they found"
    )
    parser.add_argument(
        "--to",
        type=Path,
        default=PATH,
        metavar="PATH",
        help="another file than docs/leaderboard.md",
    )
    asked = parser.parse_args()
    if asked.tuned:
        print(tuned(asked.folders))
    else:
        said = asked.to.read_text().partition(SAID)[2] if asked.to.is_file() else "\n"
        asked.to.write_text(page(asked.folders) + SAID + said)
        print(f"wrote {asked.to}")


def page(folders: Sequence[Path]) -> str:
    """What docs/leaderboard.md holds of figures."""
    runs, waiting = find_runs(folders)
    streams: dict[str, list[Run]] = {}
    for run in runs:
        streams.setdefault(run.matrix.stream, []).append(run)
    commands = "\n".join(
        command for folder in folders for command in comparison.load_commands(folder)
    )
    left = f"\nNot finished, and in no mean: {', '.join(waiting)}.\n" if waiting else ""
    again = " ".join(map(str, folders))
    return (
        f"# Leaderboard\n\nMade by\n\n```bash\n{commands}\npython -m benchmarks.leaderboard "
        f"{again}\n```\n\non {machine()}. Scores are in percent, on the "
        f"{' and '.join(sorted(_splits(runs)))} rows: the mean over the runs and its 95% "
        "interval. A ceiling learns all tasks at once (joint) or each with weights of its own "
        "(per_task); the floor does nothing against forgetting. Seconds are those of a run, "
        "training and scoring together; stored is the strategy's memory in its last "
        f"checkpoint.\n{left}\n"
        + "\n".join(
            f"## {stream}\n\n{_facts(those)}\n\n{table(group_runs(those))}"
            for stream, those in streams.items()
        )
    )


def _splits(runs: Sequence[Run]) -> set[str]:
    return {run.settings.get("score.split", "test") for run in runs}


def _facts(runs: Sequence[Run]) -> str:
    """What was run."""
    seeds = sorted({str(run.matrix.seed) for run in runs})
    orders = sorted({run.matrix.order for run in runs})
    return (
        f"{len({task for run in runs for task in run.matrix.tasks})} tasks; orders "
        f"{', '.join(orders)}; seeds {', '.join(seeds)}."
    )


def table(groups: Sequence[RunGroup]) -> str:
    """A row a strategy: ceilings, then by average performance; the best of the others in bold."""
    ranked = sorted(groups, key=lambda g: (g.label not in CEILINGS, -(g.mean(COLUMNS[0]) or -1)))
    heads = [
        "strategy",
        "runs",
        *(f"{SUMMARY_INFO[name].title} {SUMMARY_INFO[name].arrow}" for name in COLUMNS),
        "seconds",
        "stored",
    ]
    lines = ["| " + " | ".join(heads) + " |", "|---|" + "---:|" * (len(heads) - 1)]
    arms = [g for g in ranked if g.label not in (FLOOR, *CEILINGS)]
    best = {
        name: _best([g.mean(name) for g in arms], SUMMARY_INFO[name].better == "higher")
        for name in COLUMNS
    }
    for g in ranked:
        kind = " (floor)" if g.label == FLOOR else " (ceiling)" if g.label in CEILINGS else ""
        cells = [_cell(g, name, best[name] if g in arms else None) for name in COLUMNS]
        lines.append(
            "| "
            + " | ".join(
                [
                    f"{g.label}{kind}",
                    str(g.num_finished),
                    *cells,
                    format_seconds(g.mean("seconds")),
                    format_bytes(stored(g)),
                ]
            )
            + " |"
        )
    return "\n".join(lines) + "\n"


def _best(values: Sequence[float | None], higher: bool) -> float | None:
    known = [value for value in values if value is not None]
    return (max if higher else min)(known) if len(known) > 1 else None


def _cell(group: RunGroup, name: str, best: float | None) -> str:
    """The mean and its interval."""
    value, span = group.mean(name), interval_over_runs(group.finished_values(name))
    told = format_percent(value, SUMMARY_INFO[name].signed) + (
        f" ± {50 * (span.high - span.low):.1f}" if span else ""
    )
    return f"**{told}**" if best is not None and value == best else told or NO_VALUE


def stored(group: RunGroup) -> float | None:
    """The bytes of the strategy's memory at the end, in the mean over the runs; None where a run
    does not say.
    """
    last = [run.events("checkpoint")[-1:] for run in group.runs if run.matrix.is_finished]
    return mean_or_none(events[0].get("memory_bytes") if events else None for events in last)


def tuned(folders: Sequence[Path]) -> str:
    """What each search found, a line of YAML each with the score that it had."""
    lines = ["strategy_defaults:"]
    for folder in folders:
        told = untrusted.load_yaml_mapping(folder / SEARCH_RESULT_FILE)
        found: dict[str, dict[str, str]] = {}
        for key, value in told["best_params"].items():
            _, name, setting = key.split(".", 2)
            found.setdefault(name, {})[setting] = json.dumps(value)
        lines += [
            f"  {name}: {{{', '.join(f'{k}: {v}' for k, v in keys.items())}}}  # "
            f"{told['best_value']:.3f}"
            for name, keys in found.items()
        ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
