"""train.py — pretrain a LLaMA. The loop is written out: no trainer, no callbacks.

Read it from top to bottom: the learning rate, the optimizer, the run. What follows the run can
wait: how the data and the model are opened, the settings, the texts on the screen.

    python train.py                                         # tiny, on the manuals of your Python
    python train.py --resume                                # after Ctrl-C: as if it had not stopped
    python train.py --preset 1.7b --data data/fineweb-edu   # the paper's run (arXiv 2412.13335)
    torchrun --standalone --nproc_per_node=8 -- train.py --preset 1.7b    # -- is needed

Exit codes: 0 done, 2 bad usage, config or data, 3 the loss became NaN or infinite, 4 a checkpoint
or the log could not be written, 75 stopped and saved: run again with --resume.
"""
import argparse
import math
import sys
import time
from dataclasses import replace
from pathlib import Path

from support import cpu  # before torch, which reads its settings once
import torch
from torch.nn.parallel import DistributedDataParallel

import checkpoint
from data import DataFolder, Windows
from evaluate import Observer
from model import PRESETS, Llama, ModelConfig, flops_per_token, kv_bytes_per_token
from support import fast, flags, sharding
from support.devices import (StopSignals, any_process, can_compile, check_equal, choose_dtype,
                             end_processes, environment, from_rank_0, peak_memory, peak_rate,
                             remark, start_processes, sum_over_processes, to_device, use_machine,
                             wait_for_rank_0)
from support.files import write_json
from support.memory import checkpoint_activations
from support.runs import Log, UserError, claim, due, is_finished, script, shown, start_over

EMBEDDED = "data/pydocs"  # text that every computer with Python has; prepared when it is missing

# What a preset changes. A flag on the command line wins over it; the other defaults are below.
BY_PRESET = {
    # Batches are small here, so AdamW averages the squares of more gradients: beta2 0.99.
    "tiny": dict(data=EMBEDDED, max_steps=3800, batch_tokens=1024, seq_len=128, lr=1e-3,
                 warmup_steps=100, schedule="wsd", beta2=0.99, eval_every=1000, eval_tokens=24_576,
                 benchmark_items=320, sample_every=0, sample_prompt="The function returns",
                 keep_every=0),
    "124m": dict(max_steps=19_073),
    # On 8 GPUs to save 20 GB takes as long as some dozen steps, so it is done less often.
    "978m": dict(max_steps=38_147, save_every=1000),
    "1.7b": dict(max_steps=38_147, save_every=1000),  # the paper's: 20B tokens
}


# The fields of ModelConfig that a flag can change.
SIZES = ("dim", "n_layers", "n_heads", "n_kv_heads", "intermediate_size")

COMPILE_FROM = 500  # steps; compiling takes 10 to 20 s, which a shorter run does not earn back


# -------------------------------------------------------------------------------------------------
# The learning rate and the optimizer

def lr_at(step, settings):
    """Learning rate of the update from `step` to `step` + 1: a linear warm-up, then a decay to
    min_lr.

    cosine: Loshchilov & Hutter 2017, arXiv 1608.03983, eq. 5. wsd: constant, then linear over the
    last 20 % (Hu et al. 2024, arXiv 2404.06395, §4). A pure function of its arguments, so a resume
    does not change it. But another --max_steps does: to continue a finished run of 3,800 steps with
    --max_steps 7600 raises the rate from the final 1.0e-4 back to 1.0e-3."""
    warmup = settings.warmup_steps
    end = settings.max_steps
    progress = min(1.0, max(0, step - warmup) / max(1, end - warmup))  # 0 to 1, after the warm-up
    if settings.schedule == "cosine":
        height = 0.5 * (1 + math.cos(math.pi * progress))        # from 1 to 0
    elif settings.schedule == "linear":
        height = 1 - progress
    elif settings.schedule == "wsd":  # a long warm-up leaves less than 20 % for the decay
        decay_steps = max(1, min(0.2 * end, end - warmup))
        height = min(1.0, (end - step) / decay_steps)
    else:
        raise UserError(f"--schedule {settings.schedule} has no branch in lr_at, train.py — add it")
    if step < warmup:
        return settings.lr * (step + 1) / warmup
    return settings.min_lr + (settings.lr - settings.min_lr) * height


def rewarming(updates, settings):
    """Factor on the learning rate after --reset_optimizer --rewarm_steps N: it rises to 1 over the
    first N updates that the new moments see; 1 without these flags."""
    return min(1.0, (updates + 1) / max(1, settings.rewarm_steps))


def make_optimizer(model, args, device):
    """AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101, algorithm 2). Matrices decay, also the
    embedding; the vectors of the norms do not."""
    # AdamW keeps two moving averages for every weight, of its gradient and of the gradient's
    # square: twice the size of the model. An update is about lr · average / √(average of squares).
    # In the first update, and again after --resume --reset_optimizer, both come from one gradient:
    # it is divided by its own size, and every weight moves by about lr. What the averages had
    # learned, how far each weight should move, is then lost.
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in trained if p.dim() >= 2]
    vectors = [p for p in trained if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": args.weight_decay},
              {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=args.lr, betas=(args.beta1, args.beta2), eps=1e-8,
                             fused=device.type in ("cuda", "cpu"))  # one kernel for all: faster


def rms_of_change(before, parameters):
    """Root mean square of what an update changed, over all trained weights. before: copies of the
    `parameters` from before it."""
    changes = [p.detach() - old for old, p in zip(before, parameters)]
    norm = sharding.whole(torch.nn.utils.get_total_norm(changes)).item()
    return norm / math.sqrt(sum(p.numel() for p in changes))


# -------------------------------------------------------------------------------------------------
# The run

@script  # a mistake that the user can fix ends in one line
def main(argv=None):
    args = read_settings(argv)  # a wrong flag ends here, before anything is touched
    rank, world, device = start_processes(args)
    is_main = rank == 0
    run = Path(args.run or f"runs/{args.preset}")
    folder = None  # of the checkpoint to resume
    if is_main:
        claim(run, args.resume, args.overwrite)
        if args.resume:
            folder = checkpoint.newest(run)
    folder = from_rank_0(folder)
    state = checkpoint.load(folder)  # restored below; None in a new run
    if state is not None:
        args = read_settings(argv, saved=state["config"])  # again, with the saved values
    args.run = str(run)
    device = use_machine(args, device, world)
    dtype = choose_dtype(args.dtype, device)
    if args.fsdp:
        sharding.check(world, dtype)

    lr_at(0, args)  # a schedule without a formula ends here

    # ---- Data, model, optimizer, precision
    accumulation = accumulation_steps(args, world)
    data, fingerprint = open_data(args, state, is_main)
    windows = Windows(data.train, args.seq_len, data.vocab_size, args.seed, args.shuffle)
    # The weights are fp32. In bf16, with 8 bits of precision, most small updates would round to 0.
    model = make_model(args, state, data.vocab_size, device)
    if args.activation_checkpointing:
        checkpoint_activations(model)
    if args.fsdp:
        sharding.shard(model)
    optimizer = make_optimizer(model, args, device)
    # Autocast runs matrix products in `dtype`; norms, loss and weights stay fp32. bf16 has
    # the range of fp32 and needs nothing else. fp16 has a smaller range: small gradients would
    # become 0. So the scaler multiplies the loss by a factor before the backward, and divides the
    # gradients by it afterwards. If a gradient overflowed, it skips the update and halves the
    # factor.
    autocast = torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    observer = Observer(model, data, args, autocast)  # evaluates and samples

    # `step` counts finished steps, which is also the number of batches consumed (an update that the
    # scaler skips counts too). So the position in the data, in the schedule and in the log is one
    # number, and no resume repeats or skips a batch.
    step = 0
    tokens_seen = 0
    seconds = 0.0      # of training, over all resumes
    updates = 0        # those that the optimizer's moments have seen
    log_length = 0     # what was logged after the checkpoint is cut off
    resumed_at = None  # this step is saved already
    if state is not None:
        checkpoint.restore(state, model, optimizer, scaler, args.reset_optimizer)
        step = state["step"]
        tokens_seen = state["tokens"]
        seconds = state["seconds"]
        updates = 0 if args.reset_optimizer else state["updates"]
        log_length = state["log_bytes"]
        resumed_at = step
    elif args.init_from:
        weights, _ = checkpoint.load_weights(args.init_from)
        checkpoint.check_config(weights["config"], model.config)
        checkpoint.restore_weights(weights, model)
    check_resume(run, state, args)
    code = fast.hashes("model.py", "train.py")
    check_equal({**vars(args), **code, "data in the folder": fingerprint})
    # A run at its last step may still lack its last evaluations: the log says if it is finished.
    finished = from_rank_0(is_main and step == args.max_steps and is_finished(run))
    if finished:
        if is_main:
            print(f"{run} is finished: {step} steps — next: python sample.py {run}")
        return end_processes(0)

    # The formulas of model.py, or what computes the same faster.
    parts, remarks = [], []
    if args.fast:
        compiled = args.max_steps >= COMPILE_FROM if args.compile is None else args.compile
        compiled = compiled and not any_process(not can_compile(device), device)
        if compiled and is_main:
            print("compiling, which takes a while; --no-compile leaves it out", flush=True)
        parts, remarks = fast.use_what_agrees(model, args.micro_batch, args.seq_len, autocast,
                                              compiled, args.activation_checkpointing)
    network = model  # what the loop calls; `model` keeps the plain names
    if world > 1 and not args.fsdp:
        if "blocks" in parts:
            torch._dynamo.config.optimize_ddp = False  # else it cuts the blocks at DDP's buckets
        devices = [device] if device.type == "cuda" else None
        network = DistributedDataParallel(
            model, device_ids=devices,
            gradient_as_bucket_view=True,  # else all gradients are in memory twice
            broadcast_buffers=False)       # they are constants, the same in each process

    # ---- Log. Everything is checked by now: only here is an earlier run deleted.
    settings = {name: value for name, value in vars(args).items() if name not in ONCE}
    env = environment(device, dtype, world, args.micro_batch, parts, code)
    flops = flops_per_token(model.config, args.seq_len)
    if is_main:
        if state is None:
            start_over(run)
        write_json(run / "config.json", {**settings, "fingerprint": fingerprint})
    log = Log(run if is_main else None, log_length, args.max_steps, peak_rate(env, flops))
    log.start(step, state, settings, env, args.reset_optimizer)
    log.say(introduce(args, model, world, accumulation, dtype, device, parts, remarks))
    if state is not None:
        log.say(introduce_resume(args, state, env))
    del state  # its memory is needed

    # ---- The loop
    stop = StopSignals(log)
    start_time = time.monotonic()
    stopping = False
    failure = None
    skipped_in_a_row = 0
    sequences_in_step = args.batch_tokens // args.seq_len
    trained = [p for p in model.parameters() if p.requires_grad]
    while True:
        # Each round does what is due at `step`, then the update to `step` + 1. It ends here: when
        # told to stop, after saving; at the last step, after evaluating. Saving comes first, so
        # that whatever takes long or fails after it loses nothing. Evaluation draws no random
        # numbers and sampling has its own, so doing them more often does not change the training.
        stopping = stopping or step == args.stop_at
        save_now = stopping or due(step, args.save_every, args.max_steps)
        if save_now and step != resumed_at and (is_main or args.fsdp):  # sharded: each has a part
            full = checkpoint.capture(model, optimizer, scaler, step=step, tokens=tokens_seen,
                                      seconds=seconds, config=settings, env=env, data=fingerprint,
                                      updates=updates, log_bytes=log.length())
            if is_main:
                checkpoint.save(run, full, args.keep_last, args.keep_every)
            del full
        if stopping:
            break
        if due(step, args.eval_every, args.max_steps):
            observer.evaluate(step, log)
        if due(step, args.sample_every, args.max_steps):  # each process the same; rank 0 logs it
            observer.sample(step, log)
        if step == args.max_steps:
            break

        # 1. Batch, 2. forward, 3. backward, for each micro-batch of this process.
        start = time.monotonic()
        lr = lr_at(step, args) * rewarming(updates, args)
        targets_in_step = args.batch_tokens  # of all processes
        loss_sum = torch.zeros((), device=device)
        for micro in range(accumulation):
            # The windows of a step are one list, whatever the number of processes. With 2 processes
            # and 2 micro-batches of 4, rank 0 reads 0–3 and 8–11 of it, rank 1 4–7 and 12–15.
            first = step * sequences_in_step + (micro * world + rank) * args.micro_batch
            # A window is T + 1 tokens in a row; a seeded permutation says from where in the text.
            tokens = to_device(windows.read(first, args.micro_batch), device)  # (B, T + 1)
            inputs = tokens[:, :-1]  # (B, T)
            targets = tokens[:, 1:]  # (B, T)
            if world > 1:  # exchange gradients once a step, in the last backward
                sharding.exchange_in_backward(network, micro == accumulation - 1)
            with autocast:
                _, micro_loss = network(inputs, targets, reduction="sum")
            # Gradients add up over micro-batches, so each sum is divided by the targets of the
            # whole step. Take two micro-batches with 10 and 90 targets and mean losses 4 and 2. The
            # mean is (10·4 + 90·2) / 100 = 2.2; the mean of their means would be 3. (Here all have
            # the same number of targets, in sft.py they do not.) DDP and FSDP take the mean over
            # processes where we want the sum: therefore · world.
            scaler.scale(micro_loss * world / targets_in_step).backward()
            loss_sum += micro_loss.detach()

        # 4. Clip. All processes first agree on the loss, and on whether one was told to stop: if
        # only that one left the loop, the others would wait for it for ever.
        loss = sum_over_processes(loss_sum).item() / targets_in_step
        stopping = any_process(stop.requested, device)
        scaler.unscale_(optimizer)  # without fp16 it does nothing
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.grad_clip or math.inf)
        norm = sharding.whole(norm).item()
        overflow = scaler.is_enabled() and not math.isfinite(norm)  # the scaler skips this update
        skipped_in_a_row = skipped_in_a_row + 1 if overflow else 0
        if has_diverged(loss, norm, scaler, skipped_in_a_row):
            failure = f"step {step + 1}: loss {loss}, gradient norm {norm}, lr {lr:.2e}"
            stopping = True
            continue  # without this update: the state before it is good, and is saved above

        # 5. Learning rate, 6. update.
        for group in optimizer.param_groups:
            group["lr"] = lr
        before = [p.detach().clone() for p in trained] if args.log_update_rms else None
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        updates += not overflow

        # 7. Log.
        update_rms = rms_of_change(before, trained) if args.log_update_rms else None
        tokens_in_step = args.batch_tokens  # here every token is a target
        tokens_seen += tokens_in_step
        dt = time.monotonic() - start
        seconds += dt
        log.train(step, tokens_seen, loss, lr, norm, dt, tokens_in_step, skipped=overflow,
                  memory=peak_memory(device), update_rms=update_rms)

    # ---- The end
    stop.restore()
    advice = [f"python sample.py {run} --prompt \"The function\"",
              f"python evaluate.py {run} --step 1", f"python sft.py {run}"]
    return finish(log, run, step, time.monotonic() - start_time, stopping, failure, advice)


# -------------------------------------------------------------------------------------------------
# What the run is made of

def open_data(args, state, is_main):
    """(DataFolder, its fingerprint). Prepares the embedded text if it is absent.

    Raises UserError if the data is damaged, or is not that of the run that is resumed."""
    if is_main and args.data == EMBEDDED and not Path(EMBEDDED).exists():
        from prepare_data import prepare_pydocs
        prepare_pydocs(Path(EMBEDDED), PRESETS["tiny"].vocab_size)
    wait_for_rank_0()
    data = DataFolder(args.data)
    if data.unused and is_main:
        names = ", ".join(file.name for file in data.unused[:5])
        print(f"{args.data}: {len(data.unused)} files are in no split and not used: {names}")
    if state is not None:
        data.check_same(state["data"], "restore it, or choose another --run")
    elif is_main:
        data.check_content()  # every byte, once; a resume compares the fingerprint
    return data, data.fingerprint


def make_model(args, state, vocab_size, device):
    """A network of the preset with new random weights; on a resume one with the saved sizes, to be
    filled by `checkpoint.restore`. Raises UserError if these sizes cannot be used."""
    if state is not None:
        config = checkpoint.read_config(state["model_config"])
        if config.vocab_size != vocab_size:
            raise UserError(f"{args.data} has a vocabulary of {vocab_size}, the model of "
                            f"{config.vocab_size} — restore the data, or choose another --run")
        tokens = state["step"] * args.batch_tokens
        if config.max_seq_len < args.seq_len or state["tokens"] != tokens:
            raise UserError(f"the checkpoint's sizes contradict its settings — "
                            f"{checkpoint.OTHER_STATE}")
        with checkpoint.NoInit():
            model = Llama(config)
        return model.to(device)
    preset = PRESETS[args.preset]
    given = {name: getattr(args, name) for name in SIZES if getattr(args, name) is not None}
    try:
        config = replace(preset, **given, vocab_size=vocab_size, padded_vocab_size=None,
                         max_seq_len=max(preset.max_seq_len, args.seq_len))
    except ValueError as why:
        raise UserError(f"{why} — change --{' or --'.join(given)}") from None
    torch.manual_seed(args.seed)
    return Llama(config).to(device)


def accumulation_steps(args, world):
    """Micro-batches per step of each process. Raises UserError naming batch sizes that fit."""
    unit = args.micro_batch * args.seq_len * world
    if args.batch_tokens % unit != 0:
        below = args.batch_tokens // unit * unit
        near = [str(n) for n in (below, below + unit) if n > 0]
        raise UserError(f"--batch_tokens {args.batch_tokens} is not divisible by micro_batch "
                        f"{args.micro_batch} x seq_len {args.seq_len} x {world} processes = {unit} "
                        f"— use --batch_tokens {' or '.join(near)}, or another --micro_batch")
    return args.batch_tokens // unit


def check_resume(run, state, args):
    """Raise UserError for flags that do not fit the state that is resumed: an end before its step,
    or no state to reset."""
    if state is None:
        if args.reset_optimizer:
            raise UserError(f"{run} has no state to continue without its optimizer — leave out "
                            f"--reset_optimizer")
        return
    for name in ("max_steps", "stop_at"):
        end = getattr(args, name)
        if end is not None and end < state["step"]:
            raise UserError(f"{run} is at step {state['step']} already — give a larger --{name}")


def has_diverged(loss, norm, scaler, skipped_in_a_row):
    """Whether an update must not be made, because the training cannot go on.

    In fp16 a gradient that overflows is normal: the scaler skips the update and halves its factor.
    20 times in a row, or a factor below 1, are not normal, and neither is any other NaN or
    infinity."""
    if scaler.is_enabled():
        return not math.isfinite(loss) or skipped_in_a_row == 20 or scaler.get_scale() < 1
    return not (math.isfinite(loss) and math.isfinite(norm))


# -------------------------------------------------------------------------------------------------
# Settings. What counts is, in this order: a flag on the command line; on --resume the saved value;
# the value of the preset; the default.

# A resume may not change these: it would continue another experiment. What it may change is logged:
# speed, paths, intervals; and max_steps, to train longer, which also moves the learning rate.
EXPERIMENT = ("preset", *SIZES, "init_from", "seed", "batch_tokens", "seq_len", "lr", "min_lr",
              "warmup_steps", "schedule", "weight_decay", "beta1", "beta2", "grad_clip", "shuffle")

# Flags about one start of the script, which are not saved with the run.
ONCE = ("resume", "overwrite", "reset_optimizer", "stop_at")


def add_settings(parser):
    """Settings that train.py and sft.py share. `add` adds a flag to the group above it."""
    yes_or_no = argparse.BooleanOptionalAction
    add = parser.add_argument_group("the run").add_argument
    add("--run", help="folder for the log and the checkpoints")
    add("--seed", type=flags.seed, default=1337, help="of initial weights and data order")
    add("--max_steps", type=flags.count, help="length of the run and of the learning-rate schedule")
    add("--stop_at", type=flags.count_or_0, metavar="STEP", help="save and stop there, like Ctrl-C")
    add("--resume", action="store_true", help="continue the run; start it if it has not begun")
    add("--overwrite", action="store_true", help="delete the run in this folder and start over")
    add("--reset_optimizer", action="store_true", help="on --resume: forget the optimizer's state")
    add("--rewarm_steps", type=flags.count_or_0, default=0,
        help="with --reset_optimizer: let the learning rate rise again over so many steps")

    add = parser.add_argument_group("the machine").add_argument
    add("--device", help="cpu, cuda, cuda:1 …; without it cuda if there is one")
    add("--dtype", choices=("auto", "fp32", "bf16", "fp16"), default="auto",
        help="of matrix products; weights are always fp32")
    add("--deterministic", action=yes_or_no, default=False, help="bitwise on CUDA too; slower")
    add("--fast", action=yes_or_no, default=True, help="use what support/fast.py computes "
        "faster, after comparing it with model.py; --no-fast implies --no-compile")
    add("--threads", type=flags.number(int, 1, 1024), help="CPU threads")
    add("--micro_batch", type=flags.count, default=8,
        help="sequences per forward of one process; changes memory and speed, nothing else")
    add("--activation_checkpointing", action=yes_or_no, default=False, help="compute the inside of "
        "the blocks a second time in the backward, instead of keeping it: less memory, slower")

    add = parser.add_argument_group("learning rate and optimizer").add_argument
    add("--lr", type=flags.positive_or_0, default=6e-4, help="peak learning rate")
    add("--min_lr", type=flags.positive_or_0, help="final learning rate; without it lr / 10")
    add("--warmup_steps", type=flags.count_or_0, default=715, help="linear rise to the peak")
    add("--schedule", choices=("cosine", "linear", "wsd"), default="cosine", help="the decay")
    add("--weight_decay", type=flags.positive_or_0, default=0.1, help="of matrices, not of vectors")
    add("--beta1", type=flags.below_1, default=0.9, help="AdamW's memory of the gradient")
    add("--beta2", type=flags.below_1, default=0.95, help="AdamW's memory of its square")
    add("--grad_clip", type=flags.positive_or_0, default=1.0,
        help="largest gradient norm; 0: no limit")
    add("--log_update_rms", action=yes_or_no, default=False,
        help="log how far a step moves the weights (root mean square); needs a copy of them")

    interval = "steps between (always at 0, 1, 2, 4, 8 … and at the end too; 0: only there)"
    add = parser.add_argument_group(interval).add_argument
    add("--eval_every", type=flags.count_or_0, default=250, help="evaluations")
    add("--sample_every", type=flags.count_or_0, default=1000, help="samples")
    add("--save_every", type=flags.count_or_0, default=500, help="full checkpoints")
    add("--keep_every", type=flags.count_or_0, default=5000, help="weights that are kept for ever")
    add("--keep_last", type=flags.number(int, 2, 1000), default=2,
        help="how many full ones are kept")

    add = parser.add_argument_group("evaluation").add_argument
    add("--benchmark", help="questions in HellaSwag's format; without it the data's cloze.jsonl")
    add("--benchmark_items", type=flags.count, help="use only so many of them, the first")


def read_settings(argv, saved=None):
    """The command line as a namespace; saved: the settings of the run that is resumed.

    Raises UserError for a value that makes no sense, and for one that would change the
    experiment."""
    # First only --preset, because the other defaults depend on it.
    preset_parser = flags.Parser(add_help=False)
    preset_parser.add_argument("--preset", choices=PRESETS, default="tiny", help="size of the "
                               "model and its settings; --help shows those of the given preset")
    preset = preset_parser.parse_known_args(argv)[0].preset
    if saved is not None and saved.get("preset") in list(PRESETS):
        preset = saved["preset"]

    parser = flags.Parser(description=__doc__.split("\n")[0], parents=[preset_parser])
    add_settings(parser)
    add = parser.add_argument_group("pretraining").add_argument
    add("--data", default="data/fineweb-edu", help="folder from prepare_data.py, or shards of "
        "nanoGPT, build-nanogpt, llm.c")
    add("--init_from", metavar="RUN", help="start from the weights of this run")
    add("--batch_tokens", type=flags.count, default=524_288,
        help="tokens per step, over all processes")
    add("--seq_len", type=flags.count, default=1024, help="tokens per sequence")
    add("--shuffle", action=argparse.BooleanOptionalAction, default=True,
        help="read windows in a new random order each epoch; else in file order")
    add("--eval_tokens", type=flags.count, default=10_485_760,
        help="validation tokens per evaluation")
    add("--sample_prompt", type=flags.text, default="The", help="what the samples continue")
    add("--fsdp", action=argparse.BooleanOptionalAction, default=False, help="under torchrun: each "
        "process keeps a part of weights, gradients and moments; less memory")
    add("--compile", action=argparse.BooleanOptionalAction, help="torch.compile blocks and "
        f"loss; if not given, in runs of {COMPILE_FROM} steps and more")
    add = parser.add_argument_group("sizes of the network, other than the preset's").add_argument
    for name in SIZES:
        kind = type(getattr(PRESETS[preset], name))
        if kind is bool:
            add(f"--{name}", action=argparse.BooleanOptionalAction)
        else:
            add(f"--{name}", type=flags.count if kind is int else kind)
    if saved is None:
        parser.set_defaults(**BY_PRESET[preset])
    return finish_settings(parser, argv, saved, EXPERIMENT)


def finish_settings(parser, argv, saved, experiment):
    """Parse; on a resume the saved settings are the defaults, and `experiment` must not differ.

    A flag that is newer than the run has its own default, which `saved` gets too: what a preset
    gives today is not what the run had."""
    if saved is not None:
        known = vars(parser.parse_args([]))
        unknown = sorted(saved.keys() - known.keys())
        if unknown:
            raise UserError(f"this run was made by another script or by another version of this "
                            f"code, with settings that are unknown here ({', '.join(unknown[:5])}) "
                            f"— continue it with that one, or start a new run from its weights: "
                            f"train.py --init_from")
        newer = {name: value for name, value in known.items()
                 if name not in saved and name not in ONCE}
        if newer:
            remark(f"the run does not have the settings {checkpoint.as_text(newer)}: the default "
                   f"is used")
        saved.update(newer)
        parser.set_saved(saved)
    args = parser.parse_args(argv)
    if args.resume and args.overwrite:
        raise UserError("--resume continues and --overwrite starts over — give one of them")
    if args.reset_optimizer and not args.resume:
        raise UserError("--reset_optimizer is for --resume — give both")
    rewarmed_before = 0 if saved is None else saved["rewarm_steps"]
    if args.rewarm_steps != rewarmed_before and not args.reset_optimizer:
        raise UserError("--rewarm_steps is for --resume --reset_optimizer — give all three")
    if args.min_lr is None:
        args.min_lr = args.lr / 10
    if saved is not None:
        given = vars(args)
        differ = [f"{name} (saved {saved[name]}, given {given[name]})" for name in experiment
                  if given[name] != saved[name]]
        if differ:
            raise UserError(f"not the run that was saved: {', '.join(differ)} — leave these flags "
                            f"out, or choose another --run")
    return args


# -------------------------------------------------------------------------------------------------
# What it prints

def introduce(args, model, world, accumulation, dtype, device, parts, remarks):
    """What is about to happen: the model, the arithmetic of a batch, the first loss to expect."""
    config = model.config
    parameters = sum(p.numel() for p in model.parameters())
    kv = kv_bytes_per_token(config)
    ungrouped = kv_bytes_per_token(replace(config, n_kv_heads=config.n_heads))
    gigaflops = flops_per_token(config, args.seq_len) / 1e9
    uniform = math.log(config.padded_vocab_size)
    # The forward is a third of the arithmetic of a training step.
    steps_per_evaluation = args.eval_tokens / 3 / args.batch_tokens
    return "\n".join([
        f"model   {args.preset}: {parameters:,} parameters, {config.n_layers} layers of "
        f"{config.dim}, {config.n_heads} query heads on {config.n_kv_heads} key/value: KV cache "
        f"{kv:,} bytes/token, not {ungrouped:,}",
        f"batch   {args.batch_tokens:,} tokens/step = {args.micro_batch} sequences x "
        f"{args.seq_len} tokens x {accumulation} accumulation x {world} process(es); "
        f"{args.max_steps:,} steps",
        f"eval    {args.eval_tokens:,} tokens each time (--eval_every {args.eval_every}), which is "
        f"the arithmetic of {steps_per_evaluation:.1f} training steps",
        f"device  {device}, {str(dtype).removeprefix('torch.')}, {gigaflops:.3f} GFLOP/token",
        *introduce_parts(parts, remarks),
        f"expect  a first loss near ln {config.padded_vocab_size:,} = {uniform:.2f}: any next "
        f"token equally likely"])


def introduce_parts(parts, remarks):
    """Lines: what support/fast.py computes in the place of model.py, and what not and why."""
    yield f"fast    {', '.join(parts) or 'nothing: all is computed as model.py says'}"
    for remark in remarks:
        yield f"        {remark}"


UNKNOWN = "(not recorded)"  # in a run of older code


def introduce_resume(args, state, env):
    """Where the run continues, and what differs from when it was saved."""
    step = state["step"]
    before = {**state["config"], "fast": UNKNOWN, **state["env"]}
    changed = []
    for name, value in {**vars(args), **env}.items():
        old = before.get(name, UNKNOWN)
        if name in ONCE or old == value:
            continue
        is_code = name.endswith(".py")
        changed.append(f"{name} (edited)" if is_code and old != UNKNOWN else
                       f"{name} {shown(old)} → {shown(value)}")
    lr_before = lr_at(step, argparse.Namespace(**state["config"]))
    optimizer = "without" if args.reset_optimizer else "with"
    rewarmed = ""
    if args.reset_optimizer and args.rewarm_steps > 0:
        rewarmed = f", after {args.rewarm_steps} steps in which it rises"
    return "\n".join([
        f"resume  at step {step}, {optimizer} the optimizer's state; lr {lr_before:.2e} as saved, "
        f"{lr_at(step, args):.2e} now{rewarmed}",
        f"        changed since it was saved: {', '.join(changed) or 'nothing'}"])


def finish(log, run, step, seconds, stopping, failure, advice):
    """The last row of the log, the figure, the last lines on the screen; returns the exit code.
    seconds: since this start of the script. Raises UserError with code 3 after a failure."""
    wait_for_rank_0()  # which may still be saving
    reason = "done"
    if stopping:
        reason = "stopped"
    if failure is not None:
        reason = "diverged"
    log.event("end", step, reason=reason, seconds=seconds)
    if failure is not None:
        raise UserError(f"{failure}; this update was not made, and the state before it is saved — "
                        f"try a lower --lr in another --run", code=3)
    if stopping:
        log.say(f"stopped and saved at step {step} — continue with the same command and --resume")
        return end_processes(75)
    if log.file is not None:  # on rank 0
        draw(run)
    log.say(f"done: {step} steps, {seconds / 60:.1f} minutes. What to try next:")
    for command in advice:
        log.say(f"  {command}")
    return end_processes(0)


def draw(run):
    """dynamics.png and trajectory.md. If that fails it says why; the run is done all the same."""
    try:
        import plot_dynamics
        plot_dynamics.main([str(run), "--out", str(run)])
    except SystemExit:  # as a script ends; its message is on the screen
        pass
    except Exception as error:  # of matplotlib: say, a backend that this machine lacks
        print(f"warning: the figure was not drawn: {error}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
