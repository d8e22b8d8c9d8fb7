"""Run the commands. Heavy imports stay inside the verbs, so that --help answers at once."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from continual.cli.arguments import parse_arguments, parse_bool, parse_count
from continual.cli.help import HELP, VERB_HELP
from continual.distributed.processes import (
    broadcast,
    is_main_process,
    num_started_processes,
    process_group,
    wait_for_first_message,
)
from continual.errors import ConfigError, ContinualError, MissingError, unknown
from continual.io.terminal import escape_control
from continual.runs.signals import RunInterrupted
from continual.runs.stop_if import EXIT_STATUS, ForgettingLimitExceeded
from continual.tracking.events import silence_libraries

if TYPE_CHECKING:
    from omegaconf import DictConfig


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line; exit with 2 and one message for an error that the user can fix."""
    args = list(sys.argv[1:] if argv is None else argv)
    verb, rest = (args[0], args[1:]) if args else ("--help", [])
    if verb in ("-h", "--help", "help"):
        print(HELP)
        return
    if verb == "--version":
        print(f"continual {_installed_version()}")
        return
    try:
        if verb not in VERBS:
            raise ConfigError(unknown("command", verb, VERBS))
        if num_started_processes() > 1 and verb not in MULTI_PROCESS_VERBS:
            raise ConfigError(
                f"continual {verb} needs one process, but {num_started_processes()} were started; "
                f"only continual {' and '.join(MULTI_PROCESS_VERBS)} can use several"
            )
        if "-h" in rest or "--help" in rest:
            print(VERB_HELP[verb])
            return
        if "--cfg" in rest:
            _print_config(verb, rest)
            return
        VERBS[verb](rest)
    except (RunInterrupted, ForgettingLimitExceeded) as stop:
        wait_for_first_message()
        Console(stderr=True).print(str(stop), markup=False, highlight=False, soft_wrap=True)
        sys.exit(128 + stop.signal_number if isinstance(stop, RunInterrupted) else EXIT_STATUS)
    except ContinualError as error:
        exit_with_error(error)
    except BrokenPipeError:  # the reader of our output has closed, such as head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        exit_with_error(
            ContinualError(
                f"{error.filename or 'the system'}: {error.strerror or error}; check that the "
                "folder is writable and has free space, and give the same command again"
            )
        )
    except KeyboardInterrupt:
        Console(stderr=True).print(
            "Stopped. The same command with the same out= resumes after the last checkpoint."
        )
        sys.exit(130)


def exit_with_error(error: ContinualError) -> None:
    """Print the message and exit with 2; with HYDRA_FULL_ERROR=1 raise the error instead."""
    if os.environ.get("HYDRA_FULL_ERROR") == "1":
        raise error
    wait_for_first_message()
    Console(stderr=True).print(
        escape_control(f"error: {error}"),
        style="red",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    sys.exit(2)


def compose_config(verb: str, overrides: Sequence[str], **compose_options: Any) -> DictConfig:
    """Compose a verb's configuration; `compose_options` are passed to Hydra's compose.

    Raises ConfigError for what Hydra refuses, with the closest valid names.
    """
    from hydra import compose, initialize_config_module
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from continual.config import overrides as words

    overrides = words.normalize_overrides(verb, overrides)
    with initialize_config_module("conf", version_base=None):
        try:
            config = words.compose_config(verb, overrides, partial(compose, **compose_options))
            words.check_values(config)
        except ConfigError:
            raise
        except (HydraException, OmegaConfBaseException, ValueError) as error:
            # ValueError: null in place of a group's choice.
            raise words.explain_error(error, verb, overrides, compose) from None
    return config


def _print_config(verb: str, rest: Sequence[str]) -> None:
    from omegaconf import OmegaConf

    if verb not in CONFIGURED_VERBS:
        raise ConfigError(
            f"continual {verb} has no configuration: its keys are those that continual {verb} "
            f"--help shows; --cfg works with {', '.join(CONFIGURED_VERBS)}"
        )
    print(OmegaConf.to_yaml(compose_config(verb, [r for r in rest if r != "--cfg"])))


def _run_or_adapt(verb: str, rest: Sequence[str]) -> None:
    """Run or adapt, then print the tables."""
    config = compose_config(verb, rest)
    from continual.reports import write
    from continual.runs.adapt import adapt
    from continual.runs.run import run

    silence_libraries()
    with process_group(config.device):
        config.out = broadcast(config.out)  # the default contains the time of day
        {"run": run, "adapt": adapt}[verb](
            config, Console(stderr=True, quiet=not is_main_process())
        )
        if is_main_process():
            write.print_tables(Console(), Path(config.out))


def _plan(rest: Sequence[str]) -> None:
    config = compose_config("plan", rest)
    from continual.runs.plan import plan, print_plan

    silence_libraries()
    print_plan(plan(config), config, Console())


def _audit(rest: Sequence[str]) -> None:
    """Print the problems in a stream's rows."""
    config = compose_config("audit", rest)
    from continual.runs.audit_step import run_audit

    silence_libraries()
    run_audit(config, Console())


def _compare(rest: Sequence[str]) -> None:
    from continual.config import overrides
    from continual.runs import compare

    compare.compare(overrides.normalize_overrides("compare", rest), compose_config)


def _parse_run_arguments(
    rest: Sequence[str], keys: dict[str, str]
) -> tuple[Path, dict[str, str], DictConfig]:
    """Parse a run folder and keys; return (folder, values of the keys, a run configuration).

    The configuration has the device and trust_remote_code of the command; the model of the run is
    built with it. Raises MissingError unless exactly one folder is given.
    """
    from omegaconf import open_dict

    paths, values = parse_arguments(rest, keys)
    if len(paths) != 1:
        raise MissingError(
            f"expected the folder of one run, found {len(paths)}; give the out= of continual run "
            "or adapt"
        )
    config = compose_config("run", [f"device={values['device']}"])
    with open_dict(config):
        config.model.trust_remote_code = parse_bool(
            "trust_remote_code", values["trust_remote_code"]
        )
    silence_libraries()
    return paths[0], values, config


def _export(rest: Sequence[str]) -> None:
    from continual.cli.arguments import parse_export_arguments
    from continual.inference.export import EXPORT_DEFAULTS, export

    path, values, config = _parse_run_arguments(rest, EXPORT_DEFAULTS)
    result = export(path, config, **parse_export_arguments(values))
    kind = "an adapter" if result.adapter else "a whole model"
    print(f"wrote {result.path}: {kind}; its README.md shows how to prompt it")


def _chat(rest: Sequence[str]) -> None:
    from continual.inference import chat

    path, values, config = _parse_run_arguments(rest, chat.CHAT_DEFAULTS)
    limit = values["max_new_tokens"]
    console = Console(highlight=False)
    chat.chat(
        path,
        config,
        console,
        chat.input_lines(console),
        stage=values["stage"] or None,
        task=values["task"] or None,
        max_new_tokens=parse_count("max_new_tokens", limit) if limit else None,
    )


def _watch(rest: Sequence[str]) -> None:
    from continual.cli.watch import WATCH_DEFAULTS, watch

    paths, values = parse_arguments(rest, WATCH_DEFAULTS)
    watch(
        paths,
        Console(),
        once=parse_bool("once", values["once"]),
        every=parse_count("every", values["every"]),
    )


def _report(rest: Sequence[str]) -> None:
    from continual.reports import write

    paths, values = parse_arguments(rest, {"out": ""})
    if not paths:
        raise MissingError("continual report needs a folder made by run, compare or adapt")
    files = write.write_report(*paths, out=Path(values["out"]) if values["out"] else None)
    write.print_tables(Console(), *paths)
    print("\n".join(f"wrote {path}" for path in files))


def _verify(rest: Sequence[str]) -> None:
    from continual.reports.verify import verify

    verify(rest, Console())


def _completion(rest: Sequence[str]) -> None:
    from continual.cli.completion import completion

    completion(rest, list(VERBS), CONFIGURED_VERBS)


def _installed_version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("continual")
    except PackageNotFoundError:
        return "(not installed: run from its source folder)"


def _list(rest: Sequence[str]) -> None:
    from continual.config.catalogue import print_catalogue

    print_catalogue(rest, Console())


VERBS: dict[str, Callable[[Sequence[str]], Any]] = {
    "compare": _compare,
    "run": partial(_run_or_adapt, "run"),
    "adapt": partial(_run_or_adapt, "adapt"),
    "plan": _plan,
    "audit": _audit,
    "export": _export,
    "chat": _chat,
    "watch": _watch,
    "report": _report,
    "verify": _verify,
    "list": _list,
    "completion": _completion,
}
CONFIGURED_VERBS = ("compare", "run", "adapt", "plan", "audit")
MULTI_PROCESS_VERBS = ("run", "adapt")
