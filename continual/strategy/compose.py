"""Compose several strategies into one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from inspect import isfunction, unwrap
from itertools import combinations
from typing import Any

from continual.errors import ConfigError
from continual.strategy.interface import Strategy


def compose(*parts: Strategy, names: Sequence[str] = ()) -> Strategy:
    """Return one strategy that inherits from the classes of all `parts`, in that order.

    It has the hyper-parameters of all parts. A part whose class another part inherits from is
    that part's base, and is not listed twice. Raises ConfigError if a part would lose a method to
    another, if two have different fields of one name, or if they share a setting and give it
    different values. The message calls the parts by their `names`, by default their classes'.
    """
    kinds = list(dict.fromkeys(type(p) for p in parts))
    bases = tuple(k for k in kinds if not any(o is not k and issubclass(o, k) for o in kinds))
    kind = bases[0] if len(bases) == 1 else _make_class(bases)

    for reason in (*_shadowed_methods(kind, kinds), *_field_conflicts(kinds)):
        raise ConfigError(reason)

    settings = _merge_settings(parts, names or [type(p).__name__ for p in parts])
    composed: Strategy = kind(**settings)
    return composed


def _make_class(bases: tuple[type[Strategy], ...]) -> type[Strategy]:
    """Create the dataclass that inherits from all `bases`; it adds no code of its own."""
    name = "".join(b.__name__ for b in bases)
    # No code of its own, so nothing that is not shardable; its bases declare the same or not.
    kind: type[Strategy] = type(name, bases, {"shardable": True})
    return dataclass(kw_only=True)(kind)


def _merge_settings(parts: Sequence[Strategy], names: Sequence[str]) -> dict[str, Any]:
    """Return the parts' hyper-parameters; raises ConfigError if two disagree on one."""
    settings: dict[str, Any] = {}
    owners: dict[str, str] = {}
    for part, part_name in zip(parts, names, strict=True):
        for name in (f.name for f in fields(part) if f.init):
            value = getattr(part, name)
            other = settings.setdefault(name, value)
            owner = owners.setdefault(name, part_name)
            if other != value:
                raise ConfigError(
                    f"{owner}.{name}={other} and {part_name}.{name}={value} are one setting of "
                    "the composed strategy; give both the same value, or use only one of them"
                )
    return settings


def _field_conflicts(kinds: Sequence[type[Strategy]]) -> Iterator[str]:
    """Yield a sentence for each name that stands for two different fields in two classes.

    A hyper-parameter may be in both: then it is one setting.
    """
    for a, b in combinations(kinds, 2):
        settings = {f.name for f in fields(a) if f.init} & {f.name for f in fields(b) if f.init}
        names = dict.fromkeys(f.name for kind in (a, b) for f in fields(kind))
        for name in (n for n in names if n not in settings):
            first = _defining_class(a, name)
            second = _defining_class(b, name)
            if first and second and first is not second:
                yield (
                    f"{a.__name__} and {b.__name__} cannot be composed: both define "
                    f"{name!r}; use only one of them"
                )


def _defining_class(kind: type[Strategy], name: str) -> type | None:
    """Return the most basic class of `kind`'s bases that has the field or method."""
    for base in reversed(kind.__mro__):
        if name in vars(base) or name in getattr(base, "__dataclass_fields__", {}):
            return base
    return None


def _shadowed_methods(kind: type[Strategy], kinds: Sequence[type[Strategy]]) -> Iterator[str]:
    """Yield a sentence for each method of a listed class that the composed `kind` never calls.

    A class may replace the methods of its own bases, but not those of a base that is listed too.
    """
    names = dict.fromkeys(n for k in kind.__mro__ for n, f in vars(k).items() if isfunction(f))
    for name in names:
        if name.startswith("__") and name != "__post_init__":
            continue
        # The classes that define the method, in the order in which `super()` reaches them. Those
        # behind the first that does not call `super()` are never reached.
        owners = [k for k in kind.__mro__ if isfunction(vars(k).get(name))]
        ends = [i for i, k in enumerate(owners) if not _passes_on(vars(k)[name])]
        if not ends:
            continue
        last = owners[ends[0]]
        for owner in owners[ends[0] + 1 :]:
            if owner is Strategy or (owner not in kinds and issubclass(last, owner)):
                continue
            yield _shadowed_sentence(kinds, name, last, owner)


def _shadowed_sentence(
    kinds: Sequence[type[Strategy]], name: str, by: type[Strategy], owner: type[Strategy]
) -> str:
    """Say that `by`'s method hides that of `owner`, by the listed classes that have them."""
    winner = next(k for k in kinds if issubclass(k, by)).__name__
    loser = next(k for k in kinds if issubclass(k, owner)).__name__
    fix = f"list {loser} first" if _passes_on(vars(owner)[name]) else "use only one of them"
    return f"{winner} and {loser} cannot be composed: {winner}'s {name!r} replaces {loser}'s; {fix}"


def _passes_on(method: Any) -> bool:
    """Return True if a method calls `super()`, so that the next class's method runs too.

    The compiler gives a function that names `super` the closure variable `__class__`. This is
    read here, where a decorator on every method could serve, because a decorator can be forgotten:
    then another strategy's method would be skipped without an error.
    """
    if "replaces_super" in vars(method):
        return False
    return "__class__" in unwrap(method).__code__.co_freevars
