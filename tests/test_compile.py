"""`torch.compile` and `torch.func`, on every PyTorch from 2.6 on: one graph, the same values and gradients."""

import itertools

import pytest
import torch
import torch._dynamo.testing
from packaging.version import Version

from attncongruence import PRINTED, RELEASED, WEIGHTED_MEAN, QueryKey, TokenLayout, cacr_loss
from tests.helpers.problems import CASES, LOSSES, assert_close, fast, make_problem, randn

IMPLS = ("dense", "streaming")
KINDS = ("int", "ragged", "interleaved")
every_case = pytest.mark.parametrize(("name", "convention"), CASES)
every_impl = pytest.mark.parametrize("impl", IMPLS)
# PyTorch 2.6 makes a graph for each batch size.
GRAPHS = 2 if Version(torch.__version__) >= Version("2.8") else 4


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def queries_and_keys(*shape, seed=0, dtype=torch.float64):
    return [randn(*shape, seed=seed + i, dtype=dtype).requires_grad_() for i in range(2)]


def assert_same(function, wanted, inputs, tolerance=1e-12):
    """The same value, and the same gradients of all inputs that have one, each entry with a weight of its own."""
    wrt = [x for x in inputs if x.requires_grad]
    values = [f(*inputs) for f in (function, wanted)]
    weights = torch.linspace(1.0, 2.0, values[1].numel(), dtype=values[1].dtype).view_as(values[1])
    grads = [torch.autograd.grad((value * weights).sum(), wrt) for value in values]
    for ours, expected in zip((values[0], *grads[0]), (values[1], *grads[1]), strict=True):
        assert_close(ours, expected, tolerance)


# Each loss meets each kind of boundary in both forms; which convention meets which kind takes turns.
ROUNDS = [
    (*case, impl, KINDS[(i + shift) % 3])
    for shift, impl in enumerate(IMPLS)
    for i, case in enumerate(itertools.chain(CASES, [("distributed", "RELEASED")] * 2))
]


@pytest.mark.parametrize(("name", "convention", "impl", "kind"), dict.fromkeys(ROUNDS))
def test_in_one_graph(name, convention, impl, kind):
    problem = make_problem(kind, 4, seed=1)  # an odd seed: with a mask, where the kind takes one
    q, k = queries_and_keys(*problem.S.shape[:3], 3)

    def loss(q, k):
        options = {"convention": convention, "impl": impl, "mask": problem.mask}
        return fast(name, QueryKey(q, k, 0.8), problem.n_text, **options)

    assert_same(torch.compile(loss, fullgraph=True, backend="aot_eager"), loss, (q, k))


# One of each form is quick; the others say the same of the other losses.
MANY_SHAPES = [
    pytest.param(name, convention, impl, kind, marks=[] if (name, kind) == ("cacr", "int") else [pytest.mark.slow])
    for name, convention in [*((name, "RELEASED") for name in LOSSES), ("singular", "PRINTED")]
    for impl in IMPLS
    for kind in ("int", "ragged")
]


@pytest.mark.parametrize(("name", "convention", "impl", "kind"), MANY_SHAPES)
def test_one_graph_for_many_shapes(name, convention, impl, kind):
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def loss(q, k, n_text):
        return fast(name, QueryKey(q, k), n_text, convention=convention, impl=impl)

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend=counter)
    for batch, length in ((5, 9), (7, 12), (6, 17), (8, 14)):
        n_text = 4 if kind == "int" else torch.arange(batch) % 4 + 1
        inputs = queries_and_keys(batch, 2, length, 3)
        assert_same(lambda q, k, n=n_text: compiled(q, k, n), lambda q, k, n=n_text: loss(q, k, n), inputs)
    assert counter.frame_count <= GRAPHS


def test_scores_and_a_mask_of_pairs():
    pairs = torch.rand(2, 9, 9, generator=torch.Generator().manual_seed(0)) < 0.8

    def loss(S):
        return cacr_loss(S, 4, mask=pairs, convention=WEIGHTED_MEAN)

    S = randn(2, 2, 9, 9).requires_grad_()
    assert_same(torch.compile(loss, fullgraph=True, backend="aot_eager"), loss, (S,))


def test_auto_takes_the_streaming_form():
    def loss(q, k):
        return cacr_loss(QueryKey(q, k), 20, convention=WEIGHTED_MEAN)

    operators = []

    def look(graph, inputs):
        operators.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    q, k = queries_and_keys(8, 2, 300, 3)
    assert_same(torch.compile(loss, fullgraph=True, backend=look), loss, (q, k))
    assert any("attncongruence" in name for name in operators)


@pytest.mark.slow
@every_impl
@pytest.mark.parametrize("dynamic", [False, True])
def test_with_inductor(impl, dynamic):
    q, k = queries_and_keys(2, 2, 9, 3, dtype=torch.float32)
    for convention in (RELEASED, PRINTED, WEIGHTED_MEAN):

        def loss(q, k, c=convention):
            return cacr_loss(QueryKey(q, k), 4, convention=c, impl=impl)

        assert_same(torch.compile(loss, fullgraph=True, dynamic=dynamic), loss, (q, k), 1e-5)


# ---------------------------------------------------------------- torch.func


PROBLEMS, LENGTH = 3, 9
GENERATOR = torch.Generator().manual_seed(0)
TEXT = torch.rand(PROBLEMS, 2, LENGTH, generator=GENERATOR) < 0.5
MAPPED = {
    "nothing": (),
    "boundaries": (torch.tensor([[4, 3], [5, 4], [2, 6]]),),
    "a layout": (TEXT, ~TEXT & (torch.rand(PROBLEMS, 2, LENGTH, generator=GENERATOR) < 0.8)),
    "padding": (torch.arange(LENGTH) < torch.tensor([[9, 8], [7, 9], [9, 9]])[..., None],),
    "pairs": (torch.rand(PROBLEMS, 2, LENGTH, LENGTH, generator=GENERATOR) < 0.8,),
}


def mapped_loss(name, convention, impl, what):
    """A loss of queries, keys and what else is mapped, for one problem."""

    def loss(q, k, *more):
        where, options = 4, {"convention": convention, "impl": impl}
        if what == "boundaries":
            (where,) = more
        elif what == "a layout":
            where = TokenLayout(*more)
        elif more:
            options["mask"] = more[0]
        return fast(name, QueryKey(q, k), where, **options)

    return loss


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("what", MAPPED)
@every_impl
@every_case
def test_vmap_is_a_loop(name, convention, impl, what):
    loss = mapped_loss(name, convention, impl, what)
    inputs = *queries_and_keys(PROBLEMS, 2, 2, LENGTH, 3), *MAPPED[what]
    if (impl, what) == ("streaming", "pairs"):
        with pytest.raises(ValueError, match=r"a mask says which pairs may attend .* use impl='auto'"):
            torch.func.vmap(loss)(*inputs)
        return

    def loop(*inputs):
        return torch.stack([loss(*(x[i] for x in inputs)) for i in range(PROBLEMS)])

    assert_same(torch.func.vmap(loss), loop, inputs)  # forward mapped, and backward() through it
    grads = torch.func.vmap(torch.func.grad(loss, (0, 1)))(*inputs)
    for ours, expected in zip(grads, torch.autograd.grad(loop(*inputs).sum(), inputs[:2]), strict=True):
        assert_close(ours, expected, 1e-12)


@every_impl
def test_vmap_of_one_side_and_of_other_dimensions(impl):
    loss = mapped_loss("cacr", "PRINTED", impl, "nothing")
    q, k = queries_and_keys(2, 2, LENGTH, 3, PROBLEMS)
    moved = q.movedim(-1, 0)
    each = torch.stack([loss(x, y) for x, y in zip(moved, k.movedim(-1, 0), strict=True)])
    assert_close(torch.func.vmap(loss, in_dims=-1)(q, k), each, 1e-12)
    each = torch.stack([loss(x, k[..., 0]) for x in moved])
    assert_close(torch.func.vmap(loss, (-1, None))(q, k[..., 0]), each, 1e-12)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@every_impl
@pytest.mark.parametrize("convention", ["RELEASED", "PRINTED"])
def test_vmap_inside_a_compiled_function(convention, impl):
    loss = mapped_loss("cacr", convention, impl, "nothing")
    mapped = torch.func.vmap(loss)
    compiled = torch.compile(lambda q, k: torch.func.vmap(loss)(q, k), fullgraph=True, backend="aot_eager")
    assert_same(compiled, mapped, queries_and_keys(PROBLEMS, 2, 2, LENGTH, 3))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@every_case
def test_a_second_derivative_of_the_mapped_streaming_form_is_refused(name, convention):
    q, k = queries_and_keys(PROBLEMS, 2, 2, LENGTH, 3)
    losses = torch.func.vmap(mapped_loss(name, convention, "streaming", "nothing"))(q, k)
    first = torch.autograd.grad(losses.sum(), (q, k), create_graph=True)
    with pytest.raises(RuntimeError, match=r"no second derivative .* impl='dense'"):
        torch.autograd.grad(sum(x.sum() for x in first), (q, k))
