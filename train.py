"""Train head, adapters, LoRA or everything on labelled sentences: one loop for every technique.

    python train.py lora                        the default weights and data, about three minutes on a laptop
    python train.py adapter --data my.csv       your own sentences
    python -m minipeft runs/lora-fold0 "a gripping film"
"""
import argparse
import math
import sys
from pathlib import Path

# What each technique is trained with unless an option says otherwise, and the only ones of these options that it
# has. LoRA and adapters are of nearly the same size. The papers' full fine-tuning has dropout in the encoder; with
# so few parameters the others do without, which is faster.
DEFAULTS = {
    "head": {"lr": 8e-3},
    "adapter": {"lr": 5e-4, "targets": ["attention.output", "feed_forward.output"], "bottleneck": 32,
                "init_std": 1e-2, "norms": ["attention.norm", "feed_forward.norm"], "dropout": 0.0, "top_layers": None},
    "lora": {"lr": 2.5e-4, "targets": ["query", "key", "value", "attention.output", "intermediate",
                                       "feed_forward.output"],
             "rank": 8, "alpha": 16.0, "lora_dropout": 0.0, "rslora": False, "dropout": 0.0, "top_layers": None},
    "bitfit": {"lr": 4e-3, "dropout": 0.0, "top_layers": None},
    "full": {"lr": 2.5e-5, "dropout": 0.1, "top_layers": None},
}
DIVERGED = 3         # the exit code of a run whose loss does not stay finite; that of a user's mistake is 2
READ_EVERY = 10      # steps between looks at the loss: on a GPU each look has to wait for it
TRAIN_SAMPLE = 1000  # sentences of the training set that training loss and accuracy are measured on
METRICS = ("method", "seed", "epochs", "train_loss", "train_accuracy", "dev_loss", "dev_accuracy", "test_loss",
           "test_accuracy", "technique_parameters", "head_parameters", "trainable_parameters", "total_parameters",
           "trainable_percent", "train_seconds", "step_milliseconds", "sentences_per_second", "peak_memory_mb",
           "saved_bytes", "device", "precision")


class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: {message} (--help lists the options)\n")


def number(kind, low, high=math.inf):
    """An argparse type: a number between low and high, both allowed."""
    def parse_number(text):
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not between {low} and {high}" if high < math.inf
                                             else f"{text} is not a number from {low} up")
        return value
    parse_number.__name__ = "whole number" if kind is int else "number"  # argparse says "invalid ... value"
    return parse_number


def parse(arguments):
    """The settings of a run, from its command line: an argparse.Namespace."""
    parser = Parser(prog="train.py", usage="python train.py {head,adapter,lora,bitfit,full} [options]",
                    description="Fine-tune a small BERT to classify sentences. Defaults stand in brackets.",
                    allow_abbrev=False,  # compare.py looks for options by their whole names
                    formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=30, width=100))
    parser.add_argument("method", choices=DEFAULTS, metavar="method", help="what is trained: head (the last two layers "
                        "only), adapter, lora or bitfit (each with the head), or full (everything)")
    count, rate, positive = number(int, 1), number(float, 0, 1), number(float, 1e-12)

    def default(option):  # of every technique that has this option
        values = {name: " ".join(map(str, v[option])) if isinstance(v[option], list) else v[option]
                  for name, v in DEFAULTS.items() if option in v}
        return str(*values.values()) if len(values) == 1 else ", ".join(f"{k} {v}" for k, v in values.items())

    group = parser.add_argument_group("weights and data")
    group.add_argument("--weights", metavar="FOLDER", help="a folder of BERT weights, or a name on the Hugging Face "
                       "Hub (all-MiniLM-L6-v2, fetched once)")
    group.add_argument("--data", metavar="FILE", help="CSV, TSV or JSON-lines file of labelled sentences (movie "
                       "reviews, fetched once)")
    group.add_argument("--test", metavar="FILE", help="a file to test on (a part of the data is kept for that)")
    group.add_argument("--text-column", metavar="NAME", help="name of the column of texts (text)")
    group.add_argument("--label-column", metavar="NAME", help="name of the column of labels (label)")
    group.add_argument("--fold", metavar="I", type=number(int, 0, 9), help="which tenth to test on, 0 to 9 (0)")
    group.add_argument("--max-length", metavar="N", type=number(int, 3), default=128,
                       help="tokens that a sentence is cut to (%(default)s)")
    group.add_argument("--limit", metavar="N", type=number(int, 2), help="train on N sentences chosen at random (all)")

    group = parser.add_argument_group("training")
    group.add_argument("--epochs", metavar="N", type=number(int, 0), default=3,
                       help="passes over the training set (%(default)s)")
    group.add_argument("--lr", metavar="X", type=positive, help=f"highest learning rate ({default('lr')})")
    group.add_argument("--batch-size", metavar="N", type=count, default=32, help="sentences a step (%(default)s)")
    group.add_argument("--warmup", metavar="X", type=rate, default=0.1,
                       help="share of the steps in which the rate rises (%(default)s)")
    group.add_argument("--schedule", choices=("linear", "constant"), default="linear",
                       help="the rate after that: it falls to 0, or stays (%(default)s)")
    group.add_argument("--weight-decay", metavar="X", type=number(float, 0), default=0.01,
                       help="AdamW's, on matrices only (%(default)s)")
    group.add_argument("--clip", metavar="X", type=positive, default=1.0,
                       help="a gradient longer than this is scaled down to it (%(default)s)")
    group.add_argument("--dropout", metavar="X", type=rate, help=f"dropout in the encoder ({default('dropout')})")
    group.add_argument("--head-dropout", metavar="X", type=rate, default=0.1, help="dropout in the head (%(default)s)")
    group.add_argument("--pooling", choices=("mean", "cls"), default="mean",
                       help="what the head sees: the mean of a sentence's tokens, or [CLS] (%(default)s)")
    group.add_argument("--seed", metavar="N", type=number(int, 0), default=0, help="of everything random (%(default)s)")

    group = parser.add_argument_group("techniques")
    group.add_argument("--rank", metavar="R", type=count, help=f"LoRA: rank of the update ({default('rank')})")
    group.add_argument("--alpha", metavar="X", type=positive,
                       help=f"LoRA: the update is scaled by alpha / rank ({default('alpha')})")
    group.add_argument("--lora-dropout", metavar="X", type=rate,
                       help=f"LoRA: dropout on what the update sees ({default('lora_dropout')})")
    group.add_argument("--rslora", action="store_true", default=None, help="LoRA: scale by alpha / sqrt(rank)")
    group.add_argument("--bottleneck", metavar="M", type=count,
                       help=f"adapters: width of the bottleneck ({default('bottleneck')})")
    group.add_argument("--init-std", metavar="X", type=positive,
                       help=f"adapters: spread of the first weights ({default('init_std')})")
    group.add_argument("--norms", nargs="*", metavar="NAME", help="adapters: the LayerNorms trained with them, by the "
                       f"end of their names ({default('norms')})")
    group.add_argument("--targets", nargs="+", metavar="NAME", help="the linear layers that take part, by the end of "
                       f"their names; LoRA's paper has: query value ({default('targets')})")
    group.add_argument("--top-layers", metavar="K", type=count, help="train in the top K blocks only (all)")

    group = parser.add_argument_group("the run")
    group.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto",
                       help="where to train (%(default)s)")
    group.add_argument("--precision", choices=("auto", "bf16", "fp32"), default="auto",
                       help="of the linear layers: auto is bf16 where the hardware has it, fp32 repeats to the bit "
                       "on a CPU (%(default)s)")
    group.add_argument("--out", metavar="FOLDER", help="folder of the run (runs/METHOD-foldI; with --test, "
                       "runs/METHOD-seedN)")
    group.add_argument("--save-every", metavar="STEPS", type=count, default=100,
                       help="how often to save the state (%(default)s)")
    group.add_argument("--resume", action="store_true", help="go on with an unfinished run")
    group.add_argument("--overwrite", action="store_true", help="replace a run that is there already")

    settings = parser.parse_args(arguments)
    defaults = DEFAULTS[settings.method]
    for option in sorted({option for values in DEFAULTS.values() for option in values}):
        if option in defaults:
            if getattr(settings, option) is None:
                setattr(settings, option, defaults[option])
        elif getattr(settings, option) is None:
            delattr(settings, option)  # settings.json holds what took part, and nothing else
        else:
            parser.error(f"--{option.replace('_', '-')} is no option of {settings.method}")
    if settings.test and settings.fold is not None:
        parser.error("--fold picks a test set from the data, but --test names one; repeat a run with --seed instead")
    if settings.test and not settings.data:
        parser.error("--test needs --data, a file of the same labels to train on")
    if not settings.test and settings.fold is None:
        settings.fold = 0
    if settings.out is None:
        repeat = f"seed{settings.seed}" if settings.test else f"fold{settings.fold}"
        settings.out = f"runs/{settings.method}-{repeat}"
    return settings


if __name__ == "__main__":
    SETTINGS = parse(sys.argv[1:])  # before the slow imports, so that --help and typing errors are answered at once

import platform
import time
from collections import deque
from functools import partial

import numpy as np
import safetensors
import tokenizers
import torch
import torch.nn.functional as F
from tqdm import tqdm

from minipeft import checkpoint, data, download, plots
from minipeft.adapter import Adapter
from minipeft.bert import frozen_to_bf16, has_bf16
from minipeft.lora import LoRALinear, merge_lora


# -- before training --------------------------------------------------------------------------------------

def choose_device(settings):
    """(device, whether to multiply in bf16). ValueError for a device that is not there."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    device = next(name for name in there if there[name]) if settings.device == "auto" else settings.device
    if not there[device]:
        raise ValueError(f"--device {device}: not available here; there is "
                         + " and ".join(name for name in there if there[name]))
    return device, settings.precision == "bf16" or settings.precision == "auto" and has_bf16(device)


def describe(model):
    """What was swapped, as lines to print, and the parameter counts as they stand in metrics.json."""
    groups = {}
    for name, module in model.encoder.named_modules():
        if isinstance(module, LoRALinear):
            became = f"Linear + LoRA, rank {module.lora_A.shape[0]}"
        elif isinstance(module, Adapter):
            became = f"Linear + adapter, bottleneck {module.down.out_features}"
        elif hasattr(module, "adapter_base"):
            became = "LayerNorm, trained"
        elif [part for part, value in module.named_parameters(recurse=False) if value.requires_grad] == ["bias"]:
            became = f"{type(module).__name__}, bias trained"
        else:
            continue
        new = sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
        group = ".".join("*" if part.isdigit() else part for part in name.split("."))
        groups.setdefault((group, became, new), []).append(name)
    lines = [f"{'module':<36}{'became':<34}new parameters"] if groups else []
    for (group, became, new), names in groups.items():
        lines.append(f"{group:<36}{became:<34}{len(names)} x {new:,} = {len(names) * new:,}")
    head = sum(parameter.numel() for parameter in model.head.parameters())
    trainable = sum(parameter.numel() for parameter in checkpoint.trained(model).values())
    total = sum(parameter.numel() for parameter in model.parameters())
    return lines, {"technique_parameters": trainable - head, "head_parameters": head, "trainable_parameters": trainable,
                   "total_parameters": total, "trainable_percent": 100 * trainable / total}


# -- the loop ---------------------------------------------------------------------------------------------

class Forward:
    """A classifier on a corpus: the forward pass for training, and for evaluation.

    An encoder that is frozen as a whole (head tuning) says the same of a sentence every time. It is asked
    once, without dropout, and what it said is kept: after that a step costs only what the head costs.
    """

    def __init__(self, model, corpus, device, bf16):
        self.model, self.corpus, self.device, self.bf16 = model, corpus, device, bf16
        self.frozen = not any(parameter.requires_grad for parameter in model.encoder.parameters())
        if self.frozen:
            self.features = torch.zeros(len(corpus), model.head.dense.in_features, device=device)
            self.known = np.zeros(len(corpus), bool)

    def encode(self, rows):
        """If the encoder is frozen, make sure that the features of these sentences are there."""
        rows = rows[~self.known[rows]] if self.frozen else rows[:0]
        if len(rows):
            self.model.eval()
            bar = partial(tqdm, desc="encoding once", unit=" batches", leave=False, disable=None)
            features = data.predict(self.model.features, self.corpus.sentences(rows), self.device, self.bf16, bar)
            self.features[rows] = torch.from_numpy(features).to(self.device)
            self.known[rows] = True

    def logits(self, rows):
        """For a training step: (len(rows), classes), with autograd and dropout."""
        if self.frozen:
            return self.model.head.train()(self.features[rows])
        self.model.train()
        input_ids, attention_mask = data.pad(self.corpus.sentences(rows), self.device)
        with torch.autocast(self.device, torch.bfloat16, enabled=self.bf16):
            return self.model(input_ids, attention_mask)

    def evaluate(self, rows):
        """(loss, accuracy, logits) over these sentences, without dropout.

        Loss and accuracy are summed over all sentences and divided once: they do not depend on the batches.
        """
        self.model.eval()
        self.encode(rows)
        if self.frozen:
            with torch.no_grad():
                logits = self.model.head(self.features[rows]).cpu()
        else:
            logits = torch.from_numpy(data.predict(self.model, self.corpus.sentences(rows), self.device, self.bf16))
        labels = torch.from_numpy(self.corpus.labels[rows])
        loss = F.cross_entropy(logits.double(), labels).item()
        return loss, (logits.argmax(1) == labels).double().mean().item(), logits


def learning_rate(step, steps, settings):
    """The rate at a step from 1 to `steps`: linear warm-up to settings.lr, then linear decay, or constant."""
    warmup = round(settings.warmup * steps)
    rise = step / max(warmup, 1)
    fall = (steps - step + 1) / max(steps - warmup, 1) if settings.schedule == "linear" else 1.0
    return settings.lr * min(rise, fall, 1.0)


def state_path(settings):
    return Path(settings.out) / "state.safetensors"


def check_finite(step, loss, norm, settings):
    """FloatingPointError if the loss of a step or the length of its gradient is NaN or infinite."""
    if not math.isfinite(loss) or not math.isfinite(norm):
        raise FloatingPointError(
            f"step {step}: the loss is {loss:g} and the length of its gradient {norm:g}, so training stopped. Try a "
            f"lower --lr (it was {settings.lr:g}), a longer --warmup or --precision fp32, with --overwrite. The last "
            f"good state is kept in {settings.out}")


def train_epoch(forward, optimizer, rows, epoch, progress, settings, bar):
    """Take the steps of one epoch (counted from 0) that `progress` does not have yet.

    Everything random follows from the seed, the epoch and the step, so that a run which was stopped anywhere
    and taken up again ends in the same bits.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    batches = data.batches_of_like_length(forward.corpus.lengths[rows], settings.batch_size,
                                          np.random.default_rng([settings.seed, epoch]))
    first, last = epoch * len(batches) + 1, (epoch + 1) * len(batches)
    unread, recent = [], deque(maxlen=50)
    for step, batch in enumerate(batches, first):
        if step <= progress["step"]:
            continue
        started = time.perf_counter()
        torch.manual_seed(settings.seed * 1_000_003 + step)
        logits = forward.logits(rows[batch])
        labels = torch.from_numpy(forward.corpus.labels[rows[batch]]).to(logits.device)
        loss = F.cross_entropy(logits, labels)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, settings.clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, settings.epochs * len(batches), settings)
        optimizer.step()
        optimizer.zero_grad()

        unread.append(torch.stack([loss.detach(), norm, (logits.argmax(1) == labels).float().mean()]))
        save = step % settings.save_every == 0
        if save or step == last or len(unread) == READ_EVERY:
            numbers = torch.stack(unread).tolist()
            for number, (loss, norm, _) in enumerate(numbers, step - len(numbers) + 1):
                check_finite(number, loss, norm, settings)
            unread.clear()
            recent.extend(numbers)
            loss, _, accuracy = np.mean(recent, axis=0)
            bar.set_description_str(f"epoch {epoch + 1}/{settings.epochs}  loss {loss:.3f}  accuracy {accuracy:.1%} ",
                                    refresh=False)
        progress["step"] = step
        seconds = time.perf_counter() - started
        progress["seconds"] += seconds
        progress["recent_seconds"] = [*progress["recent_seconds"][-999:], seconds]
        bar.update(len(batch))
        if save:
            checkpoint.save_state(state_path(settings), forward.model, optimizer, progress)


def train(forward, optimizer, train_rows, dev_rows, progress, settings):
    """All epochs, measured after each (and before the first) on dev and on a fixed sample of the training set."""
    sample = np.random.default_rng(settings.seed).permutation(train_rows)[:TRAIN_SAMPLE]
    started = time.perf_counter()
    forward.encode(train_rows)
    progress["seconds"] += time.perf_counter() - started
    total = settings.epochs * len(train_rows)
    with tqdm(total=total, initial=min(progress["step"] * settings.batch_size, total), unit=" sentences",
              smoothing=0.05, disable=None,
              bar_format="{desc}{percentage:3.0f}% |{bar:20}| {rate_fmt}, {remaining} left") as bar:
        for epoch in range(settings.epochs + 1):
            if epoch > 0:
                train_epoch(forward, optimizer, train_rows, epoch - 1, progress, settings, bar)
            if epoch < len(progress["history"]):
                continue
            row = {"epoch": epoch, "seconds": progress["seconds"]}
            row["train_loss"], row["train_accuracy"], _ = forward.evaluate(sample)
            row["dev_loss"], row["dev_accuracy"], _ = forward.evaluate(dev_rows)
            progress["history"].append(row)
            if epoch > 0:
                checkpoint.save_state(state_path(settings), forward.model, optimizer, progress)
            tqdm.write(f"epoch {epoch}/{settings.epochs}   "
                       f"train loss {row['train_loss']:.3f} accuracy {row['train_accuracy']:.1%}   "
                       f"dev loss {row['dev_loss']:.3f} accuracy {row['dev_accuracy']:.1%}   "
                       f"trained {row['seconds']:.0f} s")


# -- after training ---------------------------------------------------------------------------------------

def peak_memory(device):
    """The most memory this process has held, in MB (of the GPU, where it trains there); None if unknown."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 1e6
    try:  # of this process alone: the resource module's figure begins with that of the process which started it
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e6
    except (OSError, IndexError):
        pass
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6


def finish(forward, dev_rows, test_rows, progress, settings, metrics):
    """Read the test set, once, and write what stays of the run. Returns the metrics, complete."""
    folder, corpus, history = Path(settings.out), forward.corpus, progress["history"]
    metrics |= history[-1]
    metrics["test_loss"], metrics["test_accuracy"], logits = forward.evaluate(test_rows)
    metrics |= {"epochs": settings.epochs, "train_seconds": progress["seconds"],
                "peak_memory_mb": peak_memory(forward.device)}
    if progress["recent_seconds"]:
        metrics["step_milliseconds"] = 1000 * float(np.median(progress["recent_seconds"]))
    checkpoint.write_tensors(folder / "model.safetensors", checkpoint.trained(forward.model))
    metrics["saved_bytes"] = (folder / "model.safetensors").stat().st_size
    checkpoint.write_csv(folder / "predictions.csv", ["row", "label", *corpus.classes], (
        [corpus.line[row], corpus.classes[corpus.labels[row]], *(f"{chance:.6f}" for chance in chances)]
        for row, chances in zip(test_rows, logits.double().softmax(1).tolist())))
    checkpoint.write_csv(folder / "history.csv", list(history[0]), (row.values() for row in history))
    with download.whole(folder / "curves.png") as aside:
        plots.curves(history, f"{settings.method} on {Path(corpus.files[-1]).name}", aside)
    merge_lora(forward.model)  # as for use; what it costs to use is measured on dev
    started = time.perf_counter()
    logits = data.predict(forward.model.eval(), corpus.sentences(dev_rows), forward.device, forward.bf16)
    metrics["sentences_per_second"] = len(dev_rows) / (time.perf_counter() - started)
    metrics = {key: metrics.get(key) for key in METRICS}
    checkpoint.write_json(folder / checkpoint.FINISHED, metrics)
    state_path(settings).unlink(missing_ok=True)

    print("\nthe most confident mistakes on dev:")
    chances, answers = torch.from_numpy(logits).softmax(1).max(1)
    labels = corpus.labels[dev_rows]
    wrong = np.flatnonzero(answers.numpy() != labels)
    wrong = wrong[np.argsort(-chances.numpy()[wrong])][:3]
    for row, text in zip(wrong, corpus.texts(dev_rows[wrong])):
        print(f"  {corpus.classes[answers[row]]} ({chances[row]:.1%}), but labelled "
              f"{corpus.classes[labels[row]]}: {text[:200]}")
    memory = f"{metrics['peak_memory_mb']:,.0f} MB" if metrics["peak_memory_mb"] else "unknown"
    print(f"\ntest loss {metrics['test_loss']:.3f} accuracy {metrics['test_accuracy']:.1%} "
          f"on {len(test_rows):,} sentences\n"
          f"training took {metrics['train_seconds']:.0f} s, peak memory {memory}, "
          f"trained tensors {metrics['saved_bytes'] / 1e6:.1f} MB\n"
          f"written to {folder}/: {', '.join(sorted(path.name for path in folder.iterdir()))}\n"
          f'use it: python -m minipeft {folder} "a sentence of yours"')
    return metrics


def run(settings):
    """Train, evaluate, and write everything to settings.out. Returns what stands in metrics.json.

    settings: what `parse` returns. Raises ValueError, OSError or FloatingPointError with a line for the user.
    """
    device, bf16 = choose_device(settings)
    weights = download.find_weights(settings.weights)
    tokenizer = data.load_tokenizer(weights, settings.max_length)
    files = [settings.test] * bool(settings.test) + [settings.data or download.fetch_data()]
    corpus = data.read_corpus(files, tokenizer, settings.text_column, settings.label_column)
    train_rows, dev_rows, test_rows = data.split(corpus, settings.fold)
    if settings.limit:
        train_rows = np.sort(np.random.default_rng(settings.seed).permutation(train_rows)[:settings.limit])
        if len(np.unique(corpus.labels[train_rows])) < len(corpus.classes):
            raise ValueError(f"--limit {settings.limit} leaves a class without a sentence to train on; take more")
    model = checkpoint.build(vars(settings), len(corpus.classes), weights)
    config = model.encoder.config
    longest = config.max_position_embeddings // data.MULTIPLE * data.MULTIPLE
    if settings.max_length > longest:
        raise ValueError(f"--max-length {settings.max_length}: this encoder takes at most {longest} tokens")
    if tokenizer.get_vocab_size() > config.vocab_size:
        raise ValueError(f"{weights}: tokenizer.json has {tokenizer.get_vocab_size():,} tokens and the encoder only "
                         f"{config.vocab_size:,}: they do not belong together")
    swapped, counts = describe(model)
    facts = {key: value for key, value in vars(settings).items()
             if key not in ("out", "resume", "overwrite", "save_every")}  # these do not change the outcome
    facts |= {"device": device, "precision": "bf16" if bf16 else "fp32", "classes": corpus.classes,
              "weights_sha256": download.hash_weights(weights),
              "data_sha256": [download.sha256(path) for path in files],
              "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__,
                           "tokenizers": tokenizers.__version__, "safetensors": safetensors.__version__}}
    folder = Path(settings.out)  # nothing has been written so far: a mistake leaves nothing behind
    if checkpoint.begin(folder, facts, settings.resume, settings.overwrite):
        print(f"{folder} is finished already")
        return checkpoint.read_json(folder / checkpoint.FINISHED)

    print(f"{Path(files[-1]).name}: {len(train_rows):,} sentences to train on, {len(dev_rows):,} dev, "
          f"{len(test_rows):,} test, labelled {', '.join(corpus.classes)[:200]}", *corpus.notes, *swapped, sep="\n")
    print(f"{settings.method} {counts['technique_parameters']:,} + head {counts['head_parameters']:,} = "
          f"{counts['trainable_parameters']:,} of {counts['total_parameters']:,} parameters are trained "
          f"({counts['trainable_percent']:.2f} %), on {device} in {facts['precision']}")

    model.to(device)
    if bf16:
        frozen_to_bf16(model)
    parameters = list(checkpoint.trained(model).values())
    optimizer = torch.optim.AdamW(
        [{"params": [p for p in parameters if p.dim() > 1], "weight_decay": settings.weight_decay},
         {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0}], lr=settings.lr, fused=True)
    progress = {"step": 0, "seconds": 0.0, "recent_seconds": [], "history": []}
    if settings.resume and state_path(settings).is_file():
        progress |= checkpoint.load_state(state_path(settings), model, optimizer)
        print(f"going on after step {progress['step']}")
    forward = Forward(model, corpus, device, bf16)
    train(forward, optimizer, train_rows, dev_rows, progress, settings)
    return finish(forward, dev_rows, test_rows, progress, settings, counts | {
        "method": settings.method, "seed": settings.seed, "device": device, "precision": facts["precision"]})


def main(settings):
    """`run` for the command line: returns the exit code, and says a user's mistake in one line."""
    try:
        run(settings)
        return 0
    except (ValueError, OSError, FloatingPointError) as error:  # what bad input raises; a bug keeps its traceback
        print(f"train.py: {error}", file=sys.stderr)
        return DIVERGED if isinstance(error, FloatingPointError) else 2
    except KeyboardInterrupt:
        print(f"\nstopped; the same command with --resume goes on from the last state in {settings.out}",
              file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # a sentence that the terminal cannot show is no reason to stop
    sys.exit(main(SETTINGS))
