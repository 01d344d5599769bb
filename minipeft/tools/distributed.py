"""Data-parallel training in several processes: torchrun --nproc-per-node N train.py lora

Each process holds the whole model and computes its share of every batch; torch's DistributedDataParallel averages the
gradients. Every process evaluates for itself; only the first prints and writes. Without torchrun, each function is that
of a single process.
"""
import os
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout

import torch
import torch.distributed as dist
from torch import nn


@contextmanager
def processes(device):
    """Join the processes that torchrun has started, and silence all but the first. device: that of --device."""
    if not dist.is_torchelastic_launched():
        yield
        return
    on_gpu = device in ("auto", "cuda") and torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if on_gpu else "gloo")
    try:
        with ExitStack() as silence:
            if not is_first():
                nowhere = silence.enter_context(open(os.devnull, "w"))
                silence.enter_context(redirect_stdout(nowhere))
                silence.enter_context(redirect_stderr(nowhere))
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


def from_first(*values):
    """The values of the first process, in every process."""
    values = list(values)
    if world() > 1:
        dist.broadcast_object_list(values)
    return values


def wrap(module):
    """Return `module`, or with several processes a wrapper whose backward pass averages their gradients."""
    return nn.parallel.DistributedDataParallel(module) if world() > 1 else module


def share(batch):
    """Return (indices, weight): the average over processes of weight x mean loss is the mean loss of the batch."""
    own = batch[rank()::world()]
    weight = world() * len(own) / len(batch)
    return (own, weight) if len(own) else (batch[:1], weight)  # DistributedDataParallel waits for every process
