"""Intervals, verdicts and calibration on plain numpy arrays. One rule for every comparison: `judge`."""
import math
from dataclasses import dataclass, replace
from functools import cache
from statistics import NormalDist

import numpy as np

OVERLAP = 1 / 9  # n_test / n_train where fold i of ten parts tests on part i and trains on the other nine
INCONCLUSIVE = "inconclusive"


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
    """A paired comparison. low, high: the interval at `level`; low90, high90: the 90% interval. runs: how many
    pairs of runs (1: the interval is over the sentences of one run, other runs may differ). needed: if inconclusive,
    the number of folds that would settle it (beyond ten: folds of further splits); None if unknown or above 100."""
    mean: float
    low: float
    high: float
    low90: float
    high90: float
    level: float
    verdict: str
    runs: int
    needed: int | None = None

    @property
    def in_words(self):
        """The verdict, and the number of folds that would settle it if it is open."""
        return f"{self.verdict} ({self.needed} folds would settle it)" if self.needed else self.verdict


def judge(mean, error, df, runs, comparisons=1, margin=1.0, lower_is_better=False):
    """Return the Comparison for a mean difference, its standard error and its degrees of freedom.

    - *better*, *worse*: the interval at 1 - 0.05 / comparisons excludes zero (Bonferroni);
    - *equivalent within 1 point*: the 90% interval lies within +-margin, that is, two one-sided tests at 5%
      (Schuirmann 1987), not corrected for the number of comparisons; margin=None leaves this out (a loss);
    - both: "worse, but equivalent within 1 point": the difference is significant and smaller than the margin;
    - neither: *inconclusive*.
    """
    level = 1 - 0.05 / comparisons
    wide, narrow = student_t(level, df) * error, student_t(0.9, df) * error
    words = []
    if abs(mean) > wide:
        words.append("better" if (mean > 0) != lower_is_better else "worse")
    if margin is not None and abs(mean) + narrow <= margin:
        words.append(f"equivalent within {margin:g} point{'' if margin == 1 else 's'}")
    verdict = ", but ".join(words) or INCONCLUSIVE
    return Comparison(mean, mean - wide, mean + wide, mean - narrow, mean + narrow, level, verdict, runs)


def is_inconclusive(found):
    return found.verdict == INCONCLUSIVE


def paired(differences, overlap=OVERLAP, is_open=is_inconclusive, **rule):
    """Compare over k >= 2 folds. differences: (k,), one mean difference a fold, in points; rule: as in `judge`.

        standard error^2 = var(differences) (1 / k + n_test / n_train),    Student's t with k - 1 degrees of freedom

    Folds share training sentences, so 1 / k alone is too small (Nadeau & Bengio 2003, Machine Learning 52).
    `needed` is the smallest number of folds with which a Comparison would not be open (`is_open`), if mean and variance
    found so far were the true ones. Raises ValueError for one fold.
    """
    mean, std = mean_std(differences)
    if std is None:
        raise ValueError("paired needs two folds or more; for one run use paired_sentences")

    def judge_with(k):
        return judge(mean, std * math.sqrt(1 / k + overlap), k - 1, len(differences), **rule)

    found = judge_with(len(differences))
    if found.verdict != INCONCLUSIVE:
        return found
    enough = (k for k in range(len(differences) + 1, 101) if not is_open(judge_with(k)))
    return replace(found, needed=next(enough, None))


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


def compare(scores, part="test", seeds=False, is_open=is_inconclusive, **rule):
    """Compare runs. scores: for each run the paired differences of the sentences of a part, "test" or "dev".

    seeds: the runs differ in their seed, not in their fold. Then, and on dev, and if there is only one run, the
    interval is over sentences and runs; else it is over the folds.
    """
    overlap = 0 if seeds else OVERLAP
    if seeds or part == "dev" or len(scores) == 1:
        return paired_sentences(scores, overlap, **rule)
    return paired([run.mean() for run in scores], overlap, is_open, **rule)


def log_probabilities(logits):
    """Log softmax, (n, classes) -> (n, classes)."""
    logits = np.asarray(logits, dtype=float)
    logits = logits - logits.max(1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(1, keepdims=True))


def log_loss(logits, labels):
    """Return the mean negative log probability of the label, in nats."""
    return float(-log_probabilities(logits)[np.arange(len(labels)), labels].mean())


def temperature(logits, labels):
    """Return the T that minimises log_loss(logits / T, labels), by bisection within 0.2 to 20 (Guo et al. 2017, 4.2).

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


def expected_calibration_error(logits, labels, bins=15):
    """Return the mean |accuracy - confidence| over equal bins of the largest probability (Guo et al. 2017, eq. 3)."""
    probabilities = np.exp(log_probabilities(logits))
    gap = (probabilities.argmax(1) == labels) - probabilities.max(1)
    bin_of = np.ceil(probabilities.max(1) * bins)  # bin b holds ((b - 1) / bins, b / bins]
    return float(np.abs(np.bincount(bin_of.astype(int), gap)).sum() / len(gap))
