"""Labelled texts from tables (CSV, TSV), JSON or folders, checked and tokenised into a Corpus (data.py).

A file is read as lines (encoding), rows (format), and a Table (columns); its labelled texts become a Corpus. Rows that
are left out, or read in a second way, are counted in a note, which train.py prints. What cannot be read is a UserError.
"""
import codecs
import csv
import gzip
import hashlib
import io
import json
import os
import re
import zlib
from array import array
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

import numpy as np

from ..data import Corpus, limit, load_tokenizer, split, tokenize
from . import download
from .files import UserError, sha256

CHUNK = 1000  # rows that are read and tokenised at a time; the first so many decide on the format
UNLABELLED = " (a file without labels: python -m minipeft predict RUN --csv FILE)"
NO_CLASSES = ("unsup", "__MACOSX")  # subfolders: unlabelled texts in the IMDb archive, what macOS adds to archives


# -- lines ------------------------------------------------------------------------------------------------

def counted(number, noun):
    """A number with its noun: "1 sentence", "2,000 sentences"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def listed(names, most=10):
    """Names on one line; of many the first ones, and how many follow."""
    return ", ".join(names[:most]) + (f" and {len(names) - most:,} more" if len(names) > most else "")


def read_lines(path, encoding, notes):
    """Yield the lines of a text file, also of one packed with gzip. UserError, with the line, if it is not text.

    encoding: None for UTF-16 if the file begins with its mark, else UTF-8, with Windows-1252 for lines that are not
    UTF-8: these are counted in a note, added to `notes`.
    """
    number, other = 0, []  # other: the lines that are not UTF-8
    try:
        with (gzip.open if str(path).lower().endswith(".gz") else open)(path, "rb") as file:
            if not encoding and file.peek(2)[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
                encoding = "utf-16"
            for line in io.TextIOWrapper(file, encoding, newline="\n") if encoding else file:
                number += 1
                try:
                    line = line if encoding else line.decode()
                except UnicodeDecodeError:
                    line = line.decode("cp1252")
                    other.append(number)
                if "\0" in line:
                    raise ValueError("a NUL byte")
                yield line.removeprefix("\ufeff")  # not only in line 1: files may have been joined
    except ValueError as error:  # UnicodeDecodeError is one
        place = "after line" if encoding else "line"  # with a given encoding, many lines are decoded at once
        raise UserError(f"{path}, {place} {number}: not plain text ({error}); name the encoding with --encoding, or "
                        "save the file as UTF-8") from None
    except (OSError, EOFError, zlib.error) as error:  # the last two from a damaged .gz
        raise UserError(f"{path} could not be read ({getattr(error, 'strerror', None) or error})") from error
    if other:
        notes.append(f"{path}, line {other[0]}: not UTF-8, so {counted(len(other), 'such line')} read as Windows-1252 "
                     "(--encoding names another)")


# -- rows -------------------------------------------------------------------------------------------------

def read_objects(path, encoding, notes):
    """Yield (line, object) from a JSON-lines file, or (place, object) from a JSON array of objects."""
    lines, number = read_lines(path, encoding, notes), 0
    first = next(lines, "")
    is_array, lines = first.lstrip().startswith("["), chain([first], lines)
    try:
        for number, content in enumerate(["".join(lines)] if is_array else lines, 1):
            if not content.strip():
                continue
            found = json.loads(content, parse_constant=int)  # int("NaN") is a ValueError
            if "\\ud" in content.lower():
                json.dumps(found, ensure_ascii=False).encode()  # fails for half a surrogate pair: not a character
            for number, row in enumerate(found, 1) if is_array else [(number, found)]:
                if not isinstance(row, dict):
                    raise TypeError(f"{row!r:.80}")
                yield number, row
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{path}, line {number}: not a JSON object ({error})") from None


def is_regular(lines, separator):
    """Return whether this separator gives all rows the same number of columns, two or more."""
    quoting = csv.QUOTE_NONE if separator == "\t" else csv.QUOTE_MINIMAL
    try:
        rows = list(csv.reader(lines, delimiter=separator, quoting=quoting))
    except csv.Error:
        return False
    widths = {len(row) for row in rows[:-1] or rows} - {0}  # the last row may be incomplete; 0: a blank line
    return len(widths) == 1 and widths.pop() > 1


def quotes_close(lines):
    """Return whether quotation marks enclose fields of a TSV file, as csv and pandas write them.

    False if a mark that begins a field does not end one. False, too, if a field then contains a tab: the mark of one
    row was closed by the mark of another.
    """
    try:
        return all("\t" not in "".join(row) for row in csv.reader(lines, delimiter="\t", strict=True))
    except csv.Error:
        return False


def read_rows(path, kind, encoding, separator, notes):
    """Yield (line on which the row begins, list of fields) from a CSV or TSV file, without blank lines."""
    csv.field_size_limit(2**31 - 1)
    lines, skipped, opened = read_lines(path, encoding, notes), 0, 0
    start = list(islice(lines, CHUNK))
    if start and (first := re.fullmatch(r"sep=(.)\s*", start[0], re.IGNORECASE)):  # a line for Excel
        separator, skipped, start = separator or first[1], 1, start[1:]
    choice = {".tsv": "\t", ".tab": "\t", ".csv": ",;\t"}.get(kind, "\t,;")
    separator = separator or next((mark for mark in choice if is_regular(start, mark)), choice[0])
    as_they_are = separator == "\t" and not quotes_close(read_lines(path, encoding, []))
    reader = csv.reader(chain(start, lines), delimiter=separator, strict=True,
                        quoting=csv.QUOTE_NONE if as_they_are else csv.QUOTE_MINIMAL)
    begin = skipped + 1
    try:
        for row in reader:
            if row:
                yield begin, row
            if as_they_are:
                opened += sum(field.startswith('"') for field in row)
            begin = skipped + reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{path}, line {begin}: {error}; check quotation marks and line ends") from None
    if as_they_are:
        notes.append(f"{path}: not every field that begins with a quotation mark ends with one, so quotation marks are "
                     f"part of the text ({counted(opened, 'field')})")


def list_folder(folder):
    """Return the sorted names, like pos/12_8.txt, of the texts in a folder with one subfolder a class. UserError if a
    subfolder has no texts."""
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
    """Yield (place in the sorted listing, [name, text, class]) for each text of a folder."""
    names, changed = list_folder(folder), []
    others = Counter({Path(place).relative_to(folder).as_posix(): len(files) for place, _, files in os.walk(folder)})
    others.subtract(name.partition("/")[0] for name in names)
    for number, name in enumerate(names, 1):
        label = name.partition("/")[0]
        if label != label.encode(errors="replace").decode():
            raise UserError(f"{folder}: the name of the class folder {label!a} is not UTF-8: rename it")
        yield number, [name, "".join(read_lines(folder / name, encoding, changed)).strip(), label]
    if others := sorted((+others).items()):  # those above 0
        notes.append(f"left out of {folder}: " + listed([f"{counted(n, 'file')} in {place}" for place, n in others])
                     + " (the texts of a class are the .txt files in its folder)")
    if changed:
        notes.append(f"{changed[0]}; {counted(len(changed), 'such file')}")


# -- tables and labels ------------------------------------------------------------------------------------

@dataclass
class Table:
    """The rows of a file or folder, and the indices of the columns that hold text and label (None: no such column)."""
    names: list     # of the columns
    text: int
    label: int
    rows: Iterator  # (line, list of values)


def find_column(names, name):
    """Return the index of a column, or else of one whose name differs in case only, or else None."""
    same = [column for column, other in enumerate(names) if other.casefold() == name.casefold()]
    return names.index(name) if name in names else next(iter(same), None)


def check_rows(path, rows, names, text, header, notes):
    """Yield the rows but those equal to `header`. UserError, with the line, if one does not fit."""
    headers = 0
    for line, row in rows:
        if row == header:
            headers += 1
            continue
        if len(row) != len(names):
            raise UserError(f"{path}, line {line}: {len(row)} columns where the first line has {len(names)}; a text "
                            "that contains the separator needs quotation marks around it")
        if not isinstance(row[text], str):
            raise UserError(f"{path}, line {line}: {names[text]!r} is {row[text]!r:.80} and not a string")
        yield line, row
    if headers > 1:  # files that were joined
        notes.append(f"left out {counted(headers - 1, 'row')} of {path} equal to the names of its columns")


def open_table(path, notes, labelled=True, text_column=None, label_column=None, encoding=None, separator=None):
    """Return the Table of a CSV, TSV, JSON-lines or JSON file, or of a folder.

    Column names ("text" and "label" by default) are found whatever their case. Of two columns one name is enough; if
    there is none, there is no header, and the label is the column with fewer distinct values. Unless `labelled`, a
    column of labels is not needed, but a header is. UserError if a column is missing. Notes come with the last row.
    """
    path, header = Path(path), None
    if path.is_dir():
        return Table(["file", "text", "label"], 1, 2, read_folder(path, encoding, notes))
    if not path.is_file():
        raise UserError(f"{path} is not a file or folder; give a CSV, TSV or JSON file or a folder")
    kind = Path(path.name.lower().removesuffix(".gz")).suffix
    if kind in (".jsonl", ".ndjson", ".json"):
        rows = read_objects(path, encoding, notes)
        start = list(islice(rows, 1))
        names = list(start[0][1]) if start else []
        rows = ((line, [row.get(name) for name in names]) for line, row in chain(start, rows))
    else:
        rows = read_rows(path, kind, encoding, separator, notes)
        start = list(islice(rows, CHUNK))
        header = start[0][1] if start else []
        names, rows = [name.strip() for name in header], chain(start, rows)

    wanted = text_column or "text", label_column or "label"
    text, label = (find_column(names, name) for name in wanted)
    if len(names) == 2 and not (text_column or label_column):
        if text is None and label is None and header and labelled:
            first, second = (len({row[column] for _, row in start if len(row) == 2}) for column in (0, 1))
            text, label = (1, 0) if first < second else (0, 1)
            names[text], names[label], header = *wanted, None
        elif text is None and label is not None:
            text = 1 - label
        elif label is None and text is not None:
            label = 1 - text
    way_out = f"the columns with --text-column and --label-column{UNLABELLED}" if labelled else "it with --text-column"
    for name, column in zip(wanted, (text, label if labelled else 0)):
        if column is None and names:
            others = listed([repr(name) for name in names])
            raise UserError(f"{path} has no column {name!r} but {others}; name {way_out}")
    return Table(names, text, label, check_rows(path, rows, names, text, header, notes))


def read_file(path, notes=None, **reading):
    """Yield (line, text, label) for each row of a labelled file or folder. Raises UserError, with the line.

    In a folder "line" is the place of the file in the sorted listing, in a JSON array that of the object, from 1.
    reading: options of `open_table`.
    """
    table = open_table(path, [] if notes is None else notes, **reading)
    for line, row in table.rows:
        label = row[table.label]
        if isinstance(label, (dict, list)):
            raise UserError(f"{path}, line {line}: {table.names[table.label]!r} is neither a string nor a number")
        yield line, row[table.text], "" if label is None else str(label).strip()


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
        for line, text, _ in read_file(path, **corpus.reading):
            if (number, line) in found:
                found[number, line] = text
    return [found[place] for place in places]


def hash_text(text):
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def spelling(name):
    """Return what names that differ in case or number format only have in common: Pos and pos, 1 and 1.0."""
    try:
        return float(name)
    except ValueError:
        return name.casefold()


def check_labels(corpus):
    """Raise UserError unless there are at least two classes, each with two sentences or more, and the test set has no
    other class."""
    path, labels = corpus.files[-1], corpus.labels
    own = corpus.file == len(corpus.files) - 1
    counts = np.bincount(labels[own], minlength=len(corpus.classes))
    if np.count_nonzero(counts) == 1:
        raise UserError(f"{path}: every label is {corpus.classes[counts.argmax()]!r:.80}; two classes are needed")
    if not own.all() and not counts[labels[~own]].any():
        tested = listed([repr(corpus.classes[label]) for label in np.unique(labels[~own])], 3)
        raise UserError(f"{corpus.files[0]}: none of its labels ({tested}) occurs in {path}" + UNLABELLED)
    rarest = counts.argmin()
    if counts[rarest] < 2:
        last = np.flatnonzero(labels == rarest)[-1]  # in a test file, if the data lack this label
        raise UserError(f"{corpus.files[corpus.file[last]]}, line {corpus.line[last]}: {path} has "
                        f"{counted(counts[rarest], 'sentence')} labelled {corpus.classes[rarest]!r:.80} and needs two; "
                        "add some or take the label out (if it is the name of a column, use --text-column and "
                        "--label-column)")


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
            corpus.notes.append(f"left out {counted(tested.sum(), 'sentence')} of {corpus.files[-1]} found in "
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
            f"({counted(len(set(first[differs])), 'text')}), such as {read_texts(corpus, [one])[0]!r:.200}: "
            f"{corpus.classes[corpus.labels[one]]!r:.80} in line {corpus.line[one]}, "
            f"{corpus.classes[corpus.labels[other]]!r:.80} in line {corpus.line[other]}")
    repeats = (first != np.arange(len(own))) & ~conflicts
    if repeats.any():
        corpus.notes.append(f"dropped {counted(repeats.sum(), 'repeated sentence')}")
    kept[own[conflicts | repeats]] = False
    return kept


def read_corpus(files, tokenizer, **reading):
    """Read, check and tokenise the labelled sentences of one data set, or of a test set and a data set.

    Each row of a test set (the first of two `files`) that has a text is kept, repeated ones included. Left out of the
    data, and counted in `notes`: rows without text (also in the test set), sentences that occur in the test set
    whatever their case and spacing, texts with more than one label, exact repeats. Raises UserError if a file cannot
    be used: no rows, one class, a row without a label, a label that occurs once. reading: options of `open_table`.
    """
    tokens, lengths, labels, lines, hashes, exact = (array(kind) for kind in "iiiqQQ")
    names, sizes, notes, cut = {}, [], [], 0
    for path in files:
        rows, empty = read_file(path, notes, **reading), 0
        while chunk := list(islice(rows, CHUNK)):
            texts = []
            for line, text, label in chunk:
                if not text.strip():
                    empty += 1
                    continue
                if not label:
                    raise UserError(f"{path}, line {line}: a text without a label; label it or take it out"
                                    + UNLABELLED)
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
            notes.append(f"skipped {counted(empty, 'row')} without text in {path}")
    if cut:
        tokens_kept = tokenizer.truncation["max_length"]
        notes.append(f"cut {cut:,} of {counted(len(lines), 'text')} to {tokens_kept} tokens (--max-length)")
    if unknown := tokens.count(tokenizer.token_to_id("[UNK]")):
        share = unknown / (len(tokens) - 2 * len(lines))  # without [CLS] and [SEP]
        notes.append(f"{share:.1%} of the tokens are [UNK]: the vocabulary of the weights lacks them")
        if share > 0.1:
            notes[-1] = f"warning: {notes[-1]}; take weights for this language, or multilingual ones, with --weights"

    whole = all(re.fullmatch(r"-?\d+", name) for name in names)
    classes = sorted(names, key=lambda name: (int(name) if whole else 0, name))
    spellings = Counter(map(spelling, classes))
    if alike := [name for name in classes if spellings[spelling(name)] > 1]:
        notes.append(f"warning: some classes differ in case or number format only: {listed(alike)}")
    rank = {name: number for number, name in enumerate(classes)}
    corpus = Corpus(list(files), reading, classes,
                    tokens=np.frombuffer(tokens, np.int32),
                    starts=np.concatenate([[0], np.cumsum(lengths)]),
                    labels=np.array([rank[name] for name in names])[labels],
                    file=np.repeat(np.arange(len(files)), sizes),
                    line=np.array(lines), hashes=np.array(hashes), notes=notes)
    check_labels(corpus)
    corpus.keep(find_usable(corpus, np.array(exact)))
    return corpus


def reading_options(settings):
    """The options of `open_table` that `settings` hold."""
    return {name: getattr(settings, name) for name in ("text_column", "label_column", "encoding", "separator")}


def check_files(settings):
    """UserError if a file of the user's is missing or its first rows cannot be read."""
    for path in filter(None, (settings.test, settings.data)):
        deque(islice(read_file(path, **reading_options(settings)), CHUNK), maxlen=0)


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
