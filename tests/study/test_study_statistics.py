import math

import numpy as np
import pytest
from scipy import stats

from sabrage.study.statistics import (
    Curve,
    against_target,
    detectable,
    estimate,
    paired,
    pooled_sd,
    verdict,
)

A = [3.512, 3.498, 3.505, 3.520, 3.501]
B = [3.490, 3.489, 3.481, 3.502, 3.488]


def test_the_paired_estimate_is_scipys_related_t_test():
    found, known = paired(A, B), stats.ttest_rel(B, A)
    interval = known.confidence_interval(0.95)
    assert found.n == 5
    assert found.mean == pytest.approx(np.mean(B) - np.mean(A))
    assert found.p == pytest.approx(known.pvalue)
    assert found.mean - found.half == pytest.approx(interval.low)
    assert found.mean + found.half == pytest.approx(interval.high)


def test_the_claim_below_a_target_is_scipys_one_sided_t_test():
    known = stats.ttest_1samp(A, 3.515, alternative="less")
    assert against_target(A, 3.515).p_below == pytest.approx(known.pvalue)
    assert against_target(A, 3.0).p_below > 0.99


def test_the_interval_is_what_a_hand_computes():
    # Differences 1, 2, 3: sd 1, standard error 1 / sqrt(3), t(0.975, 2) = 4.3027.
    found = estimate([1.0, 2.0, 3.0])
    assert (found.mean, found.sd) == (2.0, 1.0)
    assert found.half == pytest.approx(4.3027 / math.sqrt(3), rel=1e-4)


def test_one_value_has_a_mean_and_nothing_else():
    found = estimate([0.25])
    assert (found.n, found.mean) == (1, 0.25)
    assert found.sd is found.half is found.p is found.p_below is None


def test_runs_that_are_the_same_bit_for_bit_do_not_differ():
    assert paired(A, A).p == 1.0
    assert "no difference seen" in verdict(paired(A, A))


def test_a_constant_difference_leaves_no_doubt():
    assert estimate([-0.5, -0.5, -0.5]).p == 0.0
    assert estimate([-0.5, -0.5, -0.5]).p_below == 0.0
    assert estimate([0.5, 0.5, 0.5]).p_below == 1.0


def test_the_noise_floor_pools_the_variances_by_their_degrees_of_freedom():
    # Variances 2 (n=2) and 1 (n=3): (1 * 2 + 2 * 1) / 3.
    groups = [[0.0, 2.0], [1.0, 2.0, 3.0], [7.0]]
    assert pooled_sd(map(estimate, groups)) == pytest.approx(math.sqrt(4 / 3))


def test_there_is_no_noise_floor_without_a_repeat():
    assert pooled_sd(map(estimate, [[1.0], [2.0]])) is None


@pytest.mark.parametrize("n", [2, 3, 5, 20])
def test_four_of_five_studies_find_the_smallest_detectable_difference(n):
    sd, draws = 0.01, 40_000
    values = np.random.default_rng(n).normal(detectable(sd, n), sd, size=(draws, n))
    scores = values.mean(1) / (values.std(1, ddof=1) / math.sqrt(n))
    found = np.mean(scores > stats.t.ppf(0.975, n - 1))
    assert found == pytest.approx(0.8, abs=0.01)


def test_the_verdict_says_what_was_seen_and_no_more():
    assert verdict(paired(A, B)).startswith("better: -0.0172 +- ")
    assert verdict(paired(B, A)).startswith("worse: +0.0172 +- ")
    assert verdict(paired(A[:1], B[:1])) == "one seed, screens only: -0.0220"
    assert verdict(None) == "no pair of finished runs"
    noisy = verdict(paired([1.0, 2.0, 3.0], [1.1, 1.9, 3.0]))
    assert noisy == "no difference seen: +0.0000 +- 0.2484 at n=3, smallest detectable 0.3264"


CURVE = Curve(tokens=[100, 200, 400], seconds=[1.0, 2.0, 6.0], losses=[5.0, 4.0, 3.0])


def test_a_curve_is_linear_between_evaluations():
    assert CURVE.at_tokens(300) == 3.5
    assert CURVE.at_seconds(1.5) == 4.5
    assert CURVE.seconds_to(3.25) == 5.0


def test_a_curve_says_nothing_outside_of_its_evaluations():
    assert CURVE.at_tokens(99) is None
    assert CURVE.at_seconds(6.1) is None
    assert CURVE.seconds_to(2.9) is None


def test_the_time_to_a_loss_is_that_of_its_first_crossing():
    curve = Curve(tokens=[1, 2, 3, 4], seconds=[1.0, 2.0, 3.0, 4.0], losses=[5.0, 3.0, 4.0, 2.0])
    assert curve.seconds_to(3.5) == 1.75


def test_a_curve_that_starts_below_meets_the_loss_at_its_first_evaluation():
    assert CURVE.seconds_to(6.0) == 1.0


def test_a_loss_that_is_not_a_number_meets_nothing():
    assert Curve(tokens=[1, 2], seconds=[1.0, 2.0], losses=[math.nan, math.nan]).seconds_to(3.0) is None
