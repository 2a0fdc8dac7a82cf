"""transformers: layouts of whole families, and kernels that no torch function shows."""

import copy
import pickle
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from attncongruence import cacr_loss, capture_attention
from attncongruence.integrations.huggingface import token_layout
from tests.helpers.models import hook_count
from tests.helpers.versions import has
from tests.zoo import CASES, each, needs, run, set_kernel

HF = [name for name, case in CASES.items() if "S" in case.layers and not name.startswith(("timm", "torch"))]


@pytest.mark.parametrize("name", each(HF, slow=False))
def test_the_layout_is_that_of_the_model(name):
    case = CASES[name]
    model, inputs = case.build()
    with capture_attention(model, case.layers["S"].path) as capture:
        run(model, inputs)
        twice = name == "flava" and not has("transformers>=4.53")  # 4.30 computes its softmax twice
        captured = capture.pop_all()[1] if twice else capture.pop()
    layout = token_layout(model, inputs, captured)
    assert torch.equal(layout.text, case.text(inputs))
    assert torch.equal(layout.image, case.image(inputs))
    direction = "both" if case.kind == "encoder" else "language"
    loss = cacr_loss(captured, layout, direction=direction)
    assert torch.isfinite(loss)
    assert loss > 0


@needs("flava")
def test_without_any_mask_every_position_is_real():
    model, inputs = CASES["flava"].build()
    del inputs["attention_mask"]
    with capture_attention(model) as capture:
        run(model, inputs)
        captured = capture.pop()
    if has("transformers>=5.17"):
        assert captured.allowed is None
    else:  # 5.0 makes a mask of its own
        assert captured.allowed is None or captured.allowed.all()
    layout = token_layout(model, inputs, captured)
    words = inputs["input_ids"].shape[1]
    # After a multimodal [CLS]: the image's [CLS] and four patches, then the caption.
    assert layout.image.tolist() == [[False, *[True] * 5, *[False] * words]] * 2
    assert layout.text.tolist() == [[False] * 6 + [True] * words] * 2


@pytest.mark.parametrize("name", each(["llava", "qwen3_vl", "kosmos2", "visual_bert"], slow=False))
def test_placeholders_and_given_masks_need_no_record(name):
    case = CASES[name]
    model, inputs = case.build()
    assert torch.equal(token_layout(model, inputs).image, case.image(inputs))


IMAGE_CLS = {"vilt": 8, "flava": 1, "git": 0, "llava": None}


@pytest.mark.parametrize("name", each(IMAGE_CLS, slow=False))
def test_special_tokens_and_the_image_cls_are_left_out(name):
    case, cls = CASES[name], IMAGE_CLS[name]
    model, inputs = case.build()
    with capture_attention(model) as capture:
        run(model, inputs)
        layout = token_layout(model, inputs, capture.pop(), special=[1, 5])  # 1 opens each text, 5 is the placeholder
    text, image = case.text(inputs).clone(), case.image(inputs).clone()
    start = text.int().argmax(1)
    text[torch.arange(2), start] = False
    if cls is not None:
        image[:, cls] = False
    assert torch.equal(layout.text, text)
    assert torch.equal(layout.image, image)


NO_LAYOUT = {
    "vilt": "known only from a captured layer",
    "mllama": "cross-attention: there is no joint sequence",
    "bridgetower": r"does not know where 'bridgetower'.*TokenLayout\(text, image\)",
    "timm_fused": "does not know where 'TimmBlocks'",
}


@pytest.mark.parametrize("name", each(NO_LAYOUT, slow=False))
def test_says_how_to_build_the_layout_by_hand(name):
    model, inputs = CASES[name].build()
    with pytest.raises(ValueError, match=NO_LAYOUT[name]):
        token_layout(model, inputs)


@needs("florence2")
def test_rejects_a_layer_that_is_not_the_joint_sequence():
    model, inputs = CASES["florence2"].build()
    with capture_attention(model) as capture:
        run(model, inputs)
        with pytest.raises(ValueError, match=r"the layout has 13 positions, but .*decoder.* 2 queries over 2 keys"):
            token_layout(model, inputs, capture.pop())
    with pytest.raises(ValueError, match="needs inputs"):
        token_layout(model, {})


def by_hand(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float, **_: object):
    """An attention kernel without one function that capture watches for."""
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    scores = (q[:, :, :, None] * k[:, :, None]).sum(-1) * scaling
    if mask is not None:  # added, or bool, as the version of transformers has it
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    weights = scores.exp()
    return (weights[..., None] * v[:, :, None]).sum(3).div(weights.sum(-1, keepdim=True)).transpose(1, 2), None


@pytest.fixture
def hidden_kernel():
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register("hidden", by_hand)
    ALL_MASK_ATTENTION_FUNCTIONS.register("hidden", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    return "hidden"


@needs("gemma3_sliding")
@pytest.mark.parametrize("layers", [-1, "*.language_model.layers.1.self_attn"])
def test_a_kernel_no_torch_function_shows_is_seen_where_transformers_calls_it(hidden_kernel, layers):
    case = CASES["gemma3_sliding"]
    model, inputs = case.build()
    _, expected = case.reference(model, inputs)
    set_kernel(model, hidden_kernel)
    plain = run(model, inputs).logits
    configs = [module.__dict__.get("config") for module in model.modules()]
    keys = {id(config): sorted(vars(config)) for config in configs if config is not None}
    with capture_attention(model, layers) as capture:
        for _ in range(2):
            assert torch.equal(run(model, inputs).logits, plain)
            record = capture.pop()
            rows = case.real_rows("S", inputs, record.scores.shape)
            ours, theirs = record.probs.transpose(1, 2)[rows], expected["S"].transpose(1, 2)[rows]
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
            assert record.query is not None
            weight = model.get_submodule(record.layer).q_proj.weight
            assert torch.autograd.grad(record.probs.square().sum(), weight)[0].abs().max() > 0
            # Between two passes, the configuration is the model's own again.
            assert all(a is b.__dict__.get("config") for a, b in zip(configs, model.modules(), strict=True))
        twin = pickle.loads(pickle.dumps(copy.deepcopy(model)))
        assert torch.equal(run(twin, inputs).logits, plain)
    assert hook_count(model) == 0
    assert {id(config): sorted(vars(config)) for config in configs if config is not None} == keys


@needs("llava")
def test_the_kernel_is_put_back_when_forward_raises(hidden_kernel):
    model, inputs = CASES["llava"].build()
    set_kernel(model, hidden_kernel)
    attention = model.model.language_model.layers[1].self_attn
    config, projection = attention.config, attention.o_proj
    with capture_attention(model) as capture:
        run(model, inputs)
        capture.pop()
        for error in (ValueError, KeyboardInterrupt):

            def fail(*_: object, error: type[BaseException] = error) -> None:
                raise error

            handle = projection.register_forward_hook(fail)
            with pytest.raises(error):
                run(model, inputs)
            handle.remove()
            run(model, inputs)
            assert attention.config is config
            assert capture.pop().requires_grad


@pytest.mark.filterwarnings("ignore:flex_attention called without", "ignore:_compile flag:DeprecationWarning")
@pytest.mark.parametrize("name", each(["llava_left_padded", "gemma3_sliding", "paligemma"], slow=False))
def test_flex_attention_masks_are_rebuilt(name):
    case = CASES[name]
    model, inputs = case.build()
    _, expected = case.reference(model, inputs)
    set_kernel(model, "flex_attention")
    # On CPU flex attention has no backward, and compiling it takes half a minute: analysis, uncompiled.
    with torch.compiler.set_stance("force_eager"), torch.no_grad(), capture_attention(model, analysis=True) as capture:
        for _ in range(2):
            run(model, inputs)
            record = capture.pop()
            assert record.layer == case.layers["S"].path
            rows = case.real_rows("S", inputs, record.scores.shape)
            ours, theirs = record.probs.transpose(1, 2)[rows], expected["S"].transpose(1, 2)[rows]
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


Q = torch.randn(2, 4, 5, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("mask", "options", "allowed"),
    [
        (None, {"is_causal": True}, torch.ones(5, 5).tril().bool().expand(2, 1, 5, 5)),
        (torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]), {"is_causal": False}, None),
        (None, {"is_causal": True, "sliding_window": 2}, torch.ones(5, 5).tril().triu(-1).bool().expand(2, 1, 5, 5)),
    ],
)
def test_flash_kernels_say_their_mask_in_options(mask, options, allowed):
    from attncongruence.capture.kernels import _operation
    from attncongruence.capture.record import CapturedAttention

    record = CapturedAttention("attention", _operation(nn.Identity(), Q, Q, mask, options))
    expected = mask.bool()[:, None, None].expand(2, 1, 5, 5) if allowed is None else allowed
    assert torch.equal(record.allowed.expand(2, 1, 5, 5), expected)
    scores = (Q @ Q.mT / 8**0.5).masked_fill(~expected, -torch.inf)
    torch.testing.assert_close(record.scores, scores)


@pytest.mark.parametrize("options", [{"softcap": 30.0}, {"s_aux": torch.ones(4)}])
def test_kernels_that_do_more_are_left_to_the_error_of_an_empty_capture(options):
    from attncongruence.capture.kernels import _operation

    assert _operation(SimpleNamespace(is_causal=True), Q, Q, None, options) is None
