"""Measure time and memory of minipeft beside the usual stack, transformers Trainer + peft, on this machine's CPU.

    pip install -r requirements.txt -r benchmarks/requirements.txt
    python benchmarks/speed.py            results/speed-<processor>.json; resumes after an interruption
    python benchmarks/speed.py --quick --out /tmp/speed

Three sides train the same model on the same token ids with the same batch size, rates, dropout and AdamW; usual and
best are called the peers:

    usual      Trainer + peft: shuffled batches padded to their longest sentence, fp32, fused attention (sdpa)
    best       the same with batches grouped by length, and the fastest of {fp32, bf16} x {eager, sdpa} in a short
               trial on this machine
    minipeft   train.py with its defaults

Each measurement is a process of its own, and the sides take turns. Training runs on a sample of the default data;
seconds are those of the training loop, scaled to a whole epoch by the number of tokens (long texts: a step). Memory
is the peak of the process, and the first step is timed from the start of the program. The peers do no evaluation,
logging or saving. Adapters are minipeft's on all sides; the usual way to tune a head is Trainer on a frozen encoder.
Nothing else should run on the machine meanwhile.
"""
import time
STARTED = time.time()  # before the imports: they belong to the time to the first step

import argparse
import csv
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # torch, minipeft and transformers are imported in the process that needs them

SIDES = ("usual", "best", "minipeft")
SPINS = {"": "waiting threads give way (minipeft)", "30000000000": "waiting threads spin for ever"}
EQUAL = 0.03                 # figures this close to each other are called equal
EPOCHS = {"lora": 1, "adapter": 1, "full": 1, "head": 3}  # head tuning encodes once and caches the result
USUAL = {"precision": "fp32", "attention": "sdpa", "grouped": False}
TRIAL = [{"precision": precision, "attention": attention, "grouped": True}
         for precision in ("fp32", "bf16") for attention in ("eager", "sdpa")]
EMULATED = 4  # bf16 is not tried where its matrix product is so many times slower: a step would take a minute
LADDER = [  # what is added to the plain loop, one by one, and whether only in bf16
    ("plain loop, shuffled batches", {}, False),
    ("batches of similar length", {"grouped": True}, False),
    ("matrix products in bf16", {"precision": "bf16"}, True),
    ("LoRA's gradient by hand", {"twins": ["FastLoRALinear"]}, False),
    ("attention for bf16", {"twins": ["FastLoRALinear", "FastAttention"]}, True),
    ("lengths in multiples of 8", {"multiple": 8}, True),
]
CAST = {"each pass": ["FastAttention"], "once": ["FastAttention", "CastOnceLinear"]}  # of frozen weights, with adapters


# -- what all sides share ---------------------------------------------------------------------------------

def time_first_step():
    """A list that receives the seconds from the start of the program to the end of the first optimiser step."""
    from torch.optim.optimizer import register_optimizer_step_post_hook
    first = []
    register_optimizer_step_post_hook(lambda *_: first or first.append(time.time() - STARTED))
    return first


def count_flops(lengths, config, rank=8, bottleneck=32):
    """Floating-point operations of a pass over these sentences, without padding: {what is done: FLOP}.

    A product of (m, k) and (k, n) is 2 m k n. T tokens in sentences of length L, hidden h, feed-forward f, n blocks.
    Backward repeats the products of forward (attention's twice: both factors depend on what is trained), and again for
    the gradients of what is trained. The few products of the first block that need no gradient are counted too. Norms,
    GELU, softmax, embeddings, optimiser and head are not counted.
    """
    h, f, n = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    tokens = int(lengths.sum())
    linear = n * tokens * 2 * (4 * h * h + 2 * h * f)                    # the six matrices W
    low_rank = n * tokens * 2 * rank * (4 * (h + h) + 2 * (h + f))       # A and B beside each of them
    adapters = n * tokens * 2 * 2 * (2 * bottleneck * h)                 # two in each block
    attention = n * int((lengths.astype(int) ** 2).sum()) * 2 * (h + h)  # scores, and the weighted sum of the values
    return {"inference": linear + attention, "full": 3 * (linear + attention),
            "lora": 2 * linear + 3 * (low_rank + attention), "adapter": 2 * linear + 3 * (adapters + attention)}


def read(settings):
    """Return (corpus, train, dev). It does not import train.py, which the peers do not need."""
    from minipeft import data
    from minipeft.tools import texts
    corpus = texts.read_corpus([settings["data"]], data.load_tokenizer(settings["weights"], settings["max_length"]))
    train_set, dev_set, _ = data.split(corpus, settings["fold"])
    return corpus, train_set[:settings["limit"]], dev_set


def vector_flags():
    """The vector instructions of the processor, as Linux lists them."""
    path = Path("/proc/cpuinfo")
    flags = re.search(r"^(?:flags|Features)\s*:(.*)$", path.read_text() if path.is_file() else "", re.MULTILINE)
    kinds = ("avx", "amx", "fma", "f16c", "asimd", "sve", "bf16", "i8mm")
    return sorted(flag for flag in flags[1].split() if flag.startswith(kinds)) if flags else []


def prepare(folder, steps, trial_steps, long, long_steps, held_out):
    """Write the sentences and the long texts to train on. Return the settings of all runs, and facts about them."""
    from importlib.metadata import version
    import numpy as np
    import torch
    from minipeft import bert, data
    from minipeft.tools import download, settings as options, texts
    from minipeft.tools.fast import processor
    weights = download.find_weights(None)
    corpus = texts.read_corpus([download.fetch_data()], data.load_tokenizer(weights, 128))
    training, dev, test = data.split(corpus)
    rows = np.random.default_rng(0).permutation(training)[:32 * steps]

    def settings(technique, name, rows, labels, *more):
        path = Path(folder, name)
        with open(path, "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("text", "label"), *zip(rows, labels)])
        words = ["--data", path, "--weights", weights, "--device", "cpu", "--out", Path(folder, "run"), "--overwrite",
                 "--epochs", EPOCHS[technique], *more]
        return vars(options.parse([technique, *map(str, words)]))

    chosen = np.concatenate([rows, dev[:held_out], test[:32]])  # a hash of its text puts each into the same set again
    sentences, labels = texts.read_texts(corpus, chosen), [corpus.classes[label] for label in corpus.labels[chosen]]
    runs = {name: settings(name, "sample.csv", sentences, labels) for name in EPOCHS}
    runs["trial"] = runs["lora"] | {"limit": 32 * trial_steps}
    for tokens in long:
        joined = [" ".join(texts.read_texts(corpus, training[first:first + tokens // 16]))
                  for first in range(50 * long_steps + 50)]
        runs[f"long-{tokens}"] = settings("lora", f"{tokens}.csv", joined, ["even", "odd"] * (len(joined) // 2),
                                          "--max-length", tokens, "--limit", 32 * long_steps)
    return {"settings": runs, "about": {
        "processor": processor("cpu"), "flags": vector_flags(), "cores": os.cpu_count(),
        "threads": torch.get_num_threads(), "python": sys.version.split()[0],
        "versions": {name: version(name) for name in ("torch", "transformers", "peft", "accelerate", "tokenizers")},
        "sentences": len(rows), "tokens": int(corpus.lengths[rows].sum()), "whole_sentences": len(training),
        "whole_tokens": int(corpus.lengths[training].sum()),
        "flops": count_flops(corpus.lengths[rows], bert.read_config(weights)),
        "dev_flops": count_flops(np.concatenate([corpus.lengths[dev], corpus.lengths[test]]),
                                 bert.read_config(weights))["inference"], "dev_sentences": len(dev) + len(test)}}


def peak():
    """GFLOP/s of the matrix product of a feed-forward layer in each precision, and the one that minipeft chooses."""
    import torch
    from minipeft.tools import fast
    rates = {name: fast.product_rate(896, 384, 1536, dtype, seconds=1)
             for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))}
    return rates | {"chosen": fast.fastest_precision("cpu", 384, 1536)[0]}


# -- the sides --------------------------------------------------------------------------------------------

def ours(settings):
    """Train as train.py does. It also times inference on dev, with LoRA merged."""
    first = time_first_step()
    import train
    record = train.run(argparse.Namespace(**settings))
    metrics = {name: record["metrics"][name] for name in ("peak_memory_mb", "sentences_per_second")}
    return metrics | {"seconds": record["metrics"]["train_seconds"], "first_step_seconds": first[0],
                      "trained": record["parameters"]["trainable"], "precision": record["machine"]["precision"]}


def loop(settings, grouped=False, precision="fp32", twins=(), multiple=1):
    """Train an epoch with chosen speed-ups, through the functions of train.py, without evaluation and saving."""
    import numpy as np
    import torch
    import train
    from minipeft import data, model as models
    from minipeft.tools import fast
    corpus, train_set, _ = read(settings)
    settings = argparse.Namespace(**settings)
    model = models.build(settings, len(corpus.classes), settings.weights)
    compute = models.Compute("cpu", precision, multiple)
    fast.speed_up(model.train(), compute, [getattr(fast, name) for name in twins])
    optimizer, labels = train.make_optimizer(model, settings), torch.from_numpy(corpus.labels)
    rng = np.random.default_rng(0)
    if grouped:
        batches = data.batches_of_like_length(corpus.lengths[train_set], settings.batch_size, rng)
    else:
        batches = np.array_split(rng.permutation(len(train_set)), len(train_set) // settings.batch_size)
    began = time.perf_counter()
    for batch in batches:
        with compute.autocast():
            logits = model(*compute.pad(corpus.sentences(train_set[batch])))
        loss = torch.nn.functional.cross_entropy(logits, labels[train_set[batch]])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(models.trained(model).values(), settings.clip)
        optimizer.step()
        optimizer.zero_grad()
    return {"seconds": time.perf_counter() - began, "peak_memory_mb": fast.peak_memory("cpu")}


def peer_model(settings, attention):
    """The classifier of model.build, with a transformers encoder and, for LoRA, peft."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import BertModel
    from minipeft import adapter, head

    class PeerClassifier(head.Classifier):
        def forward(self, input_ids, attention_mask=None, labels=None):  # the signature that Trainer expects
            logits = super().forward(input_ids, attention_mask)
            if labels is None:
                return logits
            return {"loss": torch.nn.functional.cross_entropy(logits, labels), "logits": logits}

    encoder = BertModel.from_pretrained(settings["weights"], add_pooling_layer=False, hidden_dropout_prob=0.0,
                                        attention_probs_dropout_prob=0.0, attn_implementation=attention)
    torch.manual_seed(settings["seed"])
    if settings["technique"] == "lora":
        targets = ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"]
        encoder = get_peft_model(encoder, LoraConfig(
            r=settings["rank"], lora_alpha=settings["alpha"], target_modules=targets))
    elif settings["technique"] == "adapter":
        adapter.add_adapters(encoder, "output.dense", settings["bottleneck"], settings["init_std"], "output.LayerNorm")
    elif settings["technique"] == "head":
        head.freeze(encoder)
    return PeerClassifier(encoder, 2, settings["pooling"], settings["head_dropout"])


def peer(settings, side):
    """Train with transformers' Trainer. For LoRA also time inference on dev, merged, in batches of 32."""
    first, times = time_first_step(), {}
    import numpy as np
    import torch
    import transformers
    corpus, train_set, dev_set = read(settings)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=f"{settings['weights']}/tokenizer.json", pad_token="[PAD]")
    collate, bf16 = transformers.DataCollatorWithPadding(tokenizer), side["precision"] == "bf16"

    def examples(indices):
        return [{"input_ids": ids.tolist(), "attention_mask": [1] * len(ids), "labels": int(label)}
                for ids, label in zip(corpus.sentences(indices), corpus.labels[indices])]

    class Clock(transformers.TrainerCallback):
        def on_train_begin(self, *_, **__):
            times["began"] = time.perf_counter()

        def on_train_end(self, *_, **__):
            times["ended"] = time.perf_counter()

    model = peer_model(settings, side["attention"])
    arguments = transformers.TrainingArguments(
        settings["out"] + "-peer", num_train_epochs=settings["epochs"], learning_rate=settings["lr"], use_cpu=True,
        per_device_train_batch_size=settings["batch_size"], warmup_steps=settings["warmup"], bf16=bf16,
        weight_decay=settings["weight_decay"], max_grad_norm=settings["clip"], optim="adamw_torch_fused",
        lr_scheduler_type=settings["schedule"], seed=settings["seed"], save_strategy="no", logging_strategy="no",
        train_sampling_strategy="group_by_length" if side["grouped"] else "random", report_to=[], disable_tqdm=True)
    transformers.Trainer(model, arguments, collate, examples(train_set), callbacks=[Clock()]).train()
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    from minipeft.tools.fast import peak_memory  # after the timed part
    figures = {"side": side, "seconds": times["ended"] - times["began"], "first_step_seconds": first[0],
               "peak_memory_mb": peak_memory("cpu"), "trained": trained}
    if settings["technique"] == "lora":
        model.encoder = model.eval().encoder.merge_and_unload()
        if side["grouped"]:
            dev_set = dev_set[np.argsort(-corpus.lengths[dev_set])]
        loader = torch.utils.data.DataLoader(examples(dev_set), settings["batch_size"], collate_fn=collate)
        began = time.perf_counter()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            for batch in loader:
                model(batch["input_ids"], batch["attention_mask"])
        figures["sentences_per_second"] = len(dev_set) / (time.perf_counter() - began)
    return figures


# -- measuring --------------------------------------------------------------------------------------------

def start(task, threads=None, spin=None, **arguments):
    """Start a task, a function of this file, in a process of its own. spin: GNU OpenMP's GOMP_SPINCOUNT."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1"} | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
    if spin:
        environment["GOMP_SPINCOUNT"] = spin
    return subprocess.Popen([sys.executable, __file__, "--task", task, json.dumps(arguments)], text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)


def result(process):
    """Wait for a task and return its result, a dict."""
    output, errors = process.communicate()
    if process.returncode:
        sys.exit(f"{' '.join(process.args[2:4])} failed:\n{errors[-5000:]}")
    return json.loads(output.splitlines()[-1])  # train.py prints before it


def at_once(settings, processes, threads):
    """Seconds from the start to the last exit of several simultaneous runs of train.py, each with `threads` threads."""
    began = time.perf_counter()
    running = [start("ours", threads, settings=settings | {"out": f"{settings['out']}-{number}"})
               for number in range(processes)]
    for process in running:
        result(process)
    return {"seconds": time.perf_counter() - began, "processes": processes, "threads": threads}


def with_neighbour(settings, spin, busy):
    """Train, beside another process that keeps one core busy if `busy`. spin: "" for minipeft's own choice."""
    other = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if busy else None
    try:
        return result(start("ours", spin=spin, settings=settings))
    finally:
        if other:
            other.kill()


class Results:
    """A results file {"options", "about", "runs": {key: figures}}, saved after each measurement."""

    def __init__(self, path, options, about):
        from minipeft.tools.files import read_json
        self.path, self.content = path, {"options": options, "about": about, "runs": {}}
        if path.is_file():
            before, now = read_json(path, self.content), options | about
            differ = [name for name, value in now.items() if (before["options"] | before["about"]).get(name) != value]
            if differ:
                sys.exit(f"{path} was measured with other {', '.join(differ)}: move it away, or use another --out")
            self.content = before
        self.runs = self.content["runs"]

    def measure(self, key, task, **arguments):
        """The figures of a task, measured now unless the file has them."""
        from minipeft.tools.files import write_json
        if key not in self.runs:
            function = {"at_once": at_once, "with_neighbour": with_neighbour}.get(task)
            self.runs[key] = function(**arguments) if function else result(start(task, **arguments))
            write_json(self.path, self.content)
            print(key, json.dumps(self.runs[key]), flush=True)
        return self.runs[key]


def fastest_trial(runs):
    """The configuration of the peers that was fastest in the trial."""
    return min((run for key, run in runs.items() if key.startswith("trial/")), key=lambda run: run["seconds"])["side"]


def measure_all(results, settings, pairs):
    measure, cores = results.measure, os.cpu_count()
    rates = measure("peak/0", "peak")
    for number, side in enumerate(TRIAL):
        if side["precision"] == "fp32" or rates["bf16"] * EMULATED > rates["fp32"]:
            measure(f"trial/{number}", "peer", settings=settings["trial"], side=side)
    peers = {"usual": USUAL, "best": fastest_trial(results.runs)}
    long = [f"long-{tokens}" for tokens in results.content["options"]["long"]]
    for pair in range(pairs):
        measure(f"peak/{pair}", "peak")
        for part in (*EPOCHS, *long):
            for name, side in peers.items():
                measure(f"{part}/{name}/{pair}", "peer", settings=settings[part], side=side)
            measure(f"{part}/minipeft/{pair}", "ours", settings=settings[part])
            sizes = {results.runs[f"{part}/{side}/{pair}"]["trained"] for side in SIDES}
            assert len(sizes) == 1, f"{part}: {sizes} parameters are trained, so these are not the same model"
        have = {}
        for rung, (_, added, only_bf16) in enumerate(LADDER):
            if rates["chosen"] == "bf16" or not only_bf16:
                have |= added
                measure(f"ladder/{rung}/{pair}", "loop", settings=settings["lora"], **have)
        for name, twins in CAST.items() if rates["chosen"] == "bf16" else ():
            measure(f"cast/{name}/{pair}", "loop", settings=settings["adapter"], **have | {"twins": twins})
        for part in long:
            measure(f"{part}/plain/{pair}", "loop", settings=settings[part], grouped=True, precision=rates["chosen"])
        for spin in SPINS:
            for busy in (False, True):
                measure(f"neighbour/{spin or 'ours'}/{'busy' if busy else 'quiet'}/{pair}", "with_neighbour",
                        settings=settings["lora"], spin=spin, busy=busy)
        measure(f"jobs/1/{pair}", "at_once", settings=settings["lora"], processes=1, threads=cores)
        measure(f"jobs/2/{pair}", "at_once", settings=settings["lora"], processes=2, threads=max(cores // 2, 1))


# -- tables -----------------------------------------------------------------------------------------------

@dataclass
class Row:
    """A row of the main table."""
    label: str
    part: str
    figure: str


ROWS = [Row("LoRA, seconds an epoch", "lora", "seconds"),
        Row("adapters, seconds an epoch", "adapter", "seconds"),
        Row("full fine-tuning, seconds an epoch", "full", "seconds"),
        Row("head tuning, seconds for 3 epochs", "head", "seconds"),
        Row("inference, sentences a second", "lora", "sentences_per_second"),
        Row("LoRA, peak memory (MB)", "lora", "peak_memory_mb"),
        Row("LoRA, seconds from the command to the first step", "lora", "first_step_seconds")]


def tables(content):
    """The tables of a complete results file for benchmarks/README.md, as lines of Markdown."""
    about, options, runs = content["about"], content["options"], content["runs"]
    scales = dict.fromkeys([*EPOCHS, "ladder", "cast"], about["whole_tokens"] / about["tokens"])
    rows = list(ROWS)
    for tokens in options["long"]:
        part = f"long-{tokens}"
        scales[part] = 1 / options["long_steps"]
        rows.append(Row(f"LoRA at {tokens} tokens, seconds a step", part, "seconds"))
        rows.append(Row(f"LoRA at {tokens} tokens, peak memory (MB)", part, "peak_memory_mb"))

    def values(key, figure="seconds"):
        scale = scales.get(key.split("/")[0], 1) if figure == "seconds" else 1
        return [scale * runs[f"{key}/{pair}"][figure] for pair in range(options["pairs"])]

    def cell(key, figure="seconds"):
        middle = median(values(key, figure))
        return f"{middle:.1f}" if middle < 100 else f"{middle:,.0f}"

    precision, best = runs["lora/minipeft/0"]["precision"], fastest_trial(runs)
    trial = [f"{run['side']['precision']} {run['side']['attention']} {run['seconds']:.1f} s"
             for key, run in runs.items() if key.startswith("trial/")]
    lines = [f"{about['processor']}, {about['threads']} threads ({', '.join(about['flags'])}); "
             + ", ".join(f"{name} {number}" for name, number in about["versions"].items()) + ". "
             f"Medians of {options['pairs']}. minipeft computes in {precision}. Best configuration of the usual stack: "
             f"{best['precision']}, {best['attention']} (trial of {options['trial_steps']} LoRA steps: "
             f"{', '.join(trial)}{'' if len(trial) == len(TRIAL) else '; bf16 is emulated here and was not tried'}).",
             "", "| | usual | best | minipeft | times better than usual | than best | share of the speed of matrix "
             "products |", "|---|---|---|---|---|---|---|"]
    fastest = max(median(values("peak", name)) for name in ("fp32", "bf16"))  # GFLOP/s
    for row in rows:
        cells = [row.label] + [cell(f"{row.part}/{side}", row.figure) for side in SIDES]
        for side in ("usual", "best"):
            pairs = zip(values(f"{row.part}/{side}", row.figure), values(f"{row.part}/minipeft", row.figure))
            times = median(own / other if row.figure == "sentences_per_second" else other / own for other, own in pairs)
            cells.append("equal" if abs(times - 1) <= EQUAL else f"{times:.2f}")
        share = ""
        if row.figure == "seconds" and row.part in about.get("flops", ()):  # files of 2026-11 lack these counts
            share = about["flops"][row.part] / median(runs[f"{row.part}/minipeft/{pair}"]["seconds"]
                                                      for pair in range(options["pairs"]))
        if row.figure == "sentences_per_second" and "dev_flops" in about:
            share = about["dev_flops"] / about["dev_sentences"] * median(values("lora/minipeft", row.figure))
        cells.append(share and f"{share / 1e9 / fastest:.0%}")
        lines.append(f"| {' | '.join(cells)} |")

    lines += ["", "| LoRA, added one by one | seconds an epoch | times the row above | peak memory (MB) |",
              "|---|---|---|---|"]
    before = None
    for rung, (label, _, _) in enumerate(LADDER):
        if f"ladder/{rung}/0" in runs:
            seconds = values(f"ladder/{rung}")
            gain = median(old / new for old, new in zip(before or seconds, seconds))
            memory = cell(f"ladder/{rung}", "peak_memory_mb")
            lines.append(f"| {label} | {cell(f'ladder/{rung}')} | {gain:.2f} | {memory} |")
            before = seconds

    if "cast/once/0" in runs:
        lines += ["", "| adapters, frozen weights cast | seconds an epoch |", "|---|---|",
                  *(f"| {name} | {cell(f'cast/{name}')} |" for name in CAST)]

    rates = {name: median(values("peak", name)) for name in ("fp32", "bf16")}
    lines += ["", "| LoRA | |", "|---|---|",
              f"| GFLOP/s of matrix products | fp32 {rates['fp32']:.0f}, bf16 {rates['bf16']:.0f} |",
              *(f"| {tokens} tokens, plain modules | {cell(f'long-{tokens}/plain')} s a step, "
                f"{cell(f'long-{tokens}/plain', 'peak_memory_mb')} MB |" for tokens in options["long"])]
    for number, words in ((1, "one after the other"), (2, "two at once")):
        threads, seconds = runs[f"jobs/{number}/0"]["threads"], median(values(f"jobs/{number}"))
        lines.append(f"| runs of {32 * options['steps']} sentences an hour, {words}, threads each: {threads} | "
                     f"{number * 3600 / seconds:.0f} |")
    if "neighbour/ours/quiet/0" not in runs:
        return lines
    lines += ["", f"| {32 * options['steps']} sentences, seconds | quiet | one busy neighbour | times |",
              "|---|---|---|---|"]
    for spin, words in SPINS.items():
        quiet, busy = (median(values(f"neighbour/{spin or 'ours'}/{name}")) for name in ("quiet", "busy"))
        lines.append(f"| {words} | {quiet:.1f} | {busy:.1f} | {busy / quiet:.2f} |")
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", metavar="N", type=int, default=3, help="measurements of each side (%(default)s)")
    parser.add_argument("--steps", metavar="N", type=int, default=20, help="steps of 32 sentences (%(default)s)")
    parser.add_argument("--long", metavar="N", type=int, nargs="+", default=[256, 512],
                        help="tokens of long texts (256 512)")
    parser.add_argument("--out", metavar="FOLDER", type=Path, default=ROOT / "results", help="(results)")
    parser.add_argument("--quick", action="store_true", help="everything tiny: shows that it runs, measures nothing")
    parser.add_argument("--task", nargs=2, help=argparse.SUPPRESS)  # name and arguments in JSON: a process of its own
    arguments = parser.parse_args()
    if arguments.task:
        task, given = arguments.task
        print(json.dumps(globals()[task](**json.loads(given))))
        return
    sizes = {"steps": arguments.steps, "trial_steps": 8, "long": arguments.long, "long_steps": 3, "held_out": 480}
    if arguments.quick:
        if arguments.out == ROOT / "results":
            parser.error("--quick measures nothing worth keeping: use another --out")
        sizes, arguments.pairs = {"steps": 2, "trial_steps": 1, "long": [48], "long_steps": 1, "held_out": 32}, 1
    with tempfile.TemporaryDirectory() as folder:
        needs = result(start("prepare", folder=folder, **sizes))
        name = re.sub("[^a-z0-9]+", "-", needs["about"]["processor"].lower())
        options = {"pairs": arguments.pairs, **sizes}
        results = Results(arguments.out / f"speed-{name}.json", options, needs["about"])
        measure_all(results, needs["settings"], arguments.pairs)
    print("", *tables(results.content), sep="\n")


if __name__ == "__main__":
    main()
