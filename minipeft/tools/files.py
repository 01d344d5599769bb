"""The ground floor: the one exception for users' mistakes, atomic writes, hashes, JSON, safetensors, progress bars."""
import hashlib
import io
import json
import os
import shutil
import sys
import zlib
from contextlib import contextmanager
from pathlib import Path

import safetensors
import torch
from safetensors.torch import save_file
from tqdm import tqdm

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class UserError(Exception):
    """A mistake of the user's, or a limit of the machine: one line that says what is wrong and how to fix it.

    The command-line programs print the line and exit with code 2. Every other exception is a bug and keeps
    its traceback.
    """


def run_program(name, main, *arguments):
    """Call the main function of a command-line program and return its exit code. A user's mistake is one line; Ctrl-C,
    and a reader of the output that ends, such as head, end the program quietly."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # not in a notebook
            # A file or a pipe gets UTF-8; a text that a terminal cannot show must not stop a run.
            stream.reconfigure(encoding=None if stream.isatty() else "utf-8", errors="backslashreplace")
    try:
        try:
            return main(*arguments) or 0
        finally:
            sys.stdout.flush()  # here, where a reader that has ended is noticed, and not when Python exits
    except UserError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return 130


@contextmanager
def atomic(path):
    """Yield a temporary path to write to; on success it is renamed to `path`, which is never half-written.

    Raises UserError if the file system refuses (disk full, no permission); the old file is then untouched.
    """
    path = Path(path)
    folder = path.with_name(f"{path.name}.{os.getpid()}.part")  # a folder: safetensors puts a temporary beside its file
    temporary = folder / path.name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield temporary
        temporary.chmod(0o644)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"{path} could not be written ({error.strerror or error})") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_text(path, text):
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path, content):
    """Write a dict as a JSON object with one key a line: compact, and still readable."""
    encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ": ")).encode
    lines = (f"{encode(key)}: {encode(value)}" for key, value in content.items())
    write_text(path, "{" + ",\n".join(lines) + "}\n")


@contextmanager
def readable(path):
    """In this context, a file that cannot be read is a UserError."""
    try:
        yield
    except (OSError, EOFError, zlib.error) as error:  # the last two: a damaged .gz
        raise UserError(f"{path} could not be read ({getattr(error, 'strerror', None) or error})") from error


def read_json(path, keys=()):
    """Read a JSON object and check that it has `keys`. UserError if the file is missing or damaged."""
    try:
        with readable(path):
            content = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("not a JSON object")
        if missing := [key for key in keys if key not in content]:
            raise ValueError(f"missing: {', '.join(missing)}")
        return content
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): restore it, or delete it if minipeft wrote it") from error


def sha256(path):
    """The SHA-256 of a file, in hexadecimal. UserError if it cannot be read."""
    with readable(path), open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# -- safetensors -----------------------------------------------------------------------------------------

def read_safetensors(path):
    """Read all tensors of a file, and its metadata. UserError if the file is missing or damaged."""
    try:
        with readable(path), safetensors.safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
    except safetensors.SafetensorError as error:
        with open(path, "rb") as file:
            if file.read(23) == b"version https://git-lfs":
                error = "it is a Git-LFS pointer; git lfs pull fetches what it stands for"
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
    """UserError that counts, and lists up to five, tensors that are missing, unexpected, misshaped or not finite."""
    wrong = [f"missing {name}" for name in expected if name not in tensors]
    for name, tensor in tensors.items():
        if name not in expected:
            wrong.append(f"unexpected {name}")
        elif tensor.shape != expected[name].shape:
            wrong.append(f"{name} has shape {tuple(tensor.shape)}, not {tuple(expected[name].shape)}")
        elif tensor.dtype not in FLOATS or not tensor.isfinite().all():
            wrong.append(f"{name} holds values that are not finite floating-point numbers")
    if wrong:
        more = f"; and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise UserError(f"{path} does not fit the model: {'; '.join(wrong[:5])}{more}")


# -- progress --------------------------------------------------------------------------------------------

class Lines(io.TextIOBase):
    """A file for tqdm that prints each state as a line of its own."""

    def write(self, text):
        if text := text.replace("\x1b[A", "").strip():  # without the codes that move the cursor
            print(text, file=sys.stderr, flush=True)


def progress_bar(**options):
    """A tqdm bar in a terminal; elsewhere (nohup, CI, a notebook) a plain line every 30 seconds."""
    if not sys.stderr.isatty():
        options |= {"file": Lines(), "mininterval": 30, "maxinterval": 60, "delay": 30}
    return tqdm(**options, leave=False, smoothing=0.05)
