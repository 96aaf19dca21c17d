"""The proof that a move keeps the model's function: its outputs before and after, or a certificate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from noetherflow.balance.motion import Motion
from noetherflow.core.inputs import ModelInputs
from noetherflow.discovery.certificate import Certificate
from noetherflow.discovery.copies import eps_scaled, eps_settings
from noetherflow.discovery.outputs import floating_tensors
from noetherflow.discovery.repeat import same_draws
from noetherflow.errors import CertificateError, DataError, NoetherflowError
from noetherflow.symmetry.symmetry import Symmetry

APPROXIMATE = 1e-3
"""Default tolerance on outputs when a moved symmetry is only approximate (a normalisation's eps), and nothing shows
what part of their change eps explains.
"""
SAME_MODEL = 2.0**-8
"""The same where eps explains the change: half the distance of 1 from the next number of bfloat16."""
LESS_EPS = 0.01
"""Share of eps at which outputs are compared once more: what eps explains falls with it, and nothing else does."""
CONDITIONED = 10.0
"""How many roundings, times the condition number of a matrix that moves weights, outputs may change by."""
PROVEN = ("exact",)
"""Verdicts that stand for a comparison of outputs."""


@dataclass(frozen=True, eq=False)
class OutputCheck:
    """What is to prove that a move keeps the function, as the user gave it.

    Attributes:
        example_inputs: inputs to run before and after the move, None for none.
        certificate: what `certify` said of the symmetries, None for none.
        tolerance: the largest relative change of outputs; None chooses by the dtypes (`limit`).
        unchecked: move even if nothing proves it.
    """

    example_inputs: Any = None
    certificate: Certificate | None = None
    tolerance: float | None = None
    unchecked: bool = False

    def before(self, model: nn.Module, motion: Motion, remembered: Any) -> OutputsBefore | None:
        """The model's outputs before the move; None where a certificate or `unchecked` stands for them.

        Args:
            model: the model to move.
            motion: the move.
            remembered: the inputs that the symmetries were found with; used where no others are given, if the model
                still runs on them.

        Raises:
            CertificateError: the certificate calls a moved symmetry broken, or nothing proves the move.
            DataError: the model does not run on the example inputs.
        """
        self._refuse_broken(motion.symmetries)
        if self.example_inputs is not None:
            first = _first_run(model, self.example_inputs)
            return OutputsBefore(first, self.example_inputs, _with_less_eps(model, self.example_inputs, motion))
        if self.unchecked or not motion.symmetries or self._certified(motion.symmetries):
            return None
        outputs = None if remembered is None else _run_or_none(model, remembered)
        if outputs is None:
            raise CertificateError(_unproven(motion.symmetries, self.certificate))
        return OutputsBefore(outputs, remembered, _with_less_eps(model, remembered, motion))

    def limit(self, precisions: Sequence[torch.dtype], symmetries: Sequence[Symmetry], condition: float = 1.0) -> float:
        """The largest relative change of outputs that is let pass.

        Without a `tolerance`: what rounding explains (`rounding_limit`), or `APPROXIMATE` where a moved symmetry is
        approximate. A certificate never widens it.
        """
        if self.tolerance is not None:
            return self.tolerance
        rounding = rounding_limit(precisions, condition)
        return max(rounding, APPROXIMATE) if any(s.eps is not None for s in symmetries) else rounding

    def kept(self, before: OutputsBefore, model: nn.Module, precisions: Sequence[torch.dtype], motion: Motion) -> float:
        """By how much the outputs of the moved model differ from those before, where that is little enough.

        A weight before a normalisation that is moved by `s` is the same model with an eps of `eps / s^2`, exactly:
        outputs then change by what eps does to them, at any precision, and by more the larger the move. So where a
        moved symmetry is approximate and outputs change by more than rounding explains, they are compared once more
        with a hundredth of every eps. What eps explains is then a hundredth; what a symmetry that does not hold
        changes, stays, and is refused however small. If eps explains it all, `SAME_MODEL` is let pass, which is what
        bfloat16 makes of outputs. (A small Llama whose residual stream was moved changed by 1.4e-3, in float32 as in
        float64, and by 8e-7 without eps.)

        Raises:
            CertificateError: they differ by more than that, or than the tolerance that was given.
        """
        change = before.change(model)
        condition, symmetries = condition_of(motion), motion.symmetries
        limit = self.limit([*precisions, *before.precisions], symmetries, condition)
        if self.tolerance is None and before.with_less_eps:
            rounding = rounding_limit([*precisions, *before.precisions], condition)
            rest = before.change_with_less_eps(model) if change > rounding else 0.0
            if not rest <= rounding + 3 * LESS_EPS * change:
                raise CertificateError(not_eps(change, rest, symmetries))
            limit = max(limit, SAME_MODEL)
        if not change <= limit:
            raise CertificateError(too_much(change, limit, symmetries))
        return change

    def _refuse_broken(self, symmetries: Sequence[Symmetry]) -> None:
        wanted = {s.name for s in symmetries}
        for verdict in ("broken", "undetermined"):
            names = [c.name for c in self.certificate or () if c.name in wanted and c.verdict == verdict]
            if names:
                raise CertificateError(
                    f"certificate calls {names[:5]} {verdict}; drop them (syms.without) before solving"
                )

    def _certified(self, symmetries: Sequence[Symmetry]) -> bool:
        """Whether the certificate proves the move without a run: an approximate symmetry changes the outputs by as much
        as it is moved, which a certificate measured at another element does not bound.
        """
        proven = {c.name for c in self.certificate or () if c.verdict in PROVEN}
        return all(s.name in proven for s in symmetries)


@dataclass(frozen=True, eq=False)
class OutputsBefore:
    """What a model returned for some inputs before it was moved."""

    outputs: tuple[Tensor, ...]
    inputs: Any
    with_less_eps: tuple[Tensor, ...] = ()
    """The same with `LESS_EPS` of every eps; empty where no moved symmetry has one, or modules do not hold theirs."""

    @property
    def precisions(self) -> list[torch.dtype]:
        """The dtypes of the outputs."""
        return [t.dtype for t in self.outputs]

    def change(self, model: nn.Module) -> float:
        """The largest `max |y' - y| / max |y|` of the moved model; inf where an infinity or NaN came, went or changed.

        Raises:
            DataError: there is nothing finite to compare.
        """
        if self.outputs and not any(bool(t.isfinite().any()) for t in self.outputs):
            raise DataError("the outputs on example_inputs have no finite entry, so that nothing can be compared")
        return _largest_change(self.outputs, _run(model, self.inputs))

    def change_with_less_eps(self, model: nn.Module) -> float:
        """The same where every eps is `LESS_EPS` of its value."""
        with eps_scaled(eps_settings(model), LESS_EPS):
            return _largest_change(self.with_less_eps, _run(model, self.inputs))


def rounding_limit(precisions: Sequence[torch.dtype], condition: float = 1.0) -> float:
    """The relative change of outputs that rounding moved weights to the least precise of these dtypes explains.

    `10 eps^(3/4)` for what a network makes of the rounding of its weights, 2e-11 in float64 and 6e-5 in float32.
    Weights that are multiplied by a number keep their relative precision, whatever the number. A matrix `G` on one side
    and its inverse on the other leave an error of `condition(G) eps` in their product: `CONDITIONED` times that where
    it is more, up to `SAME_MODEL`.

    Example:
        >>> f"{rounding_limit([torch.float32]):.1e}", f"{rounding_limit([torch.float32], 1000.0):.1e}"
        ('6.4e-05', '1.2e-03')
    """
    eps = max((torch.finfo(dtype).eps for dtype in precisions), default=0.0)
    return float(max(10 * eps**0.75, min(CONDITIONED * condition * eps, SAME_MODEL)))


def condition_of(motion: Motion) -> float:
    """The largest condition number among the matrices of a motion; 1 where weights are multiplied by numbers only."""
    matrices = [motion.elements[s.name] for s in motion.symmetries if not s.is_torus]
    return max((float(torch.linalg.cond(m.double()).max()) for m in matrices if m.numel()), default=1.0)


def not_eps(change: float, rest: float, symmetries: Sequence[Symmetry]) -> str:
    """The message when outputs changed by more than a normalisation's eps explains."""
    return (
        f"balancing changed the outputs by {change:.2e} relative, and still by {rest:.2e} with a hundredth of every "
        f"normalisation's eps, which does not explain it: of {[s.name for s in symmetries][:3]} one does not hold; the "
        "model was restored. Certify the symmetries (nf.certify), or pass tolerance= if this change is acceptable"
    )


def too_much(change: float, limit: float, symmetries: Sequence[Symmetry]) -> str:
    """The message when outputs changed by more than the limit."""
    approximate = [s.name for s in symmetries if s.eps is not None]
    cause = (
        f"{approximate[:3]} hold only up to a normalisation's eps: leave such symmetries in place with "
        f"noise_equilibrium(..., approximate=False)"
        if approximate
        else "Certify the symmetries (nf.certify)"
    )
    return (
        f"balancing changed the outputs by {change:.2e} relative, more than the tolerance {limit:.2e}; the model "
        f"was restored. {cause}, or pass tolerance= if this change is acceptable"
    )


def _unproven(symmetries: Sequence[Symmetry], certificate: Certificate | None) -> str:
    doubtful = [c.name for c in certificate or () if c.verdict not in PROVEN]
    known = {c.name for c in certificate or ()}
    missing = [s.name for s in symmetries if s.name not in known]
    why = (
        f"the certificate does not prove {(doubtful or missing)[:3]}"
        if certificate is not None
        else f"nothing proves that {[s.name for s in symmetries[:3]]} keep this model's function"
    )
    if any(c.verdict == "approximate" for c in certificate or ()):
        why += " (approximate: outputs change by as much as it is moved)"
    return (
        f"{why}; pass example_inputs, on which the outputs are compared before and after, or certificate=nf.certify("
        f"model, syms, example_inputs), or unchecked=True to move without a check"
    )


def _devices(model: nn.Module) -> tuple[int, ...]:
    """Indices of the CUDA devices that hold the model."""
    return tuple({p.device.index for p in model.parameters() if p.device.type == "cuda"})


def _run(model: nn.Module, inputs: Any) -> tuple[Tensor, ...]:
    """Copies of the floating tensors that the model returns in evaluation mode, with equal random draws in every call;
    its training flags are put back.
    """
    flags = {m: m.training for m in model.modules()}
    model.eval()
    try:
        with torch.no_grad(), same_draws(0, _devices(model)):
            out = ModelInputs.of(inputs).call(model)
    finally:
        for module, flag in flags.items():
            module.training = flag
    return tuple(t.detach().clone() for t in floating_tensors(out))


def _first_run(model: nn.Module, inputs: Any) -> tuple[Tensor, ...]:
    """The outputs before the move. Raises DataError where the model does not run on these inputs."""
    try:
        return _run(model, inputs)
    except NoetherflowError:
        raise
    except Exception as cause:
        remedy = "; a list is one argument: pass several arguments as a tuple" if isinstance(inputs, list) else ""
        raise DataError(
            f"the model does not run on example_inputs ({ModelInputs.of(inputs).shapes()}): "
            f"{type(cause).__name__}: {cause}{remedy}"
        ) from cause


def _with_less_eps(model: nn.Module, inputs: Any, motion: Motion) -> tuple[Tensor, ...]:
    """The outputs with `LESS_EPS` of every eps; none where no moved symmetry has one, or modules do not hold theirs."""
    settings = eps_settings(model)
    if not settings or all(s.eps is None for s in motion.symmetries):
        return ()
    with eps_scaled(settings, LESS_EPS):
        return _run_or_none(model, inputs) or ()


def _largest_change(before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
    pairs = zip(before, after, strict=True)
    return max((_change(a.double(), b.double()) for a, b in pairs), default=0.0)


def _run_or_none(model: nn.Module, inputs: Any) -> tuple[Tensor, ...] | None:
    """The outputs, or None where the model no longer runs on these inputs or answers nothing finite."""
    try:
        outputs = _run(model, inputs)
    except Exception:
        return None
    return outputs if any(bool(t.isfinite().any()) for t in outputs) else None


def _change(before: Tensor, after: Tensor) -> float:
    finite = before.isfinite()
    rest_kept = torch.equal(finite, after.isfinite()) and torch.allclose(
        before[~finite], after[~finite], equal_nan=True
    )
    if not rest_kept:
        return math.inf
    a, b = before[finite], after[finite]
    return float((b - a).abs().max() / a.abs().max().clamp_min(1e-300)) if a.numel() else 0.0
