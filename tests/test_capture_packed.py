"""Packed rows: several samples in one row do not mix, whichever kernel runs."""

import warnings

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

from attncongruence import CACRLoss, TokenLayout, cacr_loss, capture_attention, regularize
from attncongruence.capture.kernels import _documents
from attncongruence.training.term import _packed

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


def flash_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, causal, window, **_):
    """What flash attention's own varlen function gives for (tokens, heads, width): each document alone."""
    out = torch.zeros_like(q)
    for start, end in zip(cu_seqlens_q[:-1].tolist(), cu_seqlens_q[1:].tolist(), strict=True):
        part = flash(*(t[None, start:end] for t in (q, k, v)), softmax_scale, causal, window)
        out[start:end] = part[0]
    return out


def flash(q, k, v, softmax_scale, causal, window, **_):
    """What flash attention's own function gives for (batch, tokens, heads, width)."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
    allowed = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool)
    if causal:
        allowed = allowed.tril(k.shape[2] - q.shape[2])
    if window is not None:
        allowed &= ~torch.ones_like(allowed).tril(-window)
    return F.scaled_dot_product_attention(q, k, v, allowed, scale=softmax_scale).transpose(1, 2)


@pytest.fixture
def flash_on_a_cpu(monkeypatch):
    """transformers' flash attention up to the functions of the flash package, which need a GPU."""
    from transformers import modeling_flash_attention_utils as utils

    def of_the_package(softmax_scale=None, is_causal=False, sliding_window=None, query_length=0, **options):
        del options["key_length"]
        causal = is_causal and query_length > 1
        return {"softmax_scale": softmax_scale, "causal": causal, "window": sliding_window, **options}

    functions = (flash, flash_varlen, None, utils._pad_input, utils._unpad_input), (of_the_package, None)
    monkeypatch.setattr(utils, "lazy_import_flash_attention", lambda *args, **kwargs: functions)


def flash_llama() -> nn.Module:
    """A Llama that takes transformers' own way through flash attention."""
    model = llama("sdpa")
    model.config._attn_implementation = "flash_attention_2"
    return model


def random_row(seed: int) -> tuple[Tensor, Tensor, Tensor, list[int]]:
    """A packed row: its tokens, their positions, which are image, and the documents' lengths."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 8, (int(torch.randint(2, 5, (), generator=generator)),), generator=generator).tolist()
    lengths = [5, *lengths]
    ids = torch.randint(0, 50, (1, sum(lengths)), generator=generator)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    image = positions < torch.tensor([2])  # each document begins with its image
    return ids, positions, image, lengths


def loss_of(model: nn.Module, image: Tensor, **inputs) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, the model's output and what the layer says may attend."""
    with capture_attention(model, "layers.1.self_attn") as capture:
        out = model(use_cache=False, **inputs).last_hidden_state
        captured = capture.pop()
    length = image.shape[1]
    loss = cacr_loss(captured, TokenLayout(~image, image), direction="language", convention="weighted_mean")
    return loss, out, captured.allowed.expand(len(image), 1, length, length)[:, 0]


@pytest.mark.needs("transformers>=5.20", reason="the flash path of these versions")
@pytest.mark.parametrize("ways", ["positions", "lengths"])
@pytest.mark.parametrize("seed", range(4))
def test_flash_attention_is_recorded_as_it_ran(flash_on_a_cpu, seed, ways):
    ids, positions, image, lengths = random_row(seed)
    document = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    blocks = (document[:, None] == document) & torch.ones(len(document), len(document), dtype=torch.bool).tril()
    expected, right, _ = loss_of(
        llama("sdpa"), image, input_ids=ids, position_ids=positions, attention_mask=blocks[None, None]
    )
    ends = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    cut = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": max(lengths), "max_length_k": max(lengths)}
    options = cut if ways == "lengths" else {}
    loss, out, allowed = loss_of(flash_llama(), image, input_ids=ids, position_ids=positions, **options)
    torch.testing.assert_close(out, right, **OURS)  # the stand-in is right
    assert torch.equal(allowed[0], blocks)
    torch.testing.assert_close(loss, expected, **OURS)
    plain, _, allowed = loss_of(llama("sdpa"), image, input_ids=ids, position_ids=positions)
    assert torch.equal(allowed[0], blocks)
    torch.testing.assert_close(plain, expected, **OURS)
    one, _, allowed = loss_of(flash_llama(), image, input_ids=ids, position_ids=torch.arange(ids.shape[1])[None])
    assert allowed.all(0).equal(torch.ones_like(blocks).tril())
    assert not torch.isclose(one, expected, rtol=1e-3)


@pytest.mark.needs("transformers>=5.20", reason="the flash path of these versions")
def test_flash_attention_does_not_look_for_documents_in_several_rows(flash_on_a_cpu):
    """Two rows, positions that start again in both: flash mixes the samples, and the record says so."""
    ids, positions, image, _ = random_row(5)
    both = {"input_ids": torch.cat([ids, ids.flip(1)]), "position_ids": positions.repeat(2, 1)}
    loss, out, allowed = loss_of(flash_llama(), image.repeat(2, 1), **both)
    causal = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
    assert torch.equal(allowed, causal.expand(2, -1, -1))
    expected, right, _ = loss_of(llama("sdpa"), image.repeat(2, 1), **both, attention_mask=causal.expand(2, 1, -1, -1))
    torch.testing.assert_close(out, right, **OURS)
    torch.testing.assert_close(loss, expected, **OURS)


def test_positions_outside_of_every_document_see_nothing():
    ends = torch.tensor([0, 3, 5], dtype=torch.int32)
    options = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": 3, "max_length_k": 3}
    assert _documents(1, 7, options)[1].tolist() == [1, 1, 1, 2, 2, 0, 0]
    assert _documents(1, 5, {"position_ids": torch.tensor([[3, 4, 0, 1, 0]])})[1].tolist() == [0, 0, 1, 1, 2]


def test_a_cache_and_what_flash_attention_cannot_read():
    """Fewer queries than keys and one document: seen. Positions of another shape: not known."""
    assert _documents(1, 3, {"position_ids": torch.arange(4, 7)[None]}) == (True, None)
    assert _documents(1, 1, {"position_ids": torch.tensor([[4]])}) == (True, None)
    assert _documents(1, 4, {"position_ids": torch.arange(4).expand(3, 1, 4)}) == (False, None)


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
        warnings.filterwarnings("error", message="rows of this batch")
        model(ids, positions)
    assert _packed({"position_ids": positions.expand(3, 1, 8)})
    assert _packed({"position_ids": positions, "attention_mask": torch.ones(1, 8)})
    left = torch.tensor([[1, 1, 1, 0, 1, 2, 3, 4]])  # padding on the left
    assert not _packed({"position_ids": left, "attention_mask": torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1]])})
    assert _packed({"cu_seq_lens_q": torch.tensor([0, 4, 8])})
    assert not _packed({"cu_seq_lens_q": torch.tensor([0, 8])})
    other = Head().train()
    regularize(other, CACRLoss(direction="language"), layout)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="rows of this batch")
        other(ids, torch.arange(8)[None])
