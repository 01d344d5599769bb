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
        dtype = getattr(self.down.weight, "dtype", torch.float32)  # a layer that was quantised later has none
        low = F.gelu(self.down(h.to(dtype)))  # (..., bottleneck)
        return (h + self.up(low)).to(h.dtype)


class AdapterLinear(nn.Module):
    """A frozen linear layer, then a trainable adapter. (The authors' code has BERT's dropout between the two.)"""
    way_out = "call remove_adapters"  # for matching, below

    def __init__(self, linear, bottleneck=32, init_std=1e-2):
        super().__init__()
        width = linear.nf if type(linear).__name__ == "Conv1D" else linear.out_features
        self.linear = linear
        self.adapter = Adapter(width, bottleneck, init_std, linear.weight.device)
        self.train(linear.training)

    def forward(self, input):  # x has the name that nn.Linear gives it
        """(..., in_features) -> (..., out_features)"""
        return self.adapter(self.linear(input))

    @property
    def weight(self):
        return self.linear.weight.as_subclass(NotToCompute)

    def __getattr__(self, name):  # bias, in_features and the like, for code that reads them, are the base layer's
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_"):  # what a library keeps about the base layer, such as accelerate's hook
                raise
            return getattr(super().__getattr__("linear"), name)


class TrainedNorm(nn.Module):
    """A normalisation layer replaced by a trained fp32 copy, `trained`. The original, `base`, is not called; it is
    kept so that remove_adapters can put it back bit for bit."""
    way_out = "call remove_adapters"

    def __init__(self, norm):
        super().__init__()
        self.base = norm
        self.trained = copy.deepcopy(norm).float().requires_grad_(True)
        self.train(norm.training)

    def forward(self, *args, **named):
        """(..., width) -> (..., width), in the dtype of the input, which is the first argument; more as the base has"""
        base, trained = next(self.base.parameters()).dtype, next(self.trained.parameters()).dtype
        if base == trained:
            return self.trained(*args, **named)

        def cast(value):
            return value.to(trained) if torch.is_tensor(value) and value.dtype == base else value
        output = self.trained(*map(cast, args), **{name: cast(value) for name, value in named.items()})
        return output.to([*args, *named.values()][0].dtype)

    def __getattr__(self, name):  # weight, eps and the like are the trained copy's, tensors in the dtype of the base's
        try:
            return super().__getattr__(name)
        except AttributeError:
            value = getattr(super().__getattr__("trained"), name)
            return value.to(getattr(self.base, name).dtype) if torch.is_tensor(value) else value


# -- what makes it safe on anyone's model ------------------------------------------------------------------

class NotToCompute(torch.Tensor):
    """The weight that AdapterLinear shows. Code that computes with it instead of calling the layer would leave out the
    adapter, so that is a ValueError; dtype, device and shape can be read. nn.TransformerEncoderLayer is such code in
    inference, but calls its layers if a weight has a class like this one. (For torch.export, call
    torch.backends.mha.set_fastpath_enabled(False) as well.)"""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function.__name__ not in ("__get__", "__repr__", "size", "dim", "numel", "is_floating_point", "is_complex"):
            raise ValueError(f"{function.__name__} of the weight of a layer that has an adapter: the model reads the "
                             "weight and does not call the layer, which leaves out the adapter; choose other targets")
        return super().__torch_function__(function, types, args, kwargs)


# The functions from here to is_linear are repeated in lora.py, so that each file can be copied alone.

def plain(tensors):
    """Check that there are tensors, with floating-point values in memory: none is sharded, quantised or offloaded."""
    counting = torch.get_default_device().type == "meta"  # inside `with torch.device("meta")`: shapes are enough
    return bool(tensors) and all(
        type(tensor) in (torch.Tensor, nn.Parameter) and tensor.is_floating_point() and tensor.element_size() > 1
        and tensor.numel() > 0 and (counting or not tensor.is_meta) for tensor in tensors)


def named(model, target):
    """Return {name: module}: the modules called `target` or ending in "." + `target`; shared ones under each name."""
    modules = model.named_modules(remove_duplicate=False)
    return {name: module for name, module in modules if name and f".{name}".endswith(f".{target}")}


def matching(model, targets, fits=lambda module: True):
    """Return the modules that `targets` name by dotted suffix, each once. Raise ValueError, with the names that could
    match, if a target matches nothing or a module that does not fit; also if `model` cannot be changed any more."""
    fitting, wrong, found = set(), {}, []
    for name, module in model.named_modules(remove_duplicate=False):
        kind = module._get_name()  # a second technique would freeze the first; DDP would not synchronise what is added
        if hasattr(type(module), "way_out") or kind in ("DistributedDataParallel", "FullyShardedDataParallel"):
            way_out = getattr(type(module), "way_out", "apply the technique")
            raise ValueError(f"{name or 'the model'} is a {kind} already: {way_out} first")
        if not fits(module):
            wrong[name] = f"{name} is a {kind}"
        elif not plain([*module.parameters()]):
            wrong[name] = f"{name} is a {kind} without plain weights in memory (quantised, sharded, offloaded?)"
        elif name:
            fitting.add(name.rpartition(".")[2])
    for target in [targets] if isinstance(targets, str) else targets:
        matches = named(model, target)
        problems = [wrong[name] for name in matches if name in wrong]
        if problems or not matches:
            raise ValueError(f"target {target!r}: {'; '.join(problems[:3]) or 'matches nothing'}. "
                             f"Modules that fit end in: {', '.join(sorted(fitting))}")
        found += matches.values()
    return list(dict.fromkeys(found))


def freeze(model, train=(), stacklevel=2):
    """Freeze `model` in place, except the modules that `train` names by dotted suffix. Raise ValueError, and change
    nothing, where matching does. Warn if a module called `classifier` or `score` is frozen: a new one stays random."""
    kept, total = matching(model, train), len(list(model.parameters()))
    model.requires_grad_(False)
    for module in kept:
        module.requires_grad_(True)
    for name, head in (named(model, "classifier") | named(model, "score")).items():
        if not all(parameter.requires_grad for parameter in head.parameters()):
            outer = name.rpartition(".")[0]
            while outer and len(list(model.get_submodule(outer).parameters())) < total / 2:  # without the encoder
                name, outer = outer, outer.rpartition(".")[0]
            warnings.warn(f"{name} is frozen; if it is a new head, pass train=({name!r},)", stacklevel=stacklevel)


def swap(model, replacements):
    """Replace modules, given as {old: new}, under every name that they have in `model`. Return the names."""
    modules = model.named_modules(remove_duplicate=False)
    old = {name: module for name, module in modules if module in replacements}
    for name, module in old.items():
        model.set_submodule(name, replacements[module])
    return list(old)


def trained_tensors(model, own):
    """Return {name: tensor} of what training changes: the tensors `own`, what else requires a gradient, and buffers
    (BatchNorm's statistics) of modules trained as a whole. Raise ValueError for one that is not a tensor in memory."""
    own = own | {parameter for parameter in model.parameters() if parameter.requires_grad}
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


def load(tensors, state):
    """Copy `state` into `tensors`, both {name: tensor}. Raise ValueError, and copy none, if names or shapes differ."""
    ours = {f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items()}
    given = {f"{name} {tuple(tensor.shape)}" for name, tensor in state.items()}
    if ours != given:
        raise ValueError(f"missing: {', '.join(sorted(ours - given))}; unexpected: {', '.join(sorted(given - ours))}")
    with torch.no_grad():
        for name, tensor in tensors.items():
            tensor.copy_(state[name])


def is_linear(module):
    """Recognise nn.Linear, but not its subclass in nn.MultiheadAttention, whose weight is read and which is never
    called; and transformers' Conv1D (GPT-2), whose weight is (in, out)."""
    read = isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear)
    return isinstance(module, nn.Linear) and not read or type(module).__name__ == "Conv1D" and hasattr(module, "nf")


# -- adapters in a model ----------------------------------------------------------------------------------

def is_norm(module):
    """Recognise a normalisation layer by the name of its class or of one that it inherits from: LayerNorm, GroupNorm,
    BatchNorm2d, T5LayerNorm, LlamaRMSNorm. Nothing may be nested in it."""
    classes = [kind.__name__.rstrip("123d") for kind in type(module).__mro__]
    return any(name.endswith("Norm") for name in classes) and not list(module.children())


def add_adapters(model, targets=("attention.output", "feed_forward.output"), bottleneck=32, init_std=1e-2,
                 norms=("attention.norm", "feed_forward.norm"), train=()):
    """Freeze `model`, except the modules that `train` names, put an adapter after every linear layer in `targets`, and
    train a copy of every normalisation layer in `norms`.

    The defaults are the paper's placement on the encoder of bert.py: one adapter at the end of each of a block's two
    sub-layers, before the residual sum. The authors train the norm of the embeddings too, "embeddings.norm". Names
    match by dotted suffix. Return the names of what was wrapped; a module with several names gets one wrapper. Raise
    ValueError, and change nothing, if a name does not match, nothing is named, or the model has LoRA or adapters.
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


def adapter_parameters(model):
    """Return {name: tensor}: adapters, trained norms, and what else was trained, such as a head, with their buffers."""
    own = [module for module in model.modules() if isinstance(module, Adapter)]
    own += [module.trained for module in model.modules() if isinstance(module, TrainedNorm)]
    if not own:
        raise ValueError("the model has no adapters. The order is: load the base model, add_adapters, train (or "
                         "load_adapters), adapter_state")
    return trained_tensors(model, set(nn.ModuleList(own).parameters()))


def adapter_state(model):
    """Return a copy of what was trained, {name: tensor}: see adapter_parameters."""
    return {name: tensor.detach().clone() for name, tensor in adapter_parameters(model).items()}


def load_adapters(model, state):
    """Load the result of `adapter_state` into a model after the same `add_adapters`. All or nothing: see `load`."""
    load(adapter_parameters(model), state)
