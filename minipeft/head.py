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
    trainable and is not wrapped. Save the head too: `lora_state(encoder)` does not hold it.

    encoder: called as encoder(input_ids, attention_mask=mask); returns (batch, length, hidden), or a tuple or object
    that has it as its first item, as Hugging Face encoders do. hidden_size: that of `encoder.config` if not given.
    pooler: a linear layer that the head's dense layer starts from, with pooling="cls" only: with `bert.pooler.dense`
    of transformers, the whole is BertForSequenceClassification. Raises ValueError for another pooling.
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


# -- freezing, safe on anyone's model ----------------------------------------------------------------------

TAKEN = ("LoRALinear", "AdapterLinear", "TrainedNorm", "DistributedDataParallel", "FullyShardedDataParallel")


def freeze(model, train=(), stacklevel=2):
    """Freeze `model` in place, except the modules that `train` names by dotted suffix. Raise ValueError, and change
    nothing, if a name matches nothing, or for LoRA and adapters, which would be frozen, and distributed models. Warn if
    a module called `classifier` or `score` is frozen: a new one stays random."""
    modules, kept = dict(model.named_modules(remove_duplicate=False)), set()
    for name, module in modules.items():
        kind = module._get_name()
        if kind.endswith(TAKEN):
            raise ValueError(f"{name or 'the model'} is a {kind} already: call merge_lora, remove_lora or "
                             "remove_adapters first; apply a technique before DistributedDataParallel")
    for target in [train] if isinstance(train, str) else train:
        matches = [module for name, module in modules.items() if name and f".{name}".endswith(f".{target}")]
        if not matches:
            endings = ", ".join(sorted({name.rpartition(".")[2] for name in modules if name}))
            raise ValueError(f"target {target!r}: matches nothing. Modules end in: {endings}")
        for module in matches:
            kept |= set(module.parameters())
    for parameter in model.parameters():
        parameter.requires_grad_(parameter in kept)
    for name, module in modules.items():
        frozen = not all(parameter.requires_grad for parameter in module.parameters())
        if frozen and name.rpartition(".")[2] in ("classifier", "score"):
            warnings.warn(f"{name} is frozen; if it is a new head, pass train=({name.partition('.')[0]!r},)",
                          stacklevel=stacklevel)


def train_biases(model, train=()):
    """Freeze `model` except its biases and the modules that `train` names: BitFit (Ben Zaken et al. 2021, arXiv
    2106.10199). Biases keep their dtype. Return their names. Raise ValueError if there are none."""
    biases = {name: parameter for name, parameter in model.named_parameters() if name.endswith("bias")}
    if not biases:
        raise ValueError("the model has no biases to train")
    freeze(model, train, stacklevel=3)
    for bias in biases.values():
        bias.requires_grad_(True)
    return list(biases)
