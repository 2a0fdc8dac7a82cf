"""Capture on 39 real models as they come and in eager mode: values, gradients, and outputs that stay the same."""

import warnings

import pytest
import torch
from torch import Tensor, nn

from attncongruence.capture import CapturedAttention, capture_attention
from tests.zoo import CASES, Case, each, needs, run

# Libraries warn about their own defaults when tiny random models are built and run.
pytestmark = pytest.mark.filterwarnings("ignore")


def tensors(output: object) -> list[Tensor]:
    """All tensors of a model's output, in order."""
    if isinstance(output, Tensor):
        return [output]
    if hasattr(output, "values"):
        output = list(output.values())
    return [t for part in output for t in tensors(part)] if isinstance(output, list | tuple) else []


def capture(case: Case, model: nn.Module, inputs: dict) -> tuple[dict[str, CapturedAttention], object]:
    """One forward pass with all the layers of a case captured by name."""
    with capture_attention(model, sorted({layer.path for layer in case.layers.values()})) as captured:
        output = run(model, inputs)
        records = captured.pop_all()
    found = {}
    for role, layer in case.layers.items():
        found[role] = [record for record in records if record.layer == layer.path][layer.number]
    return found, output


def gradients(model: nn.Module, probabilities: dict[str, Tensor], case: Case, inputs: dict) -> dict[str, Tensor | None]:
    """Of a random linear function of the probabilities in rows of real tokens."""
    loss = torch.zeros(())
    for role, probs in sorted(probabilities.items()):
        generator = torch.Generator().manual_seed(5)
        pull = (
            torch.randn(probs.shape, generator=generator) * case.real_rows(role, inputs, probs.shape)[:, None, :, None]
        )
        loss = loss + (probs * pull).sum()
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return dict(zip(named, torch.autograd.grad(loss, list(named.values()), allow_unused=True), strict=True))


@pytest.mark.parametrize("name", each(CASES, reference=True))
def test_probabilities_and_gradients_are_those_of_eager_attention(name):
    case = CASES[name]
    model, inputs = case.build()
    twin, expected = case.reference(model, inputs)
    plain = tensors(run(model, inputs))

    captured, output = capture(case, model, inputs)
    assert len(plain) > 0
    assert all(torch.equal(a, b) for a, b in zip(plain, tensors(output), strict=True))
    for role, record in captured.items():
        rows = case.real_rows(role, inputs, record.scores.shape)
        close(record.probs.transpose(1, 2)[rows], expected[role].transpose(1, 2)[rows])
        check_record(record, offered=role not in case.opaque)
    check_gradients(
        gradients(model, {role: record.probs for role, record in captured.items()}, case, inputs),
        gradients(twin, expected, case, inputs),
        captured.values(),
    )

    eager = case.eager(model)
    if eager is not None:
        for role, record in capture(case, eager, inputs)[0].items():
            rows = case.real_rows(role, inputs, record.scores.shape)
            close(record.probs.transpose(1, 2)[rows], expected[role].transpose(1, 2)[rows])


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert (ours.sum(-1) - 1).abs().max() < 1e-5


def check_record(record: CapturedAttention, *, offered: bool) -> None:
    """Masked pairs are -inf and nothing else is; q and k give the scores wherever they are offered."""
    scores = record.scores
    allowed = (
        torch.ones_like(scores, dtype=torch.bool) if record.allowed is None else record.allowed.expand(scores.shape)
    )
    assert torch.equal(scores == -torch.inf, ~allowed)
    assert torch.isfinite(scores[allowed]).all()
    assert (record.query is not None) == (record.key is not None) == offered
    if record.query is not None:
        product = record.scale * record.query @ record.key.transpose(-1, -2)
        torch.testing.assert_close(product[allowed], scores[allowed], rtol=1e-5, atol=1e-5)


def check_gradients(ours: dict, theirs: dict, records: object) -> None:
    size = max(float(grad.abs().max()) for grad in theirs.values() if grad is not None)
    for name, their in theirs.items():
        # One path may leave out what the other gives an exact zero (a key bias moves no softmax).
        our = torch.zeros(()) if ours[name] is None else ours[name]
        their = torch.zeros(()) if their is None else their
        assert (our - their).abs().max() < 1e-4 * size, name
    for record in records:
        own = [grad for name, grad in ours.items() if name.startswith(f"{record.layer}.") and name.endswith("weight")]
        assert sum(grad is not None and bool(grad.any()) for grad in own) >= 1, record.layer


@pytest.mark.parametrize("name", each(name for name, case in CASES.items() if case.last and "S" in case.layers))
def test_the_last_self_attention_is_found_and_kept(name):
    case = CASES[name]
    model, inputs = case.build()
    with warnings.catch_warnings(), capture_attention(model) as captured:
        warnings.filterwarnings("error", ".*AttentionBlocks.from_streams")  # not for a sequence that holds both
        run(model, inputs)
        found = captured.pop()
        run(model, inputs)
        again = captured.pop()
    assert found.layer == again.layer == case.layers["S"].path
    assert torch.equal(found.scores, again.scores)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules() if not kept(module))


def kept(module: nn.Module) -> bool:
    """Hooks that a library put there itself."""
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    return all("attncongruence" not in type(hook).__module__ for hook in hooks)


@needs("timm_fused")
def test_no_warning_comes_from_capture():
    model, inputs = CASES["timm_fused"].build()

    def warned() -> list[str]:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            run(model, inputs)
        return [str(warning.message) for warning in seen]

    before = warned()  # what the libraries say by themselves
    with capture_attention(model) as captured:
        for _ in range(2):
            assert warned() == before
            captured.pop()
