"""torch.compile: captured without graph breaks or recompilations, or an error that says when to capture."""

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch.overrides import _get_current_function_mode_stack

from attncongruence.capture import capture_attention
from tests.helpers.models import Attention, Stack, hook_count
from tests.helpers.problems import pairwise


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


class TorchLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.MultiheadAttention(16, 2, batch_first=True) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x, x, x, need_weights=False)[0]
        return x


MODELS = {"fused": lambda: Stack(fused=True), "by hand": lambda: Stack(fused=False), "torch": TorchLayers}


def build(kind: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return MODELS[kind](), torch.randn(3, 5, 16)


def steps(model: nn.Module, capture: object, x: Tensor, parameters: list[Tensor], count: int = 3) -> list[Tensor]:
    """Scores and gradients of each step."""
    found = []
    for number in range(count):
        out = model(x + number)
        record = capture.pop()
        assert _get_current_function_mode_stack() == []
        loss = out.square().mean() + record.scores.square().mean()
        found += [record.scores.detach(), *torch.autograd.grad(loss, parameters)]
    return found


ORDERS = ["capture first", "capture the compiled model", "compile in place"]


@pytest.mark.parametrize(
    ("kind", "order", "layers"),
    [
        pytest.param(*each, marks=[] if each[0] == "fused" or each[:2] == ("by hand", ORDERS[0]) else pytest.mark.slow)
        for each in pairwise(MODELS, ORDERS, [-1, "layers.1"])
    ],
)
def test_compiled_models_are_captured_in_one_graph_compiled_once(kind, order, layers):
    model, x = build(kind)
    parameters = list(model.parameters())
    with capture_attention(model, layers) as capture:
        expected = steps(model, capture, x, parameters)

    counter = CompileCounterWithBackend("aot_eager")
    if order == "capture first":
        capture = capture_attention(model, layers)
        compiled = torch.compile(model, backend=counter)
    elif order == "compile in place":
        model.compile(backend=counter)
        compiled, capture = model, capture_attention(model, layers)
    else:
        compiled = torch.compile(model, backend=counter)
        capture = capture_attention(compiled, layers)
    with capture:
        ours = steps(compiled, capture, x, parameters)
    for our, their in zip(ours, expected, strict=True):
        torch.testing.assert_close(our, their)
    assert counter.frame_count == 1
    assert not counters["graph_break"]


class Folded(Attention):
    """Batch and heads in one dimension, for `bmm`."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (2, 8)).transpose(1, 2).flatten(0, 1) for t in self.qkv(x).chunk(3, -1))
        out = torch.bmm(torch.bmm(q, k.transpose(1, 2)).softmax(-1), v)
        return out.view(x.shape[0], 2, -1, 8).transpose(1, 2).flatten(2)


def test_batch_and_heads_in_one_dimension_are_told_apart_in_compiled_code():
    torch.manual_seed(0)
    model = Folded()
    counter = CompileCounterWithBackend("aot_eager")
    with capture_attention(model, "") as capture:
        compiled = torch.compile(model, backend=counter)
        for batch, length in ((3, 5), (4, 6), (2, 7)):
            x = torch.randn(batch, length, 16)
            compiled(x)
            q, k, _ = (t.unflatten(-1, (2, 8)).transpose(1, 2) for t in model.qkv(x).chunk(3, -1))
            torch.testing.assert_close(capture.pop().scores, q @ k.mT)
    assert counter.frame_count == 2  # as without capture: the second size makes the sizes dynamic
    assert not counters["graph_break"]


def test_named_layers_compile_with_fullgraph():
    model, x = build("fused")
    with capture_attention(model, "layers.0") as capture:
        torch.compile(model, backend="aot_eager", fullgraph=True)(x)
        assert capture.pop().query.shape == (3, 2, 5, 8)


def test_every_record_of_several_layers_and_forwards_arrives():
    model, x = build("fused")
    with capture_attention(model, "layers.*") as capture:
        compiled = torch.compile(model, backend="aot_eager")
        compiled(x)
        compiled(x + 1)
        records = capture.pop_all()
    assert [record.layer for record in records] == ["layers.0", "layers.1"] * 2
    assert not torch.equal(records[0].scores, records[2].scores)


@pytest.mark.parametrize("layers", [-1, "layers.1"])
def test_a_compiled_training_step_around_the_model_is_captured(layers):
    model, x = build("fused")
    with capture_attention(model, layers) as capture:
        model(x)
        expected = capture.pop().scores
    with capture_attention(model, layers) as capture:
        step = torch.compile(lambda x: model(x).square().mean(), backend="aot_eager")
        for _ in range(3):
            loss = step(x)
            record = capture.pop()
            torch.testing.assert_close(record.scores, expected)
            (loss + record.scores.mean()).backward()


@pytest.mark.parametrize("layers", [-1, "layers.1"])
def test_capture_after_the_first_compiled_run_says_so(layers):
    model, x = build("fused")
    compiled = torch.compile(model, backend="aot_eager")
    compiled(x)
    with capture_attention(compiled, layers) as capture:
        if layers == -1:
            compiled(x)  # the layer is found in a pass that runs uncompiled
            capture.pop()
        compiled(x)
        with pytest.raises(RuntimeError, match="before the first compiled run"):
            capture.pop()
        torch._dynamo.reset()
        compiled(x)
        assert capture.pop().layer == "layers.1"


def test_compiled_validation_records_nothing_and_training_goes_on():
    model, x = build("fused")
    with capture_attention(model, "layers.1") as capture:
        compiled = torch.compile(model, backend="aot_eager")
        with torch.no_grad():
            compiled(x)
            with pytest.raises(RuntimeError, match="gradients off"):
                capture.pop()
        compiled(x)
        assert capture.pop().requires_grad


def test_after_close_compiled_code_keeps_nothing():
    model, x = build("fused")
    capture = capture_attention(model, "layers.1")
    compiled = torch.compile(model, backend="aot_eager")
    compiled(x)
    slot = capture._watches[0].compiled
    capture.close()
    assert torch.equal(compiled(x), model(x))
    assert slot.slot == ()
    assert hook_count(model) == 0
