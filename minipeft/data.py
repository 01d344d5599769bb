"""From a file of labelled sentences to batches of token ids: read, check, split, tokenise, batch.

A corpus is a few flat arrays: all tokens end to end, and for every sentence where its tokens start, its
label and where in which file it stands. Texts are not kept; `Corpus.texts` reads the few that are shown.
"""
import csv
import hashlib
import json
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer

PARTS = 11  # a hash of its text puts every sentence into one of these parts
DEV = 10    # the part that all choices are made on; the others take turns as the test part
CHUNK = 1000  # sentences read and tokenised at a time
MULTIPLE = 8  # batches are padded to a multiple of so many tokens


# -- reading ----------------------------------------------------------------------------------------------

def read_lines(path):
    """The lines of a UTF-8 file. ValueError, with the line, for other encodings and for NUL bytes."""
    with open(path, "rb") as file:
        for number, raw in enumerate(file, 1):
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError:
                raise ValueError(f"{path}, line {number}: not UTF-8; save the file as UTF-8 text") from None
            if "\0" in line:
                raise ValueError(f"{path}, line {number}: holds a NUL byte, so the file is damaged or is not plain "
                                 "text; save it again as UTF-8 text")
            yield line


def read_json_lines(path, text_column, label_column):
    for number, line in enumerate(read_lines(path), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            text, label = row[text_column], row[label_column]
            str(text).encode()  # half of a surrogate pair is no character
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path}, line {number}: not a JSON object with the fields {text_column!r} and "
                             f"{label_column!r} ({error}); name them with --text-column and --label-column") from None
        if not isinstance(text, str) or isinstance(label, (dict, list)):
            raise ValueError(f"{path}, line {number}: the text has to be a string and the label a string or a number")
        yield number, text, "" if label is None else str(label)


def read_table(path, text_column, label_column):
    with open(path, "rb") as file:
        tabs = path.suffix in (".tsv", ".tab") or path.suffix != ".csv" and b"\t" in file.readline()
    csv.field_size_limit(2**31 - 1)
    # In a TSV file a quotation mark is a character like any other; in a CSV file it may enclose a field.
    form = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if tabs else {"strict": True}
    reader = csv.reader(read_lines(path), **form)
    try:
        start = list(islice(reader, CHUNK))
        reader = csv.reader(read_lines(path), **form)
        names = [name.strip() for name in start[0]] if start else []
        text, label = text_column or "text", label_column or "label"
        if text in names and label in names:
            text, label = names.index(text), names.index(label)
            next(reader)
        elif len(names) == 2 and not (text_column or label_column):  # no header: the labels are those with few values
            values = [len({row[column] for row in start if len(row) == 2}) for column in (0, 1)]
            text, label = (1, 0) if values[0] < values[1] else (0, 1)
        elif names:
            missing = " and ".join(repr(name) for name in (text, label) if name not in names)
            raise ValueError(f"{path}, line 1: no column {missing} among {', '.join(map(repr, names))[:300]}; name the "
                             "columns with --text-column and --label-column")
        for row in reader:
            if len(row) not in (0, len(names)):
                raise ValueError(f"{path}, line {reader.line_num}: {len(row)} columns where the first line has "
                                 f"{len(names)}; a text that holds the separator needs quotation marks around it")
            yield reader.line_num, row[text] if row else "", row[label].strip() if row else ""
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: {error}; check the quotation marks") from None


def read_file(path, text_column=None, label_column=None):
    """Yield (line number, text, label) for every row of a CSV, TSV or JSON-lines file.

    A table with two columns and no header is understood. Raises ValueError that names file and line,
    FileNotFoundError.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file; --data and --test take a CSV, TSV or JSON-lines file")
    if path.suffix in (".jsonl", ".ndjson", ".json"):
        return read_json_lines(path, text_column or "text", label_column or "label")
    return read_table(path, text_column, label_column)


# -- the corpus -------------------------------------------------------------------------------------------

@dataclass
class Corpus:
    """n labelled sentences. tokens: all token ids end to end; sentence i has tokens[starts[i]:starts[i + 1]]."""
    files: list         # the paths read; with a test file of its own, that comes first
    columns: tuple      # their text and label column, None for the defaults
    classes: list       # the names of the labels
    tokens: np.ndarray  # (total tokens,) int32
    starts: np.ndarray  # (n + 1,) int64
    labels: np.ndarray  # (n,) int64, indices into classes
    file: np.ndarray    # (n,) int64, index into files
    line: np.ndarray    # (n,) int64, where in that file
    hashes: np.ndarray  # (n,) uint64, equal for equal texts whatever their case and spacing
    notes: list         # what was mended or cut, to be said aloud

    def __len__(self):
        return len(self.labels)

    @property
    def lengths(self):
        """(n,) tokens in each sentence, [CLS] and [SEP] included"""
        return np.diff(self.starts)

    def sentences(self, rows):
        """The token ids of some sentences, as a list of arrays."""
        return [self.tokens[self.starts[row]:self.starts[row + 1]] for row in rows]

    def texts(self, rows):
        return read_texts(self.files, self.columns, [(self.file[row], self.line[row]) for row in rows])


def read_texts(files, columns, places):
    """The few texts that stand at `places`, pairs of (index into files, line), read once more."""
    found = {}
    for index, path in enumerate(files):
        for line, text, _ in read_file(path, *columns):
            if (index, line) in places:
                found[index, line] = text
    return [found[place] for place in places]


def load_tokenizer(folder, max_length):
    """The tokenizer of a folder of weights, cutting at `max_length` tokens and not padding.

    Raises ValueError if tokenizer.json is damaged, FileNotFoundError.
    """
    path = Path(folder) / "tokenizer.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: a folder of weights holds config.json, model.safetensors and "
                                "tokenizer.json")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"{path} is not a tokenizer ({error}): fetch the file again") from None
    tokenizer.no_padding()  # files from sentence-transformers pad everything to 128
    tokenizer.enable_truncation(max_length)
    return tokenizer


def tokenize(tokenizer, texts):
    """Token ids of each text as int32 arrays, and how many texts were cut."""
    encodings = tokenizer.encode_batch_fast(texts)
    return [np.array(encoding.ids, np.int32) for encoding in encodings], sum(bool(e.overflowing) for e in encodings)


def read_corpus(files, tokenizer, text_column=None, label_column=None):
    """Read, check and tokenise the labelled sentences of one or two files (a test file first) into a Corpus.

    Empty texts are skipped and repeated texts dropped, both counted in `notes`. Raises ValueError for a file
    that cannot be used: no rows, one class, a row without a label, a label that occurs once, one text with
    two labels.
    """
    tokens, labels, file, line, hashes, names = [], [], [], [], [], {}
    empty = cut = 0
    for index, path in enumerate(files):
        rows = read_file(path, text_column, label_column)
        while chunk := list(islice(rows, CHUNK)):
            kept = [row for row in chunk if row[1].strip()]
            empty += len(chunk) - len(kept)
            for number, text, label in kept:
                if not label:
                    raise ValueError(f"{path}, line {number}: a text without a label; label it or take it out")
                labels.append(names.setdefault(label, len(names)))
                same = " ".join(text.casefold().split()).encode()
                hashes.append(int.from_bytes(hashlib.blake2b(same, digest_size=8).digest(), "big"))
                file.append(index)
                line.append(number)
            ids, too_long = tokenize(tokenizer, [text for _, text, _ in kept])
            tokens += ids
            cut += too_long
        if index not in file:
            raise ValueError(f"{path} holds no sentences; it needs rows of text and label")

    classes = sorted(names)
    rank = {name: number for number, name in enumerate(classes)}
    labels = np.array([rank[name] for name in names])[labels]
    file, line, hashes = np.array(file), np.array(line), np.array(hashes, np.uint64)
    _, first, same = np.unique(hashes, return_index=True, return_inverse=True)
    conflicts = np.flatnonzero(labels != labels[first[same]])
    if len(conflicts):
        one, other = first[same[conflicts[0]]], conflicts[0]
        text, = read_texts(files, (text_column, label_column), [(file[one], line[one])])
        raise ValueError(
            f"{', '.join(map(str, files))}: {len(conflicts):,} texts stand there again with another label, such as "
            f"{text!r:.200}: {classes[labels[one]]!r} in line {line[one]} of {files[file[one]]}, "
            f"{classes[labels[other]]!r} in line {line[other]} of {files[file[other]]}; keep one of them")
    kept = np.sort(first)
    tokens = [tokens[row] for row in kept]
    labels, file, line, hashes = labels[kept], file[kept], line[kept], hashes[kept]

    notes = []
    if empty:
        notes.append(f"skipped {empty:,} rows without text")
    if len(kept) < len(same):
        notes.append(f"dropped {len(same) - len(kept):,} repeated texts"
                     + " (from training, where they stand in the test file too)" * (len(files) > 1))
    if cut:
        notes.append(f"cut {cut:,} of {len(same):,} texts to {tokenizer.truncation['max_length']} tokens "
                     "(--max-length)")
    counts = np.bincount(labels)
    if len(classes) == 1:
        raise ValueError(f"{files[-1]}: every label is {classes[0]!r}; there is nothing to tell apart")
    if counts.min() == 1:
        row = np.flatnonzero(labels == counts.argmin())[0]
        raise ValueError(f"{files[file[row]]}, line {line[row]}: the label {classes[counts.argmin()]!r:.80} occurs "
                         "only once; add sentences with it or take it out (if it is the name of a column, use "
                         "--text-column and --label-column)")
    starts = np.concatenate([[0], np.cumsum([len(ids) for ids in tokens])])
    return Corpus(files, (text_column, label_column), classes, np.concatenate(tokens), starts, labels, file, line,
                  hashes, notes)


def split(corpus, fold=0):
    """Which sentences to train on, to choose on and to test on: (train, dev, test), arrays of indices.

    The hash of its text decides where a sentence goes, so neither the order of the file nor a repeated text
    matters. Of eleven parts the last is dev; fold i tests on part i and trains on the remaining nine. With a
    test file, that is the test set and all parts but dev are trained on. Raises ValueError if one is empty,
    or lacks a class in training.
    """
    part = (corpus.hashes % PARTS).astype(int)
    own_test = len(corpus.files) > 1
    is_test = corpus.file == 0 if own_test else part == fold
    sets = {"training": ~is_test & (part != DEV), "dev": ~is_test & (part == DEV), "test": is_test}
    for name, chosen in sets.items():
        present = np.unique(corpus.labels[chosen])
        if not len(present) or name == "training" and len(present) < len(corpus.classes):
            lack = ", ".join(repr(label) for i, label in enumerate(corpus.classes) if i not in present)
            raise ValueError(f"{', '.join(map(str, corpus.files))}: the {name} set has no sentence labelled {lack} "
                             f"({len(corpus):,} sentences in all); add more of them")
    return tuple(np.flatnonzero(chosen) for chosen in sets.values())


# -- batches ----------------------------------------------------------------------------------------------

def batches_of_like_length(lengths, batch_size, rng=None):
    """Cut 0 .. n - 1 into batches of sentences that are about equally long, so that little is padding.

    With a generator, ties and the order of the batches are random: a new epoch. Without, longest first.
    """
    order = np.arange(len(lengths)) if rng is None else rng.permutation(len(lengths))
    order = order[np.argsort(-lengths[order], kind="stable")]
    batches = [order[start:start + batch_size] for start in range(0, len(order), batch_size)]
    if rng is not None:
        rng.shuffle(batches)
    return batches


def pad(sentences, device="cpu"):
    """Token ids of a few sentences -> input_ids (batch, length) and attention_mask, None if nothing is padding.

    The length is that of the longest, up to the next multiple of 8. On a CPU, torch compiles the kernels of a
    matrix product for every shape it meets, and keeps them: 50 different lengths fill hundreds of megabytes.
    """
    lengths = np.array([len(ids) for ids in sentences])
    length = -(-lengths.max() // MULTIPLE) * MULTIPLE
    input_ids = np.zeros((len(sentences), length), np.int64)
    mask = np.arange(length) < lengths[:, None]
    input_ids[mask] = np.concatenate(sentences)
    attention_mask = None if mask.all() else torch.from_numpy(mask).to(device)
    return torch.from_numpy(input_ids).to(device), attention_mask


def predict(forward, sentences, device="cpu", bf16=False, progress=lambda batches: batches,
            batch_size=32):
    """What `forward(input_ids, attention_mask)` gives for each sentence: a float32 array (n, width), in their order.

    Runs in order of length and without autograd. The caller puts the model into eval mode. `progress` may
    wrap the list of batches, as tqdm does.
    """
    lengths = np.array([len(ids) for ids in sentences])
    output = None
    for rows in progress(batches_of_like_length(lengths, batch_size)):
        with torch.no_grad(), torch.autocast(torch.device(device).type, torch.bfloat16, enabled=bf16):
            result = forward(*pad([sentences[row] for row in rows], device)).float().cpu().numpy()
        if output is None:
            output = np.empty((len(sentences), result.shape[1]), np.float32)
        output[rows] = result
    return output
