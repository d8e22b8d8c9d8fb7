"""The audit as a step of a run, and as a command."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from continual.auditing.audit import Audit, audit_stream
from continual.auditing.duplicates import train_rows_by_task
from continual.auditing.lengths import TokenCount, count_row_tokens, measure_lengths
from continual.data.template import Encoder
from continual.data.types import Example, Stream
from continual.evaluation.scoring import EvalSet
from continual.io.atomic import write_atomically
from continual.reports import audits
from continual.runs import build, validate
from continual.tracking.events import EventLog

PRINTED_AUDITS: set[str] = (
    set()
)  # what this process has shown: the runs of a comparison need not say it again


def print_audit(
    out: Path,
    config: DictConfig,
    stream: Stream,
    encoder: Encoder,
    context: int | None,
    eval_sets: Sequence[EvalSet],
    count_tokens: Callable[[Sequence[Example]], Sequence[TokenCount]],
    console: Console,
) -> dict[str, Any] | None:
    """Count and show, once a run; None where the run has `noted` it before."""
    if (out / audits.AUDIT_FILE).exists():
        return None
    told = _audit_with_lengths(config, stream, encoder, context, eval_sets, count_tokens).to_dict()
    if (once := f"{out.parent} {json.dumps(told)}") in PRINTED_AUDITS:
        console.print(
            f"audit of {stream.name}: as above, {len(told['findings'])} findings",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
    else:
        audits.print_audit_table(console, told)
        PRINTED_AUDITS.add(once)
    return told


def record_audit(out: Path, told: Mapping[str, Any], events: EventLog) -> None:
    """Tell `events` what was `shown`, and write audit.json: the run has begun."""
    events({"event": "audit", "findings": told["findings"]})
    write_atomically(out / audits.AUDIT_FILE, json.dumps(told, indent=1))


def report_solved_tasks(out: Path, scores: Mapping[str, float], events: EventLog) -> None:
    """Show the tasks that the base already solves, by its scores."""
    told = audits.load_audit(out)
    for line in audits.solved_task_lines(told, scores) if told else []:
        events.print_line(line)
        events({"event": "audit", "solved": line})


def run_audit(config: DictConfig, console: Console) -> Audit:
    """`continual audit`: count and show, and write nothing; tokens are counted where a model is
    named.
    """
    validate.check(config)
    stream, s = build.stream(config), config.score
    if not OmegaConf.select(config, "model._target_"):
        told = audit_stream(stream, s.split, metric=s.metric, max_examples=s.max_examples)
    else:
        reader = build.reader(config, stream)
        encoder = replace(build.encoder(config, reader), on_unusable="skip")
        tests = [
            build.test(config, t, encoder, i)
            for i, t in enumerate(stream.tasks)
            if getattr(t, s.split, ())
        ]
        told = _audit_with_lengths(
            config,
            stream,
            encoder,
            reader.context_length,
            tests,
            lambda rows: count_row_tokens(encoder, rows),
        )
    audits.print_audit_table(console, told.to_dict())
    return told


def _audit_with_lengths(
    config: DictConfig,
    stream: Stream,
    encoder: Encoder,
    context: int | None,
    tests: Sequence[EvalSet],
    count_tokens: Callable[[Sequence[Example]], Sequence[TokenCount]],
) -> Audit:
    """The audit with the rows' lengths: `fits` tells what becomes of training rows."""
    s, prepared, train = (
        config.score,
        {test.task: test for test in tests},
        train_rows_by_task(stream),
    )
    lengths = {
        t.name: measure_lengths(
            encoder,
            train[t.name],
            count_tokens(train[t.name]),
            getattr(t, s.split)[: s.max_examples],
            prepared.get(t.name),
            s.max_new_tokens,
        )
        for t in stream.tasks
    }
    return audit_stream(
        stream,
        s.split,
        metric=s.metric,
        max_examples=s.max_examples,
        lengths=lengths,
        token_limits={
            "limit": encoder.max_tokens,
            "max_length": config.data.max_length,
            "context": context,
        },
    )
