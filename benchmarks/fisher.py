"""The diagonal Fisher of 256 examples: ours, a loop of one example at a time, and Avalanche's EWC at batch size 1.

All three give the same numbers, which is checked before anything is timed.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from continual.attention import reads_flat_rows
from continual.data import Encoded
from continual.importance import fisher, fisher_by_example
from continual.model import Model, adapt_with
from continual.packing import Layout
from continual.weights import Weights

VOCABULARY = 8192
LORA = {"lora": {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]}}
Row = dict[str, Any]


def model(adapter: str, device: str) -> Model:
    """A Llama of 3M parameters, its head tied to its embedding; LoRA's second half away from its zeros."""
    import transformers

    torch.manual_seed(0)
    net: Any = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=192, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4,
        max_position_embeddings=512, tie_word_embeddings=True, bos_token_id=None, eos_token_id=0, pad_token_id=1))
    if adapter != "none":
        net = adapt_with(net, adapter, LORA, seq2seq=False)
        for name, p in net.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(p, std=0.02)
    net = net.eval().to(device)
    return Model(net, None, Layout(pad=1, device=torch.device(device), flat=reads_flat_rows(net)))


def examples(n: int) -> list[Encoded]:
    """Random tokens of the lengths of news: an instruction of 35, an article of some 60, a label and its end."""
    rng = random.Random(0)

    def one(i: int) -> Encoded:
        prompt, response = 35 + min(160, max(20, round(rng.gauss(60, 16)))), rng.choice((2, 2, 2, 4))
        ids = tuple(rng.randrange(2, VOCABULARY) for _ in range(prompt + response))
        return Encoded(str(i), 0, ids, (False,) * prompt + (True,) * response)

    return [one(i) for i in range(n)]


def avalanche(made: Model, chosen: list[Encoded]) -> Callable[[], Weights]:
    """EWCPlugin.compute_importances at batch size 1, on the same summed log-likelihood of the same response tokens."""
    from avalanche.training.plugins import EWCPlugin

    class Logits(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = made.net

        def forward(self, ids: Tensor) -> Tensor:
            logits: Tensor = self.net(input_ids=ids, use_cache=False).logits
            return logits.transpose(1, 2)

    def data() -> list[tuple[Tensor, Tensor, Tensor]]:
        return [(torch.tensor(e.ids[:-1]),
                 torch.tensor([y if r else -100 for y, r in zip(e.ids[1:], e.response[1:], strict=True)]),
                 torch.tensor(0)) for e in chosen]

    plugin, module, rows = EWCPlugin(ewc_lambda=1.0), Logits(), data()
    loss = torch.nn.CrossEntropyLoss(ignore_index=-100, reduction="sum")
    optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.1)
    trainable = {n for n, p in made.net.named_parameters() if p.requires_grad}

    def measure() -> Weights:
        found = plugin.compute_importances(module, loss, optimizer, rows, made.layout.device.type, batch_size=1)
        module.eval()
        optimizer.zero_grad()
        return {n.removeprefix("net."): p.data for n, p in found.items() if n.removeprefix("net.") in trainable}

    return measure


def competitors(made: Model, chosen: list[Encoded]) -> dict[str, Callable[[], Weights]]:
    """Each arm's Fisher of these examples."""
    return {"ours": lambda: fisher(made, chosen), "loop": lambda: fisher_by_example(made, chosen),
            "avalanche": avalanche(made, chosen)}


def agree(found: dict[str, Weights]) -> None:
    """Raises AssertionError where an arm's Fisher is not ours, but for rounding."""
    for arm, theirs in found.items():
        for name, f in found["ours"].items():
            apart = ((f - theirs[name]).norm() / f.norm()).item()
            assert apart < 1e-4, f"{arm} differs by {apart:.1e} in {name}"


def timed(arms: dict[str, Callable[[], Any]], device: str, rounds: int) -> dict[str, list[float]]:
    """Seconds of each arm, taken in turn."""
    seconds: dict[str, list[float]] = {arm: [] for arm in arms}
    for _ in range(rounds):
        for arm, measure in arms.items():
            gc.collect()
            start = time.perf_counter()
            measure()
            if device == "cuda":
                torch.cuda.synchronize()
            seconds[arm].append(time.perf_counter() - start)
    return seconds


def peak(measure: Callable[[], Any], device: str) -> int:
    """Bytes beyond what was there before, at the most; on a CPU those of tensors, as torch's profiler follows them."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        measure()
        return torch.cuda.max_memory_allocated() - before
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:
        measure()
    held = most = 0
    for event in sorted((e for e in run.profiler.kineto_results.events() if e.name() == "[memory]"),
                        key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def run(n: int = 256, rounds: int = 5, device: str = "cpu") -> list[Row]:
    """A row for each of LoRA and full fine-tuning and each arm; `ratio_to` is each peer's time over this arm's."""
    found, chosen = [], examples(n)
    for adapter in ("lora", "none"):
        made = model(adapter, device)
        arms, few = competitors(made, chosen), competitors(made, chosen[:16])
        agree({arm: measure() for arm, measure in few.items()})  # and a warm-up
        seconds = {arm: statistics.median(t) for arm, t in timed(arms, device, rounds).items()}
        for arm, s in seconds.items():
            # On a CPU following every allocation is slow: 16 examples show what one chunk or one example takes.
            bytes_ = peak((arms if device == "cuda" else few)[arm], device)
            found.append({"benchmark": "fisher", "work": f"3M {'full' if adapter == 'none' else adapter}, {n} examples",
                          "arm": arm, "median_s": s, "examples_per_s": n / s, "peak_bytes": bytes_,
                          "ratio_to": {peer: t / s for peer, t in seconds.items() if peer != arm}})
    return found


def main() -> None:
    """Print the rows, and write them where --json says."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--examples", type=int, default=256)
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    options.add_argument("--json", type=Path)
    asked = options.parse_args()
    rows = run(asked.examples, asked.rounds, asked.device)
    for row in rows:
        ratios = ", ".join(f"{r:.2f} of {peer}" for peer, r in row["ratio_to"].items())
        print(f"{row['work']:24} {row['arm']:10} {row['median_s']:7.2f} s {row['examples_per_s']:7.1f} examples/s "
              f"{row['peak_bytes'] / 2**20:7.1f} MiB   speed against: {ratios}")
    if asked.json:
        asked.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
