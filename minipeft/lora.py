"""LoRA (Hu et al. 2021, arXiv 2106.09685) for any model made of nn.Linear, or of transformers' Conv1D (GPT-2).

The update of a weight matrix is learnt as a product of two thin matrices, which can be merged into the weight after
training. This file needs only torch: copy it as it is, call add_lora, train the parameters that require a gradient.
"""
import math
import warnings

import torch
import torch.nn.functional as F
from torch import nn


class LoRALinear(nn.Module):
    """A frozen linear layer plus a trainable update of low rank (section 4.1, equation 3).

        h = W0 x + b0 + scaling B A x,    scaling = alpha / rank

    A is (rank, in_features), B (out_features, rank): rank x (in + out) new parameters, in fp32. A starts
    Kaiming-uniform, as in the authors' code (the paper says Gaussian), B at zero, so the first output is that of the
    base layer. rslora: scaling = alpha / sqrt(rank) (Kalajdzievski 2023, arXiv 2312.03732). Dropout acts on the input
    of A only. Raises ValueError for a rank below 1.
    """

    def __init__(self, linear, rank=8, alpha=16, dropout=0.0, rslora=False):
        super().__init__()
        if rank < 1:
            raise ValueError(f"rank must be at least 1, not {rank}")
        self.linear = linear
        self.transposed = type(linear).__name__ == "Conv1D"  # transformers' layer: its weight is (in, out)
        inputs, outputs = linear.weight.shape if self.transposed else (linear.in_features, linear.out_features)
        self.lora_A = nn.Parameter(linear.weight.new_empty(rank, inputs, dtype=torch.float32))
        self.lora_B = nn.Parameter(linear.weight.new_zeros(outputs, rank, dtype=torch.float32))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))  # as nn.Linear's weight: within 1 / sqrt(in_features)
        self.scaling = alpha / (math.sqrt(rank) if rslora else rank)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        """(..., in_features) -> (..., out_features), in the dtype of the base layer's output"""
        h = self.linear(x)
        low_rank = F.linear(self.dropout(x.to(self.lora_A.dtype)), self.lora_A)  # (..., rank)
        return h + F.linear(self.scaling * low_rank, self.lora_B).to(h.dtype)

    @property
    def weight(self):
        """The merged weight W0 + scaling B A, computed in fp32, rounded once. merge_lora stores it;
        nn.TransformerEncoderLayer's fused kernel for inference reads it instead of calling forward."""
        update = self.scaling * self.lora_B.float() @ self.lora_A.float()
        return (self.linear.weight + (update.T if self.transposed else update)).to(self.linear.weight.dtype)

    @property
    def bias(self):
        return self.linear.bias


# -- finding and swapping layers: repeated in adapter.py, so that each file can be copied alone ------------

def named(model, target):
    """Return {name: module}: the modules called `target` or ending in "." + `target`; shared ones under each name."""
    modules = model.named_modules(remove_duplicate=False)
    return {name: module for name, module in modules if f".{name}".endswith(f".{target}")}


def freeze(model, train=()):
    """Freeze `model` in place, except the modules that `train` names by dotted suffix.

    Raise ValueError, and change nothing, for a name without a module. Warn if a module called `classifier` or `score`
    is frozen: a new head would stay at its random initialisation.
    """
    kept = []
    for name in [train] if isinstance(train, str) else train:
        found = named(model, name)
        if not found:
            raise ValueError(f"train={name!r} matches no module; the model consists of: "
                             f"{', '.join(dict(model.named_children()))}")
        kept += found.values()
    model.requires_grad_(False)
    for module in kept:
        module.requires_grad_(True)
    for name, head in (named(model, "classifier") | named(model, "score")).items():
        if not all(parameter.requires_grad for parameter in head.parameters()):
            warnings.warn(f"{name} is frozen; if it is a new head, pass train=({name!r},)", stacklevel=3)


def is_linear(module):
    """Recognise nn.Linear, and transformers' Conv1D (GPT-2): a linear layer whose weight is (in, out)."""
    return isinstance(module, nn.Linear) or (type(module).__name__ == "Conv1D" and hasattr(module, "nf"))


def matching(model, targets, fits):
    """Return the modules that `targets` name by dotted suffix, each once. Raise ValueError, with the names that could
    match, if a target matches nothing, or matches a parameter or a module that cannot be wrapped (`fits` is false)."""
    modules = dict(model.named_modules(remove_duplicate=False))

    def problem(name):
        if not fits(modules[name]):
            return f"{name} is a {type(modules[name]).__name__}"
        if isinstance(modules[name.rpartition(".")[0]], nn.MultiheadAttention):
            return f"{name} is never called: nn.MultiheadAttention reads its weight instead"

    found = []
    for target in [targets] if isinstance(targets, str) else targets:
        matches = named(model, target)
        problems = [f"{name} is a parameter, not a module (nn.MultiheadAttention packs q, k and v in one)"
                    for name, _ in model.named_parameters() if f".{name}".endswith(f".{target}")]
        problems += filter(None, map(problem, matches))
        if problems or not matches:
            endings = sorted({name.rpartition(".")[2] for name in modules if not problem(name)})
            raise ValueError(f"target {target!r}: {'; '.join(problems[:3]) or 'matches nothing'}. "
                             f"Modules that fit end in: {', '.join(endings)}")
        found += matches.values()
    return list(dict.fromkeys(found))


def swap(model, replacements):
    """Replace modules, given as {old: new}, under every name that they have in `model`. Return the names."""
    modules = model.named_modules(remove_duplicate=False)
    old = {name: module for name, module in modules if module in replacements}
    for name, module in old.items():
        model.set_submodule(name, replacements[module])
    return list(old)


def load(parameters, state):
    """Copy `state` into `parameters`, both {name: tensor}. Raise ValueError, and copy nothing, if a name or shape
    differs."""
    ours = {f"{name} {tuple(parameter.shape)}" for name, parameter in parameters.items()}
    given = {f"{name} {tuple(tensor.shape)}" for name, tensor in state.items()}
    if ours != given:
        raise ValueError(f"missing: {', '.join(sorted(ours - given))}; unexpected: {', '.join(sorted(given - ours))}")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(state[name])


# -- LoRA in a model --------------------------------------------------------------------------------------

def add_lora(model, targets=("query", "key", "value", "attention.output", "intermediate", "feed_forward.output"),
             rank=8, alpha=16, dropout=0.0, rslora=False, train=()):
    """Freeze `model`, except the modules that `train` names, and wrap every linear layer in `targets` in a LoRALinear.

    The default is every linear layer of the blocks in bert.py; the paper's choice is ("query", "value"). Names match
    by dotted suffix. Return the names of the wrapped layers; a layer with several names gets one wrapper. Raise
    ValueError, and change nothing, if a name does not match, no layer is named, or the model has LoRA already.
    """
    if any(isinstance(module, LoRALinear) for module in model.modules()):
        raise ValueError("the model has LoRA already: call merge_lora or remove_lora first")
    wrappers = {layer: LoRALinear(layer, rank, alpha, dropout, rslora) for layer in matching(model, targets, is_linear)}
    if not wrappers:
        raise ValueError("targets is empty: name at least one linear layer")
    freeze(model, train)  # before the swap: A and B are not in the model yet and stay trainable
    return swap(model, wrappers)


def remove_lora(model):
    """Put the base layers back, bit for bit and still frozen. Return their names."""
    return swap(model, {module: module.linear for module in model.modules() if isinstance(module, LoRALinear)})


@torch.no_grad()
def merge_lora(model):
    """Add every update to its weight and put plain layers back under their old names. Return the names.

    A second call is a no-op. Each merged weight is a new parameter: an embedding tied to the old one keeps its values.
    Raise ValueError, and change nothing, for a layer that computes more than W x + b (a subclass with its own forward),
    or if `model` is itself a LoRALinear. Forward hooks of a base layer stay, and then see the merged layer.
    """
    wrappers = {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}
    if "" in wrappers:
        raise ValueError("the model is itself a LoRALinear: merge a module that holds it")
    for name, module in wrappers.items():
        linear = module.linear
        plain = module.transposed or getattr(linear.forward, "__func__", None) is nn.Linear.forward
        if not plain or "weight" not in linear._parameters:  # a parametrized weight is computed, not stored
            raise ValueError(f"cannot merge into {name} ({type(linear).__name__}): it computes more than W x + b")
    for module in wrappers.values():
        merged = module.weight  # the property: W0 + scaling B A
        module.linear.weight = nn.Parameter(merged, requires_grad=module.linear.weight.requires_grad)
    return remove_lora(model)  # the base layers, which now hold the merged weights


def trained(model):
    """Return {name: parameter}: every A and B, and all else that requires a gradient, such as a head in `train`."""
    return {name: parameter for name, parameter in model.named_parameters()
            if parameter.requires_grad or name.endswith(("lora_A", "lora_B"))}


def lora_state(model):
    """Return a copy of what was trained, {name: tensor}: every A and B, and all else that requires a gradient."""
    return {name: parameter.detach().clone() for name, parameter in trained(model).items()}


def load_lora(model, state):
    """Load the result of `lora_state` into a model after the same `add_lora`. All or nothing: see `load`."""
    load(trained(model), state)
