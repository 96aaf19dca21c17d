"""The list of mutants fits the code as it is; whether tests notice them is for `make mutants`."""

from __future__ import annotations

import pytest

from mutants import MUTANTS, Mutant, existing, whole_name


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.title[:90])
def test_a_mutant_names_a_place_that_exists_once_and_tests_that_exist(mutant: Mutant) -> None:
    assert mutant.path.read_text(encoding="utf-8").count(mutant.text) == 1, "adapt tests/mutants.py to the code"
    assert mutant.text != mutant.fault
    assert existing(mutant.tests)
    compile(mutant.path.read_text(encoding="utf-8").replace(mutant.text, mutant.fault), mutant.file, "exec")


def test_there_are_enough_and_each_is_one_of_a_kind() -> None:
    assert len(MUTANTS) >= 75
    assert len({(m.file, m.text, m.fault) for m in MUTANTS}) == len(MUTANTS)
    folders = {m.file.rpartition("/")[0].removesuffix("/rules") for m in MUTANTS}
    assert folders >= {
        f"noetherflow/{f}" for f in ["core", "symmetry", "discovery", "moments", "equilibrium", "balance", "monitor"]
    }
    assert "noetherflow_paper" in folders


def test_a_test_whose_parameters_hold_a_space_is_found_again() -> None:
    assert whole_name("tests/test_a.py::test_b[products") == "test_a.py::test_b"
    assert whole_name("tests/test_a.py::test_b[c]") == "test_a.py::test_b[c]"
