"""The losses through the GPU kernels: on a card if there is one, else in Triton's interpreter on CPU."""

import pytest
import torch

from attncongruence import QueryKey
from attncongruence.streaming import low_rank, low_rank_kernels, map_kernels, mean_map, per_sample
from tests.helpers.problems import CASES, DIRECTIONS, assert_close, fast, make_problem, pairwise, randn


@pytest.fixture
def device(monkeypatch):
    """Where the kernels run, and small chunks, so that there are several."""
    monkeypatch.setattr(map_kernels, "cache_bytes", lambda device: 800)
    if torch.cuda.is_available():
        return "cuda"
    for module in (low_rank, mean_map, per_sample):
        monkeypatch.setattr(module, "has_kernels", low_rank_kernels.supported)
    return "cpu"


def value_and_grads(loss, *inputs):
    inputs = [x.detach().requires_grad_() for x in inputs]
    value = loss(QueryKey(*inputs, 0.8))
    weights = torch.linspace(1.0, 2.0, value.numel(), dtype=value.dtype, device=value.device)
    return [x.detach().double().cpu() for x in (value, *torch.autograd.grad((value * weights).sum(), inputs))]


@pytest.mark.parametrize(
    ("name", "convention", "direction", "kind"),
    [(*case, *rest) for case, *rest in pairwise(CASES, DIRECTIONS, ("interleaved", "int"))],
)
def test_kernels_are_dense(name, convention, direction, kind, device, monkeypatch):
    used = []
    for module in (low_rank_kernels, map_kernels):
        monkeypatch.setattr(
            module,
            "launch",
            lambda kernel, *x, f=module.launch, **o: used.append(kernel.__name__) or f(kernel, *x, **o),
        )
    problem = make_problem(kind, 4, seed=7, batch=3, n=4, m=7)
    q, k = (randn(3, 2, 11, 5, seed=seed) for seed in (0, 1))
    n_text, mask = problem.n_text, problem.mask

    def loss(source, impl):
        where = n_text if isinstance(n_text, int) else n_text.to(source.query.device)
        return fast(
            name,
            source,
            where,
            mask=None if mask is None else mask.to(source.query.device),
            convention=convention,
            direction=direction,
            reduction="none",
            impl=impl,
        )

    exact = value_and_grads(lambda s: loss(s, "dense"), q, k)
    ours = value_and_grads(lambda s: loss(s, "streaming"), q.float().to(device), k.float().to(device))
    for a, b in zip(ours, exact, strict=True):
        assert_close(a, b, 2e-5)
    # IAIS under RELEASED takes T itself as a distribution: log T is worked out in torch, also on a card.
    if convention != "RELEASED":
        assert used == ["_statistics", "_gradients", "_gradients"] * (2 if direction == "both" else 1)
    elif name == "cacr":
        assert {"_logsumexp_kernel", "_mean_kernel", "_grad_q_kernel", "_grad_k_kernel"} == set(used)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "convention"), CASES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_errs_no_more_than_half_scores_do(name, convention, dtype, device, monkeypatch):
    monkeypatch.setattr(map_kernels, "cache_bytes", lambda device: 10**5)
    q, k = (randn(16, 1, 17, 16, seed=seed) for seed in (0, 1))
    half = [x.to(dtype) for x in (q, k)]

    def loss(source, impl="dense"):
        return fast(name, source, 6, convention=convention, reduction="none", impl=impl)

    exact = value_and_grads(loss, q, k)
    # What an eager model's dense form sees: scores that were computed from half, and rounded to half.
    rounded = loss((0.8 * half[0].double() @ half[1].double().mT).to(dtype))
    ours = value_and_grads(lambda s: loss(s, "streaming"), *(x.to(device) for x in half))
    assert (ours[0] - exact[0]).norm() <= 1.5 * (rounded - exact[0]).norm()
    exact_on_half = value_and_grads(loss, *half)
    for a, b in zip(ours[1:], exact_on_half[1:], strict=True):
        assert torch.isfinite(a).all()
        assert (a - b).norm() <= 0.05 * b.norm()


def test_float64_takes_no_kernel(device):
    q = torch.zeros(1, 1, 4, 4, dtype=torch.float64, device=device)
    assert not low_rank_kernels.supported(q)
