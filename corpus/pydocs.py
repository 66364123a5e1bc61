"""pydocs.py — the manuals on this computer as a corpus, for `python prepare_data.py pydocs`.

It reads the docstrings of Python's standard library and of the five required packages, the
language topics of pydoc, and, for training only, the docstrings of what pip installs along with the
five. It reads source files and never imports or runs them. It keeps the prose, splits the documents
so that validation shares no sentence with training, and makes questions from them. The same
versions of Python and the packages give the same documents in the same order. For the validation
text and the questions, the versions of Python and the five are enough.
"""
import ast
import gc
import hashlib
import importlib.metadata
import importlib.util
import inspect
import json
import os
import pickle
import random
import re
import subprocess
import sys
import sysconfig
import warnings
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from support.progress import tqdm
from support.runs import UserError

VAL_SHARE = 0.05  # of the source files here; of the documents or characters in prepare_data.py


def stable_hash(text):
    """A number that is the same in every process and on every machine.

    Python's own hash() of a string differs from process to process."""
    digest = hashlib.sha256(text.encode()).digest()
    return int.from_bytes(digest[:8], "big")


# -------------------------------------------------------------------------------------------------
# 1. The docstrings. Files are parsed, never imported.

PACKAGES = ("torch", "numpy", "tiktoken", "tqdm", "matplotlib")
# Tests, demonstrations, tables, copies of other projects and internals of compilers: users do not
# read these as a manual.
SKIPPED = set("""
    test tests testing idlelib lib2to3 turtledemo encodings distutils ensurepip site-packages
    dist-packages pydoc_data _vendor vendor _inductor _dynamo _functorch _export _higher_order_ops
    _subclasses _refs _prims _decomp ao quantization passes experimental f2py _internal
    _prims_common _native _numpy _library _api _typing _pyinstaller _examples __pycache__
    """.split())


@dataclass
class Document:
    """One docstring or topic."""
    package: str
    module: str  # where it is defined: "json.encoder"
    name: str  # as users write it: "json.JSONEncoder.encode"
    kind: str  # "module", "class", "constructor", "function" or "topic"
    raw: str  # the docstring as written
    paragraphs: list  # its prose, one line for each paragraph
    summary: str  # its first sentences; "" if it does not start with prose
    split: str = "train"

    def text(self):
        return "\n".join([self.name, *self.paragraphs])


def source_roots():
    """[(package, folder)]: where the source files are. Raises UserError if a package is missing."""
    roots = [("python", Path(sysconfig.get_path("stdlib")))]
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)  # finds a package without importing it
        if spec is None:
            raise UserError(f"package {package} is not installed — "
                            f"run: pip install -r requirements.txt")
        folder = Path(spec.origin).parent
        roots.append((package, folder))
        if package == "matplotlib":  # it has a second folder of its own
            roots.append((package, folder.with_name("mpl_toolkits")))
    return roots


def source_files():
    """[(package, module, path)], sorted, of all files of Python and the five packages that can hold
    documentation."""
    found = []
    for package, root in source_roots():
        # Names start at the package: torch/nn/functional.py is torch.nn.functional. The standard
        # library is a folder of packages: in it, json/encoder.py is json.encoder.
        base = root if package == "python" else root.parent
        for folder, inner, files in os.walk(root):
            inner[:] = [name for name in inner if name not in SKIPPED]  # os.walk enters only these
            for file in files:
                path = Path(folder, file)
                if path.suffix == ".py" and path.stem not in SKIPPED:
                    found.append((package, module_name(path.relative_to(base)), path))
    return sorted(found)


def dependencies():
    """{package: version} of what pip installs along with the five packages; of a package that is
    not installed the version is None.

    A requirement with a marker is left out: it is for an extra, one operating system (as Triton is)
    or one version of Python. So the text is the same on all of them."""
    found = list(PACKAGES)
    versions = {}
    for package in found:  # the list grows in this loop
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
            continue
        for requirement in importlib.metadata.requires(package) or []:
            name = re.match(r"[\w.-]+", requirement)[0]
            name = re.sub(r"[-_.]+", "-", name).lower()  # one of several ways to write it
            if ";" not in requirement and name not in found:
                found.append(name)
    return {package: versions[package] for package in sorted(found) if package not in PACKAGES}


def dependency_files():
    """The same of the dependencies, found in the lists of files that pip keeps."""
    found = []
    for package, version in dependencies().items():
        if version is None:
            continue
        for file in importlib.metadata.files(package) or []:
            path = Path(file.locate())
            is_source = file.suffix == ".py" and path.exists()
            if is_source and SKIPPED.isdisjoint([*file.parts, file.stem]):
                found.append((package, module_name(file), path))
    return sorted(found)


def module_name(path):
    """json/encoder.py → json.encoder; json/__init__.py → json."""
    parts = path.with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def docstrings(module, tree):
    """Yield (full name, kind, docstring) for all that a parsed file documents."""
    yield from written_docstrings(tree, module, "module")
    for statement in tree.body:
        found = attached_docstring(statement, module)
        if found is not None:
            name, docstring = found
            yield name, "function", docstring


def written_docstrings(node, name, kind):
    """Yield (full name, kind, docstring) of a module or class and all public definitions in it."""
    docstring = ast.get_docstring(node)
    if docstring:
        yield name, kind, docstring
    if kind not in ("module", "class"):
        return  # functions within functions are not for users
    for child in node.body:
        is_class = isinstance(child, ast.ClassDef)
        is_function = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef))
        if not is_class and not is_function:
            continue
        if child.name == "__init__":  # documents its class
            yield from written_docstrings(child, name, "constructor")
        elif not child.name.startswith("_"):
            kind_of_child = "class" if is_class else "function"
            yield from written_docstrings(child, f"{name}.{child.name}", kind_of_child)


def attached_docstring(statement, module):
    """(full name, docstring) if the statement attaches a text by a call, else None.

    torch and NumPy document in this way what they implement in C++ and C. Four forms exist, one
    for each branch below."""
    call = getattr(statement, "value", None)
    if not isinstance(call, ast.Call) or not call.args:
        return None
    function = ast.unparse(call.func)
    if "add_" not in function:
        return None
    constants = [node.value for node in ast.walk(call) if isinstance(node, ast.Constant)]
    strings = [value for value in constants if isinstance(value, str)]
    if isinstance(statement, ast.Assign):  # conv1d = _add_docstr(torch.conv1d, "...")
        target = ast.unparse(statement.targets[0])
        name = f"{module}.{target}"
    elif "newdoc" in function:  # add_newdoc("numpy", "ndarray", ("shape", "..."))
        name = ".".join(string for string in strings if re.fullmatch(r"[\w.]+", string))
    elif "docstr_all" in function:  # add_docstr_all("abs", "...")
        name = f"torch.Tensor.{strings[0]}"
    else:  # add_docstr(torch.abs, "...")
        name = ast.unparse(call.args[0])
    if "." not in name:
        name = f"{module}.{name}"
    longest = max(strings, key=len, default="")
    return name, inspect.cleandoc(longest)


def read_source(package, module, path):
    """(documents, re-exports) of one file; both empty if it does not parse.

    A re-export is a pair of names: ("json.encoder.JSONEncoder", "json.JSONEncoder"), or, after
    `from asyncio.tasks import *`, ("asyncio.tasks.*", "asyncio.*")."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in the code of others
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return [], []
    documents = []
    for name, kind, raw in docstrings(module, tree):
        paragraphs, summary = prose(raw)
        if paragraphs:
            documents.append(Document(package, module, name, kind, raw, paragraphs, summary))
    exports = []
    is_package = path.name == "__init__.py"
    parents = module.split(".") if is_package else module.split(".")[:-1]
    for statement in imports(tree):
        origin = origin_of(statement, parents)
        for alias in statement.names:
            here = alias.asname or alias.name
            exports.append((f"{origin}.{alias.name}", f"{module}.{here}"))
    return documents, exports


def read_sources(files):
    """[read_source(*file) for file in files]; every second file is read by a second process."""
    results = [None] * len(files)
    with ThreadPoolExecutor(1) as threads:
        answer = threads.submit(ask_helper, files[1::2])
        # Syntax trees have no reference cycles. To search for some takes a third of the time.
        gc.disable()
        for i in tqdm(range(0, len(files), 2), "reading docstrings", unit=" files", unit_scale=2):
            results[i] = read_source(*files[i])
        gc.enable()
    try:
        results[1::2] = answer.result()
    except Exception:  # a second process cannot be started here: this one reads them too
        results[1::2] = [read_source(*file) for file in files[1::2]]
    return results


def ask_helper(files):
    """What read_source finds in the files, read by another process.

    It is a new process, not a fork of this one. A fork would hold the lock of the data folder even
    after this process was killed, and it can hang in a process with PyTorch's threads."""
    command = [sys.executable, "-c", "from corpus.pydocs import help_reading; help_reading()"]
    done = subprocess.run(command, cwd=Path(__file__).parent.parent, input=pickle.dumps(files),
                          stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True)
    return pickle.loads(done.stdout)


def help_reading():
    """What the other process runs: files from its stdin, what is found in them to its stdout."""
    gc.disable()
    files = pickle.load(sys.stdin.buffer)
    found = [read_source(*file) for file in files]
    pickle.dump(found, sys.stdout.buffer)


def imports(tree):
    """Yield a module's `from … import …` statements, also those in a top-level try or if."""
    for statement in tree.body:
        nodes = [statement]
        if isinstance(statement, (ast.Try, ast.If)):
            nodes = ast.walk(statement)
        for node in nodes:
            if isinstance(node, ast.ImportFrom):
                yield node


def origin_of(statement, parents):
    """The module that an import reads from. `parents` are the packages around the importing one:
    in json/decoder.py they are ["json"], and `from .scanner import x` reads from json.scanner."""
    parts = []
    if statement.level > 0:  # the number of leading dots
        parts = parents[:len(parents) - statement.level + 1]
    if statement.module:
        parts = parts + [statement.module]
    return ".".join(parts)


def is_private(name):
    return name.startswith("_") or "._" in name


def public_name(name, exports):
    """The shortest name by which users reach an object: torch.nn.modules.linear.Linear →
    torch.nn.Linear. None if every name has a part with a leading underscore.

    `exports` maps a name to the list of names under which it is re-exported."""
    names = [name]
    for known in names:  # the list grows in this loop: a re-export can be re-exported
        for other in reexported_names(known, exports):
            if other not in names:
                names.append(other)
    public = [candidate for candidate in names if not is_private(candidate)]
    return min(public, key=lambda candidate: (candidate.count("."), candidate), default=None)


def reexported_names(name, exports):
    """Yield the names that one re-export gives to an object, but only those that users know.

    Many modules import an object for their own use. Users know it from a package around its module.
    If the module is private, they know it from a module that imports all of it, or that gets it
    through other private modules."""
    parts = name.split(".")
    most_dots = max(2, len(parts) - 1)
    for i in range(1, len(parts)):
        origin = ".".join(parts[:i])
        targets = exports.get(f"{origin}.{parts[i]}", []) + exports.get(f"{origin}.*", [])
        for target in targets:
            place, _, attribute = target.rpartition(".")
            takes_all = attribute == "*"
            if takes_all:
                attribute = parts[i]
            new = ".".join([place, attribute, *parts[i + 1:]])
            is_around = origin.startswith(place + ".")
            takes_over = takes_all or is_private(place)
            is_short = new.count(".") <= most_dots
            if is_around or (is_private(origin) and takes_over and is_short):
                yield new


def language_topics():
    """The chapters of the language reference that `help("while")` shows.

    pydoc_data/topics.py is one dict literal, {topic: text}."""
    path = Path(sysconfig.get_path("stdlib"), "pydoc_data", "topics.py")
    if not path.exists():  # some systems package it separately
        return []
    tree = ast.parse(path.read_bytes())
    topics = ast.literal_eval(tree.body[-1].value)
    documents = []
    for topic, raw in sorted(topics.items()):
        # The quotation marks around a word stand for a code font: "len()" → len()
        plain = re.sub(r'"([\w.]+(\(\))?)"', r"\1", raw.strip())
        title = plain.split("\n")[0]
        paragraphs, summary = prose(plain)
        documents.append(
            Document("python", f"topics.{topic}", title, "topic", raw, paragraphs, summary))
    return documents


# -------------------------------------------------------------------------------------------------
# 2. The prose of a docstring, found by two tables of substitutions.

# Parts of the patterns below.
NAMES = r"[\w*.`]+(?:, [\w*.`]+)*"  # "x" or "x1, x2"
DIRECTIVES = "note|warning|tip|important|admonition|deprecated|caution|hint"  # their text is prose
ITEM = "|".join([
    r"[-*+•]",  # a bullet
    r"\(?\d\d?[.)]|\(?[a-z]\)",  # 1.  (2)  a)
    r":\w+( [\w*]+)*:|@\w+( \w+)?:",  # :param x:  @param x:
    rf"{NAMES}( \([^)]*\))?:",  # Google's "dim (int, optional):"
    rf"{NAMES} +--?",  # name -- description
])
# Applied to the whole docstring, in this order. An empty line ends a paragraph. \0 marks an item
# of a list: its further lines may be indented.
LAYOUT = [
    (r" +$", ""),
    (r"^ *>>>.*(\n.+)*", ""),  # examples with their output
    # NumPy's lists of names
    (r"^ *(See Also|References|Methods|Attributes)\n *---+\n(.*\n)*?(?=.*\n *---|\Z)", ""),
    (r"^.*\n *([-=~^*#+])\1\1+$", "\n"),  # a heading and the ruler under it
    # Sphinx's directives with their content, such as `.. code-block::`
    (rf"^( *)\.\. (?!({DIRECTIVES})::).*(\n+\1 +.*)*", "\n"),
    (r"^ *\.\. \w+:: *\n?", "\n\0"),  # a directive of prose: only its head goes
    (r"^( *)(.*)::\n(\n*\1 +.*\n)*", r"\1\2:\n\n"),  # code after "::"
    (rf"^ *{NAMES} :( .*)?$", "\n"),  # NumPy's "axis : int, optional" above a description
    (r"^ *[A-Z][\w ]*:$", "\n"),  # Returns:
    (rf"^ *({ITEM}) +(?=\S)", "\n\0"),
]
LAYOUT = [(re.compile(pattern, re.MULTILINE), new) for pattern, new in LAYOUT]
# Applied in this order to each paragraph with one of the signs: words stay, their markup goes.
MARKUP_SIGN = re.compile("[`*_]")
MARKUP = [
    (r":math:`([\w ,.+-]{1,12})`", r"\1"),
    (r":math:`", r"\\"),  # a longer formula leaves a backslash, which marks the sentence as code
    (r"(:[\w:.-]+:)?`~[^`<]*?(\w+(\(\))?)`", r"\2"),  # :class:`~torch.nn.Module`
    (r"(:[\w:.-]+:)?`([^`<]+?)\s*<[^`>]*>`_*", r"\2"),  # `text <address>`_
    (r":[\w:.-]+:`[!.]*([^`]+)`", r"\1"),  # :func:`os.path.join`
    (r"``([^`]+)``", r"\1"),
    (r"`[!.]*([^`]+)`_*", r"\1"),
    (r"`(\w+)'", r"'\1'"),
    (r"\s*\[[\w#]+\]_", ""),  # [1]_
    (r"(?<!\w)(\*\*?)([^\s*]|[^\s*][^*]*[^\s*])\1(?!\w)", r"\2"),  # *emphasis*
]
MARKUP = [(re.compile(pattern), new) for pattern, new in MARKUP]

SENTENCE_END = re.compile(r"""[.!?]["')\]]*\s+(?=["'(\[]*[A-Z0-9])""")
ABBREVIATION = re.compile(
    r"\b(e\.g|i\.e|cf|vs|etc|al|Dr|Mr|Fig|Eq|Ref|Sec|approx|resp|incl|No|[A-Z])\.$")
CAPITAL_FIRST = re.compile(r"""["'(]*[A-Z]""")
PUNCTUATION_LAST = re.compile(r"""[.!?]["')\]]*$""")
PLAIN_WORD = re.compile(
    r"""["'(\[]*([A-Za-z]{2,}|[aAI])(['’-][A-Za-z]+)*(\(s\))?["')\],.;:!?]*$""")
NOT_PROSE = re.compile(
    r"[{}\\|<>^~$@#`]|==|->|::|----|%[(sd]|\.\.\.\s|https?:|\b(TODO|FIXME|XXX)\b")


def sentences(text):
    """Cut a paragraph at the ends of its sentences."""
    found = []
    start = 0
    for match in SENTENCE_END.finditer(text):
        sentence = text[start:match.end()].rstrip()
        if not ABBREVIATION.search(sentence):
            found.append(sentence)
            start = match.end()
    return found + [text[start:]]


def is_prose(sentence):
    """Whether it reads as English: a capital letter first, a full stop last, mostly words."""
    words = sentence.split()
    if len(words) < 3 or NOT_PROSE.search(sentence):
        return False
    if not CAPITAL_FIRST.match(sentence) or not PUNCTUATION_LAST.search(sentence):
        return False
    plain = [word for word in words if PLAIN_WORD.match(word)]
    return len(plain) >= 0.7 * len(words)


def indentation(line):
    return len(line) - len(line.lstrip())


def blocks(raw):
    """Yield (text, is_item) for every paragraph of a docstring, its lines joined."""
    raw = raw.expandtabs() + "\n"
    for pattern, new in LAYOUT:
        raw = pattern.sub(new, raw)
    for block in re.split(r"\n\s*\n", raw):
        is_item = "\0" in block
        lines = block.strip("\n").split("\n")
        if is_item:
            groups = [lines]
        else:  # outside a list, another indentation starts another paragraph
            groups = [list(group) for _, group in groupby(lines, indentation)]
        for group in groups:
            words = " ".join(group).replace("\0", "").split()
            if words:
                yield " ".join(words), is_item


def prose(raw):
    """(paragraphs, summary) of a docstring.

    A paragraph is kept if at least half of it is sentences of prose, and only those are kept."""
    paragraphs = []
    summary = ""
    for number, (text, is_item) in enumerate(blocks(raw)):
        if MARKUP_SIGN.search(text):
            for pattern, new in MARKUP:
                text = pattern.sub(new, text)
        text = complete(text, is_item)
        kept = [sentence for sentence in sentences(text) if is_prose(sentence)]
        if kept and sum(map(len, kept)) >= 0.5 * len(text):
            paragraphs.append(" ".join(kept))
            if number == 0:
                summary = " ".join(kept[:2])
    return paragraphs, summary


def complete(text, is_item):
    """Add the capital that items of a list often lack, and a missing full stop."""
    if is_item and re.match(r"[a-z]+[ ,]", text):
        text = text[0].upper() + text[1:]
    is_long = text.count(" ") >= 5
    if is_long and text[-1].isalnum():
        text += "."
    return text


# -------------------------------------------------------------------------------------------------
# 3. The corpus.

SALT = 90  # of the first 400, the one whose validation files mix the packages most like the whole


def read_all(files, topics=()):
    """All documents of the files under their public names, and the topics, sorted."""
    documents = list(topics)
    exports = defaultdict(list)
    exports["_pyio.*"] = ["io.*"]  # io.py imports the twin that is written in C
    for found, reexports in read_sources(files):
        documents += found
        for origin, here in reexports:
            exports[origin].append(here)
    for document in documents:
        if document.kind != "topic":
            document.name = public_name(document.name, exports)
    public = [document for document in documents if document.name]
    return sorted(public, key=lambda document: (document.name, document.module, document.raw))


SENTENCE_BREAK = re.compile(r"[.!?:]\s+|\n\s*\n")
WORD = re.compile(r"\w+")


def marks(text):
    """Yield what two splits must not share: every sentence and every 13 words in a row.

    A mark is in lower case and has no punctuation."""
    words = []
    for sentence in SENTENCE_BREAK.split(text.lower()):
        found = WORD.findall(sentence)
        if found:
            yield " ".join(found)
        words += found
    for i in range(len(words) - 12):
        yield " ".join(words[i:i + 13])


def all_marks(document):
    """Yield the marks of a document in any quality: of its raw docstring as a whole, of each line
    of it, and of its prose. So one validation split serves all three qualities."""
    for text in [document.raw, *document.raw.split("\n"), *document.paragraphs]:
        yield from marks(text)


def split_documents(documents):
    """Choose 5 % of the source files for validation. Then move every validation document that
    shares a mark with training to training, until no document shares one."""
    training = []
    holders = defaultdict(list)  # mark → the validation documents that hold it
    for document in documents:
        if stable_hash(f"{SALT}:{document.module}") % 1000 >= 1000 * VAL_SHARE:
            training.append(document)
            continue
        document.split = "val"
        for paragraph in document.paragraphs:
            for mark in marks(paragraph):
                holders[mark].append(document)
    for document in training:  # the list grows in this loop
        for mark in all_marks(document):
            for other in holders.pop(mark, []):
                if other.split == "val":
                    other.split = "train"
                    training.append(other)


def apart_from_validation(others, documents):
    """Those of `others` that share no mark with the validation documents among `documents`. So the
    validation text stays the same, whatever the others are."""
    held_out = set()
    for document in documents:
        if document.split == "val":
            for paragraph in document.paragraphs:
                held_out.update(marks(paragraph))
    return [other for other in others if held_out.isdisjoint(all_marks(other))]


def drop_repeated_paragraphs(documents):
    """Keep each paragraph in the first document that has it."""
    seen = set()
    for document in documents:
        kept = []
        for paragraph in document.paragraphs:
            if paragraph not in seen:
                seen.add(paragraph)
                kept.append(paragraph)
        document.paragraphs = kept


def limit_largest_package(documents):
    """Drop the last documents of the largest package, so that it is a third of all these."""
    if not documents:
        return []
    sizes = Counter()
    for document in documents:
        sizes[document.package] += len(document.text())
    largest, size = sizes.most_common(1)[0]
    room = (sum(sizes.values()) - size) // 2  # half of the others is a third of the whole
    kept = []
    for document in documents:
        if document.package == largest:
            room -= len(document.text())
            if room < 0:
                continue
        kept.append(document)
    return kept


def build_corpus():
    """The documents of the corpus with their splits, in an order fixed by a hash."""
    documents = read_all(source_files(), language_topics())
    split_documents(documents)
    others = apart_from_validation(read_all(dependency_files()), documents)
    drop_repeated_paragraphs(documents + others)
    corpus = []
    for group in (documents, others):
        kept = [document for document in group if document.paragraphs]
        kept.sort(key=mixed_order)
        corpus += limit_largest_package(kept)  # torch in one group, SymPy in the other
    return sorted(corpus, key=mixed_order)


def pieces_of(documents, quality, val_quality):
    """[(split, text, True)]: the text of each document, those to train on first. A quality is
    "prose": sentences; "raw": the docstrings with their code, tables and markup; or "shuffled":
    every sentence is moved to a random place in its split."""
    pieces = []
    for split, wanted in (("train", quality), ("val", val_quality)):
        chosen = [document for document in documents if document.split == split]
        if wanted == "raw":
            texts = [f"{document.name}\n{document.raw}" for document in chosen]
        elif wanted == "shuffled":
            texts = shuffle_sentences(chosen)
        else:
            texts = [document.text() for document in chosen]
        pieces += [(split, text, True) for text in texts]
    return pieces


def source_of(pieces):
    """What the corpus was made from, for meta.json: versions, and a hash of the text."""
    source = {"python": sys.version.split()[0]}
    for package in PACKAGES:
        source[package] = importlib.metadata.version(package)
    source["dependencies"] = dependencies()
    texts = [text for _, text, _ in pieces]
    source["fingerprint"] = hashlib.sha256("\0".join(texts).encode()).hexdigest()
    return source


def mixed_order(document):
    return stable_hash(document.module + document.name), document.raw


def shuffle_sentences(documents):
    """Texts with the same names and the same numbers of paragraphs and sentences, but with every
    sentence moved to a random place in the corpus."""
    pool = []
    for document in documents:
        for paragraph in document.paragraphs:
            pool += sentences(paragraph)
    random.Random(0).shuffle(pool)
    texts = []
    for document in documents:
        lines = [document.name]
        for paragraph in document.paragraphs:
            drawn = [pool.pop() for _ in sentences(paragraph)]
            lines.append(" ".join(drawn))
        texts.append("\n".join(lines))
    return texts


# -------------------------------------------------------------------------------------------------
# 4. Questions made from the corpus.

CLOZE_ITEMS = 1000  # at most
CLOZE_CONTEXT = 300  # characters, about 100 tokens


@dataclass(eq=False)
class Question:
    """A sentence cut into `start` and `ending`, and the `context` before it in its document."""
    document: Document
    context: str
    start: str
    ending: str
    rank: tuple  # (length of the ending, a random number): equally long ones come in random order


def cloze_items(documents, seed=0):
    """Multiple choice in HellaSwag's format: which words end this sentence?

    Four questions from four source files form a block. They share the same four endings, of about
    one length, and each ending is right for one of them. So a model that ignores the context gets
    exactly one in four."""
    rng = random.Random(seed)
    questions = cloze_questions(documents, rng)
    blocks = list(cloze_blocks(questions))
    chosen = rng.sample(blocks, min(len(blocks), CLOZE_ITEMS // 4))
    items = []
    for number, block in enumerate(chosen):
        rng.shuffle(block)
        endings = [question.ending for question in block]
        for label, question in enumerate(block):
            items.append({
                "ind": len(items),
                "activity_label": question.document.name,
                "ctx_a": question.context,
                "ctx_b": question.start,
                "ctx": question.context + question.start,
                "endings": endings,
                "label": label,
                "split": "val",
                "source_id": f"{question.document.module}:{question.document.name}",
                "block": number,
            })
    return items


def cloze_questions(documents, rng):
    """Every sentence whose last 6 to 10 words can be an ending: lower case first, no code."""
    questions = []
    for document in documents:
        before = document.name + "\n"
        for paragraph in document.paragraphs:
            for sentence in sentences(paragraph):
                words = sentence.split()
                count = rng.randint(6, 10)
                start = " ".join(words[:-count])
                ending = " ".join(words[-count:])
                is_plain = re.fullmatch(r"[a-z][\w ,'()/-]+\.", ending)
                if is_plain and len(words) >= count + 3:
                    rank = (len(ending), rng.random())
                    context = last_words(before, CLOZE_CONTEXT)
                    questions.append(Question(document, context, start, ending, rank))
                before += sentence + " "
            before = before[:-1] + "\n"
    return questions


def last_words(text, size):
    """The last `size` characters of a text, without the word that this cuts."""
    if len(text) <= size:
        return text
    return text[-size:].partition(" ")[2]


def cloze_blocks(questions):
    """Yield lists of four questions whose endings differ by at most 4 characters in length."""
    pool = sorted(questions, key=lambda question: question.rank)
    while pool:
        block = []
        for question in pool:
            is_too_long = len(question.ending) > len(pool[0].ending) + 4
            if is_too_long or len(block) == 4:
                break
            if fits(question, block):
                block.append(question)
        if len(block) == 4:
            yield block
            pool = [question for question in pool if question not in block]
        else:
            pool = pool[1:]  # too few partners for the shortest


def fits(question, block):
    """Whether a question has another source file and another ending than all of the block."""
    for other in block:
        same_file = question.document.module == other.document.module
        same_ending = question.ending == other.ending
        if same_file or same_ending:
            return False
    return True


QUESTION_ABOUT = {
    "function": "What does `{}` do?",
    "class": "What is `{}`?",
    "module": "What is the module `{}` for?",
}


def instruct_rows(documents):
    """Questions and answers in Alpaca's format. The answer is how the documentation starts."""
    rows = {}
    for document in documents:
        if document.kind not in QUESTION_ABOUT or not document.summary:
            continue
        instruction = QUESTION_ABOUT[document.kind].format(document.name)
        if instruction not in rows:
            rows[instruction] = {
                "instruction": instruction,
                "input": "",
                "output": document.summary,
                "split": document.split,
            }
    return list(rows.values())


def write_questions(folder, documents):
    """Write cloze.jsonl and instruct.json into the data folder."""
    items = cloze_items([document for document in documents if document.split == "val"])
    lines = [json.dumps(item) + "\n" for item in items]
    (folder / "cloze.jsonl").write_text("".join(lines))
    # As the validation text, questions and answers do not depend on the dependencies.
    installed = dependencies()
    rows = instruct_rows([document for document in documents if document.package not in installed])
    (folder / "instruct.json").write_text(json.dumps(rows, indent=1) + "\n")
    print(f"cloze.jsonl: {len(items):,} questions; instruct.json: {len(rows):,} rows")
