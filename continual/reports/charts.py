"""Line and scatter charts as inline SVG, coloured by the page: they follow its light or dark scheme."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from markupsafe import Markup

COLOURS = 7  # the style sheet's .c0 to .c6; further series repeat them, dashed

Point = tuple[float, float]
Tick = tuple[float, str]


@dataclass(frozen=True)
class Series:
    """One line: its points in order, a band (x, low, high), and points to ring with what to say of them.

    `look` is a number for a colour, or a class of the style sheet: "faint" (context), "ceiling" (a reference). `dots`
    is the radius of the points, in pixels.
    """

    name: str
    points: Sequence[Point]
    look: int | str = 0
    band: Sequence[tuple[float, float, float]] = ()
    rings: Sequence[Point] = ()
    dots: float = 3
    says: Sequence[str] = ()


@dataclass(frozen=True)
class Chart:
    """A plot area with axes; `x` and `y` are the ranges shown, ticks (value, text)."""

    series: Sequence[Series]
    x: Point
    y: Point = (0.0, 1.0)
    x_ticks: Sequence[Tick] = ()
    y_ticks: Sequence[Tick] = field(default_factory=lambda: SCORE_TICKS)
    width: int = 720
    height: int = 320
    right: int = 16
    left: int = 44
    x_title: str = ""
    title: str = ""
    walls: Sequence[Tick] = ()
    labels: bool = False

    def px(self, x: float) -> float:
        """The horizontal pixel of a value."""
        return self.left + (x - self.x[0]) / ((self.x[1] - self.x[0]) or 1) * (self.width - self.left - self.right)

    def py(self, y: float) -> float:
        """The vertical pixel of a value."""
        top, bottom = (26 if self.title or self.walls else 12), self.height - (42 if self.x_title else 26)
        return bottom - (y - self.y[0]) / ((self.y[1] - self.y[0]) or 1) * (bottom - top)

    def svg(self) -> Markup:
        """The chart as an SVG element that scales with its box."""
        opening = Markup('<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}">').format(
            self.width, self.height, self.title or ", ".join(s.name for s in self.series))
        return Markup("\n").join([opening, *self._axes(), *(part for s in self.series for part in self._line(s)),
                                  *(self._names() if self.labels else []), Markup("</svg>")])

    def _axes(self) -> list[Markup]:
        left, right, bottom = self.px(self.x[0]), self.px(self.x[1]), self.py(self.y[0])
        parts = [_text(left - 8, self.py(y) + 4, text, "tick end") for y, text in self.y_ticks]
        parts += [_path([(left, self.py(y)), (right, self.py(y))], "grid") for y, _ in self.y_ticks]
        parts += [_text(self.px(x), bottom + 17, text, "tick mid") for x, text in self.x_ticks]
        for x, text in self.walls:
            parts += [_path([(self.px(x), self.py(self.y[1])), (self.px(x), bottom)], "wall"),
                      _text(self.px(x) + 4, self.py(self.y[1]) - 6, text, "tick")]
        parts += [_text((left + right) / 2, self.height - 6, self.x_title, "tick mid")] if self.x_title else []
        return parts + ([_text(left, 14, self.title, "title")] if self.title else [])

    def _line(self, s: Series) -> list[Markup]:
        look = _look(s.look)
        at = [(self.px(x), self.py(y)) for x, y in s.points]
        parts = []
        if s.band:
            edge = [(x, low) for x, low, _ in s.band] + [(x, high) for x, _, high in reversed(s.band)]
            parts.append(_path([(self.px(x), self.py(y)) for x, y in edge], f"band {look}"))
        parts.append(_path(at, f"line {look}"))
        says = s.says or [f"{s.name}: {y:.3g}" for _, y in s.points]
        if s.dots:
            parts += [_dot(point, f"dot {look}", text, s.dots) for point, text in zip(at, says, strict=True)]
        return parts + [_dot((self.px(x), self.py(y)), f"ring {look}", f"{s.name}: learned here", 5)
                        for x, y in s.rings]

    def _names(self) -> list[Markup]:
        """Each line's name right of its end, pushed apart where they would overlap."""
        named = sorted((s for s in self.series if s.points), key=lambda s: -s.points[-1][1])
        wanted = [self.py(s.points[-1][1]) + 4 for s in named]
        return [_text(self.px(s.points[-1][0]) + 10, y, s.name, f"name {_look(s.look)}")
                for s, y in zip(named, apart(wanted, 16, self.py(self.y[0]) + 4), strict=True)]


SCORE_TICKS: list[Tick] = [(y / 100, str(y)) for y in (0, 25, 50, 75, 100)]


def apart(wanted: Sequence[float], gap: float, most: float) -> list[float]:
    """Rising positions at least `gap` apart, near the `wanted` ones (which rise), none beyond `most` if they fit."""
    down = list(wanted)
    for i in range(1, len(down)):
        down[i] = max(down[i], down[i - 1] + gap)
    for i in reversed(range(len(down))):
        down[i] = min(down[i], most - gap * (len(down) - 1 - i))
    return down


def scatter(points: Sequence[tuple[Point, int | str, str]], x: Point, y: Point, x_ticks: Sequence[Tick],
            y_ticks: Sequence[Tick], titles: tuple[str, str]) -> Markup:
    """Points ((x, y), look, text to show on hovering) with both axes named."""
    series = [Series(text, [at], look, dots=6, says=[text]) for at, look, text in points]
    return Chart(series, x, y, x_ticks, y_ticks, width=420, height=320, x_title=titles[0], title=titles[1]).svg()


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round values from `low` to `high`, 1, 2 or 5 times a power of ten apart."""
    span = max(high - low, 0.0) or 1.0
    power = 10.0 ** math.floor(math.log10(span / about))
    step = next(power * m for m in (1, 2, 5, 10) if span / (power * m) <= about)
    return [round(i * step, 10) for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _look(look: int | str) -> str:
    return look if isinstance(look, str) else f"c{look % COLOURS}" + (" dashed" if look // COLOURS % 2 else "")


def _path(points: Sequence[Point], look: str) -> Markup:
    return Markup('<path class="{}" d="M{}"/>').format(look, "L".join(f"{x:.1f},{y:.1f}" for x, y in points))


def _dot(at: Point, look: str, text: str, radius: float) -> Markup:
    return Markup('<circle class="{}" cx="{}" cy="{}" r="{}"><title>{}</title></circle>').format(
        look, f"{at[0]:.1f}", f"{at[1]:.1f}", radius, text)


def _text(x: float, y: float, text: str, look: str) -> Markup:
    return Markup('<text class="{}" x="{}" y="{}">{}</text>').format(look, f"{x:.1f}", f"{y:.1f}", text)
