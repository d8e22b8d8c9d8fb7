"""A causal or encoder-decoder language model with its tokenizer and, if asked for, its adapter."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from continual.distributed.processes import is_main_process
from continual.errors import ConfigError, MissingError, listed, unknown
from continual.models.model import Model, pick_device
from continual.models.virtual_tokens import prompted
from continual.packing.batch import Layout
from continual.packing.support import detect_packing_support

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def load_pretrained(
    *,
    name: str,
    device: str = "auto",
    seed: int = 0,
    adapter: str = "none",
    dtype: str = "fp32",
    trust_remote_code: bool = False,
    adapters: Mapping[str, Mapping[str, Any]] | None = None,
    network: bool = True,
    drawn: bool = False,
    quantize: str = "none",
    **_: Any,
) -> Model:
    """Load a hub id or local folder through the Auto classes, causal or encoder-decoder by its own
    config.

    `adapter` names a kind of `adapters` (lora or any other peft kind with its settings) or is
    "none" for full fine-tuning. With `quantize="4bit"` the weights are held in 4 bits, and only an
    adapter trains. With `drawn` the weights are drawn anew, and config.json alone is needed.
    Without the `network` it only tokenises, and no weights are read. Raises MissingError if there
    is no such model, ConfigError for an unknown adapter or dtype and for what cannot be held in 4
    bits.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

    if dtype not in DTYPES:
        raise ConfigError(unknown("model.dtype", dtype, DTYPES))
    if quantize != "none":
        _refuse_bits(quantize, adapter, drawn)
    if name.startswith((".", "/", "~")) and not Path(name).expanduser().is_dir():
        raise MissingError(
            f"model.name={name}: no such folder; give a folder with config.json and safetensors "
            "weights, or a hub id"
        )
    path = str(Path(name).expanduser()) if name.startswith("~") else name
    source: dict[str, Any] = {
        "pretrained_model_name_or_path": path,
        "trust_remote_code": trust_remote_code,
    }
    try:
        config = AutoConfig.from_pretrained(**source)
        kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        tokenizer = (
            AutoTokenizer.from_pretrained(**source)
            if not drawn or _has_tokenizer(path)
            else _no_words()
        )
        if drawn:
            net = kind.from_config(config, dtype=DTYPES[dtype], trust_remote_code=trust_remote_code)
        elif network:
            net, told = kind.from_pretrained(
                **source,
                dtype=DTYPES[dtype],
                use_safetensors=True,
                output_loading_info=True,
                **_held_in(quantize, dtype, device),
            )
            for module in net.modules():
                if hasattr(
                    module, "support_avx512bf16_for_cpu"
                ):  # bitsandbytes packs what it answers with on a CPU,
                    module.support_avx512bf16_for_cpu = (
                        False  # for good, and no gradient comes through that
                    )
            if absent := sorted(told["missing_keys"]):
                raise ValueError(
                    f"its weights lack {listed(absent, 3)}, which would be drawn at random."
                )
    except (
        Exception
    ) as e:  # files can be wrong in any way, and each library has its own words for it
        first = next(iter(str(e).splitlines()), "") or repr(e)
        raise MissingError(
            f"model.name={name} could not be loaded: {first} Give a local folder with "
            "config.json, tokenizer and safetensors weights, or a hub id that can be reached"
        ) from e
    if not network:
        return reader(tokenizer, context_of(config), seq2seq=bool(config.is_encoder_decoder))
    return assemble(net, tokenizer, device=device, seed=seed, adapter=adapter, adapters=adapters)


def _refuse_bits(quantize: str, adapter: str, drawn: bool) -> None:
    if quantize != "4bit":
        raise ConfigError(unknown("model.quantize", quantize, ["none", "4bit"]))
    if drawn:
        raise ConfigError(
            "model.quantize=4bit is not planned: continual plan counts weights as model.dtype "
            "has them; plan with model.quantize=none"
        )
    if adapter == "none":
        raise ConfigError(
            "model.quantize=4bit: weights in 4 bits cannot be trained; set model.adapter=lora, or "
            "model.quantize=none"
        )
    if missing := [name for name in ("bitsandbytes", "accelerate") if not find_spec(name)]:
        raise ConfigError(
            f"model.quantize=4bit needs {' and '.join(missing)}; install the extra: uv sync "
            f"--extra quantize, or pip install {' '.join(missing)}"
        )


def _held_in(quantize: str, dtype: str, device: str) -> dict[str, Any]:
    """How `transformers` is asked to hold the weights as it reads them."""
    if quantize == "none":
        return {}
    from transformers import BitsAndBytesConfig

    # Normal floats with their scales quantized as well: QLoRA (Dettmers et al. 2023, sections 3 and
    # 4).
    how = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=DTYPES[dtype],
    )
    return {"quantization_config": how, "device_map": {"": pick_device(device)}}


def _has_tokenizer(path: str) -> bool:
    """Whether a folder has one; a hub id does."""
    return not Path(path).is_dir() or any(Path(path).glob("*token*"))


def _no_words() -> Any:
    """A tokenizer that knows an end of sequence only."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<eos>": 0}, unk_token="<eos>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", pad_token="<eos>")


def assemble(
    net: Any,
    tokenizer: Any,
    *,
    device: str = "auto",
    seed: int = 0,
    adapter: str = "none",
    adapters: Mapping[str, Mapping[str, Any]] | None = None,
) -> Model:
    """Make a network ready for stages: padding and end-of-sequence tokens, adapter, device.

    What is drawn anew (an added token's embedding, the adapter) follows from `seed`.
    """
    torch.manual_seed(seed)
    _complete(net, tokenizer)
    config = net.config
    if adapter != "none":
        net = add_adapter(
            net, adapter, dict(adapters or {}), seq2seq=bool(config.is_encoder_decoder)
        )
    where = pick_device(device)
    start = None
    if config.is_encoder_decoder:
        start = getattr(config, "decoder_start_token_id", None)
        start = tokenizer.pad_token_id if start is None else start  # as T5 does
    layout = Layout(pad_token_id=tokenizer.pad_token_id, device=where, decoder_start_token_id=start)
    made = Model(net.to(where), tokenizer, layout, context_of(config))
    if hasattr(made.net, "virtual"):
        made.set_prompt_prefix(())
        layout = made.layout
    if not layout.seq2seq:
        flat, made.last_layer = detect_packing_support(made.net)
        made.layout = replace(layout, packed=flat)
        if not flat and is_main_process():
            print(
                f"{config.model_type}: its attention cannot read several examples as one row; "
                "batches are padded",
                file=sys.stderr,
            )
    return made


def reader(tokenizer: Any, context: int | None, *, seq2seq: bool = False) -> Model:
    """A model without its network: it tokenises as the whole one would."""
    _close(tokenizer)
    return Model(
        None,
        tokenizer,
        Layout(tokenizer.eos_token_id, torch.device("cpu"), 0 if seq2seq else None),
        context,
    )


def context_of(config: Any) -> int | None:
    """The most positions that a network of this configuration has; None if unbounded."""
    context = getattr(config, "max_position_embeddings", None) or getattr(
        config, "n_positions", None
    )
    return None if config.is_encoder_decoder else context


def _close(tokenizer: Any) -> None:
    """A tokenizer without an end-of-sequence token gets one."""
    if tokenizer.eos_token_id is None:
        tokenizer.add_special_tokens({"eos_token": "<|endoftext|>"})


def _complete(net: Any, tokenizer: Any) -> None:
    """An end-of-sequence token where there is none, and the model its embedding; padding defaults
    to it.
    """
    from transformers import GenerationConfig

    _close(tokenizer)
    if len(tokenizer) > net.get_input_embeddings().num_embeddings:
        net.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    net.config.eos_token_id = tokenizer.eos_token_id
    net.config.pad_token_id = tokenizer.pad_token_id
    # A model's own generation settings (sampling, a repetition penalty) would change the greedy
    # answers.
    net.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=getattr(net.config, "bos_token_id", None),
        decoder_start_token_id=getattr(net.config, "decoder_start_token_id", None),
    )


def add_adapter(net: Any, kind: str, adapters: dict[str, Any], *, seq2seq: bool) -> Any:
    """The network with a new peft adapter of this kind, the only part of it that trains from now
    on.
    """
    import peft

    if kind not in adapters:
        raise ConfigError(unknown("model.adapter", kind, ["none", *adapters]))
    settings = {
        k: list(v) if isinstance(v, Sequence) and not isinstance(v, str) else v
        for k, v in adapters[kind].items()
    }
    task_type = peft.TaskType.SEQ_2_SEQ_LM if seq2seq else peft.TaskType.CAUSAL_LM
    try:
        config = peft.get_peft_config(
            {"peft_type": kind.upper(), "task_type": task_type, **settings}
        )
        virtual = config.peft_type == peft.PeftType.PROMPT_TUNING
        if config.is_prompt_learning and not virtual:
            raise ValueError(
                "it adds more than embeddings of virtual tokens, as prompt_tuning does"
            )
        with warnings.catch_warnings():
            # peft asks transformers by a name that it is about to lose, and tells what it has
            # itself put right.
            warnings.filterwarnings(
                "ignore", ".*is_gradient_checkpointing. is deprecated", FutureWarning
            )
            warnings.filterwarnings(
                "ignore", "fan_in_fan_out is set to False but .* Setting fan_in_fan_out to True"
            )
            return (
                prompted(net, config, seq2seq=seq2seq)
                if virtual
                else peft.get_peft_model(net, config)
            )
    except (ValueError, TypeError, KeyError) as e:
        raise ConfigError(
            f"model.adapter={kind} cannot be used: {e}; see model.adapters.{kind}"
        ) from e
