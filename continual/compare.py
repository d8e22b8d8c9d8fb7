"""Several runs side by side, through Hydra's multirun, so that any Hydra launcher can spread them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from omegaconf import DictConfig, open_dict
from rich.console import Console
from rich.markup import escape

from continual.errors import ConfigError, ContinualError
from continual.interrupt import Stopped, again


def compare(overrides: Sequence[str], configure: Callable[[str, Sequence[str]], DictConfig]) -> None:
    """One run for each combination of the comma-separated values, each in a folder of its own, and their report.

    A run that fails leaves the others whole; the failures are listed at the end. Raises ConfigError for them, and for
    a combination that is wrong before any run starts.
    """
    import hydra

    config = configure("compare", [o for o in overrides if not _sweeps(o)])
    words = [*overrides]
    named = {"strategy": config.strategies, "seed": config.seed}  # a cell's folder always says these
    words += [f"{key}={value}" for key, value in named.items() if not any(o.startswith(f"{key}=") for o in words)]
    words = [o for o in words if not o.startswith("out=")] + [f"out={config.out}"]
    fixed = [key for o in words if not _sweeps(o) and (key := o.split("=")[0]) not in named]
    _check(words, configure)
    failures: list[str] = []
    stops: list[Stopped] = []

    def job(cell: DictConfig) -> None:
        from hydra.core.hydra_config import HydraConfig

        out = Path(HydraConfig.get().runtime.output_dir)
        with open_dict(cell):
            cell.out = str(out)
            del cell["strategies"]
        if not stops:
            _cell(cell, out, failures, stops)

    main = hydra.main(version_base=None, config_path="pkg://conf", config_name="compare")(job)
    before, sys.argv = sys.argv, ["continual", *words, f"hydra.job.config.override_dirname.exclude_keys={fixed}"]
    try:
        main()
    finally:
        sys.argv = before
    if stops:
        raise Stopped(f"stopped in the middle of a run; nothing is lost. Go on with:\n  {again(Path(config.out))}",
                      stops[0].number)
    _tell(Path(config.out), failures)


def _cell(cell: DictConfig, out: Path, failures: list[str], stops: list[Stopped]) -> None:
    """One run of the comparison."""
    from continual.events import quiet
    from continual.run import run

    quiet()
    console = Console(stderr=True)
    console.rule(escape(out.name), align="left")
    try:
        run(cell, console)
    except Stopped as stop:
        stops.append(stop)
    except ContinualError as error:
        failures.append(f"{out.name}: {error}")
        console.print(f"error: {error}", style="red", markup=False, highlight=False)


def _tell(out: Path, failures: Sequence[str]) -> None:
    from continual import report

    written = report.write(out) if any(out.glob("*/matrix.json")) else []
    if written:
        report.tables(Console(), out)
    print("\n".join(f"wrote {p}" for p in written))
    if failures:
        raise ConfigError(f"{len(failures)} of the runs failed; mend what they say and give the same command again "
                          f"with out={out}:\n" + "\n".join(failures))


def _sweeps(override: str) -> bool:
    from hydra.core.override_parser.overrides_parser import OverridesParser

    try:
        return bool(OverridesParser.create().parse_override(override).is_sweep_override())
    except Exception:  # what is no override at all is refused, in our words, when the configuration is composed
        return False


def _check(words: Sequence[str], configure: Callable[[str, Sequence[str]], DictConfig]) -> None:
    """Compose every combination once before the first one runs."""
    from itertools import product

    from hydra.core.override_parser.overrides_parser import OverridesParser

    values = []
    for parsed in OverridesParser.create().parse_overrides(list(words)):
        key = parsed.get_key_element()
        values.append([f"{key}={v}" for v in parsed.sweep_string_iterator()] if parsed.is_sweep_override()
                      else [str(parsed.input_line)])
    for combination in product(*values):
        configure("compare", combination)
