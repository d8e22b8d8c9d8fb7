"""Every strategy configuration, how each is switched off, and further variants, for tests over all
strategies.
"""

from __future__ import annotations

from pathlib import Path

import torch

from continual.models.model import Model
from continual.strategy.interface import Strategy
from tests.support import toy

ARRANGEMENTS = {
    "joint",
    "cumulative",
}  # of the stream, under naive: test_configs holds them to that
CONFIGS = sorted(
    {p.stem for p in (Path(__file__).parents[2] / "conf" / "strategy").glob("*.yaml")}
    - ARRANGEMENTS
)
BUFFERED = {
    "replay",
    "multitask",
    "maml",
    "reptile",
    "hard_replay",
    "inscl",
    "gem",
    "agem",
    "anil",
    "meta_sgd",
    "la_maml",
}
LORA = {"incremental_lora", "olora", "gain_lora", "slao"}  # they work on the factors of a LoRA
MOST = (
    "capacity=0.5"  # the embedded default's fraction would leave one example of these small tasks
)
VARIANTS = [
    ("replay", "replay.buffer_kind=reservoir", "replay.capacity=7", "replay.share=0.38"),
    ("ewc", "ewc.labels=sampled", "ewc.num_examples=5"),
    ("online_ewc", "online_ewc.decay=0.5"),
    ("maml", "maml.second_order=true", "maml.inner_steps=2", "maml.capacity=0.5"),
    ("maml", "maml.buffer_kind=reservoir", "maml.capacity=7"),
    ("reptile", "reptile.inner_steps=1"),
    ("gem,maml", "gem.share=0.25", "gem.capacity=0.2", "gem.sample_size=2"),
    ("anil", "anil.second_order=true", "anil.inner_optimizer=meta_sgd", "anil.inner_steps=2"),
    ("meta_sgd", "meta_sgd.second_order=true"),
    ("la_maml", "la_maml.second_order=true", "la_maml.inner_steps=2", "la_maml.capacity=7"),
    ("la_maml,ewc",),
    ("multitask", "multitask.weighting=size", "multitask.capacity=0.5"),
    ("multitask", "multitask.weighting=temperature", "multitask.capacity=0.5"),
    ("multitask", "multitask.weighting=uncertainty", "multitask.capacity=0.5"),
    ("multitask", "+multitask.weights={a:2,b:0.5}", "multitask.capacity=0.5"),
    ("der", "der.beta=0", "der.top_logits=5", "der.capacity=9", "der.minibatch_size=3"),
    ("der", "der.alpha=0"),
    ("lwf", "lwf.teacher=base", "lwf.top_logits=5", "lwf.temperature=1.0"),
    ("hard_replay", "hard_replay.criterion=forgetting", "hard_replay.capacity=7"),
    ("inscl", "inscl.capacity=7", "inscl.buffer_kind=reservoir"),
    ("lamol", "lamol.lm_weight=1.0", "lamol.top_k=5"),
    ("replay,lwf",),
    ("lwf,der",),
    ("der,ewc",),
    ("lamol,l2",),
    ("replay,ewc",),
    ("ewc,maml",),
    ("maml,ewc",),
    ("reptile,l2",),
    ("multitask,online_ewc", "multitask.weighting=uncertainty"),
    ("gem", "gem.capacity=0.5", "gem.sample_size=null", "gem.share=0.25"),
    ("gem", "gem.capacity=7", "gem.margin=0"),
    ("agem", "agem.capacity=7", "agem.buffer_kind=reservoir", "agem.sample_size=3"),
    ("ogd", "ogd.num_examples=3"),
    ("ogd,replay", "replay.capacity=0.5"),
    ("mas", "mas.num_examples=5"),
    ("olora", "olora.rank=3", "olora.lambda_2=0.1"),
    ("slao", "slao.power=0"),
    ("per_task,replay", "replay.capacity=0.5"),
    ("replay,olora", "replay.capacity=0.5", "olora.rank=2"),
    ("gain_lora", "gain_lora.rank=3", "gain_lora.hidden_size=5", "gain_lora.threshold=1"),
    ("gain_lora,olora", "gain_lora.rank=3", "olora.rank=3", "gain_lora.threshold=0.5"),
    ("replay,gain_lora", "replay.capacity=0.5", "gain_lora.rank=3", "gain_lora.threshold=0.5"),
    ("average", "average.init_from=own", "average.interpolation=0.5"),
    ("fisher_merge", "fisher_merge.init_from=base", "fisher_merge.labels=empirical"),
    ("ema,l2", "ema.init_from=merged", "ema.decay=0.3"),
    ("ties", "ties.init_from=own", "ties.density=0.5"),
    ("replay,task_arithmetic", "replay.capacity=0.5"),
    ("sparse,der", "sparse.fraction=0.3"),
    ("migu,replay",),
    ("sparse", "sparse.fraction=0.05", "sparse.protected_fraction=0.3", "sparse.labels=sampled"),
    ("progressive_prompts", "progressive_prompts.max_prompts=2"),
    ("replay,progressive_prompts", "replay.capacity=0.5"),
    ("osf", "osf.rank_share=0.9"),
    ("ewc,osf",),
    ("multitask", "multitask.conflicts=project", "multitask.capacity=0.5"),
    (
        "multitask",
        "multitask.conflicts=project",
        "multitask.weighting=uncertainty",
        "multitask.capacity=0.5",
    ),
    ("sdft", "sdft.strength=0.9", "sdft.ema_rate=0.5"),
    ("replay,sdft", "replay.capacity=0.5"),
    (
        "avalanche",
        "avalanche.plugin=EWCPlugin",
        "+avalanche.args={ewc_lambda:100,mode:online,decay_factor:0.5}",
    ),
    ("avalanche", "avalanche.plugin=RWalkPlugin", "+avalanche.args.delta_t=1"),
    (
        "avalanche",
        "avalanche.plugin=GEMPlugin",
        "+avalanche.args={patterns_per_experience:4,memory_strength:0.5}",
    ),
    ("migu,multitask", "multitask.weighting=uncertainty", "multitask.capacity=0.5"),
    ("rwalk", "rwalk.every_steps=1"),
    ("replay,si", "replay.capacity=0.5"),
]


def sized(name: str) -> tuple[str, ...]:
    """The strategy's own configuration, with a buffer that is not all but empty."""
    # The mean of more opposes no step here; a stage of a few steps leaves no trace in a slow
    # average or few weights; a small rank, and a low threshold, leave room for each task.
    more = {
        "agem": ("agem.sample_size=2",),
        "ema": ("ema.decay=0.5",),
        "sparse": ("sparse.fraction=0.2",),
        "incremental_lora": ("incremental_lora.rank=2",),
        "olora": ("olora.rank=2",),
        "gain_lora": ("gain_lora.rank=3", "gain_lora.threshold=0.5"),
        "avalanche": (
            "avalanche.plugin=SynapticIntelligencePlugin",
            "+avalanche.args.si_lambda=1000",
        ),
    }
    return (name, *((f"{name}.{MOST}",) if name in BUFFERED else ()), *more.get(name, ()))


TABLE = [*map(sized, CONFIGS), *VARIANTS]


def make(names: str, *keys: str) -> Strategy:
    return toy.strategy_from_config(
        names, *(f"+strategy.{k[1:]}" if k.startswith("+") else f"strategy.{k}" for k in keys)
    )


def kind_of(names: str) -> str:
    """What of a model the strategies need to train: all of it, a LoRA, or virtual tokens."""
    asked = {*names.split(",")}
    return "prompts" if "progressive_prompts" in asked else "lora" if LORA & asked else "all"


def of_kind(kind: str, dtype: torch.dtype = torch.float32) -> Model:
    """A model of which this is trained."""
    base = (
        "gpt2" if dtype == torch.float64 else "llama"
    )  # which norms in float32 whatever its dtype
    made = (
        toy.make_prompt_model(dtype, kind=base)
        if kind == "prompts"
        else toy.make_model(dtype, kind=base, lora_rank=12 if kind == "lora" else 0)
    )
    for (
        part
    ) in made.net.modules():  # a plugin may train where our rules ask for a step without dropout
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.0
    return made


def network(names: str, dtype: torch.dtype = torch.float32) -> Model:
    """A model that all of these strategies can work with."""
    return of_kind(kind_of(names), dtype)
