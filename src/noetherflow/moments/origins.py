"""Which parameters a tensor comes from: the parameter itself, a view of it, or something computed from parameters."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from noetherflow.core.tensors import named_tensors
from noetherflow.core.torch_internals import view_base


@dataclass(eq=False, slots=True)
class Source:
    """An operand made from the parameters `names` alone; `view_of` is set when it is a parameter or a view of one."""

    operand: Tensor
    names: frozenset[str]
    view_of: str | None


def distinct(tensor: Tensor) -> bool:
    """Whether no place in memory appears twice, as it does after `expand` or an overlapping `unfold`.

    Each axis must step beyond all that the axes of smaller stride reach; True is certain, False is not.

    Example:
        >>> distinct(torch.ones(2, 3).T), distinct(torch.ones(1, 3).expand(2, 3))
        (True, False)
    """
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                return False
            reach += stride * (size - 1)
    return True


class Origins:
    """Answers, during one forward, which parameters a tensor is made from.

    Tensors are told apart by identity. Those noted with `note` are kept alive, so that no later tensor can take their
    `id`.
    """

    def __init__(self, model: nn.Module, roots: dict[str, Tensor]) -> None:
        self._model = model
        self.roots = dict(roots)
        self._names = {id(t): n for n, t in roots.items()}
        self._made: dict[int, tuple[Tensor, frozenset[str]]] = {}

    def note(self, made: Tensor, names: frozenset[str]) -> None:
        """Remember that `made` was computed from the parameters `names` and nothing else."""
        self._made[id(made)] = made, names

    def names_of(self, tensor: Tensor) -> frozenset[str] | None:
        """The parameters that a tensor is made from alone; None if it is made from anything else."""
        key = id(tensor)
        name = self._names.get(key)
        if name is not None:
            return frozenset((name,))
        made = self._made.get(key)
        if made is not None:
            return made[1]
        if not tensor.requires_grad:
            return None
        if tensor.is_leaf:
            return self._stand_in(tensor) if isinstance(tensor, nn.Parameter) else None
        base = view_base(tensor)
        return None if base is None else self.names_of(base)

    def _stand_in(self, tensor: Tensor) -> frozenset[str] | None:
        """The name under which a sharded model holds this gathered parameter just now."""
        for name, held in named_tensors(self._model):
            if held is tensor and name in self.roots:
                self._names[id(tensor)], self.roots[name] = name, tensor
                return frozenset((name,))
        return None

    def source(self, operand: Tensor) -> Source:
        """What an operand is of its parameters: one of them, a view of one, or a tensor computed from some."""
        name = self._names.get(id(operand))
        if name is not None:
            return Source(operand, frozenset((name,)), name)
        names = self.names_of(operand) or frozenset()
        base = view_base(operand)
        base = operand if base is None else base
        plain = distinct(operand) and operand.dtype == base.dtype
        return Source(operand, names, self._names.get(id(base)) if plain else None)
