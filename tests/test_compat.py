"""Each private part of torch does what `_compat` says of it, and what is said happens where it is gone."""

import re
import subprocess
import sys
import threading
import types

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from attncongruence import CACRLoss, _compat, _compat_stack, regularize
from attncongruence.capture import capture_attention
from attncongruence.capture.find import named_modules
from attncongruence.capture.trace import push_mode, remove_mode
from tests.helpers.single_head import ByHand, Fused, X, record


class Noting(TorchFunctionMode):
    """Notes the names of functions that it sees."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.names.append(getattr(func, "__name__", ""))
        return func(*args, **(kwargs or {}))


def test_function_modes():
    ours, theirs = Noting(), Noting()
    assert _compat.function_modes() == []
    push_mode(ours)
    with theirs:
        assert _compat.function_modes() == [ours, theirs]
        other = []
        thread = threading.Thread(target=lambda: other.append(_compat.function_modes()))
        thread.start()
        thread.join()
        assert other == [[]]
        remove_mode(ours)  # an interrupt left it below the user's
        remove_mode(ours)
        assert _compat.function_modes() == [theirs]
        torch.relu(X)
    assert _compat.function_modes() == []
    assert (theirs.names[-1], "relu" in ours.names) == ("relu", False)


def test_mha_body():
    attention = nn.MultiheadAttention(4, 2, batch_first=True)
    body = Noting()

    class Opening(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func is F.multi_head_attention_forward:
                with body:
                    return _compat.mha_body(*args, **kwargs)
            return func(*args, **(kwargs or {}))

    for weights, within in [(True, "softmax"), (False, "scaled_dot_product_attention")]:
        plain = Noting()
        with plain:
            expected = attention(X, X, X, need_weights=weights)[0]
        assert "multi_head_attention_forward" in plain.names
        assert within not in plain.names  # else the copy is not needed any more
        with Opening():
            assert torch.equal(attention(X, X, X, need_weights=weights)[0], expected)
        assert within in body.names


@pytest.mark.parametrize(
    "function",
    [len, lambda x: x, types.FunctionType((lambda x: has_torch_function(x)).__code__, {})],  # noqa: F821
)
def test_no_copy_of_what_dispatches_in_another_way(function):
    assert _compat._without_dispatch(function) is None


def test_in_backward():
    seen = []

    def forward(x):
        seen.append(_compat.in_backward())
        return x.sin()

    x = X.clone().requires_grad_()
    for reentrant in (False, True):
        checkpoint(forward, x, use_reentrant=reentrant).sum().backward()
    assert seen == [False, True] * 2
    assert not _compat.in_backward()


def test_calls_around():
    seen = []

    class Calls(nn.Module):
        def forward(self, x, inner=None):
            return x if inner is None else inner(x)

    outer, inner = Calls(), Calls()
    for module in (outer, inner):
        module.register_forward_pre_hook(lambda module, args: seen.append(_compat_stack.calls_around(module)))
    outer(X, lambda x: inner(x, lambda x: outer(x)))
    assert seen == [[], [outer], [inner, outer]]
    assert _compat_stack.calls_around(outer) is None  # not called by a hook of it


def test_without_the_calls_on_the_stack_a_pass_ends_where_the_next_begins(monkeypatch):
    class Twice(Fused):
        def forward(self, x, again=True):
            return super().forward(x + super().forward(x)[:, 0]) if not again else self(x, again=False)

    monkeypatch.setattr(_compat, "FORWARD", None)
    assert [record(Fused(), layers).lengths for layers in (-1, "")] == [(3, 3)] * 2
    model = Twice()
    with capture_attention(model, "") as capture:
        for _ in range(2):
            model(X)
            assert len(capture.pop_all()) == 2  # of the inner pass


def test_in_function():
    seen = []

    def forward(x):
        seen.append((torch.is_grad_enabled(), _compat_stack.in_function()))
        return x.sin()

    x = X.clone().requires_grad_()
    for reentrant in (False, True):
        checkpoint(forward, x, use_reentrant=reentrant)
    with torch.no_grad():
        forward(x)
    assert seen == [(True, False), (False, True), (False, False)]


def test_version():
    x = X.clone()
    before = _compat.version(x)
    x.detach()[0] = 1  # shares the count
    assert _compat.version(x) == before + 1
    assert _compat.version(x.clone()) == 0
    with torch.inference_mode():
        assert _compat.version(X * 2) == 0


def test_without_versions_scores_are_right_and_queries_are_not_offered(monkeypatch):
    model, written = ByHand(), ByHand(write=True)
    assert (record(model).query is not None, record(written).query is not None) == (True, False)
    expected = [record(m).scores for m in (model, written)]
    monkeypatch.setattr(_compat, "_has_version", False)
    found = [record(m) for m in (model, written)]
    assert [r.query for r in found] == [None, None]
    assert all(torch.equal(r.scores, e) for r, e in zip(found, expected, strict=True))
    assert record(Fused()).query is not None  # nothing to follow there


@pytest.fixture
def compiler():
    torch.compiler.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append({node.target for node in graph.graph.nodes})
        return graph.forward

    yield backend, graphs
    torch.compiler.reset()


def test_set_compiler(compiler):
    backend, graphs = compiler

    @torch.compile(backend=backend)
    def run(x, off):
        x = _switched(x, off)
        return x.cos()

    eager = run(X, False)
    assert any(torch.cos in g or "cos" in g for g in graphs)
    torch.compiler.reset()
    graphs.clear()
    assert torch.equal(run(X, True), eager)
    assert not any(torch.cos in g or "cos" in g for g in graphs)
    assert len(OLD) == 1
    assert callable(OLD[0])
    _compat.set_compiler(None)


OLD = []


def _switched(x, off):
    if off:
        OLD.append(_compat.set_compiler(None))
    return x


_compat.skip_frame(_switched)


def test_skip_frame(compiler):
    backend, graphs = compiler
    torch.compile(_skipped, backend=backend)(X)
    assert [("sin" in str(g), "tan" in str(g)) for g in graphs] == [(False, True)]


def _inner(x):
    return x.tan()


def _skipped(x):
    return _inner(x.sin())


_compat.skip_frame(_skipped)


def test_without_skip_the_public_decorator_does(monkeypatch):
    def function(x):
        return x

    assert _compat.skip_frame(function) is function
    monkeypatch.delattr(torch._dynamo.decorators, "skip")
    # In old versions it needs the very function that is gone; all that is asked is that it is called.
    asked = []
    monkeypatch.setattr(torch.compiler, "disable", lambda f, recursive: asked.append((f, recursive)) or f)
    assert _compat.skip_frame(function) is function
    assert asked == [(function, False)]


def test_wrappers():
    from torch.distributed.algorithms._checkpoint import checkpoint_wrapper as saving
    from torch.distributed.fsdp import _common_utils as sharding

    model = nn.Sequential(ByHand())
    assert getattr(torch.compile(model), _compat.COMPILED) is model
    assert _compat.WRAPPERS[0] == _compat.COMPILED
    assert sharding.FSDP_WRAPPED_MODULE in _compat.WRAPPERS
    wrapped = nn.Sequential(saving.checkpoint_wrapper(ByHand()))
    assert [name for name, _ in wrapped.named_modules()][2] == f"0.{_compat.WRAPPERS[2]}"
    assert list(named_modules(torch.compile(wrapped))) == ["", "0", "0.query", "0.key"]


def test_a_compiled_model_without_its_name_is_captured_all_the_same(monkeypatch):
    model = ByHand()
    expected = record(model).scores
    monkeypatch.setattr(_compat, "COMPILED", "_gone")
    with capture_attention(torch.compile(model, backend="eager")) as capture:
        capture.model(X)
        assert torch.equal(capture.pop().scores, expected)


def test_is_replica(monkeypatch):
    model = ByHand()
    replica = model._replicate_for_data_parallel()  # as torch.nn.parallel.replicate does
    assert (_compat.is_replica(model), _compat.is_replica(replica)) == (False, True)
    capture = capture_attention(model, [model])
    replica = model._replicate_for_data_parallel()
    replica.query, replica.key = model.query, model.key
    with pytest.raises(RuntimeError, match=r"replica of torch.nn.DataParallel"):
        replica(X)
    del replica._is_replica
    assert not _compat.is_replica(replica)
    replica(X)
    with capture, pytest.raises(RuntimeError, match="nothing was captured"):
        capture.pop()


def test_hooks_of():
    model = ByHand()
    assert _compat.hooks_of(model) == []
    hooks = [lambda *_: None, lambda *_: None]
    model.register_forward_pre_hook(hooks[0])
    model.register_forward_hook(hooks[1], always_call=True, prepend=True, with_kwargs=True)
    assert _compat.hooks_of(model) == hooks[::-1]
    assert _compat.hooks_of(types.SimpleNamespace()) == []


NEEDED = {
    "_get_modes": "torch.overrides._get_current_function_mode_stack",
    "_graph_task": "torch._C._current_graph_task_id",
    "mha_body": "the Python body of torch.nn.functional.multi_head_attention_forward",
}


@pytest.mark.parametrize("part", NEEDED)
def test_what_capture_cannot_do_without_is_missed_before_anything_runs(monkeypatch, part):
    monkeypatch.setattr(_compat, part, None)
    message = rf"capture needs {NEEDED[part]}, and torch {re.escape(torch.__version__)} does not have it. "
    for layers in (-1, "", [-1]):
        with pytest.raises(RuntimeError, match=rf"{message}Either install torch 2.6 to "):
            capture_attention(ByHand(), layers)
    model = ByHand()
    with pytest.raises(RuntimeError, match=message):
        regularize(model, CACRLoss(), n_text=2)
    assert _compat.hooks_of(model) == []
    assert "forward" not in model.__dict__


def test_without_a_switch_of_the_compiler_layers_are_named(monkeypatch):
    monkeypatch.setattr(_compat, "_set_eval_frame", None)
    with pytest.raises(RuntimeError, match=r"eval_frame.set_eval_frame, .* Either name the layers, layers='...'; or "):
        capture_attention(ByHand())
    with capture_attention(ByHand(), "") as capture:
        capture.model(X)
        assert capture.pop().lengths == (3, 3)


def test_nothing_is_missed_here():
    _compat.check(by_number=True)
    assert _compat._has_version
    for part in (_compat._get_modes, _compat._graph_task, _compat._set_eval_frame, _compat.mha_body):
        assert callable(part)


def test_a_torch_without_any_of_it_imports_and_computes_losses():
    gone = """
import torch
del torch.overrides._get_current_function_mode_stack, torch._C._current_graph_task_id
del torch._C._dynamo.eval_frame.set_eval_frame
torch.nn.functional.multi_head_attention_forward = abs
from attncongruence import cacr_loss, capture_attention
print(float(cacr_loss(torch.zeros(1, 1, 4, 4), 2)))
try:
    capture_attention(torch.nn.Linear(2, 2))
except RuntimeError as error:
    print(error)
"""
    run = subprocess.run([sys.executable, "-c", gone], capture_output=True, text=True, check=True)
    value, error = run.stdout.splitlines()
    assert float(value) == 0
    assert [name in error for name in (*NEEDED.values(), "set_eval_frame")] == [True] * 4


def test_mapped(monkeypatch):
    seen = []

    def look(x):
        seen.append(_compat.mapped(x))
        return x.sum()

    look(X)
    torch.func.grad(look)(X)
    torch.func.vmap(look)(X)
    torch.func.vmap(torch.func.grad(look))(X)
    assert seen == [False, False, True, True]
    monkeypatch.setattr(_compat, "_is_mapped", None)
    torch.func.vmap(look)(X)
    assert seen[-1] is False


@pytest.mark.parametrize("gone", [False, True])
def test_gradients_of_softmaxes(gone, monkeypatch):
    if gone:
        monkeypatch.setattr(_compat, "_softmax_grad", None)
        monkeypatch.setattr(_compat, "_log_softmax_grad", None)
    logits = torch.linspace(-1.0, 2.0, 15, dtype=torch.float64).view(3, 5).requires_grad_()
    weight = logits.detach().sin()
    P, log_P = logits.softmax(-1), logits.log_softmax(-1)
    out = torch.empty_like(weight)
    ours = _compat.softmax_grad(weight, P.detach(), out), _compat.log_softmax_grad(weight, log_P.detach())
    for mine, whole in zip(ours, (P, log_P), strict=True):
        torch.testing.assert_close(mine, torch.autograd.grad((whole * weight).sum(), logits)[0], rtol=0, atol=1e-14)
    assert ours[0] is out
