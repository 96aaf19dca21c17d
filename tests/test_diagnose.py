"""`nf.diagnose`, `ledger.diagnose` and the command on planted faults, each found and named, and on healthy runs."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from typer.testing import CliRunner

import noetherflow as nf
from noetherflow.cli.app import app
from noetherflow.diagnosis.finding import QUESTIONS
from noetherflow.errors import DataError

pytestmark = pytest.mark.usefixtures("every_finding_says_what_to_do")

FIVE = ("norms", "warmup", "balance", "decay")


def classes(samples=1024, seed=0, noise=0.0):
    """Inputs of a noisy linear classifier."""
    torch.manual_seed(seed)
    x = torch.randn(samples, 12)
    logits = x @ torch.randn(12, 5) + noise * torch.randn(samples, 5)
    return x, logits.argmax(1)


def loader(x, y, batch=32):
    return DataLoader(TensorDataset(x, y), batch_size=batch, shuffle=True, generator=torch.Generator().manual_seed(0))


def mlp(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 5))


class Attention(nn.Module):
    """One attention layer without biases, in front of a classifier of the last token."""

    def __init__(self, heads: int = 4, width: int = 16, vocabulary: int = 11) -> None:
        super().__init__()
        self.heads = heads
        self.embed = nn.Embedding(vocabulary, width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.norm, self.out = nn.LayerNorm(width), nn.Linear(width, vocabulary)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        split = lambda t: t.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        mixed = F.scaled_dot_product_attention(split(self.q(x)), split(self.k(x)), split(self.v(x)))
        x = x + self.o(mixed.transpose(1, 2).flatten(2))
        return self.out(self.norm(x))[:, -1]


def tokens(samples=512):
    torch.manual_seed(1)
    ids = torch.randint(11, (samples, 6))
    return ids, ids.sum(1) % 11


def train(model, data, optimizer, steps, ledger=None):
    done = 0
    while done < steps:
        for x, y in data:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            if ledger is not None:
                ledger.note(loss)
            optimizer.step()
            done += 1
            if done == steps:
                return


def sgd(model, **options):
    return torch.optim.SGD(model.parameters(), **({"lr": 0.02, "momentum": 0.9} | options))


def adamw(model, **options):
    return torch.optim.AdamW(model.parameters(), **({"lr": 1e-3, "weight_decay": 0.1} | options))


class TestPlanted:
    @pytest.mark.parametrize("make", [sgd, adamw])
    def test_a_unit_scaled_by_thirty(self, make):
        """The function is the same: only the balance of unit 3 is off."""
        model = mlp()
        healthy = nf.diagnose(model, nn.CrossEntropyLoss(), loader(*classes()), make(model), curvature=False)
        with torch.no_grad():
            model[0].weight[3] *= 30
            model[0].bias[3] *= 30
            model[2].weight[:, 3] /= 30
        found = nf.diagnose(model, nn.CrossEntropyLoss(), loader(*classes()), make(model), curvature=False)["balance"]
        assert found.severity == "act"
        assert "unit 3 of `0 -> 2`" in found.title
        assert healthy["balance"].severity == "good"

    def test_a_unit_scaled_by_thirty_that_noise_evens_out_within_the_run(self):
        """The longer run asks for nothing, and tells the steps that noise takes; the shorter one ends before."""
        model, data = mlp(), loader(*classes(noise=1.0))
        with torch.no_grad():
            model[0].weight[3] *= 30
            model[0].bias[3] *= 30
            model[2].weight[:, 3] /= 30
        ask = lambda steps: nf.diagnose(model, nn.CrossEntropyLoss(), data, adamw(model), steps=steps, curvature=False)
        assert ask(10_000)["balance"].severity == "act"
        longer = ask(50_000)
        assert longer["balance"].severity == "good"
        assert "unit 3 of `0 -> 2`" in longer["balance"].title
        assert "within this run" in longer["balance"].title
        assert longer.changes == ()

    def test_where_equilibria_are_off_by_factors_nothing_is_to_act_on(self):
        """Adam's `v` over 20 gradients follows the fluctuations: the unit is named, and no certainty claimed."""
        model = mlp()
        with torch.no_grad():
            model[0].weight[3] *= 30
            model[0].bias[3] *= 30
            model[2].weight[:, 3] /= 30
        optimizer = adamw(model, betas=(0.9, 0.95))
        found = nf.diagnose(model, nn.CrossEntropyLoss(), loader(*classes()), optimizer, curvature=False)["balance"]
        assert found.severity == "watch"
        assert "unit 3 of `0 -> 2`" in found.title
        assert found.sure.startswith("not sure: at b2 = 0.95 Adam's v follows the fluctuations")

    @pytest.mark.parametrize("make", [sgd, adamw])
    def test_a_frozen_out_head(self, make):
        model, data = Attention(), loader(*tokens())
        healthy = nf.diagnose(model, nn.CrossEntropyLoss(), data, make(model), curvature=False)
        with torch.no_grad():
            model.v.weight[8:12] *= 1e-2
            model.o.weight[:, 8:12] *= 1e-2
        found = nf.diagnose(model, nn.CrossEntropyLoss(), data, make(model), curvature=False)["frozen-heads"]
        assert found.severity == "act"
        assert "head 2 of `v -> o`" in found.title
        assert healthy["frozen-heads"].severity == "good"

    def test_decay_too_small_to_matter_in_this_run(self):
        model, data = mlp(), loader(*classes())
        small = adamw(model, weight_decay=1e-4)
        found = nf.diagnose(model, nn.CrossEntropyLoss(), data, small, steps=2000, curvature=False)
        assert found["decay-bites"].is_note, "named, and nothing to do: no reason to look again"
        assert "too small to matter in this run" in found["decay-bites"].title
        assert found.changes == ()
        longer = nf.diagnose(model, nn.CrossEntropyLoss(), data, small, steps=50_000_000, curvature=False)
        assert longer["decay-bites"].severity == "good"
        assert not longer["decay-bites"].is_note

    def test_a_warmup_too_short(self):
        """Two layers unbalanced by a factor of 8: the same function, a learning rate beyond 2 / lambda_max."""
        torch.manual_seed(0)
        x = torch.randn(512, 6)
        y = 0.4 * x @ torch.randn(6, 6) + 0.5 * torch.randn(512, 6)
        model = nn.Sequential(nn.Linear(6, 12, bias=False), nn.ReLU(), nn.Linear(12, 6, bias=False))
        with torch.no_grad():
            model[0].weight *= 8**0.5
            model[2].weight /= 8**0.5
        squared = lambda m, b: (m(b[0]) - b[1]).square().sum(1)
        data = loader(x, y, 8)
        top = nf.top_eigenvalue(model, squared, [(x, y)])
        fast = torch.optim.SGD(model.parameters(), lr=3 / top)
        short = nf.diagnose(model, squared, data, fast, warmup=2)["learning-rate"]
        assert short.severity == "act"
        assert "warmup of 2 steps is too short" in short.title
        assert nf.diagnose(model, squared, data, fast, warmup=1_000_000)["learning-rate"].severity == "good"
        rate = lambda lr: torch.optim.SGD(model.parameters(), lr=lr)
        assert nf.diagnose(model, squared, data, rate(0.02 / top))["learning-rate"].severity == "good"
        assert nf.diagnose(model, squared, data, rate(0.3 / top))["learning-rate"].severity == "open", "it may rise"

    def test_adam_with_a_tiny_b2(self):
        model, data = mlp(), loader(*classes())
        tiny = nf.diagnose(model, nn.CrossEntropyLoss(), data, adamw(model, betas=(0.9, 0.5)), curvature=False)
        assert tiny["memory-of-squares"].severity == "act"
        assert "b2 = 0.5" in tiny["memory-of-squares"].title
        usual = nf.diagnose(model, nn.CrossEntropyLoss(), data, adamw(model), curvature=False)
        assert usual["memory-of-squares"].severity == "good"

    def test_the_mean_gradient_regime(self):
        """A quadratic loss far from its minimum, all samples alike; beside it labels at random."""
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))
        x = torch.ones(512, 6) + 0.01 * torch.randn(512, 6)
        squared = lambda m, b: (m(b[0]) - b[1]).square().sum(1)
        alike = loader(x, 5 * torch.ones(512, 2), 64)
        found = nf.diagnose(model, squared, alike, sgd(model), curvature=False)["batch-size"]
        assert found.severity == "watch"
        assert found.title.startswith("Mean-gradient regime")
        random = loader(torch.randn(512, 6), torch.randn(512, 2), 8)
        assert nf.diagnose(model, squared, random, sgd(model), curvature=False)["batch-size"].severity == "good"

    def test_growing_norms(self):
        """A normalised layer without decay at a large learning rate; with enough decay its norm stands still."""
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(12, 16, bias=False), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, 5))
        data = loader(*classes(noise=3.0))
        run = lambda **options: nf.diagnose(
            model, nn.CrossEntropyLoss(), data, sgd(model, momentum=0.0, **options), steps=20_000, curvature=False
        )
        found = run(lr=1.0)["norm-growth"]
        assert found.is_note
        assert "0" in found.where[0]
        assert found.advice.startswith("nothing to do while the loss falls")
        calm = run(lr=0.01)["norm-growth"]
        assert calm.severity == "good"
        assert not calm.is_note

    def test_dead_units(self):
        model, data = mlp(), loader(*classes())
        with torch.no_grad():
            model[0].bias[:6] -= 100
        found = nf.diagnose(model, nn.CrossEntropyLoss(), data, sgd(model), curvature=False)["dead-units"]
        assert found.severity == "watch"
        assert "6 of 24 units of `0 -> 2`" in found.title

    @pytest.mark.parametrize("dead", [0, 1, 12])
    def test_dead_units_of_a_layer_that_cannot_be_certified(self, dead):
        """Nothing is proved of a symmetry whose units the outputs do not depend on; they are counted all the same."""
        model, (x, y) = mlp(), classes()
        with torch.no_grad():
            model[2].bias[:dead] -= 100
            silent = (model[:4](x) == 0).all(0).sum().item()
        found = nf.diagnose(model, nn.CrossEntropyLoss(), loader(x, y), sgd(model), curvature=False)
        assert silent >= dead
        units, certificate = found["dead-units"], found["certificate"]
        if dead == 12:
            assert units.severity == "act"
            assert f"{silent} of 16 units of `2 -> 4` are dead" in units.title
        else:
            assert units.severity == "good"
            assert (f"{dead} unit is dead in" if dead else "No unit is dead in") in units.title
        assert certificate.severity in ("good", "open")
        if certificate.severity == "open":
            assert f"{silent} unit{'s get' if silent > 1 else ' gets'} no gradient on these data" in certificate.title


HEALTHY = {
    "MLP, momentum": (mlp, lambda: classes(noise=1.0), sgd),
    "MLP, AdamW": (mlp, lambda: classes(noise=1.0), adamw),
    "attention, AdamW": (Attention, tokens, lambda m: adamw(m, betas=(0.9, 0.95))),
    "BatchNorm, momentum and decay": (
        lambda: nn.Sequential(nn.Linear(12, 16, bias=False), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 5)),
        lambda: classes(noise=1.0),
        lambda m: sgd(m, weight_decay=5e-4),
    ),
    "LayerNorm, SGD": (
        lambda: nn.Sequential(nn.Linear(12, 16), nn.LayerNorm(16), nn.GELU(), nn.Linear(16, 5)),
        lambda: classes(noise=1.0),
        lambda m: sgd(m, lr=0.05, momentum=0.0, weight_decay=1e-3),
    ),
}


@pytest.mark.parametrize("name", HEALTHY)
def test_a_healthy_run_has_no_red_finding(name):
    """Before training, by the ledger of 200 steps, and after them."""
    make, data, optimiser = HEALTHY[name]
    torch.manual_seed(0)
    model, (x, y) = make(), data()
    batches, optimizer = loader(x, y), optimiser(model)
    before = nf.diagnose(model, nn.CrossEntropyLoss(), batches, optimizer, steps=2000)
    with nf.Ledger(model, optimizer, nf.find_symmetries(model, x[:4]), estimate_every=10, every=1) as ledger:
        train(model, batches, optimizer, 200, ledger)
    during = ledger.diagnose(steps=2000)
    after = nf.diagnose(model, nn.CrossEntropyLoss(), batches, optimizer, steps=2000)
    for diagnosis in (before, during, after):
        assert not diagnosis.severity("act"), str(diagnosis)
        assert all(diagnosis.about(topic) for topic in FIVE)


@pytest.mark.parametrize("held", ["frozen", "not in the optimiser"])
def test_layers_that_are_not_trained_are_named_and_left_out(held):
    """A frozen layer and one that the optimiser does not hold are the same to every answer."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 5))
    if held == "frozen":
        model[0].requires_grad_(False)
    rest = [*model[2].parameters(), *model[4].parameters()]
    optimizer = torch.optim.SGD(rest, lr=0.05)
    found = nf.analyze(model, nn.CrossEntropyLoss(), loader(*classes()), optimizer, steps=500)
    assert "not trained (frozen, or not in the optimiser)" in found.diagnosis.cautions[0]
    assert found.diagnosis.cautions[0].endswith(": `0`")
    assert [s.name for s in found.symmetries] == ["2 -> 4"]
    assert all(n.startswith(("2.", "4.")) for n in found.moments.mean)
    assert model[0].weight.requires_grad is (held != "frozen"), "left as it was"
    assert not any("0." in name for f in found.diagnosis for name in f.where)


def test_a_tiny_head_makes_no_learning_rate_too_large_under_adam():
    """Its values and outputs at a hundredth are stiff for Adam's step, and the first step replaces them."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=50, **sizes))
    attention = model.model.layers[0].self_attn
    with torch.no_grad():
        attention.v_proj.weight[8:16] *= 0.01
        attention.o_proj.weight[:, 8:16] *= 0.01
    batches = [{"input_ids": t, "labels": t} for t in torch.randint(50, (10, 16, 16))]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    found = nf.analyze(model, None, batches, optimizer, steps=300, warmup=30)
    assert found.curvature.small > 0.5
    assert found.diagnosis["learning-rate"].severity == "open"
    assert "frozen-heads" in [f.rule for f in found.diagnosis.severity("act")]


def test_a_group_at_a_rate_of_zero_is_not_trained():
    """As where a layer is frozen by its learning rate; before a warmup all rates are 0 and none is."""
    model, data = mlp(), loader(*classes())
    rates = [{"params": model[0].parameters(), "lr": 0.0}, {"params": model[2:].parameters()}]
    optimizer = torch.optim.SGD(rates, lr=0.05)
    found = nf.diagnose(model, nn.CrossEntropyLoss(), data, optimizer)
    assert found.cautions[0].endswith(": `0`")
    every = torch.optim.SGD(model.parameters(), lr=0.05)
    torch.optim.lr_scheduler.LambdaLR(every, lambda k: min(1.0, k / 10))
    assert every.param_groups[0]["lr"] == 0
    assert not any("not trained" in c for c in nf.diagnose(model, nn.CrossEntropyLoss(), data, every).cautions)


def test_most_units_dead_leaves_forecasts_open():
    torch.manual_seed(0)
    model, data = mlp(), loader(*classes())
    with torch.no_grad():
        model[0].bias.fill_(-100.0)
    found = nf.diagnose(model, nn.CrossEntropyLoss(), data, torch.optim.SGD(model.parameters(), lr=0.05))
    assert found["dead-units"].severity == "act"
    assert found["learning-rate"].severity == "open"
    assert not any("take norms up" in f.title for f in found)


def test_what_stands_for_the_present_is_of_the_last_quarter():
    from noetherflow.diagnosis.histories import present

    values, at = np.array([1.0, 2.0, 3.0, 4.0, 5.0]), np.array([0, 100, 200, 300, 400])
    assert present(values, at).tolist() == [3, 4]
    assert present(np.arange(100.0), np.arange(100)).tolist() == [95, 96, 97, 98, 99]
    assert present(np.array([np.nan]), np.array([0])).size == 0


def test_a_norm_that_only_grows_is_moved_across_by_nobody():
    """Scale symmetries have one side: what Adam's unequal steps do to their charges moves nothing to another."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 16, bias=False), nn.LayerNorm(16, elementwise_affine=False), nn.Linear(16, 5))
    data, optimizer = classes(), torch.optim.AdamW(model.parameters(), lr=0.02)
    with nf.Ledger(model, optimizer, nf.find_symmetries(model, data[0][:4]), every=1) as ledger:
        train(model, loader(*data), optimizer, 30, ledger)
    assert all(f.rule != "preconditioner" for f in ledger.diagnose())


@pytest.mark.parametrize("every", [1, 10])
def test_a_loss_that_is_nan_in_a_step_that_is_left_out_is_told(every):
    """The loop notes it and does not step: the ledger sees no step for it."""
    torch.manual_seed(0)
    model, (x, y) = mlp(), classes()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with nf.Ledger(model, optimizer, nf.find_symmetries(model, x[:4]), every=every) as ledger:
        for k in range(40):
            loss = F.cross_entropy(model(x), y) * (math.nan if k == 25 else 1.0)
            ledger.note(loss)
            if loss.isfinite():
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    found = ledger.diagnose()["loss-lapse"]
    assert found.title.startswith("The loss was NaN or infinite at step 25")


class TestRun:
    def test_fewer_steps_than_were_made_are_refused(self):
        ledger = self.ledger(steps=20)
        assert ledger.diagnose(steps=20)["decay-bites"].severity in ("good", "open")
        with pytest.raises(DataError, match=r"steps=1 is less than the 20 that this run has made: give the steps of"):
            ledger.diagnose(steps=1)

    def ledger(self, tmp_path=None, steps=60, spoil=lambda model, step: None, **options):
        model, data = mlp(), classes()
        optimizer = adamw(model, **options)
        syms = nf.find_symmetries(model, data[0][:4])
        with nf.Ledger(model, optimizer, syms, run_dir=tmp_path, estimate_every=10, every=1) as ledger:
            for k in range(steps):
                spoil(model, k)
                train(model, loader(*data), optimizer, 1, ledger)
        return ledger

    def test_with_and_without_a_log_it_says_the_same(self, tmp_path):
        logged = self.ledger(tmp_path / "run")
        assert str(logged.diagnose()) == str(self.ledger().diagnose())
        assert str(logged.diagnose()) == str(nf.diagnose_run(tmp_path / "run"))

    def test_weights_changed_from_outside_are_named(self):
        def clip(model, step):
            if step == 30:
                with torch.no_grad():
                    model[0].weight.mul_(0.5)

        found = self.ledger(spoil=clip).diagnose()["outside"]
        assert found.severity in ("watch", "act")
        assert "step 30" in found.title
        assert self.ledger().diagnose()["outside"].severity == "good"

    def test_the_decay_of_a_run_is_the_setting(self):
        evidence = self.ledger().diagnose()["decay-bites"].evidence
        assert evidence[0].value == pytest.approx(2 * 1e-3 * 0.1, rel=1e-3)
        assert self.ledger().diagnose(steps=50_000)["decay-bites"].severity == "good"

    def test_nothing_recorded_is_said(self):
        model = mlp()
        ledger = nf.Ledger(model, sgd(model), nf.find_symmetries(model, torch.randn(2, 12)), every=1)
        with pytest.raises(DataError, match="no recorded step"):
            ledger.diagnose()

    def test_command(self, tmp_path: Path):
        self.ledger(tmp_path / "run")
        shown = CliRunner().invoke(app, ["diagnose", str(tmp_path / "run")])
        assert shown.exit_code == 0
        assert QUESTIONS["decay"] in shown.stdout
        assert "What should I change?" in shown.stdout
        asked = CliRunner().invoke(app, ["diagnose", str(tmp_path / "run"), "--json", "--steps", "100000"])
        assert json.loads(asked.stdout)["verdict"] in ("good", "watch", "open")


def test_a_checkpoint_folder_is_told_what_diagnoses_it(tmp_path: Path) -> None:
    (tmp_path / "optimizer.pt").touch()
    outcome = CliRunner().invoke(app, ["diagnose", str(tmp_path)])
    assert "docs/jobs/trainer.md" in str(outcome.exception)
    assert f"noetherflow flow {tmp_path}" in str(outcome.exception)
    (tmp_path / "optimizer.pt").unlink()
    assert "trainer.md" not in str(CliRunner().invoke(app, ["diagnose", str(tmp_path)]).exception)


def test_a_learning_rate_that_replaces_the_weights_is_to_act_on() -> None:
    x, y = classes()
    model = mlp()
    found = nf.diagnose(model, nn.CrossEntropyLoss(), loader(x, y), torch.optim.AdamW(model.parameters(), lr=1.0))
    assert found["step-length"].severity == "act"
    assert not any(f.severity == "good" for f in found.about("warmup") if f.rule == "learning-rate")
    calm = nf.diagnose(model, nn.CrossEntropyLoss(), loader(x, y), torch.optim.AdamW(model.parameters(), lr=1e-3))
    assert all(f.rule != "step-length" for f in calm)


def test_a_last_layer_near_zero_is_no_fault_and_a_learning_rate_too_large_for_it_is() -> None:
    x, y = classes()
    model = mlp()
    with torch.no_grad():
        model[-1].weight *= 1e-4
    ask = lambda lr: nf.diagnose(model, nn.CrossEntropyLoss(), loader(x, y), sgd(model, lr=lr), curvature=False)
    found = ask(0.05)
    assert "small-weights" in [f.rule for f in found]
    assert not found.severity("act"), str(found)
    assert found.changes == ()
    assert ask(1000.0)["step-length"].severity == "act"


def normalised() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 16, bias=False), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 5))


def test_a_model_in_evaluation_mode_leaves_what_training_changes_open() -> None:
    model, data = normalised(), loader(*classes(noise=1.0))
    trained = nf.diagnose(model, nn.CrossEntropyLoss(), data, sgd(model, momentum=0.0), curvature=False)
    assert not any("evaluation mode" in text for text in trained.cautions)
    assert trained["norm-growth"].severity == "good"
    fixed = nf.diagnose(model.eval(), nn.CrossEntropyLoss(), data, sgd(model), curvature=False)
    assert "evaluation mode" in fixed.cautions[0]
    assert "CAUTION: measured in evaluation mode" in str(fixed)
    assert all(f.severity == "open" for topic in ("norms", "batch") for f in fixed.about(topic))
    assert fixed["certificate"].severity == "good"


def test_a_loss_without_samples_is_told_the_remedy() -> None:
    """Minibatch gradients go with a mean; curvature does not."""
    model, data = normalised(), loader(*classes(noise=1.0))
    mean = lambda m, b: F.cross_entropy(m(b[0]), b[1])
    found = nf.diagnose(model, mean, data, sgd(model))["learning-rate"]
    assert found.severity == "open"
    assert found.advice.startswith("return one loss per sample")
    off = nf.diagnose(model, mean, data, sgd(model), curvature=False)["learning-rate"]
    assert off.advice == "nf.diagnose(..., curvature=True) measures it"


def test_the_next_step_is_the_first_of_the_warmup() -> None:
    """Steps of Adam at lr 1: long ones now, a thousandth with a warmup."""
    model, data = mlp(), loader(*classes())
    run = lambda warmup: nf.diagnose(model, nn.CrossEntropyLoss(), data, adamw(model, lr=1.0), warmup=warmup)
    now, later = run(None), run(1000)
    assert now["step-length"].severity == "act"
    assert all(f.rule not in ("step-length", "fastest-norms") for f in later), "steps of Adam are not foretold"
    plain = torch.optim.SGD(model.parameters(), lr=0.05)
    first = nf.diagnose(model, nn.CrossEntropyLoss(), data, plain, warmup=100)["fastest-norms"].title
    assert first.startswith("In the very next step only, at the first learning rate of the warmup,")


def test_the_default_number_of_steps_is_said() -> None:
    model, data = mlp(), loader(*classes())
    default = nf.diagnose(model, nn.CrossEntropyLoss(), list(data), sgd(model), curvature=False)
    assert "for 1,000 steps (the default: give steps=" in default.subject
    given = nf.diagnose(model, nn.CrossEntropyLoss(), list(data), sgd(model), steps=1000, curvature=False)
    assert "default" not in given.subject


def test_a_flow_that_is_no_drift_is_said_where_balance_is() -> None:
    """Momentum at a large rate uses the mean gradient up within its memory; a tiny rate does not."""
    model, data = mlp(), loader(*classes())
    fast = nf.diagnose(model, nn.CrossEntropyLoss(), data, sgd(model, lr=0.5), curvature=False)
    slow = nf.diagnose(model, nn.CrossEntropyLoss(), data, sgd(model, lr=1e-5), curvature=False)
    assert "NOT VALID as a drift" in fast["balance"].title
    assert fast["balance"].severity == "open"
    asks = [f for f in fast if "NOT VALID as a drift" in f.title]
    assert all(
        "train 100 steps with nf.Ledger(model, optimizer, symmetries, estimate_every=10)" in f.advice for f in asks
    )
    assert fast["norm-growth"].severity == "good", "there is no scale-invariant weight, whatever the flow"
    assert slow["balance"].severity == "good"
    assert "NOT VALID" in str(fast).split("Which norms")[0].replace("\n  ", " ")
    assert "NOT VALID" not in str(slow)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"loader": []}, "there are no batches"),
        ({"loader": None}, "batches must be a DataLoader"),
        ({"model": None}, "model must be a torch.nn.Module"),
        ({"loss_fn": "ce"}, "loss_fn must be"),
        ({"steps": -1}, "steps must be a whole number"),
        ({"steps": float("nan")}, "steps must be a whole number"),
        ({"steps": "many"}, "steps must be a whole number"),
        ({"warmup": -3}, "warmup must be a whole number"),
        ({"optimizer": torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)}, "another model's"),
    ],
)
def test_arguments_of_another_kind_are_named(change, complaint) -> None:
    x, y = classes(64)
    model = mlp()
    given = {
        "model": model,
        "loss_fn": nn.CrossEntropyLoss(),
        "loader": loader(x, y),
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
    }
    with pytest.raises(DataError, match=complaint):
        nf.diagnose(**{**given, **change})


def test_a_pair_of_linear_layers_of_low_rank_is_judged_by_the_directions_that_settle() -> None:
    """Sixteen units between ten inputs and three outputs: three directions settle, the others have no noise."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(10, 16, bias=False), nn.Linear(16, 3, bias=False)).double()
    x = torch.randn(400, 10).double()
    data = [(x, x @ torch.randn(10, 3).double() + torch.randn(400, 3).double())]

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return (model(batch[0]) - batch[1]).square().sum(1)

    syms = nf.find_symmetries(net, x[:2])
    sgd = nf.SGDConfig(lr=0.01, batch_size=10)

    def examined(factor: float) -> tuple[nf.Diagnosis, nf.Flow]:
        with torch.no_grad():
            net[0].weight *= factor
            net[1].weight /= factor
        flow = nf.noether_flow(net, syms, nf.gradient_moments(net, loss, data, syms), sgd)
        return nf.diagnose(net, loss, data, torch.optim.SGD(net.parameters(), lr=0.01), steps=1000), flow

    near, flow = examined(1.0)
    assert "can trade scale here, so none" not in str(near)
    assert not [f for f in near.findings if f.rule.startswith("balance") and f.severity in ("watch", "act")]
    assert "10 directions shrink to zero" in str(flow)
    assert flow.families()[0]["imbalance"] > 0
    far, _ = examined(200.0)
    assert [f for f in far.findings if f.rule == "balance-layer" and f.severity == "act"]


@pytest.mark.parametrize(("lr", "severities"), [(0.1, ["good"]), (30.0, ["watch", "act"])])
def test_a_run_whose_loss_rose_is_never_said_to_be_in_hand(lr: float, severities: list[str]) -> None:
    """Also without a single jump: a blow-up from the first step on has no level to jump from."""
    model, (x, y) = mlp(), classes()
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    with nf.Ledger(model, optimizer, nf.find_symmetries(model, x[:2]), every=1) as ledger:
        for k in range(40):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x[32 * (k % 32) :][:32]), y[32 * (k % 32) :][:32])
            loss.backward()
            ledger.note(loss)
            optimizer.step()
    found = ledger.diagnose()["loss-course"]
    assert found.severity in severities
    assert ("stayed in hand" in found.title) == (severities == ["good"])


@pytest.mark.parametrize("noted", [True, False])
def test_a_run_that_diverged_is_led_by_that_and_the_rest_means_little(noted: bool) -> None:
    """Two linear layers at a rate far too large, with and without losses in the log."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 8, bias=False), nn.Linear(8, 5, bias=False)).double()
    x, y = classes(64)
    optimizer = torch.optim.SGD(model.parameters(), lr=50.0)
    with nf.Ledger(model, optimizer, nf.find_symmetries(model, x[:2].double()), every=1, estimate_every=5) as ledger:
        for _ in range(30):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x.double()), y)
            loss.backward()
            if noted:
                ledger.note(loss)
            optimizer.step()
    found = ledger.diagnose()
    assert found.verdict == "act"
    assert found.findings[0].rule == "loss-course"
    assert found["loss-course"].title.startswith("The run diverged at step")
    assert "diverged" in found.cautions[0]
    assert "stayed in hand" not in str(found)
    assert all(f.title.startswith("Means little") for f in found if f.rule not in ("loss-course", "outside"))
    assert len(found.changes) == 1, "what is open asks for no change of its own"
    assert str(found).count("do: mend that first") == 1
    topics = [f.topic for f in found]
    assert len(topics) == len(set(topics)), "one answer to each question"


def test_decay_is_judged_alike_before_a_run_and_after_it() -> None:
    """By the share of the squared norms that it takes in the steps made, recorded or not."""
    model, (x, y) = mlp(), classes()
    optimizer = adamw(model, lr=2e-3, weight_decay=0.01)
    before = nf.diagnose(model, nn.CrossEntropyLoss(), loader(x, y), optimizer, steps=1000, curvature=False)
    with nf.Ledger(model, optimizer, nf.find_symmetries(model, x[:4]), every=30) as ledger:
        train(model, loader(x, y), optimizer, 1000, ledger)
    after = ledger.diagnose()
    told = before["decay-bites"], after["decay-bites"]
    assert told[0].title == told[1].title
    assert told[0].is_note
    assert told[1].is_note
    assert after["norm-growth"].severity in ("good", "open")
    assert after.changes == ()
    assert "1,000 steps, 34 of them recorded" in after.subject


def test_rows_that_were_dropped_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    model, (x, y) = mlp(), classes()
    optimizer = sgd(model)
    with nf.Ledger(model, optimizer, nf.find_symmetries(model, x[:4]), every=1, capacity=20) as ledger:
        train(model, loader(x, y), optimizer, 50, ledger)
    found = ledger.diagnose()
    assert "the last 20 of 50 recorded steps" in found.subject
    assert "30 recorded steps before step 30 were dropped" in found.cautions[0]


def test_groups_with_rates_of_their_own_are_diagnosed_under_sgd() -> None:
    model, data = mlp(), loader(*classes())
    rates = [{"params": model[0].parameters(), "lr": 0.01}, {"params": model[2:].parameters()}]
    found = nf.diagnose(model, nn.CrossEntropyLoss(), data, torch.optim.SGD(rates, lr=0.05, momentum=0.9))
    assert "learning-rate" in [f.rule for f in found]
    assert "fastest-norms" not in [f.rule for f in found], "steps of momentum are not foretold"


def test_coupled_decay_is_named_before_and_after_a_run():
    """Adam's coupled decay is decay, though no share of a norm can be told; AdamW's is told, none is none."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))
    data = TensorDataset(torch.randn(64, 6), torch.randn(64, 2))
    loader = DataLoader(data, batch_size=8, shuffle=True)
    for kind, decay, words in (("Adam", 0.1, "not known"), ("Adam", 0.0, "no weight decay"), ("AdamW", 0.1, "")):
        optimizer = getattr(torch.optim, kind)(net.parameters(), lr=1e-3, weight_decay=decay)
        before = nf.diagnose(net, nn.MSELoss(), loader, optimizer, steps=1000)["decay-bites"]
        with nf.Ledger(net, optimizer, nf.find_symmetries(net, data[:2][0]), every=1) as ledger:
            for x, y in loader:
                optimizer.zero_grad()
                nn.functional.mse_loss(net(x), y).backward()
                optimizer.step()
        after = ledger.diagnose()["decay-bites"]
        for finding in (before, after):
            assert words in finding.title
            assert words or "not known" not in finding.title
