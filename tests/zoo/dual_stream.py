"""Two sequences that meet in cross-attention, and text encoders that look at an image."""

import copy

import torch
import transformers as hf
from torch import Tensor, nn

from tests.zoo.case import (
    BOS,
    EOS,
    HEADS,
    LAYERS,
    PAD,
    VOCABULARY,
    WIDTH,
    Case,
    Inputs,
    Layer,
    Probabilities,
    caption_inputs,
    eager_transformers,
    hooked,
    pixels,
    random_model,
    run,
    token_ids,
)
from tests.zoo.encoders import SMALL, VISION


def caption(inputs: Inputs) -> Tensor:
    """Real text tokens of the text sequence."""
    return inputs["attention_mask"].bool()


def whole_image(tokens: int):
    """An image sequence without padding."""
    return lambda inputs: torch.ones(2, tokens, dtype=torch.bool)


def lxmert() -> Case:
    def build():
        config = hf.LxmertConfig(
            vocab_size=VOCABULARY,
            hidden_size=WIDTH,
            num_attention_heads=HEADS,
            intermediate_size=64,
            l_layers=1,
            r_layers=1,
            x_layers=2,
            visual_feat_dim=20,
            max_position_embeddings=40,
        )
        mask = torch.ones(2, 6, dtype=torch.long)
        mask[0, 4:] = 0
        corner = torch.rand(2, 6, 2, generator=torch.Generator().manual_seed(4)) / 2
        image = {"visual_feats": pixels(2, 6, 20), "visual_pos": torch.cat([corner, corner + 0.3], -1)}
        model = random_model(lambda: hf.LxmertModel(config))
        return model, caption_inputs() | image | {"visual_attention_mask": mask}

    layer = "encoder.x_layers.1."
    layers = {
        "LV": Layer(layer + "visual_attention.att", 0),
        "VL": Layer(layer + "visual_attention.att", 1),
        "LL": Layer(layer + "lang_self_att.self"),
        "VV": Layer(layer + "visn_self_att.self"),
    }
    image = lambda inputs: inputs["visual_attention_mask"].bool()
    notes = "one cross-attention module, called twice: text to image, then image to text"
    reference = hooked(layers, "dropout")
    return Case("lxmert", "dual stream", build, layers, caption, image, reference, eager_transformers, notes=notes)


def bridgetower() -> Case:
    def build():
        config = hf.BridgeTowerConfig(
            hidden_size=WIDTH,
            num_hidden_layers=2,
            num_attention_heads=HEADS,
            share_link_tower_layers=False,
            text_config={**SMALL, "vocab_size": VOCABULARY, "num_hidden_layers": 3, "max_position_embeddings": 40},
            vision_config={"hidden_size": 64, "num_hidden_layers": 3, "patch_size": 8, "image_size": 16},
        )
        inputs = caption_inputs(before=(3,))
        inputs["input_ids"][inputs["attention_mask"] == 0] = 1
        model = random_model(lambda: hf.BridgeTowerModel(config))
        return model, inputs | {"pixel_values": pixels(2, 3, 16, 16)}

    text, image = "cross_modal_text_layers.1.", "cross_modal_image_layers.1."
    layers = {
        "LL": Layer(text + "attention.self"),
        "LV": Layer(text + "crossattention.self"),
        "VV": Layer(image + "attention.self"),
        "VL": Layer(image + "crossattention.self"),
    }
    reference = hooked(layers)
    return Case("bridgetower", "dual stream", build, layers, caption, whole_image(5), reference, eager_transformers)


def grounding_dino() -> Case:
    def build():
        config = hf.GroundingDinoConfig(
            backbone_config=hf.SwinConfig(
                window_size=7,
                image_size=64,
                embed_dim=8,
                depths=[1, 1, 1, 1],
                num_heads=[1, 1, 1, 1],
                out_features=["stage2", "stage3", "stage4"],
            ),
            text_config=hf.BertConfig(
                vocab_size=1100,
                hidden_size=WIDTH,
                num_hidden_layers=1,
                num_attention_heads=2,
                intermediate_size=32,
                max_position_embeddings=64,
            ),
            num_queries=3,
            encoder_layers=2,
            decoder_layers=1,
            encoder_ffn_dim=64,
            decoder_ffn_dim=32,
            d_model=32,
            encoder_attention_heads=HEADS,
            decoder_attention_heads=HEADS,
            num_feature_levels=4,
            encoder_n_points=2,
            decoder_n_points=2,
            max_text_len=32,
            disable_custom_kernels=True,
        )
        ids = torch.tensor([[101, 30, 31, 1012, 40, 1012, 102], [101, 33, 1012, 102, 0, 0, 0]])
        mask = torch.ones(2, 64, 64, dtype=torch.long)
        mask[1, :, 32:] = 0
        inputs = {"input_ids": ids, "attention_mask": (ids != 0).long(), "token_type_ids": torch.zeros_like(ids)}
        model = random_model(lambda: hf.GroundingDinoModel(config), gain=1.0)
        return model, inputs | {"pixel_values": pixels(2, 3, 64, 64), "pixel_mask": mask}

    fusion = "encoder.layers.1.fusion_layer.attn"
    layers = {
        "LV": Layer(fusion, 0),
        "VL": Layer(fusion, 1),
        "LL": Layer("encoder.layers.1.text_enhancer_layer.self_attn"),
    }

    def reference(model: nn.Module, inputs: Inputs) -> tuple[nn.Module, Probabilities]:
        model, found = copy.deepcopy(model), {}

        def fused(_, args, out):
            # The module returns (batch * heads, ...) maps: image to text, then text to image.
            found.update({role: o[1].unflatten(0, (2, -1)) for role, o in zip(("VL", "LV"), out, strict=True)})

        model.get_submodule(fusion).register_forward_hook(fused)
        enhancer = model.get_submodule(layers["LL"].path)
        enhancer.dropout.register_forward_pre_hook(lambda _, args: found.update(LL=args[0]))
        run(model, inputs)
        return model, found

    # The image's four feature levels: real cells of the padded image, level by level.
    def image(inputs: Inputs) -> Tensor:
        sizes = [8, 4, 2, 1]
        mask = inputs["pixel_mask"][:, None].float()
        return torch.cat([nn.functional.interpolate(mask, size=(s, s)).bool().flatten(1) for s in sizes], 1)

    return Case(
        "grounding_dino", "dual stream", build, layers, caption, image, reference, lambda model: None,
        opaque=("LV", "VL"),
        notes="one module with two softmaxes; eager mode adds the backbone's bool mask and changes the output",
    )  # fmt: skip


def blip_itm() -> Case:
    def build():
        text = {
            **SMALL,
            "vocab_size": VOCABULARY,
            "encoder_hidden_size": WIDTH,
            "projection_dim": WIDTH,
            "is_decoder": True,
        }
        special = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD, "sep_token_id": EOS}
        config = hf.BlipConfig(
            text_config={**text, **special, "max_position_embeddings": 40},
            vision_config={**VISION, "projection_dim": WIDTH},
            projection_dim=WIDTH,
            image_text_hidden_size=WIDTH,
        )
        inputs = caption_inputs() | {"pixel_values": pixels(2, 3, 16, 16), "use_itm_head": True}
        return random_model(lambda: hf.BlipForImageTextRetrieval(config)), inputs

    layer = f"text_encoder.encoder.layer.{LAYERS - 1}."
    layers = {"LL": Layer(layer + "attention.self"), "LV": Layer(layer + "crossattention.self")}
    reference = hooked(layers, "dropout")
    return Case("blip_itm", "cross-attention", build, layers, caption, whole_image(5), reference, eager_transformers)


def mllama() -> Case:
    def build():
        config = hf.MllamaConfig(
            text_config={
                **SMALL,
                "vocab_size": VOCABULARY,
                "num_hidden_layers": 4,
                "num_key_value_heads": 2,
                "cross_attention_layers": [1, 3],
                "pad_token_id": PAD,
                "bos_token_id": BOS,
                "eos_token_id": EOS,
                "max_position_embeddings": 64,
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
            },
            vision_config={
                "hidden_size": 16,
                "num_hidden_layers": 2,
                "num_global_layers": 1,
                "attention_heads": 4,
                "intermediate_size": 32,
                "vision_output_dim": 48,
                "image_size": 16,
                "patch_size": 8,
                "max_num_tiles": 2,
                "intermediate_layers_indices": [0, 1],
                "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]],
            },
            image_token_index=VOCABULARY,
        )
        ids, mask = token_ids(1, image=VOCABULARY)
        seen = torch.ones(2, ids.shape[1], 1, 2, dtype=torch.long)
        seen[:, 0], seen[1, :, :, 1] = 0, 0
        inputs = {"input_ids": ids, "attention_mask": mask, "cross_attention_mask": seen, "use_cache": False}
        inputs |= {"pixel_values": pixels(2, 1, 2, 3, 16, 16), "aspect_ratio_ids": torch.tensor([[2], [1]])}
        inputs["aspect_ratio_mask"] = torch.tensor([[[1, 1]], [[1, 0]]])
        return random_model(lambda: hf.MllamaForConditionalGeneration(config)), inputs

    layers = {
        "LV": Layer("model.language_model.layers.3.cross_attn"),
        "LL": Layer("model.language_model.layers.2.self_attn"),
    }
    image = lambda inputs: inputs["aspect_ratio_mask"][:, 0].bool().repeat_interleave(5, 1)  # two tiles
    return Case("mllama", "cross-attention", build, layers, caption, image, hooked(layers), eager_transformers)


CASES = [lxmert(), bridgetower(), grounding_dino(), blip_itm(), mllama()]
