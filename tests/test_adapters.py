"""The ledger inside real short trainings with accelerate, Lightning and the Hugging Face Trainer, and its log sinks."""

from __future__ import annotations

import csv
import importlib
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from noetherflow.errors import DataError
from noetherflow.monitor import adapters, sinks
from noetherflow.monitor.ledger import Ledger
from noetherflow.monitor.log import read_log
from test_ledger import assert_closed, backward, batches, mlp, mlp_symmetries

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


def exact_gradient(rows: list[dict]) -> bool:
    """The gradient entry vanishes: the ledger saw the gradients of the step it charged."""
    return all(abs(r["gradient"]) < 1e-12 * r["norm"] for r in rows)


def test_accelerate(tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    raw = mlp()
    model, optimizer = accelerator.prepare(raw, torch.optim.SGD(raw.parameters(), lr=0.1, weight_decay=0.01))
    ledger = adapters.watch_accelerate(accelerator, model, optimizer, mlp_symmetries, run_dir=tmp_path / "run")
    for x, y in batches(8):
        with accelerator.accumulate(model):
            accelerator.backward(nn.functional.cross_entropy(model(x), y))
            accelerator.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
    rows = ledger.records()
    assert_closed(rows, 4)
    assert exact_gradient(rows)
    assert all(r["decay"] != 0 for r in rows)
    accelerator.save_state(str(tmp_path / "state"))
    ledger.step = 77
    accelerator.load_state(str(tmp_path / "state"))
    assert ledger.step == 4
    ledger.close()


@pytest.mark.parametrize("package", adapters.LIGHTNING)
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.filterwarnings("ignore:.*:lightning.fabric.utilities.warnings.PossibleUserWarning")
def test_lightning(package: str, tmp_path: Path) -> None:
    pl: Any = pytest.importorskip(package)

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp()

        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9, nesterov=True)

    def symmetries(module: nn.Module) -> Any:
        from dataclasses import replace

        inner = mlp_symmetries(module.net)
        legs = lambda s: tuple(replace(leg, parameter="net." + leg.parameter) for leg in s.legs)
        return replace(inner, symmetries=tuple(replace(s, legs=legs(s)) for s in inner))

    def fit(steps: int, resume: str | None = None) -> Any:
        callback = adapters.lightning_callback(symmetries, package=package, run_dir=tmp_path / "run")
        assert isinstance(callback, pl.Callback)
        trainer = pl.Trainer(
            max_steps=steps,
            accelerator="cpu",
            gradient_clip_val=0.05,
            callbacks=[
                callback,
                pl.callbacks.ModelCheckpoint(tmp_path / "saved", every_n_train_steps=4, save_top_k=-1),
            ],
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        data = torch.utils.data.DataLoader(batches(40), batch_size=None)
        trainer.fit(Module(), data, ckpt_path=resume, **({"weights_only": False} if resume else {}))
        return callback.ledger

    ledger = fit(6)
    rows = ledger.records()
    assert_closed(rows, 6)
    assert exact_gradient(rows)
    first = [r for r in read_log(tmp_path / "run") if r["kind"] == "step"]
    assert len(first) == 6
    assert all(0 < r["loss"] < 10 for r in first)
    (saved,) = (tmp_path / "saved").glob("*step=4*")
    fit(9, str(saved))
    assert [r["step"] for r in read_log(tmp_path / "run") if r["kind"] == "step"] == list(range(9))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_hugging_face_trainer(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    from noetherflow.discovery import find_symmetries

    def fresh() -> Any:
        torch.manual_seed(0)
        config = transformers.GPT2Config(
            vocab_size=23, n_positions=8, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
        )
        return transformers.GPT2LMHeadModel(config).double()

    ids = torch.randint(23, (64, 8), generator=torch.Generator().manual_seed(0))
    data = [{"input_ids": row, "labels": row} for row in ids]
    syms = find_symmetries(fresh().eval(), {"input_ids": ids[:2], "use_cache": False})

    def train(steps: int, resume: bool = False) -> Any:
        callback = adapters.trainer_callback(syms, run_dir=tmp_path / "run", detail="symmetry")
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path / "out"),
            max_steps=steps,
            per_device_train_batch_size=8,
            gradient_accumulation_steps=2,
            max_grad_norm=0.1,
            save_steps=3,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            logging_steps=100,
            dataloader_pin_memory=False,
        )
        trainer = transformers.Trainer(fresh(), arguments, train_dataset=data, callbacks=[callback])
        trainer.train(resume_from_checkpoint=resume or None)
        return callback.ledger

    ledger = train(3)
    rows = ledger.records("symmetry")
    assert_closed(rows, 3)
    exact = {s.name for s in syms if s.eps is None}
    assert len(exact) >= 3
    assert exact_gradient([r for r in rows if r["symmetry"] in exact]), "AdamW's gradient part, clipped, is invariant"
    assert max(abs(r["preconditioner"]) for r in rows) > 0
    train(5, resume=True)
    lines = list(read_log(tmp_path / "run"))
    assert [r["step"] for r in lines if r["kind"] == "step"] == list(range(5))
    assert [r["event"] for r in lines if r["kind"] == "event"] == ["resumed"]


def logged(sink: Any) -> list[dict]:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.01)
    ledger = Ledger(model, optimizer, mlp_symmetries(model), sinks=[sink], estimate_every=2).attach()
    for batch in batches(5):
        optimizer.zero_grad()
        ledger.note(backward(model, batch))
        optimizer.step()
    ledger.close()
    return ledger.records()


def test_csv(tmp_path: Path) -> None:
    rows = logged(sinks.CSVSink(tmp_path / "log.csv"))
    with open(tmp_path / "log.csv", newline="") as file:
        found = list(csv.DictReader(file))
    assert len(found) == len(rows) == 10
    for a, b in zip(found, rows, strict=True):
        assert (int(a["step"]), a["family"]) == (b["step"], b["family"])
        assert float(a["charge"]) == b["charge"]
        assert float(a["loss"]) > 0


@pytest.mark.filterwarnings("ignore")
def test_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    accumulator = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")
    rows = logged(sinks.TensorBoardSink(tmp_path))
    events = accumulator.EventAccumulator(str(tmp_path))
    events.Reload()
    values = events.Scalars("noether/family/linear/charge")
    assert [e.step for e in values] == list(range(5))
    expected = [r["charge"] for r in rows if r["family"] == "linear"]
    assert [e.value for e in values] == pytest.approx(expected, rel=1e-6)


@pytest.mark.filterwarnings("ignore")
def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run = wandb.init(mode="offline", dir=str(tmp_path), project="test", settings=wandb.Settings(console="off"))
    rows = logged(sinks.WandbSink(run))
    summary = dict(run.summary)
    run.finish()
    assert summary["noether/family/linear/charge"] == pytest.approx(rows[-1]["charge"])
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))


@pytest.mark.filterwarnings("ignore")
def test_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    mlflow.set_tracking_uri(tmp_path.as_uri())
    mlflow.set_experiment("ledger")
    with pytest.raises(DataError, match="start_run"):
        sinks.MLflowSink()
    with mlflow.start_run() as run:
        rows = logged(sinks.MLflowSink())
    history = mlflow.MlflowClient().get_metric_history(run.info.run_id, "noether/family/rescaling/charge")
    assert [m.step for m in history] == list(range(5))
    assert [m.value for m in history] == [r["charge"] for r in rows if r["family"] == "rescaling"]


def test_scalars_leave_out_what_is_not_finite() -> None:
    row = {"families": ["a"], "symmetries": ["s"], "family": {"charge": [1.5]}, "symmetry": {"steps": [math.nan]}}
    assert sinks.scalars(row) == {"noether/family/a/charge": 1.5}
