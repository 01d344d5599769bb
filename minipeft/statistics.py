"""Is one method really better than another? Intervals, paired tests and corrections, on plain arrays.

`right_a` says of every test sentence whether A had it right, and right_a - right_b (as 1, 0, -1) is the paired
difference. Two things are left to chance: which sentences are in the test set, and how a run went (its seed, its
training sentences). Only `paired_bootstrap` answers for both; the tests on sentences speak of the trained models
at hand (Dietterich 1998, Neural Computation 10), and none of them sees more in one run than that run.
"""
import math
from statistics import NormalDist  # the standard library's, not this file

import numpy as np


def numbers(values, name, least=1):
    """`values` as a flat float array; ValueError if it is not flat, holds fewer than `least`, or nan or inf."""
    array = np.asarray(values, dtype=float)
    if array.ndim != 1 or len(array) < least or not np.isfinite(array).all():
        raise ValueError(f"{name}: not a flat array of finite numbers, {least} or more, but {array.shape} {array}")
    return array


def mean_std(values):
    """Mean and sample standard deviation sqrt(sum (x - mean)^2 / (n - 1)) of (n,) values.

    One value has no spread to show: its standard deviation is nan, not 0.
    """
    values = numbers(values, "values")
    return float(values.mean()), float(values.std(ddof=1)) if len(values) > 1 else math.nan


def resampled_means(values, resamples, rng):
    """Means of `resamples` bootstrap samples of (n,) values: (resamples,).

    How often each distinct value is drawn is multinomial: the same as drawing all n one by one, but fast where few
    values occur, as in differences of right and wrong.
    """
    distinct, counts = np.unique(values, return_counts=True)
    return rng.multinomial(len(values), counts / len(values), resamples) @ distinct / len(values)


def paired_bootstrap(differences, resamples=100_000, seed=0, level=0.95, same_sentences=False):
    """The mean difference over all sentences, with an interval for runs and sentences alike: (mean, low, high, p).

        d_rs = mu + run_r + sentence_rs        var(mean) = (T + W) / R,    T = var(run_r)
        W = mean of var(d_r) / n_r             T is about max(0, S^2 - W), S^2 = variance of the R run means

    differences: R arrays (n_r,) of right_a - right_b; with right_a instead, the result is an accuracy and its
    interval. A resample draws the sentences of every run, for W / R, and adds a normal draw of variance T / R.
    To draw runs and then sentences would count W twice, hence the subtraction (Davison & Hinkley 1997, Bootstrap
    Methods, section 3.8). Unlike there, runs are not drawn again (three are too few to stand for all others), and
    each resample has a T of its own, from S^2 (R - 1) / chi^2 with R - 1 degrees of freedom in the place of S^2 (a
    generalized interval: Weerahandi 1993, JASA 88). Where runs vary a lot this becomes Student's t on the run
    means; where they do not, a few runs cannot show it, and the interval covers more than `level`. Run effects
    are taken as normal, runs as about equally long. Folds share training sentences, which no such interval sees
    (Bengio & Grandvalet 2004, JMLR 5). With R = 1 only sentences are drawn: nothing is known of how runs vary.

    same_sentences: all runs have the same n test sentences in one order (seeds on one file). These are drawn
    jointly, so that a sentence which is hard in every run counts once: W / R becomes var(d averaged over runs) / n,
    and what S^2 loses is the mean square of d_rs - d_r. - d_.s + d.. , over n.

    p, of no difference, belongs to the interval: twice the share of resamples on the far side of zero (the data
    counted as one), so that it is at the level where the interval ends at zero.

    Raises ValueError for no run, a run without two sentences, or same_sentences with runs of different lengths.
    """
    runs = [numbers(run, "differences of a run", least=2) for run in differences]
    if not runs or not 0 < level < 1 or resamples < 1:
        raise ValueError(f"needs one run or more, 0 < level < 1 and resamples; got {len(runs)}, {level}, {resamples}")
    if same_sentences and len({len(run) for run in runs}) > 1:
        raise ValueError(f"same_sentences, but the runs have {sorted({len(run) for run in runs})} of them")
    rng = np.random.default_rng(seed)
    lengths, means = np.array([len(run) for run in runs]), np.array([run.mean() for run in runs])  # (R,)
    weights = lengths / lengths.sum()
    if same_sentences:
        table = np.stack(runs)  # (R, n)
        drawn = resampled_means(table.sum(0), resamples, rng) / len(runs)  # (resamples,)
        rest = table - table.mean(0) - means[:, None] + means.mean()
        noise = (rest ** 2).sum() / max(1, (len(runs) - 1) * (lengths[0] - 1)) / lengths[0]
    else:
        drawn = sum(weight * resampled_means(run, resamples, rng) for weight, run in zip(weights, runs))
        noise = np.mean([run.var(ddof=1) / len(run) for run in runs])
    if len(runs) > 1:
        spread = ((means - means.mean()) ** 2).sum() / rng.chisquare(len(runs) - 1, resamples)
        variance = np.maximum(0, spread - noise) * (weights ** 2).sum()  # T / R where runs are equally long
        drawn = drawn + np.sqrt(variance) * rng.standard_normal(resamples)
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    p = min(1.0, 2 * (1 + min((drawn <= 0).sum(), (drawn >= 0).sum())) / (1 + resamples))
    return float(weights @ means), float(low), float(high), float(p)


def mcnemar(right_a, right_b):
    """McNemar's test in its exact form: (only A right, only B right, two-sided p).

        p = min(1, 2 sum_{k <= min(b, c)} C(b + c, k) / 2^(b + c))

    b, c: how many sentences only A, only B has right (McNemar 1947, Psychometrika 12). right_a, right_b:
    (sentences,) of True and False, paired. If A and B never differ, p is 1. For seeds on one test file use
    permutation_test: a pooled table counts each sentence several times, and its p is too small. Raises ValueError
    for different lengths and for values that are neither right nor wrong.
    """
    a, b = numbers(right_a, "right_a"), numbers(right_b, "right_b")
    if len(a) != len(b) or not np.isin([a, b], (0, 1)).all():
        raise ValueError(f"right_a and right_b are paired and hold True or False only (lengths {len(a)} and {len(b)})")
    only_a, only_b = int((a > b).sum()), int((b > a).sum())
    total, term, tail = only_a + only_b, 1, 0  # whole numbers of any size: nothing to overflow or to round
    for k in range(min(only_a, only_b) + 1):
        tail += term  # term is C(total, k)
        term = term * (total - k) // (k + 1)
    return only_a, only_b, min(1.0, 2 * tail / 2 ** total)


def permutation_test(per_sentence_differences, permutations=10_000, seed=0):
    """Two-sided p for a mean difference of zero, by flipping signs at random.

        p = (1 + #{|sum of flipped d| >= |sum of d|}) / (1 + permutations)

    per_sentence_differences: (sentences,), right_a - right_b averaged over the seeds run on one test file, so that
    a sentence counts once. If A and B are equals, d and -d are equally likely (Fisher 1935, The Design of
    Experiments, section 21); + 1 because the data are one of the flips (Phipson & Smyth 2010, SAGMB 9). Given the
    mean differences of R runs instead, it asks whether the methods differ over runs; p is then 2 / 2^R at best.
    """
    d = numbers(per_sentence_differences, "per_sentence_differences")
    if permutations < 1:
        raise ValueError(f"permutations is at least 1, not {permutations}")
    sizes, counts = np.unique(np.abs(d), return_counts=True)
    kept = np.random.default_rng(seed).binomial(counts, 0.5, (permutations, len(counts)))  # of equal sizes, how many +
    sums = (2 * kept - counts) @ sizes  # (permutations,)
    as_far = np.abs(sums) >= np.abs(d.sum()) - 1e-9 * np.abs(d).sum()  # ties are ties in spite of rounding
    return float((1 + as_far.sum()) / (1 + permutations))


def holm(p_values):
    """p values adjusted for their number, (m,) -> (m,) in the same order: reject where they are <= level.

        adjusted p_(i) = max over j <= i of min(1, (m - j + 1) p_(j)),    p_(1) <= ... <= p_(m)

    The chance of one false rejection or more is then at most the level, whatever the tests have to do with each
    other (Holm 1979, Scandinavian Journal of Statistics 6). Raises ValueError for what is not a p value.
    """
    p = numbers(p_values, "p_values")
    if p.min() < 0 or p.max() > 1:
        raise ValueError(f"p values lie in 0..1, not {p.min()}..{p.max()}")
    order = np.argsort(p)
    adjusted = np.empty_like(p)
    adjusted[order] = np.maximum.accumulate(np.minimum(1, np.arange(len(p), 0, -1) * p[order]))
    return adjusted


def smallest_detectable(low, high, comparisons=1, power=0.8, level=0.05):
    """The smallest true difference that a design with such an interval finds with this power.

        (z(1 - level / 2m) + z(power)) (high - low) / (2 z(1 - level / 2)),    m = comparisons

    low, high: the interval at 1 - level, from which the standard error is taken as if it were normal. The first
    factor is the usual one of power analysis (Cohen 1988, Statistical Power Analysis, chapter 2), for the first and
    strictest step of Holm's correction. With an interval of Student's t, of few runs, the power is higher than said.
    Raises ValueError unless low <= high, comparisons >= 1 and level < power < 1.
    """
    if not (low <= high and comparisons >= 1 and 0 < level < power < 1):
        raise ValueError("needs low <= high, comparisons >= 1 and 0 < level < power < 1, "
                         f"not {low}, {high}, {comparisons}, {level}, {power}")
    z = NormalDist().inv_cdf
    return (z(1 - level / 2 / comparisons) + z(power)) * (high - low) / 2 / z(1 - level / 2)
