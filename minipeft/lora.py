"""LoRA (Hu et al. 2021, arXiv 2106.09685), on any model made of nn.Linear.

The update of a weight matrix is learnt as a product of two thin matrices, which can be merged into the weight
afterwards. This file needs torch only: copy it as it is.
"""
import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable


class LowRankLinear(torch.autograd.Function):
    """y = x W^T + b + (x A^T) B^T for frozen W and b, with the gradient worked out by hand:

        dx = dy W + (dy B) A,    dA = (dy B)^T x,    dB = dy^T (x A^T)

    Autograd arrives at the same, but makes a large tensor of each term and then adds them up. Here the
    second matrix product of a sum adds to the first where it lies. x is (n, in), A (rank, in), B (out, rank).
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


class LoRALinear(nn.Module):
    """A frozen linear layer plus a trainable update of low rank (section 4.1, equation 3).

        h = W0 x + b0 + scaling B A x,    scaling = alpha / rank

    A is (rank, in_features), B (out_features, rank): rank x (in + out) new parameters. A starts
    Kaiming-uniform, as in the authors' code (the paper says Gaussian), and B at zero: the first output is
    that of the base layer, exactly. rslora=True scales by alpha / sqrt(rank) instead (Kalajdzievski 2023,
    arXiv 2312.03732). Dropout applies to what LoRA sees, not to what the base layer sees.
    """

    def __init__(self, linear, rank=8, alpha=16, dropout=0.0, rslora=False):
        super().__init__()
        if rank < 1:
            raise ValueError(f"rank is at least 1, not {rank}")
        self.linear = linear
        like = {"device": linear.weight.device, "dtype": linear.weight.dtype}
        self.lora_A = nn.Parameter(torch.empty(rank, linear.in_features, **like))
        self.lora_B = nn.Parameter(torch.zeros(linear.out_features, rank, **like))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))  # nn.Linear's own start: within 1 / sqrt(in_features)
        self.scaling = alpha / (math.sqrt(rank) if rslora else rank)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        """(..., in_features) -> (..., out_features)"""
        dropout = self.training and self.dropout.p > 0
        if dropout or any(parameter.requires_grad for parameter in self.linear.parameters()):
            # The equation as it stands. Else the same, faster: LowRankLinear has but one x, and no gradient for W0.
            low_rank = F.linear(self.dropout(x), self.lora_A) * self.scaling  # (..., rank)
            return self.linear(x) + F.linear(low_rank, self.lora_B)
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        y = LowRankLinear.apply(x.to(dtype).reshape(-1, x.shape[-1]), self.linear.weight.to(dtype), self.bias,
                                self.lora_A.to(dtype), (self.scaling * self.lora_B).to(dtype))
        return y.view(*x.shape[:-1], y.shape[-1])

    @property
    def weight(self):
        """W0 + scaling B A, (out_features, in_features): for merging, and for code such as
        nn.MultiheadAttention that reads the weight of a child instead of calling it."""
        update = self.scaling * self.lora_B @ self.lora_A
        return self.linear.weight + update.to(self.linear.weight.dtype)

    @property
    def bias(self):
        return self.linear.bias


def matching(model, targets, kind):
    """The names in `model` that equal one of `targets` or end in "." + it, each of type `kind`.

    Raises ValueError, which lists what could have matched, for a target without a match or of another type.
    """
    modules = dict(model.named_modules())
    found = {}
    for target in targets:
        names = [name for name in modules if name == target or name.endswith("." + target)]
        wrong = [f"{name} is a {type(modules[name]).__name__}" for name in names if not isinstance(modules[name], kind)]
        if wrong or not names:
            could = sorted({name.rpartition(".")[2] for name in modules if isinstance(modules[name], kind)})
            raise ValueError(f"target {target!r} " + ("matches nothing" if not names else "fits no " + kind.__name__)
                             + f" ({'; '.join(wrong[:3])})" * bool(wrong)
                             + f"; the {kind.__name__} modules here end in: {', '.join(could)}")
        found.update(dict.fromkeys(names))
    return list(found)


def swap(model, name, module):
    """Put `module` in the place of the one called `name`."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def add_lora(model, targets=("query", "key", "value", "attention.output", "intermediate", "feed_forward.output"),
             rank=8, alpha=16, dropout=0.0, rslora=False):
    """Freeze `model` and put a LoRALinear in the place of every linear layer in `targets`.

    The default is every linear layer of the encoder in bert.py; the paper's choice is ("query", "value").
    Returns the names of what was swapped. Raises ValueError, and changes nothing, if a target matches nothing
    or a module that is not an nn.Linear, or if the model has LoRA already.
    """
    already = [name for name, module in model.named_modules() if isinstance(module, LoRALinear)]
    if already:
        raise ValueError(f"the model has LoRA already ({', '.join(already[:3])}, ...): "
                         "call merge_lora or remove_lora first")
    names = matching(model, targets, nn.Linear)
    wrapped = {name: LoRALinear(model.get_submodule(name), rank, alpha, dropout, rslora) for name in names}
    model.requires_grad_(False)  # what is not yet in the model stays trainable
    for name in names:
        swap(model, name, wrapped[name])
    return names


def remove_lora(model):
    """Give back the base model, bit for bit, and still frozen. Returns the names of what was swapped back."""
    names = [name for name, module in model.named_modules() if isinstance(module, LoRALinear)]
    for name in names:
        swap(model, name, model.get_submodule(name).linear)
    return names


@torch.no_grad()
def merge_lora(model):
    """Add every update to its weight (W = W0 + scaling B A) and give back plain linear layers.

    The output stays what it was, up to rounding, and costs no more than the base model's. Without LoRA in the
    model, as after a first call, it does nothing. Returns the names of what was merged.
    """
    names = [name for name, module in model.named_modules() if isinstance(module, LoRALinear)]
    for name in names:
        lora = model.get_submodule(name)
        lora.linear.weight.copy_(lora.weight)
        swap(model, name, lora.linear)
    return names
