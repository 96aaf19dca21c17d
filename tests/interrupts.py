"""Ctrl-C and SIGKILL at random instants: `make interrupts`, or `python tests/interrupts.py ctrl-c 0 20`.

Four programs, the instants drawn at random by the seed. `ctrl-c` and `kill` interrupt a training with a ledger,
`ctrl-c-file` and `kill-file` the balancing of a checkpoint file. After a Ctrl-C the training goes on, after a kill it
resumes from its last checkpoint; its log must then hold every step once, with the numbers of an uninterrupted run. The
file that is balanced must stay as it is, its target be absent or whole, and nothing else lie beside them.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

import noetherflow as nf
from equilibrium_cases import mlp as three_layers
from noetherflow.balance.checkpoint import balance_checkpoint
from noetherflow.monitor.ledger import Ledger
from noetherflow.monitor.log import read_log
from test_ledger import backward, batches, mlp, mlp_symmetries

STEPS = 40
SAVED_EVERY = 10


class Bomb:
    """Sends this process SIGINT at the n-th line that the library executes in functions called from now on."""

    def __init__(self, after: int) -> None:
        self.left, self.went_off = after, False

    def __call__(self, frame: Any, event: str, argument: Any) -> Any:
        return self.line if f"{os.sep}noetherflow{os.sep}" in frame.f_code.co_filename else None

    def line(self, frame: Any, event: str, argument: Any) -> Any:
        self.left -= 1
        if self.left == 0:
            sys.settrace(None)
            self.went_off = True
            signal.raise_signal(signal.SIGINT)
        return self.line


class Run:
    """A small training with a ledger, which can go on after an interruption or from its last checkpoint."""

    def __init__(self, folder: Path) -> None:
        self.checkpoint = folder / "checkpoint.pt"
        self.model = mlp()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05, momentum=0.9)
        self.ledger = Ledger(
            self.model,
            self.optimizer,
            mlp_symmetries(self.model),
            run_dir=folder,
            every=1,
            flush_every=4,
            estimate_every=3,
        )
        if self.checkpoint.exists():
            saved = torch.load(self.checkpoint)
            for part, state in zip(self._parts, saved, strict=True):
                part.load_state_dict(state)
        self.ledger.attach()

    @property
    def _parts(self) -> tuple[Any, ...]:
        return self.model, self.optimizer, self.ledger

    def step(self, batch: Any) -> None:
        self.optimizer.zero_grad()
        backward(self.model, batch)
        self.optimizer.step()

    def save(self) -> None:
        new = self.checkpoint.with_suffix(".new")
        torch.save([part.state_dict() for part in self._parts], new)
        os.replace(new, self.checkpoint)

    def to_the_end(self) -> None:
        for k, batch in enumerate(batches(STEPS)):
            if k >= self.ledger.step:
                self.step(batch)
                if (k + 1) % SAVED_EVERY == 0:
                    self.save()
        self.ledger.close()


def rows_of(folder: Path) -> tuple[list[int], np.ndarray]:
    """The recorded steps in the log's order, and the charges and their changes."""
    rows = [r for r in read_log(folder) if r["kind"] == "step"]
    return [r["step"] for r in rows], np.array([[r["family"][f] for f in ("charge", "change")] for r in rows])


@cache
def uninterrupted_run() -> np.ndarray:
    with tempfile.TemporaryDirectory() as folder:
        Run(Path(folder)).to_the_end()
        steps, numbers = rows_of(Path(folder))
        assert steps == list(range(STEPS))
        return numbers


def difference(folder: Path) -> str:
    """How the log differs from that of the uninterrupted run; "" where it does not."""
    steps, numbers = rows_of(folder)
    if steps != list(range(STEPS)):
        lost, twice = sorted(set(range(STEPS)) - set(steps)), sorted({s for s in steps if steps.count(s) > 1})
        return f"lost {lost}, twice {twice}, in all {len(steps)}"
    off = np.abs(numbers - uninterrupted_run()).max()
    return "" if off < 1e-9 else f"numbers differ by {off:.1e}"


@dataclass(frozen=True)
class Outcome:
    """What is wrong, "" for nothing, and how often it was interrupted."""

    fault: str
    times: int


def ctrl_c(seed: int) -> Outcome:
    """A training that is interrupted again and again at random lines of the library, and goes on each time."""
    rng, times = random.Random(seed), 0
    with tempfile.TemporaryDirectory() as name:
        run = Run(Path(name))
        weight = next(run.model.parameters())
        for batch in batches(STEPS):
            before, tries = weight.detach().clone(), 0
            while torch.equal(weight, before):
                tries += 1
                sys.settrace(Bomb(rng.randrange(1, 8000)) if tries < 3 else None)
                try:
                    run.step(batch)
                except KeyboardInterrupt:
                    times += 1
                finally:
                    sys.settrace(None)
        run.ledger.close()
        return Outcome(difference(Path(name)), times)


def in_a_fork(work: Callable[[], None], seconds: float) -> bool:
    """Run in a child that is killed after so many seconds; whether it was."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    if not os.WIFSIGNALED(status) and os.WEXITSTATUS(status):
        raise AssertionError("the child failed by itself")
    return os.WIFSIGNALED(status)


@cache
def seconds_of(work: Callable[[], Any]) -> float:
    """How long a run without interruption takes; the second one, as the first loads modules."""
    work()
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _train_somewhere() -> None:
    with tempfile.TemporaryDirectory() as name:
        Run(Path(name)).to_the_end()


def kill(seed: int) -> Outcome:
    """A training that is killed twice and resumes from its last checkpoint."""
    rng, longest = random.Random(seed), seconds_of(_train_somewhere)
    with tempfile.TemporaryDirectory() as name:
        folder, times = Path(name), 0
        for _ in range(2):
            times += in_a_fork(lambda: Run(folder).to_the_end(), rng.uniform(0, longest))
            if not (folder / "checkpoint.pt").exists():
                (folder / "ledger.jsonl").unlink(missing_ok=True)
        Run(folder).to_the_end()
        return Outcome(difference(folder), times)


@cache
def problem() -> tuple[Any, Any]:
    found = three_layers((16, 60, 50, 3), scales=(4, 0.5, 1))
    return found, nf.noise_equilibrium(found.model, found.syms, None, objective="norm")


class Files:
    """A checkpoint file and the folder that it is balanced in."""

    def __init__(self, name: str, seed: int) -> None:
        self.found, self.eq = problem()
        suffix = (".safetensors", ".pt")[seed % 2]
        self.in_place = seed % 4 > 1
        self.source = Path(name) / f"in{suffix}"
        self.target = self.source if self.in_place else Path(name) / f"out{suffix}"
        state = {n: p.detach().clone() for n, p in self.found.model.state_dict().items()}
        save_file(state, self.source) if suffix == ".safetensors" else torch.save(state, self.source)
        self.before = self.source.read_bytes()

    def work(self) -> None:
        balance_checkpoint(self.source, self.target, self.found.model, self.eq, unchecked=True)

    def fault(self, whole: bytes, litter: bool) -> str:
        """What is wrong after an interruption; `litter`: a killed writer's staging folder may be there."""
        now = self.target.read_bytes() if self.target.exists() else None
        if now not in ((self.before, whole) if self.in_place else (None, whole)):
            return "the target is neither as it was nor whole"
        if not self.in_place and self.source.read_bytes() != self.before:
            return "the source has changed"
        beside = {p.name for p in self.source.parent.iterdir()} - {self.source.name, self.target.name}
        left = {n for n in beside if not (litter and n.startswith(f".{self.target.name}.partial-"))}
        return f"left behind: {sorted(left)}" if left else ""


@cache
def balanced_bytes(kind: int) -> bytes:
    with tempfile.TemporaryDirectory() as name:
        files = Files(name, kind)
        files.work()
        return files.target.read_bytes()


def _balance_somewhere() -> None:
    with tempfile.TemporaryDirectory() as name:
        Files(name, 0).work()


@cache
def lines_of_a_balance(kind: int) -> int:
    """How many lines of the library a balance executes."""
    bomb = Bomb(1 << 40)
    with tempfile.TemporaryDirectory() as name:
        files = Files(name, kind)
        sys.settrace(bomb)
        try:
            files.work()
        finally:
            sys.settrace(None)
    return (1 << 40) - bomb.left


def ctrl_c_file(seed: int) -> Outcome:
    """Balancing a file, interrupted at a random line of the library."""
    whole = balanced_bytes(seed % 4)
    bomb = Bomb(random.Random(seed).randrange(1, lines_of_a_balance(seed % 4)))
    with tempfile.TemporaryDirectory() as name:
        files = Files(name, seed)
        sys.settrace(bomb)
        try:
            files.work()
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(None)
        return Outcome(files.fault(whole, litter=False), int(bomb.went_off))


def kill_file(seed: int) -> Outcome:
    """Balancing a file, killed at a random instant, and once more to the end: that removes what was left."""
    whole, longest = balanced_bytes(seed % 4), seconds_of(_balance_somewhere)
    with tempfile.TemporaryDirectory() as name:
        files = Files(name, seed)
        times = int(in_a_fork(files.work, random.Random(seed).uniform(0, 1.2 * longest)))
        wrong = files.fault(whole, litter=True)
        if wrong:
            return Outcome(wrong, times)
        files.source.write_bytes(files.before)
        files.work()
        return Outcome(files.fault(whole, litter=False), times)


KINDS: dict[str, Callable[[int], Outcome]] = {
    "ctrl-c": ctrl_c,
    "kill": kill,
    "ctrl-c-file": ctrl_c_file,
    "kill-file": kill_file,
}


def main(kind: str, first: int, last: int) -> int:
    """Try a range of seeds of one kind, printing what is wrong and how far it is."""
    start, bad, times = time.monotonic(), 0, 0
    for seed in range(first, last):
        found = KINDS[kind](seed)
        bad, times = bad + bool(found.fault), times + found.times
        if found.fault:
            print(f"{kind} {seed}: {found.fault}", flush=True)
        if (seed + 1) % 10 == 0 or seed + 1 == last:
            took = f"{time.monotonic() - start:.0f} s"
            print(f"{kind}: {seed + 1 - first} runs, {times} interruptions, {bad} faults, {took}", flush=True)
    return bad


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)
    sys.exit(1 if main(sys.argv[1], *(int(a) for a in sys.argv[2:4])) else 0)
