"""pydocs.py — the manuals on this computer, as a corpus: what `python prepare_data.py pydocs` makes its shards of.

Reads the docstrings of Python's standard library and of the five required packages, and pydoc's language topics, from
their source files, without importing or running any of them; keeps the prose; splits it so that validation shares no
sentence with training; and makes questions of it. The same versions give the same documents, in the same order.
"""
import ast
import gc
import hashlib
import importlib.util
import inspect
import os
import random
import re
import sys
import sysconfig
import warnings
from collections import Counter, defaultdict
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from tqdm import tqdm

from errors import UserError

VAL_SHARE = 0.05  # of what is split: source files here, documents or characters in prepare_data.py


def stable_hash(text):
    """A number that is the same in every process and on every machine; Python's own hash() of a string is not."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


# ---------------------------------------------------------------------------------------------------------------------
# 1. The docstrings. Files are parsed, never imported.

PACKAGES = ("torch", "numpy", "tiktoken", "tqdm", "matplotlib")
# Tests, demonstrations, tables, copies of other projects, and the insides of compilers: nobody reads these as a manual.
SKIPPED = set("""test tests testing idlelib lib2to3 turtledemo encodings distutils ensurepip site-packages dist-packages
    pydoc_data _vendor vendor _inductor _dynamo _functorch _export _higher_order_ops _subclasses _refs _prims _decomp ao
    quantization passes experimental f2py _internal _prims_common _native _numpy _library _api _typing _pyinstaller
    _examples __pycache__""".split())


@dataclass
class Document:
    package: str
    module: str  # where it is defined: "json.encoder"
    name: str  # as users write it: "json.JSONEncoder.encode"
    kind: str  # "module", "class", "constructor", "function" or "topic"
    raw: str  # the docstring as it is
    paragraphs: list  # its prose, a line each
    summary: str  # its first sentences, "" if it does not start with prose
    split: str = "train"

    def text(self):
        return "\n".join([self.name, *self.paragraphs])


def source_files():
    """[(package, module, path)], sorted, of all files that may hold documentation."""
    roots = [("python", Path(sysconfig.get_path("stdlib")))]
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)  # finds a top-level package without importing it
        if spec is None:
            raise UserError(f"package {package} is not installed — run: pip install -r requirements.txt")
        roots.append((package, Path(spec.origin).parent))
    roots.append(("matplotlib", roots[-1][1].with_name("mpl_toolkits")))
    found = []
    for package, root in roots:
        for folder, inner, files in os.walk(root):
            inner[:] = [name for name in inner if name not in SKIPPED]
            for path in (Path(folder, file) for file in files if file.endswith(".py")):
                parts = path.relative_to(root if package == "python" else root.parent).with_suffix("").parts
                if not SKIPPED & set(parts):
                    found.append((package, ".".join(part for part in parts if part != "__init__"), path))
    return sorted(found)


def docstrings(module, tree):
    """Yield (full name, kind, docstring) of a parsed file: of modules, classes and functions, and the texts that torch
    and NumPy attach by calls, as in `add_docstr(torch.abs, "...")`."""
    def walk(node, name, kind):
        if text := ast.get_docstring(node):
            yield name, kind, text
        for child in node.body if kind in ("module", "class") else []:
            if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                if child.name == "__init__":
                    yield from walk(child, name, "constructor")
                elif child.name[0] != "_":
                    kind_of_child = "class" if isinstance(child, ast.ClassDef) else "function"
                    yield from walk(child, f"{name}.{child.name}", kind_of_child)

    yield from walk(tree, module, "module")
    for node in tree.body:
        call = getattr(node, "value", None)
        if not isinstance(call, ast.Call) or not call.args or "add_" not in (attach := ast.unparse(call.func)):
            continue
        strings = [n.value for n in ast.walk(call) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
        if isinstance(node, ast.Assign):  # conv1d = _add_docstr(torch.conv1d, "...")
            name = f"{module}.{ast.unparse(node.targets[0])}"
        elif "newdoc" in attach:  # add_newdoc("numpy", "ndarray", ("shape", "..."))
            name = ".".join(s for s in strings if re.fullmatch(r"[\w.]+", s))
        elif "docstr_all" in attach:  # add_docstr_all("abs", "...")
            name = f"torch.Tensor.{strings[0]}"
        else:  # add_docstr(torch.abs, "...")
            name = ast.unparse(call.args[0])
        yield name if "." in name else f"{module}.{name}", "function", inspect.cleandoc(max(strings, key=len, default=""))


def read_source(source_file):
    """(documents, re-exports) of one file. A re-export is a pair of names such as
    ("json.encoder.JSONEncoder", "json.JSONEncoder") or ("asyncio.tasks.*", "asyncio.*")."""
    package, module, path = source_file
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # other people's invalid escapes
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return [], []
    documents, exports = [], []
    for name, kind, raw in docstrings(module, tree):
        paragraphs, summary = prose(raw)
        if paragraphs:
            documents.append(Document(package, module, name, kind, raw, paragraphs, summary))
    parents = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    for node in [n for top in tree.body for n in (ast.walk(top) if isinstance(top, (ast.Try, ast.If)) else [top])]:
        if isinstance(node, ast.ImportFrom):
            base = parents[:len(parents) - node.level + 1] if node.level else []
            origin = ".".join(base + [node.module] * bool(node.module))
            exports += [(f"{origin}.{a.name}", f"{module}.{a.asname or a.name}") for a in node.names]
    return documents, exports


def is_private(name):
    return name.startswith("_") or "._" in name


def public_name(name, exports):
    """The shortest name under which users reach something: torch.nn.modules.linear.Linear → torch.nn.Linear. None if
    every way to it leads through an underscore. `exports` maps a name to the names under which it is re-exported."""
    names = [name]
    for name in names:  # grows: re-exports of re-exports
        parts = name.split(".")
        for k in range(1, len(parts)):
            origin = ".".join(parts[:k])
            for here in exports.get(f"{origin}.{parts[k]}", []) + exports.get(f"{origin}.*", []):
                place, _, attribute = here.rpartition(".")
                new = ".".join([place, parts[k] if attribute == "*" else attribute, *parts[k + 1:]])
                # Many modules import a thing. Its home is a package around it or, if private, one that takes it over.
                outward = origin.startswith(place + ".") or (is_private(origin) and new.count(".") <= max(2, len(parts) - 1)
                                                             and (attribute == "*" or is_private(place)))
                if outward and new not in names:
                    names.append(new)
    return min((n for n in names if not is_private(n)), key=lambda n: (n.count("."), n), default=None)


def language_topics():
    """The chapters of the language reference that `help("while")` shows: one dict literal in pydoc_data."""
    path, documents = Path(sysconfig.get_path("stdlib"), "pydoc_data", "topics.py"), []
    tree = ast.parse(path.read_bytes() if path.exists() else b"topics = {}")
    for name, raw in sorted(ast.literal_eval(tree.body[-1].value).items()):
        plain = re.sub(r'"([\w.]+(\(\))?)"', r"\1", raw.strip())  # its quotation marks stand for a code font
        documents.append(Document("python", f"topics.{name}", plain.split("\n")[0], "topic", raw, *prose(plain)))
    return documents


# ---------------------------------------------------------------------------------------------------------------------
# 2. The prose in a docstring, by two tables of substitutions. Where a paragraph must end, they put an empty line;
# \0 marks an item of a list, whose further lines may be indented.

NAMES = r"[\w*.`]+(?:, [\w*.`]+)*"
LAYOUT = [(re.compile(pattern, re.MULTILINE), new) for pattern, new in [
    (r" +$", ""),
    (r"^ *>>>.*(\n.+)*", ""),  # doctests
    (r"^ *(See Also|References|Methods|Attributes)\n *---+\n(.*\n)*?(?=.*\n *---|\Z)", ""),  # NumPy's lists of names
    (r"^.*\n *([-=~^*#+])\1\1+$", "\n"),  # headings with their rulers
    (r"^( *)\.\. (?!(note|warning|tip|important|admonition|deprecated|caution|hint)::).*(\n+\1 +.*)*", "\n"),
    (r"^ *\.\. \w+:: *\n?", "\n\0"),  # a directive that is prose: its text stays
    (r"^( *)(.*)::\n(\n*\1 +.*\n)*", r"\1\2:\n\n"),  # code after "::"
    (rf"^ *{NAMES} :( .*)?$", "\n"),  # NumPy's "axis : int, optional" above a description
    (r"^ *[A-Z][\w ]*:$", "\n"),  # Returns:
    (rf"^ *([-*+•]|\(?\d\d?[.)]|\(?[a-z]\)|:\w+( [\w*]+)*:|@\w+( \w+)?:|{NAMES}( \([^)]*\))?:|{NAMES} +--?) +(?=\S)", "\n\0")]]
MARKUP = [(re.compile(pattern), new) for pattern, new in [
    (r":math:`([\w ,.+-]{1,12})`", r"\1"), (r":math:`", r"\\"),  # longer formulas leave a backslash: not prose
    (r"(:[\w:.-]+:)?`~[^`<]*?(\w+(\(\))?)`", r"\2"), (r"(:[\w:.-]+:)?`([^`<]+?)\s*<[^`>]*>`_*", r"\2"),
    (r":[\w:.-]+:`[!.]*([^`]+)`", r"\1"), (r"``([^`]+)``", r"\1"), (r"`[!.]*([^`]+)`_*", r"\1"),
    (r"`(\w+)'", r"'\1'"), (r"\s*\[[\w#]+\]_", ""), (r"(?<!\w)(\*\*?)([^\s*]|[^\s*][^*]*[^\s*])\1(?!\w)", r"\2")]]
ABBREVIATION = re.compile(r"\b(e\.g|i\.e|cf|vs|etc|al|Dr|Mr|Fig|Eq|Ref|Sec|approx|resp|incl|No|[A-Z])\.$")
PLAIN_WORD = re.compile(r"""["'(\[]*([A-Za-z]{2,}|[aAI])(['’-][A-Za-z]+)*(\(s\))?["')\],.;:!?]*$""")
NOT_PROSE = re.compile(r"[{}\\|<>^~$@#`]|==|->|::|----|%[(sd]|\.\.\.\s|https?:|\b(TODO|FIXME|XXX)\b")


def sentences(text):
    """Cut a paragraph at the ends of its sentences."""
    cut, start = [], 0
    for match in re.finditer(r"""[.!?]["')\]]*\s+(?=["'(\[]*[A-Z0-9])""", text):
        if not ABBREVIATION.search(text[start:match.end()].rstrip()):
            cut.append(text[start:match.end()].rstrip())
            start = match.end()
    return cut + [text[start:]]


def is_prose(sentence):
    """Would a person read it aloud: a capital, an end, mostly words, no code?"""
    words = sentence.split()
    return (len(words) >= 3 and re.match(r"""["'(]*[A-Z]""", sentence) and re.search(r"""[.!?]["')\]]*$""", sentence)
            and not NOT_PROSE.search(sentence) and sum(map(bool, map(PLAIN_WORD.match, words))) >= 0.7 * len(words))


def blocks(raw):
    """Yield (text, is an item of a list) for every paragraph of a docstring, its lines joined."""
    raw = raw.expandtabs() + "\n"
    for pattern, new in LAYOUT:
        raw = pattern.sub(new, raw)
    for block in re.split(r"\n\s*\n", raw):
        # Outside lists a paragraph keeps its indentation.
        indentation = (lambda line: 0) if "\0" in block else (lambda line: len(line) - len(line.lstrip()))
        for _, lines in groupby(block.strip("\n").split("\n"), indentation):
            if text := " ".join(" ".join(lines).replace("\0", "").split()):
                yield text, "\0" in block


def prose(raw):
    """(paragraphs, summary) of a docstring. A paragraph stays if at least half of it is sentences of prose."""
    paragraphs, summary = [], ""
    for number, (text, item) in enumerate(blocks(raw)):
        for pattern, new in MARKUP:
            text = pattern.sub(new, text)
        if item and re.match(r"[a-z]+[ ,]", text):
            text = text[0].upper() + text[1:]
        if text and text[-1].isalnum() and text.count(" ") >= 5:
            text += "."
        kept = [sentence for sentence in sentences(text) if is_prose(sentence)]
        if kept and sum(map(len, kept)) >= 0.5 * len(text):
            paragraphs.append(" ".join(kept))
            if number == 0:
                summary = " ".join(kept[:2])
    return paragraphs, summary


# ---------------------------------------------------------------------------------------------------------------------
# 3. The corpus, and the questions made from it.

SALT = 90  # of the first 400, the one whose validation files are mixed most like the whole
CLOZE_ITEMS, CLOZE_CONTEXT = 1000, 300  # at most so many questions; about so many characters of context


def read_all():
    """All documents under their public names, sorted."""
    documents, exports = language_topics(), defaultdict(list, {"_pyio.*": ["io.*"]})  # io.py imports the C twin
    gc.disable()  # syntax trees hold no cycles, and to look for some in each takes a third of the time
    for source_file in tqdm(source_files(), "reading docstrings", unit=" files"):
        found, renamed = read_source(source_file)
        documents += found
        for origin, here in renamed:
            exports[origin].append(here)
    gc.enable()
    for document in documents:
        if document.kind != "topic":
            document.name = public_name(document.name, exports)
    return sorted((d for d in documents if d.name), key=lambda d: (d.name, d.module, d.raw))


def marks(text):
    """What two texts must not share: every sentence and every run of 13 words, in lower-case words."""
    for sentence in re.split(r"[.!?:]\s+|\n\s*\n", text):
        yield " ".join(re.findall(r"\w+", sentence.lower()))
    words = re.findall(r"\w+", text.lower())
    for i in range(len(words) - 12):
        yield " ".join(words[i:i + 13])


def split_documents(documents):
    """Mark 5 % of the source files as validation; then move to training what shares a mark with training, until
    nothing does. The raw docstrings count too, so that one validation split serves all three qualities."""
    holders = defaultdict(list)  # mark → validation documents
    for document in documents:
        if stable_hash(f"{SALT}:{document.module}") % 1000 < 1000 * VAL_SHARE:
            document.split = "val"
            for mark in (m for paragraph in document.paragraphs for m in marks(paragraph) if m):
                holders[mark].append(document)
    training = [document for document in documents if document.split == "train"]
    for document in training:  # grows
        for mark in (m for text in (document.raw, *document.raw.split("\n"), *document.paragraphs) for m in marks(text)):
            for other in holders.pop(mark, ()):
                if other.split == "val":
                    other.split = "train"
                    training.append(other)


def build_corpus():
    """The documents of the corpus with their splits, in an order fixed by a hash."""
    documents = read_all()
    split_documents(documents)
    seen = set()
    for document in documents:  # sorted, so the first to say something keeps it
        document.paragraphs = [p for p in document.paragraphs if not (p in seen or seen.add(p))]
    documents = sorted((d for d in documents if d.paragraphs), key=lambda d: (stable_hash(d.module + d.name), d.raw))
    sizes = Counter()
    for document in documents:
        sizes[document.package] += len(document.text())
    largest, size = sizes.most_common(1)[0]
    room = (sum(sizes.values()) - size) // 2  # half of the others is a third of the whole
    kept = []
    for document in documents:
        if document.package == largest:
            room -= len(document.text())
        if document.package != largest or room >= 0:
            kept.append(document)
    return kept


def shuffle_sentences(documents):
    """Texts with the same names, paragraphs and sentences, but each sentence in a random place of the corpus."""
    pool = [sentence for d in documents for paragraph in d.paragraphs for sentence in sentences(paragraph)]
    random.Random(0).shuffle(pool)
    return ["\n".join([d.name, *(" ".join(pool.pop() for _ in sentences(p)) for p in d.paragraphs)]) for d in documents]


def cloze_items(documents, seed=0):
    """Multiple choice in HellaSwag's format: which words end this sentence?

    An ending is the last 6 to 10 words of a sentence, starting in lower case; its context is what the document says
    before, up to about 100 tokens. Four contexts from four source files form a block: they share the same four endings,
    of about one length, and each is right for one of them. So whoever ignores the context gets exactly one in four.
    """
    rng, pool, blocks, items = random.Random(seed), [], [], []
    for document in documents:
        before = document.name + "\n"
        for paragraph in document.paragraphs:
            for sentence in sentences(paragraph):
                words, count = sentence.split(), rng.randint(6, 10)
                start, ending = " ".join(words[:-count]), " ".join(words[-count:])
                context = before if len(before) <= CLOZE_CONTEXT else before[-CLOZE_CONTEXT:].partition(" ")[2]
                if len(words) >= count + 3 and re.fullmatch(r"[a-z][\w ,'()/-]+\.", ending):
                    pool.append((len(ending), rng.random(), document, context, start, ending))
                before += sentence + " "
            before = before[:-1] + "\n"
    pool.sort()
    while pool:
        block = []
        for item in pool:
            if item[0] > pool[0][0] + 4 or len(block) == 4:
                break
            if not any(item[2].module == other[2].module or item[5] == other[5] for other in block):
                block.append(item)
        pool = [item for item in pool[1:] if len(block) < 4 or item not in block]
        blocks += [block] * (len(block) == 4)
    for number, block in enumerate(rng.sample(blocks, min(len(blocks), CLOZE_ITEMS // 4))):
        rng.shuffle(block)
        for label, (_, _, document, context, start, _) in enumerate(block):
            items.append({"ind": len(items), "activity_label": document.name, "ctx_a": context, "ctx_b": start,
                          "ctx": context + start, "endings": [ending for *_, ending in block], "label": label,
                          "split": "val", "source_id": f"{document.module}:{document.name}", "block": number})
    return items


def instruct_rows(documents):
    """Alpaca's format: what is this thing for? The answer is how its documentation starts."""
    question = {"function": "What does `{}` do?", "class": "What is `{}`?", "module": "What is the module `{}` for?"}
    rows = {}
    for document in documents:
        if document.summary and document.kind in question:
            instruction = question[document.kind].format(document.name)
            rows.setdefault(instruction, {"instruction": instruction, "input": "", "output": document.summary,
                                          "split": document.split})
    return list(rows.values())
