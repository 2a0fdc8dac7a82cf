"""Each private part of transformers does what `_compat` says of it, and what is said happens where it is gone."""

import sys
import types

import pytest

from attncongruence import CACRLoss, _compat, regularize
from tests.helpers.single_head import ByHand, Fused, record


def test_nothing_is_shown_where_transformers_is_not_loaded(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "transformers"]:
        monkeypatch.delitem(sys.modules, name)
    assert _compat.kernels() is None


@pytest.mark.parametrize("config", [None, {}, object(), types.SimpleNamespace(_attn_implementation="flex_attention")])
def test_configurations_of_others_name_no_kernel(config):
    assert _compat.kernel_of(config) is None
    model = Fused()
    model.config = config
    assert record(model, "").query is not None


interface = pytest.mark.needs("transformers>=4.53", reason="no attention interface before")
trainer = pytest.mark.needs("transformers>=4.30")


def kernel_tables():
    import transformers.masking_utils
    import transformers.modeling_utils  # noqa: F401

    tables = _compat.kernels()
    assert tables is not None
    return tables


@interface
def test_kernels():
    tables = kernel_tables()
    from transformers import AttentionInterface, AttentionMaskInterface

    assert {"sdpa", "flex_attention", "flash_attention_2"} <= set(tables.attention)
    assert {"sdpa", "flex_attention", "flash_attention_2"} <= set(tables.masks)
    for table, public in zip(tables, (AttentionInterface, AttentionMaskInterface), strict=True):
        assert isinstance(table, public)
        table.register("attncongruence_test", len)
        assert public()["attncongruence_test"] is table["attncongruence_test"] is len


@interface
def test_kernel_of():
    kernel_tables()
    from transformers import BertConfig

    config = BertConfig()
    assert _compat.kernel_of(config) is None
    config._attn_implementation = "flex_attention"
    assert _compat.kernel_of(config) == config._attn_implementation == "flex_attention"
    other = _compat.with_kernel(config, "ours")
    assert (other._attn_implementation, config._attn_implementation) == ("ours", "flex_attention")
    assert type(other) is BertConfig
    del config.__dict__[_compat._KERNEL]
    assert _compat.kernel_of(config) is None


@interface
@pytest.mark.parametrize(
    "gone", ["modeling_utils.ALL_ATTENTION_FUNCTIONS", "masking_utils.ALL_MASK_ATTENTION_FUNCTIONS"]
)
def test_without_an_interface_nothing_is_shown_and_nothing_raises(monkeypatch, gone):
    kernel_tables()
    from transformers import BertConfig

    model = Fused()
    model.config = config = BertConfig()
    config.__dict__[_compat._KERNEL] = "flex_attention"
    monkeypatch.delattr(f"transformers.{gone}")
    assert _compat.kernels() is None
    assert record(model, "").query is not None
    assert model.config is config


@trainer
def test_exportable_state(monkeypatch):
    from transformers import trainer_callback

    there = _compat.exportable_state()
    if hasattr(trainer_callback, "ExportableState"):
        assert there is trainer_callback.ExportableState
        assert callable(there.state)
        monkeypatch.delattr(trainer_callback, "ExportableState")
    gone = _compat.exportable_state()
    assert gone is not there or not hasattr(gone, "state")
    assert callable(type("Callback", (trainer_callback.TrainerCallback, gone), {})().on_log)


@trainer
def test_without_kept_states_a_resumed_run_goes_on_at_trainers_step():
    from attncongruence.integrations.huggingface import CongruenceCallback

    model = ByHand()
    with regularize(model, CACRLoss(), n_text=1) as regularizer:
        callback = CongruenceCallback()
        callback.on_train_begin(None, types.SimpleNamespace(global_step=5), None, model=model)
        assert regularizer.step == 5


@pytest.mark.needs("accelerate>=1.3")
def test_accelerate_is_asked_in_public():
    from accelerate import Accelerator, state

    state.AcceleratorState._reset_state(True)
    state.GradientState._reset_state()
    assert not state.is_initialized()
    Accelerator(cpu=True)
    assert state.is_initialized()
    assert state.GradientState().sync_gradients is True
    state.AcceleratorState._reset_state(True)
    state.GradientState._reset_state()
