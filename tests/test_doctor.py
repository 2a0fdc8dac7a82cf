"""The doctor tells what is so: layers, layouts and losses on real models, problems by name, code that runs."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from attncongruence import PRINTED, TokenLayout, cacr_loss, capture_attention, iais_loss
from attncongruence.doctor import examine
from attncongruence.doctor.report import Problem, Report, as_text
from tests.helpers import training
from tests.helpers.models import ByHandAttention, Plain, X
from tests.zoo import CASES, each, needs

pytestmark = pytest.mark.filterwarnings("ignore")  # libraries on their own tiny random models


def captured(model, inputs, layer):
    """By hand: one forward pass as the doctor makes them, in training mode under its seed."""
    model.train()
    with capture_attention(model, layer) as capture:
        torch.manual_seed(0)
        model(**inputs)
        return capture.pop()


masked_timm = pytest.mark.needs("timm>=1.0.31", reason="blocks take no mask in 1.0.3")


@pytest.mark.parametrize(
    "name",
    [
        *each(["vilt", "llava", "git", "torch_encoder", "florence2"], slow=False),
        pytest.param("timm_fused", marks=masked_timm),
    ],
)
def test_real_models_need_no_word_about_their_layout(name):
    case = CASES[name]
    model, inputs = case.build()
    report = examine(model, inputs, rounds=1)
    assert report.ok
    assert report.layer == case.layers["S"].path
    assert (report.default == report.layer) == case.last == (name != "florence2")
    text, image = case.text(inputs), case.image(inputs)
    assert report.placed.guessed
    assert report.placed.confirmed
    assert (report.placed.text, report.placed.image) == (text.sum(1).tolist(), image.sum(1).tolist())
    assert report.direction == ("language" if name in ("llava", "git") else "both")
    assert (report.unchanged, report.restored) == (True, True)

    record, layout = captured(model, inputs, report.layer), TokenLayout(text, image)
    assert report.captured.shape == record.scores.shape
    released, printed, _, singular = report.losses
    by_hand = [
        (released.language, cacr_loss(record, layout, direction="language")),
        (printed.language, cacr_loss(record, layout, convention=PRINTED, direction="language")),
        (singular.language, iais_loss(record, layout, direction="language")),
    ]
    if name == "git":  # the image comes first and sees no text
        assert released.vision is released.both is None
        assert "no pair of VL may attend" in released.why
    else:
        by_hand.append((released.both, cacr_loss(record, layout)))
    for ours, theirs in by_hand:
        assert ours == pytest.approx(theirs.item(), rel=1e-5)


class Shifted(nn.Module):
    """One head whose softmax sees scores less their row's maximum, as in some versions of LayoutLMv3."""

    def __init__(self):
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x):
        scores = self.query(x)[:, None] @ self.key(x)[:, None].transpose(-1, -2)
        return torch.softmax(scores - scores.amax(-1, keepdim=True), -1) @ self.value(x)[:, None]


@needs("llava")
def test_what_was_captured():
    vilt, llava = (examine(*CASES[name].build(), rounds=1).captured for name in ("vilt", "llava"))
    assert (vilt.shape, vilt.dtype, vilt.mask, vilt.streaming) == ((2, 4, 25, 25), "float32", "tokens", True)
    assert (llava.mask, llava.offers_query_key, llava.streaming) == ("causal", True, False)
    biased = examine(*CASES["layoutlmv3"].build(), rounds=1)
    assert (biased.captured.offers_query_key, biased.ok) == (False, True)
    shifted = examine(Shifted(), (torch.randn(2, 5, 8),), 2, rounds=1)
    assert (shifted.captured.offers_query_key, shifted.captured.shifted, shifted.ok) == (False, True, True)
    assert "PRINTED, which weighs with raw scores" in as_text(shifted)
    assert not vilt.shifted


def test_gradient_is_that_of_the_loss_alone():
    model, inputs = CASES["vilt"].build()
    report = examine(model, inputs, rounds=1)
    names = [name.rpartition("attention.")[2] for name in report.gradient.reached]
    assert sorted(names) == ["key.weight", "query.bias", "query.weight"]
    cacr_loss(captured(model, inputs, report.layer), inputs["input_ids"].shape[1]).backward()
    outside = [p for name, p in model.named_parameters() if not name.startswith(report.layer)]
    assert report.gradient.elsewhere == sum(p.grad is not None and bool(p.grad.any()) for p in outside)
    assert report.overhead.rounds == 1
    assert report.overhead.median > 0


class TakesMapping(Plain):
    """Text and image side by side, told apart by token types; called as `model(batch)`."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(10, 16)

    def forward(self, batch):
        return super().forward(torch.cat([self.words(batch["ids"]), batch["pixels"]], 1))


def mapping():
    ids, types = torch.randint(10, (2, 3)), torch.tensor([[0, 0, 0, 1, 1, 1, 1]]).expand(2, 7)
    return TakesMapping(), ({"ids": ids, "pixels": torch.randn(2, 4, 16), "token_type_ids": types},)


SNIPPETS = {
    "mapping": mapping,
    "vilt": lambda: (training.vilt(), training.vilt_batch(4)),
    "llava": lambda: (training.llava(), training.llava_batch(4)),
    "named": lambda: (Plain(), X, 3),
    "positional": lambda: ((made := CASES["timm_fused"].build())[0], tuple(made[1].values())),
    "number": lambda: (*CASES["torch_encoder"].build(), 8),
    "function": lambda: (*CASES["timm_unfused"].build(), lambda batch, captured: batch["input_ids"].shape[1]),
}


@pytest.mark.parametrize("name", [*(name for name in SNIPPETS if name != "llava"), *each(["llava"], slow=False)])
def test_the_code_it_prints_runs(name):
    model, batch, *said = SNIPPETS[name]()
    report = examine(model, batch, *said, layers=-2 if name in ("named", "mapping") else -1, rounds=1)
    assert ("TokenLayout.from_token_type_ids" in report.snippet) == (name == "mapping")
    model.train()
    names = {
        "model": model,
        "loader": [batch] * 2,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.0),
        "main_loss": lambda out: (out if isinstance(out, torch.Tensor) else out[0]).square().mean(),
        **({"n_text": said[0]} if name == "function" else {}),
    }
    torch.manual_seed(0)
    exec(report.snippet, first := {**names, "loader": [batch]})
    exec(report.snippet, names)
    assert names["step"] == 1
    expected = getattr(report.losses[0], report.direction)
    assert first["congruence"].item() == pytest.approx(expected, rel=1e-5)

    assert (report.one_line is not None) == (name in ("vilt", "llava"))
    if report.one_line is not None:
        torch.manual_seed(0)
        plain = model(**batch).loss
        exec(report.one_line.replace("regularize(model", "regularizer = regularize(model"), names)
        torch.manual_seed(0)
        added = model(**batch).loss - plain
        assert added.item() == pytest.approx(names["weight"](0) * expected, rel=0.02, abs=1e-6)
        assert names["regularizer"].last.congruence.item() == pytest.approx(expected, rel=1e-5)


FROZEN = [f"second.self_attn.{n}" for n in ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias")]


def without_gradient(layer, x):
    with torch.no_grad():
        return layer(x)


@pytest.mark.parametrize(
    ("model", "came", "remedy"),
    [
        (
            Plain().requires_grad_(False),
            "get no gradient: " + ", ".join(FROZEN) + " are frozen",
            "requires_grad_(True)",
        ),
        (Plain(without_gradient), "second runs with gradients off", "remove the no_grad()"),
        (
            Plain(lambda layer, x: checkpoint(layer, x, use_reentrant=True)),
            "second runs under reentrant checkpointing",
            "use_reentrant=False",
        ),
    ],
    ids=["frozen", "no_grad", "reentrant"],
)
def test_what_keeps_gradient_away_is_named(model, came, remedy):
    report = examine(model, X, 3)
    assert not report.ok
    (problem,) = report.problems
    assert came in problem.came
    assert remedy in problem.remedy
    assert report.losses[0].language > 0
    assert report.snippet is None
    assert "\n\nPROBLEM 1\n" in as_text(report)
    assert as_text(report).endswith("\n\nProblems: 1.")


def test_a_frozen_layer_that_others_feed_is_no_problem():
    model = Plain()
    model.second.requires_grad_(False)
    report = examine(model, X, 3, rounds=1)
    assert report.ok
    assert report.notes == ["second.self_attn is frozen: the loss trains 14 parameters before it."]


def test_attention_that_cannot_be_seen():
    report = examine(nn.Sequential(nn.Linear(16, 16), ByHandAttention()), X, 3)
    assert report.attention == []
    assert report.unseen == {"1": "ByHandAttention"}
    (problem,) = report.problems
    assert "No softmax over a product of queries and keys" in problem.came
    assert "not seen     1 (ByHandAttention)" in as_text(report)


CODE = [
    "model.get_submodule('encoder.layers.11.crossattention.self').requires_grad_(True)",
    "gradient_checkpointing_kwargs={'use_reentrant': False}",
    "TokenLayout.from_segments(text=pad(ids > 2, 40), image=torch.ones(2, 9))",
]


@pytest.mark.parametrize("code", CODE)
def test_code_in_a_sentence_stays_in_one_piece(code):
    for words in range(40):
        problem = Problem("the queries are frozen", "gradient", f"{'word ' * words}write {code}, or {'word ' * 30}")
        lines = as_text(Report("Model", problems=[problem])).splitlines()
        assert sum(code in line for line in lines) == 1
        assert all(len(line) < 100 for line in lines)


def test_a_layout_against_the_pictures_is_told():
    model, inputs = CASES["git"].build()  # the image comes first
    report = examine(model, inputs, inputs["input_ids"].shape[1])
    assert "positions that n_text calls text change with the pictures" in report.problems[0].came
    assert "Those that change: 0 to 4" in report.problems[0].came


@pytest.mark.parametrize("name", each(["lxmert", "blip_itm", "mllama", "grounding_dino", "timm_beit"], slow=False))
def test_without_a_joint_sequence_nothing_is_made_up(name):
    report = examine(*CASES[name].build(), rounds=1)
    assert not report.ok
    assert report.placed is None
    assert ("AttentionBlocks.from_streams" in report.problems[0].remedy) == (name != "timm_beit")
    assert all(line.isascii() and len(line) < 100 for line in as_text(report).splitlines())


def test_layouts_that_do_not_fit():
    for said, came in [
        (9, "does not fit second.self_attn, which attends over 7 positions"),
        (lambda batch, captured: batch["ids"], "n_text raised KeyError for second.self_attn: 'ids'"),
        (lambda batch, captured: "three", "it is a str, and must be an int"),
        (TokenLayout(torch.ones(1, 7, dtype=torch.bool), torch.zeros(1, 7, dtype=torch.bool)), "no sample has both"),
    ]:
        assert came in examine(Plain(), X, said).problems[0].came


def test_a_function_gets_batch_and_record_by_position():
    def count(by_name, record):
        assert (list(by_name), record.layer) == (["x"], "second.self_attn")
        return torch.tensor([3, 4])

    assert examine(Plain(), X, count, rounds=1).placed.text == [3, 4]


def test_layers_and_direction_are_as_asked():
    report = examine(Plain(), X, 3, layers=-2, direction="vision", rounds=1)
    assert (report.layer, report.direction) == ("first.self_attn", "vision")
    assert 'capture_attention(model, "first.self_attn")' in report.snippet
    assert 'direction="vision"' in report.snippet
    assert examine(Plain(), X, 3, layers="first*attn", rounds=1).layer == "first.self_attn"
    assert "means: first.self_attn (7 x 7), second" in examine(Plain(), X, 3, layers="*.self_attn").problems[0].came
    model, inputs = CASES["git"].build()
    assert "'vision' is not defined" in examine(model, inputs, direction="vision").problems[0].came


def test_the_model_is_left_as_found():
    model = Plain().eval()
    model.first.train()
    model.first.linear1.weight.grad = grad = torch.ones_like(model.first.linear1.weight)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    assert examine(model, X, 3, rounds=1).restored
    assert torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert (model.training, model.first.training, model.norm.training) == (False, True, False)
    assert model.first.linear1.weight.grad is grad
    assert torch.equal(grad, torch.ones_like(grad))
    assert model.second.linear1.weight.grad is None
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_wrappers_and_broken_models():
    (problem,) = examine(nn.DataParallel(Plain()), X, 3).problems
    assert "DataParallel copies the model" in problem.came
    assert problem.remedy == "examine model.module."
    assert "raised AssertionError: was expecting" in examine(Plain(), (torch.zeros(1, 4, 5),), 3).problems[0].came


def test_examine_rejects():
    with pytest.raises(ValueError, match=r"must be a torch\.nn\.Module"):
        examine(print, X)
    with pytest.raises(ValueError, match=r"lone tensor into a tuple"):
        examine(Plain(), X[0])
    with pytest.raises(ValueError, match="direction='up' is not known"):
        examine(Plain(), X, 3, direction="up")
    with pytest.raises(ValueError, match="rounds=0"):
        examine(Plain(), X, 3, rounds=0)
