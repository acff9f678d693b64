"""Which tests hold the rows of the table in `docs/numerics.md`."""

import ast
import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
PAGE = (TESTS.parent / "docs" / "numerics.md").read_text(encoding="utf-8")
CELL = re.compile(r"^\| (.+?) \| .+ \|$", re.M)
ROWS = CELL.findall(PAGE)[2:]  # below the heading and the line under it

# By how the first cell of a row begins; modules without their `test_`.
HELD = {
    "norm ≤ limit": [
        "numerics.test_a_norm_within_its_limit_comes_out_bit_identical",
        "numerics.test_a_norm_at_its_limit_comes_out_bit_identical",
        "contract.test_no_group_exceeds_its_limit_and_those_within_are_untouched",
    ],
    "norm > limit": [
        "numerics.test_the_norm_that_comes_out_is_the_limit",
        "numerics.test_rescaling_agrees_with_float64_in_every_dtype",
        "numerics.test_every_norm_with_every_response_agrees_with_float64",
    ],
    "float16, bfloat16 leaves": [
        "numerics.test_norms_of_many_leaves_are_right_to_1e_6",
        "numerics.test_mixed_dtypes_share_a_norm_and_keep_their_own",
        "numerics.test_the_dtype_out_is_the_dtype_in_whatever_that_of_the_limit_and_of_eps",
        "numerics.test_bfloat16_is_rounded_to_nearest_ties_to_even",
        "out_dtype.test_leaves_come_out_in_it_and_others_as_they_are",
        "out_dtype.test_nothing_is_rounded_to_the_dtype_of_the_leaf",
    ],
    "finite entries whose squares overflow or vanish": [
        "numerics.test_the_norm_of_tiny_and_huge_finite_entries_is_right",
        "numerics.test_updates_of_extreme_entries_are_rescaled_rightly",
        "numerics.test_float16_entries_of_300_are_clipped_and_not_zeroed",
        "numerics.test_large_leaves_of_any_size_beside_each_other_are_measured_rightly",
    ],
    "a norm beyond float32's range": [
        "numerics.test_a_norm_beyond_float32_is_reported_as_the_largest_and_clipped_rightly",
        "numerics.test_a_norm_beyond_float32_that_is_let_pass_is_reported_as_the_largest_too",
        "numerics.test_every_response_sees_the_true_norm_beyond_float32",
        "numerics.test_zscores_learn_norms_above_1e18_as_1e18",
    ],
    "all zeros, limit 0, both": [
        "numerics.test_zeros_and_limits_of_zero_give_zeros_and_never_nan",
        "numerics.test_derivatives_at_zero_are_finite",
    ],
    "limit inf": ["numerics.test_an_infinite_limit_changes_nothing"],
    "a negative or NaN Python limit": [
        "errors.test_values_that_are_wrong_are_named",
        "errors.test_named_methods_name_themselves_and_their_own_arguments",
    ],
    "a traced negative limit": ["numerics.test_a_traced_negative_limit_counts_as_zero"],
    "a traced NaN limit": ["numerics.test_a_traced_nan_limit_is_loud"],
    'NaN or inf in a group, `nonfinite="propagate"`': [
        "numerics.test_a_non_finite_entry_takes_its_whole_group_and_no_other",
        "contract.test_non_finite_entries_stay_within_their_group",
        "chaos.test_no_disaster_gets_past",
    ],
    'the same, `nonfinite="zero"`': [
        "numerics.test_a_non_finite_entry_takes_its_whole_group_and_no_other",
        "chaos.test_no_disaster_gets_past",
    ],
    "the same, in any adaptive limit": [
        "adaptive.test_nothing_is_learned_from_nan_infinity_and_zero",
        "chaos.test_no_disaster_gets_past",
    ],
    "`None`, `MaskedNode`, zero-size arrays, an empty tree": [
        "numerics.test_leaves_without_a_norm_pass_through",
        "numerics.test_trees_without_anything_to_measure_pass_through",
        "contract.test_masked_leaves_are_not_counted",
    ],
    "integer, bool, float0 and key leaves": ["numerics.test_leaves_without_a_norm_pass_through"],
    "complex leaves": [
        "numerics.test_the_modulus_of_complex_entries_is_measured",
        "numerics.test_clipping_by_value_clips_the_modulus_of_complex_entries",
    ],
    "`eps`": ["numerics.test_eps_gives_the_numbers_of_pytorch"],
}


def functions(module):
    """The functions of a module of tests."""
    tree = ast.parse((TESTS / f"test_{module}.py").read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("row", ROWS)
def test_a_row_is_held_by_tests_that_are_there(row):
    """One entry begins as the row does, and every test that it names exists."""
    (tests,) = [tests for start, tests in HELD.items() if row.startswith(start)]
    assert tests
    for test in tests:
        module, name = test.split(".")
        assert name in functions(module), test


def test_every_entry_is_for_a_row():
    """A row that has gone leaves no entry behind."""
    assert len(ROWS) == len(HELD)
    for start in HELD:
        assert any(row.startswith(start) for row in ROWS), start
