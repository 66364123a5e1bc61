"""plan.py — what a training will need, computed before it runs: `python model.py 1.7b --plan`.

Memory is counted by running the code with tensors that have no memory (support/memory.py); a test
compares it with the peak of a real process. Time is arithmetic about an assumed utilization.
"""
import torch

from support.memory import peak_of_step, peak_when_sharded
from support.runs import due

GPUS = (24, 48, 80, 141)  # GB: RTX 4090, A6000, A100 or H100, H200
USABLE = 0.9              # the rest is for CUDA itself, its workspaces, and gaps between tensors
LARGEST = 256             # micro-batch that is tried
SHARDS = 8                # processes that share a model under --fsdp

TOKENS = 20e9             # the paper's
BATCH_TOKENS = 524_288    # these four are train.py's settings for 1.7b; a test compares them
EVAL_TOKENS = 10_485_760
EVAL_EVERY = 250          # steps
SAVE_EVERY = 1000
PEAK = 989e12             # FLOPs per second of an H100 or H200, dense bf16, data sheet
UTILIZATION = 0.5         # of it, in training and evaluation
DISK = 0.44e9             # bytes per second that are hashed and written, as README measured


def plan(Llama, config, flops_per_token):
    """The plan for a network as text: which micro-batch fits, and the hours for 20B tokens."""
    with torch.device("meta"):  # shapes without memory
        llama = Llama(config)
    parameters = sum(p.numel() for p in llama.parameters())
    return "\n".join([*memory_table(Llama, config, llama),
                      *time_table(parameters, flops_per_token)])


def memory_table(Llama, config, llama):
    """Lines: for each way to train, the largest micro-batch that fits each GPU."""
    yield (f"largest micro-batch (a power of two) of {config.max_seq_len} tokens that fits, "
           f"computed: bf16 autocast, not\ncompiled, several micro-batches a step, {USABLE:.0%} of "
           f"the GPU usable")
    yield f"{'':<42}" + "".join(f"{size:>7} GB" for size in GPUS)
    for name, recompute in (("plain", False), ("--activation_checkpointing", True)):
        peaks = {}
        sharded = {}
        micro_batch = 1
        smallest = 0  # so far, of what is still growing
        while micro_batch <= LARGEST and smallest <= USABLE * max(GPUS) * 1e9:
            peaks[micro_batch] = peak_of_step(Llama, config, micro_batch, recompute)
            sharded[micro_batch] = peak_when_sharded(peaks[micro_batch], llama, SHARDS)
            smallest = min(peaks[micro_batch], sharded[micro_batch])
            micro_batch *= 2
        yield row(name, peaks)
        together = f"{name}, " if recompute else ""
        yield row(f"{together}--fsdp on {SHARDS}", sharded)


def row(name, peaks):
    """A line of the table, from {micro-batch: peak in bytes}."""
    line = f"  {name:<40}"
    for size in GPUS:
        fitting = [n for n, peak in peaks.items() if peak <= USABLE * size * 1e9]
        largest = max(fitting, default="—")
        line += f"{largest}{'+' if largest == LARGEST else ''}".rjust(10)
    return line


def time_table(parameters, flops_per_token):
    """Lines: hours for TOKENS tokens on 1 and 8 GPUs."""
    evaluations, saves = how_often()
    yield (f"hours for {TOKENS / 1e9:.0f}B tokens, computed: {UTILIZATION:.0%} of "
           f"{PEAK / 1e12:.0f} TFLOP/s; {evaluations} evaluations of {EVAL_TOKENS:,} tokens;\n"
           f"{saves} saves of {12 * parameters / 1e9:.1f} GB at {DISK / 1e9:.1f} GB/s")
    yield f"{'':<10}{'training':>10}{'evaluation':>12}{'saving':>10}{'together':>10}"
    for gpus in (1, 8):
        training, evaluation, saving = hours(parameters, flops_per_token, gpus)
        together = training + evaluation + saving
        yield (f"  on {gpus:<5}{training:>10.1f}{evaluation:>12.1f}{saving:>10.1f}"
               f"{together:>10.1f}")


def how_often():
    """(evaluations, saves) of the whole run."""
    steps = round(TOKENS / BATCH_TOKENS)
    evaluations = sum(due(step, EVAL_EVERY, steps) for step in range(steps + 1))
    saves = sum(due(step, SAVE_EVERY, steps) for step in range(steps + 1))
    return evaluations, saves


def hours(parameters, flops_per_token, gpus):
    """(training, evaluation, saving) in hours. One process saves, while the others wait."""
    evaluations, saves = how_often()
    per_second = gpus * UTILIZATION * PEAK / flops_per_token     # tokens, in training
    training = TOKENS / per_second
    evaluation = evaluations * EVAL_TOKENS / (3 * per_second)    # the forward is a third
    saving = saves * 12 * parameters / DISK                      # weights and two moments
    return training / 3600, evaluation / 3600, saving / 3600
