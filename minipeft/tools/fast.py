"""Optional speed-ups: faster twins of the plain modules, swapped into a built model.

A twin is a subclass that computes the same as its plain class, up to rounding, from the same parameters. Swapping it in
changes a module's class and nothing else: names and state_dict stay the same. A twin is here only if it saves at least
5% of a training step on some processor. `python benchmarks/speed.py` measures the gain of each and writes it to
results/speed-<processor>.json.
"""
import math
import platform
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from ..bert import Attention
from ..lora import LoRALinear
from ..model import Compute
from .files import UserError


# -- frozen weights in bf16 -------------------------------------------------------------------------------

def cast(linear, dtype):
    """The weight and bias of a frozen linear layer in `dtype`, cast once and kept until one of them changes."""
    given = [tensor for tensor in (linear.weight, linear.bias) if tensor is not None]
    state = dtype, [(id(tensor), tensor._version) for tensor in given]
    if linear.__dict__.get("cast_from") != state:
        linear.__dict__["cast_to"] = [None if tensor is None else tensor.detach().to(dtype)
                                      for tensor in (linear.weight, linear.bias)]
        linear.__dict__["cast_from"] = state
    return linear.__dict__["cast_to"]


class CastOnceLinear(nn.Linear):
    """A frozen nn.Linear under autocast that keeps its weight in bf16, 2 more bytes a weight.

    Autocast casts a frozen weight anew in every forward pass. The cast values are the same, and so is every bit.
    The gain is not settled: benchmarks/speed.py times an epoch of adapters with and without it, and has no published
    result yet. (With LoRA on every layer, FastLoRALinear does the same.)
    """
    label = "frozen weights cast once"

    @staticmethod
    def fits(module, precision):
        frozen = not any(parameter.requires_grad for parameter in module.parameters())
        return precision == "bf16" and frozen and not module._forward_hooks and not module._forward_pre_hooks

    def forward(self, x):
        """(..., in_features) -> (..., out_features)"""
        if not torch.is_autocast_enabled("cpu"):
            return super().forward(x)
        return F.linear(x, *cast(self, torch.get_autocast_dtype("cpu")))


# -- LoRA -------------------------------------------------------------------------------------------------

class LowRankProduct(torch.autograd.Function):
    """y = x W^T + b + (x A^T) B^T for frozen W and b, with its gradient written out:

        dx = dy W + (dy B) A,    dA = (dy B)^T x,    dB = dy^T (x A^T)

    Autograd computes each term of a sum as a large tensor and then adds them. Here the second product of a sum is
    added to the first in place. x: (n, in), W: (out, in), A: (rank, in), B: (out, rank).
    """

    @staticmethod
    def forward(ctx, x, W, b, A, B):
        low_rank = x @ A.T  # (n, rank)
        ctx.save_for_backward(x, W, A, B, low_rank)
        return F.linear(x, W, b).addmm_(low_rank, B.T)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, W, A, B, low_rank = ctx.saved_tensors
        d_low_rank = dy @ B
        dx = (dy @ W).addmm_(d_low_rank, A) if ctx.needs_input_grad[0] else None
        return dx, None, None, d_low_rank.T @ x, (low_rank.T @ dy).T


class FastLoRALinear(LoRALinear):
    """LoRALinear without dropout on a frozen, plain nn.Linear.

    Gain: 1.11 times the speed of a LoRA epoch and 13% less peak memory in fp32 with AVX2, 1.05 times and 9% in bf16
    with AVX-512 (results/speed-amd-epyc-avx2.json and -avx512.json, ladder). The simpler torch.addmm with autograd's
    own gradient saves no time on AMD EPYC.
    """
    label = "LoRA's gradient by hand"

    @staticmethod
    def fits(module, precision):
        linear = module.linear  # the twin reads its weight and does not call it
        plain = type(linear) in (nn.Linear, CastOnceLinear) and not (linear._forward_hooks or linear._forward_pre_hooks)
        frozen = not any(parameter.requires_grad for parameter in linear.parameters())
        return plain and frozen and module.dropout.p == 0

    def forward(self, input):
        """(..., in_features) -> (..., out_features)"""
        device = input.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else input.dtype
        y = LowRankProduct.apply(input.to(dtype).flatten(0, -2), *cast(self.linear, dtype),
                                 self.lora_A.to(dtype), (self.scaling * self.lora_B).to(dtype))
        return y.unflatten(0, input.shape[:-1])


# -- attention in bf16 on a CPU ---------------------------------------------------------------------------

SHORT = 128  # tokens up to which the explicit softmax is faster than the fused function in fp32


class FastAttention(Attention):
    """Attention in bf16 without torch's fused function, whose backward pass is slow in bf16 on a CPU.

    Eight LoRA steps of the usual stack in bf16 take 3.4 s with it and 2.4 s without (trial in
    results/speed-amd-epyc-avx512.json). So long sentences use the fused function in fp32, and short ones the explicit
    softmax. Gain: 1.37 times the speed of a LoRA epoch (ladder in the same file).
    """
    label = "attention for bf16"

    @staticmethod
    def fits(module, precision):
        return precision == "bf16"

    def attend(self, query, key, value, mask):
        """(B, heads, T, d) three times, mask (B, 1, 1, T) or None -> (B, heads, T, d)"""
        if query.shape[2] > SHORT:
            with torch.autocast("cpu", enabled=False):
                return super().attend(query.float(), key.float(), value.float(), mask).to(query.dtype)
        scores = (query / math.sqrt(query.shape[-1])) @ key.transpose(-1, -2)  # (B, heads, T, T)
        if mask is not None:
            scores = scores.masked_fill(~mask, -math.inf)
        weights = F.dropout(scores.softmax(-1, dtype=torch.float32), self.attention_dropout, self.training)
        return weights.to(value.dtype) @ value


# -- what to use here -------------------------------------------------------------------------------------

TWINS = (FastLoRALinear, FastAttention, CastOnceLinear)


def speed_up(model, compute, twins=TWINS):
    """Swap `twins` into a built model, in place, wherever their condition holds. Return the labels of those used.

    Call it after the technique and the head. Only for a CPU: on a GPU they were not measured.
    """
    used = []
    for twin in twins if compute.device == "cpu" else ():
        plain = [module for module in model.modules() if type(module) is twin.__base__]
        fitting = [module for module in plain if twin.fits(module, compute.precision)]
        for module in fitting:
            module.__class__ = twin
        if fitting:
            used.append(twin.label)
    return used


def restore(model):
    """Undo `speed_up`: plain modules again, which merge_lora accepts."""
    for module in model.modules():
        module.__dict__.pop("cast_from", None)  # the id of a weight that is replaced may be used again
        if type(module) in TWINS:
            module.__class__ = type(module).__base__


def pad_multiple(precision, device):
    """The multiple of tokens that batches are padded to (data.pad).

    In bf16 on a CPU, oneDNN compiles kernels for every new length and keeps them: a multiple of 8 gives 1.09 times the
    speed of a LoRA epoch and 5% less peak memory in 20 steps (results/speed-amd-epyc-avx512.json, ladder). In fp32 it
    only adds padding.
    """
    return 8 if device == "cpu" and precision == "bf16" else 1


def product_rate(tokens, hidden, intermediate, dtype, seconds=0.015):
    """GFLOP/s of (tokens, hidden) @ (hidden, intermediate) on a CPU: the best of the calls that fit into `seconds`."""
    x, weight = torch.ones(tokens, hidden, dtype=dtype), torch.ones(intermediate, hidden, dtype=dtype)
    F.linear(x, weight)  # the first call compiles a kernel
    best, spent = math.inf, 0.0
    while spent < seconds:
        began = time.perf_counter()
        F.linear(x, weight)
        took = time.perf_counter() - began
        best, spent = min(best, took), spent + took
    return 2 * tokens * hidden * intermediate / best / 1e9


def fastest_precision(device, hidden, intermediate):
    """Choose "fp32" or "bf16" for a model of this shape, and say why: ("fp32", "105 GFLOP/s; bf16 12").

    On a CPU it measures a feed-forward layer's matrix product in both, in under 100 ms. A capability flag does
    not show which is faster: with AVX-512 BF16, bf16 is twice as fast as fp32 on AMD Zen 4 and half as fast on some
    Intel processors.
    """
    if device == "cuda":
        supported = torch.cuda.is_bf16_supported(including_emulation=False)
        return ("bf16", "supported by the GPU") if supported else ("fp32", "the GPU does not support bf16")
    if device != "cpu":
        return "fp32", f"bf16 is not tested on {device}"
    enough = 256 * 384 * 1536 // (hidden * intermediate)  # about the same work for every shape
    for tokens in (16, min(max(enough, 16), 1024)):
        fp32 = product_rate(tokens, hidden, intermediate, torch.float32)
        bf16 = product_rate(tokens, hidden, intermediate, torch.bfloat16)
        if bf16 < fp32 / 2:  # emulated bf16 can be 10 times slower: do not try it on more tokens
            break
    if bf16 > fp32:
        return "bf16", f"{bf16:.0f} GFLOP/s; fp32 {fp32:.0f}"
    return "fp32", f"{fp32:.0f} GFLOP/s; bf16 {bf16:.0f}"


def choose_compute(settings, config):
    """Resolve --device and --precision "auto": (Compute, a line that says what was chosen and why)."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    device = next(name for name in available if available[name]) if settings.device == "auto" else settings.device
    if not available[device]:
        there = " and ".join(name for name in available if available[name])
        raise UserError(f"--device {device}: not available here; available: {there}")
    precision, reason = settings.precision, "set by --precision"
    if precision == "auto":
        precision, reason = fastest_precision(device, config.hidden_size, config.intermediate_size)
    return Compute(device, precision, pad_multiple(precision, device)), f"{device}, {precision} ({reason})"


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
