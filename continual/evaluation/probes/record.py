"""What probes found, kept as a run goes on: of each stage beside its predictions, and of all in
RUN/probes.json.

{"schema": 1, "stages": ["base", TASK, ...], "probes": {ENTRY: {"says", "source", "better": "higher"
or "lower", "series": {LABEL: [a number or null for each stage]}}}}
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from continual.distributed.processes import broadcast, is_main_process
from continual.evaluation.probes.base import Predict, Probe, ProbeResult, StageContext
from continual.io.atomic import write_atomically
from continual.io.untrusted import is_number, load_json
from continual.results.matrix import Matrix
from continual.tracking.events import EventLog

PROBES_FILE = "probes.json"


def run_probes(
    out: Path,
    folders: Sequence[Path],
    probes: Mapping[str, Probe],
    predict: Predict,
    matrix: Matrix,
    events: EventLog,
) -> None:
    """Measure what is not measured yet after the matrix's last stage, and write RUN/probes.json.

    `folders` are those of the predictions of each stage up to it, which are of the weights as they
    were then.
    """
    began, kept = time.perf_counter(), folders[-1] / PROBES_FILE
    base, found = (
        broadcast(load_probe_result(folders[0] / PROBES_FILE)),
        broadcast(load_probe_result(kept)),
    )
    for done, (name, probe) in enumerate(probes.items()):
        events.update_bar("probing", len(probes), done, name)
        if not set(probe.entries) <= set(found):
            before = base if len(folders) > 1 and set(probe.entries) <= set(base) else None
            found |= probe.measure(StageContext(predict, matrix, before))
            if is_main_process():
                write_atomically(kept, json.dumps(found, indent=1, allow_nan=False))
    events.clear_bar()
    if is_main_process():
        write_atomically(
            out / PROBES_FILE,
            json.dumps(
                assemble_probes(
                    matrix.stages, probes, [load_probe_result(f / PROBES_FILE) for f in folders]
                ),
                indent=1,
                allow_nan=False,
            ),
        )
    events({"event": "probe", "seconds": time.perf_counter() - began, "probes": found})
    for entry, series in found.items():
        events.print_line(
            f"  {entry}: "
            + ", ".join(
                f"{label} {value:.3f}"
                for label, value in [*series.items()][:MAX_PRINTED_VALUES]
                if value is not None
            )
        )


MAX_PRINTED_VALUES = 6  # figures of an entry in the line about a stage


def assemble_probes(
    stages: Sequence[str], probes: Mapping[str, Probe], results: Sequence[ProbeResult]
) -> dict[str, object]:
    """What probes.json holds, from what each stage's probes found."""
    made = {}
    for name, entry in (
        (name, entry) for probe in probes.values() for name, entry in probe.entries.items()
    ):
        labels = dict.fromkeys(label for each in results for label in each.get(name, {}))
        series = {label: [each.get(name, {}).get(label) for each in results] for label in labels}
        made[name] = {
            "says": entry.description,
            "source": entry.source,
            "better": entry.better,
            "series": series,
        }
    return {"schema": 1, "stages": list(stages), "probes": made}


def load_probe_result(path: Path) -> ProbeResult:
    """What a stage's probes found; nothing where the file is not whole, for it is measured again."""
    try:
        found = load_json(path)
        whole = all(
            value is None or is_number(value)
            for series in found.values()
            for value in series.values()
        )
        return found if whole else {}
    except (OSError, ValueError, AttributeError):
        return {}
