"""What a page draws: charts as plain values, which its script gives to Vega-Lite.

Nothing here decides how a chart looks but its colours' numbers: a chart names its series, axes and
what is filtered.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

COORDINATE_DIGITS = (
    5  # of a coordinate that is kept, after the point: a chart is some hundred pixels high
)
MAX_LINE_LABELS = 16  # lines at whose ends there is room for their names

Point = tuple[float, float]


@dataclass(frozen=True)
class Axis:
    """What a direction shows; `kind` is how its numbers are written: percent (of values in [0, 1]),
    number, count, seconds or bytes. `span` is the range shown, None for that of the values; `names`
    names some of the values.
    """

    title: str
    kind: str = "percent"
    span: Point | None = None
    names: Mapping[int, str] = field(default_factory=dict)
    better: str = ""


SCORE_AXIS = Axis("score, %", span=(0.0, 1.0))


@dataclass(frozen=True)
class Series:
    """One line: its points in order, a band (x, low, high), and points to ring, where a task was
    learned.

    `look` is a number for a colour, or "faint" (context) or "ceiling" (a reference). `dots` marks
    the points.
    """

    name: str
    points: Sequence[Point]
    look: int | str = 0
    band: Sequence[tuple[float, float, float]] = ()
    rings: Sequence[Point] = ()
    dots: bool = True


@dataclass(frozen=True)
class Chart:
    """Lines over an axis. `walls` are upright lines with a name; `by` says that the series are the
    page's groups ("group") or tasks ("task"), which a reader chooses from, `task` of which task the
    chart is, `says` what it shows; a `small` one has others beside it.
    """

    title: str
    series: Sequence[Series]
    x: Axis
    y: Axis = SCORE_AXIS
    walls: Sequence[tuple[float, str]] = ()
    small: bool = False
    by: str = ""
    task: str = ""
    says: str = ""
    free: ClassVar[bool] = False

    @property
    def keys(self) -> list[tuple[str, int | str]]:
        """The lines that need a key: groups have theirs above all charts, and a few lines their
        names at their ends.
        """
        told = [(s.name, s.look) for s in self.series if s.look != "faint" and not self.by]
        return told if len(told) > (1 if self.small else MAX_LINE_LABELS) else []

    def to_dict(self) -> dict[str, Any]:
        """As the page's script reads it."""
        return {
            **asdict(self),
            "kind": "lines",
            "series": [
                {
                    **asdict(s),
                    "points": _round_points(s.points),
                    "band": _round_points(s.band),
                    "rings": _round_points(s.rings),
                }
                for s in self.series
            ],
        }


@dataclass(frozen=True)
class ScatterChart:
    """A dot a run, by two of its figures, which a reader may choose among `axes` where `free`.

    Each of `runs` has its `group`, a `text` to find it by, and `values` by axis, None where it has
    none.
    """

    title: str
    runs: Sequence[Mapping[str, Any]]
    axes: Mapping[str, Axis]
    x: str
    y: str
    free: bool = False
    says: str = ""
    small: bool = False
    task: str = ""
    keys: ClassVar[Sequence[tuple[str, int | str]]] = ()

    def to_dict(self) -> dict[str, Any]:
        """As the page's script reads it."""
        return {**asdict(self), "kind": "dots"}


def _round_points(points: Sequence[Sequence[float]]) -> list[list[float]]:
    return [[round(value, COORDINATE_DIGITS) for value in point] for point in points]
