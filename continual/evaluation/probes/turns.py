"""Multi-turn coherence: conversations in which the model goes on from its own earlier answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from continual.data.template import Encoder, UnusableExampleError
from continual.data.types import Example, Message
from continual.errors import ConfigError, DataError
from continual.evaluation.metrics import METRICS
from continual.evaluation.probes.base import (
    Ask,
    Entry,
    Found,
    Look,
    Probe,
    Setting,
    answered,
    at_least,
    known_mean,
)
from continual.evaluation.scoring import Test

SOURCE = (
    "turns answered behind the model's own answers (Zheng et al. 2023, MT-Bench), against the "
    "same turn asked alone (Kwan et al. 2024, MT-Eval)"
)
UNANSWERED = {"answer": "", "score": 0.0}


@dataclass(frozen=True)
class Chats:
    """A task's conversations, with what it takes to ask their turns."""

    task: str
    index: int
    metric: str
    rows: Sequence[Example]
    room: int
    encoder: Encoder

    def answers(self, ask: Ask, turns: Sequence[Example]) -> list[dict[str, Any]]:
        """The answer to each, with its mark; one that leaves no room for an answer is unanswered."""
        found, encoded = [dict(UNANSWERED) for _ in turns], {}
        for i, turn in enumerate(turns):
            try:
                encoded[i] = self.encoder.encode_prompt(turn, self.index, self.room)
            except UnusableExampleError:
                continue
        if encoded:
            test = Test(
                self.task, self.metric, [turns[i] for i in encoded], [*encoded.values()], self.room
            )
            for i, row in zip(encoded, ask(test), strict=True):
                found[i] = row
        return found


@dataclass(kw_only=True)
class Turns(Probe):
    """Chat tasks with several turns, each answered greedily behind the model's own earlier answers.

    A turn's mark is its answer's by the task's metric against the row's own answer, and it is met
    from `met` on. Then

    - `first turn` and `later turns` are mean marks;
    - `completed`: the share of conversations of which every turn has an answer that is not empty,
      and is met;
    - `context`: of the later turns that are not met where they are asked alone, without the turns
      before them, the share that is met in the conversation: those need an earlier turn. None where
      there are none;
    - `consistent`: the mean mark of the answer to the first question, asked again behind the whole
      conversation, against the answer that it had at first; an empty answer agrees with nothing.

    Conversations whose own answers leave no room for the question asked again are left out and
    counted; a turn that longer answers of the model leave no room for is unanswered. All figures
    are means over tasks.
    """

    met: float = 0.5
    limit: int | None = 50
    chats: list[Chats] = field(init=False, repr=False, default_factory=list)
    left_out: int = field(init=False, default=0)

    def ready(self, setting: Setting) -> None:
        """Find the conversations; raises ConfigError where there are none of several turns."""
        at_least("turns", 1, limit=self.limit)
        if not 0 < self.met <= 1:
            raise ConfigError(f"probe.turns.met={self.met}: expected a mark above 0, at most 1")
        answered("turns", setting)
        for index, task in enumerate(setting.stream.tasks):
            metric, encoder = setting.metric(task), setting.apart()
            rows = [
                e for e in task.get_split(setting.config.score.split) if len(_questions(e)) > 1
            ][: self.limit]
            if not rows:
                continue
            if metric not in METRICS:
                raise ConfigError(
                    f"probe=[turns] marks single answers, which {metric} does not; set "
                    f"score.metric to one of {', '.join(METRICS)}, or leave the probe out"
                )
            room = setting.config.score.max_new_tokens or max(
                encoder.count_answer_tokens(_turn(e, (), t))
                for e in rows
                for t in range(len(_questions(e)))
            )
            fit = [e for e in rows if _fits(encoder, _again(e, _references(e)), room)]
            self.left_out += len(rows) - len(fit)
            if fit:
                self.chats.append(Chats(task.name, index, metric, fit, room, encoder))
        if self.left_out and setting.encoder.on_unusable == "error":
            raise DataError(
                f"probe=[turns]: {self.left_out} conversations leave no room for their first "
                f"question asked again ({setting.encoder.max_tokens} tokens); raise data.max_length "
                "as far as the model's context goes, or set data.on_unfit=skip"
            )
        if not self.chats:
            raise ConfigError(
                'probe=[turns] needs rows of {"messages": [...]} in which the user speaks twice or '
                f"more, and no task has any that fit in its {setting.config.score.split} rows; leave "
                "the probe out"
            )

    @property
    def entries(self) -> Mapping[str, Entry]:
        """One table."""
        told = [f"{chats.task}: {len(chats.rows)} conversations" for chats in self.chats]
        told += [f"{self.left_out} left out for want of room"] if self.left_out else []
        return {
            "turns": Entry(
                "conversations answered behind the model's own answers: mean marks; completed: "
                f"share with every turn answered and met (mark of {self.met:g}); context: share "
                "met of the later turns not met when asked alone; consistent: agreement of the "
                "first answer with that to the same question asked again at the end "
                f"({'; '.join(told)})",
                SOURCE,
            )
        }

    def measure(self, look: Look) -> Found:
        """Hold the conversations."""
        each = [self._of(look.ask, chats) for chats in self.chats]
        return {"turns": {label: known_mean(told[label] for told in each) for label in each[0]}}

    def _of(self, ask: Ask, chats: Chats) -> dict[str, float | None]:
        """The figures of one task."""
        rows = chats.rows
        said: list[list[dict[str, Any]]] = [[] for _ in rows]
        for t in range(max(len(_questions(e)) for e in rows)):
            here = [i for i, e in enumerate(rows) if t < len(_questions(e))]
            told = chats.answers(
                ask, [_turn(rows[i], [a["answer"] for a in said[i]], t) for i in here]
            )
            for i, answer in zip(here, told, strict=True):
                said[i].append(answer)
        later = [(i, t) for i, e in enumerate(rows) for t in range(1, len(_questions(e)))]
        alone = chats.answers(ask, [_alone(rows[i], t) for i, t in later])
        again = chats.answers(
            ask,
            [_again(e, [a["answer"] for a in told]) for e, told in zip(rows, said, strict=True)],
        )
        needy = [
            said[i][t]
            for (i, t), single in zip(later, alone, strict=True)
            if single["score"] < self.met
        ]
        return {
            "first turn": known_mean(told[0]["score"] for told in said),
            "later turns": known_mean(said[i][t]["score"] for i, t in later),
            "completed": known_mean(
                float(all(a["answer"].strip() and a["score"] >= self.met for a in told))
                for told in said
            ),
            "context": known_mean(float(a["score"] >= self.met) for a in needy),
            "consistent": known_mean(a["score"] if a["answer"].strip() else 0.0 for a in again),
        }


def _questions(e: Example) -> list[str]:
    """What the user says, turn by turn."""
    return [m.content for m in e.messages if m.role == "user"]


def _references(e: Example) -> list[str]:
    """What the row's assistant answers."""
    return [m.content for m in e.messages if m.role == "assistant"]


def _conversation(
    e: Example, name: str, questions: Sequence[str], answers: Sequence[str], reference: str
) -> Example:
    """The questions with an answer each but for the last one, to which the reference is the answer."""
    system = tuple(m for m in e.messages if m.role == "system")
    spoken = [
        m
        for q, a in zip(questions, (*answers, reference), strict=True)
        for m in (Message("user", q), Message("assistant", a))
    ]
    return Example(f"{e.id} {name}", e.task, "", "", (reference,), (*system, *spoken), e.location)


def _turn(e: Example, answers: Sequence[str], t: int) -> Example:
    """Turn `t`, from 0, behind these answers, the row's own where there are none."""
    own = answers if answers else _references(e)[:t]
    return _conversation(e, f"turn {t + 1}", _questions(e)[: t + 1], own, _references(e)[t])


def _alone(e: Example, t: int) -> Example:
    """Turn `t` without the turns before it."""
    return _conversation(e, f"turn {t + 1} alone", _questions(e)[t : t + 1], (), _references(e)[t])


def _again(e: Example, answers: Sequence[str]) -> Example:
    """The first question behind the whole conversation; right is what was answered at first."""
    questions = _questions(e)
    return _conversation(e, "again", [*questions, questions[0]], answers, answers[0])


def _fits(encoder: Encoder, e: Example, room: int) -> bool:
    try:
        encoder.encode_prompt(e, 0, room)
    except UnusableExampleError:
        return False
    return True
