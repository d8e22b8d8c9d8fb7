"""The audit as a step of a run, and as a command."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from continual.auditing.audit import Audit, audit
from continual.auditing.duplicates import learned
from continual.auditing.lengths import Fit, fit, measure
from continual.data.template import Encoder
from continual.data.types import Example, Stream
from continual.evaluation.scoring import Test
from continual.io.atomic import write_atomically
from continual.reports import audits
from continual.runs import build, validate
from continual.tracking.events import EventLog

SHOWN: set[str] = (
    set()
)  # what this process has shown: the runs of a comparison need not say it again


def shown(
    out: Path,
    config: DictConfig,
    stream: Stream,
    encoder: Encoder,
    context: int | None,
    tests: Sequence[Test],
    fits: Callable[[Sequence[Example]], Sequence[Fit]],
    console: Console,
) -> dict[str, Any] | None:
    """Count and show, once a run; None where the run has `noted` it before."""
    if (out / audits.FILE).exists():
        return None
    told = _counted(config, stream, encoder, context, tests, fits).to_json()
    if (once := f"{out.parent} {json.dumps(told)}") in SHOWN:
        console.print(
            f"audit of {stream.name}: as above, {len(told['findings'])} findings",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
    else:
        audits.show(console, told)
        SHOWN.add(once)
    return told


def noted(out: Path, told: Mapping[str, Any], events: EventLog) -> None:
    """Tell `events` what was `shown`, and write audit.json: the run has begun."""
    events({"event": "audit", "findings": told["findings"]})
    write_atomically(out / audits.FILE, json.dumps(told, indent=1))


def base_scored(out: Path, scores: Mapping[str, float], events: EventLog) -> None:
    """Show the tasks that the base already solves, by its scores."""
    told = audits.load(out)
    for line in audits.solved(told, scores) if told else []:
        events.print_line(line)
        events({"event": "audit", "solved": line})


def alone(config: DictConfig, console: Console) -> Audit:
    """`continual audit`: count and show, and write nothing; tokens are counted where a model is
    named.
    """
    validate.check(config)
    stream, s = build.stream(config), config.score
    if not OmegaConf.select(config, "model._target_"):
        told = audit(stream, s.split, metric=s.metric, limit=s.limit)
    else:
        reader = build.reader(config, stream)
        encoder = replace(build.encoder(config, reader), on_unusable="skip")
        tests = [
            build.test(config, t, encoder, i)
            for i, t in enumerate(stream.tasks)
            if getattr(t, s.split, ())
        ]
        told = _counted(
            config, stream, encoder, reader.context, tests, lambda rows: fit(encoder, rows)
        )
    audits.show(console, told.to_json())
    return told


def _counted(
    config: DictConfig,
    stream: Stream,
    encoder: Encoder,
    context: int | None,
    tests: Sequence[Test],
    fits: Callable[[Sequence[Example]], Sequence[Fit]],
) -> Audit:
    """The audit with the rows' lengths: `fits` tells what becomes of training rows."""
    s, prepared, train = config.score, {test.task: test for test in tests}, learned(stream)
    lengths = {
        t.name: measure(
            encoder,
            train[t.name],
            fits(train[t.name]),
            getattr(t, s.split)[: s.limit],
            prepared.get(t.name),
            s.max_new_tokens,
        )
        for t in stream.tasks
    }
    return audit(
        stream,
        s.split,
        metric=s.metric,
        limit=s.limit,
        lengths=lengths,
        fits={
            "limit": encoder.max_tokens,
            "max_length": config.data.max_length,
            "context": context,
        },
    )
