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
    approximation of GELU, this file exact GELU. Raises ValueError for a size that is not positive.
    """

    def __init__(self, width, bottleneck=32, init_std=1e-2, device=None):
        super().__init__()
        if bottleneck < 1 or init_std <= 0:  # matrices of zeros would not learn
            raise ValueError(f"bottleneck must be at least 1 and init_std positive, not {bottleneck} and {init_std}")
        self.down = nn.Linear(width, bottleneck, device=device, dtype=torch.float32)
        self.up = nn.Linear(bottleneck, width, device=device, dtype=torch.float32)
        for layer in (self.down, self.up):
            nn.init.trunc_normal_(layer.weight, std=init_std, a=-2 * init_std, b=2 * init_std)
            nn.init.zeros_(layer.bias)

    def forward(self, h):
        """(..., width) -> (..., width), in the dtype of h"""
        dtype = getattr(self.down.weight, "dtype", torch.float32)  # a layer that was quantised later has no dtype
        low = F.gelu(self.down(h.to(dtype)))  # (..., bottleneck)
        return (h + self.up(low)).to(h.dtype)


class AdapterLinear(nn.Module):
    """A frozen linear layer, then a trainable adapter. (The authors' code has BERT's dropout between the two.)"""

    def __init__(self, linear, bottleneck=32, init_std=1e-2):
        super().__init__()
        width = linear.nf if type(linear).__name__ == "Conv1D" else linear.out_features
        self.linear = linear
        self.adapter = Adapter(width, bottleneck, init_std, linear.weight.device)
        self.train(linear.training)

    def forward(self, input):  # nn.Linear's own name, for code that calls layer(input=x)
        """(..., in_features) -> (..., out_features)"""
        return self.adapter(self.linear(input))

    @property
    def weight(self):
        return self.linear.weight.as_subclass(NotToCompute)

    def __getattr__(self, name):  # bias, in_features and the like, for code that reads them, are the base layer's
        if name.startswith("_") or name in self._modules:
            return super().__getattr__(name)
        return getattr(super().__getattr__("linear"), name)  # super: self.linear would come here again


class TrainedNorm(nn.Module):
    """A trained fp32 copy of a normalisation layer. The original, `base`, is kept so that remove_adapters can put it
    back bit for bit; it is not called."""

    def __init__(self, norm):
        super().__init__()
        self.base = norm
        self.trained = copy.deepcopy(norm).float().requires_grad_(True)
        self.train(norm.training)

    def forward(self, *args, **named):
        """(..., width) -> (..., width), in the dtype of the input, the first argument; others are passed on"""
        base, trained = next(self.base.parameters()).dtype, next(self.trained.parameters()).dtype
        if base == trained:
            return self.trained(*args, **named)

        def cast(value):
            return value.to(trained) if torch.is_tensor(value) and value.dtype == base else value
        output = self.trained(*map(cast, args), **{name: cast(value) for name, value in named.items()})
        return output.to([*args, *named.values()][0].dtype)

    def __getattr__(self, name):  # weight, eps and the like are read from the copy, tensors cast to the base's dtype
        if name.startswith("_") or name in self._modules:
            return super().__getattr__(name)
        value = getattr(super().__getattr__("trained"), name)
        return value.to(getattr(self.base, name).dtype) if torch.is_tensor(value) else value


# -- what makes it safe on anyone's model ------------------------------------------------------------------

class NotToCompute(torch.Tensor):
    """The weight that AdapterLinear shows: one can read its dtype, device and shape. Computing with it is a ValueError,
    as code that reads the weight instead of calling the layer leaves out the adapter. (In inference
    nn.TransformerEncoderLayer reads weights, but not those of a class with __torch_function__.)"""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function.__name__ not in ("__get__", "__repr__", "size", "dim", "numel", "is_floating_point", "is_complex"):
            raise ValueError(f"{function.__name__} of the weight of a layer that has an adapter: the model reads the "
                             "weight and does not call the layer, which leaves out the adapter; choose other targets")
        return super().__torch_function__(function, types, args, kwargs)


# From here to trained_tensors as in lora.py, so that each file can be copied alone.

# A second technique would freeze what the first has added; DDP and FSDP would not synchronise what is added after them.
TAKEN = ("LoRALinear", "AdapterLinear", "TrainedNorm", "DistributedDataParallel", "FullyShardedDataParallel")


def plain(tensors):
    """Check that there are tensors, with floating-point values in memory: none is quantised, sharded or offloaded."""
    counting = torch.get_default_device().type == "meta"  # inside `with torch.device("meta")`: shapes are enough
    floats = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    return bool(tensors) and all(  # a quantised tensor is of a subclass; a sharded one can be empty
        type(tensor) in (torch.Tensor, nn.Parameter) and tensor.dtype in floats and tensor.numel() > 0
        and (counting or not tensor.is_meta) for tensor in tensors)


def matching(model, targets, fits=lambda module: True):
    """Return the modules that `targets` name by dotted suffix, each once. Raise ValueError, with the names that could
    match, if a target matches nothing or a module that does not fit; also if `model` has a technique already."""
    modules, fitting, found = dict(model.named_modules(remove_duplicate=False)), {}, []
    for name, module in modules.items():
        kind = module._get_name()
        if kind.endswith(TAKEN):
            raise ValueError(f"{name or 'the model'} is a {kind} already: call merge_lora, remove_lora or "
                             "remove_adapters first; apply a technique before DistributedDataParallel")
        if name and fits(module) and plain(list(module.parameters())):
            fitting[name] = module
    for target in [targets] if isinstance(targets, str) else targets:
        matches = [name for name in modules if name and f".{name}".endswith(f".{target}")]  # whole names only
        wrong = [f"{name} is a {modules[name]._get_name()}, the wrong type, or quantised, sharded or offloaded"
                 for name in matches if name not in fitting]
        if wrong or not matches:
            endings = ", ".join(sorted({name.rpartition(".")[2] for name in fitting}))
            raise ValueError(f"target {target!r}: {wrong[0] if wrong else 'matches nothing'}. "
                             f"Modules that fit end in: {endings}")
        found += [fitting[name] for name in matches]
    return list(dict.fromkeys(found))


def freeze(model, train=(), stacklevel=2):
    """Freeze `model` in place, except the modules that `train` names by dotted suffix. Raise ValueError, and change
    nothing, where matching does. Warn if a module called `classifier` or `score` is frozen: a new one stays random."""
    kept = matching(model, train)
    model.requires_grad_(False)
    for module in kept:
        module.requires_grad_(True)
    for name, module in model.named_modules():
        frozen = not all(parameter.requires_grad for parameter in module.parameters())
        if frozen and name.rpartition(".")[2] in ("classifier", "score"):
            warnings.warn(f"{name} is frozen; if it is a new head, pass train=({name.partition('.')[0]!r},)",
                          stacklevel=stacklevel)


def swap(model, replacements):
    """Replace modules, given as {old: new}, under every name that they have in `model`. Return the names."""
    modules = model.named_modules(remove_duplicate=False)
    old = {name: module for name, module in modules if module in replacements}
    for name, module in old.items():
        model.set_submodule(name, replacements[module])
    return list(old)


def is_linear(module):
    """Recognise nn.Linear, but not its subclass in nn.MultiheadAttention, whose weight is read and which is never
    called; and transformers' Conv1D (GPT-2), whose weight is (in, out)."""
    read = isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear)
    return (isinstance(module, nn.Linear) and not read) or (type(module).__name__ == "Conv1D" and hasattr(module, "nf"))


def trained_tensors(model, kinds):
    """Return {name: tensor} of what training changes: what modules of the classes `kinds` add to their base layers,
    what else requires a gradient, and buffers (BatchNorm's statistics) of modules trained as a whole."""
    own = set()
    for module in model.modules():
        if isinstance(module, kinds):  # all of it but the base layer
            own |= {tensor for name, tensor in module.named_parameters() if not name.startswith(("linear.", "base."))}
    if not own:
        raise ValueError("nothing was added to the model. The order is: load the base model, add_lora or add_adapters, "
                         "train or load a state, take the state, merge or remove")
    own |= {parameter for parameter in model.parameters() if parameter.requires_grad}
    for module in model.modules():
        parameters = set(module.parameters())
        if parameters and parameters <= own:
            own |= set(module.buffers())
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    tensors = {name: tensors[name] for name in model.state_dict() if tensors.get(name) in own}
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not plain([tensor]):
            raise ValueError(f"{name} is not in memory, or it is sharded: load or gather the model first")
    return tensors


# -- adapters in a model ----------------------------------------------------------------------------------

def is_norm(module):
    """Recognise a normalisation layer by the name of its class or of one that it inherits from: LayerNorm, GroupNorm,
    BatchNorm2d, T5LayerNorm, LlamaRMSNorm. Nothing may be nested in it."""
    classes = [kind.__name__.rstrip("123d") for kind in type(module).__mro__]  # BatchNorm2d -> BatchNorm
    return any(name.endswith("Norm") for name in classes) and not list(module.children())


def add_adapters(model, targets=("attention.output", "feed_forward.output"), bottleneck=32, init_std=1e-2,
                 norms=("attention.norm", "feed_forward.norm"), train=()):
    """Freeze `model`, except the modules that `train` names, put an adapter after every linear layer in `targets`, and
    train a copy of every normalisation layer in `norms`.

    The defaults are the paper's placement on the encoder of bert.py: one adapter at the end of each of a block's two
    sub-layers, before the residual sum. The authors train the norm of the embeddings too, "embeddings.norm". Return the
    names of what was wrapped; a module with several names gets one wrapper. `norms` may be empty. Raise ValueError, and
    change nothing, where matching does or if nothing is named.
    """
    wrappers = {layer: AdapterLinear(layer, bottleneck, init_std) for layer in matching(model, targets, is_linear)}
    wrappers |= {norm: TrainedNorm(norm) for norm in matching(model, norms, is_norm)}
    if not wrappers:
        raise ValueError("targets and norms are empty: name at least one layer")
    freeze(model, train, stacklevel=3)  # before the swap: the adapters are not in the model yet and stay trainable
    return swap(model, wrappers)


def remove_adapters(model):
    """Put the base layers back, bit for bit and still frozen. Return their names."""
    bases = {module: module.linear for module in model.modules() if isinstance(module, AdapterLinear)}
    bases |= {module: module.base for module in model.modules() if isinstance(module, TrainedNorm)}
    return swap(model, bases)


def adapter_state(model):
    """Return a copy of adapters, trained norms and what else was trained, such as a head in `train`: {name: tensor}."""
    tensors = trained_tensors(model, (AdapterLinear, TrainedNorm))
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


@torch.no_grad()
def load_adapters(model, state):
    """Load the result of `adapter_state` into a model after the same `add_adapters`. Raise ValueError, and change
    nothing, if names or shapes differ."""
    tensors = trained_tensors(model, (AdapterLinear, TrainedNorm))
    ours = {f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items()}
    given = {f"{name} {tuple(tensor.shape)}" for name, tensor in state.items()}
    if ours != given:
        raise ValueError(f"missing: {', '.join(sorted(ours - given))}; unexpected: {', '.join(sorted(given - ours))}")
    for name, tensor in tensors.items():
        tensor.copy_(state[name])
