"""Several runs of one command, through Hydra's multirun, so that any Hydra launcher can spread
them.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec
from pathlib import Path
from types import FrameType

from omegaconf import DictConfig, open_dict
from rich.console import Console
from rich.markup import escape

from continual.config.quoting import quote_value
from continual.errors import ConfigError, ContinualError, gathered, unknown
from continual.io.atomic import write_atomically
from continual.io.untrusted import load_yaml_mapping
from continual.results import comparison
from continual.runs.lock import run_folder_lock
from continual.runs.signals import RunInterrupted, StopSignal

LAUNCHER_GROUP = "hydra/launcher"
SERIAL_LAUNCHER = "basic"  # the launcher that does one run after another, in this process
LAUNCHER_PACKAGES = {
    "joblib": "joblib",
    "submitit_local": "submitit",
    "submitit_slurm": "submitit",
    "slurm": "submitit",
    "ray": "ray",
    "ray_cluster": "ray",
}  # of each launcher
SEARCH_RESULT_FILE = "optimization_results.yaml"  # what a search found
STOP_FILE = ".stop"  # in the comparison's folder, with the signal's number: no further run begins
FOLDER_NAME_KEYS = ("strategy", "seed")  # a run's folder always says these
GRID_SWEEPER = "hydra._internal.core_plugins.basic_sweeper.BasicSweeper"  # every combination; another sweeper searches
COMPARISON_KEYS = (
    "strategies",
    "tuned",
    "spaces",
)  # a comparison's own keys, which its runs do not have


def compare(overrides: Sequence[str], compose_config: Callable[..., DictConfig]) -> None:
    """One run for each combination of the comma-separated values, each in a folder of its own, and
    their report.

    A run that fails leaves the others whole; what is not finished is listed at the end, with the
    command that finishes it. Raises ConfigError for it, for a combination that is wrong before any
    run starts, and where another comparison is under way in the folder; Stopped for a signal.
    """
    if several := [o for o in overrides if o.startswith("out=") and _is_sweep(o)]:
        raise ConfigError(
            f"{several[0]}: a comparison has one folder; quote a comma that is part of its name, such as "
            "\"out='a,b'\""
        )
    launcher, typed = (
        _resolve_launcher(overrides),
        [o for o in overrides if not o.startswith("out=")],
    )
    overrides = _to_strategy_defaults(overrides)
    config = compose_config(
        "compare", [_with_first_value(o) for o in overrides], return_hydra_config=True
    )
    out, given = Path(config.out), [o for o in overrides if not o.startswith("out=")]
    sweeper = config.hydra.sweeper
    told = {
        **(sweeper.params or {}),
        **_search_space(config),
    }  # an experiment's sweeps are among the params
    words = [
        *given,
        *(f"{key}={value}" for key, value in told.items() if not _has_override(given, key)),
    ]
    for key, value in zip(FOLDER_NAME_KEYS, (config.strategies, config.seed), strict=True):
        words += [] if _has_override(words, key) else [f"{key}={value}"]
    fixed = [
        key
        for o in words
        if not _is_sweep(o) and (key := o.split("=")[0].lstrip("+")) not in FOLDER_NAME_KEYS
    ]
    words.append(f"out={quote_value(str(out.absolute()))}")
    searches = sweeper._target_ != GRID_SWEEPER
    if searches and not any(
        _is_sweep(word) and word.split("=")[0] not in FOLDER_NAME_KEYS for word in words
    ):
        raise ConfigError(
            "a search needs something to look through, and of "
            f"{', '.join(config.strategy)} nothing is told; give a range, such as "
            "'strategy.NAME.KEY=tag(log,interval(0.01,10))'"
        )
    names = [] if searches else _check_combinations(words, [*fixed, "out"], compose_config)
    if launcher == "joblib" and not any(o.startswith("hydra.launcher.n_jobs=") for o in words):
        # Each gets its part of the threads.
        words.append(
            f"hydra.launcher.n_jobs={min(len(names) or sweeper.n_jobs, os.cpu_count() or 1)}"
        )
    with run_folder_lock(out):
        (out / STOP_FILE).unlink(missing_ok=True)
        if not searches:  # which runs a search will do is not known before
            comparison.plan(out, typed, names)
        with _SharedStopSignal(out) if launcher != SERIAL_LAUNCHER else nullcontext():
            trouble = _run_sweep(
                [*words, f"hydra.job.config.override_dirname.exclude_keys={[*fixed, 'out']}"]
            )
        if number := _load_stop_signal(out):
            raise RunInterrupted(
                "stopped; nothing is lost. Go on with:\n  " + comparison.command(out, typed), number
            )
        _report_results(
            out,
            typed,
            names or [p.parent.name for p in sorted(out.glob(f"*/{comparison.FAILED}"))],
            trouble,
        )


def run_combination(config: DictConfig) -> float | None:
    """One run of the comparison, in this process or wherever the launcher puts it; what fails is
    left in its folder.

    What a search maximises: the average performance.
    """
    from hydra.core.hydra_config import HydraConfig

    hydra = HydraConfig.get()
    folder, name = Path(config.out), _run_folder_name(hydra.job.override_dirname)
    beside = hydra.runtime.choices[LAUNCHER_GROUP] != SERIAL_LAUNCHER
    if _load_stop_signal(folder):
        return None
    from continual.runs.run import run
    from continual.tracking.events import prefixed_console, silence_libraries

    silence_libraries()
    out = folder / name
    with open_dict(config):
        config.out = str(out)
        _apply_strategy_defaults(
            config, {o.split("=")[0].lstrip("+") for o in hydra.overrides.task}
        )
        for key in COMPARISON_KEYS:
            del config[key]
    console = prefixed_console(name) if beside else Console(stderr=True)
    if not beside:
        console.rule(escape(name), align="left")
    (out / comparison.FAILED).unlink(missing_ok=True)
    try:
        return run(config, console).summary()["average_performance"]
    except RunInterrupted as stop:
        if not beside:
            write_atomically(folder / STOP_FILE, str(stop.signal_number))
    except Exception as error:
        if not isinstance(error, ContinualError):
            console.print_exception()
        told = (
            str(error) if isinstance(error, ContinualError) else f"{type(error).__name__}: {error}"
        )
        write_atomically(out / comparison.FAILED, told + "\n")
        console.print(f"error: {told}", style="red", markup=False, highlight=False)
    return None


def _to_strategy_defaults(overrides: Sequence[str]) -> list[str]:
    """Where several strategies are compared, a single one's settings as tuned ones: for those runs
    that have it.
    """
    if any(o.startswith("strategy=") and not _is_sweep(o) for o in overrides):
        return list(overrides)
    return [
        re.sub(r"^\+*strategy\.(?=[\w-]+\.)", "++tuned.", o) if not _is_sweep(o) else o
        for o in overrides
    ]


def _apply_strategy_defaults(config: DictConfig, overridden_keys: Collection[str]) -> None:
    """The strategies' tuned settings, but for the keys that are given; raises ConfigError for one
    that is not there.
    """
    for name, values in config.tuned.items():
        for key, value in values.items():
            if name in config.strategy and f"strategy.{name}.{key}" not in overridden_keys:
                if key not in config.strategy[name]:
                    raise ConfigError(
                        unknown(
                            "key",
                            f"strategy.{name}.{key}",
                            [
                                f"strategy.{name}.{known}"
                                for known in config.strategy[name]
                                if known != "_target_"
                            ],
                        )
                    )
                config.strategy[name][key] = value


class _SharedStopSignal(StopSignal):
    """A signal is left where runs that have not begun see it; those under way get it too, or come
    to their end.
    """

    def __init__(self, out: Path) -> None:
        """For the comparison in `out`."""
        super().__init__()
        self.out = out

    def _handle(self, number: int, frame: FrameType | None) -> None:
        write_atomically(self.out / STOP_FILE, str(number))
        super()._handle(number, frame)


def _load_stop_signal(out: Path) -> int:
    """The number of the signal that stopped the comparison, or 0."""
    return int((out / STOP_FILE).read_text()) if (out / STOP_FILE).exists() else 0


def _run_sweep(words: Sequence[str]) -> Exception | None:
    """Let Hydra do all runs; what the launcher raised, such as a process of its own that was
    killed.
    """
    import hydra

    main = hydra.main(version_base=None, config_path="pkg://conf", config_name="compare")(
        run_combination
    )
    before, sys.argv = sys.argv, ["continual", *words]
    try:
        with _hydra_full_error():
            main()
    except Exception as error:
        return error
    finally:
        sys.argv = before
    return None


@contextmanager
def _hydra_full_error() -> Iterator[None]:
    """Hydra raises what went wrong, and prints no traceback of its own."""
    name = "HYDRA_FULL_ERROR"
    before, os.environ[name] = os.environ.get(name), "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _report_results(
    out: Path, words: Sequence[str], names: Sequence[str], launcher_error: Exception | None
) -> None:
    """The report over what is there; raises ConfigError for what is not finished."""
    from continual.reports import write

    written = write.write(out) if any(out.glob("*/matrix.json")) else []
    if written:
        write.tables(Console(), out)
    if (best := out / SEARCH_RESULT_FILE).is_file():
        told = load_yaml_mapping(best)
        print(
            f"best: {' '.join(f'{k}={v}' for k, v in told['best_params'].items())}, with an "
            f"average performance of {told['best_value']:.3f}"
        )
    print("\n".join(f"wrote {p}" for p in written))
    if left := comparison.failures(out, names):
        what = (
            "failed"
            if all(told.startswith("failed") for told in left.values())
            else "are not finished"
        )
        why = f"\n{type(launcher_error).__name__}: {launcher_error}" if launcher_error else ""
        raise ConfigError(
            f"{len(left)} of the runs {what}; fix what they say, and give the "
            f"command again:\n  {comparison.command(out, words)}{why}\n"
            + "\n".join(f"{n}: {t}" for n, t in left.items())
        )
    if launcher_error:
        raise launcher_error


def _search_space(config: DictConfig) -> dict[str, str]:
    """What a search looks through for these strategies, by key."""
    return {
        f"strategy.{name}.{key}": value
        for name in config.strategy
        for key, value in config.spaces.get(name, {}).items()
    }


def _has_override(words: Sequence[str], key: str) -> bool:
    return any(word.startswith(f"{key}=") for word in words)


def _resolve_launcher(overrides: Sequence[str]) -> str:
    """The launcher's name; raises ConfigError where its package is not installed."""
    name = next(
        (o.partition("=")[2] for o in reversed(overrides) if o.startswith(f"{LAUNCHER_GROUP}=")),
        SERIAL_LAUNCHER,
    )
    plugin = LAUNCHER_PACKAGES.get(name)
    try:
        there = not plugin or bool(find_spec(f"hydra_plugins.hydra_{plugin}_launcher"))
    except ModuleNotFoundError:  # there is no plugin at all
        there = False
    if not there:
        raise ConfigError(
            f"{LAUNCHER_GROUP}={name} needs hydra-{plugin}-launcher, which is not "
            f"installed: pip install hydra-{plugin}-launcher"
        )
    return name


def _is_sweep(override: str) -> bool:
    from hydra.core.override_parser.overrides_parser import OverridesParser

    try:
        return bool(OverridesParser.create().parse_override(override).is_sweep_override())
    except (
        Exception
    ):  # what is no override at all is refused, in our words, when the configuration is composed
        return False


def _with_first_value(override: str) -> str:
    """With the first of the values that it sweeps over."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    if not _is_sweep(override):
        return override
    parsed = OverridesParser.create().parse_override(override)
    least = (
        getattr(parsed.value(), "start", None)
        if parsed.is_interval_sweep()
        else next(iter(parsed.sweep_string_iterator()))
    )
    return f"{parsed.get_key_element()}={least}"


def _check_combinations(
    words: Sequence[str], fixed: Sequence[str], configure: Callable[..., DictConfig]
) -> list[str]:
    """Compose every combination once, with its strategy and recipe, before the first one runs;
    their folders' names.
    """
    from itertools import product

    from hydra.core.override_parser.overrides_parser import OverridesParser

    from continual.runs import build

    values: dict[str, list[str]] = {}  # as Hydra's sweeper has them: the last of a key counts
    keys: dict[str, str] = {}
    for parsed in OverridesParser.create().parse_overrides(list(words)):
        key = parsed.get_key_element()
        keys[key] = parsed.key_or_group
        values[key] = (
            [f"{key}={v}" for v in parsed.sweep_string_iterator()]
            if parsed.is_sweep_override()
            else [f"{key}={parsed.get_value_element_as_str()}"]
        )
    names, met = [], set[str]()
    tuned = {key.split(".")[1] for key in values if key.startswith("++tuned.")}
    for combination in product(*values.values()):
        config = configure("compare", combination)
        _apply_strategy_defaults(config, values)
        build.strategy(config), build.recipe(config)
        met |= set(config.strategy)
        told: Mapping[str, str] = dict(zip(values, combination, strict=True))
        names.append(
            _run_folder_name(
                "_".join(
                    sorted(
                        word
                        for key, word in told.items()
                        if keys[key] not in fixed and not key.startswith("hydra")
                    )
                )
            )
        )
    if strange := sorted(tuned - met):
        raise ConfigError(
            gathered([unknown("strategy of this comparison", name, met) for name in strange])
        )
    return names


def _run_folder_name(combination: str) -> str:
    """The name of a run's folder, which is one folder whatever the values hold."""
    return re.sub("/", "%2F", combination)
