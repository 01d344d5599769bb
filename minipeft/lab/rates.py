"""The search of learning rates, on dev alone."""
import math
from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ..tools import checkpoint
from ..tools.files import UserError
from .runs import evaluate, key, make_run, train_missing
from .studies import RULES, SEARCHES, Variant

FOLDS = (0, 1, 2)


class Scores(NamedTuple):
    """What one rate has reached on each dev sentence (n,): accuracy, raw and calibrated loss; as a mean over runs."""
    accuracy: np.ndarray
    loss: np.ndarray
    calibrated: np.ndarray


def score(record):
    """The Scores of a run on dev; a failed one has accuracy 0 and a loss that no other run has."""
    outcome = evaluate(record, "dev")
    if outcome is None:
        return Scores(np.zeros(1), np.full(1, 99.0), np.full(1, 99.0))
    return Scores(outcome.accuracy / 100, outcome.raw, outcome.loss)


def run_of(place, name, search, rate, repeat):
    return make_run(place, Variant(name, search.technique, {**search.options, search.option: rate}), repeat)


def find(place, name, search=None):
    """All runs of a search that have a record: {rate: {fold (or seed): Scores}}. search: SEARCHES[name]."""
    search, found = search or SEARCHES[name], {}
    if None in search.options.values():
        return {}  # it needs a rate that is not known yet

    def rest(settings):
        return key({name: value for name, value in settings.items() if name not in (search.option, "fold", "seed")})

    wanted = rest(checkpoint.recorded(run_of(place, name, search, search.start, 0).settings))
    for record in place.records.values():
        rate = record["settings"].get(search.option)
        if rate and rest(record["settings"]) == wanted:
            found.setdefault(rate, {})[record["settings"]["seed"]] = score(record)
    return dict(sorted(found.items()))


def average(found):
    """{rate: Scores} of the rates that were run on all of FOLDS."""
    return {rate: Scores(*(sum(parts) / len(FOLDS) for parts in zip(*(runs[fold] for fold in FOLDS))))
            for rate, runs in found.items() if runs.keys() >= set(FOLDS)}


def choose(means):
    """{rule: the rate it chooses}. means: {rate: Scores}, of numbers"""
    accuracy = {rate: round(row.accuracy, 9) for rate, row in means.items()}  # the order of a sum decides no tie

    def accurate(rate):
        return accuracy[rate], -means[rate].loss

    robust = [rate for rate in means if 2 * rate in means and accuracy[2 * rate] >= accuracy[rate] - 0.01]
    return {"calibrated": min(means, key=lambda rate: means[rate].calibrated),
            "loss": min(means, key=lambda rate: means[rate].loss),
            "highest": max(means, key=accurate), "doubling": max(robust or means, key=accurate)}


def over_sentences(scores):
    """{rate: Scores} of numbers, the means over sentences."""
    return {rate: Scores(*(float(values.mean()) for values in row)) for rate, row in scores.items()}


def bootstrap(scores, rounds=1000):
    """How often each rule chooses each rate if the dev sentences are drawn anew: {rule: {rate: share}}.

    The temperatures stay: they hardly depend on the draw.
    """
    size = max(len(row.loss) for row in scores.values())
    draws = np.random.default_rng(0).multinomial(size, np.full(size, 1 / size), rounds) / size  # (rounds, sentences)
    table = np.array([[np.broadcast_to(values, size) for values in row] for row in scores.values()])
    means = np.einsum("ds,rms->drm", draws, table, optimize=True)                               # (rounds, rates, 3)
    picked = [choose({rate: Scores(*row) for rate, row in zip(scores, rows)}) for rows in means]
    return {rule: {rate: times / rounds for rate, times in Counter(pick[rule] for pick in picked).items()}
            for rule in RULES}


@dataclass
class Searched:
    """What a search has found: the number of its runs, {rate: Scores} as means, {rule: the rate it chooses}, and how
    often it chooses each rate if dev is drawn anew."""
    runs: int
    means: dict
    picks: dict
    shares: dict

    def text(self, rule, rate):
        """A rate with the share of the draws in which the rule chooses it, as "0.0005 (42%)"."""
        return f"{rate:g} ({self.shares[rule].get(rate, 0):.0%})"


def summarise(place, name):
    """The Searched of a search; None if no rate was run on all of FOLDS."""
    found = find(place, name)
    scores = average(found)
    if not scores:
        return None
    means = over_sentences(scores)
    return Searched(sum(map(len, found.values())), means, choose(means), bootstrap(scores))


# -- searching --------------------------------------------------------------------------------------------

def still_to_run(found, start, factor=2, folds=FOLDS):
    """The (rate, fold) pairs that a search by calibrated dev loss needs next; none if it is finished.

    found: {rate: {fold: calibrated dev loss}}. First fold 0 alone, by factors, until the best rate has neighbours on
    both sides. Then all folds for the best and its neighbours, until the lowest mean has both neighbours on all.
    """
    def missing(best, folds):
        rates = (best / factor, best, best * factor)
        return {(rate, fold) for rate in rates for fold in folds if fold not in found.get(rate, {})}

    first = {rate: runs[0] for rate, runs in found.items() if 0 in runs}
    if not first:
        return missing(start, [0])
    best = min(first, key=first.get)
    if first[best] >= 99:
        return set()  # every run has failed
    if pairs := missing(best, [0]) or missing(best, folds):
        return pairs
    means = {rate: np.mean(list(runs.values())) for rate, runs in found.items() if len(runs) >= len(folds)}
    return missing(min(means, key=means.get), folds)


def search_rate(place, name, search, jobs, folds=FOLDS):
    """Train what the search of a rate needs. Returns the rate with the lowest mean calibrated dev loss."""
    if None in search.options.values():
        raise UserError(f"--rates {name} needs a rate that is not known yet: fill it in in minipeft/lab/studies.py")

    def losses():
        return {rate: {fold: scores.calibrated.mean() for fold, scores in runs.items() if fold in folds}
                for rate, runs in find(place, name, search).items()}

    while pairs := sorted(still_to_run(losses(), search.start, search.factor, folds)):
        train_missing([run_of(place, name, search, rate, fold) for rate, fold in pairs], jobs)
    means = {rate: np.mean(list(runs.values())) for rate, runs in losses().items() if len(runs) == len(folds)}
    best = min(means, key=means.get, default=None)
    if best is None or not math.isfinite(means[best]) or means[best] >= 99:
        raise UserError(f"{name}: training failed at every rate from {min(losses()):g} to {max(losses()):g}; see "
                        f"{place.out / 'logs'}")
    return best
