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
from continual.evaluation.metrics import METRICS
from continual.inference.reopen import Source, reopen
from continual.io.terminal import safe
from continual.models.generation import answer
from continual.reports.figures import percent
from continual.results.run_folder import Run
from continual.runs import build

KEYS = {
    "stage": "",
    "task": "",
    "max_new_tokens": "",
    "device": "auto",
    "trust_remote_code": "false",
}
HELP = """/stages             the stages, and what each scored
/stage NAME         answer as the model did after this stage; also by its number
/task NAME          put this task's instruction before what is typed; /task alone: none
/tasks              the tasks
/example            ask a row of the task that was kept for the test
/compare [NAME ...] the last prompt again, answered after these stages; of none named, all
/quit               or Ctrl-D"""
ROOM = 128  # the most tokens of an answer, unless told
SIDES = 3  # answers that stand side by side
SHARED = 4  # rows a wording, from which on the instruction is the task's own


class Chat:
    """A conversation of single turns: each prompt stands alone, as the run's own did."""

    def __init__(
        self, source: Source, config: DictConfig, console: Console, room: int | None = None
    ) -> None:
        """At the end of the run, or where it is unfinished after the newest stage that it has."""
        newest = next(name for name in reversed(source.stages) if name in source.kept)
        self.opened, self.console = reopen(source, config), console
        self.opened.at(newest)
        most = self.opened.encoder.limit
        self.room = min(room or self.opened.config.score.max_new_tokens or ROOM, most // 2)
        self.task: str | None = None
        self.instruction = ""
        self.last: Example | None = None
        self.examples: dict[str, Iterator[Example]] = {}
        self.commands: dict[str, Callable[[str], None]] = {
            "/stages": self.stages,
            "/stage": self.stage,
            "/tasks": self.tasks,
            "/task": self.choose,
            "/example": self.example,
            "/compare": self.compare,
            "/help": lambda _: self.say(HELP),
        }

    @cached_property
    def rows(self) -> dict[str, Task[Example]]:
        """The stream's tasks, by name."""
        return {task.name: task for task in build.stream(self.opened.config).tasks}

    def greet(self) -> None:
        """What this is, and what can be typed."""
        self.say(
            f"{self.opened.source.path}, after stage {self.opened.now}. Type a prompt, or /help."
        )

    def say(self, text: str, style: str = "") -> None:
        """One line that no terminal obeys."""
        self.console.print(Text(safe(text), style=style), soft_wrap=True)

    def __call__(self, line: str) -> None:
        """Do a command, or answer; what is wrong is said."""
        word, _, rest = line.strip().partition(" ")
        try:
            if not word:
                return
            if not word.startswith("/"):
                self.ask(self.typed(line.strip()))
            elif word in self.commands:
                self.commands[word](rest.strip())
            else:
                raise ConfigError(unknown("command", word, [*self.commands, "/quit"]))
        except ContinualError as error:
            self.say(str(error), "red")

    def typed(self, text: str) -> Example:
        """What was typed, behind the task's instruction where there is one."""
        instruction, given = (self.instruction, text) if self.instruction else (text, "")
        return Example("typed", self.task or "", instruction, given, ("",), where="the prompt")

    def ask(self, example: Example) -> None:
        """Answer, and keep the prompt to compare with."""
        told = self.answered(example)
        self.last = example
        self.say(told or "(an empty answer)", "bold" if told else "dim")

    def answered(self, example: Example) -> str:
        """The greedy answer of the stage that is on."""
        opened = self.opened
        asked = opened.encoder.ask(example, 0, self.room)
        opened.ready(self.task)
        if opened.encoder.shortened:
            opened.encoder.shortened.clear()
            self.say(
                f"(the input is shortened to fit {opened.encoder.limit} tokens with its answer)",
                "yellow",
            )
        for _ in opened.strategy.dispatch(opened.model, [asked.ids]):
            return answer(opened.model, [asked], self.room, 1)[0]
        raise ConfigError("the strategy dispatched no prompt; its dispatch is wrong")

    def stages(self, _: str) -> None:
        """Each stage, with its average."""
        told = self.opened.source.told
        for n, name in enumerate(self.opened.source.stages):
            row = told.matrix.scores[n] if isinstance(told, Run) else ()
            known = [s for s in row if s is not None]
            average = f"  average {percent(sum(known) / len(known))}" if known else ""
            gone = "" if name in self.opened.source.kept else "  (weights not kept)"
            self.say(f"{'*' if name == self.opened.now else ' '} {n:2d} {name}{average}{gone}")

    def stage(self, name: str) -> None:
        """Go to another stage."""
        self.opened.at(self.opened.source.stage(name))
        self.say(f"after stage {self.opened.now}", "dim")

    def tasks(self, _: str) -> None:
        """Each task, with its score now."""
        told, now = self.opened.source.told, self.opened.now
        for name in self.opened.source.tasks:
            score = (
                f"  {percent(told.matrix.at(told.matrix.stages.index(now), name))}"
                if isinstance(told, Run)
                else ""
            )
            self.say(f"{'*' if name == self.task else ' '} {name}{score}")

    def choose(self, name: str) -> None:
        """Put a task's instruction before what is typed, or nothing any more."""
        if name and name not in self.opened.source.tasks:
            raise ConfigError(unknown("task", name, self.opened.source.tasks))
        self.task, self.instruction = name or None, ""
        if not name:
            self.say("no task: what is typed is the whole prompt", "dim")
            return
        rows = self.of(name).train
        if rows and not rows[0].messages:
            wordings = Counter(r.instruction for r in rows)
            if len(wordings) * SHARED <= len(rows) and any(r.input for r in rows):
                self.instruction = wordings.most_common(1)[0][0]
        given = next((r.input for r in rows if r.input), "")
        self.say(
            f"{self.instruction}\n(type what it is asked of, such as: {given[:200]})"
            if self.instruction
            else f"the rows of {name} have an instruction each: type the whole prompt",
            "dim",
        )

    def of(self, name: str) -> Task[Example]:
        """A task of the stream; raises what reading the stream raises."""
        if name not in self.rows:
            raise DataError(
                f"the stream has no task {name!r} any more; restore it, or type whole prompts"
            )
        return self.rows[name]

    def example(self, _: str) -> None:
        """Ask a row that was kept for the test, with what would be right."""
        if self.task is None:
            raise ConfigError(
                "/example needs a task; choose one: /task NAME, of "
                f"{listed(self.opened.source.tasks)}"
            )
        if self.task not in self.examples:
            self.examples[self.task] = cycle(
                self.of(self.task).split(self.opened.config.score.split)
            )
        row = next(self.examples[self.task])
        asked = row.messages[:-1] if row.messages else ()
        self.say(
            "\n".join(
                [f"{m.role}: {m.content}" for m in asked] or [row.instruction, row.input]
            ).strip(),
            "dim",
        )
        self.ask(row)
        self.say(f"right would be: {' | '.join(row.outputs)}", "dim")

    def compare(self, names: str) -> None:
        """The last prompt, answered after several stages."""
        if self.last is None:
            raise ConfigError(
                "/compare asks the last prompt again, and there is none yet; type one"
            )
        source, now = self.opened.source, self.opened.now
        asked = [names] if names in source.stages else names.split()
        chosen = list(dict.fromkeys(map(source.stage, asked))) or source.kept
        told = {}
        try:
            for name in chosen:
                self.opened.at(name)
                told[name] = self.answered(self.last)
        finally:
            self.opened.at(now)
        self.console.print(side_by_side(told, self.last))


def side_by_side(told: dict[str, str], example: Example) -> Table:
    """A column for each stage's answer, or where there are many a row; those that hold a
    reference's text are marked.
    """
    right = {
        name: any(METRICS["exact_match"](said, o) for o in example.outputs)
        for name, said in told.items()
    }
    cells = {
        name: Text(safe(said), style="bold green" if right[name] else "")
        for name, said in told.items()
    }
    heads = {name: Text(safe(name) + (" ✓" if right[name] else "")) for name in told}
    table = Table(show_lines=False, expand=False)
    if len(told) <= SIDES:
        for name in told:
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
    room: int | None = None,
) -> None:
    """Answer each of the `lines` until they end or one is /quit.

    Raises MissingError, DataError or ConfigError for a folder that is neither a run nor an
    adaptation, or from which no model can be built; what is wrong with a line is said, and the next
    is read.
    """
    source = Source.read(path)
    start = source.stage(stage) if stage or source.whole else None
    talk = Chat(source, config, console, room)
    if start:
        talk.opened.at(start)
    talk.greet()
    if task:
        talk.choose(task)
    with suppress(KeyboardInterrupt):
        for line in lines:
            if line.strip() in ("/quit", "/exit"):
                return
            talk(line)


def typed(console: Console) -> Iterator[str]:
    """The lines of the terminal, or of whatever stdin is, which are shown as if they were typed."""
    if not sys.stdin.isatty():
        for line in sys.stdin:
            console.print(Text(f"> {safe(line.rstrip())}", style="cyan"), soft_wrap=True)
            yield line
        return
    with suppress(ImportError):
        import readline  # noqa: F401  input() then knows the arrows
    while True:
        try:
            yield input("> ")
        except EOFError:
            return
