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
        self.train(linear.training)

    def forward(self, input):  # nn.Linear's own name, for code that calls layer(input=x)
        """(..., in_features) -> (..., out_features), in the dtype of the base layer's output"""
        h = self.linear(input)
        low_rank = F.linear(self.dropout(input.to(self.lora_A.dtype)), self.lora_A)  # (..., rank)
        return h + F.linear(self.scaling * low_rank, self.lora_B).to(h.dtype)

    @property
    def weight(self):
        """The merged weight W0 + scaling B A, computed in fp32, rounded once: for merge_lora, and for code that reads
        the weight instead of calling the layer, as nn.TransformerEncoderLayer does in inference."""
        update = self.scaling * self.lora_B.float() @ self.lora_A.float()
        return (self.linear.weight + (update.T if self.transposed else update)).to(self.linear.weight.dtype)

    def __getattr__(self, name):  # bias, in_features and the like, for code that reads them, are the base layer's
        if name.startswith("_") or name in self._parameters or name in self._modules:
            return super().__getattr__(name)
        return getattr(super().__getattr__("linear"), name)  # super: self.linear would come here again


# -- what makes it safe on anyone's model: repeated in adapter.py, so that each file can be copied alone ---

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


# -- LoRA in a model --------------------------------------------------------------------------------------

def add_lora(model, targets=("query", "key", "value", "attention.output", "intermediate", "feed_forward.output"),
             rank=8, alpha=16, dropout=0.0, rslora=False, train=()):
    """Freeze `model`, except the modules that `train` names, and wrap every linear layer in `targets` in a LoRALinear.

    The default is every linear layer of the blocks in bert.py; the paper's choice is ("query", "value"). Return the
    names of the wrapped layers; a layer with several names gets one wrapper. Raise ValueError, and change nothing,
    where matching does or if no layer is named.
    """
    wrappers = {layer: LoRALinear(layer, rank, alpha, dropout, rslora) for layer in matching(model, targets, is_linear)}
    if not wrappers:
        raise ValueError("targets is empty: name at least one linear layer")
    freeze(model, train, stacklevel=3)  # before the swap: A and B are not in the model yet and stay trainable
    return swap(model, wrappers)


def remove_lora(model):
    """Put the base layers back, bit for bit and still frozen. Return their names."""
    return swap(model, {module: module.linear for module in model.modules() if isinstance(module, LoRALinear)})


@torch.no_grad()
def merge_lora(model):
    """Add every update to its weight and put plain layers back under their old names. Return the names.

    A second call is a no-op. Each merged weight is a new parameter: an embedding tied to the old one keeps its values,
    and is no longer tied.
    Raise ValueError, and change nothing, for a base layer that computes more than W x + b (a subclass, a
    parametrisation, a hook) or is not in memory.
    """
    merged = {}
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear):
            linear = module.linear
            more = (linear._forward_hooks or linear._forward_pre_hooks
                    or getattr(linear.forward, "__func__", None) is not type(linear).forward)  # accelerate replaces it
            ordinary = type(linear) is nn.Linear or module.transposed
            if more or not ordinary or not plain(list(module.parameters())) or not name:
                raise ValueError(f"cannot merge into {name or 'the model itself'} ({linear._get_name()}): it is not "
                                 "just W x + b, in memory, without hooks, inside a model")
            with torch.autocast(linear.weight.device.type, enabled=False):
                merged[linear] = nn.Parameter(module.weight, requires_grad=linear.weight.requires_grad)
    for linear, weight in merged.items():  # after the last computation: if that fails, nothing is changed
        linear.weight = weight
    return remove_lora(model)  # the base layers, which now hold the merged weights


def lora_state(model):
    """Return a copy of every A and B, and of what else was trained, such as a head in `train`: {name: tensor}."""
    return {name: tensor.detach().clone() for name, tensor in trained_tensors(model, LoRALinear).items()}


@torch.no_grad()
def load_lora(model, state):
    """Load the result of `lora_state` into a model after the same `add_lora`: alpha is not in it. Raise ValueError, and
    change nothing, if names or shapes differ."""
    tensors = trained_tensors(model, LoRALinear)
    ours = {f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items()}
    given = {f"{name} {tuple(tensor.shape)}" for name, tensor in state.items()}
    if ours != given:
        raise ValueError(f"missing: {', '.join(sorted(ours - given))}; unexpected: {', '.join(sorted(given - ours))}")
    for name, tensor in tensors.items():
        tensor.copy_(state[name])
