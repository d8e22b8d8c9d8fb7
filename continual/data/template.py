"""Convert the text of an example to token ids, with an exact boundary between prompt and response.

Prompt and response are tokenized as separate segments and joined as ids, so that no merge of the
tokenizer can move the boundary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from continual.data.types import Encoded, Example, Message, Stream, Task
from continual.errors import ConfigError, DataError, gathered, unknown

TextSegment = tuple[str, bool]  # text, and whether it is a response


@dataclass(frozen=True)
class Template:
    """Describe how one turn is written: the prompt, with and without an input, and the response.

    `response_prefix` is the text before each response. It belongs to the response, because most
    tokenizers spell a word together with the space before it.
    """

    prompt_format: str
    prompt_format_with_input: str
    response_prefix: str = ""
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
CHAT = "chat"  # the tokenizer's own chat template
PLACEHOLDER = "\ue000"  # a private-use character, which no chat template writes itself


class UnusableExampleError(DataError):
    """Report one example that cannot be encoded: its response is empty, or it is too long."""


@dataclass(frozen=True)
class Encoding:
    """Hold the result of encoding one example.

    `encoded` is None for an example that cannot be used, and `reason` is the message that says
    why. `shortened` is true if the example's input was cut to fit. `dropped_demonstrations` counts
    the demonstrations that were left out of a prompt for lack of space.
    """

    id: str
    encoded: Encoded | None
    shortened: bool = False
    reason: str = ""
    dropped_demonstrations: int = 0

    def require(self) -> Encoded:
        """Return the encoded example; raises UnusableExampleError if there is none."""
        if self.encoded is None:
            raise UnusableExampleError(self.reason)
        return self.encoded


def usable_examples(encodings: Iterable[Encoding]) -> tuple[Encoded, ...]:
    """Return the encoded examples, without those that cannot be used."""
    return tuple(x.encoded for x in encodings if x.encoded is not None)


@dataclass(frozen=True)
class Encoder:
    """Convert examples to token ids, for one tokenizer, template and maximum length.

    `max_tokens` limits one example, prompt and response together. If an example is longer, its
    `input` is cut at the end; instruction and response are never cut. `on_unusable` decides about
    an example that still does not fit, or whose response is empty: "error" or "skip". The
    `demonstrations` are answered examples written before every prompt; if they do not all fit, the
    first ones are dropped.
    """

    tokenizer: Any
    template: str = "plain"
    max_tokens: int = 512
    seq2seq: bool = False
    on_unusable: str = "error"
    demonstrations: tuple[Example, ...] = ()

    def __post_init__(self) -> None:
        """Check template and options; raises ConfigError."""
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
        """Return the ids that the tokenizer adds before and after a text (BOS, the </s> of T5).

        With a chat template there are none before the text: the template writes them itself, as
        `apply_chat_template` does.
        """
        bare: list[int] = self.tokenizer("a", add_special_tokens=False)["input_ids"]
        full: list[int] = self.tokenizer("a")["input_ids"]
        start = next(i for i in range(len(full)) if full[i : i + len(bare)] == bare)
        before = [] if self.template == CHAT else full[:start]
        return before, full[start + len(bare) :]

    def tokenize(self, text: str) -> list[int]:
        """Return the ids of one segment, without special tokens."""
        if not text:
            return []
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def encode_example(self, example: Example, task_index: int) -> Encoding:
        """Encode prompt and response, and mark the tokens of the response."""
        if not "".join(example.outputs).strip() or not example.outputs[0].strip():
            reason = (
                f"{example.location}: the response is empty, and there is nothing to learn from it; "
                "write an output, remove the row, or set data.on_unusable=skip"
            )
            return Encoding(example.id, None, reason=reason)

        def render(e: Example) -> list[TextSegment]:
            return render_segments(e, self.template, self.tokenizer)

        try:
            return self._shorten_to_fit(example, task_index, render, self.max_tokens)
        except UnusableExampleError as error:
            return Encoding(example.id, None, reason=str(error))

    def encode_prompt(self, example: Example, task_index: int, max_new_tokens: int) -> Encoding:
        """Encode the prompt without its response, leaving `max_new_tokens` for the answer."""
        try:
            return self._fit_prompt(example, task_index, max_new_tokens)
        except UnusableExampleError as error:
            return Encoding(example.id, None, reason=str(error))

    def encode_examples(
        self, examples: Sequence[Example], task_indices: Mapping[str, int]
    ) -> list[Encoding]:
        """Encode each example with the index of its task; raises as `check_usable` does."""
        encodings = [self.encode_example(e, task_indices[e.task]) for e in examples]
        self.check_usable(encodings)
        return encodings

    def encode_task(
        self, task: Task[Example], task_indices: Mapping[str, int], *, include_dev: bool = False
    ) -> Task[Encoded]:
        """Encode a task's `train` rows, and its `dev` rows on request.

        `task_indices` maps the names of the stream's tasks to their indices. Raises DataError if
        no train row is left, or as `check_usable` does.
        """
        train = usable_examples(self.encode_examples(task.train, task_indices))
        if not train:
            raise DataError(no_rows_message(task.name))
        dev = self.encode_examples(task.dev, task_indices) if include_dev else []
        return make_encoded_task(task, train, usable_examples(dev), task_indices)

    def check_usable(self, encodings: Iterable[Encoding]) -> None:
        """Raise one DataError that names all unusable examples, unless these are to be skipped."""
        reasons = [x.reason for x in encodings if x.encoded is None]
        if reasons and self.on_unusable == "error":
            raise DataError(gathered(reasons))

    def count_answer_tokens(self, example: Example) -> int:
        """Count the tokens of the longest accepted answer, with its end of sequence."""
        answers = [
            render_segments(_with_answer(example, o), self.template, self.tokenizer)[-1][0]
            for o in example.outputs
        ]
        return max(len(self.tokenize(a)) for a in answers) + 1

    def _fit_prompt(self, example: Example, task_index: int, max_new_tokens: int) -> Encoding:
        """Drop demonstrations, and then shorten the input, until the prompt fits.

        Raises UnusableExampleError if it does not fit without either.
        """
        limit = self.max_tokens if self.seq2seq else self.max_tokens - max_new_tokens
        for dropped in range(len(self.demonstrations)):
            demonstrations = self.demonstrations[dropped:]
            segments = render_segments(example, self.template, self.tokenizer, demonstrations)[:-1]
            num_context_segments = len(segments) + 1 - 2 * _count_responses(example)
            encoded = self._join_segments(example, task_index, segments, num_context_segments)
            if len(encoded.ids) <= limit:
                return Encoding(example.id, encoded, dropped_demonstrations=dropped)

        limit_note = (
            ""
            if self.seq2seq
            else f" ({self.max_tokens} less {max_new_tokens} for the answer: score.max_new_tokens)"
        )

        def render(e: Example) -> list[TextSegment]:
            return render_segments(e, self.template, self.tokenizer)[:-1]

        encoding = self._shorten_to_fit(example, task_index, render, limit, limit_note)
        return replace(encoding, dropped_demonstrations=len(self.demonstrations))

    def _shorten_to_fit(
        self,
        example: Example,
        task_index: int,
        render: Callable[[Example], list[TextSegment]],
        limit: int,
        limit_note: str = "",
    ) -> Encoding:
        """Cut the end of the input until the example has at most `limit` tokens.

        Raises UnusableExampleError if it is too long even without an input. A conversation is
        never cut.
        """
        complete = self._join_segments(example, task_index, render(example))
        if len(complete.ids) <= limit:
            return Encoding(example.id, complete)

        # Bisect for the longest beginning of the input, in characters, that fits.
        low = 0
        high = len(example.input)
        best = None
        while low <= high:
            length = (low + high) // 2
            candidate_text = replace(example, input=example.input[:length])
            candidate = self._join_segments(example, task_index, render(candidate_text))
            if len(candidate.ids) <= limit:
                best = candidate
                low = length + 1
            else:
                high = length - 1

        if best is None or example.messages:
            # The last candidate of a search without success has no input at all.
            without = f" ({len(candidate.ids)} with no input at all)" if example.input else ""
            raise UnusableExampleError(
                f"{example.location}: takes {len(complete.ids)} tokens{without}, and the limit is "
                f"{limit}{limit_note}; raise data.max_length as far as the model's context goes, "
                "shorten the row, or set data.on_unusable=skip"
            )
        return Encoding(example.id, best, shortened=True)

    def _join_segments(
        self,
        example: Example,
        task_index: int,
        segments: Sequence[TextSegment],
        num_context_segments: int = 0,
    ) -> Encoded:
        """Join the segments as ids; responses among the first `num_context_segments` are context.

        A response ends with the end-of-sequence token. In an encoder's text the responses of
        demonstrations do not: that text ends only once.
        """
        before, after = self.special_ids
        ids = list(before)
        response_mask = [False] * len(before)
        for i, (text, is_response) in enumerate(segments):
            is_context = i < num_context_segments
            segment_ids = self.tokenize(text)
            needs_end = is_response and not (self.seq2seq and is_context)
            if needs_end and segment_ids[-1:] != [self.tokenizer.eos_token_id]:
                segment_ids.append(self.tokenizer.eos_token_id)
            ids += segment_ids
            response_mask += [is_response and not is_context] * len(segment_ids)

        if self.seq2seq:
            ids, response_mask = _end_source(ids, response_mask, after, example)
        text = "".join(text for text, _ in segments)
        return Encoded(example.id, task_index, tuple(ids), tuple(response_mask), text)


def make_encoded_task(
    task: Task[Example],
    train: tuple[Encoded, ...],
    dev: tuple[Encoded, ...],
    task_indices: Mapping[str, int],
) -> Task[Encoded]:
    """Return the task with these encoded rows, and without test rows."""
    return Task(
        task.name,
        train,
        dev,
        (),
        task.metric,
        task.labels,
        task.category,
        tuple(task_indices),
        episode_size=task.episode_size,
    )


def no_rows_message(task: str) -> str:
    """Return the error message for a task without usable train rows."""
    return f"task {task!r} has no train rows left; add rows, or raise data.max_length"


def index_tasks(stream: Stream) -> dict[str, int]:
    """Map each task's name to its index, which is its column in the matrix."""
    return {task.name: i for i, task in enumerate(stream.tasks)}


def _end_source(
    ids: list[int], response_mask: list[bool], after: list[int], example: Example
) -> tuple[list[int], list[bool]]:
    """Insert the special tokens `after` an encoder's text, before the decoder's response.

    Raises UnusableExampleError for several responses: an encoder-decoder model learns one.
    """
    start = response_mask.index(True) if True in response_mask else len(ids)
    if not all(response_mask[start:]):
        raise UnusableExampleError(
            f"{example.location}: several assistant turns, and an encoder-decoder model learns one "
            "response per row; split the row into one row per turn, or choose a causal model"
        )
    not_learned = [False] * len(after)
    return (
        [*ids[:start], *after, *ids[start:]],
        [*response_mask[:start], *not_learned, *response_mask[start:]],
    )


def render_segments(
    example: Example, template: str, tokenizer: Any, demonstrations: Sequence[Example] = ()
) -> list[TextSegment]:
    """Write the example as text after its demonstrations: prompts and responses alternate.

    The last segment is a response. A chat template writes the demonstrations as earlier turns of
    the first prompt, after the system message.
    """
    if template == CHAT:
        own = _to_messages(example)
        shown = [m for e in demonstrations for m in _to_messages(e) if m.role != "system"]
        num_system = int(own[0].role == "system")
        messages = [*own[:num_system], *shown, *own[num_system:]]
        return _render_chat(messages, tokenizer, num_system + len(shown))

    style = TEMPLATES[template]
    segments: list[TextSegment] = []
    for e in (*demonstrations, example):
        for prompt, response in _render_turns(e, style):
            separator = style.turn_separator if segments else ""
            segments.append((separator + prompt, False))
            segments.append((style.response_prefix + response, True))
    return segments


def _render_turns(example: Example, style: Template) -> Iterator[tuple[str, str]]:
    """Yield (prompt, response) of each turn."""
    if not example.messages:
        fmt = style.prompt_format_with_input if example.input else style.prompt_format
        prompt = fmt.format(instruction=example.instruction, input=example.input)
        yield prompt, example.outputs[0]

    prompt = ""
    for message in example.messages:
        if message.role == "system":
            prompt = message.content + "\n"
        elif message.role == "user":
            prompt = style.prompt_format.format(instruction=prompt + message.content)
        else:
            yield prompt, message.content
            prompt = ""


def _count_responses(example: Example) -> int:
    return sum(m.role == "assistant" for m in example.messages) or 1


def _with_answer(example: Example, output: str) -> Example:
    """Return the example with this answer as its last response."""
    turns = (*example.messages[:-1], Message("assistant", output)) if example.messages else ()
    return replace(example, outputs=(output,), messages=turns)


def _to_messages(example: Example) -> tuple[Message, ...]:
    if example.messages:
        return example.messages
    return (*example.prompt_messages, Message("assistant", example.outputs[0]))


def _render_chat(
    messages: Sequence[Message], tokenizer: Any, num_context_messages: int
) -> list[TextSegment]:
    """Write each assistant turn after the first `num_context_messages`, with the prompt for it.

    A prompt is everything that the tokenizer's chat template writes before any answer: the
    generation prompt and what follows it. A response ends with its end of turn. Raises ConfigError
    if the template rewrites earlier turns.
    """
    turns = [{"role": m.role, "content": m.content} for m in messages]
    segments: list[TextSegment] = []
    rendered = ""  # the text that is already cut into segments
    for i, turn in enumerate(turns):
        if turn["role"] != "assistant" or i < num_context_messages:
            continue
        prompt = tokenizer.apply_chat_template(
            turns[:i], tokenize=False, add_generation_prompt=True
        )
        full_text = tokenizer.apply_chat_template(turns[: i + 1], tokenize=False)
        if not full_text.startswith(prompt) or not prompt.startswith(rendered):
            raise ConfigError(
                "this tokenizer's chat template rewrites earlier turns, so a response has no fixed "
                f"boundary; choose one of {', '.join(TEMPLATES)}"
            )

        # An answer that holds its own reasoning does not begin with the suffix.
        longer_prompt = prompt + generation_prompt_suffix(turns[:i], prompt, tokenizer)
        if full_text.startswith(longer_prompt):
            prompt = longer_prompt

        answer = full_text[len(prompt) :]
        eos = tokenizer.eos_token
        end = answer.find(eos, len(turn["content"])) if eos else -1
        answer = answer[: end + len(eos)] if end >= 0 else answer.rstrip("\n")

        segments.append((prompt[len(rendered) :], False))
        segments.append((answer, True))
        rendered = prompt + answer
    return segments


def generation_prompt_suffix(
    turns: Sequence[Mapping[str, str]], generation_prompt: str, tokenizer: Any
) -> str:
    """Return the text that a chat template writes between the generation prompt and any answer.

    Qwen3's template writes an empty block of reasoning there. A space at the end belongs to the
    first word of the answer, and is left out.
    """
    answered = [*turns, {"role": "assistant", "content": PLACEHOLDER}]
    full_text = tokenizer.apply_chat_template(answered, tokenize=False)
    before, placeholder, _ = full_text.partition(PLACEHOLDER)
    if not placeholder or not before.startswith(generation_prompt):
        return ""
    return str(before.removeprefix(generation_prompt).rstrip(" "))
