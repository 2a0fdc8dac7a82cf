"""Packed rows: several samples in one row do not mix, whichever kernel runs."""

import warnings

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

from attncongruence import CACRLoss, TokenLayout, cacr_loss, capture_attention, regularize
from attncongruence.capture.kernels import _documents

pytestmark = pytest.mark.needs("transformers>=5.0")
OURS = {"rtol": 1e-6, "atol": 1e-8}


def documents_by_transformers(positions: Tensor) -> Tensor:
    """To which document each position belongs, by transformers' own functions."""
    from transformers import modeling_flash_attention_utils as flash

    length = positions.shape[1]
    if not flash._is_packed_sequence(positions, 1):
        return torch.zeros(length, dtype=torch.int64)
    (ends, _), _ = flash.prepare_fa_kwargs_from_position_ids(positions)
    return torch.bucketize(torch.arange(length), ends.long(), right=True)


@pytest.mark.needs("transformers>=5.20", reason="earlier ones look for positions of 0")
@pytest.mark.parametrize("seed", range(30))
def test_documents_are_those_of_transformers(seed):
    generator = torch.Generator().manual_seed(seed)
    count, start = int(torch.randint(1, 5, (), generator=generator)), seed % 3
    lengths = torch.randint(1, 6, (count,), generator=generator).tolist()
    positions = torch.cat([torch.arange(n) + start for n in lengths])[None]
    known, document = _documents(1, positions.shape[1], {"position_ids": positions})
    expected = documents_by_transformers(positions)
    document = torch.zeros_like(expected) if document is None else document
    assert known
    assert torch.equal(document[:, None] == document, expected[:, None] == expected)


def test_documents_by_their_ends():
    ends = torch.tensor([0, 3, 4, 9], dtype=torch.int32)
    options = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": 5, "max_length_k": 5}
    known, document = _documents(1, 9, options)
    assert known
    assert (document - document[0]).tolist() == [0, 0, 0, 1, 2, 2, 2, 2, 2]
    assert _documents(1, 9, {**options, "cu_seq_lens_k": torch.tensor([0, 4, 9])}) == (False, None)
    assert _documents(2, 9, options) == (False, None)
    assert _documents(2, 9, {"position_ids": torch.arange(9)[None]}) == (True, None)  # no kernel looks at it


def packed_kernel(module, query, key, value, mask, scaling=None, is_causal=None, position_ids=None, **kwargs):
    """What transformers' flash attention gives for one packed row, by its own rule, computed by sdpa."""
    document = documents_by_transformers(position_ids)
    allowed = (document[:, None] == document) & torch.ones(len(document), len(document), dtype=torch.bool).tril()
    groups = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(groups, 1) for t in (key, value))
    return F.scaled_dot_product_attention(query, key, value, allowed, scale=scaling).transpose(1, 2), None


def llama(kernel: str) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, intermediate_size=32,
        vocab_size=50, initializer_range=0.3,
    )  # fmt: skip
    config._attn_implementation = kernel
    return transformers.LlamaModel(config).double().train()


@pytest.fixture
def kernel():
    transformers.AttentionInterface.register("packed_by_rule", packed_kernel)
    transformers.AttentionMaskInterface.register("packed_by_rule", lambda *args, **kwargs: None)
    return "packed_by_rule"


def test_a_packed_row_is_the_same_under_every_kernel(kernel):
    ids = torch.randint(0, 50, (1, 12), generator=torch.Generator().manual_seed(1))
    positions = torch.cat([torch.arange(7), torch.arange(5)])[None]
    image = torch.tensor([[1, 1, 1, 0, 0, 0, 0, 1, 1, 0, 0, 0]]).bool()
    losses = {}
    for name in ("sdpa", "eager", kernel):
        model = llama(name)
        with capture_attention(model, "layers.1.self_attn") as capture:
            model(input_ids=ids, position_ids=positions, use_cache=False)
            captured = capture.pop()
        allowed = captured.allowed.expand(1, 1, 12, 12)[0, 0]
        assert not allowed[7:, :7].any()
        assert torch.equal(allowed[:7, :7], torch.ones(7, 7).tril().bool())
        losses[name] = cacr_loss(captured, TokenLayout(~image, image), direction="language", convention="weighted_mean")
    for loss in losses.values():
        torch.testing.assert_close(loss, losses["sdpa"], **OURS)
    assert losses["sdpa"] > 0


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = llama("sdpa")

    def forward(self, input_ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
        out = self.model(input_ids=input_ids, position_ids=position_ids, use_cache=False)
        return out.last_hidden_state.square().mean()


def test_regularize_says_what_is_averaged_once():
    model = Head().train()
    ids, positions = torch.zeros(1, 8, dtype=torch.int64), torch.cat([torch.arange(4), torch.arange(4)])[None]
    image = torch.tensor([[1, 1, 0, 0, 1, 1, 0, 0]]).bool()
    layout = TokenLayout(~image, image)
    regularize(model, CACRLoss(direction="language"), layout)
    with pytest.warns(UserWarning, match=r"rows of this batch hold several samples.*packing=False"):
        model(ids, positions)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(ids, positions)
    other = Head().train()
    regularize(other, CACRLoss(direction="language"), layout)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other(ids, torch.arange(8)[None])
