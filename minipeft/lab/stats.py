"""Intervals, verdicts and calibration on plain numpy arrays. One rule for every comparison: `judge`."""
import math
from dataclasses import dataclass, replace
from functools import cache
from statistics import NormalDist

import numpy as np

from ..tools.metrics import log_probabilities

OVERLAP = 1 / 9  # n_test / n_train where fold i of ten parts tests on part i and trains on the other nine
INTERVALS = {"corrected": "Nadeau-Bengio", "plain": "plain paired t", "split": "sampling and run variance apart"}
INCONCLUSIVE, NO_VERDICT = "inconclusive", "no verdict"


def mean_std(values):
    """Return the mean and the sample standard deviation (n - 1 in the denominator; None for one value)."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None


@cache
def student_t(level, df):
    """Return t with P(|T| < t) = level for Student's t with a whole number of degrees of freedom.

    With t = sqrt(df) tan(a), that probability is a finite sum of powers of cos a (Abramowitz & Stegun 1964,
    26.7.3-4); a is found by bisection. Above df = 1000 return the normal quantile (0.1% smaller at 95%).
    """
    if df > 1000:
        return NormalDist().inv_cdf((1 + level) / 2)

    def probability(angle):
        odd, total = df % 2, 0.0
        term = math.sin(angle) * math.cos(angle) ** odd
        for power in range(odd, df - 1, 2):
            total += term
            term *= math.cos(angle) ** 2 * (power + 1) / (power + 2)
        return (angle + total) * 2 / math.pi if odd else total

    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if probability(middle) < level else (low, middle)
    return math.sqrt(df) * math.tan((low + high) / 2)


@dataclass(frozen=True)
class Comparison:
    """A paired comparison. low, high: the interval at `level`, which decides on a difference; inner_low, inner_high:
    the shorter one that decides on equivalence. runs: how many pairs of runs (1: the interval is over the sentences of
    one run, other runs may differ)."""
    mean: float
    low: float
    high: float
    inner_low: float
    inner_high: float
    level: float
    verdict: str
    runs: int

    @property
    def inner(self):
        """The same with the interval that decides on equivalence as low and high."""
        return replace(self, low=self.inner_low, high=self.inner_high, level=2 * self.level - 1)

    def text(self, digits=2, unit=""):
        """The difference with its interval, as "+0.10 [-1.68, +1.88]"."""
        return f"{self.mean:+.{digits}f}{unit} [{self.low:+.{digits}f}, {self.high:+.{digits}f}]"

    def text_with_level(self, digits=2, unit=""):
        return f"{self.text(digits, unit)} at {100 * self.level:.4g}%"


def judge(mean, error, df, runs, comparisons=1, margin=1.0, lower_is_better=False):
    """Return the Comparison for a mean difference, its standard error and its degrees of freedom.

    Bonferroni: with m comparisons, differences and equivalences both have an error of 5% in all m together.

    - *better*, *worse*: the interval at 1 - 0.05 / m excludes zero;
    - *equivalent within 1 point*: the interval at 1 - 0.10 / m lies within +-margin, that is, two one-sided tests at
      0.05 / m (Schuirmann 1987); margin=None leaves this out (a loss);
    - both: "worse, but equivalent within 1 point": the difference is significant and smaller than the margin;
    - neither: *inconclusive*; *no verdict* if the runs do not vary at all.
    """
    level, inner = 1 - 0.05 / comparisons, 1 - 0.10 / comparisons
    wide, narrow = student_t(level, df) * error, student_t(inner, df) * error
    words = []
    if abs(mean) > wide:
        words.append("better" if (mean > 0) != lower_is_better else "worse")
    if margin is not None and abs(mean) + narrow <= margin:
        words.append(f"equivalent within {margin:g} point{'' if margin == 1 else 's'}")
    verdict = NO_VERDICT if error == 0 else ", but ".join(words) or INCONCLUSIVE
    return Comparison(mean, mean - wide, mean + wide, mean - narrow, mean + narrow, level, verdict, runs)


def paired(differences, overlap=OVERLAP, sampling=0.0, **rule):
    """Compare over k >= 2 folds. differences: (k,), one mean difference a fold, in points; rule: as in `judge`.

        standard error^2 = s / k + r (1 / k + n_test / n_train),    Student's t with k - 1 degrees of freedom

    s + r is the variance of the differences. sampling: s, the part due to the sentences of a test part. The parts share
    no sentence, so s is divided by k. Training sets overlap, so for the rest, r, 1 / k alone is too small. With s = 0
    all of the variance counts as r (Nadeau & Bengio 2003, Machine Learning 52): the more cautious choice.
    """
    mean, std = mean_std(differences)
    k, rest = len(differences), max(std ** 2 - sampling, 0)
    return judge(mean, math.sqrt(sampling / k + rest * (1 / k + overlap)), k - 1, k, **rule)


def paired_sentences(differences, overlap=0.0, **rule):
    """Compare over the sentences of one test set. differences: (k runs, n sentences), in points.

        standard error^2 = var(mean of each sentence) / n + var(mean of each run) (1 / k + overlap)

    One run: the first term and n - 1 degrees of freedom, a nearly normal interval; it holds for this run only. overlap:
    0 for runs that differ by seed alone, OVERLAP for folds, as in `paired`. The interval covers new sentences and new
    runs. It counts their interaction twice, so it is slightly wide. Degrees of freedom: Satterthwaite 1946.
    """
    differences = np.atleast_2d(np.asarray(differences, dtype=float))
    runs, sentences = differences.shape
    parts = [(differences.mean(0).var(ddof=1) / sentences, sentences - 1)]
    if runs > 1:
        parts.append((differences.mean(1).var(ddof=1) * (1 / runs + overlap), runs - 1))
    variance = sum(part for part, _ in parts)
    df = int(variance ** 2 / sum(part ** 2 / df for part, df in parts) + 1e-9) if variance else 1
    return judge(float(differences.mean()), math.sqrt(variance), df, runs, **rule)


def compare(scores, part="test", seeds=False, interval="corrected", **rule):
    """Compare runs. scores: for each run the paired differences of the sentences of a part, "test" or "dev".

    seeds: the runs differ in their seed, not in their fold. Then, and on dev, and if there is only one run, the
    interval is over sentences and runs; else it is over the folds, of a kind of INTERVALS.
    """
    if seeds or part == "dev" or len(scores) == 1:
        return paired_sentences(scores, 0 if seeds else OVERLAP, **rule)
    sampling = np.mean([run.var(ddof=1) / len(run) for run in scores]) if interval == "split" else 0.0
    return paired([run.mean() for run in scores], 0 if interval == "plain" else OVERLAP, sampling, **rule)


# -- measures ---------------------------------------------------------------------------------------------

def log_losses(logits, labels):
    """Return the negative log probability of each label, in nats: (n, classes), (n,) -> (n,)."""
    return -log_probabilities(logits)[np.arange(len(labels)), labels]


def temperature(logits, labels):
    """Return the T that minimises the log loss of logits / T, by bisection within 0.2 to 20 (Guo et al. 2017, 4.2).

    The loss is convex in 1 / T; its derivative there is mean(expected logit - logit of the label).
    """
    logits = np.asarray(logits, dtype=float)
    low, high = math.log(0.2), math.log(20)  # if all are correct, the best T is 0: one error would decide
    for _ in range(50):
        middle = (low + high) / 2
        expected = (np.exp(log_probabilities(logits / math.exp(middle))) * logits).sum(1)
        too_sharp = (expected - logits[np.arange(len(labels)), labels]).mean() > 0
        low, high = (middle, high) if too_sharp else (low, middle)
    return math.exp((low + high) / 2)
