"""What is seen of activations and attention logits during a measurement, against loops, and the answers on it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import noetherflow as nf
from noetherflow.core.sightings import PASSES, looking_at

pytestmark = pytest.mark.usefixtures("every_finding_says_what_to_do")


def cases(samples: int = 256) -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    x = torch.randn(samples, 12)
    return list(zip(x.split(64), torch.randint(5, (samples,)).split(64), strict=True))


def net(activation: nn.Module, width: int = 64) -> nn.Sequential:
    """Its first layer belongs to no symmetry: a tanh follows the activation."""
    torch.manual_seed(0)
    layers = nn.Linear(12, width), activation, nn.Tanh(), nn.Linear(width, 16), nn.Tanh(), nn.Linear(16, 5)
    return nn.Sequential(*layers)


def diagnosed(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> nf.Diagnosis:
    optimizer = optimizer or torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    return nf.diagnose(model, nn.CrossEntropyLoss(), cases(), optimizer, curvature=False)


def planted(activation: nn.Module, dead: int, bias: float) -> nn.Sequential:
    model = net(activation)
    with torch.no_grad():
        model[0].bias[:dead] += bias
    return model


@pytest.mark.parametrize(("dead", "severity"), [(0, "good"), (3, "good"), (40, "act")])
def test_dead_relu_units_outside_of_every_symmetry(dead: int, severity: str) -> None:
    model = planted(nn.ReLU(), dead, -100.0)
    assert not any("0.weight" in s.parameters for s in nf.find_symmetries(model, torch.randn(2, 12)))
    found = diagnosed(model)["dead-units"]
    assert found.severity == severity
    if dead == 40:
        assert found.title.startswith("40 of 64 units of `0` are dead (0, 1, 2,")
        assert "40 units of `0`" in found.advice
    else:
        assert "in the 2 layers looked at" in found.title, "`0` with both of its activations, and `3`"


@pytest.mark.parametrize(
    ("activation", "bias", "how"),
    [
        (nn.Tanh(), 20.0, "saturated in tanh"),
        (nn.Tanh(), -20.0, "saturated in tanh"),
        (nn.Sigmoid(), 30.0, "saturated in sigmoid"),
        (nn.GELU(), -30.0, "dead"),
        (nn.SiLU(), -60.0, "dead"),
        (nn.Hardtanh(-0.5, 0.5), 20.0, "saturated in hardtanh"),
    ],
)
def test_saturated_units(activation: nn.Module, bias: float, how: str) -> None:
    """All of a layer, which no comparison with the median of the layer shows; and the same without the bias."""
    found = diagnosed(planted(activation, 64, bias))["dead-units"]
    assert found.severity == "act"
    assert f"64 of 64 units of `0` are {how}" in found.title
    assert diagnosed(planted(activation, 0, bias))["dead-units"].severity == "good"


def test_frozen_layers_count() -> None:
    model = nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 5))
    with torch.no_grad():
        model[0].bias[:20] -= 100
    model[0].requires_grad_(False)
    found = diagnosed(model)["dead-units"]
    assert found.severity == "act"
    assert "20 of 24 units of `0`, whose weights are frozen, are dead" in found.title
    assert found.advice.startswith("prune these 20 units of `0`")


def test_a_layer_is_counted_once() -> None:
    """Layers that symmetries tell of are told by these, those with a gate beside it by their own activation."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 5))
    assert diagnosed(model)["dead-units"].title == "No unit is dead in the 2 layers looked at."


def test_channels_of_convolutions_with_batch_statistics() -> None:
    """Measured by minibatches; a tanh after BatchNorm."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.Tanh(), nn.Flatten(), nn.Linear(32, 5))
    with torch.no_grad():
        model[1].bias[[2, 5]] = 30.0
    x = torch.randn(128, 1, 4, 4)
    data = list(zip(x.split(32), torch.randint(5, (128,)).split(32), strict=True))
    statistics = model[1].running_mean.clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    found = nf.diagnose(model, nn.CrossEntropyLoss(), data, optimizer, curvature=False)["dead-units"]
    assert "2 of 8 units of `1` are saturated in tanh (2, 5)" in found.title
    assert torch.equal(statistics, model[1].running_mean)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("name", [n for n in PASSES if n != "hardtanh"])
def test_no_activation_has_a_slope_above_two_thousandths_where_it_counts_as_silent(name: str) -> None:
    """And one above that next to the ends, where it is not flat beyond them: up to a factor of 2 in the input."""
    low, high = PASSES[name]
    slope = lambda x: torch.autograd.functional.jacobian(getattr(F, name), torch.tensor(x, dtype=torch.float64)).abs()
    for end, outwards in ((low, -1.0), (high, 1.0)):
        if math.isfinite(end):
            assert max(float(slope(end + outwards * d)) for d in (1e-6, 0.1, 1.0, 5.0)) <= 2.1e-3
            assert float(slope(0.45 * end - outwards * 0.1 * (end == 0))) > 2.1e-3


class Softmaxed(nn.Module):
    """Attention written out, with a causal mask, and grouped keys."""

    def __init__(self, fused: bool, scale: float = 1.0) -> None:
        super().__init__()
        self.embed, self.fused, self.scale = nn.Embedding(11, 16), fused, scale
        self.q, self.k, self.v = (nn.Linear(16, width, bias=False) for width in (16, 8, 8))
        self.o, self.out = nn.Linear(16, 16, bias=False), nn.Linear(16, 11)

    def heads(self, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = self.embed(ids)
        q, k, v = (t.unflatten(-1, (-1, 4)).transpose(1, 2) for t in (self.scale * self.q(x), self.k(x), self.v(x)))
        return q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)

    def forward(self, ids: Tensor) -> Tensor:
        q, k, v = self.heads(ids)
        if self.fused:
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            mask = torch.ones(ids.shape[1], ids.shape[1]).tril() == 0
            mixed = (q @ k.mT / 2).masked_fill(mask, torch.finfo(q.dtype).min).softmax(-1) @ v
        return self.out(self.o(mixed.transpose(1, 2).flatten(2)))[:, -1]


@torch.no_grad()
def spread_by_loop(model: Softmaxed, ids: Tensor) -> list[float]:
    """Standard deviation over the keys that a query may look at, query by query, root mean square over these."""
    q, k, _ = model.heads(ids)
    found = []
    for head in range(4):
        squares = []
        for b in range(len(ids)):
            for i in range(1, ids.shape[1]):
                logits = [float(q[b, head, i] @ k[b, head, j]) / 2 for j in range(i + 1)]
                mean = sum(logits) / len(logits)
                squares.append(sum((v - mean) ** 2 for v in logits) / len(logits))
        found.append(math.sqrt(sum(squares) / len(squares)))
    return found


@pytest.mark.parametrize("fused", [True, False])
def test_the_spread_of_logits_is_that_of_a_loop(fused: bool) -> None:
    torch.manual_seed(0)
    model, ids = Softmaxed(fused).double(), torch.randint(11, (8, 6))
    with torch.no_grad(), looking_at(model) as seen:
        model(ids)
    (logits,) = seen.found.logits
    assert logits.module == ""
    assert logits.spread.tolist() == pytest.approx(spread_by_loop(model, ids), rel=1e-9)


@pytest.mark.parametrize("fused", [True, False])
def test_logits_are_told_as_they_are(fused: bool) -> None:
    """In one good line, and as nearly a hard choice where they are a hundred times as large."""
    torch.manual_seed(0)
    model = Softmaxed(fused, 1.0)
    ids, labels = torch.randint(11, (128, 6)), torch.randint(11, (128,))
    data = list(zip(ids.split(32), labels.split(32), strict=True))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    ask = lambda: nf.diagnose(model, nn.CrossEntropyLoss(), data, optimizer, steps=1000, curvature=False)
    small = ask()["logit-growth"]
    assert small.severity == "good"
    assert not small.is_note
    assert small.title.startswith("Attention logits spread by ")
    model.scale = 100.0
    large = ask()["logit-growth"]
    assert large.is_note
    assert "nearly a hard choice" in large.title
    most = max(spread_by_loop(model, ids[:8]))
    assert large.evidence[0].value == pytest.approx(most, rel=0.5)


def test_moments_are_the_same_while_somebody_looks() -> None:
    model, loss = net(nn.Tanh()), lambda m, b: F.cross_entropy(m(b[0]), b[1], reduction="none")
    syms = nf.find_symmetries(model, torch.randn(2, 12))
    alone = nf.gradient_moments(model, loss, cases(), syms, entries=True)
    with looking_at(model):
        watched = nf.gradient_moments(model, loss, cases(), syms, entries=True)
    for name, mean in alone.mean.items():
        assert torch.equal(mean, watched.mean[name])
        assert torch.equal(alone.squares[name], watched.squares[name])


def test_nested_tensors_are_passed_by() -> None:
    """Sequences of unequal length have no axis of keys to look at."""
    parts = torch.nested.nested_tensor([torch.randn(n, 4) for n in (2, 3)], layout=torch.jagged)
    model = nn.Linear(4, 4)
    with torch.no_grad(), looking_at(model) as seen:
        torch.relu(parts)
    assert seen.found.units == ()


@pytest.mark.parametrize(
    "pool",
    [
        nn.MaxPool2d(2),
        nn.MaxPool2d(2, return_indices=False, ceil_mode=True),
        nn.AdaptiveMaxPool2d(2),
        nn.AvgPool2d(2),
        nn.LPPool2d(2, 2),
        nn.FractionalMaxPool2d(2, output_size=2),
        nn.Upsample(scale_factor=2),
        nn.Dropout2d(0.0),
    ],
    ids=lambda pool: type(pool).__name__,
)
def test_a_model_with_pooling_is_looked_at_and_answered(pool: nn.Module) -> None:
    """Functions of pooling dispatch to one another by name; their outputs are those without a look."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), pool, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 3))
    x = torch.randn(128, 1, 8, 8)
    torch.manual_seed(1)
    expected = model(x)
    torch.manual_seed(1)
    with looking_at(model) as seen:
        found = model(x)
    assert torch.equal(found, expected)
    assert [(u.layer, u.activation) for u in seen.found.units] == [("0", "relu")]


def test_the_diagnosis_of_a_network_with_pooling_answers_its_five_questions() -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 3)]
    model, x, y = nn.Sequential(*layers), torch.randn(512, 1, 8, 8), torch.randint(3, (512,))
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=32, shuffle=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    found = nf.diagnose(model, nn.CrossEntropyLoss(), loader, optimizer, steps=100, curvature=False)
    assert all(found.about(topic) for topic in ("norms", "warmup", "balance", "decay", "batch"))
