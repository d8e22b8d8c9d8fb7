"""Fixtures that most tests share, and the `quick` mark.

One small stream folder and one small local model are written once per process. The cache folder is
not the user's.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import absl.logging
import pytest
import torch
from hypothesis import settings

from tests.support.models import write_model, write_stream

# One thread, here and in the processes that tests start: bits are only the same for the same number
# of threads, and models this small are slower on more.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that asks the network for anything must fail
# Of rouge-score: Hydra closes what its handler writes to, which here is pytest's own.
absl.logging.get_absl_handler().python_handler.stream = sys.__stderr__
settings.register_profile("ours", deadline=None)  # a slow machine is no failure
settings.load_profile("ours")

# Folders and files that `pytest -m quick` leaves out: whole runs, many processes, and the tests
# that go through every strategy or module. A new file is quick unless it is named here.
NOT_QUICK = (
    "benchmarks",
    "cli",
    "distributed",
    "inference",
    "interop",
    "io/test_fuzz.py",
    "models/test_sharding.py",
    "packaging",
    "reports",
    "runs",
    "strategies/test_contract.py",
    "test_architecture.py",
    "test_documents.py",
    "tracking",
)
NOT_QUICK_PATHS = [Path(__file__).parent / name for name in NOT_QUICK]


def pytest_ignore_collect(collection_path, config):
    """Leave the files of NOT_QUICK out of `pytest -m quick`, without importing them."""
    if config.option.markexpr == "quick" and collection_path in NOT_QUICK_PATHS:
        return True
    return None


def pytest_collection_modifyitems(items):
    """Mark as quick every other test that is neither slow nor needs a GPU."""
    for item in items:
        named = any(item.path.is_relative_to(path) for path in NOT_QUICK_PATHS)
        if not named and not any(item.iter_markers("slow")) and not any(item.iter_markers("gpu")):
            item.add_marker(pytest.mark.quick)


@pytest.fixture(autouse=True, scope="session")
def private_cache(tmp_path_factory):
    """Give the tests a cache folder of their own for models built from scratch."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def stream_folder(tmp_path_factory):
    return write_stream(tmp_path_factory.mktemp("stream"))


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def run_keys(stream_folder, model_folder):
    """The keys of a small run, without out=."""
    return (
        "stream=folder",
        f"stream.path={stream_folder}",
        "model=hf",
        f"model.name={model_folder}",
        "device=cpu",
        "train.epochs=2",
        "train.batch_size=6",
        "train.log_every_steps=1",
        "train.lr=0.003",
    )


@pytest.fixture
def run_cli(capsys, monkeypatch, tmp_path):
    """Call the command line in this process, in an empty folder -> (exit code, stdout, stderr)."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")

    def command(*words):
        from continual.cli.main import main

        code = 0
        try:
            main([str(w) for w in words])
        except SystemExit as end:
            code = end.code
        out, err = capsys.readouterr()
        return code, out, err

    return command


@pytest.fixture
def cli_error(run_cli):
    """Call the command line and return its error: exit code 2, one message and no traceback."""

    def command(*words):
        code, out, err = run_cli(*words)
        assert code == 2, (out, err)
        assert err.startswith("error: ")
        assert err.count("error: ") == 1
        assert "Traceback" not in err
        assert out == ""
        return err.removeprefix("error: ").strip()

    return command
