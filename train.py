"""Train head, adapters, LoRA or everything on labelled sentences: one loop for every technique.

    python train.py lora                        default weights and data
    python train.py adapter --data my.csv       your own sentences
    python train.py lora --help                 all options
    torchrun --nproc-per-node 2 train.py lora   data-parallel: see minipeft/tools/distributed.py
"""
import sys

from minipeft.tools import settings as options

if __name__ == "__main__":
    SETTINGS = options.parse(sys.argv[1:])  # before the slow imports: --help and typos do not wait for torch

import math
import time
from collections import deque
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from minipeft import data
from minipeft.lab import plots
from minipeft.lora import merge_lora
from minipeft.model import build, count_parameters, describe, predict, trained
from minipeft.tools import checkpoint, distributed as parallel, download, fast, texts  # parallel: in one process it changes nothing
from minipeft.tools.checkpoint import load_data
from minipeft.tools.fast import choose_compute, peak_memory
from minipeft.tools.files import UserError, progress_bar, write_json

DIVERGED = 3         # the exit code of a run whose loss does not stay finite; that of a user's mistake is 2
READ_EVERY = 10      # steps between reads of the loss: on a GPU every read waits for it
TRAIN_SAMPLE = 1000  # training sentences that training loss and accuracy are measured on


# -- the loop ---------------------------------------------------------------------------------------------

@dataclass
class Progress:
    """What a run has done so far; saved with the state, so that an interrupted run resumes exactly."""
    step: int = 0                                     # optimiser steps taken
    seconds: float = 0.0                              # spent on them, and on encoding once (see Forward)
    step_seconds: list = field(default_factory=list)  # of the last 1,000 steps
    history: list = field(default_factory=list)       # one row for each measured epoch
    peak_memory_mb: float | None = None               # of all processes that the run has had

    def note_memory(self, device):
        self.peak_memory_mb = max(self.peak_memory_mb or 0, peak_memory(device) or 0) or None


class Forward:
    """A classifier on a corpus: logits for a training step, and evaluation.

    If the whole encoder is frozen (head tuning), its output for a sentence never changes. It is computed once,
    without dropout, and cached; a step then costs only what the head costs.
    """

    def __init__(self, model, corpus, compute):
        self.model, self.corpus, self.compute = model, corpus, compute
        self.labels = torch.from_numpy(corpus.labels).to(compute.device)
        self.use_cache = not any(parameter.requires_grad for parameter in model.encoder.parameters())
        self.distributed = parallel.distribute(model.head if self.use_cache else model, model.head.dropout)
        if self.use_cache:
            self.features = torch.zeros(len(corpus), model.head.dense.in_features, device=compute.device)
            self.cached = np.zeros(len(corpus), bool)

    def cache(self, indices):
        """Compute the features of these sentences, unless they are known or the encoder is trained."""
        if self.use_cache and not self.cached[indices].all():
            indices = indices[~self.cached[indices]]
            self.model.eval()
            found = self.predict(self.model.features, indices, "encoding once")
            self.features[indices] = torch.from_numpy(found).to(self.compute.device)
            self.cached[indices] = True

    def logits(self, indices):
        """Logits for a training step, with dropout and gradients: (len(indices), classes)."""
        self.model.train()
        if self.use_cache:
            return self.distributed(self.features[indices])
        with self.compute.autocast():
            return self.distributed(*self.compute.pad(self.corpus.sentences(indices)))

    def predict(self, function, indices, label):
        """`function` of these sentences, without gradients: float32 array (len(indices), width)."""
        return parallel.spread(
            lambda share: predict(function, self.corpus.sentences(share), self.compute, label), indices)

    def evaluate(self, indices, label):
        """(loss, accuracy, logits) over these sentences, without dropout.

        Loss and accuracy are summed over all sentences and divided once, so they do not depend on the batches.
        """
        self.cache(indices)
        self.model.eval()
        if self.use_cache:
            with torch.no_grad():
                logits = self.model.head(self.features[indices]).cpu()
        else:
            logits = torch.from_numpy(self.predict(self.model, indices, label))
        labels = torch.from_numpy(self.corpus.labels[indices])
        loss = F.cross_entropy(logits.double(), labels).item()
        return loss, (logits.argmax(1) == labels).double().mean().item(), logits.numpy()


def learning_rate(step, steps, settings):
    """The rate at a step from 1 to `steps`: linear warm-up to settings.lr, then linear decay, or constant."""
    warmup = round(settings.warmup * steps)
    rise = step / max(warmup, 1)
    fall = (steps - step + 1) / max(steps - warmup, 1) if settings.schedule == "linear" else 1.0
    return settings.lr * min(rise, fall, 1.0)


class Monitor:
    """Keep loss, gradient norm and accuracy of the steps; `read` checks them and shows progress."""

    def __init__(self, progress, steps, settings):
        self.progress, self.settings = progress, settings
        self.unread, self.recent = [], deque(maxlen=50)
        self.bar = progress_bar(total=steps, initial=progress.step, unit=" steps",
                                bar_format="{desc}{percentage:3.0f}% |{bar:20}| {rate_fmt}, {remaining} left")

    def add(self, loss, norm, correct, seconds):
        self.unread.append(torch.stack([loss.detach(), norm.to(loss.dtype), correct.mean()]))
        self.progress.seconds += seconds
        self.progress.step_seconds = [*self.progress.step_seconds[-999:], seconds]

    def read(self):
        """Raise FloatingPointError if the loss or the norm of a gradient is not finite."""
        began = time.perf_counter()
        numbers = (parallel.sum_up(torch.stack(self.unread)) / parallel.world()).tolist()
        self.progress.seconds += time.perf_counter() - began  # on a GPU, the wait for the steps
        for step, (loss, norm, _) in enumerate(numbers, self.progress.step - len(numbers) + 1):
            if not math.isfinite(loss) or not math.isfinite(norm):
                self.bar.close()
                raise FloatingPointError(
                    f"step {step}: the loss is {loss:g} and the norm of its gradient {norm:g}, so training stopped. "
                    f"Try a lower --lr (it was {self.settings.lr:g}), a longer --warmup or --precision fp32, with "
                    f"--overwrite.")
        self.unread.clear()
        self.recent.extend(numbers)
        loss, _, accuracy = np.mean(self.recent, axis=0)
        self.bar.set_description_str(f"loss {loss:.3f}  accuracy {accuracy:.1%} ", refresh=False)
        self.bar.update(len(numbers))


def train(forward, optimizer, train_set, dev_set, progress, settings, save):
    """Train for all epochs; after each that is due, measure dev and a fixed sample of the training set.

    Seed, epoch and step determine all random numbers, so in fp32 on a CPU a run that was stopped anywhere and
    resumed ends in the same bits.
    """
    parameters = list(trained(forward.model).values())
    lengths = forward.corpus.lengths[train_set]
    sample = np.random.default_rng(settings.seed).permutation(train_set)[:TRAIN_SAMPLE]
    steps = settings.epochs * math.ceil(len(train_set) / settings.batch_size)
    started = time.perf_counter()
    forward.cache(train_set)
    if not progress.step:  # a resumed run has counted this already
        progress.seconds += time.perf_counter() - started
    monitor = Monitor(progress, steps, settings)

    for epoch in range(1, settings.epochs + 1):
        shuffle = np.random.default_rng([settings.seed, epoch - 1])
        batches = data.batches_of_like_length(lengths, settings.batch_size, shuffle)
        for step, batch in enumerate(batches, (epoch - 1) * len(batches) + 1):
            if step <= progress.step:
                continue  # taken before the run was interrupted
            started = time.perf_counter()
            torch.manual_seed(settings.seed * 1_000_003 + step)  # dropout
            indices, weight = parallel.share(train_set[batch])  # weight: 1 in a single process
            labels = forward.labels[indices]

            logits = forward.logits(indices)
            loss = weight * F.cross_entropy(logits, labels)
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(parameters, settings.clip)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, steps, settings)
            optimizer.step()
            optimizer.zero_grad()

            progress.step = step
            monitor.add(loss, norm, weight * (logits.argmax(1) == labels), time.perf_counter() - started)
            due = step == steps or step % (settings.eval_every * len(batches)) == 0  # the end of an epoch
            save_now = due or step % settings.save_every == 0
            if save_now or step % READ_EVERY == 0:
                monitor.read()  # before a save: a state is saved only if its loss is finite
            if due:
                progress.history.append(measure(forward, sample, dev_set, epoch, progress.seconds))
            if save_now:
                save()
    monitor.bar.close()
    if settings.epochs == 0:
        progress.history.append(measure(forward, sample, dev_set, 0, 0.0))


def measure(forward, sample, dev_set, epoch, seconds):
    """Evaluate the training sample and dev, print a line, and return the row of the history."""
    row = {"epoch": epoch, "seconds": seconds}
    row["train_loss"], row["train_accuracy"], _ = forward.evaluate(sample, "train sample")
    row["dev_loss"], row["dev_accuracy"], _ = forward.evaluate(dev_set, "dev")
    with tqdm.external_write_mode():  # in a terminal, it clears the bar first
        print(f"epoch {epoch}   train loss {row['train_loss']:.3f} accuracy {row['train_accuracy']:.1%}   "
              f"dev loss {row['dev_loss']:.3f} accuracy {row['dev_accuracy']:.1%}   trained {seconds:.0f} s",
              flush=True)
    return row


# -- before and after -------------------------------------------------------------------------------------

def check_fit(settings, tokenizer, config, weights):
    """UserError unless tokenizer and --max-length fit the encoder."""
    if settings.max_length > config.max_position_embeddings:
        raise UserError(f"--max-length {settings.max_length}: this encoder takes at most "
                        f"{config.max_position_embeddings} tokens")
    if tokenizer.get_vocab_size() > config.vocab_size:
        raise UserError(f"{weights}: tokenizer.json has {tokenizer.get_vocab_size():,} tokens and the encoder only "
                        f"{config.vocab_size:,}: they do not belong together")


def make_optimizer(model, settings):
    """AdamW, with weight decay on matrices only."""
    parameters = list(trained(model).values())
    groups = [{"params": [p for p in parameters if p.dim() > 1], "weight_decay": settings.weight_decay},
              {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=settings.lr, fused=True)


def evaluate_run(forward, dev_set, test_set, progress):
    """Evaluate the model as it will be used, LoRA merged: {"metrics", "dev", "test"}. The only use of the test set."""
    merge_lora(forward.model)
    forward.use_cache = False  # the time of inference includes the encoder
    corpus, metrics, parts, started = forward.corpus, dict(progress.history[-1]), {}, time.perf_counter()
    for name, indices in (("dev", dev_set), ("test", test_set)):
        metrics[f"{name}_loss"], metrics[f"{name}_accuracy"], logits = forward.evaluate(indices, name)
        logits = (logits - logits[:, :1]).astype(float).round(4)  # softmax depends on differences only
        parts[name] = {"lines": corpus.line[indices].tolist(), "labels": corpus.labels[indices].tolist(),
                       "logits": logits.tolist()}
    metrics["sentences_per_second"] = (len(dev_set) + len(test_set)) / (time.perf_counter() - started)
    progress.note_memory(forward.compute.device)
    metrics |= {"train_seconds": progress.seconds, "peak_memory_mb": progress.peak_memory_mb}
    metrics["step_milliseconds"] = 1000 * float(np.median(progress.step_seconds)) if progress.step_seconds else None
    return {"metrics": {name: metrics.get(name) for name in checkpoint.PARTS["metrics"]}, **parts}


def report(record, corpus, dev_set, folder):
    """Print the three most confident wrong predictions on dev, test results, costs, and what to do next."""
    logits, metrics, classes = np.array(record["dev"]["logits"]), record["metrics"], record["classes"]
    probabilities = torch.from_numpy(logits).softmax(1).numpy()
    confidence = probabilities.max(1) * (logits.argmax(1) != corpus.labels[dev_set])  # 0 where it is right
    worst = [row for row in np.argsort(-confidence)[:3] if confidence[row]]
    if worst:
        print("\nthe most confident mistakes on dev:")
    for row, text in zip(worst, texts.read_texts(corpus, dev_set[worst])):
        print(f"  {classes[logits[row].argmax()]} ({confidence[row]:.1%}), but labelled "
              f"{classes[corpus.labels[dev_set[row]]]}: {text[:200]}")
    memory = f"{metrics['peak_memory_mb']:,.0f} MB" if metrics["peak_memory_mb"] else "unknown"
    print(f"\ntest loss {metrics['test_loss']:.3f} accuracy {metrics['test_accuracy']:.1%} on "
          f"{record['sentences']['test']:,} sentences\n"
          f"training took {metrics['train_seconds']:.0f} s, peak memory {memory}, "
          f"trained tensors {metrics['saved_bytes'] / 1e6:.1f} MB\nfiles in {folder}/: "
          f"{', '.join(sorted(path.name for path in folder.iterdir() if path.name != 'lock'))}\n"
          f'use it: python -m minipeft predict {folder} "a sentence of yours"')


def run(settings):
    """Train, evaluate, and write everything to settings.out. Returns the record, as in run.json.

    settings: what `settings.parse` returns. Raises UserError for a user's mistake, FloatingPointError if the loss
    does not stay finite (run.json then holds the failure).
    """
    command = options.command(settings)  # before "auto" is resolved
    weights = download.find_weights(settings.weights)
    corpus, tokenizer, train_set, dev_set, test_set = load_data(settings, weights)
    model = build(settings, len(corpus.classes), weights)
    check_fit(settings, tokenizer, model.encoder.config, weights)
    with parallel.first_only(checkpoint.locked(settings.out)):
        checkpoint.keep_machine(settings)
        compute, chosen = parallel.from_first(choose_compute, settings, model.encoder.config)
        counts, folder = count_parameters(model), Path(settings.out)
        sizes = {"train": len(train_set), "dev": len(dev_set), "test": len(test_set)}
        record = checkpoint.start_record(command, settings, compute, weights, corpus, sizes, counts)
        finished, warnings = parallel.from_first(checkpoint.begin, folder, record, settings.resume, settings.overwrite)
        if finished:
            print(f"{folder} failed: {finished['failed']}" if "failed" in finished else f"{folder} is finished already")
            return finished
        print(f"{Path(corpus.files[-1]).name}: {len(train_set):,} training sentences, {len(dev_set):,} dev, "
              f"{len(test_set):,} test; classes: {', '.join(corpus.classes)[:200]}", *corpus.notes, *describe(model),
              f"{counts['technique']:,} of the technique + {counts['head']:,} of the head = {counts['trainable']:,} of "
              f"{counts['total']:,} parameters are trained ({counts['trainable'] / counts['total']:.2%})",
              f"on {chosen}", *parallel.describe(model, counts["trainable"]), *warnings, sep="\n", flush=True)

        model.to(compute.device)
        fast.speed_up(model, compute.device, compute.precision)  # on a CPU: faster layers that compute the same
        optimizer = make_optimizer(model, settings)
        progress = Progress()
        if settings.resume and (folder / checkpoint.STATE).is_file():
            progress = Progress(**checkpoint.load_state(folder, model, optimizer))
            print(f"resuming after step {progress.step}")

        def save():
            progress.note_memory(compute.device)
            if parallel.is_first():
                checkpoint.save_state(folder, model, optimizer, record, asdict(progress))

        forward = Forward(model, corpus, compute)
        try:
            train(forward, optimizer, train_set, dev_set, progress, settings, save)
        except FloatingPointError as error:
            if parallel.is_first():
                write_json(folder / checkpoint.RECORD, record | {"history": progress.history, "failed": str(error)})
            raise
        saved = folder / "model.safetensors"
        if parallel.is_first():
            checkpoint.write_tensors(saved, trained(model))  # before evaluate_run merges LoRA
        record |= {"history": progress.history, **evaluate_run(forward, dev_set, test_set, progress)}
        if not parallel.is_first():
            return record
        record["metrics"]["saved_bytes"] = saved.stat().st_size
        checkpoint.write_predictions(folder / "predictions.csv", record)
        plots.curves(record["history"], f"{settings.technique} on {Path(corpus.files[-1]).name}", folder / "curves.png")
        write_json(folder / checkpoint.RECORD, record)
        (folder / checkpoint.STATE).unlink(missing_ok=True)
        report(record, corpus, dev_set, folder)
    return record


def main(settings):
    """`run` for the command line. Returns the exit code; a user's mistake is one line on stderr."""
    with parallel.processes(settings.device):
        try:
            return DIVERGED if "failed" in run(settings) else 0
        except (UserError, FloatingPointError) as error:
            print(f"train.py: {error}", file=sys.stderr)
            return DIVERGED if isinstance(error, FloatingPointError) else 2
        except torch.OutOfMemoryError:
            print("train.py: out of memory; lower --batch-size or --max-length", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print("\nstopped; the same command with --resume (and without --overwrite) continues from the last state "
                  f"in {settings.out}", file=sys.stderr)
            return 130


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # a sentence that the terminal cannot show must not stop a run
    sys.exit(main(SETTINGS))
