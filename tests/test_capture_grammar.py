"""Attention written by hand, in thousands of ways: what is captured is right, or it is refused."""

import os
import random
from collections import Counter

import pytest
import torch

from attncongruence import cacr_loss, capture_attention
from tests.helpers.grammar import CHOICES, Model, Spec, Truth, draw

FROM, EXAMPLES = (
    int(os.environ.get(f"ATTNCONGRUENCE_GRAMMAR_{name}", default)) for name, default in (("FROM", 0), ("EXAMPLES", 240))
)
COMPILED = max(1, EXAMPLES // 20)
OUTCOMES: Counter[str] = Counter()


@pytest.fixture(autouse=True)
def _float64():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def inputs(spec: Spec, batch: int, seed: int):
    """Tokens, hidden keys, and a number of text tokens, so that each text sees an image token."""
    generator = torch.Generator().manual_seed(seed)
    n_text = random.Random(seed).randint(1, spec.length - 1)
    x = torch.randn(batch, spec.length, spec.heads * spec.width, generator=generator)
    hidden = torch.rand(batch, spec.length, generator=generator) < 0.3
    hidden[:, [0, n_text]] = False
    x = x.transpose(0, 1).contiguous() if spec.first == "length" else x
    return x.requires_grad_(), hidden, n_text


def loss_of(source, n_text):
    return cacr_loss(source, n_text, convention="weighted_mean", direction="language")


def right_or_refused(seed: int, steps: int, compiled: bool = False, **fixed: str) -> str:
    """Whether a random module is captured rightly in all steps, or refused; an AssertionError where it is not."""
    below, spec = draw(2 * seed, **fixed), draw(2 * seed + 1, **fixed)
    torch.manual_seed(seed)
    model, r = Model(below, spec), random.Random(seed)
    run = torch.compile(model, backend="eager") if compiled else model
    close = {"rtol": 1e-4, "atol": 1e-4} if spec.softmax == "float32" else {"rtol": 1e-8, "atol": 1e-8}
    with capture_attention(run, r.choice([-1, "attention"])) as capture:
        for step in range(steps):
            x, hidden_x, _ = inputs(below, below.batch, seed)
            y, hidden_y, n_text = inputs(spec, spec.batch if step == 0 else r.randint(1, 5), seed + 7 * step)
            try:
                run(x, y, hidden_x, hidden_y)
                captured = capture.pop()
                loss = loss_of(captured, n_text)
            except (RuntimeError, ValueError) as error:
                if "no pair of LV may attend" not in str(error):
                    return "refused"
                with pytest.raises(ValueError, match="no pair of LV may attend"):
                    loss_of(Truth(*model.attention.truth(y, hidden_y)), n_text)
                continue
            assert captured.layer == "attention"
            scores, allowed = model.attention.truth(y, hidden_y)
            expected = loss_of(Truth(scores, allowed), n_text)
            torch.testing.assert_close(captured.probs, scores.softmax(-1).to(captured.probs), **close)
            torch.testing.assert_close(loss, expected.to(loss), **close)
            if expected.requires_grad:
                grads = (torch.autograd.grad(one, y, retain_graph=True)[0] for one in (loss, expected))
                torch.testing.assert_close(*grads, **close)
            if captured.query is not None:
                product = captured.scale * captured.query @ captured.key.mT
                torch.testing.assert_close(
                    product.masked_fill(~allowed, 0.0), scores.masked_fill(~allowed, 0.0), **close
                )
    return "right"


def check(seeds: range, steps: int, compiled: bool = False) -> None:
    wrong = []
    for seed in seeds:
        try:
            outcome = right_or_refused(seed, steps, compiled)
        except AssertionError as error:
            wrong.append(f"{seed}: {draw(2 * seed + 1)}: {str(error)[:200]}")
            outcome = "wrong"
        OUTCOMES[("compiled, " if compiled else "") + outcome] += 1
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("part", range(4))
def test_each_module_is_right_or_refused(part):
    count = EXAMPLES // 4
    check(range(FROM + part * count, FROM + (part + 1) * count), steps=2)


@pytest.mark.slow
def test_each_compiled_module_is_right_or_refused():
    check(range(FROM, FROM + COMPILED), steps=3, compiled=True)


PLAIN = {"change": "nothing", "loop": "none", "softmax": "function", "scale": "scores", "mask": "fill"}


@pytest.mark.parametrize("split", CHOICES["split"])
@pytest.mark.parametrize("projection", ["linear", "fused", "conv"])
def test_the_usual_ways_are_not_refused(projection, split):
    for seed in range(3):
        assert right_or_refused(seed, 2, projection=projection, split=split, product="matmul", **PLAIN) == "right"
