"""Build a classifier from settings (encoder + technique + head), choose device and precision, predict."""
import platform
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from . import data, fast
from .adapter import add_adapters
from .bert import load_bert
from .files import UserError
from .head import Classifier, freeze, train_biases
from .lora import add_lora


def apply_lora(encoder, settings):
    if settings.init_from:
        from .interop import start_lora  # it imports this file
        return start_lora(encoder, settings)
    return add_lora(encoder, settings.targets, settings.rank, settings.alpha, settings.lora_dropout, settings.rslora)


# Each technique changes the encoder, or the blocks of it that `--top-layers` names, in place. Before that,
# everything is frozen; the head is made afterwards.
APPLY = {
    "head": lambda encoder, settings: None,
    "adapter": lambda encoder, settings: add_adapters(
        encoder, settings.targets, settings.bottleneck, settings.init_std, settings.norms),
    "lora": apply_lora,
    "bitfit": lambda encoder, settings: train_biases(encoder),
    "full": lambda encoder, settings: encoder.requires_grad_(True),
}


def build(settings, classes, weights):
    """Build the untrained classifier of `settings` (a Namespace of settings.py) on a folder of weights, on the CPU.

    The seed is set again before the head is made, so every technique starts with the same head.
    Raises UserError for weights, targets or --top-layers that do not fit.
    """
    encoder = load_bert(weights, getattr(settings, "dropout", 0.0))
    layers = len(encoder.layers)
    top = getattr(settings, "top_layers", None) or layers
    if top > layers:
        raise UserError(f"--top-layers {top}: the encoder has only {layers} layers")
    freeze(encoder)
    torch.manual_seed(settings.seed)
    try:
        APPLY[settings.technique](encoder if top == layers else encoder.layers[layers - top:], settings)
    except ValueError as error:  # how the technique files, which do not import UserError, report a wrong target
        raise UserError(f"{settings.technique}: {error}") from error
    torch.manual_seed(settings.seed)
    model = Classifier(encoder, classes, settings.pooling, settings.head_dropout)
    encoder.pooler = None  # the head has its own copy
    return model


def trained(model):
    """The parameters that training changes, by name: what has to be saved."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def count_parameters(model):
    """Count the parameters that the technique and the head train, and all parameters."""
    head = sum(parameter.numel() for parameter in model.head.parameters())
    trainable = sum(parameter.numel() for parameter in trained(model).values())
    total = sum(parameter.numel() for parameter in model.parameters())
    return {"technique": trainable - head, "head": head, "trainable": trainable, "total": total}


def describe(model):
    """One line for each kind of trained tensor: its name, shape, and count as a multiplication."""
    groups = {}
    for name, parameter in trained(model).items():
        kind = ".".join("*" if part.isdigit() else part for part in name.split("."))
        groups.setdefault((kind, tuple(parameter.shape)), []).append(parameter)
    width = 2 + max(len(kind) for kind, _ in groups)
    lines = [f"{'trained tensor (* = each layer)':<{width}}{'shape':<14}count"]
    for (kind, shape), group in groups.items():
        size, number = group[0].numel(), len(group)
        total = f"{size:,}" if number == 1 else f"{number} x {size:,} = {number * size:,}"
        lines.append(f"{kind:<{width}}{' x '.join(map(str, shape)):<14}{total}")
    return lines


# -- computing --------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Compute:
    """Where and how a model computes. In bf16 matrix products take bf16; sums, norms and softmax stay in fp32."""
    device: str = "cpu"
    precision: str = "fp32"
    multiple: int = 1  # batches are padded to a multiple of so many tokens

    def autocast(self):
        return torch.autocast(self.device, torch.bfloat16, enabled=self.precision == "bf16")

    def pad(self, sentences):
        return data.pad(sentences, self.device, self.multiple)


def choose_compute(settings, config):
    """Resolve --device and --precision "auto": (Compute, a line that says what was chosen and why)."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    device = next(name for name in available if available[name]) if settings.device == "auto" else settings.device
    if not available[device]:
        there = " and ".join(name for name in available if available[name])
        raise UserError(f"--device {device}: not available here; available: {there}")
    precision, reason = settings.precision, "as asked for"
    if precision == "auto":
        precision, reason = fast.fastest_precision(device, config.hidden_size, config.intermediate_size)
    return Compute(device, precision, fast.pad_multiple(precision, device)), f"{device}, {precision} ({reason})"


def processor(device):
    """The name of the processor that trains, with the vector instructions torch uses on a CPU."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").is_file():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), name)
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}"


def peak_memory(device):
    """The most memory this process has held, in MB (of the GPU, where it trains there); None if unknown."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 1e6
    if Path("/proc/self/status").is_file():  # of this process alone: ru_maxrss includes the parent's peak
        return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024 / 1e6
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6


class Lines:
    """A file for tqdm that prints each state as a line of its own."""

    def write(self, text):
        if text := text.replace("\x1b[A", "").strip("\r\n "):  # without the codes that move the cursor
            print(text, file=sys.stderr, flush=True)

    def flush(self):
        pass


def progress_bar(**options):
    """A tqdm bar in a terminal; elsewhere (nohup, CI, a notebook) a plain line every 30 seconds."""
    if sys.stderr.isatty():
        return tqdm(**options, leave=False, smoothing=0.05)
    return tqdm(**options, leave=False, smoothing=0.05, file=Lines(), mininterval=30, maxinterval=60, delay=30)


def predict(forward, sentences, compute=Compute(), label="predicting"):
    """`forward(input_ids, attention_mask)` of each sentence, without gradients: float32 array (n, width), in order.

    sentences: arrays of token ids. Sentences of similar length share a batch. The caller sets eval mode.
    """
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
