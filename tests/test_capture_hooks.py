"""Hooks come, go and fail without a trace: errors, interrupts, copies, threads, several captures, validation."""

import copy
import gc
import pickle
import threading
import warnings
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack

from attncongruence.capture import capture_attention
from tests.helpers.models import Attention, Stack, hook_count


@pytest.fixture
def x() -> Tensor:
    torch.manual_seed(0)
    return torch.randn(2, 5, 16)


@pytest.fixture
def model() -> Stack:
    torch.manual_seed(0)
    return Stack()


def scores_of(layer: Attention, x: Tensor) -> Tensor:
    q, k, _ = (t.unflatten(-1, (2, 8)).transpose(1, 2) for t in layer.qkv(x).chunk(3, -1))
    return q @ k.transpose(-1, -2) / 8**0.5


@pytest.mark.parametrize("layers", [-1, "layers.1"])
@pytest.mark.parametrize("error", [ValueError("mine"), KeyboardInterrupt(), SystemExit(), GeneratorExit()])
def test_an_error_in_forward_leaves_the_model_usable_and_nothing_half_captured(model, x, layers, error):
    with capture_attention(model, layers) as capture:
        model.layers[1].trouble = error
        with pytest.raises(type(error)):
            model(x)
        model.layers[1].trouble = None
        model(x)  # takes any stale mode off
        assert _get_current_function_mode_stack() == []
        captured = capture.pop()
        torch.testing.assert_close(captured.scores, scores_of(model.layers[1], x + model.layers[0](x)))
    assert hook_count(model) == 0


def test_an_error_after_the_layer_drops_its_record_too(model, x):
    with capture_attention(model, "layers.0") as capture:
        model.layers[1].trouble = torch.OutOfMemoryError("later layer")
        with pytest.raises(torch.OutOfMemoryError):
            model(x)
        model.layers[1].trouble = None
        model(x[:1])
        torch.testing.assert_close(capture.pop().scores, scores_of(model.layers[0], x[:1]))


def test_close_takes_a_stale_mode_off(model, x):
    capture = capture_attention(model, "layers.1")
    model.layers[1].trouble = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        model(x)
    capture.close()
    assert _get_current_function_mode_stack() == []
    assert hook_count(model) == 0


def test_a_module_that_returns_none_is_recorded(x):
    class Writes(Attention):
        def forward(self, x: Tensor) -> None:
            self.out = super().forward(x)

    model = Writes()
    with capture_attention(model) as capture:
        model(x)
        torch.testing.assert_close(capture.pop().scores, scores_of(model, x))


@pytest.mark.parametrize("layers", [-1, "layers.1", ["layers.*"]])
def test_after_close_the_model_pickles_to_the_same_bytes(model, x, layers):
    before = pickle.dumps(model)
    capture = capture_attention(model, layers)
    model(x)
    capture.pop_all()
    assert hook_count(model) > 0
    capture.close()
    assert hook_count(model) == 0
    assert pickle.dumps(model) == before


@pytest.mark.parametrize("found", [False, True])
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_of_a_watched_model_is_inert_and_works(model, x, duplicate, found):
    with capture_attention(model) as capture:
        if found:
            model(x)
            capture.pop()
        twin = duplicate(model)
        expected = twin(x)
        assert torch.equal(expected, model(x))
        assert capture.pop().scores.shape == (2, 2, 5, 5)  # the model's own, not the twin's
    assert torch.equal(twin(x), expected)


def test_two_captures_and_user_hooks_each_see_their_own(model, x):
    seen = []
    model.layers[1].register_forward_hook(lambda *_: seen.append(len(_get_current_function_mode_stack())))
    first, second = capture_attention(model, -1), capture_attention(model, ["layers.0", "layers.1"])
    model(x)  # the first layer is found in this pass
    first.pop(), second.pop_all()
    model(x)
    one, two = first.pop(), second.pop_all()
    assert [record.layer for record in two] == ["layers.0", "layers.1"]
    assert torch.equal(one.scores, two[1].scores)
    first.close()
    model(x)
    assert len(second.pop_all()) == 2
    second.close()
    assert seen[1:] == [0, 0]  # no mode was on in anyone else's hook


def test_parent_and_child_are_two_records(model, x):
    with capture_attention(model, [model, "layers.1"]) as capture:
        model(x)
        records = capture.pop_all()
    assert sorted(record.layer for record in records) == ["", "", "layers.1"]
    torch.testing.assert_close(records[0].scores, records[-1].scores)


def test_a_capture_inside_a_captured_model(x):
    outer = nn.Sequential(Stack(), Stack())
    with capture_attention(outer) as whole, capture_attention(outer[0]) as part:
        outer(x)
        assert (whole.pop().layer, part.pop().layer) == ("1.layers.1", "layers.1")


def test_two_forwards_in_a_step_are_two_records_in_order(model, x):
    with capture_attention(model) as capture:
        model(x)
        model(x[:1])
        with pytest.raises(RuntimeError, match=r"pop\(\) takes the one record .* but 2 wait"):
            capture.pop()
        assert [record.scores.shape[0] for record in capture.pop_all()] == [2, 1]
        with pytest.raises(RuntimeError, match="nothing was captured"):
            capture.pop()


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = Attention()

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.layer(x))


def test_one_module_called_twice_is_two_records_by_name_and_one_by_index(x):
    model = Shared()
    with capture_attention(model, "layer") as by_name, capture_attention(model, [-1]) as last:
        for _ in range(2):
            model(x)
            first, second = by_name.pop_all()
            torch.testing.assert_close(first.scores, scores_of(model.layer, x))
            assert torch.equal(last.pop().scores, second.scores)


def test_threads_have_their_own_modes_and_all_records_arrive(model, x):
    inputs = [torch.randn(1, 5, 16) for _ in range(8)]
    with capture_attention(model) as capture:
        model(x)
        capture.pop()
        threads = [threading.Thread(target=model, args=(one,)) for one in inputs]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        records = capture.pop_all()
        assert _get_current_function_mode_stack() == []
    expected = [scores_of(model.layers[1], one + model.layers[0](one)) for one in inputs]
    assert len(records) == 8
    for record in records:
        assert sum(torch.allclose(record.scores, scores, atol=1e-5) for scores in expected) == 1


def test_analysis_without_gradients_does_not_blame_them():
    with capture_attention(torch.nn.Linear(4, 4), "", analysis=True) as capture, torch.no_grad():
        capture.model(torch.ones(2, 4))
        with pytest.raises(RuntimeError, match="No softmax over a product of queries and keys was seen"):
            capture.pop()


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_validation_pushes_no_mode_and_records_nothing(model, x, context):
    modes = []
    model.layers[1].register_forward_pre_hook(lambda *_: modes.append(len(_get_current_function_mode_stack())))
    with capture_attention(model, "layers.1") as capture, context():
        model(x)
        assert modes == [0]
        with pytest.raises(RuntimeError, match=r"gradients off.*analysis=True"):
            capture.pop()
    with capture_attention(model) as capture:
        with context():
            model(x)  # the layer is not looked for here
        model(x)
        assert capture.pop().layer == "layers.1"


@pytest.mark.parametrize("layers", [-1, "layers.1"])
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("fused", [True, False])
def test_analysis_records_without_gradient(x, layers, context, fused):
    model = Stack(fused=fused)
    with capture_attention(model, layers, analysis=True) as capture, context():
        model(x)
        captured = capture.pop()
        torch.testing.assert_close(captured.scores, scores_of(model.layers[1], x + model.layers[0](x)))
    assert not captured.requires_grad


def torch_encoder(frozen: bool) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2).eval().requires_grad_(not frozen)
    padding = torch.zeros(2, 5, dtype=torch.bool)
    padding[1, 3:] = True
    return encoder, torch.randn(2, 5, 16), padding


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layers", [-1, "layers.1.self_attn", "layers.*.self_attn"])
def test_torch_encoder_validates_on_its_fast_path_as_if_nothing_were_there(layers):
    encoder, x, padding = torch_encoder(frozen=False)
    with torch.no_grad():
        expected = encoder(x, src_key_padding_mask=padding)
    with capture_attention(encoder, layers) as capture:
        for _ in range(2):
            with torch.no_grad():
                assert torch.equal(encoder(x, src_key_padding_mask=padding), expected)
            encoder(x, src_key_padding_mask=padding)
            assert not capture.pop_all()[-1].allowed[1, ..., 3:].any()


@pytest.mark.parametrize("layers", [-1, "layers.1.self_attn"])
def test_a_frozen_torch_encoder_runs_and_its_record_is_refused(layers):
    encoder, x, padding = torch_encoder(frozen=True)
    expected = encoder(x, src_key_padding_mask=padding)
    with capture_attention(encoder, layers) as capture:
        for _ in range(2):
            torch.testing.assert_close(encoder(x, src_key_padding_mask=padding), expected)
            with pytest.raises(RuntimeError, match="captured"):
                capture.pop()


def test_popping_lets_the_graph_go(model, x):
    with capture_attention(model) as capture:
        for _ in range(2):
            model(x)
            record = capture.pop()
            parts = [record.query, record.key, record.scores, record._operation.query]
            alive = [weakref.ref(part) for part in parts]
            del record, parts
            gc.collect()
            assert [ref() for ref in alive] == [None] * 4


def test_closing_lets_go_of_what_was_not_popped(model, x):
    capture = capture_attention(model)
    model(x)
    model(x)
    alive = [weakref.ref(record._operation.query) for _, record in capture._records]
    assert [ref() is None for ref in alive] == [False, False]
    capture.close()
    gc.collect()
    assert [ref() for ref in alive] == [None, None]


def test_records_that_nobody_pops_are_warned_of_once(model, x):
    with capture_attention(model) as capture:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for _ in range(32):
                model(x)
        with pytest.warns(UserWarning, match="33 records of captured attention wait"):
            model(x)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model(x)
        assert len(capture.pop_all()) == 34
    with pytest.raises(RuntimeError, match="this capture is closed"):
        capture.pop()


def test_a_shared_module_is_found_by_each_of_its_names(x):
    model = nn.Module()
    model.first = model.second = Attention()
    model.forward = None
    for name in ("first", "second", "*"):
        with capture_attention(model, name) as capture:
            model.second(x)
            assert capture.pop_all()[-1].layer == "first"


NOT_RUN = (
    r"^nothing was captured: (Stack|Attention) has not run since capture began: call model\(...\) first\. If it has"
)


def test_nothing_ran_says_so(model):
    with capture_attention(model) as capture, pytest.raises(RuntimeError, match=NOT_RUN):
        capture.pop()


def test_calling_forward_directly_says_so(model, x):
    with capture_attention(model.layers[0]) as capture:
        model.layers[0].forward(x)
        with pytest.raises(RuntimeError, match=rf"{NOT_RUN}.*a direct model.forward\(...\) only those of sub"):
            capture.pop()


def test_a_wrapper_that_calls_the_forward_method_is_followed_through_the_parts(model, x):
    with capture_attention(model) as capture:
        for _ in range(2):
            model.forward(x)  # as PEFT does with the model it wraps
            assert capture.pop().layer == "layers.1"
