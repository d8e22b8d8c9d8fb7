"""How figures are named and written, the same in the terminal, on the page and in a chart."""

from __future__ import annotations

from dataclasses import dataclass

NO_VALUE = "–"


@dataclass(frozen=True)
class SummaryInfo:
    """A summary's name for people, which way is better ("higher" or "lower"), and one line on what
    it tells.
    """

    title: str
    better: str
    description: str
    signed: bool = False

    @property
    def arrow(self) -> str:
        """An arrow to the better side."""
        return "↑" if self.better == "higher" else "↓"


SUMMARY_INFO: dict[str, SummaryInfo] = {
    "average_performance": SummaryInfo(
        "Average performance", "higher", "mean score over all tasks, at the end"
    ),
    "forgetting": SummaryInfo(
        "Forgetting", "lower", "mean fall of a task from its best score to its last"
    ),
    "backward_transfer": SummaryInfo(
        "Backward transfer",
        "higher",
        "mean change of a task from its own stage to the end; negative is forgetting",
        True,
    ),
    "learning_accuracy": SummaryInfo(
        "Learning accuracy", "higher", "mean score of a task right after its own stage"
    ),
    "forward_transfer": SummaryInfo(
        "Forward transfer",
        "higher",
        "mean gain on a task before it is taught, over the untrained model",
        True,
    ),
    "average_incremental_performance": SummaryInfo(
        "Average incremental",
        "higher",
        "mean over the stages of the mean over the tasks learned so far",
    ),
    "intransigence": SummaryInfo(
        "Intransigence",
        "lower",
        "how much less well a task is learned than the reference (joint) run knows it",
    ),
}


def format_percent(score: float | None, signed: bool = False) -> str:
    """A score in [0, 1] as a percentage with one decimal and a true minus sign; a dash where there
    is none.
    """
    if score is None:
        return NO_VALUE
    value = round(100 * score, 1) + 0.0  # + 0.0: no "-0.0"
    return (f"{value:+.1f}" if signed and value else f"{value:.1f}").replace("-", "−")


def format_interval(low: float, high: float, signed: bool = False) -> str:
    """`[38.2, 42.0]`, in percent."""
    return f"[{format_percent(low, signed)}, {format_percent(high, signed)}]"


def format_mean_std(mean: float | None, spread: float | None, signed: bool = False) -> str:
    """`40.1 ± 0.6`; without the second part where there is one run only."""
    return format_percent(mean, signed) + (f" ± {100 * spread:.1f}" if spread is not None else "")


def format_seconds(value: float | None) -> str:
    """A duration: 0.42 s, 12 s, 3 min 05 s, 2 h 10 min."""
    if value is None:
        return NO_VALUE
    if value < 60:
        return f"{value:.2g} s" if value < 10 else f"{value:.0f} s"
    minutes = round(value / 60) if value >= 3600 else int(value // 60)
    return (
        f"{minutes // 60} h {minutes % 60:02d} min"
        if value >= 3600
        else f"{minutes} min {value % 60:02.0f} s"
    )


def format_count(value: float | None) -> str:
    """A whole number with thin spaces between thousands; short forms from ten million."""
    if value is None:
        return NO_VALUE
    return f"{value / 1e6:,.0f} M" if value >= 1e7 else f"{value:,.0f}".replace(",", "\u2009")


def format_bytes(value: float | None) -> str:
    """A number of bytes: 512 B, 3.2 kB, 41 MB, 1.5 GB (powers of 1000)."""
    if value is None:
        return NO_VALUE
    power = sum(value >= 1000**n for n in (1, 2, 3, 4))
    unit, scaled = ("B", "kB", "MB", "GB", "TB")[power], value / 1000**power
    return f"{scaled:.0f} {unit}" if scaled >= 10 or not power else f"{scaled:.1f} {unit}"


def format_cost(key: str, value: float) -> tuple[str, str]:
    """The name and figure of one entry of a matrix's cost, its unit told by the key's last word."""
    *words, unit = key.split("_")
    write = {"seconds": format_seconds, "bytes": format_bytes}.get(unit)
    name = (
        " ".join(words) or {"seconds": "wall time", "bytes": "size"}.get(unit, unit)
        if write
        else key
    )
    return name.replace("_", " "), write(value) if write else format_count(value)
