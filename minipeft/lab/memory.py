"""Measure what one training step needs, for each technique: memory by purpose, and matrix products."""
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from ..lora import LoRALinear
from ..model import build, trained
from ..tools import settings as options

SENTENCES, TOKENS = 32, 26  # train.py's default batch size, the data's median length


def make_model(technique, weights, *more):
    """The classifier that `train.py TECHNIQUE` builds for two classes, in training mode. more: further options."""
    return build(options.parse([technique, "--weights", str(weights), *map(str, more)]), 2, weights).train()


def products_by_rule(model, *batch):
    """FLOP of the linear layers in one training step: {"forward", "to activations", "to weights"}.

    Each is one product, 2 x tokens x in x out: y = W x always; dx = W^T dy if x needs a gradient; dW = dy x^T if W
    is trained.
    """
    flop = {"forward": 0, "to activations": 0, "to weights": 0}

    def count(layer, inputs):
        x = inputs[0]
        if isinstance(layer, LoRALinear):  # its W0 is a linear layer with a hook of its own
            products = [(layer.lora_A, x.requires_grad), (layer.lora_B, True)]
        else:
            products = [(layer.weight, x.requires_grad)]
        for weight, input_needs_gradient in products:
            size = 2 * x.numel() // x.shape[-1] * weight.numel()
            flop["forward"] += size
            if input_needs_gradient:
                flop["to activations"] += size
            if weight.requires_grad:
                flop["to weights"] += size

    hooks = [module.register_forward_pre_hook(count) for module in model.modules()
             if isinstance(module, (nn.Linear, LoRALinear))]
    model(*batch)
    for hook in hooks:
        hook.remove()
    return flop


def measure_step(model, ids):
    """Measure one AdamW step on token ids (sentences, tokens): bytes of weights, gradients, optimiser states and saved
    activations (each storage once, without parameters), FLOP of linear layers forward, backward and by rule.

    If the encoder is frozen, the step starts at its cached features, as in train.py.
    """
    step, batch = model, (ids,)
    if not any(parameter.requires_grad for parameter in model.encoder.parameters()):
        step, batch = model.head, (model.features(ids),)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    def linear_flop(counter):
        counts = counter.get_flop_counts()["Global"]
        return sum(counts.get(product, 0) for product in (torch.ops.aten.mm, torch.ops.aten.addmm))

    optimizer = torch.optim.AdamW(trained(model).values(), lr=1e-5)
    with FlopCounterMode(display=False) as forward, saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = F.cross_entropy(step(*batch), torch.arange(len(ids)) % 2)
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    optimizer.step()
    states = [tensor for state in optimizer.state.values() for tensor in state.values()]
    return {"weights": sum(parameter.nbytes for parameter in model.parameters()),
            "gradients": sum(parameter.grad.nbytes for parameter in model.parameters() if parameter.grad is not None),
            "optimiser_states": sum(tensor.nbytes for tensor in states), "activations": sum(saved.values()),
            "forward_flop": linear_flop(forward), "backward_flop": linear_flop(backward),
            "rule_flop": products_by_rule(step, *batch)}


def memory(technique, weights, sentences=SENTENCES, tokens=TOKENS):
    """What a training step of a technique at its defaults needs, as of `measure_step`."""
    model = make_model(technique, weights)
    ids = torch.arange(sentences * tokens).view(sentences, tokens) % model.encoder.config.vocab_size
    return measure_step(model, ids)
