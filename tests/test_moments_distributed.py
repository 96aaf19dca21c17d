"""Two gloo processes measure their halves and agree with one process on the union."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from noetherflow import declare
from noetherflow.errors import NoetherflowError
from noetherflow.moments import gradient_moments, load_moments, minibatch_moments, save_moments
from processes import run_ranks
from test_moments_engine import assert_same, data, hidden, net, squared


def _wrap(kind: str) -> Any:
    from torch.nn.parallel import DistributedDataParallel

    model = net()
    if kind == "ddp":
        return DistributedDataParallel(model)
    return sharded(model) if kind == "fsdp" else model


def _worker(rank: int, folder: str) -> None:
    mine = data(4)[rank::2]
    for kind in ("ddp", "fsdp"):
        model = _wrap(kind)
        moments = gradient_moments(model, squared, mine, hidden(net()), entries=True, groups=2)
        save_moments(moments, Path(folder) / f"{kind}{rank}")
    model = _wrap("ddp")
    save_moments(minibatch_moments(model, squared, mine, hidden(net()), batch_size=6), Path(folder) / f"mini{rank}")
    plain = gradient_moments(net(), squared, mine, hidden(net()), process_group=dist.group.WORLD, entries=True)
    save_moments(plain, Path(folder) / f"plain{rank}")
    uneven = [data(2)[rank], cut(data(2)[1 - rank], 1 if rank else 6)]
    save_moments(gradient_moments(_wrap("fsdp"), squared, uneven, hidden(net())), Path(folder) / f"uneven{rank}")
    for kind, shapes in PADDED.items():
        ids = torch.arange(36).view(6, 6)[:, : shapes[rank][1]] % 9
        syms = declare(positions(), "diagonal", [("places.weight", 1)], [("head.weight", 1)])
        moments = gradient_moments(sharded(positions()), squares, [ids[: shapes[rank][0]]], syms)
        save_moments(moments, Path(folder) / f"{kind}{rank}")
    refusals = [_refusal(f, rank) for f in (_short, _uncovered, _minibatches, _uneven_positions)]
    (Path(folder) / f"refusals{rank}").write_text("\n".join(refusals))


# One rank has as many places as samples, so that it alone may take places for samples.
PADDED = {"padded": ((6, 6), (6, 5)), "equal": ((6, 5), (6, 5))}


class Positions(nn.Module):
    """A learned table of places, whose rows all samples share."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places, self.head = nn.Embedding(9, 4), nn.Embedding(8, 4), nn.Linear(4, 9)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.tokens(ids) + self.places(torch.arange(ids.shape[1]))))


def positions() -> Positions:
    torch.manual_seed(0)
    return Positions().double()


def squares(model: nn.Module, ids: Tensor) -> Tensor:
    return model(ids).square().flatten(1).sum(1)


def sharded(model: nn.Module) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    for layer in model.children():
        fully_shard(layer)
    return fully_shard(model)


def _uneven_positions(rank: int) -> None:
    syms = declare(positions(), "diagonal", [("places.weight", 1)], [("head.weight", 1)])
    gradient_moments(sharded(positions()), squares, [torch.zeros(6 - rank, 5, dtype=torch.long)], syms)


def cut(batch: Any, size: int) -> Any:
    return tuple(t[:size] for t in batch)


def _refusal(measure: Any, rank: int) -> str:
    try:
        measure(rank)
    except NoetherflowError as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def _short(rank: int) -> None:
    gradient_moments(_wrap("fsdp"), squared, iter(data(3 - rank)), hidden(net()))


def _uncovered(rank: int) -> None:
    model = sharded(nn.Sequential(nn.Linear(4, 6), nn.LSTM(6, 3, batch_first=True)).double())
    syms = declare(model, "diagonal", [("0.weight", 0)], [("1.weight_ih_l0", 1)])
    gradient_moments(model, lambda m, b: m(b[0].unsqueeze(1))[0].square().sum((1, 2)), data(1), syms)


def _minibatches(rank: int) -> None:
    minibatch_moments(_wrap("fsdp"), squared, data(2), hidden(net()), batch_size=6)


@pytest.fixture(scope="module")
def folder() -> Any:
    with tempfile.TemporaryDirectory() as name:
        run_ranks(_worker, name)
        yield Path(name)


@pytest.mark.parametrize("kind", ["ddp", "fsdp", "plain"])
def test_ranks_agree_with_one_process(folder: Path, kind: str) -> None:
    model = net()
    expected = gradient_moments(model, squared, data(4), hidden(model), entries=True)
    for rank in (0, 1):
        got = load_moments(folder / f"{kind}{rank}")
        assert len(got.groups) >= 2
        assert_same(got, expected, 1e-10)


def test_sharded_ranks_verify_a_new_way_through_the_model_together(folder: Path) -> None:
    """Rank 1's last batch is a single sample, which rank 0 never meets."""
    model = net()
    batches = [*data(2), data(2)[1], cut(data(2)[0], 1)]
    expected = gradient_moments(model, squared, batches, hidden(model))
    for rank in (0, 1):
        assert_same(load_moments(folder / f"uneven{rank}"), expected, 1e-10)


def test_sharded_models_are_refused_with_a_reason_on_every_rank(folder: Path) -> None:
    for rank in (0, 1):
        short, uncovered, minibatches, uneven = (folder / f"refusals{rank}").read_text().splitlines()
        assert "DataError: batch 3: 1 of 2 ranks have one" in short
        assert "MomentError: ['1.weight_ih_l0'] are sharded by fully_shard, and no rule covers them" in uncovered
        assert "MomentError: ['0.weight', '0.bias', '2.weight'] are sharded" in minibatches
        assert "MomentError: ranks have [6, 5] samples in one batch, and ['places.weight']" in uneven


@pytest.mark.parametrize("kind", PADDED)
def test_sharded_positions_agree_with_one_process(folder: Path, kind: str) -> None:
    model = positions()
    batches = [torch.arange(36).view(6, 6)[:n, :t] % 9 for n, t in PADDED[kind]]
    syms = declare(model, "diagonal", [("places.weight", 1)], [("head.weight", 1)])
    expected = gradient_moments(model, squares, batches, syms)
    for rank in (0, 1):
        assert_same(load_moments(folder / f"{kind}{rank}"), expected, 1e-10)


def test_ranks_are_replicates(folder: Path) -> None:
    model = net()
    expected = minibatch_moments(model, squared, data(4), hidden(model), batch_size=6)
    for rank in (0, 1):
        assert_same(load_moments(folder / f"mini{rank}"), expected, 1e-10)
