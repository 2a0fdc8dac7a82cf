"""For the tests of regularize: a model with a main loss, its expected loss with regularize, and fixtures."""

import collections
import dataclasses

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from attncongruence import cacr_loss, capture_attention
from attncongruence.training.shim import optimizer_steps
from tests.helpers.models import Stack

TEXT, LENGTH, SAMPLES = 4, 9, 4
Pair = collections.namedtuple("Pair", ["loss", "logits"])
Shuffled = collections.namedtuple("Shuffled", ["logits", "loss"])


@dataclasses.dataclass(frozen=True)
class Frozen:
    loss: Tensor
    logits: Tensor


class Thing:
    def __init__(self, loss: Tensor, logits: Tensor) -> None:
        self.loss, self.logits = loss, logits


@pytest.fixture(autouse=True)
def close_all_regularizers():
    """A regularizer lives as long as its model, and that until it is garbage-collected."""
    yield
    for listener in list(optimizer_steps.listeners):
        listener.close()


@pytest.fixture(name="x")
def hidden_states() -> Tensor:
    return torch.randn(SAMPLES, LENGTH, 16, generator=torch.Generator().manual_seed(1))


needs_transformers = pytest.mark.needs("transformers>=4.30")


def model_output(**fields: Tensor) -> object:
    from transformers.modeling_outputs import SequenceClassifierOutput

    return SequenceClassifierOutput(**fields)


FORMS = {
    "ModelOutput": lambda loss, logits: model_output(loss=loss, logits=logits),
    "dict": lambda loss, logits: {"logits": logits, "loss": loss},
    "tuple": lambda loss, logits: (loss, logits),
    "list": lambda loss, logits: [loss, logits],
    "namedtuple": Pair,
    "namedtuple with the loss elsewhere": lambda loss, logits: Shuffled(logits, loss),
    "namedtuple without the name": lambda loss, logits: collections.namedtuple("Out", ["a", "b"])(loss, logits),
    "dataclass": Frozen,
    "object": Thing,
    "tensor": lambda loss, logits: loss,
    "one number in a vector": lambda loss, logits: (loss[None], logits),
}

EACH_FORM = [pytest.param(name, marks=[needs_transformers] if name == "ModelOutput" else []) for name in FORMS]


class Model(nn.Module):
    """Two attention layers and a main loss, returned in the given form."""

    def __init__(self, form: object = "dict", layers: int = 2, checkpointed: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stack, self.head = Stack(layers), nn.Linear(16, 1)
        self.form, self.checkpointed, self.trouble = form, checkpointed, None

    def forward(self, x: Tensor, labels: Tensor | None = None, **kwargs: object) -> object:
        for layer in self.stack.layers:
            x = x + (checkpoint(layer, x, use_reentrant=False) if self.checkpointed else layer(x))
        logits = self.head(x.mean(1))
        if self.trouble is not None:
            raise self.trouble
        loss = (logits.square() if labels is None else (logits - labels).square()).mean()
        return FORMS[self.form](loss, logits)


def loss_of(output: object) -> Tensor:
    if isinstance(output, dict):
        return output["loss"]
    if hasattr(output, "loss"):
        return output.loss
    return output if isinstance(output, Tensor) else output[0]


def logits_of(output: object) -> Tensor:
    if isinstance(output, dict):
        return output["logits"]
    return output.logits if hasattr(output, "logits") else output[1]


def parts(x: Tensor, model: nn.Module | None = None, layers: object = -1, **options: object) -> tuple[Tensor, Tensor]:
    """Main and congruence loss of an untouched model, by hand."""
    model = Model().train() if model is None else model
    with capture_attention(model, layers) as capture:
        main = loss_of(model(x))
        losses = [cacr_loss(record, TEXT, **options) for record in capture.pop_all()]
    return main, torch.stack(losses).mean()


def gradients(loss: Tensor, model: nn.Module) -> list[Tensor]:
    return list(torch.autograd.grad(loss, model.parameters()))


def sgd(model: nn.Module, lr: float = 0.1) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=lr)


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, *batches: Tensor) -> None:
    for batch in batches:
        loss_of(model(batch)).backward()
    optimizer.step()
    optimizer.zero_grad()
