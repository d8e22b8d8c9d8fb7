"""Virtual tokens: with one prompt the engine computes what peft's own prompt tuning does, whatever
the layout.
"""

from dataclasses import replace

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from continual.errors import ConfigError
from continual.evaluation.likelihood import label_log_likelihoods
from continual.models.generation import generate_ids
from continual.models.loss import nll
from continual.models.weights import gradient, weights
from tests.support import toy
from tests.support.models import make_encoded, make_text_model

SETTINGS = {"prompt_tuning": {"num_virtual_tokens": 3, "prompt_tuning_init": "SAMPLE_VOCAB"}}
EXAMPLES = [
    make_encoded([5, 6, 7], [8, 9, 0], "a"),
    make_encoded([5, 6, 7, 10], [11, 0], "b"),
    make_encoded([5, 6], [8, 12, 4, 0], "c"),
]
KINDS = ("llama", "qwen3", "gpt2", "opt", "t5")
TOY = toy.make_prompt_model()


def prompted(kind="llama"):
    return make_text_model(kind, adapter="prompt_tuning", adapters=SETTINGS)


def by_peft(made, examples):
    """The mean loss over all response tokens, through peft's own forward pass, an example at a
    time.
    """
    total = torch.zeros(())
    for e in examples:
        k = e.response_mask.index(True)
        if made.layout.seq2seq:
            out = peft.PeftModelForSeq2SeqLM.forward(
                made.net,
                input_ids=torch.tensor([e.ids[:k]]),
                attention_mask=torch.ones(1, k),
                labels=torch.tensor([e.ids[k:]]),
            )
        else:
            labels = [t if r else -100 for t, r in zip(e.ids, e.response_mask, strict=True)]
            out = peft.PeftModelForCausalLM.forward(
                made.net, input_ids=torch.tensor([e.ids]), labels=torch.tensor([labels])
            )
        total = total + out.loss * sum(e.response_mask)
    return total / sum(sum(e.response_mask) for e in examples)


def left_by(made, loss):
    made.net.zero_grad()
    loss.backward()
    return gradient(made)


@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradient_are_those_of_pefts_prompt_tuning(kind):
    made = prompted(kind)
    assert set(weights(made)) == {"prompt_encoder.default.embedding.weight"}
    ours, theirs = nll(made, made.batch(EXAMPLES)), by_peft(made, EXAMPLES)
    torch.testing.assert_close(ours, theirs)
    assert toy.all_close(left_by(made, ours), left_by(made, theirs), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "layout",
    [
        {"packed": False},
        {"share_prefixes": False},
        {"tokens_per_microbatch": 7},
        {"instruction_weight": 0.5},
    ],
    ids=str,
)
def test_every_layout_has_the_same_loss(layout):
    made = prompted()
    plain = replace(made.layout, instruction_weight=layout.get("instruction_weight", 0.0))
    told = []
    for made.layout in (plain, replace(plain, **layout)):
        parts = made.batch(EXAMPLES).micro_batches()
        told.append(
            sum(nll(made, part) * part.supervised_tokens for part in parts)
            / sum(part.supervised_tokens for part in parts)
        )
    torch.testing.assert_close(*told)


def test_with_a_dual_objective_every_real_token_is_predicted_and_no_virtual_one():
    made = prompted()
    made.layout = replace(made.layout, instruction_weight=0.5)
    batch = made.batch(EXAMPLES)
    assert len(batch.targets) == sum(len(e.ids) for e in EXAMPLES)
    assert batch.targets.max() < made.layout.prompt_prefix[0]
    assert batch.supervised_tokens == sum(
        sum(e.response_mask) + 0.5 * e.response_mask.index(True) for e in EXAMPLES
    )


@pytest.mark.parametrize(
    ("kind", "flat"), [*((kind, True) for kind in KINDS[:4]), ("llama", False), ("t5", False)]
)
def test_answers_are_those_of_pefts_prompt_tuning(kind, flat):
    made = prompted(kind)
    made.layout = replace(made.layout, packed=flat)
    prompts = [replace(e, ids=e.ids[: e.response_mask.index(True)]) for e in EXAMPLES]
    ours = generate_ids(made, prompts, 4, 8, -1)
    first = 1 if kind == "t5" else 0
    for prompt, said in zip(prompts, ours, strict=True):
        ids = list(said[:first])
        for _ in range(4):
            more = {"decoder_input_ids": torch.tensor([[1, *ids]])} if kind == "t5" else {}
            read = [*prompt.ids, *([] if kind == "t5" else ids)]
            told = (
                type(made.net)
                .forward(made.net, input_ids=torch.tensor([read]), **more)
                .logits[0, -1]
            )
            ids.append(int(told.argmax()))
        assert said[:4] == ids[:4]


def test_the_likelihood_of_labels_is_that_behind_the_virtual_tokens():
    made = prompted()
    prompts, labels = [replace(e, ids=e.ids[:2]) for e in EXAMPLES], [(9, 0), (9, 4, 0), (11, 0)]
    flat = label_log_likelihoods(made, prompts, labels, 8)
    made.layout = replace(made.layout, packed=False)
    torch.testing.assert_close(
        flat, label_log_likelihoods(made, prompts, labels, 8), rtol=1e-4, atol=1e-5
    )
    pair = make_encoded(list(prompts[0].ids), list(labels[1]))
    torch.testing.assert_close(
        flat[0, 1].item(), -by_peft(made, [pair]).item() * 3, rtol=1e-4, atol=1e-5
    )


@settings(max_examples=30)
@given(st.lists(st.integers(1, 3), max_size=3), st.booleans())
def test_fixed_tokens_stand_where_they_are_put_and_do_not_train(lengths, live):
    made = TOY
    fixed = [torch.randn(n, 32, generator=torch.Generator().manual_seed(n)) for n in lengths]
    made.set_prompt_prefix(fixed, live=live)
    own = [made.net.prompt_encoder["default"].embedding.weight] if live else []
    e = toy.make_examples(0)[0]
    words = made.net.get_input_embeddings()(torch.tensor(e.ids))
    logits = made.net(inputs_embeds=torch.cat([*own, *fixed, words])[None]).logits[
        0, sum(lengths) + 2 * live :
    ]
    k = e.response_mask.index(True)
    expected = torch.nn.functional.cross_entropy(logits[k - 1 : -1], torch.tensor(e.ids[k:]))
    torch.testing.assert_close(nll(made, made.batch([e])), expected)
    assert all(f.grad is None for f in fixed)


@pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"
)  # peft asks for it
def test_what_a_run_saves_is_pefts_own_adapter(tmp_path):
    made = prompted()
    made.net.save_pretrained(tmp_path)
    base = make_text_model()
    theirs = peft.PeftModel.from_pretrained(base.net, tmp_path)
    torch.testing.assert_close(
        nll(made, made.batch(EXAMPLES)),
        by_peft(replace(base, net=theirs, layout=made.layout), EXAMPLES),
    )


def test_a_row_that_has_no_positions_behind_the_virtual_tokens_is_refused():
    made = toy.make_prompt_model()
    made.set_prompt_prefix([torch.zeros(25, 32)])
    long = make_encoded([5] * 4, [6, 7])
    nll(made, made.batch([long]))
    with pytest.raises(
        ConfigError,
        match="an example of 6 tokens follows 27 virtual tokens, and the model has 32",
    ):
        nll(made, made.batch([make_encoded([5] * 5, [6, 7])]))
    with pytest.raises(ConfigError, match="an example of 8 tokens follows 27"):
        generate_ids(made, [make_encoded([5] * 5, [6])], 3, 8, 0)


def test_a_model_without_virtual_tokens_is_told_how_to_get_them():
    with pytest.raises(
        ConfigError, match=r"no virtual tokens; give it some with model.adapter=prompt_tuning"
    ):
        toy.make_model().set_prompt_prefix(())
