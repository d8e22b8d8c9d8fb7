"""The crash benchmark in short: runs that are killed at random instants end bit for bit as the one
left alone.
"""

import sys

import pytest

from tests.support import subprocesses


def crash(*words: str) -> None:
    """The benchmark, on runs of a few steps."""
    from benchmarks import crash

    work = crash.write_work
    crash.write_work = lambda root: [*work(root), "train.epochs=2"]
    sys.argv = ["crash", *words]
    crash.main()


@pytest.mark.skipif(sys.platform != "linux", reason="forks processes that hold torch")
def test_killed_runs_end_bit_for_bit_as_the_one_that_was_left_alone(tmp_path):
    table = tmp_path / "table.md"
    code, said = subprocesses.Subprocess(
        tmp_path / "said",
        crash,
        "--kills",
        "4",
        "--strategies",
        "[replay,ewc]",
        "--out",
        str(table),
    ).wait()
    assert code == 0, said
    row = next(line for line in table.read_text().splitlines() if line.startswith("| [replay,ewc]"))
    assert row.split(" | ")[1] == "4"
