"""A prompt a task: the newest learns behind the earlier ones, which never change, nor do the
answers behind them.
"""

from dataclasses import replace

import pytest
import torch

from continual.errors import ConfigError
from continual.models.generation import generate_ids
from continual.models.loss import forward
from continual.models.weights import weights
from continual.strategy.interface import Strategy
from strategies.progressive_prompts import ProgressivePrompts
from tests.support import toy
from tests.support.models import run_in_process

RECIPE = replace(toy.RECIPE, lr=0.3)


def trained(*indices, **settings):
    made, strategy = toy.make_prompt_model(), ProgressivePrompts(**settings)
    toy.train_stages(made, strategy, *indices, recipe=RECIPE)
    return made, strategy


def live(made):
    (prompt,) = weights(made).values()
    return prompt.detach().clone()


def logits(made, strategy, index):
    """What the model says of a task's examples, once it is about to be tested."""
    strategy.route(made, toy.TASK_NAMES[index])
    with torch.no_grad():
        return forward(made, made.batch(toy.make_examples(index)))


def test_the_first_stage_is_prompt_tuning():
    made, _ = trained(0)
    naive = toy.make_prompt_model()
    toy.train_stages(naive, Strategy(), 0, recipe=RECIPE)
    assert torch.equal(live(made), live(naive))


def test_a_stage_reads_its_own_prompt_then_the_earlier_ones_from_the_newest_to_the_first():
    made, strategy = trained(0, 1)
    strategy.begin(made, toy.make_task(2))
    first, second = strategy.prompts
    e = toy.make_examples(2)[0]
    words = made.net.get_input_embeddings()(torch.tensor(e.ids))
    read = torch.cat([live(made), second, first, words])
    told = made.net(inputs_embeds=read[None]).logits[0, 6:]
    k = e.response_mask.index(True)
    torch.testing.assert_close(forward(made, made.batch([e])), told[k - 1 : -1])


def test_no_prompt_changes_after_its_stage_and_no_other_weight_ever():
    made, strategy = trained(0)
    base = {n: w for n, w in toy.copy_parameters(made).items() if n not in weights(made)}
    kept = []
    for i in (1, 2, 3):
        kept.append(strategy.prompts[-1].clone())
        toy.train_stages(made, strategy, i, recipe=RECIPE)
        assert all(torch.equal(p, k) for p, k in zip(strategy.prompts[:i], kept, strict=True))
        assert not torch.equal(strategy.prompts[i], kept[-1])
    assert toy.bitwise_equal({n: toy.copy_parameters(made)[n] for n in base}, base)


def test_a_learned_task_is_answered_as_it_was_bit_for_bit():
    made, strategy = trained(0)
    before = logits(made, strategy, 0)
    ask = [replace(e, ids=e.ids[: e.response_mask.index(True)]) for e in toy.make_examples(0)]
    said = generate_ids(made, ask, 4, 5, 0)
    toy.train_stages(made, strategy, 1, 2, recipe=RECIPE)
    assert torch.equal(logits(made, strategy, 0), before)
    assert generate_ids(made, ask, 4, 5, 0) == said


def test_a_task_that_is_not_learned_is_answered_behind_all_prompts():
    made, strategy = trained(0, 1)
    told = logits(made, strategy, 3)
    made.set_prompt_prefix(strategy.prompts[::-1], live=False)
    assert torch.equal(forward(made, made.batch(toy.make_examples(3))), told)


def test_before_the_first_stage_there_is_no_virtual_token():
    made = toy.make_prompt_model()
    told = logits(made, ProgressivePrompts(), 0)
    torch.testing.assert_close(
        told, forward(toy.make_model(), toy.make_model().batch(toy.make_examples(0)))
    )


def test_a_new_prompt_starts_as_words_that_the_seed_draws():
    starts = []
    for seed in (0, 0, 1):
        made, strategy = trained(0, seed=seed)
        strategy.begin(made, toy.make_task(1))
        words = made.net.get_input_embeddings().weight
        assert all((words == row).all(1).any() for row in live(made))
        starts.append(live(made))
    assert torch.equal(starts[0], starts[1])
    assert not torch.equal(starts[0], starts[2])


def test_the_newest_of_a_full_set_trains_on():
    made, strategy = trained(0, 1, max_prompts=2)
    first, second = (p.clone() for p in strategy.prompts)
    strategy.begin(made, toy.make_task(2))
    assert torch.equal(live(made), second)
    toy.train_stages(made, strategy, 2, recipe=RECIPE)
    assert torch.equal(strategy.prompts[0], first)
    assert not torch.equal(strategy.prompts[1], second)
    assert strategy.reach == {"a": 1, "b": 2, "c": 2}


def test_a_stage_of_several_tasks_has_one_prompt_for_all_of_them():
    made, strategy = toy.make_prompt_model(), ProgressivePrompts()
    both = replace(
        toy.make_task(0), name="joint", train=(*toy.make_examples(0), *toy.make_examples(1))
    )
    strategy.begin(made, both)
    strategy.end(made, both)
    assert strategy.reach == {"a": 1, "b": 1}


def test_prompts_that_will_leave_no_room_are_refused_before_the_first_stage():
    made = toy.make_prompt_model(virtual_tokens=7)
    with pytest.raises(
        ConfigError, match=r"follows 28 virtual tokens, and the model has 32 positions; lower"
    ):
        ProgressivePrompts().begin(made, toy.make_task(0))
    ProgressivePrompts(max_prompts=3).begin(made, toy.make_task(0))


def test_a_model_without_virtual_tokens_is_refused():
    with pytest.raises(ConfigError, match=r"model.adapter=prompt_tuning"):
        ProgressivePrompts().route(toy.make_model(), "a")
    with pytest.raises(ConfigError, match="max_prompts=0: expected at least 1"):
        ProgressivePrompts(max_prompts=0)


@pytest.mark.filterwarnings(
    "ignore:.*is_gradient_checkpointing. is deprecated:FutureWarning"
)  # peft's own
def test_the_newest_prompt_alone_is_not_adapted(cli_error, run_keys, tmp_path):
    run_in_process(
        tmp_path / "run",
        run_keys,
        "strategy=progressive_prompts",
        "model.adapter=prompt_tuning",
        "train.steps=2",
    )
    told = cli_error(
        "adapt",
        *run_keys,
        f"adapt.init_from={tmp_path / 'run'}",
        "task=loud",
        f"out={tmp_path / 'new'}",
    )
    assert "progressive_prompts keeps a part of the model in its memory" in told
