"""Transformers architectures beyond the zoo, built from their configuration: whatever is found is certified."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from noetherflow.discovery import certify, find_symmetries
from noetherflow.discovery.hf import example_inputs
from noetherflow.symmetry.symmetry_set import SymmetrySet

transformers = pytest.importorskip("transformers")
WIDE = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 1}
TEXT = WIDE | {"vocab_size": 100, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
VISION = WIDE | {"image_size": 16, "patch_size": 8}
SEQ2SEQ = {
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
} | {"vocab_size": 100, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "decoder_start_token_id": 1}
CONFIGS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "clip": ("CLIPConfig", "CLIPModel", {"text_config": TEXT, "vision_config": VISION, "projection_dim": 16}),
    "siglip": ("SiglipConfig", "SiglipModel", {"text_config": TEXT, "vision_config": VISION}),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", TEXT | {"num_key_value_heads": 2, "head_dim": 8}),
    "phi": ("PhiConfig", "PhiForCausalLM", TEXT),
    "gpt_neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", TEXT),
    "mamba": ("MambaConfig", "MambaForCausalLM", TEXT),
    "bart": ("BartConfig", "BartForConditionalGeneration", SEQ2SEQ | {"forced_eos_token_id": 1}),
    "whisper": (
        "WhisperConfig",
        "WhisperForConditionalGeneration",
        SEQ2SEQ | {"max_source_positions": 20, "num_mel_bins": 8},
    ),
    "convnext": (
        "ConvNextConfig",
        "ConvNextForImageClassification",
        {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2, "image_size": 32},
    ),
    "swin": (
        "SwinConfig",
        "SwinForImageClassification",
        {"image_size": 32, "patch_size": 2, "window_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2]},
    ),
}
EXPECTED = {  # (family, blocks), counted by hand from the equations of each architecture
    "clip": {("attention-qk", 8), ("attention-vo", 8), ("one-sided", 2)},
    "siglip": {("attention-qk", 8), ("attention-vo", 13), ("linear-linear", 4)},
    "gemma2": {("gated", 48), ("attention-vo", 2), ("rotary-qk", 8)},
    "phi": {("attention-vo", 4)},
    "gpt_neox": {("attention-vo", 4)},
    "mamba": {("attention-qk", 17), ("linear-linear", 1), ("rescaling", 48)},
    "bart": {("attention-qk", 12), ("attention-vo", 12)},
    "whisper": {("attention-qk", 12), ("attention-vo", 12)},
    "convnext": {("norm-gain", 74)},
    "swin": {("attention-qk", 4), ("attention-vo", 4)},
}


def build(name: str) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    config, model, settings = CONFIGS[name]
    torch.manual_seed(0)
    built = getattr(transformers, model)(getattr(transformers, config)(**settings)).eval()
    return built, example_inputs(built)


def blocks(syms: SymmetrySet) -> dict[str, int]:
    families = [s.family for s in syms]
    return {f: sum(s.blocks for s in syms if s.family == f) for f in families}


def test_two_towers_get_text_and_pixels() -> None:
    model, inputs = build("clip")
    assert set(inputs) == {"input_ids", "pixel_values"}
    syms = find_symmetries(model, inputs)
    assert {(f, n) for f, n in blocks(syms).items()} >= EXPECTED["clip"]


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_architectures_beyond_the_zoo(name: str) -> None:
    model, inputs = build(name)
    syms = find_symmetries(model, inputs)
    assert set(blocks(syms).items()) >= EXPECTED[name]
    assert certify(model, syms, inputs).broken == ()
