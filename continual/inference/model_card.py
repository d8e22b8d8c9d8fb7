"""The model card of what is exported: where it comes from, what it scored, and how it is asked as
it was in training.

All text in it that comes from files is written so that Markdown and YAML read it as text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig

from continual.data.template import CHAT, TEMPLATES, Encoder, generation_prompt_suffix
from continual.errors import DataError
from continual.inference.reopen import LoadedModel
from continual.io import untrusted
from continual.io.terminal import escape_control
from continual.reports.figures import format_percent
from continual.results.curve import Curve
from continual.results.run_folder import Run

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
CREATIVE_COMMONS = re.compile(r"\bcc[ -]by((?:[ -](?:nc|sa|nd))*)[ -](\d\.\d)\b", re.IGNORECASE)
LICENCE_PATTERNS = {
    "apache-2.0": r"\bapache[ -]?(license,?)?[ -]?(version )?2\.0\b",
    "mit": r"\bmit\b",
    "cc0-1.0": r"\bcc0\b",
}
OTHER_LICENCE = "other"  # the hub's word for a licence that it has no name for


def render_model_card(
    model: LoadedModel, adapter: bool, base: str | None, task: str | None, license: str | None
) -> str:
    """The text of README.md: YAML for machines, then Markdown."""
    licences = _licences(model.config)
    head = yaml.safe_dump(
        _metadata(model, adapter, base, license, licences), sort_keys=False, allow_unicode=True
    )
    names = "+".join(map(str, model.config.strategy))
    stage = f"after stage **{escape_markdown(model.stage)}**" + (
        f", for task **{escape_markdown(task)}**" if task else ""
    )
    parts = [
        f"---\n{head}---",
        f"# {escape_markdown(_title(model))}",
        f"Trained by continual with the strategy **{escape_markdown(names)}** on the "
        f"stream **{escape_markdown(_stream_name(model))}**: this is the model {stage}.",
        "## How to ask it",
        *_usage_section(model, adapter, base),
        "## What it scored",
        *_scores_section(model),
        "## Where it comes from",
        *_origin_section(model, base, license, licences),
    ]
    return "\n\n".join(parts) + "\n"


def escape_markdown(text: object) -> str:
    """Any text as Markdown that shows it, on one line."""
    return re.sub(r"([\\`*_{}\[\]<>#|~&$])", r"\\\1", escape_control(str(text)).replace("\n", " "))


def _title(opened: LoadedModel) -> str:
    return f"{_stream_name(opened)}: {'+'.join(map(str, opened.config.strategy))}, {opened.stage}"


def _stream_name(opened: LoadedModel) -> str:
    told = opened.source.result
    return told.matrix.stream if isinstance(told, Run) else told.task


def _metadata(
    opened: LoadedModel,
    adapter: bool,
    base: str | None,
    license: str | None,
    licences: dict[str, str],
) -> dict[str, Any]:
    """What the hub and its tools read."""
    seq2seq, data = opened.encoder.seq2seq, _hub_datasets(opened.config)
    name = str(opened.config.model.get("name") or "")
    kind = license or _licence_id(list(licences.values()))
    told = {
        "base_model": name if HUB_ID.fullmatch(name) and not Path(name).exists() else base,
        "base_model_relation": ("adapter" if adapter else "finetune") if name else None,
        "library_name": "peft" if adapter else "transformers",
        "pipeline_tag": "text2text-generation" if seq2seq else "text-generation",
        "license": kind,
        "license_name": "that-of-the-data" if kind == OTHER_LICENCE and not license else None,
        "datasets": data or None,
        "tags": ["continual-learning", "instruction-tuning", *map(str, opened.config.strategy)],
        "model-index": [{"name": _title(opened), "results": results}]
        if (results := list(_model_index_results(opened)))
        else None,
    }
    return {key: value for key, value in told.items() if value is not None}


def _model_index_results(opened: LoadedModel) -> Iterator[dict[str, Any]]:
    """Each score of the stage, in percent."""
    told = opened.source.result
    if not isinstance(told, Run):
        return
    matrix, row = told.matrix, told.matrix.scores[told.matrix.stages.index(opened.stage)]
    for name, score in zip(matrix.tasks, row, strict=True):
        if score is not None:
            yield {
                "task": {"type": "text-generation", "name": escape_control(name)},
                "dataset": {
                    "type": escape_control(matrix.stream),
                    "name": f"{escape_control(matrix.stream)}: {escape_control(name)}",
                    "split": str(opened.config.score.split),
                },
                "metrics": [
                    {"type": escape_control(matrix.metrics[name]), "value": round(100 * score, 2)}
                ],
            }


def _hub_datasets(config: DictConfig) -> list[str]:
    """The hub's datasets that the stream is made of."""
    entries = [
        e for e in (config.stream.get("datasets") or {}).values() if isinstance(e, DictConfig)
    ]
    paths = [str(e.get("path")) for e in entries if not e.get("data_files")]
    return sorted({p for p in paths if HUB_ID.fullmatch(p) and not Path(p).exists()})


def _licences(config: DictConfig) -> dict[str, str]:
    """Of each task the licence that its stream.json tells."""
    path = config.stream.get("path")
    file = Path(str(path)).expanduser() / "stream.json"
    if path is None or not file.is_file():
        return {}
    try:
        entries = untrusted.load_json(file)["tasks"]
        told = {e["name"]: e.get("licence") or e.get("license") for e in entries}
    except (
        DataError,
        KeyError,
        TypeError,
        AttributeError,
    ):  # no stream any more: then it tells none
        return {}
    used = config.stream.get("tasks") or told
    return {str(n): lic for n, lic in told.items() if isinstance(lic, str) and n in used}


def _licence_id(licences: Sequence[str]) -> str | None:
    """The hub's name of the one licence that all have; `other` where they differ or have none; None
    of nothing.
    """
    found = set()
    for text in licences:
        if match := CREATIVE_COMMONS.search(text):
            found.add(f"cc-by{match[1].replace(' ', '-')}-{match[2]}".lower())
        else:
            found.add(
                next(
                    (
                        n
                        for n, says in LICENCE_PATTERNS.items()
                        if re.search(says, text, re.IGNORECASE)
                    ),
                    OTHER_LICENCE,
                )
            )
    return found.pop() if len(found) == 1 else OTHER_LICENCE if found else None


def _usage_section(opened: LoadedModel, adapter: bool, base: str | None) -> list[str]:
    """The template, and code that asks."""
    encoder = opened.encoder
    kind = "AutoModelForSeq2SeqLM" if encoder.seq2seq else "AutoModelForCausalLM"
    bits = opened.config.model.get("quantize", "none") != "none"
    names = ["AutoTokenizer", kind, *(["BitsAndBytesConfig"] if adapter and bits else [])]
    code = ([f"from peft import {'PeftModel'}"] if adapter else []) + [
        f"from transformers import {', '.join(sorted(names))}",
        "",
        'folder = "."  # where this card lies',
        "tokenizer = AutoTokenizer.from_pretrained(folder)",
    ]
    if adapter:
        where = 'folder + "/base"' if base is None else _string_literal(base)
        dtype = {"bf16": "bfloat16"}.get(str(opened.config.model.get("dtype")), "float32")
        more = (
            (
                ", quantization_config=BitsAndBytesConfig(\n    load_in_4bit=True, "
                'bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, '
                f'bnb_4bit_compute_dtype="{dtype}")'
            )
            if bits
            else ""
        )
        code.append(f'base = {kind}.from_pretrained({where}, dtype="{dtype}"{more})')
        code.append("model = PeftModel.from_pretrained(base, folder).eval()")
    else:
        code.append(f"model = {kind}.from_pretrained(folder)")
    joint = _string_literal(_input_separator(encoder))
    start = "0" if encoder.seq2seq else 'asked["input_ids"].shape[1]'
    code += [
        'instruction, input = "...", "..."  # the input may be empty',
        f"text = instruction + {joint} + input if input else instruction",
        'asked = tokenizer.apply_chat_template([{"role": "user", "content": text}], '
        "add_generation_prompt=True,",
        '                                      return_tensors="pt", return_dict=True)',
        "answer = model.generate(**asked, max_new_tokens=64, do_sample=False)",
        f"print(tokenizer.decode(answer[0, {start}:], skip_special_tokens=True).strip())",
    ]
    how = (
        "the tokenizer's own chat template"
        if encoder.template == CHAT
        else f"the template `{encoder.template}`, which is saved as the tokenizer's chat template"
    )
    return [
        f"It was asked by {how}, one turn at a time, and answered greedily:",
        "```python\n" + "\n".join(code) + "\n```",
    ]


def _string_literal(text: str) -> str:
    """A Python and Jinja string, in ASCII, that closes no block of Markdown."""
    return json.dumps(text).replace("`", "\\u0060")


def _input_separator(encoder: Encoder) -> str:
    """What stands between an instruction and its input, where both are one message."""
    if encoder.template == CHAT:
        return "\n"
    between = TEMPLATES[encoder.template].prompt_format_with_input.partition("{instruction}")[2]
    return between.partition("{input}")[0]


def build_chat_template(encoder: Encoder) -> str:
    """The Jinja template by which `transformers` writes a conversation as this encoder does,
    special tokens and all.
    """
    tokenizer = encoder.tokenizer
    before, after = ("".join(tokenizer.convert_ids_to_tokens(ids)) for ids in encoder.special_ids)
    opening, closing = (
        f"{{{{ {_string_literal(part)} }}}}" if part else ""
        for part in (before, after if encoder.seq2seq else "")
    )
    if encoder.template == CHAT:
        return f"{opening}{_chat_template_with_prefix(tokenizer)}{closing}"
    t = TEMPLATES[encoder.template]
    head, _, tail = t.prompt_format.partition("{instruction}")
    end = _string_literal(tokenizer.eos_token or "")
    user = (
        f"{{{{ ({_string_literal(t.turn_separator)} if at.begun else '') + {_string_literal(head)} + at.system + "
        f"m['content'] + {_string_literal(tail)} }}}}"
    )
    return (
        f"{opening}{{% set at = namespace(system='', begun=false) %}}{{% for m in messages "
        f"%}}{{% if m['role'] == 'system' %}}{{% set at.system = m['content'] + '\\n' %}}{{% "
        f"elif m['role'] == 'user' %}}{user}{{% set at.system = '' %}}{{% set at.begun = true "
        f"%}}{{% else %}}{{{{ {_string_literal(t.response_prefix)} + m['content'] + {end} }}}}{{% set at.begun = "
        f"true %}}{{% endif %}}{{% endfor %}}{closing}"
    )


def _chat_template_with_prefix(tokenizer: Any) -> str:
    """The tokenizer's own chat template, whose generation prompt ends with all that it writes
    before any answer.
    """
    turns = [{"role": "user", "content": "a"}]
    asked = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    told, more = str(tokenizer.chat_template), generation_prompt_suffix(turns, asked, tokenizer)
    if not more:
        return told
    more = _string_literal(more)
    return (
        f"{{% set written %}}{told}{{% endset %}}{{{{ written }}}}{{% if add_generation_prompt "
        f"and not written.endswith({more}) %}}{{{{ {more} }}}}{{% endif %}}"
    )


def _scores_section(opened: LoadedModel) -> list[str]:
    """The retained-task matrix with its summaries, or the curve of an adaptation."""
    told = opened.source.result
    if isinstance(told, Curve):
        return [
            f"{escape_markdown(told.metric)} in percent on {escape_markdown(told.task)}, started from "
            f"{escape_markdown(told.start)}:",
            _markdown_table(
                ["examples \\ steps", *map(str, told.steps)],
                [
                    [
                        str(n),
                        *(
                            format_percent(dict(told.mean_scores(n)).get(step))
                            for step in told.steps
                        ),
                    ]
                    for n in told.shots
                ],
            ),
        ]
    matrix = told.matrix
    heads = ["after stage", *(f"{name} ({matrix.metrics[name]})" for name in matrix.tasks)]
    rows = [
        [f"{stage} (this model)" if stage == opened.stage else stage, *map(format_percent, row)]
        for stage, row in zip(matrix.stages, matrix.scores, strict=True)
    ]
    summary = [
        f"{name.replace('_', ' ')} {format_percent(value)}"
        for name, value in matrix.summary().items()
        if value is not None
    ]
    return [
        "Percent, on each task after each stage of the run:",
        _markdown_table(heads, rows),
        *([f"Of the whole run: {', '.join(summary)}."] if summary else []),
    ]


def _markdown_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [[escape_markdown(cell) for cell in row] for row in (heads, *rows)]
    lines.insert(1, ["---", *["---:"] * (len(heads) - 1)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _origin_section(
    opened: LoadedModel, base: str | None, license: str | None, licences: dict[str, str]
) -> list[str]:
    """Base, data and licences, in words."""
    config, name = opened.config, opened.config.model.get("name")
    made = (
        "a small model made by continual for this stream"
        if name is None
        else f"{escape_markdown(name)}, whose own licence and terms hold here too"
    )
    told = [
        f"* base: {made}",
        f"* adapter: {escape_markdown(config.model.get('adapter', 'none'))}; precision "
        f"{escape_markdown(config.train.precision)}; at most {escape_markdown(opened.encoder.max_tokens)} tokens of "
        f"prompt and answer; seed {escape_markdown(config.seed)}",
        f"* tasks, in the order of the matrix: {', '.join(map(escape_markdown, opened.source.tasks))}",
    ]
    told += [
        f"* the data of {escape_markdown(task)}: {escape_markdown(says)}"
        for task, says in licences.items()
    ]
    silent = [escape_markdown(t) for t in opened.source.tasks if t not in licences]
    if licences and silent:
        told.append(f"* of these tasks the stream tells no licence: {', '.join(silent)}")
    if license is None and not licences:
        told.append(
            "* neither the stream nor a key gives a licence: whoever publishes this model has to "
            "choose one"
        )
    return ["\n".join(told)]
