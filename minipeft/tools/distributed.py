"""Data-parallel training in several processes: torchrun --nproc-per-node N train.py lora

Each process holds the whole model and takes its share of every batch. torch's DistributedDataParallel averages the
gradients of what is trained; nothing else is exchanged in a step. Batches, rates and losses are those of one process
up to rounding, with dropout in the head too. (Dropout in the encoder differs: its masks depend on the padding.) Only
the first process prints and writes. Without torchrun, every function behaves as in a single process.
"""
import os
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from ..bert import Bert
from .files import UserError


@contextmanager
def processes(device):
    """Join the processes that torchrun has started, and silence all but the first. device: --device."""
    if not dist.is_torchelastic_launched():
        yield
        return
    on_gpu = device in ("auto", "cuda") and torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if on_gpu else "gloo")
    try:
        if is_first():
            yield
        else:
            with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
                yield
    finally:
        dist.destroy_process_group()


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    """The number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_first():
    return rank() == 0


def first_only(context):
    """A context manager that only the first process enters."""
    return context if is_first() else nullcontext()


def from_first(function, *arguments):
    """Call a function in the first process; return its result, or raise its UserError, in all of them."""
    if world() == 1:
        return function(*arguments)
    result, mistake = None, None
    if is_first():
        try:
            result = function(*arguments)
        except UserError as error:
            mistake = str(error)
    received = [result, mistake]
    try:
        dist.broadcast_object_list(received)
    except RuntimeError:
        raise UserError("the first process has ended") from None
    if received[1]:
        raise UserError(received[1])
    return received[0]


def sum_up(tensor):
    """The sum of a tensor over all processes."""
    if world() > 1:
        there = tensor.to("cuda") if dist.get_backend() == "nccl" else tensor.clone()
        dist.all_reduce(there)
        tensor = there.to(tensor.device)
    return tensor


# -- a training step --------------------------------------------------------------------------------------

class SharedDropout(nn.Dropout):
    """Dropout on the rows of this process, with the mask that one process would draw for the whole batch."""
    batch = 0  # sentences in the batch, over all processes

    def forward(self, x):
        """(own rows, width) -> (own rows, width)"""
        if not self.training:
            return x
        mask = F.dropout(torch.ones(self.batch, x.shape[1], device=x.device), self.p)
        return x * mask[own(np.arange(self.batch))]


def distribute(module, dropout):
    """Return `module`, or a wrapper whose backward pass averages the gradients of all processes.

    dropout: the nn.Dropout of the head, which then draws its masks as one process would.
    """
    if world() == 1:
        return module
    dropout.__class__ = SharedDropout
    return nn.parallel.DistributedDataParallel(module)


def own(indices):
    """Every world()-th of the indices. A process that would have none gets the first one."""
    share = indices[rank()::world()]
    return share if len(share) else indices[:1]


def share(batch):
    """Return (own indices, weight): the mean over processes of weight x mean loss is the mean loss of the batch."""
    SharedDropout.batch = len(batch)
    return own(batch), world() * len(batch[rank()::world()]) / len(batch)


# -- evaluation -------------------------------------------------------------------------------------------

def spread(function, indices):
    """Compute `function(indices)`, a float32 array of one row an index, in shares; every process gets all rows."""
    if world() == 1:
        return function(indices)
    computed = function(own(indices))
    rows = torch.zeros(len(indices), computed.shape[1])
    mine = np.arange(len(indices))[rank()::world()]
    rows[mine] = torch.from_numpy(computed[:len(mine)])
    return sum_up(rows).numpy()


# -- what is reported -------------------------------------------------------------------------------------

def facts():
    """{"processes": their number} for the record, if there are several."""
    return {"processes": world()} if world() > 1 else {}


def describe(model, trainable):
    """A line with the bytes that a step exchanges, if there are several processes."""
    if world() == 1:
        return []
    with torch.device("meta"):
        encoder = Bert(model.encoder.config)
    everything = sum(p.numel() for module in (encoder, model.head) for p in module.parameters())
    return [f"{world()} processes; gradients averaged in each step: {4 * trainable / 1e6:.1f} MB (full fine-tuning: "
            f"{4 * everything / 1e6:.1f} MB)"]
