"""Head tuning and BitFit: freeze the encoder, train a new classification head, or the biases as well.

Head tuning is the cheapest technique and the baseline of the others. The same head is used with every technique, so
this file also defines the classifier: encoder + head. It needs only torch: copy it as it is.
"""
import warnings

import torch
from torch import nn


def pool(hidden, attention_mask=None, pooling="mean"):
    """Return one fp32 vector a sentence: (batch, length, hidden) -> (batch, hidden).

    "mean" averages the tokens where `attention_mask`, (batch, length), is 1, and gives zeros where none is; "cls"
    takes the first token, [CLS].
    """
    hidden = hidden.float()  # a sum in bf16 has about three digits
    if pooling == "cls":
        return hidden[:, 0]
    if attention_mask is None:
        return hidden.mean(1)
    mask = attention_mask[:, :, None].float()
    return (hidden * mask).sum(1) / mask.sum(1).clamp(min=1)


class Head(nn.Module):
    """A classification head like BERT's (pooler, dropout, classifier): dense -> tanh -> dropout -> classifier."""

    def __init__(self, hidden_size, classes, dropout=0.1, init_std=0.02):
        super().__init__()
        self.dense = nn.Linear(hidden_size, hidden_size)
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(hidden_size, classes)
        for linear in (self.dense, self.classifier):  # BERT's initialisation of new layers
            nn.init.normal_(linear.weight, std=init_std)
            nn.init.zeros_(linear.bias)

    def forward(self, pooled):
        """(batch, hidden) -> logits (batch, classes)"""
        return self.classifier(self.dropout(torch.tanh(self.dense(pooled))))


class Classifier(nn.Module):
    """Encoder + pooling + head. Build it after a technique has been applied to the encoder: the head then stays
    trainable and is not wrapped.

    encoder: called as encoder(input_ids, attention_mask=mask); returns (batch, length, hidden), or a tuple or object
    that has it as its first item, as Hugging Face encoders do. hidden_size: that of `encoder.config` if not given.
    pooler: with pooling="cls" the head's dense layer starts as a copy of this linear layer, such as the checkpoint's
    pooler (`bert.pooler.dense` in transformers): the whole is then BertForSequenceClassification. Raises ValueError
    for another pooling.
    """

    def __init__(self, encoder, classes, pooling="mean", dropout=0.1, hidden_size=None, pooler=None):
        super().__init__()
        if pooling not in ("mean", "cls"):
            raise ValueError(f'pooling must be "mean" or "cls", not {pooling!r}')
        self.encoder = encoder
        self.pooling = pooling
        self.head = Head(hidden_size or encoder.config.hidden_size, classes, dropout)
        if pooling == "cls" and pooler is not None:
            self.head.dense.load_state_dict(pooler.state_dict())

    def features(self, input_ids, attention_mask=None):
        """Return the input of the head: (batch, length) -> (batch, hidden), in fp32."""
        output = self.encoder(input_ids, attention_mask=attention_mask)
        return pool(output if torch.is_tensor(output) else output[0], attention_mask, self.pooling)

    def forward(self, input_ids, attention_mask=None):
        """(batch, length) -> logits (batch, classes)"""
        features = self.features(input_ids, attention_mask)
        with torch.autocast(features.device.type, enabled=False):  # the head is small: full precision is cheap
            return self.head(features)


# -- freezing, safe on anyone's model: repeated in adapter.py and lora.py, so that each can be copied alone ---

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


def train_biases(model, train=()):
    """Freeze `model` except its biases and the modules that `train` names: BitFit (Ben Zaken et al. 2021, arXiv
    2106.10199). Biases keep their dtype. Return their names. Raise ValueError if there are none in memory."""
    biases = {name: parameter for name, parameter in model.named_parameters() if name.endswith("bias")}
    if not plain([*biases.values()]):
        raise ValueError("the model has no biases to train, or they are not in memory, quantised or sharded")
    freeze(model, train, stacklevel=3)
    for bias in biases.values():
        bias.requires_grad_(True)
    return list(biases)
