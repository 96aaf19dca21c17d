"""Formulas and rules whose small faults other tests would not show, each against a calculation of another kind."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import noetherflow as nf
from noetherflow.equilibrium.orbit import measured_orbit
from noetherflow.equilibrium.potential import Drift, Potential
from noetherflow.symmetry.symmetry import Symmetry

F64 = torch.float64


def squares(model: nn.Module, x: Tensor) -> Tensor:
    """A loss per sample, `[batch]`."""
    return (model(x) - x.sum(-1, keepdim=True)).square().flatten(1).sum(1)


def per_sample_gradients(model: nn.Module, loss: Callable[[nn.Module, Tensor], Tensor], x: Tensor) -> dict[str, Tensor]:
    """One backward per sample, `[samples, *shape]` by name; zeros where no gradient arrives."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    losses = loss(model, x)
    rows = [torch.autograd.grad(one, parameters, retain_graph=True, materialize_grads=True) for one in losses]
    return {name: torch.stack(column) for name, column in zip(names, zip(*rows, strict=True), strict=True)}


class Between(nn.Module):
    """Two linear maps with something between them."""

    def __init__(self, middle: Callable[[Tensor], Tensor], width: int = 4) -> None:
        super().__init__()
        self.first, self.last, self.middle = nn.Linear(3, width), nn.Linear(width, 2), middle

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.middle(self.first(x)))


def between(middle: Callable[[Tensor], Tensor], seed: int = 0) -> Between:
    torch.manual_seed(seed)
    return Between(middle).double()


# The finder


@pytest.mark.parametrize(("statistic", "power"), [(torch.var, 3.0), (torch.std, 2.0)])
def test_a_variance_scales_with_the_square_and_a_deviation_with_the_scale(statistic, power: float) -> None:
    model, x = between(lambda h: torch.relu(h) * statistic(h, dim=-1, keepdim=True)), torch.randn(5, 3, dtype=F64)
    syms = nf.find_symmetries(model, x)
    (scale,) = [s for s in syms if s.kind == "scalar" or s.blocks == 1]
    assert {leg.parameter: leg.power for leg in scale.legs}["last.weight"] == power
    assert [row.verdict for row in nf.certify(model, syms, x)] == ["exact"] * len(syms)


@pytest.mark.parametrize("pooled", [lambda h: h.amax(1), lambda h: h.amin(1), lambda h: h.max(1).values])
def test_a_maximum_lets_scales_pass_but_no_mixing(pooled) -> None:
    model, x = between(pooled), torch.randn(5, 6, 3, dtype=F64)
    (symmetry,) = nf.find_symmetries(model, x)
    assert (symmetry.kind, symmetry.blocks) == ("diagonal", 4)
    assert [row.verdict for row in nf.certify(model, nf.find_symmetries(model, x), x)] == ["exact"]


@pytest.mark.parametrize(
    ("middle", "coordinates"),
    [
        (lambda h: h.clamp(0, 1), 0),
        (lambda h: h.clamp(-1, 0), 0),
        (lambda h: h.clamp(0), 4),
        (lambda h: h.clamp(max=0), 4),
        (lambda h: F.threshold(h, 0.0, 0.0), 4),
        (lambda h: F.threshold(h, 0.0, 0.5), 0),
        (lambda h: F.threshold(h, 0.5, 0.0), 0),
        (lambda h: F.threshold(h, -1.0, -1.0), 0),
    ],
)
def test_bounds_other_than_zero_pass_no_scale(middle, coordinates: int) -> None:
    model, x = between(middle), torch.randn(16, 3, dtype=F64)
    syms = nf.find_symmetries(model, x)
    assert sum(s.blocks for s in syms) == coordinates
    assert all(row.verdict == "exact" for row in nf.certify(model, syms, x))


def test_the_eps_of_a_norm_is_what_makes_its_scale_approximate() -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 3, dtype=F64)
    for eps in (1e-3, 0.0):
        model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4, eps=eps), nn.Linear(4, 2)).double()
        (scale,) = [s for s in nf.find_symmetries(model, x) if s.family == "one-sided"]
        assert scale.eps == (eps or None)
        (row,) = [r for r in nf.certify(model, nf.find_symmetries(model, x), x) if r.name == scale.name]
        assert row.verdict == ("approximate" if eps else "exact")


# Moments


class Looked(nn.Module):
    """`F.embedding` with a padding row counted from the end."""

    def __init__(self, padding: int | None) -> None:
        super().__init__()
        self.table, self.out, self.padding = nn.Parameter(torch.randn(5, 3)), nn.Linear(3, 2), padding

    def forward(self, index: Tensor) -> Tensor:
        return self.out(F.embedding(index, self.table, padding_idx=self.padding)).sum(1)


@pytest.mark.parametrize("padding", [None, 2, -1, -3])
def test_moments_of_an_embedding_leave_out_its_padding_row(padding: int | None) -> None:
    torch.manual_seed(0)
    model = Looked(padding).double()
    index = torch.tensor([[0, 4, 2, 4], [1, 2, 3, 0], [4, 4, 4, 2]])
    loss = lambda m, b: m(b).square().sum(1)
    moments = nf.gradient_moments(model, loss, [index], nf.SymmetrySet(()), entries=True, parameters=["table"])
    assert moments.fallback == ()
    expected = per_sample_gradients(model, loss, index)["table"].square().mean(0)
    torch.testing.assert_close(moments.squares["table"], expected, rtol=1e-12, atol=1e-15)
    assert padding is None or not expected[padding].any()


@pytest.mark.parametrize(
    "norm",
    [
        lambda: nn.BatchNorm1d(3, eps=0.5).eval(),
        lambda: nn.LayerNorm(3, eps=0.5),
        lambda: nn.GroupNorm(1, 3, eps=0.5),
        lambda: nn.RMSNorm(3, eps=0.5),
    ],
)
def test_moments_of_a_gain_know_the_eps_of_the_norm(norm) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(norm(), nn.Linear(3, 2)).double()
    for statistic in ("running_mean", "running_var"):
        if hasattr(model[0], statistic):
            getattr(model[0], statistic).uniform_(0.2, 1.5)
    x = torch.randn(7, 3, dtype=F64)
    moments = nf.gradient_moments(model, squares, [x], nf.SymmetrySet(()), entries=True, parameters=["0.weight"])
    assert moments.fallback == ()
    expected = per_sample_gradients(model, squares, x)["0.weight"].square().mean(0)
    torch.testing.assert_close(moments.squares["0.weight"], expected, rtol=1e-10, atol=0)


# Flow and equilibrium


def quadratic() -> tuple[Between, Tensor, nf.SymmetrySet]:
    """A squared ReLU between two layers: what goes in scales with p, what goes out with p^-2."""
    model = between(lambda h: torch.relu(h).square(), seed=1)
    x = torch.randn(64, 3, dtype=F64, generator=torch.Generator().manual_seed(2))
    syms = nf.find_symmetries(model, x[:2])
    assert {leg.power for s in syms for leg in s.legs} == {1.0, 2.0}
    return model, x, syms


@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_a_step_is_split_without_rest_whatever_the_gradient(decay: float) -> None:
    """Random tensors in place of gradients: the gradient's part is not zero then, and still nothing is left over."""
    model, _, syms = quadratic()
    rng = torch.Generator().manual_seed(3)
    before = {n: p.detach() for n, p in model.named_parameters()}
    gradients = {n: torch.randn(p.shape, dtype=F64, generator=rng) for n, p in before.items()}
    sgd = nf.SGDConfig(0.2, 1, weight_decay=decay)
    after = {n: p - sgd.lr * (gradients[n] + decay * p) for n, p in before.items()}
    for s in syms:
        step = nf.step_identity(s, before, gradients, after, sgd)
        assert step.gradient.abs().max() > 0.1
        torch.testing.assert_close(step.gradient + step.decay + step.noise, step.measured, rtol=1e-12, atol=1e-12)


def drift_and_charge(model: nn.Module, s: Symmetry, coordinate: int, x: Tensor, sgd: nf.SGDConfig) -> Tensor:
    """`E[C' - C]` and `C` of one coordinate, from explicit gradients of all samples: minibatches of fresh data."""
    g = per_sample_gradients(model, squares, x)
    n = len(x)
    noise = torch.zeros((), dtype=F64)
    charge = torch.zeros((), dtype=F64)
    parameters = dict(model.named_parameters())
    for leg in s.weight_legs:
        rows = lambda t, leg=leg: leg.row_sums(t)[coordinate]
        mean = g[leg.parameter].mean(0)
        covariance = (g[leg.parameter].square().sum(0) - n * mean.square()) / (n - 1)
        true_mean = mean.square() - covariance / n
        noise = noise + leg.exponent * rows(covariance / sgd.batch_size + true_mean)
        charge = charge + leg.exponent * rows(parameters[leg.parameter].detach().square())
    eta, w = sgd.lr, sgd.weight_decay
    return torch.stack([-eta * w * (2 - eta * w) * charge + eta**2 * noise, charge])


@pytest.mark.parametrize("decay", [0.0, 0.05])
def test_relaxation_time_is_that_of_the_drift_along_the_orbit(decay: float) -> None:
    """`1 / (d drift / d charge)` at the equilibrium, by moving the model a little along the orbit to either side."""
    model, x, syms = quadratic()
    (s,) = syms
    sgd = nf.SGDConfig(0.1, 4, weight_decay=decay)
    measure = lambda m: nf.gradient_moments(m, squares, [x], syms, entries=True)
    nf.balance_(model, nf.noise_equilibrium(model, syms, measure(model), sgd), example_inputs=x)
    (row,) = nf.noether_flow(model, syms, measure(model), sgd).details
    assert row.imbalance[row.finite].max() < 1e-6
    for coordinate in torch.nonzero(row.finite).flatten().tolist():
        sides = []
        for step in (-1e-4, 1e-4):
            element = s.identity()
            element[coordinate] = torch.tensor(step, dtype=F64).exp()
            moved = copy.deepcopy(model)
            s.act_(nf.tensors_of(moved), element)
            sides.append(drift_and_charge(moved, s, coordinate, x, sgd))
        drift, charge = sides[1] - sides[0]
        assert float(row.relaxation_steps[coordinate]) == pytest.approx(float(-charge / drift), rel=1e-4)


def test_slopes_of_charges_are_those_of_charges_moved_a_little() -> None:
    """Two symmetries with exponents 1 and 2 on one weight: the change of every charge under generators of both."""
    torch.manual_seed(4)
    model = nn.Sequential(nn.Linear(3, 4), Squared(), nn.Linear(4, 5), Squared(), nn.Linear(5, 2)).double()
    x = torch.randn(16, 3, dtype=F64)
    syms = nf.find_symmetries(model, x)
    moments = nf.gradient_moments(model, squares, [x], syms, entries=True)
    orbit = measured_orbit(model, list(syms), moments, Potential(0.0, 1.0, 0.0))
    assert {type(term).__name__ for term in orbit.terms} == {"EntryTerm", "LegTerm"}
    rng = torch.Generator().manual_seed(5)
    elements = [s.random_element(0.2, rng) for s in syms]
    generators = [torch.randn(s.shape, dtype=F64, generator=rng) for s in syms]
    slopes = [torch.zeros(s.shape, dtype=F64) for s in syms]
    for term in orbit.terms:
        term.slope(elements, generators, slopes)

    def charges(h: float) -> list[Tensor]:
        moved = copy.deepcopy(model)
        for s, element, a in zip(syms, elements, generators, strict=True):
            s.act_(nf.tensors_of(moved), element * (h * a).exp())
        return [s.charge(nf.tensors_of(moved)).detach() for s in syms]

    for slope, up, down in zip(slopes, charges(1e-5), charges(-1e-5), strict=True):
        torch.testing.assert_close(slope, (up - down) / 2e-5, rtol=1e-6, atol=1e-7)


class Squared(nn.Module):
    """`relu(x)^2`."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x).square()


@pytest.mark.parametrize("dense", [False, True])
def test_trace_of_the_noise_from_samples_is_the_mean_over_samples(dense: bool) -> None:
    """Three linear maps in a row: GL legs meet on the middle one, so that gradients of all samples are needed."""
    torch.manual_seed(6)
    model = nn.Sequential(*(nn.Linear(a, b, bias=False) for a, b in ((3, 4), (4, 4), (4, 2)))).double()
    x = torch.randn(12, 3, dtype=F64)
    syms = nf.find_symmetries(model, x)
    loss = lambda m, b: m(b).square().sum(1)
    moments = nf.gradient_moments(model, loss, [x], syms, entries=True)
    samples = nf.gradient_factors(model, loss, [x], syms)
    given = {n: f.dense() for n, f in samples.items()} if dense else samples
    orbit = measured_orbit(model, list(syms), moments, Potential(0.0, 1.0, 0.0), given)
    rng = torch.Generator().manual_seed(7)
    elements = [s.random_element(0.3, rng) for s in syms]
    moved = copy.deepcopy(model)
    for s, element in zip(syms, elements, strict=True):
        s.act_(nf.tensors_of(moved), element)
    expected = sum(float(g.square().sum()) for g in per_sample_gradients(moved, loss, x).values()) / len(x)
    assert orbit.at(elements).trace == pytest.approx(expected, rel=1e-10)


def test_coefficients_of_the_drift_by_hand() -> None:
    """`(1 - lr w)^2` of the squares is kept; buffers of heavy ball hold noise `lr^2 / (1 - m)^2` for ever."""
    plain = Drift.of(nf.SGDConfig(0.1, 4, weight_decay=0.5))
    assert plain.decay == pytest.approx(1 - (1 - 0.1 * 0.5) ** 2, rel=1e-12)
    assert plain.noise == plain.mean == pytest.approx(0.01)
    heavy = Drift.of(nf.SGDConfig(0.1, 4, momentum=0.5))
    steps = 400
    impulse = [sum(0.5**k for k in range(steps - t)) for t in range(steps)]
    assert heavy.noise == pytest.approx(0.01 * impulse[0] ** 2, rel=1e-6)


# The ledger


@pytest.mark.filterwarnings("ignore:.*lr_scheduler.*")
def test_estimates_under_a_gradient_scaler_are_of_unscaled_gradients() -> None:
    """A fused optimiser gets scaled gradients and divides by the scale itself."""

    def drives(scale: float | None) -> list[float]:
        torch.manual_seed(8)
        model = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 2))
        x = torch.randn(8, 3)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, fused=True)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
        found = []
        with nf.Ledger(model, optimizer, nf.find_symmetries(model, x), estimate_every=1) as ledger:
            for _ in range(3):
                optimizer.zero_grad()
                scaler.scale(model(x).square().mean()).backward()
                scaler.step(optimizer)
                scaler.update()
                found += [row["drive"] for row in ledger.estimates()]
        assert all(abs(row["residual"]) < 1e-5 * row["norm"] for row in ledger.records())
        return found

    scaled, plain = drives(1024.0), drives(None)
    assert any(abs(v) > 1e-6 for v in plain)
    assert scaled == pytest.approx(plain, rel=1e-4)


# Where the finder, the certificate and the rules must not take too much


class RowShifted(nn.Module):
    """A layer norm over two axes, behind a linear map whose bias adds one number to every row."""

    def __init__(self) -> None:
        super().__init__()
        self.rows, self.norm, self.out = nn.Linear(3, 4), nn.LayerNorm((4, 5)), nn.Linear(20, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.norm(self.rows(x).mT).flatten(1))


def test_a_norm_over_two_axes_ignores_their_common_mean_only() -> None:
    """Adding one number to all four rows does nothing, adding it to one row does."""
    torch.manual_seed(0)
    model, x = RowShifted().double(), torch.randn(3, 5, 3, dtype=F64)
    with torch.no_grad():
        before = model(x)
        model.rows.bias += 1.0
        assert (model(x) - before).abs().max() < 1e-10
        model.rows.bias[0] += 1.0
        assert (model(x) - before).abs().max() > 1e-2
    syms = nf.find_symmetries(model, x)
    (shift,) = [t for t in syms.translations if t.parameters == ("rows.bias",)]
    assert (shift.leg.blocks, shift.leg.dim) == (1, 4)
    assert all(row.verdict in ("exact", "approximate") for row in nf.certify(model, syms, x))


class Rescaled(nn.Module):
    """All gradients multiplied by the norm of the first layer, which the symmetry changes; the outputs as they are."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))

    def forward(self, x: Tensor) -> Tensor:
        y, factor = self.net(x), self.net[0].weight.norm().detach()
        return factor * y - ((factor - 1) * y).detach()


def test_gradients_that_are_not_those_of_the_moved_point_are_noticed() -> None:
    """They still satisfy `theta^T A g = 0`, so only the comparison at the moved point shows it."""
    torch.manual_seed(0)
    model, x = Rescaled().double(), torch.randn(6, 3, dtype=F64)
    incoming, outgoing = [("net.0.weight", 0), ("net.0.bias", 0)], [("net.2.weight", 1)]
    torch.testing.assert_close(model(x), model.net(x))
    syms = nf.declare(model, "diagonal", plus=incoming, minus=outgoing)
    assert [row.verdict for row in nf.certify(model, syms, x)] == ["broken"]
    own = nf.declare(model.net, "diagonal", plus=[("0.weight", 0), ("0.bias", 0)], minus=[("2.weight", 1)])
    assert [row.verdict for row in nf.certify(model.net, own, x)] == ["exact"]


class Stopped(nn.Module):
    """Half of the output passes no gradient to the first layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 4, bias=False), nn.Linear(4, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.first(x))
        return self.last(h) + self.last(h.detach())


def test_an_example_of_zeros_does_not_hide_an_altered_backward() -> None:
    """At zero inputs all gradients vanish, so that `theta^T A g = 0` says nothing there."""
    torch.manual_seed(0)
    model = Stopped().double()
    syms = nf.declare(model, "diagonal", plus=[("first.weight", 0)], minus=[("last.weight", 1)])
    for x in (torch.zeros(6, 3, dtype=F64), torch.randn(6, 3, dtype=F64)):
        assert [row.verdict for row in nf.certify(model, syms, x)] == ["broken"]


class Weighed(nn.Module):
    """`beta b + alpha x W`, with numbers that the rule of `addmm` does not cover."""

    def __init__(self, beta: float, alpha: float) -> None:
        super().__init__()
        self.b, self.w = nn.Parameter(torch.randn(2)), nn.Parameter(torch.randn(3, 2))
        self.beta, self.alpha = beta, alpha

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.b, x, self.w, beta=self.beta, alpha=self.alpha)


class EvenKernel(nn.Module):
    """A convolution padded to the same length, one more on the right than on the left."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(2, 3, 4))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv1d(x, self.w, padding="same")


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (lambda: Weighed(1.0, 1.0), (5, 3)),
        (lambda: Weighed(0.5, 1.0), (5, 3)),
        (lambda: Weighed(1.0, 2.0), (5, 3)),
        (EvenKernel, (5, 3, 7)),
    ],
)
def test_what_a_rule_does_not_cover_is_measured_all_the_same(model, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    net, x = model().double(), torch.randn(shape, dtype=F64)
    loss = lambda m, b: m(b).square().flatten(1).sum(1)
    names = [n for n, _ in net.named_parameters()]
    moments = nf.gradient_moments(net, loss, [x], nf.SymmetrySet(()), entries=True, parameters=names)
    for name, g in per_sample_gradients(net, loss, x).items():
        torch.testing.assert_close(moments.squares[name], g.square().mean(0), rtol=1e-10, atol=1e-14)
