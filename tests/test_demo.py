"""The demo: its layout is ViLT's own, its loop is an ordinary one, its table says what the attention does."""

import json
import math
import random
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import ViltForImageAndTextRetrieval, ViltProcessor

from attncongruence import TokenLayout, capture_attention, exponential_warmup
from examples import demo

pytestmark = pytest.mark.slow

ITEMS = demo.WORLD.items(60, seed=5)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As in the demo: with tensors this small, threads on a busy machine mostly wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def processor() -> ViltProcessor:
    return demo.make_processor([item.caption for item in ITEMS])


@pytest.fixture
def model(processor: ViltProcessor) -> ViltForImageAndTextRetrieval:
    torch.manual_seed(0)
    return demo.make_model(len(processor.tokenizer))


def first_batch(processor: ViltProcessor, seed: int = 0) -> demo.Batch:
    return next(demo.training_batches(ITEMS, processor, 1, seed))


def mask_of_encoder(model: ViltForImageAndTextRetrieval, inputs: dict[str, Tensor]) -> Tensor:
    """Which joint positions the model itself lets anyone attend to, `(batch, length)`: from its encoder's arguments."""
    seen: list[Tensor] = []
    handle = model.vilt.encoder.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["attention_mask"]), with_kwargs=True
    )
    with torch.no_grad():
        model(**inputs)
    handle.remove()
    (mask,) = seen
    assert bool(((mask == 0) | (mask < -1e30)).all())
    assert torch.equal(mask, mask[:, :, :1].expand_as(mask))  # every query sees the same keys
    return mask[:, 0, 0] == 0


def test_batches_are_padded_both_ways(processor: ViltProcessor) -> None:
    inputs, layout = first_batch(processor)
    assert inputs["input_ids"].shape[0] == 2 * demo.MATCHED
    words, patches = layout.text.sum(1), layout.image.sum(1)
    assert set(words.tolist()) <= set(range(8, 19))
    assert len(set(words.tolist())) > 2
    assert set(patches.tolist()) == {
        6 * 6,
        9 * 6,
        6 * 8,
        7 * 6,
    }  # 160 x 128 becomes 120 x 96, then 112 x 96
    assert int(inputs["attention_mask"].min()) == 0
    assert int(inputs["pixel_mask"].min()) == 0
    assert processor.tokenizer.unk_token_id not in inputs["input_ids"]


@pytest.mark.parametrize("max_image_length", [-1, 40])
def test_layout_is_what_the_model_attends_to(
    model: ViltForImageAndTextRetrieval, processor: ViltProcessor, max_image_length: int
) -> None:
    inputs, layout = first_batch(processor)
    special_ids = [processor.tokenizer.cls_token_id, processor.tokenizer.sep_token_id]
    model.config.max_image_length = max_image_length
    if max_image_length > 0:
        layout = demo.joint_layout(inputs, special_ids, demo.PATCH, max_image_length)
        assert layout.image.sum(1).max() == 40
        assert layout.image.sum(1).min() == 36
    real = mask_of_encoder(model, inputs)
    n_text = inputs["input_ids"].shape[1]
    special = torch.zeros_like(real)
    special[:, :n_text] = torch.isin(inputs["input_ids"], torch.tensor(special_ids))
    special[:, n_text] = True  # the image's [CLS]
    assert torch.equal(layout.text | layout.image | special, real)
    assert not (special & (layout.text | layout.image)).any()
    assert not layout.text[:, n_text:].any()
    assert not layout.image[:, :n_text].any()
    assert not real[:, :n_text].all()
    assert not real[:, n_text:].all()
    assert torch.equal(special.sum(1), torch.full((len(real),), 3))


def test_capture_sees_the_same_mask_and_what_the_model_calculates(
    model: ViltForImageAndTextRetrieval, processor: ViltProcessor
) -> None:
    inputs, layout = first_batch(processor)
    with capture_attention(model, analysis=True) as capture, torch.no_grad():
        theirs = model(**inputs, output_attentions=True).attentions[-1]
        ours = capture.pop()
    assert "layer.1." in ours.layer
    torch.testing.assert_close(ours.probs, theirs, rtol=1e-5, atol=1e-7)
    # Share of attention on positions that are neither word nor patch nor special: none.
    n_text = inputs["input_ids"].shape[1]
    neither = ~(layout.text | layout.image)
    neither[:, :n_text] &= inputs["attention_mask"] == 0
    neither[:, n_text] = False
    assert neither.any()
    assert float((theirs * neither[:, None, None]).abs().max()) == 0


def test_mismatched_pairs_are_false_and_some_only_by_their_roles() -> None:
    rng = random.Random(0)
    pairs = [(item, demo.mismatched_pair(item, ITEMS, rng)) for item in ITEMS * 10]
    assert not any(caption.true_in(picture.scene) for _, (picture, caption) in pairs)
    assert all(item in pair for item, pair in pairs)
    by_roles = [(item, pair) for item, pair in pairs if item.swapped() in pair]
    assert len(by_roles) / len(pairs) == pytest.approx(0.25, abs=0.06)  # 600 draws: standard error 0.018
    assert sum(pair[0] == item for item, pair in by_roles) / len(by_roles) == pytest.approx(0.5, abs=0.15)


# Position 0 is special, 1 and 2 are words, 3 to 5 patches, 6 is padding.
LAYOUT = TokenLayout(
    torch.tensor([[0, 1, 1, 0, 0, 0, 0]]).bool(),
    torch.tensor([[0, 0, 0, 1, 1, 1, 0]]).bool(),
)


def flat_scores() -> Tensor:
    scores = torch.zeros(1, 2, 7, 7)
    scores[..., 6] = -math.inf
    return scores


def test_figures_of_uniform_attention() -> None:
    figures = {name: value.item() for name, value in demo.attention_figures(flat_scores(), LAYOUT).items()}
    assert figures == pytest.approx(
        {
            "language": 0,
            "vision": 0,
            "text_to_image": 50.0,  # three patches of six tokens
            "entropy": math.log2(3),
            "projected_entropy": 1.0,  # two words
        },
        abs=1e-5,
    )


def test_figures_of_attention_by_hand() -> None:
    scores = flat_scores()
    scores[:, :, 1, 3], scores[:, :, 2, 4] = (
        40.0,
        40.0,
    )  # the first word looks at the first patch, the second at the second
    scores[:, :, 3, 3], scores[:, :, 4, 4] = math.log(3), math.log(2)  # A_VV = (3, 1, 1) / 5 and (1, 2, 1) / 4
    figures = {name: value.item() for name, value in demo.attention_figures(scores, LAYOUT).items()}
    assert figures["text_to_image"] == pytest.approx(100)
    assert figures["entropy"] == pytest.approx(0, abs=1e-5)
    # R = (3, 1) / 5 and (1, 2) / 4, so its rows are (3/4, 1/4) and (1/3, 2/3): 2 - (3/4) log2 3 and log2 3 - 2/3 bits
    assert figures["projected_entropy"] == pytest.approx((4 / 3 + math.log2(3) / 4) / 2, abs=1e-5)
    # sigma(R) = sigmoid(d) with d = 2/5 and 1/4, against T = 1/2: sum_j (P_j - T_j) log(P_j / T_j) = (P_0 - 1/2) d
    rows = [(1 / (1 + math.exp(-d)) - 0.5) * d for d in (2 / 5, 1 / 4)]
    assert figures["language"] == pytest.approx(1e3 * sum(rows) / 2, rel=1e-4)


def plain_loop(model: ViltForImageAndTextRetrieval, batches: Iterator[demo.Batch]) -> list[float]:
    """The same training with no trace of this library."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for batch in batches:
        labels = (torch.arange(2 * demo.MATCHED) < demo.MATCHED).float()
        loss = F.binary_cross_entropy_with_logits(model(**batch.inputs).logits[:, 0], labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_the_run_without_is_ordinary_training(model: ViltForImageAndTextRetrieval, processor: ViltProcessor) -> None:
    plain = deepcopy(model)
    torch.manual_seed(3)
    expected = plain_loop(plain, demo.training_batches(ITEMS, processor, 3, seed=1))
    torch.manual_seed(3)
    history = demo.train(model, demo.training_batches(ITEMS, processor, 3, seed=1), 3, lambda step: 0.0, "without")
    assert [row["main"] for row in history] == expected
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


def test_only_matched_pairs_are_regularized(model: ViltForImageAndTextRetrieval, processor: ViltProcessor) -> None:
    matched = [(item, item) for item in ITEMS[: demo.MATCHED]]
    histories = []
    for seed in (0, 1):
        rng = random.Random(seed)
        pairs = matched + [demo.mismatched_pair(item, ITEMS, rng) for item in ITEMS[: demo.MATCHED]]
        batches = iter([demo.encode(processor, pairs)])
        histories += demo.train(deepcopy(model), batches, 1, lambda step: 1.0, "with")
    assert histories[0]["congruence"] == pytest.approx(histories[1]["congruence"], rel=1e-4)
    assert abs(histories[0]["main"] - histories[1]["main"]) > 1e-3


def test_a_large_weight_brings_the_congruence_loss_down(
    model: ViltForImageAndTextRetrieval, processor: ViltProcessor
) -> None:
    batch = first_batch(processor)
    history = demo.train(model, iter([batch] * 30), 30, lambda step: 1000.0, "with")
    assert history[-1]["congruence"] < 0.5 * history[0]["congruence"]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "demo.json"
    result = demo.main(["--steps", "4", "--seed", "1", "--json", str(path)])
    assert json.loads(path.read_text()) == result
    assert set(result) == {"steps", "seed", "seconds", "versions", "figures", "history"}
    assert set(result["versions"]) == {"attncongruence", "python", "torch", "transformers"}
    figures, history = result["figures"], result["history"]
    assert list(figures) == ["uniform", "before", "without", "with"]
    for column in figures.values():
        assert set(column) == {name for name, _, _ in demo.ROWS}
        assert all(math.isfinite(value) and value >= -1e-3 for value in column.values())
    uniform = figures["uniform"]
    assert [uniform[name] for name in ("language", "vision")] == pytest.approx([0, 0], abs=1e-3)
    assert uniform["entropy"] == pytest.approx(math.log2(45), abs=0.1)  # 36, 42, 48 and 54 patches
    for column in (figures["before"], figures["without"], figures["with"]):
        assert column["language"] > 0
        assert column["entropy"] < uniform["entropy"]
        assert column["projected_entropy"] < uniform["projected_entropy"]

    schedule = exponential_warmup(total_steps=4)
    assert [row["weight"] for row in history["with"]] == [schedule(step) for step in range(4)]
    assert [row["weight"] for row in history["without"]] == [0.0] * 4
    assert history["without"][0]["main"] == history["with"][0]["main"]
    assert history["without"][-1]["main"] != history["with"][-1]["main"]
    assert all(math.isfinite(value) for rows in history.values() for row in rows for value in row.values())

    lines = capsys.readouterr().out.splitlines()
    header = next(i for i, line in enumerate(lines) if line.split() == ["uniform", "before", "without", "with"])
    for line, (name, title, _) in zip(lines[header + 1 :], demo.ROWS, strict=False):
        assert line.startswith(title)
        numbers = [float(number) for number in line.removeprefix(title).split()]
        assert numbers == pytest.approx([column[name] for column in figures.values()], abs=0.051)
    assert max(len(line) for line in lines[header:]) <= 80
