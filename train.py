"""Train head, adapters, LoRA, biases or everything on labelled texts: one loop for every technique.

    python train.py lora                        default weights and data
    python train.py adapter --data my.csv       your own texts
    python train.py lora --help                 all options
    torchrun --nproc-per-node 2 train.py lora   data-parallel: see minipeft/tools/distributed.py
"""
import sys

from minipeft.tools import settings as options

options.share_cores()  # before torch starts its threads
if __name__ == "__main__":
    SETTINGS = options.parse(sys.argv[1:])  # before the slow imports: --help and typos do not wait for torch

import math
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from minipeft import data
from minipeft.bert import read_config
from minipeft.lab import plots
from minipeft.lora import merge_lora
from minipeft.model import build, count_parameters, describe, predict, trained
from minipeft.tools import checkpoint, distributed, download, fast, metrics, texts
from minipeft.tools.files import UserError, progress_bar, run_program, write_json

DIVERGED = 3         # the exit code of a run whose loss does not stay finite; that of a user's mistake is 2
READ_EVERY = 10      # steps between reads of the loss: on a GPU every read waits for it
TRAIN_SAMPLE = 1000  # training sentences that training loss and accuracy are measured on


# -- what the loop needs ----------------------------------------------------------------------------------

@dataclass
class Progress:
    """What a run has done so far; saved with the state, so that an interrupted run resumes exactly."""
    step: int = 0                                     # optimiser steps taken
    seconds: float = 0.0                              # spent on them, and on encoding once
    step_seconds: list = field(default_factory=list)  # of the last 1,000 steps
    history: list = field(default_factory=list)       # one row for each measured epoch
    peak_memory_mb: float | None = None               # of all processes that the run has had

    def note_memory(self, device):
        self.peak_memory_mb = max(self.peak_memory_mb or 0, fast.peak_memory(device) or 0) or None


def make_optimizer(model, settings):
    """AdamW, with weight decay on matrices only, and a rate of its own for the head if --head-lr is given."""
    head, groups = set(model.head.parameters()), []
    for is_head, peak in ((False, settings.lr), (True, settings.head_lr or settings.lr)):
        parameters = [p for p in trained(model).values() if (p in head) == is_head]
        matrices, vectors = ([p for p in parameters if (p.dim() > 1) == more] for more in (True, False))
        groups += [{"params": matrices, "peak": peak, "weight_decay": settings.weight_decay},
                   {"params": vectors, "peak": peak, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=settings.lr, fused=True)


def schedule(step, steps, settings):
    """The share of the highest rate at a step from 1 to `steps`: linear warm-up, then linear decay, or constant."""
    warmup = round(settings.warmup * steps)
    rise = step / max(warmup, 1)
    fall = (steps - step + 1) / max(steps - warmup, 1) if settings.schedule == "linear" else 1.0
    return min(rise, fall, 1.0)


def score(logits, labels):
    """Return (loss, accuracy) of logits (n, classes), over all sentences at once, so independent of batches."""
    logits, labels = torch.from_numpy(logits), torch.from_numpy(labels)
    return F.cross_entropy(logits.double(), labels).item(), (logits.argmax(1) == labels).double().mean().item()


def check_finite(step, loss, norm, settings):
    """Raise FloatingPointError if loss or gradient norm is not finite. A weight that is NaN once stays NaN, so an
    occasional look is enough."""
    if not math.isfinite(loss) or not math.isfinite(norm):
        raise FloatingPointError(
            f"step {step}: the loss is {loss:g} and the norm of its gradient {norm:g}, so training stopped. Try a "
            f"lower --lr (it was {settings.lr:g}), a longer --warmup or --precision fp32, with --overwrite.")


# -- the loop ---------------------------------------------------------------------------------------------

def train(model, optimizer, corpus, train_set, dev_set, compute, progress, settings, save):
    """Train for all epochs; after each that is due, measure dev and a fixed sample of the training set.

    Seed, epoch and step determine all random numbers, so in fp32 on a CPU a run that was stopped anywhere and resumed
    ends in the same bits. Raises FloatingPointError if the loss does not stay finite.
    """
    parameters = list(trained(model).values())
    labels = torch.from_numpy(corpus.labels).to(compute.device)
    sample = np.random.default_rng(settings.seed).permutation(train_set)[:TRAIN_SAMPLE]
    per_epoch = math.ceil(len(train_set) / settings.batch_size)
    steps = settings.epochs * per_epoch

    encoder_is_frozen = not any(parameter.requires_grad for parameter in model.encoder.parameters())
    network = distributed.wrap(model.head if encoder_is_frozen else model)
    if encoder_is_frozen:  # head tuning: the features of a sentence never change, so compute them once
        model.eval()
        features = torch.zeros(len(corpus), model.head.dense.in_features, device=compute.device)
        for indices in (train_set, dev_set):
            began = time.perf_counter()
            found = predict(model.features, corpus.sentences(indices), compute, "encoding once")
            features[indices] = torch.from_numpy(found).to(compute.device)
            if indices is train_set and not progress.step:
                progress.seconds += time.perf_counter() - began

    def measure(indices, label):
        """(loss, accuracy) without dropout"""
        model.eval()
        if encoder_is_frozen:
            with torch.no_grad():
                logits = model.head(features[indices]).cpu().numpy()
        else:
            logits = predict(model, corpus.sentences(indices), compute, label)
        return score(logits, corpus.labels[indices])

    bar = progress_bar(total=steps, initial=progress.step, unit=" steps",
                       bar_format="{desc}{percentage:3.0f}% |{bar:20}| {rate_fmt}, {remaining} left")
    for epoch in range(1, settings.epochs + 1):
        shuffle = np.random.default_rng([settings.seed, epoch - 1])
        batches = data.batches_of_like_length(corpus.lengths[train_set], settings.batch_size, shuffle)
        for step, batch in enumerate(batches, (epoch - 1) * per_epoch + 1):
            if step <= progress.step:
                continue  # taken before the run was interrupted
            began = time.perf_counter()
            torch.manual_seed(settings.seed * 1_000_003 + step + distributed.rank() * 10**9)  # dropout
            indices, weight = distributed.share(train_set[batch])  # all of it and 1.0, unless torchrun started us

            model.train()
            if encoder_is_frozen:
                logits = network(features[indices])
            else:
                with compute.autocast():
                    logits = network(*compute.pad(corpus.sentences(indices)))
            loss = weight * F.cross_entropy(logits, labels[indices])
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(parameters, settings.clip)
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * schedule(step, steps, settings)
            optimizer.step()
            optimizer.zero_grad()

            end_of_epoch = step == epoch * per_epoch
            due = step == steps or end_of_epoch and epoch % settings.eval_every == 0
            save_now = due or step % settings.save_every == 0
            if save_now or step % READ_EVERY == 0:
                check_finite(step, loss.item(), norm.item(), settings)  # before a save: only a good state is saved
                bar.set_description_str(f"loss {loss.item():.3f} ", refresh=False)
                bar.update(step - bar.n)
            progress.step = step
            progress.seconds += time.perf_counter() - began
            progress.step_seconds = [*progress.step_seconds[-999:], time.perf_counter() - began]
            if due:
                row = {"epoch": epoch, "seconds": progress.seconds}
                row["train_loss"], row["train_accuracy"] = measure(sample, "train sample")
                row["dev_loss"], row["dev_accuracy"] = measure(dev_set, "dev")
                progress.history.append(row)
                with tqdm.external_write_mode():  # in a terminal, it clears the bar first
                    print(f"epoch {epoch}   train loss {row['train_loss']:.3f} accuracy {row['train_accuracy']:.1%}   "
                          f"dev loss {row['dev_loss']:.3f} accuracy {row['dev_accuracy']:.1%}   "
                          f"trained {progress.seconds:.0f} s", flush=True)
            if save_now:
                save()
    bar.close()


# -- before and after -------------------------------------------------------------------------------------

def test(model, corpus, dev_set, test_set, compute):
    """Evaluate the finished model on dev and, for the only time, on test: (metrics, {"dev": ..., "test": ...})."""
    model.eval()
    measured, parts, began = {}, {}, time.perf_counter()
    for name, indices in (("dev", dev_set), ("test", test_set)):
        logits = predict(model, corpus.sentences(indices), compute, name)
        logits = (logits - logits[:, :1]).astype(float).round(4)  # softmax depends on differences only
        measured[f"{name}_loss"], measured[f"{name}_accuracy"] = score(logits, corpus.labels[indices])
        parts[name] = {"lines": corpus.line[indices].tolist(), "labels": corpus.labels[indices].tolist(),
                       "logits": logits.tolist()}
    measured["sentences_per_second"] = (len(dev_set) + len(test_set)) / (time.perf_counter() - began)
    return measured, parts


def print_result(record, folder):
    """Print test results with their interval, costs, and what to do next."""
    measured, rows = record["metrics"], record["test"]
    memory = f"{measured['peak_memory_mb']:,.0f} MB" if measured["peak_memory_mb"] else "unknown"
    summary = metrics.summary(np.array(rows["logits"]), np.array(rows["labels"]), record["classes"])
    print("\ntest:", *summary, sep="\n  ")
    print(f"training took {measured['train_seconds']:.0f} s, peak memory {memory}, "
          f"trained tensors {measured['saved_bytes'] / 1e6:.1f} MB\nfiles in {folder}/: "
          f"{', '.join(sorted(path.name for path in folder.iterdir() if path.name != 'lock'))}\n"
          f'use it: python -m minipeft predict {folder} "a sentence of yours"')


def run(settings):
    """Train, test, and write everything to settings.out. Returns the record, as in run.json.

    settings: what `settings.parse` returns. Raises UserError for a user's mistake, FloatingPointError if the loss does
    not stay finite (run.json then holds the failure).
    """
    folder, first = Path(settings.out), distributed.is_first()
    with checkpoint.locked(folder) if first else nullcontext():
        before = checkpoint.find(folder, settings)  # with --resume, its settings are taken over
        if before and before.finished and settings.resume:
            print(f"{folder} failed: {before.record['failed']}" if "failed" in before.record else
                  f"{folder} is finished already")
            return before.record

        texts.check_files(settings)  # a mistake in the data is found before anything is fetched
        weights = download.find_weights(settings.weights)
        config = read_config(weights)
        compute, chosen = distributed.from_first(*fast.choose_compute(settings, config))
        corpus, train_set, dev_set, test_set = texts.load_data(settings, weights, config)
        model = build(settings, len(corpus.classes), weights)
        counts, sizes = count_parameters(model), {"train": len(train_set), "dev": len(dev_set), "test": len(test_set)}
        record = checkpoint.start_record(settings, compute, weights, corpus, sizes, counts)
        warnings = checkpoint.begin(folder, before, record, settings) if first else []
        print(f"{Path(corpus.files[-1]).name}: {len(train_set):,} training sentences, {len(dev_set):,} dev, "
              f"{len(test_set):,} test; classes: {texts.listed(corpus.classes)}", *corpus.notes, *describe(model),
              f"{counts['technique']:,} of the technique + {counts['head']:,} of the head = {counts['trainable']:,} of "
              f"{counts['total']:,} parameters are trained ({counts['trainable'] / counts['total']:.2%})",
              f"on {chosen}", *warnings, sep="\n", flush=True)

        model.to(compute.device)
        fast.speed_up(model, compute)  # on a CPU: faster layers that compute the same
        optimizer, progress = make_optimizer(model, settings), Progress()
        if before and settings.resume:
            progress = Progress(**checkpoint.restore(before, model, optimizer))
            print(f"resuming after step {progress.step}")

        def save():
            progress.note_memory(compute.device)
            if first:
                checkpoint.save_state(folder, model, optimizer, record, asdict(progress))

        try:
            train(model, optimizer, corpus, train_set, dev_set, compute, progress, settings, save)
        except FloatingPointError as error:
            if first:
                write_json(folder / checkpoint.RECORD, record | {"history": progress.history, "failed": str(error)})
            raise
        if first:
            checkpoint.write_tensors(folder / "model.safetensors", trained(model))
        fast.restore(model)
        merge_lora(model)  # test what will be used: plain layers at the speed of the base model
        fast.speed_up(model, compute)
        measured, parts = test(model, corpus, dev_set, test_set, compute)
        progress.note_memory(compute.device)
        if not first:
            return record
        last = {name: value for name, value in progress.history[-1].items() if name not in ("epoch", "seconds")}
        record |= {"history": progress.history, "metrics": last | measured | {
            "train_seconds": progress.seconds, "peak_memory_mb": progress.peak_memory_mb,
            "step_milliseconds": 1000 * float(np.median(progress.step_seconds)),
            "saved_bytes": (folder / "model.safetensors").stat().st_size}, **parts}
        checkpoint.write_predictions(folder / "predictions.csv", record)
        plots.curves(record["history"], f"{settings.technique} on {Path(corpus.files[-1]).name}", folder / "curves.png")
        write_json(folder / checkpoint.RECORD, record)
        (folder / checkpoint.STATE).unlink(missing_ok=True)
        print_result(record, folder)
    return record


def main(settings):
    """`run` for the command line. Returns the exit code."""
    try:
        with distributed.processes(settings.device):
            return DIVERGED if "failed" in run(settings) else 0
    except FloatingPointError as error:
        print(f"train.py: {error}", file=sys.stderr)
        return DIVERGED
    except torch.OutOfMemoryError:
        raise UserError("out of memory; lower --batch-size or --max-length") from None
    except KeyboardInterrupt:
        print(f"\nstopped; the same command with --resume continues from the last state in {settings.out}",
              file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(run_program("train.py", main, SETTINGS))
