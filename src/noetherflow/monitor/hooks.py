"""The hooks by which an optimiser's own step calls a ledger."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from noetherflow.errors import DataError
from noetherflow.monitor.joint import JointOptimizer
from noetherflow.monitor.recorder import StepRecorder
from noetherflow.monitor.watching import WeightStamps, untraced, watch_closure

BYPASSED = (
    "the weights were trained, but the step of the watched optimiser was never called: give the ledger the "
    "optimiser whose step() moves them, for SAM in two steps its base_optimizer"
)
"""What a ledger notes whose optimiser never stepped."""


class StepHooks:
    """The hooks of one ledger on its optimiser. One that counts steps stays until `release`; `attach` adds those that
    measure before and after each step, `detach` takes them off.

    Args:
        optimizer: the watched optimiser.
        recorder: what measures its steps.
        begin: called before each step, ahead of the recorder reading its gradients.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer | JointOptimizer, recorder: StepRecorder, begin: Callable[[], None]
    ) -> None:
        self._optimizer, self._recorder, self._begin = optimizer, recorder, begin
        self._counting: list[Any] = [optimizer.register_step_post_hook(untraced(recorder.stepped))]
        self._measuring: list[Any] = []
        self._stamps: WeightStamps | None = None
        self._attached = -1

    @property
    def released(self) -> bool:
        """Whether the hooks are off for good."""
        return not self._counting

    def attach(self) -> None:
        """Measure before and after every step from here on. Raises DataError after `release`."""
        if self.released:
            raise DataError("this ledger is closed; make a new one (with its run_dir and resume=True it goes on there)")
        if not self._measuring:
            self._measuring = [
                self._optimizer.register_step_pre_hook(untraced(self._before)),
                self._optimizer.register_step_post_hook(untraced(lambda *_: self._recorder.after(None))),
            ]
            self._stamps = WeightStamps(self._recorder.meter.watched.values())
            self._attached = self._recorder.step

    def _before(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A closure makes the gradients within the step; a rule that needs no gradients measures before it moves."""
        early = self._recorder.how.rule.keeps_copy
        watched = watch_closure(args, kwargs, self._recorder.read_gradients if early else self._measure)
        if early or watched is None:
            self._begin()
        if watched is None:
            self._recorder.read_gradients()
        return watched

    def _measure(self) -> None:
        self._begin()
        self._recorder.read_gradients()

    def notice_bypass(self) -> None:
        """Note it where a training moves the weights and never calls the step of the watched optimiser."""
        unseen = self._stamps is not None and self._recorder.step == self._attached and self._stamps.trained()
        if self._recorder.journal.begins("bypassed", unseen):
            self._recorder.event("bypassed", note=BYPASSED)

    def detach(self) -> None:
        """Stop measuring; `attach` starts again."""
        if isinstance(self._optimizer, JointOptimizer):
            self._optimizer.finish()
        for handle in self._measuring:
            handle.remove()
        self._measuring = []
        self._recorder.meter.forget()
        self._recorder.pace.pause()

    def release(self) -> None:
        """Take all hooks off for good."""
        self.detach()
        for handle in self._counting:
            handle.remove()
        self._counting = []
