"""Compare minipeft with transformers, peft and AdapterHub's adapters in fp32, and copy its files next to other models.

    pip install -r requirements.txt -r benchmarks/requirements.txt
    python benchmarks/parity.py              everything but AdapterHub, one to three minutes
    python benchmarks/parity.py --tables     print results/parity.json as Markdown

AdapterHub's library needs an older transformers, so it has a virtual environment of its own:

    pip install -r benchmarks/requirements-parity.txt
    python benchmarks/parity.py --adapters

Both write their part of results/parity.json. Every figure is the largest absolute difference between the two sides.
Exits with code 1 if one is above its target.
"""
import argparse
import contextlib
import copy
import importlib.util
import io
import json
import platform
import shutil
import sys
import tempfile
from argparse import Namespace
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "results" / "parity.json"
sys.path.insert(0, str(ROOT))

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

FORWARD, LOSS, TENSOR = 1e-5, 1e-6, 1e-5  # the targets
STEPS, BATCH = 50, 8

# How a technique file is used with someone else's model: `model` is a DistilBertForSequenceClassification of
# transformers, `train(model, optimizer)` its training loop. run_snippets runs them.
SNIPPETS = {
    "head": """\
# before: everything is trained
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5)
train(model, optimizer)

# after: the model's own new head is trained
from head import freeze
freeze(model, train=["pre_classifier", "classifier"])
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
train(model, optimizer)
""",
    "adapter": """\
# before: everything is trained
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5)
train(model, optimizer)

# after: adapters, the norms of the blocks and the head are trained
from adapter import adapter_state, add_adapters
add_adapters(model, targets=["attention.out_lin", "ffn.lin2"], norms=["sa_layer_norm", "output_layer_norm"],
             train=["pre_classifier", "classifier"])
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-4)
train(model, optimizer)
save_file(adapter_state(model), "adapter.safetensors")
""",
    "lora": """\
# before: everything is trained
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5)
train(model, optimizer)

# after: low-rank updates of query and value, and the head, are trained
from lora import add_lora, lora_state, merge_lora
add_lora(model, targets=["q_lin", "v_lin"], rank=8, alpha=16, train=["pre_classifier", "classifier"])
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-4)
train(model, optimizer)
save_file(lora_state(model), "lora.safetensors")
merge_lora(model)
""",
}

# The same with a decoder. The README prints it, and run_decoder runs it.
DECODER = """\
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from lora import add_lora, load_lora, lora_state, merge_lora  # your copy of minipeft/lora.py

targets = ["c_attn", "c_fc", "c_proj"]  # GPT-2; Llama: q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj
model = AutoModelForCausalLM.from_pretrained("gpt2")
add_lora(model, targets)  # all else is frozen. Leave lm_head out: a merge would part it from the embedding
train(model)              # your loop, on the parameters that require a gradient
save_file(lora_state(model), "task.safetensors")

model = AutoModelForCausalLM.from_pretrained("gpt2")
add_lora(model, targets)  # the same rank and alpha: alpha is not in the file
load_lora(model, load_file("task.safetensors"))
merge_lora(model)         # plain layers again; lm_head and the embedding still share their weight
model.save_pretrained("merged")
"""


# -- measuring --------------------------------------------------------------------------------------------

def largest(values):
    return torch.tensor(list(values), dtype=torch.float64).max().item()  # Python's max could miss a NaN


def difference(one, other):
    """The largest absolute difference of two tensors, or of two dicts of tensors with the same names."""
    if isinstance(one, dict):
        assert one.keys() == other.keys(), sorted(one.keys() ^ other.keys())
        return largest(difference(one[name], other[name]) for name in one)
    return (one.double() - other.double()).abs().max().item()


def row(what, found, target):
    print(f"{what:<75} {found:9.1e}   target {target:g}", flush=True)
    return {"what": what, "difference": found, "target": target}


def sentences(weights, count):
    """Batches of real sentences: a list of (input_ids, attention_mask, labels), 0 and 1 in turn."""
    from transformers import PreTrainedTokenizerFast

    from minipeft.tools import download
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(weights / "tokenizer.json"), pad_token="[PAD]")
    lines = download.fetch_data().read_text(encoding="utf-8").splitlines()[1::25][:count * BATCH]
    rows = [line.split("\t") for line in lines]  # the file is sorted by label
    rows = [rows[i] for i in torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]
    batches = []
    for start in range(0, len(rows), BATCH):
        part = rows[start:start + BATCH]
        texts = [text for *_, text in part]
        encoded = tokenizer(texts, padding=True, truncation=True, max_length=64, return_tensors="pt")
        labels = torch.tensor([int(label == "positive") for _, _, label, _ in part])
        batches.append((encoded["input_ids"], encoded["attention_mask"], labels))
    return batches


def logits(model, ids, mask):
    output = model(ids, attention_mask=mask)
    return getattr(output, "logits", output)


def lockstep(models, batches, lr=2.5e-4):
    """Train two models on the same batches with AdamW; the largest difference of the losses of a step.

    The rate rises for a tenth of the steps and falls to 0, as in train.py.
    """
    optimizers = [torch.optim.AdamW([p for p in model.parameters() if p.requires_grad]) for model in models]
    differences = []
    for step in range(STEPS):
        ids, mask, labels = batches[step % len(batches)]
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = lr * min((step + 1) / (STEPS // 10), (STEPS - step) / (STEPS - STEPS // 10))
        losses = []
        for model, optimizer in zip(models, optimizers):
            loss = F.cross_entropy(logits(model, ids, mask), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        differences.append(abs(losses[0] - losses[1]))
    return largest(differences)


TEXTS = ["a warm, funny film", "dull and far too long for what it has to say"]


def logits_of_texts(model, weights):
    from minipeft import load_tokenizer, predict, tokenize
    return torch.from_numpy(predict(model, tokenize(load_tokenizer(weights, 128), TEXTS)[0]))


def trained_run(weights, out, *words):
    """Train a short run on a small part of the default data: (its folder, its logits of TEXTS)."""
    import train
    from minipeft import open_run
    from minipeft.tools import download, settings
    part = out.with_suffix(".tsv")
    lines = download.fetch_data().read_text(encoding="utf-8").splitlines()
    part.write_text("\n".join([lines[0], *lines[1::40]]), encoding="utf-8")
    with contextlib.redirect_stdout(io.StringIO()):
        train.run(settings.parse([*words, "--weights", str(weights), "--data", str(part), "--out", str(out),
                                  "--epochs", "1", "--device", "cpu", "--precision", "fp32"]))
    return out, logits_of_texts(open_run(out, weights)[0], weights)


def run_readme(folder):
    """The logits of TEXTS that the lines in the README.md of an exported run compute."""
    code = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    assert '["a text"]' in code
    scope = {}
    with contextlib.chdir(folder), torch.no_grad():
        exec(code.replace('["a text"]', repr(TEXTS)), scope)
    return scope["logits"]


# -- transformers and peft --------------------------------------------------------------------------------

def compare_transformers(weights):
    from transformers import BertForSequenceClassification

    from minipeft import Classifier, load_bert
    from minipeft.bert import hugging_face_name, load_pooler
    torch.manual_seed(0)
    theirs = BertForSequenceClassification.from_pretrained(weights).eval()
    ours = Classifier(load_bert(weights), 2, "cls", pooler=load_pooler(weights)).eval()
    ours.head.classifier.load_state_dict(theirs.classifier.state_dict())
    ids, mask, labels = sentences(weights, 1)[0]

    states = []
    for module in (ours.encoder.embeddings, *ours.encoder.layers):
        module.register_forward_hook(lambda *call: states.append(call[2]))
    output = theirs(ids, attention_mask=mask, labels=labels, output_hidden_states=True)
    own = ours(ids, mask)
    pooled = torch.tanh(ours.head.dense(states[-1][:, 0]))
    rows = [row("hidden states, all layers", largest(map(difference, states, output.hidden_states)), FORWARD),
            row("pooled output", difference(pooled, theirs.bert.pooler(output.hidden_states[-1])), FORWARD),
            row("logits of BertForSequenceClassification", difference(own, output.logits), FORWARD)]
    output.loss.backward()
    F.cross_entropy(own, labels).backward()
    found = {name: p.grad for name, p in ours.encoder.named_parameters() if p.grad is not None}
    gradients = {"bert." + hugging_face_name(name): gradient for name, gradient in found.items()}
    for name, layer in (("bert.pooler.dense", ours.head.dense), ("classifier", ours.head.classifier)):
        gradients |= {f"{name}.{kind}": getattr(layer, kind).grad for kind in ("weight", "bias")}
    reference = {name: p.grad for name, p in theirs.named_parameters()}
    rows.append(row(f"gradients of all {len(reference)} parameters", difference(gradients, reference), FORWARD))
    return rows


def lora_settings(weights, *words):
    from minipeft.tools.settings import parse
    return parse(["lora", "--weights", str(weights), "--head-dropout", "0", *words])


def open_in_peft(weights, folder, trainable=False):
    from peft import PeftModel
    from transformers import BertForSequenceClassification
    base = BertForSequenceClassification.from_pretrained(
        weights, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return PeftModel.from_pretrained(base, folder, is_trainable=trainable)


def compare_peft(weights, temporary):
    from minipeft import merge_lora
    from minipeft.tools import export as interop
    from minipeft.model import build
    settings = lora_settings(weights, "--pooling", "cls")
    ours, batches, about = build(settings, 2, weights), sentences(weights, 10), {"classes": '["a", "b"]'}
    interop.export_peft(ours, settings, about, temporary / "start")
    theirs = open_in_peft(weights, temporary / "start", trainable=True)
    rows = [row(f"lockstep: losses of {STEPS} AdamW steps", lockstep([ours, theirs], batches), LOSS)]

    interop.export_peft(ours, settings, about, temporary / "ours")
    theirs.save_pretrained(temporary / "theirs")
    one, other = (load_file(temporary / name / interop.PEFT) for name in ("ours", "theirs"))
    rows.append(row(f"lockstep: all {len(one)} trained tensors after {STEPS} steps", difference(one, other), TENSOR))
    opened = open_in_peft(weights, temporary / "ours")
    opened.save_pretrained(temporary / "again")
    rows.append(row("our file, opened and saved by peft: tensors", difference(one, load_file(
        temporary / "again" / interop.PEFT)), 0))
    ids, mask, _ = batches[0]
    with torch.no_grad():
        ours.eval(), opened.eval()
        rows.append(row("ours opened by peft: logits", difference(ours(ids, mask), logits(opened, ids, mask)), FORWARD))
        merge_lora(ours)
        merged = opened.merge_and_unload()
        interop.save_bert(ours.encoder, temporary / "merged")
        one = load_file(temporary / "merged" / "model.safetensors")
        other = {name: p for name, p in merged.bert.named_parameters() if not name.startswith("pooler")}
        rows.append(row("merged: weights of the encoder", difference(one, other), TENSOR))
        rows.append(row("merged: logits", difference(ours(ids, mask), logits(merged, ids, mask)), FORWARD))
    return rows


def compare_files(weights, temporary):
    """From a text to logits with the files of exported runs."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from minipeft import export
    rows = []
    run, expected = trained_run(weights, temporary / "cls", "lora", "--pooling", "cls", "--rslora", "--top-layers", "3")
    for to in ("transformers", "peft"):
        folder = temporary / f"cls-{to}"
        export(run, folder, to, weights)
        if to == "transformers":
            tokenizer = AutoTokenizer.from_pretrained(folder)
            theirs = AutoModelForSequenceClassification.from_pretrained(folder).eval()
            assert theirs.config.id2label == {0: "negative", 1: "positive"}
        else:
            theirs = open_in_peft(weights, folder).eval()
        with torch.no_grad():
            found = theirs(**tokenizer(TEXTS, padding=True, return_tensors="pt")).logits
        rows.append(row(f"[CLS], rsLoRA in 3 layers, exported to {to}: logits from text",
                        difference(expected, found), FORWARD))
    for technique in ("lora", "bitfit"):
        run, expected = trained_run(weights, temporary / technique, technique)
        for to in ("transformers", "peft") if technique == "lora" else ("transformers",):
            folder = temporary / f"{technique}-{to}"
            export(run, folder, to, weights)
            rows.append(row(f"mean, {technique}, exported to {to}: logits of its README.md", difference(
                expected, run_readme(folder)), FORWARD))
            if to == "transformers":  # with a head that is not trained no class is named
                assert "negative" not in AutoModelForSequenceClassification.from_pretrained(folder).config.label2id
    return rows


# -- AdapterHub -------------------------------------------------------------------------------------------

def compare_adapters(weights, temporary):
    import adapters
    from transformers import BertModel

    from minipeft import Classifier, add_adapters, load_bert
    from minipeft.tools import export as interop
    from minipeft.adapter import AdapterLinear, TrainedNorm
    batches, width = sentences(weights, 10), 32
    ids, mask, labels = batches[0]

    def theirs_with(folder, head, norms):
        """Their encoder with the adapters of a folder that our export wrote, under a copy of our head."""
        encoder = BertModel.from_pretrained(weights, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        adapters.init(encoder)
        name = encoder.load_adapter(str(folder), use_safetensors=True)
        encoder.train_adapter(name)
        for there, parameter in encoder.named_parameters():
            if norms and "encoder.layer" in there and "LayerNorm" in there:
                parameter.requires_grad_(True)  # frozen there unless asked for
        model = Classifier(encoder, 2, hidden_size=384)
        model.head.load_state_dict(head.state_dict())
        return model.eval()

    def trained_by(model):
        """What was trained, by the names that Hugging Face's modules have."""
        found = {"head." + name: p for name, p in model.head.named_parameters()}
        if isinstance(model.encoder, BertModel):
            return found | {name.replace("adapters.minipeft", "adapter").replace("adapter_down.0", "down").replace(
                "adapter_up", "up"): p for name, p in model.encoder.named_parameters() if p.requires_grad}
        for theirs, layer in interop.find_modules(model.encoder, AdapterLinear).items():
            base = theirs.removesuffix("dense") + "adapter"
            found |= {f"{base}.{name}": p for name, p in layer.adapter.named_parameters()}
        for theirs, norm in interop.find_modules(model.encoder, TrainedNorm).items():
            found |= {f"{theirs}.{name}": p for name, p in norm.trained.named_parameters()}
        return found

    rows = []
    for norms in ((), ("attention.norm", "feed_forward.norm")):
        torch.manual_seed(0)
        encoder = load_bert(weights)
        add_adapters(encoder, bottleneck=width, norms=norms, init_std=0.05)
        ours = Classifier(encoder, 2, dropout=0.0).eval()
        settings = Namespace(technique="adapter", norms=[], targets=["attention.output", "feed_forward.output"],
                             bottleneck=width, top_layers=None, weights=str(weights), pooling="mean", max_length=128)
        folder = temporary / f"adapters{len(norms)}"
        interop.export_adapters(ours, settings, {}, folder)
        if not norms:
            interop.save_head(ours, settings, {"classes": '["a", "b"]'}, folder, "adapters")
            rows.append(row("adapters, exported: logits of its README.md", difference(
                logits_of_texts(ours, weights), run_readme(folder)), FORWARD))
        theirs = theirs_with(folder, ours.head, norms)
        what = "adapters and norms" if norms else "adapters"
        outputs = [model(ids, mask) for model in (ours, theirs)]
        rows.append(row(f"{what}, exported and opened there: logits", difference(*outputs), FORWARD))
        for output in outputs:
            F.cross_entropy(output, labels).backward()
        gradients = [{name: p.grad for name, p in trained_by(model).items()} for model in (ours, theirs)]
        rows.append(row(f"{what}: gradients of {len(gradients[0])} tensors", difference(*gradients), FORWARD))
        rows.append(row(f"{what}, lockstep: losses of {STEPS} AdamW steps", lockstep([ours, theirs], batches), LOSS))
        rows.append(row(f"{what}, lockstep: all trained tensors", difference(*map(trained_by, (ours, theirs))), TENSOR))
    return rows


# -- the technique files alone, next to other models ------------------------------------------------------

def other_models():
    """{name: (model, inputs, how to apply the techniques)}: tiny and random."""
    import transformers as t
    torch.manual_seed(0)
    ids = torch.randint(4, 60, (8, 10))
    ended = torch.cat([ids, torch.ones(8, 1, dtype=torch.long)], 1)  # T5 pools at the end-of-sequence token
    labels = torch.arange(8) % 2
    text = {"input_ids": ids, "labels": labels}
    bert = dict(vocab_size=60, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    return {
        "DistilBERT": (t.DistilBertForSequenceClassification(t.DistilBertConfig(
            vocab_size=60, dim=32, hidden_dim=64, n_layers=2, n_heads=4, max_position_embeddings=32)), text, dict(
            lora=["q_lin", "v_lin"], adapter=["attention.out_lin", "ffn.lin2"],
            norms=["sa_layer_norm", "output_layer_norm"], head=["pre_classifier", "classifier"])),
        "RoBERTa": (t.RobertaForSequenceClassification(t.RobertaConfig(**bert, max_position_embeddings=32)), text, dict(
            lora=["query", "value", "intermediate.dense"], adapter=["attention.output.dense", "1.output.dense"],
            norms=["output.LayerNorm"], head=["classifier"])),
        "ViT": (t.ViTForImageClassification(t.ViTConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=16,
            patch_size=8)),
            {"pixel_values": torch.randn(8, 3, 16, 16), "labels": labels}, dict(
            lora=["q_proj", "v_proj"], adapter=["o_proj", "fc2"], norms=["layernorm_before", "layernorm_after"],
            head=["classifier"])),
        "T5": (t.T5ForSequenceClassification(t.T5Config(
            vocab_size=60, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, eos_token_id=1,
            decoder_start_token_id=0)), text | {"input_ids": ended}, dict(
            lora=["q", "v"], adapter=["SelfAttention.o", "EncDecAttention.o", "wo"], norms=["layer_norm"],
            head=["classification_head"])),
        "GPT-2": (t.GPT2LMHeadModel(t.GPT2Config(
            vocab_size=60, n_positions=32, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=1)),
            {"input_ids": ids, "labels": ids}, dict(
            lora=["c_attn", "c_proj"], adapter=["attn.c_proj", "mlp.c_proj"], norms=["ln_1", "ln_2"], head=[])),
        "Llama": (t.LlamaForSequenceClassification(t.LlamaConfig(**bert, pad_token_id=0)), text, dict(
            lora=["q_proj", "v_proj", "down_proj"], adapter=["o_proj", "down_proj"],
            norms=["input_layernorm", "post_attention_layernorm"], head=["score"])),
    }


def copied(name, folder):
    """Copy a technique file into a folder of its own, and import it from there."""
    path = Path(shutil.copy(ROOT / "minipeft" / f"{name}.py", folder))
    specification = importlib.util.spec_from_file_location(f"copied_{name}", path)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def tied(model):
    """The groups of names that share a parameter."""
    names = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, set()).add(name)
    return [group for group in names.values() if len(group) > 1]


def five_steps(model, inputs):
    """The loss before and after five steps on everything trainable."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(6):
        loss = model(**inputs).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses[0], losses[-1]


def copy_next_to(name, model, inputs, at, files, temporary):
    """Apply each technique to a model and check it; AssertionError says what does not hold. Returns a row."""
    head, lora, adapter = files["head"], files["lora"], files["adapter"]
    apply = {"head": lambda m: head.freeze(m, train=at["head"]),
             "bitfit": lambda m: head.train_biases(m, train=at["head"]),
             "adapter": lambda m: adapter.add_adapters(m, at["adapter"], 8, norms=at["norms"], train=at["head"]),
             "lora": lambda m: lora.add_lora(m, at["lora"], train=at["head"])}
    if not at["head"]:  # a language model has no new head to tune
        del apply["head"]
    if not any(part.endswith("bias") for part, _ in model.named_parameters()):
        del apply["bitfit"]
    found, base = {"model": name, "class": type(model).__name__, "loss": {}}, model.eval()
    for technique, add in apply.items():
        model = copy.deepcopy(base)
        add(model)
        before = {part: p.detach().clone() for part, p in model.named_parameters()}
        first, last = five_steps(model, inputs)
        moved = {part for part, p in model.named_parameters() if not torch.equal(p, before[part])}
        assert last < first, f"{name}, {technique}: the loss does not fall"
        intended = {part for part, p in model.named_parameters() if p.requires_grad}
        assert moved <= intended, f"{name}, {technique}: {moved - intended} moved"
        for part in at["head"]:
            assert any(part in one for one in moved), f"{name}, {technique}: {part} did not move"
        assert tied(model) == tied(base), f"{name}, {technique}: {tied(model)}"
        found["loss"][technique] = [first, last]

        if technique in ("adapter", "lora"):
            state_of, load = ((lora.lora_state, lora.load_lora) if technique == "lora" else
                              (adapter.adapter_state, adapter.load_adapters))
            save_file(state_of(model), temporary / "state.safetensors")
            other = copy.deepcopy(base)
            add(other)
            load(other, load_file(temporary / "state.safetensors"))
            with torch.no_grad():
                output = model(**inputs).logits
                found[f"{technique} loaded"] = difference(output, other(**inputs).logits)
                if technique == "lora":
                    lora.merge_lora(model)
                    found["lora merged"] = difference(output, model(**inputs).logits)
                    assert tied(model) == tied(base) and type(model) is type(base)
                    assert [part for part, _ in model.named_modules()] == [part for part, _ in base.named_modules()]
            assert found[f"{technique} loaded"] == 0
    assert found["lora merged"] < FORWARD
    found["tied"] = [sorted(group) for group in tied(base)]
    losses = (f"{key} {first:.3f} -> {last:.3f}" for key, (first, last) in found["loss"].items())
    print(f"{name:<12} {', '.join(losses)}, merged {found['lora merged']:.1e}", flush=True)
    return found


def run_snippets(make_model, inputs, folder):
    """Run the "after" part of each snippet as it is printed, on a fresh model."""
    sys.path.insert(0, str(folder))
    for text in SNIPPETS.values():
        model = make_model().eval()
        losses = []
        scope = {"torch": torch, "save_file": lambda state, name: save_file(state, folder / name), "model": model,
                 "train": lambda model, optimizer: losses.extend(five_steps(model, inputs))}
        exec(text.split("\n\n")[1], scope)
        assert losses[1] < losses[0]
    sys.path.remove(str(folder))


def run_decoder(folder):
    """Run DECODER as it is printed, on a tiny GPT-2 and a tiny Llama with tied embeddings; AssertionError says what does
    not hold. A copy of lora.py has to be in `folder`."""
    import transformers as t
    ids = torch.randint(4, 60, (8, 10))
    decoders = {
        "GPT-2": (t.GPT2LMHeadModel(t.GPT2Config(vocab_size=60, n_positions=32, n_embd=32, n_layer=2, n_head=4)),
                  ["c_attn", "c_fc", "c_proj"]),
        "Llama": (t.LlamaForCausalLM(t.LlamaConfig(
            vocab_size=60, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            tie_word_embeddings=True)), ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"])}
    sys.path.insert(0, str(folder))
    for name, (base, targets) in decoders.items():
        seen = {}

        def train(model):
            first, last = five_steps(model.eval(), {"input_ids": ids, "labels": ids})
            assert last < first, f"{name}: the loss does not fall"
            seen["logits"] = model(ids).logits

        assert all(target in DECODER for target in targets)
        with contextlib.chdir(folder):
            base.save_pretrained("gpt2")
            scope = {"train": train}
            exec(DECODER.replace('["c_attn", "c_fc", "c_proj"]', repr(targets)), scope)
            again = t.AutoModelForCausalLM.from_pretrained("merged")
        for model in (scope["model"], again):
            assert tied(model) == tied(base) and len(tied(base)) == 1, f"{name}: {tied(model)}"
            assert difference(seen["logits"], model.eval()(ids).logits) < FORWARD, name
            assert torch.equal(model.lm_head.weight, base.lm_head.weight), f"{name}: the embedding moved"
        shutil.rmtree(folder / "gpt2")
        shutil.rmtree(folder / "merged")
    sys.path.remove(str(folder))


def compare_models(temporary):
    import warnings
    warnings.simplefilter("ignore")  # GPT-2 and Llama warn about padding tokens
    files = {name: copied(name, temporary) for name in ("head", "adapter", "lora")}
    models = other_models()
    rows = [copy_next_to(name, *parts, files, temporary) for name, parts in models.items()]
    base, inputs, _ = models["DistilBERT"]
    run_snippets(lambda: copy.deepcopy(base), inputs, temporary)
    run_decoder(temporary)
    return rows


# -- tables -----------------------------------------------------------------------------------------------

def tables(results):
    """results/parity.json as Markdown tables."""
    lines = []
    for part, label in (("transformers", "transformers"), ("peft", "peft"), ("files", "exported runs"),
                        ("adapters", "AdapterHub adapters")):
        if part in results:
            packages = ", ".join(f"{name} {number}" for name, number in results[part]["versions"].items())
            lines += [f"**{label}** ({packages})", "",
                      "| compared, in fp32 | largest difference | target |", "|---|---|---|"]
            for row in results[part]["rows"]:
                found, target = (f"{row[key]:.1e}" if row[key] else "0" for key in ("difference", "target"))
                lines.append(f"| {row['what']} | {found} | {target} |")
            lines.append("")
    if "models" in results:
        lines += ["**The technique files alone, next to other models** (tiny, random; loss before and after 5 steps)",
                  "",
                  "| model | head tuning | BitFit | adapters | LoRA | merged logits differ by | shared weights kept |",
                  "|---|---|---|---|---|---|---|"]
        for found in results["models"]["rows"]:
            losses = [f"{found['loss'][key][0]:.3f} → {found['loss'][key][1]:.3f}" if key in found["loss"] else "–"
                      for key in ("head", "bitfit", "adapter", "lora")]
            shared = ", ".join(f"{len(group)} names" for group in found["tied"]) or "–"
            lines.append(f"| {found['class']} | {' | '.join(losses)} | {found['lora merged']:.1e} | {shared} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", action="store_true", help="compare with AdapterHub's adapters only")
    parser.add_argument("--tables", action="store_true", help="print the results as Markdown and measure nothing")
    options = parser.parse_args()
    results = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    if options.tables:
        print(tables(results))
        return 0
    from transformers.utils import logging
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    from minipeft.tools import download
    torch.set_num_threads(1)
    weights = download.fetch_weights()
    parts = {"adapters": compare_adapters} if options.adapters else {
        "transformers": lambda weights, _: compare_transformers(weights), "peft": compare_peft, "files": compare_files,
        "models": lambda _, temporary: compare_models(temporary)}
    packages = {"transformers": ["transformers"], "peft": ["peft", "transformers"], "files": ["peft", "transformers"],
                "adapters": ["adapters", "transformers"], "models": ["transformers"]}
    for name, compare in parts.items():
        print(f"\n{name}")
        with tempfile.TemporaryDirectory() as temporary:
            rows = compare(weights, Path(temporary))
        versions = {package: version(package) for package in [*packages[name], "torch"]}
        results[name] = {"versions": versions, "python": platform.python_version(), "rows": rows}
        RESULTS.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    above = [row for name in parts for row in results[name]["rows"]
             if not row.get("difference", 0) <= row.get("target", 0)]
    for row in above:
        print(f"above its target: {row['what']}", file=sys.stderr)
    return 1 if above else 0


if __name__ == "__main__":
    sys.exit(main())
