"""Run every combination of several values, with Hydra's multirun and any Hydra launcher."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec
from pathlib import Path
from types import FrameType

from omegaconf import DictConfig, open_dict
from rich.console import Console
from rich.markup import escape

from continual.config.quoting import quote_value
from continual.errors import ConfigError, ContinualError, Problems, unknown
from continual.io.atomic import write_atomically
from continual.io.untrusted import load_yaml_mapping
from continual.results import comparison
from continual.runs.lock import run_folder_lock
from continual.runs.signals import RunInterrupted, StopSignal

LAUNCHER_GROUP = "hydra/launcher"
SERIAL_LAUNCHER = "basic"  # runs one combination after another, in this process
# Launcher -> the NAME of its package, hydra-NAME-launcher.
LAUNCHER_PACKAGES = {
    "joblib": "joblib",
    "submitit_local": "submitit",
    "submitit_slurm": "submitit",
    "slurm": "submitit",
    "ray": "ray",
    "ray_cluster": "ray",
}
SEARCH_RESULT_FILE = "optimization_results.yaml"  # the best values, written by the search's sweeper
STOP_FILE = ".stop"  # in the comparison's folder, with a signal's number: no further run begins
FOLDER_NAME_KEYS = ("strategy", "seed")  # always in the name of a run's folder
# The sweeper that runs every combination; any other one is a search.
GRID_SWEEPER = "hydra._internal.core_plugins.basic_sweeper.BasicSweeper"
# Keys of a comparison that its runs do not have.
COMPARISON_KEYS = ("strategies", "strategy_defaults", "search_spaces")


def compare(overrides: Sequence[str], compose_config: Callable[..., DictConfig]) -> None:
    """Run each combination of comma-separated values in a folder of its own, and report on them.

    If a run fails, the others go on; what is not finished is listed at the end, with the command
    that finishes it. Raises ConfigError in that case, for a combination that cannot work (before
    any run starts), and if another comparison uses the folder; RunInterrupted for a signal.
    """
    several_folders = [o for o in overrides if o.startswith("out=") and _is_sweep(o)]
    if several_folders:
        raise ConfigError(
            f"{several_folders[0]}: a comparison has one folder; quote a comma that is part of its "
            "name, such as \"out='a,b'\""
        )
    launcher = _resolve_launcher(overrides)
    typed = [o for o in overrides if not o.startswith("out=")]
    overrides = _to_strategy_defaults(overrides)
    config = compose_config(
        "compare", [_with_first_value(o) for o in overrides], return_hydra_config=True
    )
    out = Path(config.out)
    sweeper = config.hydra.sweeper
    is_search = sweeper._target_ != GRID_SWEEPER
    words = _complete_overrides([o for o in overrides if not o.startswith("out=")], config)
    fixed_keys = [
        key
        for key in (_key_of(word) for word in words if not _is_sweep(word))
        if key not in FOLDER_NAME_KEYS
    ]
    words.append(f"out={quote_value(str(out.absolute()))}")
    if is_search:
        _check_search(words, config)

    # A search chooses its runs one by one: their folders are not known before.
    names = [] if is_search else _check_combinations(words, [*fixed_keys, "out"], compose_config)
    if launcher == "joblib" and not _has_override(words, "hydra.launcher.n_jobs"):
        # As many processes as there are runs, so that the runs share all threads.
        num_jobs = min(len(names) or sweeper.n_jobs, os.cpu_count() or 1)
        words.append(f"hydra.launcher.n_jobs={num_jobs}")
    words.append(f"hydra.job.config.override_dirname.exclude_keys={[*fixed_keys, 'out']}")

    with run_folder_lock(out):
        (out / STOP_FILE).unlink(missing_ok=True)
        if not is_search:
            comparison.record_command(out, typed, names)
        with _SharedStopSignal(out) if launcher != SERIAL_LAUNCHER else nullcontext():
            launcher_error = _run_sweep(words)
        signal_number = _load_stop_signal(out)
        if signal_number:
            raise RunInterrupted(
                "stopped; nothing is lost. Go on with:\n  " + comparison.resume_command(out, typed),
                signal_number,
            )
        failed = [p.parent.name for p in sorted(out.glob(f"*/{comparison.FAILED_FILE}"))]
        _report_results(out, typed, names or failed, launcher_error)


def _complete_overrides(given: Sequence[str], config: DictConfig) -> list[str]:
    """Add the sweeps of an experiment, the ranges of a search, and the keys in folders' names."""
    sweeps = {**(config.hydra.sweeper.params or {}), **_search_space(config)}
    words = list(given)
    words += [f"{key}={value}" for key, value in sweeps.items() if not _has_override(given, key)]
    for key, value in zip(FOLDER_NAME_KEYS, (config.strategies, config.seed), strict=True):
        if not _has_override(words, key):
            words.append(f"{key}={value}")
    return words


def _check_search(words: Sequence[str], config: DictConfig) -> None:
    """Raise ConfigError if no key has a range to search."""
    if not any(_is_sweep(word) and _key_of(word) not in FOLDER_NAME_KEYS for word in words):
        raise ConfigError(
            f"a search needs a range, and there is none for {', '.join(config.strategy)}; give "
            "one, such as 'strategy.NAME.KEY=tag(log,interval(0.01,10))'"
        )


def _key_of(word: str) -> str:
    """Return the key of an override, without a plus sign before it."""
    return word.split("=")[0].lstrip("+")


def run_combination(config: DictConfig) -> float | None:
    """Do one run of the comparison; return its average performance, which a search maximises.

    Hydra calls it, in this process or where the launcher starts one. An error is written to the
    run's folder, not raised.
    """
    from hydra.core.hydra_config import HydraConfig

    hydra = HydraConfig.get()
    folder = Path(config.out)
    name = _run_folder_name(hydra.job.override_dirname)
    is_parallel = hydra.runtime.choices[LAUNCHER_GROUP] != SERIAL_LAUNCHER
    if _load_stop_signal(folder):
        return None
    from continual.runs.run import run
    from continual.tracking.events import prefixed_console, silence_libraries

    silence_libraries()
    out = folder / name
    with open_dict(config):
        config.out = str(out)
        _apply_strategy_defaults(config, {_key_of(o) for o in hydra.overrides.task})
        for key in COMPARISON_KEYS:
            del config[key]
    console = prefixed_console(name) if is_parallel else Console(stderr=True)
    if not is_parallel:
        console.rule(escape(name), align="left")
    (out / comparison.FAILED_FILE).unlink(missing_ok=True)
    try:
        return run(config, console).summary()["average_performance"]
    except RunInterrupted as stop:
        if not is_parallel:
            write_atomically(folder / STOP_FILE, str(stop.signal_number))
    except Exception as error:
        message = str(error)
        if not isinstance(error, ContinualError):
            console.print_exception()
            message = f"{type(error).__name__}: {error}"
        write_atomically(out / comparison.FAILED_FILE, message + "\n")
        console.print(f"error: {message}", style="red", markup=False, highlight=False)
    return None


def _to_strategy_defaults(overrides: Sequence[str]) -> list[str]:
    """Rewrite `strategy.NAME.KEY=VALUE` as a strategy default if several strategies are compared.

    The value then applies to those runs that have the strategy.
    """
    if any(o.startswith("strategy=") and not _is_sweep(o) for o in overrides):
        return list(overrides)
    return [
        o if _is_sweep(o) else re.sub(r"^\+*strategy\.(?=[\w-]+\.)", "++strategy_defaults.", o)
        for o in overrides
    ]


def _apply_strategy_defaults(config: DictConfig, overridden_keys: Collection[str]) -> None:
    """Set `config.strategy` to the values of strategy_defaults, except overridden keys.

    Raises ConfigError for a key that its strategy does not have.
    """
    for name, values in config.strategy_defaults.items():
        if name not in config.strategy:
            continue
        settings = config.strategy[name]
        for key, value in values.items():
            if f"strategy.{name}.{key}" in overridden_keys:
                continue
            if key not in settings:
                known = [f"strategy.{name}.{k}" for k in settings if k != "_target_"]
                raise ConfigError(unknown("key", f"strategy.{name}.{key}", known))
            settings[key] = value


class _SharedStopSignal(StopSignal):
    """Write a signal to the comparison's folder as well, where no further run then begins.

    Runs in progress receive the signal themselves, or finish.
    """

    def __init__(self, out: Path) -> None:
        """Watch for signals to the comparison in `out`."""
        super().__init__()
        self.out = out

    def _handle(self, number: int, frame: FrameType | None) -> None:
        write_atomically(self.out / STOP_FILE, str(number))
        super()._handle(number, frame)


def _load_stop_signal(out: Path) -> int:
    """Return the number of the signal that stopped the comparison, or 0."""
    path = out / STOP_FILE
    return int(path.read_text()) if path.exists() else 0


def _run_sweep(words: Sequence[str]) -> Exception | None:
    """Let Hydra do all runs; return the error of the launcher, such as a killed worker, or None."""
    import hydra

    main = hydra.main(version_base=None, config_path="pkg://conf", config_name="compare")
    try:
        with _command_line(words), _hydra_full_error():
            main(run_combination)()
    except Exception as error:
        return error
    return None


@contextmanager
def _command_line(words: Sequence[str]) -> Iterator[None]:
    """Set `sys.argv` within the block.

    Hydra's Compose API composes configurations only. A multirun, with its sweepers and launchers,
    starts from `hydra.main`, which takes overrides from `sys.argv` and from nowhere else.
    """
    argv_before = sys.argv
    sys.argv = ["continual", *words]
    try:
        yield
    finally:
        sys.argv = argv_before


@contextmanager
def _hydra_full_error() -> Iterator[None]:
    """Let Hydra raise errors within the block, instead of printing them and exiting."""
    name = "HYDRA_FULL_ERROR"
    value_before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if value_before is None:
            del os.environ[name]
        else:
            os.environ[name] = value_before


def _report_results(
    out: Path, words: Sequence[str], names: Sequence[str], launcher_error: Exception | None
) -> None:
    """Write and print the report on all runs that have results.

    Raises ConfigError if runs are not finished, else the launcher's error if there is one.
    """
    from continual.reports import write

    written = write.write_report(out) if any(out.glob("*/matrix.json")) else []
    if written:
        write.print_tables(Console(), out)
    if (out / SEARCH_RESULT_FILE).is_file():
        best = load_yaml_mapping(out / SEARCH_RESULT_FILE)
        values = " ".join(f"{key}={value}" for key, value in best["best_params"].items())
        print(f"best: {values}, with an average performance of {best['best_value']:.3f}")
    print("\n".join(f"wrote {path}" for path in written))

    failures = comparison.unfinished_states(out, names)
    if failures:
        all_failed = all(message.startswith("failed") for message in failures.values())
        state = "failed" if all_failed else "are not finished"
        cause = f"\n{type(launcher_error).__name__}: {launcher_error}" if launcher_error else ""
        raise ConfigError(
            f"{len(failures)} of the runs {state}; fix what they say, and give the "
            f"command again:\n  {comparison.resume_command(out, words)}{cause}\n"
            + "\n".join(f"{name}: {message}" for name, message in failures.items())
        )
    if launcher_error:
        raise launcher_error


def _search_space(config: DictConfig) -> dict[str, str]:
    """Return the ranges to search for the configured strategies, by key."""
    return {
        f"strategy.{name}.{key}": value
        for name in config.strategy
        for key, value in config.search_spaces.get(name, {}).items()
    }


def _has_override(words: Sequence[str], key: str) -> bool:
    return any(word.startswith(f"{key}=") for word in words)


def _resolve_launcher(overrides: Sequence[str]) -> str:
    """Return the launcher's name; raise ConfigError if its package is not installed."""
    names = [o.partition("=")[2] for o in overrides if o.startswith(f"{LAUNCHER_GROUP}=")]
    name = names[-1] if names else SERIAL_LAUNCHER
    plugin = LAUNCHER_PACKAGES.get(name)
    try:
        is_installed = not plugin or bool(find_spec(f"hydra_plugins.hydra_{plugin}_launcher"))
    except ModuleNotFoundError:  # no Hydra plugin is installed at all
        is_installed = False
    if not is_installed:
        raise ConfigError(
            f"{LAUNCHER_GROUP}={name} needs hydra-{plugin}-launcher, which is not "
            f"installed: pip install hydra-{plugin}-launcher"
        )
    return name


def _is_sweep(override: str) -> bool:
    """Return True if an override has several values, or a range."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    try:
        return bool(OverridesParser.create().parse_override(override).is_sweep_override())
    except Exception:  # it is refused with a better message when the configuration is composed
        return False


def _with_first_value(override: str) -> str:
    """Replace the values of a sweep by the first of them, and a range by its start."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    if not _is_sweep(override):
        return override
    parsed = OverridesParser.create().parse_override(override)
    if parsed.is_interval_sweep():
        first = getattr(parsed.value(), "start", None)
    else:
        first = next(iter(parsed.sweep_string_iterator()))
    return f"{parsed.get_key_element()}={first}"


def _check_combinations(
    words: Sequence[str], fixed_keys: Sequence[str], compose_config: Callable[..., DictConfig]
) -> list[str]:
    """Compose every combination with its strategy and recipe; return the names of the run folders.

    Raises ConfigError for what is wrong with any of them, before the first one runs.
    """
    from itertools import product

    from hydra.core.override_parser.overrides_parser import OverridesParser

    from continual.runs import build

    # As in Hydra's sweeper, the last override of a key counts.
    overrides_by_key: dict[str, list[str]] = {}
    plain_keys: dict[str, str] = {}  # without a plus sign
    for parsed in OverridesParser.create().parse_overrides(list(words)):
        key = parsed.get_key_element()
        plain_keys[key] = parsed.key_or_group
        if parsed.is_sweep_override():
            values = list(parsed.sweep_string_iterator())
        else:
            values = [parsed.get_value_element_as_str()]
        overrides_by_key[key] = [f"{key}={value}" for value in values]

    names = []
    strategies: set[str] = set()
    for combination in product(*overrides_by_key.values()):
        config = compose_config("compare", combination)
        _apply_strategy_defaults(config, overrides_by_key)
        build.strategy(config)
        build.recipe(config)
        strategies |= set(config.strategy)
        in_name = [
            word
            for key, word in zip(overrides_by_key, combination, strict=True)
            if plain_keys[key] not in fixed_keys and not key.startswith("hydra")
        ]
        names.append(_run_folder_name("_".join(sorted(in_name))))

    prefix = "++strategy_defaults."
    named = {key.split(".")[1] for key in overrides_by_key if key.startswith(prefix)}
    Problems(
        unknown("strategy of this comparison", name, strategies)
        for name in sorted(named - strategies)
    ).raise_if_any()
    return names


def _run_folder_name(combination: str) -> str:
    """Return the folder name of a combination; a slash in a value must not make a subfolder."""
    return combination.replace("/", "%2F")
