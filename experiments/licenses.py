"""licenses.py — validation text of none of the kinds that experiment 4 compares: the licences of
the required Python packages.

    python experiments/licenses.py data/licenses
"""
import importlib.metadata
import re
from functools import partial
from pathlib import Path

import common  # makes Python find the files at the root

from corpus.pydocs import PACKAGES, WORD, build_corpus, dependencies
from data import Tokenizer
from prepare_data import DEFAULT_VOCAB_SIZE, check_replaceable, write_shards
from support.files import new_folder
from support.flags import Parser
from support.runs import UserError, script

NAME = re.compile(r"(LICEN[CS]E|COPYING|NOTICE|AUTHORS)", re.IGNORECASE)


def runs_of_13(text):
    words = WORD.findall(text.lower())
    return {" ".join(words[i:i + 13]) for i in range(len(words) - 12)}


def licenses():
    """The texts of all licence files. Packages share many paragraphs: each is kept once. Paragraphs
    that share 13 words in a row with a training document are left out."""
    training = set()
    for document in build_corpus():
        if document.split == "train":
            training |= runs_of_13(document.raw) | runs_of_13(document.text())
    seen = set()
    texts = []
    for package in sorted([*PACKAGES, *dependencies()]):
        try:
            files = importlib.metadata.files(package) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        for file in sorted(files):
            if not NAME.match(file.name) or file.suffix not in ("", ".txt", ".md", ".rst"):
                continue
            text = file.locate().read_text(encoding="utf-8", errors="replace")
            new = []
            for paragraph in text.split("\n\n"):
                words = " ".join(paragraph.split())
                if len(words) > 80 and words not in seen and not runs_of_13(words) & training:
                    seen.add(words)
                    new.append(words)
            if new:
                texts.append("\n".join(new))
    return texts


@script
def main(argv=None):
    parser = Parser(description="Licences as validation text.")
    parser.add_argument("folder", type=Path)
    args = parser.parse_args(argv)
    texts = licenses()
    if len(texts) < 2:
        raise UserError("the installed packages have no licence files — install them with pip")
    pieces = [("train", texts[0], True)]  # a data folder has both splits; nobody trains on this
    pieces += [("val", text, True) for text in texts[1:]]
    with new_folder(args.folder, partial(check_replaceable, name="licenses")) as folder:
        write_shards(folder, pieces, Tokenizer(DEFAULT_VOCAB_SIZE), {"name": "licenses"},
                     total=sum(map(len, texts)))


if __name__ == "__main__":
    main()
