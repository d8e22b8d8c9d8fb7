"""Small things that the engine's tests share: rows, stream folders, tokenizers and models of every
architecture.
"""

from __future__ import annotations

import io
import json
import random
from pathlib import Path

import torch

from continual.data.types import Encoded, Example
from continual.models.loading import assemble
from continual.testing.toy import make_llama

WORDS = ("red", "blue", "green", "gold", "grey", "pink", "teal", "plum")
TASKS = ("first", "last", "loud")
CHATML_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As Qwen3's: the last answer begins with what was thought, be it nothing, and earlier ones do not.
THINKING_TEMPLATE = (
    "{% set last = namespace(user=0) %}{% for m in messages if m.role == 'user' %}{% set "
    "last.user = m %}{% endfor %}{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role "
    "== 'assistant' and messages[loop.index0 - 1] == last.user and not '</think>' in m.content "
    "%}<think>\n\n</think>\n\n{{ m.content.lstrip('\n') }}{% else %}{{ m.content }}{% endif "
    "%}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% if "
    "enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% "
    "endif %}"
)


def expected_answer(task: str, words: list[str]) -> str:
    return {"first": words[0], "last": words[-1], "loud": words[0].upper()}[task]


def make_rows(task: str, n: int, offset: int = 0) -> list[dict[str, str]]:
    found = []
    for i in range(offset, offset + n):
        words = [WORDS[i % 8], WORDS[(i * 3 + i // 8 + 1) % 8]]
        found.append(
            {
                "instruction": f"Give the {task} word.",
                "input": " ".join(words),
                "output": expected_answer(task, words),
            }
        )
    return found


def write_rows(path: Path, rows: list) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


def write_stream(root: Path, tasks: tuple[str, ...] = TASKS, metric: str = "exact_match") -> Path:
    """A stream folder of 12 train, 4 dev and 4 test rows a task, with the orders `given` and
    `back`.
    """
    for task in tasks:
        for split, n, offset in (("train", 12, 0), ("dev", 4, 12), ("test", 4, 16)):
            write_rows(root / task / f"{split}.jsonl", make_rows(task, n, offset))
    index = {
        "tasks": [{"name": t, "metric": metric} for t in tasks],
        "orders": {"given": list(tasks), "back": list(tasks[::-1])},
    }
    (root / "stream.json").write_text(json.dumps(index))
    return root


def make_example(
    instruction: str = "Give the first word.", input: str = "", output="red", **more
) -> Example:
    outputs = (output,) if isinstance(output, str) else tuple(output)
    return Example(
        more.pop("id", "t/train/0"),
        more.pop("task", "t"),
        instruction,
        input,
        outputs,
        location=more.pop("where", "t/train.jsonl:1"),
        **more,
    )


def make_encoded(prompt: list[int], response: list[int], id: str = "e", task: int = 0) -> Encoded:
    return Encoded(id, task, (*prompt, *response), (False,) * len(prompt) + (True,) * len(response))


def train_byte_bpe(
    texts=(),
    size: int = 400,
    split_words: bool = True,
    eos: str | None = "<eos>",
    pad: str | None = "<pad>",
    bos: str | None = None,
    chat_template: str | None = None,
    append_eos: bool = False,
):
    """A byte-level BPE; without `split_words` merges may cross from one word or line to the next.

    It begins every text with `bos` where there is one, and ends it with `eos` if `close` (as T5's
    does).
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split_words)
    bpe.decoder = decoders.ByteLevel()
    special = [t for t in (eos, pad, bos, "<|im_start|>", "<|im_end|>") if t]
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=size,
            special_tokens=special,
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    if bos or append_eos:
        single = f"{bos + ' ' if bos else ''}$A{' ' + eos if append_eos else ''}"
        bpe.post_processor = processors.TemplateProcessing(
            single=single, special_tokens=[(t, bpe.token_to_id(t)) for t in (bos, eos) if t]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=eos,
        pad_token=pad,
        bos_token=bos,
        chat_template=chat_template,
    )


def stream_text() -> list[str]:
    return [
        f"{r['instruction']}\n{r['input']}\n{r['output']}" for t in TASKS for r in make_rows(t, 20)
    ]


def make_network(kind: str, vocabulary: int, context: int = 128, seed: int = 0):
    """A random network of a transformers architecture, a few thousand weights large."""
    import transformers as tf

    torch.manual_seed(seed)
    shape = {
        "vocab_size": vocabulary,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": context,
        "bos_token_id": None,
        "eos_token_id": 0,
        "pad_token_id": 1,
    }
    if kind == "llama":
        return make_llama(vocabulary, context, seed)
    if kind == "qwen3":
        return tf.Qwen3ForCausalLM(
            tf.Qwen3Config(**shape, intermediate_size=64, num_key_value_heads=1, head_dim=16)
        )
    if kind == "gpt2":
        return tf.GPT2LMHeadModel(
            tf.GPT2Config(
                vocab_size=vocabulary,
                n_embd=32,
                n_layer=2,
                n_head=2,
                n_positions=context,
                bos_token_id=0,
                eos_token_id=0,
            )
        )
    if kind == "opt":
        return tf.OPTForCausalLM(tf.OPTConfig(**shape, ffn_dim=64, word_embed_proj_dim=32))
    return tf.T5ForConditionalGeneration(
        tf.T5Config(
            vocab_size=vocabulary,
            d_model=32,
            d_kv=16,
            d_ff=64,
            num_layers=2,
            num_heads=2,
            dropout_rate=0.0,
            decoder_start_token_id=1,
            eos_token_id=0,
            pad_token_id=1,
        )
    )


def write_model(folder: Path, kind: str = "llama", tokenizer=None, **more) -> Path:
    """A local Hugging Face folder of a random network of this kind and its tokenizer."""
    tokenizer = tokenizer or train_byte_bpe(stream_text(), append_eos=kind == "t5")
    make_network(kind, len(tokenizer), **more).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_text_model(kind: str = "llama", tokenizer=None, dtype=torch.float32, **more):
    """A Model on the CPU, its dropout off."""
    tokenizer = tokenizer or train_byte_bpe(stream_text(), append_eos=kind == "t5")
    made = assemble(make_network(kind, len(tokenizer)).to(dtype), tokenizer, device="cpu", **more)
    made.net.eval()
    return made


def run_in_process(out: Path, keys, *more: str):
    """A run in this process; returns its matrix and all that it printed."""
    from rich.console import Console

    from continual.cli import main
    from continual.runs.run import run
    from continual.tracking import events

    events.silence_libraries()
    said = io.StringIO()
    return run(
        main.compose_config("run", [*keys, *more, f"out={out}"]), Console(file=said, width=400)
    ), said.getvalue()


def load_json_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def some(n: int, seed: int = 0, tasks: int = 1):
    """Examples of very different lengths."""
    rng = random.Random(seed)

    def ids(most):
        return [rng.randrange(5, 250) for _ in range(rng.randint(1, most))]

    return [make_encoded(ids(20), ids(12), f"e{i}", rng.randrange(tasks)) for i in range(n)]
