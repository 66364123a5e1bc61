"""checkpoint.py — what a run is: its full state. `capture` collects it, `restore` puts it back.

A run is more than its weights. AdamW keeps two more numbers for every weight, its moments (see
make_optimizer in train.py). Without them a resumed run is another run: the practical lesson of the
paper, arXiv 2412.13335. See it with
`train.py --resume --reset_optimizer`.

A checkpoint is a folder. How it is kept whole on the disk is in support/durable.py.

    runs/NAME/checkpoints/step_00000500/model.pt         {"config": sizes, "model": {name: tensor}}
                                        train_state.pt   the rest of the full state
                                        meta.json        step; size and SHA-256 of both

`save` deletes train_state.pt from older checkpoints. These can be sampled and scored, not resumed.
"""
from dataclasses import asdict, dataclass, fields

import torch

from data import Tokenizer
from model import Llama, ModelConfig
from support import durable, lora, sharding, trees
from support.devices import processes, random_state, remark, set_random_state, wait_for_rank_0
from support.fast import NoInit
from support.runs import HOW_TO_GET_A_RUN, UserError, as_text

# -------------------------------------------------------------------------------------------------
# The full state

@dataclass
class Progress:
    """How far a run has come. These fields are saved as they are."""
    step: int = 0         # number of finished steps: the position in the data and in the schedule
    tokens: int = 0       # number of tokens read
    seconds: float = 0.0  # time spent in training steps, over all resumes
    updates: int = 0      # number of updates in the optimizer's moments: normally `step`; less
                          # after --reset_optimizer, or if fp16 skipped an update


def capture(model, optimizer, scaler, progress, **others):
    """Everything that the next step depends on: a run that goes on from this is the same run.

    Tensors are saved under the names of their parameters. So you may reorder the code, or use
    another number of processes, and still resume. Tensors are not copied: save them before the next
    update. With several processes all must call this. With --fsdp, where each holds a part of every
    tensor, rank 0 collects the parts; the others get None. `others`: what belongs neither to the
    model nor to the optimizer:

        config      the settings of the run
        env         device, precision, processes, versions: to report what changes on a resume
        data        fingerprint of the data: a resume with other data is refused
        log_bytes   length of the log: a resume cuts off what was written after the checkpoint
    """
    return {
        "model_config": asdict(model.config),
        "model": sharding.gather(weights_of(model)),
        "optimizer_name": type(optimizer).__name__,
        "optimizer": sharding.gather(moments_of(optimizer, model)),
        "scaler": scaler.state_dict(),  # the loss scale of fp16
        "rng": random_state(),          # our loop draws no random numbers; yours may: dropout
        **asdict(progress),
        **others}


def restore(state, model, optimizer, scaler, reset_optimizer=False):
    """The mirror image of `capture`: puts everything back, in place, and returns the Progress.

    Learning rate, betas and weight decay are not restored: they follow from the settings.
    reset_optimizer: leave the optimizer's state and the loss scale as they are in a new run. Raises
    UserError naming what is missing, unknown or of another shape."""
    with durable.one_line_error("the checkpoint"):  # any error inside becomes one line
        progress = Progress(*[state[field.name] for field in fields(Progress)])
        restore_weights(state, model)  # first: if sizes differ, the message is about the weights
        if reset_optimizer:
            progress.updates = 0
        else:
            restore_optimizer(state, optimizer, model)
            restore_weights(state, model)  # again, because make_state changes them
            if scaler.is_enabled() and state["scaler"]:  # saved as {} without fp16
                scaler.load_state_dict(state["scaler"])
        set_random_state(state["rng"])
    return progress


def weights_of(model):
    """{name: tensor} of all weights; of sft.py --lora only of the small matrices that it trains."""
    weights = model.state_dict()
    return lora.trained_weights(model) if lora.is_lora(weights) else weights


def moments_of(optimizer, model):
    """{name: what the optimizer keeps for this parameter}. AdamW keeps {"exp_avg", "exp_avg_sq",
    "step"}, others keep something else. It is {} until the parameter has had a gradient."""
    return {name: optimizer.state.get(parameter, {}) for name, parameter in model.named_parameters()
            if parameter.requires_grad or parameter in optimizer.state}


def restore_weights(state, model):
    """Put the saved weights into the model."""
    fill("weights", weights_of(model), state["model"], "use the code and the preset that wrote it")


def restore_optimizer(state, optimizer, model):
    """Put the saved moments into the optimizer. Raises UserError if another kind of optimizer wrote
    them, or if they include another number of updates than the state says."""
    saved_by = state.get("optimizer_name", "AdamW")  # older checkpoints have no name
    if saved_by != type(optimizer).__name__:
        raise UserError(f"the checkpoint has the state of {saved_by!r}, and this code uses "
                        f"{type(optimizer).__name__} — use the code that wrote it, or go on "
                        f"without that state: --reset_optimizer")
    moments = state["optimizer"]
    if state["updates"] == 0 and not any(moments.values()):  # saved before the first update
        return
    make_state(optimizer, model, moments)
    fill("optimizer state", moments_of(optimizer, model), moments, "use the code that wrote it, or "
         "go on without that state: --reset_optimizer")
    # AdamW counts its updates too; the two numbers must agree.
    counts = [int(each["step"]) for each in moments.values() if "step" in each]
    if counts and max(counts) != state["updates"]:
        raise UserError(f"the checkpoint's optimizer state is of {max(counts)} updates, not of "
                        f"{state['updates']} — use the code that wrote it")


def make_state(optimizer, model, saved):
    """A new optimizer has no moments yet: PyTorch creates them in the first step. So make one step
    with gradients of 1, only to create them: `fill` then copies the saved ones over them, and the
    weights, which the step changed, must be restored. A parameter whose saved state is {} never had
    a gradient, and gets none here either."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and saved.get(name) != {}:
            parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def fill(what, target, saved, advice):
    """Copy the tensors of `saved` into those of `target`, both nested dicts. This is the one place
    where names, shapes and dtypes are compared. Raises UserError naming the differences."""
    in_file = trees.forms(saved)  # {name: shape and dtype}
    in_code = trees.forms(target)
    differences = []
    for name in sorted(in_file.keys() | in_code.keys()):
        forms = in_file.get(name, "absent"), in_code.get(name, "absent")
        if forms[0] != forms[1]:
            differences.append(f"{name} ({forms[0]} saved, {forms[1]} in the code)")
    if differences:
        more = ", …" if len(differences) > 4 else ""
        raise UserError(f"{len(differences)} of the checkpoint's {what} do not fit this code: "
                        f"{', '.join(differences[:4])}{more} — {advice}")
    with durable.one_line_error(f"the checkpoint's {what}"):
        sharding.scatter(saved, target)


# -------------------------------------------------------------------------------------------------
# To disk and back

def save(run, state, keep_last, keep_every):
    """On rank 0, write the state into a checkpoint of `run`. Then thin out: the newest `keep_last`
    stay complete; of older ones, steps 0, 1, 2, 4, 8 … and multiples of `keep_every` keep only
    their weights; the rest is deleted.

    Raises UserError if a number is NaN or infinite, or if the checkpoint cannot be written. Older
    checkpoints are then intact."""
    if processes()[0] > 0:
        return
    rest = dict(state)
    weights = {"config": rest.pop("model_config"), "model": rest.pop("model")}
    files = {"model.pt": weights, "train_state.pt": rest}
    durable.write_checkpoint(run, state["step"], files)
    durable.prune(run, keep_last, keep_every)


def read_back(run, step, model, old, new, scaler):
    """A test, made once in a run: load the state that was just saved into a fresh optimizer, `new`,
    and compare it with the one in use, `old`. What differs would be lost in a resume: so the run
    ends here, and names it. All processes must call this."""
    wait_for_rank_0()  # until it has saved
    before = trees.contents_of(old, model)
    old.state.clear()  # there may be no memory for the moments of two optimizers
    try:
        restore(load(durable.folder_of(run, step)), model, new, scaler)
        lost = trees.differences(before, trees.contents_of(new, model))
    except UserError as why:
        lost = [str(why)]
    if lost:
        raise UserError(f"{run} could not be resumed from step {step}, so it ends here; lost or "
                        f"changed: {', '.join(lost[:4])} — correct the code, then start over with "
                        f"--overwrite")


def load(folder):
    """The full state in the folder of a checkpoint, as `capture` returned it; None if the folder is
    None. Raises UserError if the files hold something else, or the state of another step."""
    if folder is None:
        return None
    weights = durable.load_weights(folder / "model.pt")
    rest = durable.load_rest(folder / "train_state.pt")
    if rest["step"] != durable.step_of(folder):
        raise UserError(f"{folder} holds the state of step {rest['step']} — restore the folder, or "
                        f"delete it to go on from the checkpoint before")
    return {"model_config": weights["config"], "model": weights["model"], **rest}


def read_config(saved):
    """The ModelConfig with the saved sizes. A field that is newer than the checkpoint has its
    default. Raises UserError if a size is unknown or cannot be used."""
    with durable.one_line_error("the checkpoint's model config"):
        config = ModelConfig(**saved)
    newer = {name: value for name, value in asdict(config).items() if name not in saved}
    if newer:
        remark(f"the checkpoint's config does not have {as_text(newer)}: the default is used")
    return config


def empty_model(config):
    """A Llama whose weights have no values yet, to be filled with saved ones: that saves time."""
    with durable.one_line_error(f"a network of {config}"), NoInit():
        return Llama(config)


def load_weights(run, step=None):
    """({"config", "model"}, step) of the newest undamaged checkpoint of `run`, or of `step`.

    A LoRA run (sft.py --lora) saves thin matrices; they are merged into the weights that they
    belong to. Raises UserError if there is no checkpoint."""
    folder = durable.find(run, step)
    if folder is None:
        raise UserError(f"{run}: no such run, or one without checkpoints — {HOW_TO_GET_A_RUN}")
    weights = durable.load_weights(folder / "model.pt")
    if lora.is_lora(weights["model"]):
        weights = lora.merged(run, weights["model"])
    return weights, durable.step_of(folder)


def load_model(run, step=None, device="cpu"):
    """(model, tokenizer, step) of the newest undamaged checkpoint of `run`, or of `step`."""
    weights, step = load_weights(run, step)
    model = empty_model(read_config(weights["config"]))
    restore_weights(weights, model)
    return model.to(device).eval(), Tokenizer(model.config.vocab_size), step
