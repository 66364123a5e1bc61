"""convert_hf.py: exported folders in the hands of transformers and peft, imported ones in ours.

    OTHER_PYTHON=ENVIRONMENT/bin/python python -m pytest tests/test_convert_hf.py -k parity

asks the transformers of another environment, version 4 for example."""
import hashlib
import json
import os
import re
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
from conftest import ROOT, exit_code, messages, tune
from data import Tokenizer
from model import Llama, ModelConfig
from huggingface import tokenizer as hf_tokenizer
from support import chat, durable
from support.files import write_json

# What a mistake would hide behind: a vocabulary that is padded, fewer key/value heads than heads,
# large weights, positions up to the end of the window.
CONFIG = ModelConfig(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, intermediate_size=96,
                     vocab_size=1000, max_seq_len=48, rope_theta=500_000.0)
SYSTEM = 'You are "x" \\ {{ y }} {% z %} é😀\nok.'
TEXTS = ["The function returns a list.", "", " ", "  two  spaces   three ", "\n\n\n",
         "tabs\t\tand\r\nCRLF\r\n", "emoji 😀👩‍👩‍👧 flags 🇨🇦", "漢字かな交じり文 한국어", "é é ạ̈ combining",
         "I'll we've DON'T it's", "x" * 300, " " * 200 + "a", "١٢٣ ½ ²", "nbsp\u00a0\u2003em",
         "<|endoftext|>", "a <|endoftext|> b<|endoftext|>", "null\x00byte",
         "def f(x):\n    return x\n"]
CHATS = [
    [{"role": "user", "content": "Hi?"}],
    [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Hello."}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "a\nb"},
     {"role": "assistant", "content": " c"}, {"role": "user", "content": "d"}],
    [{"role": "system", "content": ""}, {"role": "user", "content": "{{ a }}"},
     {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"},
     {"role": "assistant", "content": "d"}],
]


def make_run(folder, config=CONFIG, system=SYSTEM, seed=0):
    """A run of random weights, large ones."""
    torch.manual_seed(seed)
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


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """(run, its export in fp32)."""
    root = tmp_path_factory.mktemp("exported")
    run = make_run(root / "run")
    assert convert("export", run, root / "hf", "--dtype", "float32") == 0
    return run, root / "hf"


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


def ask(folder, tmp_path, tokens, dtype="float32"):
    """What transformers says, of this environment or of OTHER_PYTHON."""
    request = {"tokens": tokens.tolist(), "texts": TEXTS, "chats": CHATS, "dtype": dtype}
    other = os.environ.get("OTHER_PYTHON")
    if other is None:
        return parity.ask(str(folder), request)
    (tmp_path / "request").write_text(json.dumps(request))
    script = Path(parity.__file__)
    subprocess.run([other, script, folder, tmp_path / "request", tmp_path / "answer"], check=True,
                   cwd=tmp_path)
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

@pytest.mark.parametrize("tied", [False, True])
def test_parity_of_logits_and_greedy_text(tmp_path, tied):
    """Catches: weights in another order, another rotation, a padded row, a wrong end."""
    run = make_run(tmp_path / "run", replace(CONFIG, tie_embeddings=tied))
    assert convert("export", run, tmp_path / "hf", "--dtype", "float32") == 0
    tokens = tokens_of(CONFIG)
    logits, model = our_logits(run, tokens)
    answer = ask(tmp_path / "hf", tmp_path, tokens)
    print(f"transformers {answer['version']}: largest difference {distance(answer, logits):.1e}, "
          f"logits up to {logits.abs().max():.1f}")
    assert answer["problems"] == {}
    assert distance(answer, logits) <= 1e-5 * logits.abs().max()
    half = CONFIG.max_seq_len // 2
    for row, theirs in zip(tokens, answer["greedy"]):
        ids = model.generate(row[None, :half], CONFIG.max_seq_len - half, temperature=0,
                             eot=CONFIG.vocab_size - 1)
        assert [int(i) for i in ids] == theirs
    stored = load_file(tmp_path / "hf/model.safetensors")
    assert ("lm_head.weight" in stored) == (not tied)
    assert stored["model.embed_tokens.weight"].shape == (1000, 64)


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
    assert json.loads((tmp_path / "hf/config.json").read_text())["dtype"] == "bfloat16"


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


def shift_rows(tensors):
    """Rows that begin one id too late, as with padding in front."""
    tensors["lm_head.weight"] = tensors["lm_head.weight"].roll(1, 0)


@pytest.mark.parametrize("mistake", ["theta", "theta of transformers 5", swap_heads, interleave,
                                     shift_rows])
def test_a_mistake_would_be_seen(exported, folder, tmp_path, mistake):
    """Catches: a comparison of logits that cannot fail."""
    tokens = tokens_of(CONFIG)
    logits, _ = our_logits(exported[0], tokens)
    if callable(mistake):
        edit_weights(folder, mistake)
    elif mistake == "theta":
        edit(folder / "config.json", rope_theta=10_000.0, rope_parameters=None)
    else:
        edit(folder / "config.json", rope_theta=None,
             rope_parameters={"rope_type": "default", "rope_theta": 10_000.0})
    answer = parity.ask(str(folder), {"tokens": tokens.tolist(), "texts": [], "chats": []})
    assert distance(answer, logits) > 0.01 * logits.abs().max()


def test_parity_of_the_end(tmp_path):
    """Catches: generation that never stops, as that of the released checkpoints (eos 2)."""
    run = make_run(tmp_path / "run")
    weights = torch.load(run / "checkpoints/step_00000003/model.pt")
    row = weights["model"]["lm_head.weight"]
    row[999] = 0
    row[999] = 5 * row[:999].abs().sum(0)  # whatever the hidden state, end-of-text is near the top
    shutil.rmtree(run / "checkpoints")
    durable.write_checkpoint(run, 3, {"model.pt": weights})
    assert convert("export", run, tmp_path / "hf", "--dtype", "float32") == 0
    tokens = tokens_of(CONFIG, rows=16)
    ends = [row[-1] for row in ask(tmp_path / "hf", tmp_path, tokens)["greedy"]]
    assert 999 in ends
    for name in ("config.json", "generation_config.json"):
        edit(tmp_path / "hf" / name, eos_token_id=2)  # control
    never = ask(tmp_path / "hf", tmp_path, tokens)["greedy"]
    assert all(len(row) == 24 for row in never if 2 not in row)
    assert any(999 in row[:-1] for row in never)


@pytest.mark.parametrize("vocab_size", [257, 1000, 50_257])
def test_parity_of_the_tokenizer(tmp_path, vocab_size):
    """Catches: other ids than in training, from AutoTokenizer or from tokenizer.json alone (which
    transformers 5 makes anew from vocabulary and merges, and would hide a mistake)."""
    config = replace(CONFIG, vocab_size=vocab_size, padded_vocab_size=None)
    run = make_run(tmp_path / "run", config)
    assert convert("export", run, tmp_path / "hf") == 0
    tokenizer = Tokenizer(vocab_size)
    ours = [tokenizer.encode(text) for text in TEXTS]
    answer = ask(tmp_path / "hf", tmp_path, tokens_of(config, 1))
    assert answer["ids"] == ours
    assert answer["decoded"] == TEXTS
    assert answer["length"] == vocab_size
    assert answer["special"] == [vocab_size - 1] * 4
    for text, ids, alone in zip(TEXTS, ours, answer["ids_alone"]):
        if "<|endoftext|>" not in text:  # which this class always takes for the token
            assert alone == ids
    # Control: a space in front of the text.
    file = tmp_path / "hf/tokenizer.json"
    value = json.loads(file.read_text())
    value["pre_tokenizer"]["add_prefix_space"] = True
    file.write_text(json.dumps(value))
    assert parity.ask(str(tmp_path / "hf"), {"tokens": [[1, 2]], "texts": TEXTS, "chats": []})[
        "ids_alone"] != answer["ids_alone"]


def test_tables_are_gpt2s_files(tmp_path):
    """Catches: a merge or a token that differs from what OpenAI published: tiktoken has the hashes
    of those files."""
    import tiktoken_ext.openai_public as public
    source = Path(public.__file__).read_text()
    hf_tokenizer.write_tokenizer(tmp_path, Tokenizer(), 1024)
    for name in ("merges.txt", "vocab.json"):
        digest = hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()
        assert f'hash="{digest}"' in source
    hf_tokenizer.write_tokenizer(tmp_path, Tokenizer(50_256), 1024)  # control
    digest = hashlib.sha256((tmp_path / "merges.txt").read_bytes()).hexdigest()
    assert digest not in source


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
    assert json.loads((folder / "tokenizer_config.json").read_text())["chat_template"] == template
    assert chat.system_of(template) == SYSTEM
    assert chat.system_of(template + " ") is None  # control
    assert len(set(answer["rendered"])) == len(CHATS)


def test_base_run_has_no_chat_template(tmp_path):
    """Catches: a template for a model that was never tuned to answer."""
    run = make_run(tmp_path / "run", system=None)
    assert convert("export", run, tmp_path / "hf") == 0
    assert not (tmp_path / "hf/chat_template.jinja").exists()
    assert "chat_template" not in (tmp_path / "hf/tokenizer_config.json").read_text()
    assert "not tuned to answer" in (tmp_path / "hf/README.md").read_text()


# -------------------------------------------------------------------------------------------------
# There and back

@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shard_bytes", [100_000, 5_000_000_000])
def test_round_trip_is_bitwise(tmp_path, monkeypatch, tied, shard_bytes):
    """Catches: a weight that is lost, rounded or mixed up on the way, in one file or in several."""
    monkeypatch.setattr(convert_hf, "SHARD_BYTES", shard_bytes)
    run = make_run(tmp_path / "run", replace(CONFIG, tie_embeddings=tied))
    assert convert("export", run, tmp_path / "hf", "--dtype", "float32") == 0
    files = sorted(tmp_path.glob("hf/*.safetensors"))
    assert (len(files) > 1) == (shard_bytes == 100_000)
    if len(files) > 1:
        index = json.loads((tmp_path / "hf/model.safetensors.index.json").read_text())
        assert {tmp_path / "hf" / name for name in index["weight_map"].values()} == set(files)
        sizes = [tensor.nbytes for file in files for tensor in load_file(file).values()]
        assert index["metadata"]["total_size"] == sum(sizes)
    assert all(file.stat().st_mode & 0o777 == 0o644 for file in tmp_path.glob("hf/*"))
    assert convert("import", tmp_path / "hf", tmp_path / "back", "--step", 3) == 0
    before, step = checkpoint.load_weights(run)
    after, step_after = checkpoint.load_weights(tmp_path / "back")
    assert step == step_after == 3
    assert after["model"].keys() == before["model"].keys()
    for name, tensor in after["model"].items():
        assert torch.equal(tensor, before["model"][name][:len(tensor)])
    expected = {**before["config"], "padded_vocab_size": 1000}
    assert after["config"] == expected
    before["model"]["model.norm.weight"][0] += 1e-6  # control
    assert not torch.equal(after["model"]["model.norm.weight"],
                           before["model"]["model.norm.weight"])


VARIANTS = {
    "flat theta": lambda f: edit(f / "config.json", rope_parameters=None),
    "new theta": lambda f: edit(f / "config.json", rope_theta=None),
    "no head_dim": lambda f: edit(f / "config.json", head_dim=None),
    "empty scaling": lambda f: edit(f / "config.json", rope_scaling={"rope_type": "default"}),
    "vocab.json": lambda f: (f / "tokenizer.json").unlink(),
    "no type": lambda f: without_type(f / "tokenizer.json"),
    "merges as text": lambda f: merges_as_text(f / "tokenizer.json"),
    "old frequencies": lambda f: edit_weights(f, lambda t: t.update(
        {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)})),
}


def without_type(file):
    """As in GPT-2's own file."""
    value = json.loads(file.read_text())
    del value["model"]["type"]
    file.write_text(json.dumps(value))


def merges_as_text(file):
    value = json.loads(file.read_text())
    value["model"]["merges"] = [" ".join(merge) for merge in value["model"]["merges"]]
    file.write_text(json.dumps(value))


@pytest.mark.parametrize("name", VARIANTS)
def test_other_forms_of_the_same_are_imported(exported, folder, tmp_path, name):
    """Catches: a folder of an older or newer transformers that is refused, or read wrongly."""
    VARIANTS[name](folder)
    assert convert("import", folder, tmp_path / "back") == 0
    tokens = tokens_of(CONFIG)
    assert torch.equal(our_logits(tmp_path / "back", tokens)[0],
                       our_logits(exported[0], tokens)[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_shorter_weights_are_imported(folder, tmp_path, dtype):
    """Catches: weights that stay short, so that training would go on in bf16."""
    stored = load_file(folder / "model.safetensors")
    edit_weights(folder, lambda t: t.update({name: x.to(dtype) for name, x in t.items()}))
    assert convert("import", folder, tmp_path / "back") == 0
    weights, _ = checkpoint.load_weights(tmp_path / "back")
    for name, tensor in weights["model"].items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, stored[name].to(dtype).float())


def test_no_kv_heads_means_as_many_as_heads(tmp_path):
    """Catches: the default of another model for what config.json does not say."""
    run = make_run(tmp_path / "run", replace(CONFIG, n_kv_heads=4))
    assert convert("export", run, tmp_path / "hf", "--dtype", "float32") == 0
    edit(tmp_path / "hf/config.json", num_key_value_heads=None, rope_theta=None,
         rope_parameters=None, rms_norm_eps=None, max_position_embeddings=None,
         tie_word_embeddings=None)
    assert convert("import", tmp_path / "hf", tmp_path / "back") == 0
    model, _, _ = checkpoint.load_model(tmp_path / "back")
    config = model.config
    assert (config.n_kv_heads, config.rope_theta, config.norm_eps) == (4, 10_000.0, 1e-6)
    assert config.max_seq_len == 2048
    tokens = tokens_of(CONFIG)
    with torch.no_grad():
        logits, _ = model(tokens)
    answer = parity.ask(str(tmp_path / "hf"), {"tokens": tokens.tolist(), "texts": [],
                                               "chats": []})
    assert distance(answer, logits) <= 1e-5 * logits.abs().max()


def test_released_form_is_imported_and_corrected(tmp_path, capsys):
    """Catches: a chat that never ends, because the released checkpoints name "#" as the end."""
    config = replace(CONFIG, vocab_size=50_257, padded_vocab_size=None)
    run = make_run(tmp_path / "run", config, system=None)
    assert convert("export", run, tmp_path / "hf", "--dtype", "float32") == 0
    for name in ("config.json", "generation_config.json"):
        edit(tmp_path / "hf" / name, bos_token_id=1, eos_token_id=2, rope_parameters=None)
    capsys.readouterr()
    assert convert("import", tmp_path / "hf", tmp_path / "back", "--step", 2700) == 0
    printed = capsys.readouterr().out
    assert "eos_token_id is 2 in config.json; here it is 50256" in printed
    assert "eos_token_id is 2 in generation_config.json" in printed
    _, tokenizer, step = checkpoint.load_model(tmp_path / "back")
    assert (tokenizer.eot, step) == (50_256, 2700)
    # Without its tokenizer it is taken as GPT-2's, and that is said.
    for file in ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json"):
        (tmp_path / "hf" / file).unlink()
    assert convert("import", tmp_path / "hf", tmp_path / "back", "--step", 3300) == 0
    assert "its ids are taken as GPT-2's" in capsys.readouterr().out
    assert list(durable.checkpoints(tmp_path / "back")) == [2700, 3300]


def test_padding_stays(folder, tmp_path):
    """Catches: rows beyond the tokenizer's that are lost, or sampled."""
    edit(folder / "config.json", vocab_size=1024)
    edit_weights(folder, lambda t: t.update({
        name: torch.cat([t[name], torch.ones(24, 64)])
        for name in ("lm_head.weight", "model.embed_tokens.weight")}))
    assert convert("import", folder, tmp_path / "back") == 0
    model, tokenizer, _ = checkpoint.load_model(tmp_path / "back")
    assert model.config.padded_vocab_size == 1024
    assert model.config.vocab_size == tokenizer.vocab_size == 1000


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


def other_merges(f):
    value = json.loads((f / "tokenizer.json").read_text())
    value["model"]["merges"].reverse()
    (f / "tokenizer.json").write_text(json.dumps(value))


def index(name):
    def change(f):
        (f / "model.safetensors.index.json").write_text(json.dumps(
            {"weight_map": {"lm_head.weight": name}}))
    return change


def only_pickle(f):
    (f / "model.safetensors").rename(f / "pytorch_model.bin")


def cut(name):
    return lambda f: os.truncate(f / name, (f / name).stat().st_size // 2)


def more_tokens(f):
    token = {"id": 1000, "content": "<pad>", "special": True}
    added = json.loads((f / "tokenizer.json").read_text())["added_tokens"]
    edit(f / "tokenizer.json", added_tokens=[*added, token])
    edit(f / "config.json", vocab_size=1001)


REFUSED = {
    "another architecture": (config(model_type="mistral"), "model_type is 'mistral'"),
    "biases": (config(attention_bias=True), "attention_bias is True"),
    "mlp biases": (config(mlp_bias=True), "mlp_bias is True"),
    "activation": (config(hidden_act="gelu"), "hidden_act is 'gelu'"),
    "quantized": (config(quantization_config={"bits": 4}), "quantization_config is"),
    "scaled rope": (config(rope_scaling={"rope_type": "linear", "factor": 2.0}), "rope_scaling is"),
    "yarn": (config(rope_parameters={"rope_type": "yarn", "rope_theta": 1e4}),
             "rope_parameters is"),
    "half a head rotated": (config(partial_rotary_factor=0.5), "partial_rotary_factor is 0.5"),
    "two thetas": (config(rope_theta=10_000.0), "two values of rope_theta"),
    "head_dim": (config(head_dim=32), "head_dim is 32"),
    "no layers": (config(num_hidden_layers=None), "num_hidden_layers is missing"),
    "a text as a size": (config(hidden_size="64"), "dim '64' is not of type int"),
    "absurd size": (config(num_hidden_layers=10**9), "n_layers 1000000000 is too large"),
    "one head too many": (config(num_attention_heads=5), "not divisible by n_heads 5"),
    "another size": (config(intermediate_size=100), "has the shape (64, 96)"),
    "more layers": (config(num_hidden_layers=3), "9 tensors are missing (model.layers.2.input"),
    "a missing tensor": (drop("model.norm.weight"), "1 tensors are missing (model.norm.weight)"),
    "a bias": (put("model.layers.0.self_attn.q_proj.bias", torch.ones(64)),
               "not those of a plain Llama (model.layers.0.self_attn.q_proj.bias)"),
    "another shape": (put("model.norm.weight", torch.ones(65)), "has the shape (65,)"),
    "fp64": (put("model.norm.weight", torch.ones(64).double()), "is stored as F64"),
    "NaN": (put("model.norm.weight", torch.full((64,), float("nan"))), "holds NaN or infinity"),
    "an absolute name": (index("/etc/passwd"), "'/etc/passwd', which is not one in this folder"),
    "a name above": (index("../x.safetensors"), "'../x.safetensors', which is not one"),
    "an absent file": (index("other.safetensors"), "other.safetensors: not a whole"),
    "no dict": (lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": []}'),
                "names the file None"),
    "a pickle": (only_pickle, "pytorch_model.bin can run code"),
    "half a file": (cut("model.safetensors"), "model.safetensors: not a whole safetensors file"),
    "half a config": (cut("config.json"), "config.json: cannot be read"),
    "half a tokenizer": (cut("tokenizer.json"), "tokenizer.json: cannot be read"),
    "no config": (lambda f: (f / "config.json").unlink(), "no config.json in it"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "no weights in it"),
    "sentencepiece": (lambda f: [(f / n).unlink() for n in ("tokenizer.json", "vocab.json")],
                      "merges.txt: not the files of GPT-2's tokenizer"),
    "a prefix space": (tokenizer_json(pre_tokenizer={"type": "ByteLevel",
                                                     "add_prefix_space": True}),
                       "its pre_tokenizer is not GPT-2's"),
    "a normalizer": (tokenizer_json(normalizer={"type": "NFC"}), "it has a normalizer"),
    "another kind": (tokenizer_json(model={"type": "Unigram", "vocab": []}), "the type 'Unigram'"),
    "other merges": (other_merges, "its merges are others"),
    "one more token": (more_tokens, "'<pad>' has id 1000, in GPT-2's none"),
    "a run of ours": (config(model_type=None), "model_type is None, not 'llama'"),
    "two kinds of names": (lambda f: (f / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": 1, "b": "c", "d": []}})), "names the file 1"),
    "a huge epsilon": (config(rms_norm_eps=10**400), "is too large"),
    "a truth as a number": (config(rms_norm_eps=True), "is not of type float"),
    "few rows": (config(vocab_size=999), "vocab_size 999 in config.json is less than"),
    "no tokenizer": (lambda f: [(f / n).unlink() for n in ("tokenizer.json", "vocab.json",
                                                           "merges.txt")],
                     "1,000 rows are not those of GPT-2's"),
}


@pytest.mark.row(40)
@pytest.mark.parametrize("name", REFUSED)
def test_what_we_cannot_be_is_refused(folder, tmp_path, capsys, name):
    """Catches: a model that is imported, and says nonsense; a traceback; half a run."""
    change, expected = REFUSED[name]
    change(folder)
    assert convert("import", folder, tmp_path / "back") == 2
    lines = [line for line in messages(capsys) if "convert_hf.py: " in line]
    assert len(lines) == 1 and expected in lines[0]
    assert not (tmp_path / "back").exists()


def test_untouched_folder_is_imported(folder, tmp_path):
    """The control of all refusals."""
    assert convert("import", folder, tmp_path / "back") == 0


def test_tied_head_must_be_the_embedding(tmp_path, capsys):
    """Catches: a head of its own that is silently dropped."""
    run = make_run(tmp_path / "run", replace(CONFIG, tie_embeddings=True))
    assert convert("export", run, tmp_path / "hf", "--dtype", "float32") == 0
    embedding = load_file(tmp_path / "hf/model.safetensors")["model.embed_tokens.weight"]
    edit_weights(tmp_path / "hf", lambda t: t.update({"lm_head.weight": embedding.clone()}))
    assert convert("import", tmp_path / "hf", tmp_path / "same") == 0  # control
    edit_weights(tmp_path / "hf", lambda t: t.update({"lm_head.weight": embedding + 1}))
    assert convert("import", tmp_path / "hf", tmp_path / "other") == 2
    assert "lm_head.weight differs" in messages(capsys)[-1]


def test_nothing_is_overwritten(exported, folder, tmp_path, capsys):
    """Catches: an export into a folder of the user's, an import into a run that was trained."""
    run, _ = exported
    assert convert("export", run, folder) == 2
    assert "exists — choose another folder" in messages(capsys)[-1]
    shutil.copytree(run, tmp_path / "trained")
    assert convert("import", folder, tmp_path / "trained") == 2
    assert "already holds something else" in messages(capsys)[-1]
    assert convert("import", folder, tmp_path / "back", "--step", 1) == 0
    assert convert("import", folder, tmp_path / "back", "--step", 2) == 0  # control
    assert convert("import", folder, tmp_path / "back", "--step", 2) == 2
    assert "already has step 2" in messages(capsys)[-1]
    edit(folder / "config.json", max_position_embeddings=24)
    assert convert("import", folder, tmp_path / "back", "--step", 4) == 2
    assert "of other sizes" in messages(capsys)[-1]


def test_network_that_is_no_llama_is_refused(tmp_path, capsys, monkeypatch):
    """Catches: a folder that says "Llama" and computes what an edited model.py does not."""
    run = make_run(tmp_path / "run")

    class SwiGLU(model.SwiGLU):
        pass

    monkeypatch.setattr(model, "SwiGLU", SwiGLU)
    monkeypatch.setattr(model, "apply_rope", lambda x, cos, sin: x)
    assert call(convert_hf.main, "export", run, tmp_path / "hf") == 2
    message, = messages(capsys)
    assert "apply_rope in model.py has another text, SwiGLU in model.py has another" in message
    assert not (tmp_path / "hf").exists()
    assert call(convert_hf.main, "export", run, tmp_path / "hf", "--anyway") == 0
    assert "note: exported as a Llama all the same: apply_rope" in capsys.readouterr().out
    monkeypatch.undo()
    assert call(convert_hf.main, "export", run, tmp_path / "again") == 0  # control


@pytest.mark.parametrize("change", ["more", "less", "other"])
def test_tensors_of_no_llama_are_refused(change, tmp_path, capsys):
    """Catches: weights that the format does not know, left out without a word."""
    run = make_run(tmp_path / "run")
    weights, _ = checkpoint.load_weights(run)
    name = "model.layers.1.mlp.up_proj.weight"
    if change == "more":
        name = "model.layers.1.self_attn.q_norm.weight"
        weights["model"][name] = torch.ones(16)
    if change == "less":
        del weights["model"][name]
    if change == "other":
        weights["model"][name] = torch.ones(96, 65)
    durable.write_checkpoint(run, 4, {"model.pt": weights})
    assert call(convert_hf.main, "export", run, tmp_path / "hf") == 2
    assert name in messages(capsys)[0]
    assert call(convert_hf.main, "export", run, tmp_path / "hf", "--anyway") == (
        0 if change == "more" else 2)
    assert call(convert_hf.main, "export", run, tmp_path / "hf2", "--step", 3) == 0  # control


@pytest.mark.row(38)
def test_export_of_a_damaged_run_is_refused(exported, tmp_path, capsys):
    """Catches: half a folder of a damaged checkpoint."""
    shutil.copytree(exported[0], tmp_path / "run")
    cut("model.pt")(tmp_path / "run/checkpoints/step_00000003")
    assert convert("export", tmp_path / "run", tmp_path / "hf") == 2
    assert "no usable checkpoint" in messages(capsys)[-1]
    assert convert("export", tmp_path / "absent", tmp_path / "hf") == 2
    assert "no such run" in messages(capsys)[-1]
    assert convert("export", tmp_path / "run", tmp_path / "hf", "--step", 9) == 2
    assert "no checkpoint of step 9" in messages(capsys)[-1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


@pytest.mark.parametrize("main", [sample.main, evaluate.main, sft.main])
def test_a_hugging_face_folder_is_not_a_run_mistake(folder, tmp_path, capsys, main):
    """Catches: "no such run" for a folder that is there; the way to use it is not told."""
    argv = [folder] if main is not sft.main else [folder, "--run", tmp_path / "tuned"]
    assert exit_code(main, argv) == 2
    assert "python convert_hf.py import" in messages(capsys)[-1]


# -------------------------------------------------------------------------------------------------
# LoRA

ONLY_LORA = pytest.mark.parametrize("method", [["--lora", 4]], indirect=True, ids=["lora"])


@ONLY_LORA
def test_adapters_are_merged_or_kept(tuned, whole, tmp_path, capsys):
    """Catches: an export without what LoRA has learned; adapters with another scale, or transposed:
    the base plus (alpha / r) B A, from the folder of adapters, is the merged export."""
    assert convert("export", whole, tmp_path / "lora", "--adapters") == 2
    assert "holds whole weights, no adapters" in messages(capsys)[-1]
    for run, name in ((tuned, "merged"), (whole, "base")):
        assert convert("export", run, tmp_path / name, "--dtype", "float32") == 0
    assert convert("export", tuned, tmp_path / "lora", "--adapters") == 0
    merged = load_file(tmp_path / "merged/model.safetensors")
    base = load_file(tmp_path / "base/model.safetensors")
    adapters = load_file(tmp_path / "lora/adapter_model.safetensors")
    settings = json.loads((tmp_path / "lora/adapter_config.json").read_text())
    changed = 0
    for name, weight in base.items():
        prefix = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{prefix}.lora_A.weight" not in adapters:
            assert torch.equal(weight, merged[name])
            continue
        A = adapters[f"{prefix}.lora_A.weight"]
        B = adapters[f"{prefix}.lora_B.weight"]
        assert A.shape[0] == settings["r"]
        expected = weight + settings["lora_alpha"] / settings["r"] * (B @ A)
        assert torch.allclose(expected, merged[name], atol=1e-6)
        assert not torch.allclose(weight, merged[name], atol=1e-6)  # control
        changed += 1
    assert changed == len(adapters) // 2 == 14
    assert len(settings["target_modules"]) == 7


@ONLY_LORA
def test_peft_gives_our_logits(tuned, whole, tmp_path):
    """Catches: adapters that peft does not find, or applies in another way."""
    peft = pytest.importorskip("peft", reason="peft is not installed: pip install peft")
    import transformers
    assert convert("export", whole, tmp_path / "base", "--dtype", "float32") == 0
    assert convert("export", tuned, tmp_path / "lora", "--adapters") == 0
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    tokens = tokens_of(ModelConfig(vocab_size=300, max_seq_len=64))
    with torch.no_grad():
        without = base(tokens).logits
        model = peft.PeftModel.from_pretrained(base, tmp_path / "lora")
        theirs = model(tokens).logits
    ours, _ = our_logits(tuned, tokens)
    assert (theirs - ours).abs().max() <= 1e-5 * ours.abs().max()
    assert (without - ours).abs().max() > 1e-3 * ours.abs().max()  # control


# -------------------------------------------------------------------------------------------------
# An imported run is a run

def test_imported_run_is_scored_sampled_tuned_and_drawn(whole, data, instructions, tmp_path,
                                                        monkeypatch, capsys):
    """Catches: an imported run that one of the other scripts does not accept."""
    assert convert("export", whole, tmp_path / "hf", "--dtype", "float32") == 0
    for step in (10, 20):
        assert convert("import", tmp_path / "hf", tmp_path / "back", "--step", step) == 0
    back = tmp_path / "back"
    assert call(evaluate.main, back) == 2
    assert "was imported, so it has no data of its own" in messages(capsys)[-1]
    for step in (10, 20):
        assert call(evaluate.main, back, "--step", step, "--data", data,
                    "--eval_tokens", 256, "--seq_len", 16) == 0
    original = Path(shutil.copytree(whole, tmp_path / "original"))
    assert call(evaluate.main, original, "--eval_tokens", 256) == 0
    events = [json.loads(line) for run in (back, original)
              for line in (run / "evaluations.jsonl").read_text().splitlines()]
    losses = [event["val_loss"] for event in events if event["event"] == "eval"]
    assert losses[0] == losses[1]
    assert losses[0] == pytest.approx(losses[2], abs=0.3)  # 84 rows of padding less
    assert call(sample.main, back, "--prompt", "a", "--max_new_tokens", 4) == 0
    assert call(sft.main, back, "--run", tmp_path / "tuned", "--max_steps", 2) == 2
    assert "give --instructions" in messages(capsys)[-1]
    edit(tmp_path / "hf/config.json", max_position_embeddings=64)  # as long as the rows
    assert convert("import", tmp_path / "hf", tmp_path / "long") == 0
    assert tune(tmp_path / "long", instructions, tmp_path / "tuned", "--max_steps", 2) == 0
    monkeypatch.undo()  # the drawing, which the fixtures leave out
    assert call(plot_dynamics.main, back, "--out", tmp_path / "figures") == 0
    run = plot_dynamics.read_run(back)
    assert [row["step"] for row in run.rows["eval"]] == [10, 20]
    assert (tmp_path / "figures/dynamics.png").stat().st_size > 10_000


def test_card_tells_how_it_was_made(whole, tmp_path):
    """Catches: a model card with numbers of another step."""
    assert convert("export", whole, tmp_path / "hf", "--step", 8) == 0
    card = (tmp_path / "hf/README.md").read_text()
    rows = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    losses = {row["step"]: row["val_loss"] for row in rows if row["event"] == "eval"}
    assert f"| loss on held-out text, nats/token | {losses[8]:.4f} |" in card
    assert "| steps | 8 |" in card
    assert re.search(r"\| lr \| 0.01 \|", card)
    assert f"{losses[20]:.4f}" not in card  # control
    copied = Path(shutil.copytree(whole, tmp_path / "copied"))
    lines = (whole / "metrics.jsonl").read_text().splitlines(keepends=True)
    others = [line for line in lines if '"eval", "step": 16' not in line]
    assert len(others) == len(lines) - 1
    (copied / "metrics.jsonl").write_text("".join(others))
    assert convert("export", copied, tmp_path / "unscored", "--step", 16) == 0
    assert "loss on held-out" not in (tmp_path / "unscored/README.md").read_text()
    assert convert("import", tmp_path / "hf", tmp_path / "back") == 0
    assert convert("export", tmp_path / "back", tmp_path / "again") == 0
    card = (tmp_path / "again/README.md").read_text()
    assert "were imported by vesper from hf:" in card and "license" not in card


QUESTIONS = [
    ("Baking cookies", "Put it in [step] the oven. [substeps]", "and WAIT", "3"),
    ("Moving [header] a cat", "Choose a room. [title] Open the door.", "then [step]", "0"),
    ("Walking", "A man  walks,  and  runs.", "he Stops  [substeps] ", "1"),
    ("Talking", "Nothing", "", "2"),
]


def write_questions(file):
    endings = ["goes on [step] and on.", "  [title] ends here.", "is a  test of it.", "x [y] z"]
    rows = [{"activity_label": label, "ctx_a": a, "ctx_b": b, "ctx": f"{a} {b}",
             "endings": endings, "label": right} for label, a, b, right in QUESTIONS]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_lm_eval_gives_our_likelihoods(tmp_path, monkeypatch):
    """Catches: a score in the style of the leaderboards that is not the one of the leaderboards:
    another context, another ending, another space between them, padded ids."""
    python = os.environ.get("LM_EVAL_PYTHON")
    if python is None:
        pytest.importorskip("lm_eval", reason="lm_eval is not installed: pip install lm_eval[hf], "
                                              "or set LM_EVAL_PYTHON")
        python = sys.executable
    config = replace(CONFIG, max_seq_len=128)
    run = make_run(tmp_path / "run", config, system=None)
    assert convert("export", run, tmp_path / "hf", "--dtype", "float32") == 0
    write_questions(tmp_path / "questions.jsonl")
    script = Path(parity.__file__).with_name("lm_eval_scores.py")
    results = tmp_path / "run/lm_eval/step_3"
    subprocess.run([python, script, tmp_path / "hf", tmp_path / "questions.jsonl", results,
                    tmp_path / "answer"], check=True, cwd=tmp_path)
    theirs = json.loads((tmp_path / "answer").read_text())

    model, tokenizer, _ = checkpoint.load_model(run)
    autocast = torch.autocast("cpu", enabled=False)
    benchmark = evaluate.Benchmark(tmp_path / "questions.jsonl", tokenizer, 128, "harness")
    ours = benchmark.likelihoods(model, benchmark.contexts, autocast)
    expected = torch.tensor(theirs["likelihoods"], dtype=torch.float64)
    print(f"lm_eval: largest difference {(ours - expected).abs().max():.1e}, "
          f"values down to {expected.min():.0f}")
    assert (ours - expected).abs().max() < 1e-5 * expected.abs().max()
    scores = benchmark.score(model, autocast)
    assert (scores["acc"], scores["acc_norm"]) == (theirs["acc"], theirs["acc_norm"])
    # Controls: the space of a removed remark left with the context; the words of the other style.
    monkeypatch.setattr(evaluate, "put_question", lambda item, style: (
        evaluate.without_brackets(f"{item['activity_label']}: {item['ctx_a']} "
                                  f"{item['ctx_b'].capitalize()}"), " ",
        [evaluate.without_brackets(text) for text in item["endings"]]))
    other = evaluate.Benchmark(tmp_path / "questions.jsonl", tokenizer, 128, "harness")
    found = other.likelihoods(model, other.contexts, autocast)
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
    config = replace(CONFIG, vocab_size=50_257, padded_vocab_size=None)
    for seed, name in enumerate(("2.7k", "43.5k")):
        run = make_run(tmp_path / f"run{seed}", config, system=None, seed=seed)
        folder = copied / f"folders/step-{name}"
        assert convert("export", run, folder, "--dtype", "float32") == 0
        for file in ("config.json", "generation_config.json"):
            edit(folder / file, bos_token_id=1, eos_token_id=2, rope_parameters=None)
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": f"Text {i} is here."}) + "\n" for i in range(999)))
    questions = tmp_path / "questions.jsonl"
    write_questions(questions)
    for argv in (["fineweb-edu", "--from", texts, "--out", copied / "data/fineweb-edu-10M"],
                 ["hellaswag", "--from", questions, "--out", copied / "data/hellaswag"]):
        assert call(prepare_data.main, *argv) == 0
    env = {**os.environ, "PYTHON": sys.executable, "RELEASED": "folders/step-"}
    command = ["bash", "reproduce.sh", "released", "2.7k", "43.5k"]
    done = subprocess.run(command, cwd=copied, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in
            (copied / "runs/released/evaluations.jsonl").read_text().splitlines()]
    found = [(row["event"], row["step"]) for row in rows]
    kinds = ("eval", "benchmark", "sample", "sample")
    assert found == [(kind, step) for step in (2700, 43_500) for kind in kinds]
    losses = [row["val_loss"] for row in rows if row["event"] == "eval"]
    assert losses[0] != losses[1]
    assert (copied / "figures/released/dynamics.png").stat().st_size > 10_000
    assert not list((copied / "runs/released").glob("checkpoints/*"))
    assert (copied / "folders/step-2.7k/model.safetensors").exists()  # those of others stay
    done = subprocess.run(command, cwd=copied, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and "== step" not in done.stdout  # nothing is scored twice


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_export_makes_no_second_copy(tmp_path):
    """Catches: an export that needs twice the weights in memory: the large ones do not fit then."""
    config = ModelConfig(dim=1024, n_layers=16, n_heads=16, n_kv_heads=4, intermediate_size=2816,
                         vocab_size=50_257, max_seq_len=64)
    run = make_run(tmp_path / "run", config)
    size = (run / "checkpoints/step_00000003/model.pt").stat().st_size
    script = ("import re, sys; sys.path.insert(0, {root!r}); import convert_hf\n"
              "def kilobytes(): return int(re.search(r'VmHWM:\\s+(\\d+)', "
              "open('/proc/self/status').read()).group(1))\n"
              "before = kilobytes()\n"
              "convert_hf.main(['export', {run!r}, {out!r}, '--dtype', {dtype!r}])\n"
              "print('peak', kilobytes() - before)\n")
    for dtype in ("bfloat16", "float32"):
        code = script.format(root=str(ROOT), run=str(run),
                             out=str(tmp_path / dtype), dtype=dtype)
        out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                             check=True).stdout
        peak = 1024 * int(re.search(r"peak (\d+)", out).group(1))
        print(f"{dtype}: {size / 1e9:.2f} GB of weights, peak {peak / 1e9:.2f} GB")
        assert 0.9 * size < peak < 1.3 * size
