"""Decoders: image tokens in the sequence of a language model, causal or with a bidirectional prefix."""

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

from tests.zoo.case import (
    BOS,
    EOS,
    HEADS,
    IMAGE,
    IMAGE_END,
    IMAGE_START,
    LAYERS,
    PAD,
    VIDEO,
    VOCABULARY,
    WIDTH,
    Case,
    Inputs,
    Layer,
    Reference,
    caption_inputs,
    eager_transformers,
    hooked,
    pixels,
    random_model,
    returned,
    token_ids,
)
from tests.zoo.encoders import SMALL, VISION, placeholders, qformer, then_text, tiny_opt

LLAMA = {
    **SMALL,
    "model_type": "llama",
    "vocab_size": VOCABULARY,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
}
QWEN_TEXT = {**LLAMA, "model_type": "qwen2"}
CLIP = {**VISION, "model_type": "clip_vision_model", "projection_dim": WIDTH}
SIGLIP = {**VISION, "model_type": "siglip_vision_model", "vision_use_head": False}
INTERN = {**SMALL, "image_size": (32, 32), "patch_size": (8, 8)}
TEXT_LAYER = f"model.language_model.layers.{LAYERS - 1}.self_attn"


def placeholder_inputs(images: int, image: Tensor | None = None, **ids_options: Any) -> Callable[[], Inputs]:
    """Inputs whose ids hold so many image placeholders."""

    def inputs() -> Inputs:
        ids, mask = token_ids(images, **ids_options)
        values = pixels(2, 3, 16, 16) if image is None else image
        return {"input_ids": ids, "attention_mask": mask, "pixel_values": values, "use_cache": False}

    return inputs


def decoder(
    name: str,
    model: str,
    config: Callable[[], Any],
    inputs: Callable[[], Inputs],
    *,
    path: str = TEXT_LAYER,
    kind: str = "decoder",
    reference: Reference | None = None,
    notes: str = "",
) -> Case:
    """A case whose image tokens are placeholders in the input ids; `model` names a class of transformers."""

    def build():
        return random_model(lambda: getattr(hf, model)(config())), inputs()

    own = reference or returned(lambda out: out.attentions[-1])
    layers = {"S": Layer(path)}
    return Case(name, kind, build, layers, *placeholders(), own, eager_transformers, notes=notes)


def llava_like(name: str, images: int, *, image: Tensor | None = None, kind: str = "decoder", **options: Any) -> Case:
    """LLaVA and its relatives: a vision tower, a projector, a language model."""
    names = {"llava": "Llava", "llava_next": "LlavaNext", "llava_onevision": "LlavaOnevision", "internvl": "InternVL"}
    family = names[name.removesuffix("_left_padded")]
    config = lambda: getattr(hf, family + "Config")(**options)
    ids_options = options.pop("ids", {})
    sizes = options.pop("sizes", None)

    def inputs() -> Inputs:
        made = placeholder_inputs(images, image, **ids_options)()
        return made if sizes is None else made | {"image_sizes": torch.tensor([sizes] * 2)}

    return decoder(name, family + "ForConditionalGeneration", config, inputs, kind=kind)


def git() -> Case:
    def build():
        config = hf.GitConfig(vision_config=VISION, **SMALL, vocab_size=VOCABULARY, max_position_embeddings=64)
        inputs = caption_inputs() | {"pixel_values": pixels(2, 3, 16, 16), "use_cache": False}
        return random_model(lambda: hf.GitForCausalLM(config)), inputs

    layers = {"S": Layer("git.encoder.layer.1.attention.self")}
    reference = returned(lambda out: out.attentions[-1])
    return Case("git", "prefix decoder", build, layers, *then_text(5), reference, eager_transformers)


def paligemma() -> Case:
    def config():
        text = {**LLAMA, "model_type": "gemma", "head_dim": 8, "num_key_value_heads": 1}
        return hf.PaliGemmaConfig(
            vision_config={**SIGLIP, "projection_dim": WIDTH},
            text_config=text,
            image_token_index=IMAGE,
            projection_dim=WIDTH,
            vocab_size=VOCABULARY,
            hidden_size=WIDTH,
        )

    def inputs() -> Inputs:
        made = placeholder_inputs(4, before=())()
        suffix = (torch.arange(made["input_ids"].shape[1]) >= 8).long()
        return made | {"token_type_ids": suffix.expand(2, -1).contiguous()}

    return decoder("paligemma", "PaliGemmaForConditionalGeneration", config, inputs, kind="prefix decoder")


def gemma3(name: str, layer_types: list[str]) -> Case:
    def config():
        text = {**SMALL, "vocab_size": VOCABULARY, "num_key_value_heads": 2, "head_dim": 8, "query_pre_attn_scalar": 8}
        return hf.Gemma3Config(
            vision_config={**SIGLIP, "image_size": 32},
            text_config={**text, "sliding_window": 6, "layer_types": layer_types, "max_position_embeddings": 64},
            mm_tokens_per_image=4,
            image_token_index=IMAGE,
            boi_token_index=IMAGE_START,
            eoi_token_index=IMAGE_END,
        )

    def inputs() -> Inputs:
        made = placeholder_inputs(4, pixels(2, 3, 32, 32), before=(BOS, IMAGE_START), after=(IMAGE_END,))()
        return made | {"token_type_ids": (made["input_ids"] == IMAGE).long()}

    return decoder(name, "Gemma3ForConditionalGeneration", config, inputs, kind="prefix decoder")


def blip_2() -> Case:
    def config():
        return hf.Blip2Config(
            vision_config=VISION,
            qformer_config=qformer(),
            text_config=tiny_opt(LAYERS),
            num_query_tokens=5,
            image_token_index=IMAGE,
        )

    path = "language_model.model.decoder.layers.1.self_attn"
    reference = hooked({"S": Layer(path)})
    inputs = placeholder_inputs(5)
    return decoder("blip_2", "Blip2ForConditionalGeneration", config, inputs, path=path, reference=reference)


def janus() -> Case:
    def config():
        vision = {
            "hidden_size": WIDTH,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "projection_dim": WIDTH,
        }
        size = {"image_size": 16, "patch_size": 8, "num_image_tokens": 4, "mlp_ratio": 2.0}
        return hf.JanusConfig(
            text_config=LLAMA,
            image_token_id=IMAGE,
            vision_config={"model_type": "janus_vision_model", **vision, **size},
            vq_config={
                "model_type": "janus_vqgan",
                "embed_dim": 4,
                "num_embeddings": 16,
                "latent_channels": 8,
                "base_channels": 32,
                "channel_multiplier": (1, 1),
                "num_res_blocks": 1,
                "num_patches": 4,
                "projection_dim": WIDTH,
                "image_token_embed_dim": 8,
            },
        )

    return decoder("janus", "JanusForConditionalGeneration", config, placeholder_inputs(4))


def chameleon() -> Case:
    def config():
        letters = ["".join(chr(ord("A") + int(digit)) for digit in str(code)) for code in range(16)]
        codes = {f"IMGIMG{word}Z": 20 + code for code, word in enumerate(letters)}
        return hf.ChameleonConfig(
            **SMALL,
            vocab_size=VOCABULARY,
            num_key_value_heads=2,
            max_position_embeddings=64,
            pad_token_id=PAD,
            vq_config={
                "embed_dim": 8,
                "num_embeddings": 16,
                "latent_channels": 8,
                "resolution": 8,
                "base_channels": 32,
                "channel_multiplier": (1, 1),
                "num_res_blocks": 1,
            },
            vocabulary_map={"<image>": IMAGE, **codes},
        )

    inputs = placeholder_inputs(16, pixels(2, 3, 8, 8))
    return decoder("chameleon", "ChameleonForConditionalGeneration", config, inputs, path="model.layers.1.self_attn")


def kosmos2() -> Case:
    def build():
        config = hf.Kosmos2Config(
            text_config={
                "vocab_size": VOCABULARY,
                "max_position_embeddings": 64,
                "embed_dim": WIDTH,
                "layers": LAYERS,
                "ffn_dim": 64,
                "attention_heads": HEADS,
                "pad_token_id": 1,
                "bos_token_id": 3,
            },
            vision_config=VISION,
            latent_query_num=4,
        )
        ids, mask = token_ids(4, before=(3,))
        ids[mask == 0] = 1
        inputs = {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels(2, 3, 16, 16), "use_cache": False}
        inputs["image_embeds_position_mask"] = (ids == IMAGE).long()
        return random_model(lambda: hf.Kosmos2ForConditionalGeneration(config)), inputs

    layers = {"S": Layer("text_model.model.layers.1.self_attn")}
    reference = returned(lambda out: out.attentions[-1])
    return Case("kosmos2", "decoder", build, layers, *placeholders(), reference, eager_transformers)


def idefics(name: str, family: str) -> Case:
    def config():
        vision = {**VISION, "image_size": 32}
        make = getattr(hf, family + "Config")
        return make(image_token_id=IMAGE, vision_config=vision, scale_factor=2, text_config=LLAMA)

    inputs = placeholder_inputs(4, pixels(2, 1, 3, 32, 32))
    model = family + "ForConditionalGeneration"
    return decoder(name, model, config, inputs, path="model.text_model.layers.1.self_attn")


QWEN_ROPE = {"rope_type": "default", "rope_theta": 1e4}
QWEN = {
    "qwen2_vl": (
        "Qwen2VL",
        {"rope_parameters": {**QWEN_ROPE, "mrope_section": [1, 1, 2]}},
        {"depth": 2, "embed_dim": WIDTH, "hidden_size": WIDTH, "num_heads": 2, "patch_size": 4, "mlp_ratio": 2},
    ),
    "qwen2_5_vl": (
        "Qwen2_5_VL",
        {"rope_parameters": {**QWEN_ROPE, "mrope_section": [1, 1, 2]}},
        {
            "depth": 2,
            "hidden_size": WIDTH,
            "out_hidden_size": WIDTH,
            "intermediate_size": 64,
            "num_heads": 2,
            "patch_size": 4,
            "window_size": 8,
            "fullatt_block_indexes": [1],
        },
    ),
    "qwen3_vl": (
        "Qwen3VL",
        {"head_dim": 8, "rope_parameters": {**QWEN_ROPE, "mrope_section": [2, 1, 1], "mrope_interleaved": True}},
        {
            "depth": 2,
            "hidden_size": WIDTH,
            "out_hidden_size": WIDTH,
            "intermediate_size": 64,
            "num_heads": 2,
            "patch_size": 4,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0],
        },
    ),
}


def qwen(name: str) -> Case:
    family, text, vision = QWEN[name]
    base = {key: value for key, value in LLAMA.items() if key != "model_type"}

    def config():
        return getattr(hf, family + "Config")(
            text_config={**base, "max_position_embeddings": 64, **text},
            vision_config=vision,
            image_token_id=IMAGE,
            video_token_id=VIDEO,
            vision_start_token_id=IMAGE_START,
            vision_end_token_id=IMAGE_END,
        )

    def inputs() -> Inputs:
        settings = config().vision_config
        width = 3 * settings.temporal_patch_size * settings.patch_size**2
        made = placeholder_inputs(4, pixels(2 * 16, width), before=(BOS, IMAGE_START), after=(IMAGE_END,))()
        grid = torch.tensor([[1, 4, 4]] * 2)
        return made | {"image_grid_thw": grid, "mm_token_type_ids": (made["input_ids"] == IMAGE).int()}

    return decoder(name, family + "ForConditionalGeneration", config, inputs)


def phi4_multimodal() -> Case:
    def config():
        return hf.Phi4MultimodalConfig(
            **{key: value for key, value in LLAMA.items() if key not in ("model_type", "max_position_embeddings")},
            max_position_embeddings=64,
            original_max_position_embeddings=64,
            rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0},
            vision_config={
                **SMALL,
                "image_size": 8,
                "crop_size": 8,
                "patch_size": 4,
                "image_token_id": IMAGE,
                "feature_layer": -1,
            },
            audio_config={
                "hidden_size": WIDTH,
                "intermediate_size": 64,
                "num_blocks": 1,
                "num_attention_heads": HEADS,
                "ext_pw_out_channel": WIDTH,
                "depthwise_separable_out_channel": WIDTH,
                "nemo_conv_channels": 8,
                "input_size": 16,
                "audio_token_id": 9,
            },
        )

    def inputs() -> Inputs:
        ids, mask = token_ids(5)
        image = {"image_pixel_values": pixels(2, 2, 3, 8, 8), "image_sizes": torch.tensor([[8, 8]] * 2)}
        image["image_attention_mask"] = torch.ones(2, 2, 2, 2, dtype=torch.bool)
        return {"input_ids": ids, "attention_mask": mask, "use_cache": False} | image

    def eager_text(model: nn.Module) -> nn.Module:
        model = eager_transformers(model)
        model.set_attn_implementation({"": "eager", "vision_config": "sdpa", "audio_config": "sdpa"})
        return model

    case = decoder("phi4_multimodal", "Phi4MultimodalForCausalLM", config, inputs, path="model.layers.1.self_attn")
    reference = returned(lambda out: out.attentions[-1], eager_text)
    notes = "the vision tower is causal under sdpa only, so eager is compared for the language model alone"
    return Case(
        case.name, case.kind, case.build, case.layers, case.text, case.image, reference, eager_text, notes=notes
    )


PAIR = pixels(2, 3, 3, 16, 16)  # an image in two tiles and a thumbnail
TILES = {"sizes": [16, 32], "image_grid_pinpoints": [[16, 32]], "vision_feature_layer": -1}

CASES = [
    blip_2(),
    git(),
    paligemma(),
    gemma3("gemma3", ["sliding_attention", "full_attention"]),
    gemma3("gemma3_sliding", ["full_attention", "sliding_attention"]),
    llava_like(
        "llava", 4, vision_config=CLIP, text_config=LLAMA, image_token_index=IMAGE, vision_feature_layer=-1,
        image_seq_length=4,
    ),
    llava_like(
        "llava_left_padded", 4, vision_config=CLIP, text_config=LLAMA, image_token_index=IMAGE, vision_feature_layer=-1,
        image_seq_length=4, ids={"before": (BOS, 40, 41, 42), "left": True},
    ),
    llava_like(
        "llava_next", 4 + 2 * 4 + 2, image=PAIR, vision_config=CLIP, text_config=LLAMA, image_token_index=IMAGE,
        image_seq_length=4, **TILES,
    ),
    llava_like(
        "llava_onevision", 4 + 2 * 4 + 2, image=PAIR, vision_config=SIGLIP, text_config=QWEN_TEXT,
        image_token_index=IMAGE, video_token_index=VIDEO, **TILES,
    ),
    janus(),
    llava_like(
        "internvl", 4, image=pixels(2, 3, 32, 32), vision_config=INTERN,
        text_config=QWEN_TEXT, image_token_id=IMAGE, image_seq_length=4, vision_feature_layer=-1,
    ),
    chameleon(),
    kosmos2(),
    idefics("idefics3", "Idefics3"),
    idefics("smolvlm", "SmolVLM"),
    qwen("qwen2_vl"),
    qwen("qwen2_5_vl"),
    qwen("qwen3_vl"),
    phi4_multimodal(),
]  # fmt: skip
