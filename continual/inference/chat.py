"""Talk to a run's model in the terminal, as it was after any of its stages: what was forgotten
answers for itself.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import cached_property
from itertools import cycle
from pathlib import Path

from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table
from rich.text import Text

from continual.data.types import Example, Task
from continual.errors import ConfigError, ContinualError, DataError, listed, unknown
from continual.evaluation.metrics import REFERENCE_METRICS
from continual.inference.reopen import ModelSource, load_run_model
from continual.io.terminal import escape_control
from continual.models.generation import generate_answers
from continual.reports.figures import format_percent
from continual.results.run_folder import Run
from continual.runs import build

CHAT_DEFAULTS = {
    "stage": "",
    "task": "",
    "max_new_tokens": "",
    "device": "auto",
    "trust_remote_code": "false",
}
CHAT_HELP = """/stages             the stages, and what each scored
/stage NAME         answer as the model did after this stage; also by its number
/task NAME          put this task's instruction before what is typed; /task alone: none
/tasks              the tasks
/example            ask a row of the task that was kept for the test
/compare [NAME ...] the last prompt again, answered after these stages; of none named, all
/quit               or Ctrl-D"""
DEFAULT_MAX_NEW_TOKENS = 128  # the most tokens of an answer, unless told
MAX_COLUMNS = 3  # answers that stand side by side
MIN_ROWS_PER_INSTRUCTION = 4  # rows a wording, from which on the instruction is the task's own


class ChatSession:
    """A conversation of single turns: each prompt stands alone, as the run's own did."""

    def __init__(
        self,
        source: ModelSource,
        config: DictConfig,
        console: Console,
        max_new_tokens: int | None = None,
    ) -> None:
        """At the end of the run, or where it is unfinished after the newest stage that it has."""
        newest = next(name for name in reversed(source.stages) if name in source.available_stages)
        self.loaded, self.console = load_run_model(source, config), console
        self.loaded.load_stage(newest)
        most = self.loaded.encoder.max_tokens
        self.max_new_tokens = min(
            max_new_tokens or self.loaded.config.score.max_new_tokens or DEFAULT_MAX_NEW_TOKENS,
            most // 2,
        )
        self.task: str | None = None
        self.instruction = ""
        self.last_example: Example | None = None
        self.test_rows: dict[str, Iterator[Example]] = {}
        self.commands: dict[str, Callable[[str], None]] = {
            "/stages": self.list_stages,
            "/stage": self.go_to_stage,
            "/tasks": self.list_tasks,
            "/task": self.choose_task,
            "/example": self.ask_test_row,
            "/compare": self.compare_stages,
            "/help": lambda _: self.print_line(CHAT_HELP),
        }

    @cached_property
    def tasks_by_name(self) -> dict[str, Task[Example]]:
        """The stream's tasks, by name."""
        return {task.name: task for task in build.stream(self.loaded.config).tasks}

    def greet(self) -> None:
        """What this is, and what can be typed."""
        self.print_line(
            f"{self.loaded.source.path}, after stage {self.loaded.stage}. Type a prompt, or /help."
        )

    def print_line(self, text: str, style: str = "") -> None:
        """One line that no terminal obeys."""
        self.console.print(Text(escape_control(text), style=style), soft_wrap=True)

    def __call__(self, line: str) -> None:
        """Do a command, or answer; what is wrong is said."""
        word, _, rest = line.strip().partition(" ")
        try:
            if not word:
                return
            if not word.startswith("/"):
                self.ask(self.to_example(line.strip()))
            elif word in self.commands:
                self.commands[word](rest.strip())
            else:
                raise ConfigError(unknown("command", word, [*self.commands, "/quit"]))
        except ContinualError as error:
            self.print_line(str(error), "red")

    def to_example(self, text: str) -> Example:
        """What was typed, behind the task's instruction where there is one."""
        instruction, given = (self.instruction, text) if self.instruction else (text, "")
        return Example("typed", self.task or "", instruction, given, ("",), location="the prompt")

    def ask(self, example: Example) -> None:
        """Answer, and keep the prompt to compare with."""
        told = self.generate_answer(example)
        self.last_example = example
        self.print_line(told or "(an empty answer)", "bold" if told else "dim")

    def generate_answer(self, example: Example) -> str:
        """The greedy answer of the stage that is on."""
        opened = self.loaded
        encoding = opened.encoder.encode_prompt(example, 0, self.max_new_tokens)
        asked = encoding.require()
        opened.route(self.task)
        if encoding.shortened:
            self.print_line(
                f"(the input is shortened to fit {opened.encoder.max_tokens} tokens with its answer)",
                "yellow",
            )
        for _ in opened.strategy.dispatch(opened.model, [asked.ids]):
            return generate_answers(opened.model, [asked], self.max_new_tokens, 1)[0]
        raise ConfigError("the strategy dispatched no prompt; its dispatch is wrong")

    def list_stages(self, _: str) -> None:
        """Each stage, with its average."""
        told = self.loaded.source.result
        for n, name in enumerate(self.loaded.source.stages):
            row = told.matrix.scores[n] if isinstance(told, Run) else ()
            known = [s for s in row if s is not None]
            average = f"  average {format_percent(sum(known) / len(known))}" if known else ""
            gone = "" if name in self.loaded.source.available_stages else "  (weights not kept)"
            self.print_line(
                f"{'*' if name == self.loaded.stage else ' '} {n:2d} {name}{average}{gone}"
            )

    def go_to_stage(self, name: str) -> None:
        """Go to another stage."""
        self.loaded.load_stage(self.loaded.source.resolve_stage(name))
        self.print_line(f"after stage {self.loaded.stage}", "dim")

    def list_tasks(self, _: str) -> None:
        """Each task, with its score now."""
        told, now = self.loaded.source.result, self.loaded.stage
        for name in self.loaded.source.tasks:
            score = (
                f"  {format_percent(told.matrix.score(told.matrix.stages.index(now), name))}"
                if isinstance(told, Run)
                else ""
            )
            self.print_line(f"{'*' if name == self.task else ' '} {name}{score}")

    def choose_task(self, name: str) -> None:
        """Put a task's instruction before what is typed, or nothing any more."""
        if name and name not in self.loaded.source.tasks:
            raise ConfigError(unknown("task", name, self.loaded.source.tasks))
        self.task, self.instruction = name or None, ""
        if not name:
            self.print_line("no task: what is typed is the whole prompt", "dim")
            return
        rows = self.stream_task(name).train
        if rows and not rows[0].messages:
            wordings = Counter(r.instruction for r in rows)
            if len(wordings) * MIN_ROWS_PER_INSTRUCTION <= len(rows) and any(r.input for r in rows):
                self.instruction = wordings.most_common(1)[0][0]
        given = next((r.input for r in rows if r.input), "")
        self.print_line(
            f"{self.instruction}\n(type what it is asked of, such as: {given[:200]})"
            if self.instruction
            else f"the rows of {name} have an instruction each: type the whole prompt",
            "dim",
        )

    def stream_task(self, name: str) -> Task[Example]:
        """A task of the stream; raises what reading the stream raises."""
        if name not in self.tasks_by_name:
            raise DataError(
                f"the stream has no task {name!r} any more; restore it, or type whole prompts"
            )
        return self.tasks_by_name[name]

    def ask_test_row(self, _: str) -> None:
        """Ask a row that was kept for the test, with what would be right."""
        if self.task is None:
            raise ConfigError(
                "/example needs a task; choose one: /task NAME, of "
                f"{listed(self.loaded.source.tasks)}"
            )
        if self.task not in self.test_rows:
            self.test_rows[self.task] = cycle(
                self.stream_task(self.task).get_split(self.loaded.config.score.split)
            )
        row = next(self.test_rows[self.task])
        asked = row.messages[:-1] if row.messages else ()
        self.print_line(
            "\n".join(
                [f"{m.role}: {m.content}" for m in asked] or [row.instruction, row.input]
            ).strip(),
            "dim",
        )
        self.ask(row)
        self.print_line(f"right would be: {' | '.join(row.outputs)}", "dim")

    def compare_stages(self, names: str) -> None:
        """The last prompt, answered after several stages."""
        if self.last_example is None:
            raise ConfigError(
                "/compare asks the last prompt again, and there is none yet; type one"
            )
        source, now = self.loaded.source, self.loaded.stage
        asked = [names] if names in source.stages else names.split()
        chosen = list(dict.fromkeys(map(source.resolve_stage, asked))) or source.available_stages
        told = {}
        try:
            for name in chosen:
                self.loaded.load_stage(name)
                told[name] = self.generate_answer(self.last_example)
        finally:
            self.loaded.load_stage(now)
        self.console.print(build_answer_table(told, self.last_example))


def build_answer_table(answers: dict[str, str], example: Example) -> Table:
    """A column for each stage's answer, or where there are many a row; those that hold a
    reference's text are marked.
    """
    right = {
        name: any(REFERENCE_METRICS["exact_match"](said, o) for o in example.outputs)
        for name, said in answers.items()
    }
    cells = {
        name: Text(escape_control(said), style="bold green" if right[name] else "")
        for name, said in answers.items()
    }
    heads = {name: Text(escape_control(name) + (" ✓" if right[name] else "")) for name in answers}
    table = Table(show_lines=False, expand=False)
    if len(answers) <= MAX_COLUMNS:
        for name in answers:
            table.add_column(heads[name], overflow="fold")
        table.add_row(*cells.values())
        return table
    table.add_column("after stage")
    table.add_column("answer", overflow="fold")
    for name, cell in cells.items():
        table.add_row(heads[name], cell)
    return table


def chat(
    path: Path,
    config: DictConfig,
    console: Console,
    lines: Iterable[str],
    *,
    stage: str | None = None,
    task: str | None = None,
    max_new_tokens: int | None = None,
) -> None:
    """Answer each of the `lines` until they end or one is /quit.

    Raises MissingError, DataError or ConfigError for a folder that is neither a run nor an
    adaptation, or from which no model can be built; what is wrong with a line is said, and the next
    is read.
    """
    source = ModelSource.load(path)
    start = source.resolve_stage(stage) if stage or source.is_finished else None
    talk = ChatSession(source, config, console, max_new_tokens)
    if start:
        talk.loaded.load_stage(start)
    talk.greet()
    if task:
        talk.choose_task(task)
    with suppress(KeyboardInterrupt):
        for line in lines:
            if line.strip() in ("/quit", "/exit"):
                return
            talk(line)


def input_lines(console: Console) -> Iterator[str]:
    """The lines of the terminal, or of whatever stdin is, which are shown as if they were typed."""
    if not sys.stdin.isatty():
        for line in sys.stdin:
            console.print(Text(f"> {escape_control(line.rstrip())}", style="cyan"), soft_wrap=True)
            yield line
        return
    with suppress(ImportError):
        import readline  # noqa: F401  input() then knows the arrows
    while True:
        try:
            yield input("> ")
        except EOFError:
            return
