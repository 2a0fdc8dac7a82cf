"""token_layout: video counts as image, audio as neither, and a tokenizer says what is no word."""

import re
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


@pytest.mark.parametrize("seed", range(4))
def test_films_and_pictures_at_random(seed):
    """Any number of words, pictures and films of any length, in any order; the layout by hand is laid as they come."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low, high, count=1):
        return torch.randint(low, high, (count,), generator=generator).tolist()

    ids, text, image, pixels, grids = [], [], [], {"image": [], "video": []}, {"image": [], "video": []}

    def lay(tokens, is_text, is_image):
        ids.extend(tokens)
        text.extend([is_text] * len(tokens))
        image.extend([is_image] * len(tokens))

    for _ in range(draw(2, 5)[0]):
        lay(draw(1, 90, draw(1, 4)[0]), True, False)
        kind = "video" if not grids["video"] else ("image", "video")[draw(0, 2)[0]]
        frames = draw(1, 4)[0] if kind == "video" else 1
        lay([START], True, False)
        lay([IMAGE if kind == "image" else VIDEO] * 4 * frames, False, True)
        lay([END], True, False)
        pixels[kind].append(torch.randn(frames * 16, 3 * 2 * 4 * 4, generator=generator))
        grids[kind].append([frames, 4, 4])
    lay(draw(1, 90, 3), True, False)
    ids = torch.tensor([ids])
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    batch["mm_token_type_ids"] = (ids == IMAGE).long() + 2 * (ids == VIDEO).long()
    for kind, (pixel, grid) in {
        "image": ("pixel_values", "image_grid_thw"),
        "video": ("pixel_values_videos", "video_grid_thw"),
    }.items():
        if grids[kind]:
            batch |= {pixel: torch.cat(pixels[kind]), grid: torch.tensor(grids[kind])}
    model = qwen2_vl()
    with capture_attention(model, "*language_model.layers.1.self_attn") as capture:
        model(**batch)
        captured = capture.pop()
    layout, by_hand = token_layout(model, batch, captured), TokenLayout(torch.tensor([text]), torch.tensor([image]))
    loss, expected = (
        cacr_loss(captured, one, direction="language", convention="weighted_mean") for one in (layout, by_hand)
    )
    assert loss == expected > 0


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


@pytest.mark.needs("datasets", reason="the tiny processor stands beside data for TRL")
def test_a_real_tokenizer_knows_its_added_tokens():
    from tests.helpers.vlm import WORDS, llava, processor

    ids = torch.tensor([[WORDS.index(word) for word in ("<s>", "user", "<image>", "mug", "</s>", "<pad>")]])
    layout = token_layout(llava(), {"input_ids": ids}, special=processor())
    assert layout.text.int().tolist() == [[0, 1, 0, 1, 0, 0]]
    assert layout.image.int().tolist() == [[0, 0, 1, 0, 0, 0]]


PLACEHOLDERS = {"image_token_id", "image_token_index", "video_token_id", "video_token_index"}
SOUNDS = {"audio_token_id", "audio_token_index", "speech_token_id"}
MARKS = """audio_bos_token_id audio_delay_token_id audio_end_token_id audio_eos_token_id audio_latent_token_id
    audio_pad_token_id audio_prompt_bos_token_id audio_prompt_token_id audio_start_token_id boa_token_id boi_token_id
    boi_token_index eoa_token_id eoa_token_index eoi_token_id eoi_token_index frame_end_token_id frame_start_token_id
    im_end_id im_end_token_id im_newline_id im_start_id im_start_token_id image_bos_token_id image_end_id
    image_end_token_id image_start_id image_start_token_id low_res_image_start_token_id newline_id slice_end_id
    slice_start_id video_end_token_id video_start_token_id vision_end_token_id vision_start_token_id
    visual_indicator_token_ids"""
# Codes of a speech decoder, and another name of Molmo 2's image_token_id.
NONE_OF_THE_VOCABULARY = {"audio_stream_bos_id", "audio_stream_eos_id", "image_patch_id"}


@pytest.mark.slow
def test_every_token_that_transformers_names_is_known():
    """A new name would be laid out as a word: this test sees it."""
    names = re.compile(
        r"(?:.*(?:image|img|video|audio|speech|sound|music|vision|visual|pixel|frame|slice|patch|tile|newline|fake|row_|col_)"
        r"|im_|[be]o[aiv]).*_(?:ids?|index)"
    )
    found, seen = set(), set()
    for kind in CONFIG_MAPPING:
        try:
            waiting = [CONFIG_MAPPING[kind]()]
        except Exception:  # not made without arguments, or of a missing package
            continue
        while waiting:
            config = waiting.pop()
            waiting += [value for value in vars(config).values() if isinstance(value, transformers.PretrainedConfig)]
            if type(config) not in seen:
                seen.add(type(config))
                found |= {name for name in {*vars(config), *config.attribute_map} if names.fullmatch(name)}
    assert found - NONE_OF_THE_VOCABULARY <= PLACEHOLDERS | SOUNDS | set(MARKS.split())
    assert found >= {"image_token_id", "video_token_index", "audio_token_id", "vision_start_token_id", "boi_token_id"}
    for name in found - NONE_OF_THE_VOCABULARY:
        modality = name.split("_token_")[0]
        (known,) = named_tokens(SimpleNamespace(**{name: 5})).items()
        assert known[1] == {5}
        assert (known[0] in ("image", "video", "audio", "speech")) == (name in PLACEHOLDERS | SOUNDS)
        assert known[0] == modality or name in MARKS
    for name in NONE_OF_THE_VOCABULARY:
        assert not named_tokens(SimpleNamespace(**{name: 5}))


# Constructor's names of the configuration, and where its tokens stand inside of it.
REAL = {
    "qwen2_vl": ("", "id"), "qwen2_5_vl": ("", "id"), "qwen3_vl": ("", "id"), "llava_onevision": ("", "index"),
    "llava_next_video": ("", "index"), "video_llava": ("", "index"), "qwen2_5_omni": ("thinker_config", "index"),
    "qwen3_omni_moe": ("thinker_config", "id"), "qwen2_5_omni_thinker": ("", "index"), "glm4v": ("", "id"),
    "molmo2": ("", "id"), "gemma3": ("", "index"), "gemma3n": ("", "id"), "paligemma": ("", "index"),
    "phi4_multimodal": ("", "id"), "smolvlm": ("", "id"), "internvl": ("", "id"), "qwen2_audio": ("", "index"),
}  # fmt: skip


@pytest.mark.needs("transformers>=5.20", reason="newer families")
@pytest.mark.parametrize("family", REAL)
def test_configurations_of_transformers(family):
    """By hand: what the configuration (or the one inside of it) has under each modality's name."""
    config = CONFIG_MAPPING[family]()
    inside, end = REAL[family]
    holder = getattr(config, inside) if inside else config
    if family == "phi4_multimodal":
        tokens = {"image": config.vision_config.image_token_id, "audio": config.audio_config.audio_token_id}
    else:
        names = ("image", "video", "audio")
        tokens = {name: getattr(holder, f"{name}_token_{end}", None) for name in names}
    tokens = {name: number for name, number in tokens.items() if number is not None}
    model = nn.Identity()
    model.config = config
    ids = torch.tensor([[7, *tokens.values(), 8, *reversed(tokens.values()), 9]])
    visual = [number for name, number in tokens.items() if name != "audio"]
    if not visual:
        with pytest.raises(ValueError, match="does not know where 'qwen2_audio' puts text and image"):
            token_layout(model, {"input_ids": ids})
        return
    layout = token_layout(model, {"input_ids": ids})
    assert torch.equal(layout.image, torch.isin(ids, torch.tensor(visual)))
    assert torch.equal(layout.text, ids < 10)


def test_the_outer_configuration_has_the_word():
    inner = transformers.PretrainedConfig(image_token_id=6, video_token_id=8)
    layout = token_layout(configured(image_token_id=5, inner=inner), {"input_ids": torch.tensor([[5, 6, 7, 8]])})
    assert layout.image.int().tolist() == [[1, 0, 0, 1]]
    assert layout.text.int().tolist() == [[0, 1, 1, 0]]


def test_one_placeholder_for_two_modalities():
    """GLM-4V and Molmo 2: the processor's mm_token_type_ids tell images from videos; nothing else does."""
    model, ids = configured(image_token_id=5, video_token_id=5), torch.tensor([[1, 5, 2, 5]])
    assert token_layout(model, {"input_ids": ids}).image.int().tolist() == [[0, 1, 0, 1]]
    with pytest.raises(ValueError, match=r"do not tell image from video.*mm_token_type_ids"):
        token_layout(model, {"input_ids": ids}, image="image")
    with pytest.raises(ValueError, match=r"do not tell image from video"):
        token_layout(configured(image_token_id=5), {"input_ids": ids}, image=("video",))
    inputs = {"input_ids": ids, "mm_token_type_ids": torch.tensor([[0, 1, 0, 2]])}
    for name, expected in (("image", [[0, 1, 0, 0]]), ("video", [[0, 0, 0, 1]])):
        layout = token_layout(model, inputs, image=name)
        assert layout.image.int().tolist() == expected
        assert layout.text.int().tolist() == [[1, 0, 1, 0]]


def test_what_is_no_tokenizer_is_explained():
    with pytest.raises(ValueError, match="special is a SimpleNamespace: pass token ids, a tokenizer or its processor"):
        token_layout(configured(image_token_id=5), {"input_ids": torch.ones(1, 4).long()}, special=SimpleNamespace())


def test_a_mask_that_does_not_fit_the_ids_is_explained():
    with pytest.raises(ValueError, match=r"\(1, 7\), and input_ids \(1, 4\).*prefix or prompt tuning"):
        token_layout(
            configured(image_token_id=5), {"input_ids": torch.ones(1, 4).long(), "attention_mask": torch.ones(1, 7)}
        )
