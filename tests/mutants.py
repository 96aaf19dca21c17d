"""Small faults put into the code one at a time: the tests named beside each must notice it.

Run `make mutants`, or `python tests/mutants.py [WORD ...]` for those whose file or text has one of the words. Results
are kept in `.mutants.json` by the fault and by the code and tests they depend on, so that an interrupted run goes on;
`--again` forgets them.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
KEPT = ROOT / ".mutants.json"
LIMIT = 300
"""Seconds after which a run of tests counts as failed: a fault may send a loop on for ever."""


@dataclass(frozen=True)
class Mutant:
    """One fault: in `src/<file>`, `text` (which occurs once) becomes `fault`; one of `tests` must fail.

    Attributes:
        file: below `src/`.
        text: a piece of the source.
        fault: what stands there instead.
        tests: arguments of pytest, files of `tests/` or `file::test`, with `-k` after a space where a part will do.
    """

    file: str
    text: str
    fault: str
    tests: str

    @property
    def path(self) -> Path:
        return ROOT / "src" / self.file

    @property
    def title(self) -> str:
        return f"{self.file}: {' '.join(self.text.split())} -> {' '.join(self.fault.split())}"


CORE, SYM, FIND = "noetherflow/core", "noetherflow/symmetry", "noetherflow/discovery"
MOM, EQ, BAL, MON, PAPER = (
    "noetherflow/moments",
    "noetherflow/equilibrium",
    "noetherflow/balance",
    "noetherflow/monitor",
    "noetherflow_paper",
)

MUTANTS = (
    # symmetry algebra
    Mutant(f"{SYM}/leg.py", "return self.sign * self.power", "return self.sign", "test_symmetry.py test_flow.py"),
    Mutant(f"{SYM}/leg.py", "return x @ x.mT", "return x.mT @ x", "test_symmetry.py"),
    Mutant(f"{SYM}/symmetry.py", "here if leg.sign > 0 else dual.to(current.device)", "here", "test_symmetry.py"),
    Mutant(f"{SYM}/symmetry.py", "total = total + leg.exponent * value", "total = total + value", "test_symmetry.py"),
    Mutant(f"{SYM}/symmetry.py", "k * (2 * self.dim + 1 - k) // 2", "k * self.dim", "test_symmetry.py"),
    Mutant(
        f"{SYM}/symmetry.py",
        "return {n: t.double() + self.offsets[n] if n in self.offsets else t for n, t in params.items()}",
        "return dict(params)",
        "test_symmetry.py test_offsets.py",
    ),
    Mutant(
        f"{SYM}/overlap.py",
        "total = total + abs(leg.exponent) * leg.moves.double()",
        "total = torch.maximum(total, abs(leg.exponent) * leg.moves.double())",
        "test_equilibrium_joint.py",
    ),
    Mutant(f"{SYM}/overlap.py", "int(torch.as_tensor(count).max()) > 1", "False", "test_equilibrium_joint.py"),
    # settings
    Mutant(
        f"{CORE}/rates.py",
        "(dataset_size - batch_size) / (dataset_size - 1) / batch_size",
        "1.0 / batch_size",
        "test_flow.py test_closed_form.py",
    ),
    Mutant(f"{CORE}/settings.py", "return self.lr / (1 - self.momentum)", "return self.lr", "test_closed_form.py"),
    Mutant(f"{CORE}/spd.py", "return (a + a.mT) / 2", "return a + a.mT", "test_core.py test_closed_form.py"),
    Mutant(
        f"{CORE}/printing.py",
        "numeric = tuple(not any(isinstance(row.get(name), str) for row in rows) for name in names)",
        "numeric = tuple(False for name in names)",
        "test_printing.py",
    ),
    Mutant(f"{CORE}/files.py", "scratch.replace(path)", "path.write_bytes(scratch.read_bytes())", "test_core.py"),
    # finder
    Mutant(
        f"{FIND}/rules/norms.py",
        'power = 2.0 if short_name(ctx.node) == "var" else 1.0',
        "power = 1.0",
        "test_discovery_rules.py",
    ),
    Mutant(
        f"{FIND}/rules/norms.py",
        "    ctx.store.singletons(x.fields)\n    return mean(ctx, x, dim, keepdim)",
        "    return mean(ctx, x, dim, keepdim)",
        "test_discovery_rules.py",
    ),
    Mutant(
        f"{FIND}/rules/norms.py",
        "ctx.store.approximately([replace(f, exponent=2 * f.exponent) for f in scale], float(eps))",
        "ctx.store.approximately(list(scale), float(eps))",
        "test_discovery_rules.py test_discovery.py",
    ),
    Mutant(
        f"{FIND}/rules/norms.py",
        '[replace(f, exponent=power * f.exponent) for f in scale], "is a running statistic"',
        'scale, "is a running statistic"',
        "test_discovery.py test_certify.py",
    ),
    Mutant(
        f"{FIND}/rules/elementwise.py",
        "for bound in (low, high)):\n        return homogeneous(ctx, x)",
        "for bound in (low,)):\n        return homogeneous(ctx, x)",
        "test_discovery_rules.py",
    ),
    Mutant(
        f"{FIND}/rules/elementwise.py",
        'if name == "threshold" and high == low == 0:',
        'if name == "threshold":',
        "test_discovery_rules.py",
    ),
    Mutant(
        f"{FIND}/rules/elementwise.py",
        '    ctx.store.singletons(x.fields)\n    ctx.store.tag(x.fields, "relu")',
        '    ctx.store.tag(x.fields, "relu")',
        "test_discovery.py test_discovery_rules.py",
    ),
    Mutant(
        f"{FIND}/rules/elementwise.py",
        "Field(f.ids, sign * f.exponent) for f in b",
        "Field(f.ids, f.exponent) for f in b",
        "test_discovery_rules.py test_discovery.py",
    ),
    Mutant(
        f"{FIND}/rules/elementwise.py", "return _power(ctx, x, -0.5)", "return _power(ctx, x, 0.5)", "test_discovery.py"
    ),
    Mutant(
        f"{FIND}/rules/linear.py",
        'kernel = "xzy" if transposed else "xyz"',
        'kernel = "xyz"',
        "test_discovery_rules.py test_discovery.py",
    ),
    Mutant(
        f"{FIND}/rules/attention.py",
        'ctx.store.vanish(scores, "passes a softmax")',
        "pass",
        "test_discovery.py",
    ),
    Mutant(
        f"{FIND}/rules/shape.py",
        "labels += (k + 1) * np.isin(atoms, np.unique(piece.ids.numpy()))",
        "labels += np.isin(atoms, np.unique(piece.ids.numpy()))",
        "test_discovery.py test_discovery_rules.py",
    ),
    Mutant(
        f"{FIND}/rules/shape.py",
        "if x.zero or y.zero:\n        return y.fields if x.zero else x.fields",
        "if x.zero or y.zero:\n        return ()",
        "test_discovery.py test_discovery_rules.py",
    ),
    Mutant(f"{FIND}/linear_system.py", "rz, rz + n])", "rz, rz])", "test_random_graphs.py test_discovery_solve.py"),
    Mutant(
        f"{FIND}/linear_system.py",
        "relation = np.where(ratio[equal] > 0, -1, 1)",
        "relation = np.where(ratio[equal] > 0, 1, -1)",
        "test_discovery.py",
    ),
    Mutant(
        f"{FIND}/shift_rules/absorbing.py",
        'ctx.absorb(x, list(range(n - len(normalized), n)), "null")',
        'ctx.absorb(x, [n - 1], "null")',
        "test_shifts.py test_discovery.py",
    ),
    # certificate and oracle
    Mutant(
        f"{FIND}/verdict.py",
        "return v.outputs < tolerance and max(v.covariance, conserved(v, statistics)) < GRADIENT_SLACK * tolerance",
        "return v.outputs < tolerance",
        "test_certify.py",
    ),
    Mutant(
        f"{FIND}/verdict.py",
        "return max(v.loss, v.conserved)\n\n\ndef uns",
        "return v.loss\n\n\ndef uns",
        "test_certify.py",
    ),
    Mutant(f"{FIND}/verdict.py", "    if v.without_effect:", "    if False:", "test_certify.py"),
    Mutant(
        f"{FIND}/violations.py",
        "scale = _norm(predicted, names)\n",
        "scale = math.inf\n",
        "test_certify.py",
    ),
    Mutant(
        f"{FIND}/oracle.py", "return SymmetryCount(null - relations,", "return SymmetryCount(null,", "test_oracle.py"
    ),
    Mutant(f"{FIND}/oracle.py", "n * (n + 1) // 2 if symmetric else n * n", "n * n", "test_oracle.py"),
    # moments
    Mutant(
        f"{MOM}/rules/norms.py",
        "normalised = lambda x: F.batch_norm(x, mean, var, None, None, False, 0.0, eps)",
        "normalised = lambda x: F.batch_norm(x, mean, var, None, None, False, 0.0)",
        "test_moments_rules.py",
    ),
    Mutant(
        f"{MOM}/rules/norms.py",
        "lambda x: F.layer_norm(x, shape, None, None, eps)",
        "lambda x: F.layer_norm(x, shape)",
        "test_moments_rules.py",
    ),
    Mutant(
        f"{MOM}/rules/lookups.py",
        "    if padding is not None and padding < 0:\n        padding += rows\n",
        "",
        "test_moments_rules.py",
    ),
    Mutant(
        f"{MOM}/rules/lookups.py",
        "kept = delta if padding is None else",
        "kept = delta if True else",
        "test_moments_rules.py",
    ),
    Mutant(
        f"{MOM}/rules/lookups.py",
        'wrapped = torch.where(index < 0, index + a["input"].shape[0], index)',
        "wrapped = index.abs()",
        "test_moments_rules.py",
    ),
    Mutant(
        f"{MOM}/rules/products.py",
        'if a["beta"] != 1 or a["alpha"] != 1 or owned(x):',
        "if owned(x):",
        "test_moments_rules.py",
    ),
    Mutant(
        f"{MOM}/rules/broadcasts.py",
        'delta_alone if owned(a["input"]) else lambda delta: (-delta,)',
        "delta_alone",
        "test_moments_rules.py",
    ),
    Mutant(
        f"{MOM}/rules/broadcasts.py",
        "torch.mul(*raised(delta, x.clamp(max=0)))",
        "torch.mul(*raised(delta, x))",
        "test_moments_rules.py",
    ),
    Mutant(
        f"{MOM}/rules/convolutions.py",
        "return None if any(r % 2 for r in reach) else [r // 2 for r in reach]",
        "return [r // 2 for r in reach]",
        "test_moments_rules.py",
    ),
    Mutant(
        f"{MOM}/forms.py",
        "target.add_leg(leg, gram(leg.unfold(own * norms)))",
        "target.add_leg(leg, gram(leg.unfold(own)))",
        "test_moments_engine.py test_moments_paths.py",
    ),
    Mutant(
        f"{MOM}/forms.py",
        "slot[1:] = (keys[1:] != keys[:-1]).cumsum(0)",
        "slot[1:] = torch.arange(1, len(keys))",
        "test_moments_rules.py test_moments_engine.py",
    ),
    Mutant(
        f"{MOM}/forms.py",
        "weighted = other @ other.mT @ own",
        "weighted = own",
        "test_moments_engine.py test_moments_paths.py test_moments_rules.py",
    ),
    Mutant(
        f"{MOM}/result.py",
        "return (f * q, -f * q), (-v * q, 1 + v * q)",
        "return (f * q, -f * q), (0.0, 1.0)",
        "test_flow.py test_moments_engine.py",
    ),
    Mutant(
        f"{MOM}/result.py",
        "max(0, n - distinct) / max(1, n - 1) / drawn",
        "1 / drawn",
        "test_moments_engine.py test_flow.py test_moments_minibatch.py",
    ),
    Mutant(
        f"{MOM}/result.py",
        "weights = [p.samples / total for p in parts]",
        "weights = [1 / len(parts) for p in parts]",
        "test_moments_engine.py test_moments_statistics.py",
    ),
    Mutant(
        f"{MOM}/statistics.py",
        "variance = ((pseudo - mean).square() / (h - 1)).mean(0)",
        "variance = (pseudo - mean).square().mean(0)",
        "test_moments_statistics.py test_moments_engine.py",
    ),
    Mutant(f"{MOM}/statistics.py", "max(0.0, 1 - n / dataset_size)", "1.0", "test_flow.py test_moments_engine.py"),
    # flow and equilibrium
    Mutant(f"{EQ}/flow.py", "gradient=-eta * shrink * cross_charge", "gradient=-eta * cross_charge", "test_flow.py"),
    Mutant(f"{EQ}/flow.py", "decay=(shrink**2 - 1) * charge", "decay=(shrink - 1) * charge", "test_flow.py"),
    Mutant(
        f"{EQ}/flow.py",
        "squares = [leg.exponent**2 for leg in symmetry.weight_legs]",
        "squares = [abs(leg.exponent) for leg in symmetry.weight_legs]",
        "test_flow.py",
    ),
    Mutant(f"{EQ}/flow.py", "decay=-drift.decay * charge", "decay=drift.decay * charge", "test_flow.py"),
    Mutant(
        f"{EQ}/flow.py",
        "torch.linalg.eigvalsh(root @ k[finite] @ root).amax(-1) / 4",
        "torch.linalg.eigvalsh(root @ k[finite] @ root).amin(-1) / 4",
        "test_flow.py",
    ),
    Mutant(
        f"{EQ}/potential.py",
        "return lr * weight_decay * (2 - lr * weight_decay) / (1 - momentum)",
        "return 2 * lr * weight_decay / (1 - momentum)",
        "test_flow.py test_equilibrium_potential.py",
    ),
    Mutant(
        f"{EQ}/potential.py",
        "return lr**2 / (1 - momentum) ** 2",
        "return lr**2 / (1 - momentum)",
        "test_flow.py test_equilibrium_potential.py",
    ),
    Mutant(
        f"{EQ}/potential.py",
        "first = 1 + momentum - nesterov * 2 * momentum * (1 - momentum)",
        "first = 1 + momentum",
        "test_equilibrium_potential.py",
    ),
    Mutant(
        f"{EQ}/potential.py",
        "together = -(1 - lags / batches) / (batches - 1)",
        "together = -np.ones(len(lags)) / (batches - 1)",
        "test_equilibrium_potential.py",
    ),
    Mutant(
        f"{EQ}/terms.py",
        "change = leg.exponent * leg.collect(k * rate)",
        "change = leg.collect(k * rate)",
        "test_equilibrium_forecast.py test_flow.py test_equilibrium_joint.py",
    ),
    Mutant(
        f"{EQ}/terms.py",
        "rate = rate + leg.exponent * leg.spread(generators[leg.symmetry], outside=0.0)",
        "rate = rate + (-1.0) ** (leg.exponent < 0) * leg.spread(generators[leg.symmetry], outside=0.0)",
        "test_equilibrium_forecast.py test_flow.py test_equilibrium_joint.py",
    ),
    Mutant(
        f"{EQ}/terms.py",
        "trace = (inner[0] * inner[1]).sum() / n",
        "trace = (inner[0] * inner[1]).sum()",
        "test_equilibrium_joint.py",
    ),
    Mutant(
        f"{EQ}/terms.py",
        "change = 2 * self.exponent**2 * a * self.weight",
        "change = 2 * abs(self.exponent) * a * self.weight",
        "test_equilibrium_forecast.py test_flow.py",
    ),
    Mutant(
        f"{EQ}/terms.py",
        "factor = element ** (2 * self.exponent)",
        "factor = element**self.exponent",
        "test_equilibrium_joint.py",
    ),
    Mutant(f"{EQ}/blocks.py", "return (y / x) ** 0.25", "return (y / x) ** 0.5", "test_equilibrium_closed_forms.py"),
    Mutant(
        f"{EQ}/blocks.py",
        "return spd.sqrtm(spd.geometric_mean(x, y))",
        "return spd.geometric_mean(x, y)",
        "test_equilibrium_closed_forms.py",
    ),
    Mutant(
        f"{EQ}/forecast.py",
        "rates += [a @ roots[0], -a @ roots[1]]",
        "rates += [a @ roots[0], a @ roots[1]]",
        "test_equilibrium_forecast.py test_flow.py",
    ),
    Mutant(
        f"{EQ}/sharpness.py",
        "return total, total - now + then",
        "return now, then",
        "test_sharpness.py",
    ),
    Mutant(f"{EQ}/sharpness.py", "((a - b) / 4).cpu()", "((a - b) / 2).cpu()", "test_sharpness.py"),
    # balance
    Mutant(
        f"{BAL}/motion.py",
        "return symmetry.move(name, tensor, dual.square())",
        "return symmetry.move(name, tensor, dual)",
        "test_balance.py",
    ),
    Mutant(
        f"{BAL}/motion.py", "return inverse if symmetry.is_torus else inverse.mT", "return inverse", "test_balance.py"
    ),
    Mutant(
        f"{BAL}/model.py",
        "            for target, value in reversed(old):\n                target.copy_(value)\n",
        "",
        "test_balance.py",
    ),
    # ledger
    Mutant(
        f"{MON}/measure.py",
        'whole["gradient"] = whole["gradient"] / scale',
        'whole["gradient"] = whole["gradient"]',
        "test_ledger_estimates.py test_ledger_edges.py test_ledger.py",
    ),
    Mutant(
        f"{MON}/rules.py",
        "lead, memory_lead = 1 + mu * fresh, mu * mu * started",
        "lead, memory_lead = 1 + mu * fresh, mu * started",
        "test_ledger.py",
    ),
    Mutant(
        f"{MON}/rules.py",
        "fresh = kept if started else 1.0",
        "fresh = kept",
        "test_ledger.py",
    ),
    Mutant(f"{MON}/rules.py", "rate=root * lr / (1 - beta1**k)", "rate=root * lr", "test_ledger.py"),
    Mutant(
        f"{MON}/rules.py",
        "shrink, scalar = 1 - c.lr * c.decoupled, c.rate * reference",
        "shrink, scalar = 1.0, c.rate * reference",
        "test_ledger.py",
    ),
    Mutant(
        f"{MON}/rules.py",
        "return replace(c, sign=c.sign / scale)",
        "return c",
        "test_ledger_edges.py test_ledger.py test_ledger_runs.py test_adapters.py",
    ),
    Mutant(
        f"{MON}/estimates.py",
        "0.25 * np.log(y / x)",
        "0.5 * np.log(y / x)",
        "test_ledger_estimates.py",
    ),
    Mutant(
        f"{MON}/estimates.py",
        "steps = 0.5 * (norm_minus / y * np.log(target) - slow * np.log(left))",
        "steps = 0.5 * (-slow * np.log(left))",
        "test_ledger_estimates.py",
    ),
    Mutant(
        f"{MON}/estimates.py",
        "self.weight = np.where(known, keep * self.weight + 1 - keep, self.weight)",
        "self.weight = np.ones_like(values)",
        "test_ledger_estimates.py test_ledger_books.py",
    ),
    Mutant(
        f"{MON}/books.py",
        "norm = apply(layout.absolute, before)",
        "norm = apply(layout.matrix, before)",
        "test_ledger_books.py test_ledger.py",
    ),
    # the paper
    Mutant(
        f"{PAPER}/closed_form.py",
        "return decay / (2 * loss_scale**2 * eta * sgd.covariance_factor)",
        "return decay * sgd.batch_size / (2 * loss_scale**2 * eta)",
        "test_closed_form.py",
    ),
    Mutant(
        f"{PAPER}/closed_form.py",
        "gam_u = gam_u + _scaled(trace(sigma_x), signal) + 2 * es @ es.mT",
        "gam_u = gam_u + _scaled(trace(sigma_x), signal) + es @ es.mT",
        "test_closed_form.py",
    ),
    Mutant(
        f"{PAPER}/closed_form.py",
        "outer = c ** (-(depth - 2) / 2)",
        "outer = c ** (-(depth - 1) / 2)",
        "test_closed_form.py",
    ),
    Mutant(
        f"{PAPER}/simulate.py",
        "mixed = [d + math.sqrt(self.substeps) * n",
        "mixed = [d + n",
        "test_reproduce_simulate.py",
    ),
    Mutant(
        f"{PAPER}/simulate.py",
        "chi = (2 * torch._standard_gamma",
        "chi = (torch._standard_gamma",
        "test_reproduce_simulate.py",
    ),
    Mutant(
        f"{PAPER}/rank_one.py",
        "residual_u = length.square() * h - self.size * (u @ self.a)[:, None] * k - length * noise_u",
        "residual_u = length.square() * h - self.size * (u @ self.a)[:, None] * k",
        "test_reproduce_rank_one.py",
    ),
    Mutant(
        f"{PAPER}/experiment.py",
        "return abs(self.measured - self.predicted) + reach <= allowed",
        "return abs(self.measured - self.predicted) <= allowed",
        "test_reproduce_runner.py",
    ),
    Mutant(
        f"{PAPER}/experiment.py",
        "math.hypot(da / b, a * db / b**2)",
        "math.hypot(da / b, db / b)",
        "test_reproduce_runner.py",
    ),
    Mutant(
        f"{PAPER}/theory.py",
        "return gam_u, gam_w + cf.trace(once)[..., None, None] * sigma_x + (1 + s) * sigma_x @ columns @ sigma_x",
        "return gam_u, gam_w + cf.trace(once)[..., None, None] * sigma_x",
        "test_reproduce_generic.py",
    ),
)


def source_digest(paths: Iterable[Path]) -> str:
    """A digest of all Python files below the given folders or files."""
    digest = hashlib.sha256()
    for path in sorted(p for base in paths for p in ([base] if base.is_file() else base.rglob("*.py"))):
        digest.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()


def pytest_arguments(tests: str) -> list[str]:
    """The arguments of pytest for the tests that exist: files of `tests/` by name."""
    named = [ROOT / "tests" / word for word in tests.split()]
    return [str(path) for path in named if Path(str(path).partition("::")[0]).exists()]


def run_tests(source: Path, tests: str) -> bool:
    """Whether the tests pass with the package imported from the folder `source`."""
    environment = {**os.environ, "PYTHONPATH": str(source), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *pytest_arguments(tests)]
    try:
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, timeout=LIMIT, check=False)
    except subprocess.TimeoutExpired:
        return False
    if done.returncode not in (0, 1):
        raise RuntimeError(f"pytest could not run {tests}: {done.stdout.decode()[-2000:]}")
    return done.returncode == 0


def survives(mutant: Mutant) -> bool:
    """Whether the tests named beside the fault pass with it."""
    with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
        source = Path(folder) / "src"
        shutil.copytree(ROOT / "src", source, ignore=shutil.ignore_patterns("__pycache__"))
        target = source / mutant.file
        text = target.read_text(encoding="utf-8")
        assert text.count(mutant.text) == 1, f"{mutant.title}: the text must occur once in the file"
        target.write_text(text.replace(mutant.text, mutant.fault), encoding="utf-8")
        return run_tests(source, mutant.tests)


class Results:
    """Outcomes by a digest of the fault and of what they depend on, written after every one of them."""

    def __init__(self, again: bool) -> None:
        self.state = source_digest([ROOT / "src"])
        self.known: dict[str, bool] = {} if again or not KEPT.exists() else json.loads(KEPT.read_text())

    def key(self, mutant: Mutant) -> str:
        files = [Path(a.partition("::")[0]) for a in pytest_arguments(mutant.tests)]
        return hashlib.sha256(f"{self.state}{mutant}{source_digest(files)}".encode()).hexdigest()[:24]

    def outcome(self, mutant: Mutant) -> tuple[bool, bool]:
        """Whether the fault survives, and whether that was known before."""
        key = self.key(mutant)
        if key in self.known:
            return self.known[key], True
        self.known[key] = survives(mutant)
        KEPT.write_text(json.dumps(self.known))
        return self.known[key], False


def broken_without_fault(mutants: Sequence[Mutant], jobs: int) -> list[str]:
    """The test lists that fail on the code as it is: with these nothing can be told."""
    lists = sorted({m.tests for m in mutants})
    with ThreadPoolExecutor(jobs) as pool:
        passed = list(pool.map(lambda tests: run_tests(ROOT / "src", tests), lists))
    return [tests for tests, ok in zip(lists, passed, strict=True) if not ok]


def main() -> int:
    """Run the mutants; 0 when none survives."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("words", nargs="*", help="only mutants whose file or text has one of these words")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--again", action="store_true", help="forget what is known from earlier runs")
    parser.add_argument("--trust", action="store_true", help="do not check first that the tests pass without a fault")
    options = parser.parse_args()
    chosen = [m for m in MUTANTS if not options.words or any(w in m.title for w in options.words)]
    results = Results(options.again)
    fresh = [m for m in chosen if results.key(m) not in results.known]
    if fresh and not options.trust and (broken := broken_without_fault(fresh, options.jobs)):
        print(f"these tests fail without any fault: {broken}")
        return 2
    survivors = 0
    with ThreadPoolExecutor(options.jobs) as pool:
        outcomes = pool.map(results.outcome, chosen)
        for number, (mutant, (alive, known)) in enumerate(zip(chosen, outcomes, strict=True), 1):
            word = "SURVIVES" if alive else "noticed"
            print(f"[{number}/{len(chosen)}] {word}{' (known)' * known} {mutant.title}", flush=True)
            survivors += alive
    print(f"{len(chosen) - survivors} of {len(chosen)} faults are noticed")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
