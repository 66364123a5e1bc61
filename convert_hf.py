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
import sys
from dataclasses import asdict, replace
from operator import attrgetter
from pathlib import Path

import support.cpu  # before torch, which reads its settings once
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
from support.rows import read_json_rows
from support.runs import (AT_END, UserError, first_line_of, hold, quoted, script, settings_of,
                          trained_window, warn)


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
    "vocab_size": "vocab_size",
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
    eot = config.vocab_size - 1
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **{name: getattr(config, ours) for ours, name in NAMES.items()},
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


# What Hugging Face assumes where config.json is silent.
DEFAULTS = {"max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "rope_theta": 10_000.0,
            "tie_word_embeddings": False}
# What our network does. A field may be absent; another value is refused. None: there must be none.
EXPECTED = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False,
            "partial_rotary_factor": 1.0, "quantization_config": None, "sliding_window": None}
LARGEST = 2**24  # of a size: to make more layers would take forever


def from_hf_config(theirs, file):
    """The ModelConfig of a config.json; its vocabulary is as large as the embedding. Raises
    UserError naming what our network cannot be."""
    if theirs.get("model_type") != "llama":
        raise UserError(f"{file}: model_type is {theirs.get('model_type')!r}, not 'llama' — give "
                        f"the Hugging Face folder of a Llama")
    known = {name: value for name, value in theirs.items() if value is not None}
    for name, value in EXPECTED.items():
        if known.get(name, value) != value:
            raise UserError(f"{file}: {name} is {known[name]!r}, and our network has {value!r} — "
                            f"import a plain Llama")
    known = {**DEFAULTS, **known, "rope_theta": rope_theta_of(known, file)}
    known.setdefault("num_key_value_heads", known.get("num_attention_heads"))
    missing = [name for name in NAMES.values() if name not in known]
    if missing:
        raise UserError(f"{file}: {missing[0]} is missing — download it again")
    sizes = {ours: known[name] for ours, name in NAMES.items()}
    for name, value in sizes.items():
        if isinstance(value, int) and value > LARGEST:
            raise UserError(f"{file}: {name} {value!r:.40} is too large — import a plain Llama")
    try:
        config = ModelConfig(**sizes, padded_vocab_size=sizes["vocab_size"])
    except ValueError as why:
        raise UserError(f"{file}: {why} — import a plain Llama") from None
    if known.get("head_dim", config.head_dim) != config.head_dim:
        raise UserError(f"{file}: head_dim is {known['head_dim']}, and ours is hidden_size / "
                        f"num_attention_heads = {config.head_dim} — import a plain Llama")
    return config


def rope_theta_of(known, file):
    """The base of the rotary frequencies, in the form of transformers 4, 5, or both. Raises
    UserError for any other kind of positions than ours."""
    found = [known.get("rope_theta")]
    for name in ("rope_parameters", "rope_scaling"):
        rope = known.get(name, {})
        is_plain = (isinstance(rope, dict) and rope.keys() <= {"rope_type", "type", "rope_theta"}
                    and rope.get("rope_type", rope.get("type", "default")) == "default")
        if not is_plain:
            raise UserError(f"{file}: {name} is {json.dumps(rope)}, and our positions are plain "
                            f"rotary ones — import a plain Llama")
        found.append(rope.get("rope_theta"))
    found = [theta for theta in found if theta is not None] or [DEFAULTS["rope_theta"]]
    if any(theta != found[0] for theta in found):
        raise UserError(f"{file}: two values of rope_theta, {found[0]} and {found[-1]} — correct "
                        f"the wrong one")
    return found[0]


# -------------------------------------------------------------------------------------------------
# A folder says "Llama", and others compute what a Llama computes. So the network has to be one.

# The texts of model.py that compute what LlamaForCausalLM does, without comments and docstrings.
# (After a change that computes the same, the test that fails shows the new hash.)
LLAMA = {
    "RMSNorm": "466f64868f00", "rope_table": "2ce28319e80c",
    "apply_rope": "3211e61e0794", "causal_mask": "a50242de4f46",
    "attention": "d61d2846c435", "Attention": "f6bf70e11764",
    "SwiGLU": "77b98f32f3de", "Block": "251c31a89cee",
    "Decoder": "e24b6c12f41a", "Llama.logits": "8d83de847b0a",
    "Llama.forward": "70b80f90c193",
}


def check_is_llama(anyway):
    """Raise UserError if a part of model.py has another text, so that it may compute something else
    than a Llama. anyway: only say it."""
    edited = [f"{name} in model.py has another text" for name, text in LLAMA.items()
              if fast.hash_of(attrgetter(name)(model)) != text]
    if edited and not anyway:
        raise UserError(f"not a plain Llama: {', '.join(edited)} — others would compute something "
                        f"else with these weights; if you know that they would not, give --anyway")
    if edited:
        print(f"note: exported as a Llama all the same: {', '.join(edited)}")


OF_A_LAYER = ("input_layernorm", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj",
              "self_attn.o_proj", "post_attention_layernorm", "mlp.gate_proj", "mlp.up_proj",
              "mlp.down_proj")


def check_weights(names, n_layers):
    """Raise UserError if there are weights that a Llama does not have: they would be lost."""
    known = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    known |= {f"model.layers.{i}.{part}.weight" for i in range(n_layers) for part in OF_A_LAYER}
    added = sorted(set(names) - known)
    if added:
        more = ", …" if len(added) > 4 else ""
        raise UserError(f"a Llama does not have these weights: {', '.join(added[:4])}{more} — so "
                        f"others cannot load it, and --anyway does not help")


# -------------------------------------------------------------------------------------------------
# Export

def export(run, out, step, dtype, anyway):
    """Write the newest checkpoint of `run`, or that of `step`, as a Hugging Face folder. Adapters
    are merged. Each weight is in memory once."""
    check_is_llama(anyway)
    settings = settings_of(run)
    with new_folder(out) as folder:
        weights, step = checkpoint.load_weights(run, step)
        config = checkpoint.read_config(weights["config"])
        with torch.device("meta"):  # a network without memory, to compare names and shapes
            checkpoint.restore_weights(weights, Llama(config))
        check_weights(weights["model"], config.n_layers)
        window = trained_window(settings, config.max_seq_len)
        if window < config.max_seq_len:
            print(f"config.json names the windows of training, {window} tokens, not the "
                  f"{config.max_seq_len} that the network takes")
            config = replace(config, max_seq_len=window)
        tensors = weights.pop("model")
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            tensors[name] = tensors[name][:config.vocab_size]  # without the padded rows
        if config.tie_embeddings:
            del tensors["lm_head.weight"]  # it is the embedding
        n = sum(tensor.numel() for tensor in tensors.values())
        for name in tqdm(list(tensors), desc="converting", unit=" tensors"):
            tensors[name] = tensors[name].to(getattr(torch, dtype))
        save(tensors, folder / "model.safetensors")
        write_json(folder / "config.json", to_hf_config(config, dtype))
        eot = config.vocab_size - 1
        write_json(folder / "generation_config.json",
                   {"bos_token_id": eot, "eos_token_id": eot, "pad_token_id": eot})
        card = model_card(run.resolve().name, step, n, config, dtype, settings,
                          source_of(settings), evaluation_at(run, step))
        write_texts(folder, config, settings, card)
    print(f"{out}: step {step:,} of {run}, {n:,} parameters in {dtype}. Next:\n"
          f"  python -c \"from transformers import pipeline; "
          f"print(pipeline('text-generation', '{out}')('The function'))\"")


def save(tensors, file):
    """safetensors' save_file. Raises UserError if the disk does not take it."""
    safetensors = import_safetensors()
    try:
        safetensors.torch.save_file(tensors, file, metadata={"format": "pt"})
    except safetensors.SafetensorError as error:
        raise UserError(f"{file}: not written ({first_line_of(error)}) — make room on the "
                        f"disk") from None


def write_texts(folder, config, settings, card):
    """Write the files of the tokenizer, with the chat template of a tuned run, and the card. Let
    everybody read them and the weights: safetensors lets only the owner."""
    system = settings.get("system")
    template = None if system is None else jinja_template(system)
    hf_tokenizer.write_tokenizer(folder, Tokenizer(config.vocab_size), config.max_seq_len, template)
    (folder / "README.md").write_text(card, encoding="utf-8")
    for file in folder.iterdir():
        try:
            file.chmod(0o644)
        except OSError as error:
            warn(f"files in {folder} may be readable by their owner only ({error.strerror})")


def source_of(settings):
    """The name of the training text's source, if the data is still there."""
    try:
        source = DataFolder(settings["data"]).meta["source"]
        if source["name"] == "fineweb-edu" and "repo" not in source:
            return "files of the author's"  # given by --from: whatever they hold
        return str(source["name"])
    except (UserError, TypeError, KeyError):
        return "unknown"


def evaluation_at(run, step):
    """The evaluation in the log of `run` at `step`; {} without one."""
    log = run / "metrics.jsonl"
    rows = read_json_rows(log) if log.exists() else []  # an imported run has no log
    found = {}
    for _, row, _ in rows:
        is_score = isinstance(row, dict) and row.get("event") in ("eval", "sft_eval")
        if is_score and row.get("step") == step:
            found = row
    return found


def export_adapters(run, out, step, anyway):
    """Write the adapters of a LoRA run as a folder for peft. Raises UserError for another run."""
    check_is_llama(anyway)
    settings = settings_of(run)
    folder = durable.find(run, step)
    if folder is None:
        raise UserError(f"{run}: no checkpoints — tune it first")
    weights = durable.load_weights(folder / "model.pt")
    adapters = weights["model"]
    if not lora.is_lora(adapters):
        raise UserError(f"{run} holds whole weights, no adapters — leave out --adapters")
    tensors = {f"base_model.model.{name}.weight": tensor for name, tensor in adapters.items()
               if not name.endswith(".lora_scale")}
    base = Path(settings["base"]).resolve().name
    with new_folder(out) as new:
        save(tensors, new / "adapter_model.safetensors")
        write_json(new / "adapter_config.json", {
            "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": settings["lora"],
            "lora_alpha": settings["lora_alpha"], "lora_dropout": 0.0, "bias": "none",
            "target_modules": sorted({name.split(".")[-2] for name in adapters}),
            "base_model_name_or_path": base, "inference_mode": True})
        card = ADAPTERS.format(name=run.resolve().name, base=base)
        write_texts(new, checkpoint.read_config(weights["config"]), settings, card)
    of_step = "" if settings.get("step") is None else f" --step {settings['step']}"
    print(f"{out}: adapters of step {durable.step_of(folder)} of {run}, for {base}. They need it "
          f"as a Hugging Face folder too:\n"
          f"  python convert_hf.py export {quoted(settings['base'])} DIR{of_step}")


# -------------------------------------------------------------------------------------------------
# Import

def import_folder(folder, run, step):
    """Make the weights of a Hugging Face folder the checkpoint `step` of `run`, a new run or an
    imported one of the same sizes. Raises UserError, and leaves no run, for what cannot be one."""
    file = folder / "config.json"
    if not file.exists():
        raise UserError(f"{folder}: no config.json in it — give a Hugging Face folder of a Llama")
    config = from_hf_config(read_json(file), file)
    config = replace(config, vocab_size=vocabulary_of(folder, config.padded_vocab_size))
    note_other_tokens(folder, eot=config.vocab_size - 1)
    settings = {"imported_from": str(folder), "data": None, "seq_len": config.max_seq_len,
                "preset": None, "model": asdict(config), "system": chat_system(folder)}
    check_target(run, step, settings)
    weights = {"config": asdict(config), "model": read_tensors(folder, config)}
    run.mkdir(parents=True, exist_ok=True)
    held = hold(run)
    AT_END.append(lambda code: os.close(held))
    check_target(run, step, settings)  # again: another process may have been faster
    write_json(run / "config.json", settings)
    durable.write_checkpoint(run, step, {"model.pt": weights})
    print(f"{run}: step {step:,}. Next:\n"
          f"  python sample.py {quoted(run)} --prompt \"The function\"\n"
          f"  python evaluate.py {quoted(run)} --data DIR   # in windows of {config.max_seq_len} "
          f"tokens, or --seq_len")


def vocabulary_of(folder, rows):
    """How many ids the tokenizer of the folder has. rows: of the embedding. Raises UserError unless
    it is GPT-2's."""
    found = hf_tokenizer.read_vocabulary(folder)
    if found is None:
        if not GPT2_VOCAB_SIZE <= rows < GPT2_VOCAB_SIZE + 1024:
            raise UserError(f"{folder}: it has no files of a tokenizer, and its {rows:,} rows are "
                            f"not those of GPT-2's {GPT2_VOCAB_SIZE:,} ids — add them")
        print(f"note: {folder} has no files of a tokenizer: its ids are taken as GPT-2's")
        return GPT2_VOCAB_SIZE
    vocabulary, merges = found
    vocab_size = len(vocabulary)
    if not 257 <= vocab_size <= GPT2_VOCAB_SIZE:
        raise UserError(f"{folder}: its tokenizer has {vocab_size:,} tokens, GPT-2's "
                        f"{GPT2_VOCAB_SIZE:,} — import a model that uses GPT-2's")
    differs = hf_tokenizer.difference(vocabulary, merges, Tokenizer(vocab_size))
    if differs is not None:
        raise UserError(f"{folder}: its tokenizer is not GPT-2's ({differs}) — import a model that "
                        f"uses GPT-2's")
    if rows < vocab_size:
        raise UserError(f"{folder}: vocab_size {rows:,} in config.json is less than the "
                        f"{vocab_size:,} tokens of its tokenizer — download it again")
    return vocab_size


def read_optional(file):
    """The JSON object in a file, {} without the file."""
    return read_json(file) if file.exists() else {}


def note_other_tokens(folder, eot):
    """Print it if the folder names another token than `eot`, our last one, as begin or end, or puts
    one before each text."""
    for file in ("config.json", "generation_config.json"):
        settings = read_optional(folder / file)
        for name in ("bos_token_id", "eos_token_id"):
            if settings.get(name) not in (eot, None):
                print(f"note: {name} is {settings[name]} in {file}; here it is {eot}, "
                      f"<|endoftext|>")
    if read_optional(folder / "tokenizer_config.json").get("add_bos_token"):
        print("note: its tokenizer puts a begin token before each text; sample.py and evaluate.py "
              "do not, so texts and scores differ")


def chat_system(folder):
    """The system prompt of the folder's chat template; None without one, or if it is not ours."""
    file = folder / "chat_template.jinja"
    template = read_optional(folder / "tokenizer_config.json").get("chat_template")
    if file.exists():
        template = file.read_text(encoding="utf-8", errors="replace")
    if template is None:
        return None
    system = system_of(str(template))
    if system is None:
        print(f"note: {folder} has a chat template, and not ours: sample.py --chat uses that of "
              f"Vicuna 1.1")
    return system


def check_target(run, step, settings):
    """Raise UserError unless `run` is new, or imported, of the same sizes, without this step."""
    if not any(run.glob("[!.]*")):
        return
    try:
        known = settings_of(run)
    except UserError:
        known = {}
    if "imported_from" not in known:
        raise UserError(f"{run} already holds something else — choose another folder for the run")
    if known.get("model") != settings["model"]:
        raise UserError(f"{run} holds an imported model of other sizes — choose another folder for "
                        f"the run")
    if step in durable.checkpoints(run):
        raise UserError(f"{run} already has step {step} — give another --step")


def read_tensors(folder, config):
    """{name: fp32 tensor} of the weights. Raises UserError if they are not those of the config."""
    where = files_of(folder)
    with torch.device("meta"):  # shapes without memory
        state = Llama(config).state_dict()
    wanted = set(state)
    if config.tie_embeddings and "lm_head.weight" not in where:
        wanted.remove("lm_head.weight")
    # Old folders hold the rotary frequencies too. They follow from the config.
    extra = [name for name in where.keys() - state.keys() if not name.endswith(".inv_freq")]
    missing = sorted(wanted - where.keys())
    if missing or extra:
        raise UserError(f"{folder}: {len(missing)} tensors are missing ({', '.join(missing[:3])}), "
                        f"{len(extra)} are not those of a plain Llama ({', '.join(extra[:3])}) — "
                        f"download it again, or import a plain Llama")
    tensors = {}
    for name in tqdm(sorted(wanted), desc="reading", unit=" tensors"):
        tensors[name] = read_tensor(folder, where[name], name, tuple(state[name].shape))
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
    present = [file.name for file in folder.glob("*.safetensors")]
    names = ["model.safetensors"]
    if index.exists():
        weight_map = read_json(index).get("weight_map")
        names = weight_map.values() if isinstance(weight_map, dict) else [None]
    elif names[0] not in present:
        raise UserError(f"{folder}: no weights in it (pytorch_model.bin can run code, so it is not "
                        f"read) — give a folder with model.safetensors, or with several such files "
                        f"and their index")
    unknown = [name for name in names if name not in present]
    if unknown:
        raise UserError(f"{index}: names the file {unknown[0]!r}, which is not one in this folder "
                        f"— download it again")
    safetensors = import_safetensors()
    where = {}
    for name in set(names):
        try:
            file = safetensors.safe_open(folder / name, framework="pt")
        except (OSError, safetensors.SafetensorError) as error:
            raise UserError(f"{folder / name}: not a whole safetensors file "
                            f"({first_line_of(error)}) — download it again") from None
        where.update(dict.fromkeys(file.keys(), file))
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
    commands = parser.add_subparsers(dest="command", required=True, metavar="{export,import}")
    out = commands.add_parser("export", help="write a run as a Hugging Face folder")
    out.add_argument("run", type=Path, metavar="RUN", help="run folder")
    out.add_argument("folder", type=Path, metavar="DIR", help="folder to write, a new one")
    out.add_argument("--step", type=int, help="checkpoint; without it the newest")
    out.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16",
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
