"""The folder of a run: its files, how an unfinished run resumes exactly, and how a finished one is opened.

    run.json            the record: settings, machine, versions, hashes, history, metrics, dev and test predictions
                        (logits minus that of the first class)
    model.safetensors   the trained tensors
    predictions.csv     dev and test, for people and spreadsheets
    curves.png
    state.safetensors   while unfinished: trained tensors, optimiser state, progress

Tensors go to safetensors, everything else to JSON and CSV; no pickle. Every write is atomic.
"""
import csv
import hashlib
import json
import os
import platform
import shutil
from argparse import Namespace
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import safetensors
import tokenizers
import torch

from ..model import build, trained
from . import distributed
from .download import find_weights, hash_weights
from .fast import processor
from .files import UserError, atomic, check_tensors, read_json, read_safetensors, write_safetensors
from .settings import TECHNIQUES, UNRECORDED, command, defaults, recorded
from .texts import fingerprint

RECORD, STATE = "run.json", "state.safetensors"
FILES = (RECORD, STATE, "model.safetensors", "predictions.csv", "curves.png")
START_KEYS = ("command", "settings", "machine", "versions", "weights_sha256", "data_sha256", "classes", "sentences",
              "parameters")  # the keys of a record that are known before the first step
PARTS = {  # the keys inside the objects of a finished record
    "machine": ("processor", "device", "precision", "threads"),
    "metrics": ("train_loss", "train_accuracy", "dev_loss", "dev_accuracy", "test_loss", "test_accuracy",
                "train_seconds", "step_milliseconds", "sentences_per_second", "peak_memory_mb", "saved_bytes"),
    "dev": ("lines", "labels", "logits"), "test": ("lines", "labels", "logits"),
    "parameters": ("technique", "head", "trainable", "total")}
PATHS = ("weights", "data", "test")  # hashes of their contents decide, not their names
DELETE = "delete it (in the folder of a run: the whole folder) and run again"


# -- records ----------------------------------------------------------------------------------------------

def start_record(settings, compute, weights, corpus, sentences, parameters):
    """What is known of a run before its first step: the values of START_KEYS. sentences, parameters: counts."""
    settings = Namespace(**vars(settings))
    if settings.weights and Path(settings.weights).is_dir():  # not a name on the Hub
        settings.weights = str(Path(settings.weights).resolve())  # found from any folder
    machine = {"processor": processor(compute.device), "device": compute.device, "precision": compute.precision,
               "threads": torch.get_num_threads()}
    if distributed.world() > 1:
        machine["processes"] = distributed.world()
    return {
        "command": command(settings), "settings": recorded(settings), "machine": machine,
        "versions": {"python": platform.python_version(), "torch": torch.__version__,
                     "tokenizers": tokenizers.__version__, "safetensors": safetensors.__version__},
        "weights_sha256": hash_weights(weights), "data_sha256": [fingerprint(path) for path in corpus.files],
        "classes": corpus.classes, "sentences": sentences, "parameters": parameters}


def settings_of(record):
    """The settings of a record, as a Namespace. Those that it does not have are None."""
    return Namespace(**(dict.fromkeys(defaults(record["settings"]["technique"])) | record["settings"]))


def read_record(path):
    """Read a run.json. UserError if the file is missing, damaged, or lacks a key."""
    record = read_json(path, (*START_KEYS, "history"))
    technique = record["settings"].get("technique") if isinstance(record["settings"], dict) else None
    if technique not in TECHNIQUES:
        raise UserError(f"{path} is damaged (technique {technique!r}): {DELETE}")
    parts = {"settings": recorded(Namespace(**defaults(technique))), "machine": PARTS["machine"]}
    if "failed" not in record:
        parts |= PARTS
    for part, keys in parts.items():
        content = record.get(part)
        missing = [key for key in keys if not isinstance(content, dict) or key not in content]
        if missing:
            raise UserError(f"{path} is damaged ({part} lacks {', '.join(missing)}): {DELETE}")
    return record


# -- tensors ----------------------------------------------------------------------------------------------

def digest(tensors, about):
    """A hash of all tensors and of `about`. safetensors has no checksum: a changed bit would load without an error."""
    total = hashlib.sha256(json.dumps(about).encode())
    for name in sorted(tensors):
        total.update(name.encode())
        total.update(tensors[name].detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return total.hexdigest()


def write_tensors(path, tensors, about=None):
    """Save named tensors and, with them, anything that fits JSON."""
    write_safetensors(path, tensors, {"minipeft": json.dumps({"sha256": digest(tensors, about), "about": about})})


def read_tensors(path):
    """Read (tensors, about). UserError if the file is missing, damaged or not written by `write_tensors`."""
    tensors, metadata = read_safetensors(path)
    try:
        label = json.loads(metadata["minipeft"])
        if label["sha256"] != digest(tensors, label["about"]):
            raise ValueError("its content does not match its hash")
        return tensors, label["about"]
    except (KeyError, ValueError, TypeError) as error:
        raise UserError(f"{path} is damaged, or not written by minipeft ({error}): delete it and train again with "
                        "--overwrite") from None


@torch.no_grad()
def fill(model, tensors, path):
    """Copy saved tensors into the trained parameters. UserError lists what is missing, unexpected or misshaped."""
    expected = trained(model)
    check_tensors(path, tensors, expected)
    for name, parameter in expected.items():
        parameter.copy_(tensors[name])


def open_run(folder, weights=None):
    """Open a finished run: (model in eval mode, record, folder of the base weights).

    Needs the run's folder and the base weights that it was trained on. Raises UserError if the run is not
    finished, if files are damaged, or for other base weights.
    """
    folder = Path(folder)
    if not (folder / RECORD).is_file():
        raise UserError(f"{folder} holds no finished run (no {RECORD}); train.py makes one, and resumes an "
                        "unfinished one with --resume")
    record = read_record(folder / RECORD)
    if "failed" in record:
        raise UserError(f"{folder} holds a failed run: {record['failed']}")
    settings = settings_of(record)
    weights = find_weights(weights or settings.weights)
    check_weights(folder, record, hash_weights(weights))
    model = build(settings, len(record["classes"]), weights)
    fill(model, read_tensors(folder / "model.safetensors")[0], folder / "model.safetensors")
    return model.eval(), record, weights


def check_weights(folder, record, hashes):
    """UserError if a run was trained on other base weights than those with these hashes."""
    other = [name for name in hashes if hashes[name] != record["weights_sha256"].get(name)]
    if other:
        raise UserError(f"{folder} was trained on other base weights ({', '.join(other)} differ): name the right ones "
                        "with --weights")


# -- the folder -------------------------------------------------------------------------------------------

def lock_file(file):
    """Take the system's exclusive lock on an open file; OSError if another process holds it."""
    try:
        import fcntl
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:  # Windows
        import msvcrt
        os.lseek(file.fileno(), 1 << 30, os.SEEK_SET)  # one byte, the same for all, beyond the text
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)


@contextmanager
def locked(folder):
    """Hold `folder` for this process. UserError if another process holds it.

    The system releases the lock of a process that was killed, so a lock file that is left over does not block.
    """
    path = Path(folder) / "lock"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+")
    except OSError as error:
        raise UserError(f"--out {folder}: cannot be used as a folder ({error.strerror})") from error
    with file:
        try:
            lock_file(file)
            if not path.exists() or not os.path.samestat(os.fstat(file.fileno()), path.stat()):
                raise BlockingIOError  # its owner has just deleted it, so it is another file now
        except OSError as error:
            file.seek(0)
            raise UserError(f"--out {folder} is in use by another process ({file.read() or error}): wait for it, or "
                            "choose another folder, on a local disk") from None
        file.truncate(0)
        file.write(f"pid {os.getpid()}")
        file.flush()
        try:
            yield
        finally:
            if os.name == "nt":  # an open file cannot be deleted there
                file.close()
            with suppress(OSError):
                path.unlink()
                path.parent.rmdir()  # if it is empty: a mistake was found before the first write


@dataclass
class Found:
    """The run that a folder holds; tensors: the state of an unfinished one."""
    record: dict
    finished: bool
    tensors: dict


def find(folder, settings=None):
    """Return the run in `folder`, as a Found, or None. With --resume, `settings` take over all that was not given on
    the command line. UserError for damaged files, and for a given option that differs."""
    folder, tensors = Path(folder), {}
    if (folder / RECORD).is_file():
        record = read_record(folder / RECORD)
    elif (folder / STATE).is_file():
        tensors, record = read_tensors(folder / STATE)
        if not isinstance(record, dict) or any(key not in record for key in (*START_KEYS, "progress")):
            raise UserError(f"{folder / STATE} is damaged (keys are missing): {DELETE}")
    else:
        return None
    if settings and settings.resume:
        there = record["settings"] | {name: record["machine"][name] for name in ("device", "precision")}
        if there["technique"] != settings.technique:
            raise UserError(f"--resume: {folder} holds a run of {there['technique']}, not of {settings.technique}")
        for name in defaults(settings.technique).keys() - set(UNRECORDED) | {"device", "precision"}:
            old, new = there.get(name), getattr(settings, name)
            if name not in settings.given or new == "auto":
                setattr(settings, name, old)
            elif new != old and name not in PATHS:
                raise UserError(f"--resume: {folder} was started with --{name.replace('_', '-')} {old}, not {new}: "
                                "leave it out, or start anew with --overwrite")
    return Found(record, not tensors, tensors)


THEN = ", then "  # between the machines of a run that was resumed on another one


def check_same_run(folder, before, record):
    """UserError unless weights, data and classes are those of the run `before`, a record. Returns warnings, as lines.
    Processor and threads of both machines go into `record`: the times of a run on two machines belong to neither."""
    check_weights(folder, before, record["weights_sha256"])
    for key, what in (("data_sha256", "the data have"), ("classes", "the classes of the data have")):
        if before[key] != record[key]:
            raise UserError(f"--resume: {what} changed since {folder} was started: restore them, or start anew with "
                            "--overwrite")
    there, here = before["machine"] | before["versions"], record["machine"] | record["versions"]
    changed = [key for key in here if str(there.get(key)).rpartition(THEN)[2] != str(here[key])]
    for key in ("processor", "threads"):
        record["machine"][key] = f"{there[key]}{THEN}{here[key]}" if key in changed else there[key]
    return [f"warning: this run began with {key} {there.get(key)} and resumes with {here[key]}: the last bits may "
            "differ" for key in changed]


def begin(folder, before, record, settings):
    """Make the folder ready for a run and return warnings, as lines; if it raises, nothing has changed.

    before: what `find` returned; record: the keys START_KEYS. Raises UserError if the folder holds files but no run, or
    a run although neither --resume nor --overwrite is given. Only files that a run of ours has written are deleted.
    """
    if before is None:
        ours = ("lock", f"{STATE}.")  # the latter of a run that was killed in its first write
        others = sorted(path.name for path in folder.iterdir() if not path.name.startswith(ours))
        if others:
            raise UserError(f"--out {folder} holds other files ({', '.join(others[:3])}) and no run: choose "
                            "another folder")
        return [f"no unfinished run in {folder}: starting at the first step"] if settings.resume else []
    if not (settings.resume or settings.overwrite):
        raise UserError(f"{folder} holds a run already: --resume resumes it, --overwrite replaces it, "
                        "--out FOLDER writes to another folder")
    warnings = []
    if settings.resume:
        warnings = check_same_run(folder, before.record, record)
        record["command"] = before.record["command"]
    for name in FILES:
        for left in folder.glob(f"{name}.*.part"):  # of a process that was killed while it wrote
            shutil.rmtree(left, ignore_errors=True)
        if settings.overwrite:
            (folder / name).unlink(missing_ok=True)
    return warnings


# -- the state of an unfinished run -----------------------------------------------------------------------

MOMENTS = ("exp_avg", "exp_avg_sq")  # what AdamW keeps of each parameter


def save_state(folder, model, optimizer, record, progress):
    """Save all that decides the rest of a run. Batches and dropout follow from the seed and the step."""
    tensors = {}
    for name, parameter in trained(model).items():
        tensors["model." + name] = parameter
        for moment in MOMENTS:
            tensors[f"{moment}.{name}"] = optimizer.state[parameter][moment]
    write_tensors(Path(folder) / STATE, tensors, record | {"progress": progress})


@torch.no_grad()
def restore(found, model, optimizer):
    """Put the state of a Found into model and optimiser, and return its progress. UserError if it does not fit."""
    tensors, progress, parameters = found.tensors, found.record["progress"], trained(model)
    check_tensors(STATE, tensors, {f"{kind}.{name}": parameter for name, parameter in parameters.items()
                                   for kind in ("model", *MOMENTS)})
    for name, parameter in parameters.items():
        parameter.copy_(tensors["model." + name])
        optimizer.state[parameter] = {moment: tensors[f"{moment}.{name}"].to(parameter.device, copy=True)
                                      for moment in MOMENTS}  # a copy: Windows cannot replace a mapped file
        optimizer.state[parameter]["step"] = torch.tensor(float(progress["step"]), device=parameter.device)
    return progress


# -- the files of a finished run --------------------------------------------------------------------------

def write_predictions(path, record):
    """Write dev and test predictions of a record as a table: set, line, label, prediction, probabilities."""
    classes = record["classes"]
    with atomic(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["set", "line", "label", "prediction", *(f"p({name})" for name in classes)])
        for part in ("dev", "test"):
            rows = record[part]
            probabilities = torch.tensor(rows["logits"], dtype=torch.float64).softmax(1).tolist()
            for line, label, row in zip(rows["lines"], rows["labels"], probabilities):
                best = classes[row.index(max(row))]
                writer.writerow([part, line, classes[label], best, *(f"{value:.4f}" for value in row)])
