"""Adapters (Houlsby et al. 2019, arXiv 1902.00751) for any model made of linear and normalisation layers.

A small bottleneck at the end of each sub-layer, before its residual sum, is trained; the pretrained weights stay as
they are. This file needs only torch: copy it as it is, call add_adapters, train the parameters that require a gradient.
"""
import copy
import warnings

import torch
import torch.nn.functional as F
from torch import nn


class Adapter(nn.Module):
    """A bottleneck with a skip connection (section 2.1, figure 2, right).

        y = h + W_up GELU(W_down h + b_down) + b_up

    W_down is (bottleneck, width), W_up (width, bottleneck): 2 x bottleneck x width + bottleneck + width parameters, in
    fp32. The weights are normal, truncated at two standard deviations, so the adapter starts near the identity. The
    paper's standard deviation is 1e-2, that of its code 1e-3. The paper names no nonlinearity; its code has the tanh
    approximation of GELU, this file exact GELU. Raises ValueError for a bottleneck below 1 or an init_std that is not
    positive.
    """

    def __init__(self, width, bottleneck=32, init_std=1e-2, device=None):
        super().__init__()
        if bottleneck < 1:
            raise ValueError(f"bottleneck must be at least 1, not {bottleneck}")
        if init_std <= 0:
            raise ValueError(f"init_std must be positive, not {init_std}: at zero its matrices would not learn")
        self.down = nn.Linear(width, bottleneck, device=device, dtype=torch.float32)
        self.up = nn.Linear(bottleneck, width, device=device, dtype=torch.float32)
        for layer in (self.down, self.up):
            nn.init.trunc_normal_(layer.weight, std=init_std, a=-2 * init_std, b=2 * init_std)
            nn.init.zeros_(layer.bias)

    def forward(self, h):
        """(..., width) -> (..., width), in the dtype of h"""
        low = F.gelu(self.down(h.to(self.down.weight.dtype)))  # (..., bottleneck)
        return (h + self.up(low)).to(h.dtype)


class Unfused(torch.Tensor):
    """Only for nn.TransformerEncoderLayer; skip it at first reading. In inference that layer has a fused kernel, which
    reads its children's weights without calling them and would leave out adapters. Weights of this tensor type turn the
    kernel off. For torch.export, call torch.backends.mha.set_fastpath_enabled(False) as well."""


class AdapterLinear(nn.Module):
    """A frozen linear layer, then a trainable adapter. (The authors' code has BERT's dropout between the two.)"""

    def __init__(self, linear, bottleneck=32, init_std=1e-2):
        super().__init__()
        width = linear.nf if type(linear).__name__ == "Conv1D" else linear.out_features
        self.linear = linear
        self.adapter = Adapter(width, bottleneck, init_std, linear.weight.device)

    def forward(self, x):
        """(..., in_features) -> (..., out_features)"""
        return self.adapter(self.linear(x))

    @property
    def weight(self):
        return self.linear.weight.as_subclass(Unfused)

    @property
    def bias(self):
        return self.linear.bias


class TrainedNorm(nn.Module):
    """A normalisation layer replaced by a trained fp32 copy, `trained`. The original, `base`, is not called; it is
    kept so that remove_adapters can put it back bit for bit."""

    def __init__(self, norm):
        super().__init__()
        self.base = norm
        self.trained = copy.deepcopy(norm).float().requires_grad_(True)

    def forward(self, x):
        """(..., width) -> (..., width), in the dtype of the base's output"""
        base, trained = next(self.base.parameters()).dtype, next(self.trained.parameters()).dtype
        return self.trained(x) if base == trained else self.trained(x.to(trained)).to(x.dtype)

    @property
    def weight(self):
        return self.trained.weight.as_subclass(Unfused)

    def __getattr__(self, name):  # bias, eps and the like, for code that reads them, are those of the trained copy
        modules = self.__dict__["_modules"]  # self.trained would call __getattr__ again, for ever
        return modules[name] if name in modules else getattr(modules["trained"], name)


# -- finding and swapping layers: repeated in lora.py, so that each file can be copied alone ---------------

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


# -- adapters in a model ----------------------------------------------------------------------------------

def is_norm(module):
    """Recognise a normalisation layer of any class (RMSNorm too): a leaf with weights, neither linear nor embedding."""
    leaf = not list(module.children()) and list(module.parameters())
    return bool(leaf) and not is_linear(module) and not isinstance(module, nn.Embedding)


def add_adapters(model, targets=("attention.output", "feed_forward.output"), bottleneck=32, init_std=1e-2,
                 norms=("attention.norm", "feed_forward.norm"), train=()):
    """Freeze `model`, except the modules that `train` names, put an adapter after every linear layer in `targets`, and
    train a copy of every normalisation layer in `norms`.

    The defaults are the paper's placement on the encoder of bert.py: one adapter at the end of each of a block's two
    sub-layers, before the residual sum. The authors train the norm of the embeddings too, "embeddings.norm". Names
    match by dotted suffix. Return the names of what was wrapped; a module with several names gets one wrapper. Raise
    ValueError, and change nothing, if a name does not match, nothing is named, or the model has adapters already.
    """
    if any(isinstance(module, (AdapterLinear, TrainedNorm)) for module in model.modules()):
        raise ValueError("the model has adapters already: call remove_adapters first")
    wrappers = {layer: AdapterLinear(layer, bottleneck, init_std) for layer in matching(model, targets, is_linear)}
    wrappers |= {norm: TrainedNorm(norm) for norm in matching(model, norms, is_norm)}
    if not wrappers:
        raise ValueError("targets and norms are empty: name at least one layer")
    freeze(model, train)  # before the swap: the adapters are not in the model yet and stay trainable
    return swap(model, wrappers)


def remove_adapters(model):
    """Put the base layers back, bit for bit and still frozen. Return their names."""
    bases = {module: module.linear for module in model.modules() if isinstance(module, AdapterLinear)}
    bases |= {module: module.base for module in model.modules() if isinstance(module, TrainedNorm)}
    return swap(model, bases)


def trained(model):
    """Return {name: parameter}: adapters, trained norms, and what else requires a gradient (see `train`)."""
    own = [module for module in model.modules() if isinstance(module, Adapter)]
    own += [module.trained for module in model.modules() if isinstance(module, TrainedNorm)]
    own = {parameter for module in own for parameter in module.parameters()}
    return {name: parameter for name, parameter in model.named_parameters()
            if parameter.requires_grad or parameter in own}


def adapter_state(model):
    """Return a copy of what was trained, {name: tensor}: adapters, norms, and all else that requires a gradient."""
    return {name: parameter.detach().clone() for name, parameter in trained(model).items()}


def load_adapters(model, state):
    """Load the result of `adapter_state` into a model after the same `add_adapters`. All or nothing: see `load`."""
    load(trained(model), state)
