"""A pass inside a pass: negatives ranked with gradients off, and modules that call themselves."""

import contextlib
import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.overrides import _get_current_function_mode_stack
from torch.utils.checkpoint import checkpoint

from attncongruence import CACRLoss, regularize
from attncongruence.capture import capture_attention
from tests.helpers.models import Attention, Stack, hook_count


class Ranking(nn.Module):
    """Ranks negatives with gradients off inside its forward, as UNITER, CACR and IAIS do, and then trains."""

    def __init__(self, rank: str = "", saves: bool = False, fused: bool = True) -> None:
        super().__init__()
        self.encoder, self.rank, self.saves = Stack(2, fused=fused), rank, saves

    def encode(self, x: Tensor) -> Tensor:
        return checkpoint(self.encoder, x, use_reentrant=False) if self.saves else self.encoder(x)

    def negatives(self, x: Tensor) -> None:
        batch = torch.cat([x, x.flip(0), x.flip(1)])
        with torch.no_grad():
            if self.rank.startswith("part"):
                self.encode(batch)
            elif self.rank.startswith("layer"):
                self.encoder.layers[1](batch)
            elif self.rank.startswith("self"):
                self(batch, rank=False)
            elif self.rank.startswith("method"):
                self.forward(batch, rank=False)
            elif self.rank.startswith("eval"):
                self.eval()
                self(batch, rank=False)
                self.train()
            elif self.rank.startswith("inference"):
                with torch.inference_mode():
                    self.encode(batch.clone())
                    self(batch.clone(), rank=False)
            elif self.rank.startswith("caught"):
                with contextlib.suppress(RuntimeError):
                    self(batch[..., :3], rank=False)  # a wrong width

    def forward(self, x: Tensor, rank: bool = True) -> dict[str, Tensor]:
        if rank and "after" not in self.rank:
            self.negatives(x)
        hidden = self.encode(x)
        if rank and ("after" in self.rank or "both" in self.rank):
            self.negatives(x)
        return {"loss": hidden.square().mean()}


KINDS = ("part", "layer", "self", "method", "eval", "inference", "caught")
RANKS = [f"{kind} {when}" for kind in KINDS for when in ("before", "after", "both")]
LAYERS = [-1, 0, [0, -1], "encoder.layers.1", "encoder", ""]


def inputs(step: int) -> Tensor:
    return torch.randn(3, 6, 16, generator=torch.Generator().manual_seed(step))


def steps(model: nn.Module, layers: object, wrap=lambda model: model) -> list[tuple[str, Tensor, Tensor]]:
    """What is captured in three steps: names, scores, and their gradients."""
    found, weight = [], model.encoder.layers[0].qkv.weight
    with capture_attention(model, layers) as capture:
        wrapped = wrap(model)
        for step in range(3):
            wrapped(inputs(step))
            for record in capture.pop_all():
                (grad,) = torch.autograd.grad(record.scores.square().sum(), weight, retain_graph=True)
                found.append((record.layer, record.scores.detach(), grad))
            assert _get_current_function_mode_stack() == []
    assert hook_count(model) == 0
    return found


def same(ours: list[tuple[str, Tensor, Tensor]], theirs: list[tuple[str, Tensor, Tensor]]) -> None:
    assert [name for name, *_ in ours] == [name for name, *_ in theirs]
    for (_, *our), (_, *their) in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our, their, rtol=0, atol=0)


def ranking(rank: str, saves: bool = False, fused: bool = True) -> Ranking:
    torch.manual_seed(0)
    return Ranking(rank, saves, fused)


@pytest.mark.parametrize("layers", LAYERS, ids=str)
@pytest.mark.parametrize("rank", RANKS)
def test_only_the_pass_with_gradients_is_recorded_in_every_step(rank, layers):
    same(steps(ranking(rank), layers), steps(ranking(""), layers))


@pytest.mark.parametrize(
    ("rank", "layers"), [("self both", -1), ("part before", 0), ("eval after", "encoder.layers.1")]
)
@pytest.mark.parametrize("fused", [True, False])
def test_likewise_with_checkpointing(rank, layers, fused):
    same(steps(ranking(rank, True, fused), layers), steps(ranking("", True, fused), layers))


def test_likewise_in_ddp(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        for rank in ("self before", "part both", "method after"):
            same(steps(ranking(rank), -1, DistributedDataParallel), steps(ranking(""), -1))
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("rank", RANKS)
def test_a_regularized_model_that_ranks_trains_as_if_it_did_not(rank):
    runs = []
    for name in (rank, ""):
        model = ranking(name)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        with regularize(model, CACRLoss(), 2, weight=100.0) as regularizer:
            for step in range(3):
                model(inputs(step))["loss"].backward()
                runs.append(regularizer.last.congruence)
                optimizer.step()
                optimizer.zero_grad()
        runs += [p.detach() for p in model.parameters()]
    half = len(runs) // 2
    torch.testing.assert_close(runs[:half], runs[half:], rtol=0, atol=0)
    assert all(value > 0 for value in runs[:3])


@pytest.mark.parametrize(
    ("rank", "layers"), [("self before", -1), ("part after", 0), ("part both", "encoder.layers.1"), ("layer both", "")]
)
def test_likewise_in_compiled_code(rank, layers):
    torch._dynamo.reset()
    compiled = steps(ranking(rank), layers, lambda model: torch.compile(model, backend="aot_eager"))
    torch._dynamo.reset()
    for (name, scores, _), (plain, expected, _) in zip(compiled, steps(ranking(""), layers), strict=True):
        assert name == plain
        torch.testing.assert_close(scores, expected)


def test_for_analysis_all_that_runs_is_recorded_and_counted():
    model = ranking("self before")
    with capture_attention(model, [0, -1], analysis=True) as capture:
        for step in range(2):
            model(inputs(step))
            assert [record.batch_size for record in capture.pop_all()] == [9, 3]


def test_what_ranks_and_never_trains_is_said_to_run_with_gradients_off():
    class OnlyRanks(Ranking):
        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                return self.encoder(x)

    model = OnlyRanks()
    for layers in (-1, "encoder.layers.0"):
        with capture_attention(model, layers) as capture:
            for step in range(2):
                model(inputs(step))
                with pytest.raises(RuntimeError, match=r"ran with gradients off.*inside a no_grad\(\) block"):
                    capture.pop()


class Towers(nn.Module):
    """A vision tower, and a decoder that is checkpointed in the way that gives its layers no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.vision, self.decoder = Stack(1), Stack(1)

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.decoder, self.vision(x), use_reentrant=True)


@pytest.mark.parametrize("layers", [-1, "decoder.layers.0", ["vision.layers.0", "decoder.layers.0"]], ids=str)
def test_reentrant_checkpointing_of_the_last_layer_does_not_move_the_choice_to_another_one(layers):
    model = Towers()
    with capture_attention(model, layers) as capture:
        for step in range(2):
            model(inputs(step))
            with pytest.raises(
                RuntimeError, match=r"decoder.layers.0 was captured without gradient.*use_reentrant=False"
            ):
                capture.pop_all()


class Recursive(Attention):
    """Calls itself `depth` times more, on another input each time."""

    depth, catches = 2, False

    def forward(self, x: Tensor, depth: int | None = None) -> Tensor:
        depth = self.depth if depth is None else depth
        if depth % 2 == 0:
            x = x + super().forward(x)
        if depth:
            inner = x[:, : x.shape[1] - 1]
            try:
                x = x + nn.functional.pad(self(inner, depth - 1), (0, 0, 0, 1))
            except (ValueError, KeyboardInterrupt):
                if not self.catches:
                    raise
        if depth % 2:
            x = x + super().forward(x)
        return x


class Around(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)


def by_hand(layer: Recursive, x: Tensor) -> list[Tensor]:
    """The scores of each of its calls, in order of execution."""
    found = []

    def attend(self: Attention, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (2, 8)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        found.append((q @ k.mT / 8**0.5).detach())
        return (found[-1].softmax(-1) @ v).transpose(1, 2).flatten(2)

    twin = copy.deepcopy(layer)
    original, Attention.forward = Attention.forward, attend
    try:
        twin(x)
    finally:
        Attention.forward = original
    return found


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("around", [False, True])
@pytest.mark.parametrize("fused", [True, False])
def test_a_module_that_calls_itself_is_recorded_at_each_depth(depth, around, fused):
    block = Recursive(fused)
    block.depth = depth
    model, name = (Around(block), "block") if around else (block, "")
    for layers in (name, list(range(depth + 1)), "*"):
        with capture_attention(model, layers) as capture:
            for step in range(3):
                model(inputs(step))
                expected = by_hand(block, inputs(step))
                records = [record for record in capture.pop_all() if record.layer == name]
                if layers == "*" and not around:
                    records = records[: depth + 1]
                torch.testing.assert_close([r.scores.detach() for r in records[-depth - 1 :]], expected)
                assert len(expected) == depth + 1


@pytest.mark.parametrize("layers", [-1, "", 0])
def test_the_numbers_of_calls_are_the_same_in_every_step(layers):
    block = Recursive()
    with capture_attention(block, layers) as capture:
        for step in range(3):
            block(inputs(step))
            expected = by_hand(block, inputs(step))
            if layers == "":
                assert len(capture.pop_all()) == 3
            else:
                torch.testing.assert_close(capture.pop().scores, expected[layers])


class Trouble(Recursive):
    error: BaseException | None = None

    def forward(self, x: Tensor, depth: int | None = None) -> Tensor:
        if depth == 0 and self.error is not None:
            raise self.error
        return super().forward(x, depth)


@pytest.mark.parametrize("error", [ValueError("mine"), KeyboardInterrupt()])
@pytest.mark.parametrize("catches", [True, False])
@pytest.mark.parametrize("layers", ["", [0, 1], "block", -1])
def test_what_an_inner_call_did_does_not_count_if_it_raised(error, catches, layers):
    block = Trouble()
    block.catches = catches
    block.depth = 1
    model = Around(block) if layers == "block" else block
    with capture_attention(model, layers) as capture:
        if layers == -1:
            model(inputs(9))  # which of the calls is meant is found here
        for step in range(3):
            block.error = error
            with contextlib.nullcontext() if catches else pytest.raises(type(error)):
                model(inputs(step))
            capture.forget()
            block.error = None
            model(inputs(step + 1))
            assert _get_current_function_mode_stack() == []
            records, expected = capture.pop_all(), by_hand(block, inputs(step + 1))
            expected = expected[-1:] if layers == -1 else expected
            torch.testing.assert_close([r.scores.detach() for r in records], expected)
    assert hook_count(model) == 0


def test_validation_that_was_interrupted_does_not_cost_the_next_step_its_record():
    model = Stack()
    with capture_attention(model, "layers.0") as capture:
        model.layers[1].trouble = KeyboardInterrupt()
        with torch.no_grad(), pytest.raises(KeyboardInterrupt):
            model(inputs(0))
        model.layers[1].trouble = None
        model(inputs(1))
        assert capture.pop().lengths == (6, 6)
