"""What a difference between runs is worth: Student's t on paired differences, in nats unless said.

Runs of one seed form a pair, so what they share (weights' seed, data order, the moment) cancels: with d the n
differences, the 95% interval is mean(d) +- t(0.975, n - 1) sd(d) / sqrt(n). Lower losses are better.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

CONFIDENCE = 0.95
POWER = 0.8


class StatisticsError(ValueError):
    """Statistics that cannot be made: says why and the remedy."""


def distributions() -> Any:
    """scipy.stats. Raises StatisticsError naming the extra where scipy is missing."""
    try:
        import scipy.stats
    except ImportError as error:
        raise StatisticsError("a study needs scipy; install it with: pip install 'sabrage[study]'") from error
    return scipy.stats


@dataclass(frozen=True)
class Estimate:
    """A mean of `n` values, their sd, half the width of its 95% interval, and p against a mean of zero.

    `p` is two-sided, `p_below` one-sided: how often noise alone gives a mean this low. With one value only
    `n` and `mean` are known, the rest is None.
    """

    n: int
    mean: float
    sd: float | None = None
    half: float | None = None
    p: float | None = None
    p_below: float | None = None


def estimate(values: Sequence[float]) -> Estimate:
    """The mean of at least one value, with all that can be said about it."""
    n, mean = len(values), float(np.mean(values))
    if n < 2:
        return Estimate(n, mean)
    sd = float(np.std(values, ddof=1))
    return judged(mean, n=n, sd=sd, error=sd / n**0.5, freedom=n - 1)


def judged(mean: float, *, n: int, sd: float, error: float, freedom: float) -> Estimate:
    """A mean with its standard error, which is known with so many degrees of freedom."""
    t = distributions().t
    half = float(t.ppf((1 + CONFIDENCE) / 2, freedom)) * error
    # Equal values leave no doubt: runs that are bit for bit the same differ by nothing, with p = 1.
    score = mean / error if error > 0 else float(np.sign(mean)) * np.inf
    p = 2 * float(t.sf(abs(score), freedom)) if mean else 1.0
    return Estimate(n, mean, sd, half, p, float(t.cdf(score, freedom)) if mean else 0.5)


def paired(reference: Sequence[float], challenger: Sequence[float]) -> Estimate:
    """The estimate of challenger - reference; both in the same order of seeds."""
    return estimate([after - before for before, after in zip(reference, challenger, strict=True)])


def against_target(losses: Sequence[float], target: float) -> Estimate:
    """The estimate of loss - target; `p_below` is the p of the claim that the mean is below the target."""
    return estimate([loss - target for loss in losses])


def pooled_sd(estimates: Iterable[Estimate]) -> float | None:
    """The sd common to several estimates, weighted by their degrees of freedom; None without any repeat.

    Of groups of runs alike but for the seed it is the noise floor, of paired differences what they vary by.
    """
    repeated = [(one.n - 1, one.sd) for one in estimates if one.sd is not None]
    freedom = sum(degrees for degrees, _ in repeated)
    return (sum(degrees * sd**2 for degrees, sd in repeated) / freedom) ** 0.5 if freedom else None


def detectable(sd: float, n: int) -> float:
    """The smallest true mean that a two-sided t-test at 5% on `n` >= 2 values finds in 80% of studies.

    From the noncentral t distribution; `sd` is that of the values (for pairs: of the differences).
    """
    stats = distributions()
    critical, freedom = stats.t.ppf((1 + CONFIDENCE) / 2, n - 1), n - 1
    low, high = 0.0, 100.0 * critical
    # Bisection on the noncentrality: the power rises with it.
    for _ in range(60):
        middle = (low + high) / 2
        power = stats.nct.sf(critical, freedom, middle)
        low, high = (middle, high) if power < POWER else (low, middle)
    return float(high) * sd / n**0.5


def verdict(difference: Estimate | None) -> str:
    """What may be said of a difference in loss, in one sentence."""
    if difference is None:
        return "no pair of finished runs"
    if difference.sd is None or difference.half is None:
        return f"one seed, screens only: {difference.mean:+.4f}"
    said, word = f"{difference.mean:+.4f} +- {difference.half:.4f} at n={difference.n}", standing(difference)
    if word is None:
        least = detectable(difference.sd, difference.n)
        return f"no difference seen: {said}, smallest detectable {least:.4f}"
    return f"{word}: {said}"


def standing(difference: Estimate) -> Literal["better", "worse"] | None:
    """What a difference in loss that has an interval amounts to; None where the interval holds zero."""
    assert difference.half is not None
    if abs(difference.mean) <= difference.half:
        return None
    return "better" if difference.mean < 0 else "worse"


@dataclass(frozen=True)
class Curve:
    """The validations of one run, in order: tokens trained, seconds of training, loss."""

    tokens: Sequence[float]
    seconds: Sequence[float]
    losses: Sequence[float]

    def at_tokens(self, tokens: float) -> float | None:
        """The loss after so many tokens, linear between evaluations; None outside of them."""
        return interpolate(self.tokens, self.losses, tokens)

    def at_seconds(self, seconds: float) -> float | None:
        """The loss after so many seconds of training, linear between evaluations; None outside of them."""
        return interpolate(self.seconds, self.losses, seconds)

    def seconds_to(self, loss: float) -> float | None:
        """Seconds of training until the curve first meets `loss`, linear between evaluations, or None."""
        for index, value in enumerate(self.losses):
            if value <= loss:
                if index == 0:
                    return self.seconds[0]
                before = self.losses[index - 1]
                share = (before - loss) / (before - value)
                start = self.seconds[index - 1]
                return start + share * (self.seconds[index] - start)
        return None


def interpolate(xs: Sequence[float], ys: Sequence[float], x: float) -> float | None:
    """y at x on the line through the points, xs rising; None outside."""
    if not xs or not xs[0] <= x <= xs[-1]:
        return None
    return float(np.interp(x, xs, ys))
