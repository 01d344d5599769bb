"""A BERT encoder (Devlin et al. 2018, arXiv 1810.04805) that loads Hugging Face-format folders.

Post-norm, exact (erf) GELU, learned positions: with the same weights it computes what the original does.
Read downwards: config, the two sub-layers of a block, the encoder, then loading.
"""
import json
import math
from dataclasses import dataclass, fields
from pathlib import Path

import safetensors
import torch
import torch.nn.functional as F
from torch import nn


@dataclass
class BertConfig:
    """The shape of an encoder. The fields carry the names they have in a Hugging Face config.json."""
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


def dropout(x, p):
    """Each element becomes 0 with probability p, and x / (1 - p) otherwise; p to the nearest multiple of 2^-16."""
    if x.device.type != "cpu" or not 0 < p < 1:
        return F.dropout(x, p)
    bits = torch.empty(x.numel() // 4 + 1, dtype=torch.int64).random_(-2**63, None)  # one draw serves four elements:
    kept = bits.view(torch.int16)[:x.numel()].view(x.shape) >= round(p * 2**16) - 2**15  # F.dropout takes one for each
    return x * (kept.to(x.dtype) / (1 - p))


class Dropout(nn.Dropout):
    def forward(self, x):
        return dropout(x, self.p) if self.training else x


def attend(query, key, value, mask=None, p=0.0):
    """softmax(Q K^T / sqrt(d) + mask) V (Vaswani et al. 2017, arXiv 1706.03762, equation 1).

    query, key, value: (batch, heads, length, d). mask: (batch, 1, 1, length), 0 where a key may be seen and
    -infinity where it is padding. p: dropout on the softmax. Returns (batch, heads, length, d).
    """
    on_cpu = query.device.type == "cpu"
    if on_cpu and query.shape[2] <= 128:  # for short sentences a CPU is faster without the fused kernel
        scores = (query / math.sqrt(query.shape[-1])) @ key.transpose(-1, -2)  # (batch, heads, length, length)
        weights = (scores if mask is None else scores + mask).softmax(-1, dtype=torch.float32)
        return dropout(weights, p).to(value.dtype) @ value
    if on_cpu:  # whose backward in bf16 is several times slower there than in fp32
        query, key, value = query.float(), key.float(), value.float()
    mask = None if mask is None else mask.to(query.dtype)
    with torch.autocast(query.device.type, enabled=False):
        return F.scaled_dot_product_attention(query, key, value, mask, dropout_p=p)


class Attention(nn.Module):
    """The first sub-layer of a block: LayerNorm(x + Dropout(Output(MultiHeadAttention(x))))."""

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
        self.dropout = Dropout(config.hidden_dropout_prob)

    def forward(self, x, mask=None):
        """(batch, length, hidden) -> the same; mask (batch, 1, 1, length) is added to the scores: 0 where a key may
        be seen, -infinity where it is padding."""
        def heads(projected):  # (batch, length, hidden) -> (batch, heads, length, hidden / heads)
            return projected.unflatten(-1, (self.num_heads, -1)).transpose(1, 2).contiguous()

        query, key, value = heads(self.query(x)), heads(self.key(x)), heads(self.value(x))
        context = attend(query, key, value, mask, self.attention_dropout if self.training else 0.0)
        context = context.transpose(1, 2).flatten(2).to(query.dtype)  # back to (batch, length, hidden)
        return self.norm(x + self.dropout(self.output(context)))


class FeedForward(nn.Module):
    """The second sub-layer of a block: LayerNorm(x + Dropout(Output(GELU(Intermediate(x)))))."""

    def __init__(self, config):
        super().__init__()
        self.intermediate = nn.Linear(config.hidden_size, config.intermediate_size)
        self.output = nn.Linear(config.intermediate_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = Dropout(config.hidden_dropout_prob)

    def forward(self, x):
        """(batch, length, hidden) -> the same."""
        return self.norm(x + self.dropout(self.output(F.gelu(self.intermediate(x)))))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.attention = Attention(config)
        self.feed_forward = FeedForward(config)

    def forward(self, x, mask=None):
        return self.feed_forward(self.attention(x, mask))


class Embeddings(nn.Module):
    """word + position + token type, normalised. All text is of token type 0: one sentence, no pairs."""

    def __init__(self, config):
        super().__init__()
        self.word = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.token_type = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = Dropout(config.hidden_dropout_prob)

    def forward(self, input_ids):
        """(batch, length) -> (batch, length, hidden)"""
        longest = self.position.num_embeddings
        if input_ids.shape[1] > longest:
            raise ValueError(f"{input_ids.shape[1]} tokens, but the encoder has only {longest} positions")
        position = self.position.weight[: input_ids.shape[1]]
        return self.dropout(self.norm(self.word(input_ids) + position + self.token_type.weight[0]))


class Bert(nn.Module):
    """Token ids in, one vector per token out.

    `pooler` is the checkpoint's own dense layer over [CLS], or None. The encoder does not use it: a
    classification head may start from it (head.py), and `pool` shows what it is.
    """

    def __init__(self, config, pooler=True):
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.pooler = nn.Linear(config.hidden_size, config.hidden_size) if pooler else None

    def forward(self, input_ids, attention_mask=None):
        """Encode padded sentences.

        input_ids: (batch, length) integers. attention_mask: (batch, length), 1 for a token and 0 for
        padding; None says that nothing is padding, which is faster. Returns (batch, length, hidden).
        Raises ValueError for more tokens than the encoder has positions.
        """
        x = self.embeddings(input_ids)
        if torch.is_autocast_enabled(x.device.type):  # the linear layers decide: no casts to and fro between them
            x = x.to(torch.get_autocast_dtype(x.device.type))
        mask = None
        if attention_mask is not None:
            mask = torch.zeros(attention_mask.shape, device=x.device).masked_fill(attention_mask == 0, -math.inf)
            mask = mask[:, None, None, :]
        for layer in self.layers:
            x = layer(x, mask)
        return x

    def pool(self, hidden):
        """BERT's pooled output: (batch, length, hidden) -> (batch, hidden), tanh of a dense layer over [CLS]."""
        return torch.tanh(self.pooler(hidden[:, 0]))


# -- loading ----------------------------------------------------------------------------------------------

# Our module names and Hugging Face's. One table for both directions; * stands for the number of the layer.
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
# What BERT checkpoints carry beside the encoder: the heads they were trained with, and a stored 0, 1, 2, ...
NOT_THE_ENCODER = ("cls.", "classifier.", "qa_outputs.", "embeddings.position_ids")


def hugging_face_name(name):
    """`layers.3.attention.query.weight` -> `encoder.layer.3.attention.self.query.weight`"""
    module, _, leaf = name.rpartition(".")
    layer = next((part for part in module.split(".") if part.isdigit()), "*")
    return HUGGING_FACE_NAMES[module.replace(f".{layer}.", ".*.")].replace("*", layer) + "." + leaf


def read_config(folder):
    """Read `config.json` into a BertConfig. ValueError names all it says that this encoder cannot honour."""
    path = Path(folder) / "config.json"
    try:
        given = json.loads(path.read_text(encoding="utf-8"))
        given = {"model_type": "bert", "hidden_act": "gelu", **given}
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is not a JSON object ({error}): fetch the file again") from None
    wrong = [f"{key} = {given.get(key)!r}, but only {only!r} is implemented" for key, only in
             [("model_type", "bert"), ("hidden_act", "gelu"), ("position_embedding_type", "absolute"),
              ("is_decoder", False), ("add_cross_attention", False)] if given.get(key, only) not in (only, None)]
    numbers = {}
    for field in fields(BertConfig):
        value = given.get(field.name, field.default)
        is_number = isinstance(value, (int, field.type)) and not isinstance(value, bool)
        if not is_number or (value < 0 if field.type is float else value < 1):
            wrong.append(f"{field.name} = {given.get(field.name)!r} is not a positive {field.type.__name__}")
        numbers[field.name] = value
    if not wrong and numbers["hidden_size"] % numbers["num_attention_heads"]:
        wrong.append("hidden_size is not a multiple of num_attention_heads")
    if wrong:
        raise ValueError(f"{path}: " + "; ".join(wrong))
    return BertConfig(**numbers)


def read_safetensors(path):
    """All tensors of a file and its metadata. ValueError if the file is damaged: safetensors holds no code."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}): fetch or write it again") from None


def check_tensors(path, tensors, expected):
    """ValueError listing every tensor of `tensors` that is missing, unexpected, misshaped or not finite."""
    wrong = [f"missing {name}" for name in expected if name not in tensors]
    for name, tensor in tensors.items():
        if name not in expected:
            wrong.append(f"unexpected {name}")
        elif tensor.shape != expected[name].shape:
            wrong.append(f"{name} has shape {tuple(tensor.shape)}, not {tuple(expected[name].shape)}")
        elif not tensor.is_floating_point() or not tensor.isfinite().all():
            wrong.append(f"{name} holds values that are not finite floating-point numbers")
    if wrong:
        raise ValueError(f"{path} does not fit the model: " + "; ".join(wrong))


def load_bert(folder, dropout=None):
    """Build the encoder that `config.json` describes and fill it from `model.safetensors`, in fp32.

    Understands names with or without the prefix `bert.`, LayerNorms called gamma and beta, other tasks'
    heads (skipped) and a pooler that is there or not. `dropout` overrides both of the config's rates.
    Raises ValueError that lists all that is wrong, FileNotFoundError; nothing is loaded by halves.
    """
    path = Path(folder) / "model.safetensors"
    for needed in (path.with_name("config.json"), path):
        if not needed.is_file():
            raise FileNotFoundError(f"{needed} is missing: a folder of weights holds config.json, model.safetensors "
                                    "and tokenizer.json (pickled weights such as pytorch_model.bin are not read)")
    config = read_config(folder)
    if dropout is not None:
        config.hidden_dropout_prob = config.attention_probs_dropout_prob = dropout
    tensors = {}
    for name, tensor in read_safetensors(path)[0].items():
        name = name.removeprefix("bert.").replace(".gamma", ".weight").replace(".beta", ".bias")
        if not name.startswith(NOT_THE_ENCODER):
            tensors[name] = tensor
    with torch.device("meta"):  # shapes only: no time spent on random weights that are overwritten at once
        model = Bert(config, pooler="pooler.dense.weight" in tensors)
    expected = {hugging_face_name(name): tensor for name, tensor in model.state_dict().items()}
    check_tensors(path, tensors, expected)
    model.load_state_dict({name: tensors[hugging_face_name(name)].float() for name in model.state_dict()}, assign=True)
    return model.requires_grad_(True).eval()


# -- precision --------------------------------------------------------------------------------------------

def has_bf16(device):
    """Whether this device multiplies bf16 matrices in hardware; without that, bf16 is no faster than fp32."""
    if torch.device(device).type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    able = torch.cpu.get_capabilities()
    return torch.device(device).type == "cpu" and bool(able.get("avx512_bf16") or able.get("amx_bf16"))


def frozen_to_bf16(model):
    """Store the weights of frozen linear layers in bf16, once. Autocast would round them alike at every use."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            for parameter in module.parameters():
                if not parameter.requires_grad:
                    parameter.data = parameter.data.to(torch.bfloat16)
