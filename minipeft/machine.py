"""The machine that a run uses: device, precision, processor, memory, and progress bars."""
import platform
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from . import data, fast
from .files import UserError


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


def choose_compute(settings, config):
    """Resolve --device and --precision "auto": (Compute, a line that says what was chosen and why)."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    device = next(name for name in available if available[name]) if settings.device == "auto" else settings.device
    if not available[device]:
        there = " and ".join(name for name in available if available[name])
        raise UserError(f"--device {device}: not available here; available: {there}")
    precision, reason = settings.precision, "set by --precision"
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
    """The most memory that this process has held, in MB (GPU memory if it trains on CUDA); None if unknown."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 1e6
    status = Path("/proc/self/status")
    if status.is_file() and "VmHWM:" in (text := status.read_text()):  # ru_maxrss includes the parent's peak
        return int(text.split("VmHWM:")[1].split()[0]) * 1024 / 1e6
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
    if not sys.stderr.isatty():
        options |= {"file": Lines(), "mininterval": 30, "maxinterval": 60, "delay": 30}
    return tqdm(**options, leave=False, smoothing=0.05)
