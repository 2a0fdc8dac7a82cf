"""Samples and heads are told apart by where their axes come from: folds, loops, channels, compiled code."""

import copy
import itertools
import random

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from attncongruence.capture import CapturedAttention, capture_attention

# Sizes that agree by chance: batch = heads, batch = length, heads = length, and none.
SIZES = [(3, 3, 5), (4, 2, 4), (2, 4, 4), (2, 3, 5), (1, 3, 3), (3, 1, 3)]
D = 4


class Attention(nn.Module):
    """Two projections, a split into `(batch, heads, length, D)` and an attention as the test wants it."""

    def __init__(self, heads: int, way, split=None) -> None:
        super().__init__()
        self.heads, self.way, self.split = heads, way, split or view
        self.q, self.k = nn.Linear(heads * D, heads * D), nn.Linear(heads * D, heads * D)

    def forward(self, x: Tensor) -> Tensor:
        return self.way(self.split(self.q(x), self.heads), self.split(self.k(x), self.heads))

    def expected(self, x: Tensor) -> Tensor:
        q, k = view(self.q(x), self.heads), view(self.k(x), self.heads)
        return q @ k.mT


def view(t: Tensor, heads: int) -> Tensor:
    return t.view(*t.shape[:2], heads, D).transpose(1, 2)


def fold(q: Tensor, k: Tensor) -> Tensor:
    return torch.bmm(q.flatten(0, 1), k.flatten(0, 1).mT).softmax(-1)


def fold_heads_first(q: Tensor, k: Tensor) -> Tensor:
    return fold(q.transpose(0, 1), k.transpose(0, 1))


def heads_first(q: Tensor, k: Tensor) -> Tensor:
    return (q.transpose(0, 1) @ k.transpose(0, 1).mT).softmax(-1)


def fold_scores(q: Tensor, k: Tensor) -> Tensor:
    return torch.softmax((q @ k.mT).transpose(0, 1).flatten(0, 1), -1)


def fairseq(q: Tensor, k: Tensor) -> Tensor:
    q, k = (t.permute(2, 0, 1, 3).flatten(1, 2).transpose(0, 1) for t in (q, k))
    return torch.softmax(torch.bmm(q, k.transpose(1, 2)), -1)


def five_axes(q: Tensor, k: Tensor) -> Tensor:
    return (q.unflatten(1, (1, -1)) @ k.unflatten(1, (1, -1)).mT).softmax(-1)


def equation(q: Tensor, k: Tensor) -> Tensor:
    return torch.einsum("...jd,...id->...ij", k.transpose(0, 1), q.transpose(0, 1)).softmax(-1)


def over_heads(q: Tensor, k: Tensor) -> Tensor:
    return torch.stack([(q[:, h] @ k[:, h].mT).softmax(-1) for h in range(q.shape[1])])


def over_samples(q: Tensor, k: Tensor) -> Tensor:
    return torch.stack([(one @ other.mT).softmax(-1) for one, other in zip(q, k, strict=True)])


def over_heads_fused(q: Tensor, k: Tensor) -> Tensor:
    sdpa = nn.functional.scaled_dot_product_attention
    return torch.stack([sdpa(a, b, b, scale=1.0) for a, b in zip(q.unbind(1), k.unbind(1), strict=True)])


def chunks(t: Tensor, heads: int) -> Tensor:
    return torch.stack(t.chunk(heads, -1), 1)


def split_cat(t: Tensor, heads: int) -> Tensor:
    return torch.cat(t.split(D, -1), 0).view(heads, *t.shape[:2], D).transpose(0, 1)


WAYS = (fold, fold_heads_first, heads_first, fold_scores, fairseq, five_axes, equation)
LOOPS = (over_heads, over_samples, over_heads_fused)


def captured(model: nn.Module, *inputs: Tensor, layers: object = None) -> CapturedAttention:
    with capture_attention(model, model if layers is None else layers) as capture:
        model(*inputs)
        return capture.pop()


def check(record: CapturedAttention, expected: Tensor, weight: Tensor) -> None:
    """Values and gradient, of the scores and of what queries and keys make of them."""
    torch.testing.assert_close(record.scores, expected)
    pull = torch.linspace(-1, 1, expected.numel()).view(expected.shape)
    found = [record.scores]
    if record.query is not None:
        assert record.query.shape == (*expected.shape[:3], D)
        found.append(record.scale * record.query @ record.key.mT)
    (theirs,) = torch.autograd.grad((expected * pull).sum(), weight, retain_graph=True)
    for ours in found:
        torch.testing.assert_close(ours, expected)
        (mine,) = torch.autograd.grad((ours * pull).sum(), weight, retain_graph=True)
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("split", [view, chunks, split_cat])
@pytest.mark.parametrize("way", [*WAYS, *LOOPS])
def test_samples_and_heads_whatever_their_order(way, split):
    for batch, heads, length in SIZES:
        torch.manual_seed(0)
        model, x = Attention(heads, way, split), torch.randn(batch, length, heads * D)
        for layers in (model, -1):
            check(captured(model, x, layers=layers), model.expected(x), model.q.weight)


def test_two_modules_whose_folds_have_the_same_size():
    torch.manual_seed(0)
    model = nn.ModuleList([Attention(2, fold), Attention(3, fold_heads_first)])
    wide, narrow = torch.randn(3, 5, 2 * D), torch.randn(2, 5, 3 * D)
    model.forward = lambda: (model[0](wide), model[1](narrow))
    with capture_attention(model, ["0", "1"]) as capture:
        for _ in range(2):
            model()
            records = capture.pop_all()
            check(records[0], model[0].expected(wide), model[0].q.weight)
            check(records[1], model[1].expected(narrow), model[1].q.weight)


def test_each_mask_is_unfolded_like_the_scores_that_it_was_added_to():
    for batch, heads, length in SIZES:
        torch.manual_seed(0)
        alibi = torch.randn(heads, 1, length)
        hidden = torch.rand(batch, 1, 1, length) < 0.3
        hidden[..., 0] = False

        def way(q, k, alibi=alibi, hidden=hidden):
            b, h, n, _ = q.shape
            scores = torch.bmm(q.transpose(0, 1).flatten(0, 1), k.transpose(0, 1).flatten(0, 1).mT)
            scores = scores.view(h, b, n, n) + alibi[:, None]
            scores = scores.flatten(0, 1).masked_fill(hidden.expand(b, h, n, n).transpose(0, 1).flatten(0, 1), -1e9)
            return scores.softmax(-1)

        model, x = Attention(heads, way), torch.randn(batch, length, heads * D)
        expected = (model.expected(x) + alibi[None]).masked_fill(hidden, -torch.inf)
        torch.testing.assert_close(captured(model, x).scores, expected)


def test_random_modules_are_right():
    generator = random.Random(0)
    for _ in range(60):
        batch, heads, length = (generator.randint(1, 4) for _ in range(3))
        way, split = generator.choice([*WAYS, *LOOPS]), generator.choice([view, chunks, split_cat])
        model, x = Attention(heads, way, split), torch.randn(batch, length, heads * D)
        torch.testing.assert_close(captured(model, x).scores, model.expected(x), msg=str((way, split, x.shape)))


class Grouped(nn.Module):
    """Five axes: batch, groups, heads of a group, length, length."""

    def __init__(self, equation: str = "") -> None:
        super().__init__()
        self.q, self.k, self.equation = nn.Linear(24, 24), nn.Linear(24, 8), equation

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.q(x).unflatten(-1, (2, 3, D)).permute(0, 2, 3, 1, 4), self.k(x).unflatten(-1, (2, D)).transpose(
            1, 2
        )

    def forward(self, x: Tensor) -> Tensor:
        q, k = self.parts(x)
        if self.equation:
            return torch.einsum(self.equation, q, k).softmax(-1)
        return (q @ k[:, :, None].mT).softmax(-1)


@pytest.mark.parametrize("equation", ["", "bgrid,bgjd->bgrij"])
def test_grouped_queries_with_five_axes_have_groups_times_heads(equation):
    model, x = Grouped(equation), torch.randn(2, 5, 24)
    q, k = model.parts(x)
    check(captured(model, x), (q @ k[:, :, None].mT).flatten(1, 2), model.q.weight)


class Channels(Attention):
    """XCA: each head attends over its channels."""

    def forward(self, x: Tensor) -> Tensor:
        q, k = (view(t, self.heads).mT for t in (self.q(x), self.k(x)))
        return (q @ k.mT).softmax(-1)


class LinearAttention(Attention):
    """Queries and keys are each made a distribution, and no token meets another."""

    def forward(self, x: Tensor) -> Tensor:
        q, k = (view(t, self.heads) for t in (self.q(x), self.k(x)))
        return q.softmax(-1) @ (k.mT.softmax(-1) @ k)


@pytest.mark.parametrize("length", [D, 5])
def test_attention_over_channels_is_none_over_tokens(length):
    model, x = nn.Sequential(Channels(2, None)), torch.randn(3, length, 2 * D)
    with pytest.raises(RuntimeError, match="attends over channels, not tokens"):
        captured(model, x, layers="0")
    with pytest.raises(RuntimeError, match="nothing was captured"):
        captured(model, x, layers=-1)


@pytest.mark.parametrize("layers", ["0", -1])
@pytest.mark.parametrize("length", [D, 5])
def test_linear_attention_is_named_and_never_captured(length, layers):
    model, x = nn.Sequential(LinearAttention(2, None)), torch.randn(3, length, 2 * D)
    with pytest.raises(RuntimeError, match=r"nothing was captured.*linear attention"):
        captured(model, x, layers=layers)


@pytest.mark.parametrize(
    "scale", [torch.tensor(0.5), nn.Parameter(torch.tensor([0.5])), nn.Parameter(torch.zeros(())).exp()]
)
def test_a_tensor_on_the_left_of_the_queries_is_no_other_sequence(scale):
    class Scaled(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return ((scale * x) @ x.mT).softmax(-1)

    model, x = nn.Sequential(Scaled(), nn.Identity()), torch.randn(2, 5, D, requires_grad=True)
    torch.testing.assert_close(captured(model, x, layers=-1).scores[:, 0], (scale * x) @ x.mT)


class Outer(nn.Module):
    """Folds batch and heads outside of the module that attends."""

    class Core(nn.Module):
        def forward(self, q: Tensor, k: Tensor) -> Tensor:
            return torch.bmm(q, k.mT).softmax(-1)

    def __init__(self) -> None:
        super().__init__()
        self.qk, self.core = nn.Linear(8, 16), Outer.Core()

    def forward(self, x: Tensor) -> Tensor:
        return self.core(*(view(t, 2).flatten(0, 1) for t in self.qk(x).chunk(2, -1)))


def test_a_fold_made_outside_is_refused_with_the_remedy():
    model, x = Outer(), torch.randn(3, 5, 8)
    with pytest.raises(RuntimeError, match=r"core has scores .*\(6 x 5 x 5\). Capture the module around it"):
        captured(model, x, layers="core")
    q, k = (view(t, 2) for t in model.qk(x).chunk(2, -1))
    check(captured(model, x), q @ k.mT, model.qk.weight)


class PerHead(nn.Module):
    """Each head has projections of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = (nn.ModuleList([nn.Linear(8, D) for _ in range(3)]) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return sum((q(x) @ k(x).mT).softmax(-1) for q, k in zip(self.q, self.k, strict=True))


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_heads_with_projections_of_their_own_are_one_record(batch):
    model, x = PerHead(), torch.randn(batch, 5, 8)
    expected = torch.stack([q(x) @ k(x).mT for q, k in zip(model.q, model.k, strict=True)], 1)
    check(captured(model, x), expected, model.q[0].weight)


@pytest.mark.parametrize("size", [1, 2])
def test_chunks_of_queries_are_no_samples(size):
    model = Attention(2, lambda q, k: torch.cat([(part @ k.mT).softmax(-1) for part in q.split(size, 2)], 2))
    with capture_attention(model, model) as capture:
        model(torch.randn(3, 6, 8))
        with pytest.raises(RuntimeError, match=f"but {6 // size} wait"):
            capture.pop()
        assert {record.shape for record in capture.pop_all()} == {(3, 2, size, 6)}


def test_a_fold_whose_order_was_lost_is_refused():
    model = Attention(2, lambda q, k: fold_scores(q.flatten(0, 1).flip(0)[:, None], k.flatten(0, 1).flip(0)[:, None]))
    with pytest.raises(RuntimeError, match="cannot be told apart"):
        captured(model, torch.randn(3, 5, 8))


def test_a_shared_module_called_twice_gives_two_records_in_order():
    torch.manual_seed(0)
    layer, x = Attention(2, over_heads), torch.randn(3, 5, 8)
    model = nn.ModuleList([layer])
    model.forward = lambda: (layer(x), layer(x + 1))
    with capture_attention(model, "0") as capture:
        model()
        first, second = capture.pop_all()
    torch.testing.assert_close(first.scores, layer.expected(x))
    torch.testing.assert_close(second.scores, layer.expected(x + 1))


def test_layers_in_a_loop_stay_apart():
    model = nn.ModuleList([Attention(2, lambda q, k: q + (q @ k.mT).softmax(-1) @ k) for _ in range(2)])
    x = torch.randn(3, 5, 8)

    def run() -> Tensor:
        y = x
        for layer in model:
            y = layer(y).transpose(1, 2).flatten(2)
        return y

    model.forward = run
    with capture_attention(model, model) as capture:
        model()
        records = capture.pop_all()
    assert [record.shape for record in records] == [(3, 2, 5, 5)] * 2
    torch.testing.assert_close(records[0].scores, model[0].expected(x))


@pytest.fixture
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("layers", ["0", -1])
def test_compiled_multihead_attention_with_weights_is_right_in_every_step(layers):
    torch.manual_seed(0)

    class Torch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.add_module("0", nn.MultiheadAttention(16, 4, batch_first=True))

        def forward(self, x: Tensor) -> Tensor:
            return self.get_submodule("0")(x, x, x)[0]

    model, plain = Torch(), Torch()
    plain.load_state_dict(model.state_dict())
    counter, alone = CompileCounterWithBackend("aot_eager"), CompileCounterWithBackend("aot_eager")
    bare = torch.compile(copy.deepcopy(model), backend=alone, dynamic=True)
    with capture_attention(model, layers) as capture, capture_attention(plain, layers) as eager:
        if layers == "0":  # an uncompiled pass, which layers by number have of themselves
            model(torch.randn(3, 4, 16))
            capture.pop()
        compiled = torch.compile(model, backend=counter, dynamic=True)
        for batch, length in ((2, 4), (4, 4), (3, 5), (2, 7)):
            x = torch.randn(batch, length, 16)
            compiled(x)
            plain(x)
            bare(x)
            ours, theirs = capture.pop(), eager.pop()
            assert ours.shape == (batch, 4, length, length)
            torch.testing.assert_close(ours.scores, theirs.scores)
    assert counter.frame_count <= alone.frame_count + (layers == "0")


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("way", [fold, fold_heads_first, heads_first, fold_scores])
def test_compiled_folds_are_read_by_the_pass_that_was_followed(way):
    torch.manual_seed(0)
    model = Attention(2, lambda q, k: way(q, k) * q.flatten(0, 1).softmax(-1).mean())  # beside it a gate
    with capture_attention(model, model) as capture:
        model(torch.randn(3, 4, 2 * D))  # the pass that is followed
        capture.pop()
        compiled = torch.compile(model, backend="aot_eager")
        for batch, length in itertools.product((2, 3), (3, 5)):
            x = torch.randn(batch, length, 2 * D)
            compiled(x)
            torch.testing.assert_close(capture.pop().scores, model.expected(x))
            if batch == 2:
                assert capture._watches[0].compiled.plan is not None


@pytest.mark.usefixtures("_fresh_compiler")
def test_compiled_code_that_calls_something_else_is_refused():
    class Either(Attention):
        twice = False

        def forward(self, x: Tensor) -> Tensor:
            out = super().forward(x)
            return out + x.softmax(-1).mean() if self.twice else out

    model, x = Either(2, fold), torch.randn(3, 5, 2 * D)
    with capture_attention(model, model) as capture:
        compiled = torch.compile(model, backend="aot_eager")
        compiled(x)
        torch.testing.assert_close(capture.pop().scores, model.expected(x))
        model.twice = True
        compiled(x)
        with pytest.raises(RuntimeError, match="another number of times"):
            capture.pop_all()
