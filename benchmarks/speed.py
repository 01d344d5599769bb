"""Time and memory of minipeft beside the usual stack, transformers Trainer + peft, on the processor of this machine.

    pip install -r requirements.txt -r benchmarks/requirements.txt
    python benchmarks/speed.py                  everything; a run that was stopped goes on where it was
    python benchmarks/speed.py --only growth    one part
    python benchmarks/speed.py --quick --out /tmp/speed

Three sides train the same model (encoder, mean pooling, head) on the same token ids of the same sentences, with
the same batch size, epochs, dropout, rates and optimiser:

    usual      Trainer + peft, shuffled, padded to the longest of a batch, fp32
    best       the same Trainer with all it has for speed: batches grouped by length, bf16, and the attention
               that is faster then ("eager": the backward of torch's fused one is slow in bf16 on a CPU)
    minipeft   train.py as it comes

Each measurement is a process of its own, and the sides take turns. Seconds are those of the training loop alone;
the first step is timed from the start of the process (ours evaluates the untrained model before it, the others do
not); memory is the most that the process ever held. The peers get tokenised texts and do no logging, evaluation or
saving. Adapters are ours on both sides. The usual way to tune a head is Trainer on a frozen encoder.
"""
import time
STARTED = time.time()  # before anything that takes time

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import mean, median

# Nothing heavy up here: a process inherits the peak memory of the one that starts it, so that has to be small,
# and no side should pay for the imports of another.
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from minipeft.download import whole

SIDES = ("usual", "best", "minipeft")
PARTS = ("epoch", "inference", "ablation", "growth")
EPOCHS = {"lora": 3, "adapter": 1, "head": 3, "full": 1}  # after LoRA's three, the accuracies are compared too
PEER_LORA = ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"]
PEER_ADAPTERS = {"targets": ("output.dense",), "norms": ("output.LayerNorm",)}  # the ends of both sub-layers' names
SPEED_UPS = ("batches of like length", "linear layers in bf16", "frozen weights kept in bf16",
             "LoRA's gradient by hand", "short attention by the book", "lengths in multiples of 8")
LADDER = ("plain loop", *("+ " + name for name in SPEED_UPS))  # step n has the first n of them
# One row each: runs, figure, and how many times better than the usual and the best side ours should be.
TABLE = {"LoRA, seconds an epoch": ("epoch/lora", "scaled_seconds", 4, 2),
         "adapters, seconds an epoch": ("epoch/adapter", "scaled_seconds", 4, None),
         "head, seconds for 3 epochs": ("epoch/head", "scaled_seconds", 20, None),
         "full fine-tuning, seconds an epoch": ("epoch/full", "scaled_seconds", 3, 1.5),
         "inference, sentences a second": ("inference", "sentences_per_second", 3, 1.3),
         "LoRA, peak memory (MB)": ("epoch/lora", "peak_memory_mb", 1.5, None),
         "LoRA, seconds from command to first step": ("epoch/lora", "first_step_seconds", None, None)}


# -- what all sides share ---------------------------------------------------------------------------------

def peak_memory():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6


def note_first_step():
    """A list that will hold the seconds from the start of the process to the end of the first optimiser step."""
    from torch.optim.optimizer import register_optimizer_step_post_hook
    first = []
    register_optimizer_step_post_hook(lambda *_: first or first.append(time.time() - STARTED))
    return first


def lora_flops(lengths, config, rank):
    """The floating-point operations that an epoch of LoRA on all six linear layers of every block needs.

    Real tokens only, no padding; a product of (m, k) and (k, n) is 2 m k n. For T tokens in sentences of length L,
    hidden size h, feed-forward size f and n blocks:

        linear    = T (2 (4 h^2 + 2 h f))             the six matrices W
        low_rank  = T (2 r (4 (h + h) + 2 (h + f)))   A and B beside each of them
        attention = sum L^2 (2 h + 2 h)               scores, and the weighted sum of the values
        forward   = n (linear + low_rank + attention)
        backward  = n (linear + low_rank + 2 attention) - T (3 (2 h^2 + 2 r h))
        weights   = n low_rank                        gradients of A and B

    The backward pass repeats the products of the forward pass; attention's twice, as both factors of each product
    depend on what is trained; and it stops at query, key and value of the first block. Frozen weights have no
    gradient. Norms, GELU, softmax, embeddings, optimiser and head are not counted.
    """
    h, f, n = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    tokens = int(lengths.sum())
    linear = tokens * 2 * (4 * h * h + 2 * h * f)
    low_rank = tokens * 2 * rank * (4 * (h + h) + 2 * (h + f))
    attention = int((lengths ** 2).sum()) * 4 * h
    forward = n * (linear + low_rank + attention)
    backward = n * (linear + low_rank + 2 * attention) - tokens * 3 * (2 * h * h + 2 * rank * h)
    return forward + backward + n * low_rank


def random_batches(lengths, batch_size, rng):
    import numpy as np
    return np.array_split(rng.permutation(len(lengths)), range(batch_size, len(lengths), batch_size))


def prepare(folder, sentences, held_out):
    """Put `sentences` of fold 0's training set into a file, with dev and test, and say what all sides have to know.

    A hash of its text decides where a sentence goes, so the smaller file is split just as the whole one is.
    """
    from importlib.metadata import version
    import numpy as np
    import torch
    import train
    from minipeft import bert, data, download
    file, weights = download.fetch_data(), download.fetch_weights()
    corpus = data.read_corpus([file], data.load_tokenizer(weights, 128))
    training, dev, test = data.split(corpus)
    rows, dev, test = np.random.default_rng(0).permutation(training)[:sentences], dev[:held_out], test[:held_out]
    lines = file.read_text(encoding="utf-8").split("\n")
    chosen = corpus.line[np.sort(np.concatenate([rows, dev, test]))]
    subset = Path(folder, "sentences.tsv")
    subset.write_text("\n".join([lines[0], *(lines[line - 1] for line in chosen), ""]), encoding="utf-8")
    settings = {name: vars(train.parse([
        name, "--data", str(subset), "--weights", str(weights), "--device", "cpu", "--epochs", str(epochs),
        "--out", str(Path(folder, "run")), "--overwrite", "--save-every", str(10**9)]))
        for name, epochs in EPOCHS.items()}
    lengths, padded = corpus.lengths[training], {}
    for name, make, multiple in (("in_random_batches", random_batches, 1),
                                 ("in_batches_of_like_length", data.batches_of_like_length, data.MULTIPLE)):
        longest = [(len(batch), lengths[batch].max()) for batch in make(lengths, 32, np.random.default_rng(0))]
        padded[f"tokens_{name}"] = int(sum(size * -(-length // multiple) * multiple for size, length in longest))
    return {"settings": settings, "whole_file": str(file), "about": padded | {
        "sentences": len(rows), "tokens": int(corpus.lengths[rows].sum()), "whole_sentences": len(training),
        "whole_tokens": int(corpus.lengths[training].sum()), "dev_sentences": len(dev), "test_sentences": len(test),
        "lora_flops": lora_flops(corpus.lengths[rows], bert.read_config(weights), settings["lora"]["rank"]),
        "cores": os.cpu_count(), "threads": torch.get_num_threads(), "python": platform.python_version(),
        "processor": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        **{name: version(name) for name in ("torch", "transformers", "peft", "accelerate")}}}


def peak():
    """GFLOP/s of this machine's matrix product, at the shape of a feed-forward layer: the best of 30 x 10 calls."""
    import torch
    rates = {}
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        x, weight, seconds = torch.randn(896, 384).to(dtype), torch.randn(1536, 384).to(dtype), []
        for _ in range(30):
            began = time.perf_counter()
            for _ in range(10):
                torch.nn.functional.linear(x, weight)
            seconds.append(time.perf_counter() - began)
        rates[name] = 10 * 2 * 896 * 384 * 1536 / min(seconds) / 1e9
    return rates


# -- the sides --------------------------------------------------------------------------------------------

def ours(settings):
    """Train as train.py does."""
    first = note_first_step()
    import train
    metrics = train.run(argparse.Namespace(**settings))
    return {"seconds": metrics["train_seconds"], "first_step_seconds": first[0],
            "peak_memory_mb": metrics["peak_memory_mb"], "dev_accuracy": metrics["dev_accuracy"],
            "trained_parameters": metrics["trainable_parameters"]}


def peer_model(settings, best):
    """The classifier that checkpoint.build makes, but of a transformers encoder and, for LoRA, peft."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import BertModel
    from minipeft import adapter, head

    class PeerClassifier(head.Classifier):
        def features(self, input_ids, attention_mask=None):
            hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
            return head.pool(hidden.float(), attention_mask, self.pooling)

        def forward(self, input_ids, attention_mask=None, labels=None):  # as Trainer wants it
            logits = super().forward(input_ids, attention_mask)
            if labels is None:
                return logits
            return {"loss": torch.nn.functional.cross_entropy(logits, labels), "logits": logits}

    dropout = settings.get("dropout", 0.0)
    encoder = BertModel.from_pretrained(
        settings["weights"], add_pooling_layer=False, hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout, attn_implementation="eager" if best else "sdpa")
    torch.manual_seed(settings["seed"])
    if settings["method"] == "lora":
        lora = LoraConfig(r=settings["rank"], lora_alpha=settings["alpha"], target_modules=PEER_LORA)
        encoder = get_peft_model(encoder, lora)
    elif settings["method"] == "adapter":
        adapter.add_adapters(encoder, bottleneck=settings["bottleneck"], init_std=settings["init_std"], **PEER_ADAPTERS)
    elif settings["method"] == "head":
        head.freeze(encoder)
    torch.manual_seed(settings["seed"])
    return PeerClassifier(encoder, 2, settings["pooling"], settings["head_dropout"])


def read(settings):
    """(corpus, (train, dev, test))"""
    from minipeft import data
    corpus = data.read_corpus([settings["data"]], data.load_tokenizer(settings["weights"], settings["max_length"]))
    return corpus, data.split(corpus, settings["fold"])


def examples(corpus, rows, settings):
    """Sentences as Trainer and DataLoader want them, and the usual collator."""
    from transformers import DataCollatorWithPadding, PreTrainedTokenizerFast
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=f"{settings['weights']}/tokenizer.json", pad_token="[PAD]")
    return [{"input_ids": ids.tolist(), "attention_mask": [1] * len(ids), "labels": int(label)}
            for ids, label in zip(corpus.sentences(rows), corpus.labels[rows])], DataCollatorWithPadding(tokenizer)


def peer(settings, best):
    """Train the same with transformers' Trainer."""
    first = note_first_step()
    from transformers import Trainer, TrainerCallback, TrainingArguments
    from minipeft import data
    corpus, (train_rows, dev_rows, _) = read(settings)
    sentences, collate = examples(corpus, train_rows, settings)
    model = peer_model(settings, best)
    times = {}

    class Clock(TrainerCallback):
        def on_train_begin(self, *_, **__):
            times["began"] = time.perf_counter()

        def on_train_end(self, *_, **__):
            times["ended"] = time.perf_counter()

    arguments = TrainingArguments(
        settings["out"] + "-peer", num_train_epochs=settings["epochs"], learning_rate=settings["lr"], use_cpu=True,
        per_device_train_batch_size=settings["batch_size"], warmup_steps=settings["warmup"], bf16=best,
        weight_decay=settings["weight_decay"], max_grad_norm=settings["clip"], optim="adamw_torch_fused",
        lr_scheduler_type=settings["schedule"], train_sampling_strategy="group_by_length" if best else "random",
        seed=settings["seed"], save_strategy="no", logging_strategy="no", report_to=[], disable_tqdm=True)
    Trainer(model, arguments, collate, sentences, callbacks=[Clock()]).train()
    answers = data.predict(model.eval(), corpus.sentences(dev_rows), "cpu", best).argmax(1)
    return {"seconds": times["ended"] - times["began"], "first_step_seconds": first[0],
            "peak_memory_mb": peak_memory(), "dev_accuracy": float((answers == corpus.labels[dev_rows]).mean()),
            "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad)}


def infer(settings, side):
    """Classify dev and test in batches of 32, with LoRA merged: sentences a second, without reading them."""
    import numpy as np
    import torch
    from minipeft import bert, checkpoint, data, lora
    corpus, (_, dev, test) = read(settings)
    rows = np.concatenate([dev, test])
    if side.startswith("minipeft"):
        bf16 = side == "minipeft" and bert.has_bf16("cpu")
        model = checkpoint.build(settings, 2, settings["weights"]).eval()
        lora.merge_lora(model)
        if bf16:
            bert.frozen_to_bf16(model)
        sentences = corpus.sentences(rows)

        def run(number):
            data.predict(model, sentences[:number], "cpu", bf16)
    else:
        best = side == "best"
        model = peer_model(settings, best).eval()
        model.encoder = model.encoder.merge_and_unload()
        if best:
            rows = rows[np.argsort(-corpus.lengths[rows])]
        sentences, collate = examples(corpus, rows, settings)

        def run(number):
            for batch in torch.utils.data.DataLoader(sentences[:number], 32, collate_fn=collate):
                with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=best):
                    model(batch["input_ids"], batch["attention_mask"])
    run(32)  # the first call prepares kernels
    began = time.perf_counter()
    run(len(rows))
    return {"sentences_per_second": len(rows) / (time.perf_counter() - began), "peak_memory_mb": peak_memory()}


# -- our own speed ----------------------------------------------------------------------------------------

def ablate(settings, without):
    """Train with some of SPEED_UPS taken away, each by putting the plain version in its place."""
    import torch
    import torch.nn.functional as F
    from minipeft import bert, data, lora
    like_length = data.batches_of_like_length

    def plain_lora(self, x):
        low_rank = F.linear(self.dropout(x), self.lora_A) * self.scaling
        return self.linear(x) + F.linear(low_rank, self.lora_B)

    def fused_attention(self, x, mask=None):
        query, key, value = (linear(x).float().unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
                             for linear in (self.query, self.key, self.value))
        with torch.autocast("cpu", enabled=False):
            context = F.scaled_dot_product_attention(query, key, value, mask)
        return self.norm(x + self.dropout(self.output(context.transpose(1, 2).flatten(2).to(x.dtype))))

    like, bf16, kept, by_hand, by_book, multiples = (name in without for name in SPEED_UPS)
    if like:  # in training; evaluation, which brings no generator, stays as it is
        data.batches_of_like_length = lambda lengths, size, rng=None: (
            random_batches(lengths, size, rng) if rng else like_length(lengths, size))
    if bf16:
        settings["precision"] = "fp32"
    if kept:
        bert.frozen_to_bf16 = lambda model: None
    if by_hand:
        lora.LoRALinear.forward = plain_lora
    if by_book:
        bert.Attention.forward = fused_attention
    if multiples:
        data.MULTIPLE = 1
    return ours(settings)  # imports train.py, which finds the plain versions


def steps(settings, batch, length, count, shrink=0):
    """Seconds a step of LoRA (median) and peak memory, on random sentences of `length` tokens.

    The last sentence of a batch is a token shorter, so that there is padding as in real batches. With `shrink`, each
    batch is so many tokens shorter than the one before: memory has to be found anew for every shape.
    """
    import dataclasses
    import numpy as np
    import torch
    import train
    from minipeft import bert, checkpoint
    lengths = length - shrink * np.repeat(np.arange(count), batch)
    lengths[batch - 1::batch] -= 1
    rng = np.random.default_rng(0)
    corpus = dataclasses.replace(
        read(settings)[0], tokens=rng.integers(1000, 30000, lengths.sum(), np.int32), labels=rng.integers(
            0, 2, len(lengths)), starts=np.concatenate([[0], lengths.cumsum()]))
    model, bf16 = checkpoint.build(settings, 2, settings["weights"]), bert.has_bf16("cpu")
    if bf16:
        bert.frozen_to_bf16(model)
    optimizer = torch.optim.AdamW(checkpoint.trained(model).values(), settings["lr"], fused=True)
    forward, seconds = train.Forward(model, corpus, "cpu", bf16), []
    for rows in np.arange(len(lengths)).reshape(count, batch):
        began = time.perf_counter()
        labels = torch.from_numpy(corpus.labels[rows])
        torch.nn.functional.cross_entropy(forward.logits(rows), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - began)
    return {"seconds": median(seconds[2:]), "peak_memory_mb": peak_memory()}


def reading(settings, whole_file, count, folder):
    """Seconds to read and tokenise `count` distinct sentences, and the memory that takes and leaves held; and the
    peak memory of a process that has also split them and made an epoch's batches."""
    from itertools import cycle, islice
    import numpy as np
    from minipeft import data
    path = Path(folder, "many.tsv")
    with open(path, "w", encoding="utf-8") as file:
        rows = cycle(list(data.read_file(whole_file)))
        file.writelines(f"{text} {number}\t{label}\n" for number, (_, text, label) in enumerate(islice(rows, count)))
    tokenizer = data.load_tokenizer(settings["weights"], settings["max_length"])
    before, began = peak_memory(), time.perf_counter()
    corpus = data.read_corpus([path], tokenizer)
    seconds = time.perf_counter() - began
    path.unlink()
    growth = peak_memory() - before
    rows = data.split(corpus)[0]
    data.batches_of_like_length(corpus.lengths[rows], settings["batch_size"], np.random.default_rng(0))
    arrays = {name: array.nbytes / 1e6 for name, array in vars(corpus).items() if hasattr(array, "nbytes")}
    return {"seconds": seconds, "sentences": len(corpus), "peak_growth_mb": growth, "token_ids_mb": arrays["tokens"],
            "all_arrays_mb": sum(arrays.values()), "peak_memory_mb": peak_memory()}


# -- measuring and telling --------------------------------------------------------------------------------

class Results:
    """speed.json: {"options": ..., "about": ..., "runs": {key: figures}, "summary": ...}, saved after every run."""

    def __init__(self, path, options):
        self.path, self.content = path, {"options": options, "about": {}, "runs": {}, "summary": {}}
        if path.is_file():
            self.content = json.loads(path.read_text(encoding="utf-8"))
            if self.content["options"] != options:
                sys.exit(f"{path} was measured with {self.content['options']}, not {options}: move it away, or use "
                         "another --out")
        self.runs = self.content["runs"]

    def save(self):
        with whole(self.path) as aside:
            aside.write_text(json.dumps(self.content, indent=1) + "\n", encoding="utf-8")

    def measure(self, key, task, scale=None, **arguments):
        """Figures of a task that runs in a process of its own, unless they are there already.

        `scale`: what its seconds have to be multiplied by to be those for the whole training set.
        """
        if key not in self.runs:
            print(f"{key:<34}", end="", flush=True)
            self.runs[key] = figures = in_a_process(task, **arguments)
            if scale:
                figures["scaled_seconds"] = scale * figures["seconds"]
            self.save()
            print(", ".join(f"{name} {value:,.4g}" for name, value in figures.items()), flush=True)
        return self.runs[key]

    def take(self, prefix, figure):
        """The values of all runs prefix/0, prefix/1, ..."""
        return [run[figure] for key, run in self.runs.items() if key.rpartition("/")[0] == prefix]


def in_a_process(task, **arguments):
    process = subprocess.run([sys.executable, __file__, "--task", task, json.dumps(arguments)], text=True,
                             capture_output=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    if process.returncode:
        sys.exit(f"{task} failed:\n{process.stderr[-5000:]}")
    return json.loads(process.stdout.splitlines()[-1])  # train.py prints before it


def measure_all(results, needs, parts, pairs, rounds, quick, folder):
    settings, about = needs["settings"], needs["about"]
    lora, scale = settings["lora"], about["whole_tokens"] / about["tokens"]
    if "epoch" in parts:
        for method, epochs in EPOCHS.items():
            for number in range(pairs):
                if method == "lora":
                    results.measure(f"peak/{number}", "peak")
                for side in SIDES:
                    task = {"task": "ours"} if side == "minipeft" else {"task": "peer", "best": side == "best"}
                    results.measure(f"epoch/{method}/{side}/{number}", **task, settings=settings[method] | {
                        "seed": number}, scale=scale / (1 if method == "head" else epochs))
            sizes = {size for side in SIDES for size in results.take(f"epoch/{method}/{side}", "trained_parameters")}
            assert len(sizes) == 1, f"{method}: {sizes} parameters are trained, so these are not the same model"
    if "inference" in parts:
        for number in range(rounds):
            for side in (*SIDES, "minipeft-fp32"):
                results.measure(f"inference/{side}/{number}", "infer", settings=lora, side=side)
    if "ablation" in parts:
        for number in range(rounds):
            for have in range(len(LADDER)):
                results.measure(f"ablation/{have}/{number}", "ablate", scale=scale, without=SPEED_UPS[have:],
                                settings=lora | {"epochs": 1})
    if "growth" in parts:
        for batch in (8, 16) if quick else (8, 16, 32, 64, 128):
            results.measure(f"growth/batch/{batch}", "steps", settings=lora, batch=batch, length=32, count=20)
        for length in (16, 32) if quick else (16, 32, 64, 128, 256, 512):
            results.measure(f"growth/length/{length}", "steps", settings=lora, batch=32, length=length, count=8)
        results.measure("growth/long", "steps", settings=lora, batch=4 if quick else 32, length=256, count=8, shrink=8)
        for limit in (40, 80) if quick else (1000, 3000, about["whole_sentences"]):
            results.measure(f"growth/sentences/{limit}", "ours", settings=lora | {
                "epochs": 1, "limit": limit, "data": lora["data"] if quick else needs["whole_file"]})
        for count in (2000, 4000) if quick else (100_000, 1_000_000):
            results.measure(f"growth/reading/{count}", "reading", settings=lora, whole_file=needs["whole_file"],
                            count=count, folder=folder)


def summarise(results):
    """Put the rows of the tables into `results`: ours beside the others', what else is aimed at, and the ablation."""
    about, runs, rows, aims = results.content["about"], results.runs, [], []
    for label, (prefix, figure, *targets) in TABLE.items():
        values = {side: results.take(f"{prefix}/{side}", figure) for side in SIDES}
        if not all(values.values()):
            continue
        row = {"what": label} | {side: median(values[side]) for side in SIDES}
        for side, target in zip(SIDES, targets):
            times = [other / own for other, own in zip(values[side], values["minipeft"])]
            times = median(1 / value if figure == "sentences_per_second" else value for value in times)
            row[f"times_{side}"] = {"measured": times, "target": target, "met": target and times >= target}
        rows.append(row)

    def aim(what, value, most=None, least=None):
        bound = least or (f"{most:,.0f}" if most > 100 else f"{most:.2g}")
        target = f"at least {bound}" if least else f"at most {bound}"
        aims.append({"what": what, "measured": value, "target": target,
                     "met": value <= most if most else value >= least})

    if own := results.take("epoch/lora/minipeft", "seconds"):
        machine = max(run["bf16"] for key, run in runs.items() if key.startswith("peak/"))
        rate = about["lora_flops"] * EPOCHS["lora"] / min(own) / 1e9
        aim(f"LoRA training, {rate:.0f} of the {machine:.0f} GFLOP/s of bf16 matrix products (%)",
            100 * rate / machine, least=65)
        accuracy = {side: mean(results.take(f"epoch/lora/{side}", "dev_accuracy")) for side in SIDES}
        share = accuracy["minipeft"]  # two standard errors of a difference, for one seed: a wide bound
        noise = 200 * (2 * share * (1 - share) / about["dev_sentences"]) ** 0.5
        for side in SIDES[:2]:
            aim(f"LoRA, dev accuracy {share:.1%}, apart from the {accuracy[side]:.1%} of the {side} side (points)",
                100 * abs(share - accuracy[side]), most=noise)
    if "growth/long" in runs:
        aim("LoRA on all linear layers, 256 tokens, batch 32: peak memory (MB)",
            runs["growth/long"]["peak_memory_mb"], most=3000)
    if reads := [run for key, run in runs.items() if key.startswith("growth/reading/")]:
        aim(f"reading and tokenising {reads[0]['sentences']:,} sentences (s)", reads[0]["seconds"], most=5)
        aim(f"{reads[-1]['sentences']:,} sentences read, split and put into batches: peak memory (MB)",
            reads[-1]["peak_memory_mb"], most=24_000)
    steps = [{"with": label} | {
        figure: median(results.take(f"ablation/{have}", figure)) for figure in ("scaled_seconds", "peak_memory_mb")}
        for have, label in enumerate(LADDER) if results.take(f"ablation/{have}", "seconds")]
    results.content["summary"] = {"table": rows, "aims": aims, "ablation": steps}
    results.save()


def tables(summary):
    """The tables as they stand in the README: lines of Markdown."""
    def amount(value):
        return f"{value:,.1f}" if value < 100 else f"{value:,.0f}"

    def verdict(times):
        target, met = times["target"], "met" if times["met"] else "missed"
        return f"{times['measured']:.2f}" + f" (target {target}: {met})" * bool(target)

    lines = ["| | usual | best | minipeft | times better than usual | than best |", "|---|---|---|---|---|---|"]
    for row in summary["table"]:
        cells = row["what"], *(amount(row[side]) for side in SIDES), *(verdict(row[f"times_{s}"]) for s in SIDES[:2])
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "| | measured | target | |", "|---|---|---|---|"]
    for aim in summary["aims"]:
        met = "met" if aim["met"] else "missed"
        lines.append(f"| {aim['what']} | {amount(aim['measured'])} | {aim['target']} | {met} |")
    lines += ["", "| LoRA | seconds an epoch | peak memory (MB) |", "|---|---|---|"]
    for row in summary["ablation"]:
        lines.append(f"| {row['with']} | {amount(row['scaled_seconds'])} | {amount(row['peak_memory_mb'])} |")
    return lines


def draw(results, folder):
    from minipeft import plots
    seconds = [results.take(f"ablation/{have}", "scaled_seconds") for have in range(len(LADDER))]
    if all(seconds):
        with whole(folder / "ablation.png") as aside:
            plots.steps([(label, median(values), min(values), max(values)) for label, values in zip(LADDER, seconds)],
                        aside, "seconds an epoch of LoRA; bars: median, whiskers: least and most", "s")
    if "growth/long" in results.runs:
        panels = []
        for name, size, y_label in (("batch", "sentences in a batch", "seconds a step"), ("length", "tokens in a "
                                    "sentence", "seconds a step"), ("sentences", "sentences", "seconds an epoch")):
            runs = {int(key.split("/")[2]): run for key, run in results.runs.items()
                    if key.startswith(f"growth/{name}/")}
            panels.append([{"title": title, "x_label": size, "y_label": y_label, "log": title == "time", "series": {
                "lora": [(size, run[figure]) for size, run in runs.items()]}} for title, y_label, figure in (
                    ("time", y_label, "seconds"), ("memory", "peak memory (MB)", "peak_memory_mb"))])
        with whole(folder / "growth.png") as aside:
            plots.growth(panels, aside)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="the parts to measure (all)")
    parser.add_argument("--sentences", metavar="N", type=int, default=1440, help="training sentences of an epoch; "
                        "seconds are also scaled to the whole training set by its tokens (%(default)s)")
    parser.add_argument("--pairs", metavar="N", type=int, default=3, help="rounds of training, each with a seed of "
                        "its own (%(default)s)")
    parser.add_argument("--rounds", metavar="N", type=int, default=2, help="rounds of inference and of the ablation "
                        "(%(default)s)")
    parser.add_argument("--out", metavar="FOLDER", type=Path, default=ROOT / "results",
                        help="where speed.json and the figures go (results)")
    parser.add_argument("--quick", action="store_true", help="everything tiny: shows that it runs, measures nothing")
    parser.add_argument("--task", nargs=2, help=argparse.SUPPRESS)  # NAME and arguments in JSON: a process of its own
    options = parser.parse_args()
    if options.task:
        task, arguments = options.task
        print(json.dumps(globals()[task](**json.loads(arguments))))
        return
    if options.quick:
        options.sentences, options.pairs, options.rounds = 96, 1, 1
        if options.out == ROOT / "results":
            parser.error("--quick measures nothing that should be kept: use another --out")
    options.out.mkdir(parents=True, exist_ok=True)
    results = Results(options.out / "speed.json", {
        name: getattr(options, name) for name in ("sentences", "pairs", "rounds", "quick")})
    with tempfile.TemporaryDirectory() as folder:
        needs = in_a_process("prepare", folder=folder, sentences=options.sentences,
                             held_out=64 if options.quick else None)
        results.content["about"] = needs["about"]
        measure_all(results, needs, options.only, options.pairs, options.rounds, options.quick, folder)
    summarise(results)
    print("", *tables(results.content["summary"]), sep="\n")
    draw(results, options.out / "speed")


if __name__ == "__main__":
    main()
