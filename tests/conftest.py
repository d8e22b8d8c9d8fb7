"""One small stream folder and one small local model, written once, serve most tests; the cache is
not the user's.
"""

from __future__ import annotations

import os
import sys

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
settings.register_profile(
    "ours", deadline=None
)  # how long an example takes is the machine's affair
settings.load_profile("ours")


@pytest.fixture(autouse=True, scope="session")
def private_cache(tmp_path_factory):
    """The cache folder for models built from scratch is the tests' own."""
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
    """What a small run needs to be told, beside out=."""
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
    """The command line in this process, in an empty folder: its exit code, and what it wrote to
    stdout and stderr.
    """
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
    """What the command line says of what it refuses: exit code 2, one message, no traceback,
    nothing else.
    """

    def command(*words):
        code, out, err = run_cli(*words)
        assert code == 2, (out, err)
        assert err.startswith("error: ")
        assert err.count("error: ") == 1
        assert "Traceback" not in err
        assert out == ""
        return err.removeprefix("error: ").strip()

    return command
