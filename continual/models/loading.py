"""Load causal and encoder-decoder language models, with tokenizer and adapter."""

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
from continual.models.virtual_tokens import add_prompt_tuning
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
    load_network: bool = True,
    random_weights: bool = False,
    quantize: str = "none",
    **_: Any,
) -> Model:
    """Load a hub id or local folder through the Auto classes of transformers.

    The model's config says whether it is causal or encoder-decoder. `adapter` names one of
    `adapters` (lora or another peft type, with its settings); "none" is full fine-tuning. With
    `quantize="4bit"` the weights are held in 4 bits, and only an adapter trains. With
    `random_weights` only config.json is needed. Without `load_network` no weights are read: the
    model only tokenizes. Raises MissingError if it cannot be loaded, and
    ConfigError for an unknown adapter or dtype, or if 4 bits are not possible.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

    if dtype not in DTYPES:
        raise ConfigError(unknown("model.dtype", dtype, DTYPES))
    if quantize != "none":
        _check_quantize(quantize, adapter, random_weights)
    if name.startswith((".", "/", "~")) and not Path(name).expanduser().is_dir():
        raise MissingError(
            f"model.name={name}: no such folder; give a folder with config.json and safetensors "
            "weights, or a hub id"
        )
    path = str(Path(name).expanduser()) if name.startswith("~") else name
    source_options: dict[str, Any] = {
        "pretrained_model_name_or_path": path,
        "trust_remote_code": trust_remote_code,
    }
    try:
        config = AutoConfig.from_pretrained(**source_options)
        kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        if random_weights and not _has_tokenizer(path):
            tokenizer = _make_empty_tokenizer()
        else:
            tokenizer = AutoTokenizer.from_pretrained(**source_options)
        if random_weights:
            net = kind.from_config(config, dtype=DTYPES[dtype], trust_remote_code=trust_remote_code)
        elif load_network:
            net, report = kind.from_pretrained(
                **source_options,
                dtype=DTYPES[dtype],
                use_safetensors=True,
                output_loading_info=True,
                **_quantization_options(quantize, dtype, device),
            )
            for module in net.modules():
                # On a CPU bitsandbytes would repack the weights for inference for good, and no
                # gradient passes through the repacked form.
                if hasattr(module, "support_avx512bf16_for_cpu"):
                    module.support_avx512bf16_for_cpu = False
            absent = sorted(report["missing_keys"])
            if absent:
                raise ValueError(
                    f"its weights lack {listed(absent, 3)}, which would be initialised at random."
                )
    except Exception as e:  # each library raises its own errors for damaged files
        first = next(iter(str(e).splitlines()), "") or repr(e)
        raise MissingError(
            f"model.name={name} could not be loaded: {first} Give a local folder with "
            "config.json, tokenizer and safetensors weights, or a hub id that can be reached"
        ) from e
    if not load_network:
        return make_tokenizing_model(
            tokenizer, context_length(config), seq2seq=bool(config.is_encoder_decoder)
        )
    return assemble(net, tokenizer, device=device, seed=seed, adapter=adapter, adapters=adapters)


def _check_quantize(quantize: str, adapter: str, random_weights: bool) -> None:
    if quantize != "4bit":
        raise ConfigError(unknown("model.quantize", quantize, ["none", "4bit"]))
    if random_weights:
        raise ConfigError(
            "continual plan cannot estimate model.quantize=4bit: it counts weights in model.dtype; "
            "plan with model.quantize=none"
        )
    if adapter == "none":
        raise ConfigError(
            "model.quantize=4bit: weights in 4 bits cannot be trained; set model.adapter=lora, or "
            "model.quantize=none"
        )
    missing = [name for name in ("bitsandbytes", "accelerate") if not find_spec(name)]
    if missing:
        raise ConfigError(
            f"model.quantize=4bit needs {' and '.join(missing)}; install the extra: uv sync "
            f"--extra quantize, or pip install {' '.join(missing)}"
        )


def _quantization_options(quantize: str, dtype: str, device: str) -> dict[str, Any]:
    """Return the options with which `transformers` quantizes weights as it loads them."""
    if quantize == "none":
        return {}
    from transformers import BitsAndBytesConfig

    # NormalFloat with double quantization: QLoRA (Dettmers et al. 2023, section 3).
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=DTYPES[dtype],
    )
    return {"quantization_config": quantization, "device_map": {"": pick_device(device)}}


def _has_tokenizer(path: str) -> bool:
    """Return True if a folder has tokenizer files; a hub id is taken to have them."""
    return not Path(path).is_dir() or any(Path(path).glob("*token*"))


def _make_empty_tokenizer() -> Any:
    """Return a tokenizer whose only token is the end of sequence."""
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
    """Prepare a network for training: padding and end-of-sequence tokens, adapter, device.

    `seed` decides what is initialised at random: an added token's embedding, the adapter.
    """
    torch.manual_seed(seed)
    _add_special_tokens(net, tokenizer)
    config = net.config
    if adapter != "none":
        net = add_adapter(
            net, adapter, dict(adapters or {}), seq2seq=bool(config.is_encoder_decoder)
        )
    start = None
    if config.is_encoder_decoder:
        start = getattr(config, "decoder_start_token_id", None)
        start = tokenizer.pad_token_id if start is None else start  # as T5 does
    torch_device = pick_device(device)
    layout = Layout(
        pad_token_id=tokenizer.pad_token_id, device=torch_device, decoder_start_token_id=start
    )
    model = Model(net.to(torch_device), tokenizer, layout, context_length(config))
    if hasattr(model.net, "virtual"):
        model.set_prompt_prefix(())

    if not layout.seq2seq:
        packed, model.last_layer = detect_packing_support(model.net)
        model.layout = replace(model.layout, packed=packed)
        if not packed and is_main_process():
            print(
                f"{config.model_type}: its attention cannot read several examples in one packed "
                "row; batches are padded",
                file=sys.stderr,
            )
    return model


def make_tokenizing_model(tokenizer: Any, context: int | None, *, seq2seq: bool = False) -> Model:
    """Return a model without a network, which tokenizes as the complete one would."""
    _add_eos_token(tokenizer)
    return Model(
        None,
        tokenizer,
        Layout(tokenizer.eos_token_id, torch.device("cpu"), 0 if seq2seq else None),
        context,
    )


def context_length(config: Any) -> int | None:
    """Return the number of positions of a network with this configuration; None if unbounded."""
    if config.is_encoder_decoder:
        return None
    length: int | None = getattr(config, "max_position_embeddings", None)
    return length or getattr(config, "n_positions", None)


def _add_eos_token(tokenizer: Any) -> None:
    """Give a tokenizer an end-of-sequence token if it has none."""
    if tokenizer.eos_token_id is None:
        tokenizer.add_special_tokens({"eos_token": "<|endoftext|>"})


def _add_special_tokens(net: Any, tokenizer: Any) -> None:
    """Add an end-of-sequence token and its embedding if there is none; pad with it by default."""
    from transformers import GenerationConfig

    _add_eos_token(tokenizer)
    if len(tokenizer) > net.get_input_embeddings().num_embeddings:
        net.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    net.config.eos_token_id = tokenizer.eos_token_id
    net.config.pad_token_id = tokenizer.pad_token_id
    # The model's generation settings (sampling, repetition penalty) would change greedy answers.
    net.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=getattr(net.config, "bos_token_id", None),
        decoder_start_token_id=getattr(net.config, "decoder_start_token_id", None),
    )


def add_adapter(net: Any, kind: str, adapters: dict[str, Any], *, seq2seq: bool) -> Any:
    """Return the network with a new peft adapter, the only part that trains from then on.

    Raises ConfigError for an adapter that `adapters` does not list or peft refuses.
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
            # peft uses a deprecated name of transformers, and reports a setting that it corrects.
            warnings.filterwarnings(
                "ignore", ".*is_gradient_checkpointing. is deprecated", FutureWarning
            )
            warnings.filterwarnings(
                "ignore", "fan_in_fan_out is set to False but .* Setting fan_in_fan_out to True"
            )
            if virtual:
                return add_prompt_tuning(net, config, seq2seq=seq2seq)
            return peft.get_peft_model(net, config)
    except (ValueError, TypeError, KeyError) as e:
        raise ConfigError(
            f"model.adapter={kind} cannot be used: {e}; see model.adapters.{kind}"
        ) from e
