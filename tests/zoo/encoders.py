"""Encoders of one joint sequence: text and image attend to each other in all layers."""

import torch
import transformers as hf
from torch.nn import functional as F

from tests.zoo.case import (
    BOS,
    EOS,
    HEADS,
    IMAGE,
    LAYERS,
    PAD,
    VOCABULARY,
    WIDTH,
    Case,
    Inputs,
    Layer,
    caption_inputs,
    eager_transformers,
    hooked,
    pixels,
    random_model,
    returned,
    token_ids,
)

SMALL = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "intermediate_size": 64}
VISION = {**SMALL, "image_size": 16, "patch_size": 8}


def text_then(images: int):
    """Masks of a sequence of the caption followed by so many image tokens."""

    def text(inputs: Inputs):
        return F.pad(inputs["attention_mask"].bool(), (0, images))

    def image(inputs: Inputs):
        return F.pad(torch.ones(2, images, dtype=torch.bool), (inputs["attention_mask"].shape[1], 0))

    return text, image


def then_text(images: int, skipped: int = 0):
    """Masks of so many image tokens (after some that are neither) followed by the caption."""

    def text(inputs: Inputs):
        return F.pad(inputs["attention_mask"].bool(), (skipped + images, 0))

    def image(inputs: Inputs):
        return F.pad(torch.ones(2, images, dtype=torch.bool), (skipped, inputs["attention_mask"].shape[1]))

    return text, image


def placeholders(image: int = IMAGE):
    """Masks of a sequence whose image tokens are placeholders among the input ids."""
    return lambda i: (i["input_ids"] != image) & i["attention_mask"].bool(), lambda i: i["input_ids"] == image


def vilt() -> Case:
    def build():
        config = hf.ViltConfig(**{**VISION, "image_size": 32}, vocab_size=VOCABULARY, max_position_embeddings=16)
        mask = torch.ones(2, 32, 32, dtype=torch.long)
        mask[1, :, 16:] = 0
        image = {"pixel_values": pixels(2, 3, 32, 32) * mask[:, None], "pixel_mask": mask}
        return random_model(lambda: hf.ViltModel(config)), caption_inputs() | image

    def image(inputs: Inputs):
        patches = F.interpolate(inputs["pixel_mask"][:, None].float(), size=(4, 4)).flatten(1).sum(1)
        real = torch.arange(17) < patches[:, None] + 1  # and the image's [CLS]
        return F.pad(real, (inputs["attention_mask"].shape[1], 0))

    layers = {"S": Layer("encoder.layer.1.attention.attention")}
    reference = returned(lambda out: out.attentions[-1])
    return Case("vilt", "encoder", build, layers, text_then(17)[0], image, reference, eager_transformers)


def visual_bert() -> Case:
    def build():
        config = hf.VisualBertConfig(
            **SMALL, vocab_size=VOCABULARY, visual_embedding_dim=20, max_position_embeddings=40
        )
        mask = torch.ones(2, 6, dtype=torch.long)
        mask[0, 4:] = 0
        image = {
            "visual_embeds": pixels(2, 6, 20),
            "visual_attention_mask": mask,
            "visual_token_type_ids": mask * 0 + 1,
        }
        return random_model(lambda: hf.VisualBertModel(config)), caption_inputs() | image

    layers = {"S": Layer("encoder.layer.1.attention.self")}
    reference = returned(lambda out: out.attentions[-1])
    image = lambda i: F.pad(i["visual_attention_mask"].bool(), (i["attention_mask"].shape[1], 0))
    return Case("visual_bert", "encoder", build, layers, text_then(6)[0], image, reference, eager_transformers)


def flava() -> Case:
    def build():
        config = hf.FlavaConfig(
            text_config={**SMALL, "vocab_size": VOCABULARY, "max_position_embeddings": 40},
            image_config=VISION,
            multimodal_config=SMALL,
            init_codebook=False,
            hidden_size=WIDTH,
            projection_dim=WIDTH,
        )
        return random_model(lambda: hf.FlavaModel(config)), caption_inputs() | {"pixel_values": pixels(2, 3, 16, 16)}

    layers = {"S": Layer("multimodal_model.encoder.layer.1.attention.attention")}
    # After a multimodal [CLS]: the image's [CLS] and four patches.
    text, image = then_text(5, skipped=1)
    return Case("flava", "encoder", build, layers, text, image, hooked(layers, "dropout"), eager_transformers)


def layoutlmv3() -> Case:
    def build():
        config = hf.LayoutLMv3Config(
            **SMALL,
            vocab_size=VOCABULARY,
            coordinate_size=6,
            shape_size=4,
            input_size=16,
            patch_size=8,
            max_position_embeddings=40,
        )
        inputs = caption_inputs()
        inputs["input_ids"] = inputs["input_ids"].clamp(min=1)
        corner = torch.randint(0, 400, (2, 8, 2), generator=torch.Generator().manual_seed(4))
        inputs |= {"bbox": torch.cat([corner, corner + 100], -1), "pixel_values": pixels(2, 3, 16, 16)}
        return random_model(lambda: hf.LayoutLMv3Model(config)), inputs

    layers = {"S": Layer("encoder.layer.1.attention.self")}
    reference = returned(lambda out: out.attentions[-1])
    notes = (
        "1-D and 2-D position bias; up to transformers 5.23 the softmax sees scores less their row's maximum, so that "
        "PRINTED means nothing"
    )
    masks = text_then(5)
    return Case("layoutlmv3", "encoder", build, layers, *masks, reference, eager_transformers, ("S",), notes=notes)


def modernvbert() -> Case:
    def build():
        config = hf.ModernVBertConfig(
            text_config={
                **SMALL,
                "model_type": "modernbert",
                "num_hidden_layers": 3,
                "vocab_size": VOCABULARY,
                "pad_token_id": PAD,
                "bos_token_id": BOS,
                "eos_token_id": EOS,
                "cls_token_id": BOS,
                "sep_token_id": EOS,
                "max_position_embeddings": 128,
            },
            vision_config={**VISION, "model_type": "siglip_vision_model", "image_size": 32, "vision_use_head": False},
            image_token_id=IMAGE,
            pixel_shuffle_factor=2,
        )
        ids, mask = token_ids(4)
        inputs = {"input_ids": ids, "attention_mask": mask, "use_cache": False, "pixel_values": pixels(2, 1, 3, 32, 32)}
        return random_model(lambda: hf.ModernVBertModel(config)), inputs

    layers = {"S": Layer("text_model.layers.2.attn")}
    reference = returned(lambda out: out.attentions[-1])
    return Case("modernvbert", "encoder", build, layers, *placeholders(), reference, eager_transformers)


def florence2() -> Case:
    def build():
        config = hf.Florence2Config(
            vision_config={
                "embed_dim": (16, 16, 32, 32),
                "depths": (1, 1, 1, 1),
                "num_heads": (2, 2, 2, 2),
                "num_groups": (2, 2, 2, 2),
                "window_size": 4,
                "projection_dim": WIDTH,
                "drop_path_rate": 0.0,
            },
            text_config={
                "model_type": "bart",
                "vocab_size": VOCABULARY,
                "d_model": WIDTH,
                "encoder_layers": LAYERS,
                "decoder_layers": LAYERS,
                "encoder_attention_heads": HEADS,
                "decoder_attention_heads": HEADS,
                "encoder_ffn_dim": 64,
                "decoder_ffn_dim": 64,
                "max_position_embeddings": 64,
                "pad_token_id": PAD,
                "bos_token_id": BOS,
                "eos_token_id": EOS,
                "decoder_start_token_id": EOS,
            },
            image_token_id=IMAGE,
        )
        ids, mask = token_ids(5)
        inputs = {"input_ids": ids, "attention_mask": mask, "use_cache": False, "pixel_values": pixels(2, 3, 64, 64)}
        inputs["decoder_input_ids"] = torch.tensor([[2, 30], [2, 31]])
        return random_model(lambda: hf.Florence2ForConditionalGeneration(config)), inputs

    layers = {"S": Layer("model.language_model.encoder.layers.1.self_attn")}
    reference = returned(lambda out: out.encoder_attentions[-1])
    return Case(
        "florence2", "encoder", build, layers, *placeholders(), reference, eager_transformers, last=False,
        notes="an encoder-decoder: the decoder's self-attention runs last, so the encoder's layer is named",
    )  # fmt: skip


def blip_2_itm() -> Case:
    def build():
        config = hf.Blip2Config(
            vision_config=VISION,
            qformer_config=qformer(use_qformer_text_input=True),
            text_config=tiny_opt(layers=1),
            num_query_tokens=5,
            image_text_hidden_size=WIDTH,
        )
        inputs = caption_inputs() | {"pixel_values": pixels(2, 3, 16, 16), "use_image_text_matching_head": True}
        return random_model(lambda: hf.Blip2ForImageTextRetrieval(config)), inputs

    layers = {"S": Layer("qformer.encoder.layer.1.attention.attention")}
    notes = "image tokens are the learned queries; cross-attention to the image has 5 queries and 5 keys here"
    return Case("blip_2_itm", "encoder", build, layers, *then_text(5), hooked(layers), eager_transformers, notes=notes)


def qformer(**more: bool) -> dict[str, object]:
    """Configuration of a small Q-Former."""
    positions = {"vocab_size": VOCABULARY, "max_position_embeddings": 40}
    return {**SMALL, **positions, "encoder_hidden_size": WIDTH, "cross_attention_frequency": 1, **more}


def tiny_opt(layers: int) -> dict[str, object]:
    """Configuration of a small OPT decoder."""
    return {
        "model_type": "opt",
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "ffn_dim": 64,
        "word_embed_proj_dim": WIDTH,
        "max_position_embeddings": 64,
        "pad_token_id": PAD,
    }


CASES = [vilt(), visual_bert(), flava(), layoutlmv3(), modernvbert(), florence2(), blip_2_itm()]
