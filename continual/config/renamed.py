"""Names from earlier versions, and what they are called now.

Run folders and configurations that an earlier version wrote name constructors and keys by their
old names; these tables let them open.
"""

from __future__ import annotations

from typing import Any

# Memory field of a strategy -> field, for checkpoints.
MEMORY_FIELDS = {"owed": "fractional_carry"}

# Dotted path -> dotted path, for the `_target_` of run folders and configurations.
TARGETS = {
    "continual.model.hf": "continual.models.loading.load_pretrained",
    "continual.probes.general.General": "continual.evaluation.probes.general.GeneralAbility",
    "continual.probes.shots.Shots": "continual.evaluation.probes.shots.Shots",
    "continual.probes.transfer.Transfer": "continual.evaluation.probes.transfer.Transfer",
    "continual.probes.turns.Turns": "continual.evaluation.probes.turns.Turns",
    "continual.probes.wordings.Wordings": "continual.evaluation.probes.wordings.Wordings",
    "continual.scratch.build": "continual.training.scratch.load_or_build_llama",
    "continual.strategy.Strategy": "continual.strategy.interface.Strategy",
    "strategies.adapters.PerTask": "strategies.per_task.PerTask",
    "strategies.anchor.EWC": "strategies.ewc.EWC",
    "strategies.anchor.L2": "strategies.ewc.L2",
    "strategies.anchor.MAS": "strategies.ewc.MAS",
    "strategies.anchor.OnlineEWC": "strategies.ewc.OnlineEWC",
    "strategies.hard.HardReplay": "strategies.hard_replay.HardReplay",
    "strategies.incremental.IncrementalLoRA": "strategies.incremental_lora.IncrementalLoRA",
    "strategies.lamaml.LaMAML": "strategies.la_maml.LaMAML",
    "strategies.path.RWalk": "strategies.si.RWalk",
    "strategies.path.SI": "strategies.si.SI",
    "streams.folder.folder": "streams.folder.load_folder",
    "streams.hub.hub": "streams.hub.load_hub",
    "streams.skills.skills": "streams.skills.stream.generate_skills",
}

# Key -> key, of the command line and of config.yaml.
KEYS = {
    "adapt.at": "adapt.eval_steps",
    "adapt.rule": "adapt.update_rule",
    "adapt.start": "adapt.init_from",
    "data.on_unfit": "data.on_unusable",
    "loss.mask_how": "loss.prompt_mask_mode",
    "loss.mask_instruction_tokens": "loss.prompt_mask_prob",
    "model.context": "model.context_length",
    "model.hidden": "model.hidden_size",
    "model.pretrain.clip": "model.pretrain.max_grad_norm",
    "model.pretrain.warmup": "model.pretrain.warmup_ratio",
    "model.vocabulary": "model.vocab_size",
    "plan.examples": "plan.train_examples",
    "plan.flops": "plan.peak_flops",
    "plan.memory": "plan.memory_gb",
    "plan.response": "plan.response_tokens",
    "plan.share": "plan.flops_utilization",
    "plan.stages": "plan.rehearse_stages",
    "plan.steps": "plan.rehearse_steps",
    "plan.tasks": "plan.num_tasks",
    "plan.tests": "plan.test_examples",
    "plan.tokens": "plan.tokens_per_example",
    "probe.general.limit": "probe.general.max_examples",
    "probe.shots.limit": "probe.shots.max_examples",
    "probe.transfer.similarity": "probe.transfer.min_similarity",
    "probe.turns.limit": "probe.turns.max_examples",
    "probe.turns.met": "probe.turns.pass_score",
    "probe.wordings.given": "probe.wordings.paraphrases",
    "probe.wordings.limit": "probe.wordings.max_examples",
    "score.during": "score.every_steps",
    "score.during_examples": "score.monitor_examples",
    "score.how": "score.answer_mode",
    "score.judge.how": "score.judge.grade_mode",
    "score.limit": "score.max_examples",
    "strategy.agem.sample": "strategy.agem.sample_size",
    "strategy.anil.adapts": "strategy.anil.inner_scope",
    "strategy.anil.inner": "strategy.anil.inner_optimizer",
    "strategy.asft.dynamic": "strategy.asft.weight_by_probability",
    "strategy.asft.top": "strategy.asft.top_logits",
    "strategy.average.begin_at": "strategy.average.init_from",
    "strategy.average.blend": "strategy.average.interpolation",
    "strategy.der.minibatch": "strategy.der.minibatch_size",
    "strategy.der.top": "strategy.der.top_logits",
    "strategy.ema.begin_at": "strategy.ema.init_from",
    "strategy.ema.blend": "strategy.ema.interpolation",
    "strategy.ewc.examples": "strategy.ewc.num_examples",
    "strategy.fisher_merge.begin_at": "strategy.fisher_merge.init_from",
    "strategy.fisher_merge.blend": "strategy.fisher_merge.interpolation",
    "strategy.fisher_merge.examples": "strategy.fisher_merge.num_examples",
    "strategy.gain_lora.hidden": "strategy.gain_lora.hidden_size",
    "strategy.gem.sample": "strategy.gem.sample_size",
    "strategy.hard_replay.among": "strategy.hard_replay.candidates",
    "strategy.hard_replay.by": "strategy.hard_replay.criterion",
    "strategy.lwf.dynamic": "strategy.lwf.weight_by_probability",
    "strategy.lwf.top": "strategy.lwf.top_logits",
    "strategy.maml.adapts": "strategy.maml.inner_scope",
    "strategy.maml.inner": "strategy.maml.inner_optimizer",
    "strategy.mas.examples": "strategy.mas.num_examples",
    "strategy.meta_sgd.adapts": "strategy.meta_sgd.inner_scope",
    "strategy.meta_sgd.inner": "strategy.meta_sgd.inner_optimizer",
    "strategy.migu.updated": "strategy.migu.neuron_share",
    "strategy.ogd.examples": "strategy.ogd.num_examples",
    "strategy.online_ewc.examples": "strategy.online_ewc.num_examples",
    "strategy.osf.keep": "strategy.osf.rank_share",
    "strategy.per_task.start": "strategy.per_task.adapter_init",
    "strategy.progressive_prompts.most": "strategy.progressive_prompts.max_prompts",
    "strategy.router.start": "strategy.router.adapter_init",
    "strategy.rwalk.every": "strategy.rwalk.every_steps",
    "strategy.sdft.rate": "strategy.sdft.ema_rate",
    "strategy.slao.orthogonal": "strategy.slao.orthogonal_init",
    "strategy.sparse.avoid": "strategy.sparse.protected_fraction",
    "strategy.sparse.examples": "strategy.sparse.num_examples",
    "strategy.task_arithmetic.begin_at": "strategy.task_arithmetic.init_from",
    "strategy.task_arithmetic.blend": "strategy.task_arithmetic.interpolation",
    "strategy.ties.begin_at": "strategy.ties.init_from",
    "strategy.ties.blend": "strategy.ties.interpolation",
    "stream.files": "stream.split_files",
    "stream.level": "stream.difficulty",
    "spaces": "search_spaces",
    "stream.limit": "stream.max_train_rows",
    "train.clip": "train.max_grad_norm",
    "train.log_every": "train.log_every_steps",
    "train.warmup": "train.warmup_ratio",
    "tuned": "strategy_defaults",
}


def current_target(target: str) -> str:
    """Return the current dotted path of a constructor."""
    return TARGETS.get(target, target)


def current_key(key: str) -> str:
    """Return the current name of a dotted key; sections may be renamed too, as in `tuned.NAME`."""
    section, dot, name = key.rpartition(".")
    if key in KEYS or not dot:
        return KEYS.get(key, key)
    return f"{current_key(section)}.{name}"


def rename_in_config(config: dict[str, Any]) -> dict[str, Any]:
    """Return a run's nested configuration with current names of targets and keys."""
    renamed: dict[str, Any] = _rename_targets(config)
    for old, new in KEYS.items():
        _move_key(renamed, old.split("."), new.split("."))
    return renamed


def _rename_targets(value: Any) -> Any:
    if isinstance(value, list):
        return [_rename_targets(part) for part in value]
    if not isinstance(value, dict):
        return value
    renamed = {key: _rename_targets(part) for key, part in value.items()}
    if isinstance(renamed.get("_target_"), str):
        renamed["_target_"] = current_target(renamed["_target_"])
    return renamed


def _move_key(config: dict[str, Any], old: list[str], new: list[str]) -> None:
    """Move the value at the path `old` to the path `new`, where there is one and the other is free.

    Both paths lead through the same sections; a key keeps its place among its neighbours.
    """
    section: Any = config
    for name in old[:-1]:
        section = section.get(name) if isinstance(section, dict) else None
    if not isinstance(section, dict) or old[-1] not in section or new[-1] in section:
        return
    pairs = [(new[-1] if key == old[-1] else key, value) for key, value in section.items()]
    section.clear()
    section.update(pairs)
