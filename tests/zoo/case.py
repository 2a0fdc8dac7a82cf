"""What a zoo case is, and the parts that all of them share."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

PAD, BOS, EOS, IMAGE, IMAGE_START, IMAGE_END, VIDEO = 0, 1, 2, 5, 6, 7, 8
VOCABULARY, WIDTH, LAYERS, HEADS = 128, 32, 2, 4

Inputs = dict[str, Any]
Probabilities = dict[str, Tensor]
Reference = Callable[[nn.Module, Inputs], tuple[nn.Module, Probabilities]]


@dataclass(frozen=True)
class Layer:
    """An attention module, and which of its operations in one forward pass is meant."""

    path: str
    number: int = 0


@dataclass(frozen=True)
class Case:
    """A tiny model as its library builds it.

    Args:
        name: family.
        kind: `encoder`, `decoder`, `prefix decoder`, `dual stream`, `cross-attention` or `vision only`.
        build: makes the model and its inputs; the same each time.
        layers: role (`S` for a joint sequence, else the block) to layer.
        text: real text positions of the inputs, `(batch, length)`.
        image: real image positions.
        reference: `(model, inputs) -> (eager copy, {role: probabilities})` of its own eager attention.
        eager: the same model with eager attention, or None where the library's own eager path differs.
        opaque: roles whose scores are more than `scale q k^T` and masks, so that no `query` and `key` are expected.
        last: `layers=-1` finds the layer of role `S`.
    """

    name: str
    kind: str
    build: Callable[[], tuple[nn.Module, Inputs]]
    layers: Mapping[str, Layer]
    text: Callable[[Inputs], Tensor | None]
    image: Callable[[Inputs], Tensor | None]
    reference: Reference
    eager: Callable[[nn.Module], nn.Module | None]
    opaque: tuple[str, ...] = ()
    last: bool = True
    notes: str = field(default="", compare=False)

    def real_rows(self, role: str, inputs: Inputs, shape: torch.Size) -> Tensor:
        """`(batch, queries)`: the rows of real tokens."""
        kinds = {"S": (self.text, self.image), "L": (self.text,), "V": (self.image,)}[role[0]]
        rows = [mask for mask in (kind(inputs) for kind in kinds) if mask is not None]
        return torch.stack(rows).any(0) if rows else torch.ones(shape[0], shape[-2], dtype=torch.bool)


_TABLES = ("embed", "bias_table", "relative_attention_bias", "position", "token_type")


def sharpen(model: nn.Module, gain: float = 1.5) -> nn.Module:
    """Random weights that put the softmax well away from uniform; a fresh 0.02 initialization hides errors."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            table = any(word in name for word in _TABLES)
            if p.dim() >= 2:
                p.copy_(noise * (0.7 if table else gain / p[0].numel() ** 0.5))
            elif name.endswith("weight") and "norm" in name.lower():
                p.copy_(1 + 0.2 * noise)
            elif name.endswith("bias"):
                p.copy_(0.1 * noise)
            elif p.numel() and not p.any():  # gates start at zero
                p.copy_(0.5 + 0.2 * noise)
    return model


def random_model(build: Callable[[], nn.Module], gain: float = 1.5) -> nn.Module:
    """A model with sharpened random weights in eval mode, gradients on."""
    torch.manual_seed(0)
    return sharpen(build(), gain).eval()


def run(model: nn.Module, inputs: Inputs, **more: Any) -> Any:
    """One forward pass; ViLT samples image patches, so the seed is part of the input."""
    torch.manual_seed(123)
    return model(**inputs, **more)


def pixels(*shape: int) -> Tensor:
    """Random image tensor."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


def token_ids(
    images: int,
    before: tuple[int, ...] = (BOS,),
    after: tuple[int, ...] = (),
    *,
    image: int = IMAGE,
    left: bool = False,
) -> tuple[Tensor, Tensor]:
    """Two rows `before, images, after, text`: seven words, and five words with two positions of padding."""
    generator = torch.Generator().manual_seed(1)
    words = torch.randint(20, VOCABULARY - 8, (2, 7), generator=generator).tolist()
    head = [*before, *[image] * images, *after]
    long, short, gap = head + words[0], head + words[1][:5], [PAD] * 2
    ids = torch.tensor([long, gap + short if left else short + gap])
    mask = torch.ones_like(ids)
    mask[1, slice(0, 2) if left else slice(-2, None)] = 0
    return ids, mask


def caption_inputs(before: tuple[int, ...] = (BOS,)) -> Inputs:
    """Text alone, for models that take the image apart from it."""
    ids, mask = token_ids(0, before)
    return {"input_ids": ids, "attention_mask": mask}


def set_kernel(model: nn.Module, kernel: str) -> None:
    """Changes the attention of a transformers model, as versions before `set_attn_implementation` allow it too."""
    if hasattr(model, "set_attn_implementation"):
        model.set_attn_implementation(kernel)
        return
    for module in model.modules():
        if hasattr(module, "config"):
            module.config._attn_implementation = kernel


def eager_transformers(model: nn.Module) -> nn.Module:
    """A copy that runs transformers' eager attention everywhere it can."""
    eager = copy.deepcopy(model)
    if hasattr(model.config, "_attn_implementation") and not hasattr(model, "set_attn_implementation"):
        # In 4.53 some families choose a class when they are built; in 4.30 there is nothing to choose.
        eager = type(model)._from_config(eager.config, attn_implementation="eager").train(model.training)
        eager.load_state_dict(model.state_dict())
    set_kernel(eager, "eager")
    return eager


def returned(pick: Callable[[Any], Tensor], eager: Callable[[nn.Module], nn.Module] = eager_transformers) -> Reference:
    """Reference: what the model returns for `output_attentions=True` in eager mode."""

    def reference(model: nn.Module, inputs: Inputs) -> tuple[nn.Module, Probabilities]:
        model = eager(model)
        return model, {"S": pick(run(model, inputs, output_attentions=True))}

    return reference


def hooked(
    layers: Mapping[str, Layer], dropout: str = "", eager: Callable[[nn.Module], nn.Module] = eager_transformers
) -> Reference:
    """Reference: the eager module's second output, or the input of its dropout of this name."""

    def reference(model: nn.Module, inputs: Inputs) -> tuple[nn.Module, Probabilities]:
        model = eager(model)
        seen: dict[str, list[Tensor]] = {layer.path: [] for layer in layers.values()}
        for path, probabilities in seen.items():
            module = model.get_submodule(path)
            if dropout:
                drop = module.get_submodule(dropout)
                drop.register_forward_pre_hook(lambda _, args, found=probabilities: found.append(args[0]))
            else:
                module.register_forward_hook(lambda _, args, out, found=probabilities: found.append(out[1]))
        run(model, inputs)
        return model, {role: seen[layer.path][layer.number] for role, layer in layers.items()}

    return reference
