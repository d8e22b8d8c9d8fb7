"""The commands. Heavy imports stay inside the verbs, so that --help answers at once."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from continual.cli.arguments import count, given, truth
from continual.cli.help import EXAMPLES, HELP
from continual.distributed.processes import agreed, joined, leads, let_first_speak, started
from continual.errors import ConfigError, ContinualError, MissingError, unknown
from continual.io.terminal import safe
from continual.runs.signals import Stopped
from continual.runs.stop_if import STATUS, Gated
from continual.tracking.events import quiet

if TYPE_CHECKING:
    from omegaconf import DictConfig


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
            raise ConfigError(
                f"continual {verb} is the work of one process, and {started()} were started; "
                f"several can share continual {' or '.join(SHARED)}"
            )
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
        fail(
            ContinualError(
                f"{error.filename or 'the system'}: {error.strerror or error}; see that the "
                "folder can be written and that there is space, and give the same command again"
            )
        )
    except KeyboardInterrupt:
        Console(stderr=True).print(
            "Stopped. The same command with the same out= goes on after the last checkpoint."
        )
        sys.exit(130)


def fail(error: ContinualError) -> None:
    """Print the message and exit with 2, or show the traceback where HYDRA_FULL_ERROR=1 asks for
    it.
    """
    if os.environ.get("HYDRA_FULL_ERROR") == "1":
        raise error
    let_first_speak()
    Console(stderr=True).print(
        safe(f"error: {error}"), style="red", markup=False, highlight=False, soft_wrap=True
    )
    sys.exit(2)


def configure(verb: str, overrides: Sequence[str], **more: Any) -> DictConfig:
    """Compose the verb's configuration; raises ConfigError for what Hydra refuses, with the nearest
    valid names.

    `more` is for Hydra's compose.
    """
    from hydra import compose, initialize_config_module
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from continual.config import overrides as words

    overrides = words.spelled(verb, overrides)
    with initialize_config_module("conf", version_base=None):
        try:
            config = words.composed(verb, overrides, partial(compose, **more))
            words.resolved(config)
        except ConfigError:
            raise
        except (
            HydraException,
            OmegaConfBaseException,
            ValueError,
        ) as error:  # ValueError: null for a group
            raise words.explained(error, verb, overrides, compose) from None
    return config


def _show_config(verb: str, rest: Sequence[str]) -> None:
    from omegaconf import OmegaConf

    if verb not in CONFIGURED:
        raise ConfigError(
            f"continual {verb} has no configuration, for it takes the keys that continual {verb} "
            f"--help shows; --cfg goes with {', '.join(CONFIGURED)}"
        )
    print(OmegaConf.to_yaml(configure(verb, [r for r in rest if r != "--cfg"])))


def _work(verb: str, rest: Sequence[str]) -> None:
    """Run or adapt, and show the tables."""
    config = configure(verb, rest)
    from continual.reports import write
    from continual.runs.adapt import adapt
    from continual.runs.run import run

    quiet()
    with joined(config.device):
        config.out = agreed(config.out)  # which may hold the time of day
        {"run": run, "adapt": adapt}[verb](config, Console(stderr=True, quiet=not leads()))
        if leads():
            write.tables(Console(), Path(config.out))


def _plan(rest: Sequence[str]) -> None:
    config = configure("plan", rest)
    from continual.runs.plan import plan, show

    quiet()
    show(plan(config), config, Console())


def _audit(rest: Sequence[str]) -> None:
    """Count what is amiss in the rows."""
    config = configure("audit", rest)
    from continual.runs.audit_step import alone

    quiet()
    alone(config, Console())


def _compare(rest: Sequence[str]) -> None:
    from continual.config import overrides
    from continual.runs import compare

    compare.compare(overrides.spelled("compare", rest), configure)


def _opened(rest: Sequence[str], keys: dict[str, str]) -> tuple[Path, dict[str, str], DictConfig]:
    """The run folder and keys that a command names, and a configuration for its model to be built
    by.
    """
    from omegaconf import open_dict

    paths, told = given(rest, keys)
    if len(paths) != 1:
        raise MissingError(
            f"expected the folder of one run, and {len(paths)} are named; give the out= of "
            "continual run or adapt"
        )
    config = configure("run", [f"device={told['device']}"])
    with open_dict(config):
        config.model.trust_remote_code = truth("trust_remote_code", told["trust_remote_code"])
    quiet()
    return paths[0], told, config


def _export(rest: Sequence[str]) -> None:
    from continual.cli.arguments import asked
    from continual.inference.export import KEYS, export

    path, told, config = _opened(rest, KEYS)
    made = export(path, config, **asked(told))
    print(
        f"wrote {made.path}: {'an adapter' if made.adapter else 'a whole model'}, and README.md "
        "says how it is asked"
    )


def _chat(rest: Sequence[str]) -> None:
    from continual.inference import chat

    path, told, config = _opened(rest, chat.KEYS)
    room = count("max_new_tokens", told["max_new_tokens"]) if told["max_new_tokens"] else None
    console = Console(highlight=False)
    chat.chat(
        path,
        config,
        console,
        chat.typed(console),
        stage=told["stage"] or None,
        task=told["task"] or None,
        room=room,
    )


def _watch(rest: Sequence[str]) -> None:
    from continual.cli.watch import KEYS, watch

    paths, told = given(rest, KEYS)
    watch(paths, Console(), once=truth("once", told["once"]), every=count("every", told["every"]))


def _report(rest: Sequence[str]) -> None:
    from continual.reports import write

    paths, told = given(rest, {"out": ""})
    if not paths:
        raise MissingError("continual report needs a folder made by run, compare or adapt")
    written = write.write(*paths, out=Path(told["out"]) if told["out"] else None)
    write.tables(Console(), *paths)
    print("\n".join(f"wrote {p}" for p in written))


def _verify(rest: Sequence[str]) -> None:
    from continual.reports.verify import verify

    verify(rest, Console())


def _list(rest: Sequence[str]) -> None:
    from continual.config.catalogue import show

    show(rest, Console())


VERBS: dict[str, Callable[[Sequence[str]], Any]] = {
    "compare": _compare,
    "run": partial(_work, "run"),
    "adapt": partial(_work, "adapt"),
    "plan": _plan,
    "audit": _audit,
    "export": _export,
    "chat": _chat,
    "watch": _watch,
    "report": _report,
    "verify": _verify,
    "list": _list,
}
CONFIGURED = ("compare", "run", "adapt", "plan", "audit")
SHARED = ("run", "adapt")
