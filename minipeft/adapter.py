"""Adapters (Houlsby et al. 2019, arXiv 1902.00751), on any model made of nn.Linear and nn.LayerNorm.

A small bottleneck after each sub-layer learns the task; the pretrained weights stay as they are. This file
needs torch only: copy it as it is.
"""
import copy

import torch.nn.functional as F
from torch import nn


class Adapter(nn.Module):
    """A linear layer followed by a bottleneck with a skip connection (section 2.1, figure 2, right).

        h = W0 x + b0,    y = h + W_up GELU(W_down h + b_down) + b_up

    W_down is (bottleneck, width), W_up (width, bottleneck): 2 x bottleneck x width + bottleneck + width new
    parameters. The weights start near zero (truncated normal), so the adapter starts near the identity.
    The paper says a standard deviation of 1e-2, its authors' code 1e-3; we follow the paper. It names no
    nonlinearity; GELU is that of their code (which approximates it with a tanh). Where the paper's text has
    the adapter after the sub-layer's projection, their code has BERT's dropout between the two: a wrapper
    around the linear layer leaves that dropout after the adapter.
    """

    def __init__(self, linear, bottleneck=32, init_std=1e-2):
        super().__init__()
        if bottleneck < 1:
            raise ValueError(f"bottleneck is at least 1, not {bottleneck}")
        self.linear = linear
        like = {"device": linear.weight.device, "dtype": linear.weight.dtype}
        self.down = nn.Linear(linear.out_features, bottleneck, **like)
        self.up = nn.Linear(bottleneck, linear.out_features, **like)
        for layer in (self.down, self.up):
            nn.init.trunc_normal_(layer.weight, std=init_std, a=-2 * init_std, b=2 * init_std)
            nn.init.zeros_(layer.bias)

    def forward(self, x):
        """(..., in_features) -> (..., out_features)"""
        h = self.linear(x)
        return h + self.up(F.gelu(self.down(h)))

    @property
    def weight(self):  # torch's fused paths read `.weight` of a child instead of calling it
        raise RuntimeError("a layer with an adapter is more than its weight, so code that reads .weight cannot use "
                           "it; for nn.TransformerEncoder call torch.backends.mha.set_fastpath_enabled(False)")


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


def add_adapters(model, targets=("attention.output", "feed_forward.output"), bottleneck=32, init_std=1e-2,
                 norms=("attention.norm", "feed_forward.norm")):
    """Freeze `model`, put an adapter after every linear layer in `targets`, and train the LayerNorms in `norms`.

    The defaults are the paper's placement on the encoder of bert.py: one adapter at the end of each of a
    block's two sub-layers, before the residual sum. `norms=()` leaves the LayerNorms frozen; the authors
    train that of the embeddings too, "embeddings.norm". A trained LayerNorm is a copy; the base's own is put
    aside for `remove_adapters`. Returns the names of all that was swapped. Raises ValueError, and changes
    nothing, if a target or norm matches nothing or a module of another type, or if the model has adapters
    already.
    """
    already = [name for name, module in model.named_modules() if isinstance(module, Adapter)]
    if already:
        raise ValueError(f"the model has adapters already ({', '.join(already[:3])}, ...): call remove_adapters first")
    linears, layer_norms = matching(model, targets, nn.Linear), matching(model, norms, nn.LayerNorm)
    adapters = {name: Adapter(model.get_submodule(name), bottleneck, init_std) for name in linears}
    model.requires_grad_(False)  # what is not yet in the model stays trainable
    for name in linears:
        swap(model, name, adapters[name])
    for name in layer_norms:
        norm = model.get_submodule(name)
        trained = copy.deepcopy(norm).requires_grad_(True)  # on the parameters: a flag on the module does nothing
        trained.adapter_base = [norm]  # in a list, so that torch neither counts nor saves it
        swap(model, name, trained)
    return linears + layer_norms


def remove_adapters(model):
    """Give back the base model, bit for bit, and still frozen. Returns the names of what was swapped back."""
    removed = []
    for name, module in list(model.named_modules()):
        if isinstance(module, Adapter):
            swap(model, name, module.linear)
        elif isinstance(getattr(module, "adapter_base", None), list):
            swap(model, name, module.adapter_base[0].to(module.weight.device))
        else:
            continue
        removed.append(name)
    return removed
