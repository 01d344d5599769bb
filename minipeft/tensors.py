"""Tensors in files: read, write and check safetensors."""
import safetensors
import torch
from safetensors.torch import save_file

from .files import UserError, atomic

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def read_safetensors(path):
    """Read all tensors of a file, and its metadata. UserError if the file is missing or damaged."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
    except OSError as error:
        raise UserError(f"{path} could not be read ({error.strerror or error})") from None
    except safetensors.SafetensorError as error:
        raise UserError(f"{path} is damaged ({error}): fetch or write it again") from None


def write_safetensors(path, tensors, metadata):
    """Write tensors and metadata (strings) to a file. UserError if the file system refuses."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with atomic(path) as temporary:
        try:
            save_file(tensors, temporary, metadata)
        except safetensors.SafetensorError as error:  # which it raises for a full disk, too
            raise OSError(str(error)) from error


def check_tensors(path, tensors, expected):
    """UserError that lists every tensor of `tensors` that is missing, unexpected, misshaped or not finite."""
    wrong = [f"missing {name}" for name in expected if name not in tensors]
    for name, tensor in tensors.items():
        if name not in expected:
            wrong.append(f"unexpected {name}")
        elif tensor.shape != expected[name].shape:
            wrong.append(f"{name} has shape {tuple(tensor.shape)}, not {tuple(expected[name].shape)}")
        elif tensor.dtype not in FLOATS or not tensor.isfinite().all():
            wrong.append(f"{name} holds values that are not finite floating-point numbers")
    if wrong:
        raise UserError(f"{path} does not fit the model: " + "; ".join(wrong))
