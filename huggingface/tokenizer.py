"""tokenizer.py — GPT-2's tokenizer, or the first of its ids, as Hugging Face files, and back.

Hugging Face writes a token as text. Its bytes need not be valid UTF-8, so GPT-2 gives each of the
256 bytes a visible character; a space is "Ġ". A merge is written as the two tokens that it joins.
"""
import json

from support.files import write_json
from support.runs import UserError, parse_json

END_OF_TEXT = "<|endoftext|>"

# What GPT-2's tokenizer.json says: of its model, and of how text is cut before it.
MODEL = {"type": "BPE", "dropout": None, "continuing_subword_prefix": "", "end_of_word_suffix": "",
         "byte_fallback": False, "ignore_merges": False}
CUTTER = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}

# These bytes have no visible character in Latin-1; GPT-2 gives them those from 256 on.
HIDDEN = [byte for byte in range(256) if byte == ord(" ") or not chr(byte).isprintable()]
VISIBLE = {byte: 256 + i for i, byte in enumerate(HIDDEN)}


def visible(piece):
    """The bytes of a token as text."""
    return piece.decode("latin-1").translate(VISIBLE)


def merge_of(piece, ranks):
    """The two tokens that were joined to `piece`: what is left of it after all merges that were
    learned before it. ranks: {token: rank} (Sennrich et al. 2016, arXiv 1508.07909, algorithm 1,
    is how they were learned)."""
    parts = [bytes([byte]) for byte in piece]
    while len(parts) > 2:
        # Of the pairs that are tokens, join the one that was learned first.
        _, i = min((ranks.get(parts[i] + parts[i + 1], len(ranks)), i)
                   for i in range(len(parts) - 1))
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
    return parts


def tables_of(tokenizer):
    """(vocabulary {text: id}, merges [(text, text), …]) of a data.Tokenizer."""
    pieces = [tokenizer.decode_bytes([i]) for i in range(tokenizer.eot)]
    ranks = {piece: rank for rank, piece in enumerate(pieces)}
    vocabulary = {visible(piece): rank for rank, piece in enumerate(pieces)}
    vocabulary[END_OF_TEXT] = tokenizer.eot
    merges = []
    for piece in pieces:
        if len(piece) > 1:
            first, second = merge_of(piece, ranks)
            merges.append((visible(first), visible(second)))
    return vocabulary, merges


# -------------------------------------------------------------------------------------------------
# Writing

def write_tokenizer(folder, tokenizer, window, template=None):
    """Write tokenizer.json, tokenizer_config.json, vocab.json and merges.txt, and the chat
    template if there is one. window: tokens that the model can read."""
    vocabulary, merges = tables_of(tokenizer)
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    lines = ["#version: 0.2", *[f"{first} {second}" for first, second in merges], ""]
    (folder / "merges.txt").write_bytes("\n".join(lines).encode())
    special = {"content": END_OF_TEXT, "lstrip": False, "normalized": False, "rstrip": False,
               "single_word": False, "special": True}
    by_bytes = {**CUTTER, "trim_offsets": True}
    write_json(folder / "tokenizer.json", {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": tokenizer.eot, **special}],
        "normalizer": None,
        "pre_tokenizer": by_bytes,
        "post_processor": {**CUTTER, "trim_offsets": False},
        "decoder": by_bytes,
        "model": {**MODEL, "unk_token": None, "fuse_unk": False, "vocab": vocabulary,
                  "merges": merges},
    })
    config = {
        "tokenizer_class": "GPT2Tokenizer",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "unk_token": END_OF_TEXT,
        "pad_token": END_OF_TEXT,
        "add_prefix_space": False,
        "add_bos_token": False,
        "padding_side": "left",  # what is generated must follow the prompt
        "clean_up_tokenization_spaces": False,
        "model_max_length": window,
        "added_tokens_decoder": {str(tokenizer.eot): special},
    }
    if template is not None:
        config["chat_template"] = template
        (folder / "chat_template.jinja").write_bytes(template.encode())
    write_json(folder / "tokenizer_config.json", config)


# -------------------------------------------------------------------------------------------------
# Reading

def read_vocabulary(folder):
    """(vocabulary {text: id} with the added tokens, merges [(text, text), …]) of a folder, or None
    if it has no files of a tokenizer. Raises UserError naming what we cannot do."""
    if (folder / "tokenizer.json").exists():
        return read_tokenizer_json(folder / "tokenizer.json")
    if (folder / "vocab.json").exists() and (folder / "merges.txt").exists():
        lines = (folder / "merges.txt").read_text(encoding="utf-8", errors="replace").splitlines()
        merges = [tuple(line.split(" ")) for line in lines if not line.startswith("#version")]
        return read_json(folder / "vocab.json"), merges
    for file in ("tokenizer.model", "vocab.json", "merges.txt"):
        if (folder / file).exists():
            raise UserError(f"{folder / file}: not the files of GPT-2's tokenizer, and ours can "
                            f"be no other — import a model that uses GPT-2's")
    return None


def read_tokenizer_json(file):
    found = read_json(file)
    try:
        model = found["model"]
        check_fields(model, MODEL, f"{file}: its model")
        check_fields(found["pre_tokenizer"], CUTTER, f"{file}: its pre_tokenizer")
        check_fields(found, {"normalizer": None}, file)
        vocabulary = dict(model["vocab"])
        for token in found.get("added_tokens") or []:
            vocabulary[token["content"]] = token["id"]
        merges = [tuple(merge.split(" ") if isinstance(merge, str) else merge)
                  for merge in model["merges"]]
    except (KeyError, TypeError, AttributeError, ValueError) as why:
        raise UserError(f"{file}: not a tokenizer of the tokenizers library ({why!r}) — download "
                        f"it again") from None
    return vocabulary, merges


def check_fields(found, expected, where):
    """Raise UserError if a field of a JSON object has another value; it may be absent."""
    for name, value in expected.items():
        if found.get(name, value) not in (value, None):
            raise UserError(f"{where} has {name} {found[name]!r}, GPT-2's tokenizer {value!r} — "
                            f"import a model that uses GPT-2's")


def read_json(file):
    """The JSON object in a file. Raises UserError."""
    try:
        value = parse_json(file.read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise ValueError("not a JSON object")
        return value
    except (ValueError, OSError) as why:
        raise UserError(f"{file}: cannot be read ({why}) — download it again") from None


def difference(vocabulary, merges, tokenizer):
    """How they differ from those of a data.Tokenizer, in a few words; None if they do not."""
    ours, our_merges = tables_of(tokenizer)
    others = [text for text, number in vocabulary.items() if number != ours.get(text)]
    if others:
        text = others[-1]
        return f"{text!r} has id {vocabulary[text]}, in GPT-2's {ours.get(text, 'none')}"
    if merges != our_merges:
        return "its merges are others"
    return None
