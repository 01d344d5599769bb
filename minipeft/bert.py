"""A BERT encoder (Devlin et al. 2018, arXiv 1810.04805) that loads Hugging Face folders.

Post-norm blocks (LayerNorm after each residual sum), exact (erf) GELU, learned positions: with the same weights it
computes what transformers' BertModel does. Read downwards: config, the two sub-layers of a block, the encoder, then
loading. The shapes in the comments are those of the default weights: hidden 384, 12 heads of 32, feed-forward 1536; B
sentences of T tokens.
"""
import re
from dataclasses import dataclass, fields
from pathlib import Path

import torch
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

        def table(rows):  # nn.Embedding's own initialisation needs 1.5 s of imports on the meta device (see load_bert)
            weight = torch.empty(rows, config.hidden_size).uniform_(-0.035, 0.035)
            return nn.Embedding.from_pretrained(weight, freeze=False)

        self.word, self.position = table(config.vocab_size), table(config.max_position_embeddings)
        self.token_type = table(config.type_vocab_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, input_ids):
        """(B, T) token ids -> (B, T, hidden)"""
        length = input_ids.shape[1]
        if length > self.position.num_embeddings:
            raise ValueError(f"{length} tokens, but the encoder has only {self.position.num_embeddings} positions")
        x = self.word(input_ids) + self.position.weight[:length] + self.token_type.weight[0]
        return self.dropout(self.norm(x))


class Bert(nn.Module):
    """Token ids in, one vector per token out."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))

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

# Our module names and Hugging Face's; those of a layer come after its number.
HUGGING_FACE_NAMES = {
    "embeddings.word": "embeddings.word_embeddings",
    "embeddings.position": "embeddings.position_embeddings",
    "embeddings.token_type": "embeddings.token_type_embeddings",
    "embeddings.norm": "embeddings.LayerNorm",
    "attention.query": "attention.self.query",
    "attention.key": "attention.self.key",
    "attention.value": "attention.self.value",
    "attention.output": "attention.output.dense",
    "attention.norm": "attention.output.LayerNorm",
    "feed_forward.intermediate": "intermediate.dense",
    "feed_forward.output": "output.dense",
    "feed_forward.norm": "output.LayerNorm",
}
# What BERT checkpoints hold beside the encoder: the pooler, heads of other tasks, and position ids.
NOT_THE_ENCODER = ("pooler.", "cls.", "classifier.", "qa_outputs.", "embeddings.position_ids")
# Settings of which one value is supported. A missing setting counts as that value.
IMPLEMENTED = {"model_type": "bert", "hidden_act": "gelu", "position_embedding_type": "absolute",
               "is_decoder": False, "add_cross_attention": False}
WORDS = "embeddings.word_embeddings.weight"


def hugging_face_name(name):
    """`layers.3.attention.query.weight` -> `encoder.layer.3.attention.self.query.weight`"""
    layer, module = re.match(r"(layers\.\d+\.)?(.+)\.", name).groups("")
    return layer.replace("layers", "encoder.layer") + HUGGING_FACE_NAMES[module] + name[len(layer + module):]


def read_config(folder):
    """Read config.json into a BertConfig. UserError lists every setting that this encoder does not implement."""
    path = Path(folder) / "config.json"
    given = read_json(path)
    config = BertConfig(**{field.name: given.get(field.name, field.default) for field in fields(BertConfig)})
    wrong = [f"{key} = {given[key]!r}, but only {only!r} is implemented"
             for key, only in IMPLEMENTED.items() if given.get(key, only) not in (only, None)]
    if not wrong:  # another architecture has other names for its sizes
        for field in fields(config):
            value, least = getattr(config, field.name), 1 if field.type is int else 0
            if type(value) not in (int, field.type) or not least <= value <= 10**9:
                wrong.append(f"{field.name} is {given.get(field.name)!r}, not a positive {field.type.__name__}")
    if not wrong and config.hidden_size % config.num_attention_heads:
        wrong.append("hidden_size is not a multiple of num_attention_heads")
    if wrong:
        raise UserError(f"{path}: " + "; ".join(wrong))
    return config


def read_tensors(folder):
    """Read {Hugging Face's name: tensor} from model.safetensors, without a prefix such as `bert.`, and with LayerNorms
    called gamma and beta renamed. UserError if it is missing or holds no BERT."""
    path = Path(folder) / "model.safetensors"
    if not path.is_file():
        raise UserError(f"{path} is missing; weights/README.md says how to convert weights that are pickled "
                        "(pytorch_model.bin) or in several files (model.safetensors.index.json)")
    tensors, _ = read_safetensors(path)
    prefixes = [name.removesuffix(WORDS) for name in tensors if name.endswith(WORDS)]
    if not prefixes:
        raise UserError(f"{path} holds no BERT: {WORDS} is not among its {len(tensors)} tensors")
    return {name.removeprefix(prefixes[0]).replace(".gamma", ".weight").replace(".beta", ".bias"): tensor
            for name, tensor in tensors.items()}


def fill(module, folder, tensors, theirs):
    """Give a module without memory, on the meta device, its tensors in fp32. `theirs` maps our names to the names in
    `tensors`. Raises UserError as check_tensors."""
    expected = module.state_dict()
    check_tensors(Path(folder) / "model.safetensors", tensors, {theirs(name): expected[name] for name in expected})
    module.load_state_dict({name: tensors[theirs(name)].float() for name in expected}, assign=True)
    return module.eval()


def load_bert(folder, dropout=0.0):
    """Build the encoder that `config.json` describes and load `model.safetensors`, in fp32 and eval mode.

    Skips the pooler and heads of other tasks. `dropout` replaces both rates of the config. All or nothing: raises a
    UserError that lists what is missing, unexpected, misshaped or not implemented. Nothing takes memory before it is
    known to fit the file.
    """
    config = read_config(folder)
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = dropout
    tensors = {name: tensor for name, tensor in read_tensors(folder).items() if not name.startswith(NOT_THE_ENCODER)}
    layers = len({name.split(".")[2] for name in tensors if name.startswith("encoder.layer.")})
    if layers != config.num_hidden_layers:
        raise UserError(f"{folder}: model.safetensors has {layers} layers, but config.json says num_hidden_layers = "
                        f"{config.num_hidden_layers}")
    with torch.device("meta"):
        encoder = Bert(config)
    return fill(encoder, folder, tensors, hugging_face_name)


def load_pooler(folder):
    """Return the checkpoint's pooler as an nn.Linear in fp32, or None if it has none. The pooler is a dense layer over
    the vector of [CLS], the special first token; a classification head may start from it (head.py)."""
    tensors = {name: tensor for name, tensor in read_tensors(folder).items() if name.startswith("pooler.")}
    if not tensors:
        return None
    hidden = read_config(folder).hidden_size
    return fill(nn.Linear(hidden, hidden, device="meta"), folder, tensors, "pooler.dense.{}".format)
