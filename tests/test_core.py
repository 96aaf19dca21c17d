"""Files, model inputs and wrappers: what every verb uses."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from noetherflow.core.files import check_writable, replacing, write_text
from noetherflow.core.inputs import ModelInputs
from noetherflow.core.tensors import named_tensors, tensors_of
from noetherflow.core.unwrap import plain_name, unwrap, unwrap_optimizer
from noetherflow.errors import DataError, MissingExtraError, require


def test_a_failed_write_leaves_the_old_file_alone(tmp_path):
    path = tmp_path / "a.json"
    write_text(path, "old")

    def stopped_half_way():
        with replacing(path) as first, replacing(path) as second:
            assert first != second
            assert first.suffix == ".json"
            first.write_text("half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        stopped_half_way()
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
    assert path.read_text() == "old"


def test_a_write_makes_the_folder_and_sets_the_permissions(tmp_path):
    path = tmp_path / "new" / "a.txt"
    with replacing(path, mode=0o600, durable=True) as scratch:
        scratch.write_text("whole")
    assert path.read_text() == "whole"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_durable_writes_are_synced_before_the_rename(tmp_path, monkeypatch):
    events = []
    monkeypatch.setattr(os, "fsync", lambda handle: events.append((tmp_path / "a").exists()))
    with replacing(tmp_path / "a", durable=True) as scratch:
        scratch.write_text("x")
    assert events == [False]


def test_a_target_that_cannot_be_written_is_known_before(tmp_path):
    check_writable(tmp_path / "fine")
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        check_writable(tmp_path / "file" / "below")


class Sum(nn.Module):
    def forward(self, x, y=None):
        return sum(x) if isinstance(x, list) else x if y is None else x + y


@pytest.mark.parametrize(
    ("given", "value"),
    [
        (torch.ones(2), 2),
        ((torch.ones(2), torch.ones(2)), 4),
        ([torch.ones(2), torch.ones(2), torch.ones(2)], 6),
        ({"x": torch.ones(2), "y": torch.zeros(2)}, 2),
        (ModelInputs((torch.ones(2),), {"y": torch.ones(2)}), 4),
    ],
    ids=["one", "tuple", "list is one argument", "mapping", "both"],
)
def test_inputs_are_read_alike_everywhere(given, value):
    assert ModelInputs.of(given).call(Sum()).sum() == value


def test_inputs_are_changed_at_any_depth_and_described():
    inputs = ModelInputs.of({"x": [torch.ones(2), (torch.ones(3), 5)], "cache": None})
    doubled = inputs.map(lambda t: 2 * t)
    assert doubled.kwargs["x"][1][0].tolist() == [2, 2, 2]
    assert doubled.kwargs["x"][1][1] == 5
    assert inputs.shapes() == "x=[(2,), ((3,), 5)], cache=None"


@pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning")  # torch's own, on the first torch.compile
def test_every_wrapper_comes_off():
    net = nn.Sequential(nn.Linear(2, 2))
    compiled = torch.compile(net)
    assert unwrap(compiled) is net
    assert unwrap(nn.DataParallel(torch.compile(nn.DataParallel(net)))) is net
    assert list(tensors_of(compiled)) == list(tensors_of(net)) == ["0.weight", "0.bias"]


def test_a_module_with_an_attribute_like_a_wrappers_is_not_one():
    net = nn.Linear(2, 2)
    net.module = None
    net._orig_mod = "a name of its own"
    assert unwrap(net) is net


def test_fabric_and_accelerate_come_off():
    accelerate, fabric = pytest.importorskip("accelerate"), pytest.importorskip("lightning.fabric")
    net = nn.Linear(2, 2)
    wrapped = fabric.Fabric(accelerator="cpu", devices=1).setup_module(net)
    assert unwrap(wrapped) is net
    assert list(tensors_of(wrapped)) == ["weight", "bias"]
    assert unwrap(accelerate.Accelerator(cpu=True).prepare(net)) is net


@pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning")  # torch's own, on the first torch.compile
def test_names_are_free_of_wrappers_inside():
    net = nn.Sequential(nn.Linear(2, 2), torch.compile(nn.Linear(2, 2)))
    assert list(tensors_of(net)) == ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert plain_name("a._checkpoint_wrapped_module.b._fsdp_wrapped_module.weight") == "a.b.weight"


def test_tied_tensors_have_every_name_and_one_canonical_one():
    net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    net[1].weight = net[0].weight
    assert [n for n, _ in named_tensors(net)] == ["0.weight", "1.weight"]
    assert list(tensors_of(net)) == ["0.weight"]


def test_what_holds_no_torch_optimiser_is_refused():
    with pytest.raises(DataError, match="expected a torch optimiser, got dict"):
        unwrap_optimizer({})


@pytest.mark.parametrize("module", ["no_such_package", "json.no_such_part"])
def test_a_missing_extra_is_named(module):
    with pytest.raises(MissingExtraError, match=r"pip install 'noetherflow\[hf\]'"):
        require(module, "hf")


def test_what_a_killed_writer_left_is_removed_by_the_next_and_what_a_running_one_writes_is_not(tmp_path: Path) -> None:
    path = tmp_path / "points[1].json"
    code = "import os, signal, sys\nfrom noetherflow.core.files import replacing\n"
    code += "with replacing(sys.argv[1]) as scratch:\n"
    code += "    scratch.write_text('half')\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    subprocess.run([sys.executable, "-c", code, str(path)], check=False)
    (left,) = tmp_path.iterdir()
    long_ago = time.time() - 3600
    with replacing(path) as running:
        assert left.exists()  # too young to tell
        running.write_text("whole")
        for file in (left, running):
            os.utime(file, (long_ago, long_ago))
        write_text(path, "another")
        assert not left.exists()
        assert running.exists()
    assert [f.name for f in tmp_path.iterdir()] == [path.name]
    assert path.read_text() == "whole"
