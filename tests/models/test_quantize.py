"""A base whose weights are held in 4 bits, under an adapter."""

from importlib.util import find_spec

import pytest
import torch

from continual.models.loading import load_pretrained
from continual.models.loss import accumulate, forward, nll
from continual.models.weights import gradient, weights
from tests.support.models import make_encoded, write_model

ADAPTERS = {"lora": {"r": 2, "target_modules": "all-linear", "init_lora_weights": False}}
needed = pytest.mark.skipif(
    not find_spec("bitsandbytes") or not find_spec("accelerate"), reason="needs the extra quantize"
)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("model.quantize=8bit",), "unknown model.quantize '8bit'"),
        (
            ("model.quantize=4bit",),
            "model.quantize=4bit: weights in 4 bits cannot be trained; set model.adapter=lora, or "
            "model.quantize=none",
        ),
        (
            ("model.quantize=4bit", "model.adapter=lora"),
            "model.quantize=4bit needs bitsandbytes and accelerate; install the extra: uv sync "
            "--extra quantize, or pip install bitsandbytes accelerate",
        ),
    ],
)
def test_what_cannot_be_held_in_4_bits_is_refused(
    words, expected, cli_error, run_keys, monkeypatch, tmp_path
):
    monkeypatch.setattr("continual.models.loading.find_spec", lambda name: None)
    assert expected in cli_error("run", *run_keys, *words, f"out={tmp_path}")


@needed
def test_through_4_bits_the_adapter_gets_the_gradient_that_it_has_on_the_weights_they_stand_for(
    tmp_path,
):
    from bitsandbytes.functional import dequantize_4bit

    folder = write_model(tmp_path / "model")
    made = load_pretrained(
        name=str(folder), device="cpu", adapter="lora", quantize="4bit", adapters=ADAPTERS
    )
    plain = load_pretrained(name=str(folder), device="cpu", adapter="lora", adapters=ADAPTERS)
    told = dict(plain.net.named_parameters())
    packed = {n: p for n, p in made.net.named_parameters() if p.dtype == torch.uint8}
    assert len(packed) == 2 * 7
    with torch.no_grad():
        for n, p in made.net.named_parameters():
            told[n].copy_(dequantize_4bit(p.data, p.quant_state) if n in packed else p)
    assert all("lora" in n for n in weights(made))
    rows = [make_encoded([5, 6, 7], [8, 9], "a"), make_encoded([5, 6, 9], [10], "b")]
    with torch.no_grad():  # on some CPUs an answer would change how the weights lie
        answers = [forward(m, m.batch(rows)) for m in (made, plain)]
    torch.testing.assert_close(*answers, rtol=1e-3, atol=1e-4)
    for m in (made, plain):
        accumulate(nll, m, [m.batch(rows)])
    for n, g in gradient(plain).items():
        torch.testing.assert_close(gradient(made)[n], g, rtol=1e-2, atol=1e-5)
