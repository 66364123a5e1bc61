"""train.py — pretrain a LLaMA. The loop is written out, without a trainer.

Read it from top to bottom: the learning rate, the optimizer, the loop, and what
`main` puts together for it. The rest can wait: settings, and the texts on the
screen. sft.py uses the same loop with other batches and another observer, the
object that evaluates and samples.

    python train.py                  # tiny, on the manuals of your Python
    python train.py --resume         # after Ctrl-C: as if it had not stopped
    python train.py --preset 1.7b    # the paper's run (arXiv 2412.13335)
    torchrun --standalone --nproc_per_node=8 -- train.py --preset 1.7b

Exit codes: 0 done, 2 bad usage, config or data, 3 the loss became NaN or infinite,
4 a checkpoint or the log could not be written, 75 stopped and saved: run again
with --resume.
"""
import argparse
import math
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import support.cpu  # before torch, which reads its settings once
import torch

import checkpoint
from checkpoint import Progress
from data import DataFolder, Windows
from evaluate import Observer
from model import PRESETS, Llama, flops_per_token
from support import durable, fast, flags, sharding
from support.devices import (
    StopSignals, any_process, check_equal, end_processes, environment, from_rank_0,
    peak_memory, peak_rate, processes, remark, say, start_processes, sum_over_processes,
    to_device, use_machine, wait_for_rank_0)
from support.files import write_json
from support.memory import checkpoint_activations
from support.runs import (
    Log, UserError, as_text, changes, claim, due, is_finished, quoted, script, start_over)

EMBEDDED = "data/pydocs"  # text that every computer with Python has; prepared when it is missing

# What a preset changes. A flag on the command line wins over it; the other defaults are below.
BY_PRESET = {
    # Small batches have noisy gradients: with beta2 0.99 AdamW averages their squares over about
    # 100 steps, with 0.95 over about 20. docs/tiny.md tells how these were chosen.
    "tiny": dict(data=EMBEDDED, max_steps=3900, batch_tokens=1024, seq_len=128, lr=2e-3, min_lr=0.0,
                 warmup_steps=100, schedule="wsd", beta2=0.99, eval_every=1024, eval_tokens=24_576,
                 benchmark_items=320, sample_every=0, sample_prompt="The function returns",
                 keep_every=0),
    "124m": dict(max_steps=19_073),
    # Saving 20 GB takes as long as some dozen steps on 8 GPUs, so it is done less often.
    "978m": dict(max_steps=38_147, save_every=1000),
    "1.7b": dict(max_steps=38_147, save_every=1000),  # the paper's: 20B tokens
}

# The fields of ModelConfig that a flag can change.
SIZES = ("dim", "n_layers", "n_heads", "n_kv_heads", "intermediate_size")

COMPILE_FROM = 500  # steps; compiling takes 10 to 20 s, more than it saves in a shorter run


# -------------------------------------------------------------------------------------------------
# The learning rate and the optimizer

def lr_at(step, settings):
    """Learning rate of the update from `step` to `step` + 1: a linear warm-up to lr, then by
    --schedule. cosine (Loshchilov & Hutter 2017, arXiv 1608.03983, eq. 5) and linear fall to min_lr
    from the end of the warm-up on. wsd (Hu et al. 2024, arXiv 2404.06395, §4) stays at lr and falls
    in the last part of the run: here along a line, in the last 20 % of the steps.

    A pure function of its arguments, so a resume does not change the rate. Another --max_steps
    does: step 3,900 is the end of a run of 3,900 steps, where the rate has fallen to 0, but half of
    one of 7,800, where wsd is still at its peak."""
    warmup = settings.warmup_steps
    end = settings.max_steps
    done = min(1.0, max(0, step - warmup) / max(1, end - warmup))  # of what follows the warm-up
    if settings.schedule == "cosine":
        height = 0.5 * (1 + math.cos(math.pi * done))            # from 1 to 0
    elif settings.schedule == "linear":
        height = 1 - done
    elif settings.schedule == "wsd":
        decay_steps = max(1, min(0.2 * end, end - warmup))       # less if the warm-up is long
        height = min(1.0, (end - step) / decay_steps)
    else:
        raise UserError(f"--schedule {settings.schedule} has no branch in lr_at, train.py — use "
                        f"cosine, linear or wsd, or add it there")
    if step < warmup:
        return settings.lr * (step + 1) / warmup
    return settings.min_lr + (settings.lr - settings.min_lr) * height


def rewarming(updates, settings):
    """Factor on the learning rate: 1, except after --reset_optimizer --rewarm_steps N, where it
    rises from 1 / N to 1 over the first N updates of the new moments."""
    return min(1.0, (updates + 1) / max(1, settings.rewarm_steps))


def make_optimizer(model, args, device):
    """AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101, algorithm 2). Weight decay applies to
    matrices, also to the embedding, and not to the vectors of the norms."""
    # AdamW keeps two moving averages for every weight, of its gradient and of the gradient's
    # square: twice the size of the model. An update is about lr · average / √(average of squares).
    # In the first update, and again after --resume --reset_optimizer, both averages come from one
    # gradient g: corrected for their start at 0 they are g and g², and the update is lr · g / √g² =
    # ± lr. Every weight that has a gradient moves by lr, be it large or tiny. What a reset loses is
    # what the averages had learned: how far each weight should move.
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in trained if p.dim() >= 2], "weight_decay": args.weight_decay},
              {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=args.lr, betas=(args.beta1, args.beta2), eps=1e-8,
                             fused=device.type in ("cuda", "cpu"))  # one kernel for all: faster


def rms_of_change(before, parameters):
    """Root mean square of what an update changed, over all trained weights. before: copies of the
    `parameters` from before it."""
    moved = [p.detach() - old for old, p in zip(before, parameters)]
    norm = sharding.whole(torch.nn.utils.get_total_norm(moved)).item()
    return norm / math.sqrt(sum(p.numel() for p in moved))


# -------------------------------------------------------------------------------------------------
# The loop. torchrun starts `world` copies of this script, one for each GPU, and each has a number,
# its rank. All hold the same weights and read other windows; in the backward they average their
# gradients (DDP). With one process rank is 0 and world is 1: at the first reading assume that.

@dataclass
class Batch:
    """The data of one step."""
    micro_batches: list  # of this process, for one forward each: (inputs, targets), both (B, T)
    targets: int         # number of targets that count, over all processes
    tokens: int          # number of tokens, over all processes: for the log


@dataclass
class Prepared:
    """A model and what the loop needs to train it; `prepare` makes it."""
    model: Llama
    network: torch.nn.Module  # what the loop calls: `model`, or DDP around it
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    autocast: torch.autocast
    progress: Progress
    saved_at: int | None      # step of the newest state on the disk; None without one
    parts: list               # names of what support/fast.py computes


def has_diverged(loss, norm, scaler, skipped_in_a_row):
    """Whether an update must not be made, because the training cannot go on: the loss or the
    gradient norm is NaN or infinite.

    In fp16 an infinite norm now and then is expected: a gradient overflowed, and the scaler skips
    the update and halves its factor. 20 skipped updates in a row, or a factor below 1, mean that
    the run has diverged."""
    if scaler.is_enabled():
        return not math.isfinite(loss) or skipped_in_a_row == 20 or scaler.get_scale() < 1
    return not (math.isfinite(loss) and math.isfinite(norm))


def train(run, args, machine, prepared, constants, read_step, observer, log):
    """Train up to --max_steps, or until told to stop; returns whether it was told to stop.

    read_step(step) gives the Batch of the update from `step` to `step` + 1. All processes have the
    same number of micro-batches. constants: for checkpoint.capture. observer: evaluates and
    samples. Raises UserError with code 3 if the loss or a gradient becomes NaN or infinite, after
    saving the state before that update."""
    model = prepared.model
    scaler = prepared.scaler
    progress = prepared.progress
    trained = [p for p in model.parameters() if p.requires_grad]
    # Each group's own rate divided by --lr: 1 here, another number if you give a group its own.
    shares = [group["lr"] / args.lr for group in prepared.optimizer.param_groups]
    stop = StopSignals(log)
    skipped_in_a_row = 0

    def save():
        """Save the state, unless it is on the disk already. All processes take part.

        After the second update the saved state is also loaded, as a resume would do it, and
        compared. (Not after the first: loading makes one update itself, see checkpoint.make_state,
        so a counter that was lost would be 1 all the same.)"""
        if progress.step == prepared.saved_at:
            return
        state = checkpoint.capture(model, prepared.optimizer, scaler, progress, **constants,
                                   log_bytes=log.length())
        checkpoint.save(run, state, args.keep_last, args.keep_every)
        prepared.saved_at = progress.step
        if progress.updates == 2:
            del state  # it holds the moments, and there may be no memory for them twice
            new = make_optimizer(model, args, machine.device)
            checkpoint.read_back(run, progress.step, model, prepared.optimizer, new, scaler)
            prepared.optimizer = new

    def do_what_is_due(told_to_stop):
        """Save, evaluate, sample, in this order, if that is due: at steps 0, 1, 2, 4, 8 … (early
        learning is fast), at multiples of the interval, and at the last. Returns whether to stop.

        Saving is first, so a kill in an evaluation loses no step. A stop saves and does not
        evaluate: the resumed run does that first. None of the three draws from the run's random
        numbers, so how often they are done does not change the training."""
        step = progress.step
        stops_here = told_to_stop or step == args.stop_at
        to_be_proven = progress.updates == 2  # see `save`
        if stops_here or to_be_proven or due(step, args.save_every, args.max_steps):
            save()
        if not stops_here and due(step, args.eval_every, args.max_steps):
            observer.evaluate(step, log)
        if not stops_here and due(step, args.sample_every, args.max_steps):
            observer.sample(step, log)
        return stops_here

    stopping = do_what_is_due(told_to_stop=False)
    while progress.step < args.max_steps and not stopping:
        # 1. Batch. Then, for each micro-batch of this process, 2. forward, 3. backward.
        start = time.monotonic()
        lr = lr_at(progress.step, args) * rewarming(progress.updates, args)
        batch = read_step(progress.step)
        loss_sum = torch.zeros((), device=machine.device)
        for micro, (inputs, targets) in enumerate(batch.micro_batches):
            inputs = to_device(inputs, machine.device)    # (B, T)
            targets = to_device(targets, machine.device)  # (B, T)
            # In the last backward of a step, and only there, processes exchange their gradients.
            sharding.exchange_in_backward(prepared.network, micro == len(batch.micro_batches) - 1)
            with prepared.autocast:
                _, micro_loss = prepared.network(inputs, targets, reduction="sum")
            # The loss of a step is the mean over all its targets. So each micro-batch gives its
            # sum, divided by the targets of the whole step, and the gradients add up. In sft.py two
            # micro-batches may have 10 targets with mean loss 4 and 90 with 2: the mean of all is
            # 2.2, the mean of their means 3. DDP divides by `world`; · world cancels that.
            scaler.scale(micro_loss * machine.world / batch.targets).backward()
            loss_sum += micro_loss.detach()

        # 4. Clip. First all processes agree on the loss, and on whether one of them was told to
        # stop. (If only that one left the loop, the others would wait for it for ever.)
        loss = sum_over_processes(loss_sum).item() / batch.targets
        told_to_stop = any_process(stop.requested, machine.device)
        optimizer = prepared.optimizer
        scaler.unscale_(optimizer)  # without fp16 it does nothing
        limit = args.grad_clip or math.inf  # 0: no limit
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), limit)  # that before clipping
        norm = sharding.whole(norm).item()  # with --fsdp each process has a part
        overflow = scaler.is_enabled() and not math.isfinite(norm)  # the scaler skips this update
        skipped_in_a_row = skipped_in_a_row + 1 if overflow else 0
        if has_diverged(loss, norm, scaler, skipped_in_a_row):
            save()  # the state before this update, which is good
            log.end(progress.step, "diverged")
            wait_for_rank_0()  # until it has saved
            raise UserError(f"step {progress.step + 1}: loss {loss}, gradient norm {norm}, lr "
                            f"{lr:.2e}; this update was not made, and the state before it is saved "
                            f"— try a lower --lr in another --run", code=3)

        # 5. Learning rate, 6. update.
        for group, share in zip(optimizer.param_groups, shares):
            group["lr"] = lr * share
        before = [p.detach().clone() for p in trained] if args.log_update_rms else None
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        # `step` counts finished steps, which is also the number of batches consumed (an update that
        # the scaler skips counts too). So the position in the data, in the schedule and in the log
        # is one number, and no resume repeats or skips a batch.
        progress.step += 1
        progress.tokens += batch.tokens
        if not overflow:
            progress.updates += 1

        # 7. Log, 8. what is due now.
        update_rms = rms_of_change(before, trained) if args.log_update_rms else None
        seconds = time.monotonic() - start
        progress.seconds += seconds
        log.train(progress.step, progress.tokens, loss, lr, norm, seconds, batch.tokens,
                  skipped=overflow, memory=peak_memory(machine.device), update_rms=update_rms)
        stopping = do_what_is_due(told_to_stop)

    stop.restore()
    log.end(progress.step, "stopped" if stopping else "done")
    return stopping


# -------------------------------------------------------------------------------------------------
# The run

@script  # a mistake that the user can fix ends in one line
def main(argv=None):
    run, args, machine, state = open_run(argv, read_settings)
    if is_finished(run, state, args.max_steps):
        say(f"{run} is finished: {args.max_steps} steps — next: python sample.py {quoted(run)}")
        return end_processes(0)
    data = open_data(args.data, state)
    windows = Windows(data.train, args.seq_len, data.vocab_size, args.seed, args.shuffle)
    epochs = args.max_steps * args.batch_tokens / (windows.total * args.seq_len)
    say(f"data    {args.data}: {windows.total:,} windows of {args.seq_len} tokens; the run reads "
        f"each {epochs:.2f} times")
    code = fast.hashes("model.py", "train.py")
    # All processes must have the same settings, code and data.
    check_equal({**vars(args), **code, "data in the folder": data.fingerprint})
    model = make_model(args, state, data.vocab_size).to(machine.device)
    if args.fsdp:
        sharding.shard(model, machine)
    compiled = args.max_steps >= COMPILE_FROM if args.compile is None else args.compile
    prepared = prepare(args, state, model, machine, args.seq_len, compiled)
    observer = Observer(model, data, args, prepared.autocast)
    constants, log = begin(run, args, machine, state, prepared, code, data.fingerprint)
    log.peak_rate = peak_rate(constants["env"], flops_per_token(model.config, args.seq_len))
    log.say(introduce(args, model, machine.world))
    del state  # it may be as large as the model and its moments

    sequences = args.batch_tokens // args.seq_len  # of a step

    def read_step(step):
        # A window is T + 1 tokens in a row; a seeded permutation decides where in the text it is.
        # The windows of a step have numbers, whatever the number of processes. Of 16, with 2
        # processes and micro-batches of 4, rank 0 reads 0–3 and 8–11, rank 1 4–7 and 12–15.
        micro_batches = []
        per_forward = machine.world * args.micro_batch  # of all processes
        for first in range(machine.rank * args.micro_batch, sequences, per_forward):
            tokens = windows.read(step * sequences + first, args.micro_batch)  # (B, T + 1)
            micro_batches.append((tokens[:, :-1], tokens[:, 1:]))
        return Batch(micro_batches, targets=args.batch_tokens, tokens=args.batch_tokens)

    stopped = train(run, args, machine, prepared, constants, read_step, observer, log)
    return finish(run, log, prepared.progress.step, stopped, advice=[
        "python sample.py {run} --prompt \"The function\"",
        "python evaluate.py {run} --step 1", "python sft.py {run}"])


def open_run(argv, read_settings):
    """(run folder, settings, Machine, state to resume or None). Until the script ends, no other
    process can use the run folder. Raises UserError."""
    args = read_settings(argv)  # a wrong flag ends the script here, before anything is touched
    device = start_processes(args.device)
    run = Path(args.run)
    folder = None  # of the checkpoint to resume
    if processes()[0] == 0:
        claim(run, args.resume, args.overwrite)
        if args.resume:
            folder = durable.newest(run)
    state = checkpoint.load(from_rank_0(folder))
    if args.resume and state is None:
        say(f"{run} has nothing to resume, so it begins")
    if state is not None:
        args = read_settings(argv, saved=state["config"])  # again, with the saved values
    args.run = str(run)
    machine = use_machine(args, device)
    flags.check_together(args, state, machine.world)
    return run, args, machine, state


def open_data(path, state):
    """The DataFolder. Prepares the embedded text if it is absent. Raises UserError if the data is
    damaged, or is not that of the run that is resumed."""
    rank, _ = processes()
    if rank == 0 and path == EMBEDDED and not Path(EMBEDDED).exists():
        from prepare_data import prepare_pydocs
        prepare_pydocs(Path(EMBEDDED), PRESETS["tiny"].vocab_size)
    wait_for_rank_0()
    data = DataFolder(path)
    if state is not None:
        data.check_same(state["data"], "restore it, or choose another --run")
    elif rank == 0:
        data.check_content()  # every byte, at the start of a run; a resume compares fingerprints
    return data


def make_model(args, state, vocab_size):
    """A network of the preset, with new random weights or those of --init_from; on a resume one
    with the saved sizes, to be filled. Raises UserError if these sizes cannot be used."""
    sizes = {name: getattr(args, name) for name in SIZES if getattr(args, name) is not None}
    sizes["vocab_size"] = vocab_size
    if state is not None:
        config = checkpoint.read_config(state["model_config"])
        check_sizes(config, sizes, args.run)
        if config.max_seq_len < args.seq_len:
            raise UserError(f"{args.run} has windows of {config.max_seq_len} tokens, and --seq_len "
                            f"is {args.seq_len} — use the code that wrote it")
        return checkpoint.empty_model(config)
    config = PRESETS[args.preset]
    padded = None  # ModelConfig rounds vocab_size up
    if args.init_from:
        weights, _ = checkpoint.load_weights(args.init_from)
        config = checkpoint.read_config(weights["config"])
        padded = config.padded_vocab_size
        check_sizes(config, sizes, args.init_from)
    try:
        config = replace(config, **sizes, padded_vocab_size=padded,
                         max_seq_len=max(config.max_seq_len, args.seq_len))
    except ValueError as why:
        raise UserError(f"{why} — give other sizes") from None
    torch.manual_seed(args.seed)
    model = Llama(config)
    if args.init_from:
        checkpoint.restore_weights(weights, model)
    return model


def check_sizes(config, sizes, run):
    """Raise UserError unless the weights of `run` have these sizes. Their shapes do not tell all:
    vocabularies may be padded to the same size."""
    for name, value in sizes.items():
        if getattr(config, name) != value:
            raise UserError(f"{run} has {name} {getattr(config, name)}, here {value} — its weights "
                            f"tell the sizes: leave out other flags, and prepare the text with its "
                            f"--vocab_size")


def prepare(args, state, model, machine, T, compiled=False):
    """Prepare a model for the loop, and restore the state; returns Prepared. T: tokens of the
    longest sequence. compiled: whether support/fast.py may compile the blocks."""
    lr_at(0, args)  # an unknown schedule fails here, not in the loop
    if args.activation_checkpointing:
        checkpoint_activations(model)
    optimizer = make_optimizer(model, args, machine.device)
    # The weights are fp32. In bf16, with 8 bits of precision, most small updates would round to 0.
    # Autocast runs matrix products in machine.dtype; norms, loss and weights stay fp32. bf16 has
    # the range of fp32 and needs nothing else. fp16 has a smaller range: small gradients would
    # become 0. So the scaler multiplies the loss by a factor before the backward, and divides the
    # gradients by it afterwards. If a gradient overflowed, it skips the update and halves the
    # factor.
    kind = machine.device.type
    autocast = torch.autocast(kind, dtype=machine.dtype, enabled=machine.dtype != torch.float32)
    scaler = torch.amp.GradScaler(kind, enabled=machine.dtype == torch.float16)
    progress = Progress()
    saved_at = None
    if state is not None:
        progress = checkpoint.restore(state, model, optimizer, scaler, args.reset_optimizer)
        saved_at = progress.step
    parts = []
    if args.fast:  # code that computes the same as model.py, faster
        parts = fast.use_what_agrees(model, args.micro_batch, T, autocast, compiled,
                                     args.activation_checkpointing)
    network = sharding.replicate(model, machine, compiled="blocks" in parts)
    return Prepared(model, network, optimizer, scaler, autocast, progress, saved_at, parts)


def begin(run, args, machine, state, prepared, code, fingerprint):
    """Begin or go on in the run folder: write config.json, open the log and introduce the run.
    Returns (what checkpoint.capture saves besides, Log). Deletes an earlier run in the folder, so
    all checks must be made before. code: {file: hash of its text}."""
    settings = {name: value for name, value in vars(args).items() if name not in flags.ONCE}
    env = environment(machine, args.micro_batch, prepared.parts, code)
    if machine.is_main:
        if state is None:
            start_over(run)
        # Settings of sft.py have a fingerprint already: that of its base's data.
        write_json(run / "config.json", {"fingerprint": fingerprint, **settings})
    length = 0 if state is None else state["log_bytes"]  # what was logged later is cut off
    log = Log(run if machine.is_main else None, length, args.max_steps)
    if machine.is_main and state is not None:
        durable.set_aside_newer(run, state["step"])
    log.start(prepared.progress.step, state, settings, env, args.reset_optimizer)
    log.say(f"device  {machine.device}, {env['dtype']}")
    if state is not None:
        log.say(introduce_resume(args, state, env))
    return {"config": settings, "env": env, "data": fingerprint}, log


def finish(run, log, step, stopped, advice):
    """Draw a run that is done, and print the last lines. Returns the exit code. advice: lines, what
    to try next."""
    if stopped:
        log.say(f"stopped and saved at step {step} — continue with the same command and --resume")
        return end_processes(75)
    if log.file is not None:  # on rank 0
        draw(run)
    log.say(f"done: {step} steps, {log.minutes():.1f} minutes. What to try next:")
    log.say("\n".join(f"  {line.format(run=quoted(run))}" for line in advice))
    return end_processes(0)


def draw(run):
    """Draw the figures and trajectory.md. If that fails, print why: the run is done all the
    same."""
    try:
        import plot_dynamics
        plot_dynamics.main([str(run), "--out", str(run)])
    except SystemExit:  # it has printed what is wrong
        pass
    except Exception as error:  # of matplotlib: say, a backend that this machine lacks
        print(f"warning: the figure was not drawn: {error}", file=sys.stderr)


# -------------------------------------------------------------------------------------------------
# Settings. Each is taken from the first of these that has it: a flag on the command line, on
# --resume the saved run, the preset, the default.

def read_settings(argv, saved=None):
    """The command line as a namespace; saved: the settings of the run that is resumed.

    Raises UserError for a value that makes no sense, and for one that would change the
    experiment."""
    # First only --preset, because the other defaults depend on it.
    preset_parser = flags.Parser(add_help=False)
    preset_parser.add_argument("--preset", choices=PRESETS, default="tiny", help="size of the "
                               "model and its settings; --help shows those of the given preset")
    preset = preset_parser.parse_known_args(argv)[0].preset
    parser = flags.Parser(description=__doc__.split("\n")[0], parents=[preset_parser])
    flags.add_settings(parser)
    add = parser.add_argument_group("pretraining").add_argument
    add("--data", default="data/fineweb-edu", help="folder from prepare_data.py")
    add("--init_from", metavar="RUN", help="start from the weights of this run, which also tell "
        "the sizes of the network; --preset then gives the other settings")
    add("--batch_tokens", type=flags.count, default=524_288,
        help="tokens per step, over all processes")
    add("--seq_len", type=flags.count, default=1024, help="tokens per sequence")
    add("--shuffle", action=argparse.BooleanOptionalAction, default=True,
        help="read windows in a new random order each epoch; else in file order")
    add("--eval_tokens", type=flags.count, default=10_485_760,
        help="validation tokens per evaluation")
    add("--benchmark_from", type=flags.count_or_0, default=100, metavar="STEP",
        help="no questions before: a new network can only guess")
    add("--sample_prompt", type=flags.text, default="The", help="what the samples continue")
    add("--fsdp", action=argparse.BooleanOptionalAction, default=False, help="under torchrun: each "
        "process keeps a part of weights, gradients and moments; less memory")
    add("--compile", action=argparse.BooleanOptionalAction, help="torch.compile blocks and "
        f"loss; if not given, in runs of {COMPILE_FROM} steps and more")
    add = parser.add_argument_group("sizes of the network, other than the preset's").add_argument
    for name in SIZES:
        flags.add_value(add, name, getattr(PRESETS[preset], name))
    if saved is None:
        parser.set_defaults(**BY_PRESET[preset])
    args = parse_settings(parser, argv, saved)
    args.run = args.run or f"runs/{args.preset}"
    return args


def parse_settings(parser, argv, saved):
    """Parse. On a resume the saved settings are the defaults. If a flag is newer than the saved
    run, the run was trained as if it had the flag's default: so that is used, not the preset's."""
    if saved is not None:
        newer = parser.set_saved(saved)
        if newer:
            remark(f"the run does not have the settings {as_text(newer)}: the default is used")
    args = parser.parse_args(argv)
    if args.min_lr is None:
        args.min_lr = args.lr / 10
    return args


# -------------------------------------------------------------------------------------------------
# What it prints

def introduce(args, model, world):
    """What is about to happen: the model, the arithmetic of a batch, the first loss to expect."""
    config = model.config
    accumulation = args.batch_tokens // (args.micro_batch * args.seq_len * world)
    flops = flops_per_token(config, args.seq_len)
    total = args.max_steps * args.batch_tokens * flops
    return "\n".join([
        f"model   {args.init_from or args.preset}: "
        f"{sum(p.numel() for p in model.parameters()):,} parameters, {config.n_layers} layers of "
        f"{config.dim}, {config.n_heads} query heads, {config.n_kv_heads} key/value",
        f"batch   {args.batch_tokens:,} tokens = {args.micro_batch} sequences x {args.seq_len} x "
        f"{accumulation} accumulation x {world} process(es)",
        f"run     {args.max_steps:,} steps x {args.batch_tokens:,} tokens x {flops / 1e9:.3f} "
        f"GFLOP = {total / 1e12:,.0f} TFLOP",
        f"expect  of random weights a loss near ln {config.padded_vocab_size:,} = "
        f"{math.log(config.padded_vocab_size):.2f}: all tokens equally likely"])


def introduce_resume(args, state, env):
    """Where the run continues, and what differs from when it was saved."""
    step = state["step"]
    optimizer = "without" if args.reset_optimizer else "with"
    saved = argparse.Namespace(**state["config"])
    updates = state["updates"]
    before = lr_at(step, saved) * rewarming(updates, saved)
    now = lr_at(step, args) * rewarming(0 if args.reset_optimizer else updates, args)
    changed = changes({**state["config"], **state["env"]}, {**vars(args), **env}, flags.ONCE)
    return (f"resume  at step {step}, {optimizer} the optimizer's state; lr {before:.2e} as "
            f"saved, {now:.2e} now\n"
            f"        changed since it was saved: {', '.join(changed) or 'nothing'}")


if __name__ == "__main__":
    sys.exit(main())
