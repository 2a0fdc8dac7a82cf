"""Which layers are meant: candidates, names, wildcards, modules, indices; and errors that say what to do."""

import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attncongruence import cacr_loss
from attncongruence.capture import capture_attention, find_attention
from tests.helpers.models import Attention, Stack
from tests.zoo import CASES, each, needs, run

X = torch.linspace(-1, 1, 160).view(2, 5, 16)


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
@pytest.mark.parametrize("name", each(CASES))
def test_find_attention_lists_the_layers_that_attend(name):
    case = CASES[name]
    model, _ = case.build()
    found = find_attention(model)
    for layer in case.layers.values():
        assert found[layer.path] == type(model.get_submodule(layer.path)).__name__
    parents = [one for one in found for other in found if other.startswith(f"{one}.")]
    assert parents == []


def test_projections_give_an_attention_away_whatever_its_class_is_called():
    class Mixer(nn.Module):
        def __init__(self, names: tuple[str, ...]) -> None:
            super().__init__()
            for name in names:
                self.add_module(name, nn.Linear(2, 2))

    model = nn.Sequential(Mixer(("q_proj", "k_proj", "v_proj")), Mixer(("qkv", "out")), Mixer(("up", "down")))
    assert find_attention(model) == {"0": "Mixer", "1": "Mixer"}


@pytest.mark.parametrize(
    "names",
    [
        ("linear_v", "linear_k", "linear_q", "linear_merge"),  # ROSITA, MCAN
        ("to_q", "to_kv", "to_out"),
        ("Wq", "Wk", "Wv", "Wo"),
        ("Wqkv", "Wo"),
        ("w_qs", "w_ks", "w_vs", "fc"),
        ("proj_query", "proj_key", "proj_value"),
        ("QueryLayer", "KeyLayer", "ValueLayer"),
        ("lin_q_0", "lin_k_0", "lin_v_0"),
    ],
    ids=str,
)
def test_projections_may_be_called_anything_that_differs_in_q_k_and_v(names):
    class MHAtt(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name in names:
                self.add_module(name, nn.Linear(2, 2))

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mhatt, self.quant_conv, self.post_quant_conv = MHAtt(), nn.Linear(2, 2), nn.Linear(2, 2)
            self.question_linear, self.knowledge_linear, self.ln_q, self.ln_v = (nn.Linear(2, 2) for _ in range(4))

    assert find_attention(nn.Sequential(Layer(), Layer())) == {"0.mhatt": "MHAtt", "1.mhatt": "MHAtt"}


def test_layers_by_index_name_wildcard_and_module():
    model = Stack(3)
    chosen = {
        "first": (0, ["layers.0"]),
        "two": ([0, -1], ["layers.0", "layers.2"]),
        "name": ("layers.1", ["layers.1"]),
        "wildcard": ("*.[12]", ["layers.1", "layers.2"]),
        "module": (model.layers[2], ["layers.2"]),
        "modules": ([model.layers[2], "layers.0"], ["layers.0", "layers.2"]),
    }
    for layers, expected in chosen.values():
        with capture_attention(model, layers) as capture:
            for _ in range(2):
                model(X)
                assert [record.layer for record in capture.pop_all()] == expected


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ("layers.7", "no module is called 'layers.7'. Modules that look like attention: layers.0, layers.1"),
        ("encoder.*", r"no module is called 'encoder.\*'"),
        (nn.Linear(1, 1), "the given Linear is not a module of this Stack"),
        ([], "layers is empty"),
        (True, "layers has True, a bool"),
        ([1.5], "layers has 1.5, a float"),
    ],
)
def test_rejects_layers_that_are_not_there(layers, message):
    model = Stack()
    with pytest.raises(ValueError, match=message):
        capture_attention(model, layers)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_an_index_out_of_range_says_how_many_there_are():
    model = Stack()
    with capture_attention(model, 2) as capture:
        for _ in range(2):
            model(X)
            seen = r"layers.0 \(5 x 5\), layers.1 \(5 x 5\)"
            with pytest.raises(RuntimeError, match=rf"ran 2. Attention seen.*{seen}. Choose -2 to 1\.$"):
                capture.pop()


class Sink(Attention):
    """One learned extra key that takes attention away from all others."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (2, 8)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        scores = q @ k.transpose(-1, -2)
        scores = torch.cat([scores, torch.ones(*scores.shape[:-1], 1)], -1)
        return (scores.softmax(-1)[..., :-1] @ v).transpose(1, 2).flatten(2)


class Linear(Attention):
    """Linear attention: no scores anywhere."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return q.softmax(-1) @ (k.softmax(1).transpose(1, 2) @ v)


class ByHand(Attention):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        weights = (q @ k.transpose(1, 2)).exp()
        return weights / weights.sum(-1, keepdim=True) @ v


class Gated(Attention):
    """A router (softmax over experts) and a distribution over heads beside the attention."""

    def forward(self, x: Tensor) -> Tensor:
        gate = self.qkv(x)[..., :5].softmax(-1)
        return super().forward(x) * gate.mean()


def test_attention_sinks_are_told_by_their_extra_key():
    model = nn.Sequential(Sink())
    with capture_attention(model) as capture:
        model(X)
        with pytest.raises(
            RuntimeError, match=r"ran 0. Attention seen, queries x keys: 0 \(5 x 6\). None of"
        ) as raised:
            capture.pop()
        assert "No softmax" not in str(raised.value)


@pytest.mark.parametrize("layer", [Linear, ByHand])
@pytest.mark.parametrize("layers", [-1, "0"])
def test_attention_without_a_softmax_over_scores_is_never_an_empty_result(layer, layers):
    model = nn.Sequential(layer())
    with capture_attention(model, layers) as capture:
        for _ in range(2):
            model(X)
            if layer is Linear and layers == "0":
                return  # asked for by name, its softmaxes are given as they are
            with pytest.raises(RuntimeError, match=r"(?s)linear attention.*look like attention"):
                capture.pop()


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
def test_torchscript_says_what_it_cannot_see():
    model = nn.Sequential(torch.jit.trace(Attention(fused=False), X))
    with capture_attention(model) as capture:
        model(X)
        with pytest.raises(RuntimeError, match="TorchScript"):
            capture.pop()


@pytest.mark.parametrize("layers", [-1, "0"])
def test_a_gate_is_not_taken_for_attention(layers):
    model = nn.Sequential(Gated(fused=False))
    with capture_attention(model, layers) as capture:
        for _ in range(2):
            model(X)
            assert capture.pop().scores.shape == (2, 2, 5, 5)


def test_cross_attention_with_as_many_queries_as_keys_is_not_the_last_self_attention():
    class Decoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.frames = nn.Embedding(9, 16), nn.Linear(4, 16)
            self.own = nn.MultiheadAttention(16, 2, batch_first=True)
            self.cross = nn.MultiheadAttention(16, 2, batch_first=True)

        def forward(self, ids: Tensor, frames: Tensor) -> Tensor:
            x, y = self.words(ids), self.frames(frames)
            x = x + self.own(x, x, x)[0]
            return x + self.cross(x, y, y)[0]

    model = Decoder()
    with capture_attention(model) as capture:
        with pytest.warns(UserWarning, match="own was chosen by its number.* of the same length .cross.: it may hold"):
            model(torch.arange(5)[None], torch.randn(1, 5, 4))
        assert capture.pop().layer == "own"


@pytest.mark.parametrize("name", each(["lxmert", "bridgetower", "blip_itm", "mllama"]))
def test_the_last_self_attention_of_two_streams_comes_with_a_warning(name):
    model, inputs = CASES[name].build()
    layers = [layer.path for layer in CASES[name].layers.values()]
    with capture_attention(model), pytest.warns(UserWarning, match="text alone or image alone.*from_streams"):
        run(model, inputs)
    with warnings.catch_warnings(), capture_attention(model, layers) as named:
        warnings.filterwarnings("error", ".*from_streams")
        run(model, inputs)
        assert named.pop_all()


def test_windows_keep_their_own_batch():
    class Windowed(Attention):
        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (t.unflatten(-1, (2, 8)) for t in self.qkv(x.unflatten(1, (-1, 4))).chunk(3, -1))
            q, k, v = (t.transpose(2, 3).flatten(0, 1) for t in (q, k, v))
            out = F.scaled_dot_product_attention(q, k, v)
            return out.unflatten(0, (x.shape[0], -1)).transpose(2, 3).flatten(3).flatten(1, 2)

    x = torch.randn(2, 12, 16)
    with capture_attention(Windowed()) as capture:
        capture.model(x)
        assert capture.pop().scores.shape == (6, 2, 4, 4)


@needs("florence2")
def test_real_models_need_no_index_but_an_encoder_decoder_needs_a_name():
    model, inputs = CASES["florence2"].build()
    with capture_attention(model) as last, capture_attention(model, "*.encoder.layers.1.self_attn") as named:
        with pytest.warns(UserWarning, match=r"decoder.layers.1.self_attn was chosen .* name it, layers='...'"):
            run(model, inputs)
        assert last.pop().layer == "model.language_model.decoder.layers.1.self_attn"
        assert named.pop().layer == "model.language_model.encoder.layers.1.self_attn"


def test_a_bare_attention_module_attends_to_its_own_input():
    class Projections(Attention):
        """Three projections of an input that no module made: still one stream."""

        def __init__(self) -> None:
            super().__init__()
            self.q, self.k = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            return (self.q(x) @ self.k(x).mT).softmax(-1) @ x

    model = Projections()
    with capture_attention(model) as capture:
        model(X)
        assert capture.pop().layer == ""


class MHAtt(nn.Module):
    """As ROSITA and MCAN write it."""

    def __init__(self, names):
        super().__init__()
        for name in (*names, "linear_merge"):
            setattr(self, name, nn.Linear(8, 8))

    def forward(self, x):
        return x


@pytest.mark.parametrize(
    "names",
    [
        ("linear_v", "linear_k", "linear_q"),
        ("to_q", "to_k", "to_v"),
        ("w_q", "w_k", "w_v"),
        ("Wq", "Wk", "Wv"),
        ("proj_query", "proj_key", "proj_value"),
        ("q_proj", "k_proj", "v_proj"),
    ],
)
def test_projections_are_known_by_their_names(names):
    model = nn.Module()
    model.att, model.mlp = MHAtt(names), MHAtt(("fc1", "fc2", "gate"))
    assert find_attention(model) == {"att": "MHAtt"}


class Cached(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x, past):
        keys = torch.cat([past, x], 1)
        q, k, v = self.q(x)[:, None], self.k(keys)[:, None], self.v(keys)[:, None]
        return nn.functional.scaled_dot_product_attention(q, k, v)


def test_fewer_queries_than_keys_are_a_cache_or_a_prefix():
    model = Cached()
    x, past = torch.randn(2, 5, 8), torch.randn(2, 3, 8)
    with capture_attention(model) as capture:
        model(x, past)
        with pytest.raises(RuntimeError, match=r"5 x 8\)\..*ewer queries than keys.*past_key_values.*use_cache=False"):
            capture.pop()
    with capture_attention(model, "") as capture:
        model(x, past)
        with pytest.raises(ValueError, match=r"5 queries and 8 keys.*key/value cache.*use_cache=False"):
            cacr_loss(capture.pop(), 3)


class Prefixed(Attention):
    """Keys of a prefix or cache before its own."""

    def __init__(self, prefix: int) -> None:
        super().__init__()
        self.past = nn.Parameter(torch.randn(1, 2, prefix, 8))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (2, 8)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        k, v = (torch.cat([self.past.expand(len(x), -1, -1, -1), t], 2) for t in (k, v))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def test_a_vision_tower_is_not_chosen_silently_where_the_decoder_has_a_prefix():
    class Captioner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.vision, self.decoder = Attention(), Prefixed(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.decoder(torch.cat([self.vision(x), x[:, :2]], 1))

    model = Captioner()
    with (
        capture_attention(model),
        pytest.warns(UserWarning, match=r"vision was chosen.*a prefix: decoder \(7 x 10\).*name the layer"),
    ):
        model(X)
    with capture_attention(model, "vision") as capture, warnings.catch_warnings():
        warnings.simplefilter("error")
        model(X)
        capture.pop()
