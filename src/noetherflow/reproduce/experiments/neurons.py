"""Beyond the paper: neuron balance of a small language model and a small CNN, predicted from one measurement."""

from __future__ import annotations

import importlib
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from noetherflow.reproduce import style
from noetherflow.reproduce.experiment import Config, Experiment, Point, Results, Verdict, from_seeds, generator, plain
from noetherflow.sgd import SGDConfig
from noetherflow.workloads import digits

CASES = {
    "language model": {"lr": 0.3, "batch": 8, "before": 250, "steps": 250, "measured": 384},
    "CNN": {"lr": 0.15, "batch": 8, "before": 300, "steps": 400, "measured": 1797},
}
SCALES = {
    "quick": {"cases": CASES, "seeds": 3, "context": 24, "marks": 8},
    "paper": {
        "cases": {k: {**v, "lr": v["lr"] / 3, "steps": 20_000, "before": 3000} for k, v in CASES.items()},
        "seeds": 8,
        "context": 64,
        "marks": 40,
    },
}


class CharacterModel(nn.Module):
    """Embedding, one causal attention block and a ReLU feed-forward block, pre-norm; next-character logits."""

    def __init__(self, vocabulary: int, context: int, width: int = 24, hidden: int = 48) -> None:
        super().__init__()
        self.embed, self.position = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, width))
        self.head = nn.Linear(width, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) + self.position(torch.arange(tokens.shape[1], device=tokens.device))
        z = self.norm1(x)
        x = x + self.o(F.scaled_dot_product_attention(self.q(z), self.k(z), self.v(z), is_causal=True))
        x = x + self.mlp(self.norm2(x))
        return self.head(x)


def text_windows(context: int) -> tuple[Tensor, int]:
    """Windows of `context + 1` characters of the standard library's `pydoc_data.topics`, and the vocabulary size."""
    topics = importlib.import_module("pydoc_data.topics").topics
    text = "".join(topics[k] for k in sorted(topics))[:60_000]
    letters = sorted(set(text))
    codes = torch.tensor([letters.index(c) for c in text])
    return codes.unfold(0, context + 1, context).contiguous(), len(letters)


def problem(name: str, config: Config) -> tuple[nn.Module, Any, Tensor, Tensor]:
    """`(model, per-sample loss, inputs, targets)`, float64."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if name == "CNN":
            images, labels = digits(images=True)
            cnn = nn.Sequential(
                nn.Conv2d(1, 8, 3, padding=1),
                nn.ReLU(),
                nn.MaxPool2d(2),
                nn.Conv2d(8, 12, 3, padding=1),
                nn.ReLU(),
                nn.AvgPool2d(2),
                nn.Flatten(),
                nn.Linear(48, 10),
            )
            loss = lambda m, batch: F.cross_entropy(m(batch[0]), batch[1], reduction="none")
            return cnn.double(), loss, images, labels
        windows, vocabulary = text_windows(config["context"])
        lm = CharacterModel(vocabulary, config["context"]).double()
        per_window = lambda m, batch: F.cross_entropy(m(batch[0]).mT, batch[1], reduction="none").mean(1)
        return lm, per_window, windows[:, :-1], windows[:, 1:]


def points(config: Config) -> list[Point]:
    """One point per model."""
    return [{"name": name, **case} for name, case in config["cases"].items()]


def train(
    model: nn.Module,
    loss: Any,
    x: Tensor,
    y: Tensor,
    point: Point,
    steps: int,
    rng: torch.Generator,
    see: Any = None,
    marks: tuple[int, ...] = (),
) -> None:
    """Plain SGD with replacement."""
    params = list(model.parameters())
    for step in range(steps + 1):
        if step in marks:
            see()
        if step == steps:
            return
        index = torch.randint(len(x), (point["batch"],), generator=rng)
        grads = torch.autograd.grad(loss(model, (x[index], y[index])).mean(), params)
        with torch.no_grad():
            for p, g in zip(params, grads, strict=True):
                p.sub_(g, alpha=point["lr"])


def compute(config: Config, point: Point) -> dict[str, Any]:
    """Charges of every neuron `[T, seeds, neurons]` after the measurement, and their forecasts `[T, neurons]`."""
    nf: Any = importlib.import_module("noetherflow")
    model, loss, x, y = problem(point["name"], config)
    train(model, loss, x, y, point, point["before"], generator(61))
    syms = nf.find_symmetries(model, (x[:2],))
    # Neurons: every torus with a positive and a negative leg, apart from norm gains.
    chosen = [
        s for s in syms if s.is_torus and not s.one_sided and not any("norm" in p or "embed" in p for p in s.parameters)
    ]
    only = syms.without({s.name: "not a hidden neuron" for s in syms if s not in chosen})
    few = slice(0, point["measured"])
    sgd = SGDConfig(point["lr"], point["batch"])
    moments = nf.gradient_moments(model, loss, [(x[few], y[few])], only, entries=True, groups=1)
    marks = tuple(round(point["steps"] * k / config["marks"]) for k in range(config["marks"] + 1))
    predicted = nf.noether_flow(model, only, moments, sgd).forecast(list(marks))
    forecasts = torch.cat([predicted.charges[s.name] for s in chosen], dim=1)
    saved = {n: t.clone() for n, t in model.state_dict().items()}
    runs = []
    for seed in range(config["seeds"]):
        model.load_state_dict(saved)
        rows: list[Tensor] = []

        def see(rows: list[Tensor] = rows) -> None:
            params = {n: p.detach() for n, p in model.named_parameters()}
            rows.append(torch.cat([s.charge(params) for s in chosen]))

        train(model, loss, x, y, point, point["steps"], generator(62 + seed), see, marks)
        runs.append(torch.stack(rows))
    return plain(
        {
            "steps": marks,
            "charges": torch.stack(runs, 1),
            "forecasts": forecasts,
            "loss": moments.loss,
            "families": [s.family for s in chosen],
        }
    )


def changes(results: Results, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Measured change of every charge per seed `[seeds, neurons]`, and predicted `[neurons]`, at the end."""
    charges, forecasts = results.array(name, "charges"), results.array(name, "forecasts")
    return charges[-1] - charges[0], forecasts[-1] - forecasts[0]


def plot(results: Results) -> Any:
    """Measured against predicted change of every neuron's balance."""
    fig, axes = style.figure(2, width=5.0, height=4.2)
    for ax, (point, _), color in zip(axes, results.points, (style.SGD, style.ACCENT), strict=True):
        measured, predicted = changes(results, point["name"])
        mean, error = measured.mean(0), measured.std(0, ddof=1) / math.sqrt(len(measured))
        ax.errorbar(
            predicted,
            mean,
            2 * error,
            fmt="o",
            color=color,
            ms=4,
            capsize=0,
            lw=0.8,
            label="one neuron, mean over seeds",
        )
        ends = np.array([min(predicted.min(), mean.min()), max(predicted.max(), mean.max())])
        ax.plot(ends, ends, "--", color=style.THEORY, label="measured = predicted")
        ax.axhline(0, color=style.MUTED, lw=0.6)
        ax.set(
            xlabel=f"predicted change of the charge in {point['steps']} steps",
            ylabel="measured change",
            title=f"{point['name']}: {len(predicted)} neurons",
        )
        ax.legend(fontsize=8)
    return fig


ANALYSIS = (
    "the forecast holds the gradient noise of step 0 fixed up to the symmetry; while the model still learns, its loss "
    "falls and the noise with it, so the later part of the predicted change is too large. The correlation over "
    "neurons is not affected"
)


def verdicts(results: Results) -> list[Verdict]:
    """Correlation and slope over neurons."""
    out = []
    for point, _ in results.points:
        measured, predicted = changes(results, point["name"])
        correlations = [np.corrcoef(m, predicted)[0, 1] for m in measured]
        slopes = measured @ predicted / (predicted @ predicted)
        out.append(
            from_seeds(
                f"{point['name']}: correlation of measured and predicted change over neurons",
                0.8,
                correlations,
                relation="above",
                analysis=ANALYSIS,
            )
        )
        out.append(
            from_seeds(f"{point['name']}: slope of measured on predicted change", 1, slopes, 0.3, analysis=ANALYSIS)
        )
    return out


EXPERIMENT = Experiment(
    id="neurons",
    title="Beyond the paper: neuron balance of a language model and a CNN from one measurement",
    setup=(
        "Language model: characters of the standard library's pydoc_data.topics, width 24, one attention block, 48 "
        "ReLU neurons. CNN: two convolutions on digits, 20 ReLU channels. Trained by SGD for a few hundred steps, "
        "measured once, trained on with three different data orders."
    ),
    scales=SCALES,
    points=points,
    compute=compute,
    plot=plot,
    verdicts=verdicts,
    choices="Models, rates and lengths are ours; the forecast is for the neurons' charges while training continues.",
    beyond=True,
)
