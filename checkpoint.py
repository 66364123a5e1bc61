"""checkpoint.py — what a run is: its full state, captured in one function and restored in one.

A run is more than its weights. AdamW keeps two more numbers for every weight. Without them a
resumed run is another run: the practical lesson of the paper, arXiv 2412.13335. See it with
`train.py --resume --reset_optimizer`.

A checkpoint is a folder. How it is kept whole on the disk is in support/durable.py.

    runs/NAME/checkpoints/step_00000500/model.pt         {"config": sizes, "model": {name: tensor}}
                                        train_state.pt   the rest of the full state
                                        meta.json        step; size and SHA-256 of both

Old checkpoints lose train_state.pt: their weights can be sampled and scored, but not resumed.
"""
import json
from dataclasses import asdict

import torch
from torch.overrides import TorchFunctionMode

from data import Tokenizer
from model import Llama, ModelConfig
from support import durable, lora, sharding
from support.devices import remark
from support.runs import UserError, holds_steps, refuse_hugging_face

# -------------------------------------------------------------------------------------------------
# The full state

def capture(model, optimizer, scaler, **progress):
    """Everything that the next step depends on: a run that goes on from this is the same run.

    Tensors are saved by the names of their parameters. So you may reorder the code, or use another
    number of processes, and still resume. Sharded tensors (--fsdp) are gathered one by one into the
    memory of rank 0, so all processes must call this, and only rank 0 gets them: the state does not
    tell who held what. `progress` is what only the caller knows:

        step        finished steps, which is also the position in the data and in the schedule
        tokens      seen so far
        seconds     of training so far
        config      the settings of the run
        env         device, precision, processes, versions: to report what changes on a resume
        data        fingerprint of the data: a resume with other data is refused
        log_bytes   length of the log: a resume cuts off what was written after the checkpoint
        updates     those that the optimizer's moments have seen: fewer than steps after a
                    --reset_optimizer, or if gradients overflowed in fp16
    """
    weights = {name: sharding.on_rank_0(t) for name, t in trained_weights(model).items()}
    moments = {}
    for name, parameter in model.named_parameters():
        if parameter in optimizer.state:  # a dict whose keys are the parameters themselves
            found = optimizer.state[parameter]
            moments[name] = {key: sharding.on_rank_0(tensor) for key, tensor in found.items()}
    return {
        "model_config": asdict(model.config),
        "model": weights,
        "optimizer": moments,           # {name: {"exp_avg", "exp_avg_sq", "step"}}; {} at step 0
        "scaler": scaler.state_dict(),  # the loss scale of fp16
        "rng": random_state(),          # our loop draws no random numbers; yours may: dropout
        **progress,
    }


def trained_weights(model):
    """{name: tensor} of the weights, without frozen ones. There are frozen ones in a LoRA run only,
    which need not save its base again."""
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    return {name: tensor for name, tensor in model.state_dict().items() if name not in frozen}


def random_state():
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def restore(state, model, optimizer, scaler, reset_optimizer=False):
    """The opposite of `capture`: changes model, optimizer and scaler.

    reset_optimizer: leave the moments at zero (and the loss scale at its start) on purpose, to see
    what they are good for. Raises UserError naming what is missing, unknown or of another shape."""
    restore_weights(state, model)
    if not reset_optimizer:
        restore_optimizer(state, model, optimizer)
        restore_scaler(state["scaler"], scaler)
    try:
        torch.set_rng_state(state["rng"]["cpu"])
        if state["rng"]["cuda"] is not None and torch.cuda.is_available():
            torch.cuda.set_rng_state(state["rng"]["cuda"])
    except (KeyError, TypeError, RuntimeError) as error:
        raise UserError(f"the checkpoint's random state cannot be used ({error}) — "
                        f"{OTHER_STATE}") from None


def restore_weights(state, model):
    """Put the saved weights into the model."""
    check_tensors("weights", state["model"], trained_weights(model))
    now = model.state_dict()
    saved = {name: sharding.part_of(tensor, now[name]) for name, tensor in state["model"].items()}
    model.load_state_dict({**now, **saved})  # frozen ones keep their present values


def restore_scaler(saved, scaler):
    """Put the saved loss scale into the scaler; there is one in fp16 only."""
    if not saved or not scaler.is_enabled():
        return
    numbers = [isinstance(value, int | float) and value >= 0 for value in saved.values()]
    if saved.keys() != scaler.state_dict().keys() or not all(numbers):
        raise UserError(f"the checkpoint's loss scale is not one ({saved}) — {OTHER_STATE}")
    scaler.load_state_dict(saved)


def restore_optimizer(state, model, optimizer):
    """Put the saved moments into the optimizer. Its learning rate, betas and weight decay are not
    part of the state: they follow from the settings."""
    if state["updates"] == 0 and not state["optimizer"]:
        return  # AdamW creates its moments in the first update
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    expected = {}
    for name, parameter in trained.items():
        expected.update({f"{name}.exp_avg": parameter, f"{name}.exp_avg_sq": parameter,
                         f"{name}.step": torch.ones(())})
    check_tensors("optimizer state", durable.named_tensors(state["optimizer"]), expected)
    updates = {float(state["optimizer"][name]["step"]) for name in trained}
    if updates != {state["updates"]} or state["updates"] > state["step"]:
        raise UserError(f"the checkpoint's optimizer state is of {sorted(updates)[:4]} updates, "
                        f"not of {state['updates']} at step {state['step']} — {OTHER_STATE}")
    # Ours is {name: moments}. PyTorch's is {"state": {0: moments, 1: …}, "param_groups": …}, with
    # the parameters numbered in the order of the groups. Translate back.
    name_of = {parameter: name for name, parameter in trained.items()}
    in_order = []
    for group in optimizer.param_groups:
        in_order += [name_of[parameter] for parameter in group["params"]]
    theirs = optimizer.state_dict()
    for number, name in enumerate(in_order):
        found = dict(state["optimizer"][name])
        for key in ("exp_avg", "exp_avg_sq"):
            found[key] = sharding.part_of(found[key], trained[name])
        theirs["state"][number] = found
    optimizer.load_state_dict(theirs)


OTHER_STATE = "use the code that wrote it"


def check_tensors(what, saved, expected):
    """Raise UserError unless both dicts hold tensors of the same names, shapes and dtypes."""
    differences = []
    for name in sorted(saved.keys() | expected.keys(), key=str):
        in_file = describe(name, saved)
        in_code = describe(name, expected)
        if in_file != in_code:
            differences.append(f"{name} ({in_file} saved, {in_code} in the code)")
    if differences:
        raise UserError(f"the checkpoint's {what} do not fit the network in {len(differences)} "
                        f"parameters: {', '.join(differences[:4])} — use the code and the preset "
                        f"that wrote it")


def describe(name, tensors):
    if name not in tensors:
        return "absent"
    tensor = tensors[name]
    is_dense = isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided
    if is_dense and not tensor.is_meta:
        return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
    return f"not a dense tensor: {type(tensor).__name__}"


def check_config(saved, config):
    """Raise UserError if weights with the `saved` config mean something else in `config`. Shapes do
    not tell everything: 2 heads of 64 and 4 of 32 have the same, and so have vocabularies that are
    padded to the same size."""
    here = asdict(config)
    differ = []
    for name, value in asdict(read_config(saved)).items():
        if value != here[name] and name != "max_seq_len":
            differ.append(f"{name} {value}, here {here[name]}")
    if differ:
        raise UserError(f"the weights to start from are of another network: {', '.join(differ)} — "
                        f"choose its preset, and data of its vocabulary")


# -------------------------------------------------------------------------------------------------
# To disk and back

def save(run, state, keep_last, keep_every):
    """Write the state into a checkpoint of `run`, then prune older ones: only the newest
    `keep_last` keep their train_state.pt.

    Raises UserError with exit code 3 if a number is NaN or infinite, with 4 if it cannot be
    written; the older checkpoints are intact then."""
    rest = dict(state)
    weights = {"config": rest.pop("model_config"), "model": rest.pop("model")}
    files = {"model.pt": weights, "train_state.pt": rest}
    durable.write_checkpoint(run, state["step"], files)
    durable.prune(run, state["step"], keep_last, keep_every)


def newest(run):
    """The folder of the newest undamaged full state of `run`; None if the run has not begun.

    Raises UserError if it has begun and no state can be used: a run never starts over by itself."""
    folder = durable.find(run, full=True)
    if folder is None and holds_steps(run):
        raise UserError(f"{run} holds a run but no checkpoint of it — restore its checkpoints, or "
                        f"start over with --overwrite")
    return folder


def load(folder):
    """The full state in a checkpoint's folder, as `capture` returned it; None without a folder.

    Raises UserError if the files, though undamaged, hold something else."""
    if folder is None:
        return None
    weights = load_parts(folder / "model.pt", WEIGHTS)
    rest = load_parts(folder / "train_state.pt", REST)
    try:
        json.dumps([rest["config"], rest["env"], rest["data"]])  # as they are logged
    except (TypeError, ValueError, RecursionError):
        raise UserError(f"{folder}: its settings hold more than plain values — "
                        f"{OTHER_STATE}") from None
    if rest["step"] != durable.step_of(folder):
        raise UserError(f"{folder} holds the state of step {rest['step']} — restore the folder, "
                        f"or delete it to go on from the checkpoint before")
    return {"model_config": weights["config"], "model": weights["model"], **rest}


# What the two files hold, and its types.
WEIGHTS = {"config": dict, "model": dict}
REST = {"optimizer": dict, "scaler": dict, "rng": dict, "step": int, "tokens": int,
        "seconds": float, "config": dict, "env": dict, "data": list, "log_bytes": int,
        "updates": int}


def load_parts(file, parts):
    """The dict in a file of a checkpoint. Raises UserError unless it has exactly these parts."""
    contents = durable.load_file(file)
    if not isinstance(contents, dict):
        contents = {}
    wrong = [name for name, kind in parts.items() if type(contents.get(name)) is not kind]
    wrong += [name for name in contents if name not in parts]
    wrong += [name for name, value in contents.items()
              if isinstance(value, int | float) and not value >= 0]
    if wrong:
        raise UserError(f"{file}: missing, unknown or of another type: "
                        f"{', '.join(map(str, wrong[:5]))} — {OTHER_STATE}")
    return contents


LARGEST = {"n_layers": 10_000}  # an absurd number of layers would take for ever to make


def read_config(saved):
    """The ModelConfig with the saved sizes. A field that is newer than the checkpoint has its
    default. Raises UserError if a size is unknown or cannot be used."""
    known = asdict(ModelConfig())
    newer = {name: value for name, value in known.items() if name not in saved}
    unknown = [str(name) for name in saved if name not in known]
    try:
        if unknown:
            raise ValueError(f"{', '.join(unknown)}: unknown here")
        config = ModelConfig(**saved)
        for name, value in saved.items():
            if isinstance(value, int) and value > LARGEST.get(name, 2**24):
                raise ValueError(f"{name} {value!r:.40} is too large")
    except (TypeError, ValueError, OverflowError) as why:
        raise UserError(f"the checkpoint's model config cannot be used ({why}) — "
                        f"{OTHER_STATE}") from None
    if newer:
        remark(f"the checkpoint's config does not have {as_text(newer)}: the default is used")
    return config


def as_text(values):
    """{name: value} in a line."""
    return ", ".join(f"{name} {value!r}" for name, value in values.items())


def load_weights(run, step=None):
    """({"config", "model"}, step) of the newest undamaged checkpoint of `run`, or of `step`.

    A LoRA run (sft.py --lora) saves thin matrices; they are merged into the weights that they
    belong to. Raises UserError if there is no checkpoint."""
    folder = durable.find(run, step)
    if folder is None:
        refuse_hugging_face(run)
        raise UserError(f"{run}: no such run, or one without checkpoints — train it first: "
                        f"python train.py --run {run}")
    weights = load_parts(folder / "model.pt", WEIGHTS)
    if lora.is_lora(weights["model"]):
        base = load_parts(lora.base_file(run), WEIGHTS)
        lora.merge(base["model"], weights["model"])
        weights = base
    return weights, durable.step_of(folder)


class NoInit(TorchFunctionMode):
    """`with NoInit():` new layers keep whatever is in their memory. For a network whose weights all
    come from a file: random numbers for 1.7 billion of them take 40 seconds."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__module__", None) == "torch.nn.init":
            return None  # all of its functions work in place
        return function(*args, **(kwargs or {}))


def load_model(run, step=None, device="cpu"):
    """(model, tokenizer, step) of the newest undamaged checkpoint of `run`, or of `step`."""
    weights, step = load_weights(run, step)
    with NoInit():
        model = Llama(read_config(weights["config"]))
    restore_weights(weights, model)
    return model.to(device).eval(), Tokenizer(model.config.vocab_size), step
