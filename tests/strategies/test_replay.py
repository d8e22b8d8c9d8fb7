"""What a buffer keeps, what is drawn from it, and how much of each step is remembered."""

import json
import random
from collections import Counter
from dataclasses import dataclass, field
from itertools import combinations, product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from continual.data.types import Encoded
from continual.errors import ConfigError
from continual.packing.batch import Batch, Layout
from continual.strategy.replay_buffer import ReplayBuffer, update_reservoir
from continual.training import checkpoint
from continual.training.recipe import Recipe
from continual.training.serialization import deserialize_value, serialize_value
from strategies.replay import Replay
from tests.support import toy


def rows(task: int, n: int) -> list[Encoded]:
    """Examples that only their ids tell apart."""
    return [Encoded(f"{task}/{i}", task, (2, 3), (False, True)) for i in range(n)]


def filled(
    sizes: list[int], capacity: float, kind: str = "balanced", seed: int = 0
) -> ReplayBuffer:
    buffer = ReplayBuffer(capacity, kind, seed)
    for t, n in enumerate(sizes):
        buffer.add(f"task{t}", rows(t, n))
    return buffer


def test_what_was_drawn_before_the_first_example_came_is_drawn_once_also_behind_a_checkpoint():
    """A first stage of several tasks, whose conflicts take the buffer's generator."""
    buffer = ReplayBuffer(5)
    buffer.rng.random()
    told = json.loads(json.dumps(serialize_value(buffer, "buffer", {})))
    assert deserialize_value(told, {}, 64).rng.random() == buffer.rng.random()


class Scripted(random.Random):
    """A generator whose throws are given."""

    def __init__(self, throws):
        self.throws = list(throws)

    def randrange(self, n):
        throw = self.throws.pop(0)
        assert throw < n
        return throw


def test_every_subset_is_equally_likely_in_a_reservoir():
    """Algorithm R exactly (Vitter 1985): over all throws of the generator each 2 of 5 come up 6
    times.
    """
    found: Counter[frozenset[str]] = Counter()
    for throws in product(range(3), range(4), range(5)):
        kept: list[Encoded] = []
        update_reservoir(kept, rows(0, 5), 2, 0, Scripted(throws))
        found[frozenset(e.id for e in kept)] += 1
    assert found == {frozenset(pair): 6 for pair in combinations([f"0/{i}" for i in range(5)], 2)}


def test_a_reservoir_is_uniform_over_examples_of_all_tasks_however_they_arrive():
    runs, capacity, sizes = 3000, 6, [3, 7, 10]
    found = Counter(
        e.id for seed in range(runs) for e in filled(sizes, capacity, "reservoir", seed).examples
    )
    expected, deviation = runs * 6 / 20, (runs * 6 / 20 * 14 / 20) ** 0.5
    assert len(found) == 20
    assert all(abs(n - expected) < 4 * deviation for n in found.values())


def test_a_balanced_buffer_is_uniform_within_each_task():
    runs, sizes = 3000, [10, 5]
    found = Counter(e.id for seed in range(runs) for e in filled(sizes, 4, seed=seed).examples)
    for t, n in enumerate(sizes):
        expected, deviation = runs * 2 / n, (runs * 2 / n * (1 - 2 / n)) ** 0.5
        assert all(abs(found[f"{t}/{i}"] - expected) < 4 * deviation for i in range(n))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=6), st.integers(1, 40), st.integers(0, 9))
def test_a_balanced_buffer_parts_its_capacity_equally(sizes, capacity, seed):
    kept = Counter(e.task_index for e in filled(sizes, capacity, seed=seed).examples)
    part, rest = divmod(capacity, len(sizes))
    assert sum(kept.values()) <= capacity
    for t, n in enumerate(sizes):
        assert min(n, part) <= kept[t] <= min(n, part + (rest > 0))
    if min(sizes) > part:
        assert sum(kept.values()) == capacity


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=6), st.integers(1, 40), st.integers(0, 9))
def test_a_reservoir_is_full_as_soon_as_it_can_be(sizes, capacity, seed):
    buffer = filled(sizes, capacity, "reservoir", seed)
    ids = [e.id for e in buffer.examples]
    assert len(buffer) == min(capacity, sum(sizes))
    assert len(set(ids)) == len(ids)
    assert set(ids) <= {e.id for t, n in enumerate(sizes) for e in rows(t, n)}


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 50), min_size=1, max_size=5),
    st.floats(0.01, 0.99),
    st.sampled_from(["balanced", "reservoir"]),
)
def test_a_fraction_is_kept_of_each_task_and_at_least_one_example(sizes, fraction, kind):
    kept = Counter(e.task_index for e in filled(sizes, fraction, kind).examples)
    assert kept == {t: max(1, round(fraction * n)) for t, n in enumerate(sizes)}


def test_an_empty_buffer_keeps_nothing_and_gives_nothing():
    for kind in ("balanced", "reservoir"):
        buffer = filled([5, 5], 0, kind)
        assert len(buffer) == 0
        assert buffer.draw(3) == []


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 20), st.integers(0, 9))
def test_none_is_drawn_twice_before_all_have_been_drawn_once(n, seed):
    drawn = Counter(e.id for e in filled([4, 3], 6, seed=seed).draw(n))
    assert sum(drawn.values()) == n
    assert all(n // 6 <= drawn[i] <= -(-n // 6) for i in drawn)
    assert len(drawn) == min(n, 6)


@pytest.mark.parametrize("kind", ["balanced", "reservoir"])
def test_the_same_seed_keeps_and_draws_the_same(kind):
    one, two, other = (filled([30, 30], 10, kind, seed) for seed in (1, 1, 2))
    assert one.examples == two.examples != other.examples
    assert one.draw(20) == two.draw(20)


@pytest.mark.parametrize("capacity", [-1, 2.5])
def test_a_capacity_that_is_neither_count_nor_fraction_is_refused(capacity):
    with pytest.raises(ConfigError, match="whole number of examples, or a fraction"):
        ReplayBuffer(capacity)


def test_an_unknown_buffer_is_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match="did you mean 'reservoir'"):
        ReplayBuffer(5, "resevoir")


@dataclass(kw_only=True)
class Counting(Replay):
    """Replay that remembers how many new and old examples each step had."""

    steps: list[tuple[int, int]] = field(init=False, default_factory=list)
    current: int = field(init=False, default=0)

    def begin(self, model, task):
        self.current = task.train[0].task_index
        return super().begin(model, task)

    def backward(self, model, batch):
        self.steps.append((0, 0))
        return super().backward(model, batch)

    def loss(self, model, batch):
        new = sum(e.task_index == self.current for e in batch.examples)
        before = self.steps[-1]
        self.steps[-1] = (before[0] + new, before[1] + len(batch.examples) - new)
        return super().loss(model, batch)


def counted(share: float, batch_size: int, tokens: int = 4096) -> list[tuple[int, int]]:
    made, strategy = (
        toy.make_model(tokens_per_microbatch=tokens),
        Counting(capacity=20, share=share),
    )
    recipe = Recipe(lr=1e-3, batch_size=batch_size)
    toy.train_stages(made, strategy, 0, recipe=recipe)
    assert all(old == 0 for _, old in strategy.steps)
    strategy.steps.clear()
    toy.train_stages(made, strategy, 1, recipe=recipe)
    return strategy.steps


def test_a_share_that_is_a_whole_number_is_met_by_every_step():
    assert counted(share=0.25, batch_size=6) == [(6, 2), (6, 2)]
    assert counted(share=0.5, batch_size=4) == [(4, 4), (4, 4), (4, 4)]


def test_micro_batches_do_not_change_the_share():
    assert counted(share=0.25, batch_size=6, tokens=20) == [(6, 2), (6, 2)]


def test_the_rest_of_a_share_is_carried_to_the_next_step():
    assert counted(share=0.3, batch_size=4) == [(4, 1), (4, 2), (4, 2)]  # 12 * 3/7 = 5.14


@settings(max_examples=200, deadline=None)
@given(st.floats(0, 0.95), st.lists(st.integers(1, 20), min_size=1, max_size=30))
def test_the_running_share_is_exact_to_within_one_example(share, sizes):
    strategy, batch = (
        Replay(capacity=8, share=share),
        Batch((), Layout(pad_token_id=1, device=torch.device("cpu"))),
    )
    strategy.buffer.add("a", rows(0, 8))
    new = old = 0
    for n in sizes:
        joined = strategy.add_replay_examples(batch.with_examples(rows(1, n)))
        assert list(joined.examples[:n]) == rows(1, n)
        new, old = new + n, old + len(joined.examples) - n
        assert -1e-6 <= share * (new + old) - old < 1


@pytest.mark.parametrize("share", [1, -0.1, 1.5])
def test_a_share_that_leaves_no_room_for_new_examples_is_refused(share):
    with pytest.raises(ConfigError, match="replay share"):
        Replay(share=share)


def test_the_buffer_can_be_read_in_the_checkpoint(tmp_path):
    made, strategy = toy.make_model(), Replay(capacity=4)
    toy.train_stages(made, strategy, 0, 1)
    checkpoint.save(tmp_path / "stage-02", made, strategy, toy.empty_matrix())
    told = json.loads((tmp_path / "stage-02" / "memory.json").read_text("utf-8"))
    fields = dict(told["dict"])["buffer"]["fields"]
    kept = {
        task: [e["example"]["text"] for e in examples] for task, examples in fields["tasks"]["dict"]
    }
    assert kept == {t: [e.text for e in strategy.buffer.tasks[t]] for t in ("a", "b")}
    assert [len(texts) for texts in kept.values()] == [2, 2]
    assert kept["a"][0].startswith("task a, row ")


def test_a_loaded_buffer_draws_what_the_saved_one_would_have_drawn(tmp_path):
    made, strategy, again = toy.make_model(), Replay(capacity=10), Replay(capacity=10)
    toy.train_stages(made, strategy, 0, 1)
    checkpoint.save(tmp_path / "stage-02", made, strategy, toy.empty_matrix())
    checkpoint.load(tmp_path / "stage-02", made, again)
    assert again.buffer.draw(30) == strategy.buffer.draw(30)


def test_a_step_on_new_and_remembered_examples_is_a_step_on_both_together():
    made, strategy = toy.make_model(), Replay(capacity=12, share=0.5)
    strategy.begin(made, toy.make_task(0))
    strategy.end(made, toy.make_task(0))
    strategy.begin(made, toy.make_task(1))
    loss = strategy.backward(made, made.batch(toy.make_examples(1)))
    together = toy.mean_loss(made.net, [*toy.make_examples(0), *toy.make_examples(1)])
    assert loss.item() == pytest.approx(together.item(), rel=1e-5)
