"""The search of learning rates, on dev alone. A search has found {rate: {fold: (dev accuracy, dev loss)}}."""
import math

import numpy as np

from ..tools.files import UserError, write_json
from . import plots
from .runs import evaluate, load, make_run, train_missing
from .studies import SEARCHES, Variant, label

FOLDS = (0, 1, 2)


def average(found):
    """{rate: (mean accuracy, mean loss)} of the rates that were run on all folds."""
    return {rate: tuple(np.mean(list(folds.values()), axis=0)) for rate, folds in sorted(found.items())
            if len(folds) == len(FOLDS)}


def choose(means):
    """(rate of the accuracy rule, rate of the loss rule). means: {rate: (accuracy, loss)}

    Accuracy rule: the most accurate rate among those whose double was tried and is at most 1 point less accurate.
    Loss rule: the lowest loss.
    """
    robust = [rate for rate in means if 2 * rate in means and means[2 * rate][0] >= means[rate][0] - 0.01]
    return (max(robust or means, key=lambda rate: (means[rate][0], -means[rate][1])),
            min(means, key=lambda rate: means[rate][1]))


def most_accurate(means):
    """The rate with the highest mean dev accuracy, even if it loses more than 1 point when doubled."""
    return max(means, key=lambda rate: means[rate][0])


def still_to_run(found, start):
    """The (rate, fold) pairs that a search needs next; none if it is finished, or if every run has failed.

    First search fold 0 alone, by factors of 2, until the best rate by accuracy and by loss has neighbours on both
    sides. Then run all folds for the rates within 1.5 points of the best, their doubles, the lowest loss and its
    neighbours; finally also for the neighbours of the most accurate rate and of both choices.
    """
    if not found:
        return {(start * factor, 0) for factor in (0.5, 1, 2)}

    def missing(rates, folds):
        return {(rate, fold) for rate in rates for fold in folds if fold not in found.get(rate, {})}

    first = {rate: folds[0] for rate, folds in sorted(found.items()) if 0 in folds}
    if not any(math.isfinite(loss) for _, loss in first.values()):
        return set()
    accurate = max(first, key=lambda rate: (first[rate][0], -first[rate][1]))
    lowest = min(first, key=lambda rate: first[rate][1])
    close = [rate for rate in first if first[rate][0] >= first[accurate][0] - 0.015]
    runs = missing([accurate / 2, accurate * 2, lowest / 2, lowest * 2], [0])
    runs = runs or missing([*close, *(2 * rate for rate in close), lowest / 2, lowest, lowest * 2], FOLDS)
    if runs:
        return runs
    means = average(found)
    best = [most_accurate(means), *choose(means)]
    return missing([rate * factor for rate in best for factor in (0.5, 1, 2)], FOLDS)


def calibrated_to_run(found, start, factor=2):
    """The (rate, fold) pairs that a search by calibrated dev loss needs next; none if it is finished.

    found: {rate: {fold: calibrated dev loss}}. First fold 0 alone, by factors, until the best rate has neighbours on
    both sides. Then folds 0 to 2 for the best and its neighbours, until the lowest mean has both neighbours on all.
    """
    if not found:
        return {(start * change, 0) for change in (1 / factor, 1, factor)}

    def missing(best, folds):
        rates = (best / factor, best, best * factor)
        return {(rate, fold) for rate in rates for fold in folds if fold not in found.get(rate, {})}

    first = {rate: folds[0] for rate, folds in found.items() if 0 in folds}
    best = min(first, key=first.get)
    runs = missing(best, [0]) or missing(best, FOLDS)
    if runs or not math.isfinite(first[best]):
        return runs if math.isfinite(first[best]) else set()
    means = {rate: np.mean(list(folds.values())) for rate, folds in found.items() if len(folds) == len(FOLDS)}
    return missing(min(means, key=means.get), FOLDS)


def search_calibrated(name, place, jobs=0):
    """Search one rate by the calibrated rule: {rate: {fold: calibrated dev loss}}. jobs 0: train nothing; None if
    records are missing. A failed run has infinite loss."""
    entry, found = SEARCHES[name], {}
    while pairs := sorted(calibrated_to_run(found, entry.start, entry.factor)):
        runs = [make_run(place, Variant(name, entry.technique, {**entry.options, entry.option: rate}, name), fold,
                         "calibrated") for rate, fold in pairs]
        if jobs:
            train_missing(runs, jobs)
        for (rate, fold), run in zip(pairs, runs):
            record = load(run)
            if record is None:
                return None
            loss = evaluate(record, "dev").numbers["calibrated"] if "dev" in record else math.inf
            found.setdefault(rate, {})[fold] = loss
    return found


def search(name, place, jobs=0):
    """Search one learning rate; a failed run has accuracy 0. jobs 0: train nothing; None if records are
    missing or all runs failed."""
    entry, found = SEARCHES[name], {}
    while pairs := sorted(still_to_run(found, entry.start)):
        runs = [make_run(place, Variant(name, entry.technique, {**entry.options, "lr": rate}), fold)
                for rate, fold in pairs]
        if jobs:
            train_missing(runs, jobs)
        for (rate, fold), run in zip(pairs, runs):
            record = load(run)
            if record is None:
                return None
            metrics = record.get("metrics", {"dev_accuracy": 0.0, "dev_loss": math.inf})
            found.setdefault(rate, {})[fold] = metrics["dev_accuracy"], metrics["dev_loss"]
    if not any(math.isfinite(loss) for folds in found.values() for _, loss in folds.values()):
        if jobs:
            raise UserError(f"--rates: training failed at every rate from {min(found):g} to {max(found):g}; see the "
                            "folder logs, and start lower in minipeft/studies.py")
        return None
    return found


HEADING = ["", "rates tried", "accuracy rule", "mean dev accuracy", "at twice the rate", "most accurate rate",
           "mean dev accuracy", "loss rule", "mean dev loss"]


def points(found, measure, scale=1):
    """The points of a curve. measure: 0 for accuracy, 1 for loss."""
    return [plots.Point(rate, scale * np.mean([scores[measure] for scores in folds.values()]))
            for rate, folds in sorted(found.items())]


def publish(place):
    """Write rates.json and rates.png from the complete searches; the figure leaves out those on few sentences.

    Returns ({name: {"accuracy": rate, "loss": rate, "highest": rate}}, rows of a table, names of the figures drawn).
    highest: the most accurate rate, which no rule chooses.
    """
    searches = {name: found for name in SEARCHES if SEARCHES[name].accuracy and (found := search(name, place))}
    chosen, rows = {}, []
    for name, found in searches.items():
        means = average(found)
        (accurate, lowest), highest = choose(means), most_accurate(means)
        chosen[name] = {"accuracy": accurate, "loss": lowest, "highest": highest}
        rows.append([label(name), f"{min(found):g} to {max(found):g}", f"{accurate:g}", f"{means[accurate][0]:.1%}",
                     f"{means[2 * accurate][0]:.1%}", f"{highest:g}", f"{means[highest][0]:.1%}", f"{lowest:g}",
                     f"{means[lowest][1]:.3f}"])
    drawn = {name: found for name, found in searches.items() if "limit" not in SEARCHES[name].options}
    if chosen:
        write_json(place.out / "rates.json", chosen)
    if drawn:
        plots.rates({name: points(found, 0, 100) for name, found in drawn.items()},
                    {name: points(found, 1) for name, found in drawn.items()},
                    *({name: chosen[name][rule] for name in drawn} for rule in ("accuracy", "loss")),
                    place.out / "rates.png")
    return chosen, rows, ["rates.png"] if drawn else []
