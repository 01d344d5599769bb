"""Write finished runs as files of peft, transformers and AdapterHub's adapters.

    python -m minipeft export RUN FOLDER --to peft|transformers|adapters
"""
import json
import shutil
from dataclasses import asdict
from pathlib import Path

from ..adapter import AdapterLinear
from ..bert import hugging_face_name, load_pooler
from ..data import load_tokenizer
from ..lora import LoRALinear, merge_lora
from . import checkpoint
from .download import WEIGHTS_HUB
from .files import UserError, read_json, write_safetensors, write_text
from .settings import defaults

CONFIG, PEFT, ADAPTERS = "adapter_config.json", "adapter_model.safetensors", "adapter.safetensors"  # their file names
HEAD = "head.safetensors"  # ours: a head that has no counterpart in the other library
FORMAT = {"format": "pt"}  # the metadata that the other libraries ask of a safetensors file


def find_modules(encoder, kind):
    """{Hugging Face's name: module} of the modules of a class, or of several."""
    return {hugging_face_name(name + ".weight").removesuffix(".weight"): module
            for name, module in encoder.named_modules() if isinstance(module, kind)}


def layer_tensors(layers):
    """The weights and biases of linear layers: {name: layer} -> {"name.weight": tensor, "name.bias": tensor}"""
    return {f"{name}.{kind}": getattr(layer, kind) for name, layer in layers.items() for kind in ("weight", "bias")}


def save_config(path, config):
    write_text(path, json.dumps(config, indent=2, sort_keys=True) + "\n")


def save_bert(encoder, folder, config=None, prefix="", more=None):
    """Write an encoder as the Hugging Face files `config.json` and `model.safetensors`.

    config: entries to add to config.json. prefix: before every name, `bert.` for a model with a head.
    more: further tensors, by their Hugging Face names. The dropout rates written are those in use, 0 after load_bert.
    Raises UserError if the files cannot be written, ValueError for an encoder that holds LoRA or adapters.
    """
    if find_modules(encoder, (LoRALinear, AdapterLinear)):
        raise ValueError("the encoder is not a plain BERT: call merge_lora or remove_adapters first")
    tensors = {prefix + hugging_face_name(name): tensor for name, tensor in encoder.state_dict().items()}
    content = {"architectures": ["BertModel"], "model_type": "bert", "hidden_act": "gelu"} | asdict(encoder.config)
    save_config(Path(folder) / "config.json", content | (config or {}))
    write_safetensors(Path(folder) / "model.safetensors", tensors | (more or {}), FORMAT)


# -- one function a library -------------------------------------------------------------------------------

def export_peft(model, settings, about, folder):
    """Write LoRA over BertForSequenceClassification with [CLS] pooling, else over BertModel."""
    if settings.technique != "lora":
        raise UserError(f"--to peft: the run trained {settings.technique}, and peft has a format for LoRA only; use "
                        "--to transformers (head, bitfit, full) or --to adapters (adapter)")
    sequence = settings.pooling == "cls"
    prefix = "base_model.model.bert." if sequence else "base_model.model."
    tensors = {}
    if sequence:
        tensors = layer_tensors({"base_model.model.bert.pooler.dense": model.head.dense,
                                 "base_model.model.classifier": model.head.classifier})
    layers = find_modules(model.encoder, LoRALinear)
    for name, layer in layers.items():
        tensors |= {f"{prefix}{name}.lora_A.weight": layer.lora_A, f"{prefix}{name}.lora_B.weight": layer.lora_B}
    save_config(folder / CONFIG, {
        "peft_type": "LORA", "task_type": "SEQ_CLS" if sequence else "FEATURE_EXTRACTION", "inference_mode": True,
        "base_model_name_or_path": settings.weights or WEIGHTS_HUB, "target_modules": list(layers),
        "modules_to_save": ["classifier", "pooler", "score"] if sequence else None, "r": settings.rank,
        "lora_alpha": settings.alpha, "use_rslora": settings.rslora, "lora_dropout": settings.lora_dropout,
        "bias": "none", "fan_in_fan_out": False, "init_lora_weights": True})
    write_safetensors(folder / PEFT, tensors, FORMAT | about)


def special_tokens(folder):
    """The special tokens of a folder's tokenizer.json, by their keys in tokenizer_config.json.

    [CLS] and [SEP], whatever their names are, stand around an empty text. Padding has the id 0, as in data.pad, unless
    the file names another token.
    """
    content, tokenizer = read_json(folder / "tokenizer.json"), load_tokenizer(folder, 8)
    first, *_, last = tokenizer.encode("").tokens
    padding = content.get("padding") or {"pad_token": tokenizer.id_to_token(0)}
    return {"cls_token": first, "sep_token": last, "pad_token": padding["pad_token"],
            "unk_token": content["model"].get("unk_token")}


def export_transformers(model, settings, about, folder, weights):
    """Write the merged model and its tokenizer: BertForSequenceClassification with [CLS] pooling, else BertModel.

    Only the former gets the names of the classes: transformers would put a new, random head on the latter and answer
    with them.
    """
    if settings.technique == "adapter":
        raise UserError("--to transformers: adapters are not linear, so they cannot be merged into the base weights; "
                        "use --to adapters")
    merge_lora(model)
    if settings.pooling == "cls":
        labels = dict(enumerate(json.loads(about["classes"])))
        config = {"architectures": ["BertForSequenceClassification"], "classifier_dropout": settings.head_dropout,
                  "id2label": labels, "label2id": {name: number for number, name in labels.items()}}
        head = {"bert.pooler.dense": model.head.dense, "classifier": model.head.classifier}
        save_bert(model.encoder, folder, config, "bert.", layer_tensors(head))
    else:
        pooler = load_pooler(weights)  # not used; without it transformers makes a random one
        save_bert(model.encoder, folder, more=layer_tensors({"pooler.dense": pooler}) if pooler else None)
    shutil.copyfile(weights / "tokenizer.json", folder / "tokenizer.json")
    save_config(folder / "tokenizer_config.json", {
        **special_tokens(weights), "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": settings.max_length})


def export_adapters(model, settings, about, folder):
    """Write adapters over BertModel for AdapterHub's load_adapter(folder, use_safetensors=True)."""
    default = defaults("adapter")["targets"]
    if settings.technique != "adapter" or settings.norms or set(settings.targets) != set(default):
        raise UserError("--to adapters: the library holds adapters after both sub-layers of a block, and no trained "
                        "norms; train with train.py adapter --norms, and the default --targets")
    layers, config = {}, model.encoder.config
    for name, layer in find_modules(model.encoder, AdapterLinear).items():
        base = name.removesuffix("dense") + "adapters.minipeft"
        layers |= {f"{base}.adapter_down.0": layer.adapter.down, f"{base}.adapter_up": layer.adapter.up}
    below = config.num_hidden_layers - (settings.top_layers or config.num_hidden_layers)
    save_config(folder / CONFIG, {  # without "version", "gelu" is read as the tanh approximation
        "name": "minipeft", "version": "adapters.1.3.0", "model_type": "bert", "model_class": "BertModel",
        "model_name": settings.weights or WEIGHTS_HUB, "hidden_size": config.hidden_size, "config": {
            "mh_adapter": True, "output_adapter": True, "non_linearity": "gelu", "original_ln_after": True,
            "original_ln_before": False, "residual_before_ln": True, "adapter_residual_before_ln": False,
            "ln_before": False, "ln_after": False, "is_parallel": False, "scaling": 1.0, "init_weights": "houlsby",
            "leave_out": list(range(below)),
            "reduction_factor": config.hidden_size / (settings.bottleneck + 0.5)}})  # it takes hidden_size // this
    write_safetensors(folder / ADAPTERS, layer_tensors(layers), FORMAT)


# -- a head without a counterpart -------------------------------------------------------------------------

README = """\
A text classifier for the classes {classes}. {library} opens the encoder in this folder, but has no place for the
classification head, which is in head.safetensors. Run these lines in this folder:

```python
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer
tokenizer, encoder = AutoTokenizer.from_pretrained({base!r}), AutoModel.from_pretrained({base!r})
{more}tokens = tokenizer(["a text"], padding=True, truncation=True, max_length={length}, return_tensors="pt")
hidden, mask, head = encoder(**tokens).last_hidden_state, tokens["attention_mask"][..., None], load_file("{file}")
features = F.linear({pooled}, head["dense.weight"], head["dense.bias"]).tanh()
logits = F.linear(features, head["classifier.weight"], head["classifier.bias"])  # logits.softmax(1): probabilities
```
"""
POOLED = {"mean": "(hidden * mask).sum(1) / mask.sum(1)", "cls": "hidden[:, 0]"}
MORE = {  # lines that put what was trained into the base model
    "transformers": "",
    "peft": 'from peft import PeftModel\nencoder = PeftModel.from_pretrained(encoder, ".")\n',
    "adapters": "import adapters\nadapters.init(encoder)\n"
                'encoder.load_adapter(".", use_safetensors=True, set_active=True)\n'}


def save_head(model, settings, about, folder, library):
    """Write the head, and the lines that use it with the other library's encoder."""
    layers = {"dense": model.head.dense, "classifier": model.head.classifier}
    write_safetensors(folder / HEAD, layer_tensors(layers), FORMAT | about)
    write_text(folder / "README.md", README.format(
        classes=about["classes"], library=library, more=MORE[library], length=settings.max_length, file=HEAD,
        pooled=POOLED[settings.pooling], base="." if library == "transformers" else settings.weights or WEIGHTS_HUB))


def export(run, folder, to, weights=None):
    """Write a finished run to a new folder in the format `to`: "peft", "transformers" or "adapters".

    A head without a counterpart there (mean pooling; AdapterHub) goes to head.safetensors, with a README.md that says
    how to use it. Returns the names of the files. Raises UserError if the format cannot hold the run, or if the folder
    exists and holds anything.
    """
    model, record, weights = checkpoint.open_run(run, weights)
    folder, settings = Path(folder), checkpoint.settings_of(record)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists and is not an empty folder: choose another")
    about = {"classes": json.dumps(record["classes"]), "pooling": settings.pooling,
             "max_length": str(settings.max_length)}
    if to == "peft":
        export_peft(model, settings, about, folder)
    elif to == "transformers":
        export_transformers(model, settings, about, folder, weights)
    else:
        export_adapters(model, settings, about, folder)
    if to == "adapters" or settings.pooling == "mean":
        save_head(model, settings, about, folder, to)
    return sorted(path.name for path in folder.iterdir())
