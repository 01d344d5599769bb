"""Atomic writes, hashes, JSON, and the one exception for users' mistakes."""
import hashlib
import json
import os
import shutil
from contextlib import contextmanager
from pathlib import Path


class UserError(Exception):
    """A mistake of the user's, or a limit of the machine: one line that says what is wrong and how to fix it.

    The command-line programs print the line and exit with code 2. Every other exception is a bug and keeps
    its traceback.
    """


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


def read_json(path, keys=()):
    """Read a JSON object and check that it has `keys`. UserError if the file is missing or damaged."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} could not be read ({error.strerror or error})") from error
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): restore it, or delete it if minipeft wrote it") from error
    missing = [key for key in keys if key not in content] if isinstance(content, dict) else ["a JSON object"]
    if missing:
        raise UserError(f"{path} is damaged (missing: {', '.join(missing)}): restore it, or delete it if minipeft "
                        "wrote it")
    return content


def sha256(path):
    """The SHA-256 of a file, in hexadecimal. UserError if it cannot be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path} could not be read ({error.strerror or error})") from error
