"""A tiny LLaVA with a real processor and a chat template, made without a hub, and data for TRL's trainers."""

import torch
import transformers
from datasets import Dataset
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn

SPECIAL = ["<pad>", "<unk>", "<s>", "</s>", "<image>"]
PLAIN = "user assistant : what is in this picture a mug grass dog on under red blue"
WORDS = [*SPECIAL, *PLAIN.split()]
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} : "
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for part in m['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{{ ' ' }}"
    "{% endfor %}{% endif %}"
    "{% if m['role'] == 'assistant' %}</s>{% endif %}{{ ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant : {% endif %}"
)


def processor() -> transformers.LlavaProcessor:
    """Words, and pictures of 8 x 8 pixels as 4 tokens."""
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", unk_token="<unk>", bos_token="<s>", eos_token="</s>",
        additional_special_tokens=["<image>"], padding_side="right",
    )  # fmt: skip
    pictures = transformers.CLIPImageProcessor(
        size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8}, do_center_crop=True
    )
    return transformers.LlavaProcessor(
        image_processor=pictures,
        tokenizer=tokenizer,
        patch_size=4,
        vision_feature_select_strategy="full",
        chat_template=TEMPLATE,
        num_additional_image_tokens=0,
    )


def llava(seed: int = 0, **config: object) -> nn.Module:
    """Two decoder layers over words and 4 image tokens."""
    torch.manual_seed(seed)
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    return transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(
            vision_config=transformers.SiglipVisionConfig(
                **small, image_size=8, patch_size=4, vision_use_head=False, attention_dropout=0.0
            ),
            text_config=transformers.LlamaConfig(
                **small,
                vocab_size=len(WORDS),
                num_key_value_heads=1,
                initializer_range=0.3,
                bos_token_id=2,
                eos_token_id=3,
                pad_token_id=0,
            ),
            image_token_id=WORDS.index("<image>"),
            vision_feature_layer=-1,
            vision_feature_select_strategy="full",
            **config,
        )
    )


def picture(seed: int) -> Image.Image:
    """Random pixels."""
    pixels = torch.randint(0, 256, (8, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(pixels.numpy())


ANSWERS = ["a mug", "a dog on grass", "red mug on blue grass", "grass", "a blue dog", "mug under a red dog"]


def turn(role: str, text: str) -> dict[str, object]:
    """One turn of a conversation."""
    return {"role": role, "content": text}


def conversations(*answers: str, size: int = 6) -> Dataset:
    """One picture and one question each, with different answers in the columns of these names."""
    rows: list[dict[str, object]] = []
    for i in range(size):
        row: dict[str, object] = {"images": [picture(i)], "prompt": [turn("user", "what is in this picture")]}
        for shift, name in enumerate(answers):
            row[name] = [turn("assistant", ANSWERS[(i + shift) % len(ANSWERS)])]
        rows.append(row)
    return Dataset.from_list(rows)
