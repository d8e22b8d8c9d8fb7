"""Avalanche's plugins inside our stage."""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from hydra.utils import get_object
from torch import Tensor

from continual.data.types import Encoded, Task
from continual.errors import ConfigError, listed, unknown
from continual.interop.avalanche import (
    AvalancheModel,
    Criterion,
    EncodedDataset,
    copy_shared_tensors,
    deserialize_state,
    import_avalanche,
    serialize_state,
    to_tensors,
)
from continual.models.model import Model
from continual.models.weights import gradient, set_gradient, weights
from continual.packing.batch import Batch
from continual.strategy.interface import Strategy, memory

POST_STEP_EVENTS = (
    "after_update",
    "after_training_iteration",
)  # what comes after the optimizer's step
UNSUPPORTED_EVENTS = (
    "before_eval",
    "before_eval_exp",
    "before_eval_iteration",
    "before_eval_forward",
    "after_eval_forward",
    "after_eval_iteration",
    "after_eval_exp",
    "after_eval",
    "before_train_dataset_adaptation",
    "after_train_dataset_adaptation",
    "before_eval_dataset_adaptation",
    "after_eval_dataset_adaptation",
)

# Of Avalanche 0.6.0's own plugins those that our stage hosts, and how each differs from our
# strategy of its name.
SUPPORTED_PLUGINS = {
    "SynapticIntelligencePlugin": "si: the path takes in the pull's gradient; importance is cut "
    "above 0.001, not at 0",
    "EWCPlugin": "ewc: F is of a batch's mean loss, one example's at mb_size=1; its lambda is "
    "half our strength",
    "MASPlugin": "mas: norms are averaged over tokens, and the importance over tasks; its lambda "
    "is half our strength",
    "RWalkPlugin": "rwalk: F is of a step's mean loss; not a number after a stage of fewer than "
    "delta_t steps",
    "GEMPlugin": "gem: a task's first examples in a random order are remembered; no strict bound "
    "on the solver's v",
}
# Why it does not host the others.
UNSUPPORTED_PLUGINS = {
    name: reason
    for reason, names in {
        "it works on classes, and our stage has no class labels": (
            "BiCPlugin CoPEPlugin CWRStarPlugin CurrentDataFeCAMUpdate CurrentDataNCMUpdate "
            "FeCAMOracle GDumbPlugin MIRPlugin MemoryFeCAMUpdate MemoryNCMUpdate NCMOracle"
        ),
        "it distils the logits of the classes seen, and our stage has no class labels: see "
        "strategy=lwf": "LwFPlugin",
        "it asks the model for features, which a language model does not name: see strategy=lwf": (
            "FeatureDistillationPlugin LFLPlugin"
        ),
        "it keeps data loaders under way, which no checkpoint can hold: see strategy=agem": "AGEMPlugin",
        "it replaces the data loader, and our stage draws its own steps: see strategy=replay": (
            "GSS_greedyPlugin ReplayPlugin"
        ),
        "it replaces the data loader and perturbs inputs, and tokens cannot be perturbed": "RARPlugin",
        "it needs a model that generates inputs: see strategy=lamol": "GenerativeReplayPlugin "
        "TrainGeneratorAfterExpPlugin",
        "our stage does this itself: train.patience": "EarlyStoppingPlugin",
        "our stage does this itself: train.schedule": "LRSchedulerPlugin",
    }.items()
    for name in names.split()
}


class UnsupportedAttributeError(ConfigError, AttributeError):
    """A plugin asked for what our stage does not have; `hasattr` gives False."""


class AttributeView(SimpleNamespace):
    """What a plugin is shown under a name: these attributes, and no other; it may set those of
    `settable`.
    """

    def __init__(
        self, plugin: str, name: str, settable: Sequence[str] = (), **attributes: Any
    ) -> None:
        self.__dict__.update(attributes, _told=(plugin, name, settable))

    def __getattr__(self, key: str) -> Any:
        raise UnsupportedAttributeError(self._unsupported_text("reads", key))

    def __setattr__(self, key: str, value: Any) -> None:
        if key not in self.__dict__["_told"][2]:
            raise UnsupportedAttributeError(self._unsupported_text("sets", key))
        self.__dict__[key] = value

    def __deepcopy__(self, memo: Any) -> AttributeView:
        return self  # it says what is there now, and is made anew in each stage

    def _unsupported_text(self, verb: str, key: str) -> str:
        plugin, name, _ = self.__dict__.get("_told", ("", "", ()))
        known = ", ".join(k for k in self.__dict__ if not k.startswith("__") and k != "_told")
        return (
            f"{plugin} {verb} {name}.{key}, which our stage does not have for it (there is "
            f"{known}); it cannot be hosted"
        )


class PluginHost(AttributeView):
    """The Avalanche strategy that a plugin believes to be in."""

    mb_x = property(lambda self: self.mbatch[0])
    mb_y = property(lambda self: self.mbatch[1])
    mb_task_id = property(lambda self: self.mbatch[2])
    mb_output = property(
        lambda self: self.model(self.mb_x)
    )  # once more: the stage's own pass is in micro-batches


@dataclass(kw_only=True)
class Avalanche(Strategy):
    """Any `SupervisedPlugin` of Avalanche (Lomonaco et al. 2021) that needs no class labels, inside
    our stage.

    `plugin` is a name of avalanche.training.plugins or a dotted path, `args` are its constructor's.
    A stage is an experience of one epoch. The callbacks come in Avalanche's order: those after the
    optimizer's step at the next step or the stage's end, with the step's gradient in place, as it
    was before it was clipped. What a plugin adds to `strategy.loss` is differentiated beside our
    loss. By itself it goes through a task's data in batches of `mb_size`.

    What it keeps must be tensors, ParamData, numbers and texts, in lists, sets and dicts: it is in
    every checkpoint. A tensor there that shares its memory with a weight becomes a copy, so that
    values from before a step stay what they were, also where a plugin only moves them to the CPU
    that they are on.
    """

    stores: ClassVar[str] = "what the plugin keeps"
    costs: ClassVar[str] = "1 + what the plugin does"
    plugin: str
    args: Mapping[str, Any] | None = None
    mb_size: int = 1
    seed: int = 0
    running: dict[str, Any] = memory(dict)  # what plugin and clock keep
    pending: dict[str, Any] = memory(
        dict
    )  # the last step's batch, loss and gradient, until its update is told
    plugin_instance: Any = field(init=False, repr=False, default=None)
    clock: Any = field(init=False, repr=False, default=None)
    host: Any = field(init=False, repr=False, default=None)

    def __post_init__(self) -> None:
        """Make the plugin; raises ConfigError for one that is not there or cannot be hosted."""
        super().__post_init__()
        kind = resolve_plugin(self.plugin)
        try:
            self.plugin_instance = kind(**(self.args or {}))
        except (TypeError, AssertionError, ValueError) as e:
            raise ConfigError(
                f"{self.plugin} cannot be made with "
                f"strategy.avalanche.args={dict(self.args or {})}: {e}"
            ) from e
        self.clock = import_avalanche("training.plugins.clock.Clock")()
        serialize_state(vars(self.plugin_instance), self.plugin)  # before anything is trained

    def begin(self, model: Model, task: Task[Encoded]) -> list[Any]:
        """An experience begins."""
        trained = super().begin(model, task)
        rows, name = EncodedDataset(task.train, not model.layout.seq2seq), self.plugin
        index = self.clock.train_exp_counter
        optimizer = AttributeView(
            name, "strategy.optimizer", zero_grad=lambda *_, **__: clear_gradients(model)
        )
        experience = AttributeView(
            name, "strategy.experience", dataset=rows, current_experience=index
        )
        self.host = PluginHost(
            name,
            "strategy",
            ("loss",),
            model=AvalancheModel(model),
            optimizer=optimizer,
            experience=experience,
            mbatch=None,
            loss=torch.zeros((), device=model.layout.device),
            clock=self.clock,
            device=model.layout.device,
            train_epochs=1,
            train_mb_size=self.mb_size,
            eval_mb_size=self.mb_size,
            is_training=True,
            is_eval=False,
            adapted_dataset=rows,
            plugins=[self.plugin_instance, self.clock],
            _criterion=Criterion(),
        )
        self.pending = {}
        self.fire_events(model, "before_training", "before_training_exp", "before_training_epoch")
        return trained

    def backward(self, model: Model, batch: Batch) -> Tensor:
        """An iteration, but for what comes after its update."""
        self.finish_last_step(model)
        mbatch = [
            t.to(model.layout.device) for t in to_tensors(batch.examples, not model.layout.seq2seq)
        ]
        self.host.__dict__["mbatch"] = mbatch
        self.fire_events(model, "before_training_iteration", "before_forward", "after_forward")
        clear_gradients(model)
        ours = super().backward(model, batch).detach().requires_grad_()
        self.host.loss = ours.clone()
        self.fire_events(model, "before_backward")
        (share,) = torch.autograd.grad(self.host.loss, ours, retain_graph=True, allow_unused=True)
        for w in weights(model).values():  # 1, unless the plugin has scaled or replaced our loss
            if w.grad is not None:
                w.grad *= 0 if share is None else share
        self.host.loss.backward()
        self.host.loss = self.host.loss.detach()
        self.fire_events(model, "after_backward", "before_update")
        loss: Tensor = self.host.loss
        self.pending = {"mbatch": mbatch, "loss": loss}
        if any(self.handles_event(event) for event in POST_STEP_EVENTS):
            self.pending["gradient"] = gradient(model)
        return loss

    def finish_last_step(self, model: Model) -> None:
        """Tell of the last step's update. Where that was skipped for its gradient, no weight has
        moved.
        """
        if self.pending:
            self.host.__dict__.update(mbatch=self.pending["mbatch"], loss=self.pending["loss"])
            if told := self.pending.get("gradient"):
                set_gradient(model, {n: g.nan_to_num() for n, g in told.items()})
            self.fire_events(model, *POST_STEP_EVENTS)
            clear_gradients(model)
            self.pending = {}

    def end(self, model: Model, task: Task[Encoded]) -> None:
        """The experience is over."""
        super().end(model, task)
        self.finish_last_step(model)
        self.fire_events(model, "after_training_epoch", "after_training_exp", "after_training")
        clear_gradients(model)

    def handles_event(self, event: str) -> bool:
        """Whether the plugin has this callback."""
        return getattr(type(self.plugin_instance), event) is not getattr(
            import_avalanche("core.SupervisedPlugin"), event
        )

    def fire_events(self, model: Model, *events: str) -> None:
        """The plugin's callbacks of these names, then the clock's; the network is left in the mode
        that it is in.
        """
        self.host.model.model = model
        training = model.net.training
        for event in events:
            if self.handles_event(event):
                with plugin_context(
                    model,
                    random.Random(f"{self.seed}/{self.clock.train_iterations}").getrandbits(63),
                ):
                    getattr(self.plugin_instance, event)(self.host)
                model.net.train(training)
                copy_shared_tensors(vars(self.plugin_instance), weights(model).values())
            getattr(self.clock, event)(self.host)

    def state_dict(self) -> dict[str, Any]:
        """The memory, what the plugin keeps among it; raises ContinualError where no checkpoint can
        hold that.
        """
        running = {
            "plugin": serialize_state(vars(self.plugin_instance), self.plugin),
            "clock": dict(vars(self.clock)),
        }
        return {**super().state_dict(), "running": running}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Give it back to the plugin."""
        super().load_state_dict({**state, "running": {}})
        for key, value in deserialize_state(state["running"]["plugin"]).items():
            here = getattr(self.plugin_instance, key, None)
            if isinstance(here, dict):  # which may have a default for what is not in it
                here.clear()
                here.update(value)
            else:
                setattr(self.plugin_instance, key, value)
        vars(self.clock).update(state["running"]["clock"])


def resolve_plugin(name: str) -> Any:
    """The plugin's class; raises ConfigError with the reason where there is none that our stage can
    host.
    """
    base = import_avalanche("core.SupervisedPlugin")
    try:
        kind = get_object(name if "." in name else f"avalanche.training.plugins.{name}")
    except Exception as e:  # a module that is imported may raise anything
        told = (
            str(e)
            if "." in name
            else unknown("plugin", name, [*SUPPORTED_PLUGINS, *UNSUPPORTED_PLUGINS])
        )
        raise ConfigError(f"strategy.avalanche.plugin={name} is not there: {told}") from e
    if (
        reason := UNSUPPORTED_PLUGINS.get(kind.__name__)
        if kind.__module__.startswith("avalanche.")
        else None
    ):
        raise ConfigError(f"strategy.avalanche.plugin={name} cannot be hosted: {reason}")
    if not (isinstance(kind, type) and issubclass(kind, base)):
        raise ConfigError(f"strategy.avalanche.plugin={name} is no SupervisedPlugin of Avalanche's")
    if wanted := [
        event for event in UNSUPPORTED_EVENTS if getattr(kind, event) is not getattr(base, event)
    ]:
        raise ConfigError(
            f"strategy.avalanche.plugin={name} cannot be hosted: our stage never comes to its "
            f"{listed(wanted)}"
        )
    return kind


def clear_gradients(model: Model) -> None:
    """No gradients."""
    for w in weights(model).values():
        w.grad = None


@contextmanager
def plugin_context(model: Model, seed: int) -> Iterator[None]:
    """What a plugin makes is in the precision of the weights unless it says which; what it draws
    follows from the seed.

    It may give NumPy tensors.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(next(iter(weights(model).values())).dtype)
    try:
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            warnings.filterwarnings("ignore", "__array_wrap__ must accept", DeprecationWarning)
            yield
    finally:
        torch.set_default_dtype(before)
