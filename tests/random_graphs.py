"""Small random models: layers used again, residuals, products, concatenations, tied and transposed weights, norms.

`random_graph(seed)` is always the same model for one seed, so that a seed that failed can be kept as a test.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTHS = (2, 3, 4)
BATCH = 4


@dataclass(frozen=True)
class Step:
    """One line of the program: an operator's name, the values it reads and the parameters it uses."""

    operator: str
    reads: tuple[int, ...]
    uses: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.operator}({', '.join(f'v{k}' for k in self.reads)}{''.join(f', {u}' for u in self.uses)})"


def _heads(x: Tensor, y: Tensor) -> Tensor:
    """Two vectors as two heads of half their width: products of heads `[batch, 2, half] x [batch, half, 2]`."""
    a, b = x.unflatten(-1, (2, -1)), y.unflatten(-1, (2, -1))
    return (a @ b.mT).flatten(1)


FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "linear": lambda x, w, b: F.linear(x, w, b),
    "matrix": lambda x, w: F.linear(x, w),
    "transposed": lambda x, w: x @ w,
    "gain": lambda x, g: x * g,
    "shift": lambda x, g: x + g,
    "divide": lambda x, g: x / g,
    "layer_norm": lambda x: F.layer_norm(x, x.shape[-1:], eps=0.0),
    "rms_norm": lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True)),
    "relu": F.relu,
    "tanh": torch.tanh,
    "abs": torch.abs,
    "cube": lambda x: F.relu(x) ** 3,
    "root": lambda x: x.abs().sqrt(),
    "double": lambda x: 2.0 * x,
    "negate": lambda x: -x,
    "flip": lambda x: x.flip(-1),
    "add": lambda x, y: x + y,
    "subtract": lambda x, y: x - y,
    "multiply": lambda x, y: x * y,
    "maximum": torch.maximum,
    "concatenate": lambda x, y: torch.cat((x, y), -1),
    "stack_sum": lambda x, y: torch.stack((x, y), 1).sum(1),
    "inner": lambda x, y: (x * y).sum(-1, keepdim=True),
    "scores": lambda x, y: torch.einsum("bi,bj->bij", x, y).flatten(1),
    "heads": _heads,
    "first_two": lambda x: x[:, :2],
    "mean": lambda x: x.mean(-1, keepdim=True),
    "maximum_of": lambda x: x.amax(-1, keepdim=True),
    "softmax": lambda x: x.softmax(-1),
    "select": lambda x, y: torch.where(y > 0, x, torch.zeros_like(x)),
    "padded": lambda x: F.pad(x, (0, 1)),
}
UNARY = (
    *("relu", "relu", "relu", "tanh", "abs", "cube", "root", "double", "negate", "flip", "mean", "maximum_of"),
    *("softmax", "first_two", "padded"),
)
BINARY = (
    *("add", "add", "add", "multiply", "multiply", "subtract", "maximum", "concatenate", "concatenate", "stack_sum"),
    *("inner", "scores", "heads", "select"),
)


class RandomGraph(nn.Module):
    """A program of 5 to 14 steps over values of width 1 to 8, read out by a linear layer from its last values."""

    choices = WIDTHS
    """Widths of inputs and layers."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.rng = random.Random(seed)
        self.torch_rng = torch.Generator().manual_seed(seed)
        self.leaves = nn.ParameterDict()
        self.steps: list[Step] = []
        self.widths = [self.rng.choice(self.choices)]
        self.input_width = self.widths[0]
        for _ in range(self.rng.randint(5, 14)):
            self._grow()
        last = [k for k in range(len(self.widths)) if not any(k in s.reads for s in self.steps)]
        for k in last:
            self._layer(k, self.rng.choice((1, 2)))
        self.outputs = tuple(range(len(self.widths) - len(last), len(self.widths)))

    def _parameter(self, *shape: int) -> str:
        name = f"p{len(self.leaves)}"
        self.leaves[name] = nn.Parameter(torch.randn(shape, generator=self.torch_rng, dtype=torch.float64) + 0.1)
        return name

    def _old(self, *shape: int) -> str | None:
        """An earlier parameter of this shape, half the time where there is one."""
        fitting = [n for n, p in self.leaves.items() if tuple(p.shape) == shape]
        return self.rng.choice(fitting) if fitting and self.rng.random() < 0.5 else None

    def _put(self, width: int, operator: str, reads: tuple[int, ...], uses: tuple[str, ...] = ()) -> None:
        self.steps.append(Step(operator, reads, uses))
        self.widths.append(width)

    def _layer(self, k: int, width: int) -> None:
        wide = self.widths[k]
        if self.rng.random() < 0.15 and (old := self._old(wide, width)):
            self._put(width, "transposed", (k,), (old,))
            return
        weight = self._old(width, wide) or self._parameter(width, wide)
        if self.rng.random() < 0.5:
            self._put(width, "matrix", (k,), (weight,))
        else:
            self._put(width, "linear", (k,), (weight, self._old(width) or self._parameter(width)))

    def _grow(self) -> None:
        k = max(self.rng.randrange(len(self.widths)) for _ in range(2))  # rather a late value
        wide, chance = self.widths[k], self.rng.random()
        if chance < 0.45 or k == 0:
            same = self.rng.random() < 0.4 and wide <= 4
            self._layer(k, wide if same else self.rng.choice(self.choices))
        elif chance < 0.52:
            self._put(
                wide, self.rng.choice(("gain", "shift", "divide")), (k,), (self._old(wide) or self._parameter(wide),)
            )
        elif chance < 0.60 and wide > 2:
            self._put(wide, self.rng.choice(("layer_norm", "rms_norm")), (k,))
        elif chance < 0.78:
            self._one(k, self.rng.choice(UNARY))
        else:
            fitting = [j for j in range(1, len(self.widths)) if self.widths[j] == wide]
            self._two(k, self.rng.choice(fitting), self.rng.choice(BINARY))

    def _one(self, k: int, operator: str) -> None:
        wide = self.widths[k]
        change = {"mean": 1, "maximum_of": 1, "first_two": min(2, wide), "padded": wide + 1}
        if change.get(operator, wide) <= 8:
            self._put(change.get(operator, wide), operator, (k,))

    def _two(self, k: int, j: int, operator: str) -> None:
        wide = self.widths[k]
        if operator == "heads" and wide % 2:
            operator = "add"
        if k == j and operator != "multiply":
            return  # a value twice side by side has symmetries of its own, which no network has
        change = {"concatenate": 2 * wide, "inner": 1, "scores": wide * wide, "heads": 4}
        if change.get(operator, wide) <= 8:
            self._put(change.get(operator, wide), operator, (k, j))

    def forward(self, x: Tensor) -> Tensor:
        values = [x]
        for step in self.steps:
            arguments = [values[k] for k in step.reads] + [self.leaves[u] for u in step.uses]
            values.append(FUNCTIONS[step.operator](*arguments))
        return torch.cat([values[k] for k in self.outputs], -1)

    def program(self) -> str:
        """The steps, one a line, for the message of a failing test."""
        return "\n".join(f"v{k + 1} = {step}" for k, step in enumerate(self.steps))


def random_graph(seed: int) -> tuple[RandomGraph, Tensor]:
    """The model of a seed and example inputs, both float64."""
    model = RandomGraph(seed)
    return model, torch.randn(BATCH, model.input_width, generator=model.torch_rng, dtype=torch.float64)
