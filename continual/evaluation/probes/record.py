"""Run the probes after a stage; write each stage's results, and all of them to RUN/probes.json.

A stage's results are in probes.json of its predictions folder. RUN/probes.json holds
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
MAX_PRINTED_VALUES = 6  # values of an entry in the terminal line of a stage


def run_probes(
    out: Path,
    folders: Sequence[Path],
    probes: Mapping[str, Probe],
    predict: Predict,
    matrix: Matrix,
    events: EventLog,
) -> None:
    """Measure what is missing after the matrix's last stage, and write RUN/probes.json.

    `folders` are the predictions folders of all stages up to the last. Results that are in them
    were measured with the weights of their stage.
    """
    began = time.perf_counter()
    stage_file = folders[-1] / PROBES_FILE
    base_results = broadcast(load_probe_result(folders[0] / PROBES_FILE))
    results = broadcast(load_probe_result(stage_file))

    for number, (name, probe) in enumerate(probes.items()):
        events.update_bar("probing", len(probes), number, name)
        if set(probe.entries) <= set(results):
            continue
        has_base = len(folders) > 1 and set(probe.entries) <= set(base_results)
        context = StageContext(predict, matrix, base_results if has_base else None)
        results |= probe.measure(context)
        if is_main_process():
            _write_json(stage_file, results)
    events.clear_bar()

    if is_main_process():
        all_results = [load_probe_result(folder / PROBES_FILE) for folder in folders]
        _write_json(out / PROBES_FILE, assemble_probes(matrix.stages, probes, all_results))
    events({"event": "probe", "seconds": time.perf_counter() - began, "probes": results})
    for entry, series in results.items():
        values = list(series.items())[:MAX_PRINTED_VALUES]
        texts = [f"{label} {value:.3f}" for label, value in values if value is not None]
        events.print_line(f"  {entry}: {', '.join(texts)}")


def _write_json(path: Path, document: Mapping[str, object]) -> None:
    write_atomically(path, json.dumps(document, indent=1, allow_nan=False))


def assemble_probes(
    stages: Sequence[str], probes: Mapping[str, Probe], results: Sequence[ProbeResult]
) -> dict[str, object]:
    """Return the document of probes.json from one result per stage."""
    entries = {name: entry for probe in probes.values() for name, entry in probe.entries.items()}
    tables = {}
    for name, entry in entries.items():
        labels = dict.fromkeys(label for result in results for label in result.get(name, {}))
        tables[name] = {
            "says": entry.description,
            "source": entry.source,
            "better": entry.better,
            "series": {
                label: [result.get(name, {}).get(label) for result in results] for label in labels
            },
        }
    return {"schema": 1, "stages": list(stages), "probes": tables}


def load_probe_result(path: Path) -> ProbeResult:
    """Load a stage's results; {} if the file is incomplete, so that it is measured again."""
    try:
        result: ProbeResult = load_json(path)
        values = [value for series in result.values() for value in series.values()]
    except (OSError, ValueError, AttributeError):
        return {}
    is_complete = all(value is None or is_number(value) for value in values)
    return result if is_complete else {}
