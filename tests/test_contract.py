"""What every strategy must keep to, over the table of all configurations and some of their variants."""

from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import pytest
import torch
import toy

from continual import rules
from continual.errors import ConfigError
from continual.model import Model
from continual.progress import Patience
from continual.stage import learn
from continual.strategy import Strategy
from continual.weights import gradient

ARRANGEMENTS = {"joint", "cumulative"}  # of the stream, under naive: test_configs holds them to that
CONFIGS = sorted({p.stem for p in (Path(__file__).parents[1] / "conf" / "strategy").glob("*.yaml")} - ARRANGEMENTS)
BUFFERED = {"replay", "multitask", "maml", "reptile", "hard_replay", "inscl", "gem", "agem",
            "anil", "meta_sgd", "la_maml"}
LORA = {"incremental_lora", "olora", "gain_lora", "slao"}  # they work on the factors of a LoRA
UNPLANNED = {"avalanche": "its plugins use NumPy", "gain_lora": "where a branch begins is read off its weights"}
MOMENTS = ("begin", "end", "route")  # at which to give the model other weights is what some are for:
SETTERS = {"per_task", "router", "slao", "progressive_prompts", "average", "fisher_merge", "ema", "task_arithmetic",
           "ties"}
MOST = "capacity=0.5"  # the embedded default's fraction would leave one example of these small tasks

# What makes a strategy naive. A new configuration must say it here.
OFF = {
    "naive": (),
    "replay": ("replay.capacity=0",),
    "multitask": ("multitask.capacity=0",),
    "l2": ("l2.strength=0",), "ewc": ("ewc.strength=0",), "online_ewc": ("online_ewc.strength=0",),
    "maml": ("maml.capacity=0", "maml.inner_steps=0"), "reptile": ("reptile.capacity=0", "reptile.inner_steps=0"),
    "anil": ("anil.capacity=0", "anil.inner_steps=0"), "meta_sgd": ("meta_sgd.capacity=0", "meta_sgd.inner_steps=0"),
    "la_maml": ("la_maml.capacity=0", "la_maml.inner_steps=0"),
    "der": ("der.capacity=0",), "lwf": ("lwf.strength=0",), "hard_replay": ("hard_replay.capacity=0",),
    "inscl": ("inscl.capacity=0",), "lamol": ("lamol.share=0", "lamol.lm_weight=0"),
    "replay,ewc": ("replay.capacity=0", "ewc.strength=0"),
    "gem": ("gem.capacity=0",), "agem": ("agem.capacity=0",), "ogd": ("ogd.examples=0",),
    "per_task": ("per_task.start=last",), "router": ("router.start=last",),
    "incremental_lora": ("incremental_lora.rank=0",), "olora": ("olora.rank=0",),
    "gain_lora": ("gain_lora.rank=0",), "slao": ("slao.power=0", "slao.orthogonal=false"),
    "asft": ("asft.strength=0", "asft.dynamic=false"), "sdft": ("sdft.strength=0",),
    "avalanche": ("avalanche.plugin=SynapticIntelligencePlugin", "+avalanche.args.si_lambda=0"),
    "mas": ("mas.strength=0",), "si": ("si.strength=0",), "rwalk": ("rwalk.strength=0",),
    "average": ("average.blend=0",), "fisher_merge": ("fisher_merge.blend=0",), "ema": ("ema.blend=0",),
    "task_arithmetic": ("task_arithmetic.blend=0",), "ties": ("ties.blend=0",),
    "sparse": ("sparse.fraction=1",), "migu": ("migu.updated=1",),
    "progressive_prompts": ("progressive_prompts.most=1",), "osf": ("osf.keep=0",),
}
VARIANTS = [
    ("replay", "replay.buffer_kind=reservoir", "replay.capacity=7", "replay.share=0.38"),
    ("ewc", "ewc.labels=sampled", "ewc.examples=5"),
    ("online_ewc", "online_ewc.decay=0.5"),
    ("maml", "maml.second_order=true", "maml.inner_steps=2", "maml.capacity=0.5"),
    ("maml", "maml.buffer_kind=reservoir", "maml.capacity=7"),
    ("reptile", "reptile.inner_steps=1"), ("gem,maml", "gem.share=0.25", "gem.capacity=0.2", "gem.sample=2"),
    ("anil", "anil.second_order=true", "anil.inner=meta_sgd", "anil.inner_steps=2"),
    ("meta_sgd", "meta_sgd.second_order=true"),
    ("la_maml", "la_maml.second_order=true", "la_maml.inner_steps=2", "la_maml.capacity=7"), ("la_maml,ewc",),
    ("multitask", "multitask.weighting=size", "multitask.capacity=0.5"),
    ("multitask", "multitask.weighting=temperature", "multitask.capacity=0.5"),
    ("multitask", "multitask.weighting=uncertainty", "multitask.capacity=0.5"),
    ("multitask", "+multitask.weights={a:2,b:0.5}", "multitask.capacity=0.5"),
    ("der", "der.beta=0", "der.top=5", "der.capacity=9", "der.minibatch=3"), ("der", "der.alpha=0"),
    ("lwf", "lwf.teacher=base", "lwf.top=5", "lwf.temperature=1.0"),
    ("hard_replay", "hard_replay.by=forgetting", "hard_replay.capacity=7"),
    ("inscl", "inscl.capacity=7", "inscl.buffer_kind=reservoir"), ("lamol", "lamol.lm_weight=1.0", "lamol.top_k=5"),
    ("replay,lwf",), ("lwf,der",), ("der,ewc",), ("lamol,l2",),
    ("replay,ewc",), ("ewc,maml",), ("maml,ewc",), ("reptile,l2",),
    ("multitask,online_ewc", "multitask.weighting=uncertainty"),
    ("gem", "gem.capacity=0.5", "gem.sample=null", "gem.share=0.25"), ("gem", "gem.capacity=7", "gem.margin=0"),
    ("agem", "agem.capacity=7", "agem.buffer_kind=reservoir", "agem.sample=3"),
    ("ogd", "ogd.examples=3"), ("ogd,replay", "replay.capacity=0.5"), ("mas", "mas.examples=5"),
    ("olora", "olora.rank=3", "olora.lambda_2=0.1"), ("slao", "slao.power=0"),
    ("per_task,replay", "replay.capacity=0.5"), ("replay,olora", "replay.capacity=0.5", "olora.rank=2"),
    ("gain_lora", "gain_lora.rank=3", "gain_lora.hidden=5", "gain_lora.threshold=1"),
    ("gain_lora,olora", "gain_lora.rank=3", "olora.rank=3", "gain_lora.threshold=0.5"),
    ("replay,gain_lora", "replay.capacity=0.5", "gain_lora.rank=3", "gain_lora.threshold=0.5"),
    ("average", "average.begin_at=own", "average.blend=0.5"),
    ("fisher_merge", "fisher_merge.begin_at=base", "fisher_merge.labels=empirical"),
    ("ema,l2", "ema.begin_at=merged", "ema.decay=0.3"), ("ties", "ties.begin_at=own", "ties.density=0.5"),
    ("replay,task_arithmetic", "replay.capacity=0.5"), ("sparse,der", "sparse.fraction=0.3"), ("migu,replay",),
    ("sparse", "sparse.fraction=0.05", "sparse.avoid=0.3", "sparse.labels=sampled"),
    ("progressive_prompts", "progressive_prompts.most=2"), ("replay,progressive_prompts", "replay.capacity=0.5"),
    ("osf", "osf.keep=0.9"), ("ewc,osf",),
    ("multitask", "multitask.conflicts=project", "multitask.capacity=0.5"),
    ("multitask", "multitask.conflicts=project", "multitask.weighting=uncertainty", "multitask.capacity=0.5"),
    ("sdft", "sdft.strength=0.9", "sdft.rate=0.5"), ("replay,sdft", "replay.capacity=0.5"),
    ("avalanche", "avalanche.plugin=EWCPlugin", "+avalanche.args={ewc_lambda:100,mode:online,decay_factor:0.5}"),
    ("avalanche", "avalanche.plugin=RWalkPlugin", "+avalanche.args.delta_t=1"),
    ("avalanche", "avalanche.plugin=GEMPlugin", "+avalanche.args={patterns_per_experience:4,memory_strength:0.5}"),
    ("migu,multitask", "multitask.weighting=uncertainty", "multitask.capacity=0.5"),
    ("rwalk", "rwalk.every=1"), ("replay,si", "replay.capacity=0.5"),
]


def sized(name: str) -> tuple[str, ...]:
    """The strategy's own configuration, with a buffer that is not all but empty."""
    # The mean of more opposes no step here; a stage of a few steps leaves no trace in a slow average or few weights;
    # a small rank, and a low threshold, leave room for each task.
    more = {"agem": ("agem.sample=2",), "ema": ("ema.decay=0.5",), "sparse": ("sparse.fraction=0.2",),
            "incremental_lora": ("incremental_lora.rank=2",), "olora": ("olora.rank=2",),
            "gain_lora": ("gain_lora.rank=3", "gain_lora.threshold=0.5"),
            "avalanche": ("avalanche.plugin=SynapticIntelligencePlugin", "+avalanche.args.si_lambda=1000")}
    return (name, *((f"{name}.{MOST}",) if name in BUFFERED else ()), *more.get(name, ()))


TABLE = [*map(sized, CONFIGS), *VARIANTS]


def make(names: str, *keys: str) -> Strategy:
    return toy.configured(names, *(f"+strategy.{k[1:]}" if k.startswith("+") else f"strategy.{k}" for k in keys))


def kind_of(names: str) -> str:
    """What of a model the strategies need to train: all of it, a LoRA, or virtual tokens."""
    asked = {*names.split(",")}
    return "prompts" if "progressive_prompts" in asked else "lora" if LORA & asked else "all"


def of_kind(kind: str, dtype: torch.dtype = torch.float32) -> Model:
    """A model of which this is trained."""
    base = "gpt2" if dtype == torch.float64 else "llama"  # which norms in float32 whatever its dtype
    made = toy.prompted(dtype, kind=base) if kind == "prompts" else toy.model(
        dtype, kind=base, lora=12 if kind == "lora" else 0)
    for part in made.net.modules():  # a plugin may train where our rules ask for a step without dropout
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.0
    return made


def network(names: str, dtype: torch.dtype = torch.float32) -> Model:
    """A model that all of these strategies can work with."""
    return of_kind(kind_of(names), dtype)


every = pytest.mark.parametrize("entry", TABLE, ids=" ".join)


@cache
def subject(entry) -> rules.Subject:
    """What its first stage leaves is learned once for all rules."""
    made = rules.Subject(lambda: make(*entry), MOMENTS if SETTERS & {*entry[0].split(",")} else (),
                           partial(network, entry[0]))
    if "progressive_prompts" in entry[0]:  # a prompt steers little of a network of random weights
        made.recipe, made.falls = replace(toy.RECIPE, lr=0.3, epochs=6), 1e-3
    if "la_maml" in entry[0]:
        made.recipe = replace(toy.RECIPE, optimizer="sgd", lr=3)
    return made


@pytest.mark.parametrize("rule", rules.RULES, ids=lambda rule: rule.__name__)
@every
def test_every_strategy_keeps_every_rule(entry, rule):
    rule(subject(entry))


@pytest.mark.parametrize("names", [*CONFIGS, "replay,ewc"])
def test_switched_off_it_is_naive_bit_for_bit(names):
    rules.switched_off_it_is_naive(rules.Subject(lambda: make(names, *OFF[names]), model=partial(network, names)))


@pytest.mark.parametrize("entry", [sized(name) for name in CONFIGS], ids=" ".join)
def test_a_stage_that_is_stopped_early_ends_as_if_it_had_ended_with_its_best_epoch(entry, monkeypatch):
    """Its weights, and what the strategy remembers of them and of the way to them, bit for bit."""
    monkeypatch.setattr(Patience, "_loss", lambda self: float(self.seen))  # the first is the best
    task = replace(toy.task(1, toy.SHORT), dev=toy.task(1).train)
    found = []
    for recipe in ({"epochs": 1}, {"epochs": 3, "patience": 1}):
        (made, strategy), told = subject(entry).after_one_stage(), []
        recipe = replace(subject(entry).recipe, schedule="constant", **recipe)
        learn(made, task, strategy, recipe, seed=1, log=told.append)
        found.append((told[-1]["steps"], rules.ended(made, strategy)))
    assert found[0][0] < found[1][0]
    assert found[0][1] == found[1][1]


def planned(entry):
    """Two stages of a step each, without numbers."""
    return toy.rehearsed(partial(network, entry[0]), make(*entry), replace(subject(entry).recipe, steps=1))


@pytest.mark.parametrize("entry", [sized(name) for name in CONFIGS if name not in UNPLANNED], ids=" ".join)
def test_a_plan_can_go_through_its_stages(entry):
    first, second = planned(entry)
    assert second.peak > second.weights > first.strategy == 0


@pytest.mark.filterwarnings("ignore:Accessing the data pointer")
@pytest.mark.parametrize("entry", [sized(name) for name in UNPLANNED], ids=" ".join)
def test_a_strategy_that_cannot_be_planned_says_what_to_do(entry):
    with pytest.raises(ConfigError, match="plan a strategy that stores as much"):
        planned(entry)


@cache
def naive(kind, *sizes):
    """The parameters after a stage of each size under plain fine-tuning."""
    made = of_kind(kind)
    for t, n in enumerate(sizes):
        toy.train(made, Strategy(), t, n=n)
    return toy.everything(made)


@pytest.mark.parametrize("entry", [e for e in TABLE if e[0] != "naive"], ids=" ".join)
def test_switched_on_it_is_not_naive(entry):
    on, strategy = subject(entry).after_one_stage()
    for t in (1, 2, 3):  # a projection waits for tasks that oppose each other
        toy.train(on, strategy, t)
        if not toy.same(toy.everything(on), naive(kind_of(entry[0]), toy.SHORT, *[12] * t)):
            return
    pytest.fail("it never departs from naive")


def test_micro_batches_also_have_the_same_step_where_tasks_in_one_step_differ_in_weight():
    """A micro-batch of tasks that weigh nothing has no mean loss of its own."""
    strategy = make("multitask", "+multitask.weights={a:0,b:1}", "multitask.capacity=12", "multitask.share=0.6")
    made = toy.model(torch.float64)
    strategy.begin(made, toy.task(0))
    strategy.end(made, toy.task(0))
    strategy.begin(made, toy.task(1))
    small = toy.in_micro_batches(made, 1)
    strategy.backward(small, small.batch(toy.examples(1)[:3]))
    got = gradient(made)
    made.net.zero_grad()
    Strategy().backward(made, made.batch(toy.examples(1)[:3]))
    assert toy.close(got, gradient(made), rtol=1e-6, atol=1e-7)  # scales are float32
