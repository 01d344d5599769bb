"""Files of peft, transformers and AdapterHub's adapters: export finished runs, import peft's LoRA.

    python -m minipeft export RUN FOLDER --to peft|transformers|adapters
    python -m minipeft import FOLDER RUN
    python train.py lora --init-from FOLDER

Files from elsewhere are not trusted: no pickle, no path that a file names is opened, and a file's size is compared
with its configuration before it is read. A UserError lists everything that is wrong.
"""
import json
import math
import re
import shutil
from argparse import Namespace
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from ..adapter import AdapterLinear
from ..bert import IMPLEMENTED, hugging_face_name, load_bert, load_pooler
from ..lora import LoRALinear, add_lora, load_lora, merge_lora, swap
from ..model import build, count_parameters, trained
from . import checkpoint
from .download import WEIGHTS_HUB, find_weights, hash_weights
from .files import UserError, check_tensors, read_json, read_safetensors, write_json, write_safetensors, write_text
from .settings import defaults

CONFIG, PEFT, ADAPTERS = "adapter_config.json", "adapter_model.safetensors", "adapter.safetensors"  # their file names
HEAD = "head.safetensors"  # ours: a head that has no counterpart in the other library
PEFT_HEAD = ("base_model.model.bert.pooler.dense", "base_model.model.classifier")  # the two layers of head.py's Head


def names(encoder, kind):
    """{Hugging Face's name: our name} of the modules of a class, without the pooler."""
    ours = [name for name, module in encoder.named_modules() if isinstance(module, kind) and name != "pooler"]
    return {hugging_face_name(name + ".weight").removesuffix(".weight"): name for name in ours}


def head_tensors(head, dense="dense", classifier="classifier"):
    """The four tensors of a Head, by the names that its layers have elsewhere."""
    return {f"{dense}.weight": head.dense.weight, f"{dense}.bias": head.dense.bias,
            f"{classifier}.weight": head.classifier.weight, f"{classifier}.bias": head.classifier.bias}


def save_bert(encoder, folder, config=None, prefix="", more=None):
    """Write an encoder as the Hugging Face files `config.json` and `model.safetensors`.

    config: entries to add to config.json. prefix: before every name, `bert.` for a model with a head.
    more: further tensors, by their Hugging Face names. The dropout rates written are those in use, 0 after load_bert.
    Raises UserError if the files cannot be written, ValueError for an encoder that holds LoRA or adapters.
    """
    try:
        tensors = {prefix + hugging_face_name(name): tensor for name, tensor in encoder.state_dict().items()}
    except KeyError as error:
        raise ValueError(f"{error} is not in a plain BERT: call merge_lora or remove_adapters first") from None
    content = IMPLEMENTED | {"architectures": ["BertModel"]} | asdict(encoder.config) | (config or {})
    write_text(Path(folder) / "config.json", json.dumps(content, indent=2) + "\n")
    write_safetensors(Path(folder) / "model.safetensors", tensors | (more or {}), {"format": "pt"})


def new_folder(folder):
    """UserError if a folder exists and holds anything: existing files are never replaced."""
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists and is not an empty folder: choose another")
    return folder


# -- out --------------------------------------------------------------------------------------------------

def save_config(path, config):
    write_text(path, json.dumps(config, indent=2, sort_keys=True) + "\n")


def export_peft(model, settings, about, folder):
    """Write LoRA over BertForSequenceClassification with [CLS] pooling, else over BertModel."""
    if settings.technique != "lora":
        raise UserError(f"--to peft: the run trained {settings.technique}, and peft has a format for LoRA only; use "
                        "--to transformers (head, bitfit, full) or --to adapters (adapter)")
    sequence = settings.pooling == "cls"
    prefix = "base_model.model.bert." if sequence else "base_model.model."
    tensors = head_tensors(model.head, *PEFT_HEAD) if sequence else {}
    ranks, alphas = {}, {}
    for theirs, ours in names(model.encoder, LoRALinear).items():
        layer = model.encoder.get_submodule(ours)
        tensors |= {f"{prefix}{theirs}.lora_A.weight": layer.lora_A, f"{prefix}{theirs}.lora_B.weight": layer.lora_B}
        of_layer = settings.targets[ours] if isinstance(settings.targets, dict) else (settings.rank, settings.alpha)
        ranks[theirs], alphas[theirs] = of_layer
    save_config(folder / CONFIG, {
        "peft_type": "LORA", "task_type": "SEQ_CLS" if sequence else "FEATURE_EXTRACTION", "inference_mode": True,
        "base_model_name_or_path": settings.weights or WEIGHTS_HUB, "target_modules": list(ranks),
        "modules_to_save": ["classifier", "pooler", "score"] if sequence else None, "r": settings.rank,
        "rank_pattern": {name: rank for name, rank in ranks.items() if rank != settings.rank},
        "lora_alpha": settings.alpha, "use_rslora": settings.rslora, "lora_dropout": settings.lora_dropout,
        "alpha_pattern": {name: alpha for name, alpha in alphas.items() if alpha != settings.alpha},
        "bias": "none", "fan_in_fan_out": False, "init_lora_weights": True})
    write_safetensors(folder / PEFT, tensors, {"format": "pt"} | about)


def export_transformers(model, settings, about, folder, weights):
    """Write the merged model and its tokenizer: BertForSequenceClassification with [CLS] pooling, else BertModel."""
    if settings.technique == "adapter":
        raise UserError("--to transformers: adapters are not linear, so they cannot be merged into the base weights; "
                        "use --to adapters")
    merge_lora(model)
    classes = json.loads(about["classes"])
    config = {"id2label": dict(enumerate(classes)), "label2id": {name: index for index, name in enumerate(classes)},
              "classifier_dropout": settings.head_dropout}
    if settings.pooling == "cls":
        save_bert(model.encoder, folder, config | {"architectures": ["BertForSequenceClassification"]}, "bert.",
                  head_tensors(model.head, "bert.pooler.dense", "classifier"))
    else:
        pooler = load_pooler(weights)  # not used; without it transformers makes a random one
        more = {f"pooler.dense.{kind}": tensor for kind, tensor in pooler.state_dict().items()} if pooler else {}
        save_bert(model.encoder, folder, config, more=more)
    shutil.copyfile(weights / "tokenizer.json", folder / "tokenizer.json")
    vocabulary = read_json(weights / "tokenizer.json")["model"].get("vocab", {})
    special = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    save_config(folder / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": settings.max_length,
        **{name: token for name, token in special.items() if token in vocabulary}})


def export_adapters(model, settings, about, folder):
    """Write adapters over BertModel for AdapterHub's load_adapter(folder, use_safetensors=True)."""
    default = defaults("adapter")["targets"]
    if settings.technique != "adapter" or settings.norms or set(settings.targets) != set(default):
        raise UserError("--to adapters: the library holds adapters after both sub-layers of a block, and no trained "
                        "norms; train with train.py adapter --norms, and the default --targets")
    tensors, config = {}, model.encoder.config
    for theirs, ours in names(model.encoder, AdapterLinear).items():
        base, adapter = theirs.removesuffix("dense") + "adapters.minipeft", model.encoder.get_submodule(ours).adapter
        for there, layer in (("adapter_down.0", adapter.down), ("adapter_up", adapter.up)):
            tensors |= {f"{base}.{there}.weight": layer.weight, f"{base}.{there}.bias": layer.bias}
    below = config.num_hidden_layers - (settings.top_layers or config.num_hidden_layers)
    save_config(folder / CONFIG, {  # without "version", "gelu" is read as the tanh approximation
        "name": "minipeft", "version": "adapters.1.3.0", "model_type": "bert", "model_class": "BertModel",
        "model_name": settings.weights or WEIGHTS_HUB, "hidden_size": config.hidden_size, "config": {
            "mh_adapter": True, "output_adapter": True, "non_linearity": "gelu", "original_ln_after": True,
            "original_ln_before": False, "residual_before_ln": True, "adapter_residual_before_ln": False,
            "ln_before": False, "ln_after": False, "is_parallel": False, "scaling": 1.0, "init_weights": "houlsby",
            "leave_out": list(range(below)),
            "reduction_factor": config.hidden_size / (settings.bottleneck + 0.5)}})  # it takes hidden_size // this
    write_safetensors(folder / ADAPTERS, tensors, {"format": "pt"})


def export(run, folder, to, weights=None):
    """Write a finished run to a new folder in the format `to`: "peft", "transformers" or "adapters".

    A head without a counterpart there (mean pooling; AdapterHub) goes to head.safetensors: the state_dict of head.py's
    Head. Returns the names of the files. Raises UserError if the format cannot hold the run.
    """
    model, record, weights = checkpoint.open_run(run, weights)
    folder, settings = new_folder(folder), checkpoint.settings_of(record)
    about = {"classes": json.dumps(record["classes"]), "pooling": settings.pooling,
             "max_length": str(settings.max_length)}
    if to == "peft":
        export_peft(model, settings, about, folder)
    elif to == "transformers":
        export_transformers(model, settings, about, folder, weights)
    else:
        export_adapters(model, settings, about, folder)
    if to == "adapters" or settings.pooling == "mean":
        write_safetensors(folder / HEAD, head_tensors(model.head), {"format": "pt"} | about)
    return sorted(path.name for path in folder.iterdir())


# -- in: what is understood -------------------------------------------------------------------------------

KINDS = {"target_modules": (str, list), "rank_pattern": dict, "alpha_pattern": dict, "use_rslora": bool}
VALUES = {"peft_type": ["LORA"], "task_type": [None, "SEQ_CLS", "FEATURE_EXTRACTION"], "bias": ["none"],
          "init_lora_weights": [True, False, None, "gaussian"]}  # others, such as PiSSA, change the base weights
ANY_VALUE = ("r", "lora_alpha",  # checked by read_layers; the others have no effect on the model
             "base_model_name_or_path", "inference_mode", "lora_dropout", "revision", "auto_mapping", "peft_version",
             "megatron_core", "qalora_group_size")
HEADS = ("classifier", "score", "pooler")  # modules_to_save
MOST_CLASSES, MOST_CONFIG = 10_000, 1_000_000  # outputs of a head; bytes


def check_config(path, config):
    """UserError that lists everything in an adapter_config.json that is not supported. Other keys must be empty."""
    wrong = [] if "peft_type" in config else ["no peft_type"]
    for key, value in config.items():
        if key in KINDS:
            fits = isinstance(value, KINDS[key])
        elif key in VALUES:
            fits = value in VALUES[key]
        elif key == "modules_to_save":
            fits = value is None or isinstance(value, list) and all(name in HEADS for name in value)
        else:
            fits = key in ANY_VALUE or not value
        if not fits:
            wrong.append(f"{key} = {value!r:.60}")
    if wrong:
        raise UserError(f"{path}: unsupported settings: {'; '.join(wrong)}; plain LoRA on linear layers is supported")


def matches(pattern, name, before=""):
    """Whether `before`, then a regular expression, matches the name. ValueError if the search could take minutes."""
    # In a name of 60 letters a repetition can end in 2^6 places; an option or an alternative doubles the ways.
    bits = 6 * len(re.findall(r"[*+{]", pattern)) + len(re.findall(r"[?|]", pattern))
    if bits > 22 or re.search(r"\)[*+{]", pattern):
        raise ValueError(f"the pattern {pattern!r:.100} is too complex; list the layers by name instead")
    return re.fullmatch(f"{before}(?:{pattern})", name) is not None


def is_target(targets, name):
    """As in peft: a string is a regular expression, a list holds whole names or dotted suffixes."""
    if isinstance(targets, str):
        return matches(targets, name)
    return any(f".{name}".endswith(f".{target}") for target in targets)


def from_pattern(patterns, name, default):
    """As in peft: the value of the first key that matches the name or a dotted suffix of it."""
    return next((value for key, value in patterns.items() if matches(key, name, before=r"(?:.*\.)?")), default)


def read_layers(path, config, encoder, prefix):
    """{our name: [rank, alpha]} of the layers that a checked config targets. UserError lists wrong values."""
    layers, wrong = {}, []
    for theirs, ours in names(encoder, nn.Linear).items():
        try:
            if not is_target(config.get("target_modules", []), prefix + theirs):
                continue
            rank = from_pattern(config.get("rank_pattern", {}), prefix + theirs, config.get("r", 8))
            alpha = from_pattern(config.get("alpha_pattern", {}), prefix + theirs, config.get("lora_alpha", 8))
        except (ValueError, re.error) as error:
            raise UserError(f"{path}: {error}") from None
        if type(rank) is not int or not 1 <= rank <= encoder.config.hidden_size:
            wrong.append(f"rank {rank!r:.20} of {theirs} is not from 1 to hidden_size")
        if type(alpha) not in (int, float) or not 0 < alpha < math.inf:
            wrong.append(f"alpha {alpha!r:.20} of {theirs} is not a positive number")
        layers[ours] = [rank, alpha]
    if wrong or not layers:
        raise UserError(f"{path}: {'; '.join(wrong) or 'target_modules names no linear layer of this encoder'}")
    return layers


# -- in ---------------------------------------------------------------------------------------------------

@dataclass
class PeftLoRA:
    config: dict   # adapter_config.json, checked
    layers: dict   # our name of each layer -> [rank, alpha]
    tensors: dict  # our names -> tensors of a LoRA on `layers`
    head: dict     # our names -> tensors of a Head, as far as the folder holds them
    pooling: str   # "cls" for a sequence classifier
    about: dict    # what `export` has added to the tensors: classes, pooling, max_length


def read_small(path, values):
    """Read a safetensors file that should hold about so many values; UserError, unread, if it is far larger."""
    if path.is_file() and path.stat().st_size > 8 * values + MOST_CONFIG:
        raise UserError(f"{path} has {path.stat().st_size:,} bytes, too many for {values:,} values, so it is not "
                        "read: is it the file that peft saved?")
    return read_safetensors(path)


def rename(path, tensors, expected):
    """Return tensors by our names, in fp32. expected: {name in the file: (our name, shape)}. See check_tensors."""
    tensors = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    check_tensors(path, tensors, {name: torch.empty(shape, device="meta") for name, (_, shape) in expected.items()})
    return {ours: tensors[name] for name, (ours, _) in expected.items()}


def expected_head(tensors, hidden, dense="dense", classifier="classifier"):
    """What a file of `tensors` should hold of a Head, as `rename` takes it; `dense` may be left to the base weights."""
    bias = tensors.get(f"{classifier}.bias", torch.zeros(2))
    expected = {f"{classifier}.weight": ("classifier.weight", (bias.numel(), hidden)),
                f"{classifier}.bias": ("classifier.bias", (bias.numel(),))}
    if f"{dense}.weight" in tensors or f"{dense}.bias" in tensors:
        expected |= {f"{dense}.weight": ("dense.weight", (hidden, hidden)), f"{dense}.bias": ("dense.bias", (hidden,))}
    return expected


def read_peft(folder, encoder):
    """Read a LoRA that peft trained on a BERT-type model, and check that it fits `encoder`. Returns a PeftLoRA.

    Honours lists and patterns of targets, rsLoRA, rank and alpha patterns. Raises UserError that lists every setting
    that is not supported (DoRA, trained biases, layer replication, ...), or every tensor that is missing,
    unexpected or misshaped.
    """
    folder, hidden = Path(folder), encoder.config.hidden_size
    path = folder / CONFIG
    if path.is_file() and path.stat().st_size > MOST_CONFIG:
        raise UserError(f"{path} has {path.stat().st_size:,} bytes, too many for a configuration, so it is not "
                        "read: is it the file that peft saved?")
    try:
        config = read_json(path)
    except RecursionError:
        raise UserError(f"{path} is damaged (nested too deeply): save the LoRA again with peft") from None
    check_config(path, config)
    sequence = config.get("task_type") == "SEQ_CLS"
    prefix = "bert." if sequence else ""
    layers, expected = read_layers(path, config, encoder, prefix), {}
    for ours, (rank, _) in layers.items():
        linear, theirs = encoder.get_submodule(ours), hugging_face_name(ours + ".weight").removesuffix(".weight")
        base = f"base_model.model.{prefix}{theirs}"
        expected[f"{base}.lora_A.weight"] = (f"{ours}.lora_A", (rank, linear.in_features))
        expected[f"{base}.lora_B.weight"] = (f"{ours}.lora_B", (linear.out_features, rank))

    of_head = (hidden + 1) * (hidden + MOST_CLASSES)
    tensors, about = read_small(folder / PEFT, of_head + sum(math.prod(shape) for _, shape in expected.values()))
    if sequence:
        expected |= expected_head(tensors, hidden, *PEFT_HEAD)
    lora = rename(folder / PEFT, tensors, expected)
    head = {name: lora.pop(name) for name in list(lora) if name.startswith(("dense.", "classifier."))}
    if not sequence and (folder / HEAD).is_file():
        tensors, about = read_small(folder / HEAD, of_head)
        head = rename(folder / HEAD, tensors, expected_head(tensors, hidden))
    return PeftLoRA(config, layers, lora, head, "cls" if sequence else about.get("pooling"), about)


def start_lora(encoder, settings):
    """Add LoRA to an encoder with the layers and tensors of peft's folder `settings.init_from`.

    Rank, alpha, scaling and targets (a dict: layer -> [rank, alpha]) replace those of `settings`, and so get into the
    record: a finished run no longer needs the folder. Raises UserError as `read_peft`, and for options that differ.
    """
    if settings.top_layers:
        raise UserError("--top-layers: --init-from decides which layers; leave it out")
    found = None
    if not isinstance(settings.targets, dict):  # else a record is opened, and its tensors are in the run's folder
        found, default = read_peft(settings.init_from, encoder), defaults("lora")
        theirs = {"rank": found.config.get("r", 8), "alpha": float(found.config.get("lora_alpha", 8)),
                  "rslora": found.config.get("use_rslora", False), "targets": found.layers}
        for name, value in theirs.items():
            if getattr(settings, name) not in (default[name], value):
                raise UserError(f"--{name}: --init-from decides this; leave it out")
            setattr(settings, name, value)
    add_lora(encoder, list(settings.targets))
    wrappers = {encoder.get_submodule(name): layout for name, layout in settings.targets.items()}
    swap(encoder, {wrapper: LoRALinear(wrapper.linear, rank, alpha, settings.lora_dropout, settings.rslora)
                   for wrapper, (rank, alpha) in wrappers.items()})
    if found:
        load_lora(encoder, found.tensors)


def class_names(given, about, count):
    """Names of `count` classes: as given, else those that `export` has written, else 0, 1, ..."""
    def fit(names):
        return len(names) == len(set(names)) == count

    if given and not fit(given) or count < 2:
        raise UserError(f"--classes: the head has {count} outputs; it needs as many different names, and at least two")
    try:
        noted = json.loads(about.get("classes", "null"))
    except (ValueError, RecursionError):
        noted = None
    if not isinstance(noted, list) or any(not isinstance(name, str) for name in noted) or not fit(noted):
        noted = [str(number) for number in range(count)]
    return given or noted


def import_run(folder, run, weights=None, classes=None):
    """Turn a LoRA with a classification head that peft trained into a finished run in a new folder. Returns its record.

    weights: the base weights that it was trained on. The record has no history and no metrics. If the pooler of a
    sequence classifier was not trained, it is that of the base weights. UserError if there is no head.
    """
    base, run = find_weights(weights), new_folder(run)
    encoder = load_bert(base)
    found = read_peft(folder, encoder)
    has_dense = "dense.weight" in found.head or found.pooling == "cls" and load_pooler(base) is not None
    if "classifier.weight" not in found.head or not has_dense or found.pooling not in ("cls", "mean"):
        raise UserError(f"{folder} holds no classification head; train one: python train.py lora --init-from {folder}")
    classes = class_names(classes, found.about, found.head["classifier.bias"].numel())
    longest = found.about.get("max_length", "")
    longest = int(longest) if re.fullmatch("[1-9][0-9]{1,4}", longest) else 128
    settings = Namespace(**defaults("lora"))
    settings.weights, settings.pooling, settings.init_from = weights and str(weights), found.pooling, str(folder)
    settings.max_length = min(longest, encoder.config.max_position_embeddings)
    model = build(settings, len(classes), base)
    model.head.load_state_dict(model.head.state_dict() | found.head)
    record = {"command": f"python -m minipeft import {folder} {run}", "settings": checkpoint.recorded(settings),
              "versions": {}, "weights_sha256": hash_weights(base), "data_sha256": [], "classes": classes,
              "sentences": {}, "parameters": count_parameters(model), "history": []}
    record |= {part: dict.fromkeys(keys) for part, keys in checkpoint.PARTS.items()}  # nothing was measured
    checkpoint.write_tensors(run / "model.safetensors", trained(model))
    write_json(run / checkpoint.RECORD, record)
    return record
