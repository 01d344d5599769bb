"""Labelled texts from tables (CSV, TSV), JSON or folders, checked and tokenised into a Corpus (data.py).

A file is read as text (encoding), rows (format) and a Table (columns). What is left out, or read in a second way, is
counted in a note, which train.py prints. What cannot be read is a UserError that names the line.
"""
import codecs
import csv
import gzip
import hashlib
import io
import json
import os
import re
from collections import Counter
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np

from ..data import Corpus, limit, load_tokenizer, split, tokenize
from . import download
from .files import UserError, readable, sha256
from .settings import READING

UNLABELLED = " (if the file has no labels: python -m minipeft predict RUN --csv FILE)"
NO_CLASSES = ("unsup", "__MACOSX")  # subfolders: unlabelled texts in the IMDb archive, what macOS adds to archives


def counted(number, noun):
    """A number with its noun: "1 sentence", "2,000 sentences"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def listed(names, most=10):
    """Names on one line; of many the first ones, and how many follow."""
    return ", ".join(names[:most]) + (f" and {len(names) - most:,} more" if len(names) > most else "")


# -- text and rows ----------------------------------------------------------------------------------------

def read_text(path, encoding):
    """Return the content of a text file, which may be packed with gzip. UserError, with the line, if it is not text.

    Without `encoding`: UTF-16 if the file begins with its mark, else UTF-8.
    """
    with readable(path):
        content = path.read_bytes()
        if path.suffix.lower() == ".gz":
            content = gzip.decompress(content)
    if encoding is None:
        encoding = "utf-16" if content[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8"
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}, line {line}: not {encoding} text ({error.reason}); save it as UTF-8, or name its "
                        "encoding with --encoding, such as cp1252") from None
    return re.sub("^\ufeff", "", text, flags=re.MULTILINE)  # not only in line 1: files may have been joined


def read_objects(path, text):
    """Return (number, object) of each object of a JSON array, or of each line of a file of JSON lines."""
    number, rows = 1, []
    try:
        if text.lstrip().startswith("["):
            rows = list(enumerate(json.loads(text, parse_constant=int), 1))
        else:
            for number, line in enumerate(text.split("\n"), 1):
                if line.strip():
                    rows.append((number, json.loads(line, parse_constant=int)))  # int("NaN") is a ValueError
        for number, row in rows:
            if not isinstance(row, dict):
                raise ValueError(f"{row!r:.80}")
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}, line {number}: not a JSON object ({error})") from None
    return rows


def parse_rows(path, text, separator, quoting=csv.QUOTE_MINIMAL):
    """Return (line on which it begins, list of fields) of each row that is not blank."""
    rows, begin = [], 1
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, quoting=quoting, strict=True)
    try:
        for row in reader:
            if row:
                rows.append((begin, row))
            begin = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{path}, line {begin}: {error}; check quotation marks") from None
    return rows


def read_rows(path, text, separator, notes):
    """Return the rows of a table as `parse_rows` does. The separator is the most frequent one of the first line.

    Many TSV files do not quote: there, a quotation mark is part of the text.
    """
    first_line = text.lstrip("\r\n").partition("\n")[0]
    separator = separator or max("\t,;", key=first_line.count)
    try:
        rows = parse_rows(path, text, separator)
        if separator != "\t" or not any("\t" in field for _, row in rows for field in row):
            return rows  # a tab inside: the quotation mark of one row was closed by that of another
    except UserError:
        if separator != "\t":
            raise
    notes.append(f"{path}: not every field that begins with a quotation mark ends with one, so quotation marks are "
                 "part of the text")
    return parse_rows(path, text, separator, csv.QUOTE_NONE)


def list_folder(folder):
    """Return the sorted names, like pos/12_8.txt, of the texts in a folder with one subfolder a class."""
    folder, names = Path(folder), []
    if (folder / "train").is_dir() and (folder / "test").is_dir():
        raise UserError(f"{folder} holds two data sets: give --data {folder / 'train'} --test {folder / 'test'}")
    for path in folder.glob("[!.]*"):  # without hidden files
        if path.is_dir() and path.name not in NO_CLASSES:
            found = [f"{path.name}/{text.name}" for text in path.glob("[!.]*.[tT][xX][tT]")]
            if not found:
                raise UserError(f"{path} holds no .txt file, but each subfolder is a class: add some or remove it")
            names += found
    return sorted(names)


def read_folder(folder, encoding, notes):
    """Return (place in the sorted listing, [name, text, class]) of each text of a folder."""
    names, rows = list_folder(folder), []
    for number, name in enumerate(names, 1):
        rows.append((number, [name, read_text(folder / name, encoding).strip(), name.partition("/")[0]]))
    others = sum(path.is_file() for path in folder.rglob("*")) - len(names)
    if others:
        notes.append(f"left out {counted(others, 'file')} of {folder} (texts are read from CLASS/NAME.txt)")
    return rows


# -- tables and labels ------------------------------------------------------------------------------------

@dataclass
class Table:
    """The rows of a file or folder, and the indices of the columns that hold text and label (None: no such column)."""
    names: list  # of the columns
    text: int
    label: int
    rows: list   # of (line, list of values)


def find_column(names, name):
    """Return the index of a column, or else of one whose name differs in case only, or else None."""
    same = [column for column, other in enumerate(names) if other.casefold() == name.casefold()]
    return names.index(name) if name in names else next(iter(same), None)


def is_text(value):
    """Return whether a value is a string without halves of characters, which JSON and names of files can hold."""
    return isinstance(value, str) and value == value.encode(errors="replace").decode()


def open_table(path, notes, labelled=True, text_column=None, label_column=None, encoding=None, separator=None):
    """Return the Table of a CSV, TSV, JSON-lines or JSON file, or of a folder.

    Column names ("text" and "label" by default) are found whatever their case; of two columns one name is enough.
    Unless `labelled`, a column of labels is not needed. Rows equal to the first, as in files that were joined, are left
    out. UserError if a column is missing or, with the line, a row does not fit.
    """
    path = Path(path)
    if path.is_dir():
        return Table(["file", "text", "label"], 1, 2, read_folder(path, encoding, notes))
    if not path.is_file():
        raise UserError(f"{path} is not a file or folder; give a CSV, TSV or JSON file or a folder")
    content = read_text(path, encoding)
    if Path(path.name.lower().removesuffix(".gz")).suffix in (".jsonl", ".ndjson", ".json"):
        objects = read_objects(path, content)
        names = list(objects[0][1]) if objects else []
        rows = [(line, [row.get(name) for name in names]) for line, row in objects]
    else:
        (_, header), *others = read_rows(path, content, separator, notes) or [(1, [])]
        names = [name.strip() for name in header]
        rows = [(line, row) for line, row in others if row != header]
        if len(rows) < len(others):
            repeated = counted(len(others) - len(rows), "row")
            notes.append(f"left out {repeated} of {path} equal to the names of its columns")

    wanted = text_column or "text", label_column or "label"
    text, label = (find_column(names, name) for name in wanted)
    if len(names) == 2 and text is None and label is not None:
        text = 1 - label
    elif len(names) == 2 and label is None and text is not None:
        label = 1 - text
    for name, column in zip(wanted, (text, label if labelled else 0)):
        if column is None:
            found = listed([repr(name) for name in names]) or "none"
            way_out = f" and --label-column{UNLABELLED}" if labelled else ""
            raise UserError(f"{path} has no column {name!r} (found: {found}): the first line must name the columns; "
                            f"choose others with --text-column{way_out}")
    for line, row in rows:
        if len(row) != len(names):
            raise UserError(f"{path}, line {line}: {len(row)} columns where the first line has {len(names)}; a text "
                            "that contains the separator needs quotation marks around it")
        if not is_text(row[text]):
            raise UserError(f"{path}, line {line}: {names[text]!r} is {row[text]!a:.80} and not a text")
    return Table(names, text, label, rows)


def read_file(path, notes=None, **reading):
    """Yield (line, text, label) for each row of a labelled file or folder. Raises UserError, with the line.

    In a folder "line" is the place of the file in the sorted listing, in a JSON array that of the object, from 1.
    reading: options of `open_table`.
    """
    table = open_table(path, [] if notes is None else notes, **reading)
    for line, row in table.rows:
        label = row[table.label]
        if isinstance(label, (dict, list)) or not is_text(str(label)):
            raise UserError(f"{path}, line {line}: the label {label!a:.80} is neither a text nor a number")
        yield line, row[table.text], "" if label is None else str(label).strip()


def fingerprint(path):
    """The SHA-256 of a data file; for a folder, the SHA-256 over the hashes and names of its texts."""
    if not Path(path).is_dir():
        return sha256(path)
    listing = "".join(f"{sha256(Path(path) / name)}  {name}\n" for name in list_folder(path))
    return hashlib.sha256(os.fsencode(listing)).hexdigest()


# -- sentences --------------------------------------------------------------------------------------------

@dataclass(slots=True)
class Sentence:
    """A labelled text, and where it was read. file: an index into the list of files."""
    file: int
    line: int
    text: str
    label: str


def read_sentences(files, notes, **reading):
    """Read the labelled sentences of some files: a list of Sentences for each file. Rows without text are left out.

    Raises UserError for a file without sentences and for a text without a label. reading: options of `open_table`.
    """
    found = []
    for number, path in enumerate(files):
        rows = [Sentence(number, *row) for row in read_file(path, notes, **reading)]
        sentences = [row for row in rows if row.text.strip()]
        if not sentences:
            raise UserError(f"{path} holds no sentences: a table needs rows of text and label, a folder a subfolder "
                            "for each class with a .txt file for each sentence")
        if len(sentences) < len(rows):
            notes.append(f"skipped {counted(len(rows) - len(sentences), 'row')} without text in {path}")
        for sentence in sentences:
            if not sentence.label:
                raise UserError(f"{path}, line {sentence.line}: a text without a label; label it or take it out"
                                f"{UNLABELLED}")
        found.append(sentences)
    return found


def check_labels(files, found):
    """UserError unless the data, the last of the files, have two classes or more, each with two sentences, and the test
    set has no other."""
    path, counts = files[-1], Counter(sentence.label for sentence in found[-1])
    if len(counts) == 1:
        raise UserError(f"{path}: every label is {found[-1][0].label!r:.80}; two classes are needed")
    for sentence in chain(*found):
        number = counts[sentence.label]
        if number < 2:
            way_out = "; two are needed: add some or take it out" if number else UNLABELLED
            raise UserError(f"{files[sentence.file]}, line {sentence.line}: {path} has {counted(number, 'sentence')} "
                            f"labelled {sentence.label!r:.80}{way_out}")


def spelling(text):
    """Return what texts that differ in case and spacing only have in common."""
    return " ".join(text.casefold().split())


def find_usable(files, found, notes):
    """Return the sentences of the data, the last of the files, that can be used.

    Left out, with a note, are sentences of the test set whatever their case and spacing, texts with more than one
    label, and exact repeats. UserError if none is left.
    """
    *test, data = found
    path, tested = files[-1], {spelling(sentence.text) for sentence in chain(*test)}
    untested = [sentence for sentence in data if spelling(sentence.text) not in tested]
    if len(untested) < len(data):
        notes.append(f"left out {counted(len(data) - len(untested), 'sentence')} of {path} found in {files[0]} too")

    labels = {}  # of each text, with the line of the first sentence that has it
    for sentence in untested:
        labels.setdefault(sentence.text.strip(), {}).setdefault(sentence.label, sentence.line)
    clear = [sentence for sentence in untested if len(labels[sentence.text.strip()]) == 1]
    if len(clear) < len(untested):
        one, other, *_ = next(lines for lines in labels.values() if len(lines) > 1).values()
        notes.append(f"left out {len(untested) - len(clear):,} sentences of {path} whose text occurs with more than "
                     f"one label, such as lines {one} and {other}")

    first = {}  # the first sentence of each text
    for sentence in clear:
        first.setdefault(sentence.text.strip(), sentence)
    if len(first) < len(clear):
        notes.append(f"dropped {counted(len(clear) - len(first), 'repeated sentence')}")
    if not first:
        raise UserError(f"{path} holds no sentences that can be used: {'; '.join(notes)}")
    return list(first.values())


# -- the corpus -------------------------------------------------------------------------------------------

def hash_text(text):
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def read_corpus(files, tokenizer, **reading):
    """Read, check and tokenise the labelled sentences of one data set, or of a test set and a data set.

    Each row of a test set (the first of two `files`) that has a text is kept, repeated ones included; of the data,
    those of `find_usable`. Raises UserError if a file cannot be used. reading: options of `open_table`.
    """
    notes = []
    found = read_sentences(files, notes, **reading)
    check_labels(files, found)
    names = {sentence.label for sentence in chain(*found)}
    whole = all(re.fullmatch(r"-?\d+", name) for name in names)
    classes = sorted(names, key=lambda name: (int(name) if whole else 0, name))
    index_of = {name: index for index, name in enumerate(classes)}
    used = [*chain(*found[:-1]), *find_usable(files, found, notes)]
    ids, cut = tokenize(tokenizer, [sentence.text for sentence in used])
    tokens = np.concatenate(ids)
    if cut:
        notes.append(f"cut {cut:,} of {counted(len(used), 'text')} to {tokenizer.truncation['max_length']} tokens "
                     "(--max-length)")
    unknown = np.count_nonzero(tokens == tokenizer.token_to_id("[UNK]")) / (len(tokens) - 2 * len(used))
    if unknown:
        notes.append(f"{unknown:.1%} of the tokens are [UNK], which the vocabulary of the weights lacks (if many: take "
                     "--weights for this language)")
    return Corpus(
        list(files), reading, classes, tokens, starts=np.cumsum([0, *map(len, ids)]),
        labels=np.array([index_of[sentence.label] for sentence in used]),
        file=np.array([sentence.file for sentence in used]), line=np.array([sentence.line for sentence in used]),
        hashes=np.array([hash_text(spelling(sentence.text)) for sentence in used], np.uint64), notes=notes)


def read_texts(corpus, indices):
    """Read the texts of some sentences from their files again, in one pass."""
    places = [(corpus.file[index], corpus.line[index]) for index in indices]
    found = dict.fromkeys(places)
    for number, path in enumerate(corpus.files):
        for line, text, _ in read_file(path, **corpus.reading):
            if (number, line) in found:
                found[number, line] = text
    return [found[place] for place in places]


def reading_options(settings):
    """The options of `open_table` that `settings` hold."""
    return {name: getattr(settings, name) for name in READING}


def check_files(settings):
    """UserError if a file of the user's is missing or cannot be used."""
    files = [path for path in (settings.test, settings.data) if path]
    if files:
        check_labels(files, read_sentences(files, [], **reading_options(settings)))


def load_data(settings, weights, config):
    """Read, tokenise and split the data of `settings`: (corpus, train, dev, test), the last three arrays of indices.

    weights, config: of the encoder, whose tokenizer is used. Raises UserError for data or options that do not fit.
    """
    if settings.max_length > config.max_position_embeddings:
        raise UserError(f"--max-length {settings.max_length}: this encoder takes at most "
                        f"{config.max_position_embeddings} tokens")
    tokenizer = load_tokenizer(weights, settings.max_length, config.vocab_size)
    files = [settings.data or download.fetch_data()]
    if settings.test:
        files.insert(0, settings.test)
    corpus = read_corpus(files, tokenizer, **reading_options(settings))
    train_set, dev_set, test_set = split(corpus, settings.fold)
    return corpus, *limit(corpus, train_set, dev_set, settings.limit, settings.seed), test_set
