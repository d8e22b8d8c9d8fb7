"""The commands, as they are typed."""

import json
import re
import shlex
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import pytest
import torch

from continual.cli.help import VERB_HELP
from continual.cli.main import VERBS, compose_config
from continual.results import comparison
from continual.results.matrix import Matrix
from continual.runs.signals import resume_command
from tests.support.models import TASKS, load_json_lines, run_in_process


def names(group):
    return {
        p.name.removesuffix(".yaml")
        for p in files("conf").joinpath(group).iterdir()
        if p.name.endswith(".yaml")
    }


# Help and lists


@pytest.mark.parametrize("word", ["--help", "-h", "help", None])
def test_help_names_every_command(run_cli, word):
    code, out, err = run_cli(*([word] if word else []))
    assert (code, err) == (0, "")
    assert all(f"continual {verb}" in out for verb in VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_every_command_shows_examples(run_cli, verb):
    code, out, _ = run_cli(verb, "--help")
    assert code == 0
    assert out.count(f"continual {verb}") >= 2


def test_help_loads_nothing_heavy():
    code = (
        "import sys; from continual.cli.main import main; main(['--help']); main(['run', "
        "'--help']); print({'torch', 'transformers', 'hydra', 'datasets', 'matplotlib'} & "
        "set(sys.modules))"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    assert out.strip().endswith("set()")


@pytest.mark.parametrize(
    "line",
    [
        line
        for verb in ("run", "compare", "adapt", "audit", "plan")
        for line in VERB_HELP[verb].replace("\\\n", " ").splitlines()[2:]
    ],
)
def test_the_examples_of_the_help_compose(line):
    from continual.cli.main import compose_config

    _, verb, *words = line.strip().split()
    words = [w.strip("'").replace(">", "=") for w in words if re.search(r"[=>]", w)]
    words = [w for w in words if not w.startswith("hydra/")]
    compose_config(
        verb, [w if "[" in w else w.partition(",")[0] for w in words if "naive,[" not in w]
    )


def test_list_names_all_there_is_each_with_a_line(run_cli):
    code, out, _ = run_cli("list")
    assert code == 0
    shown = {line.split()[0]: line.split()[1:] for line in out.splitlines() if line.strip()}
    for group in ("strategy", "stream", "model"):
        for name in names(group) - {"adapters"}:
            assert len(shown[name]) > 2, name


def test_list_of_one_group_names_no_other(run_cli):
    _, out, _ = run_cli("list", "streams")
    assert "folder" in out
    assert "replay" not in out


def test_cfg_shows_the_whole_configuration_and_does_nothing(run_cli, tmp_path):
    from omegaconf import OmegaConf

    code, out, _ = run_cli(
        "run", "strategy=[replay,ewc]", "train.lr=0.25", f"out={tmp_path / 'run'}", "--cfg"
    )
    config = OmegaConf.create(out)
    assert code == 0
    assert (config.train.lr, list(config.strategy)) == (0.25, ["replay", "ewc"])
    assert not (tmp_path / "run").exists()


# Names that are not there


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (
            ["rn"],
            "unknown command 'rn'; did you mean 'run'? Known: " + ", ".join(sorted(VERBS)) + ".",
        ),
        (["list", "strategis"], "unknown list 'strategis'; did you mean 'strategies'"),
        (["run", "strategy=replya"], "unknown strategy 'replya'; did you mean 'replay'"),
        (["run", "strategy=[naive,ewk]"], "unknown strategy 'ewk'; did you mean 'ewc'"),
        (["run", "stream=foldr"], "unknown stream 'foldr'; did you mean 'folder'?"),
        (["run", "model=scrach"], "unknown model 'scrach'; did you mean 'scratch'?"),
        (["run", "train.lrr=1"], "unknown key 'train.lrr'; did you mean 'train.lr'"),
        (["run", "trian.lr=1"], "unknown key 'trian"),
        (["run", "sead=1"], "unknown key 'sead'; did you mean 'seed'"),
        (
            ["run", "strategy=replay", "strategy.replay.shere=1"],
            "did you mean 'strategy.replay.share'",
        ),
        (["run", "+strategy.naive.foo=1"], "unknown key strategy.naive 'foo'"),
        (["run", "+train.foo=1"], "unknown key train 'foo'"),
        (["compare", "strategy=naive,replya"], "unknown strategy 'replya'; did you mean 'replay'"),
        (["compare", "seed=0,1", "train.lrr=1"], "unknown key 'train.lrr'"),
        (["adapt", "adapt.stps=3"], "unknown key 'adapt.stps'; did you mean 'adapt.steps'"),
        (["run", "stream=folder"], "stream.path is not set; give stream.path=..."),
        (["run", "model=hf"], "model.name is not set; give model.name=..."),
        (
            ["run", "stream=folder", "model=hf"],
            "model.name is not set; give model.name=...\nstream.path is not set",
        ),
        (["run", "train.lr"], "Keys are given as key=value"),
        (["run", "train.lr=[1"], "Keys are given as key=value"),
        (["run", "out=höhe"], "out=höhe: found no key and value that can be parsed."),
        (
            ["run", "out=höhe", "seed=1", "stream=a=b"],
            "in quotes: \"out='höhe'\"\nstream=a=b: found no key",
        ),
        (["run", "out=a,b"], "out=a,b: found several values, which only continual compare takes."),
        (
            ["run", "out=2024"],
            "out=2024: expected text; put text that looks like a number or a list in quotes",
        ),
        (["run", "out=null"], "out=None: expected text"),
        (
            ["run", "device=null", "checkpoint=null"],
            "device=None: expected text; put text that looks like a number or a list "
            "in quotes: \"device='123'\"\ncheckpoint=None: expected its keys, as in checkpoint.KEY=VALUE",
        ),
        (["run", "lr=1"], "unknown key 'lr'; did you mean 'train.lr'?"),
        (
            ["run", "strategy=maml", "strategy.inner_optimizer=meta_sgd"],
            "did you mean 'strategy.maml.inner_optimizer'",
        ),
        (
            ["run", "strategy=avalanche", "strategy.plugin=EWCPlugin"],
            "did you mean 'strategy.avalanche.plugin'",
        ),
        (["run", "train=null"], "train=null: expected one of the names in"),
        (
            ["run", "~train.lr"],
            "cannot delete train.lr ('~' is not supported); set it to another value",
        ),
        (["compare", "~strategies", "seed=1"], "cannot delete strategies ('~' is not supported)"),
        (["audit", "data=5"], "data=5: expected its keys"),
        (["run", "strategy=[]"], "strategy=[] is empty"),
        (["compare", "strategy=[]"], "strategy=[] is empty"),
        (["report"], "continual report needs a folder made by run, compare or adapt"),
        (["report", "nowhere"], "nowhere: there is no such folder"),
        (["report", "json=true"], "unknown key 'json'"),
        (["export", "runs/x", "--cfg"], "continual export has no configuration"),
    ],
)
def test_a_name_that_is_not_there_is_refused_with_the_nearest(cli_error, words, told):
    assert told in cli_error(*words)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["stream.order=givn"], "unknown stream.order 'givn'; did you mean 'given'?"),
        (["stream.tasks=[furst]"], "'furst'; did you mean 'first'"),
        (["stream.tasks=first"], "stream.tasks=first: expected a list, such as [a,b]"),
        (
            ["stream.arrangement=cumulativ"],
            "unknown stream.arrangement 'cumulativ'; did you mean 'cumulative'?",
        ),
        (["score.metric=rougel"], "unknown metric 'rougel'; did you mean 'rougeL'"),
        (["score.split=tset"], "unknown score.split 'tset'; did you mean 'test'"),
        (["data.template=alpacca"], "unknown data.template 'alpacca'; did you mean 'alpaca'?"),
        (["data.template=chat"], "needs a tokenizer with a chat template"),
        (["model.adapter=lra"], "unknown model.adapter 'lra'; did you mean 'lora'"),
        (["train.schedule=cos"], "unknown train.schedule 'cos'; did you mean 'cosine'"),
        (["train.precision=fp16"], "unknown train.precision 'fp16'"),
        (["train.lr=fast"], "train.lr=fast: expected a number"),
        (["train.betas=3"], "train.betas=3: expected a list"),
        (["train.betas=[0.9,1]"], "train.betas=[0.9, 1]: expected two numbers in [0, 1)"),
        (
            ["train.tokens_per_microbatch=0"],
            "train.tokens_per_microbatch=0: expected a whole number of at least 1",
        ),
        (["score.batch_size=0"], "score.batch_size=0: expected a whole number of at least 1"),
        (
            ["data.max_length=many", "score.max_examples=0"],
            "data.max_length=many: expected a whole number of at least 1\nscore.max_examples=0",
        ),
        (["seed=x"], "seed=x: expected a whole number of at least 0"),
        (
            ["seed=99999999999999999999"],
            "seed=99999999999999999999: expected a whole number below 2^63",
        ),
        (
            ["checkpoint.every_seconds=5m"],
            "checkpoint.every_seconds=5m: expected a number of seconds of at least 0",
        ),
        (
            ["checkpoint.every_seconds=nan"],
            "checkpoint.every_seconds=nan: expected a number of seconds",
        ),
        (["train.epochs=inf"], "train.epochs=inf: expected more than 0 and at most 1e9"),
        (
            ["train.steps=99999999999999999999"],
            "train.steps=99999999999999999999: expected at least 1 and below 2^63",
        ),
        (["stream.tasks=[1]"], "unknown task in stream.tasks"),
        (["track=null"], "unknown track None"),
        (["strategy=replay", "strategy.replay.capacity=inf"], "capacity"),
        (["loss.instruction_weight=2"], "loss.instruction_weight=2: expected a number from 0"),
        (["loss.instruction_weight=all"], "loss.instruction_weight=all: expected a number from 0"),
        (["device=gpu"], "unknown device 'gpu'"),
        (["stream.max_train_rows=0"], "stream.max_train_rows=0"),
        (["stream.max_train_rows=few"], "stream.max_train_rows=few: expected a whole number"),
        (["model.name=./nowhere"], "model.name=./nowhere: no such folder"),
        (["strategy=replay", "strategy.replay.share=2"], "share"),
        (
            ["strategy=replay", "strategy.replay.share=half"],
            "strategy.replay.share=half: expected a number",
        ),
    ],
)
def test_a_value_that_cannot_be_is_refused(cli_error, run_keys, tmp_path, words, told):
    assert told in cli_error("run", *run_keys, *words, f"out={tmp_path}")


def test_the_traceback_is_there_for_those_who_ask(run_cli, monkeypatch):
    from continual.errors import ConfigError

    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(ConfigError):
        run_cli("rn")


# run


def test_run_trains_composed_strategies_and_shows_the_matrix(run_cli, run_keys, tmp_path):
    code, out, err = run_cli("run", *run_keys, "strategy=[replay,ewc]", f"out={tmp_path}")
    assert code == 0
    assert all(task in out for task in TASKS)
    assert "stage 3/3 loud: average" in err
    assert Matrix.load(tmp_path / "matrix.json").strategy == "replay+ewc"


# compare


@pytest.fixture(scope="module")
def compared(run_keys, tmp_path_factory):
    """Two strategies, two seeds."""
    from continual.cli.main import main

    out = tmp_path_factory.mktemp("compared") / "it"
    main(["compare", *run_keys, "strategy=naive,[replay,ewc]", "seed=0,1", f"out={out}"])
    return out


def test_compare_leaves_a_run_folder_for_each_combination_and_one_page(compared):
    runs = {p.parent.name: Matrix.load(p) for p in compared.glob("*/matrix.json")}
    assert {(m.strategy, m.seed) for m in runs.values()} == {
        (s, seed) for s in ("naive", "replay+ewc") for seed in (0, 1)
    }
    assert all(m.is_finished for m in runs.values())
    assert all((compared / name / "report.html").is_file() for name in runs)
    assert {p.name for p in compared.iterdir() if p.is_file()} >= {
        "comparison.json",
        "report.html",
        "curves.png",
    }


def test_a_comparisons_runs_are_those_of_run(compared, run_keys, tmp_path):
    alone, _ = run_in_process(tmp_path, run_keys, "strategy=[replay,ewc]", "seed=1")
    (same,) = [
        m
        for p in compared.glob("*/matrix.json")
        if (m := Matrix.load(p)).strategy != "naive" and m.seed == 1
    ]
    assert same.scores == alone.scores
    assert same.stages == alone.stages


def test_the_same_comparison_again_is_finished_and_another_seed_is_added(
    run_cli, compared, run_keys
):
    before = {p: p.stat().st_mtime_ns for p in compared.glob("*/predictions/*/*")}
    code, _, err = run_cli(
        "compare", *run_keys, "strategy=naive,[replay,ewc]", "seed=0,1,2", f"out={compared}"
    )
    assert code == 0, err
    assert " ".join(err.split()).count("is finished") == 4
    assert {p: p.stat().st_mtime_ns for p in before} == before
    assert len(list(compared.glob("*/matrix.json"))) == 6


def test_a_comparison_of_one_seed_grows_by_others(run_cli, run_keys, tmp_path):
    for seeds in ([], ["seed=0,1"]):
        assert (
            run_cli(
                "compare",
                *run_keys,
                "strategy=naive",
                "train.epochs=1",
                *seeds,
                f"out={tmp_path / 'it'}",
            )[0]
            == 0
        )
    assert sorted(Matrix.load(p).seed for p in (tmp_path / "it").glob("*/matrix.json")) == [0, 1]


def test_compare_runs_every_default_strategy_and_the_joint_arm(run_cli, run_keys, tmp_path):
    code, out, err = run_cli(
        "compare",
        *run_keys,
        "train.epochs=1",
        "stream.tasks=[first,loud]",
        f"out={tmp_path / 'all'}",
    )
    assert code == 0, err
    ran = {Matrix.load(p).strategy for p in (tmp_path / "all").glob("*/matrix.json")}
    assert ran == {"naive", "replay", "ewc", "multitask", "maml", "joint"}
    assert all(name in out for name in ran)


def test_a_run_that_fails_leaves_the_others_whole_and_is_told_at_the_end(
    run_cli, run_keys, tmp_path
):
    code, _, err = run_cli(
        "compare", *run_keys, "strategy=naive", "stream.order=nope,given", f"out={tmp_path / 'it'}"
    )
    assert code == 2
    assert "Traceback" not in err
    last = err[err.rindex("error: ") :]
    assert "1 of the runs failed" in last
    assert "unknown stream.order 'nope'" in last
    (whole,) = (tmp_path / "it").glob("*/matrix.json")
    assert Matrix.load(whole).is_finished
    assert (tmp_path / "it/comparison.json").is_file()


def test_training_that_diverges_in_one_run_leaves_the_others_whole(run_cli, run_keys, tmp_path):
    broken = ("strategy=naive", "train.weight_decay=0.0,1e30", "train.epochs=4")
    code, _, err = run_cli("compare", *run_keys, *broken, f"out={tmp_path / 'it'}")
    assert code == 2
    assert "the last checkpoint is kept. Lower train.lr" in err
    assert sum(Matrix.load(p).is_finished for p in (tmp_path / "it").glob("*/matrix.json")) == 1


# report


def test_report_writes_the_pages_again(run_cli, compared):
    (compared / "report.html").unlink()
    code, out, _ = run_cli("report", compared)
    assert code == 0
    assert f"wrote {compared / 'report.html'}" in out.replace("\n", "")
    assert (compared / "report.html").is_file()


def test_report_sets_several_folders_side_by_side(run_cli, compared, tmp_path):
    some = sorted(p.parent for p in compared.glob("*/matrix.json"))[:2]
    code, _, _ = run_cli("report", *some, f"out={tmp_path / 'both'}")
    assert code == 0
    assert json.loads((tmp_path / "both/comparison.json").read_text())
    assert (tmp_path / "both/report.html").is_file()


def test_report_of_several_folders_needs_a_place(cli_error, compared):
    some = sorted(p.parent for p in compared.glob("*/matrix.json"))[:2]
    assert "out=DIR" in cli_error("report", *some)


# adapt

ADAPT = (
    "stream.tasks=[loud]",
    "adapt.steps=6",
    "adapt.eval_steps=[0,2,4]",
    "adapt.shots=[2,null]",
    "adapt.draws=1",
)


@pytest.mark.filterwarnings(
    "ignore:.*is_gradient_checkpointing. is deprecated:FutureWarning"
)  # peft's own
@pytest.mark.parametrize("adapter", ["none", "lora"])
def test_adapt_from_a_run_writes_its_curve_and_a_model_that_loads(
    run_cli, run_keys, tmp_path, adapter
):
    run_in_process(
        tmp_path / "run", run_keys, "stream.tasks=[first,last]", f"model.adapter={adapter}"
    )
    code, out, err = run_cli(
        "adapt", *run_keys, *ADAPT, f"adapt.init_from={tmp_path / 'run'}", f"out={tmp_path / 'new'}"
    )
    assert code == 0, err
    curve = json.loads((tmp_path / "new/curve.json").read_text())
    assert (curve["task"], curve["metric"]) == ("loud", "exact_match")
    assert curve["start"] == str(tmp_path / "run/checkpoints/stage-02")
    assert [(p["shots"], p["step"]) for p in curve["points"]] == [
        (n, s) for n in (2, 12) for s in (0, 2, 4, 6)
    ]
    assert len({p["score"] for p in curve["points"] if p["step"] == 0}) == 1, (
        "each curve starts at the same weights"
    )
    assert "loud" in out
    assert (tmp_path / "new/report.html").is_file()
    assert loads(tmp_path / "new/model", run_keys, adapter)


def loads(folder, keys, adapter):
    """Whether transformers, or peft on the base, read the adapted model and its weights are no
    longer the base's.
    """
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert AutoTokenizer.from_pretrained(folder).eos_token == "<eos>"
    base = next(k for k in keys if k.startswith("model.name")).partition("=")[2]
    original = AutoModelForCausalLM.from_pretrained(base)
    ids = torch.tensor([[7, 8, 9]])
    before = original(ids).logits
    net = (
        AutoModelForCausalLM.from_pretrained(folder)
        if adapter == "none"
        else PeftModel.from_pretrained(original, folder)
    )
    return not torch.equal(net(ids).logits, before)


def test_adapt_from_the_base_and_from_one_checkpoint(run_cli, run_keys, tmp_path):
    run_in_process(tmp_path / "run", run_keys, "stream.tasks=[first,last]")
    starts = {"base": "base", "one": str(tmp_path / "run/checkpoints/stage-01")}
    for name, start in starts.items():
        code, _, err = run_cli(
            "adapt", *run_keys, *ADAPT, f"adapt.init_from={start}", f"out={tmp_path / name}"
        )
        assert code == 0, err
        assert json.loads((tmp_path / name / "curve.json").read_text())["start"] == start
        told = [
            e for e in load_json_lines(tmp_path / name / "events.jsonl") if e["event"] == "score"
        ]
        assert len(told) == 8


def test_adapt_again_in_the_same_folder_says_that_it_is_finished(run_cli, run_keys, tmp_path):
    for _ in range(2):
        code, _, err = run_cli("adapt", *run_keys, *ADAPT, f"out={tmp_path}")
        assert code == 0
    assert f"{tmp_path} is finished" in err.replace("\n", "")


def test_adapt_learns_one_task_only(cli_error, run_keys, tmp_path):
    told = cli_error("adapt", *run_keys, f"out={tmp_path}")
    assert "adapt learns one task, and this stream has 3: first, last, loud" in told
    assert "pick one, such as stream.tasks=[first]" in told


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (
            "adapt.eval_steps=5",
            "adapt.eval_steps=5: expected a list of whole numbers of at least 0",
        ),
        (
            "adapt.shots=[16,many]",
            "adapt.shots=[16, 'many']: expected a list of whole numbers of at least 1",
        ),
        ("adapt.shots=[0]", "adapt.shots=[0]: expected a list"),
        ("adapt.steps=0", "adapt.steps=0: expected a whole number of at least 1"),
    ],
)
def test_adapt_refuses_steps_and_shots_that_cannot_be(cli_error, run_keys, tmp_path, words, told):
    assert told in cli_error("adapt", *run_keys, "stream.tasks=[loud]", words, f"out={tmp_path}")


def test_adapt_needs_a_checkpoint_to_start_from(cli_error, run_keys, tmp_path):
    told = cli_error(
        "adapt", *run_keys, *ADAPT, f"adapt.init_from={tmp_path}", f"out={tmp_path / 'new'}"
    )
    assert "is neither a run folder with a checkpoint nor one of its checkpoints" in told


def test_adapt_builds_nothing_but_our_own_from_a_run_folder(cli_error, run_keys, tmp_path):
    run_in_process(tmp_path / "run", run_keys, "stream.tasks=[first]")
    config = tmp_path / "run/config.yaml"
    config.write_text(
        config.read_text().replace("continual.models.loading.load_pretrained", "os.system")
    )
    told = cli_error(
        "adapt", *run_keys, *ADAPT, f"adapt.init_from={tmp_path / 'run'}", f"out={tmp_path / 'new'}"
    )
    assert "asks for model._target_='os.system', which is not one of continual's" in told


@pytest.mark.parametrize(
    "name",
    ["plain/a b-1", "a,b", "a=b", "it's", "[x]", "{x}", "höhe", "123", "null", " lead", "a\\"],
)
def test_the_command_that_goes_on_names_the_same_folder_whatever_it_is_called(name, monkeypatch):
    monkeypatch.setattr("sys.argv", ["continual", "run", "out='other'", "seed=3"])
    for command, verb in (
        (resume_command(Path(name)), "run"),
        (comparison.resume_command(Path(name), ["seed=3"]), "compare"),
    ):
        program, first, *words = shlex.split(command)
        assert (program, first) == ("continual", verb)
        assert compose_config(verb, words).out == name
