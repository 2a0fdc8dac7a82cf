"""Models without transformers: timm blocks, and torch's own encoder and multi-head attention."""

import copy
from collections.abc import Callable
from inspect import signature

import timm
import torch
from timm.models.eva import Eva
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from tests.zoo.case import (
    HEADS,
    LAYERS,
    VOCABULARY,
    WIDTH,
    Case,
    Inputs,
    Layer,
    Probabilities,
    caption_inputs,
    hooked,
    pixels,
    random_model,
    run,
)
from tests.zoo.encoders import text_then


class Joint(nn.Module):
    """Word embeddings and patches side by side, then whatever attends."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.patches = nn.Embedding(VOCABULARY, WIDTH), nn.Conv2d(3, WIDTH, 8, 8)
        self.kinds, self.positions = nn.Embedding(2, WIDTH), nn.Parameter(torch.randn(1, 12, WIDTH))

    def forward(self, input_ids: Tensor, attention_mask: Tensor, pixel_values: Tensor) -> Tensor:
        text = self.words(input_ids) + self.kinds.weight[0]
        image = self.patches(pixel_values).flatten(2).transpose(1, 2) + self.kinds.weight[1]
        real = torch.cat([attention_mask.bool(), torch.ones(image.shape[:2], dtype=torch.bool)], 1)
        return self.attend(torch.cat([text, image], 1) + self.positions, real)

    def attend(self, tokens: Tensor, real: Tensor) -> Tensor:
        raise NotImplementedError


class TimmBlocks(Joint):
    """What the first ViLT was: timm blocks over both modalities, with an additive mask."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(WIDTH, HEADS, qkv_bias=True) for _ in range(LAYERS)])
        for block in self.blocks:
            block.attn.fused_attn = fused

    def attend(self, tokens: Tensor, real: Tensor) -> Tensor:
        mask = torch.zeros(real.shape[0], 1, 1, real.shape[1]).masked_fill(~real[:, None, None], -torch.inf)
        masked = {"attn_mask": mask} if "attn_mask" in signature(Block.forward).parameters else {}  # none in timm 1.0.3
        for block in self.blocks:
            tokens = block(tokens, **masked)
        return tokens


class TorchEncoder(Joint):
    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 64, dropout=0.1, batch_first=batch_first)
        self.encoder, self.batch_first = nn.TransformerEncoder(layer, LAYERS), batch_first

    def attend(self, tokens: Tensor, real: Tensor) -> Tensor:
        if self.batch_first:
            return self.encoder(tokens, src_key_padding_mask=~real)
        return self.encoder(tokens.transpose(0, 1), src_key_padding_mask=~real).transpose(0, 1)


class TorchAttention(Joint):
    def __init__(self, need_weights: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, dropout=0.1, batch_first=True)
        self.need_weights = need_weights

    def attend(self, tokens: Tensor, real: Tensor) -> Tensor:
        options = {"key_padding_mask": ~real, "need_weights": self.need_weights}
        return tokens + self.attention(tokens, tokens, tokens, **options)[0]


def joint_inputs() -> Inputs:
    return caption_inputs() | {"pixel_values": pixels(2, 3, 16, 16)}


def unfused(model: nn.Module) -> nn.Module:
    """A copy of a timm model that calls softmax by itself."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    return model


def torch_reference(path: str) -> Callable[..., tuple[nn.Module, Probabilities]]:
    """The same `nn.MultiheadAttention`, asked for its weights."""

    def reference(model: nn.Module, inputs: Inputs) -> tuple[nn.Module, Probabilities]:
        model, found = copy.deepcopy(model), []
        attention = model.get_submodule(path)
        forward = attention.forward

        def with_weights(query, key, value, key_padding_mask=None, **_):
            options = {"key_padding_mask": key_padding_mask, "average_attn_weights": False}
            out = forward(query, key, value, need_weights=True, **options)
            found.append(out[1])
            return out

        attention.forward = with_weights
        run(model, inputs)
        return model, {"S": found[0]}

    return reference


def timm_joint(name: str, fused: bool) -> Case:
    layers = {"S": Layer("blocks.1.attn")}
    build = lambda: (random_model(lambda: TimmBlocks(fused)), joint_inputs())
    return Case(name, "encoder", build, layers, *text_then(4), hooked(layers, "attn_drop", unfused), unfused)


class ImageOnly(nn.Module):
    def __init__(self, name: str, **options: object) -> None:
        super().__init__()
        size = {"img_size": 32, "patch_size": 8, "embed_dim": WIDTH, "depth": 2, "num_heads": HEADS, "num_classes": 0}
        self.net = timm.create_model(name, pretrained=False, **size, **options)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.net(pixel_values)


def timm_image(name: str, model: str, *, opaque: tuple[str, ...] = (), notes: str, **options: object) -> Case:
    layers = {"S": Layer("net.blocks.1.attn")}
    build = lambda: (random_model(lambda: ImageOnly(model, **options)), {"pixel_values": pixels(2, 3, 32, 32)})
    nothing = lambda inputs: None
    reference = hooked(layers, "attn_drop", unfused)
    return Case(name, "vision only", build, layers, nothing, nothing, reference, unfused, opaque, notes=notes)


def torch_joint(name: str, make: Callable[[], nn.Module], path: str) -> Case:
    build = lambda: (random_model(make), joint_inputs())
    reference = torch_reference(path)
    return Case(name, "encoder", build, {"S": Layer(path)}, *text_then(4), reference, lambda model: None)


EVA_NORMS = {"qk_norm": True} if "qk_norm" in signature(Eva).parameters else {}  # none in timm 1.0.3

CASES = [
    timm_joint("timm_fused", True),
    timm_joint("timm_unfused", False),
    timm_image("timm_beit", "beit_base_patch16_224", opaque=("S",), notes="relative position bias"),
    timm_image("timm_eva02", "eva02_tiny_patch14_224", notes="rotary, q and k norms", **EVA_NORMS),
    torch_joint("torch_encoder", lambda: TorchEncoder(True), "encoder.layers.1.self_attn"),
    torch_joint("torch_encoder_length_first", lambda: TorchEncoder(False), "encoder.layers.1.self_attn"),
    torch_joint("torch_attention", lambda: TorchAttention(False), "attention"),
    torch_joint("torch_attention_weights", lambda: TorchAttention(True), "attention"),
]
