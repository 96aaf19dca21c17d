"""Small versions of the model zoo: random weights, evaluation mode, float32 (use `.double()`), batches of four.

`ZOO[name]()` builds a fresh `Case`. Builders are seeded, so two calls give equal models.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BATCH = 4
ZOO: dict[str, Callable[[], Case]] = {}


@dataclass(frozen=True)
class Case:
    """A model, its example inputs (tensor, tuple of args or dict of kwargs), and per-sample losses on `batch`."""

    model: nn.Module
    inputs: Any
    loss_fn: Callable[[nn.Module, Any], Tensor]
    batch: Any

    def double(self) -> Case:
        """The same case in float64 (the model is converted in place)."""
        return Case(self.model.double(), _double(self.inputs), self.loss_fn, _double(self.batch))


def _double(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, dict):
        return {k: _double(v) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(_double(v) for v in value)
    return value


def call(model: nn.Module, inputs: Any) -> Any:
    """`model` on example inputs of any of the three forms."""
    if isinstance(inputs, dict):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def output_of(out: Any) -> Tensor:
    """The main tensor of a model's output: logits, last hidden state, or the first element."""
    if isinstance(out, Tensor):
        return out
    for key in ("logits", "last_hidden_state"):
        if hasattr(out, key) and getattr(out, key) is not None:
            return getattr(out, key)
    return out[0]


def per_sample_cross_entropy(model: nn.Module, batch: Any) -> Tensor:
    """Cross entropy of `(inputs, targets)`: targets `[batch]`, or `[batch, time]` averaged over time."""
    inputs, targets = batch
    out = output_of(call(model, inputs))
    if targets.ndim == 2:
        return F.cross_entropy(out.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape).mean(1)
    return F.cross_entropy(out, targets, reduction="none")


def per_sample_squared_error(model: nn.Module, batch: Any) -> Tensor:
    """`|f(x) - y|^2` summed over everything but the batch."""
    inputs, targets = batch
    return (output_of(call(model, inputs)) - targets).square().flatten(1).sum(1)


def case(name: str) -> Callable[[Callable[[], Case]], Callable[[], Case]]:
    def register(build: Callable[[], Case]) -> Callable[[], Case]:
        def seeded() -> Case:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                built = build()
                jitter(built.model)
                built.model.eval()
            return built

        ZOO[name] = seeded
        return seeded

    return register


@torch.no_grad()
def jitter(model: nn.Module) -> None:
    """Move gains, biases and running statistics off their special initial values (ones and zeros)."""
    for name, p in model.named_parameters():
        if p.ndim <= 1:
            p.add_(0.1 * torch.randn_like(p))
        elif "lora_B" in name:
            p.copy_(0.1 * torch.randn_like(p))
    for name, b in model.named_buffers():
        if name.endswith("running_mean"):
            b.copy_(0.1 * torch.randn_like(b))
        elif name.endswith("running_var"):
            b.copy_(1 + 0.3 * torch.rand_like(b))


def _classify(model: nn.Module, inputs: Any, classes: int) -> Case:
    return Case(model, inputs, per_sample_cross_entropy, (inputs, torch.randint(classes, (BATCH,))))


def _regress(model: nn.Module, inputs: Any) -> Case:
    with torch.no_grad():
        out = output_of(call(model.eval(), inputs))
    return Case(model, inputs, per_sample_squared_error, (inputs, torch.randn_like(out)))


# --- torch ---------------------------------------------------------------------------------------------------------


@case("mlp")
def mlp() -> Case:
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.LeakyReLU(), nn.Linear(5, 3))
    return _classify(net, torch.randn(BATCH, 4), 3)


@case("mlp_prelu_dropout")
def mlp_prelu_dropout() -> Case:
    net = nn.Sequential(nn.Linear(4, 6), nn.PReLU(6), nn.Dropout(0.5), nn.Linear(6, 3, bias=False))
    return _classify(net, torch.randn(BATCH, 4), 3)


@case("deep_linear")
def deep_linear() -> Case:
    net = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Linear(4, 3, bias=False), nn.Linear(3, 2, bias=False))
    return _regress(net, torch.randn(BATCH, 3))


@case("cnn")
def cnn() -> Case:
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 6, 3, padding=1),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(24, 3),
    )
    return _classify(net, torch.randn(BATCH, 2, 8, 8), 3)


@case("cnn_batchnorm")
def cnn_batchnorm() -> Case:
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 6, 3, padding=1, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 3),
    )
    return _classify(net, torch.randn(BATCH, 2, 6, 6), 3)


@case("depthwise_cnn")
def depthwise_cnn() -> Case:
    net = nn.Sequential(
        nn.Conv2d(2, 4, 1),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3, padding=1, groups=4),
        nn.ReLU(),
        nn.Conv2d(4, 6, 3, padding=1, groups=2),
        nn.ReLU(),
        nn.ConvTranspose2d(6, 4, 2, stride=2),
        nn.ReLU(),
        nn.Conv2d(4, 2, 1),
    )
    return _regress(net, torch.randn(BATCH, 2, 4, 4))


@case("layernorm_mlp")
def layernorm_mlp() -> Case:
    net = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 5), nn.GELU(), nn.Linear(5, 3))
    return _classify(net, torch.randn(BATCH, 4), 3)


@case("groupnorm_cnn")
def groupnorm_cnn() -> Case:
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.GroupNorm(2, 4),
        nn.ReLU(),
        nn.Conv2d(4, 3, 3),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
    return _classify(net, torch.randn(BATCH, 2, 6, 6), 3)


class _EmbeddingLinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.position = nn.Embedding(7, 4), nn.Embedding(5, 4)
        self.head = nn.Linear(4, 7)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.embedding(ids) + self.position(torch.arange(ids.shape[1], device=ids.device)))


@case("embedding_linear")
def embedding_linear() -> Case:
    ids = torch.randint(7, (BATCH, 5))
    return Case(_EmbeddingLinear(), ids, per_sample_cross_entropy, (ids, torch.randint(7, (BATCH, 5))))


class _SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=True)[0]


@case("multihead_attention")
def multihead_attention() -> Case:
    return _regress(_SelfAttention(), torch.randn(BATCH, 3, 8))


@case("transformer_encoder")
def transformer_encoder() -> Case:
    layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True, norm_first=True)
    return _regress(nn.TransformerEncoder(layer, 1, enable_nested_tensor=False), torch.randn(BATCH, 3, 8))


class _LSTMHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inputs, self.lstm = nn.Linear(3, 4), nn.LSTM(4, 5, batch_first=True)
        self.up, self.head = nn.Linear(5, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.up(self.lstm(self.inputs(x))[0][:, -1])))


@case("lstm_head")
def lstm_head() -> Case:
    return _classify(_LSTMHead(), torch.randn(BATCH, 3, 3), 2)


@case("weight_norm")
def weight_norm() -> Case:
    wn = nn.utils.parametrizations.weight_norm
    return _classify(nn.Sequential(wn(nn.Linear(4, 5)), nn.ReLU(), wn(nn.Linear(5, 3))), torch.randn(BATCH, 4), 3)


@case("spectral_norm")
def spectral_norm() -> Case:
    sn = nn.utils.parametrizations.spectral_norm
    return _classify(nn.Sequential(sn(nn.Linear(4, 5)), nn.ReLU(), nn.Linear(5, 3)), torch.randn(BATCH, 4), 3)


# --- transformers --------------------------------------------------------------------------------------------------


def _tokens(model: nn.Module, vocabulary: int, length: int = 5, **extra: Any) -> Case:
    model.config.use_cache = False
    ids = torch.randint(3, vocabulary, (BATCH, length))  # special tokens apart: padding rows get no gradient
    inputs = {"input_ids": ids, **extra}
    out = output_of(model(**inputs))
    targets = torch.randint(out.shape[-1], (BATCH, out.shape[1]) if out.ndim == 3 else (BATCH,))
    return Case(model, inputs, per_sample_cross_entropy, (inputs, targets))


@case("gpt2")
def gpt2() -> Case:
    import transformers as tf

    config = tf.GPT2Config(vocab_size=11, n_positions=8, n_embd=8, n_layer=2, n_head=2, n_inner=12)
    return _tokens(tf.GPT2LMHeadModel(config), 11)


@case("gpt2_eager")
def gpt2_eager() -> Case:
    import transformers as tf

    config = tf.GPT2Config(vocab_size=11, n_positions=8, n_embd=8, n_layer=1, n_head=2, n_inner=12)
    config._attn_implementation = "eager"
    return _tokens(tf.GPT2LMHeadModel(config), 11)


@case("llama")
def llama() -> Case:
    import transformers as tf

    config = tf.LlamaConfig(
        vocab_size=11,
        hidden_size=8,
        intermediate_size=6,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=16,
    )
    return _tokens(tf.LlamaForCausalLM(config), 11)


@case("qwen3")
def qwen3() -> Case:
    import transformers as tf

    config = tf.Qwen3Config(
        vocab_size=11,
        hidden_size=8,
        intermediate_size=6,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=4,
        max_position_embeddings=16,
    )
    return _tokens(tf.Qwen3ForCausalLM(config), 11)


@case("opt")
def opt() -> Case:
    import transformers as tf

    config = tf.OPTConfig(
        vocab_size=11,
        hidden_size=8,
        ffn_dim=6,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=16,
        word_embed_proj_dim=8,
        dropout=0.0,
    )
    return _tokens(tf.OPTForCausalLM(config), 11)


@case("bert")
def bert() -> Case:
    import transformers as tf

    config = tf.BertConfig(
        vocab_size=11,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=12,
        max_position_embeddings=8,
        num_labels=3,
    )
    return _tokens(tf.BertForSequenceClassification(config), 11)


@case("vit")
def vit() -> Case:
    import transformers as tf

    config = tf.ViTConfig(
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=12,
        image_size=8,
        patch_size=4,
        num_labels=3,
    )
    pixels = {"pixel_values": torch.randn(BATCH, 3, 8, 8)}
    return _classify(tf.ViTForImageClassification(config), pixels, 3)


def _resnet(layer_type: str, depths: list[int], widths: list[int]) -> Case:
    import transformers as tf

    config = tf.ResNetConfig(
        embedding_size=4, hidden_sizes=widths, depths=depths, layer_type=layer_type, num_labels=3, num_channels=2
    )
    pixels = {"pixel_values": torch.randn(BATCH, 2, 32, 32)}
    return _classify(tf.ResNetForImageClassification(config), pixels, 3)


@case("resnet_basic")
def resnet_basic() -> Case:
    return _resnet("basic", [2, 1], [4, 6])


@case("resnet_bottleneck")
def resnet_bottleneck() -> Case:
    return _resnet("bottleneck", [1, 1], [8, 16])


@case("convnext")
def convnext() -> Case:
    import transformers as tf

    config = tf.ConvNextConfig(
        num_channels=2, patch_size=2, num_stages=2, hidden_sizes=[4, 6], depths=[1, 1], image_size=8, num_labels=3
    )
    pixels = {"pixel_values": torch.randn(BATCH, 2, 8, 8)}
    return _classify(tf.ConvNextForImageClassification(config), pixels, 3)


@case("mixtral")
def mixtral() -> Case:
    import transformers as tf

    config = tf.MixtralConfig(
        vocab_size=11,
        hidden_size=8,
        intermediate_size=6,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=3,
        num_experts_per_tok=2,
        max_position_embeddings=16,
    )
    config._experts_implementation = "batched_mm"
    return _tokens(tf.MixtralForCausalLM(config), 11)


@case("t5")
def t5() -> Case:
    import transformers as tf

    config = tf.T5Config(
        vocab_size=11,
        d_model=8,
        d_kv=4,
        d_ff=6,
        num_layers=1,
        num_decoder_layers=1,
        num_heads=2,
        feed_forward_proj="relu",
        dropout_rate=0.0,
    )
    return _tokens(tf.T5ForConditionalGeneration(config), 11, decoder_input_ids=torch.randint(3, 11, (BATCH, 3)))


@case("t5_encoder")
def t5_encoder() -> Case:
    import transformers as tf

    config = tf.T5Config(
        vocab_size=11,
        d_model=8,
        d_kv=4,
        d_ff=6,
        num_layers=1,
        num_heads=2,
        feed_forward_proj="relu",
        dropout_rate=0.0,
    )
    return _regress(tf.T5EncoderModel(config), {"input_ids": torch.randint(3, 11, (BATCH, 5))})


@case("whisper")
def whisper() -> Case:
    import transformers as tf

    config = tf.WhisperConfig(
        vocab_size=11,
        d_model=8,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=12,
        decoder_ffn_dim=12,
        num_mel_bins=4,
        max_source_positions=4,
        max_target_positions=8,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    model = tf.WhisperForConditionalGeneration(config)
    model.config.use_cache = False
    inputs = {"input_features": torch.randn(BATCH, 4, 8), "decoder_input_ids": torch.randint(3, 11, (BATCH, 3))}
    return Case(model, inputs, per_sample_cross_entropy, (inputs, torch.randint(11, (BATCH, 3))))


@case("gpt2_lora")
def gpt2_lora() -> Case:
    import peft
    import transformers as tf

    config = tf.GPT2Config(vocab_size=11, n_positions=8, n_embd=8, n_layer=1, n_head=2, n_inner=12)
    lora = peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft reads an attribute that transformers renames
        return _tokens(peft.get_peft_model(tf.GPT2LMHeadModel(config), lora), 11)


# --- written by hand -----------------------------------------------------------------------------------------------


class _NanoBlock(nn.Module):
    """A pre-norm block with packed qkv, attention by matmul, scale, mask and softmax."""

    def __init__(self, width: int = 8, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.c_attn, self.c_proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.c_fc, self.c_out = nn.Linear(width, 12), nn.Linear(12, width)

    def forward(self, x: Tensor) -> Tensor:
        b, t, c = x.shape
        q, k, v = (
            part.view(b, t, self.heads, c // self.heads).transpose(1, 2)
            for part in self.c_attn(self.ln_1(x)).split(c, dim=2)
        )
        scores = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        mask = torch.tril(torch.ones(t, t, device=x.device)).view(1, 1, t, t)
        probabilities = F.softmax(scores.masked_fill(mask == 0, float("-inf")), dim=-1)
        x = x + self.c_proj((probabilities @ v).transpose(1, 2).contiguous().view(b, t, c))
        return x + self.c_out(F.gelu(self.c_fc(self.ln_2(x))))


class _NanoGPT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(11, 8), nn.Parameter(0.1 * torch.randn(6, 8))
        self.block, self.ln_f = _NanoBlock(), nn.LayerNorm(8)
        self.lm_head = nn.Linear(8, 11, bias=False)
        self.lm_head.weight = self.wte.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.lm_head(self.ln_f(self.block(self.wte(ids) + self.wpe[: ids.shape[1]])))


@case("nanogpt")
def nanogpt() -> Case:
    ids = torch.randint(11, (BATCH, 5))
    return Case(_NanoGPT(), ids, per_sample_cross_entropy, (ids, torch.randint(11, (BATCH, 5))))


class _EinsumAttention(nn.Module):
    """Attention by einsum with per-head weight tensors, interleaved rotary embedding and grouped queries."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Parameter(0.4 * torch.randn(4, 6, 4))
        self.k = nn.Parameter(0.4 * torch.randn(2, 6, 4))
        self.v = nn.Parameter(0.4 * torch.randn(2, 6, 3))
        self.o = nn.Linear(12, 6)

    @staticmethod
    def _rotate(x: Tensor) -> Tensor:
        angle = torch.outer(
            torch.arange(x.shape[-2], dtype=x.dtype, device=x.device),
            10.0 ** -torch.arange(0, x.shape[-1], 2, dtype=x.dtype, device=x.device),
        )
        even, odd = x[..., ::2], x[..., 1::2]
        turned = (even * angle.cos() - odd * angle.sin(), even * angle.sin() + odd * angle.cos())
        return torch.stack(turned, -1).flatten(-2)

    def forward(self, x: Tensor) -> Tensor:
        q, k = (
            self._rotate(torch.einsum("btc,hcd->bhtd", x, self.q)),
            self._rotate(torch.einsum("btc,hcd->bhtd", x, self.k)),
        )
        v = torch.einsum("btc,hcd->bhtd", x, self.v)
        k, v = (y.repeat_interleave(2, dim=1) for y in (k, v))
        weights = torch.einsum("bhtd,bhsd->bhts", q, k).softmax(-1)
        return self.o(torch.einsum("bhts,bhsd->bthd", weights, v).flatten(2))


@case("einsum_attention")
def einsum_attention() -> Case:
    return _regress(_EinsumAttention(), torch.randn(BATCH, 5, 6))


class _UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2 = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 6, 3, padding=1)
        self.middle = nn.Conv2d(6, 6, 3, padding=1)
        self.up = nn.ConvTranspose2d(6, 4, 2, stride=2)
        self.up1, self.head = nn.Conv2d(8, 4, 3, padding=1), nn.Conv2d(4, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = F.relu(self.down1(x))
        b = F.relu(self.down2(F.max_pool2d(a, 2)))
        c = F.interpolate(F.relu(self.middle(F.avg_pool2d(b, 2))), scale_factor=2, mode="bilinear")
        d = F.relu(self.up(b + c))
        return self.head(F.relu(self.up1(torch.cat((a, d), dim=1))))


@case("unet")
def unet() -> Case:
    return _regress(_UNet(), torch.randn(BATCH, 2, 8, 8))


class _DenseBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(2 + 3 * i, 3, 3, padding=1) for i in range(3))
        self.head = nn.Linear(11, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.cat((x, F.relu(layer(x))), dim=1)
        return self.head(x.mean((2, 3)))


@case("densenet_block")
def densenet_block() -> Case:
    return _classify(_DenseBlock(), torch.randn(BATCH, 2, 4, 4), 3)


class _SqueezeExcite(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.out = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 2, 1)
        self.squeeze, self.excite = nn.Linear(4, 3), nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv(x))
        scale = torch.sigmoid(self.excite(F.relu(self.squeeze(x.mean((2, 3))))))
        return self.out(x * scale[:, :, None, None]).mean((2, 3))


@case("squeeze_excitation")
def squeeze_excitation() -> Case:
    return _classify(_SqueezeExcite(), torch.randn(BATCH, 2, 4, 4), 2)


class _Bilinear(nn.Module):
    """Elementwise product of two linear branches: two tori meet in one consumer."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.out = nn.Linear(4, 5), nn.Linear(4, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.left(x) * self.right(x))


@case("bilinear")
def bilinear() -> Case:
    return _classify(_Bilinear(), torch.randn(BATCH, 4), 2)


class _NMF(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w, self.h = nn.Parameter(torch.rand(6, 3)), nn.Parameter(torch.rand(3, 5))

    def forward(self, rows: Tensor) -> Tensor:
        return self.w[rows] @ self.h


@case("nmf")
def nmf() -> Case:
    return _regress(_NMF(), torch.tensor([0, 2, 3, 5]))


class _SharedLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(2, 4)
        self.shared, self.head = nn.Linear(4, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.head(F.relu(self.shared(F.relu(self.a(x)))) + F.relu(self.shared(F.relu(self.b(y)))))


@case("shared_layer")
def shared_layer() -> Case:
    return _classify(_SharedLayer(), (torch.randn(BATCH, 3), torch.randn(BATCH, 2)), 2)


class _TopOneExperts(nn.Module):
    """Softmax-routed mixture of experts that writes its result with index_add."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(4, 2, bias=False)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.router(x).softmax(-1)
        out = x.new_zeros(x.shape[0], 3)
        rows = torch.arange(x.shape[0], device=x.device)
        for e, expert in enumerate(self.experts):
            out = out.index_add(0, rows, expert(x) * weight[:, e : e + 1])
        return out


@case("experts_index_add")
def experts_index_add() -> Case:
    return _classify(_TopOneExperts(), torch.randn(BATCH, 4), 3)


class _ParameterLists(nn.Module):
    """Weights in a ParameterList, a constant buffer in between, hand-written RMS norm."""

    def __init__(self) -> None:
        super().__init__()
        self.ws = nn.ParameterList([0.5 * torch.randn(4, 6), 0.5 * torch.randn(6, 3)])
        self.gain = nn.Parameter(torch.ones(6))
        self.mix: Tensor
        self.register_buffer("mix", torch.randn(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        h = x @ self.mix @ self.ws[0]
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6) * self.gain
        return h @ self.ws[1]


@case("parameter_list")
def parameter_list() -> Case:
    return _classify(_ParameterLists(), torch.randn(BATCH, 4), 3)
