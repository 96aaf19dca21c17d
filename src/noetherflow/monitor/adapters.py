"""The ledger inside training frameworks: accelerate, Lightning (both import names), the Hugging Face Trainer.

A plain loop needs no adapter: `Ledger(model, optimizer, syms).attach()`.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from noetherflow.core.files import replacing
from noetherflow.errors import MissingExtraError, require
from noetherflow.monitor.ledger import Ledger
from noetherflow.symmetry.symmetry_set import SymmetrySet

Symmetries = SymmetrySet | Callable[[nn.Module], SymmetrySet]
LIGHTNING = ("lightning.pytorch", "pytorch_lightning")
STATE_NAME = "noetherflow_ledger.pt"


def _resolve(syms: Symmetries, model: nn.Module) -> SymmetrySet:
    return syms if isinstance(syms, SymmetrySet) else syms(model)


def watch_accelerate(accelerator: Any, model: nn.Module, optimizer: Any, syms: Symmetries, **options: Any) -> Ledger:
    """An attached ledger for a model and optimiser that `accelerator.prepare` returned.

    It is registered for `accelerator.save_state` and `load_state`. `options` go to `Ledger`.
    """
    plain = accelerator.unwrap_model(model)
    ledger = Ledger(plain, optimizer, _resolve(syms, plain), **options).attach()
    accelerator.register_for_checkpointing(ledger)
    return ledger


def lightning_callback(syms: Symmetries, *, package: str | None = None, optimizer: int = 0, **options: Any) -> Any:
    """A Lightning callback; its `.ledger` exists once fitting has started. State goes into Lightning's checkpoints.

    The ledger hooks the optimiser itself, inside the closure that Lightning passes to its step:
    `on_before_optimizer_step` fires before Lightning clips the gradients. Several optimisers (a GAN, Muon beside AdamW)
    take one callback each; every callback's state is kept under a key of its own.

    Args:
        syms: the symmetries, or a function that finds them in the module.
        package: `lightning.pytorch` or `pytorch_lightning`, by default the one already imported.
        optimizer: the index of the watched one.
        options: passed on to `Ledger`.

    Raises:
        MissingExtraError: neither package is installed.
    """
    names = [package] if package else [n for n in LIGHTNING if n in sys.modules] or list(LIGHTNING)
    base: Any = _first(names).Callback

    class LightningLedger(_LightningHooks, base):
        """Keeps a ledger of one optimiser's steps."""

    return LightningLedger(syms, optimizer, options)


class _LightningHooks:
    """What Lightning calls, apart from its base class, which is imported late."""

    def __init__(self, syms: Symmetries, optimizer: int, options: Mapping[str, Any]) -> None:
        self.ledger: Ledger | None = None
        self._syms, self._optimizer, self._options = syms, optimizer, options
        self._restored: dict[str, Any] | None = None

    @property
    def state_key(self) -> str:
        """Under which the state lies in Lightning's checkpoints: one key per optimiser."""
        name = type(self).__qualname__
        return f"{name}[optimizer={self._optimizer}]" if self._optimizer else name

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        optimizer = trainer.optimizers[self._optimizer]
        options = {"notes": _lightning_notes(trainer), **self._options}
        if self._restored is not None:
            options = {"resume": True, **options}
        self.ledger = Ledger(pl_module, optimizer, _resolve(self._syms, pl_module), **options)
        if self._restored is not None:
            self.ledger.load_state_dict(self._restored)
            self._restored = None
        self.ledger.attach()

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Any) -> None:
        if self.ledger is not None:
            self.ledger.note(_batch_loss(trainer, pl_module, loss))

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        if self.ledger is not None:
            self.ledger.close()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        if self.ledger is not None:
            self.ledger.__exit__(type(exception), exception, exception.__traceback__)

    def state_dict(self) -> dict[str, Any]:
        if self.ledger is None:
            return {}
        self.ledger.flush()
        return self.ledger.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = dict(state_dict) or None


def _lightning_notes(trainer: Any) -> dict[str, Any]:
    """The schedules and the clipping of a Lightning run, for the log's header."""
    schedules = [type(c.scheduler).__name__ for c in getattr(trainer, "lr_scheduler_configs", None) or ()]
    clipping = {"value": trainer.gradient_clip_val, "algorithm": trainer.gradient_clip_algorithm}
    return {
        "schedule": ", ".join(schedules),
        "clipping": {k: None if v is None else getattr(v, "value", v) for k, v in clipping.items()},
    }


def _trainer_notes(args: Any, total: int) -> dict[str, Any]:
    """The schedule and the clipping of a Trainer's run of `total` steps, for the log's header."""
    schedule = getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)
    return {
        "schedule": str(schedule),
        "warmup_steps": int(args.get_warmup_steps(total)),
        "total_steps": total,
        "clipping": {"norm": args.max_grad_norm},
    }


def _batch_loss(trainer: Any, module: Any, backpropagated: torch.Tensor) -> torch.Tensor:
    """`loss = backpropagated * accumulate_grad_batches / scale`: Lightning divides and scales before `backward`.

    Under manual optimisation it does not divide.
    """
    parts = trainer.accumulate_grad_batches if module.automatic_optimization else 1
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return backpropagated.detach() * (parts if scaler is None else parts / scaler.get_scale())


def _first(names: list[str]) -> Any:
    for name in names:
        try:
            return require(name, "lightning")
        except MissingExtraError:
            continue
    raise MissingExtraError(f"none of {names} is installed; install it with: pip install 'noetherflow[lightning]'")


def watch_trainer(trainer: Any, syms: Symmetries, **options: Any) -> Any:
    """Give a `transformers.Trainer` the callback of `trainer_callback` and note the loss of every step.

    Callbacks are not told losses. Here the Trainer's `training_step` passes on what it returned, the mean loss of one
    micro-batch as a tensor on its device; the sum over the micro-batches of a step is noted. Nothing waits for the
    device, and training goes as without it. With several processes, each of which knows its own loss only, the rows
    keep what the Trainer logs.

    Args:
        trainer: before `trainer.train()`.
        syms: as in `trainer_callback`.
        options: as in `trainer_callback`.

    Returns:
        The callback; `.ledger` exists once training has begun.

    Raises:
        MissingExtraError: transformers is not installed.

    Example:
        ```
        callback = watch_trainer(trainer, syms, run_dir="run")
        trainer.train()
        print(callback.ledger.diagnose())
        ```
    """
    callback = trainer_callback(syms, **options)
    trainer.add_callback(callback)
    if trainer.args.world_size == 1:
        trainer.training_step = partial(callback.step_noted, trainer.training_step)
    return callback


def trainer_callback(syms: Symmetries, *, resume_from: str | Path | None = None, **options: Any) -> Any:
    """A callback for `transformers.Trainer`; its `.ledger` exists once training has begun.

    Its state is saved beside every checkpoint (`noetherflow_ledger.pt`) and read when training resumes from one. The
    ledger of a training that resumes without such a state warns and counts on from its own log. The loss of a row is
    what the Trainer logged last, its mean over the `logging_steps` steps before; `watch_trainer` notes every step's.

    Args:
        syms: the symmetries, or a function that finds them in the model.
        resume_from: the checkpoint's folder, when it does not lie in the Trainer's `output_dir`.
        options: passed on to `Ledger`.

    Raises:
        MissingExtraError: transformers is not installed.
    """
    transformers: Any = require("transformers", "hf")
    base: Any = transformers.TrainerCallback

    class TrainerLedger(_TrainerHooks, base):
        """Keeps a ledger of the trainer's optimiser."""

    return TrainerLedger(syms, resume_from, options)


class _TrainerHooks:
    """What the Trainer calls, apart from its base class, which is imported late."""

    def __init__(self, syms: Symmetries, resume_from: str | Path | None, options: Mapping[str, Any]) -> None:
        self.ledger: Ledger | None = None
        self._syms, self._resume_from, self._options = syms, resume_from, options
        self._before: tuple[int, int] = (0, 0)
        self._loss: float | None = None
        self._under_way: torch.Tensor | None = None

    def step_noted(self, training_step: Callable[..., torch.Tensor], *args: Any, **kwargs: Any) -> torch.Tensor:
        """The Trainer's `training_step`, its loss added to that of the step under way."""
        loss = training_step(*args, **kwargs)
        own = loss.detach()
        self._under_way = own.clone() if self._under_way is None else self._under_way + own
        return loss

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.ledger is not None:
            self.ledger.close()
        self._under_way = None
        model = kwargs["model"]
        options = {"notes": _trainer_notes(args, int(state.max_steps)), **self._options}
        if state.global_step:
            options = {"resume": True, **options}
        self.ledger = Ledger(model, kwargs["optimizer"], _resolve(self._syms, model), **options)
        if state.global_step:
            folder = Path(self._resume_from or _checkpoint(args, state))
            _restore(self.ledger, folder / STATE_NAME, state.global_step)
        self.ledger.attach()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.ledger is None:
            return
        self._before = _progress(self.ledger)
        if self._under_way is not None:
            self.ledger.note(self._under_way)
            self._under_way = None
        elif self._loss is not None and self.ledger.step % self.ledger.every == 0:
            self.ledger.note(self._loss)
            self._loss = None

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.ledger is not None and _progress(self.ledger) == self._before:
            self.ledger.before_step()
            self.ledger.after_step()

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._loss = kwargs["logs"].get("loss", self._loss)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.ledger is not None:
            self.ledger.flush()
            saved = self.ledger.state_dict()
            if state.is_world_process_zero:
                with replacing(_checkpoint(args, state) / STATE_NAME, durable=True) as scratch:
                    torch.save(saved, scratch)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.ledger is not None:
            self.ledger.close()


def _progress(ledger: Ledger) -> tuple[int, int]:
    """What changes when the optimiser's hooks saw a step; a gradient scaler that skips one does not call them."""
    return ledger.step, len(ledger.events)


def _checkpoint(args: Any, state: Any) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"


def _restore(ledger: Ledger, path: Path, step: int) -> None:
    if path.exists():
        ledger.load_state_dict(torch.load(path, weights_only=True))
        return
    warnings.warn(
        f"training resumes at step {step}, but {path} is missing: the ledger counts on from step {ledger.step}; "
        "give the checkpoint's folder as trainer_callback(..., resume_from=...)",
        stacklevel=2,
    )
