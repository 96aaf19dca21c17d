"""Does balancing help LoRA? A small GPT-2 on the texts of `pydoc_data.topics`, told in docs/lora.md.

python examples/lora_balance.py [--quick] [--work runs/lora_balance]
Finished points are kept in WORK/points.jsonl, so a run can be stopped and started again; the figure goes to
docs/figures/lora_balance.png (with --quick to WORK).
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import pydoc_data.topics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import noetherflow as nf
from noetherflow.report import style

FIGURE = Path(__file__).parent.parent / "docs" / "figures" / "lora_balance.png"
CONTEXT, BATCH, WARM_LR, WARM_STEPS, SKEW = 64, 8, 0.25, 40, 10.0
DIVERGED = 1.0  # nats per character above the base model
VARIANTS = ("none", "once", "every", "skewed")
OPTIMISERS = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}


@dataclass(frozen=True)
class Plan:
    """`lrs`: the learning rates by optimiser; `skewed_lrs`: those for the skewed start, which needs smaller ones."""

    pretrain: int
    steps: int
    every: int
    seeds: int
    lrs: dict[str, tuple[float, ...]]
    skewed_lrs: dict[str, tuple[float, ...]]


FULL = Plan(
    pretrain=800,
    steps=200,
    every=50,
    seeds=6,
    lrs={
        "sgd": tuple(0.25 * 2 ** (k / 4) for k in (0, 2, 4, 5, 6, 7, 8, 9, 10, 12)),
        "adamw": tuple(5e-4 * 2.0**k for k in range(8)),
    },
    skewed_lrs={"sgd": tuple(0.00125 * 2.0**k for k in range(7)), "adamw": tuple(1.25e-4 * 2.0**k for k in range(7))},
)
QUICK = Plan(
    pretrain=100,
    steps=20,
    every=10,
    seeds=2,
    lrs={"sgd": (0.25, 0.5), "adamw": (1e-3, 4e-3)},
    skewed_lrs={"sgd": (0.0025, 0.005), "adamw": (2.5e-4, 1e-3)},
)


@dataclass(frozen=True)
class Texts:
    """Character ids: the first 60 topics for pretraining, the others for fine-tuning, every tenth chunk held out."""

    vocabulary: int
    pretrain: Tensor
    tune: Tensor
    held_out: Tensor

    @classmethod
    def load(cls) -> Texts:
        topics = [pydoc_data.topics.topics[k] for k in sorted(pydoc_data.topics.topics)]
        alphabet = {c: i for i, c in enumerate(sorted(set("".join(topics))))}

        def chunks(texts: list[str]) -> Tensor:
            ids = torch.tensor([alphabet[c] for c in "".join(texts)])
            return ids[: len(ids) // CONTEXT * CONTEXT].view(-1, CONTEXT)

        tune = chunks(topics[60:])
        held = torch.arange(len(tune)) % 10 == 9
        return cls(len(alphabet), chunks(topics[:60]), tune[~held], tune[held])


def batches(chunks: Tensor, size: int, seed: int) -> Iterator[Tensor]:
    rng = torch.Generator().manual_seed(seed)
    while True:
        yield chunks[torch.randint(len(chunks), (size,), generator=rng)]


def losses(model: nn.Module, ids: Tensor) -> Tensor:
    """Cross entropy per sequence, nats per character."""
    logits = model(input_ids=ids).logits[:, :-1]
    return nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none").mean(1)


def pretrained(texts: Texts, plan: Plan, work: Path) -> nn.Module:
    import transformers

    torch.manual_seed(0)
    sizes = {"vocab_size": texts.vocabulary, "n_positions": CONTEXT, "n_embd": 64, "n_layer": 2, "n_head": 4}
    off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "use_cache": False}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **off, bos_token_id=0, eos_token_id=0))
    path = work / f"base-{plan.pretrain}.pt"
    if path.exists():
        model.load_state_dict(torch.load(path))
        return model
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, plan.pretrain)
    for _, batch in zip(range(plan.pretrain), batches(texts.pretrain, 16, 0), strict=False):
        optimizer.zero_grad()
        losses(model, batch).mean().backward()
        optimizer.step()
        schedule.step()
    torch.save(model.state_dict(), path)
    return model


def adapted(base: nn.Module, seed: int) -> nn.Module:
    """LoRA of rank 4 on every attention and MLP projection."""
    import peft

    torch.manual_seed(seed)
    targets = ["c_attn", "c_proj", "c_fc"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets, fan_in_fan_out=True)
        return peft.get_peft_model(copy.deepcopy(base), config)


@dataclass(frozen=True)
class Point:
    """One run. `variant`: never balanced, balanced `once` at the start or `every` so many steps; `skewed`: never
    balanced, started at `(SKEW * A, B / SKEW)`."""

    optimiser: str
    variant: str
    lr: float
    seed: int


def points(plan: Plan) -> list[Point]:
    return [
        Point(optimiser, variant, lr, seed)
        for seed in range(plan.seeds)
        for optimiser in OPTIMISERS
        for variant in VARIANTS
        for lr in (plan.skewed_lrs if variant == "skewed" else plan.lrs)[optimiser]
    ]


class Study:
    """All runs start from one base model and, per seed, from one adapter warmed up by `WARM_STEPS` steps of SGD."""

    def __init__(self, plan: Plan, work: Path) -> None:
        self.plan, self.texts = plan, Texts.load()
        self.base = pretrained(self.texts, plan, work)
        self.model = adapted(self.base, 0)
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.syms = nf.find_symmetries(self.model, {"input_ids": self.texts.tune[:2]})
        self.limit = self.held_out() + DIVERGED
        self.starts: dict[int, tuple[list[Tensor], float]] = {}

    def held_out(self) -> float:
        with torch.no_grad():
            return float(losses(self.model, self.texts.held_out).mean())

    def train(self, optimizer: torch.optim.Optimizer, steps: int, seed: int) -> Iterator[int]:
        """Yields after each step; ends early when the loss of a batch is `DIVERGED` above the base model's."""
        for step, batch in zip(range(1, steps + 1), batches(self.texts.tune, BATCH, seed), strict=False):
            optimizer.zero_grad()
            loss = losses(self.model, batch).mean()
            if not loss < self.limit:
                return
            loss.backward()
            optimizer.step()
            yield step

    def start(self, seed: int) -> float:
        """Set the warmed-up adapter of a seed; returns its held-out loss."""
        if seed not in self.starts:
            fresh = adapted(self.base, seed)
            _copy(self.trained, [p for p in fresh.parameters() if p.requires_grad])
            for _ in self.train(torch.optim.SGD(self.trained, WARM_LR), WARM_STEPS, 1000 + seed):
                pass
            self.starts[seed] = [p.detach().clone() for p in self.trained], self.held_out()
        values, loss = self.starts[seed]
        _copy(self.trained, values)
        return loss

    def skew(self) -> None:
        for s in self.syms:
            s.act_(nf.tensors_of(self.model), SKEW * s.identity())

    def probe(self, seed: int) -> Tensor:
        return next(batches(self.texts.tune, 4 * BATCH, 2000 + seed))

    def schedule(self, lr: float, seed: int, optimizer: torch.optim.Optimizer | None = None) -> nf.BalanceSchedule:
        options = {"sgd": nf.SGDConfig(lr, BATCH), "optimizer": optimizer, "objective": "noise"}
        return nf.BalanceSchedule(self.model, self.syms, losses, [self.probe(seed)], self.plan.every, **options)

    def sharpness(self, seed: int) -> dict[str, Any]:
        """`Tr E[g g^T]` and the largest Hessian eigenvalue where runs of a seed start."""
        out: dict[str, Any] = {"seed": seed}
        for state in ("start", "balanced", "skewed"):
            self.start(seed)
            if state == "balanced":
                self.schedule(1.0, seed).balance()
            elif state == "skewed":
                self.skew()
            moments = nf.gradient_moments(self.model, losses, [self.probe(seed)], self.syms)
            grams = [gram for legs in moments.second.values() for gram in legs]
            out[f"noise {state}"] = sum(float(gram.diagonal(dim1=-2, dim2=-1).sum()) for gram in grams)
            out[f"top {state}"] = nf.top_eigenvalue(self.model, losses, [self.probe(seed)], tolerance=1e-2)
        return out

    def run(self, point: Point) -> dict[str, Any]:
        """Held-out loss before and after (None when diverged), squared norms of the factors at the end."""
        before = self.start(point.seed)
        if point.variant == "skewed":
            self.skew()
        optimizer = OPTIMISERS[point.optimiser](self.trained, point.lr, weight_decay=0.0)
        schedule = self.schedule(point.lr, point.seed, optimizer)
        done = 0
        try:
            if point.variant in ("once", "every"):
                schedule.balance()
            for done in self.train(optimizer, self.plan.steps, point.seed):
                if point.variant == "every" and done < self.plan.steps:
                    schedule.after_step(done)
        except nf.errors.NoetherflowError:
            done = -1
        after = self.held_out() if done == self.plan.steps else math.inf
        norms = {
            k: sum(float(p.detach().square().sum()) for n, p in self.model.named_parameters() if k in n)
            for k in ("lora_A", "lora_B")
        }
        return {**asdict(point), "before": before, "after": after if after < math.inf else None, **norms}


@torch.no_grad()
def _copy(parameters: list[nn.Parameter], values: Sequence[Tensor]) -> None:
    for p, v in zip(parameters, values, strict=True):
        p.copy_(v)


def finished(path: Path) -> list[dict[str, Any]]:
    """The points of an earlier run; a line cut short by an interruption is dropped."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def compute(plan: Plan, work: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The finished points, and the sharpness at the start of every seed."""
    work.mkdir(parents=True, exist_ok=True)
    made: list[Study] = []

    def study() -> Study:
        made[:] = made or [Study(plan, work)]
        return made[0]

    def through(name: str, wanted: list[Any], key: Callable[[dict], Any], run: Callable[[Any], dict]) -> list[dict]:
        rows = [row for row in finished(work / name) if key(row) in wanted]
        todo = [item for item in wanted if item not in [key(row) for row in rows]]
        for k, item in enumerate(todo):
            began = time.time()
            rows.append(run(item))
            with (work / name).open("a") as f:
                f.write("\n" + json.dumps(rows[-1]))
            print(f"{k + 1} of {len(todo)}: {item}, {time.time() - began:.1f} s", flush=True)
        return rows

    def point(row: dict[str, Any]) -> Point:
        return Point(row["optimiser"], row["variant"], row["lr"], row["seed"])

    rows = through("points.jsonl", points(plan), point, lambda p: study().run(p))
    starts = through("starts.jsonl", list(range(plan.seeds)), lambda row: row["seed"], lambda s: study().sharpness(s))
    return rows, starts


class Results:
    """Losses after training minus before, by seed and learning rate: `[seeds, lrs]`, infinite where a run diverged."""

    def __init__(self, rows: list[dict[str, Any]], optimiser: str, variant: str) -> None:
        own = {(r["lr"], r["seed"]): r for r in rows if (r["optimiser"], r["variant"]) == (optimiser, variant)}
        self.lrs = np.array(sorted({lr for lr, _ in own}))
        seeds = sorted({seed for _, seed in own})
        table = [[own[lr, seed] for lr in self.lrs] for seed in seeds]
        self.change = np.array(
            [[math.inf if r["after"] is None else r["after"] - r["before"] for r in t] for t in table]
        )

    @property
    def best(self) -> np.ndarray:
        """Per seed, over all learning rates."""
        return self.change.min(1)

    @property
    def best_lr(self) -> np.ndarray:
        return np.log2(self.lrs[self.change.argmin(1)])

    @property
    def largest_lr(self) -> np.ndarray:
        """Per seed, log2 of the largest learning rate that ends below where it started."""
        return np.log2([self.lrs[c < 0].max(initial=self.lrs[0] / 2) for c in self.change])


def with_error(values: np.ndarray, digits: int = 4) -> str:
    return f"{values.mean():.{digits}f} ± {values.std(ddof=1) / math.sqrt(len(values)):.{digits}f}"


def rate(values: np.ndarray) -> str:
    """Learning rates given by their log2: geometric mean, and the error of the log2."""
    return f"{2 ** values.mean():.2g} (log2 {with_error(values, digits=2)})"


def table(rows: list[dict[str, Any]]) -> str:
    """Means and standard errors over seeds; differences to `none` are taken seed by seed."""
    lines = [
        "| optimiser | variant | best change of the loss | minus that of none | best lr | largest lr that helps | "
        "log2 of it minus that of none |",
        "|---|---|---|---|---|---|---|",
    ]
    for optimiser in OPTIMISERS:
        plain = Results(rows, optimiser, "none")
        for variant in VARIANTS:
            own = Results(rows, optimiser, variant)
            cells = [with_error(own.best), with_error(own.best - plain.best)]
            cells += [rate(own.best_lr), rate(own.largest_lr)]
            cells.append(with_error(own.largest_lr - plain.largest_lr, digits=2))
            lines.append(f"| {optimiser} | {variant} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    fig, axes = style.figure(2, 2)
    colours = dict(zip(VARIANTS, (style.GD, style.SGD, style.SDE, style.MUTED), strict=True))
    labels = {
        "none": "never balanced",
        "once": "balanced once",
        "every": "balanced again and again",
        "skewed": f"start ({SKEW:g} A, B / {SKEW:g}), never balanced",
    }
    for column, optimiser in enumerate(OPTIMISERS):
        above, below = axes[column], axes[column + 2]
        plain = Results(rows, optimiser, "none")
        low = plain.best.mean()
        top = -0.6 * low
        for k, variant in enumerate(VARIANTS):
            own = Results(rows, optimiser, variant)
            whole = np.isfinite(own.change).all(0)
            lrs = own.lrs * 1.02 ** (k - 1)
            style.dots(above, lrs[whole], own.change.T[whole], colours[variant], labels[variant])
            above.plot(lrs[whole], own.change.T[whole].mean(1), color=colours[variant], lw=1)
            above.plot(lrs[~whole], np.full(sum(~whole), top * (0.94 - 0.09 * k)), "x", color=colours[variant], ms=5)
            if variant in ("once", "every"):
                both = np.isfinite(own.change).all(0) & np.isfinite(plain.change).all(0)
                difference = own.change.T[both] - plain.change.T[both] if both.any() else np.empty((0, 2))
                style.dots(below, lrs[both], difference, colours[variant], labels[variant])
        above.set(title={"sgd": "SGD", "adamw": "AdamW"}[optimiser] + ": change of the held-out loss (nats)")
        above.set(xscale="log", xlabel="learning rate", ylim=(1.25 * low, top))
        below.set(title="the same minus never balanced, seed by seed", xscale="log", xlabel="learning rate")
        below.set_xlim(plain.lrs[0] / 1.3, 1.3 * plain.lrs[-1])
        for ax in (above, below):
            ax.axhline(0, color=style.THEORY, lw=0.8)
    axes[0].legend(loc="lower left", title="x: a seed diverged")
    axes[2].legend(loc="lower left", title="bars: 2 standard errors")
    style.tidy(fig)
    style.save(fig, path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a minute instead of an hour; no conclusions")
    parser.add_argument("--work", type=Path, default=Path("runs/lora_balance"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    work = options.work / ("quick" if options.quick else "full")
    rows, starts = compute(QUICK if options.quick else FULL, work)
    print(table(rows))
    for what in ("noise", "top"):
        states = {state: np.array([s[f"{what} {state}"] for s in starts]) for state in ("start", "balanced", "skewed")}
        print(what, {state: with_error(v) for state, v in states.items()})
    with style.context():
        draw(rows, work / FIGURE.name if options.quick else FIGURE)
