"""The runs of a comparison: naming, finding and executing them. Each is a train.py process and leaves one record."""
import json
import os
import re
import shlex
import subprocess
import sys
import time
from argparse import Namespace
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from ..bert import read_config
from ..tools import checkpoint, download, texts
from ..tools.fast import choose_compute, processor
from ..tools.files import UserError, read_json, write_json
from ..tools.metrics import confusion, matthews
from ..tools.settings import command, common_defaults, defaults
from . import stats
from .studies import QUICK, RULES, SEARCHES

TRAIN = Path(__file__).parents[2] / "train.py"
COMPARISON = "comparison.json"  # the rates that --search has found
DIVERGED = 3                    # train.py's exit code if the loss does not stay finite
UNNAMED = ("technique", "lr", "fold", "seed", "text_column", "label_column", *checkpoint.PATHS)
READING = ("text_column", "label_column", "encoding", "separator")  # how a data file is read


def key(settings):
    """What tells the runs of a place apart: all settings that decide the outcome, but no paths, whose contents do."""
    return json.dumps({name: value for name, value in settings.items() if name not in checkpoint.PATHS}, sort_keys=True)


@dataclass
class Outcome:
    """A finished run on one part: accuracy (%), calibrated and raw loss (nats) of each sentence; numbers for tables."""
    record: dict
    accuracy: np.ndarray
    loss: np.ndarray
    raw: np.ndarray
    numbers: dict


def machine(record, *more):
    """What two runs must share to be compared; with "threads", to have their costs averaged."""
    return tuple(record["machine"][name] for name in ("processor", "device", "precision", *more))


def evaluate(record, part):
    """The Outcome of a run on "test" or "dev"; None for a failed run, or without predictions on this part."""
    if "failed" in record or not record[part]["labels"]:
        return None
    parameters, metrics, dev, judged = (record[name] for name in ("parameters", "metrics", "dev", part))
    logits, labels = np.array(judged["logits"]), np.array(judged["labels"])
    predicted = logits.argmax(1)
    right, raw = 100.0 * (predicted == labels), stats.log_losses(logits, labels)
    losses = stats.log_losses(logits / stats.temperature(dev["logits"], dev["labels"]), labels)
    return Outcome(record, right, losses, raw, {
        **metrics, **parameters, "lr": record["settings"]["lr"], "head_lr": record["settings"].get("head_lr"),
        "share": parameters["trainable"] / parameters["total"], "saved_mb": metrics["saved_bytes"] / 1e6,
        "accuracy": right.mean(), "calibrated": losses.mean(), "loss": raw.mean(),
        "matthews": 100 * matthews(confusion(labels, predicted, len(record["classes"])))})


@dataclass
class Place:
    """A folder of runs, and what these share: settings, and the hashes of weights and data. rates: those that a search
    on this data has found, {technique: rate}. records: {key: record}"""
    out: Path
    common: dict
    weights_sha256: dict
    data_sha256: list
    rates: dict = field(default_factory=dict)
    records: dict = field(default_factory=dict)

    def __post_init__(self):
        if (self.out / COMPARISON).is_file():
            self.rates = read_json(self.out / COMPARISON, ["rates"])["rates"]
        for path in sorted(self.out.glob("runs/*.json")):
            self.add(path)

    @property
    def quick(self):
        """These runs are a smoke test, too short to rank the techniques."""
        return QUICK.items() <= self.common.items()

    def add(self, path):
        """Read a record. UserError if it is of other weights or data, or not of the device or precision asked for."""
        record = checkpoint.read_record(path)
        for name, expected in (("weights", self.weights_sha256), ("data", self.data_sha256)):
            if record[f"{name}_sha256"] != expected:
                raise UserError(f"{path} is of other {name} than the other runs: choose another --out")
        for name in ("device", "precision"):
            if self.common[name] not in ("auto", record["machine"][name]):
                raise UserError(f"{path} was run in {record['machine'][name]}, and --{name} is {self.common[name]}: "
                                "choose another --out")
        self.records[key(record["settings"])] = record


@dataclass
class Run:
    """The settings of a run, and its name, which its record, folder and log have."""
    place: Place
    name: str
    settings: Namespace

    @property
    def path(self):
        return self.place.out / "runs" / f"{self.name}.json"

    @property
    def log(self):
        return self.place.out / "logs" / f"{self.name}.txt"

    @property
    def record(self):
        """The record, or None."""
        return self.place.records.get(key(checkpoint.recorded(self.settings)))


def find_place(out, common):
    """The Place of a comparison. Look at the data files first, then fetch weights and data if needed, and hash them."""
    given = [common[name] for name in ("test", "data") if common[name]]
    for path in given:
        for _ in texts.read_file(path, **{name: common[name] for name in READING if common.get(name)}):
            pass
    weights = download.find_weights(common["weights"])
    files = given or [download.fetch_data()]
    return Place(out, common, download.hash_weights(weights), [texts.fingerprint(path) for path in files])


def read_place(out):
    """The Place of the records in `out`. Its common settings are those that all of them share."""
    paths = sorted(out.glob("runs/*.json"))
    if not paths:
        raise UserError(f"{out / 'runs'} holds no records: name the folder of a comparison with --out, or run "
                        "python compare.py first")
    first = checkpoint.read_record(paths[0])
    place = Place(out, common_defaults(), first["weights_sha256"], first["data_sha256"])
    for name, value in first["settings"].items():
        shared = all(record["settings"].get(name) == value for record in place.records.values())
        if name in checkpoint.PATHS or name in place.common and shared:
            place.common[name] = value
    return place


def word(value):
    """A value of an option, in the name of a run."""
    if isinstance(value, list):
        return "+".join(value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def rates_of(place, variant, rule):
    """The rates of a variant by a rule: {"lr" or "head_lr": rate, or None if it is not known yet}."""
    searches = [(name, SEARCHES[name]) for name in variant.searches or (variant.technique,) if name in SEARCHES]
    own = place.rates if rule == "doubling" else {}  # instead of train.py's defaults
    found = {search.option: own.get(name) or getattr(search, rule) for name, search in searches}
    return {name: rate for name, rate in found.items() if name not in variant.options}


def make_run(place, variant, repeat, rule="doubling"):
    """The run of a variant on fold `repeat` (with --test: with this seed). Equal settings give equal names."""
    default, fold = defaults(variant.technique), None if place.common["test"] else repeat
    rates = rates_of(place, variant, rule)
    if None in rates.values():
        names = " ".join(variant.searches or (variant.technique,))
        raise UserError(f"{variant.name}: no rate by the rule {RULES[rule]!r} is known yet: python compare.py --rates "
                        f"{names} finds it, minipeft/lab/studies.py takes it")
    given = default | place.common | rates | {"seed": repeat, "fold": fold} | variant.options
    given |= {"resume": True, "given": list(default)}  # an unfinished run must have all of these settings
    words = [f"{name}-{word(value)}" for name, value in checkpoint.recorded(Namespace(**given)).items()
             if value != default.get(name) and name not in UNNAMED]
    words += [f"lr-{given['lr']:g}", f"seed{repeat}" if fold is None else f"fold{repeat}"]
    name = re.sub(r"[^a-zA-Z0-9.+-]+", "-", "-".join([variant.technique, *words]))
    return Run(place, name, Namespace(**given | {"out": str(place.out / "folders" / name)}))


def records_of(place, variant, rule):
    """{fold (or seed): record} of the runs of a variant that exist."""
    if None in rates_of(place, variant, rule).values():
        return {}
    records = {fold: make_run(place, variant, fold, rule).record for fold in range(10)}
    return {fold: record for fold, record in records.items() if record}


def collect(place, study):
    """The runs of a study on the folds (or seeds) that all its variants have: {variant: {fold: Outcome, or None for a
    failed run}}. {} if there is no such fold. Of a study that is `partial`, one variant without any run is left out."""
    found = {variant.name: records_of(place, variant, study.rule) for variant in study.variants}
    empty = [name for name, records in found.items() if not records]
    if len(empty) == 1 and study.partial:
        del found[empty[0]]
    folds = set.intersection(*(set(records) for records in found.values()))
    return {name: {fold: evaluate(records[fold], study.part) for fold in sorted(folds)}
            for name, records in found.items()} if folds else {}


# -- executing --------------------------------------------------------------------------------------------

def start(run, threads):
    """Start a run in a process of its own, so that its time and memory are its own. An unfinished run resumes."""
    run.log.parent.mkdir(parents=True, exist_ok=True)
    _, _, *words = shlex.split(command(run.settings))  # without "python train.py"
    with open(run.log, "ab") as log:
        return subprocess.Popen([sys.executable, str(TRAIN), *words, "--out", run.settings.out, "--resume"],
                                stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                                env=os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONIOENCODING": "utf-8"})


def finish(run, code, jobs):
    """Copy the record of a finished or failed run, and add how many runs shared the machine: times depend on it.
    UserError, with the last line of its log, if there is no record."""
    if code not in (0, DIVERGED):
        lines = run.log.read_text(encoding="utf-8", errors="replace").splitlines()
        raise UserError(f"{run.name} ended with exit code {code}: {lines[-1] if lines else 'no output'} ({run.log})")
    record = checkpoint.read_record(Path(run.settings.out) / checkpoint.RECORD)
    record["machine"]["jobs"] = jobs
    write_json(run.path, record)
    run.place.add(run.path)


def choose_precision(run):
    """What precision "auto" means for the runs of a comparison, as runs in two precisions are not compared: that of
    an existing record of this processor, or else the faster one."""
    compute, _ = choose_compute(run.settings, read_config(download.find_weights(run.settings.weights)))
    here = processor(compute.device), compute.device
    for record in run.place.records.values():
        if machine(record)[:2] == here:
            return record["machine"]["precision"]
    return compute.precision


def train_missing(runs, jobs):
    """Train the runs that have no record yet, `jobs` at a time. If this process ends, so do its runs; only if it is
    killed at once (SIGKILL) they go on, and hold their folders until they are finished."""
    runs = list({run.name: run for run in runs}.values())
    waiting, running = [run for run in runs if run.record is None], {}
    print(f"{len(runs) - len(waiting)} of {len(runs)} runs are finished already", flush=True)
    for run in waiting:
        if run.path.exists():
            raise UserError(f"{run.path} is of a run with other settings: choose another --out")
        checkpoint.find(run.settings.out, run.settings)  # a run that resumes keeps its device and precision
    new = [run for run in waiting if run.settings.precision == "auto"]
    if new:
        precision = choose_precision(new[0])
        print(f"precision of new runs: {precision}", flush=True)
        for run in new:
            run.settings.precision = precision
    threads = max(1, torch.get_num_threads() // jobs)
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                run = waiting.pop(0)
                print(f"{run.name}: run {len(runs) - len(waiting)} of {len(runs)}; output in {run.log}", flush=True)
                running[run.name] = run, start(run, threads)
            for run, process in list(running.values()):
                if process.poll() is not None:
                    del running[run.name]
                    finish(run, process.returncode, jobs)
            time.sleep(0.1)
    finally:
        for _, process in running.values():
            process.terminate()
            process.wait()
