"""Loading models and data: what is accepted, and how the rest is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from noetherflow.errors import DataError
from noetherflow.workloads import BUILT_IN, load_workload, minibatches

FACTORIES = """
import torch
from torch import nn

def model_loss(model, batch):
    return (model(batch[0]) - batch[1]).square().sum(1)

def good():
    return nn.Linear(3, 2), model_loss, [(torch.ones(5, 3), torch.zeros(5, 2))]

def two():
    return nn.Linear(3, 2), model_loss

def empty():
    return nn.Linear(3, 2), model_loss, []

def odd():
    return nn.Linear(3, 2), model_loss, [("text", 1)]

def no_sample():
    return nn.Linear(3, 2), model_loss, [torch.ones(2, 3), torch.ones(0, 3)]

def no_tensor():
    return nn.Linear(3, 2), model_loss, [{"x": torch.ones(5, 3)}]

def no_item():
    return nn.Linear(3, 2), model_loss, [()]

def with_example():
    return nn.Linear(3, 2), model_loss, [{"x": torch.ones(5, 3)}], torch.ones(1, 3)

def more():
    return [(torch.ones(7, 3), torch.zeros(7, 2))]

number = 3
"""


@pytest.fixture
def factories(tmp_path, monkeypatch):
    name = f"factories_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(FACTORIES)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    return name


@pytest.mark.parametrize("name", BUILT_IN)
def test_built_in_losses_are_per_sample(name):
    workload = load_workload(name)
    losses = workload.loss_fn(workload.model, workload.batches[0])
    assert losses.shape == (len(workload.batches[0][0]),)
    assert workload.model(*workload.example_inputs).shape[0] == 4


def test_factory_and_replaced_data(factories, tmp_path):
    assert load_workload(f"{factories}:good").samples == 5
    assert load_workload(f"{factories}:with_example").samples == 5
    assert load_workload(f"{factories}:good", data=f"{factories}:more").samples == 7
    np.savez(tmp_path / "d.npz", x=np.ones((9, 3)), y=np.zeros((9, 2)))
    assert load_workload(f"{factories}:good", data=str(tmp_path / "d.npz")).samples == 9
    save_file({"x": torch.ones(8, 3), "y": torch.zeros(8, 2)}, tmp_path / "d.safetensors")
    assert load_workload(f"{factories}:good", data=str(tmp_path / "d.safetensors")).samples == 8


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("two", "must return .model, loss_fn, batches."),
        ("empty", "no batches"),
        ("odd", "must be the model's input tensor, got a str"),
        ("number", "is a int, not a function"),
        ("absent", "cannot load"),
        ("no_sample", r"batch 1 is empty \(first tensor has shape \(0, 3\)\)"),
        ("no_tensor", "must be the model's input tensor, got a dict"),
        ("no_item", "must be the model's input tensor, got a NoneType"),
    ],
)
def test_bad_factories_name_the_problem(factories, factory, message):
    with pytest.raises(DataError, match=message):
        load_workload(f"{factories}:{factory}")


def test_bad_data_files_name_the_problem(factories, tmp_path):
    good = f"{factories}:good"
    np.savez(tmp_path / "x.npz", x=np.ones((9, 3)))
    np.savez(tmp_path / "short.npz", x=np.ones((9, 3)), y=np.ones((8, 3)))
    np.savez(tmp_path / "empty.npz", x=np.ones((0, 3)), y=np.ones((0, 3)))
    (tmp_path / "broken.npz").write_bytes(b"not an archive")
    for data, message in [
        ("x.npz", "missing .'y'."),
        ("short.npz", "x has 9 samples, y has 8"),
        ("empty.npz", r"batch 0 is empty \(first tensor has shape \(0, 3\)\)"),
        ("broken.npz", "cannot be read"),
        ("gone.npz", "no such file"),
        ("table.csv", "give a .npz or .safetensors"),
    ]:
        with pytest.raises(DataError, match=message):
            load_workload(good, data=data)
    with pytest.raises(DataError, match=r"package\.module:factory"):
        load_workload("no-such-example")


def test_minibatches_are_reproducible():
    x, y = torch.arange(10.0)[:, None], torch.arange(10)
    first, second = minibatches(x, y, 4, seed=1), minibatches(x, y, 4, seed=1)
    for _ in range(3):
        (a, b), (c, _) = next(first), next(second)
        assert torch.equal(a, c)
        assert torch.equal(a[:, 0].long(), b)
