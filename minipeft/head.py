"""Head tuning: freeze the encoder, train the last two layers, the classification head.

It is the cheapest technique and the floor the others have to beat. The same head sits on top of every
technique, so this file also holds the classifier: encoder + head. It needs torch only: copy it as it is.
"""
import torch
from torch import nn


def freeze(encoder):
    """Train nothing of `encoder`. That is all head tuning does to it: no module is swapped, so returns []."""
    encoder.requires_grad_(False)
    return []


def train_biases(encoder):
    """Train the biases of `encoder` and nothing else: BitFit (Ben Zaken et al. 2021, arXiv 2106.10199).

    Not one of the three techniques but their cheapest rival. No module is swapped; returns the names of the biases.
    """
    biases = {name: parameter for name, parameter in encoder.named_parameters() if name.endswith("bias")}
    encoder.requires_grad_(False)
    for parameter in biases.values():
        parameter.requires_grad_(True)
    return list(biases)


def pool(hidden, attention_mask=None, pooling="mean"):
    """One vector a sentence: (batch, length, hidden) -> (batch, hidden).

    "mean" averages the tokens that `attention_mask` (batch, length; 1 = token) says are there; "cls" takes
    the first token, BERT's [CLS].
    """
    if pooling == "cls":
        return hidden[:, 0]
    if attention_mask is None:
        return hidden.mean(1)
    mask = attention_mask[:, :, None].to(hidden.dtype)
    return (hidden * mask).sum(1) / mask.sum(1)


class Head(nn.Module):
    """dense -> tanh -> dropout -> classifier: the head of BERT and RoBERTa for classification.

    hidden_size x hidden_size + hidden_size x classes weights, and the biases.
    """

    def __init__(self, hidden_size, classes, dropout=0.1, init_std=0.02):
        super().__init__()
        self.dense = nn.Linear(hidden_size, hidden_size)
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(hidden_size, classes)
        for linear in (self.dense, self.classifier):  # as BERT draws every new layer
            nn.init.normal_(linear.weight, std=init_std)
            nn.init.zeros_(linear.bias)

    def forward(self, pooled):
        """(batch, hidden) -> logits (batch, classes)"""
        return self.classifier(self.dropout(torch.tanh(self.dense(pooled))))


class Classifier(nn.Module):
    """Encoder + pooling + head.

    Build it after a technique has been applied to the encoder: a technique freezes all that it is given, so
    a head made afterwards is trainable, counted and saved, and cannot be wrapped by accident.

    encoder: maps (input_ids, attention_mask) to (batch, length, hidden). hidden_size: asked of
    `encoder.config` if not given. With pooling="cls" and an encoder that has a `pooler`, the head's dense
    layer starts as that pooler, and the whole is BertForSequenceClassification. Either way the pooler then
    leaves the encoder, where it would be an unused layer. Raises ValueError for another pooling.
    """

    def __init__(self, encoder, classes, pooling="mean", dropout=0.1, hidden_size=None):
        super().__init__()
        if pooling not in ("mean", "cls"):
            raise ValueError(f'pooling is "mean" or "cls", not {pooling!r}')
        self.encoder = encoder
        self.pooling = pooling
        self.head = Head(hidden_size or encoder.config.hidden_size, classes, dropout)
        if getattr(encoder, "pooler", None) is not None:
            if pooling == "cls":
                self.head.dense.load_state_dict(encoder.pooler.state_dict())
            encoder.pooler = None

    def features(self, input_ids, attention_mask=None):
        """What the head sees: (batch, length) -> (batch, hidden), in fp32."""
        return pool(self.encoder(input_ids, attention_mask).float(), attention_mask, self.pooling)

    def forward(self, input_ids, attention_mask=None):
        """(batch, length) -> logits (batch, classes)"""
        features = self.features(input_ids, attention_mask)
        with torch.autocast(features.device.type, enabled=False):  # the head is small: full precision costs nothing
            return self.head(features)
