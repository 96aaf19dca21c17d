"""How a certificate runs the model: random draws, memory, casts, modes; and what it refuses to run."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from noetherflow import SymmetrySet, certify, count_symmetries, declare, find_symmetries
from noetherflow.core.copies import copy_of
from noetherflow.discovery.outputs import plain_output
from noetherflow.discovery.repeat import ModelState, same_draws
from noetherflow.discovery.wide import WideFloats
from noetherflow.errors import DataError, ExportError, NoetherflowError

X = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
UNITS = ([("a.weight", 0), ("a.bias", 0)], [("b.weight", 1)])


class Units(nn.Module):
    """Six ReLU units; `between` is applied to them."""

    def __init__(self, between: Callable[[nn.Module, Tensor], Tensor] = lambda module, h: h) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)
        self.between = between
        self.steps = 0

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.between(self, self.a(x).relu()))


def count_calls(module: nn.Module, h: Tensor) -> Tensor:
    module.steps += 1  # type: ignore[operator]
    return h * (1 + module.steps)  # type: ignore[operator]


DRAWS: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "torch": lambda module, h: h * torch.rand_like(h),
    "dropout in evaluation": lambda module, h: nn.functional.dropout(h, 0.5, training=True),
    "numpy": lambda module, h: h * (1 + np.random.rand()),  # noqa: NPY002
    "python": lambda module, h: h * (1 + random.random()),
    "counter": count_calls,
}


@pytest.mark.parametrize("name", DRAWS)
def test_a_forward_that_is_never_the_same_is_compared_with_equal_draws(name: str) -> None:
    model = Units(DRAWS[name])
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # noqa: NPY002
    certificate = certify(model, declare(model, "diagonal", *UNITS), X)
    assert [row.verdict for row in certificate] == ["exact"]
    assert ("draws random numbers" in str(certificate)) == (name != "counter")
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1:] == (np.random.get_state()[1].tolist(), random.getstate())  # noqa: NPY002
    wrong = declare(model, "diagonal", UNITS[0])
    assert certify(model, wrong, X).broken == (wrong.symmetries[0].name,)


def test_a_generator_of_the_models_own_starts_again_at_each_call() -> None:
    def draw(module: nn.Module, h: Tensor) -> Tensor:
        return h * torch.rand(h.shape, generator=module.rng, dtype=h.dtype)  # type: ignore[arg-type]

    model = Units(draw)
    model.rng = torch.Generator().manual_seed(3)  # type: ignore[assignment]
    assert [row.verdict for row in certify(model, declare(model, "diagonal", *UNITS), X)] == ["exact"]


CALLS = [0]


def test_what_cannot_be_repeated_is_undetermined_and_says_why() -> None:
    def drift(module: nn.Module, h: Tensor) -> Tensor:
        CALLS[0] += 1
        return h * CALLS[0]

    model = Units(drift)
    (row,) = certify(model, declare(model, "diagonal", *UNITS), X)
    assert row.verdict == "undetermined"
    assert "two calls with the same weights" in row.note


def test_the_state_of_a_model_is_put_back() -> None:
    model = nn.BatchNorm1d(2)
    model.seen = None  # type: ignore[assignment]
    state = ModelState.of(model)
    model.train()(torch.randn(5, 2))
    model.seen, model.fresh = torch.ones(1), 3  # type: ignore[assignment]
    model.eval()
    state.restore()
    assert model.running_mean is not None
    assert model.running_mean.tolist() == [0, 0]
    assert (model.seen, hasattr(model, "fresh"), model.training) == (None, False, True)


def test_draws_are_equal_inside_and_go_on_outside() -> None:
    torch.manual_seed(5)
    expected = torch.rand(2)
    torch.manual_seed(5)
    with same_draws(1):
        first = torch.rand(1), np.random.rand(), random.random()  # noqa: NPY002
    assert torch.equal(torch.rand(2), expected)
    with same_draws(1):
        assert (torch.rand(1), np.random.rand(), random.random()) == first  # noqa: NPY002
    with same_draws(2):
        assert torch.rand(1) != first[0]


CASTS: dict[str, Callable[[Tensor], Tensor]] = {
    "float": lambda h: h.float(),
    "to half": lambda h: h.to(torch.float16),
    "sum": lambda h: h / (1 + h.sum(-1, keepdim=True, dtype=torch.float32)) * 3,
    "softmax": lambda h: h * torch.softmax(torch.ones_like(h), -1, dtype=torch.float32),
    "mask": lambda h: h.float() @ (torch.eye(6) > 0).float(),
}


@pytest.mark.parametrize("name", CASTS)
def test_casts_are_widened_so_that_exact_means_exact(name: str) -> None:
    """Each of them rounds to 1e-8 or more by itself, while the scale of the last layer is a symmetry of the formula."""
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), Apply(CASTS[name]), Back(), nn.Linear(6, 5), nn.Linear(5, 2))
    syms = declare(model, "general_linear", [("4.weight", 0), ("4.bias", 0)], [("5.weight", 1)])
    (row,) = certify(model, syms, X)
    assert row.verdict == "exact"
    assert row.outputs < 1e-13
    assert row.gradients < 1e-12
    wide = model.double()
    h = torch.rand(3, 6, dtype=torch.float64) / 3
    with WideFloats() as mode:
        kept = CASTS[name](h)
    assert (kept.dtype, mode.widened > 0) == (torch.float64, True)
    assert wide[2](h).dtype in (torch.float32, torch.float16, torch.float64)


class Apply(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Back(nn.Module):
    """Into the precision of the weights again, as transformers do after a norm."""

    def forward(self, x: Tensor) -> Tensor:
        return x.double()


def test_a_scale_through_a_cast_is_exact_and_a_false_one_is_not() -> None:
    class Norm(nn.Module):
        def forward(self, h: Tensor) -> Tensor:
            wide = h.float()
            return (wide / wide.square().mean(-1, keepdim=True).sqrt()).to(h.dtype)

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), Norm(), nn.Linear(6, 3))
    scale = declare(model, "scalar", [("0.weight", 0), ("0.bias", 0)])
    (row,) = certify(model, scale, X)
    assert (row.verdict, row.outputs < 1e-14) == ("exact", True)
    false = declare(model, "diagonal", [("0.weight", 0), ("0.bias", 0)])
    assert certify(model, false, X).broken


def test_the_mode_in_which_a_symmetry_holds_is_said() -> None:
    """Scales in front of a BatchNorm get no gradient with batch statistics; gains behind it in both modes."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))
    syms = find_symmetries(model, X)
    certificate = certify(model, syms, X)
    modes = {s.family: certificate[s.name].mode for s in syms}
    assert modes == {"one-sided": "training", "norm-gain": "any"}
    alone = declare(model, "diagonal", [("0.weight", 0), ("0.bias", 0)])
    (row,) = certify(model, alone, X)
    assert row.verdict == "broken"
    assert "batch statistics" in row.note


def test_a_symmetry_of_evaluation_mode_alone_is_said_to_be_one() -> None:
    """The mean that a LayerNorm removes: dropout in front of the norm keeps only parts of it."""
    torch.manual_seed(0)
    for p, mode in ((0.0, "any"), (0.5, "evaluation")):
        model = nn.Sequential(nn.Linear(4, 6), nn.Dropout(p), nn.LayerNorm(6), nn.Linear(6, 3)).eval()
        syms = find_symmetries(model, X)
        null = [t.name for t in syms.translations]
        assert null
        assert {certify(model, syms, X)[name].mode for name in null} == {mode}


def test_batch_statistics_do_not_take_an_eps_of_zero() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.InstanceNorm1d(6), nn.ReLU(), nn.Flatten(), nn.LazyLinear(3))
    x = torch.randn(5, 7, 4)
    for net, inputs in (
        (nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6, track_running_stats=False), nn.Linear(6, 3)), X),
        (nn.Sequential(nn.Conv1d(7, 6, 1), *model[1:]), x),
    ):
        net(inputs)
        certificate = certify(net, find_symmetries(net, inputs), inputs)
        assert certificate.rows
        assert certificate.broken == ()


@dataclass
class Named:
    """An output class that torch.export does not know."""

    logits: Tensor
    extra: tuple[Tensor, ...] = ()


class Opaque:
    def __init__(self, logits: Tensor) -> None:
        self.logits = logits


class Returns(Units):
    def __init__(self, kind: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor) -> object:  # type: ignore[override]
        return self.kind(super().forward(x))


def test_a_dataclass_is_read_by_every_verb() -> None:
    model = Returns(lambda y: Named(y, (2 * y,)))
    syms = find_symmetries(model, X)
    assert [s.blocks for s in syms] == [6]
    assert [row.verdict for row in certify(model, syms, X)] == ["exact"]
    assert count_symmetries(model, X).symmetries == 6


def test_a_class_that_hides_tensors_is_refused_by_name() -> None:
    model = Returns(Opaque)
    declared = declare(model, "diagonal", *UNITS)
    for verb in (
        lambda: find_symmetries(model, X),
        lambda: certify(model, declared, X),
        lambda: count_symmetries(model, X),
    ):
        with pytest.raises(NoetherflowError, match=r"returns a Opaque.*(.|\n)*register_dataclass"):
            verb()
    assert plain_output({"logits": X, "cache": None, "past_key_values": Opaque(X)}) == {"logits": X, "cache": None}


def _keep(module: nn.Module, h: Tensor) -> Tensor:
    module.features = h  # type: ignore[assignment]
    return h


def _collect(module: nn.Module, h: Tensor) -> Tensor:
    module.__dict__.setdefault("maps", []).append(h)
    return h


@pytest.mark.parametrize("keep", [_keep, _collect])
def test_a_feature_map_left_in_the_model_does_no_harm(keep: Callable[[nn.Module, Tensor], Tensor]) -> None:
    model = Units(keep)
    model(X).sum().backward()
    syms = find_symmetries(model, X)
    assert [s.blocks for s in syms] == [6]
    assert [row.verdict for row in certify(model, syms, X)] == ["exact"]
    kept = model.features if keep is _keep else model.maps[0]  # type: ignore[union-attr, index]
    assert kept.requires_grad
    copied = copy_of(model)
    assert not (copied.features if keep is _keep else copied.maps[0]).requires_grad  # type: ignore[union-attr, index]


def _filled(value: float) -> nn.Module:
    model = Units().double()
    with torch.no_grad():
        model.a.weight[0, 0] = value
    return model


def _meta() -> nn.Module:
    with torch.device("meta"):
        return Units()


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "meta": (_meta, r"a\.weight .*meta device.*to_empty"),
    "NaN": (lambda: _filled(float("nan")), r"'a\.weight' holds NaN"),
    "infinite": (lambda: _filled(float("inf")), r"'a\.weight' has an entry of size inf"),
    "huge": (lambda: _filled(1e40), r"'a\.weight' has an entry of size 1e\+40"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_unusable_weights_are_named(name: str) -> None:
    make, says = REFUSED[name]
    model = make()
    with pytest.raises(DataError, match=says):
        certify(model, find_symmetries(model, X), X)
    with pytest.raises(DataError, match=says):
        count_symmetries(model, X)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_gradients_are_taken_whatever_the_caller_has_switched_off(
    context: Callable[[], AbstractContextManager[None]],
) -> None:
    with context():
        model, x = Units(), X.clone()
        syms = find_symmetries(model, x)
        (row,) = certify(model, syms, x)
        assert (row.verdict, 0 < row.gradients < 1e-12) == ("exact", True)
        assert count_symmetries(model, x).symmetries == 6
    assert [row.verdict for row in certify(model, syms, X)] == ["exact"]


class Checkpointed(Units):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        return self.b(checkpoint(lambda h: self.a(h).relu(), x, use_reentrant=self.reentrant))


def test_checkpointing_of_the_older_kind_is_named() -> None:
    syms = declare(Units(), "diagonal", *UNITS)
    assert [row.verdict for row in certify(Checkpointed(False), syms, X)] == ["exact"]
    for x in (X, X.clone().requires_grad_(True)):
        with pytest.raises(DataError, match="use_reentrant=False"):
            certify(Checkpointed(True), syms, x)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
def test_scripted_modules_are_named() -> None:
    whole = torch.jit.script(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)))
    inside = Units()
    inside.a = torch.jit.script(inside.a)
    for model, where in ((whole, "the model"), (inside, "a")):
        with pytest.raises(ExportError, match=rf"{where} is a torch\.jit module(.|\n)*scripted or traced"):
            find_symmetries(model, X)
        with pytest.raises(DataError, match=rf"{where} is a torch\.jit module"):
            certify(model, SymmetrySet(()), X)


SELECTIONS: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "mask": lambda module, h: h[h.sum(1) > 0].sum(0, keepdim=True),
    "nonzero": lambda module, h: h[torch.nonzero(h[:, 0] > 0).squeeze(1)],
    "unique": lambda module, h: h[torch.unique(h.sum(1) > 0).long()],
}


@pytest.mark.parametrize("name", SELECTIONS)
def test_sizes_that_depend_on_data_are_named(name: str) -> None:
    model = Units(SELECTIONS[name])
    with pytest.raises(ExportError, match=r"size in this model depends on data(.|\n)*nf\.declare"):
        find_symmetries(model, X)


def test_offloaded_models_are_searched_and_not_run() -> None:
    accelerate = pytest.importorskip("accelerate")
    model = Units()
    expected = [s.name for s in find_symmetries(model, X)]
    accelerate.cpu_offload(model, execution_device="cpu")
    syms = find_symmetries(model, X)
    assert [s.name for s in syms] == expected
    with pytest.raises(DataError, match="remove_hook_from_submodules"):
        certify(model, syms, X)


class Branches(nn.Module):
    """Many small ReLU branches side by side, each with a symmetry of its own; counts its calls."""

    def __init__(self, number: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        branch = lambda: nn.Sequential(nn.Linear(4, 2), nn.ReLU(), nn.Linear(2, 1))
        self.branches = nn.ModuleList(branch() for _ in range(number))
        self.branches[7][1] = nn.Tanh()  # type: ignore[index]

    def forward(self, x: Tensor) -> Tensor:
        CALLS[0] += 1
        return sum(branch(x) for branch in self.branches)  # type: ignore[return-value]


def _every_branch(model: Branches) -> SymmetrySet:
    legs = lambda k: ([(f"branches.{k}.0.weight", 0), (f"branches.{k}.0.bias", 0)], [(f"branches.{k}.2.weight", 1)])
    sets = [declare(model, "diagonal", *legs(k), name=str(k)) for k in range(len(model.branches))]
    return SymmetrySet(tuple(s for declared in sets for s in declared), shapes=sets[0].shapes)


def test_many_symmetries_are_applied_together_and_a_wrong_one_is_still_found() -> None:
    """120 branches, one of them with tanh: runs of the model grow with 48 moves, not with 120."""
    few, many = Branches(40), Branches(120)
    runs = []
    for model in (few, many):
        before = CALLS[0]
        certificate = certify(model, _every_branch(model), X)
        runs.append(CALLS[0] - before)
        assert certificate.broken == ("7",)
        assert all(row.outputs < 1e-14 for row in certificate if row.name != "7")
        assert certificate["7"].outputs > 1e-6
    assert runs[1] < 1.6 * runs[0]


def test_a_row_of_padding_gets_no_gradient() -> None:
    """A padding row of zeros is no obstacle; one that is not zero moves with the others and gets no gradient."""

    class Embedded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b = nn.Embedding(7, 4, padding_idx=0), nn.Linear(4, 3)

        def forward(self, ids: Tensor) -> Tensor:
            return self.b(self.a(ids))

    ids, model = torch.tensor([[0, 1, 2], [3, 4, 0]]), Embedded()
    syms = declare(model, "general_linear", [("a.weight", 1)], [("b.weight", 1)])
    assert [row.verdict for row in certify(model, syms, ids)] == ["exact"]
    with torch.no_grad():
        model.a.weight[0] = 1.0
    (row,) = certify(model, syms, ids)
    assert row.verdict == "broken"
    assert "padding_idx" in row.note
    assert [row.verdict for row in certify(model, syms, ids.clamp_min(1))] == ["exact"]


def _casts_itself(module: nn.Module, h: Tensor) -> Tensor:
    module.b.half()  # type: ignore[operator, union-attr]
    module.b.float()  # type: ignore[operator, union-attr]
    return h


def _leaves_torch(module: nn.Module, h: Tensor) -> Tensor:
    return h * float(module.a.weight.detach().numpy().mean())  # type: ignore[operator, union-attr]


def _branches(module: nn.Module, h: Tensor) -> Tensor:
    return h if h.sum() > 0 else -h


def warn_if_padding_and_no_attention_mask(h: Tensor) -> Tensor:
    """A name of transformers: it looks into the inputs for padding when no mask is given."""
    return h if (h[0] > 0).any() else -h


TRACED: dict[str, tuple[Callable[[nn.Module, Tensor], Tensor], str]] = {
    "casts its weights": (_casts_itself, "do that once, outside forward"),
    "numpy": (_leaves_torch, r"keep to torch operators(.|\n)*nf\.declare"),
    "branch": (_branches, r"control flow(.|\n)*nf\.declare"),
    "mask": (lambda module, h: warn_if_padding_and_no_attention_mask(h), "add attention_mask"),
}


@pytest.mark.parametrize("name", TRACED)
def test_a_failed_trace_names_its_cause(name: str) -> None:
    between, remedy = TRACED[name]
    with pytest.raises(ExportError, match=remedy) as caught:
        find_symmetries(Units(between), X)
    assert ("control flow" in str(caught.value)) == (name == "branch")
