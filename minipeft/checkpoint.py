"""What a run leaves behind, and how to go on from it: trained tensors, settings, metrics, and the state to resume.

Tensors go to safetensors files, everything else to JSON and CSV; no pickle. Every file appears whole or not
at all.
"""
import csv
import hashlib
import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from .adapter import add_adapters
from .bert import check_tensors, load_bert, read_safetensors
from .download import find_weights, hash_weights, whole
from .head import Classifier, freeze, train_biases
from .lora import add_lora

FINISHED = "metrics.json"  # the last file a run writes
FILES = (FINISHED, "state.safetensors", "model.safetensors", "history.csv", "predictions.csv", "curves.png",
         "settings.json")


# -- files ------------------------------------------------------------------------------------------------

def write_json(path, content):
    with whole(path) as aside:
        aside.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path):
    """A JSON object. ValueError if the file is damaged, FileNotFoundError."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): train again with --overwrite") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged (not a JSON object): train again with --overwrite")
    return content


def write_csv(path, header, rows):
    with whole(path) as aside, open(aside, "w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows([header, *rows])


def digest(tensors):
    """A hash of all tensors: safetensors has none of its own, and a flipped bit in a weight is still a weight."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        total.update(name.encode())
        total.update(tensors[name].contiguous().view(-1).view(torch.uint8).numpy())
    return total.hexdigest()


def write_tensors(path, tensors, about=None):
    """Save named tensors, and with them anything that fits JSON."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    label = json.dumps({"sha256": digest(tensors), "about": about})  # one key: the order of several is random
    with whole(path) as aside:
        save_file(tensors, aside, {"minipeft": label})


def read_tensors(path):
    """(tensors, about) as written. ValueError if the file is damaged, FileNotFoundError."""
    tensors, metadata = read_safetensors(path)
    label = json.loads(metadata.get("minipeft", "{}"))
    if label.get("sha256") != digest(tensors):
        raise ValueError(f"{path} is damaged (its content does not match its hash): train again with --overwrite")
    return tensors, label["about"]


# -- the model of a run -----------------------------------------------------------------------------------

def build(settings, classes, weights):
    """The untrained classifier that `settings`, a dict as in settings.json, describe.

    The technique comes first and freezes the encoder, the head after it. The seed is set anew before the
    head, so that every technique starts with the same one.
    """
    method = settings["method"]
    encoder = load_bert(weights, dropout=settings.get("dropout", 0.0))
    layers = len(encoder.layers)
    top = settings.get("top_layers") or layers
    if top > layers:
        raise ValueError(f"--top-layers {top}: the encoder has only {layers} layers")
    part = encoder if top == layers else encoder.layers[layers - top:]  # a technique may have the top blocks only
    torch.manual_seed(settings["seed"])
    if method != "full" or top < layers:
        freeze(encoder)
    if method == "adapter":
        add_adapters(part, settings["targets"], settings["bottleneck"], settings["init_std"], settings["norms"])
    elif method == "lora":
        add_lora(part, settings["targets"], settings["rank"], settings["alpha"], settings["lora_dropout"],
                 settings["rslora"])
    elif method == "bitfit":
        train_biases(part)
    elif method == "full":
        part.requires_grad_(True)
    torch.manual_seed(settings["seed"])
    return Classifier(encoder, classes, settings["pooling"], settings["head_dropout"])


def trained(model):
    """The parameters that training moves, by name: all that has to be saved."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


@torch.no_grad()
def fill(model, tensors, path):
    """Load saved tensors into the trainable parameters. ValueError lists what is missing, unexpected or misshaped."""
    expected = trained(model)
    check_tensors(path, tensors, expected)
    for name, parameter in expected.items():
        parameter.copy_(tensors[name])


def open_run(folder, weights=None):
    """A finished run as a model ready for use: (model in eval mode, settings, folder of the base weights).

    Needs the run's folder and the base weights it was trained on. Raises ValueError for other base weights and
    for damaged files, FileNotFoundError.
    """
    folder = Path(folder)
    if not (folder / FINISHED).is_file():
        raise FileNotFoundError(f"{folder} holds no finished run (it has no {FINISHED}); train.py makes one, and "
                                "goes on with an unfinished one with --resume")
    settings = read_json(folder / "settings.json")
    weights = find_weights(weights or settings["weights"])
    check_weights(folder, settings, hash_weights(weights))
    model = build(settings, len(settings["classes"]), weights)
    path = folder / "model.safetensors"
    fill(model, read_tensors(path)[0], path)
    return model.eval(), settings, weights


def check_weights(folder, settings, hashes):
    """ValueError if a run was trained on other base weights than those with these hashes."""
    other = [name for name in hashes if hashes[name] != settings["weights_sha256"][name]]
    if other:
        raise ValueError(f"{folder} was trained on other base weights ({', '.join(other)} differ): name those with "
                         "--weights")


# -- the folder of a run ----------------------------------------------------------------------------------

def begin(folder, facts, resume, overwrite):
    """Make the folder of a run, or check that it holds the beginning of this one. Returns whether it is finished.

    facts: everything that decides what the run does; settings.json holds it. Raises ValueError, and changes
    nothing, if there is another run and neither `resume` nor `overwrite` fits.
    """
    folder = Path(folder)
    for part in folder.glob("*.part"):  # what a kill in the middle of writing left
        part.unlink()
    if resume:
        if not (folder / "settings.json").is_file():
            raise ValueError(f"--resume: {folder} holds no run; leave --resume out to begin one")
        before = read_json(folder / "settings.json")
        check_weights(folder, before, facts["weights_sha256"])
        differ = [f"{key} was {before.get(key)!r} and is {facts.get(key)!r}" for key in {**before, **facts}
                  if before.get(key) != facts.get(key) and key not in ("weights", "data", "test")]  # their hashes count
        if differ:
            raise ValueError(f"--resume: {folder} was begun differently: {'; '.join(differ)}")
        return (folder / FINISHED).is_file()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        if not overwrite:
            raise ValueError(f"{folder} is there already: --resume goes on with it, --overwrite replaces it, "
                             "--out FOLDER goes elsewhere")
        if not (folder / "settings.json").is_file():
            raise ValueError(f"--overwrite: {folder} holds no run, so it is left alone; use another --out")
        for name in FILES:
            (folder / name).unlink(missing_ok=True)
    write_json(folder / "settings.json", facts)
    return False


# -- the state of an unfinished run -----------------------------------------------------------------------

MOMENTS = ("exp_avg", "exp_avg_sq")  # what AdamW keeps of each parameter


def save_state(path, model, optimizer, progress):
    """Everything that decides what the rest of a run does. Batches and dropout follow from the seed and the step."""
    tensors = {}
    for name, parameter in trained(model).items():
        tensors["model." + name] = parameter
        for moment in MOMENTS:
            tensors[f"{moment}.{name}"] = optimizer.state[parameter][moment]
    write_tensors(path, tensors, progress)


@torch.no_grad()
def load_state(path, model, optimizer):
    """Put a saved state back, and return its `progress`. ValueError if it is damaged or of another model."""
    tensors, progress = read_tensors(path)
    expected = {f"{kind}.{name}": parameter for name, parameter in trained(model).items()
                for kind in ("model", *MOMENTS)}
    check_tensors(path, tensors, expected)
    for name, parameter in trained(model).items():
        parameter.copy_(tensors["model." + name])
        optimizer.state[parameter] = {moment: tensors[f"{moment}.{name}"].to(parameter.device) for moment in MOMENTS}
        optimizer.state[parameter]["step"] = torch.tensor(float(progress["step"]), device=parameter.device)
    return progress
