"""token_layout: video counts as image, audio as neither, and a tokenizer says what is no word."""

from types import SimpleNamespace

import pytest
import torch
import transformers
from torch import nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from attncongruence import TokenLayout, cacr_loss, capture_attention
from attncongruence.integrations.huggingface import token_layout
from attncongruence.integrations.layouts import named_tokens

pytestmark = pytest.mark.needs("transformers>=5.0")
IMAGE, VIDEO, START, END, PAD = 90, 91, 92, 93, 0


def qwen2_vl():
    torch.manual_seed(0)
    config = transformers.Qwen2VLConfig(
        text_config={
            "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
            "intermediate_size": 64, "vocab_size": 100,
            "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]},
        },
        vision_config={"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "patch_size": 4, "mlp_ratio": 2},
        image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=START, vision_end_token_id=END,
    )  # fmt: skip
    return transformers.Qwen2VLForConditionalGeneration(config).train()


def visual(kind, frames=1):
    """Pixels of 4 x 4 patches, which become 4 tokens for each two frames."""
    grid = torch.tensor([[frames, 4, 4]])
    pixels = torch.randn(frames * 16, 3 * 2 * 4 * 4, generator=torch.Generator().manual_seed(len(kind)))
    names = ("pixel_values", "image_grid_thw") if kind == "image" else ("pixel_values_videos", "video_grid_thw")
    return dict(zip(names, (pixels, grid), strict=True))


def batch_of(*kinds):
    """One sample: words, each picture or film between its marks, words."""
    ids, inputs = [10, 11], {}
    for kind in kinds:
        ids += [START, *[IMAGE if kind == "image" else VIDEO] * 4, END]
        inputs |= visual(kind)
    ids = torch.tensor([[*ids, 20, 21, 22]])
    kind_of = (ids == IMAGE).long() + 2 * (ids == VIDEO).long()
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": kind_of, **inputs}


@pytest.mark.parametrize("kinds", [("video",), ("image", "video"), ("video", "image"), ("image",)])
def test_a_film_is_an_image(kinds):
    model, batch = qwen2_vl(), batch_of(*kinds)
    with capture_attention(model, "*language_model.layers.1.self_attn") as capture:
        model(**batch)
        captured = capture.pop()
    ids = batch["input_ids"]
    by_hand = TokenLayout((ids < IMAGE) | (ids > VIDEO), (ids == IMAGE) | (ids == VIDEO))
    layout = token_layout(model, batch, captured)
    assert torch.equal(layout.text, by_hand.text)
    assert torch.equal(layout.image, by_hand.image)
    loss = cacr_loss(captured, layout, direction="language", convention="weighted_mean")
    assert loss == cacr_loss(captured, by_hand, direction="language", convention="weighted_mean") > 0


def test_the_option_says_which_modalities_are_image():
    model, batch = qwen2_vl(), batch_of("image", "video")
    ids = batch["input_ids"]
    for image, ours in ((("image",), ids == IMAGE), (("video",), ids == VIDEO)):
        layout = token_layout(model, batch, image=image)
        assert torch.equal(layout.image, ours)
        assert torch.equal(layout.text, (ids < IMAGE) | (ids > VIDEO))  # the other one is neither
    with pytest.raises(ValueError, match=r"image=\('audio',\) may hold 'image' and 'video'"):
        token_layout(model, batch, image=("audio",))


def configured(**tokens):
    model = nn.Identity()
    model.config = SimpleNamespace(model_type="any", **tokens)
    return model


def test_audio_is_neither():
    inner = transformers.PretrainedConfig(video_token_id=6, audio_token_index=7)
    for model in (
        configured(image_token_id=5, video_token_id=6, audio_token_id=7),
        configured(image_token_id=5, inner=inner),
    ):
        layout = token_layout(model, {"input_ids": torch.tensor([[1, 5, 6, 7, 2]])})
        assert layout.text.int().tolist() == [[1, 0, 0, 0, 1]]
        assert layout.image.int().tolist() == [[0, 1, 1, 0, 0]]
    with pytest.raises(ValueError, match="does not know where 'any' puts text and image"):
        token_layout(configured(audio_token_id=7), {"input_ids": torch.tensor([[1, 7, 2]])})


TOKENIZER = SimpleNamespace(
    all_special_ids=[1], added_tokens_decoder={8: SimpleNamespace(special=True), 9: SimpleNamespace(special=False)}
)


@pytest.mark.parametrize("special", [TOKENIZER, SimpleNamespace(tokenizer=TOKENIZER)])
def test_a_tokenizer_knows_what_is_no_word(special):
    model = configured(image_token_id=5, vision_start_token_id=3, boi_token_index=4)
    inputs = {"input_ids": torch.tensor([[1, 3, 4, 5, 8, 9, 2]])}
    assert token_layout(model, inputs, special=special).text.int().tolist() == [[0, 0, 0, 0, 0, 1, 1]]
    assert token_layout(model, inputs, special=[1]).text.int().tolist() == [[0, 1, 1, 0, 1, 1, 1]]
    assert token_layout(model, inputs, special=special).image.int().tolist() == [[0, 0, 0, 1, 0, 0, 0]]


def test_a_real_tokenizer_knows_its_added_tokens():
    from tests.helpers.vlm import WORDS, llava, processor

    ids = torch.tensor([[WORDS.index(word) for word in ("<s>", "user", "<image>", "mug", "</s>", "<pad>")]])
    layout = token_layout(llava(), {"input_ids": ids}, special=processor())
    assert layout.text.int().tolist() == [[0, 1, 0, 1, 0, 0]]
    assert layout.image.int().tolist() == [[0, 0, 1, 0, 0, 0]]


def test_every_modality_that_transformers_names_is_known():
    """A new name for a placeholder would be laid out as a word: this test sees it."""
    names = set()
    for kind in CONFIG_MAPPING:
        try:
            config = CONFIG_MAPPING[kind]()
        except Exception:  # not made without arguments, or of a missing package
            continue
        waiting = [config]
        while waiting:
            for name, value in vars(waiting.pop()).items():
                if isinstance(value, transformers.PretrainedConfig):
                    waiting.append(value)
                elif name.endswith(("_token_id", "_token_index")) and type(value) is int:
                    names.add(name.rsplit("_token_", 1)[0])
    kinds = {name: set(named_tokens(SimpleNamespace(**{f"{name}_token_id": 5}))) for name in names}
    assert {name for name, kind in kinds.items() if kind - {"marks"}} >= {"image", "video", "audio"}
    media = ("image", "video", "vision", "audio", "speech", "pixel", "frame", "sound", "patch")
    assert not {name for name, kind in kinds.items() if not kind and any(word in name for word in media)}


def test_a_mask_that_does_not_fit_the_ids_is_explained():
    with pytest.raises(ValueError, match=r"\(1, 7\), and input_ids \(1, 4\).*prefix or prompt tuning"):
        token_layout(
            configured(image_token_id=5), {"input_ids": torch.ones(1, 4).long(), "attention_mask": torch.ones(1, 7)}
        )
