"""TokenLayout: each constructor by hand, and what it refuses."""

import numpy as np
import pytest
import torch

from attncongruence import TokenLayout


def rows(mask):
    return ["".join("01"[bit] for bit in row) for row in mask.int().tolist()]


def test_from_n_text():
    one = TokenLayout.from_n_text(2, length=5)
    assert (rows(one.text), rows(one.image), one.max_text, one.max_image) == (["11000"], ["00111"], 2, 3)
    mask = torch.tensor([[1, 1, 1, 1, 0], [0, 1, 1, 0, 0]])
    each = TokenLayout.from_n_text(torch.tensor([3, 2]), attention_mask=mask)
    assert rows(each.text) == ["11100", "01000"]
    assert rows(each.image) == ["00010", "00100"]
    assert (each.max_text, each.max_image) == (3, 1)


def test_from_masks():
    layout = TokenLayout.from_masks(torch.tensor([[1, 0, 0]]), torch.tensor([[False, False, True]]))
    assert (rows(layout.text), rows(layout.image)) == (["100"], ["001"])


def test_any_kind_of_integer():
    text = ["1100"]
    assert rows(TokenLayout.from_n_text(np.int64(2), length=4).text) == text
    assert rows(TokenLayout.from_n_text(torch.tensor([2], dtype=torch.uint8), 4, torch.ones(1, 4).byte()).text) == text
    assert rows(TokenLayout.from_input_ids(torch.tensor([[1, 1, 5, 5]], dtype=torch.int32), np.int64(5)).text) == text


def test_from_token_type_ids():
    types, mask = torch.tensor([[0, 0, 1, 1, 0]]), torch.tensor([[1, 1, 1, 1, 0]])
    layout = TokenLayout.from_token_type_ids(types, mask)
    assert (rows(layout.text), rows(layout.image)) == (["11000"], ["00110"])
    turned = TokenLayout.from_token_type_ids(types, image_type=0)
    assert (rows(turned.text), rows(turned.image)) == (["00110"], ["11001"])


def test_from_input_ids():
    ids, mask = torch.tensor([[9, 32, 32, 7, 8], [32, 7, 32, 5, 0]]), torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]])
    layout = TokenLayout.from_input_ids(ids, 32, attention_mask=mask)
    assert rows(layout.image) == ["01100", "10100"]
    assert rows(layout.text) == ["10011", "01010"]
    assert (layout.max_text, layout.max_image) == (3, 2)


def test_from_segments():
    layout = TokenLayout.from_segments(torch.tensor([[1, 1, 0]]), torch.tensor([[True, False]]))
    assert (rows(layout.text), rows(layout.image)) == (["11000"], ["00010"])


def test_without_special_tokens():
    layout = TokenLayout.from_n_text(3, length=5).without(torch.tensor([[1, 0, 1, 0, 1]]))
    assert (rows(layout.text), rows(layout.image), layout.max_text) == (["01000"], ["00010"], 1)


def test_some_samples_and_another_device():
    layout = TokenLayout.from_n_text(torch.tensor([1, 2, 3]), length=4)
    part = layout[torch.tensor([2, 0])]
    assert (rows(part.text), part.max_text, part.max_image) == (["1110", "1000"], 3, 3)
    assert rows(layout[1].text) == ["1100"]
    assert rows(layout[torch.tensor([False, True, True])].text) == ["1100", "1110"]
    # One row serves every sample, and any choice of them.
    assert rows(TokenLayout.from_n_text(1, length=2)[torch.tensor([4, 7])].text) == ["10"]
    assert layout.to("cpu").max_text == 3
    assert layout.to("meta").text.device.type == "meta"


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda t: TokenLayout(t, t), ValueError, "text and image masks overlap at 2 position"),
        (lambda t: TokenLayout(t, t[:, :3]), ValueError, "batch length"),
        (lambda t: TokenLayout(t.long(), ~t), ValueError, "text"),
        (lambda t: TokenLayout(t, ~t.to("meta")), ValueError, "all tensors must be on one device"),
        (lambda t: TokenLayout.from_n_text(2), ValueError, "needs the length"),
        (lambda t: TokenLayout.from_n_text(5, length=4), ValueError, "n_text=5 is out of range"),
        (lambda t: TokenLayout.from_n_text(torch.tensor([1, -1]), length=4), ValueError, "n_text=-1 is out of range"),
        (
            lambda t: TokenLayout.from_n_text(2, length=5, attention_mask=t),
            ValueError,
            "length=5, but the mask has 4 positions",
        ),
        (lambda t: TokenLayout.from_n_text(2.0, length=4), ValueError, "n_text"),
        (lambda t: TokenLayout.from_input_ids(t.float(), 3), ValueError, "input_ids"),
        (lambda t: TokenLayout.from_n_text(2, length=4).without(t[:, :2]), ValueError, r"special has .* = \(1, 2\)"),
    ],
)
def test_rejects(make, error, message):
    with pytest.raises(error, match=message):
        make(torch.tensor([[True, True, False, False]]))
