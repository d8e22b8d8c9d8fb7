"""Audit a stream as a step of a run, or as a command."""

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

# Audits that this process has printed: the runs of a comparison share one.
PRINTED_AUDITS: set[str] = set()


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
    """Audit the stream and print the result; None if the run has recorded it before."""
    if (out / audits.AUDIT_FILE).exists():
        return None
    audit = _audit_with_lengths(config, stream, encoder, context, eval_sets, count_tokens).to_dict()
    key = f"{out.parent} {json.dumps(audit)}"
    if key in PRINTED_AUDITS:
        console.print(
            f"audit of {stream.name}: as above, {len(audit['findings'])} findings",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
    else:
        audits.print_audit_table(console, audit)
        PRINTED_AUDITS.add(key)
    return audit


def record_audit(out: Path, audit: Mapping[str, Any], events: EventLog) -> None:
    """Log the result of `print_audit`, and write audit.json, once the run has begun."""
    events({"event": "audit", "findings": audit["findings"]})
    write_atomically(out / audits.AUDIT_FILE, json.dumps(audit, indent=1))


def report_solved_tasks(out: Path, scores: Mapping[str, float], events: EventLog) -> None:
    """Print and log the tasks that the base model already solves, by its scores."""
    audit = audits.load_audit(out)
    for line in audits.solved_task_lines(audit, scores) if audit else []:
        events.print_line(line)
        events({"event": "audit", "solved": line})


def run_audit(config: DictConfig, console: Console) -> Audit:
    """Audit a stream and print the result, without writing files (`continual audit`).

    Tokens are counted only if a model is configured.
    """
    validate.check(config)
    stream = build.stream(config)
    score = config.score
    if not OmegaConf.select(config, "model._target_"):
        audit = audit_stream(
            stream, score.split, metric=score.metric, max_examples=score.max_examples
        )
    else:
        reader = build.reader(config, stream)
        encoder = replace(build.encoder(config, reader), on_unusable="skip")
        tests = [
            build.test(config, t, encoder, i)
            for i, t in enumerate(stream.tasks)
            if getattr(t, score.split, ())
        ]
        audit = _audit_with_lengths(
            config,
            stream,
            encoder,
            reader.context_length,
            tests,
            lambda rows: count_row_tokens(encoder, rows),
        )
    audits.print_audit_table(console, audit.to_dict())
    return audit


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
