"""The crash benchmark in short: runs that are killed at random instants end bit for bit as the one left alone."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.skipif(sys.platform != "linux", reason="forks processes that hold torch")
def test_killed_runs_end_bit_for_bit_as_the_one_that_was_left_alone(tmp_path):
    done = subprocess.run([sys.executable, "-m", "benchmarks.crash", "--kills", "4", "--strategies", "[replay,ewc]",
                           "--out", str(tmp_path / "table.md")], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    row = next(line for line in (tmp_path / "table.md").read_text().splitlines() if line.startswith("| [replay,ewc]"))
    assert row.split(" | ")[1] == "4"
