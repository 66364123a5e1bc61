"""documents.py — the user's documents: repetitions left out, each in one split."""
import array
import zlib

import numpy as np

from corpus.pydocs import VAL_SHARE, stable_hash
from corpus.textfiles import JSON, has_suffix, read_pieces
from support.progress import tqdm
from support.runs import UserError


class Documents:
    """What the first reading of all files finds: the length and a key of each document.

    Documents with the same words have the same key, whatever the white space between them. Raises
    UserError if a file cannot be read."""

    def __init__(self, files, separator):
        keys = array.array("Q")  # 8 bytes a document, of which there can be many millions
        lengths = array.array("Q")  # in characters
        empty = []
        is_separated = False
        with tqdm(desc="checking", unit=" characters", unit_scale=True) as bar:
            for file in files:
                before = len(keys)
                for text, starts in read_pieces(file, separator):
                    if starts:
                        keys.append(0)
                        lengths.append(0)
                    words = " ".join(text.split())
                    keys[-1] = stable_hash(f"{keys[-1]} {words}")
                    lengths[-1] += len(text)
                    bar.update(len(text))
                documents = len(keys) - before
                if documents == 0:
                    empty.append(str(file))
                if documents > 1 and not has_suffix(file, JSON):
                    is_separated = True
        if empty:
            print(f"{len(empty)} files hold no text: {', '.join(empty[:5])}")
        if separator and not is_separated:
            print(f"--separator {separator!r} separates nothing: it occurs in no .txt or .md file, "
                  f"so each of them is one document")
        self.keys = np.array(keys, dtype=np.uint64)
        self.distinct, first = np.unique(self.keys, return_index=True)
        self.is_first = np.zeros(len(keys), dtype=bool)  # not a repetition of an earlier one
        self.is_first[first] = True
        self.total = int(np.array(lengths)[self.is_first].sum())  # characters
        repeated = len(keys) - len(self.distinct)
        if repeated > 0:
            print(f"{repeated} of {len(keys)} documents repeat another one and are left out")

    def first_ones(self, pieces):
        """Yield (key, text, starts): the pieces, without those of repeated documents."""
        number = -1
        for text, starts in pieces:
            number += starts
            if number == len(self.keys):
                break
            if self.is_first[number]:
                yield self.keys[number], text, starts
        if number != len(self.keys) - 1:
            raise UserError("a file was changed while it was read — prepare the data again")

    def split(self, pieces):
        """Yield (split, text, starts): 5 % of the documents, or of a few long ones, are for
        validation."""
        if len(self.distinct) >= 20:
            threshold = self.distinct[int(len(self.distinct) * VAL_SHARE)]
            return split_by_key(self.first_ones(pieces), threshold)
        # 5 % of so few documents is at most one document, of any length
        return split_by_length(self.first_ones(pieces), self.total)


def split_by_key(pieces, threshold):
    """Yield (split, text, starts). A document is for validation if its key is small, so the order
    of the files does not matter."""
    for key, text, starts in pieces:
        yield "val" if key <= threshold else "train", text, starts


def split_by_length(pieces, total):
    """Yield (split, text, starts). The last 5 % of all `total` characters are for validation."""
    left = int(total * (1 - VAL_SHARE))  # characters that still go to training
    split = "train"
    for _, text, starts in pieces:
        if split == "train" and len(text) > left:
            cut = place_to_cut(text, left, int(total * VAL_SHARE))
            if cut > 0:
                yield "train", text[:cut], starts
            text = text[cut:]
            starts = True
            split = "val"
        left -= len(text)
        yield split, text, starts


def place_to_cut(text, end, slack):
    """The last place up to `end` after a line break, if one is within `slack` characters of it,
    else (a book in one line) after a space within them, else `end` itself."""
    start = max(0, end - slack)
    after_line = text.rfind("\n", start, end) + 1
    after_word = text.rfind(" ", start, end) + 1
    return after_line or after_word or end


class PassageCounter:
    """Counts the passages of the validation text that stand in the training text too. Whole
    documents never do; but of two versions of a text one may be on each side.

    A passage is eight words; it starts at a word that ends with h, p, x, 0 or 8 (or a sign whose
    code is divisible by 8). So the same passages are taken from a text and from its other version,
    however their lines are broken."""
    WORDS = 8

    def __init__(self, total):
        self.sums = {"train": array.array("I"), "val": array.array("I")}  # 4 bytes a passage
        self.one_in = 1 + total // 2**28  # so that those of any text fit in memory

    def watch(self, pieces):
        for split, text, starts in pieces:
            words = text.split()
            for place, word in enumerate(words):
                if ord(word[-1]) % 8 == 0:
                    passage = " ".join(words[place:place + self.WORDS])
                    checksum = zlib.crc32(passage.encode())
                    if checksum % self.one_in == 0:
                        self.sums[split].append(checksum)
            yield split, text, starts

    def report(self):
        known = np.isin(self.sums["val"], self.sums["train"])
        if known.any() and known.mean() > 0.05:
            print(f"note: {known.mean():.0%} of the passages for validation are in the training "
                  f"text too, so its loss will be too low — is a text there in two versions?")
