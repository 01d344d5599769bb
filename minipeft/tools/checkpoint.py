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
PATHS = ("weights", "data", "test")  # hashes of their contents decide, not their names


# -- records ----------------------------------------------------------------------------------------------

def start_record(settings, compute, weights, corpus, sentences, parameters):
    """What is known of a run before its first step, as a dict. sentences, parameters: counts."""
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
    record = read_json(path, ("command", "settings", "machine", "versions", "weights_sha256", "data_sha256", "classes",
                              "sentences", "parameters", "history"))
    if record["settings"].get("technique") not in TECHNIQUES:
        raise UserError(f"{path} is of a technique that this version of minipeft does not have")
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


def check_weights(folder, record, hashes):
    """UserError if a run was trained on other base weights than those with these hashes."""
    other = [name for name in hashes if hashes[name] != record["weights_sha256"].get(name)]
    if other:
        raise UserError(f"{folder} was trained on other base weights ({', '.join(other)} differ): name the right ones "
                        "with --weights")


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


# -- the folder -------------------------------------------------------------------------------------------

def lock_file(file):
    """Take the system's exclusive lock on an open file; OSError if another process holds it."""
    try:
        import fcntl
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:  # Windows
        import msvcrt
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)


@contextmanager
def locked(folder):
    """Hold `folder` for this process. UserError if another process holds it.

    The system releases the lock of a process that was killed, so a lock file that is left over does not block.
    """
    path = Path(folder) / "lock"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a")
    except OSError as error:
        raise UserError(f"--out {folder}: cannot be used as a folder ({error.strerror})") from error
    with file:
        try:
            lock_file(file)
            if not os.path.samestat(os.fstat(file.fileno()), path.stat()):
                raise BlockingIOError  # its owner has just deleted it, so it is another file now
        except OSError:
            raise UserError(f"--out {folder} is in use by another process: wait for it, or choose another folder, on a "
                            "local disk") from None
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


def find(folder, settings):
    """Return the run in `folder`, as a Found, or None.

    With --resume, `settings` take over all that was not given on the command line. Raises UserError if an option that
    was given differs, if files are damaged, if the folder holds files but no run, or if it holds a run although neither
    --resume nor --overwrite is given.
    """
    folder, tensors = Path(folder), {}
    if (folder / RECORD).is_file():
        record = read_record(folder / RECORD)
    elif (folder / STATE).is_file():
        tensors, record = read_tensors(folder / STATE)
    else:
        ours = ("lock", f"{STATE}.")  # the latter of a run that was killed in its first write
        others = sorted(path.name for path in folder.glob("*") if not path.name.startswith(ours))
        if others:
            raise UserError(f"--out {folder} holds other files ({', '.join(others[:3])}) and no run: choose another "
                            "folder")
        return None
    if not (settings.resume or settings.overwrite):
        raise UserError(f"{folder} holds a run already: --resume resumes it, --overwrite replaces it, --out FOLDER "
                        "writes to another folder")
    if settings.resume:
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


def check_same_run(folder, before, record):
    """UserError unless weights and data are those of the run `before`, a record. Returns warnings, as lines.

    Processor and threads of both machines go into `record`: the times of a run on two machines belong to neither.
    """
    check_weights(folder, before, record["weights_sha256"])
    if before["data_sha256"] != record["data_sha256"]:
        raise UserError(f"--resume: the data have changed since {folder} was started: restore them, or start anew with "
                        "--overwrite")
    there, here = before["machine"], record["machine"]
    for key in ("processor", "threads"):
        last = str(there[key]).split(", then ")[-1]
        here[key] = there[key] if last == str(here[key]) else f"{there[key]}, then {here[key]}"
    if (here, record["versions"]) == (there, before["versions"]):
        return []
    return ["warning: this run began on another machine, or with other threads or versions: its last bits may differ"]


def begin(folder, before, record, settings):
    """Make the folder ready for a run and return warnings, as lines; if it raises, nothing has changed.

    before: what `find` returned; record: what `start_record` returned. Raises UserError if --resume would mix two runs.
    Only files that a run of ours has written are deleted.
    """
    if before is None:
        return [f"no unfinished run in {folder}: starting at the first step"] if settings.resume else []
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
