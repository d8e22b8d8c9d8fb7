"""The commands. Heavy imports stay inside the verbs, so that --help answers at once."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from continual.errors import ConfigError, ContinualError, MissingError, unknown
from continual.events import quiet
from continual.gate import STATUS, Gated
from continual.interrupt import Stopped
from continual.parallel import agreed, joined, leads, let_first_speak, started
from continual.terminal import count, given, safe, truth

if TYPE_CHECKING:
    from omegaconf import DictConfig

HELP = """continual: continual instruction learning of language models.

Tasks arrive one after another; each is learned in one masked-SFT stage under one strategy; after every stage all tasks
are scored, and the scores are the retained-task matrix.

  continual compare [key=value ...]   strategies x seeds x orders over one stream, side by side
  continual run     [key=value ...]   one strategy over one stream
  continual adapt   [key=value ...]   one new task, from a checkpoint or a base model: curves over steps and shots
  continual plan    [key=value ...]   memory, FLOPs, hours and disk of a run, before it is begun
  continual audit   [key=value ...]   what is amiss in a stream's rows: repeated, leaked, contradictory, too long
  continual export  RUN [key=value ...]   the model after a stage, as a folder that transformers or peft loads
  continual chat    RUN [key=value ...]   talk to it in the terminal, as it was after any of its stages
  continual watch   PATH...           live runs, followed in the terminal
  continual report  PATH...           tables, report.html and curves.png again, from folders on disk
  continual verify  PATH...           every summary of published matrices, recomputed in all published forms
  continual list    [strategies|streams|models|probes] [json=true]   what there is

Keys: stream=NAME  strategy=NAME or strategy=[A,B]  model=NAME  seed=N  device=auto|cpu|cuda|mps  out=DIR
      train.*  loss.*  data.*  score.*  strategy.NAME.*  stream.*  model.*
The same out= twice resumes. continual VERB --help shows examples; continual VERB --cfg the whole configuration."""

EXAMPLES = {
    "compare": """continual compare [key=value ...]: several strategies over one stream -> a comparison folder.

  continual compare                                        five strategies and joint training on the embedded stream
  continual compare strategy=naive,[replay,ewc] seed=0,1,2 commas sweep, brackets compose
  continual compare strategy=ewc strategy.ewc.strength=1,100,10000
  continual compare stream=folder stream.path=DIR stream.order=order1,order3 score.split=dev model=scratch
  continual compare hydra/launcher=joblib                  spread by any Hydra launcher that is installed""",
    "run": """continual run [key=value ...]: one strategy over one stream -> a run folder.

  continual run strategy=replay out=runs/replay            and the same again to resume it
  continual run strategy=[replay,ewc] strategy.replay.share=0.5
  continual run model=hf model.name=Qwen/Qwen3-0.6B model.adapter=lora data.template=chat train.lr=1e-4
  continual run stream=folder stream.path=DIR stream.tasks=[a,b] stream.limit=500 score.split=dev
  continual run score.during=20 'stop_if.forgetting>0.2'   forgetting seen within a stage, and an end to it
  continual run stream.arrangement=joint                   the ceiling: all tasks at once
  continual run probe=[wordings,shots]                     measure robustness and k-shot beside the matrix""",
    "adapt": """continual adapt [key=value ...]: one new task from a checkpoint -> its curves, and the adapted model.

  continual adapt checkpoint=runs/maml task=NEW            from a run's last checkpoint
  continual adapt checkpoint=runs/maml/checkpoints/stage-03 task=NEW
  continual adapt checkpoint=base task=NEW                 from the base model: the reference to compare with
  continual adapt checkpoint=runs/maml stream=folder stream.path=DIR task=NEW adapt.shots=[16,64] adapt.draws=5""",
    "plan": """continual plan [key=value ...]: what a run with these keys would take, and what grows with its tasks.

  continual plan strategy=ewc                              the default stream and model
  continual plan stream=folder stream.path=DIR model=hf model.name=DIR strategy=replay plan.memory=80
  continual plan model=hf model.name=docs/llama-3.1-8b plan.tasks=1000 plan.gpus=64 plan.flops=989e12
  continual plan model=hf model.name=DIR plan.tasks=20 plan.examples=5000 plan.tokens=300 plan.response=8""",
    "audit": """continual audit [key=value ...]: what is amiss in a stream's rows, as run tells it at its start.

  continual audit stream=folder stream.path=DIR score.split=dev   repeats, leaks, conflicts, one-sided answers
  continual audit model=hf model.name=Qwen/Qwen3-0.6B             and lengths in its tokens; no weights are read""",
    "export": """continual export RUN [key=value ...]: the model of a run or adaptation -> a folder with a model card.

  continual export runs/replay                             as it is at the run's end, to runs/replay/export/STAGE
  continual export runs/replay stage=reverse out=models/reverse license=apache-2.0
  continual export runs/lora merged=false                  a peft adapter for its base, instead of a whole model
  continual export runs/per_task task=reverse              where a strategy has other weights for each task""",
    "chat": """continual chat RUN [key=value ...]: prompts from the terminal or a pipe, answered; /help says the rest.

  continual chat runs/naive                                then /task NAME, /example, /compare: what was forgotten
  continual chat runs/naive stage=reverse max_new_tokens=50
  echo 'Reverse the words: red blue' | continual chat runs/naive""",
    "watch": """continual watch PATH...: a line for each run of these folders, until all are over or Ctrl-C.

  continual watch runs/compare                             a comparison's runs, those too that have not begun
  continual watch runs/a runs/b every=5                    looked at every 5 seconds
  continual watch runs/compare once=true                   as they are now; so too where there is no terminal""",
    "report": """continual report PATH...: the tables, report.html and curves.png of runs, comparisons or adaptations.

  continual report runs/compare
  continual report runs/a runs/b runs/c out=runs/abc       a comparison of finished runs
  continual report runs/new-base runs/new-maml out=runs/new   adaptations: what each start needs to reach the base""",
    "verify": """continual verify PATH...: every summary of matrices, each in its published forms, recomputed.

  continual verify matrix.json other/matrix.json           a run's, or anyone's
  continual verify runs/compare                            a run, a comparison, a folder of .json and .csv files
  continual verify scores.csv json=true                    for machines

A CSV has a first line 'stage,TASK,...', then a line a stage, named by the task that was learned in it (or base), a cell
a task: in [0, 1], empty where not measured; 'stage (percent)' says that it is in percent. A line 'counts,N,...' may
hold the numbers of test examples.""",
    "list": """continual list [strategies|streams|models|probes]: what there is, one line each.

  continual list strategies                                those of installed packages too
  continual list strategies json=true                      for machines""",
}


def main(argv: Sequence[str] | None = None) -> None:
    """The entry point: exits with 2 and one clear message for what the user can mend."""
    args = list(sys.argv[1:] if argv is None else argv)
    verb, rest = (args[0], args[1:]) if args else ("--help", [])
    if verb in ("-h", "--help", "help"):
        print(HELP)
        return
    try:
        if verb not in VERBS:
            raise ConfigError(unknown("command", verb, VERBS))
        if started() > 1 and verb not in SHARED:
            raise ConfigError(f"continual {verb} is the work of one process, and {started()} were started; several "
                              f"can share continual {' or '.join(SHARED)}")
        if "-h" in rest or "--help" in rest:
            print(EXAMPLES[verb])
            return
        if "--cfg" in rest:
            _show_config(verb, rest)
            return
        VERBS[verb](rest)
    except (Stopped, Gated) as stop:
        let_first_speak()
        Console(stderr=True).print(str(stop), markup=False, highlight=False, soft_wrap=True)
        sys.exit(128 + stop.number if isinstance(stop, Stopped) else STATUS)
    except ContinualError as error:
        fail(error)
    except BrokenPipeError:  # what we print to has closed, such as head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        fail(ContinualError(f"{error.filename or 'the system'}: {error.strerror or error}; see that the folder can be "
                            "written and that there is space, and give the same command again"))
    except KeyboardInterrupt:
        Console(stderr=True).print("Stopped. The same command with the same out= goes on after the last checkpoint.")
        sys.exit(130)


def fail(error: ContinualError) -> None:
    """Print the message and exit with 2, or show the traceback where HYDRA_FULL_ERROR=1 asks for it."""
    if os.environ.get("HYDRA_FULL_ERROR") == "1":
        raise error
    let_first_speak()
    Console(stderr=True).print(safe(f"error: {error}"), style="red", markup=False, highlight=False, soft_wrap=True)
    sys.exit(2)


def configure(verb: str, overrides: Sequence[str], **more: Any) -> DictConfig:
    """Compose the verb's configuration; raises ConfigError for what Hydra refuses, with the nearest valid names.

    `more` is for Hydra's compose.
    """
    from hydra import compose, initialize_config_module
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from continual import overrides as words

    overrides = words.spelled(verb, overrides)
    with initialize_config_module("conf", version_base=None):
        try:
            config = words.composed(verb, overrides, partial(compose, **more))
            words.resolved(config)
        except ConfigError:
            raise
        except (HydraException, OmegaConfBaseException, ValueError) as error:  # ValueError: null for a group
            raise words.explained(error, verb, overrides, compose) from None
    return config


def _show_config(verb: str, rest: Sequence[str]) -> None:
    from omegaconf import OmegaConf

    if verb not in CONFIGURED:
        raise ConfigError(f"continual {verb} has no configuration, for it takes the keys that continual {verb} --help "
                          f"shows; --cfg goes with {', '.join(CONFIGURED)}")
    print(OmegaConf.to_yaml(configure(verb, [r for r in rest if r != "--cfg"])))


def _work(verb: str, rest: Sequence[str]) -> None:
    """Run or adapt, and show the tables."""
    config = configure(verb, rest)
    from continual import report
    from continual.adapt import adapt
    from continual.run import run

    quiet()
    with joined(config.device):
        config.out = agreed(config.out)  # which may hold the time of day
        {"run": run, "adapt": adapt}[verb](config, Console(stderr=True, quiet=not leads()))
        if leads():
            report.tables(Console(), Path(config.out))


def _plan(rest: Sequence[str]) -> None:
    config = configure("plan", rest)
    from continual.plan import plan, show

    quiet()
    show(plan(config), config, Console())


def _audit(rest: Sequence[str]) -> None:
    """Count what is amiss in the rows."""
    config = configure("audit", rest)
    from continual.audit import alone

    quiet()
    alone(config, Console())


def _compare(rest: Sequence[str]) -> None:
    from continual import compare, overrides

    compare.compare(overrides.spelled("compare", rest), configure)


def _opened(rest: Sequence[str], keys: dict[str, str]) -> tuple[Path, dict[str, str], DictConfig]:
    """The run folder and keys that a command names, and a configuration for its model to be built by."""
    from omegaconf import open_dict

    paths, told = given(rest, keys)
    if len(paths) != 1:
        raise MissingError(f"expected the folder of one run, and {len(paths)} are named; give the out= of continual "
                           "run or adapt")
    config = configure("run", [f"device={told['device']}"])
    with open_dict(config):
        config.model.trust_remote_code = truth("trust_remote_code", told["trust_remote_code"])
    quiet()
    return paths[0], told, config


def _export(rest: Sequence[str]) -> None:
    from continual.export import KEYS, asked, export

    path, told, config = _opened(rest, KEYS)
    made = export(path, config, **asked(told))
    print(f"wrote {made.path}: {'an adapter' if made.adapter else 'a whole model'}, and README.md says how it is asked")


def _chat(rest: Sequence[str]) -> None:
    from continual import chat

    path, told, config = _opened(rest, chat.KEYS)
    room = count("max_new_tokens", told["max_new_tokens"]) if told["max_new_tokens"] else None
    console = Console(highlight=False)
    chat.chat(path, config, console, chat.typed(console), stage=told["stage"] or None, task=told["task"] or None,
              room=room)


def _watch(rest: Sequence[str]) -> None:
    from continual.watch import KEYS, watch

    paths, told = given(rest, KEYS)
    watch(paths, Console(), once=truth("once", told["once"]), every=count("every", told["every"]))


def _report(rest: Sequence[str]) -> None:
    from continual import report

    paths, told = given(rest, {"out": ""})
    if not paths:
        raise MissingError("continual report needs a folder made by run, compare or adapt")
    written = report.write(*paths, out=Path(told["out"]) if told["out"] else None)
    report.tables(Console(), *paths)
    print("\n".join(f"wrote {p}" for p in written))


def _verify(rest: Sequence[str]) -> None:
    from continual.verify import verify

    verify(rest, Console())


def _list(rest: Sequence[str]) -> None:
    from continual.catalogue import show

    show(rest, Console())


VERBS: dict[str, Callable[[Sequence[str]], Any]] = {
    "compare": _compare, "run": partial(_work, "run"), "adapt": partial(_work, "adapt"), "plan": _plan,
    "audit": _audit, "export": _export, "chat": _chat, "watch": _watch, "report": _report, "verify": _verify,
    "list": _list,
}
CONFIGURED = ("compare", "run", "adapt", "plan", "audit")
SHARED = ("run", "adapt")
