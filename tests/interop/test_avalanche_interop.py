"""Our tasks under Avalanche's own strategies, evaluators and loggers, and its metrics beside our
summaries.
"""

import io
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from continual.data.template import Encoder
from continual.interop import avalanche
from continual.interop.avalanche import (
    AvalancheModel,
    Criterion,
    EncodedDataset,
    make_benchmark,
    to_examples,
    to_tensors,
)
from continual.models.loss import forward, nll, number_examples
from continual.models.weights import gradient, snapshot
from continual.results.matrix import Matrix
from continual.runs.build import stream
from tests.support import toy
from tests.support.models import TASKS, make_text_model

pytest.importorskip("avalanche", reason="the extra avalanche-lib")
pytestmark = pytest.mark.filterwarnings("ignore:No loggers specified")


@pytest.mark.parametrize("causal", [True, False])
def test_examples_are_what_their_tensors_hold(causal):
    rows = toy.make_examples(2, 5)
    x, y, t = to_tensors(rows, causal, min_width=20)
    assert x.shape == (5, 2, 20)
    assert [(e.ids, e.response_mask) for e in to_examples(x)] == [
        (e.ids, e.response_mask) for e in rows
    ]
    assert y[y != avalanche.IGNORE_INDEX].tolist() == [
        i for e in rows for i, r in zip(e.ids, e.response_mask, strict=True) if r
    ]
    assert t.tolist() == [2] * 5


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_a_model_as_avalanche_sees_it_has_our_logits_and_our_loss(kind):
    made = make_text_model(kind)
    rows = [
        replace(e, ids=(*e.ids, 0), response_mask=(*e.response_mask, True))
        for e in toy.make_examples(0, 4)
    ]
    x, y, _ = to_tensors(rows, causal=not made.layout.seq2seq)
    logits, batch = AvalancheModel(made)(x), number_examples(made, rows)
    assert torch.allclose(logits, forward(made, batch), atol=1e-5)
    assert Criterion()(logits, y).item() == pytest.approx(nll(made, batch).item(), rel=1e-5)


# A benchmark


@pytest.fixture(scope="module")
def ready(stream_folder):
    """A benchmark of the small stream, and a model for it."""
    made = make_text_model()
    tasks = stream(toy.compose_run_config("stream=folder", f"stream.path={stream_folder}"))
    return make_benchmark(tasks, Encoder(made.tokenizer, max_tokens=128)), made


def loop(made, kind="Naive", adam: float | None = None, **settings):
    """One of Avalanche's strategies on our model, by SGD at 0.1 or by Adam."""
    from avalanche.training import supervised

    net = AvalancheModel(made)
    p = list(net.parameters())
    settings = {"train_mb_size": 12, "eval_mb_size": 4, "evaluator": None, **settings}
    return getattr(supervised, kind)(
        model=net,
        criterion=Criterion(),
        optimizer=torch.optim.Adam(p, adam) if adam else torch.optim.SGD(p, 0.1),
        **settings,
    )


def test_a_stage_is_an_experience_and_a_task_a_test_experience(ready):
    assert [len(e.dataset) for e in ready[0].train_stream] == [12] * 3
    assert [len(e.dataset) for e in ready[0].test_stream] == [4] * 3
    assert [e.current_experience for e in ready[0].train_stream] == [0, 1, 2]
    assert [e.dataset[0].task_index for e in ready[0].test_stream] == [0, 1, 2]


def test_a_step_of_avalanche_s_naive_is_a_step_down_our_gradient(ready):
    made = deepcopy(ready[1])
    before, data = snapshot(made), ready[0].train_stream[0].dataset
    nll(made, made.batch([data[i] for i in range(len(data))])).backward()
    expected = {n: before[n] - 0.1 * g for n, g in gradient(made).items()}
    made.net.zero_grad()
    loop(made).train(ready[0].train_stream[0])
    assert toy.all_close(snapshot(made), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("Replay", {"mem_size": 6}),
        ("EWC", {"ewc_lambda": 1.0}),
        ("AGEM", {"patterns_per_exp": 4, "sample_size": 4}),
    ],
)
def test_avalanche_s_own_strategies_run_over_our_tasks(ready, kind, settings):
    made = deepcopy(ready[1])
    made_of = loop(made, kind, train_mb_size=4, **settings)
    rows = [ready[0].train_stream[1].dataset[i] for i in range(12)]
    before = nll(made, made.batch(rows)).item()
    for experience in ready[0].train_stream:
        made_of.train(experience)
    assert nll(made, made.batch(rows)).item() < before - 0.1


# Its metrics


def token_accuracy(made, rows) -> float:
    batch = number_examples(made, rows)
    return (forward(made, batch).argmax(-1) == batch.targets).float().mean().item()


def test_evaluators_and_loggers_of_avalanche_s_tell_what_our_matrix_tells(ready):
    """Its forgetting is the first less the last score, minus our backward transfer; ours begins at
    the best.
    """
    from avalanche.evaluation import metrics
    from avalanche.logging import TextLogger
    from avalanche.training.plugins import EvaluationPlugin

    made, said, scores = deepcopy(ready[1]), io.StringIO(), []
    square = metrics.acc_matrix.AccuracyMatrixPluginMetric()
    evaluator = EvaluationPlugin(
        metrics.forgetting_metrics(stream=True),
        metrics.bwt_metrics(stream=True),
        square,
        loggers=[TextLogger(said)],
    )
    made_of = loop(made, "Naive", 0.005, train_mb_size=4, train_epochs=15, evaluator=evaluator)
    tests = [[e.dataset[i] for i in range(4)] for e in ready[0].test_stream]
    for experience in ready[0].train_stream:
        made_of.train(experience)
        told = made_of.eval(ready[0].test_stream)
        scores.append(tuple(token_accuracy(made, rows) for rows in tests))
    matrix = Matrix(
        "s", "given", "naive", 0, TASKS, dict.fromkeys(TASKS, "accuracy"), TASKS, tuple(scores)
    )
    last = {key.split("/")[0]: value for key, value in told.items()}
    assert torch.allclose(square.matrix, torch.tensor(scores))
    assert last["StreamBWT"] == pytest.approx(matrix.summary()["backward_transfer"], abs=1e-6)
    assert last["StreamForgetting"] == pytest.approx(
        -matrix.summary()["backward_transfer"], abs=1e-6
    )
    assert matrix.summary()["backward_transfer"] != 0
    assert "StreamForgetting/eval_phase/test_stream" in said.getvalue()


grid = st.lists(st.lists(st.floats(0, 1), min_size=4, max_size=4), min_size=5, max_size=5)


@settings(max_examples=30, deadline=None)
@given(grid)
def test_on_any_matrix_its_bwt_and_fwt_are_ours_and_its_forgetting_is_at_most_ours(scores):
    from avalanche.evaluation.metrics import BWT, Forgetting, ForwardTransfer

    matrix = Matrix(
        "s",
        "given",
        "naive",
        0,
        toy.TASK_NAMES,
        dict.fromkeys(toy.TASK_NAMES, "accuracy"),
        ("base", *toy.TASK_NAMES),
        tuple(map(tuple, scores)),
    )
    forgetting, bwt, fwt = Forgetting(), BWT(), ForwardTransfer()
    for j in range(4):
        fwt.update(j, scores[0][j], initial=True)
        for metric in (forgetting, bwt):
            metric.update(j, scores[j + 1][j], initial=True)
            if j < 3:
                metric.update(j, scores[4][j])
        if j:
            fwt.update(j, scores[j][j])

    def mean(metric):
        return sum(metric.result().values()) / 3

    ours = matrix.summary()
    assert mean(bwt) == pytest.approx(ours["backward_transfer"])
    assert mean(fwt) == pytest.approx(ours["forward_transfer"])
    assert mean(forgetting) == pytest.approx(-ours["backward_transfer"])
    assert mean(forgetting) <= ours["forgetting"] + 1e-12


def test_their_forgetting_differs_from_ours_where_a_task_was_best_after_its_own_stage():
    from avalanche.evaluation.metrics import Forgetting

    matrix = Matrix(
        "s",
        "given",
        "naive",
        0,
        ("a", "b", "c"),
        dict.fromkeys("abc", "accuracy"),
        ("a", "b", "c"),
        ((0.5, 0, 0), (0.9, 0.4, 0), (0.3, 0.4, 0.8)),
    )
    theirs = Forgetting()
    for task, first, last in (("a", 0.5, 0.3), ("b", 0.4, 0.4)):
        theirs.update(task, first, initial=True)
        theirs.update(task, last)
    assert sum(theirs.result().values()) / 2 == pytest.approx(0.1)  # (0.5 - 0.3 + 0) / 2
    assert matrix.summary()["forgetting"] == pytest.approx(0.3)  # (0.9 - 0.3 + 0) / 2


def test_rows_of_a_data_set_have_one_width():
    rows = EncodedDataset(toy.make_examples(0), causal=True)
    assert {rows.collate_fn([e])[0].shape for e in rows.examples} == {
        (1, 2, max(len(e.ids) for e in rows.examples))
    }
