"""Runs the example scripts unchanged."""

import pytest
import torch
from PIL import Image

from attncongruence import PRINTED, WEIGHTED_MEAN, cacr_loss, capture_attention
from attncongruence.integrations.huggingface import token_layout
from examples import add_cacr, compare_conventions, look_at_congruence

pytestmark = pytest.mark.docs


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


def test_look_at_congruence_has_a_row_for_each_layer(capsys, tmp_path):
    look_at_congruence.main(["--picture", str(tmp_path / "last.png")])
    shown = capsys.readouterr().out
    model, batch = look_at_congruence.load()
    rows, layers = look_at_congruence.look(model, batch)
    assert [row.layer for row in rows] == [f"encoder.layer.{i}.attention.attention" for i in range(4)]
    for row in rows:
        assert f"{row.language:10.4f} {row.vision:10.4f} {row.argmax_entropy:15.4f}" in shown
    alone = cacr_loss(
        layers[2].scores, token_layout(model, batch, layers[2]), convention=WEIGHTED_MEAN, direction="vision"
    )
    assert rows[2].vision == pytest.approx(alone.item(), rel=1e-5)
    with Image.open(tmp_path / "last.png") as picture:
        assert len(picture.convert("RGB").getcolors(10**6)) > 50
