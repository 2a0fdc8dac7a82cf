"""Real PEFT: adapters train as by hand, layers keep the names of docs/models.md, k-bit preparation names its remedy."""

import functools

import pytest
import torch
from torch import Tensor, nn

from attncongruence import CACRLoss, capture_attention, find_attention, regularize
from tests.helpers.training import (
    LOSSES,
    LR,
    MODELS,
    TEXT,
    furthest,
    llava,
    llava_batch,
    llava_layout,
    regularized,
    schedule,
)

pytestmark = pytest.mark.needs("peft>=0.20", "transformers>=5.0")
CLOSE, STEPS = 1e-6, 3
TARGETS = {"llava": ["q_proj", "v_proj"], "vilt": ["query", "value"]}
LAYER = {
    "llava": "model.language_model.layers.1.self_attn",
    "vilt": "vilt.encoder.layer.1.attention.attention",
}


def adapted(model: nn.Module, name: str = "llava", mixed: bool = False, **options: object) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(3)
    options = {"target_modules": TARGETS[name], "r": 4, "init_lora_weights": False, **options}
    return get_peft_model(model, LoraConfig(**options), mixed=mixed)


def trained(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters() if p.requires_grad]


def loop_by_hand(name: str, **options: object) -> list[Tensor]:
    model = adapted(MODELS[name][0](), name, **options).train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=LR)
    batch = MODELS[name][1]()
    where = TEXT if name == "vilt" else llava_layout(batch)
    (attention,) = [m for n, m in model.named_modules() if n.endswith(LAYER[name])]
    with capture_attention(model, attention) as capture:
        for step in range(STEPS):
            main = model(**batch).loss
            (main + schedule(step) * LOSSES[name](capture.pop(), where)).backward()
            optimizer.step()
            optimizer.zero_grad()
    return trained(model)


@pytest.mark.parametrize("first", ["regularize", "peft"])
@pytest.mark.parametrize(
    ("name", "options"),
    [("llava", {}), ("vilt", {}), ("llava", {"use_dora": True}), ("llava", {"modules_to_save": ["lm_head"]})],
    ids=["llava", "vilt", "DoRA", "modules to save"],
)
def test_adapters_train_as_by_hand(name, options, first):
    base, batch = MODELS[name][0](), MODELS[name][1]()
    regularizer = regularized(name, base) if first == "regularize" else None
    model = adapted(base, name, **options).train()
    regularizer = regularizer or regularized(name, model)
    assert regularizer.model is base
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=LR)
    before = trained(model)
    for step in range(STEPS):
        model(**batch).loss.backward()
        reached = {n for n, p in model.named_parameters() if p.grad is not None}
        assert reached
        assert all("lora" in n or "modules_to_save" in n for n in reached)
        optimizer.step()
        optimizer.zero_grad()
        assert regularizer.step == step + 1
    assert furthest(trained(model), loop_by_hand(name, **options)) < CLOSE
    assert furthest(trained(model), before) > 1000 * CLOSE


@pytest.mark.parametrize("wrap", ["LoRA", "mixed", "compiled", "DDP", "prompt"])
def test_layers_have_their_names_under_wrappers(wrap):
    from peft import PromptTuningConfig, get_peft_model

    expected = find_attention(llava())
    assert LAYER["llava"] in expected
    base = llava()
    if wrap == "prompt":
        own = {"num_layers": 2, "token_dim": 16, "num_attention_heads": 2}
        model = get_peft_model(base, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, **own))
    else:
        model = adapted(base, mixed=wrap == "mixed")
    if wrap == "compiled":
        model = torch.compile(model, backend="eager")
    if wrap == "DDP":
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
        try:
            model = nn.parallel.DistributedDataParallel(model)
        finally:
            torch.distributed.destroy_process_group()
    assert find_attention(model) == expected
    # As typed on the page, with wildcards, and with the prefix of the wrapper.
    (long,) = [name for name, module in model.named_modules() if name.endswith(LAYER["llava"])]
    for layer in (LAYER["llava"], "*language_model.layers.1.self_attn", long, long.replace(".language", ".l*")):
        with capture_attention(model, layer) as capture:
            assert capture.model is base
            assert [list(watch.modules) for watch in capture._watches] == [[LAYER["llava"]]]
    with pytest.raises(ValueError, match=r"no module is called 'base_model\.layers\.1\.self_attn'"):
        capture_attention(model, "base_model.layers.1.self_attn")


def test_a_part_of_the_users_own_keeps_its_name():
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base_model = nn.Sequential(nn.MultiheadAttention(8, 2))

    assert find_attention(Own()) == {"base_model.0": "MultiheadAttention"}
    assert find_attention(nn.Sequential(adapted(llava())))["0." + LAYER["llava"]] == "LlamaAttention"  # in the middle


def test_token_layout_finds_the_configuration():
    from attncongruence.integrations.huggingface import token_layout

    batch, model = llava_batch(), adapted(llava()).train()
    layout, expected = token_layout(model, batch), llava_layout(batch)
    assert torch.equal(layout.text, expected.text)
    assert torch.equal(layout.image, expected.image)
    regularizer = regularize(model, LOSSES["llava"], functools.partial(token_layout, model))
    model(**batch)
    other = regularized("llava", again := adapted(llava()).train())
    again(**batch)
    torch.testing.assert_close(regularizer.last.congruence, other.last.congruence)


def prepared(kwargs: dict | None, adapter: bool = True) -> nn.Module:
    """As for a model that bitsandbytes has quantized; its weights stay floats here."""
    from peft import prepare_model_for_kbit_training

    model = llava()
    model.is_loaded_in_8bit = True
    model = prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs=kwargs)
    return adapted(model).train() if adapter else model.train()


def test_kbit_preparation_with_its_remedy():
    model = prepared({"use_reentrant": False})
    assert model.get_base_model().is_gradient_checkpointing
    regularizer = regularized("llava", model)
    model(**llava_batch()).loss.backward()
    plain = adapted(llava()).train()
    other = regularized("llava", plain)
    plain(**llava_batch()).loss.backward()
    assert float(regularizer.last.congruence) == pytest.approx(float(other.last.congruence), abs=1e-7)
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        if ours.requires_grad:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-7)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("layers", [-1, LAYER["llava"]])
def test_kbit_preparation_that_checkpoints_the_reentrant_way_names_the_remedy(layers):
    model = prepared({"use_reentrant": True})
    regularized("llava", model, layers=layers)
    with pytest.raises(RuntimeError, match=r"'use_reentrant': False.*prepare_model_for_kbit_training"):
        model(**llava_batch())


def test_frozen_embeddings_with_gradients_of_inputs():
    """`enable_input_require_grads` lets gradients through; the adapters of lower layers get the same ones."""
    model, other = adapted(llava()), adapted(llava())
    model.enable_input_require_grads()
    for each in (model, other):
        each.train()
        regularized("llava", each)
        each(**llava_batch()).loss.backward()
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        if ours.requires_grad:
            torch.testing.assert_close(ours.grad, theirs.grad)


def test_merged_adapters():
    batch = llava_batch()
    model = adapted(llava()).train()
    with capture_attention(model, LAYER["llava"], analysis=True) as capture, torch.no_grad():
        model(**batch)
        apart = capture.pop().scores
        model.merge_adapter()
        model(**batch)
        merged = capture.pop().scores
        model.unmerge_adapter()
        model(**batch)
        again = capture.pop().scores
        with model.disable_adapter():
            model(**batch)
            without = capture.pop().scores
    seen = apart.isfinite()
    torch.testing.assert_close(merged[seen], apart[seen], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(again[seen], apart[seen], rtol=1e-5, atol=1e-5)
    assert (without[seen] - apart[seen]).abs().max() > 1e-3


@pytest.mark.filterwarnings("ignore")
def test_an_attention_that_is_saved_as_a_whole():
    """A copy of the attention trains in the place of the layer, which keeps its name."""
    model = adapted(llava(), target_modules=["gate_proj"], modules_to_save=["self_attn"]).train()
    regularizer = regularized("llava", model, layers=LAYER["llava"])
    model(**llava_batch()).loss.backward()
    assert regularizer.last.congruence > 0
    grads = [p.grad for n, p in model.named_parameters() if "self_attn.modules_to_save.default.q_proj" in n]
    assert sum(float(grad.abs().sum()) for grad in grads if grad is not None) > 0


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("kind", "message"),
    [("PromptTuningConfig", r"needs inputs\['input_ids'\], got .*'inputs_embeds'"), ("PrefixTuningConfig", "")],
)
def test_virtual_tokens_are_refused_by_token_layout(kind, message):
    import peft

    from attncongruence.integrations.huggingface import token_layout

    heads = 1 if kind == "PrefixTuningConfig" else 2  # of keys
    own = {"num_layers": 2, "token_dim": 8 * heads, "num_attention_heads": heads}
    settings = getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=3, **own)
    model = peft.get_peft_model(llava(), settings).train()
    regularize(model, CACRLoss(direction="language"), functools.partial(token_layout, model), layers=LAYER["llava"])
    with pytest.raises((ValueError, RuntimeError), match=message):
        model(**llava_batch())
