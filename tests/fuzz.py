"""Random models of every kind of trouble through the whole library: `make fuzz`, or `python tests/fuzz.py 0 3000`.

Each seed is one model: shared layers, residuals, products, widths of zero and one, weights of sizes from 1e-150 to
1e40, dead units, zero inputs, in float64 or float32. Nothing false, nothing foreign: a symmetry that is reported holds
(by brute force, where the numbers allow it), none that breaks the outputs is certified exact, errors are the library's
own, and no result holds or prints NaN. `faults(seed)` lists what is wrong with a seed, one line each.
"""

from __future__ import annotations

import random
import re
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

import noetherflow as nf
from noetherflow.equilibrium import forecast
from noetherflow.errors import NoetherflowError
from random_graphs import BATCH, RandomGraph

TROUBLES = ("none", "sizes", "extreme", "dead", "zero inputs", "zero weights", "single", "equal rows", "small sizes")
NUMBER = re.compile(r"(?<![a-z])(nan|inf)(?![a-z])", re.IGNORECASE)


class WildGraph(RandomGraph):
    """A random graph whose values may have no or one entry."""

    choices = (0, 1, 1, 2, 3, 4)


@dataclass(frozen=True, eq=False)
class Subject:
    """The model of a seed, its inputs, and the trouble it was given."""

    model: RandomGraph
    x: Tensor
    trouble: str

    @property
    def tame(self) -> bool:
        """Whether weights have usual sizes, so that brute force tells true from false."""
        return self.trouble not in ("extreme", "single", "small sizes")


def subject(seed: int) -> Subject:
    """The model of a seed."""
    rng = random.Random(-1 - seed)
    trouble = rng.choice(TROUBLES)
    model = (WildGraph if rng.random() < 0.5 else RandomGraph)(seed)
    x = torch.randn(BATCH, model.input_width, generator=model.torch_rng, dtype=torch.float64)
    with torch.no_grad():
        for p in model.parameters():
            _trouble(p, trouble, rng)
    if trouble == "zero inputs":
        x = torch.zeros_like(x)
    if trouble == "single":
        model, x = model.float(), x.float()
    return Subject(model, x, trouble)


def _trouble(p: Tensor, trouble: str, rng: random.Random) -> None:
    if trouble == "sizes":
        p.mul_(10.0 ** rng.uniform(-2, 2))
    elif trouble == "extreme":
        p.mul_(10.0 ** rng.uniform(-150, 40))
    elif trouble == "small sizes":
        p.mul_(10.0 ** rng.uniform(-12, 6))
    elif trouble == "dead" and p.ndim == 2 and len(p):
        p[rng.randrange(len(p))] = 0.0
    elif trouble == "zero weights" and rng.random() < 0.4:
        p.zero_()
    elif trouble == "equal rows" and p.ndim == 2 and len(p):
        p.copy_(p[:1].expand_as(p).clone())


def squares(model: Any, x: Tensor) -> Tensor:
    return model(x).square().sum(1) if model(x).numel() else model(x).sum(1)


def change(s: Subject, moved: dict[str, Tensor]) -> float:
    """Relative change of the outputs, 0 where they are not finite or vanish (nothing to compare)."""
    params = {n: p.detach() for n, p in s.model.named_parameters()}
    with torch.no_grad():
        before, after = (functional_call(s.model, {**params, **m}, (s.x,)) for m in ({}, moved))
    if not before.numel() or not before.isfinite().all() or not before.any():
        return 0.0
    return float((after - before).abs().max() / before.abs().max())


def faults(seed: int) -> list[str]:
    """What is wrong with a seed, one line each."""
    s, wrong = subject(seed), []

    def own(what: str, call: Callable[[], Any]) -> Any:
        """The result of a call, None where the library refuses."""
        try:
            found = call()
        except NoetherflowError as error:
            if not str(error).strip():
                wrong.append(f"{what}: an error without words")
            return None
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            wrong.append(f"{what}: {type(error).__name__}: {error} ({place.filename}:{place.lineno})"[:400])
            return None
        if NUMBER.search(str(found)):
            wrong.append(f"{what} prints NaN or inf: {str(found)[:300]}")
        return found

    syms = own("find", lambda: nf.find_symmetries(s.model, s.x))
    if syms is None:
        return wrong
    wrong += false_ones(s, syms) if s.tame else []
    certificate = own("certify", lambda: nf.certify(s.model, syms, s.x))
    wrong += false_exact(s, syms, certificate or ())
    proven = syms.without(dict(certificate.refused) if certificate else {})
    moments = own("moments", lambda: nf.gradient_moments(s.model, squares, [s.x], proven, entries=True))
    if moments is None:
        return wrong
    sgd = nf.SGDConfig(lr=0.01, batch_size=2, weight_decay=1e-3)
    flow = own("flow", lambda: nf.noether_flow(s.model, proven, moments, sgd))
    if flow is not None:
        with few_evaluations():
            own("forecast", lambda: flow.forecast([0, 10, 1000], errors=False))
    eq = own("equilibrium", lambda: nf.noise_equilibrium(s.model, proven, moments, sgd))
    if eq is not None:
        wrong += balanced(s, eq, own)
    return wrong


@contextmanager
def few_evaluations() -> Iterator[None]:
    """Forecasts that are too fast to be followed end soon: most models here are at no minimum at all."""
    usual = forecast.EVALUATIONS
    forecast.EVALUATIONS = 300
    try:
        yield
    finally:
        forecast.EVALUATIONS = usual


def elements(s: Subject, symmetry: Any) -> Tensor:
    return symmetry.random_element(0.3, s.model.torch_rng)


def false_ones(s: Subject, syms: nf.SymmetrySet) -> list[str]:
    """Reported symmetries that change the outputs."""
    params = {n: p.detach() for n, p in s.model.named_parameters()}
    found = [(t.name, change(s, t.act(params, elements(s, t)))) for t in syms]
    shifts = [(t.name, change(s, t.act(params, torch.ones(1, dtype=torch.float64)))) for t in syms.translations]
    return [f"false symmetry {name}: outputs off by {off:.1e}" for name, off in (*found, *shifts) if not off < 1e-7]


def false_exact(s: Subject, syms: nf.SymmetrySet, rows: Iterable[Any]) -> list[str]:
    """Certificates that are wrong: numbers that are none, exact ones that change the outputs."""
    params = {n: p.detach().double() for n, p in s.model.named_parameters()}
    by_name = {t.name: t for t in syms}
    wrong = []
    double = Subject(s.model.double(), s.x.double(), s.trouble) if s.trouble != "single" else s
    for row in rows:
        if not (row.outputs >= 0 and row.gradients >= 0):
            wrong.append(f"certificate of {row.name} holds {row.outputs} and {row.gradients}")
        if row.verdict == "exact" and row.name in by_name and s.trouble != "single":
            off = change(double, by_name[row.name].act(params, elements(s, by_name[row.name])))
            if not off < 1e-7:
                wrong.append(f"{row.name} is called exact: outputs off by {off:.1e}")
    return wrong


def balanced(s: Subject, eq: nf.Equilibrium, own: Callable[[str, Callable[[], Any]], Any]) -> list[str]:
    """A move that changes the outputs beyond the tolerance, or leaves weights that are no numbers."""
    wrong = []
    held = [*(e.element for e in eq), *(e.charge for e in eq), *(e.imbalance for e in eq)]
    if not all(bool(t.isfinite().all()) for t in held):
        wrong.append("the equilibrium holds NaN or inf")
    with torch.no_grad():
        before = s.model(s.x)
    report = own("balance", lambda: nf.balance_(s.model, eq, example_inputs=s.x))
    with torch.no_grad():
        after = s.model(s.x)
    if not all(bool(p.isfinite().all()) for p in s.model.parameters()):
        wrong.append("weights are NaN or inf after balance_")
    if report is None and not torch.equal(before.nan_to_num(), after.nan_to_num()):
        wrong.append("balance_ refused and yet moved the model")
    size = float(before.abs().max()) if before.numel() else 0.0
    off = float((after - before).abs().max()) / size if size else 0.0
    if not off < 1e-3:
        wrong.append(f"balance_ changed the outputs by {off:.1e}")
    return wrong


def main(first: int, last: int) -> int:
    """Try a range of seeds, printing what is wrong and how far it is."""
    start, bad = time.monotonic(), 0
    warnings.simplefilter("error")
    for seed in range(first, last):
        found = faults(seed)
        if found:
            bad += 1
            print(f"seed {seed} ({subject(seed).trouble})", *found, sep="\n  ")
        if (seed + 1) % 100 == 0 or seed + 1 == last:
            print(f"{seed + 1 - first} models, {bad} with faults, {time.monotonic() - start:.0f} s", flush=True)
    return bad


if __name__ == "__main__":
    sys.exit(1 if main(*(int(a) for a in sys.argv[1:3] or ("0", "3000"))) else 0)
