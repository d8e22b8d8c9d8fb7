"""Episodes by instruction type: one stage of all tasks from which meta-learning draws support and
query of one each.
"""

from collections import Counter
from dataclasses import dataclass, field
from functools import cache

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from continual.data.template import Encoder
from continual.data.types import Task
from continual.strategy.interface import Strategy
from continual.training.recipe import Recipe
from continual.training.stage import train_stage
from strategies.maml import MAML
from streams.arrange import EPISODE_ROWS
from streams.skills.stream import generate_skills
from tests.support import toy
from tests.support.models import TASKS, load_json_lines, run_in_process, train_byte_bpe


@dataclass(kw_only=True)
class Noting(Strategy):
    """Notes the examples of every step, and learns nothing."""

    steps: list = field(default_factory=list)

    def backward(self, model, batch):
        self.steps.append(batch.examples)
        return torch.zeros(())


@cache
def made():
    return toy.make_model()


def drawn(sizes, episode, batch_size, epochs=1):
    """The examples of every step of a stage of so many rows of each task."""
    mixed = Task(
        "mixed",
        [e for i, n in enumerate(sizes) for e in toy.make_examples(i, n)],
        task_names=toy.TASK_NAMES,
        episode_size=episode,
    )
    noting = Noting()
    train_stage(
        made(),
        mixed,
        noting,
        Recipe(lr=0.0, epochs=epochs, batch_size=batch_size),
        seed=1,
        log_event=lambda event: None,
    )
    return noting.steps


def test_a_step_is_made_of_whole_episodes_of_one_task_each():
    steps = drawn((12, 8, 16), episode=4, batch_size=8)
    assert len(steps) == 5
    for step in steps:
        assert all(
            len({e.task_index for e in step[i : i + 4]}) == 1 for i in range(0, len(step), 4)
        )
    assert len({tuple(sorted({e.task_index for e in step})) for step in steps}) > 1, (
        "steps are of different tasks"
    )


@settings(max_examples=10, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(1, 5), st.integers(1, 9))
def test_every_row_is_learned_once_an_epoch(sizes, episode, batch_size):
    seen = Counter(e.id for step in drawn(sizes, episode, batch_size) for e in step)
    assert len(seen) == sum(sizes)
    assert set(seen.values()) == {1}


def test_each_epoch_draws_other_episodes():
    first, second, *_ = (
        sorted(e.id for e in step) for step in drawn((8,), episode=4, batch_size=4, epochs=2)[::2]
    )
    assert first != second


def test_maml_takes_half_of_an_episode_to_adapt_and_half_to_judge():
    episode = toy.make_model().batch(toy.make_examples(0, EPISODE_ROWS))
    ((support,), query) = MAML(inner_steps=1).split_episode(episode)
    assert [e.id for part in support for e in part.examples] == [
        e.id for e in episode.examples[: EPISODE_ROWS // 2]
    ]
    assert query.examples == episode.examples[EPISODE_ROWS // 2 :]


def test_the_arrangement_is_one_stage_of_all_tasks_with_the_episodes_of_its_mixture():
    stream = generate_skills(
        seed=0, train_size=20, dev_size=2, test_size=2, pretraining_size=0, arrangement="episodes"
    )
    (stage,) = stream.stages
    assert (stage.name, stage.episode_size, len(stage.train)) == (
        "episodes",
        EPISODE_ROWS,
        20 * len(stream.tasks),
    )
    columns = {t.name: i for i, t in enumerate(stream.tasks)}
    tokenizer = train_byte_bpe([f"{e.instruction} {e.input} {e.outputs[0]}" for e in stage.train])
    assert Encoder(tokenizer, "plain", 64).encode_task(stage, columns).episode_size == EPISODE_ROWS


def test_meta_training_as_preparation_and_as_a_strategy_are_one_command(run_keys, tmp_path):
    prepared, _ = run_in_process(
        tmp_path / "a", run_keys, "strategy=maml", "stream.arrange=episodes"
    )
    continual, _ = run_in_process(tmp_path / "b", run_keys, "strategy=maml")
    assert prepared.stages == ("base", "episodes")
    assert continual.stages == ("base", *TASKS)
    assert prepared.is_finished
    steps = {e["event"]: e.get("steps") for e in load_json_lines(tmp_path / "a/events.jsonl")}[
        "stage"
    ]
    assert steps * 3 >= len(TASKS)
