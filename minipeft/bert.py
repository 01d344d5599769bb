"""A BERT encoder (Devlin et al. 2018, arXiv 1810.04805) that loads Hugging Face folders.

Post-norm blocks (LayerNorm after each residual sum), exact (erf) GELU, learned positions: with the same weights it
computes what transformers' BertModel does. Read downwards: config, the two sub-layers of a block, the encoder, then
loading. The shapes in the comments are those of the default weights: hidden 384, 12 heads of 32, feed-forward 1536; B
sentences of T tokens.
"""
from dataclasses import dataclass, fields
from pathlib import Path

import torch.nn.functional as F
from torch import nn

from .tools.files import UserError, check_tensors, read_json, read_safetensors


@dataclass
class BertConfig:
    """The shape of an encoder. The fields have the names that a Hugging Face config.json gives them."""
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1


class Attention(nn.Module):
    """The first sub-layer of a block: LayerNorm(x + Dropout(Output(MultiHeadAttention(x)))).

    Each head computes softmax(Q K^T / sqrt(d)) V (Vaswani et al. 2017, arXiv 1706.03762, equation 1).
    """

    def __init__(self, config):
        super().__init__()
        hidden = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.query = nn.Linear(hidden, hidden)
        self.key = nn.Linear(hidden, hidden)
        self.value = nn.Linear(hidden, hidden)
        self.output = nn.Linear(hidden, hidden)
        self.norm = nn.LayerNorm(hidden, eps=config.layer_norm_eps)
        self.attention_dropout = config.attention_probs_dropout_prob
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def attend(self, query, key, value, mask):
        """(B, heads, T, d) three times, mask (B, 1, 1, T) or None -> (B, heads, T, d)"""
        dropout = self.attention_dropout if self.training else 0.0
        return F.scaled_dot_product_attention(query, key, value, mask, dropout)

    def forward(self, x, mask=None):
        """(B, T, hidden) -> (B, T, hidden). mask: (B, 1, 1, T), False where a key is padding."""
        def heads(projected):
            return projected.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, T, 384) -> (B, 12, T, 32)

        context = self.attend(heads(self.query(x)), heads(self.key(x)), heads(self.value(x)), mask)
        context = context.transpose(1, 2).flatten(2)  # (B, 12, T, 32) -> (B, T, 384)
        return self.norm(x + self.dropout(self.output(context)))


class FeedForward(nn.Module):
    """The second sub-layer of a block: LayerNorm(x + Dropout(Output(GELU(Intermediate(x)))))."""

    def __init__(self, config):
        super().__init__()
        self.intermediate = nn.Linear(config.hidden_size, config.intermediate_size)
        self.output = nn.Linear(config.intermediate_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, x):
        """(B, T, hidden) -> (B, T, hidden)"""
        expanded = F.gelu(self.intermediate(x))  # (B, T, 384) -> (B, T, 1536)
        return self.norm(x + self.dropout(self.output(expanded)))


class Block(nn.Module):
    """A transformer block, or layer: attention mixes the tokens, feed-forward processes each token separately."""

    def __init__(self, config):
        super().__init__()
        self.attention = Attention(config)
        self.feed_forward = FeedForward(config)

    def forward(self, x, mask=None):
        return self.feed_forward(self.attention(x, mask))


class Embeddings(nn.Module):
    """word + position + token type, normalised. All tokens have type 0: single sentences, no pairs."""

    def __init__(self, config):
        super().__init__()
        self.word = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.token_type = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, input_ids):
        """(B, T) token ids -> (B, T, hidden)"""
        length, longest = input_ids.shape[1], self.position.num_embeddings
        if length > longest:
            raise ValueError(f"{length} tokens, but the encoder has only {longest} positions")
        x = self.word(input_ids) + self.position.weight[:length] + self.token_type.weight[0]
        return self.dropout(self.norm(x))


class Bert(nn.Module):
    """Token ids in, one vector per token out.

    `pooler` is the checkpoint's dense layer over the vector of [CLS], the special first token of every input, or
    None. `forward` does not use it; a classification head may start from it (head.py).
    """

    def __init__(self, config, pooler=True):
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.pooler = nn.Linear(config.hidden_size, config.hidden_size) if pooler else None

    def forward(self, input_ids, attention_mask=None):
        """Encode padded sentences: (B, T) token ids -> (B, T, hidden).

        attention_mask: (B, T), 1 for a token and 0 for padding; None if nothing is padding.
        Raises ValueError for more tokens than the encoder has positions.
        """
        x = self.embeddings(input_ids)
        mask = None if attention_mask is None else attention_mask[:, None, None, :].bool()
        for layer in self.layers:
            x = layer(x, mask)
        return x


# -- loading ----------------------------------------------------------------------------------------------

# Our module names and Hugging Face's: one table for both directions. * is the number of the layer.
HUGGING_FACE_NAMES = {
    "embeddings.word": "embeddings.word_embeddings",
    "embeddings.position": "embeddings.position_embeddings",
    "embeddings.token_type": "embeddings.token_type_embeddings",
    "embeddings.norm": "embeddings.LayerNorm",
    "layers.*.attention.query": "encoder.layer.*.attention.self.query",
    "layers.*.attention.key": "encoder.layer.*.attention.self.key",
    "layers.*.attention.value": "encoder.layer.*.attention.self.value",
    "layers.*.attention.output": "encoder.layer.*.attention.output.dense",
    "layers.*.attention.norm": "encoder.layer.*.attention.output.LayerNorm",
    "layers.*.feed_forward.intermediate": "encoder.layer.*.intermediate.dense",
    "layers.*.feed_forward.output": "encoder.layer.*.output.dense",
    "layers.*.feed_forward.norm": "encoder.layer.*.output.LayerNorm",
    "pooler": "pooler.dense",
}
# What BERT checkpoints hold beside the encoder: heads of other tasks, and position ids.
NOT_THE_ENCODER = ("cls.", "classifier.", "qa_outputs.", "embeddings.position_ids")
# Settings of which one value is supported. A missing setting counts as that value.
IMPLEMENTED = {"model_type": "bert", "hidden_act": "gelu", "position_embedding_type": "absolute",
               "is_decoder": False, "add_cross_attention": False}


def hugging_face_name(name):
    """`layers.3.attention.query.weight` -> `encoder.layer.3.attention.self.query.weight`"""
    module, _, leaf = name.rpartition(".")
    layer = next((part for part in module.split(".") if part.isdigit()), "*")  # "*": no layer, nothing is replaced
    return HUGGING_FACE_NAMES[module.replace(f".{layer}.", ".*.")].replace("*", layer) + "." + leaf


def read_config(folder):
    """Read config.json into a BertConfig. UserError lists every setting that this encoder does not implement."""
    path = Path(folder) / "config.json"
    given = read_json(path)
    wrong = [f"{key} = {given[key]!r}, but only {only!r} is implemented"
             for key, only in IMPLEMENTED.items() if given.get(key, only) not in (only, None)]
    numbers = {}
    for field in fields(BertConfig):
        value = given.get(field.name, field.default)
        is_number = isinstance(value, (int, field.type)) and not isinstance(value, bool)
        if not is_number or value < 0 or field.type is int and value < 1:
            wrong.append(f"{field.name} = {given.get(field.name)!r} is not a positive {field.type.__name__}")
        numbers[field.name] = value
    if not wrong and numbers["hidden_size"] % numbers["num_attention_heads"]:
        wrong.append("hidden_size is not a multiple of num_attention_heads")
    if wrong:
        raise UserError(f"{path}: " + "; ".join(wrong))
    return BertConfig(**numbers)


def load_bert(folder, dropout=0.0):
    """Build the encoder that `config.json` describes and load `model.safetensors`, in fp32 and eval mode.

    Accepts names with or without the prefix `bert.`, LayerNorms called gamma and beta, heads of other tasks
    (skipped), and checkpoints without a pooler. `dropout` replaces both rates of the config. All or nothing: raises a
    UserError that lists everything missing, unexpected, misshaped or not implemented.
    """
    path = Path(folder) / "model.safetensors"
    for needed in (path.with_name("config.json"), path):
        if not needed.is_file():
            raise UserError(f"{needed} is missing: a folder of weights holds config.json, model.safetensors and "
                            "tokenizer.json (pickled weights such as pytorch_model.bin are not read)")
    config = read_config(folder)
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = dropout
    tensors = {}
    for name, tensor in read_safetensors(path)[0].items():
        name = name.removeprefix("bert.").replace(".gamma", ".weight").replace(".beta", ".bias")
        if not name.startswith(NOT_THE_ENCODER):
            tensors[name] = tensor
    model = Bert(config, pooler="pooler.dense.weight" in tensors)
    check_tensors(path, tensors, {hugging_face_name(name): tensor for name, tensor in model.state_dict().items()})
    ours = {name: tensors[hugging_face_name(name)].float() for name in model.state_dict()}
    model.load_state_dict(ours, assign=True)
    return model.eval()


def load_pooler(folder):
    """Load the checkpoint's pooler, an nn.Linear in fp32, or None if it has none."""
    return load_bert(folder).pooler
