"""Whatever the bytes of a file, its reader returns or raises a ContinualError: no traceback, no
hang, no flood.

`python -m benchmarks.fuzz` drives the same readers by a coverage-guided fuzzer, for as long as one
likes.
"""

from __future__ import annotations

import json
import tracemalloc

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks.fuzz import READERS, WORDS, attempt

ANY = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
# What JSON allows and few expect: numbers without end or value, halves of characters, NUL.
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(10**17, 10**400)
    | st.floats()
    | st.text(max_size=9)
    | st.sampled_from(["\ud800", "\x00", "\x1b[2J", "../..", "${oc.env:HOME}", "<script>", *WORDS])
)
VALUES = st.recursive(
    SCALARS,
    lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=5), v, max_size=3),
    max_leaves=6,
)


def spots(value, path=()):
    """The paths to all parts of a JSON value."""
    parts = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    return [path, *(spot for key, part in parts for spot in spots(part, (*path, key)))]


def changed(value, path, new):
    """The value with another part at that path."""
    if not path:
        return new
    made = dict(value) if isinstance(value, dict) else list(value)
    made[path[0]] = changed(made[path[0]], path[1:], new)
    return made


@st.composite
def structured(draw, raw):
    """The lines of a sound file, some parts of which are other values."""
    told = []
    for line in raw.splitlines():
        value = json.loads(line)
        for _ in range(draw(st.integers(0, 2))):
            value = changed(value, draw(st.sampled_from(spots(value))), draw(VALUES))
        told.append(json.dumps(value))
    return "\n".join(told).encode()


@st.composite
def spliced(draw, raw):
    """A sound file with other bytes, or a word that means something to some reader, in the place of
    a few.
    """
    at, end = sorted((draw(st.integers(0, len(raw))), draw(st.integers(0, len(raw)))))
    word = draw(st.binary(max_size=20) | st.sampled_from([w.encode() for w in WORDS]))
    return raw[:at] + word + raw[min(end, at + 9) :]


def check(name, folder, raw):
    if error := attempt(name, folder, raw):
        raise AssertionError(f"{raw!r} of {name} gave {error!r}") from error


@pytest.mark.parametrize("name", READERS)
def test_a_sound_file_is_read_and_not_refused(name, tmp_path):
    reader, raw = READERS[name]
    reader(tmp_path, raw)


@pytest.mark.parametrize("name", READERS)
def test_any_bytes_at_all(name, tmp_path):
    @ANY
    @given(st.binary(max_size=200) | st.text().map(lambda t: t.encode("utf-8", "surrogatepass")))
    def any_bytes(raw):
        check(name, tmp_path, raw)

    any_bytes()


@pytest.mark.parametrize("name", READERS)
def test_a_sound_file_with_a_few_bytes_changed(name, tmp_path):
    @ANY
    @given(spliced(READERS[name][1]))
    def changed_bytes(raw):
        check(name, tmp_path, raw)

    changed_bytes()


@pytest.mark.parametrize("name", [n for n in READERS if n not in ("config", "tensors")])
def test_a_sound_file_with_other_values(name, tmp_path):
    @ANY
    @given(structured(READERS[name][1]))
    def changed_values(raw):
        check(name, tmp_path, raw)

    changed_values()


FLOODS = {
    "brackets": b"[" * 300_000,
    "objects": b'{"a":' * 100_000,
    "digits": b"9" * 300_000,
    "exponent": b"1e999999999",
    "one line": b"x" * 2_000_000,
    "many lines": b"x\n" * 100_000,
    "quotes": b'"' * 300_000,
    "indents": b"- " * 100_000,
    "a key twice": b'{"a":1,"a":1}',
    "BOM": b"\xef\xbb\xbf" * 9,
    "NUL": bytes(100_000),
    "UTF-16": "{}".encode("utf-16"),
    "unfolding": b"a: &a [1,1,1,1,1,1,1,1,1]\n"
    + b"".join(
        b"%c: &%c [*%c,*%c,*%c,*%c,*%c,*%c]\n" % (i + 1, i + 1, *[i] * 6) for i in range(97, 121)
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_no_flood_fills_the_memory(name, tmp_path):
    for whole in FLOODS.values():
        flood = whole[:9_000] if name == "config" else whole  # a reader of YAML takes its time
        tracemalloc.start()
        try:
            check(name, tmp_path, flood)
            assert tracemalloc.get_traced_memory()[1] < 64 * len(flood) + 2**24
        finally:
            tracemalloc.stop()
