"""A transformers model from a configuration: on the meta device (no memory) or with weights."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from noetherflow.errors import DataError, NoetherflowError, require

BATCH, LENGTH = 2, 8
CODE = re.compile(r"auto_map|trust_remote_code|_?(attn|experts)_implementation\w*")
"""Keys of a configuration that name code to be fetched."""
AUTO_CLASSES = (
    "AutoModelForCausalLM",
    "AutoModelForSeq2SeqLM",
    "AutoModelForMaskedLM",
    "AutoModelForImageClassification",
    "AutoModel",
)


def load_hf(path: str | Path, device: str = "meta") -> tuple[nn.Module, Any]:
    """Model in evaluation mode and example inputs from a `config.json` or a model folder.

    The architecture is the one the configuration names. On `meta` no weights are made; elsewhere they are loaded when
    the folder holds some and random (seed 0) otherwise.

    Raises DataError for a path or configuration that cannot be used, MissingExtraError without transformers.
    """
    transformers: Any = require("transformers", "hf")
    config = _config(transformers, Path(path))
    try:
        model = _made(transformers, config, Path(path), device)
    except NoetherflowError:
        raise
    except Exception as error:
        raise DataError(f"transformers cannot build {type(config).__name__} as {path} has it: {error}") from error
    return model.eval(), example_inputs(model)


def _made(transformers: Any, config: Any, path: Path, device: str) -> nn.Module:
    """The model of the configuration: without memory, with the folder's weights, or with random ones."""
    build = _builder(transformers, config)
    if device == "meta":
        with torch.device("meta"):
            return build(config)
    if _has_weights(path):
        return _named_class(transformers, config).from_pretrained(str(path), local_files_only=True).to(device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build(config).to(device)


def example_inputs(model: nn.Module) -> dict[str, Tensor]:
    """Inputs of the right form for a transformers model: token ids, pixels or audio features by its main input
    (both for two-tower models).

    Raises DataError when the main input is of another kind.
    """
    config: Any = model.config
    main = getattr(model, "main_input_name", "input_ids")
    rng = torch.Generator().manual_seed(0)
    if main == "pixel_values":
        inputs = {"pixel_values": _pixels(config, rng)}
    elif main == "input_features":
        frames = 2 * config.max_source_positions
        inputs = {"input_features": torch.randn(BATCH, config.num_mel_bins, frames, generator=rng)}
    elif main == "input_ids":
        inputs = {"input_ids": _tokens(config, rng)}
        if _two_towers(config):
            inputs["pixel_values"] = _pixels(config.vision_config, rng)
    else:
        raise DataError(f"{type(model).__name__} takes {main!r}; pass a package.module:factory instead of a config")
    if getattr(config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = _tokens(config, rng)
    return inputs


def _pixels(config: Any, rng: torch.Generator) -> Tensor:
    size = getattr(config, "image_size", None) or 224
    height, width = size if isinstance(size, (tuple, list)) else (size, size)
    return torch.randn((BATCH, getattr(config, "num_channels", 3), height, width), generator=rng)


def _two_towers(config: Any) -> bool:
    """An image and a text encoder side by side (CLIP); image tokens within the text are optional and left out."""
    return hasattr(config, "vision_config") and hasattr(config, "text_config") and not hasattr(config, "image_token_id")


def _tokens(config: Any, rng: torch.Generator) -> Tensor:
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    experts = max(int(getattr(text, name, 0) or 0) for name in ("num_local_experts", "num_experts", "n_routed_experts"))
    length = max(LENGTH, -(-experts // BATCH))
    if int(text.vocab_size) < 1:
        raise DataError(f"vocab_size is {text.vocab_size}: the model has no tokens; give a configuration with some")
    return torch.randint(0, int(text.vocab_size), (BATCH, length), generator=rng)


def _config(transformers: Any, path: Path) -> Any:
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise DataError(f"{str(path)!r} is neither a config.json nor a folder that holds one")
    try:
        data = json.loads(file.read_text())
    except ValueError as error:
        raise DataError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(data, dict):
        raise DataError(f"{file} holds a JSON {type(data).__name__}; a transformers configuration is an object")
    data = _without_code(data)
    kind = data.pop("model_type", None)
    if not isinstance(kind, str):
        raise DataError(f"{file} names no model_type; is it a transformers configuration?")
    if kind not in transformers.models.auto.configuration_auto.CONFIG_MAPPING:
        raise DataError(f"transformers does not know the model_type {kind!r} of {file}")
    try:
        return transformers.AutoConfig.for_model(kind, **data)
    except Exception as error:
        raise DataError(f"transformers refuses the configuration {file} of model_type {kind!r}: {error}") from error


def _without_code(data: Any) -> Any:
    """The configuration, parts included, without what could make transformers fetch or run code.

    That is `auto_map` (the model's own code) and the names of attention and expert kernels, which may be repositories.
    Kernels compute the same function, so that the symmetries are the same.
    """
    if isinstance(data, dict):
        return {key: _without_code(value) for key, value in data.items() if not CODE.fullmatch(key)}
    return [_without_code(value) for value in data] if isinstance(data, list) else data


def _named_class(transformers: Any, config: Any) -> Any:
    names = [n for n in getattr(config, "architectures", None) or [] if hasattr(transformers, n)]
    return getattr(transformers, names[0]) if names else transformers.AutoModel


def _builder(transformers: Any, config: Any) -> Any:
    if getattr(config, "architectures", None):
        named = _named_class(transformers, config)
        return named.from_config if hasattr(named, "from_config") else named._from_config

    def build(config: Any) -> nn.Module:
        for name in AUTO_CLASSES:
            auto = getattr(transformers, name)
            if type(config) in auto._model_mapping:
                return auto.from_config(config)
        raise DataError(f"no transformers model for {type(config).__name__}; name one in 'architectures'")

    return build


def _has_weights(path: Path) -> bool:
    return path.is_dir() and any(path.glob("*.safetensors"))
