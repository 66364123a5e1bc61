"""convert_hf.py — a run as a Hugging Face folder, and a Hugging Face folder as a run.

    python convert_hf.py export runs/tiny hf/tiny      # for transformers, lm-eval, llama.cpp
    python convert_hf.py export runs/tiny-lora8 hf/lora --adapters     # adapters alone, for peft
    python convert_hf.py import hf/tiny runs/again     # for evaluate.py, sample.py, sft.py

Our modules have Hugging Face's names, and their rows Hugging Face's order (see apply_rope and
attention in model.py). So a tensor is copied as it is, and a folder is a stock LlamaForCausalLM,
which loads without any code of ours. Needs safetensors (requirements-extras.txt).
"""
import json
import os
import re
import sys
from dataclasses import asdict, replace
from pathlib import Path

from support import cpu  # before torch, which reads its settings once
import torch

import checkpoint
import model
from data import GPT2_VOCAB_SIZE, DataFolder, Tokenizer
from huggingface import tokenizer as hf_tokenizer
from huggingface.model_card import ADAPTERS, model_card
from huggingface.tokenizer import read_json
from model import Llama, ModelConfig
from support import durable, fast, lora
from support.chat import jinja_template, system_of
from support.files import new_folder, write_json
from support.flags import Parser, number
from support.progress import tqdm
from support.runs import (AT_END, UserError, first_line_of, hold, is_argument, parse_json,
                          quoted, script, settings_of, trained_window, warn)

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
SHARD_BYTES = 5_000_000_000  # of one file of weights


def import_safetensors():
    try:
        import safetensors.torch
    except ImportError:
        raise UserError("safetensors is missing, which reads and writes weights — run: pip install "
                        "-r requirements-extras.txt") from None
    return safetensors


# -------------------------------------------------------------------------------------------------
# config.json: ours and theirs

NAMES = {  # our name of a size: Hugging Face's
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "intermediate_size": "intermediate_size",
    "max_seq_len": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
    "rope_theta": "rope_theta",
    "tie_embeddings": "tie_word_embeddings",
}


def to_hf_config(config, dtype):
    """config.json of a ModelConfig, as a dict."""
    theirs = {"architectures": ["LlamaForCausalLM"], "model_type": "llama",
              "vocab_size": config.vocab_size}
    for ours, name in NAMES.items():
        theirs[name] = getattr(config, ours)
    eot = config.vocab_size - 1
    return {
        **theirs,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        # transformers 5 reads this, older versions and others the plain rope_theta above. Who finds
        # neither takes 10,000, without a word.
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        # The defaults, 1 and 2, are '"' and '#' in GPT-2's table. There is no pad_token_id: the
        # embedding of that token would not be trained any more, and here it is end-of-text.
        "bos_token_id": eot,
        "eos_token_id": eot,
        "use_cache": True,
        "torch_dtype": dtype,
        "dtype": dtype,
    }


REQUIRED = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "vocab_size")
# What Hugging Face assumes where config.json is silent.
DEFAULTS = {"max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "rope_theta": 10_000.0,
            "tie_word_embeddings": False}
# What our network does. A field may be absent; another value is refused. None: there must be none.
EXPECTED = {"hidden_act": "silu", "attention_bias": False,
            "mlp_bias": False, "quantization_config": None, "sliding_window": None}


def from_hf_config(theirs, file):
    """The sizes of a ModelConfig, without the vocabulary, from a config.json. Raises UserError
    naming what our network cannot be."""
    if theirs.get("model_type") != "llama":
        raise UserError(f"{file}: model_type is {theirs.get('model_type')!r}, not 'llama' — give "
                        f"the Hugging Face folder of a Llama")
    for name, value in EXPECTED.items():
        found = theirs.get(name, value)
        if found is not None and found != value:
            raise UserError(f"{file}: {name} is {found!r}, and our network has "
                            f"{'none' if value is None else repr(value)} — import a plain Llama")
    missing = [name for name in REQUIRED if theirs.get(name) is None]
    if missing:
        raise UserError(f"{file}: {missing[0]} is missing — download it again")
    known = {**DEFAULTS, "num_key_value_heads": theirs["num_attention_heads"]}
    known.update({name: value for name, value in theirs.items() if value is not None})
    known["rope_theta"] = rope_theta_of(theirs, file)
    sizes = {ours: known[name] for ours, name in NAMES.items()}
    sizes["padded_vocab_size"] = theirs["vocab_size"]
    sizes["vocab_size"] = theirs["vocab_size"]
    config = checked_config(sizes, file)
    head_dim = theirs.get("head_dim") or config.head_dim
    if head_dim != config.head_dim:
        raise UserError(f"{file}: head_dim is {head_dim}, and ours is hidden_size / "
                        f"num_attention_heads = {config.head_dim} — import a plain Llama")
    return config


def rope_theta_of(theirs, file):
    """The base of the rotary frequencies, in the form of transformers 4, 5, or both. Raises
    UserError for any other kind of positions than ours."""
    found = []
    for name in ("rope_parameters", "rope_scaling"):
        rope = theirs.get(name)
        if rope is None:
            continue
        if not isinstance(rope, dict):
            raise UserError(f"{file}: {name} is {rope!r} — download it again")
        kind = rope.get("rope_type", rope.get("type", "default"))
        others = rope.keys() - {"rope_type", "type", "rope_theta"}
        if kind != "default" or others:
            raise UserError(f"{file}: {name} is {json.dumps(rope)}, and our positions are plain "
                            f"rotary ones — import a plain Llama")
        found.append(rope.get("rope_theta"))
    found.append(theirs.get("rope_theta"))
    found = [theta for theta in found if theta is not None]
    if theirs.get("partial_rotary_factor", 1.0) not in (None, 1, 1.0):
        raise UserError(f"{file}: partial_rotary_factor is {theirs['partial_rotary_factor']}, and "
                        f"we rotate all of a head — import a plain Llama")
    if found and not all(theta == found[0] for theta in found):
        raise UserError(f"{file}: two values of rope_theta, {found[0]} and {found[-1]} — correct "
                        f"the wrong one")
    return found[0] if found else DEFAULTS["rope_theta"]


LARGEST = {"n_layers": 10_000}  # an absurd number of layers would take for ever to make


def checked_config(sizes, file):
    for name, value in sizes.items():
        if isinstance(value, int) and value > LARGEST.get(name, 2**24):
            raise UserError(f"{file}: {name} {value!r:.40} is too large — import a plain Llama")
    try:
        return checkpoint.read_config(sizes)
    except UserError as why:
        raise UserError(f"{file}: {str(why).split(' — ')[0]} — import a plain Llama") from None


# -------------------------------------------------------------------------------------------------
# A folder says "Llama", and others compute what a Llama computes. So the network has to be one.

# The texts of model.py that compute what LlamaForCausalLM does, without comments and docstrings.
# (After a change that computes the same, the test that fails shows the new hash.)
LLAMA = {
    "RMSNorm": "466f64868f00", "rope_table": "2ce28319e80c",
    "apply_rope": "3211e61e0794", "causal_mask": "a50242de4f46",
    "attention": "d61d2846c435", "Attention": "f6bf70e11764",
    "SwiGLU": "77b98f32f3de", "Block": "251c31a89cee",
    "Decoder": "57e2ac7a961e", "Llama.logits": "8d83de847b0a",
    "Llama.forward": "16b142d99e2e",
}


def check_is_llama(tensors, config, anyway):
    """Raise UserError if tensors {name: tensor} are not those of a Llama, or if a part of model.py
    has another text, so that it may compute something else. anyway: say it only, and take out the
    tensors that a Llama does not have."""
    shapes = shapes_of(config)
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    missing = [name for name in shapes if found.get(name) != shapes[name]]
    if missing:
        raise UserError(f"not a Llama: its weights lack {', '.join(missing[:3])} of the shape that "
                        f"the config tells — there is no such folder for this network")
    unknown = [name for name in found if name not in shapes]
    edited = [name for name, text in LLAMA.items() if fast.hash_of(part_of_model(name)) != text]
    what = [f"{name} is not a tensor of one" for name in unknown[:3]]
    what += [f"{name} in model.py has another text" for name in edited]
    if what and not anyway:
        raise UserError(f"not a plain Llama: {', '.join(what)} — others would compute something "
                        f"else with these weights; if you know that they would not, give --anyway")
    if what:
        print(f"note: exported as a Llama all the same: {', '.join(what)}")
    for name in unknown:
        del tensors[name]


def part_of_model(name):
    """The function or class of model.py of this name; "Llama.logits" is one of a class."""
    found = model
    for part in name.split("."):
        found = getattr(found, part)
    return found


def shapes_of(config):
    """{name: shape} of the tensors of a LlamaForCausalLM."""
    dim = config.dim
    kv_dim = config.n_kv_heads * config.head_dim
    wide = config.intermediate_size
    in_layer = {
        "self_attn.q_proj": (dim, dim),
        "self_attn.k_proj": (kv_dim, dim),
        "self_attn.v_proj": (kv_dim, dim),
        "self_attn.o_proj": (dim, dim),
        "mlp.gate_proj": (wide, dim),
        "mlp.up_proj": (wide, dim),
        "mlp.down_proj": (dim, wide),
        "input_layernorm": (dim,),
        "post_attention_layernorm": (dim,),
    }
    shapes = {"model.embed_tokens.weight": (config.padded_vocab_size, dim)}
    for layer in range(config.n_layers):
        for part, shape in in_layer.items():
            shapes[f"model.layers.{layer}.{part}.weight"] = shape
    shapes["model.norm.weight"] = (dim,)
    shapes["lm_head.weight"] = (config.padded_vocab_size, dim)
    return shapes


# -------------------------------------------------------------------------------------------------
# Export

def export(run, out, step, dtype, anyway):
    """Write the newest checkpoint of `run`, or that of `step`, as a Hugging Face folder. Adapters
    are merged. At most one file's weights are in memory twice."""
    import_safetensors()
    settings = settings_of(run)
    with new_folder(out) as folder:
        weights, step = checkpoint.load_weights(run, step)
        config = checkpoint.read_config(weights["config"])
        window = trained_window(settings, config.max_seq_len)
        if window < config.max_seq_len:
            print(f"config.json names the windows of training, {window} tokens, not the "
                  f"{config.max_seq_len} that the network takes")
            config = replace(config, max_seq_len=window)
        tokenizer = Tokenizer(config.vocab_size)
        tensors = weights.pop("model")
        check_is_llama(tensors, config, anyway)
        padding = config.padded_vocab_size - config.vocab_size
        if padding > 0:
            print(f"{padding} rows of padding, which are no tokens, are left out")
        if config.tie_embeddings:
            del tensors["lm_head.weight"]  # it is the embedding
        n = write_weights(folder, tensors, config.vocab_size, DTYPES[dtype])
        write_json(folder / "config.json", to_hf_config(config, dtype))
        eot = tokenizer.eot
        write_json(folder / "generation_config.json",
                   {"bos_token_id": eot, "eos_token_id": eot, "pad_token_id": eot})
        template = None
        if settings.get("system") is not None:
            template = jinja_template(settings["system"])
        hf_tokenizer.write_tokenizer(folder, tokenizer, config.max_seq_len, template)
        card = model_card(run.resolve().name, step, n, config, dtype, settings,
                          origin_of(settings), source_of(settings), evaluation_at(run, step))
        (folder / "README.md").write_text(card, encoding="utf-8")
        readable_by_all(folder)
    print(f"{out}: step {step:,} of {run}, {n:,} parameters in {dtype}. Next:\n"
          f"  python -c \"from transformers import pipeline; "
          f"print(pipeline('text-generation', '{out}')('The function'))\"")


def write_weights(folder, tensors, vocab_size, dtype):
    """Write the tensors, in files of at most SHARD_BYTES, taking them out of the dict one by one;
    returns the number of parameters. The embedding and the output layer lose their padded rows."""
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if name in tensors:
            tensors[name] = tensors[name][:vocab_size]
    parameters = sum(tensor.numel() for tensor in tensors.values())
    groups = [[]]  # of each file, the names of its tensors
    size = 0
    for name, tensor in tensors.items():
        nbytes = tensor.numel() * dtype.itemsize
        if size + nbytes > SHARD_BYTES and groups[-1]:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += nbytes
    weight_map = {}  # name of a tensor: its file
    with tqdm(total=len(tensors), desc="converting", unit=" tensors") as bar:
        for i, names in enumerate(groups, 1):
            file = "model.safetensors"
            if len(groups) > 1:
                file = f"model-{i:05d}-of-{len(groups):05d}.safetensors"
            converted = {}
            for name in names:
                converted[name] = tensors.pop(name).to(dtype).contiguous()
                weight_map[name] = file
                bar.update()
            save(converted, folder / file)
    if len(groups) > 1:
        sizes = {"total_size": parameters * dtype.itemsize, "total_parameters": parameters}
        write_json(folder / "model.safetensors.index.json",
                   {"metadata": sizes, "weight_map": weight_map})
    return parameters


def save(tensors, file):
    """safetensors' save_file. Raises UserError if the disk does not take it."""
    safetensors = import_safetensors()
    try:
        safetensors.torch.save_file(tensors, file, metadata={"format": "pt"})
    except safetensors.SafetensorError as error:
        raise UserError(f"{file}: not written ({first_line_of(error)}) — make room on the "
                        f"disk") from None


def readable_by_all(folder):
    """safetensors writes files that only their owner can read."""
    for file in folder.iterdir():
        try:
            file.chmod(0o644)
        except OSError as error:
            warn(f"files in {folder} may be readable by their owner only ({error.strerror})")


def origin_of(settings):
    """The folder that the weights, or those that they were trained from, were imported from; None
    if they were made here."""
    for _ in range(100):  # folders that were trained over can name each other in a circle
        base = settings.get("base") or settings.get("init_from")
        if "imported_from" in settings or base is None:
            break
        try:
            settings = settings_of(base)
        except (UserError, TypeError):  # the base is gone
            break
    return settings.get("imported_from")


def source_of(settings):
    """The name of the training text's source, if the data is still there."""
    try:
        return str(DataFolder(settings["data"]).meta["source"]["name"])
    except (UserError, OSError, TypeError, KeyError):
        return "unknown"


def evaluation_at(run, step):
    """The evaluation in the log of `run` at `step`; {} without one."""
    found = {}
    try:
        lines = (run / "metrics.jsonl").read_bytes().splitlines()
    except OSError:
        return {}
    for line in lines:
        if b'"eval"' in line or b'"sft_eval"' in line:
            try:
                row = parse_json(line)
                if row["event"] in ("eval", "sft_eval") and row["step"] == step:
                    found = row
            except (ValueError, KeyError, TypeError):
                pass  # half a line
    return found


def export_adapters(run, out, step, anyway):
    """Write the adapters of a LoRA run as a folder for peft. Raises UserError for another run."""
    import_safetensors()
    settings = settings_of(run)
    folder = durable.find(run, step)
    if folder is None:
        raise UserError(f"{run}: no such run, or one without checkpoints — tune it first")
    adapters = durable.load_weights(folder / "model.pt")
    config = checkpoint.read_config(adapters["config"])
    if not lora.is_lora(adapters["model"]):
        raise UserError(f"{run} holds whole weights, no adapters — leave out --adapters")
    base = durable.load_weights(lora.base_file(run))
    check_is_llama(base["model"], config, anyway)
    ours = adapters["model"]
    layers = [name.removesuffix(".lora_A") for name in ours if name.endswith(".lora_A")]
    rank = ours[f"{layers[0]}.lora_A"].shape[0]  # the same for all of them, and so is the scale
    scale = ours[f"{layers[0]}.lora_scale"].item()
    tensors = {}
    for layer in layers:
        for part in ("lora_A", "lora_B"):
            tensors[f"base_model.model.{layer}.{part}.weight"] = ours[f"{layer}.{part}"]
    modules = sorted({layer.split(".")[-1] for layer in layers})
    if settings.get("base") is None or settings.get("system") is None:
        raise UserError(f"{run}/config.json does not tell the base and the system prompt — restore "
                        f"it")
    base = Path(settings["base"]).resolve().name
    with new_folder(out) as new:
        save(tensors, new / "adapter_model.safetensors")
        write_json(new / "adapter_config.json", {
            "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": scale * rank,
            "lora_dropout": 0.0, "bias": "none", "target_modules": modules,
            "base_model_name_or_path": base, "inference_mode": True})
        template = jinja_template(settings["system"])
        hf_tokenizer.write_tokenizer(new, Tokenizer(config.vocab_size), config.max_seq_len,
                                     template)
        card = ADAPTERS.format(name=run.resolve().name, base=base)
        (new / "README.md").write_text(card, encoding="utf-8")
        readable_by_all(new)
    step = f" --step {settings['step']}" if settings.get("step") is not None else ""
    print(f"{out}: adapters of step {durable.step_of(folder)} of {run}, for {base}. They need it "
          f"as a Hugging Face folder too:\n"
          f"  python convert_hf.py export {quoted(settings['base'])} DIR{step}")


# -------------------------------------------------------------------------------------------------
# Import

def import_folder(folder, run, step):
    """Make the weights of a Hugging Face folder the checkpoint `step` of `run`, a new run or an
    imported one of the same sizes. Raises UserError, and leaves no run, for what cannot be one."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder — download the model first")
    theirs = read_json(folder / "config.json") if (folder / "config.json").exists() else None
    if theirs is None:
        raise UserError(f"{folder}: no config.json in it — give a Hugging Face folder of a Llama")
    config = from_hf_config(theirs, folder / "config.json")
    config = with_vocabulary(config, folder)
    check_end_of_text(folder, theirs, config.vocab_size)
    settings = {"imported_from": str(folder), "data": None, "seq_len": config.max_seq_len,
                "preset": None, "model": asdict(config), "system": chat_system(folder)}
    check_target(run, step, settings)
    tensors = read_tensors(folder, config)
    run.mkdir(parents=True, exist_ok=True)
    held = hold(run)
    AT_END.append(lambda code: os.close(held))
    check_target(run, step, settings)  # another process may have been faster
    write_json(run / "config.json", settings)
    weights = {"config": asdict(config), "model": tensors}
    try:
        durable.write_checkpoint(run, step, {"model.pt": weights})
    except UserError as why:
        advice = "make room, and run the same command again"
        raise UserError(f"{str(why).split(' — ')[0]} — {advice}", why.code) from None
    shapes = {tensor.data_ptr(): tensor.numel() for tensor in tensors.values()}  # tied ones once
    print(f"{run}: step {step:,}, {sum(shapes.values()):,} parameters. Next:\n"
          f"  python sample.py {quoted(run)} --prompt \"The function\"\n"
          f"  python evaluate.py {quoted(run)} --data DIR   # in windows of {config.max_seq_len} "
          f"tokens, or --seq_len")


def with_vocabulary(config, folder):
    """The config with the size of the tokenizer's vocabulary, after a check that it is GPT-2's."""
    rows = config.padded_vocab_size
    found = hf_tokenizer.read_vocabulary(folder)
    if found is None:
        if not GPT2_VOCAB_SIZE <= rows < GPT2_VOCAB_SIZE + 1024:
            raise UserError(f"{folder}: it has no files of a tokenizer, and its {rows:,} rows are "
                            f"not those of GPT-2's {GPT2_VOCAB_SIZE:,} ids — add them")
        print(f"note: {folder} has no files of a tokenizer: its ids are taken as GPT-2's")
        vocab_size = GPT2_VOCAB_SIZE
    else:
        vocabulary, merges = found
        vocab_size = len(vocabulary)
        if not 257 <= vocab_size <= GPT2_VOCAB_SIZE:
            raise UserError(f"{folder}: its tokenizer has {vocab_size:,} tokens, GPT-2's "
                            f"{GPT2_VOCAB_SIZE:,} — import a model that uses GPT-2's")
        differs = hf_tokenizer.difference(vocabulary, merges, Tokenizer(vocab_size))
        if differs is not None:
            raise UserError(f"{folder}: its tokenizer is not GPT-2's ({differs}) — import a model "
                            f"that uses GPT-2's")
        if rows < vocab_size:
            raise UserError(f"{folder}: vocab_size {rows:,} in config.json is less than the "
                            f"{vocab_size:,} tokens of its tokenizer — download it again")
    return ModelConfig(**{**asdict(config), "vocab_size": vocab_size})


def check_end_of_text(folder, theirs, vocab_size):
    """Say it if the folder names another token as the end: ours is always the last."""
    named = [("config.json", theirs)]
    if (folder / "generation_config.json").exists():
        named.append(("generation_config.json", read_json(folder / "generation_config.json")))
    for file, settings in named:
        for name in ("bos_token_id", "eos_token_id"):
            found = settings.get(name, vocab_size - 1)
            if found != vocab_size - 1 and found is not None:
                print(f"note: {name} is {found} in {file}; here it is {vocab_size - 1}, "
                      f"<|endoftext|>")
    file = folder / "tokenizer_config.json"
    if file.exists() and read_json(file).get("add_bos_token"):
        print("note: its tokenizer puts a begin token before each text; sample.py and evaluate.py "
              "do not, so texts and scores differ")


def chat_system(folder):
    """The system prompt of the folder's chat template; None without one, or if it is not ours."""
    file = folder / "chat_template.jinja"
    template = None
    if file.exists():
        template = file.read_text(encoding="utf-8", errors="replace")
    elif (folder / "tokenizer_config.json").exists():
        template = read_json(folder / "tokenizer_config.json").get("chat_template")
    if template is None:
        return None
    system = system_of(template) if isinstance(template, str) else None
    if system is None:
        print(f"note: {folder} has a chat template, and not ours: sample.py --chat uses that of "
              f"Vicuna 1.1")
    return system


def check_target(run, step, settings):
    """Raise UserError unless `run` is new, or imported, of the same sizes, without this step."""
    if not run.exists() or all(path.name.startswith(".") for path in run.iterdir()):
        return
    try:
        known = settings_of(run)
        is_imported = "imported_from" in known
    except UserError:
        is_imported = False
    if not is_imported:
        raise UserError(f"{run} already holds something else — choose another folder for the run")
    if known.get("model") != settings["model"]:
        raise UserError(f"{run} holds an imported model of other sizes — choose another folder for "
                        f"the run")
    if step in durable.checkpoints(run):
        raise UserError(f"{run} already has step {step} — give another --step")


def read_tensors(folder, config):
    """{name: fp32 tensor} of the weights. Raises UserError if they are not those of the config."""
    where = files_of(folder)
    with torch.device("meta"):
        state = Llama(config).state_dict()
    expected = {name: tuple(tensor.shape) for name, tensor in state.items()}
    wanted = set(expected)
    if config.tie_embeddings and "lm_head.weight" not in where:
        wanted.remove("lm_head.weight")
    # Old folders hold the rotary frequencies too. They follow from the config.
    extra = [name for name in where if name not in expected
             and not re.fullmatch(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq", name)]
    missing = sorted(wanted - where.keys())
    if missing or extra:
        raise UserError(f"{folder}: {len(missing)} tensors are missing ({', '.join(missing[:3])}), "
                        f"{len(extra)} are not those of a plain Llama ({', '.join(extra[:3])}) — "
                        f"download it again, or import a plain Llama")
    tensors = {}
    for name in tqdm(sorted(wanted), desc="reading", unit=" tensors"):
        tensors[name] = read_tensor(folder, where[name], name, expected[name])
    if config.tie_embeddings:
        embedding = tensors["model.embed_tokens.weight"]
        if not torch.equal(tensors.get("lm_head.weight", embedding), embedding):
            raise UserError(f"{folder}: lm_head.weight differs from the embedding, although "
                            f"tie_word_embeddings is true — correct config.json")
        tensors["lm_head.weight"] = embedding
    return tensors


def files_of(folder):
    """{name of a tensor: open safetensors file that holds it}. Nothing outside the folder is read,
    and no pickle."""
    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.exists():
        weight_map = read_json(index).get("weight_map")
        named = list(weight_map.values()) if isinstance(weight_map, dict) else [None]
        for name in named:
            is_name = isinstance(name, str) and is_argument(name) and Path(name).name == name
            if not is_name or not name.endswith(".safetensors"):
                raise UserError(f"{index}: names the file {name!r}, which is not one in this "
                                f"folder — download it again")
        names = sorted(set(named))
    elif not (folder / names[0]).exists():
        pickles = [file.name for file in folder.glob("pytorch_model*.bin")]
        what = f"{pickles[0]} can run code, so it is not read" if pickles else "no weights in it"
        raise UserError(f"{folder}: {what} — give a folder with model.safetensors")
    safetensors = import_safetensors()
    where = {}
    for name in names:
        try:
            file = safetensors.safe_open(folder / name, framework="pt")
            where.update({tensor: file for tensor in file.keys()})
        except (OSError, safetensors.SafetensorError) as error:
            raise UserError(f"{folder / name}: not a whole safetensors file "
                            f"({first_line_of(error)}) — download it again") from None
    return where


def read_tensor(folder, file, name, shape):
    part = file.get_slice(name)
    found = tuple(part.get_shape())
    if found != shape:
        raise UserError(f"{folder}: {name} has the shape {found}, and config.json asks for {shape} "
                        f"— download both again")
    if part.get_dtype() not in ("F32", "BF16", "F16"):
        raise UserError(f"{folder}: {name} is stored as {part.get_dtype()} — import a folder in "
                        f"fp32, bf16 or fp16")
    tensor = file.get_tensor(name).float()
    if not torch.isfinite(tensor).all():
        raise UserError(f"{folder}: {name} holds NaN or infinity — download it again")
    return tensor


# -------------------------------------------------------------------------------------------------
# The command line

@script
def main(argv=None):
    parser = Parser(description="A run as a Hugging Face folder, and the other way round.")
    commands = parser.add_subparsers(dest="command", required=True)
    out = commands.add_parser("export", help="write a run as a Hugging Face folder")
    out.add_argument("run", type=Path, metavar="RUN", help="run folder")
    out.add_argument("folder", type=Path, metavar="DIR", help="folder to write, a new one")
    out.add_argument("--step", type=int, help="checkpoint; without it the newest")
    out.add_argument("--dtype", choices=tuple(DTYPES), default="bfloat16",
                     help="of the weights in the files; float32 is exact, and twice as large")
    out.add_argument("--adapters", action="store_true",
                     help="of a LoRA run: the adapters alone, for peft; without it they are merged")
    out.add_argument("--anyway", action="store_true",
                     help="also if model.py was edited, so that it may not be a Llama any more")
    back = commands.add_parser("import", help="make a run of a Hugging Face folder")
    back.add_argument("folder", type=Path, metavar="DIR", help="folder of a Llama that uses "
                      "GPT-2's tokenizer")
    back.add_argument("run", type=Path, metavar="RUN", help="run folder to write")
    back.add_argument("--step", type=number(int, 0, 99_999_999), default=0,
                      help="number of the checkpoint")
    args = parser.parse_args(argv)
    if args.command == "import":
        import_folder(args.folder, args.run, args.step)
    elif args.adapters:
        export_adapters(args.run, args.folder, args.step, args.anyway)
    else:
        export(args.run, args.folder, args.step, args.dtype, args.anyway)


if __name__ == "__main__":
    sys.exit(main())
