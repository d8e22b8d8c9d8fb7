"""Build a small language model from scratch: train its tokenizer, pre-train it, cache it."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from continual.data.template import Encoder
from continual.data.types import Encoded, Example, Stream, Task
from continual.distributed.processes import main_process_first
from continual.errors import ConfigError
from continual.io.atomic import write_folder_atomically
from continual.models.loading import assemble, make_tokenizing_model
from continual.models.model import Model
from continual.strategy.interface import Strategy
from continual.tracking.events import EventLog
from continual.training.recipe import Recipe
from continual.training.stage import train_stage

CACHE_VERSION = 2  # raise it with every change of this code that gives other weights
EOS_TOKEN = "<|endoftext|>"


def load_or_build_llama(
    *,
    stream: Stream,
    hidden_size: int,
    layers: int,
    heads: int,
    context_length: int,
    vocab_size: int,
    pretrain: Any,
    attention: str = "sdpa",
    seed: int = 0,
    weights_seed: int = 0,
    device: str = "auto",
    adapter: str = "none",
    adapters: Mapping[str, Mapping[str, Any]] | None = None,
    load_network: bool = True,
    random_weights: bool = False,
) -> Model:
    """Load a Llama of this shape for this stream from the user's cache, or build it.

    The tokenizer is a byte-level BPE of `vocab_size` tokens trained on the stream's training text.
    With `pretrain.tokens` above 0 the model is first trained on that many tokens: of the stream's
    own pre-training examples or, if it has none, of the training rows' instructions and inputs,
    without their answers; only the inputs have a loss. With `random_weights` the weights stay
    random. Without `load_network` only the tokenizer is made. Neither of the two is cached.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    shape = {
        "hidden": hidden_size,
        "layers": layers,
        "heads": heads,
        "context": context_length,
        "vocabulary": vocab_size,
    }
    if hidden_size % heads:
        raise ConfigError(
            f"model.hidden_size={hidden_size} is not a multiple of model.heads={heads}; change one "
            "of them"
        )
    tasks = sorted(stream.tasks, key=lambda t: t.name)  # the same model for every task order
    corpus = [*(e for t in tasks for e in t.train), *stream.pretraining]
    if random_weights:
        tokenizer = train_byte_bpe(corpus, vocab_size, context_length)
        return assemble(
            _make_llama(tokenizer, shape, attention, weights_seed),
            tokenizer,
            device=device,
            seed=seed,
            adapter=adapter,
            adapters=adapters,
        )
    cache_key = {
        "version": CACHE_VERSION,
        **shape,
        "pretrain": dict(pretrain),
        "attention": attention,
        "seed": weights_seed,
        "text": _hash_corpus(corpus),
        "torch": torch.__version__,
    }
    digest = hashlib.sha256(json.dumps(cache_key, sort_keys=True).encode()).hexdigest()
    folder = cache_dir() / "models" / digest[:16]

    if not load_network:
        if folder.exists():  # use the cached model's own tokenizer
            tokenizer = AutoTokenizer.from_pretrained(folder)
        else:
            tokenizer = train_byte_bpe(corpus, vocab_size, context_length)
        return make_tokenizing_model(tokenizer, context_length)

    with main_process_first():
        if not folder.exists():
            with _build_lock(folder):
                if not folder.exists():
                    _build_and_save(
                        folder, stream, corpus, shape, pretrain, attention, weights_seed, device
                    )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    net = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation=attention
    )
    return assemble(net, tokenizer, device=device, seed=seed, adapter=adapter, adapters=adapters)


def cache_dir() -> Path:
    """Return the user's folder for files that can be built again."""
    import platformdirs

    return Path(platformdirs.user_cache_dir("continual"))


@contextmanager
def _build_lock(folder: Path) -> Iterator[None]:
    """Wait while another process builds the same model; the lock ends with its process."""
    import fcntl

    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_name(f"{folder.name}.lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _hash_corpus(examples: Sequence[Example]) -> str:
    digest = hashlib.sha256()
    for e in examples:
        digest.update(repr((e.instruction, e.input, e.outputs, e.messages)).encode())
    return digest.hexdigest()


def _build_and_save(
    folder: Path,
    stream: Stream,
    corpus: Sequence[Example],
    dimensions: Mapping[str, int],
    pretrain: Any,
    attention: str,
    seed: int,
    device: str,
) -> None:
    """Build the model and write it to `folder`, unless another machine has done so meanwhile."""
    tokenizer = train_byte_bpe(corpus, dimensions["vocabulary"], dimensions["context"])
    model = assemble(_make_llama(tokenizer, dimensions, attention, seed), tokenizer, device=device)
    with write_folder_atomically(folder, keep_existing=True) as temporary:
        if pretrain["tokens"]:
            _pretrain(model, stream, pretrain, seed, dimensions["context"], temporary)
        model.net.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)


def train_byte_bpe(corpus: Sequence[Example], vocab_size: int, context_length: int) -> Any:
    """Train a byte-level BPE tokenizer of at most `vocab_size` tokens on the corpus."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    # With the space, the first word of an answer is the same token as that word within a text.
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS_TOKEN],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    bpe.train_from_iterator(
        (_prompt_text(e) + "\n" + "\n".join(e.outputs) for e in corpus), trainer
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=EOS_TOKEN,
        pad_token=EOS_TOKEN,
        model_max_length=context_length,
    )


def _make_llama(tokenizer: Any, dimensions: Mapping[str, int], attention: str, seed: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=dimensions["hidden"],
        intermediate_size=3 * dimensions["hidden"],
        num_hidden_layers=dimensions["layers"],
        num_attention_heads=dimensions["heads"],
        num_key_value_heads=dimensions["heads"],
        max_position_embeddings=dimensions["context"],
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        attn_implementation=attention,
    )
    return LlamaForCausalLM(config)


def _pretrain(
    model: Model, stream: Stream, pretrain: Any, seed: int, context: int, folder: Path
) -> None:
    """Pre-train in one naive stage; events go to `folder`."""
    encoder = Encoder(model.tokenizer, "plain", context)
    if stream.pretraining:
        examples = [encoder.encode_example(e, 0).require() for e in stream.pretraining]
    else:
        rows = [e for t in sorted(stream.tasks, key=lambda t: t.name) for e in t.train]
        random.Random(seed).shuffle(rows)
        examples = [_encode_plain_text(e, encoder) for e in rows]
    settings = dict(pretrain)
    total_tokens = sum(len(e.ids) for e in examples)
    steps = settings.pop("tokens") * len(examples) // (total_tokens * settings["batch_size"])
    recipe = Recipe(**settings, steps=max(1, steps))
    num_parameters = sum(p.numel() for p in model.net.parameters())
    console = Console(stderr=True)
    console.print(
        f"Building a model of {num_parameters / 1e6:.1f}M parameters for stream "
        f"{stream.name!r}, once; it is kept in {folder.parent}",
        highlight=False,
    )
    with EventLog(folder / "events.jsonl", console) as events:
        train_stage(
            model, Task("pretraining", examples), Strategy(), recipe, seed=seed, log_event=events
        )


def _prompt_text(e: Example) -> str:
    """Return the text of the prompt, without the answer."""
    contents = [m.content for m in e.messages if m.role != "assistant"]
    return "\n".join(contents) if contents else f"{e.instruction}\n{e.input}"


def _encode_plain_text(e: Example, encoder: Encoder) -> Encoded:
    """Encode a row's prompt as text to learn, cut to the context; the answer is left out.

    If the row has an input, only the input has a loss; the instruction stands before it.
    """
    text = [*encoder.tokenize(e.input or _prompt_text(e)), encoder.tokenizer.eos_token_id]
    text = text[: encoder.max_tokens]
    instruction: list[int] = []
    if e.input:
        instruction = encoder.tokenize(f"{e.instruction}\n")[: encoder.max_tokens - len(text)]
    mask = (False,) * len(instruction) + (True,) * len(text)
    return Encoded(e.id, 0, (*instruction, *text), mask)
