"""Multi-turn coherence: conversations that continue from the model's own answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from continual.data.template import Encoder
from continual.data.types import Example, Message
from continual.errors import ConfigError, DataError
from continual.evaluation.metrics import REFERENCE_METRICS
from continual.evaluation.probes.base import (
    Predict,
    Probe,
    ProbeEntry,
    ProbeResult,
    RunSetup,
    StageContext,
    check_generates_answers,
    check_minimum,
    mean_or_none,
)
from continual.evaluation.scoring import EvalSet
from continual.results.prediction import Prediction

SOURCE = (
    "turns answered behind the model's own answers (Zheng et al. 2023, MT-Bench), against the "
    "same turn asked alone (Kwan et al. 2024, MT-Eval)"
)
NO_ANSWER = Prediction("", {"score": 0.0}, answer="")


@dataclass(frozen=True)
class TaskConversations:
    """A task's conversations, and what is needed to encode their turns."""

    task: str
    task_index: int
    metric: str
    rows: Sequence[Example]
    max_new_tokens: int
    encoder: Encoder

    def answer_turns(self, predict: Predict, turns: Sequence[Example]) -> list[Prediction]:
        """Answer the turns; a turn that leaves no room for an answer gets NO_ANSWER."""
        found, encoded = [NO_ANSWER for _ in turns], {}
        for i, turn in enumerate(turns):
            encoding = self.encoder.encode_prompt(turn, self.task_index, self.max_new_tokens)
            if encoding.encoded is not None:
                encoded[i] = encoding.encoded
        if encoded:
            test = EvalSet(
                self.task,
                self.metric,
                [turns[i] for i in encoded],
                [*encoded.values()],
                self.max_new_tokens,
            )
            for i, row in zip(encoded, predict(test), strict=True):
                found[i] = row
        return found


@dataclass(kw_only=True)
class Turns(Probe):
    """Coherence over several turns, each answered greedily after the model's own answers.

    A turn's score is that of the task's metric against the row's own answer; the turn is passed if
    it is at least `pass_score`. The values, all of them means over tasks, are

    - `first turn` and `later turns`: mean scores;
    - `completed`: the share of conversations whose turns are all passed with answers that are not
      empty;
    - `context`: among the later turns that fail without the turns before them, the share that is
      passed in the conversation. These turns need an earlier one. None if there are none;
    - `consistent`: the mean score of the answer to the first question, repeated after the whole
      conversation, against the model's first answer; an empty answer scores 0.

    Conversations whose own answers leave no room for the repeated question are left out and
    counted. A turn is unanswered if longer answers of the model leave no room for it.
    """

    pass_score: float = 0.5
    max_examples: int | None = 50
    conversations: list[TaskConversations] = field(init=False, repr=False, default_factory=list)
    num_skipped: int = field(init=False, default=0)

    def prepare(self, setup: RunSetup) -> None:
        """Select the conversations; raise ConfigError if none has several turns."""
        check_minimum("turns", 1, max_examples=self.max_examples)
        if not 0 < self.pass_score <= 1:
            raise ConfigError(
                f"probe.turns.pass_score={self.pass_score}: expected a mark above 0, at most 1"
            )
        check_generates_answers("turns", setup)
        for index, task in enumerate(setup.stream.tasks):
            metric, encoder = setup.metric_name(task), setup.encoder
            rows = [e for e in task.get_split(setup.config.score.split) if len(e.user_turns) > 1][
                : self.max_examples
            ]
            if not rows:
                continue
            if metric not in REFERENCE_METRICS:
                raise ConfigError(
                    f"probe=[turns] marks single answers, which {metric} does not; set "
                    f"score.metric to one of {', '.join(REFERENCE_METRICS)}, or leave the probe out"
                )
            room = setup.config.score.max_new_tokens or max(
                encoder.count_answer_tokens(_turn_example(e, (), t))
                for e in rows
                for t in range(len(e.user_turns))
            )
            fit = [
                e
                for e in rows
                if _prompt_fits(encoder, _repeated_question_example(e, _references(e)), room)
            ]
            self.num_skipped += len(rows) - len(fit)
            if fit:
                self.conversations.append(
                    TaskConversations(task.name, index, metric, fit, room, encoder)
                )
        if self.num_skipped and setup.encoder.on_unusable == "error":
            raise DataError(
                f"probe=[turns]: {self.num_skipped} conversations leave no room for their first "
                f"question asked again ({setup.encoder.max_tokens} tokens); raise data.max_length "
                "as far as the model's context goes, or set data.on_unusable=skip"
            )
        if not self.conversations:
            raise ConfigError(
                'probe=[turns] needs rows of {"messages": [...]} in which the user speaks twice or '
                f"more, and no task has any that fit in its {setup.config.score.split} rows; leave "
                "the probe out"
            )

    @property
    def entries(self) -> Mapping[str, ProbeEntry]:
        """Describe the table."""
        told = [f"{chats.task}: {len(chats.rows)} conversations" for chats in self.conversations]
        told += [f"{self.num_skipped} left out for want of room"] if self.num_skipped else []
        return {
            "turns": ProbeEntry(
                "conversations answered behind the model's own answers: mean marks; completed: "
                f"share with every turn answered and met (mark of {self.pass_score:g}); context: share "
                "met of the later turns not met when asked alone; consistent: agreement of the "
                "first answer with that to the same question asked again at the end "
                f"({'; '.join(told)})",
                SOURCE,
            )
        }

    def measure(self, context: StageContext) -> ProbeResult:
        """Run the conversations."""
        each = [self._measure_task(context.predict, chats) for chats in self.conversations]
        return {"turns": {label: mean_or_none(told[label] for told in each) for label in each[0]}}

    def _measure_task(self, ask: Predict, chats: TaskConversations) -> dict[str, float | None]:
        """Return the values of one task."""
        rows = chats.rows
        said: list[list[Prediction]] = [[] for _ in rows]
        for t in range(max(len(e.user_turns) for e in rows)):
            here = [i for i, e in enumerate(rows) if t < len(e.user_turns)]
            told = chats.answer_turns(
                ask, [_turn_example(rows[i], _answers(said[i]), t) for i in here]
            )
            for i, answer in zip(here, told, strict=True):
                said[i].append(answer)
        later = [(i, t) for i, e in enumerate(rows) for t in range(1, len(e.user_turns))]
        alone = chats.answer_turns(ask, [_single_turn_example(rows[i], t) for i, t in later])
        again = chats.answer_turns(
            ask,
            [
                _repeated_question_example(e, _answers(told))
                for e, told in zip(rows, said, strict=True)
            ],
        )
        needy = [
            said[i][t]
            for (i, t), single in zip(later, alone, strict=True)
            if single.score < self.pass_score
        ]
        return {
            "first turn": mean_or_none(told[0].score for told in said),
            "later turns": mean_or_none(said[i][t].score for i, t in later),
            "completed": mean_or_none(
                float(all(_is_answered(a) and a.score >= self.pass_score for a in told))
                for told in said
            ),
            "context": mean_or_none(float(a.score >= self.pass_score) for a in needy),
            "consistent": mean_or_none(a.score if _is_answered(a) else 0.0 for a in again),
        }


def _answers(predictions: Sequence[Prediction]) -> list[str]:
    return [prediction.answer or "" for prediction in predictions]


def _is_answered(prediction: Prediction) -> bool:
    return bool(prediction.answer and prediction.answer.strip())


def _references(e: Example) -> list[str]:
    """Return the assistant's messages of a row."""
    return [m.content for m in e.messages if m.role == "assistant"]


def _make_conversation(
    e: Example, name: str, questions: Sequence[str], answers: Sequence[str], reference: str
) -> Example:
    """Make a conversation of questions and answers whose last answer is the reference."""
    system = tuple(m for m in e.messages if m.role == "system")
    spoken = [
        m
        for q, a in zip(questions, (*answers, reference), strict=True)
        for m in (Message("user", q), Message("assistant", a))
    ]
    return Example(f"{e.id} {name}", e.task, "", "", (reference,), (*system, *spoken), e.location)


def _turn_example(e: Example, answers: Sequence[str], t: int) -> Example:
    """Return turn `t`, from 0, after these answers, or after the row's own if there are none."""
    own = answers if answers else _references(e)[:t]
    return _make_conversation(e, f"turn {t + 1}", e.user_turns[: t + 1], own, _references(e)[t])


def _single_turn_example(e: Example, t: int) -> Example:
    """Return turn `t` without the turns before it."""
    return _make_conversation(
        e, f"turn {t + 1} alone", e.user_turns[t : t + 1], (), _references(e)[t]
    )


def _repeated_question_example(e: Example, answers: Sequence[str]) -> Example:
    """Repeat the first question after the conversation; the reference is its first answer."""
    questions = e.user_turns
    return _make_conversation(e, "again", [*questions, questions[0]], answers, answers[0])


def _prompt_fits(encoder: Encoder, e: Example, room: int) -> bool:
    return encoder.encode_prompt(e, 0, room).encoded is not None
