"""Models that read an image with the prompt: it goes through the prompt's own pass, trees through the text model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

import specdec
from specdec.policies import FixedPolicy
from tests.tiny import Oracle

IMAGE = 96
TEXT: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.6,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def llava() -> tuple[Any, dict[str, Any]]:
    """An image as tokens of its own, positions in one dimension."""
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=8
    )
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=vision, text_config=LlamaConfig(**TEXT), image_token_id=IMAGE, vision_feature_layer=-1
        )
    )
    return model.eval(), {"input_ids": with_image(), "pixel_values": torch.randn(1, 3, 16, 16)}


def qwen2_vl() -> tuple[Any, dict[str, Any]]:
    """Positions in three dimensions, which after an image are not the number of tokens."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "patch_size": 4, "mlp_ratio": 2}
    ids = {"image_token_id": IMAGE, "video_token_id": 95, "vision_start_token_id": 94, "vision_end_token_id": 93}
    config = Qwen2VLConfig(text_config={**TEXT, "rope_parameters": rope}, vision_config=vision, **ids)
    model = Qwen2VLForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0, 0.5 if parameter.shape[-1] < 64 else 0.2)
    tokens = with_image()
    tokens[0, 1], tokens[0, 6] = 94, 93
    inputs = {"input_ids": tokens, "mm_token_type_ids": (tokens == IMAGE).long()}
    return model, {**inputs, "pixel_values": torch.randn(16, 96), "image_grid_thw": torch.tensor([[1, 4, 4]])}


def with_image() -> torch.Tensor:
    ids = torch.randint(3, 90, (1, 12))
    ids[0, 2:6] = IMAGE
    return ids


@pytest.mark.parametrize("make", [llava, qwen2_vl])
def test_equal_to_plain_generate(make) -> None:
    torch.manual_seed(0)
    model, inputs = make()
    plain = model.generate(**inputs, max_new_tokens=30, do_sample=False)
    unlike = model.generate(
        **inputs | {"pixel_values": -3 * inputs["pixel_values"]}, max_new_tokens=30, do_sample=False
    )
    assert plain.tolist() != unlike.tolist()  # the image is seen
    with specdec.speculating(model, Oracle([plain[0].tolist()]), FixedPolicy(16, 6, 4), on_unsupported="error"):
        ours = model.generate(**inputs, max_new_tokens=30, do_sample=False)
        stats = specdec.stats(model)
    assert ours.tolist() == plain.tolist()
    assert stats.level == "tree"
    assert stats.accepted > 5
