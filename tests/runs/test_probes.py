"""Probes within a run: what is written, shown, resumed and refused."""

import json
import shutil

import pytest

from continual.errors import DataError
from continual.evaluation.probes import record
from continual.evaluation.probes.shots import Shots
from continual.reports import probed
from continual.runs import build
from tests.support.models import TASKS, load_json_lines, run_in_process, write_rows, write_stream

SETTINGS = (
    "probe.shots.k=[0,2]",
    "probe.shots.max_examples=3",
    "probe.wordings.max_examples=2",
    "probe.wordings.changes=[upper]",
)


@pytest.fixture(scope="module")
def beside(tmp_path_factory):
    """A stream that is never learned."""
    return write_stream(tmp_path_factory.mktemp("beside"), ("loud",))


@pytest.fixture(scope="module")
def words(run_keys, beside):
    """A run's keys with four probes."""
    return (
        *run_keys,
        "probe=[general,wordings,shots,transfer]",
        f"probe.general.stream.path={beside}",
        *SETTINGS,
    )


@pytest.fixture(scope="module")
def done(words, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "done"
    _, said = run_in_process(out, words)
    return out, said


def read(out):
    return json.loads((out / "probes.json").read_text())


def test_a_run_measures_its_probes_before_training_and_after_every_stage(done):
    out, said = done
    told = read(out)
    assert told["schema"] == 1
    assert told["stages"] == ["base", *TASKS]
    assert list(told["probes"]) == [
        "general",
        "general drift",
        "wordings",
        "wordings spread",
        "shots",
        "transfer",
        "transfer overall",
    ]
    for entry in told["probes"].values():
        assert entry["says"]
        assert entry["source"]
        assert entry["better"] in ("higher", "lower")
        assert all(len(values) == 4 for values in entry["series"].values())
    assert told["probes"]["wordings spread"]["better"] == "lower"
    assert told["probes"]["general drift"]["series"]["mean"][0] == 0
    assert said.count("  general drift: mean ") == 4
    assert [e["stage"] for e in load_json_lines(out / "events.jsonl") if e["event"] == "probe"] == [
        0,
        1,
        2,
        3,
    ]


def test_probes_change_nothing_of_the_run(done, run_keys, tmp_path):
    run_in_process(tmp_path, run_keys)
    assert not (tmp_path / "probes.json").exists()
    one, other = (
        json.loads((out / "matrix.json").read_text())["scores"] for out in (done[0], tmp_path)
    )
    assert one == other
    weights = "checkpoints/stage-03/weights.safetensors"
    assert (done[0] / weights).read_bytes() == (tmp_path / weights).read_bytes()


def test_no_demonstration_scores_as_the_matrix_does(run_keys, tmp_path):
    matrix, _ = run_in_process(tmp_path, run_keys, "probe=[shots]", "probe.shots.k=[0]")
    told = read(tmp_path)["probes"]["shots"]["series"]
    assert [list(row) for row in zip(*(told[f"{task} k=0"] for task in TASKS), strict=True)] == [
        list(row) for row in matrix.scores
    ]


def rewind(out, stage):
    """The folder as it was after the training of this stage."""
    (out / "finished").unlink()
    (out / "probes.json").unlink()
    for number in range(stage, 4):
        shutil.rmtree(out / f"predictions/stage-{number:02d}")
        if number > stage:
            shutil.rmtree(out / f"checkpoints/stage-{number:02d}")


def test_a_run_that_goes_on_ends_with_the_same_probes(done, words, tmp_path):
    out = shutil.copytree(done[0], tmp_path / "copy")
    rewind(out, 3)
    run_in_process(out, words)
    assert (out / "probes.json").read_bytes() == (done[0] / "probes.json").read_bytes()


def test_a_run_that_ends_while_it_probes_goes_on_to_the_same_probes(
    done, words, tmp_path, monkeypatch
):
    out, whole = tmp_path / "run", Shots.measure

    def dies(self, look):
        if len(look.matrix.stages) == 2:
            raise KeyboardInterrupt
        return whole(self, look)

    with monkeypatch.context() as patch:
        patch.setattr(Shots, "measure", dies)
        with pytest.raises(KeyboardInterrupt):
            run_in_process(out, words)
    assert read(out)["stages"] == ["base"]
    run_in_process(out, words)
    assert (out / "probes.json").read_bytes() == (done[0] / "probes.json").read_bytes()


def test_what_was_measured_of_a_stage_is_not_measured_again_and_the_rest_is(
    done, words, tmp_path, monkeypatch
):
    out = shutil.copytree(done[0], tmp_path / "copy")
    rewind(out, 3)
    half = out / "predictions/stage-03/probes.json"
    half.parent.mkdir()
    found = json.loads((done[0] / "predictions/stage-03/probes.json").read_text())
    half.write_text(json.dumps({name: series for name, series in found.items() if name != "shots"}))
    measured = []
    whole = Shots.measure
    monkeypatch.setattr(
        Shots, "measure", lambda self, look: measured.append("shots") or whole(self, look)
    )
    for other in ("general.GeneralAbility", "wordings.Wordings"):
        monkeypatch.setattr(
            f"continual.evaluation.probes.{other}.measure", lambda *_: pytest.fail("measured again")
        )
    run_in_process(out, words)
    assert measured == ["shots"]
    assert (out / "probes.json").read_bytes() == (done[0] / "probes.json").read_bytes()


def test_half_a_file_of_a_stage_is_measured_again(done, words, tmp_path):
    out = shutil.copytree(done[0], tmp_path / "copy")
    (out / "finished").unlink()
    kept = out / "predictions/stage-03/probes.json"
    kept.write_bytes(kept.read_bytes()[:-20])
    run_in_process(out, words)
    assert (out / "probes.json").read_bytes() == (done[0] / "probes.json").read_bytes()


@pytest.mark.parametrize(
    "strategy",
    [
        ["per_task"],
        ["router"],
        ["gain_lora", "model.adapter=lora", "strategy.gain_lora.rank=2"],
    ],
    ids=lambda told: told[0],
)
def test_a_probe_is_answered_as_the_strategy_readies_the_model_for_it(strategy, run_keys, tmp_path):
    name, *more = strategy
    matrix, _ = run_in_process(
        tmp_path, run_keys, f"strategy={name}", *more, "probe=[shots]", "probe.shots.k=[0]"
    )
    told = read(tmp_path)["probes"]["shots"]["series"]
    assert [told[f"{task} k=0"][-1] for task in TASKS] == list(matrix.scores[-1])


def test_chat_tasks_are_probed_turn_by_turn(model_folder, tmp_path):
    talk = [
        {
            "messages": [
                {"role": role, "content": text}
                for role, text in zip(
                    ("user", "assistant") * 2, (f"Give the {w} word.", w, "Again.", w), strict=True
                )
            ]
        }
        for w in ("red", "blue")
    ]
    for split in ("train", "test"):
        write_rows(tmp_path / "talk" / f"{split}.jsonl", talk)
    (tmp_path / "stream.json").write_text('{"tasks": [{"name": "talk"}]}')
    run_in_process(
        tmp_path / "run",
        (
            "stream=folder",
            f"stream.path={tmp_path}",
            "model=hf",
            f"model.name={model_folder}",
            "train.epochs=20",
            "train.lr=0.01",
        ),
        "probe=[turns]",
    )
    told = read(tmp_path / "run")["probes"]["turns"]["series"]
    assert set(told) == {"first turn", "later turns", "completed", "context", "consistent"}
    assert all(0 <= v <= 1 for values in told.values() for v in values if v is not None)


# Shown


def test_the_tables_show_the_probes(run_cli, done):
    code, said, _ = run_cli("report", done[0])
    assert code == 0
    assert "general drift" in said
    assert "wordings spread" in said


@pytest.mark.parametrize(
    "spoil",
    [
        lambda told: {**told, "schema": 2},
        lambda told: {**told, "stages": told["stages"][:1]},
        lambda told: {**told, "stages": ["\x1b[2J", *TASKS]},
        lambda told: [],
        lambda told: {
            **told,
            "probes": {"x": {"says": 1, "source": "", "better": "higher", "series": {}}},
        },
        lambda told: {
            **told,
            "probes": {
                "x": {"says": "", "source": "", "better": "higher", "series": {"a": ["1"] * 4}}
            },
        },
    ],
)
def test_probes_of_another_form_are_one_clear_error(done, tmp_path, spoil):
    (tmp_path / "probes.json").write_text(json.dumps(spoil(read(done[0]))))
    with pytest.raises(DataError, match=r"probes.json: no probes of schema 1"):
        probed.load_probes(tmp_path)


def test_a_stage_s_figures_that_are_none_are_not_read(tmp_path):
    for text in ('{"shots": {"k=0": "1"}}', "[1]", "{", '{"shots": 1}'):
        (tmp_path / "probes.json").write_text(text)
        assert record.load_probe_result(tmp_path / "probes.json") == {}


# Refused


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["probe=[shot]"], "unknown probe 'shot'; did you mean 'shots'"),
        (["probe=[shots]", "probe.shots.kk=1"], "unknown key 'probe.shots.kk'; did you mean"),
        (["probe=[shots]", "probe.shots.k=[99]"], "could be shown; lower k"),
        (["probe=[general]"], "probe.general.stream.path is not set"),
        (["probe=[turns]"], "the user speaks twice or more"),
        (["stream.arrangement=none"], "learns nothing"),
    ],
)
def test_a_probe_that_cannot_be_is_refused_before_training(cli_error, run_keys, given, told):
    assert told in cli_error("run", *run_keys, *given)


def test_adapt_refuses_probes(cli_error, run_keys):
    assert "adapt measures no probe" in cli_error("adapt", *run_keys, "probe=[shots]")


def test_any_stream_can_be_the_probe(run_keys):
    from continual.cli import main

    config = main.compose_config(
        "run", [*run_keys, "probe=[general]", "stream@probe.general.stream=skills"]
    )
    probe = build.probes(config)["general"]
    assert probe.stream["_target_"] == "streams.skills.stream.generate_skills"
    assert probe.stream["arrangement"] == "none"


def test_the_list_tells_the_probes(run_cli):
    _, said, _ = run_cli("list", "probes")
    assert "robustness" in said.lower()
    assert [line.split()[0] for line in said.splitlines()[2:] if line] == [
        "general",
        "shots",
        "transfer",
        "turns",
        "wordings",
    ]
