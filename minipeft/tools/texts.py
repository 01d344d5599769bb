"""Labelled texts from CSV, TSV, JSON-lines files or folders, checked and tokenised into a Corpus (data.py)."""
import csv
import hashlib
import json
import os
from array import array
from itertools import islice
from pathlib import Path

import numpy as np

from ..data import Corpus, load_tokenizer, split, tokenize
from . import download
from .files import UserError, sha256

CHUNK = 1000  # sentences read and tokenised at a time
UNLABELLED = "unsup"  # the subfolder of unlabelled texts in the IMDb archive


# -- reading ----------------------------------------------------------------------------------------------

def read_lines(path):
    """Yield the lines of a UTF-8 file. Raises UserError, with the line, for other encodings and NUL bytes."""
    try:
        with open(path, "rb") as file:
            for number, raw in enumerate(file, 1):
                if b"\0" in raw:
                    raise ValueError("a NUL byte")
                yield raw.decode("utf-8-sig" if number == 1 else "utf-8")
    except ValueError as error:  # UnicodeDecodeError is one
        raise UserError(f"{path}, line {number}: not plain text ({error}); save the file as UTF-8 text") from None
    except OSError as error:
        raise UserError(f"{path} could not be read ({error.strerror or error})") from error


def read_json_lines(path, text_column, label_column):
    for number, line in enumerate(read_lines(path), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            text, label = row[text_column], row[label_column]
            if not isinstance(text, str) or isinstance(label, (dict, list)):
                raise TypeError("the text must be a string, the label a string or a number")
            f"{text}{label}".encode()  # fails for half of a surrogate pair, which is not a character
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise UserError(f"{path}, line {number}: not a JSON object with the fields {text_column!r} and "
                            f"{label_column!r} ({error}); name them with --text-column and --label-column") from None
        yield number, text, "" if label is None else str(label).strip()


def read_rows(path, form):
    """Yield (line on which the row begins, list of fields) for each row of a CSV or TSV file but blank lines."""
    csv.field_size_limit(2**31 - 1)
    begin = 1
    reader = csv.reader(read_lines(path), **form)
    try:
        for row in reader:
            if row:
                yield begin, row
            begin = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{path}, line {begin}: {error}; check quotation marks and line ends") from None


def read_table(path, text_column, label_column):
    form = {"strict": True}
    if path.suffix in (".tsv", ".tab") or path.suffix != ".csv" and "\t" in next(read_lines(path), ""):
        form = {"delimiter": "\t", "quoting": csv.QUOTE_NONE}  # in TSV a quotation mark is an ordinary character
    start = [row for _, row in islice(read_rows(path, form), CHUNK)]
    if not start:
        return
    names = [name.strip() for name in start[0]]
    text, label = text_column or "text", label_column or "label"
    header = text in names and label in names
    if header:
        text, label = names.index(text), names.index(label)
    elif len(names) == 2 and not (text_column or label_column):  # the label is the column with fewer distinct values
        first, second = (len({row[column] for row in start if len(row) == 2}) for column in (0, 1))
        text, label = (1, 0) if first < second else (0, 1)
    else:
        raise UserError(f"{path}, line 1: the columns are {', '.join(map(repr, names))[:300]}, without {text!r} or "
                        f"{label!r}; name them with --text-column and --label-column")
    for line, row in islice(read_rows(path, form), int(header), None):
        if len(row) != len(names):
            raise UserError(f"{path}, line {line}: {len(row)} columns where the first line has {len(names)}; a text "
                            "that contains the separator needs quotation marks around it")
        yield line, row[text], row[label].strip()


def list_folder(folder):
    """Return the sorted names, like pos/12_8.txt, of the texts in a folder with one subfolder a class."""
    paths = Path(folder).glob("[!.]*/[!.]*.txt")  # without hidden files
    return sorted(path.relative_to(folder).as_posix() for path in paths if path.parent.name != UNLABELLED)


def read_folder(folder):
    for number, name in enumerate(list_folder(folder), 1):
        label = name.partition("/")[0]
        try:
            label.encode()
        except UnicodeEncodeError:
            raise UserError(f"{folder}: the name of the class folder {label!a} is not UTF-8: rename it") from None
        yield number, "".join(read_lines(folder / name)).strip(), label


def read_file(path, text_column=None, label_column=None):
    """Yield (line, text, label) for each row of a CSV, TSV or JSON-lines file, or for each .txt file of a folder.

    A table of two columns needs no header. In a folder "line" is the place of the file in the sorted listing, from 1.
    Raises UserError with file and line.
    """
    path = Path(path)
    if path.is_dir():
        return read_folder(path)
    if not path.is_file():
        raise UserError(f"{path} is not a file or folder; give a CSV, TSV or JSON-lines file or a folder")
    if path.suffix in (".jsonl", ".ndjson", ".json"):
        return read_json_lines(path, text_column or "text", label_column or "label")
    return read_table(path, text_column, label_column)


def fingerprint(path):
    """The SHA-256 of a data file; for a folder, the SHA-256 over the hashes and names of its texts."""
    if not Path(path).is_dir():
        return sha256(path)
    listing = "".join(f"{sha256(Path(path) / name)}  {name}\n" for name in list_folder(path))
    return hashlib.sha256(os.fsencode(listing)).hexdigest()


# -- the corpus -------------------------------------------------------------------------------------------

def read_texts(corpus, indices):
    """Read the texts of some sentences from their files again, in one pass."""
    places = [(corpus.file[index], corpus.line[index]) for index in indices]
    found = dict.fromkeys(places)
    for number, path in enumerate(corpus.files):
        for line, text, _ in read_file(path, *corpus.columns):
            if (number, line) in found:
                found[number, line] = text
    return [found[place] for place in places]


def hash_text(text):
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def check_labels(corpus):
    """Raise UserError unless there are at least two classes, each with two sentences or more, and the test set has no
    other class."""
    path = corpus.files[-1]
    counts = np.bincount(corpus.labels[corpus.file == len(corpus.files) - 1], minlength=len(corpus.classes))
    if np.count_nonzero(counts) == 1:
        raise UserError(f"{path}: every label is {corpus.classes[counts.argmax()]!r:.80}; two classes are needed")
    rarest = counts.argmin()
    if counts[rarest] < 2:
        last = np.flatnonzero(corpus.labels == rarest)[-1]  # in a test file, if the data lack this label
        raise UserError(f"{corpus.files[corpus.file[last]]}, line {corpus.line[last]}: {path} has {counts[rarest]} "
                        f"sentences labelled {corpus.classes[rarest]!r:.80} and needs two; add some or take the label "
                        "out (if it is the name of a column, use --text-column and --label-column)")


def find_usable(corpus, exact):
    """Return which sentences to keep, as a boolean mask, and add to corpus.notes what is left out and why.

    exact: (n,) hashes of the texts without surrounding white space. Each row of a test file is kept.
    """
    kept = np.ones(len(corpus), bool)
    own = np.flatnonzero(corpus.file == len(corpus.files) - 1)
    if len(corpus.files) > 1:
        tested = np.isin(corpus.hashes[own], corpus.hashes[corpus.file == 0])
        kept[own[tested]] = False
        if tested.any():
            corpus.notes.append(f"left out {tested.sum():,} sentences of {corpus.files[-1]} that occur in "
                                f"{corpus.files[0]} too")
        own = own[~tested]

    _, first, same = np.unique(exact[own], return_index=True, return_inverse=True)
    first = first[same]  # the first sentence with the same text, as an index into own
    labels = corpus.labels[own]
    differs = labels != labels[first]
    conflicts = np.isin(first, first[differs])
    if conflicts.any():
        one, other = own[first[differs][0]], own[differs][0]
        corpus.notes.append(
            f"left out {conflicts.sum():,} sentences of {corpus.files[-1]} whose text occurs with more than one label "
            f"({len(set(first[differs])):,} texts), such as {read_texts(corpus, [one])[0]!r:.200}: "
            f"{corpus.classes[corpus.labels[one]]!r:.80} in line {corpus.line[one]}, "
            f"{corpus.classes[corpus.labels[other]]!r:.80} in line {corpus.line[other]}")
    repeats = (first != np.arange(len(own))) & ~conflicts
    if repeats.any():
        corpus.notes.append(f"dropped {repeats.sum():,} repeated sentences")
    kept[own[conflicts | repeats]] = False
    return kept


def read_corpus(files, tokenizer, text_column=None, label_column=None):
    """Read, check and tokenise the labelled sentences of one data set, or of a test set and a data set.

    Each row of a test set (the first of two `files`) that has a text is kept, repeated ones included. Left out of the
    data, and counted in `notes`: rows without text (also in the test set), sentences that occur in the test set
    whatever their case and spacing, texts with more than one label, exact repeats. Raises UserError if a file cannot
    be used: no rows, one class, a row without a label, a label that occurs once.
    """
    tokens, lengths, labels, lines, hashes, exact = (array(kind) for kind in "iiiqQQ")
    names, sizes, notes, cut = {}, [], [], 0
    for path in files:
        rows, empty = read_file(path, text_column, label_column), 0
        while chunk := list(islice(rows, CHUNK)):
            texts = []
            for line, text, label in chunk:
                if not text.strip():
                    empty += 1
                    continue
                if not label:
                    raise UserError(f"{path}, line {line}: a text without a label; label it or take it out")
                texts.append(text)
                labels.append(names.setdefault(label, len(names)))
                lines.append(line)
                hashes.append(hash_text(" ".join(text.casefold().split())))
                exact.append(hash_text(text.strip()))
            sentences, too_long = tokenize(tokenizer, texts)
            cut += too_long
            for ids in sentences:
                tokens.frombytes(ids.tobytes())
                lengths.append(len(ids))
        sizes.append(len(lines) - sum(sizes))
        if not sizes[-1]:
            raise UserError(f"{path} holds no sentences; a table needs rows of text and label, a folder one "
                            "subfolder a class with one .txt file a sentence")
        if empty:
            notes.append(f"skipped {empty:,} rows without text in {path}")
        if (Path(path) / UNLABELLED).is_dir():
            notes.append(f"left out {Path(path) / UNLABELLED}: texts without labels")
    if cut:
        tokens_kept = tokenizer.truncation["max_length"]
        notes.append(f"cut {cut:,} of {len(lines):,} texts to {tokens_kept} tokens (--max-length)")

    classes = sorted(names)
    rank = {name: number for number, name in enumerate(classes)}
    corpus = Corpus(list(files), (text_column, label_column), classes,
                    tokens=np.frombuffer(tokens, np.int32),
                    starts=np.concatenate([[0], np.cumsum(lengths)]),
                    labels=np.array([rank[name] for name in names])[labels],
                    file=np.repeat(np.arange(len(files)), sizes),
                    line=np.array(lines), hashes=np.array(hashes), notes=notes)
    check_labels(corpus)
    corpus.keep(find_usable(corpus, np.array(exact)))
    return corpus


def check_files(settings):
    """UserError if a file of the user's does not exist."""
    for path in filter(None, (settings.test, settings.data)):
        read_file(path)


def load_data(settings, weights, config):
    """Read, tokenise and split the data of `settings`: (corpus, train, dev, test), the last three arrays of indices."""
    tokenizer = load_tokenizer(weights, settings.max_length)
    if settings.max_length > config.max_position_embeddings:
        raise UserError(f"--max-length {settings.max_length}: this encoder takes at most "
                        f"{config.max_position_embeddings} tokens")
    if tokenizer.get_vocab_size() > config.vocab_size:
        raise UserError(f"{weights}: tokenizer.json has {tokenizer.get_vocab_size():,} tokens and the encoder only "
                        f"{config.vocab_size:,}: they do not belong together")
    files = [settings.data or download.fetch_data()]
    if settings.test:
        files.insert(0, settings.test)
    corpus = read_corpus(files, tokenizer, settings.text_column, settings.label_column)
    train_set, dev_set, test_set = split(corpus, settings.fold)
    if settings.limit:
        train_set = np.sort(np.random.default_rng(settings.seed).permutation(train_set)[:settings.limit])
        if len(np.unique(corpus.labels[train_set])) < len(corpus.classes):
            raise UserError(f"--limit {settings.limit} leaves a class without a training sentence; take more")
    return corpus, train_set, dev_set, test_set
