"""Short names of symmetries spelled out, and lengths of a run that contradict each other."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import noetherflow as nf
from noetherflow.core.members import compressed, modules_of, spelled_out
from noetherflow.core.printing import assumed
from noetherflow.errors import DataError


class TwoReaders(nn.Module):
    """One normalisation read by two linear maps, so that its symmetry has a `(+1)`."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.left, self.right = nn.LayerNorm(6), nn.Linear(6, 3), nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(x)
        return self.left(h).tanh() + self.right(h).sin()


def diagnosed(**lengths: int) -> nf.Diagnosis:
    torch.manual_seed(0)
    model = TwoReaders()
    data = [(torch.randn(16, 6), torch.randint(3, (16,))) for _ in range(20)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    return nf.diagnose(model, nn.CrossEntropyLoss(), data, optimizer, **lengths)


def test_every_further_weight_of_a_printed_name_is_named() -> None:
    diagnosis = diagnosed()
    text = str(diagnosis)
    (name,) = (n for n in diagnosis.members if "(+1)" in n)
    assert name in " ".join(text.split())
    below = text.split("What the names stand for")[1]
    assert all(module in below for module in ("norm", "left", "right"))


def test_a_certificate_names_them_too() -> None:
    model = TwoReaders()
    certificate = nf.certify(model, nf.find_symmetries(model, torch.randn(2, 6)), torch.randn(4, 6))
    assert "norm -> left (+1): norm, left, right" in str(certificate)


def test_the_key_of_a_certificate_stands_above_its_names_and_nowhere_else() -> None:
    """One line says what `(+n)` means; without such a name, or with the legend left out, there is none."""
    key = "(+n): n further modules that the symmetry acts on"
    model, plain = TwoReaders(), nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2))
    certificate, without = (
        nf.certify(m, nf.find_symmetries(m, torch.randn(2, 6)), torch.randn(4, 6)) for m in (model, plain)
    )
    lines = str(certificate).splitlines()
    (at,) = (i for i, line in enumerate(lines) if key in line)
    assert lines[at + 1].strip() == "norm -> left (+1): norm, left, right"
    assert any("norm -> left (+1)" in line for line in lines[:at])
    assert key not in certificate.describe(legend=False)
    assert "norm -> left (+1): norm" in certificate.describe(legend=False, verbose=True)
    assert not any("(+" in row.name for row in without.rows)
    assert "(+n)" not in str(without)


def test_names_without_more_are_left_alone() -> None:
    assert spelled_out("`0 -> 2` and a (+7) that is no name", {"0 -> 2": ("0", "2"), "b (+1)": ("b", "c")}) == []


def test_compressing_keeps_gaps_and_order() -> None:
    names = [f"h.{i}.o" for i in (0, 1, 2, 5)]
    assert compressed(["wte", *names, "h.3.x"]) == ["wte", "h.0-2,5.o", "h.3.x"]
    assert compressed(["conv1", "conv2"]) == ["conv1", "conv2"]


def test_a_parameter_of_the_model_itself_is_its_own_module() -> None:
    assert modules_of(["weight", "scale", "a.gamma", "a.weight"]) == ("weight", "scale", "a.gamma", "a")


def test_a_warmup_longer_than_the_run_is_refused() -> None:
    with pytest.raises(DataError, match=r"warmup=2,000 is longer than the run, steps=500"):
        diagnosed(steps=500, warmup=2000)


@pytest.mark.parametrize(("lengths", "looked_at"), [({"steps": 500, "warmup": 500}, 500), ({"warmup": 3000}, 3000)])
def test_a_warmup_within_the_run_is_taken(lengths: dict[str, int], looked_at: int) -> None:
    assert f"for {looked_at:,} steps" in diagnosed(**lengths).subject


def test_what_is_assumed_is_one_line_unless_asked_for() -> None:
    sentences = ["v is slow, over 1,000 steps: unknown without curvature", "gradients stay"]
    assert assumed(sentences) == ["assumed: v is slow; gradients stay (in full: describe(verbose=True))"]
    assert len(assumed(sentences, verbose=True)) == 2
    assert assumed([]) == []
