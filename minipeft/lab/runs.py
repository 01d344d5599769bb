"""The runs of a comparison: making, loading and executing. Each is a train.py run in a process of its own."""
import multiprocessing
import os
import re
import sys
import threading
from argparse import Namespace
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from statistics import mean

import numpy as np
import torch

import train

from ..bert import read_config
from ..tools import checkpoint, download, texts
from ..tools.fast import choose_compute, processor
from ..tools.files import UserError, write_json
from ..tools.settings import defaults
from . import stats
from .studies import SEARCHES, STUDIES, Study

PATHS = ("weights", "data", "test")  # compared by the hash of their content
UNNAMED = ("technique", "lr", "fold", "seed", "text_column", "label_column", *PATHS)


@dataclass
class Place:
    """Where the runs of a comparison go, and what they share: settings, and the hashes of weights and data."""
    out: Path
    common: dict
    weights_sha256: dict
    data_sha256: list


@dataclass
class Run:
    """Settings for train.py, and the name of the run's record, folder and log."""
    place: Place
    name: str
    settings: Namespace

    @property
    def record(self):
        return self.place.out / "runs" / f"{self.name}.json"

    @property
    def log(self):
        return self.place.out / "logs" / f"{self.name}.txt"


def find_place(out, common):
    """Fetch weights and data if needed, and hash them."""
    weights = download.find_weights(common["weights"])
    files = [common["test"]] if common["test"] else []
    files.append(common["data"] or download.fetch_data())
    return Place(out, common, download.hash_weights(weights), [texts.fingerprint(path) for path in files])


def word(value):
    if isinstance(value, list):
        return "+".join(value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def make_run(place, variant, repeat, rule="accuracy"):
    """The run of a variant on fold `repeat` (with --test: with this seed). Equal settings give equal names."""
    default, fold = defaults(variant.technique), None if place.common["test"] else repeat
    search = SEARCHES.get(variant.search or variant.technique)
    lr = getattr(search, rule) if search else default["lr"]
    given = default | place.common | {"lr": lr, "seed": repeat, "fold": fold, "resume": True} | variant.options
    words = [f"{name}-{word(value)}" for name, value in checkpoint.recorded(Namespace(**given)).items()
             if value != default[name] and name not in UNNAMED]
    words += [f"lr-{given['lr']:g}", f"seed{repeat}" if fold is None else f"fold{repeat}"]
    name = re.sub(r"[^a-zA-Z0-9.+-]+", "-", "-".join([variant.technique, *words]))
    return Run(place, name, Namespace(**given | {"out": str(place.out / "folders" / name)}))


# -- reading ----------------------------------------------------------------------------------------------

def load(run, path=None):
    """The record of a run, or None if there is none. UserError if it has other settings, weights or data."""
    path = path or run.record
    if not path.is_file():
        return None
    record, wanted = checkpoint.read_record(path), checkpoint.recorded(run.settings)
    found = dict(record["settings"])
    for name in ("weights_sha256", "data_sha256"):
        wanted[name], found[name] = getattr(run.place, name), record[name]
    for name in ("device", "precision"):
        if getattr(run.settings, name) != "auto":
            wanted[name], found[name] = getattr(run.settings, name), record["machine"][name]
    differ = [name for name in wanted | found if wanted.get(name) != found.get(name) and name not in PATHS]
    if differ:
        raise UserError(f"{path} is of a run that differs in {', '.join(differ)}: choose another --out")
    return record


@dataclass
class Outcome:
    """A finished run: accuracy (%) and calibrated loss (nats) of each sentence, (2, n); numbers for tables."""
    record: dict
    scores: np.ndarray
    numbers: dict


def machine(record, *more):
    """What two runs must share to be compared; with "threads", to have their costs averaged."""
    return tuple(record["machine"][key] for key in ("processor", "device", "precision", *more))


def evaluate(record, part):
    """The Outcome of a finished run on "test" or "dev"."""
    parameters, dev, judged = record["parameters"], record["dev"], record[part]
    logits, labels = np.array(judged["logits"]), np.array(judged["labels"])
    calibrated = stats.log_probabilities(logits / stats.temperature(dev["logits"], dev["labels"]))
    scores = np.array([100.0 * (logits.argmax(1) == labels), -calibrated[np.arange(len(labels)), labels]])
    return Outcome(record, scores, {
        **record["metrics"], **parameters, "lr": record["settings"]["lr"],
        "share": parameters["trainable"] / parameters["total"], "saved_mb": record["metrics"]["saved_bytes"] / 1e6,
        "accuracy": scores[0].mean(), "calibrated": scores[1].mean(), "loss": stats.log_loss(logits, labels),
        "error": stats.expected_calibration_error(logits, labels)})


@dataclass
class Result:
    """A study on the folds (or seeds) that all its variants have: {variant: {fold: Outcome}}, without failed runs."""
    name: str
    study: Study
    folds: list
    outcomes: dict


def collect(place, name, folds):
    """The Result of a study, from the records that exist."""
    study, records, outcomes = STUDIES[name], {}, {}
    for variant in study.variants:
        found = {fold: load(make_run(place, variant, fold, study.rule)) for fold in folds}
        records[variant.name] = {fold: record for fold, record in found.items() if record}
    complete = sorted(set(folds).intersection(*records.values()))
    for variant_name, found in records.items():
        finished = [fold for fold in complete if "failed" not in found[fold]]
        outcomes[variant_name] = {fold: evaluate(found[fold], study.part) for fold in finished}
    return Result(name, study, complete, outcomes)


# -- executing --------------------------------------------------------------------------------------------

def child(settings, threads, log):
    """What the process of a run does. It ends when compare.py ends, even if compare.py was killed."""
    def end_with_parent():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    sys.stdout = sys.stderr = open(log, "a", encoding="utf-8", errors="backslashreplace", buffering=1)
    sys.exit(train.main(settings))


def start(run, jobs):
    """Start a run in a process of its own, so that its time and memory are its own. An unfinished run resumes."""
    if load(run, Path(run.settings.out) / checkpoint.RECORD):  # it is finished, but its record was deleted: repeat it
        run.settings.resume, run.settings.overwrite = False, True
    run.log.parent.mkdir(parents=True, exist_ok=True)
    threads = max(1, torch.get_num_threads() // jobs)
    process = multiprocessing.get_context("spawn").Process(target=child, args=(run.settings, threads, run.log))
    process.start()
    return process


def finish(run, process, jobs):
    """Copy the record of a finished or failed run, and add how many runs shared the machine: times depend on it.
    UserError, with the last line of its log, if there is no record."""
    process.join()
    if process.exitcode == 130:
        raise KeyboardInterrupt
    if process.exitcode not in (0, train.DIVERGED):
        lines = run.log.read_text(encoding="utf-8").splitlines() if run.log.is_file() else []
        last = lines[-1] if lines else "no output"
        raise UserError(f"{run.name} ended with exit code {process.exitcode}: {last} ({run.log})")
    record = checkpoint.read_record(Path(run.settings.out) / checkpoint.RECORD)
    record["machine"]["jobs"] = jobs
    write_json(run.record, record)


def time_left(waiting, seconds, jobs):
    """Format the estimated time left. seconds: {technique: training times of finished runs}."""
    known = [mean(times) for times in seconds.values()]
    if not known:
        return ""
    total = sum(mean(seconds.get(run.settings.technique, known)) for run in waiting)
    return f", about {total / jobs / 60:.0f} min left"


def choose_precision(run):
    """What precision "auto" means for the runs of a comparison, as runs in two precisions are not compared: that of
    an existing record in the same folder and from the same processor, or else the faster one."""
    weights = download.find_weights(run.settings.weights)
    compute, _ = choose_compute(run.settings, read_config(weights))
    here = processor(compute.device), compute.device
    for path in sorted(run.record.parent.glob("*.json")):
        found = checkpoint.read_record(path)["machine"]
        if (found["processor"], found["device"]) == here:
            return found["precision"]
    return compute.precision


def train_missing(runs, jobs):
    """Train the runs that have no record yet, `jobs` at a time."""
    runs, waiting, running, seconds = {run.name: run for run in runs}.values(), [], {}, {}

    def note_time(record):
        if record and "failed" not in record:
            seconds.setdefault(record["settings"]["technique"], []).append(record["metrics"]["train_seconds"])

    for run in runs:
        record = load(run)
        note_time(record)
        if record is None:
            checkpoint.keep_machine(run.settings)  # a run that is resumed or repeated keeps its precision
            waiting.append(run)
    print(f"{len(runs)} runs, {len(runs) - len(waiting)} of them finished already", flush=True)
    new = [run for run in waiting if run.settings.precision == "auto"]
    if new:
        precision = choose_precision(new[0])
        print(f"precision of new runs: {precision}", flush=True)
        for run in new:
            run.settings.precision = precision
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                left = time_left(waiting, seconds, jobs)
                run = waiting.pop(0)
                number = len(runs) - len(waiting)
                if load(run):  # another compare.py has finished it meanwhile
                    continue
                print(f"{run.name}: run {number} of {len(runs)}{left}; output in {run.log}", flush=True)
                process = start(run, jobs)
                running[process.sentinel] = run, process
            for sentinel in wait(running) if running else ():
                run, process = running.pop(sentinel)
                finish(run, process, jobs)
                note_time(load(run))
    finally:
        for _, process in running.values():
            process.terminate()
            process.join()
