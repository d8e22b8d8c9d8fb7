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
    """One strategy that has the moments of all `parts`, in that order, and their hyper-parameters.

    A part whose class another part inherits from is that part's own base, and is not listed twice.
    Raises ConfigError where a part would lose one of its methods to another, where two have a field
    of one name that is not the same field, and where they share a setting and ask for different
    values. There the parts are called by their `names`, by default their classes'.
    """
    kinds = list(dict.fromkeys(type(p) for p in parts))
    bases = tuple(k for k in kinds if not any(o is not k and issubclass(o, k) for o in kinds))
    name, says = "".join(b.__name__ for b in bases), {"shardable": True}  # if all of them are
    kind = bases[0] if len(bases) == 1 else dataclass(kw_only=True)(type(name, bases, says))
    for reason in (*_shadowed_methods(kind, kinds), *_field_conflicts(kinds)):
        raise ConfigError(reason)
    settings: dict[str, tuple[Any, str]] = {}
    for part, called in zip(parts, names or [type(p).__name__ for p in parts], strict=True):
        for f in (f for f in fields(part) if f.init):
            value = getattr(part, f.name)
            other, owner = settings.setdefault(f.name, (value, called))
            if other != value:
                raise ConfigError(
                    f"{owner}.{f.name}={other} and {called}.{f.name}={value} are one setting of "
                    "what is composed of both; give both the same value, or choose one of them"
                )
    composed: Strategy = kind(**{name: value for name, (value, _) in settings.items()})
    return composed


def _field_conflicts(kinds: Sequence[type[Strategy]]) -> Iterator[str]:
    """The names of fields that two listed classes have, each its own; a setting may be both's, if
    its values agree.
    """
    for a, b in combinations(kinds, 2):
        settings = {f.name for f in fields(a) if f.init} & {f.name for f in fields(b) if f.init}
        for name in dict.fromkeys(
            f.name for kind in (a, b) for f in fields(kind) if f.name not in settings
        ):
            first, second = _defining_class(a, name), _defining_class(b, name)
            if first and second and first is not second:
                yield (
                    f"{a.__name__} and {b.__name__} cannot be composed: each has a {name!r} of "
                    "its own, and what is composed of both has one; choose one of them"
                )


def _defining_class(kind: type[Strategy], name: str) -> type | None:
    """The class, of all that `kind` inherits from, that had the field or method first."""
    had = (
        k
        for k in reversed(kind.__mro__)
        if name in {**vars(k), **getattr(k, "__dataclass_fields__", {})}
    )
    return next(had, None)


def _shadowed_methods(kind: type[Strategy], kinds: Sequence[type[Strategy]]) -> Iterator[str]:
    """What a listed class has and nothing in the composed `kind` would ever call, one sentence
    each.

    What a class has from its own bases it may replace, but not what such a base is listed for.
    """
    names = dict.fromkeys(n for k in kind.__mro__ for n, f in vars(k).items() if isfunction(f))
    for name in (n for n in names if n == "__post_init__" or not n.startswith("__")):
        owners = [k for k in kind.__mro__ if isfunction(vars(k).get(name))]
        first = next(
            (i for i, k in enumerate(owners) if _ignores_super(vars(k)[name])), len(owners)
        )
        for owner in owners[first + 1 :]:
            if owner is not Strategy and (owner in kinds or not issubclass(owners[first], owner)):
                by, lost = (
                    next(k for k in kinds if issubclass(k, o)).__name__
                    for o in (owners[first], owner)
                )
                fix = (
                    "choose one of them"
                    if _ignores_super(vars(owner)[name])
                    else f"list {lost} first"
                )
                yield f"{by} and {lost} cannot be composed so: {by}'s {name!r} takes the place of {lost}'s; {fix}"


def _ignores_super(method: Any) -> bool:
    """Whether a method leaves nothing to its bases': it is marked so, or there is no `super()` in
    it.
    """
    return "instead" in vars(method) or "__class__" not in unwrap(method).__code__.co_freevars
