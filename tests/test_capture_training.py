"""Capture in the main job: ViLT and timm blocks, training mode, dropout and padding; value and gradient."""

import pytest
import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from transformers import ViltConfig, ViltModel

from attncongruence.capture import capture_attention

TEXT, IMAGE, WIDTH, HEADS = 5, 4, 16, 2


def vilt(dropout: float) -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    config = ViltConfig(
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        intermediate_size=32,
        image_size=16,
        patch_size=8,
        vocab_size=50,
        max_position_embeddings=TEXT,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        initializer_range=0.5,
    )
    ids = torch.randint(1, 50, (2, TEXT))
    mask = torch.ones_like(ids)
    mask[1, 3:] = 0
    inputs = {"input_ids": ids, "attention_mask": mask, "pixel_values": torch.randn(2, 3, 16, 16)}
    return ViltModel(config).train(), inputs


class TimmStack(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        blocks = [Block(WIDTH, HEADS, qkv_bias=True, attn_drop=dropout, proj_drop=dropout) for _ in range(2)]
        self.blocks = nn.ModuleList(blocks)

    def forward(self, tokens: Tensor, real: Tensor) -> Tensor:
        for block in self.blocks:
            tokens = block(tokens, attn_mask=real[:, None, None, :])
        return tokens


def timm_stack(dropout: float) -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    model = TimmStack(dropout).train()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    real = torch.ones(2, TEXT + IMAGE, dtype=torch.bool)
    real[1, 3:TEXT] = False
    return model, {"tokens": torch.randn(2, TEXT + IMAGE, WIDTH), "real": real}


takes_a_mask = pytest.mark.needs("timm>=1.0.31", reason="a Block takes no mask in 1.0.3; none between was tried")
each_model = pytest.mark.parametrize("build", [vilt, pytest.param(timm_stack, marks=takes_a_mask)])


def by_hand(model: nn.Module, layer_input: Tensor) -> Tensor:
    """`q k^T / sqrt(d)` of the last layer, from its own weights."""
    if isinstance(model, ViltModel):
        layer = model.encoder.layer[1]
        hidden = layer.layernorm_before(layer_input)
        attention = layer.attention.attention
        query, key = attention.query(hidden), attention.key(hidden)
    else:
        layer = model.blocks[1]
        query, key, _ = layer.attn.qkv(layer.norm1(layer_input)).chunk(3, -1)
    query, key = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in (query, key))
    return query @ key.transpose(-1, -2) / (WIDTH // HEADS) ** 0.5


@each_model
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_scores_and_gradient_are_those_of_the_last_layer(build, dropout):
    model, inputs = build(dropout)
    last = model.encoder.layer[1] if isinstance(model, ViltModel) else model.blocks[1]
    layer_input = []
    last.register_forward_pre_hook(lambda module, args: layer_input.append(args[0]))
    with capture_attention(model) as capture:
        torch.manual_seed(1)
        model(**inputs)
        captured = capture.pop()
    expected = by_hand(model, layer_input[0])
    assert captured.layer in ("encoder.layer.1.attention.attention", "blocks.1.attn")
    batch, heads, length, _ = expected.shape
    allowed = captured.allowed.expand(batch, heads, length, length)
    assert not allowed[1, :, :, 3:TEXT].any()
    assert allowed[0].all()
    assert allowed[1, :, :, TEXT:].all()
    torch.testing.assert_close(captured.scores, expected.masked_fill(~allowed, -torch.inf), rtol=1e-5, atol=1e-5)
    product = captured.scale * captured.query @ captured.key.transpose(-1, -2)
    torch.testing.assert_close(product, expected, rtol=1e-5, atol=1e-5)

    weights = [p for p in model.parameters() if p.requires_grad]
    pull = torch.randn(expected.shape)
    losses = [(scores.masked_fill(~allowed, 0.0) * pull).sum() for scores in (captured.scores, expected)]
    ours, theirs = (torch.autograd.grad(loss, weights, retain_graph=True, allow_unused=True) for loss in losses)
    assert sum(g is not None for g in ours) > 10
    for our, their in zip(ours, theirs, strict=True):
        assert (our is None) == (their is None)
        if our is not None:
            torch.testing.assert_close(our, their, rtol=1e-4, atol=1e-4)


@each_model
def test_the_model_computes_the_same_bits_with_and_without_capture(build):
    model, inputs = build(0.3)

    def run() -> list[Tensor]:
        torch.manual_seed(1)
        output = model(**inputs)
        output = output if isinstance(output, Tensor) else output.last_hidden_state
        return [output, *torch.autograd.grad(output.square().sum(), model.parameters(), allow_unused=True)]

    before = run()
    with capture_attention(model):
        first, second = run(), run()
    for other in (first, second, run()):
        assert all(a is b is None or torch.equal(a, b) for a, b in zip(before, other, strict=True))


@each_model
def test_probs_are_the_softmax_of_the_scores_and_samples_can_be_picked(build):
    model, inputs = build(0.3)
    with capture_attention(model) as capture:
        model(**inputs)
        captured = capture.pop()
    torch.testing.assert_close(captured.probs, captured.scores.softmax(-1))
    second = captured[torch.tensor([False, True])]
    torch.testing.assert_close(second.scores, captured.scores[1:])
    torch.testing.assert_close(second.query, captured.query[1:])
    assert torch.equal(second.allowed, captured.allowed[1:])
    torch.testing.assert_close(captured[[1, 0]].scores, captured.scores.flip(0))
