"""What the benchmarks share: arms timed step by step in turn, executed FLOPs, peak memory, rows and
their table.

A row says what one arm did on one work: {"benchmark", "work", "arm", "median_s", "examples_per_s",
"peak_bytes" (above the loaded model; None where it was not measured), "ratio_to": {peer: x}} and
whatever else the benchmark shows. A ratio to "PEER" compares examples a second, more is better; one
to "PEER time" or "PEER memory" compares cost.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop, sdpa_flop

Row = dict[str, Any]
Step = Callable[[], Any]
SHOWN = ("work", "arm", "median_s", "examples_per_s", "peak_bytes", "ratio_to")
PACKAGES = ("transformers", "peft", "trl", "accelerate", "learn2learn", "avalanche-lib")


@dataclass
class Asked:
    """What the command line asked of every benchmark."""

    data: Path | None = None  # a stream folder; without one the rows are synthetic
    gpu: bool = False

    @property
    def device(self) -> torch.device:
        """Where all arms run."""
        return torch.device("cuda" if self.gpu else "cpu")


ASKED = Asked()


def row(
    benchmark: str,
    work: str,
    arm: str,
    median_s: float,
    examples: int,
    peak_bytes: int | None = None,
    ratio_to: Mapping[str, float] | None = None,
    **more: Any,
) -> Row:
    """One row; `examples` is how many of them a step of `median_s` seconds takes."""
    return {
        "benchmark": benchmark,
        "work": work,
        "arm": arm,
        "median_s": median_s,
        "examples_per_s": examples / median_s,
        "peak_bytes": peak_bytes,
        "ratio_to": dict(ratio_to or {}),
        **more,
    }


def ratios(
    arm: str, peers: Sequence[str], took: Mapping[str, float], memory: Mapping[str, int | None]
) -> dict[str, float]:
    """One arm's against each of the other arms that are peers: examples a second, and memory where
    it was measured.
    """
    found: dict[str, float] = {}
    for peer in (p for p in peers if p in took and p != arm):
        found[peer] = took[peer] / took[arm]
        if (ours := memory.get(arm)) and (theirs := memory.get(peer)):
            found[f"{peer} memory"] = ours / theirs
    return found


def synchronize() -> None:
    """Wait for the accelerator, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def timed(step: Step) -> float:
    """The seconds of one step."""
    synchronize()
    began = time.perf_counter()
    step()
    synchronize()
    return time.perf_counter() - began


def interleaved(
    arms: Mapping[str, Step], *, seconds: float, least: int = 5, most: int = 60, warmup: int = 1
) -> dict[str, list[float]]:
    """The seconds of each arm's steps, in rounds of one step an arm, each round begun by another
    arm.

    Rounds go on for `seconds`, but are at least `least` and at most `most`. Whatever else the
    machine does meanwhile falls on all arms alike, so ratios of medians are sound where the medians
    themselves are not.
    """
    names = list(arms)
    for _ in range(warmup):
        for name in names:
            arms[name]()
    gc.collect()
    spent: dict[str, list[float]] = {name: [] for name in names}
    began = time.perf_counter()
    for i in range(most):
        if i >= least and time.perf_counter() - began > seconds:
            break
        first = i % len(names)
        for name in names[first:] + names[:first]:
            spent[name].append(timed(arms[name]))
    return spent


def medians(spent: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Each arm's median."""
    return {name: statistics.median(s) for name, s in spent.items()}


def matmul(dtype: torch.dtype, device: torch.device) -> tuple[Step, int]:
    """A large matrix product, the peak that a step is measured against: (one product, its FLOPs)."""
    n = 2048 if device.type == "cpu" else 8192
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    return lambda: a @ b, 2 * n**3


def flops(step: Step) -> int:
    """The FLOPs of the matrix products and attention that one step executes, forward and backward.

    They are counted as they run, so what needs no gradient (the weights below an adapter, positions
    dropped before the LM head) costs nothing here. On a CPU causal attention counts the half that
    it needs, on a GPU all of it.
    """

    def forward(
        q: Any, k: Any, v: Any, dropout: float = 0.0, causal: bool = False, *_: Any, **__: Any
    ) -> int:
        return sdpa_flop(q, k, v) // (1 + causal)

    def backward(
        g: Any,
        q: Any,
        k: Any,
        v: Any,
        out: Any,
        norm: Any,
        dropout: float = 0.0,
        causal: bool = False,
        *_: Any,
        **__: Any,
    ) -> int:
        return sdpa_backward_flop(g, q, k, v) // (1 + causal)

    aten = torch.ops.aten
    exact = {
        aten._scaled_dot_product_flash_attention_for_cpu: forward,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: backward,
    }
    with FlopCounterMode(display=False, custom_mapping=exact) as counter:
        step()
    return counter.get_total_flops()


def peaks(
    loads: Mapping[str, tuple[Any, ...]], build: Callable[..., Step], steps: int = 2
) -> dict[str, int | None]:
    """The peak memory above the loaded model of `build(*arguments)` and a few of its steps, each in
    its own process.

    `build` must be importable.
    """
    return apart(
        {name: (peak, build, arguments, steps) for name, arguments in loads.items()},
        build.__module__,
        1 if ASKED.gpu else 2,
    )


def apart(calls: Mapping[str, tuple[Any, ...]], module: str, at_once: int = 1) -> dict[str, Any]:
    """What each call, an importable function and its arguments, returns in a process of its own.

    The processes are forked from one that has imported the peers and run nothing, and are asked for
    the same rows.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([module, "peft", "transformers"])
    threads = max(1, torch.get_num_threads() // at_once)
    with ProcessPoolExecutor(
        at_once,
        mp_context=context,
        max_tasks_per_child=1,
        initializer=_ask,
        initargs=(threads, ASKED.data, ASKED.gpu),
    ) as pool:
        waiting = {name: pool.submit(*call) for name, call in calls.items()}
        return {name: found.result() for name, found in waiting.items()}


def _ask(threads: int, data: Path | None, gpu: bool) -> None:
    """Set up a process as this one is."""
    torch.set_num_threads(threads)
    ASKED.data, ASKED.gpu = data, gpu


def peak(build: Callable[..., Step], arguments: tuple[Any, ...], steps: int) -> int | None:
    """How far memory grows in the steps, above what it is once built; None where the system does
    not tell.

    What a process maps at its first step, whatever the model (kernels, caches), is part of it: some
    20 MB on a CPU.
    """
    step = build(*arguments)
    gc.collect()
    if torch.cuda.is_initialized():  # the arm runs there
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        for _ in range(steps):
            step()
        return torch.cuda.max_memory_allocated() - before
    if sys.platform != "linux":
        return None
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts from here
    before = resident("VmRSS")
    for _ in range(steps):
        step()
    return resident("VmHWM") - before


def resident(field: str) -> int:
    """A size in bytes from this process's status."""
    told = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(told[field].split()[0]) * 1024


def machine() -> str:
    """The machine and what runs on it, in one line."""
    cpu = platform.processor() or platform.machine()
    if (info := Path("/proc/cpuinfo")).exists():
        named = (line for line in info.read_text().splitlines() if line.startswith("model name"))
        cpu = next((line.split(":", 1)[1].strip() for line in named), cpu)
    parts = [f"{cpu}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"]
    if ASKED.gpu:
        parts.insert(0, torch.cuda.get_device_name())
    parts.append(f"Python {platform.python_version()}, torch {torch.__version__}")
    for package in PACKAGES:
        try:
            parts.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return ", ".join(parts)


def table(rows: Sequence[Row]) -> str:
    """The rows as a markdown table."""
    keys = list(dict.fromkeys(chain(SHOWN, *rows)))
    keys.remove("benchmark")
    lines = ["| " + " | ".join(_heading(k) for k in keys) + " |", "|---" * len(keys) + "|"]
    lines += ["| " + " | ".join(_cell(k, r.get(k)) for k in keys) + " |" for r in rows]
    return "\n".join(lines) + "\n"


def _heading(key: str) -> str:
    return {
        "median_s": "ms a step",
        "examples_per_s": "examples/s",
        "peak_bytes": "MB above the model",
        "ratio_to": "ratio to",
    }.get(key, key.replace("_per_s", "/s").replace("_", " "))


def _cell(key: str, value: Any) -> str:
    if value is None:
        return ""
    if key == "median_s":
        return f"{value * 1e3:.1f}"
    if key == "peak_bytes":
        return f"{value / 1e6:.1f}"
    if isinstance(value, dict):
        return ", ".join(f"{k} {v:.2f}" for k, v in value.items())
    if isinstance(value, float):
        return f"{value:.3g}" if value < 100 else f"{value:.0f}"
    return str(value)
