"""The example scripts, run as they stand."""

import pytest
import torch

from attncongruence import PRINTED, cacr_loss, capture_attention
from attncongruence.integrations.huggingface import token_layout
from examples import add_cacr, compare_conventions


def test_add_cacr_trains_both_losses(capsys):
    with_it, without = add_cacr.main(), add_cacr.main(scale=0.0)
    assert with_it[0] == without[0]  # the same weights and batch
    assert with_it[-1]["main"] < 0.1 * with_it[0]["main"]
    assert with_it[-1]["congruence"] < 0.9 * without[-1]["congruence"]
    shown = capsys.readouterr().out
    assert f"main {with_it[-1]['main']:.5f}  congruence {with_it[-1]['congruence']:.5f}" in shown


def test_compare_conventions_shows_losses_and_gradients(capsys):
    compare_conventions.main()
    shown = capsys.readouterr().out
    reference, rows = compare_conventions.compare(*compare_conventions.load())
    assert [row.name for row in rows] == list(compare_conventions.LOSSES)
    for row in rows:
        assert f"{row.loss:12.4g} {row.gradient:12.4g}" in shown
        assert row.equal_weight * row.gradient == pytest.approx(reference)
    model, batch = compare_conventions.load()
    with capture_attention(model) as capture:
        model(**batch)
        captured = capture.pop()
    loss = cacr_loss(captured, token_layout(model, batch, captured), convention=PRINTED)
    loss.backward()
    squares = [parameter.grad.square().sum() for parameter in model.parameters() if parameter.grad is not None]
    assert rows[2].loss == pytest.approx(loss.item())
    assert rows[2].gradient == pytest.approx(torch.stack(squares).sum().sqrt().item(), rel=1e-4)
