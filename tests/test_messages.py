"""Wrong shapes and dtypes: the error ends with what to do."""

import pytest
import torch
from jaxtyping import TypeCheckError

from attncongruence import AttentionBlocks, CACRLoss, TokenLayout, cacr_loss, regularize, split_attention
from attncongruence._typing import REMEDIES
from tests.problems import randn
from tests.test_robustness_training import Tiny

S, zeros = randn(2, 4, 9, 9), torch.zeros
STREAMS = {"LL": zeros(1, 6, 6), "LV": zeros(1, 6, 8), "VL": zeros(1, 8, 6), "VV": zeros(1, 8, 8)}


@pytest.mark.parametrize(
    ("call", "argument", "remedy"),
    [
        (lambda: cacr_loss(S, 5, mask=torch.ones(2, 5).long()), "mask", "TokenLayout.from_segments"),
        (lambda: cacr_loss(S[..., :5], 5), "attention", "AttentionBlocks.from_streams"),
        (lambda: split_attention(S.long(), 5), "S", "scores are square"),
        (lambda: TokenLayout(zeros(2, 9), zeros(2, 9).bool()), "text", "TokenLayout.from_masks takes integers"),
        (lambda: TokenLayout(zeros(2, 9).bool(), zeros(2, 8).bool()), "image", "from_segments one mask for each"),
        (
            lambda: AttentionBlocks.from_streams(**STREAMS | {"LV": STREAMS["VL"], "VL": STREAMS["LV"]}),
            "LV",
            r"LV \(.., text, image\), VL \(.., image, text\)",
        ),
    ],
)
def test_the_last_line_says_what_to_do(call, argument, remedy):
    with pytest.raises(TypeCheckError, match=f"parameter '{argument}'") as raised:
        call()
    last = str(raised.value).splitlines()[-1]
    assert last == f"{argument}: {REMEDIES[argument]}"
    with pytest.raises(TypeCheckError, match=remedy):
        call()


def test_two_streams_are_not_told_to_stream():
    blocks = AttentionBlocks.from_streams(**STREAMS)
    with pytest.raises(ValueError, match=r"two streams have no streaming form: use impl='auto'.* the dense form$"):
        cacr_loss(blocks, impl="streaming")
    with pytest.raises(ValueError, match=r"given scores.* or pass a captured layer or QueryKey"):
        cacr_loss(S, 5, impl="streaming")


@pytest.mark.parametrize("name", ["layout", "positives", "mask"])
def test_a_function_of_the_batch_that_asks_for_what_it_has_not(name):
    wrong = {name: lambda batch: batch["input_ids"]}
    model, n_text = Tiny(), None if name == "layout" else 2
    with regularize(model, CACRLoss(), n_text, **wrong), pytest.raises(KeyError, match="input_ids") as raised:
        model(randn(2, 5, 4, dtype=torch.float32))
    (note,) = raised.value.__notes__
    assert note == f"in regularize(..., {name}=): the batch, what the model was called with, has ['x']"


@pytest.mark.parametrize("came", [(torch.ones(2, 5),) * 2, [1, 2], 2.0, None])
def test_a_layout_function_that_returns_something_else(came):
    model = Tiny()
    with regularize(model, CACRLoss(), layout=lambda batch: came), pytest.raises(TypeError, match="layout") as raised:
        model(randn(2, 5, 4, dtype=torch.float32))
    returned = f"layout(batch) returned a {type(came).__name__}: it must return a TokenLayout, an int or a (batch,)"
    assert str(raised.value).startswith(returned)
