"""convert_hf.py: exported folders in the hands of transformers and peft, imported ones in ours.

    OTHER_PYTHON=ENVIRONMENT/bin/python python -m pytest tests/test_convert_hf.py -k parity

asks the transformers of another environment, version 4 for example."""
import hashlib
import itertools
import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import checkpoint
import convert_hf
import evaluate
import model
import parity
import plot_dynamics
import prepare_data
import sample
import sft
from conftest import ROOT, exit_code, messages, rows, tune, write_lines
from data import Tokenizer
from huggingface import tokenizer as hf_tokenizer
from huggingface.tokenizer import read_json
from model import Llama, ModelConfig
from support import chat, durable, trees
from support.files import write_json

# What a mistake would hide behind: a vocabulary that is padded, fewer key/value heads than heads,
# large weights, positions up to the end of the window.
CONFIG = ModelConfig(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, intermediate_size=96,
                     vocab_size=1000, max_seq_len=48, rope_theta=500_000.0)
SYSTEM = 'You are "x" \\ {{ y }} {% z %} é😀\nok.'
TEXTS = ["The function returns a list.", "", " ", "  two  spaces   three ", "\n\n\n",
         "tabs\t\tand\r\nCRLF\r\n", "emoji 😀👩‍👩‍👧 flags 🇨🇦", "漢字かな交じり文 한국어",
         "é é ạ̈ combining",
         "I'll we've DON'T it's", "x" * 300, " " * 200 + "a", "١٢٣ ½ ²", "nbsp\u00a0\u2003em",
         "<|endoftext|>", "a <|endoftext|> b<|endoftext|>", "null\x00byte",
         "def f(x):\n    return x\n"]
CHATS = [
    [{"role": "user", "content": "Hi?"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "a\nb"},
     {"role": "assistant", "content": " c"}, {"role": "user", "content": "d"}],
    [{"role": "system", "content": ""}, {"role": "user", "content": "{{ a }}"},
     {"role": "assistant", "content": "b"}],
]


def make_run(folder, system=SYSTEM, seed=0, **changes):
    """A run of random weights, large ones. changes: of the sizes in CONFIG."""
    torch.manual_seed(seed)
    config = replace(CONFIG, padded_vocab_size=None, **changes)
    model = Llama(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter *= 6
            else:
                parameter += 0.3 * torch.randn_like(parameter)
    weights = {"config": asdict(config), "model": dict(model.state_dict())}
    folder.mkdir(parents=True)
    durable.write_checkpoint(folder, 3, {"model.pt": weights})
    write_json(folder / "config.json", {"data": None, "seq_len": config.max_seq_len,
                                        "preset": None, "system": system})
    return folder


def call(main, *argv):
    """The exit code of a script."""
    return exit_code(main, argv) or 0


def convert(*argv):
    return call(convert_hf.main, *argv)


def export(run, folder):
    """The folder of an export in fp32."""
    assert convert("export", run, folder, "--dtype", "float32") == 0
    return folder


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """(run, its export in fp32)."""
    root = tmp_path_factory.mktemp("exported")
    run = make_run(root / "run")
    return run, export(run, root / "hf")


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    """The same with a head that is the embedding."""
    root = tmp_path_factory.mktemp("tied")
    run = make_run(root / "run", tie_embeddings=True)
    return run, export(run, root / "hf")


@pytest.fixture
def folder(exported, tmp_path):
    """A copy of the export, to be changed."""
    return Path(shutil.copytree(exported[1], tmp_path / "hf"))


def edit(file, **changes):
    """Change fields of a JSON file; None removes one."""
    value = json.loads(file.read_text())
    value.update(changes)
    file.write_text(json.dumps({name: v for name, v in value.items() if v is not None}))


def edit_weights(folder, change):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file,
              metadata={"format": "pt"})


def tokens_of(config, rows=3):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, config.vocab_size, (rows, config.max_seq_len), generator=generator)


def ask(folder, tmp_path, tokens):
    """What transformers says, of this environment or of OTHER_PYTHON."""
    request = {"tokens": tokens.tolist(), "texts": TEXTS, "chats": CHATS}
    other = os.environ.get("OTHER_PYTHON")
    if other is None:
        return parity.ask(str(folder), request)
    (tmp_path / "request").write_text(json.dumps(request))
    subprocess.run([other, parity.__file__, folder, tmp_path / "request", tmp_path / "answer"],
                   check=True, cwd=tmp_path)
    return json.loads((tmp_path / "answer").read_text())


def our_logits(run, tokens, dtype=torch.float32):
    model, _, _ = checkpoint.load_model(run)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(dtype))
        logits, _ = model(tokens)
    return logits[..., :model.config.vocab_size], model


def distance(answer, logits):
    return (torch.tensor(answer["logits"]) - logits).abs().max().item()


# -------------------------------------------------------------------------------------------------
# transformers

@pytest.mark.parametrize("name", ["exported", "tied"])
def test_parity_of_logits_and_greedy_text(tmp_path, name, request):
    """Catches: weights in another order, another rotation, a padded row, a wrong end."""
    run, folder = request.getfixturevalue(name)
    tokens = tokens_of(CONFIG)
    logits, model = our_logits(run, tokens)
    answer = ask(folder, tmp_path, tokens)
    print(f"transformers {answer['version']}: largest difference {distance(answer, logits):.1e}, "
          f"logits up to {logits.abs().max():.1f}")
    assert answer["problems"] == {}
    assert distance(answer, logits) <= 1e-5 * logits.abs().max()
    half = CONFIG.max_seq_len // 2
    for row, theirs in zip(tokens, answer["greedy"]):
        ids = model.generate(row[None, :half], CONFIG.max_seq_len - half, temperature=0,
                             eot=CONFIG.vocab_size - 1)
        assert [int(i) for i in ids] == theirs


def test_parity_in_bf16(tmp_path, exported):
    """Catches: a conversion that rounds twice, or in another way."""
    run, _ = exported
    assert convert("export", run, tmp_path / "hf") == 0
    tokens = tokens_of(CONFIG)
    answer = ask(tmp_path / "hf", tmp_path, tokens)
    rounded, _ = our_logits(run, tokens, torch.bfloat16)
    whole, _ = our_logits(run, tokens)
    assert distance(answer, rounded) <= 1e-5 * whole.abs().max()
    assert distance(answer, whole) > 1e-3 * whole.abs().max()  # control
    assert read_json(tmp_path / "hf/config.json")["dtype"] == "bfloat16"


def swap_heads(tensors):
    """Of two key/value heads the second first: [K2 K2 K1 K1]."""
    for name in ("k_proj", "v_proj"):
        weight = tensors[f"model.layers.1.self_attn.{name}.weight"]
        tensors[f"model.layers.1.self_attn.{name}.weight"] = weight.roll(CONFIG.head_dim, 0)


def interleave(tensors):
    """The rows of the other convention of rotary positions."""
    for name in ("q_proj", "k_proj"):
        weight = tensors[f"model.layers.0.self_attn.{name}.weight"]
        halves = weight.view(-1, 2, CONFIG.head_dim // 2, CONFIG.dim)
        tensors[f"model.layers.0.self_attn.{name}.weight"] = halves.transpose(1, 2).reshape(
            weight.shape)


@pytest.mark.parametrize("mistake", [swap_heads, interleave])
def test_a_mistake_would_be_seen(exported, folder, mistake):
    """Catches: a comparison of logits that cannot fail."""
    tokens = tokens_of(CONFIG)
    logits, _ = our_logits(exported[0], tokens)
    edit_weights(folder, mistake)
    answer = parity.ask(str(folder), {"tokens": tokens.tolist(), "texts": [], "chats": []})
    assert distance(answer, logits) > 0.01 * logits.abs().max()


def test_parity_of_the_end(folder, tmp_path):
    """Catches: generation that never stops, as that of the released checkpoints (eos 2)."""
    def make_end_likely(tensors):
        head = tensors["lm_head.weight"]
        head[999] = 5 * head.abs().sum(0)  # near the top, whatever the hidden state

    edit_weights(folder, make_end_likely)
    tokens = tokens_of(CONFIG, rows=8)
    assert 999 in [row[-1] for row in ask(folder, tmp_path, tokens)["greedy"]]
    for name in ("config.json", "generation_config.json"):
        edit(folder / name, eos_token_id=2)
    never = ask(folder, tmp_path, tokens)["greedy"]
    assert any(999 in row[:-1] for row in never)  # control


@pytest.mark.parametrize("vocab_size", [257, 1000])
def test_parity_of_the_tokenizer(tmp_path, vocab_size):
    """Catches: other ids than in training, from AutoTokenizer or from tokenizer.json alone (which
    transformers 5 makes anew from vocabulary and merges, and would hide a mistake)."""
    run = make_run(tmp_path / "run", vocab_size=vocab_size)
    folder = export(run, tmp_path / "hf")
    tokenizer = Tokenizer(vocab_size)
    ours = [tokenizer.encode(text) for text in TEXTS]
    answer = ask(folder, tmp_path, torch.tensor([[1, 2]]))
    assert answer["ids"] == ours
    assert answer["decoded"] == TEXTS
    assert answer["length"] == vocab_size
    assert answer["special"] == [vocab_size - 1] * 4
    for text, ids, alone in zip(TEXTS, ours, answer["ids_alone"]):
        if "<|endoftext|>" not in text:  # which this class always takes for the token
            assert alone == ids
    # Control: a space in front of the text.
    cutter = read_json(folder / "tokenizer.json")["pre_tokenizer"]
    edit(folder / "tokenizer.json", pre_tokenizer={**cutter, "add_prefix_space": True})
    other = ask(folder, tmp_path, torch.tensor([[1, 2]]))
    assert other["ids_alone"] != answer["ids_alone"]


def test_tables_are_gpt2s_files(tmp_path):
    """Catches: a merge or a token that differs from what OpenAI published: tiktoken has the hashes
    of those files."""
    import tiktoken_ext.openai_public as public
    source = Path(public.__file__).read_text()
    hf_tokenizer.write_tokenizer(tmp_path, Tokenizer(), 1024)
    for name in ("merges.txt", "vocab.json"):
        content = (tmp_path / name).read_bytes()
        assert f'hash="{hashlib.sha256(content).hexdigest()}"' in source
        assert hashlib.sha256(content[:-1]).hexdigest() not in source  # control


def test_parity_of_the_chat_template(exported, tmp_path):
    """Catches: a rendering that differs from what sft.py trains on, in one space even."""
    _, folder = exported
    answer = ask(folder, tmp_path, tokens_of(CONFIG, 1))
    assert answer["problems"] == {}
    tokenizer = Tokenizer(CONFIG.vocab_size)
    for messages_, text in zip(CHATS, answer["rendered"]):
        ids, _ = chat.encode_chat(tokenizer, messages_, SYSTEM)
        assert tokenizer.decode(ids) == text
    template = (folder / "chat_template.jinja").read_text()
    assert read_json(folder / "tokenizer_config.json")["chat_template"] == template
    assert chat.system_of(template) == SYSTEM
    assert chat.system_of(template + " ") is None  # control


# -------------------------------------------------------------------------------------------------
# There and back

def divide(folder):
    """Put the weights of a folder into three files, as large models have them."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for i in range(3):
        file = f"model-{i}.safetensors"
        part = {name: tensors[name] for name in sorted(tensors)[i::3]}
        save_file(part, folder / file)
        weight_map.update(dict.fromkeys(part, file))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize("name", ["exported", "tied"])
def test_round_trip_is_bitwise(tmp_path, request, name):
    """Catches: a weight that is lost, rounded or mixed up on the way, in one file or in several."""
    run, _ = request.getfixturevalue(name)
    folder = export(run, tmp_path / "hf")
    assert all(file.stat().st_mode & 0o777 == 0o644 for file in folder.iterdir())
    if name == "exported":
        divide(folder)
    assert convert("import", folder, tmp_path / "back", "--step", 3) == 0
    before, _ = checkpoint.load_weights(run)
    after, step = checkpoint.load_weights(tmp_path / "back")
    assert step == 3
    assert after["config"] == {**before["config"], "padded_vocab_size": 1000}
    for tensor_name in ("lm_head.weight", "model.embed_tokens.weight"):
        before["model"][tensor_name] = before["model"][tensor_name][:1000]
    assert trees.differences(before["model"], after["model"]) == []
    before["model"]["model.norm.weight"][0] += 1e-6  # control
    assert trees.differences(before["model"], after["model"]) != []


def older(folder):
    """As transformers 4 and GPT-2's own tokenizer file have it."""
    edit(folder / "config.json", rope_parameters=None, head_dim=None)
    frequencies = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    edit_weights(folder, lambda tensors: tensors.update(frequencies))
    model = read_json(folder / "tokenizer.json")["model"]
    del model["type"]
    merges = [" ".join(merge) for merge in model["merges"]]
    edit(folder / "tokenizer.json", model={**model, "merges": merges})


def newer(folder):
    """As transformers 5 has it, with the older files of a tokenizer."""
    edit(folder / "config.json", rope_theta=None, rope_scaling={"rope_type": "default"})
    (folder / "tokenizer.json").unlink()


@pytest.mark.parametrize("change", [older, newer])
def test_other_forms_of_the_same_are_imported(exported, folder, tmp_path, change):
    """Catches: a folder of an older or newer transformers that is refused, or read wrongly."""
    change(folder)
    assert convert("import", folder, tmp_path / "back") == 0
    tokens = tokens_of(CONFIG)
    assert torch.equal(our_logits(tmp_path / "back", tokens)[0],
                       our_logits(exported[0], tokens)[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_shorter_weights_are_imported(folder, tmp_path, dtype):
    """Catches: weights that stay short, so that training would go on in bf16."""
    stored = load_file(folder / "model.safetensors")
    short = {name: tensor.to(dtype) for name, tensor in stored.items()}
    edit_weights(folder, lambda tensors: tensors.update(short))
    assert convert("import", folder, tmp_path / "back") == 0
    weights, _ = checkpoint.load_weights(tmp_path / "back")
    long = {name: tensor.float() for name, tensor in short.items()}
    assert trees.differences(weights["model"], long) == []
    assert trees.differences(weights["model"], stored) != []  # control


def test_no_kv_heads_means_as_many_as_heads(tmp_path):
    """Catches: the default of another model for what config.json does not say."""
    folder = export(make_run(tmp_path / "run", n_kv_heads=4), tmp_path / "hf")
    silent = ("num_key_value_heads", "rope_theta", "rope_parameters", "rms_norm_eps",
              "max_position_embeddings", "tie_word_embeddings")
    edit(folder / "config.json", **dict.fromkeys(silent))
    assert convert("import", folder, tmp_path / "back") == 0
    tokens = tokens_of(CONFIG)
    logits, model = our_logits(tmp_path / "back", tokens)
    assert model.config.max_seq_len == 2048
    answer = parity.ask(str(folder), {"tokens": tokens.tolist(), "texts": [], "chats": []})
    assert distance(answer, logits) <= 1e-5 * logits.abs().max()


def add_rows(folder, n):
    """Make the vocabulary longer than that of the tokenizer."""
    edit(folder / "config.json", vocab_size=1000 + n)
    edit_weights(folder, lambda t: t.update({
        name: torch.cat([t[name], torch.ones(n, 64)])
        for name in ("lm_head.weight", "model.embed_tokens.weight")}))


def test_padding_stays(folder, tmp_path):
    """Catches: rows beyond the tokenizer's that are lost, or sampled."""
    add_rows(folder, 24)
    assert convert("import", folder, tmp_path / "back") == 0
    model, tokenizer, _ = checkpoint.load_model(tmp_path / "back")
    assert model.config.padded_vocab_size == 1024
    assert model.config.vocab_size == tokenizer.vocab_size == 1000


def test_released_form_is_imported_and_corrected(folder, tmp_path, capsys):
    """Catches: a chat that never ends, because the released checkpoints name "#" as the end; a
    folder without a tokenizer, whose ids are taken as GPT-2's without a word."""
    add_rows(folder, 49_257)
    for name in ("config.json", "generation_config.json"):
        edit(folder / name, bos_token_id=1, eos_token_id=2, rope_parameters=None)
    remove("tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json")(folder)
    assert convert("import", folder, tmp_path / "back", "--step", 2700) == 0
    printed = capsys.readouterr().out
    assert "eos_token_id is 2 in config.json; here it is 50256" in printed
    assert "eos_token_id is 2 in generation_config.json" in printed
    assert "its ids are taken as GPT-2's" in printed
    _, tokenizer, step = checkpoint.load_model(tmp_path / "back")
    assert (tokenizer.eot, step) == (50_256, 2700)


# -------------------------------------------------------------------------------------------------
# Refusals

def drop(name):
    return lambda f: edit_weights(f, lambda t: t.pop(name))


def put(name, tensor):
    return lambda f: edit_weights(f, lambda t: t.update({name: tensor}))


def config(**changes):
    return lambda f: edit(f / "config.json", **changes)


def tokenizer_json(**changes):
    return lambda f: edit(f / "tokenizer.json", **changes)


def weight_map(value):
    return lambda f: write_json(f / "model.safetensors.index.json", {"weight_map": value})


def remove(*names):
    def change(f):
        for name in names:
            (f / name).unlink()
    return change


def cut(name):
    return lambda f: os.truncate(f / name, (f / name).stat().st_size // 2)


def other_merges(f):
    model = read_json(f / "tokenizer.json")["model"]
    edit(f / "tokenizer.json", model={**model, "merges": model["merges"][::-1]})


def more_tokens(f):
    added = read_json(f / "tokenizer.json")["added_tokens"]
    edit(f / "tokenizer.json", added_tokens=[*added, {"id": 1000, "content": "<pad>"}])
    edit(f / "config.json", vocab_size=1001)


REFUSED = {
    "model_type is 'mistral'": config(model_type="mistral"),
    "quantization_config is": config(quantization_config={"bits": 4}),
    "rope_scaling is": config(rope_scaling={"rope_type": "linear", "factor": 2.0}),
    "partial_rotary_factor is 0.5": config(partial_rotary_factor=0.5),
    "two values of rope_theta": config(rope_theta=10_000.0),
    "head_dim is 32": config(head_dim=32),
    "num_hidden_layers is missing": config(num_hidden_layers=None),
    "dim '64' is not of type int": config(hidden_size="64"),
    "not divisible by n_heads 5": config(num_attention_heads=5),
    "1 tensors are missing (model.norm.weight)": drop("model.norm.weight"),
    "not those of a plain Llama (q.bias)": put("q.bias", torch.ones(64)),
    "has the shape (65,)": put("model.norm.weight", torch.ones(65)),
    "is stored as F64": put("model.norm.weight", torch.ones(64).double()),
    "holds NaN or infinity": put("model.norm.weight", torch.full((64,), float("nan"))),
    "'/etc/passwd', which is not one in this folder": weight_map({"a": "/etc/passwd"}),
    "'../x.safetensors', which is not one": weight_map({"a": "../x.safetensors"}),
    "'other.safetensors', which is not one": weight_map({"a": "other.safetensors"}),
    "names the file None": weight_map([]),
    "model.bin can run code": lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
    "model.safetensors: not a whole safetensors file": cut("model.safetensors"),
    "config.json: cannot be read": cut("config.json"),
    "no config.json in it": remove("config.json"),
    "no weights in it": remove("model.safetensors"),
    "merges.txt: not the files of GPT-2's": remove("tokenizer.json", "vocab.json"),
    "its pre_tokenizer has add_prefix_space True": tokenizer_json(
        pre_tokenizer={"type": "ByteLevel", "add_prefix_space": True}),
    "has normalizer {'type': 'NFC'}": tokenizer_json(normalizer={"type": "NFC"}),
    "its model has type 'Unigram'": tokenizer_json(model={"type": "Unigram", "vocab": []}),
    "its merges are others": other_merges,
    "'<pad>' has id 1000, in GPT-2's none": more_tokens,
    "vocab_size 999 in config.json is less than": config(vocab_size=999),
    "1,000 rows are not those of GPT-2's": remove("tokenizer.json", "vocab.json", "merges.txt"),
}


@pytest.mark.row(40)
@pytest.mark.parametrize("why", REFUSED)
def test_what_we_cannot_be_is_refused(folder, tmp_path, capsys, why):
    """Catches: a model that is imported, and says nonsense; a traceback; half a run."""
    REFUSED[why](folder)
    assert convert("import", folder, tmp_path / "back") == 2
    line, = [line for line in messages(capsys) if "convert_hf.py: " in line]
    assert why in line
    assert not (tmp_path / "back").exists()


def test_tied_head_that_is_not_the_embedding_is_refused(tied, tmp_path, capsys):
    """Catches: a head of its own that is silently dropped."""
    folder = shutil.copytree(tied[1], tmp_path / "hf")
    embedding = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    put("lm_head.weight", embedding.clone())(folder)
    assert convert("import", folder, tmp_path / "same") == 0  # control
    put("lm_head.weight", embedding + 1)(folder)
    assert convert("import", folder, tmp_path / "other") == 2
    assert "lm_head.weight differs" in messages(capsys)[-1]


def test_overwriting_is_refused(exported, folder, tmp_path, capsys):
    """Catches: an export into a folder of the user's, an import into a run that was trained."""
    run, _ = exported
    shutil.copytree(run, tmp_path / "trained")
    back = tmp_path / "back"
    assert convert("import", folder, back, "--step", 1) == 0
    assert convert("import", folder, back, "--step", 2) == 0  # control
    for argv, why in ((("export", run, folder), "exists — choose another folder"),
                      (("import", folder, tmp_path / "trained"), "already holds something else"),
                      (("import", folder, back, "--step", 2), "already has step 2")):
        assert convert(*argv) == 2
        assert why in messages(capsys)[-1]
    edit(folder / "config.json", max_position_embeddings=24)
    assert convert("import", folder, back, "--step", 4) == 2
    assert "of other sizes" in messages(capsys)[-1]


def test_network_that_is_no_llama_is_refused(exported, tmp_path, capsys, monkeypatch):
    """Catches: a folder that says "Llama" and computes what an edited model.py does not; weights
    that the format does not know, left out without a word."""
    run = shutil.copytree(exported[0], tmp_path / "run")
    weights, _ = checkpoint.load_weights(run)
    weights["model"]["q_norm.weight"] = torch.ones(64)
    durable.write_checkpoint(run, 4, {"model.pt": weights})
    assert convert("export", run, tmp_path / "hf", "--anyway") == 2
    assert "q_norm.weight ((64,) float32 saved, absent in the code)" in messages(capsys)[-1]
    monkeypatch.setattr(model, "apply_rope", lambda x, cos, sin: x)
    assert convert("export", run, tmp_path / "hf", "--step", 3) == 2
    assert "not a plain Llama: apply_rope in model.py has another text" in messages(capsys)[-1]
    assert not (tmp_path / "hf").exists()
    assert convert("export", run, tmp_path / "hf", "--step", 3, "--anyway") == 0
    assert "note: exported as a Llama all the same: apply_rope" in capsys.readouterr().out
    monkeypatch.undo()

    class Biased(torch.nn.Linear):
        def __init__(self, *sizes, bias):
            super().__init__(*sizes, bias=True)

    monkeypatch.setattr(torch.nn, "Linear", Biased)
    weights["model"] = Llama(checkpoint.read_config(weights["config"])).state_dict()
    durable.write_checkpoint(run, 5, {"model.pt": weights})
    assert convert("export", run, tmp_path / "new", "--anyway") == 2
    assert "a Llama does not have these weights: lm_head.bias, model." in messages(capsys)[-1]
    monkeypatch.undo()
    assert convert("export", run, tmp_path / "again", "--step", 3) == 0  # control


@pytest.mark.row(38)
def test_export_of_a_damaged_run_is_refused(exported, tmp_path, capsys):
    """Catches: half a folder of a damaged checkpoint."""
    shutil.copytree(exported[0], tmp_path / "run")
    cut("model.pt")(tmp_path / "run/checkpoints/step_00000003")
    assert convert("export", tmp_path / "run", tmp_path / "hf") == 2
    assert "no usable checkpoint" in messages(capsys)[-1]
    assert convert("export", tmp_path / "run", tmp_path / "hf", "--step", 9) == 2
    assert "no checkpoint of step 9" in messages(capsys)[-1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_a_hugging_face_folder_is_not_a_run_mistake(folder, capsys):
    """Catches: "no such run" for a folder that is there; the way to use it is not told."""
    assert exit_code(evaluate.main, [folder]) == 2
    assert "python convert_hf.py import" in messages(capsys)[-1]


# -------------------------------------------------------------------------------------------------
# LoRA

@pytest.fixture(scope="module")
def adapted(whole, instructions, tmp_path_factory):
    """A LoRA run of 2 steps."""
    folder = tmp_path_factory.mktemp("adapted") / "r"
    assert tune(whole, instructions, folder, "--lora", 4, "--max_steps", 2) == 0
    return folder


def test_adapters_are_merged_or_kept(adapted, whole, tmp_path, capsys):
    """Catches: an export without what LoRA has learned; adapters with another scale, or transposed:
    the base plus (alpha / r) B A, from the folder of adapters, is the merged export."""
    assert convert("export", whole, tmp_path / "lora", "--adapters") == 2
    assert "holds whole weights, no adapters" in messages(capsys)[-1]
    assert convert("export", adapted, tmp_path / "lora", "--adapters") == 0
    merged = load_file(export(adapted, tmp_path / "merged") / "model.safetensors")
    base = load_file(export(whole, tmp_path / "base") / "model.safetensors")
    adapters = load_file(tmp_path / "lora/adapter_model.safetensors")
    settings = read_json(tmp_path / "lora/adapter_config.json")
    scale = settings["lora_alpha"] / settings["r"]
    for name, weight in base.items():
        prefix = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{prefix}.lora_A.weight" in adapters:
            A = adapters[f"{prefix}.lora_A.weight"]
            B = adapters[f"{prefix}.lora_B.weight"]
            assert not torch.allclose(weight, merged[name], atol=1e-6)  # control
            weight = weight + scale * (B @ A)
        assert torch.allclose(weight, merged[name], atol=1e-6)
    assert len(adapters) == 2 * 2 * 7


def test_peft_gives_our_logits(adapted, whole, tmp_path):
    """Catches: adapters that peft does not find, or applies in another way."""
    peft = pytest.importorskip("peft", reason="peft is not installed: pip install peft")
    import transformers
    assert convert("export", adapted, tmp_path / "lora", "--adapters") == 0
    base = transformers.AutoModelForCausalLM.from_pretrained(export(whole, tmp_path / "base"))
    tokens = tokens_of(ModelConfig(vocab_size=300, max_seq_len=64))
    with torch.no_grad():
        without = base(tokens).logits
        model = peft.PeftModel.from_pretrained(base, tmp_path / "lora")
        theirs = model(tokens).logits
    ours, _ = our_logits(adapted, tokens)
    assert (theirs - ours).abs().max() <= 1e-5 * ours.abs().max()
    assert (without - ours).abs().max() > 1e-3 * ours.abs().max()  # control


# -------------------------------------------------------------------------------------------------
# An imported run is a run

def test_imported_run_is_scored_sampled_tuned_and_drawn(whole, data, instructions, tmp_path,
                                                        monkeypatch, capsys):
    """Catches: an imported run that one of the other scripts does not accept."""
    folder = export(whole, tmp_path / "hf")
    edit(folder / "config.json", max_position_embeddings=64)  # as long as the rows
    back = tmp_path / "back"
    assert convert("import", folder, back, "--step", 20) == 0
    assert call(evaluate.main, back) == 2
    assert "was imported, so it has no data of its own" in messages(capsys)[-1]
    assert call(evaluate.main, back, "--data", data, "--eval_tokens", 256, "--seq_len", 16) == 0
    assert call(sample.main, back, "--prompt", "a", "--max_new_tokens", 4) == 0
    assert call(sft.main, back, "--run", tmp_path / "tuned", "--max_steps", 2) == 2
    assert "give --instructions" in messages(capsys)[-1]
    assert tune(back, instructions, tmp_path / "tuned", "--max_steps", 2) == 0
    monkeypatch.undo()  # the drawing, which the fixtures leave out
    assert call(plot_dynamics.main, back, "--out", tmp_path / "figures") == 0
    assert [row["step"] for row in plot_dynamics.read_run(back).rows["eval"]] == [20]
    assert (tmp_path / "figures/dynamics.png").stat().st_size > 10_000


def test_card_tells_how_it_was_made(whole, tmp_path):
    """Catches: a model card with numbers of another step, or without where its weights come from; a
    chat template for a model that was never tuned to answer."""
    assert convert("export", whole, tmp_path / "hf", "--step", 8) == 0
    card = (tmp_path / "hf/README.md").read_text()
    losses = dict(rows(whole, "eval", ("step", "val_loss")))
    assert f"| loss on held-out text, nats/token | {losses[8]:.4f} |" in card
    assert "license" in card
    assert f"{losses[20]:.4f}" not in card  # control
    assert not (tmp_path / "hf/chat_template.jinja").exists()
    assert "chat_template" not in (tmp_path / "hf/tokenizer_config.json").read_text()
    assert convert("import", tmp_path / "hf", tmp_path / "back") == 0
    assert convert("export", tmp_path / "back", tmp_path / "again") == 0
    card = (tmp_path / "again/README.md").read_text()
    assert "| imported from | hf |" in card


def test_card_names_fineweb_only_if_it_is(data, tmp_path):
    """Catches: somebody's own parquet files that are published as FineWeb-Edu."""
    copied = shutil.copytree(data, tmp_path / "data")
    for more, name in (({"files": ["a.parquet"]}, "files of the author's"),
                       ({"repo": "HuggingFaceFW/fineweb-edu"}, "fineweb-edu")):
        edit(copied / "meta.json", source={"name": "fineweb-edu", **more})
        assert convert_hf.source_of({"data": copied}) == name


QUESTIONS = [
    ("Baking cookies", "Put it in [step] the oven. [substeps]", "and WAIT", "3"),
    ("Moving [header] a cat", "Choose a room. [title] Open the door.", "then [step]", "0"),
    ("Walking", "A man  walks,  and  runs.", "he Stops  [substeps] ", "1"),
    ("Talking", "Nothing", "", "2"),
]


def write_questions(file):
    endings = ["goes on [step] and on.", "  [title] ends here.", "is a  test of it.", "x [y] z"]
    write_lines(file, [{"activity_label": label, "ctx_a": a, "ctx_b": b, "ctx": f"{a} {b}",
                        "endings": endings, "label": right} for label, a, b, right in QUESTIONS])


def test_lm_eval_gives_our_likelihoods(tmp_path):
    """Catches: a score in the style of the leaderboards that is not the one of the leaderboards:
    another context, another ending, another space between them, padded ids."""
    python = os.environ.get("LM_EVAL_PYTHON")
    if python is None:
        pytest.importorskip("lm_eval", reason="lm_eval is not installed: pip install lm_eval[hf], "
                                              "or set LM_EVAL_PYTHON")
        python = sys.executable
    run = make_run(tmp_path / "run", system=None, max_seq_len=128)
    export(run, tmp_path / "hf")
    write_questions(tmp_path / "questions.jsonl")
    script = Path(parity.__file__).with_name("lm_eval_scores.py")
    results = tmp_path / "run/lm_eval/step_3"
    subprocess.run([python, script, tmp_path / "hf", tmp_path / "questions.jsonl", results,
                    tmp_path / "answer"], check=True, cwd=tmp_path)
    theirs = read_json(tmp_path / "answer")

    model, tokenizer, _ = checkpoint.load_model(run)
    autocast = torch.autocast("cpu", enabled=False)
    benchmark = evaluate.Benchmark(tmp_path / "questions.jsonl", tokenizer, 128, "harness")
    ours = evaluate.log_likelihoods(model, benchmark.contexts, benchmark.endings, autocast)
    expected = torch.tensor(theirs["likelihoods"], dtype=torch.float64)
    print(f"lm_eval: largest difference {(ours - expected).abs().max():.1e}, "
          f"values down to {expected.min():.0f}")
    assert (ours - expected).abs().max() < 1e-5 * expected.abs().max()
    scores = benchmark.score(model, autocast)
    assert (scores["acc"], scores["acc_norm"]) == (theirs["acc"], theirs["acc_norm"])
    other = evaluate.Benchmark(tmp_path / "questions.jsonl", tokenizer, 128, "token")  # control
    found = evaluate.log_likelihoods(model, other.contexts, other.endings, autocast)
    assert (found - expected).abs().max() > 1e-3 * expected.abs().max()
    # And plot_dynamics.py draws its result file.
    (tmp_path / "run/evaluations.jsonl").write_text('{"event": "eval", "step": 3, "val_loss": 1}\n')
    drawn = plot_dynamics.read_run(tmp_path / "run")
    assert drawn.rows["benchmark"][0]["acc_norm"] == theirs["acc_norm"]
    assert list(drawn.benchmarks) == ["ours (lm-eval, 4 questions)"]


@pytest.mark.slow
def test_released_trajectory_with_stand_ins(tmp_path):
    """Catches: a command of `reproduce.sh released` that fails, or a checkpoint scored as another
    one. Two small folders in the form of the released ones take their place."""
    copied = tmp_path / "copy"
    shutil.copytree(ROOT, copied, ignore=shutil.ignore_patterns(".*", "runs", "data", "tests"))
    for seed, name in enumerate(("2.7k", "43.5k")):
        run = make_run(tmp_path / f"run{seed}", system=None, seed=seed, vocab_size=50_257)
        folder = export(run, copied / f"folders/step-{name}")
        for file in ("config.json", "generation_config.json"):
            edit(folder / file, bos_token_id=1, eos_token_id=2, rope_parameters=None)
    texts = tmp_path / "texts.jsonl"
    write_lines(texts, [{"text": f"Text {i} is here."} for i in range(999)])
    questions = tmp_path / "questions.jsonl"
    write_questions(questions)
    for argv in (["fineweb-edu", "--from", texts, "--out", copied / "data/fineweb-edu-10M"],
                 ["hellaswag", "--from", questions, "--out", copied / "data/hellaswag"]):
        assert call(prepare_data.main, *argv) == 0
    env = {**os.environ, "PYTHON": sys.executable, "RELEASED": "folders/step-"}
    command = ["bash", "reproduce.sh", "released", "2.7k", "43.5k"]
    done = subprocess.run(command, cwd=copied, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = (copied / "runs/released/evaluations.jsonl").read_text().splitlines()
    events = [json.loads(line) for line in lines]
    kinds = ("eval", "benchmark", "sample", "sample")
    found = [(event["step"], event["event"]) for event in events]
    assert found == list(itertools.product((2700, 43_500), kinds))
    losses = [event["val_loss"] for event in events if event["event"] == "eval"]
    assert losses[0] != losses[1]
    assert (copied / "figures/released/dynamics.png").stat().st_size > 10_000
    assert (copied / "folders/step-2.7k/model.safetensors").exists()  # those of others stay
    done = subprocess.run(command, cwd=copied, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and "== step" not in done.stdout  # nothing is scored twice


PEAK = """
import re, sys
from pathlib import Path
import convert_hf

def kilobytes():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text()).group(1))

before = kilobytes()
convert_hf.main(["export", *sys.argv[1:]])
print(kilobytes() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_export_makes_no_second_copy(tmp_path):
    """Catches: an export that needs twice the weights in memory: the large ones do not fit then."""
    run = make_run(tmp_path / "run", dim=1024, n_layers=16, n_heads=16, n_kv_heads=4,
                   intermediate_size=2816, vocab_size=50_257, max_seq_len=64)
    size = (run / "checkpoints/step_00000003/model.pt").stat().st_size
    for dtype in ("bfloat16", "float32"):
        command = [sys.executable, "-c", PEAK, run, tmp_path / dtype, "--dtype", dtype]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        peak = 1024 * int(done.stdout.split()[-1])
        print(f"{dtype}: {size / 1e9:.2f} GB of weights, peak {peak / 1e9:.2f} GB")
        assert 0.9 * size < peak < 1.3 * size
