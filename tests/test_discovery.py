"""Gauge inference against counts derived by hand and against the certificate, on tricky little networks."""

from __future__ import annotations

import copy
import sys
import threading
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune

import noetherflow as nf
from noetherflow import SymmetrySet, declare, tensors_of
from noetherflow.discovery import certify, count_symmetries, explain, find_symmetries
from noetherflow.errors import DataError, DeclarationError, ExportError
from zoo import ZOO


def generators(syms: SymmetrySet) -> int:
    """Symmetric generators: coordinates of tori, d (d + 1) / 2 per GL block."""
    return sum(s.blocks if s.is_torus else s.blocks * s.dim * (s.dim + 1) // 2 for s in syms)


def groups(syms: SymmetrySet) -> dict[tuple[str, str], int]:
    """Blocks by (family, group)."""
    return {(row["family"], row["group"]): row["blocks"] for row in syms.summary() if row["group"] != "shift"}


HEADS, WIDTH, HIDDEN = 2, 8, 12
BLOCK = {  # one pre-norm GPT-2 block of width 8 with 2 heads: two norms, QK and VO per head
    ("norm-gain", "diagonal"): 2 * WIDTH,
    ("attention-qk", "GL(4)"): HEADS,
    ("attention-vo", "GL(4)"): HEADS,
}
EXPECTED: dict[str, dict[tuple[str, str], int]] = {
    "mlp": {("rescaling", "diagonal"): 6 + 5},
    "mlp_prelu_dropout": {("rescaling", "diagonal"): 6},
    "deep_linear": {("linear-linear", "GL(4)"): 1, ("linear-linear", "GL(3)"): 1},
    "cnn": {("rescaling", "diagonal"): 4 + 6},
    "cnn_batchnorm": {("norm-gain", "diagonal"): 4 + 6, ("one-sided", "diagonal"): 4 + 6},
    "depthwise_cnn": {("rescaling", "diagonal"): 4 + 4 + 6 + 4},
    "layernorm_mlp": {("norm-gain", "diagonal"): 6, ("one-sided", "scalar"): 1},
    "groupnorm_cnn": {("norm-gain", "diagonal"): 4, ("one-sided", "diagonal"): 2},
    "embedding_linear": {("linear-linear", "GL(4)"): 1},
    "multihead_attention": {("attention-qk", "GL(4)"): 2, ("attention-vo", "GL(4)"): 2},
    "transformer_encoder": BLOCK | {("rescaling", "diagonal"): HIDDEN},
    "lstm_head": {("linear-linear", "GL(4)"): 1, ("rescaling", "diagonal"): 6},
    # a weight-normed layer: every row of v one-sided, and one scalar from the first gain to the second
    "weight_norm": {("one-sided", "diagonal"): 5 + 3, ("rescaling", "scalar"): 1},
    "spectral_norm": {("one-sided", "scalar"): 1},
    # tied embedding: the stream scale has its counterweight in the last gain
    "gpt2": {k: 2 * v for k, v in BLOCK.items()} | {("norm-gain", "scalar"): 1},
    "nanogpt": BLOCK | {("norm-gain", "scalar"): 1},
    "llama": {
        ("one-sided", "scalar"): 1,
        ("norm-gain", "diagonal"): 3 * 8,
        ("rotary-qk", "diagonal"): 2,
        ("attention-vo", "GL(4)"): 1,
        ("gated", "diagonal"): 6,
    },
    # QK-norm: the scale of q and k is free per head, their gains keep one number per frequency pair
    "qwen3": {
        ("one-sided", "scalar"): 1 + 1,
        ("one-sided", "diagonal"): 2,
        ("norm-gain", "diagonal"): 3 * 8 + 2,
        ("attention-vo", "GL(4)"): 1,
        ("gated", "diagonal"): 6,
    },
    "opt": BLOCK | {("norm-gain", "scalar"): 1, ("rescaling", "diagonal"): 6},
    # post-norm: a gain and the residual branch scale together; the last gain meets the pooler per channel
    "bert": {
        ("one-sided", "scalar"): 1,
        ("norm-gain", "scalar"): 2,
        ("norm-gain", "diagonal"): 8,
        ("attention-qk", "GL(4)"): 2,
        ("attention-vo", "GL(4)"): 2,
    },
    "vit": BLOCK | {("one-sided", "scalar"): 1, ("norm-gain", "diagonal"): 3 * 8},
    "mixtral": {
        ("one-sided", "scalar"): 1,
        ("norm-gain", "diagonal"): 3 * 8,
        ("rotary-qk", "diagonal"): 2,
        ("attention-vo", "GL(4)"): 1,
        ("gated", "diagonal"): 3 * 6,  # per expert
    },
    "t5_encoder": {
        ("one-sided", "scalar"): 1,
        ("norm-gain", "diagonal"): 2 * 8,
        ("attention-qk", "GL(4)"): 2,
        ("attention-vo", "GL(4)"): 2,
        ("rescaling", "diagonal"): 6,
    },
    "gpt2_lora": {("linear-linear", "GL(2)"): 1},  # the base weights are frozen
    "einsum_attention": {("rotary-qk", "diagonal"): 2 * 2, ("attention-vo", "GL(3)"): 2},
    "unet": {("rescaling", "diagonal"): 4 + 6 + 4 + 4},
    "densenet_block": {("rescaling", "diagonal"): 3 * 3},
    "squeeze_excitation": {("rescaling", "diagonal"): 4 + 3},
    "bilinear": {("gated", "diagonal"): 2 * 5},
    "nmf": {("linear-linear", "GL(3)"): 1},
    "shared_layer": {("rescaling", "diagonal"): 4 + 5},
    "experts_index_add": {("rescaling", "diagonal"): 2 * 5},
    "parameter_list": {("one-sided", "scalar"): 1, ("norm-gain", "diagonal"): 6},
}


@pytest.mark.parametrize("name", EXPECTED)
def test_hand_derived_counts(name: str) -> None:
    case = ZOO[name]()
    assert groups(find_symmetries(case.model, case.inputs)) == EXPECTED[name]


def linear_net(*widths: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*[nn.Linear(a, b, bias=False) for a, b in pairwise(widths)])


@pytest.mark.parametrize(
    ("widths", "charges"),
    [
        ((2, 2, 2), 3),
        ((2, 3, 2), 6),
        ((2, 5, 2), 14),
        ((2, 4, 1), 9),
        ((3, 4, 3, 2), 16),
        ((4, 2, 4, 2, 4), 16),
        ((3, 3, 3, 3), 12),
    ],
)
def test_linear_nets_have_the_charges_of_marcotte_gribonval_peyre(widths: tuple[int, ...], charges: int) -> None:
    assert find_symmetries(linear_net(*widths), torch.randn(3, widths[0])).n_charges() == charges


def test_relu_net_has_one_charge_per_hidden_unit() -> None:
    layers: list[nn.Module] = []
    for a, b in [(20, 30), (30, 40), (40, 25)]:
        layers += [nn.Linear(a, b), nn.ReLU()]
    syms = find_symmetries(nn.Sequential(*layers, nn.Linear(25, 5)), torch.randn(2, 20))
    assert syms.n_charges() == 95
    assert [s.kind for s in syms] == ["diagonal"] * 3


def test_resnet18_has_twelve_tied_regions() -> None:
    import transformers as tf

    config = tf.ResNetConfig(depths=[2, 2, 2, 2], hidden_sizes=[64, 128, 256, 512], layer_type="basic")
    with torch.device("meta"):
        model = tf.ResNetForImageClassification(config).eval()
    syms = find_symmetries(model, {"pixel_values": torch.randn(1, 3, 64, 64)})
    gains, scales = syms.filter(family="norm-gain"), syms.filter(family="one-sided")
    assert len(gains) == 12
    assert sum(s.blocks for s in gains) == 2880
    convolutions = {n for n, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    assert {s.parameters[0].removesuffix(".weight") for s in scales} == convolutions
    assert all(s.eps == 1e-5 and any(leg.buffer and leg.power == 2 for leg in s.legs) for s in scales)


@pytest.mark.parametrize(("heads", "kv", "width", "hidden", "layers"), [(4, 2, 16, 10, 1), (2, 2, 12, 5, 2)])
def test_llama_layer_formula(heads: int, kv: int, width: int, hidden: int, layers: int) -> None:
    import transformers as tf

    config = tf.LlamaConfig(
        vocab_size=13,
        hidden_size=width,
        intermediate_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv,
    )
    with torch.device("meta"):
        model = tf.LlamaForCausalLM(config)
    d = width // heads
    assert groups(find_symmetries(model, {"input_ids": torch.zeros(1, 4, dtype=torch.long)})) == {
        ("one-sided", "scalar"): 1,
        ("norm-gain", "diagonal"): (2 * layers + 1) * width,
        ("rotary-qk", "diagonal"): layers * kv * d // 2,
        ("attention-vo", f"GL({d})"): layers * kv,
        ("gated", "diagonal"): layers * hidden,
    }


class Tricky(nn.Module):
    """A function of named parameters, for networks that no module describes."""

    def __init__(self, function: Callable[..., Tensor], **shapes: tuple[int, ...]) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.function = function
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(*shape)))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, **dict(self.named_parameters()))


def _cycle(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    h = x @ a
    return (h + h[:, [1, 2, 0, 5, 3, 4]]) @ b


def _power_iteration(x: Tensor, a: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return x @ a @ w @ w @ b


def _linear_attention(x: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor) -> Tensor:
    return ((x @ q) @ (x @ k).mT) @ (x @ v) @ o


def _halves(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    u, v = (x @ a).chunk(2, dim=-1)
    return (u + v.flip(-1)) @ b


def _unused_rows(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.relu(x @ a)[:, :4] @ b


TRICKY: dict[str, tuple[Tricky, Tensor, dict[tuple[str, str], int]]] = {
    "flattened channels keep their block": (
        Tricky(lambda x, a, b: torch.einsum("btc,cd->bdt", x, a).flatten(1) @ b, a=(3, 4), b=(20, 2)),
        torch.randn(3, 5, 3),
        {("linear-linear", "GL(4)"): 1},
    ),
    "halves of one axis move together": (
        Tricky(_halves, a=(3, 6), b=(3, 2)),
        torch.randn(4, 3),
        {("linear-linear", "GL(3)"): 1},
    ),
    "a permutation is followed": (
        Tricky(lambda x, a, b: (x @ a).flip(-1) @ b, a=(3, 5), b=(5, 2)),
        torch.randn(4, 3),
        {("linear-linear", "GL(5)"): 1},
    ),
    "a fixed vector breaks mixing": (
        Tricky(lambda x, a, b: (x @ a) * torch.arange(1.0, 6.0, dtype=x.dtype) @ b, a=(3, 5), b=(5, 2)),
        torch.randn(4, 3),
        {("rescaling", "diagonal"): 5},
    ),
    "the same matrix twice conjugates": (
        Tricky(_power_iteration, a=(3, 4), w=(4, 4), b=(4, 2)),
        torch.randn(4, 3),
        {("linear-linear", "GL(4)"): 1, ("rescaling", "scalar"): 1},
    ),
    "tied encoder and decoder are only orthogonal": (
        Tricky(lambda x, a: torch.relu(x @ a) @ a.mT, a=(4, 6)),
        torch.randn(4, 4),
        {},
    ),
    "attention without softmax also has a scalar": (
        Tricky(_linear_attention, q=(4, 3), k=(4, 3), v=(4, 2), o=(2, 4)),
        torch.randn(2, 5, 4),
        {("attention-qk", "GL(3)"): 1, ("linear-linear", "GL(2)"): 1, ("attention-qk", "scalar"): 1},
    ),
    "rows that nothing reads are left out": (
        Tricky(_unused_rows, a=(3, 6), b=(4, 2)),
        torch.randn(4, 3),
        {("rescaling", "diagonal"): 4},
    ),
    "a vector between two matrices": (
        Tricky(lambda x, a, s, b: torch.tanh(x @ a) * s @ b, a=(3, 5), s=(5,), b=(5, 2)),
        torch.randn(4, 3),
        {("norm-gain", "diagonal"): 5},
    ),
    "padding with zeros fits any gauge": (
        Tricky(lambda x, a, b: F.pad(torch.relu(x @ a), (0, 2)) @ b, a=(3, 4), b=(6, 2)),
        torch.randn(4, 3),
        {("rescaling", "diagonal"): 4},
    ),
    "relu6 is not homogeneous": (
        Tricky(lambda x, a, b: F.relu6(9 * x @ a) @ b, a=(3, 4), b=(4, 2)),
        torch.randn(4, 3),
        {},
    ),
    "squared relu has powers": (
        Tricky(lambda x, a, b: torch.relu(x @ a).square() @ b, a=(3, 4), b=(4, 2)),
        torch.randn(4, 3),
        {("rescaling", "diagonal"): 4},
    ),
}


@pytest.mark.parametrize("name", TRICKY)
def test_tricky_networks_are_found_exact_and_complete(name: str) -> None:
    model, inputs, expected = TRICKY[name]
    syms = find_symmetries(model, inputs)
    assert groups(syms) == expected
    assert {row.verdict for row in certify(model, syms, inputs)} <= {"exact"}
    # Two halves of one matrix that are added have directions with no effect at all: u + e, v - e.
    idle = 6 if name == "halves of one axis move together" else 0
    assert count_symmetries(model, inputs).symmetries == generators(syms) + idle


def test_mixing_is_refused_where_permutations_do_not_match() -> None:
    """Three-cycles in different directions: the coordinates are tied in threes, and no GL of them is a symmetry."""
    model, inputs = Tricky(_cycle, a=(3, 6), b=(6, 2)), torch.randn(4, 3)
    syms = find_symmetries(model, inputs)
    assert {row.verdict for row in certify(model, syms, inputs)} <= {"exact"}
    assert all(s.is_torus for s in syms)


@pytest.mark.parametrize("activation", [nn.GELU(), nn.SiLU(), nn.Tanh(), nn.Sigmoid(), nn.ReLU6(), nn.ELU()])
def test_other_activations_leave_no_rescaling(activation: nn.Module) -> None:
    net = nn.Sequential(nn.Linear(3, 4), activation, nn.Linear(4, 2))
    syms = find_symmetries(net, torch.randn(2, 3))
    assert len(syms) == 0
    assert not syms.unknown


def test_frozen_parameters_exclude_their_symmetries() -> None:
    case = ZOO["mlp"]()
    case.model[0].weight.requires_grad_(False)
    syms = find_symmetries(case.model, case.inputs)
    assert [s.name for s in syms] == ["2 -> 4"]
    assert syms.excluded == {"0 -> 2": "frozen parameter 0.weight"}


def test_wrapped_models_keep_their_names() -> None:
    case = ZOO["mlp"]()
    wrapped = nn.DataParallel(case.model)
    syms = find_symmetries(wrapped, case.inputs)
    assert set(syms.parameters) <= set(tensors_of(wrapped))
    assert certify(wrapped, syms, case.inputs).broken == ()


def test_tied_parameters_appear_once() -> None:
    case = ZOO["nanogpt"]()
    assert "lm_head.weight" not in find_symmetries(case.model, case.inputs).shapes


def test_the_model_is_left_as_it_was() -> None:
    case = ZOO["gpt2"]()
    case.model.config.use_cache = True
    case.model.train()
    before = copy.deepcopy(case.model.state_dict())
    syms = find_symmetries(case.model, case.inputs)
    certify(case.model, syms, case.inputs, dtypes=(torch.bfloat16,))
    assert case.model.training
    assert case.model.config.use_cache
    assert all(torch.equal(v, before[k]) and v.dtype == before[k].dtype for k, v in case.model.state_dict().items())


def test_training_mode_moves_running_statistics_too() -> None:
    case = ZOO["cnn_batchnorm"]()
    case.model.train()
    scales = find_symmetries(case.model, case.inputs).filter(family="one-sided")
    assert all(
        {leg.parameter.split(".")[1] for leg in s.legs if leg.buffer} == {"running_mean", "running_var"} for s in scales
    )
    assert "broken" not in {row.verdict for row in certify(case.model, scales, case.inputs)}


def test_dropout_in_training_mode_stops_mixing() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 2))
    assert [s.kind for s in find_symmetries(net.train(), torch.randn(2, 3))] == ["diagonal"]
    assert [s.kind for s in find_symmetries(net.eval(), torch.randn(2, 3))] == ["general_linear"]


def test_casts_inside_the_graph_are_named() -> None:
    case = ZOO["llama"]()
    casts = find_symmetries(case.model, case.inputs).casts
    assert any("input_layernorm" in c and "float32" in c for c in casts)
    assert find_symmetries(ZOO["mlp"]().model, torch.randn(4, 4)).casts == ()


class _Branch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) if x.sum() > 0 else x


def test_export_failure_says_why_and_what_else_to_do() -> None:
    with pytest.raises(ExportError, match=r"_Branch could not be exported: (.|\n)*nf\.declare"):
        find_symmetries(_Branch(), torch.randn(1, 2))


def _computed(layer: nn.Linear) -> None:
    layer.scale = layer.weight.sum()  # type: ignore[assignment]


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    ("hook", "says"),
    [
        (nn.utils.weight_norm, r"0\.weight of Linear is an attribute (.|\n)*parametrizations\.weight_norm instead"),
        (nn.utils.spectral_norm, r"0\.weight of Linear is an attribute (.|\n)*parametrizations\.spectral_norm instead"),
        (
            lambda m: prune.l1_unstructured(m, "weight", 2),
            r"0\.weight of Linear (.|\n)*prune\.remove\(module, 'weight'\)",
        ),
        (_computed, r"0\.scale of Linear is an attribute (.|\n)*compute it in forward"),
    ],
    ids=["weight_norm", "spectral_norm", "prune", "own"],
)
def test_a_weight_computed_by_an_old_hook_is_named_with_its_remedy(hook: Callable[[nn.Module], Any], says: str) -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    x, declared = torch.randn(2, 3), declare(net, "diagonal", plus=[("0.bias", 0)], minus=[("2.weight", 1)])
    hook(net[0])
    net(x)
    with pytest.raises(ExportError, match=says):
        find_symmetries(net, x)
    with pytest.raises(DataError, match=says):
        certify(net, declared, x)


def test_result_survives_json() -> None:
    case = ZOO["cnn_batchnorm"]()
    syms = find_symmetries(case.model, case.inputs)
    again = SymmetrySet.from_json(syms.to_json())
    assert str(again) == str(syms)
    assert certify(case.model, again, case.inputs).to_dict() == certify(case.model, syms, case.inputs).to_dict()


def test_explanation_names_the_operator_that_kills_and_the_path() -> None:
    case = ZOO["llama"]()
    text = explain(case.model, case.inputs, "model.layers.0.mlp.gate_proj.weight")
    assert "axis 0: 6 of 6 rows have no symmetry of their own\n    passes silu at model.layers.0.mlp.act_fn" in text
    assert "axis 1: 8 of 8 rows carried by" in text
    tied = explain(ZOO["gpt2"]().model, ZOO["gpt2"]().inputs, "transformer.wte.weight")
    assert "axis 0: 11 of 11 rows have no symmetry of their own\n    is indexed by data" in tied
    with pytest.raises(DeclarationError, match="did you mean"):
        explain(case.model, case.inputs, "model.layers.0.mlp.gate_pro.weight")


class ScaledConv(nn.Conv2d):
    """A convolution whose weight is computed (equalised learning rate)."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, 0.3 * self.weight, self.bias)


def _convolutions(make: Callable[..., nn.Module]) -> nn.Module:
    layers = (make(2, 4, 3), nn.LeakyReLU(0.2), make(4, 3, 3), nn.LeakyReLU(0.2), nn.Flatten(), nn.Linear(12, 2))
    return nn.Sequential(*layers).double()


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (ScaledConv, {("rescaling", "diagonal"): 7}),
        (
            lambda *a: nn.utils.parametrizations.weight_norm(nn.Conv2d(*a)),
            {
                ("one-sided", "diagonal"): 7,
                ("rescaling", "scalar"): 1,
                ("rescaling", "diagonal"): 3,
            },
        ),
        (lambda *a: nn.utils.parametrizations.spectral_norm(nn.Conv2d(*a)), {("one-sided", "scalar"): 2}),
    ],
    ids=["scaled", "weight_norm", "spectral_norm"],
)
def test_computed_convolution_weights_keep_their_channels(make: Callable[..., nn.Module], expected: dict) -> None:
    model, inputs = _convolutions(make), torch.randn(2, 2, 6, 6).double()
    syms = find_symmetries(model, inputs)
    assert groups(syms) == expected
    assert {row.verdict for row in certify(model, syms, inputs)} == {"exact"}
    assert count_symmetries(model, inputs).symmetries == generators(syms)


class Added(nn.Module):
    """Parameters with three axes that are added, so that none of their axes is free."""

    def __init__(self) -> None:
        super().__init__()
        self.bias, self.linear = nn.Parameter(torch.randn(2, 3, 3)), nn.Linear(4, 4)
        self.bilinear = nn.Bilinear(3, 4, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.linear(x).view(-1, 3, 2, 2).transpose(1, 2)
        return torch.softmax(h @ h.mT + self.bias, -1).flatten(1), self.bilinear(x[..., :3], x)


def test_constants_that_cancel_within_a_parameter_are_no_symmetries() -> None:
    assert not list(find_symmetries(Added(), torch.randn(2, 3, 4)))


class Clamped(nn.Module):
    """Bounds that are a buffer, which stays, and a parameter, which may move along."""

    def __init__(self, low: bool, high: bool) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(2, 4), nn.Linear(4, 2)
        self.register_buffer("low", torch.tensor(-1.0) if low else None)
        self.high = nn.Parameter(torch.tensor(1.0)) if high else None

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.clamp(self.a(x), self.low, self.high))


@pytest.mark.parametrize("bounds", [(True, True), (True, False)])
def test_clamping_by_tensors_is_no_relu(bounds: tuple[bool, bool]) -> None:
    assert not list(find_symmetries(Clamped(*bounds), torch.randn(4, 2)))


def test_a_bound_that_is_a_parameter_scales_with_what_it_bounds() -> None:
    """All units and the bound times c, the weights behind them divided by c; no unit may scale alone."""
    model, x = Clamped(False, True), torch.randn(16, 2)
    (found,) = syms = find_symmetries(model, x)
    assert (found.kind, {leg.parameter for leg in found.legs}) == ("scalar", {"a.weight", "a.bias", "high", "b.weight"})
    assert [row.verdict for row in certify(model, syms, x)] == ["exact"]


class Gained(nn.Module):
    """A learnable gain without axes (ReZero)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.alpha = nn.Linear(4, 4), nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor) -> Tensor:
        return self.alpha * self.a(x)


def test_every_verb_takes_a_parameter_without_axes() -> None:
    model, x = Gained().double(), torch.randn(16, 4).double()
    loss = lambda m, batch: (m(batch) - batch).square().sum(1)
    syms = find_symmetries(model, x)
    assert groups(syms) == {("rescaling", "scalar"): 1}
    assert {row.verdict for row in certify(model, syms, x)} == {"exact"}
    sgd = nf.SGDConfig(lr=0.1, batch_size=4)
    moments = nf.gradient_moments(model, loss, [x], syms, entries=True)
    nf.curvature_moments(model, loss, [x], syms)
    before = model(x)
    nf.balance_(model, nf.noise_equilibrium(model, syms, moments, sgd), example_inputs=x)
    assert torch.allclose(model(x), before, rtol=1e-12)
    again = nf.gradient_moments(model, loss, [x], syms)
    drift = nf.noether_flow(model, syms, again, sgd)[syms.symmetries[0].name].drift
    assert float(drift.abs().max()) < 1e-12
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ledger = nf.Ledger(model, optimizer, syms, detail="symmetry", every=1)
    loss(model, x).mean().backward()
    ledger.before_step()
    optimizer.step()
    ledger.after_step()
    (row,) = ledger.records(by="symmetry")
    assert abs(row["residual"]) < 1e-12


def _rotated(x: Tensor) -> Tensor:
    t = torch.arange(x.shape[-2])[:, None] * torch.tensor([1.0, 0.1])
    c, s, (a, b) = t.cos().to(x), t.sin().to(x), x.chunk(2, -1)
    return torch.cat([a * c - b * s, a * s + b * c], -1)


class NormedGroupedQuery(nn.Module):
    """Rotary attention of four query heads and two key heads, both divided by their root mean square."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(8, n, bias=False) for n in (16, 8, 8))

    def forward(self, x: Tensor) -> Tensor:
        heads = lambda t: t.view(*x.shape[:2], -1, 4).transpose(1, 2)
        normed = lambda t: _rotated(t * torch.rsqrt(t.square().mean(-1, keepdim=True)))
        q, k, v = normed(heads(self.q(x))), normed(heads(self.k(x))), heads(self.v(x))
        return F.scaled_dot_product_attention(q, *(t.repeat_interleave(2, 1) for t in (k, v)))


def test_a_scale_that_is_free_by_itself_does_not_hide_in_a_pair() -> None:
    model, x = NormedGroupedQuery().double(), torch.randn(2, 5, 8).double()
    assert groups(find_symmetries(model, x)) == {("one-sided", "diagonal"): 6}
    model.q.weight.requires_grad_(False)
    assert groups(find_symmetries(model, x)) == {("one-sided", "diagonal"): 2}


def test_many_threads_find_the_same_symmetries() -> None:
    """With a short switch interval tracing would be interrupted everywhere, if it were not serialised."""
    found: list[int | str] = []
    x = torch.randn(2, 4)

    def find() -> None:
        for _ in range(2):
            try:
                model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
                found.append(find_symmetries(model, x).n_charges())
            except Exception as error:
                found.append(repr(error))

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=find) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert found == [6] * 12
