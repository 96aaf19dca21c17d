"""Balancing LoRA adapters of peft models, once and at given steps of training."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import noetherflow as nf
from noetherflow.balance.model import balance_
from noetherflow.balance.schedule import BalanceSchedule
from noetherflow.discovery import certify, find_symmetries
from noetherflow.equilibrium import Equilibrium, noise_equilibrium
from noetherflow.errors import DataError
from noetherflow.moments import GradientMoments, gradient_moments
from processes import run_ranks
from zoo import per_sample_cross_entropy

peft = pytest.importorskip("peft")
tf = pytest.importorskip("transformers")

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

RANK, VOCABULARY = 2, 13
TOKENS = torch.randint(VOCABULARY, (12, 6), generator=torch.Generator().manual_seed(0))
LABELS = torch.randint(VOCABULARY, (12, 6), generator=torch.Generator().manual_seed(1))
BATCH = ({"input_ids": TOKENS}, LABELS)
SGD = nf.SGDConfig(0.05, 4, weight_decay=1e-3)
GPT2_TARGETS = ("c_attn", "c_proj", "c_fc")
LLAMA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def gpt2(**options: Any) -> nn.Module:
    sizes = {"n_embd": 8, "n_head": 2, "n_inner": 12, "n_positions": 8, "vocab_size": VOCABULARY, "use_cache": False}
    config = tf.GPT2Config(**sizes, n_layer=1, bos_token_id=0, eos_token_id=0)
    return _adapted(tf.GPT2LMHeadModel(config), GPT2_TARGETS, fan_in_fan_out=True, **options)


def llama(**options: Any) -> nn.Module:
    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_attention_heads": 2, "num_key_value_heads": 1}
    more = {"vocab_size": VOCABULARY, "max_position_embeddings": 8, "use_cache": False}
    config = tf.LlamaConfig(**sizes, **more, num_hidden_layers=1, bos_token_id=0, eos_token_id=0, pad_token_id=0)
    return _adapted(tf.LlamaForCausalLM(config), LLAMA_TARGETS, **options)


def _adapted(base: nn.Module, targets: tuple[str, ...], **options: Any) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.LoraConfig(r=RANK, lora_alpha=8, target_modules=list(targets), **options)
        return peft.get_peft_model(base, config).double().eval()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def syms() -> nf.SymmetrySet:
    """Those of `gpt2()`; only shapes matter."""
    return find_symmetries(gpt2(), {"input_ids": TOKENS})


def train(model: nn.Module, optimizer: torch.optim.Optimizer | None = None, steps: int = 5) -> torch.optim.Optimizer:
    """Steps with momentum SGD (by default) on batches of four."""
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = optimizer or torch.optim.SGD(params, lr=0.5, momentum=0.5)
    for k in range(steps):
        pick = slice(4 * (k % 3), 4 * (k % 3) + 4)
        optimizer.zero_grad()
        per_sample_cross_entropy(model, ({"input_ids": TOKENS[pick]}, LABELS[pick])).mean().backward()
        optimizer.step()
    return optimizer


def measure(model: nn.Module, syms: nf.SymmetrySet) -> GradientMoments:
    return gradient_moments(model, per_sample_cross_entropy, [BATCH], syms)


def solve(model: nn.Module, syms: nf.SymmetrySet, **options: Any) -> Equilibrium:
    return noise_equilibrium(model, syms, measure(model, syms), SGD, **options)


def merged(model: nn.Module) -> dict[str, Tensor]:
    """`B A` of every adapted layer, scaling left out."""
    modules = dict(model.named_modules())
    return {
        name: (modules[name.replace("lora_A", "lora_B")].weight @ module.weight).detach().double()
        for name, module in modules.items()
        if ".lora_A." in name
    }


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS).logits.double()


def apart(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def residual(model: nn.Module, syms: nf.SymmetrySet) -> float:
    """Largest `|E[C' - C]|` relative to the sum of its parts, by its definition and from a fresh measurement."""
    moments, worst = measure(model, syms), 0.0
    params = {n: t.detach().double() for n, t in nf.tensors_of(model).items()}
    decay = SGD.lr * SGD.weight_decay * (2 - SGD.lr * SGD.weight_decay)
    for s in syms:
        up, down = torch.zeros(s.shape).double(), torch.zeros(s.shape).double()
        for leg, k, m in zip(s.weight_legs, s.grams(params), moments.batch_grams(s, SGD), strict=True):
            weight, noise = decay * k, SGD.lr**2 * m
            up, down = up + (weight if leg.sign > 0 else noise), down + (noise if leg.sign > 0 else weight)
        worst = max(worst, float((up - down).norm() / (up.norm() + down.norm())))
    return worst


def balanced(model: nn.Module, syms: nf.SymmetrySet, **options: Any) -> tuple[nn.Module, Any]:
    """A balanced copy with its report, the function checked by `balance_` itself."""
    out = copy.deepcopy(model)
    return out, balance_(out, solve(out, syms), example_inputs={"input_ids": TOKENS}, **options)


@pytest.mark.parametrize(("build", "targets"), [(gpt2, GPT2_TARGETS), (llama, LLAMA_TARGETS)], ids=["gpt2", "llama"])
def test_one_general_linear_symmetry_per_adapter_and_none_on_the_frozen_base(
    build: Callable[..., nn.Module], targets: tuple[str, ...]
) -> None:
    model = build()
    train(model)
    inputs = {"input_ids": TOKENS[:2]}
    syms = find_symmetries(model, inputs)
    assert len(syms.symmetries) == len(merged(model)) == len(targets) + (1 if build is gpt2 else 0)
    for s in syms:
        (a, b) = s.legs
        assert (s.kind, s.blocks, s.dim) == ("general_linear", 1, RANK)
        assert (a.parameter.replace("lora_A", "lora_B"), a.axes, a.sign) == (b.parameter, (0,), 1)
        assert (b.axes, b.sign) == ((1,), -1)
    assert syms.unknown == ()
    assert syms.excluded
    assert all("frozen parameter" in why for why in syms.excluded.values())
    assert certify(model, syms, inputs).broken == ()


def test_what_is_frozen_decides() -> None:
    model = gpt2()
    for p in model.parameters():
        p.requires_grad_(True)
    assert len(find_symmetries(model, {"input_ids": TOKENS[:2]}).symmetries) > len(merged(model))


def test_at_initialisation_every_adapter_is_degenerate_with_advice(syms: nf.SymmetrySet) -> None:
    model = gpt2()
    for objective in ("noise", "noise+decay", "norm"):
        eq = solve(model, syms, objective=objective)
        for s in eq:
            assert s.classification == "degenerate"
            assert "train some steps first" in s.reason
            assert torch.equal(s.element, torch.eye(RANK).double()[None])
    before = {n: t.clone() for n, t in model.state_dict().items()}
    report = balance_(model, eq, example_inputs={"input_ids": TOKENS})
    assert report.moved == {}
    assert set(report.skipped) >= {s.name for s in syms}
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    train(model)
    assert [s.classification for s in solve(model, syms)] == ["finite"] * len(syms.symmetries)


@pytest.mark.parametrize(("build", "change"), [(gpt2, 1e-10), (llama, 1e-6)], ids=["gpt2", "llama"])
def test_after_some_steps_balanced_exactly_and_nothing_else_moves(
    build: Callable[[], nn.Module], change: float
) -> None:
    """Llama's RMSNorm computes in float32 whatever the weights, so its outputs answer to rounding at that level."""
    model = build()
    train(model)
    syms = find_symmetries(model, {"input_ids": TOKENS})
    out, report = balanced(model, syms, tolerance=change)
    assert residual(model, syms) > 0.3
    assert residual(out, syms) < 1e-8
    assert apart(logits(out), logits(model)) < change
    after = merged(out)
    for name, product in merged(model).items():
        assert apart(after[name], product) < 1e-10
    kept = out.state_dict()
    for name, t in model.state_dict().items():
        assert torch.equal(t, kept[name]) == ("lora_" not in name)
    assert set(report.moved) == set(syms.parameters)


def test_start_scaled_along_the_orbit_is_undone(syms: nf.SymmetrySet) -> None:
    model = gpt2()
    train(model)
    skewed = copy.deepcopy(model)
    for s in syms:
        s.act_(nf.tensors_of(skewed), 10 * s.identity())
    assert apart(logits(skewed), logits(model)) < 1e-10
    pairs = list(zip(balanced(model, syms)[0].parameters(), balanced(skewed, syms)[0].parameters(), strict=True))
    for p, q in pairs:
        torch.testing.assert_close(p, q, rtol=1e-8, atol=1e-12)
    assert max(apart(p, q) for p, q in zip(skewed.parameters(), model.parameters(), strict=True)) > 1


VARIANTS = {
    "dropout": {"lora_dropout": 0.3},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "bias": {"bias": "lora_only"},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_kinds_of_lora(name: str) -> None:
    """DoRA: a weight `m (W + B A) / |W + B A|` keeps the GL symmetry of `B A`; its magnitudes m stay where they are."""
    model = gpt2(**VARIANTS[name])
    train(model)
    syms = find_symmetries(model, {"input_ids": TOKENS})
    assert [s.kind for s in syms if s.family == "linear-linear"] == ["general_linear"] * len(merged(model))
    assert syms.unknown == ()
    adapters = syms.filter(family="linear-linear")
    assert certify(model, adapters, {"input_ids": TOKENS[:2]}).broken == ()
    out, report = balanced(model, adapters)
    assert residual(model, adapters) > 0.3
    assert residual(out, adapters) < 1e-8
    assert apart(logits(out), logits(model)) < 1e-10
    assert all("lora_A" in n or "lora_B" in n for n in report.moved)


def test_wrong_symmetry_of_dora_is_refused() -> None:
    """Negative control: scaling a magnitude vector against its `B` is no symmetry."""
    model = gpt2(use_dora=True)
    train(model)
    names = [n for n in dict(model.named_parameters()) if "c_fc" in n and "lora" in n]
    magnitude, b = (next(n for n in names if part in n) for part in ("magnitude", "lora_B"))
    wrong = nf.declare(model, "diagonal", [(magnitude, 0)], [(b, 0)])
    assert certify(model, wrong, {"input_ids": TOKENS[:2]}).broken


def test_adapters_that_share_a_factor_move_together() -> None:
    model = llama()
    attention = model.base_model.model.model.layers[0].self_attn
    attention.k_proj.lora_A["default"].weight = attention.q_proj.lora_A["default"].weight
    train(model)
    syms = find_symmetries(model, {"input_ids": TOKENS})
    (shared,) = [s for s in syms if len(s.legs) == 3]
    assert [leg.sign for leg in shared.legs] == [1, -1, -1]
    out, _ = balanced(model, syms, tolerance=1e-6)
    assert residual(out, syms) < 1e-8
    inner = out.base_model.model.model.layers[0].self_attn
    assert inner.k_proj.lora_A["default"].weight is inner.q_proj.lora_A["default"].weight


def test_convolutions_have_adapters_too() -> None:
    base = nn.Sequential(nn.Conv2d(2, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))
    model = peft.get_peft_model(base, peft.LoraConfig(r=RANK, target_modules=["0", "2", "5"])).double().eval()
    x, y = torch.randn(12, 2, 6, 6).double(), torch.randint(3, (12,))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(3):
        per_sample_cross_entropy(model, (x, y)).mean().backward()
        optimizer.step()
    syms = find_symmetries(model, x[:2])
    assert [(s.kind, s.dim) for s in syms] == [("general_linear", RANK)] * 3
    moments = gradient_moments(model, per_sample_cross_entropy, [(x, y)], syms)
    report = balance_(model, noise_equilibrium(model, syms, moments, SGD), example_inputs=x)
    assert len(report.moved) == 6
    assert report.output_change is not None
    assert report.output_change < 1e-10


def test_only_the_active_adapter_moves() -> None:
    model = gpt2()
    train(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        options = {"target_modules": list(GPT2_TARGETS), "fan_in_fan_out": True, "init_lora_weights": False}
        model.add_adapter("second", peft.LoraConfig(r=3, **options))
    model.double().set_adapter("second")
    syms = find_symmetries(model, {"input_ids": TOKENS})
    assert {s.dim for s in syms} == {3}
    assert all(".second." in n for n in syms.parameters)
    out, report = balanced(model, syms)
    assert all(".second." in n for n in report.moved)
    for m in (model, out):
        m.set_adapter("default")
    assert torch.equal(logits(out), logits(model))


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("adapter", [torch.float32, torch.bfloat16])
def test_narrow_weights_are_solved_in_float64_and_rounded_once(
    base: torch.dtype, adapter: torch.dtype, syms: nf.SymmetrySet
) -> None:
    exact = gpt2()
    train(exact)
    model = copy.deepcopy(exact).to(base)
    for name, module in model.named_modules():
        if "lora_" in name and not list(module.children()):
            module.to(adapter)
    eq = solve(model, syms)
    assert all(s.element.dtype == torch.float64 for s in eq)
    out = copy.deepcopy(model)
    report = balance_(out, eq, example_inputs={"input_ids": TOKENS})
    assert {t.dtype for n, t in nf.tensors_of(out).items() if n in report.moved} == {adapter}
    eps = torch.finfo(adapter).eps
    assert 0 < report.rounding < eps
    assert f"{report.rounding:.1e}" in str(report)
    after = merged(out)
    for name, product in merged(model).items():
        assert apart(after[name], product) < 4 * eps
    assert report.output_change is not None
    assert report.output_change < 8 * max(eps, torch.finfo(base).eps)


def test_adam_state_follows_approximately_and_momentum_exactly(syms: nf.SymmetrySet) -> None:
    for kind, key in ((torch.optim.SGD, "momentum_buffer"), (torch.optim.AdamW, "exp_avg")):
        model = gpt2()
        trained = [p for p in model.parameters() if p.requires_grad]
        options = {"momentum": 0.9} if kind is torch.optim.SGD else {"weight_decay": 0.01}
        optimizer = train(model, kind(trained, lr=0.02, **options))
        eq = solve(model, syms)
        names = {n: p for n, p in model.named_parameters() if p.requires_grad}
        before = {n: optimizer.state[p][key].clone() for n, p in names.items()}
        report = balance_(model, eq, optimizer)
        for s in syms:
            expected = s.act_on_gradients({n: before[n] for n in s.parameters}, eq[s.name].element)
            for n in s.parameters:
                torch.testing.assert_close(optimizer.state[names[n]][key], expected[n])
        told = [line for line in report.approximate_state if "exp_avg_sq" in line and "uncorrelated" in line]
        assert len(told) == (len(names) if kind is torch.optim.AdamW else 0)


# --- at given steps of training ------------------------------------------------------------------------------------


def test_a_schedule_says_when(syms: nf.SymmetrySet) -> None:
    model = gpt2()

    def due(steps: Any) -> list[int]:
        schedule = BalanceSchedule(model, syms, per_sample_cross_entropy, [BATCH], steps, sgd=SGD)
        return [k for k in range(9) if schedule.due(k)]

    assert due(4) == [4, 8]
    assert due([1, 5]) == [1, 5]
    assert due(range(2, 9, 3)) == [2, 5, 8]
    for bad in (0, [], [0, 3]):
        with pytest.raises(DataError, match="at least 1"):
            due(bad)
    with pytest.raises(DataError, match="at least one batch"):
        BalanceSchedule(model, syms, per_sample_cross_entropy, [], 4, sgd=SGD)


@pytest.mark.parametrize("kind", ["momentum", "nesterov", "adamw", "adadelta"])
def test_training_with_a_schedule(kind: str, syms: nf.SymmetrySet) -> None:
    """Balanced at the steps asked for, the loss kept there, optimiser state moved, modes put back, then trained on."""
    model = gpt2(lora_dropout=0.1)
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer: torch.optim.Optimizer = {
        "momentum": lambda: torch.optim.SGD(trained, lr=0.2, momentum=0.9),
        "nesterov": lambda: torch.optim.SGD(trained, lr=0.2, momentum=0.9, nesterov=True),
        "adamw": lambda: torch.optim.AdamW(trained, lr=0.01),
        "adadelta": lambda: torch.optim.Adadelta(trained, lr=1.0, rho=0.5, eps=1e-3),
    }[kind]()
    schedule = BalanceSchedule(
        model, syms, per_sample_cross_entropy, [BATCH], 4, sgd=SGD, optimizer=optimizer,
        example_inputs={"input_ids": TOKENS},
    )  # fmt: skip
    losses = []
    for step in range(1, 11):
        train(model, optimizer, 1)
        before = schedule_loss(model)
        report = schedule.after_step(step)
        assert (report is not None) == (step in (4, 8))
        assert schedule_loss(model) == pytest.approx(before, rel=1e-10)
        if report is not None:
            model.eval()
            assert residual(model, syms) < 1e-8
            model.train()
            assert report.output_change is not None
            assert report.output_change < 1e-10
            assert schedule.after_step(step) is None
            unknown = [line for line in report.unmoved if "no rule" in line]
            assert bool(unknown) == (kind == "adadelta")
        losses.append(before)
    assert model.training
    assert list(schedule.reports) == [4, 8]
    assert losses[-1] < losses[0]


def schedule_loss(model: nn.Module) -> float:
    model.eval()
    try:
        with torch.no_grad():
            return float(per_sample_cross_entropy(model, BATCH).mean())
    finally:
        model.train()


def test_schedule_is_balance_at_that_step(syms: nf.SymmetrySet) -> None:
    models = [gpt2(), gpt2()]
    models[1].load_state_dict(models[0].state_dict())
    optimizers = [train(m, steps=3) for m in models]
    options: dict[str, Any] = {"sgd": None, "objective": "norm"}
    schedule = BalanceSchedule(
        models[0], syms, per_sample_cross_entropy, [BATCH], [3], optimizer=optimizers[0], **options
    )
    schedule.after_step(3)
    balance_(models[1], solve(models[1], syms, objective="norm"), optimizers[1])
    for m, o in zip(models, optimizers, strict=True):
        train(m, o, steps=3)
    assert torch.equal(logits(models[0]), logits(models[1]))
    params = {n: t.detach() for n, t in nf.tensors_of(models[0]).items()}
    assert max(float(s.charge(params).abs().max()) for s in syms) > 1e-6


def test_a_schedule_moves_the_state_of_several_optimisers(syms: nf.SymmetrySet) -> None:
    model = gpt2()
    factors = [[p for n, p in model.named_parameters() if part in n] for part in ("lora_A", "lora_B")]
    optimizers = [torch.optim.SGD(params, lr=0.5, momentum=0.5) for params in factors]
    per_sample_cross_entropy(model, BATCH).mean().backward()
    for o in optimizers:
        o.step()
    schedule = BalanceSchedule(model, syms, per_sample_cross_entropy, [BATCH], 1, sgd=SGD, optimizer=optimizers)
    report = schedule.after_step(1)
    assert report is not None
    assert report.state_entries == report.gradients == len(report.moved) == len(syms.parameters)
    assert report.unmoved == ()


def test_at_initialisation_a_schedule_moves_nothing_and_says_why(syms: nf.SymmetrySet) -> None:
    model = gpt2()
    report = BalanceSchedule(model, syms, per_sample_cross_entropy, [BATCH], 1, sgd=SGD).after_step(1)
    assert report is not None
    assert report.moved == {}
    assert all("train some steps first" in report.skipped[s.name] for s in syms)


@pytest.mark.slow
def test_hugging_face_trainer(tmp_path: Any, syms: nf.SymmetrySet) -> None:
    """As docs/lora.md shows it: the optimiser exists when training begins."""
    pytest.importorskip("accelerate")

    class Balance(tf.TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            options = {"sgd": SGD, "optimizer": kwargs["optimizer"], "example_inputs": {"input_ids": TOKENS}}
            self.schedule = BalanceSchedule(kwargs["model"], syms, per_sample_cross_entropy, [BATCH], 3, **options)

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.schedule.after_step(state.global_step)

    model = gpt2()
    rows = [{"input_ids": t, "labels": t} for t in TOKENS]
    options = {"max_steps": 7, "per_device_train_batch_size": 4, "learning_rate": 0.01, "use_cpu": True}
    arguments = tf.TrainingArguments(str(tmp_path), **options, report_to=[], save_strategy="no")
    callback = Balance()
    tf.Trainer(model, arguments, train_dataset=rows, callbacks=[callback]).train()
    assert list(callback.schedule.reports) == [3, 6]
    for report in callback.schedule.reports.values():
        assert report.output_change is not None
        assert report.output_change < 1e-10
        assert report.state_entries > 0


@pytest.mark.slow
def test_the_study_runs_and_resumes(tmp_path: Any) -> None:
    """The second run recomputes one lost point and one cut short, and comes to the same table."""
    script = Path(__file__).parent.parent / "examples" / "lora_balance.py"
    command = [sys.executable, str(script), "--quick", "--work", str(tmp_path)]
    points = tmp_path / "quick" / "points.jsonl"
    tables = []
    for missing in (32, 2):
        out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert f"{missing} of {missing}: Point" in out
        tables.append(out[out.index("| optimiser") :])
        lines = points.read_text().splitlines()[1:]
        assert [json.loads(line)["seed"] for line in lines if line.endswith("}")].count(1) == 16
        points.write_text("\n".join(["", *lines[:-2], lines[-1][:40]]))
    assert "| adamw | every |" in tables[0]
    assert tables[0] == tables[1]
    assert (tmp_path / "quick" / "lora_balance.png").stat().st_size > 10_000


def _two_layers() -> tuple[nn.Module, nf.SymmetrySet, list[tuple[Tensor, Tensor]]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 3, bias=False), nn.Linear(3, 4, bias=False)).double()
    syms = nf.declare(model, "general_linear", [("0.weight", 0)], [("1.weight", 1)])
    return model, syms, list(zip(torch.randn(4, 6, 5).double(), torch.randint(4, (4, 6)), strict=True))


def _rank(rank: int, folder: str) -> None:
    model, syms, data = _two_layers()
    wrapped = nn.parallel.DistributedDataParallel(model)
    BalanceSchedule(wrapped, syms, per_sample_cross_entropy, data[rank::2], 1, sgd=SGD).after_step(1)
    torch.save(model.state_dict(), f"{folder}/{rank}.pt")


@pytest.mark.slow
def test_ranks_move_together(tmp_path: Any) -> None:
    run_ranks(_rank, str(tmp_path))
    model, syms, data = _two_layers()
    BalanceSchedule(model, syms, per_sample_cross_entropy, data, 1, sgd=SGD).after_step(1)
    for rank in (0, 1):
        for name, t in torch.load(tmp_path / f"{rank}.pt").items():
            torch.testing.assert_close(t, model.state_dict()[name], rtol=1e-9, atol=0)
