"""What a run learned, as a folder that `transformers` or `peft` loads: weights, tokenizer, template
and card.

The folder is written beside and renamed: it is there whole or not at all.
"""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from continual.errors import ConfigError, ContinualError, listed, unknown
from continual.inference import model_card
from continual.inference.reopen import LoadedModel, ModelSource, load_run_model
from continual.io.atomic import task_file_name, write_atomically, write_folder_atomically
from continual.models.model import Model

EXPORT_DEFAULTS = {
    "stage": "",
    "task": "",
    "merged": "",
    "license": "",
    "device": "cpu",
    "trust_remote_code": "false",
    "out": "",
}
BASE_FOLDER = "base"  # in an adapter's folder: the base, where there is none to be had elsewhere


@dataclass(frozen=True)
class ExportResult:
    """Where the folder is, and how it is loaded: `adapter` if on a base, the model of that name or
    of the folder.
    """

    path: Path
    adapter: bool
    base: str | None


def export(
    path: Path,
    config: DictConfig,
    *,
    stage: str | None = None,
    task: str | None = None,
    merge: bool | None = None,
    out: Path | None = None,
    license: str | None = None,
) -> ExportResult:
    """Write the model of a run or adaptation, as it was after `stage`, by default the last, to
    `out`, by default PATH/export/STAGE.

    `merged` adds an adapter's weights to the model's own, as is done by default wherever it can be;
    false leaves it an adapter for its base. A strategy with other weights for each task needs the
    `task`. `config` is that of `continual run`, for the device. Raises ConfigError for what cannot
    be exported so and for an `out` that is there already, ContinualError, with nothing written,
    where the disk has not the space.
    """
    source = ModelSource.load(path)
    name = source.resolve_stage(stage)
    if task is not None and task not in source.tasks:
        raise ConfigError(unknown("task", task, source.tasks))
    place = "-".join(task_file_name(part) for part in (name, task) if part is not None)
    target = out or path / "export" / place
    if target.exists():
        raise ConfigError(f"{target} is there already; remove it, or give another out=")
    opened = load_run_model(source, config)
    check_single_model(opened, task)
    opened.load_stage(name)
    opened.route(task)
    adapter = not _should_merge(opened, merge)
    if adapter and not opened.model.layout.prompt_prefix and hasattr(opened.model.net, "virtual"):
        adapter = False  # no virtual token stands before anything yet: the base alone answers
    base = _base_name(opened) if adapter else None
    made = ExportResult(target, adapter, base)
    _write_atomically(
        target,
        opened,
        made,
        model_card.render_model_card(opened, made.adapter, base, task, license),
    )
    return made


def check_single_model(model: LoadedModel, task: str | None) -> None:
    """Raise ConfigError where the answers come from several models, and no task says which is
    meant.
    """
    names = "+".join(map(str, model.config.strategy))
    if model.dispatches_by_prompt:
        raise ConfigError(
            f"the strategy {names} chooses other weights for each prompt, which no one model "
            f"holds; talk to it with continual chat {model.source.path}, or export a run of "
            "another strategy"
        )
    if model.routes_by_task and task is None:
        raise ConfigError(
            f"the strategy {names} has other weights for each task, and one model holds those of "
            f"one; give task=NAME, of {listed(model.source.tasks)}"
        )


def _should_merge(opened: LoadedModel, merged: bool | None) -> bool:
    """Whether the adapter's weights go into the model's own; raises ConfigError where they cannot,
    or there is none.
    """
    kind, bits = (
        opened.config.model.get("adapter", "none"),
        opened.config.model.get("quantize", "none") != "none",
    )
    if kind == "none":
        if merged is False:
            raise ConfigError(
                "merged=false is for a run with an adapter, and this one trained the whole "
                "model; leave merged out"
            )
        return True
    reason = (
        f"model.adapter={kind} puts virtual tokens before the prompt, which no weight of the "
        "model can hold"
        if hasattr(opened.model.net, "virtual")
        else "model.quantize=4bit holds the base in 4 bits, and what is merged into them is "
        "rounded away"
        if bits
        else ""
    )
    if merged and reason:
        raise ConfigError(f"merged=true cannot be: {reason}; give merged=false, for an adapter")
    return not reason and merged is not False


def _base_name(opened: LoadedModel) -> str | None:
    """The name of the model that the adapter belongs to; None where only this run has it: made
    here, or grown by a token that its tokenizer lacked.
    """
    name = opened.config.model.get("name")
    if name is None:
        return None
    from transformers import AutoConfig

    trust_remote_code = bool(
        opened.config.model.get("trust_remote_code")
    )  # only where it was given: see take_over
    theirs = AutoConfig.from_pretrained(
        str(Path(name).expanduser()) if str(name).startswith("~") else name,
        trust_remote_code=trust_remote_code,
    )
    words = opened.model.net.get_input_embeddings().num_embeddings
    return str(name) if theirs.get_text_config().vocab_size == words else None


def _write_atomically(target: Path, opened: LoadedModel, made: ExportResult, text: str) -> None:
    """Write all files of the export to `target`, completely or not at all."""
    from safetensors import SafetensorError

    try:
        with write_folder_atomically(target, num_bytes=_size_bytes(opened.model, made)) as folder:
            _write_files(folder, opened, made)
            write_atomically(folder / "README.md", text)
            # Weight files are written for their owner alone; a model is for everybody.
            for path in folder.rglob("*"):
                path.chmod(0o755 if path.is_dir() else 0o644)
    except (OSError, SafetensorError) as e:
        raise ContinualError(
            f"{target} cannot be written: {e}; see to the space there, or give another out="
        ) from e


def _size_bytes(model: Model, made: ExportResult) -> int:
    """Return the size in bytes of the weights that the export writes."""
    whole = not made.adapter or made.base is None
    return sum(p.nbytes for p in model.net.parameters() if whole or p.requires_grad)


def _write_files(folder: Path, opened: LoadedModel, made: ExportResult) -> None:
    net, tokenizer = opened.model.net, copy.deepcopy(opened.model.tokenizer)
    tokenizer.chat_template = model_card.build_chat_template(opened.encoder)
    tokenizer.save_pretrained(folder)
    if not made.adapter:
        plain = opened.config.model.get("adapter", "none") == "none"
        whole = (
            net
            if plain
            else net.get_base_model()
            if hasattr(net, "virtual")
            else net.merge_and_unload()
        )
        whole.save_pretrained(folder)
        return
    if made.base is None:
        _save_base(folder / BASE_FOLDER, opened)
    if hasattr(net, "virtual"):
        _save_virtual_tokens(folder, opened.model)
    else:
        net.save_pretrained(folder, save_embedding_layers=False)
    _set_base_name(folder / "adapter_config.json", made.base or BASE_FOLDER)


def _save_base(folder: Path, opened: LoadedModel) -> None:
    """The base, which can be had nowhere else: without what the adapter does to it."""
    net = opened.model.net
    net = net.get_base_model() if hasattr(net, "virtual") else copy.deepcopy(net).unload()
    net.save_pretrained(folder)
    opened.model.tokenizer.save_pretrained(folder)


@torch.no_grad()
def _save_virtual_tokens(folder: Path, model: Model) -> None:
    """The virtual tokens that stand before every prompt now, of this task and of those before it,
    as peft's own.
    """
    from safetensors.torch import save_file

    ids = torch.tensor(model.layout.prompt_prefix, device=model.layout.device)
    config = copy.deepcopy(model.net.peft_config["default"])
    config.num_virtual_tokens, config.inference_mode = len(ids), True
    config.save_pretrained(str(folder))
    rows = model.net.virtual(ids).detach().cpu().contiguous()
    save_file({"prompt_embeddings": rows}, folder / "adapter_model.safetensors")


def _set_base_name(path: Path, name: str) -> None:
    """Say which base the adapter belongs to; where it lay when it was loaded means nothing
    elsewhere.
    """
    told: dict[str, Any] = {**json.loads(path.read_text("utf-8")), "base_model_name_or_path": name}
    write_atomically(path, json.dumps(told, indent=2, sort_keys=True) + "\n")
