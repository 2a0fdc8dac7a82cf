"""What fuzzing found (tests/test_robustness.py), each as the smallest call that showed it: wrong numbers first."""

import pytest
import torch
from jaxtyping import TypeCheckError

from attncongruence import (
    AttentionBlocks,
    TokenLayout,
    argmax_entropy,
    cacr_loss,
    hard_equivalence_loop,
    iais_loss,
    soft_equivalence_loop,
    split_attention,
)
from tests.problems import randn

S = randn(2, 2, 6, 6)
MASK = torch.ones(2, 6, dtype=torch.bool)
every_reader = pytest.mark.parametrize(
    "read",
    [cacr_loss, iais_loss, soft_equivalence_loop, hard_equivalence_loop, split_attention, argmax_entropy],
    ids=lambda read: read.__name__,
)


# ---------------------------------------------------------------- tensors that are not dense, or have no values


@every_reader
@pytest.mark.parametrize(
    ("make", "what"),
    [
        (lambda: S.to_sparse(), "sparse_coo"),
        (lambda: S[0].to_sparse_csr(), "sparse_csr"),
        (lambda: torch.nested.nested_tensor([S[0, :, :4], S[1]], layout=torch.jagged), "nested"),
    ],
    ids=["coo", "csr", "nested"],
)
@pytest.mark.filterwarnings("ignore")
def test_only_dense_tensors(read, make, what):
    # One of them gave a number.
    with pytest.raises(ValueError, match=rf"(S|attention) is a {what} tensor, and only dense ones"):
        read(make(), 3)


@every_reader
def test_a_sparse_mask_or_boundary(read):
    with pytest.raises(ValueError, match="mask is a sparse_coo tensor"):
        read(S, 3, mask=MASK.to_sparse())
    with pytest.raises(ValueError, match="n_text is a sparse_coo tensor"):
        read(S, torch.tensor([3, 2]).to_sparse())
    with pytest.raises(ValueError, match="text is a sparse_coo tensor"):
        TokenLayout(MASK.to_sparse(), MASK.to_sparse())


@every_reader
def test_float8_has_no_arithmetic(read):
    with pytest.raises(ValueError, match=r"is torch\.float8_e5m2, which has no arithmetic: pass (S|attention)\.float"):
        read(S.to(torch.float8_e5m2), 3)


def test_the_loops_need_values():
    for loop in (soft_equivalence_loop, hard_equivalence_loop):
        with pytest.raises(ValueError, match="attention is on the meta device"):
            loop(S.to("meta"), 3)


def test_streams_of_something_else():
    blocks = {"LL": randn(1, 2, 2), "LV": randn(1, 2, 3), "VV": randn(1, 3, 3)}
    with pytest.raises(TypeCheckError, match="LV"):
        AttentionBlocks.from_streams(**blocks | {"LV": blocks["LV"].numpy()})
