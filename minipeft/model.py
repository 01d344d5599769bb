"""Build a classifier from settings (encoder + technique + head), describe what it trains, predict."""
import re
from dataclasses import dataclass

import numpy as np
import torch

from . import data
from .adapter import add_adapters
from .bert import load_bert, load_pooler
from .head import Classifier, freeze, train_biases
from .lora import add_lora
from .tools.files import UserError, progress_bar

# Each technique changes a frozen encoder, or its upper blocks (--top-layers), in place. Only what it adds, or makes
# trainable again, is trained, and the head.
APPLY = {
    "head": lambda encoder, settings: None,
    "adapter": lambda encoder, settings: add_adapters(
        encoder, settings.targets, settings.bottleneck, settings.init_std, settings.norms),
    "lora": lambda encoder, settings: add_lora(
        encoder, settings.targets, settings.rank, settings.alpha, settings.lora_dropout, settings.rslora),
    "bitfit": lambda encoder, settings: train_biases(encoder),
    "full": lambda encoder, settings: encoder.requires_grad_(True),
}


def build(settings, classes, weights):
    """Build the untrained classifier of `settings` (a Namespace of settings.py) on a folder of weights, on the CPU.

    Raises UserError for weights, targets or --top-layers that do not fit.
    """
    encoder = load_bert(weights, getattr(settings, "dropout", 0.0))  # head tuning has neither dropout nor top_layers
    layers = len(encoder.layers)
    top = getattr(settings, "top_layers", None) or layers
    if top > layers:
        raise UserError(f"--top-layers {top}: the encoder has only {layers} layers")
    freeze(encoder)
    torch.manual_seed(settings.seed)
    try:
        APPLY[settings.technique](encoder if top == layers else encoder.layers[-top:], settings)
    except ValueError as error:  # how the technique files, which do not import UserError, report a wrong target
        raise UserError(f"{settings.technique}: {error}") from error
    pooler = load_pooler(weights) if settings.pooling == "cls" else None
    torch.manual_seed(settings.seed)  # again, so that every technique starts with the same head
    return Classifier(encoder, classes, settings.pooling, settings.head_dropout, pooler=pooler)


def trained(model):
    """Return {name: parameter} of what training changes: this has to be saved."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def count_parameters(model):
    """Count the parameters that the technique and the head train, and all parameters."""
    head = sum(parameter.numel() for parameter in model.head.parameters())
    trainable = sum(parameter.numel() for parameter in trained(model).values())
    total = sum(parameter.numel() for parameter in model.parameters())
    return {"technique": trainable - head, "head": head, "trainable": trainable, "total": total}


def describe(model):
    """Return a line for each kind of trained tensor: its name, shape, and number of parameters."""
    groups = {}
    for name, parameter in trained(model).items():
        kind, shape = re.sub(r"\.\d+\.", ".*.", name), " x ".join(map(str, parameter.shape))
        groups.setdefault((kind, shape), []).append(parameter.numel())
    rows = [("trained tensor (* = each layer)", "shape", "count")]
    for (kind, shape), sizes in groups.items():
        total = f"{sizes[0]:,}" if len(sizes) == 1 else f"{len(sizes)} x {sizes[0]:,} = {sum(sizes):,}"
        rows.append((kind, shape, total))
    width = max(len(kind) for kind, _, _ in rows)
    return [f"{kind:<{width}}  {shape:<12}  {total}" for kind, shape, total in rows]


@dataclass(frozen=True)
class Compute:
    """Where and how a model computes.

    In bf16, linear layers and the sums inside LoRALinear and Adapter are bf16: an update smaller than bf16's rounding
    is lost there. Norms, softmax, residual sums and the loss are fp32.
    """
    device: str = "cpu"
    precision: str = "fp32"
    multiple: int = 1  # batches are padded to a length that is a multiple of this

    def autocast(self):
        return torch.autocast(self.device, torch.bfloat16, enabled=self.precision == "bf16")

    def pad(self, sentences):
        return data.pad(sentences, self.device, self.multiple)


def predict(forward, sentences, compute=Compute(), label="predicting"):
    """Return `forward(input_ids, attention_mask)` of each sentence, without gradients: a float32 array (n, width), in
    the order of `sentences`, arrays of token ids; None for no sentences. The caller sets eval mode."""
    output = None
    with progress_bar(total=len(sentences), unit=" sentences", desc=label) as bar:
        for batch in data.batches_of_tokens(np.array([len(ids) for ids in sentences])):
            with torch.no_grad(), compute.autocast():
                result = forward(*compute.pad([sentences[index] for index in batch])).float().cpu().numpy()
            if output is None:
                output = np.empty((len(sentences), result.shape[1]), np.float32)
            output[batch] = result
            bar.update(len(batch))
    return output
