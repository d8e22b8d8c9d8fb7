"""Several runs of one command, through Hydra's multirun, so that any Hydra launcher can spread them."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec
from pathlib import Path
from types import FrameType

from omegaconf import DictConfig, open_dict
from rich.console import Console
from rich.markup import escape

from continual import cells
from continual.errors import ConfigError, ContinualError
from continual.files import write_whole
from continual.interrupt import Signals, Stopped

LAUNCHER = "hydra/launcher"
HERE = "basic"  # the launcher that does one run after another, in this process
EXTRAS = {"joblib": ("parallel", "joblib"), "submitit_local": ("cluster", "submitit"), "ray": ("ray", "ray"),
          "submitit_slurm": ("cluster", "submitit"), "slurm": ("cluster", "submitit"), "ray_cluster": ("ray", "ray")}
STOP = ".stop"  # in the comparison's folder, with the signal's number: no further run begins
NAMED = ("strategy", "seed")  # a run's folder always says these


def compare(overrides: Sequence[str], configure: Callable[[str, Sequence[str]], DictConfig]) -> None:
    """One run for each combination of the comma-separated values, each in a folder of its own, and their report.

    A run that fails leaves the others whole; what is not finished is listed at the end, with the command that finishes
    it. Raises ConfigError for it, and for a combination that is wrong before any run starts; Stopped for a signal.
    """
    launcher = _launcher(overrides)
    config = configure("compare", [_first(o) for o in overrides])
    out, given = Path(config.out), [o for o in overrides if not o.startswith("out=")]
    words = [*given]
    for key, value in zip(NAMED, (config.strategies, config.seed), strict=True):
        words += [] if any(o.startswith(f"{key}=") for o in words) else [f"{key}={value}"]
    fixed = [key for o in words if not _sweeps(o) and (key := o.split("=")[0]) not in NAMED]
    words.append(f"out={_quoted(str(out.absolute()))}")
    names = _check(words, [*fixed, "out"], configure)
    if launcher == "joblib" and not any(o.startswith("hydra.launcher.n_jobs=") for o in words):
        from joblib import cpu_count

        words.append(f"hydra.launcher.n_jobs={min(len(names), cpu_count())}")  # each gets its part of the threads
    (out / STOP).unlink(missing_ok=True)
    cells.plan(out, given, names)
    beside = launcher != HERE
    with _Noted(out) if beside else nullcontext():
        trouble = _sweep([*words, f"hydra.job.config.override_dirname.exclude_keys={[*fixed, 'out']}"])
    if number := _stopped(out):
        raise Stopped("stopped; nothing is lost. Go on with:\n  " + cells.command(out, given), number)
    _tell(out, given, names, trouble)


def cell(config: DictConfig) -> None:
    """One run of the comparison, in this process or wherever the launcher puts it; what fails is left in its folder."""
    from hydra.core.hydra_config import HydraConfig

    hydra = HydraConfig.get()
    folder, name = Path(config.out), _folder(hydra.job.override_dirname)
    beside = hydra.runtime.choices[LAUNCHER] != HERE
    if _stopped(folder):
        return
    from continual.events import lines_of, quiet
    from continual.run import run

    quiet()
    out = folder / name
    with open_dict(config):
        config.out = str(out)
        del config["strategies"]
    console = lines_of(name) if beside else Console(stderr=True)
    if not beside:
        console.rule(escape(name), align="left")
    (out / cells.FAILED).unlink(missing_ok=True)
    try:
        run(config, console)
    except Stopped as stop:
        if not beside:
            write_whole(folder / STOP, str(stop.number))
    except Exception as error:
        if not isinstance(error, ContinualError):
            console.print_exception()
        told = str(error) if isinstance(error, ContinualError) else f"{type(error).__name__}: {error}"
        write_whole(out / cells.FAILED, told + "\n")
        console.print(f"error: {told}", style="red", markup=False, highlight=False)


class _Noted(Signals):
    """A signal is left where runs that have not begun see it; those under way get it too, or come to their end."""

    def __init__(self, out: Path) -> None:
        """For the comparison in `out`."""
        super().__init__()
        self.out = out

    def _note(self, number: int, frame: FrameType | None) -> None:
        write_whole(self.out / STOP, str(number))
        super()._note(number, frame)


def _stopped(out: Path) -> int:
    """The number of the signal that stopped the comparison, or 0."""
    return int((out / STOP).read_text()) if (out / STOP).exists() else 0


def _sweep(words: Sequence[str]) -> Exception | None:
    """Let Hydra do all runs; what the launcher raised, such as a process of its own that was killed."""
    import hydra

    main = hydra.main(version_base=None, config_path="pkg://conf", config_name="compare")(cell)
    before, sys.argv = sys.argv, ["continual", *words]
    try:
        with _raising():
            main()
    except Exception as error:
        return error
    finally:
        sys.argv = before
    return None


@contextmanager
def _raising() -> Iterator[None]:
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


def _tell(out: Path, words: Sequence[str], names: Sequence[str], trouble: Exception | None) -> None:
    """The report over what is there; raises ConfigError for what is not finished."""
    from continual import report

    written = report.write(out) if any(out.glob("*/matrix.json")) else []
    if written:
        report.tables(Console(), out)
    print("\n".join(f"wrote {p}" for p in written))
    if left := cells.failures(out, names):
        what = "failed" if all(told.startswith("failed") for told in left.values()) else "are not finished"
        why = f"\n{type(trouble).__name__}: {trouble}" if trouble else ""
        raise ConfigError(f"{len(left)} of the runs {what}; mend what they say, and give the command again:\n  "
                          f"{cells.command(out, words)}{why}\n" + "\n".join(f"{n}: {t}" for n, t in left.items()))
    if trouble:
        raise trouble


def _launcher(overrides: Sequence[str]) -> str:
    """The launcher's name; raises ConfigError where it is one that an extra brings, which is not installed."""
    name = next((o.partition("=")[2] for o in reversed(overrides) if o.startswith(f"{LAUNCHER}=")), HERE)
    extra, plugin = EXTRAS.get(name, ("", ""))
    try:
        there = not extra or bool(find_spec(f"hydra_plugins.hydra_{plugin}_launcher"))
    except ModuleNotFoundError:  # there is no plugin at all
        there = False
    if not there:
        raise ConfigError(f"{LAUNCHER}={name} needs hydra-{plugin}-launcher, which is not installed; it comes with the "
                          f"extra {extra}: uv sync --extra {extra}")
    return name


def _sweeps(override: str) -> bool:
    from hydra.core.override_parser.overrides_parser import OverridesParser

    try:
        return bool(OverridesParser.create().parse_override(override).is_sweep_override())
    except Exception:  # what is no override at all is refused, in our words, when the configuration is composed
        return False


def _first(override: str) -> str:
    """With the first of the values that it sweeps over."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    if not _sweeps(override):
        return override
    parsed = OverridesParser.create().parse_override(override)
    return f"{parsed.get_key_element()}={next(iter(parsed.sweep_string_iterator()))}"


def _check(words: Sequence[str], fixed: Sequence[str], configure: Callable[[str, Sequence[str]], DictConfig]
           ) -> list[str]:
    """Compose every combination once before the first one runs; returns their folders' names."""
    from itertools import product

    from hydra.core.override_parser.overrides_parser import OverridesParser

    values: dict[str, list[str]] = {}  # as Hydra's sweeper has them: the last of a key counts
    keys: dict[str, str] = {}
    for parsed in OverridesParser.create().parse_overrides(list(words)):
        key = parsed.get_key_element()
        keys[key] = parsed.key_or_group
        values[key] = ([f"{key}={v}" for v in parsed.sweep_string_iterator()] if parsed.is_sweep_override()
                       else [f"{key}={parsed.get_value_element_as_str()}"])
    names = []
    for combination in product(*values.values()):
        configure("compare", combination)
        told: Mapping[str, str] = dict(zip(values, combination, strict=True))
        names.append(_folder("_".join(sorted(
            word for key, word in told.items() if keys[key] not in fixed and not key.startswith("hydra")))))
    return names


def _quoted(text: str) -> str:
    """As a value of Hydra's grammar, in which commas and brackets have a meaning."""
    return "'" + re.sub(r"(\\+)(?='|$)", r"\1\1", text).replace("'", r"\'") + "'"


def _folder(combination: str) -> str:
    """The name of a run's folder, which is one folder whatever the values hold."""
    return re.sub("/", "%2F", combination)
