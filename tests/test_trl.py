"""`regularize(trainer, ...)` in the real trainers of TRL, with a tiny vision-language model and a real processor."""

import functools
import itertools
from contextlib import nullcontext

import pytest
import torch

from attncongruence import CACRLoss, capture_attention, regularize

pytestmark = [pytest.mark.needs("trl>=1.15", "datasets", reason="TRL's own trainers"), pytest.mark.slow]
LOSS = CACRLoss("weighted_mean", direction="language")


def schedule(step):
    """Another weight at each step, and so large that a wrong one shows."""
    return 3.0 + 2.0 * step


def options(tmp_path, **own):
    return {
        "output_dir": str(tmp_path),
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 4,
        "learning_rate": 0.05,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "report_to": [],
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        **own,
    }


def sft(tmp_path, model, kind=None, **own):
    import trl

    from tests.helpers.vlm import conversations, processor

    more = {name: own.pop(name) for name in ("compute_loss_func", "callbacks", "peft_config") if name in own}
    return (kind or trl.SFTTrainer)(
        model=model,
        args=trl.SFTConfig(max_length=None, **options(tmp_path, **own)),
        train_dataset=conversations("completion"),
        eval_dataset=conversations("completion", size=2),
        processing_class=processor(),
        **more,
    )


def dpo(tmp_path, model, kind=None, **own):
    import trl

    from tests.helpers.vlm import conversations, llava, processor

    return (kind or trl.DPOTrainer)(
        model=model,
        ref_model=llava(seed=1),
        args=trl.DPOConfig(max_length=None, **options(tmp_path, **own)),
        train_dataset=conversations("chosen", "rejected"),
        processing_class=processor(),
    )


def grpo(tmp_path, model, kind=None, **own):
    import trl

    from tests.helpers.vlm import conversations, processor

    def reward(completions, **kwargs):
        return [float(len(str(completion)) % 7) for completion in completions]

    config = trl.GRPOConfig(
        num_generations=2, max_completion_length=4, beta=0.0, **options(tmp_path, max_steps=2, **own)
    )
    return (kind or trl.GRPOTrainer)(
        model=model, reward_funcs=reward, args=config, train_dataset=conversations(), processing_class=processor()
    )


def layout(batch, captured):
    from attncongruence.integrations.huggingface import token_layout
    from tests.helpers.vlm import llava

    return token_layout(llava(), batch, captured)


def weights_of(model):
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def assert_same(model, other):
    from tests.helpers.vlm import llava

    mine, theirs = weights_of(model), weights_of(other)
    torch.testing.assert_close(mine, theirs, rtol=0.0, atol=1e-6)
    assert (mine - weights_of(llava())).abs().max() > 1e-2  # it has trained


def by_hand(kind, divided):
    """A subclass whose author adds the loss in `compute_loss`; `divided`: `training_step` divides what it returns."""

    class ByHand(kind):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            if not self.model.training:
                return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            seen = []
            with capture_attention(self.model, layers="*language_model.layers.1.self_attn") as capture:
                handle = self.model.register_forward_hook(
                    lambda m, args, batch, out: seen.append(dict(batch)) if torch.is_grad_enabled() else None,
                    with_kwargs=True,
                )
                loss = super().compute_loss(model, inputs, False, num_items_in_batch)
                handle.remove()
                records = capture.pop_all()
            assert len(records) == len(seen) > 0
            terms = [LOSS(record, layout(batch, record)) for record, batch in zip(records, seen, strict=True)]
            term = sum(terms) / len(terms)
            if not divided:
                term = term / self.current_gradient_accumulation_steps
            return loss + schedule(self.state.global_step) * term

    return ByHand


CASES = {
    "sft": (sft, "SFTTrainer", False, {}),
    "sft with evaluation": (sft, "SFTTrainer", False, {"eval_strategy": "steps", "eval_steps": 1}),
    "sft in bf16": (sft, "SFTTrainer", False, {"bf16": True}),
    "sft checkpointed": (
        sft,
        "SFTTrainer",
        False,
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
    ),
    "sft with another loss": (
        sft,
        "SFTTrainer",
        False,
        {"compute_loss_func": lambda outputs, labels, num_items_in_batch=None: outputs.logits.square().mean() / 9},
    ),
    "dpo": (dpo, "DPOTrainer", True, {}),
    "grpo": (grpo, "GRPOTrainer", False, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_trainer_equals_one_with_the_loss_written_in(case, tmp_path):
    import trl

    from tests.helpers.vlm import llava

    make, name, divided, own = CASES[case]
    model, hand = llava(), llava()
    trainer = make(tmp_path / "ours", model, **own)
    with regularize(trainer, LOSS, layout, weight=schedule) as regularizer:
        trainer.train()
    make(tmp_path / "hand", hand, by_hand(getattr(trl, name), divided), **own).train()
    assert_same(model, hand)
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["congruence_weight"] for entry in logged] == [schedule(step) for step in range(len(logged))]
    assert all(entry["congruence_loss"] > 0 for entry in logged)
    assert regularizer.step == len(logged)
    assert not {"training_step", "log"} & trainer.__dict__.keys()  # closed


def test_supervised_finetuning_equals_a_loop_without_a_trainer(tmp_path):
    """6 samples in micro-batches of 2, of which 2 make a step: the last step of an epoch has one."""
    from tests.helpers.vlm import llava

    model, hand = llava(), llava()
    trainer = sft(tmp_path / "ours", model, learning_rate=0.01)
    regularize(trainer, LOSS, layout, weight=schedule)
    trainer.train()

    capture = capture_attention(hand)
    optimizer = torch.optim.SGD(hand.parameters(), lr=0.01)
    loader = sft(tmp_path / "hand", hand).get_train_dataloader()
    step = 0
    while step < 4:
        batches = iter(loader)
        while group := list(itertools.islice(batches, 2)):
            items = sum(int(batch["labels"][:, 1:].ne(-100).sum()) for batch in group)
            for batch in group:
                labels = batch.pop("labels")
                logits = hand.train()(**batch).logits[:, :-1].flatten(0, 1)
                main = torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum") / items
                captured = capture.pop()
                (main + schedule(step) * LOSS(captured, layout(batch, captured)) / len(group)).backward()
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            if step == 4:
                break
    assert_same(model, hand)


def test_a_resumed_run_goes_on(tmp_path):
    """Adapters, since Trainer itself does not load the checkpoint of a whole LLaVA into LLaVA (transformers 5.24)."""

    def trained(steps, folder, resumed=None):
        own = {"max_steps": steps, "save_strategy": "steps", "save_steps": 2, "peft_config": adapters()}
        trainer = sft(tmp_path / folder, llava(), **own)
        with regularize(trainer, LOSS, layout, weight=schedule):
            trainer.train(resume_from_checkpoint=resumed)
        return trainer

    from tests.helpers.vlm import llava

    whole = trained(4, "whole")
    trained(2, "parts")
    resumed = trained(4, "parts", str(tmp_path / "parts" / "checkpoint-2"))
    torch.testing.assert_close(weights_of(resumed.model), weights_of(whole.model), rtol=0.0, atol=1e-6)
    assert [entry["congruence_weight"] for entry in resumed.state.log_history if "loss" in entry] == [3, 5, 7, 9]


def test_a_model_whose_loss_is_not_read_is_an_error_at_the_first_step(tmp_path):
    from tests.helpers.vlm import llava

    model = llava()
    regularize(model, LOSS, layout)
    trainer = sft(tmp_path, model, max_steps=1)
    with pytest.raises(RuntimeError, match=r"no backward pass.*regularize\(trainer, \.\.\.\)"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_a_callback_regularizes_when_training_begins(tmp_path):
    from attncongruence.integrations.huggingface import RegularizeCallback
    from tests.helpers.vlm import llava

    model, other = llava(), llava()
    sft(tmp_path / "ours", model, callbacks=[RegularizeCallback(LOSS, weight=schedule)]).train()
    trainer = sft(tmp_path / "other", other)
    regularize(trainer, LOSS, functools.partial(layout), weight=schedule)
    trainer.train()
    assert_same(model, other)


def adapters():
    import peft

    torch.manual_seed(3)
    return peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2)


def test_adapters_are_trained_and_nothing_else(tmp_path):
    import trl

    from tests.helpers.vlm import llava

    def trained(folder, kind=None):
        trainer = sft(tmp_path / folder, llava(), kind, peft_config=adapters())
        with nullcontext() if kind else regularize(trainer, LOSS, layout, weight=schedule):
            trainer.train()
        return trainer.model

    ours, hand, plain = trained("ours"), trained("hand", by_hand(trl.SFTTrainer, False)), llava()
    torch.testing.assert_close(weights_of(ours), weights_of(hand), rtol=0.0, atol=1e-6)
    moved = {name for name, parameter in ours.named_parameters() if parameter.requires_grad}
    assert len(moved) == 2 * 2 * 4  # A and B of q and v in two layers of each tower
    assert all("lora" in name for name in moved)
    unwrapped = ours.base_model.model.get_submodule("model.language_model.layers.1.self_attn.q_proj.base_layer")
    torch.testing.assert_close(
        unwrapped.weight, plain.get_submodule("model.language_model.layers.1.self_attn.q_proj").weight, rtol=0, atol=0
    )
