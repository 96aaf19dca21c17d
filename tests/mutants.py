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
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

pytest: Any = None  # imported by the main program only, before it forks

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
        tests: files of `tests/` (or `file::test`), separated by spaces.
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
DIAG = "noetherflow/diagnosis"

MUTANTS = (
    # sums by piece, foreign optimisers, losses, the solve in turns
    Mutant(f"{SYM}/leg.py", "            whole += piece", "            whole.copy_(piece)", "test_symmetry.py"),
    Mutant(f"{CORE}/foreign.py", '"adam", "ademamix", "lamb"', '"ademamix", "lamb"', "test_foreign_optimizers.py"),
    Mutant(
        f"{CORE}/codes.py",
        "(self.values[1:] + self.values[:-1]) / 2",
        "self.values[1:]",
        "test_foreign_optimizers.py",
    ),
    Mutant(f"{EQ}/state_sums.py", "mean_square * step", "mean_square * over", "test_state_flow.py"),
    Mutant(f"{MON}/measure.py", "float(loss.detach()) if", "loss.detach() if", "test_diagnosis_losses.py"),
    Mutant(f"{DIAG}/losses.py", "low > max(math.log(SEVERAL)", "low > max(1e9", "test_diagnosis_losses.py"),
    Mutant(f"{MON}/pace.py", "% self.estimate_every < self.every", "% self.estimate_every < 1", "test_ledger_pace.py"),
    Mutant(f"{EQ}/alternate.py", "worst = worst_of(", "worst = 0.5 * worst_of(", "test_equilibrium_turns.py"),
    # diagnosis, ranks and waiting books
    Mutant(
        "noetherflow/equilibrium/potential.py",
        "    if noise * a * (1 + ROUNDING) + mean * c >= 0:\n",
        "    if True:\n",
        "test_diagnosis_errors.py::test_no_equilibrium_of_adam_from_samples_that_cannot_tell_the_mean_gradient_from_noise",
    ),
    Mutant(
        f"{DIAG}/parts.py",
        "    power = 0.25 if isinstance(settings, SGDConfig) else 0.5\n",
        "    power = 2.5 if isinstance(settings, SGDConfig) else 5.0\n",
        "test_diagnosis_errors.py::test_the_error_of_a_factor_is_its_scatter_over_sets_of_samples",
    ),
    Mutant(
        "noetherflow/measured.py",
        "parameters=used, for_=purpose)",
        "parameters=used)",
        "test_diagnosis_errors.py::test_a_joint_equilibrium_that_takes_factors_has_them_from_the_one_measurement",
    ),
    Mutant(
        "noetherflow/core/sightings.py",
        ' and name != "softmax" and func not in self._inside:',
        ' and name != "softmax":',
        "test_sightings.py::test_a_model_with_pooling_is_looked_at_and_answered",
    ),
    Mutant(
        f"{DIAG}/losses.py",
        "        return number if number > share * self.steps else 0\n",
        "        return 0\n",
        "test_diagnosis_rates.py::test_a_last_level_that_is_the_mean_of_many_steps_is_called_one",
    ),
    Mutant(f"{DIAG}/step.py", "(squares - mean.square()) + mean", "squares + mean", "test_diagnosis_rules.py"),
    Mutant(f"{DIAG}/histories.py", "return known[at[known] >= since]", "return known", "test_diagnose.py"),
    Mutant(f"{DIAG}/stability.py", "    if fact.small:\n", "    if False:\n", "test_diagnosis_rules.py"),
    Mutant(f"{DIAG}/finding.py", "if f.topic not in answered:", "if True:", "test_diagnosis_rules.py"),
    Mutant(
        "noetherflow/core/held.py",
        "if peak_rate(group) > 0] or list(groups)",
        "if peak_rate(group) >= 0]",
        "test_diagnose.py::test_a_group_at_a_rate_of_zero_is_not_trained",
    ),
    Mutant(
        f"{MON}/recorder.py",
        "        self._keep_loss()\n        self._loss = noted",
        "        self._loss = noted",
        "test_diagnose.py::test_a_loss_that_is_nan_in_a_step_that_is_left_out_is_told",
    ),
    Mutant(f"{PAPER}/experiments/thm43.py", "-np.expm1(-2 * lam * a)", "-np.expm1(2 * lam * a)", "test_print.py"),
    Mutant(f"{DIAG}/stability.py", "fact.ended >= ROSE * fact.began", "False", "test_diagnosis_rules.py"),
    Mutant(f"{DIAG}/losses.py", "np.average(usual, weights=shared)", "np.average(usual)", "test_diagnosis_losses.py"),
    Mutant(f"{DIAG}/losses.py", "unseen = between > SEEN_BETWEEN", "unseen = False", "test_diagnosis_losses.py"),
    Mutant(
        f"{MOM}/measuring.py",
        "made.repeatable and numbers_held(modules) == before",
        "True",
        "test_moments_one_forward.py",
    ),
    Mutant(f"{MOM}/verify.py", "if not agreement.agrees:", "if False:", "test_moments_engine.py"),
    Mutant(f"{FIND}/export.py", "with TRACING, uninterrupted():", "with TRACING:", "test_interruptible.py"),
    Mutant(
        f"{DIAG}/finding.py", 'replace(f, severity="watch", sure=sure)', "replace(f, sure=sure)", "test_diagnose.py"
    ),
    Mutant(f"{PAPER}/fluctuations.py", " + w.square() * (noise @ z) * x.sum()", "", "test_reproduce_fluctuations.py"),
    Mutant(f"{PAPER}/fluctuations.py", "x * (_sums(u, w) * z).sum(0) + ", "", "test_reproduce_fluctuations.py"),
    Mutant(f"{DIAG}/decay.py", "pace * data.family", "data.family", "test_diagnosis_decay.py"),
    Mutant(
        f"{DIAG}/of_model.py",
        "fact.steps / course.mean_square",
        "fact.steps / course.mean",
        "test_diagnosis_schedule.py",
    ),
    Mutant(f"{DIAG}/of_model.py", ", n) * examined.course.mean", ", n)", "test_diagnosis_schedule.py"),
    Mutant(f"{DIAG}/rates.py", "np.average(mean, weights=number)", "np.average(mean)", "test_diagnosis_rates.py"),
    Mutant(f"{DIAG}/rates.py", "guessed = line if line >", "guessed = 0 if line >", "test_diagnosis_rates.py"),
    Mutant(
        "noetherflow/core/schedule.py",
        "return peak + 1 if peak > 0 and",
        "return peak if peak > 0 and",
        "test_diagnosis_schedule.py",
    ),
    Mutant(
        "noetherflow/monitor/spikes.py", "told = (number >= SEVERAL)", "told = (number < 0)", "test_diagnosis_rates.py"
    ),
    Mutant(f"{DIAG}/decay.py", "if not memory < FORGETS", "if True", "test_diagnosis_decay.py"),
    Mutant(f"{CORE}/ranks.py", "if first.get(n) != other.get(n)", "if False", "test_ranks.py"),
    Mutant(f"{MON}/recorder.py", "elif self._pending:", "elif False:", "test_ranks.py"),
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
        "test_overlap.py",
    ),
    Mutant(f"{SYM}/overlap.py", "int(torch.as_tensor(count).max()) > 1", "False", "test_overlap.py"),
    # settings
    Mutant(
        f"{CORE}/rates.py",
        "(dataset_size - batch_size) / (dataset_size - 1) / batch_size",
        "1.0 / batch_size",
        "test_closed_form.py::test_decay_shift_weighs_decay_against_the_noise_of_a_minibatch",
    ),
    Mutant(
        f"{CORE}/settings.py",
        "return self.lr / (1 - self.momentum)",
        "return self.lr",
        "test_closed_form.py test_declare.py",
    ),
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
        'power = 2.0 if short_name(ctx.node).startswith("var") else 1.0',
        "power = 1.0",
        "test_brute_force.py::test_a_variance_scales_with_the_square_and_a_deviation_with_the_scale",
    ),
    Mutant(
        f"{FIND}/rules/norms.py",
        "    ctx.store.singletons(x.fields)\n    return mean(ctx, x, dim, keepdim)",
        "    return mean(ctx, x, dim, keepdim)",
        "test_brute_force.py::test_a_maximum_lets_scales_pass_but_no_mixing",
    ),
    Mutant(
        f"{FIND}/rules/norms.py",
        "    if eps:\n",
        "    if False:\n",
        "test_brute_force.py::test_the_eps_of_a_norm_is_what_makes_its_scale_approximate",
    ),
    Mutant(
        f"{FIND}/rules/norms.py",
        '[replace(f, exponent=power * f.exponent) for f in scale], "is a running statistic"',
        'scale, "is a running statistic"',
        "test_discovery.py test_certify.py",
    ),
    Mutant(
        f"{FIND}/rules/elementwise.py",
        "bounds = [bound for bound in (low, high) if",
        "bounds = [bound for bound in (low,) if",
        "test_brute_force.py::test_bounds_other_than_zero_pass_no_scale",
    ),
    Mutant(
        f"{FIND}/rules/elementwise.py",
        'if name == "threshold" and high == low == 0:',
        'if name == "threshold":',
        "test_brute_force.py::test_bounds_other_than_zero_pass_no_scale",
    ),
    Mutant(
        f"{FIND}/rules/elementwise.py",
        '    ctx.store.singletons(x.fields)\n    ctx.store.tag(x.fields, "relu")',
        '    ctx.store.tag(x.fields, "relu")',
        "test_discovery.py::test_hand_derived_counts",
    ),
    Mutant(
        f"{FIND}/rules/elementwise.py",
        "Field(f.ids, sign * f.exponent) for f in b",
        "Field(f.ids, f.exponent) for f in b",
        "test_discovery.py::test_hand_derived_counts",
    ),
    Mutant(
        f"{FIND}/rules/elementwise.py",
        "return _power(ctx, x, -0.5)",
        "return _power(ctx, x, 0.5)",
        "test_discovery.py::test_hand_derived_counts",
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
        "test_discovery.py::test_hand_derived_counts",
    ),
    Mutant(
        f"{FIND}/rules/shape.py",
        "labels += (k + 1) * np.isin(atoms, np.unique(piece.ids.numpy()))",
        "labels += np.isin(atoms, np.unique(piece.ids.numpy()))",
        "test_discovery.py::test_hand_derived_counts test_discovery_rules.py",
    ),
    Mutant(
        f"{FIND}/rules/shape.py",
        "if x.zero or y.zero:\n        return y.fields if x.zero else x.fields",
        "if x.zero or y.zero:\n        return ()",
        "test_discovery.py::test_hand_derived_counts test_discovery_rules.py",
    ),
    Mutant(f"{FIND}/linear_system.py", "rz, rz + n])", "rz, rz])", "test_random_graphs.py test_certify_general.py"),
    Mutant(
        f"{FIND}/linear_system.py",
        "relation = np.where(ratio[equal] > 0, -1, 1)",
        "relation = np.where(ratio[equal] > 0, 1, -1)",
        "test_discovery.py::test_hand_derived_counts",
    ),
    Mutant(
        f"{FIND}/shift_rules/absorbing.py",
        'ctx.absorb(x, list(range(n - len(normalized), n)), "null")',
        'ctx.absorb(x, [n - 1], "null")',
        "test_brute_force.py::test_a_norm_over_two_axes_ignores_their_common_mean_only",
    ),
    # certificate and oracle
    Mutant(
        f"{FIND}/verdict.py",
        "return conserved(v, statistics) < DRAWN_SLACK * tolerance and (statistics or",
        "return True or (statistics or",
        "test_certify_backward.py::test_an_altered_backward_is_broken_and_named",
    ),
    Mutant(
        f"{FIND}/verdict.py",
        "return max(v.loss, v.conserved)\n\n\ndef uns",
        "return v.loss\n\n\ndef uns",
        "test_brute_force.py::test_an_example_of_zeros_does_not_hide_an_altered_backward",
    ),
    Mutant(
        f"{FIND}/verdict.py",
        "    if v.without_effect:",
        "    if False:",
        "test_certify_general.py::test_where_weights_never_have_an_effect_nothing_is_determined",
    ),
    Mutant(
        f"{FIND}/violations.py",
        "scale = _norm(predicted, names)\n",
        "scale = math.inf\n",
        "test_brute_force.py::test_gradients_that_are_not_those_of_the_moved_point_are_noticed",
    ),
    Mutant(
        f"{FIND}/oracle.py",
        "return SymmetryCount(null - relations,",
        "return SymmetryCount(null,",
        "test_oracle.py::test_lie_algebra_dimensions_of_theory_11",
    ),
    Mutant(
        f"{FIND}/raw_axes.py",
        "(self.size * (self.size + 1) // 2 if symmetric else self.size**2)",
        "self.size**2",
        "test_docs.py::test_examples_in_docstrings_run_and_print_what_is_shown[noetherflow.discovery.raw_axes]",
    ),
    # moments
    Mutant(
        f"{MOM}/rules/norms.py",
        "lambda x: F.batch_norm(x, mean, var, None, None, False, 0.0, eps)",
        "lambda x: F.batch_norm(x, mean, var, None, None, False, 0.0)",
        "test_brute_force.py::test_moments_of_a_gain_know_the_eps_of_the_norm",
    ),
    Mutant(
        f"{MOM}/rules/norms.py",
        "lambda x: F.layer_norm(x, shape, None, None, eps)",
        "lambda x: F.layer_norm(x, shape)",
        "test_brute_force.py::test_moments_of_a_gain_know_the_eps_of_the_norm",
    ),
    Mutant(
        f"{MOM}/rules/lookups.py",
        "    if padding is not None and padding < 0:\n        padding += rows\n",
        "",
        "test_brute_force.py::test_moments_of_an_embedding_leave_out_its_padding_row",
    ),
    Mutant(
        f"{MOM}/rules/lookups.py",
        "kept = delta if padding is None else",
        "kept = delta if True else",
        "test_brute_force.py::test_moments_of_an_embedding_leave_out_its_padding_row",
    ),
    Mutant(
        f"{MOM}/rules/lookups.py",
        'wrapped = torch.where(index < 0, index + a["input"].shape[0], index)',
        "wrapped = index.abs()",
        "test_moments_rules.py::test_rule_equals_per_sample_loop",
    ),
    Mutant(
        f"{MOM}/rules/products.py",
        'if a["beta"] != 1 or a["alpha"] != 1 or owned(x):',
        "if owned(x):",
        "test_brute_force.py::test_what_a_rule_does_not_cover_is_measured_all_the_same",
    ),
    Mutant(
        f"{MOM}/rules/broadcasts.py",
        'delta_alone if owned(a["input"]) else lambda delta: (-delta,)',
        "delta_alone",
        "test_moments_rules.py::test_rule_equals_per_sample_loop",
    ),
    Mutant(
        f"{MOM}/rules/broadcasts.py",
        "torch.mul(*raised(delta, x.clamp(max=0)))",
        "torch.mul(*raised(delta, x))",
        "test_moments_rules.py::test_rule_equals_per_sample_loop",
    ),
    Mutant(
        f"{MOM}/rules/convolutions.py",
        "return None if any(r % 2 for r in reach) else [r // 2 for r in reach]",
        "return [r // 2 for r in reach]",
        "test_brute_force.py::test_what_a_rule_does_not_cover_is_measured_all_the_same",
    ),
    Mutant(
        f"{MOM}/forms.py",
        "target.add_leg(leg, gram(leg.unfold(own * norms)))",
        "target.add_leg(leg, gram(leg.unfold(own)))",
        "test_moments_rules.py::test_rule_equals_per_sample_loop",
    ),
    Mutant(
        f"{MOM}/forms.py",
        "slot[1:] = (keys[1:] != keys[:-1]).cumsum(0)",
        "slot[1:] = torch.arange(1, len(keys))",
        "test_brute_force.py::test_moments_of_an_embedding_leave_out_its_padding_row",
    ),
    Mutant(
        f"{MOM}/forms.py",
        "weighted = other @ other.mT @ own",
        "weighted = own",
        "test_moments_rules.py::test_both_contractions_equal_the_loop",
    ),
    Mutant(
        f"{MOM}/result.py",
        "return (f * q, -f * q), (-v * q, 1 + v * q)",
        "return (f * q, -f * q), (0.0, 1.0)",
        "test_moments_engine.py::test_weights_of_a_part_of_a_data_set_are_unbiased",
    ),
    Mutant(
        f"{MOM}/result.py",
        "max(0, n - distinct) / max(1, n - 1) / drawn",
        "1 / drawn",
        "test_moments_engine.py::test_weights_of_a_part_of_a_data_set_are_unbiased",
    ),
    Mutant(
        f"{MOM}/result.py",
        "weights = [p.samples / total for p in parts]",
        "weights = [1 / len(parts) for p in parts]",
        "test_moments_engine.py::test_uneven_batches_and_changing_shapes_are_measured",
    ),
    Mutant(
        f"{MOM}/statistics.py",
        "variance = ((pseudo - mean).square() / (h - 1)).mean(0)",
        "variance = (pseudo - mean).square().mean(0)",
        "test_moments_engine.py::test_jackknife_of_a_mean_is_its_textbook_error",
    ),
    Mutant(
        f"{MOM}/statistics.py",
        "max(0.0, 1 - n / dataset_size)",
        "1.0",
        "test_moments_engine.py::test_error_of_a_part_of_a_data_set_by_brute_force",
    ),
    # flow and equilibrium
    Mutant(
        f"{EQ}/step.py",
        "gradient=-lr * shrink * cross_charge",
        "gradient=-lr * cross_charge",
        "test_brute_force.py::test_a_step_is_split_without_rest_whatever_the_gradient",
    ),
    Mutant(
        f"{EQ}/step.py",
        "decay=(shrink**2 - 1) * charge",
        "decay=(shrink - 1) * charge",
        "test_brute_force.py::test_a_step_is_split_without_rest_whatever_the_gradient",
    ),
    Mutant(
        f"{EQ}/flow.py",
        "squares = [leg.exponent**2 for leg in symmetry.weight_legs]",
        "squares = [abs(leg.exponent) for leg in symmetry.weight_legs]",
        "test_brute_force.py::test_relaxation_time_is_that_of_the_drift_along_the_orbit",
    ),
    Mutant(
        f"{EQ}/flow.py",
        "decay=-drift.decay * settled.charge_now",
        "decay=drift.decay * settled.charge_now",
        "test_flow.py::test_expected_drift_is_the_mean_of_real_steps",
    ),
    Mutant(
        f"{EQ}/invariance.py",
        "beyond = test.value.abs() > limit",
        "beyond = test.value.abs() > test.mean",
        "test_equilibrium_objective.py::test_a_loss_that_breaks_the_symmetry_is_refused",
    ),
    Mutant(
        f"{EQ}/conditioning.py",
        "return {n for n, value in self.by_name.items() if value > self.trusted}",
        "return set()",
        "test_equilibrium_objective.py::test_stretched_factors_reach_the_same_point_by_measuring_again",
    ),
    Mutant(
        f"{EQ}/regime.py",
        "return Regime(share, moments.loss / (sgd.effective_lr * square), memory)",
        "return Regime(share, moments.loss / (sgd.lr * square), memory)",
        "test_equilibrium_regime.py::test_horizon_is_the_loss_over_what_a_step_along_the_mean_gradient_takes",
    ),
    Mutant(
        f"{EQ}/regime.py",
        "c * traces[name] + d * square",
        "square",
        "test_equilibrium_regime.py::test_the_mean_gradients_square_leaves_out_the_noise_of_the_samples",
    ),
    Mutant(
        f"{EQ}/sharpness.py",
        "f * self.noise / (2 * (1 - sgd.momentum))",
        "f * self.noise / 2",
        "test_sharpness.py::test_the_load_is_where_minibatches_stop_being_stable_in_mean_square",
    ),
    Mutant(
        f"{EQ}/flow.py",
        "torch.linalg.eigvalsh(root @ k[finite] @ root).amax(-1) / 4",
        "torch.linalg.eigvalsh(root @ k[finite] @ root).amin(-1) / 4",
        "test_flow.py::test_relaxation_steps_are_the_decay_time_of_small_deviations",
    ),
    Mutant(
        f"{EQ}/potential.py",
        "rate: Number = lr * weight_decay * (2 - lr * weight_decay) / (1 - momentum)",
        "rate: Number = 2 * lr * weight_decay / (1 - momentum)",
        "test_brute_force.py::test_coefficients_of_the_drift_by_hand",
    ),
    Mutant(
        f"{EQ}/potential.py",
        "rate: Number = lr**2 / (1 - momentum) ** 2",
        "rate: Number = lr**2 / (1 - momentum)",
        "test_brute_force.py::test_coefficients_of_the_drift_by_hand",
    ),
    Mutant(
        f"{EQ}/potential.py",
        "(1 + momentum - nesterov * 2 * momentum * (1 - momentum))",
        "(1 + momentum)",
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
        "out[leg.symmetry] = out[leg.symmetry] + leg.exponent * leg.collect(change)",
        "out[leg.symmetry] = out[leg.symmetry] + leg.collect(change)",
        "test_brute_force.py::test_slopes_of_charges_are_those_of_charges_moved_a_little",
    ),
    Mutant(
        f"{EQ}/terms.py",
        "rate = rate + leg.exponent * leg.spread(generators[leg.symmetry], outside=0.0)",
        "rate = rate + (-1.0) ** (leg.exponent < 0) * leg.spread(generators[leg.symmetry], outside=0.0)",
        "test_brute_force.py::test_slopes_of_charges_are_those_of_charges_moved_a_little",
    ),
    Mutant(
        f"{EQ}/sample_terms.py",
        "return self.sizes(there.theta, there.mean, (inner[0] * inner[1]).sum() / len(inner[0]))",
        "return self.sizes(there.theta, there.mean, (inner[0] * inner[1]).sum())",
        "test_brute_force.py::test_trace_of_the_noise_from_samples_is_the_mean_over_samples",
    ),
    Mutant(
        f"{EQ}/terms.py",
        "k = 2 * self.exponent**2 * self.weight * element ** (2 * self.exponent)",
        "k = 2 * abs(self.exponent) * self.weight * element ** (2 * self.exponent)",
        "test_brute_force.py::test_slopes_of_charges_are_those_of_charges_moved_a_little",
    ),
    Mutant(
        f"{EQ}/terms.py",
        "factor = element ** (2 * self.exponent)",
        "factor = element**self.exponent",
        "test_equilibrium_joint.py::test_self_coupled_layer_and_unequal_powers",
    ),
    Mutant(
        f"{EQ}/blocks.py",
        "return (y / x) ** 0.25",
        "return (y / x) ** 0.5",
        "test_equilibrium_closed_forms.py::test_torus_factorisation_closed_form",
    ),
    Mutant(
        f"{EQ}/blocks.py",
        "return spd.sqrtm(spd.geometric_mean(x, y))",
        "return spd.geometric_mean(x, y)",
        "test_equilibrium_closed_forms.py::test_gl_closed_form_beats_every_neighbour",
    ),
    Mutant(
        f"{EQ}/adaptive_flow.py",
        "orbit_of_weights(self.weights, self.symmetries, part, self.config)",
        "orbit_of_weights(self.weights, self.symmetries, self.moments, self.config)",
        "test_adaptive_forecast_errors.py::test_errors_of_groups_of_other_sizes",
    ),
    Mutant(
        f"{EQ}/forecast.py",
        "rates += [a @ roots[0], -a @ roots[1]]",
        "rates += [a @ roots[0], a @ roots[1]]",
        "test_flow.py::test_forecast_starts_with_the_drift_and_ends_at_the_equilibrium",
    ),
    Mutant(
        f"{EQ}/curvature.py",
        "return total, total - now + then",
        "return now, then",
        "test_sharpness.py::test_trace_at_the_equilibrium_is_predicted_without_moving",
    ),
    Mutant(
        f"{EQ}/curvature.py",
        "((a - b) / 4).cpu()",
        "((a - b) / 2).cpu()",
        "test_sharpness.py::test_trace_at_the_equilibrium_is_predicted_without_moving",
    ),
    # balance
    Mutant(
        f"{BAL}/motion.py",
        "return symmetry.move(name, tensor, dual.square())",
        "return symmetry.move(name, tensor, dual)",
        "test_balance.py::test_torus_state_moves_exactly_like_gradients",
    ),
    Mutant(
        f"{BAL}/motion.py",
        "return inverse if symmetry.is_torus else inverse.mT",
        "return inverse",
        "test_balance.py::test_gradients_are_those_of_the_moved_model",
    ),
    Mutant(
        f"{BAL}/motion.py",
        "replace(leg, offset=0.0)",
        "leg",
        "test_torch_streaming.py::test_gradients_and_squares_move_as_weights_of_another_motion",
    ),
    Mutant(
        f"{BAL}/torch_save.py",
        "self.numbers.setdefault(place, str(len(self.numbers)))",
        "str(len(self.storages))",
        "test_torch_streaming.py::test_rewritten_file_is_that_of_torch_byte_by_byte",
    ),
    Mutant(
        f"{BAL}/torch_file.py",
        "if source is None or source.start + base in differing:",
        "if source is None:",
        "test_torch_streaming.py::test_rewritten_file_is_that_of_torch_byte_by_byte",
    ),
    Mutant(
        f"{BAL}/dcp_metadata.py",
        " or (folder / where).is_symlink()",
        "",
        "test_dcp.py::test_parts_outside_the_folder_are_refused",
    ),
    Mutant(
        f"{BAL}/dcp_metadata.py",
        "slice(o, o + n)",
        "slice(0, n)",
        "test_dcp.py::test_sharded_by_two_processes",
    ),
    Mutant(
        f"{BAL}/dcp_metadata.py",
        "raise pickle.UnpicklingError(",
        "return super().find_class(module, name)\n        raise pickle.UnpicklingError(",
        "test_dcp.py::test_hostile_metadata_is_refused_and_nothing_is_run",
    ),
    Mutant(
        f"{BAL}/model.py",
        "            for target, value in reversed(old):\n                target.copy_(value)\n",
        "",
        "test_balance.py::test_any_failure_puts_everything_back",
    ),
    Mutant(
        f"{BAL}/check.py",
        "return float(max(10 * eps**0.75",
        "return float(max(1e9 * eps**0.75",
        "test_balance_checked.py::test_the_default_tolerance_is_ten_eps_to_three_quarters",
    ),
    # ledger
    Mutant(
        f"{MON}/measure.py",
        'whole["gradient"] = whole["gradient"] / scale',
        'whole["gradient"] = whole["gradient"]',
        "test_brute_force.py::test_estimates_under_a_gradient_scaler_are_of_unscaled_gradients",
    ),
    Mutant(
        f"{MON}/rules.py",
        "lead, memory_lead = 1 + mu * fresh, mu * mu * started",
        "lead, memory_lead = 1 + mu * fresh, mu * started",
        "test_ledger.py::test_sgd_entries_equal_a_dense_replay",
    ),
    Mutant(
        f"{MON}/rules.py",
        "fresh = kept if started else 1.0",
        "fresh = kept",
        "test_ledger.py::test_sgd_entries_equal_a_dense_replay",
    ),
    Mutant(
        f"{MON}/rules.py",
        "rate=root * lr / (1 - beta1**k)",
        "rate=root * lr",
        "test_ledger.py::test_adam_entries_equal_a_dense_replay",
    ),
    Mutant(
        f"{MON}/rules.py",
        "shrink, scalar = 1 - c.lr * c.decoupled, c.rate * reference",
        "shrink, scalar = 1.0, c.rate * reference",
        "test_ledger.py::test_adam_entries_equal_a_dense_replay",
    ),
    Mutant(
        f"{MON}/rules.py",
        "return replace(c, sign=c.sign / scale)",
        "return c",
        "test_brute_force.py::test_estimates_under_a_gradient_scaler_are_of_unscaled_gradients",
    ),
    Mutant(
        f"{MON}/estimates.py",
        "0.25 * np.log(y / x)",
        "0.5 * np.log(y / x)",
        "test_ledger_estimates.py::test_distance_is_the_solvers_whatever_the_momentum",
    ),
    Mutant(
        f"{MON}/estimates.py",
        "steps = 0.5 * (norm_minus / y * np.log(target) - slow * np.log(left))",
        "steps = 0.5 * (-slow * np.log(left))",
        "test_ledger_estimates.py::test_relaxation_steps_equal_integration",
    ),
    Mutant(
        f"{MON}/estimates.py",
        "self.weight = np.where(known, keep * self.weight + 1 - keep, self.weight)",
        "self.weight = np.ones_like(values)",
        "test_ledger_estimates.py::test_estimates_agree_with_moments_of_the_minibatch_gradient",
    ),
    Mutant(
        f"{MON}/books.py",
        "norm = apply(layout.absolute, before)",
        "norm = apply(layout.matrix, before)",
        "test_ledger.py",
    ),
    Mutant(
        f"{MON}/books.py",
        "table *= _rate_ratios(np.asarray(settings.lr))",
        "pass",
        "test_ledger_divided.py::test_groups_with_rates_of_their_own_leave_the_charge_over_their_rates_alone",
    ),
    Mutant(
        f"{MON}/divided_rules.py",
        "n = fed * float(c.lead) + average * float(c.memory)",
        "n = fed + average * float(c.memory)",
        "test_ledger_divided.py::test_books_are_those_of_snapshots",
    ),
    Mutant(
        f"{MON}/divided_rules.py",
        "spread = square if centre is None else (square - centre.square()).clamp_min(0)",
        "spread = square",
        "test_ledger_divided.py::test_books_are_those_of_snapshots",
    ),
    Mutant(
        f"{EQ}/roots.py",
        "return max(config.lr, *(g.lr for g in config.groups), 0.0)",
        "return config.lr",
        "test_adaptive_flow.py::test_charge_drift_and_forecast_are_in_one_unit_where_only_another_layer_is_faster",
    ),
    # the paper
    Mutant(
        f"{PAPER}/closed_form.py",
        "return decay / (2 * loss_scale**2 * eta * sgd.covariance_factor)",
        "return decay * sgd.batch_size / (2 * loss_scale**2 * eta)",
        "test_closed_form.py::test_decay_shift_weighs_decay_against_the_noise_of_a_minibatch",
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
        f"{PAPER}/verdict.py",
        "return abs(self.measured - self.predicted) + reach <= allowed",
        "return abs(self.measured - self.predicted) <= allowed",
        "test_reproduce_runner.py",
    ),
    Mutant(
        f"{PAPER}/verdict.py",
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


def digest_of(paths: Iterable[Path]) -> str:
    """A digest of all Python files among the given ones and below the given folders."""
    digest = hashlib.sha256()
    for path in sorted(p for base in paths for p in ([base] if base.is_file() else base.rglob("*.py"))):
        digest.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()


def existing(tests: str) -> list[str]:
    """Arguments of pytest for the tests that exist: `a.py` and `a.py::test` of `tests/`."""
    named = [str(ROOT / "tests" / word) for word in tests.split()]
    return [name for name in named if Path(name.partition("::")[0]).exists()]


@dataclass(frozen=True)
class Run:
    """How tests ended: whether all passed, and the first that failed."""

    passed: bool
    failed: str = ""


class Child:
    """Tests run in a fork of this process, which has imported torch and pytest already but nothing of the package."""

    def __init__(self, source: Path, tests: Sequence[str]) -> None:
        self.output = Path(tempfile.mkstemp(prefix="mutant-", suffix=".txt")[1])
        self.began = time.monotonic()
        self.process = os.fork()
        if not self.process:
            self._run(source, tests)

    def _run(self, source: Path, tests: Sequence[str]) -> None:
        os.setpgid(0, 0)
        os.chdir(ROOT)
        handle = os.open(self.output, os.O_WRONLY | os.O_TRUNC)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        os.environ["PYTHONPATH"] = str(source)
        sys.path.insert(0, str(source))
        sys.dont_write_bytecode = True
        code = 70
        try:
            code = int(pytest.main(["-q", "-x", "-rf", "--tb=no", "-p", "no:cacheprovider", *tests]))
        finally:
            os._exit(code)

    def outcome(self) -> Iterator[Run | None]:
        """How the tests end, after None for every look in vain; they are stopped when nobody looks any more."""
        run = None
        try:
            while run is None:
                run = self._ended()
                yield run
        finally:
            if run is None:
                self._stop()

    def _stop(self) -> None:
        with suppress(ProcessLookupError, ChildProcessError):  # it ended by itself: pytest refused
            os.killpg(self.process, signal.SIGKILL)
            os.waitpid(self.process, 0)

    def _ended(self) -> Run | None:
        done, status = os.waitpid(self.process, os.WNOHANG)
        late = time.monotonic() - self.began > LIMIT
        if not done and not late:
            return None
        if not done:
            self._stop()
        text = self.output.read_text(encoding="utf-8", errors="replace")
        self.output.unlink()
        code = os.waitstatus_to_exitcode(status) if done else 1
        if code not in (0, 1):
            raise RuntimeError(f"pytest could not run the tests:\n{text[-3000:]}")
        failed = re.search(r"^FAILED (tests/\S+::\S+)", text, re.MULTILINE)
        return Run(code == 0, whole_name(failed[1]) if failed else "")


def whole_name(listed: str) -> str:
    """The name of a test as pytest lists it, up to the first space; of parameters that hold one nothing is kept.

    Example:
        >>> whole_name("tests/test_a.py::test_b[products"), whole_name("tests/test_a.py::test_b[c]")
        ('test_a.py::test_b', 'test_a.py::test_b[c]')
    """
    name = listed.removeprefix("tests/")
    return name if "[" not in name or name.endswith("]") else name.partition("[")[0]


def faulty_source(mutant: Mutant, folder: Path) -> Path:
    """A copy of `src` with the fault in it."""
    source = folder / "src"
    shutil.copytree(ROOT / "src", source, ignore=shutil.ignore_patterns("__pycache__"))
    target = source / mutant.file
    text = target.read_text(encoding="utf-8")
    assert text.count(mutant.text) == 1, f"{mutant.title}: the text must occur once in the file"
    target.write_text(text.replace(mutant.text, mutant.fault), encoding="utf-8")
    return source


class Memory:
    """What earlier runs found, written after every outcome: which faults survive, and the first test to notice each."""

    def __init__(self, again: bool) -> None:
        stored = {} if again or not KEPT.exists() else json.loads(KEPT.read_text())
        self.outcomes: dict[str, bool] = stored.get("outcomes", {})
        self.noticed_by: dict[str, str] = stored.get("noticed_by", {})
        self.state = digest_of([ROOT / "src"])

    def key(self, mutant: Mutant) -> str:
        files = [Path(name.partition("::")[0]) for name in existing(mutant.tests)]
        return hashlib.sha256(f"{self.state}{mutant}{digest_of(files)}".encode()).hexdigest()[:24]

    def store(self, mutant: Mutant, run: Run) -> None:
        self.outcomes[self.key(mutant)] = run.passed
        if run.failed:
            self.noticed_by[mutant.title] = run.failed
        KEPT.write_text(json.dumps({"outcomes": self.outcomes, "noticed_by": self.noticed_by}, indent=1))


def tried(mutant: Mutant, memory: Memory) -> Iterator[Run | None]:
    """The outcome of one fault, after None for every look in vain: first by the test that noticed it last time."""
    with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
        source = faulty_source(mutant, Path(folder))
        last = memory.noticed_by.get(mutant.title, "")
        first = existing(whole_name(last)) if last.startswith(tuple(mutant.tests.split())) else []
        for tests in filter(None, (first, existing(mutant.tests))):
            run = None
            for run in Child(source, tests).outcome():
                if run is None:
                    yield None
            if run is not None and not run.passed:
                break
        yield run


def in_parallel(tasks: Mapping[str, Iterator[Run | None]], jobs: int) -> Iterator[tuple[str, Run]]:
    """The outcomes of tasks by name, as they come, with so many of them under way."""
    waiting, running = list(tasks.items()), dict[str, Iterator[Run | None]]()
    try:
        while waiting or running:
            running |= dict(waiting[: jobs - len(running)])
            waiting = [(name, task) for name, task in waiting if name not in running]
            for name, task in list(running.items()):
                if (run := next(task)) is not None:
                    del running[name]
                    task.close()  # type: ignore[attr-defined]
                    yield name, run
            time.sleep(0.2)
    finally:
        for task in running.values():
            task.close()  # type: ignore[attr-defined]


def without_fault(tests: str) -> Iterator[Run | None]:
    """The outcome of a list of tests on the code as it is."""
    yield from Child(ROOT / "src", existing(tests)).outcome()


def main() -> int:
    """Run the mutants; 0 when none survives, 2 when tests fail without a fault."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("words", nargs="*", help="only mutants whose file or text has one of these words")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--again", action="store_true", help="forget what is known from earlier runs")
    parser.add_argument("--trust", action="store_true", help="do not check that the tests pass without a fault")
    options = parser.parse_args()
    memory = Memory(options.again)
    chosen = {m.title: m for m in MUTANTS if not options.words or any(w in m.title for w in options.words)}
    fresh = {title: m for title, m in chosen.items() if memory.key(m) not in memory.outcomes}
    if not options.trust:
        lists = {m.tests: without_fault(m.tests) for m in fresh.values()}
        failing = [f"{tests}: {run.failed}" for tests, run in in_parallel(lists, options.jobs) if not run.passed]
        if failing:
            print("\n".join(["these tests fail without any fault:", *failing]))
            return 2
    outcomes = in_parallel({title: tried(m, memory) for title, m in fresh.items()}, options.jobs)
    for number, (title, run) in enumerate(outcomes, 1):
        memory.store(chosen[title], run)
        word = "SURVIVES" if run.passed else f"noticed by {run.failed or 'a timeout'}"
        print(f"[{number}/{len(fresh)}] {title}: {word}", flush=True)
    survivors = [title for title, m in chosen.items() if memory.outcomes[memory.key(m)]]
    print("\n".join(f"SURVIVES {title}" for title in survivors))
    print(f"{len(chosen) - len(survivors)} of {len(chosen)} faults are noticed")
    return 1 if survivors else 0


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    import pytest
    import scipy.optimize
    import scipy.sparse.linalg  # noqa: F401
    import torch  # noqa: F401

    sys.exit(main())
