"""The ledger inside real short trainings with accelerate, Lightning and the Hugging Face Trainer, and its log sinks."""

from __future__ import annotations

import csv
import importlib
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from noetherflow.errors import DataError
from noetherflow.monitor import adapters, sinks
from noetherflow.monitor.books import FIELDS
from noetherflow.monitor.ledger import Ledger
from noetherflow.monitor.log import read_log
from processes import run_ranks
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
    for x, y in batches(2):
        accelerator.backward(nn.functional.cross_entropy(model(x), y))
        optimizer.step()
    assert ledger.step > 4
    accelerator.load_state(str(tmp_path / "state"))
    assert ledger.step == 4
    ledger.close()


def lightning_module(pl: Any, losses: list[float]) -> Any:
    """An MLP that appends the loss of every batch to `losses`."""

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp()

        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
            losses.append(float(loss))
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9, nesterov=True)

    return Module()


def lightning_symmetries(module: nn.Module) -> Any:
    inner = mlp_symmetries(module.net)
    legs = lambda s: tuple(replace(leg, parameter="net." + leg.parameter) for leg in s.legs)
    return replace(inner, symmetries=tuple(replace(s, legs=legs(s)) for s in inner))


def lightning_trainer(pl: Any, steps: int, callbacks: list[Any], **options: Any) -> Any:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return pl.Trainer(max_steps=steps, accelerator="cpu", callbacks=callbacks, **quiet, **options)


def recorded(run_dir: Path, kind: str = "step") -> list[dict]:
    return [r for r in read_log(run_dir) if r["kind"] == kind]


@pytest.mark.parametrize("package", adapters.LIGHTNING)
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.filterwarnings("ignore:.*:lightning.fabric.utilities.warnings.PossibleUserWarning")
def test_lightning(package: str, tmp_path: Path) -> None:
    pl: Any = pytest.importorskip(package)
    module, losses = None, []

    def fit(callback: Any, steps: int, resume: str | None = None) -> list[dict]:
        nonlocal module
        assert isinstance(callback, pl.Callback)
        saving = pl.callbacks.ModelCheckpoint(tmp_path / "saved", every_n_train_steps=4, save_top_k=-1)
        trainer = lightning_trainer(pl, steps, [callback, saving], gradient_clip_val=0.05)
        data = torch.utils.data.DataLoader(batches(40), batch_size=None)
        module = lightning_module(pl, losses)
        trainer.fit(module, data, ckpt_path=resume, **({"weights_only": False} if resume else {}))
        return callback.ledger.records()

    def fresh() -> Any:
        return adapters.lightning_callback(lightning_symmetries, package=package, run_dir=tmp_path / "run", resume=True)

    rows = fit(fresh(), 6)
    assert_closed(rows, 6)
    assert exact_gradient(rows)
    assert [r["loss"] for r in recorded(tmp_path / "run")] == pytest.approx(losses)
    (saved,) = (tmp_path / "saved").glob("*step=4*")
    callback = fresh()
    fit(callback, 9, str(saved))
    assert [r["step"] for r in recorded(tmp_path / "run")] == list(range(9))
    fit(callback, 3)
    assert [r["step"] for r in recorded(tmp_path / "run")] == list(range(12)), "a checkpoint is restored only once"


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.filterwarnings("ignore:.*:lightning.fabric.utilities.warnings.PossibleUserWarning")
def test_lightning_loss_is_that_of_a_batch(tmp_path: Path) -> None:
    """Undivided by gradient accumulation, unscaled under mixed precision."""
    pl: Any = pytest.importorskip("lightning.pytorch")
    losses: list[float] = []

    def fit(name: str, **options: Any) -> list[float]:
        losses.clear()
        callback = adapters.lightning_callback(
            lightning_symmetries, package="lightning.pytorch", run_dir=tmp_path / name
        )
        trainer = lightning_trainer(pl, 2, [callback], enable_checkpointing=False, **options)
        trainer.fit(lightning_module(pl, losses), torch.utils.data.DataLoader(batches(8), batch_size=None))
        return [r["loss"] for r in recorded(tmp_path / name)]

    assert fit("accumulated", accumulate_grad_batches=4) == pytest.approx([losses[3], losses[7]])
    plugins = importlib.import_module("lightning.pytorch.plugins")
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    assert fit("scaled", plugins=plugins.MixedPrecision("16-mixed", "cpu", scaler)) == pytest.approx(losses)


def tiny_gpt2() -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=23, n_positions=8, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel(config).double()


def hf_trainer(folder: Path, callback: Any, **options: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    ids = torch.randint(23, (64, 8), generator=torch.Generator().manual_seed(0))
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=8,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **options,
    )
    data = [{"input_ids": row, "labels": row} for row in ids]
    return transformers.Trainer(tiny_gpt2(), arguments, train_dataset=data, callbacks=[callback])


@pytest.fixture(scope="module")
def gpt2_symmetries() -> Any:
    from noetherflow.discovery import find_symmetries

    return find_symmetries(tiny_gpt2().eval(), {"input_ids": torch.arange(16).reshape(2, 8), "use_cache": False})


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_hugging_face_trainer(gpt2_symmetries: Any, tmp_path: Path) -> None:
    def train(steps: int, resume: bool = False) -> Any:
        callback = adapters.trainer_callback(gpt2_symmetries, run_dir=tmp_path / "run", detail="symmetry")
        options = {"gradient_accumulation_steps": 2, "max_grad_norm": 0.1, "save_steps": 3, "logging_steps": 2}
        trainer = hf_trainer(tmp_path / "out", callback, max_steps=steps, **options)
        trainer.train(resume_from_checkpoint=resume or None)
        return callback.ledger, trainer.state.log_history

    ledger, _ = train(3)
    rows = ledger.records("symmetry")
    assert_closed(rows, 3)
    exact = {s.name for s in gpt2_symmetries if s.eps is None}
    assert len(exact) >= 3
    assert exact_gradient([r for r in rows if r["symmetry"] in exact]), "AdamW's gradient part, clipped, is invariant"
    assert max(abs(r["preconditioner"]) for r in rows) > 0
    _, told = train(5, resume=True)
    assert [r["step"] for r in recorded(tmp_path / "run")] == list(range(5))
    assert [r["event"] for r in recorded(tmp_path / "run", "event")] == ["resumed"]
    noted = {r["step"]: r["loss"] for r in recorded(tmp_path / "run") if "loss" in r}
    expected = {e["step"]: e["loss"] for e in told if "loss" in e and e["step"] < 5}
    assert noted == pytest.approx(expected)
    assert sorted(noted) == [2, 4]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("parts", [1, 3])
def test_every_loss_of_a_trainer_is_noted_and_training_is_the_same(
    gpt2_symmetries: Any, tmp_path: Path, parts: int
) -> None:
    """`logging_steps=1` makes the Trainer log each step's loss: the reference, exactly; weights bit for bit."""
    options = {"gradient_accumulation_steps": parts, "max_steps": 6, "logging_steps": 1, "save_strategy": "no"}
    plain = hf_trainer(tmp_path / "plain", adapters.trainer_callback(gpt2_symmetries), **options)
    plain.train()
    trainer = hf_trainer(tmp_path / "out", transformers_callback(), **options)
    callback = adapters.watch_trainer(trainer, gpt2_symmetries, run_dir=tmp_path / "run", every=2)
    trainer.train()
    logged = [e["loss"] for e in trainer.state.log_history if "loss" in e]
    rows = recorded(tmp_path / "run")
    assert [r["step"] for r in rows] == [0, 2, 4]
    assert [r["loss"] for r in rows] == pytest.approx([logged[i] for i in (0, 2, 4)], rel=1e-4)
    assert [r["losses"]["steps"] for r in rows[1:]] == [2, 2]
    assert [r["losses"]["mean"] for r in rows[1:]] == pytest.approx(
        [sum(logged[1:3]) / 2, sum(logged[3:5]) / 2], rel=1e-4
    )
    for a, b in zip(plain.model.parameters(), trainer.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert "were not noted" not in str(callback.ledger.diagnose())


def test_with_several_processes_the_losses_of_one_are_not_taken(gpt2_symmetries: Any, tmp_path: Path) -> None:
    trainer = hf_trainer(tmp_path, transformers_callback())
    before = trainer.training_step
    two = SimpleNamespace(args=SimpleNamespace(world_size=2), training_step=before, add_callback=lambda callback: None)
    adapters.watch_trainer(two, gpt2_symmetries)
    assert two.training_step == before


def transformers_callback() -> Any:
    """A callback that does nothing."""
    return pytest.importorskip("transformers").TrainerCallback()


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_hugging_face_resumes_from_elsewhere(gpt2_symmetries: Any, tmp_path: Path) -> None:
    """The checkpoint's folder is not told to callbacks; without its state the ledger goes on and says so."""

    def train(out: str, steps: int, run: str, **options: Any) -> list[int]:
        resume = options.pop("resume", None)
        callback = adapters.trainer_callback(gpt2_symmetries, run_dir=tmp_path / run, **options)
        hf_trainer(tmp_path / out, callback, max_steps=steps, save_steps=2, logging_steps=1).train(resume)
        return [r["step"] for r in recorded(tmp_path / run)]

    assert train("first", 3, "run") == [0, 1, 2]
    checkpoint = str(tmp_path / "first" / "checkpoint-2")
    assert train("second", 4, "run", resume=checkpoint, resume_from=checkpoint) == [0, 1, 2, 3]
    assert [r["dropped"] for r in recorded(tmp_path / "run", "event")] == [1]
    with pytest.warns(UserWarning, match=r"resumes at step 2, but .*third.* is missing.*resume_from="):
        assert train("third", 4, "new", resume=checkpoint) == [0, 1]


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_hugging_face_with_a_gradient_scaler(gpt2_symmetries: Any, tmp_path: Path) -> None:
    """Without clipping nothing unscales before `on_pre_optimizer_step`; a skipped step is an event and no row."""
    callback = adapters.trainer_callback(gpt2_symmetries, run_dir=tmp_path / "run")
    trainer = hf_trainer(tmp_path / "out", callback, max_steps=4, max_grad_norm=0.0, save_strategy="no", optim="sgd")
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    backwards: list[int] = []

    def overflow(gradient: torch.Tensor) -> torch.Tensor:
        backwards.append(len(backwards))
        return gradient * (math.inf if len(backwards) == 2 else 1.0)

    trainer.model.transformer.h[0].mlp.c_fc.bias.register_hook(overflow)
    trainer.train()
    assert len(backwards) == 4
    assert_closed(callback.ledger.records(), 3)
    assert [(e["step"], e["event"]) for e in callback.ledger.events] == [(1, "skipped")]


def logged(sink: Any, each: Any = lambda step, loss: None, **options: Any) -> list[dict]:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.01)
    ledger = Ledger(model, optimizer, mlp_symmetries(model), sinks=[sink], estimate_every=2, **options).attach()
    for step, batch in enumerate(batches(5)):
        optimizer.zero_grad()
        loss = backward(model, batch)
        ledger.note(loss)
        optimizer.step()
        each(step, float(loss.detach()))
    ledger.close()
    return ledger.records()


def resumed(sinks_of: Any, run_dir: Path) -> None:
    """Five steps, a checkpoint after the third of them, from which another ledger goes on for four."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def train(ledger: Ledger, steps: int, keep: int = 0) -> Any:
        kept = None
        for step, batch in enumerate(batches(steps)):
            kept = ledger.state_dict() if step == keep else kept
            optimizer.zero_grad()
            backward(model, batch)
            optimizer.step()
        ledger.close()
        return kept

    def watch() -> Ledger:
        return Ledger(model, optimizer, mlp_symmetries(model), run_dir=run_dir, sinks=[sinks_of()], every=1).attach()

    saved = train(watch(), 5, keep=3)
    ledger = watch()
    ledger.load_state_dict(saved)
    train(ledger, 4)


def csv_steps(path: Path) -> list[int]:
    with open(path, newline="") as file:
        return [int(row["step"]) for row in csv.DictReader(file) if row["family"] == "linear"]


def test_csv(tmp_path: Path) -> None:
    rows = logged(sinks.CSVSink(tmp_path / "log.csv"))
    with open(tmp_path / "log.csv", newline="") as file:
        found = list(csv.DictReader(file))
    assert len(found) == len(rows) == 10
    for a, b in zip(found, rows, strict=True):
        assert (int(a["step"]), a["family"]) == (b["step"], b["family"])
        assert float(a["charge"]) == b["charge"]
        assert float(a["loss"]) > 0


def test_csv_after_a_resume_and_a_crash(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    resumed(lambda: sinks.CSVSink(path), tmp_path / "run")
    assert csv_steps(path) == list(range(7))
    with open(path, "ab") as file:
        file.write(b"7,lin")
    sink = sinks.CSVSink(path)
    fields = {f: [0.0] for f in FIELDS}
    sink({"kind": "step", "step": 7, "lr": 0.1, "families": ["linear"], "symmetries": [], "family": fields})
    sink.close()
    assert csv_steps(path) == list(range(8))
    sinks.CSVSink(tmp_path / "new.csv").rewind(3)
    assert not (tmp_path / "new.csv").exists()


def ddp_logged(rank: int, folder: Path) -> None:
    model = nn.parallel.DistributedDataParallel(mlp())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sink = sinks.CSVSink(folder / "log.csv")
    with Ledger(model, optimizer, mlp_symmetries(model.module), sinks=[sink], every=1):
        for x, y in batches(3):
            optimizer.zero_grad()
            backward(model, (x[rank::2], y[rank::2]))
            optimizer.step()


@pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="needs torch with gloo")
def test_only_the_first_process_calls_the_sinks(tmp_path: Path) -> None:
    run_ranks(ddp_logged, tmp_path)
    assert csv_steps(tmp_path / "log.csv") == [0, 1, 2]
    assert (tmp_path / "log.csv").read_text().count("step,family") == 1


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
    resumed(lambda: sinks.TensorBoardSink(tmp_path / "resumed"), tmp_path / "run")
    events = accumulator.EventAccumulator(str(tmp_path / "resumed"))
    events.Reload()
    assert [e.step for e in events.Scalars("noether/family/linear/charge")] == list(range(7))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("commit", [False, True])
def test_wandb_offline(commit: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without `commit` no row takes W&B's own step away from the metrics that the user logs with `step=`."""
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run = wandb.init(mode="offline", dir=str(tmp_path), project="test", settings=wandb.Settings(console="off"))
    own = (lambda step, loss: None) if commit else (lambda step, loss: run.log({"mine": loss, "k": step}, step=step))
    rows = logged(sinks.WandbSink(run, commit=commit), own, flush_every=2)
    steps = run.step
    run.log({"end": True})
    summary = dict(run.summary)
    run.finish()
    assert summary["noether/family/linear/charge"] == pytest.approx(rows[-1]["charge"])
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    assert steps == (8 if commit else 4), "five steps and three estimates, or the five points of the user"
    assert commit or summary["k"] == 4


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


def test_sinks_take_a_prefix() -> None:
    class Run:
        def __init__(self) -> None:
            self.logged: list[dict[str, Any]] = []
            self.metrics: list[str] = []

        def define_metric(self, name: str, step_metric: str) -> None:
            self.metrics += [name, step_metric]

        def log(self, values: dict[str, Any], commit: bool) -> None:
            self.logged.append(values)

    run = Run()
    logged(sinks.WandbSink(run, prefix="muon"))
    assert run.metrics == ["muon/*", "muon/step"]
    assert "muon/family/linear/charge" in run.logged[0]
    assert not any(name.startswith("noether") for row in run.logged for name in row)


def test_scalars_leave_out_what_is_not_finite() -> None:
    row = {"families": ["a"], "symmetries": ["s"], "family": {"charge": [1.5]}, "symmetry": {"steps": [math.nan]}}
    assert sinks.scalars(row) == {"noether/family/a/charge": 1.5}


def test_callbacks_of_two_optimisers_do_not_share_a_key_in_lightnings_checkpoints() -> None:
    pytest.importorskip("lightning.pytorch")
    found = [adapters.lightning_callback(mlp_symmetries, optimizer=k).state_key for k in (0, 1)]
    assert len(set(found)) == 2
