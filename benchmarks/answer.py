"""Answers a second: ours against `transformers`' `generate` with batch 16 and left padding, greedy, on one model.

    python -m benchmarks.answer [--data STREAM_FOLDER] [--task agnews] [--rounds 5] [--json PATH]

The model is a Llama of 3M random weights (192 wide, 4 layers, 6 heads, a vocabulary of 8000). Random weights hardly
ever end an answer, so every answer has 4 tokens, as the task's labels have. Without --data the prompts are drawn from
a Zipf vocabulary with the lengths of the agnews prompts. `long instruction` puts 150 tokens before every prompt.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from continual.answer import answer
from continual.data import Encoded
from continual.model import Model, assemble

VOCABULARY, NEW, PROMPTS = 8000, 4, 192


def model(device: str = "cpu") -> Model:
    """3M random weights, and a tokenizer whose words are w0, w1, ..."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<eos>": 0, **{f"w{i}": i for i in range(1, VOCABULARY)}}, "w1"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", pad_token="<eos>")
    torch.manual_seed(0)
    net = LlamaForCausalLM(LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=192, intermediate_size=576, num_hidden_layers=4, num_attention_heads=6,
        max_position_embeddings=1024, tie_word_embeddings=True, eos_token_id=0, pad_token_id=0, bos_token_id=None))
    made = assemble(net, tokenizer, device=device)
    made.net.eval()
    return made


def synthetic(n: int = PROMPTS) -> list[list[int]]:
    """Prompts of an instruction and a text, with the lengths that the agnews prompts have."""
    rng = random.Random(0)
    weights = [1 / rank for rank in range(1, VOCABULARY)]

    def draw(length: int) -> list[int]:
        return rng.choices(range(1, VOCABULARY), weights, k=length)

    instruction = draw(25)
    return [instruction + draw(min(150, max(20, round(rng.lognormvariate(4.0, 0.35))))) for _ in range(n)]


def of_task(folder: Path, task: str, n: int = PROMPTS) -> list[list[int]]:
    """The first dev prompts of a stream folder's task, by a byte-level BPE trained on that task's train rows."""
    from tokenizers import ByteLevelBPETokenizer

    def prompts(split: str) -> list[str]:
        rows = map(json.loads, (folder / task / f"{split}.jsonl").read_text("utf-8").splitlines())
        return [f"{row['instruction']}\n{row.get('input', '')}\n" for row in rows]

    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(prompts("train"), VOCABULARY - 1, show_progress=False)
    return [[1 + i for i in e.ids] for e in bpe.encode_batch(prompts("dev")[:n])]


def generated(made: Model, prompts: Sequence[Encoded], batch: int) -> list[str]:
    """The peer: left-padded batches of prompts as they come."""
    said: list[str] = []
    for start in range(0, len(prompts), batch):
        part = [p.ids for p in prompts[start : start + batch]]
        longest, device = max(map(len, part)), made.layout.device
        ids = torch.tensor([[0] * (longest - len(p)) + [*p] for p in part], device=device)
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in part], device=device)
        with torch.inference_mode():
            out = made.net.generate(input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=NEW)
        texts = made.tokenizer.batch_decode(out[:, longest:], skip_special_tokens=True)
        said += [text.strip() for text in texts]
    return said


def compared(work: str, made: Model, ids: Sequence[Sequence[int]], rounds: int) -> list[dict[str, Any]]:
    """Both arms in turn, `rounds` times after one to warm up; raises RuntimeError if they answer differently."""
    prompts = [Encoded(str(i), 0, tuple(p), (False,) * len(p)) for i, p in enumerate(ids)]
    arms: dict[str, Callable[[], list[str]]] = {
        "ours": lambda: answer(made, prompts, NEW, 128), "generate": lambda: generated(made, prompts, 16)}
    said = {arm: play() for arm, play in arms.items()}
    apart = sum(a != b for a, b in zip(said["ours"], said["generate"], strict=True))
    if apart:
        raise RuntimeError(f"{work}: {apart} of {len(prompts)} answers differ from those of generate")
    seconds: dict[str, list[float]] = {arm: [] for arm in arms}
    peak: dict[str, int] = {}
    for _ in range(rounds):
        for arm, play in arms.items():
            began = time.perf_counter()
            play()
            _finish(made)
            seconds[arm].append(time.perf_counter() - began)
            peak[arm] = _peak(made)
    median = {arm: statistics.median(s) for arm, s in seconds.items()}
    return [{"benchmark": "answer", "work": work, "arm": arm, "median_s": median[arm],
             "examples_per_s": len(prompts) / median[arm], "peak_bytes": peak[arm],
             "ratio_to": {peer: median[peer] / median[arm] for peer in arms if peer != arm}} for arm in arms]


def _finish(made: Model) -> None:
    if made.layout.device.type == "cuda":
        torch.cuda.synchronize()


def _peak(made: Model) -> int:
    """The peak of memory since the last call on a GPU; on a CPU that of the process so far."""
    if made.layout.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return peak
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def run(data: Path | None = None, task: str = "agnews", rounds: int = 5, device: str = "cpu") -> list[dict[str, Any]]:
    """All rows: {benchmark, work, arm, median_s, examples_per_s, peak_bytes, ratio_to: {peer: ratio of speeds}}."""
    made = model(device)
    prompts = of_task(data, task) if data else synthetic()
    instruction = random.Random(1).choices(range(1, VOCABULARY), k=150)
    name = task if data else "synthetic"
    return [*compared(f"{name}, {NEW} tokens", made, prompts, rounds),
            *compared(f"{name}, {NEW} tokens, long instruction", made, [instruction + p for p in prompts], rounds)]


def main() -> None:
    """Print the rows, and write them where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--task", default="agnews")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)
    told = parser.parse_args()
    rows = run(told.data, told.task, told.rounds, told.device)
    for row in rows:
        ratios = ", ".join(f"{ratio:.2f} times {peer}" for peer, ratio in row["ratio_to"].items())
        print(f"{row['work']:40} {row['arm']:9} {row['examples_per_s']:8.1f} answers/s  {ratios}")
    if told.json:
        told.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
