"""From an example's text to token ids, with the exact boundary between what is asked and what is
answered.

Prompt and response are tokenised as separate pieces and joined as ids, so no merge can shift the
boundary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from continual.data.types import Encoded, Example, Message, Stream, Task
from continual.errors import ConfigError, DataError, gathered, unknown

TextSegment = tuple[str, bool]  # text, and whether it is a response


@dataclass(frozen=True)
class Template:
    """How one turn is written: the prompt with and without an input, and what stands before each
    response.
    """

    prompt_format: str
    prompt_format_with_input: str
    response_prefix: str = (
        ""  # belongs to the response: most tokenizers spell a word with the space before it
    )
    turn_separator: str = "\n"


TEMPLATES: Mapping[str, Template] = {
    "plain": Template("{instruction}\n", "{instruction}\n{input}\n"),
    "alpaca": Template(
        "### Instruction:\n{instruction}\n\n### Response:\n",
        "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n",
        turn_separator="\n\n",
    ),
    "human_assistant": Template(
        "### Human: {instruction}\n### Assistant:",
        "### Human: {instruction}\n{input}\n### Assistant:",
        response_prefix=" ",
    ),
    "inst": Template(
        "[INST] {instruction} [/INST]",
        "[INST] {instruction}\n{input} [/INST]",
        response_prefix=" ",
        turn_separator="",
    ),
}
CHAT = "chat"  # the tokenizer's own template
PLACEHOLDER = "\ue000"  # a content that no template writes of its own accord


class UnusableExampleError(DataError):
    """One example that cannot be learned or asked as it is: no response, or too long."""


@dataclass(frozen=True)
class Encoder:
    """Turns examples into ids for one tokenizer, template and length.

    `limit` is the most tokens an example may take, prompt and response together. Too long an
    `input` is shortened from its end; the instruction and the response never are. `on_unfit` says
    what becomes of an example that still does not fit, or whose response is empty: "error", or
    "skip", which counts it in `skipped`. Before every prompt that is asked stand the examples
    `shown`, answered; where the limit leaves no room for all, the first ones are left out, and the
    prompt is counted in `fewer`.
    """

    tokenizer: Any
    template: str = "plain"
    max_tokens: int = 512
    seq2seq: bool = False
    on_unusable: str = "error"
    skipped: list[str] = field(default_factory=list)
    shortened: list[str] = field(default_factory=list)
    demonstrations: tuple[Example, ...] = ()
    fewer: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Refuse an unknown template or option before anything is read."""
        if self.template not in TEMPLATES and self.template != CHAT:
            raise ConfigError(unknown("data.template", self.template, [*TEMPLATES, CHAT]))
        if self.on_unusable not in ("error", "skip"):
            raise ConfigError(unknown("data.on_unusable", self.on_unusable, ["error", "skip"]))
        if self.template == CHAT and not getattr(self.tokenizer, "chat_template", None):
            raise ConfigError(
                "data.template=chat needs a tokenizer with a chat template, and this one has "
                f"none; choose one of {', '.join(TEMPLATES)}"
            )

    @cached_property
    def special_ids(self) -> tuple[list[int], list[int]]:
        """The ids that stand before and after a text, of the tokenizer's own accord (a BOS, T5's
        </s>).

        A chat template writes what stands before it itself, as `apply_chat_template` has it.
        """
        bare: list[int] = self.tokenizer("a", add_special_tokens=False)["input_ids"]
        full: list[int] = self.tokenizer("a")["input_ids"]
        at = next(i for i in range(len(full)) if full[i : i + len(bare)] == bare)
        return [] if self.template == CHAT else full[:at], full[at + len(bare) :]

    def tokenize(self, text: str) -> list[int]:
        """The ids of one piece, no special token added."""
        return (
            list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
            if text
            else []
        )

    def encode_example(self, example: Example, task_index: int) -> Encoded:
        """The example with its responses marked; raises Unfit."""
        if not "".join(example.outputs).strip() or not example.outputs[0].strip():
            raise UnusableExampleError(
                f"{example.location}: the response is empty, and there is nothing to learn from it; "
                "write an output, remove the row, or set data.on_unusable=skip"
            )
        return self._shorten_to_fit(
            example,
            task_index,
            lambda e: render_segments(e, self.template, self.tokenizer),
            self.max_tokens,
        )

    def encode_prompt(self, example: Example, task_index: int, max_new_tokens: int) -> Encoded:
        """The prompt alone, leaving `room` tokens for the answer; raises Unfit."""
        limit = self.max_tokens if self.seq2seq else self.max_tokens - max_new_tokens
        for first in range(len(self.demonstrations)):
            shown = self.demonstrations[first:]
            parts = render_segments(example, self.template, self.tokenizer, shown)[:-1]
            whole = self._join_segments(
                example, task_index, parts, len(parts) + 1 - 2 * _count_responses(example)
            )
            if len(whole.ids) <= limit:
                self.fewer.extend([example.id] * (first > 0))
                return whole
        self.fewer.extend([example.id] * (self.demonstrations != ()))
        left = (
            ""
            if self.seq2seq
            else f" ({self.max_tokens} less {max_new_tokens} for the answer: score.max_new_tokens)"
        )
        return self._shorten_to_fit(
            example,
            task_index,
            lambda e: render_segments(e, self.template, self.tokenizer)[:-1],
            limit,
            left,
        )

    def count_answer_tokens(self, example: Example) -> int:
        """The tokens of the longest accepted answer and its end of sequence."""
        answers = [
            render_segments(_with_answer(example, o), self.template, self.tokenizer)[-1][0]
            for o in example.outputs
        ]
        return max(len(self.tokenize(a)) for a in answers) + 1

    def _shorten_to_fit(
        self,
        example: Example,
        task_index: int,
        render: Callable[[Example], list[TextSegment]],
        limit: int,
        limit_note: str = "",
    ) -> Encoded:
        whole = self._join_segments(example, task_index, render(example))
        if len(whole.ids) <= limit:
            return whole
        low, high, best = 0, len(example.input), None  # the longest input that fits, by bisection
        while low <= high:
            kept = (low + high) // 2
            shorter = replace(example, input=example.input[:kept])
            tried = self._join_segments(example, task_index, render(shorter))
            if len(tried.ids) <= limit:
                best, low = tried, kept + 1
            else:
                high = kept - 1
        if best is None or example.messages:
            without = f" ({len(tried.ids)} with no input at all)" if example.input else ""
            raise UnusableExampleError(
                f"{example.location}: takes {len(whole.ids)} tokens{without}, and the limit is "
                f"{limit}{limit_note}; raise data.max_length as far as the model's context goes, "
                "shorten the row, or set data.on_unusable=skip"
            )
        self.shortened.append(example.id)
        return best

    def _join_segments(
        self,
        example: Example,
        task_index: int,
        parts: Sequence[TextSegment],
        num_context_segments: int = 0,
    ) -> Encoded:
        """The pieces as ids; the first ones that are `shown` are answered, and not learned."""
        before, after = self.special_ids
        ids, response = list(before), [False] * len(before)
        for i, (text, learned) in enumerate(parts):
            piece = self.tokenize(text)
            learned = learned and not (
                self.seq2seq and i < num_context_segments
            )  # an encoder's text ends once
            if learned and piece[-1:] != [self.tokenizer.eos_token_id]:
                piece.append(self.tokenizer.eos_token_id)
            ids += piece
            response += [learned and i >= num_context_segments] * len(piece)
        if self.seq2seq:
            ids, response = _end_source(ids, response, after, example)
        return Encoded(
            example.id, task_index, tuple(ids), tuple(response), "".join(text for text, _ in parts)
        )

    def encode_task(
        self,
        task: Task[Example],
        task_indices: Mapping[str, int],
        *,
        include_dev: bool = False,
        encode_rows: Callable[[Sequence[Example]], tuple[Encoded, ...]] | None = None,
    ) -> Task[Encoded]:
        """The task with `train` encoded, and `dev` if asked; `columns` maps a task's name to its
        column.

        `encoded` gives rows that were tokenised before. Raises DataError where no train row is
        left.
        """
        encode_rows = encode_rows or (
            lambda rows: self.encode_all(
                rows, lambda e: self.encode_example(e, task_indices[e.task])
            )
        )
        if not (train := encode_rows(task.train)):
            raise DataError(no_rows_message(task.name))
        return Task(
            task.name,
            train,
            encode_rows(task.dev) if include_dev else (),
            (),
            task.metric,
            task.labels,
            task.category,
            tuple(task_indices),
            episode_size=task.episode_size,
        )

    def encode_all(
        self, examples: Sequence[Example], encode: Callable[[Example], Encoded]
    ) -> tuple[Encoded, ...]:
        """Each example encoded; all that are unfit in one DataError, or skipped and counted where
        that was asked.
        """
        return tuple(e for e in self.iter_encoded(examples, encode) if e)

    def iter_encoded(
        self, examples: Sequence[Example], encode: Callable[[Example], Encoded]
    ) -> Iterator[Encoded | None]:
        """The same one after another, None for what is skipped; the DataError comes after the last."""
        problems = []
        for example in examples:
            try:
                yield encode(example)
            except UnusableExampleError as problem:
                problems.append(str(problem))
                self.skipped.append(example.id)
                yield None
        if problems and self.on_unusable == "error":
            raise DataError(gathered(problems))


def no_rows_message(task: str) -> str:
    """Why a task without a row that can be learned is refused."""
    return f"task {task!r} has no train rows left; add rows, or raise data.max_length"


def index_tasks(stream: Stream) -> dict[str, int]:
    """The column of each task in the matrix."""
    return {task.name: i for i, task in enumerate(stream.tasks)}


def _end_source(
    ids: list[int], response: list[bool], after: list[int], example: Example
) -> tuple[Any, Any]:
    """An encoder's text ends with the tokenizer's own special tokens; the response is the
    decoder's.
    """
    turn = response.index(True) if True in response else len(ids)
    if not all(response[turn:]):
        raise UnusableExampleError(
            f"{example.location}: several assistant turns, and an encoder-decoder model learns one "
            "response a row; split the row into one row a turn, or choose a causal model"
        )
    return [*ids[:turn], *after, *ids[turn:]], [
        *response[:turn],
        *[False] * len(after),
        *response[turn:],
    ]


def render_segments(
    example: Example, template: str, tokenizer: Any, demonstrations: Sequence[Example] = ()
) -> list[TextSegment]:
    """The example as text, behind those `shown`: prompts and responses in turn, the last piece a
    response.

    A chat template writes those shown as earlier turns of the first prompt.
    """
    if template == CHAT:
        before = [m for e in demonstrations for m in _to_messages(e) if m.role != "system"]
        own = _to_messages(example)
        first = own[0].role == "system"
        return _render_chat([*own[:first], *before, *own[first:]], tokenizer, first + len(before))
    t = TEMPLATES[template]
    parts: list[TextSegment] = []
    for e in (*demonstrations, example):
        for asked, told in _render_turns(e, t):
            parts += [
                ((t.turn_separator if parts else "") + asked, False),
                (t.response_prefix + told, True),
            ]
    return parts


def _render_turns(example: Example, t: Template) -> Iterator[tuple[str, str]]:
    """What is asked and answered, turn by turn."""
    if not example.messages:
        asked = t.prompt_format_with_input if example.input else t.prompt_format
        yield asked.format(instruction=example.instruction, input=example.input), example.outputs[0]
    before = ""
    for message in example.messages:
        if message.role == "system":
            before = message.content + "\n"
        elif message.role == "user":
            before = t.prompt_format.format(instruction=before + message.content)
        else:
            yield before, message.content
            before = ""


def _count_responses(example: Example) -> int:
    """How many responses it holds."""
    return sum(m.role == "assistant" for m in example.messages) or 1


def _with_answer(example: Example, output: str) -> Example:
    """The example with this answer as its last response."""
    turns = (*example.messages[:-1], Message("assistant", output)) if example.messages else ()
    return replace(example, outputs=(output,), messages=turns)


def _to_messages(example: Example) -> tuple[Message, ...]:
    if example.messages:
        return example.messages
    asked = f"{example.instruction}\n{example.input}" if example.input else example.instruction
    return (Message("user", asked), Message("assistant", example.outputs[0]))


def _render_chat(
    messages: Sequence[Message], tokenizer: Any, num_context_messages: int
) -> list[TextSegment]:
    """Each assistant turn behind the first `shown` messages, up to its end of turn, and the prompts
    for them.

    A prompt is what the tokenizer's template asks with, and all it writes before any answer.
    """
    turns = [{"role": m.role, "content": m.content} for m in messages]
    parts: list[TextSegment] = []
    done = ""  # what has been rendered and cut into pieces so far
    for i, turn in enumerate(turns):
        if turn["role"] != "assistant" or i < num_context_messages:
            continue
        asked = tokenizer.apply_chat_template(turns[:i], tokenize=False, add_generation_prompt=True)
        whole = tokenizer.apply_chat_template(turns[: i + 1], tokenize=False)
        if not whole.startswith(asked) or not asked.startswith(done):
            raise ConfigError(
                "this tokenizer's chat template rewrites earlier turns, so a response has no fixed "
                f"boundary; choose one of {', '.join(TEMPLATES)}"
            )
        begun = asked + generation_prompt_suffix(turns[:i], asked, tokenizer)
        asked = (
            begun if whole.startswith(begun) else asked
        )  # a reasoned answer can have another beginning
        answer = whole[len(asked) :]
        end = answer.find(tokenizer.eos_token, len(turn["content"])) if tokenizer.eos_token else -1
        answer = answer[: end + len(tokenizer.eos_token)] if end >= 0 else answer.rstrip("\n")
        parts += [(asked[len(done) :], False), (answer, True)]
        done = asked + answer
    return parts


def generation_prompt_suffix(
    turns: Sequence[Mapping[str, str]], generation_prompt: str, tokenizer: Any
) -> str:
    """What a chat template writes before any answer to these turns, behind the generation prompt
    that ends `asked`.

    Qwen3's writes that nothing was thought. A space there belongs to the answer's first word.
    """
    whole = tokenizer.apply_chat_template(
        [*turns, {"role": "assistant", "content": PLACEHOLDER}], tokenize=False
    )
    before, found, _ = whole.partition(PLACEHOLDER)
    return (
        before.removeprefix(generation_prompt).rstrip(" ")
        if found and before.startswith(generation_prompt)
        else ""
    )
