"""Hard examples: which are kept and drawn, by brute force over every example's own loss."""

import pytest
import torch

from continual.errors import ConfigError
from continual.strategy.replay_buffer import ReplayBuffer
from strategies.hard_replay import HardReplay, example_key, mean_example_losses
from tests.support import toy


def loss_by_hand(made, e) -> float:
    return toy.mean_loss(made.net, [e]).item()


def test_an_example_s_loss_is_the_mean_over_its_response_tokens():
    made = toy.make_model(torch.float64)
    assert mean_example_losses(made, toy.make_examples(0)) == pytest.approx(
        {example_key(e): loss_by_hand(made, e) for e in toy.make_examples(0)}, rel=1e-9
    )


def test_by_loss_those_of_each_task_are_kept_that_are_hardest_when_it_has_been_learned():
    made, strategy = toy.make_model(), HardReplay(capacity=0.25)
    toy.train_stages(made, strategy, 0)
    hardest = sorted(toy.make_examples(0), key=lambda e: -loss_by_hand(made, e))[:3]
    assert strategy.buffer.tasks["a"] == hardest
    toy.train_stages(made, strategy, 1)
    assert strategy.buffer.tasks["a"] == hardest
    assert (
        strategy.buffer.tasks["b"]
        == sorted(toy.make_examples(1), key=lambda e: -loss_by_hand(made, e))[:3]
    )


def test_a_full_buffer_gives_up_the_easiest_first():
    made, strategy = toy.make_model(), HardReplay(capacity=8)
    toy.train_stages(made, strategy, 0)
    before = strategy.buffer.tasks["a"]
    toy.train_stages(made, strategy, 1)
    assert strategy.buffer.tasks["a"] == before[:4]


def forgetful(capacity: float = 8, candidates: int = 2):
    """A model after three stages; which of the first task's examples were kept after it, and their
    losses then.
    """
    made, strategy = (
        toy.make_model(),
        HardReplay(criterion="forgetting", capacity=capacity, candidates=candidates),
    )
    toy.train_stages(made, strategy, 0)
    kept = [*strategy.buffer.tasks["a"]]
    then = {example_key(e): loss_by_hand(made, e) for e in kept}
    toy.train_stages(made, strategy, 1)
    return made, strategy, kept, then


def test_by_forgetting_those_whose_loss_rose_least_give_way():
    made, strategy, kept, then = forgetful()
    rise = {example_key(e): loss_by_hand(made, e) - then[example_key(e)] for e in kept}
    assert strategy.buffer.tasks["a"] == sorted(kept, key=lambda e: -rise[example_key(e)])[:4]
    assert strategy.risen == pytest.approx(
        {
            **{example_key(e): rise[example_key(e)] for e in strategy.buffer.tasks["a"]},
            **{example_key(e): 0.0 for e in strategy.buffer.tasks["b"]},
        },
        abs=1e-5,
    )


def test_what_was_forgotten_is_measured_from_when_it_was_learned_and_forgotten_with_its_example():
    made, strategy, _, then = forgetful()
    toy.train_stages(made, strategy, 2)
    assert (
        strategy.learned.keys()
        == strategy.risen.keys()
        == {example_key(e) for e in strategy.buffer.examples}
    )
    for e in strategy.buffer.tasks["a"]:
        assert strategy.learned[example_key(e)] == pytest.approx(then[example_key(e)], abs=1e-5)
        assert strategy.risen[example_key(e)] == pytest.approx(
            loss_by_hand(made, e) - then[example_key(e)], abs=1e-5
        )


def test_among_all_there_are_a_step_takes_the_most_forgotten():
    _, strategy, *_ = forgetful(candidates=99)
    rank = sorted(strategy.buffer.examples, key=lambda e: -strategy.risen[example_key(e)])
    assert [strategy.risen[example_key(e)] for e in strategy.draw_replay_examples(3)] == [
        strategy.risen[example_key(e)] for e in rank[:3]
    ]


def test_among_as_many_as_are_needed_the_draw_is_uniform():
    _, strategy, *_ = forgetful(candidates=1)
    assert {example_key(e) for _ in range(60) for e in strategy.draw_replay_examples(2)} == {
        example_key(e) for e in strategy.buffer.examples
    }


def test_more_than_there_are_can_be_recalled():
    _, strategy, *_ = forgetful()
    assert len(strategy.draw_replay_examples(20)) == 20


def test_by_forgetting_what_is_kept_at_first_is_a_uniform_sample():
    made, found = toy.make_model(), set()
    for seed in range(40):
        strategy = HardReplay(criterion="forgetting", capacity=3, seed=seed)
        strategy.end(made, toy.make_task(0))
        found |= {e.id for e in strategy.buffer.examples}
    assert found == {e.id for e in toy.make_examples(0)}


def test_a_ranked_buffer_keeps_the_first_of_each_task_in_equal_parts():
    buffer = ReplayBuffer(5, "ranked")
    buffer.add("a", toy.make_examples(0))
    buffer.add("b", toy.make_examples(1))
    assert buffer.tasks == {"a": toy.make_examples(0)[:3], "b": toy.make_examples(1)[:2]}


@pytest.mark.parametrize(
    ("wrong", "told"),
    [({"criterion": "lose"}, "did you mean 'loss'"), ({"candidates": 0}, "at least 1")],
)
def test_what_cannot_work_is_refused(wrong, told):
    with pytest.raises(ConfigError, match=told):
        HardReplay(**wrong)
