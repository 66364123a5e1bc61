"""train.py: a run is its full state. Stopped and resumed, evaluated often or rarely, in small
micro-batches or large ones, it is the same run.

Each comparison has a control: the same comparison with a mistake made on purpose, which must show.
What may happen to a run from outside is in test_faults.py.
"""
import argparse
import functools
import hashlib
import json
import math
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import threading
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import checkpoint
import evaluate
import plot_dynamics
import sample
import train
from conftest import FLAGS, ROOT, TEST, evals, exit_code, messages, rows, run, same
from model import PRESETS, Block, Llama, SwiGLU
from support import durable, fast, memory, runs
from support.runs import UserError

pytestmark = pytest.mark.usefixtures("short_samples")


def steps(folder):
    return [row[0] for row in rows(folder)]


def contents(folder):
    """{path: bytes} of a folder, without the lock, which is made again at each start."""
    found = {}
    for path in folder.rglob("*"):
        if path.is_file() and path.name != ".lock":
            found[path] = path.read_bytes()
    return found


def newest(folder):
    """The step of the newest full state."""
    return durable.step_of(durable.find(folder, full=True))


def weights(folder, step=None):
    """All weights of a checkpoint in one vector."""
    model, _, _ = checkpoint.load_model(folder, step)
    return torch.nn.utils.parameters_to_vector(model.parameters())


def events(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


# -------------------------------------------------------------------------------------------------
# Stop and resume

# 0: nothing trained; 3: in the warm-up; 8: an evaluation is due; 18: the next batch crosses the
# end of an epoch; 19: in the second epoch.
@pytest.mark.row(1)
@pytest.mark.parametrize("stop", [0, 1, 3, 8, 18, 19])
def test_resume_is_bitwise(data, whole, tmp_path, stop):
    """Catches: state that a resume loses; a batch read twice or not at all."""
    folder = tmp_path / "r"
    assert run(data, folder, "--stop_at", stop) == 75
    assert steps(folder) == list(range(1, stop + 1))
    assert run(data, folder, "--resume") == 0
    assert same(folder, whole)
    assert steps(folder) == list(range(1, 21))


def zero(moment):
    def spoil(state):
        for moments in state["optimizer"].values():
            moments[moment].zero_()
    return spoil


def round_weights(state):
    for tensor in state["model"].values():
        tensor.copy_(tensor.half())


def skip_a_step(state):
    state["step"] += 1


def change_seed(state):
    state["config"]["seed"] += 1


MISTAKES = {
    "average of gradients": zero("exp_avg"),
    "average of squares": zero("exp_avg_sq"),
    "count of updates": zero("step"),
    "step": skip_a_step,
    "seed": change_seed,
    "rounded weights": round_weights,
}


@pytest.mark.row(2)
@pytest.mark.parametrize("mistake", MISTAKES)
def test_resume_differs_if_state_is_incomplete(data, whole, tmp_path, mistake):
    """Catches: a comparison of runs that cannot fail. The control of test_resume_is_bitwise."""
    folder = tmp_path / "r"
    assert run(data, folder, "--stop_at", 10) == 75
    state = checkpoint.load(durable.find(folder, full=True))
    MISTAKES[mistake](state)
    checkpoint.save(folder, state, keep_last=2, keep_every=0)
    if mistake in ("count of updates", "step"):  # these contradict the rest of the state
        assert run(data, folder, "--resume") == 2
        return
    assert run(data, folder, "--resume") == 0
    assert not same(folder, whole)
    assert rows(folder)[-1] != rows(whole)[-1]


def test_reset_optimizer_forgets_the_moments(data, whole, tmp_path):
    """Catches: a --reset_optimizer that does nothing, or one that the log does not tell."""
    folder = tmp_path / "r"
    assert run(data, folder, "--stop_at", 10) == 75
    assert run(data, folder, "--resume", "--reset_optimizer") == 0
    assert rows(folder, "resume", ("step", "restored_optimizer")) == [(10, False)]
    assert rows(folder)[:11] == rows(whole)[:11]  # its loss and norm are of the weights before it
    assert rows(folder)[11] != rows(whole)[11]


def test_rewarming_raises_the_rate_again(data, whole, tmp_path):
    """Catches: a warm-up after a reset that starts at 0, is too short, or is forgotten when the run
    is stopped within it."""
    folder = tmp_path / "r"
    again = ("--resume", "--reset_optimizer", "--rewarm_steps", 5)
    assert run(data, folder, "--stop_at", 10) == 75
    shutil.copytree(folder, tmp_path / "at once")
    assert run(data, folder, *again, "--stop_at", 13) == 75
    assert run(data, folder, "--resume") == 0  # without the flag
    assert run(data, tmp_path / "at once", *again) == 0
    assert same(folder, tmp_path / "at once")
    usual = np.array(rows(whole, keys=("lr",)))[:, 0]
    rates = np.array(rows(folder, keys=("lr",)))[:, 0]
    factors = [1.0] * 10 + [0.2, 0.4, 0.6, 0.8] + [1.0] * 6
    assert np.allclose(rates, usual * factors)
    assert not np.allclose(rates, usual)  # control


def test_update_rms_is_that_of_the_weights(data, tmp_path):
    """Catches: a logged update that is not what the step did, or that changes the run."""
    logged = ("--max_steps", 2, "--save_every", 1, "--log_update_rms")
    assert run(data, tmp_path / "r", *logged) == 0
    assert run(data, tmp_path / "plain", *logged[:-1]) == 0
    assert rows(tmp_path / "r") == rows(tmp_path / "plain")
    found = rows(tmp_path / "r", keys=("update_rms",))
    for step, (rms,) in enumerate(found):
        change = weights(tmp_path / "r", step + 1) - weights(tmp_path / "r", step)
        assert math.isclose(rms, change.detach().square().mean().sqrt(), rel_tol=1e-4)
    assert not math.isclose(found[0][0], found[1][0], rel_tol=1e-2)  # control


def test_sizes_of_the_network_can_be_given(data, tmp_path):
    """Catches: a size that is ignored, or that a resume changes."""
    folder = tmp_path / "r"
    sizes = ("--n_layers", 1, "--dim", 48, "--n_heads", 3, "--intermediate_size", 80)
    assert run(data, folder, *sizes, "--max_steps", 2, "--stop_at", 1) == 75
    model, _, _ = checkpoint.load_model(folder)
    expected = replace(TEST, n_layers=1, dim=48, n_heads=3, intermediate_size=80)
    assert model.config == expected
    assert model.config != TEST  # control
    assert run(data, folder, "--resume", "--n_layers", 2) == 2
    assert run(data, folder, "--resume") == 0


def test_resume_does_not_replace_the_state_it_came_from(data, whole, tmp_path):
    """Catches: moments that a resume without them deletes from the disk, before its first step."""
    folder = tmp_path / "r"
    assert run(data, folder, "--stop_at", 10) == 75
    assert run(data, folder, "--resume", "--reset_optimizer", "--stop_at", 10) == 75
    assert run(data, folder, "--resume") == 0
    assert same(folder, whole)


@pytest.fixture
def dropout(monkeypatch):
    """A network with dropout behind each feed-forward part, as a reader may try it."""
    forward = SwiGLU.forward

    def with_dropout(self, x):
        return F.dropout(forward(self, x), 0.1, training=self.training)
    monkeypatch.setattr(SwiGLU, "forward", with_dropout)


@pytest.mark.row(1)
def test_resume_with_dropout_is_bitwise(data, tmp_path, dropout, monkeypatch):
    """Catches: a random state that is not saved, or not restored."""
    short = ("--max_steps", 6, "--save_every", 0)
    assert run(data, tmp_path / "straight", *short) == 0
    assert run(data, tmp_path / "r", *short, "--stop_at", 3) == 75
    shutil.copytree(tmp_path / "r", tmp_path / "wrong")
    assert run(data, tmp_path / "r", *short, "--resume") == 0
    assert same(tmp_path / "r", tmp_path / "straight", 6)
    # control: without the random state it is another run
    monkeypatch.setattr(torch, "set_rng_state", lambda state: None)
    assert run(data, tmp_path / "wrong", *short, "--resume") == 0
    assert rows(tmp_path / "wrong") != rows(tmp_path / "straight")


@pytest.fixture
def finished(whole, tmp_path):
    """A copy of the run `whole`."""
    return shutil.copytree(whole, tmp_path / "finished")


def test_finished_run_stays_as_it_is(data, finished, capsys):
    """Catches: a finished run that --resume evaluates again, draws again or writes into."""
    before = contents(finished)
    assert run(data, finished, "--resume") == 0
    printed = capsys.readouterr()
    assert printed.out == f"{finished} is finished: 20 steps — next: python sample.py {finished}\n"
    assert printed.err == ""
    assert contents(finished) == before


@pytest.mark.row(29)
def test_used_folder_is_refused(data, finished, capsys):
    """Catches: two runs mixed in one folder."""
    before = contents(finished)
    assert run(data, finished) == 2
    message, = messages(capsys)
    assert "--resume" in message
    assert "--overwrite" in message
    assert contents(finished) == before


@pytest.mark.row(28)
@pytest.mark.parametrize("flag", ["--resume", "--overwrite"])
def test_folder_in_use_is_refused(data, finished, capsys, flag):
    """Catches: two processes that write into one run. (That a killed process leaves no
    lock is tested by each kill in test_faults.py.)"""
    before = contents(finished)
    lock = runs.hold(finished)
    assert run(data, finished, flag) == 2
    message, = messages(capsys)
    assert "in use by another process" in message
    assert contents(finished) == before
    os.close(lock)
    assert run(data, finished, "--resume") == 0  # control


def test_overwrite_starts_over(data, whole, tmp_path):
    """Catches: rows or checkpoints of the earlier run in the new one."""
    folder = tmp_path / "r"
    other = ("--seed", 5, "--save_every", 3, "--keep_every", 3)
    assert run(data, folder, *other, "--stop_at", 7) == 75
    assert run(data, folder, "--overwrite") == 0
    assert same(folder, whole)
    assert list(durable.checkpoints(folder)) == list(durable.checkpoints(whole))


def test_init_from_takes_the_weights_only(data, whole, tmp_path):
    """Catches: a new run that starts from random weights, or with the step of the other run."""
    folder = tmp_path / "r"
    assert run(data, folder, "--init_from", whole, "--max_steps", 1) == 0
    first, = rows(folder)
    assert first[0] == 1
    first_eval = evals(folder)[0]
    last_eval = evals(whole)[-1]
    assert first_eval[0] == 0
    assert first_eval[1:] == last_eval[1:]
    assert first_eval[1:] != evals(whole)[0][1:]  # control


@pytest.mark.row(42, 63)
def test_weights_of_another_vocabulary_are_refused(data, whole, tmp_path, capsys):
    """Catches: weights that fit, since both vocabularies are padded to 384, but whose ids mean
    something else; a size that is given, and is not that of the weights."""
    folder = shutil.copytree(data, tmp_path / "data")
    for file in folder.glob("*.npy"):
        np.save(file, np.load(file) % 289)
    meta = json.loads((folder / "meta.json").read_text())
    for shard in meta["splits"]["train"] + meta["splits"]["val"]:
        content = (folder / shard["file"]).read_bytes()
        shard["sha256"] = hashlib.sha256(content).hexdigest()
    (folder / "meta.json").write_text(json.dumps({**meta, "vocab_size": 290, "eot": 289}))
    assert run(folder, tmp_path / "r", "--init_from", whole) == 2
    assert "has vocab_size 300, here 290" in messages(capsys)[-1]
    assert run(folder, tmp_path / "r", "--stop_at", 1) == 75  # control
    assert run(data, tmp_path / "s", "--init_from", whole, "--n_heads", 4) == 2
    assert "has n_heads 2, here 4 — its weights tell the sizes" in messages(capsys)[-1]


@pytest.mark.row(63)
def test_base_is_not_replaced_by_its_child(data, whole, tmp_path, capsys):
    """Catches: --overwrite that deletes the run whose weights were asked for; an empty name, of a
    shell variable that is not set, that starts from random weights."""
    base = Path(shutil.copytree(whole, tmp_path / "base"))
    before = contents(base)
    assert run(data, base, "--init_from", f"{base}/", "--overwrite") == 2
    assert "is the run to start from — choose another --run" in messages(capsys)[-1]
    assert contents(base) == before
    assert run(data, tmp_path / "r", "--init_from", "") == 2
    assert "--init_from is empty" in messages(capsys)[-1]


@pytest.mark.row(63)
@pytest.mark.parametrize("change", [{"padded_vocab_size": 300}, {"rope_theta": 10_000.0},
                                    {"norm_eps": 1e-6}, {"n_heads": 4, "n_kv_heads": 2},
                                    {"tie_embeddings": True}])
def test_init_from_takes_the_sizes_of_the_weights(data, tmp_path, change):
    """Catches: an imported network of other padding, angles, norms or heads that no run can start
    from; one that goes on as another network."""
    torch.manual_seed(0)
    llama = Llama(replace(TEST, **change))
    contents = {"model.pt": {"config": asdict(llama.config), "model": llama.state_dict()}}
    imported = tmp_path / "imported"
    durable.write_checkpoint(imported, 0, contents)
    settings = {"imported_from": "x", "data": None, "seq_len": 64, "preset": None}
    (imported / "config.json").write_text(json.dumps(settings))
    assert run(data, tmp_path / "r", "--init_from", imported, "--stop_at", 2) == 75
    assert run(data, tmp_path / "r", "--resume", "--max_steps", 20, "--stop_at", 3) == 75
    started, _, _ = checkpoint.load_model(tmp_path / "r", 0)
    assert started.config == llama.config
    assert weights_of(started).keys() == weights_of(llama).keys()
    for name, tensor in weights_of(started).items():
        assert torch.equal(tensor, weights_of(llama)[name])
    assert run(data, tmp_path / "other", "--stop_at", 1) == 75  # control
    assert evals(tmp_path / "other")[0] != evals(tmp_path / "r")[0]


def weights_of(llama):
    return dict(llama.named_parameters())


# -------------------------------------------------------------------------------------------------
# Evaluating, sampling and saving

@pytest.mark.row(33)
def test_evaluation_does_not_change_training(data, whole, tmp_path):
    """Catches: an evaluation, a sample or a save that draws the run's random numbers or changes
    its weights."""
    often = ("--eval_every", 1, "--sample_every", 2, "--save_every", 3, "--eval_tokens", 64)
    assert run(data, tmp_path / "often", *often, "--stop_at", 10) == 75
    assert rows(tmp_path / "often") == rows(whole)[:10]
    # control
    assert run(data, tmp_path / "other", "--seed", 1, "--stop_at", 1) == 75
    assert rows(tmp_path / "other")[0] != rows(whole)[0]


def test_seed_decides_the_first_weights(data, whole, tmp_path):
    """Catches: weights that are the same for every seed, or others for the same seed."""
    for seed, equal in ((1337, True), (1, False)):
        folder = tmp_path / str(seed)
        assert run(data, folder, "--seed", seed, "--stop_at", 0) == 75
        assert torch.equal(weights(folder), weights(whole, 0)) == equal


def test_evaluation_turns_dropout_off_and_on_again(data, whole, tmp_path, dropout, monkeypatch):
    """Catches: evaluations and samples with dropout, and a training without it after them."""
    rarely = ("--max_steps", 5, "--save_every", 0)
    often = (*rarely, "--eval_every", 1, "--sample_every", 1)
    assert run(data, tmp_path / "rarely", *rarely) == 0
    assert run(data, tmp_path / "often", *often) == 0
    assert rows(tmp_path / "often") == rows(tmp_path / "rarely")
    for row in evals(tmp_path / "rarely"):
        assert row in evals(tmp_path / "often")
    # The training has dropout: it differs from that of a network without.
    assert rows(tmp_path / "rarely")[0] != rows(whole)[0]
    # control: an evaluation with dropout shows
    monkeypatch.setattr(Llama, "eval", lambda model: model)
    assert run(data, tmp_path / "wrong", *often) == 0
    assert rows(tmp_path / "wrong") != rows(tmp_path / "rarely")
    assert evals(tmp_path / "wrong")[0] != evals(tmp_path / "rarely")[0]


def test_events_are_in_order(whole):
    """Catches: an event that is missing, doubled, or at another step."""
    found = [f"{row['event']} {row['step']}" for row in events(whole)]
    assert found[:9] == [
        "start 0", "eval 0", "benchmark 0", "sample 0",
        "train 1", "eval 1", "benchmark 1", "sample 1", "train 2"]
    assert found[-5:] == ["train 20", "eval 20", "benchmark 20", "sample 20", "end 20"]
    for event in ("eval", "benchmark", "sample"):
        at = [step for step, in rows(whole, event, ("step",))]
        assert at == [0, 1, 2, 4, 8, 16, 20]
    assert rows(whole, "end", ("reason",)) == [("done",)]


@pytest.mark.parametrize("every, last, expected", [
    (0, None, [0, 1, 2, 4, 8, 16]),
    (0, 19, [0, 1, 2, 4, 8, 16, 19]),
    (5, 19, [0, 1, 2, 4, 5, 8, 10, 15, 16, 19, 20]),
    (6, None, [0, 1, 2, 4, 6, 8, 12, 16, 18]),
    (1, None, list(range(21))),
])
def test_due_is_early_at_the_interval_and_at_the_end(every, last, expected):
    """Catches: a step at which evaluating, sampling or saving is forgotten, or not wanted."""
    assert [step for step in range(21) if runs.due(step, every, last)] == expected


@pytest.mark.parametrize("flags, small, full", [
    ([], [0, 1, 2, 4, 8], [16, 20]),
    (["--keep_every", 10, "--keep_last", 3], [0, 1, 2, 4, 8, 10], [15, 16, 20]),
    (["--save_every", 0, "--keep_last", 4], [0, 1, 2], [4, 8, 16, 20]),
    (["--save_every", 7, "--keep_every", 7], [0, 1, 2, 4, 7, 8, 14], [16, 20]),
])
def test_checkpoints_follow_the_keep_rule(data, tmp_path, flags, small, full):
    """Catches: a trajectory with holes, too few full states to fall back on, a disk that fills."""
    assert run(data, tmp_path / "r", "--eval_every", 0, *flags) == 0
    found = durable.checkpoints(tmp_path / "r")
    assert list(found) == small + full  # the small ones hold weights alone
    for step, folder in found.items():
        files = {path.name for path in folder.iterdir()}
        assert ("train_state.pt" in files) == (step in full)
        assert set(durable.read_meta(folder)["files"]) == files - {"meta.json"}
        durable.verify(folder, "model.pt", durable.read_meta(folder)["files"])


# -------------------------------------------------------------------------------------------------
# The step

def windows_of(data):
    """All training windows of 16 tokens in file order, each with its targets: (149, 17)."""
    found = []
    for name in ("train_0000", "train_0001"):
        tokens = np.load(data / f"{name}.npy").astype(np.int64)
        for start in range(0, len(tokens) - 16, 16):
            found.append(tokens[start:start + 17])
    return torch.from_numpy(np.stack(found))


def plain_training(model, data, clip, decay):
    """Four steps without train.py: whole batches, and AdamW from its formula.

    Changes the model; returns (loss, learning rate, gradient norm) of each step."""
    windows = windows_of(data)
    order = np.random.RandomState([1337, 0]).permutation(len(windows))
    parameters = list(model.parameters())
    average = [torch.zeros_like(p) for p in parameters]
    square = [torch.zeros_like(p) for p in parameters]
    found = []
    for step in range(1, 5):
        batch = windows[order[8 * step - 8:8 * step]]
        targets = batch[:, 1:].flatten()
        logits, _ = model(batch[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), targets)
        gradients = torch.autograd.grad(loss, parameters)
        norm = torch.cat([g.flatten() for g in gradients]).norm().item()
        scale = min(1.0, clip / norm)
        lr = 0.01 * step / 6
        for i, p in enumerate(parameters):
            g = scale * gradients[i]
            average[i] = 0.9 * average[i] + 0.1 * g
            square[i] = 0.95 * square[i] + 0.05 * g * g
            m = average[i] / (1 - 0.9**step)
            v = square[i] / (1 - 0.95**step)
            update = m / (v.sqrt() + 1e-8)
            if p.dim() == 2:
                update = update + decay * p
            p.data = p.data - lr * update.detach()
        found.append((loss.item(), lr, norm))
    return found


@pytest.mark.parametrize("clip, decay, equal", [
    (0.5, 10.0, True),
    (math.inf, 10.0, False),  # control: without the clip it is another training
    (0.5, 0.0, False),        # control: and without the decay
])
def test_training_equals_a_plain_loop(data, tmp_path, clip, decay, equal):
    """Catches: a batch of another step, a wrong mean over micro-batches, a skipped clip, the
    learning rate of another step, a decay of vectors or of nothing."""
    folder = tmp_path / "r"
    small = ("--max_steps", 4, "--micro_batch", 2)
    assert run(data, folder, *small, "--grad_clip", 0.5, "--weight_decay", 10) == 0
    plain, _, _ = checkpoint.load_model(folder, step=0)
    expected = plain_training(plain, data, clip, decay)
    plain_weights = torch.nn.utils.parameters_to_vector(plain.parameters())
    start = weights(folder, 0)
    difference = (weights(folder) - plain_weights).norm() / (plain_weights - start).norm()
    if not equal:
        assert difference > 0.01
        return
    assert difference < 1e-3
    found = rows(folder, keys=("loss", "lr", "grad_norm"))
    assert np.allclose(found, expected, rtol=1e-4)
    assert min(norm for _, _, norm in found) > 0.5  # every step is clipped


@pytest.mark.row(16)
def test_micro_batch_changes_nothing_but_speed(data, whole, tmp_path):
    """Catches: micro-batches that count twice, or are averaged one by one."""
    stop = ("--stop_at", 6)
    assert run(data, tmp_path / "small", *stop, "--micro_batch", 1) == 75
    assert np.allclose(rows(tmp_path / "small"), rows(whole)[:6], rtol=1e-4)
    # control: half the batch
    assert run(data, tmp_path / "half", *stop, "--batch_tokens", 64) == 75
    assert not np.allclose(rows(tmp_path / "half"), rows(whole)[:6], rtol=1e-2)


@pytest.mark.parametrize("recomputed", [True, False])  # False: control
def test_recomputed_blocks_are_compiled(recomputed):
    """Catches: blocks that torch.compile skips in silence, because they are recomputed."""
    model = Llama(TEST)
    if recomputed:
        memory.checkpoint_activations(model)
    graphs = []

    def keep_graph(module, inputs):
        graphs.append(module.print_readable(print_output=False))
        return module
    for block in model.model.layers:
        block.compile(backend=keep_graph)
    tokens = torch.zeros(1, 4, dtype=torch.long)
    model(tokens, tokens)
    assert len(graphs) == 1
    assert "linear" in graphs[0]
    assert ("tag_activation_checkpoint" in graphs[0]) == recomputed


@pytest.fixture
def block_forwards(monkeypatch):
    """A list that grows by one with each forward of a block in training."""
    forward = Block.forward
    calls = []

    def counted(self, *args):
        if self.training:
            calls.append(1)
        return forward(self, *args)
    monkeypatch.setattr(Block, "forward", counted)
    return calls


def test_activation_checkpointing_changes_no_bit(data, whole, tmp_path, block_forwards):
    """Catches: a recomputation that gives other numbers, or is part of the experiment; a flag that
    does nothing."""
    folder = tmp_path / "r"
    flag = "activation_checkpointing"
    assert run(data, folder, f"--{flag}", "--no-fast", "--stop_at", 10) == 75
    assert len(block_forwards) == 10 * 2 * 2 * 2  # steps, micro-batches, blocks, forward + backward
    assert run(data, folder, "--resume", f"--no-{flag}") == 0  # still --no-fast
    assert len(block_forwards) == 10 * 2 * 2 * 2 + 10 * 2 * 2  # control
    assert run(data, tmp_path / "plain", "--no-fast") == 0
    assert same(folder, tmp_path / "plain")


def test_activation_checkpointing_repeats_dropout(data, tmp_path, dropout, monkeypatch):
    """Catches: a recomputation that draws other random numbers than the forward: its gradients are
    those of another network. The control of the test before."""
    short = ("--max_steps", 3, "--save_every", 0)
    flag = "--activation_checkpointing"
    assert run(data, tmp_path / "plain", *short) == 0
    assert run(data, tmp_path / "r", *short, flag) == 0
    assert same(tmp_path / "r", tmp_path / "plain", 3)
    forgetful = functools.partial(memory.keep_only_inputs, preserve_rng_state=False)
    monkeypatch.setattr(memory, "keep_only_inputs", forgetful)
    assert run(data, tmp_path / "wrong", *short, flag) == 0
    assert rows(tmp_path / "wrong")[0] != rows(tmp_path / "plain")[0]


def test_optimizer_decays_matrices_only(whole):
    """Catches: a decay of the norms' weights; a parameter that is not trained."""
    model, _, _ = checkpoint.load_model(whole)
    args = train.read_settings(FLAGS)
    optimizer = train.make_optimizer(model, args, torch.device("cpu"))
    matrices, vectors = optimizer.param_groups
    assert matrices["weight_decay"] == 0.1
    assert vectors["weight_decay"] == 0.0
    assert {p.dim() for p in matrices["params"]} == {2}
    assert {p.dim() for p in vectors["params"]} == {1}
    found = {*matrices["params"], *vectors["params"]}
    assert found == set(model.parameters())


# -------------------------------------------------------------------------------------------------
# Another optimizer, as a reader may try it: make_optimizer alone is edited

class MuonAndAdamW:
    """Muon for the matrices of the blocks, AdamW for the rest, as one optimizer."""

    def __init__(self, model, args):
        blocks = [p for p in model.model.layers.parameters() if p.dim() == 2]
        rest = [p for p in model.parameters() if all(p is not other for other in blocks)]
        self.parts = [torch.optim.Muon(blocks, lr=0.02), torch.optim.AdamW(rest, lr=args.lr)]
        self.parts[1].state = self.parts[0].state  # each looks only for its own parameters
        self.state = self.parts[0].state
        self.param_groups = self.parts[0].param_groups + self.parts[1].param_groups

    def step(self):
        for part in self.parts:
            part.step()

    def zero_grad(self, set_to_none):
        for part in self.parts:
            part.zero_grad(set_to_none)


class Counting(torch.optim.SGD):
    """Keeps a number that is not a tensor, on which its step depends."""

    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.state[p]["calls"] = self.state[p].get("calls", 0) + 1
                    p.data -= group["lr"] / self.state[p]["calls"] * p.grad


def torch_optimizer(name, **options):
    return lambda model, args: getattr(torch.optim, name)(model.parameters(), lr=args.lr, **options)


OPTIMIZERS = {
    "SGD with momentum": torch_optimizer("SGD", momentum=0.9),
    "Muon and AdamW": MuonAndAdamW,
    "Adafactor": torch_optimizer("Adafactor"),        # moments of other shapes than the weights
    "Adagrad": torch_optimizer("Adagrad"),            # a state before its first step
    "NAdam": torch_optimizer("NAdam"),
    "a number": lambda model, args: Counting(model.parameters(), lr=args.lr),
    "SGD": torch_optimizer("SGD"),                    # no state at all
}


@pytest.fixture
def optimizer(monkeypatch):
    """Sets what make_optimizer gives."""
    def use(make):
        monkeypatch.setattr(train, "make_optimizer", lambda model, args, device: make(model, args))
    return use


@pytest.mark.row(1)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_any_optimizer_resumes_bitwise(data, tmp_path, optimizer, name):
    """Catches: a checkpoint that knows AdamW alone."""
    optimizer(OPTIMIZERS[name])
    short = ("--max_steps", 6, "--save_every", 0)
    assert run(data, tmp_path / "straight", *short) == 0
    assert run(data, tmp_path / "r", *short, "--stop_at", 3) == 75
    shutil.copytree(tmp_path / "r", tmp_path / "forgetful")
    assert run(data, tmp_path / "r", *short, "--resume") == 0
    assert same(tmp_path / "r", tmp_path / "straight", 6)
    # control: without the state it is another run, if there is one
    assert run(data, tmp_path / "forgetful", *short, "--resume", "--reset_optimizer") == 0
    assert same(tmp_path / "forgetful", tmp_path / "straight", 6) == (name == "SGD")


def test_run_of_another_optimizer_is_refused(data, tmp_path, capsys, optimizer):
    """Catches: moments of one optimizer that another one takes for its own."""
    assert run(data, tmp_path / "r", "--stop_at", 3) == 75
    optimizer(torch_optimizer("Adam"))  # whose state has the same names and shapes
    capsys.readouterr()
    assert run(data, tmp_path / "r", "--resume") == 2
    line, = messages(capsys)
    assert "has the state of 'AdamW', and this code uses Adam" in line
    optimizer(torch_optimizer("AdamW", amsgrad=True))
    assert run(data, tmp_path / "r", "--resume") == 2
    assert "lm_head.weight.max_exp_avg_sq (absent saved, " in messages(capsys)[0]
    assert run(data, tmp_path / "r", "--resume", "--reset_optimizer") == 0  # as it says


class Unused(Llama):
    """Has a parameter that no loss depends on, so AdamW keeps no moments of it."""

    def __init__(self, config):
        super().__init__(config)
        self.unused = torch.nn.Parameter(torch.ones(3))


class Frozen(Llama):
    """Has weights that are not trained."""

    def __init__(self, config):
        super().__init__(config)
        self.model.embed_tokens.requires_grad_(False)


class Dropping(Llama):
    """Leaves out its last block in some micro-batches, so its parameters get fewer updates."""

    def __init__(self, config):
        super().__init__(config)
        forward = self.model.layers[-1].forward

        def sometimes(x, *args):
            return x if self.training and torch.rand(()) < 0.7 else forward(x, *args)
        self.model.layers[-1].forward = sometimes


@pytest.mark.parametrize("network", [Unused, Frozen, Dropping])
def test_parameters_without_a_gradient_are_resumed_too(data, tmp_path, monkeypatch, network):
    """Catches: weights that are not saved because they are frozen; a state that cannot be restored
    because a parameter has no moments, or was updated less often."""
    short = ("--max_steps", 6, "--save_every", 0, "--no-fast")
    monkeypatch.setattr(train, "Llama", network)
    monkeypatch.setattr(checkpoint, "Llama", network)
    assert run(data, tmp_path / "straight", *short) == 0
    for stop in (1, 3):
        folder = tmp_path / str(stop)
        assert run(data, folder, *short, "--stop_at", stop) == 75
        assert run(data, folder, *short, "--resume") == 0
        assert same(folder, tmp_path / "straight", 6)
    moments = checkpoint.load(durable.find(folder, full=True))["optimizer"]
    updates = {float(each["step"]) if each else 0.0 for each in moments.values()}
    assert (len(updates) > 1) == (network is not Frozen)  # control: there are such parameters


class WithoutState(MuonAndAdamW, torch.optim.Optimizer):
    """As it is written first: an optimizer of its own, whose state is not that of its parts."""

    def __init__(self, model, args):
        MuonAndAdamW.__init__(self, model, args)
        torch.optim.Optimizer.__init__(self, self.param_groups, {})


class Slowing(torch.optim.SGD):
    """Counts its steps, where the subclass says, and each is smaller than the one before."""
    def step(self):
        self.count()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.data -= group["lr"] / self.k * p.grad

    def count(self):
        self.k = getattr(self, "k", 0) + 1


class SlowingGroups(Slowing):
    def count(self):
        for group in self.param_groups:
            group["k"] = self.k = group.get("k", 0) + 1


class SlowingState(Slowing):
    def count(self):
        self.state["all"] = {"k": torch.tensor(1) + self.state.get("all", {"k": 0})["k"]}
        self.k = int(self.state["all"]["k"])


class NoPlainValue(Counting):
    def step(self):
        super().step()
        for moments in self.state.values():
            moments["odd"] = SimpleNamespace()


LOST = {
    WithoutState: "lm_head.weight.exp_avg",
    Slowing: "changed: k",
    SlowingGroups: "param_groups.0.k",
    SlowingState: "state.all.k",
    NoPlainValue: "holds more than tensors and plain values",
}


@pytest.mark.parametrize("kind", LOST, ids=lambda kind: kind.__name__)
def test_run_that_cannot_be_resumed_ends_at_its_start(data, tmp_path, capsys, optimizer, kind):
    """Catches: hours of training with an optimizer that keeps something where no checkpoint looks
    for it, or that no checkpoint can hold; also one that takes the place of another."""
    def make(model, args):
        parameters = model.parameters()
        return kind(model, args) if kind is WithoutState else kind(parameters, lr=args.lr)

    assert run(data, tmp_path / "before", "--stop_at", 3) == 75
    optimizer(make)
    capsys.readouterr()
    assert run(data, tmp_path / "new") == 2
    line, = messages(capsys)
    assert LOST[kind] in line
    assert steps(tmp_path / "new")[-1] <= 2
    assert run(data, tmp_path / "before", "--resume", "--reset_optimizer", "--save_every", 1) == 2
    assert LOST[kind] in messages(capsys)[0]
    assert steps(tmp_path / "before")[-1] <= 5


def test_reading_back_changes_nothing(data, whole, tmp_path, monkeypatch):
    """Catches: a run that is another one because its first states are read back."""
    monkeypatch.setattr(checkpoint, "read_back", lambda *args: None)
    make_optimizer = train.make_optimizer
    made = []

    def make_once(*args):  # what read_back did not fill must not be used
        made.append(made[0] if made else make_optimizer(*args))
        return made[0]
    monkeypatch.setattr(train, "make_optimizer", make_once)
    assert run(data, tmp_path / "r") == 0
    assert len(made) == 4
    assert same(tmp_path / "r", whole)


def test_state_that_is_read_back_otherwise_ends_the_run(data, tmp_path, capsys, monkeypatch):
    """Catches: a comparison of what was saved and read back that sees nothing."""
    load_rest = durable.load_rest

    def wrong(path):
        rest = load_rest(path)
        for moments in rest["optimizer"].values():
            for tensor in moments.values():
                tensor += 1e-9
        return rest
    monkeypatch.setattr(durable, "load_rest", wrong)
    assert run(data, tmp_path / "r") == 2
    line, = messages(capsys)
    assert "could not be resumed from step 1, so it ends here; lost or changed: optimizer." in line


def test_each_group_keeps_its_own_rate(data, tmp_path, optimizer):
    """Catches: a schedule that gives all groups the same rate, also after a resume."""
    rates = []

    class Watched(torch.optim.AdamW):
        def step(self, *args):
            rates.append([group["lr"] for group in self.param_groups])
            return super().step(*args)

    def make(model, args):
        groups = [{"params": model.lm_head.parameters(), "lr": 0.1 * args.lr},
                  {"params": model.model.parameters()}]
        return Watched(groups, lr=args.lr)
    optimizer(make)
    assert run(data, tmp_path / "r", "--stop_at", 10) == 75
    del rates[:]
    assert run(data, tmp_path / "r", "--resume") == 0
    logged = [lr for lr, in rows(tmp_path / "r", keys=("lr",))]
    assert len(set(logged)) > 10  # control
    assert [rate for _, rate in rates[1:]] == logged[10:]  # the first makes the optimizer's state
    assert np.allclose([rate for rate, _ in rates[1:]], 0.1 * np.array(logged[10:]), rtol=1e-12)


# -------------------------------------------------------------------------------------------------
# The learning rate

def lr_at(step, **changes):
    """The rate of a run with round numbers: 10 steps of warm-up, 100 more, from 1.0 to 0.1."""
    settings = {"lr": 1.0, "min_lr": 0.1, "warmup_steps": 10, "max_steps": 110,
                "schedule": "cosine", **changes}
    return train.lr_at(step, argparse.Namespace(**settings))


@pytest.mark.parametrize("schedule, points", [
    ("cosine", {10: 1.0, 35: 0.1 + 0.9 * 0.8535534, 60: 0.55, 110: 0.1}),  # (1 + √½) / 2
    ("linear", {10: 1.0, 35: 0.1 + 0.9 * 0.75, 60: 0.55, 110: 0.1}),
    ("wsd", {10: 1.0, 60: 1.0, 88: 1.0, 99: 0.55, 110: 0.1}),  # the last 22 steps decay
])
def test_lr_follows_its_schedule(schedule, points):
    """Catches: a wrong shape, a warm-up that starts at 0, a rate that rises after it."""
    warm_up = [lr_at(step, schedule=schedule) for step in (0, 4, 9)]
    assert warm_up == [0.1, 0.5, 1.0]
    for step, expected in points.items():
        assert math.isclose(lr_at(step, schedule=schedule), expected, rel_tol=1e-6)
    decay = [lr_at(step, schedule=schedule) for step in range(10, 111)]
    assert decay == sorted(decay, reverse=True)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd"])
@pytest.mark.parametrize("warmup", [0, 20, 80, 90, 99, 100, 150])
def test_lr_has_no_jump(schedule, warmup):
    """Catches: a warm-up that reaches into the decay of wsd, or over the end of the run."""
    rates = [lr_at(step, schedule=schedule, warmup_steps=warmup, max_steps=100)
             for step in range(101)]
    if warmup > 0:
        assert math.isclose(rates[0], 1 / warmup)
    assert max(rates) <= 1.0
    changes = np.abs(np.diff(rates))
    rise = 1 / max(1, warmup)
    decay_steps = max(1, min(20, 100 - warmup))  # of wsd, the shortest
    steepest = 0.9 * math.pi / 2 / decay_steps   # of a cosine that is as short
    assert changes.max() <= max(rise, steepest) + 1e-9


def test_schedule_without_a_formula_is_an_error(data, tmp_path, capsys, monkeypatch):
    """Catches: a new name among the schedules that trains as another one, or ends a run late."""
    for step in (0, 50):
        with pytest.raises(UserError, match="--schedule sqrt has no branch in lr_at"):
            lr_at(step, schedule="sqrt")
    monkeypatch.setitem(train.BY_PRESET, "test", {"schedule": "sqrt"})
    assert run(data, tmp_path / "r") == 2
    assert "has no branch in lr_at, train.py" in messages(capsys)[-1]
    assert not (tmp_path / "r" / "metrics.jsonl").exists()


def test_lr_of_a_longer_run_is_as_documented():
    """Catches: numbers in the docstring of lr_at that are not those of the code."""
    tiny = train.read_settings([])
    longer = train.read_settings(["--max_steps", "7600"])
    before = train.lr_at(tiny.max_steps, tiny)
    after = train.lr_at(tiny.max_steps, longer)
    assert f"{before:.1e} {after:.1e}" == "1.0e-04 1.0e-03"
    document = " ".join(train.lr_at.__doc__.split())
    assert f"run of {tiny.max_steps:,} steps with --max_steps 7600" in document
    assert "1.0e-4 back to 1.0e-3" in document


# -------------------------------------------------------------------------------------------------
# fp16

@pytest.mark.row(23)
def test_fp16_resume_keeps_the_loss_scale(data, tmp_path):
    """Catches: a loss scale, or its count of good steps, that starts anew."""
    fp16 = ("--dtype", "fp16", "--max_steps", 8)
    assert run(data, tmp_path / "straight", *fp16) == 0
    assert run(data, tmp_path / "resumed", *fp16, "--stop_at", 5) == 75
    assert run(data, tmp_path / "resumed", *fp16, "--resume") == 0
    assert same(tmp_path / "straight", tmp_path / "resumed", 8)
    scaler = checkpoint.load(durable.find(tmp_path / "resumed", full=True))["scaler"]
    assert scaler["scale"] == 65536.0
    assert scaler["_growth_tracker"] == 8  # control: 3 if the resume had started anew


@pytest.mark.row(13)
@pytest.mark.parametrize("before, after", [("fp32", "fp16"), ("fp16", "fp32"), ("fp32", "bf16")])
def test_resume_in_another_precision_goes_on(data, tmp_path, capsys, before, after):
    """Catches: a loss scaler without a saved state, after a move to another machine."""
    short = ("--max_steps", 4, "--save_every", 0)
    assert run(data, tmp_path / "r", *short, "--dtype", before, "--stop_at", 2) == 75
    capsys.readouterr()
    assert run(data, tmp_path / "r", *short, "--dtype", after, "--resume") == 0
    names = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
    assert f"dtype {names[before]} → {names[after]}" in capsys.readouterr().out
    assert steps(tmp_path / "r") == [1, 2, 3, 4]


@pytest.fixture
def start_scale(monkeypatch):
    """Sets the loss scale that fp16 starts with. From 2^23 on the tests' gradients overflow."""
    original = torch.amp.GradScaler

    def start_at(scale):
        scaler = functools.partial(original, init_scale=scale)
        monkeypatch.setattr(torch.amp, "GradScaler", scaler)
    return start_at


def skipped(folder):
    """The steps whose update was skipped."""
    return [row["step"] for row in events(folder) if "skipped" in row]


@pytest.mark.row(21)
def test_skipped_updates_are_printed_and_change_nothing(data, tmp_path, capsys, start_scale):
    """Catches: a skip that ends the run, that nobody sees, or that changes weights."""
    start_scale(2.0**34)
    assert run(data, tmp_path / "r", "--dtype", "fp16") == 0
    found = skipped(tmp_path / "r")
    assert found == list(range(1, len(found) + 1))
    assert 4 < len(found) < 20
    assert capsys.readouterr().out.count("fp16 overflow, update skipped") == len(found)
    assert steps(tmp_path / "r") == list(range(1, 21))
    start = weights(tmp_path / "r", 0)
    assert torch.equal(weights(tmp_path / "r", 4), start)
    assert not torch.equal(weights(tmp_path / "r", 20), start)  # control


@pytest.mark.row(21)
def test_20_skipped_updates_in_a_row_end_the_run(data, tmp_path, capsys, start_scale):
    """Catches: a run that skips for ever, or one that cannot go on afterwards."""
    start_scale(2.0**44)
    flags = ("--dtype", "fp16", "--max_steps", 24, "--eval_every", 0)
    assert run(data, tmp_path / "r", *flags) == 3
    message, = messages(capsys)
    assert "step 20: loss" in message
    assert re.search("gradient norm (inf|nan), lr", message)
    assert skipped(tmp_path / "r") == list(range(1, 20))
    assert newest(tmp_path / "r") == 19
    assert run(data, tmp_path / "r", *flags, "--resume") == 0
    assert steps(tmp_path / "r") == list(range(1, 25))


@pytest.mark.row(21)
def test_loss_scale_below_1_ends_the_run(data, tmp_path, capsys, start_scale):
    """Catches: gradients that no scale saves from an overflow."""
    start_scale(0.5)
    assert run(data, tmp_path / "r", "--dtype", "fp16") == 3
    message, = messages(capsys)
    assert "step 1: loss" in message
    assert newest(tmp_path / "r") == 0
    # control
    start_scale(1.0)
    assert run(data, tmp_path / "r", "--dtype", "fp16", "--overwrite", "--stop_at", 1) == 75


# -------------------------------------------------------------------------------------------------
# The screen

def test_remaining_time_is_that_of_the_fastest_steps(tmp_path, capsys):
    """Catches: a forecast from the first steps, which are slow, or from a mean with them."""
    log = runs.Log(tmp_path, 0, max_steps=1020)
    for step in range(1, 21):
        seconds = 60.0 if step <= 15 else 0.6
        log.train(step, 128 * step, 3.0, 0.1, 1.0, seconds, 128, skipped=False)
    printed = capsys.readouterr().out
    # 1,000 steps of 0.6 s; with the mean of all 20 it would be 757 minutes
    assert "the training steps take 10.0 more minutes; to end sooner: --max_steps" in printed
    assert "1016.0 min left" in printed.splitlines()[3]  # control: only slow steps are known


def test_first_last_and_skipped_steps_are_printed(tmp_path, capsys):
    """Catches: a screen that stays empty at first, or that scrolls with every step."""
    log = runs.Log(tmp_path, 0, max_steps=30)
    for step in range(1, 31):
        log.train(step, 128 * step, 3.0, 0.1, 1.0, 0.01, 128, skipped=step == 9)
    printed = re.findall(r"^step +(\d+)/30 ", capsys.readouterr().out, re.MULTILINE)
    assert printed == ["1", "2", "3", "4", "9", "30"]
    assert steps(tmp_path) == list(range(1, 31))


@pytest.mark.row(51)
def test_reason_in_the_log_is_what_a_job_script_looks_for(data, tmp_path):
    """Catches: a job of README's example that is never put into the queue again."""
    pattern = '"reason": "stopped"'
    assert f"grep -q '{pattern}'" in (ROOT / "README.md").read_text()
    assert run(data, tmp_path / "r", "--stop_at", 2) == 75
    log = tmp_path / "r/metrics.jsonl"
    assert pattern in log.read_text().splitlines()[-1]
    before = log.stat()
    assert run(tmp_path / "nowhere", tmp_path / "r", "--resume") == 2
    assert log.stat().st_mtime_ns == before.st_mtime_ns  # not queued again for an error
    assert run(data, tmp_path / "r", "--resume", "--max_steps", 3) == 0
    assert pattern not in log.read_text().splitlines()[-1]  # control


@pytest.mark.row(49)
def test_slow_steps_are_reported_once(tmp_path, capsys):
    """Catches: a machine that another program slows down, and nobody knows why; a remark about one
    slow step, or in every line."""
    def remarks(durations):
        (tmp_path / "metrics.jsonl").unlink(missing_ok=True)
        log = runs.Log(tmp_path, 0, max_steps=1000)
        for step, seconds in enumerate(durations, 1):
            log.train(step, 128 * step, 3.0, 0.1, 1.0, seconds, 128, skipped=False)
        return re.findall("times as long as the fastest.*", capsys.readouterr().out)

    alternating = [0.1, 0.1, 0.5, 0.5] * 20
    assert remarks([5.0] + [0.1] * 50 + alternating) == []  # control
    remark, = remarks([0.1] * 30 + [0.5] * 60 + [0.1] + [0.5] * 60)
    assert "OMP_WAIT_POLICY=PASSIVE" in remark


# -------------------------------------------------------------------------------------------------
# The compiler

@pytest.mark.parametrize("flags, expected", [
    (["--max_steps", 500], True),
    (["--max_steps", 499], False),                 # too short to earn it back
    (["--max_steps", 500, "--no-compile"], False),
    (["--max_steps", 20, "--compile"], True),
    (["--max_steps", 500, "--no-fast"], False),
])
def test_long_runs_are_compiled(data, tmp_path, monkeypatch, flags, expected):
    """Catches: a default run at half its speed, a short one that spends its time compiling."""
    compiled = []
    monkeypatch.setattr(fast, "can_compile", lambda device: True)
    monkeypatch.setattr(Block, "compile", lambda block: compiled.append(block))
    assert run(data, tmp_path / "r", *flags, "--stop_at", 1) == 75
    assert bool(compiled) == expected
    (env,), = rows(tmp_path / "r", "start", ("env",))
    assert ("blocks" in env["fast"]) == expected


def test_run_goes_on_without_a_compiler(data, whole, tmp_path, capsys, monkeypatch):
    """Catches: a run that ends because the machine has no C++ compiler, or is silently slower."""
    def fail(function):
        raise RuntimeError("no compiler found\nand more")
    monkeypatch.setattr(torch, "compile", fail)
    assert run(data, tmp_path / "r", "--compile") == 0
    assert "no compiler found" in capsys.readouterr().err
    (env,), = rows(tmp_path / "r", "start", ("env",))
    assert env["fast"] == ["attention", "loss"]
    assert rows(tmp_path / "r") == rows(whole)


@pytest.mark.slow
def test_compiled_run_resumes_bitwise(data, whole, tmp_path):
    """Catches: a compiled run that is resumed without the compiler, or compiled otherwise."""
    assert run(data, tmp_path / "whole", "--compile") == 0
    assert run(data, tmp_path / "r", "--compile", "--stop_at", 8) == 75
    assert run(data, tmp_path / "r", "--compile", "--resume") == 0
    assert same(tmp_path / "whole", tmp_path / "r")
    losses = [loss for loss, in rows(whole, keys=("loss",))]
    compiled = [loss for loss, in rows(tmp_path / "r", keys=("loss",))]
    assert compiled == pytest.approx(losses, rel=1e-4)
    assert compiled != losses  # control: it was compiled


@pytest.mark.row(49)
@pytest.mark.parametrize("script", ["train", "sft", "evaluate", "sample", "bench.__main__"])
@pytest.mark.parametrize("given, expected", [
    ({}, "5000 1"),
    ({"GOMP_SPINCOUNT": "7", "THP_MEM_ALLOC_ENABLE": "0"}, "7 0"),  # what the user set stays
    ({"OMP_WAIT_POLICY": "PASSIVE"}, "None 1"),
    ({"PLAIN_PYTORCH": "1"}, "None None"),
])
def test_threads_and_memory_are_set_before_torch(script, given, expected):
    """Catches: a setting that is made after PyTorch has read it."""
    code = ("import os, sys\n"
            "class Finder:\n"
            "    def find_spec(name, *rest):\n"
            "        if name == 'torch':\n"
            "            names = ('GOMP_SPINCOUNT', 'THP_MEM_ALLOC_ENABLE')\n"
            "            print(*map(os.environ.get, names), flush=True)\n"
            "            os._exit(0)\n"
            "sys.meta_path.insert(0, Finder)\n"
            f"import {script}\n")
    env = {name: value for name, value in os.environ.items()
           if name not in ("GOMP_SPINCOUNT", "THP_MEM_ALLOC_ENABLE", "OMP_WAIT_POLICY",
                           "PLAIN_PYTORCH")}
    printed = subprocess.run([sys.executable, "-c", code], env={**env, **given}, cwd=ROOT,
                             capture_output=True, text=True).stdout
    assert printed == f"{expected}\n"


FAULTS = """
from support import cpu
import resource
import torch

def step():
    for i in range(10):
        torch.ones(10 ** 7)  # 40 MB

step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no mallopt")
def test_freed_memory_is_used_again():
    """Catches: large tensors whose memory Linux hands out anew in every step, page by page."""
    counts = []
    for plain in ("0", "1"):
        env = {**os.environ, "PLAIN_PYTORCH": plain}
        counts.append(int(subprocess.run([sys.executable, "-c", FAULTS], cwd=ROOT, env=env,
                                         capture_output=True, text=True, check=True).stdout))
    assert counts[0] < 100
    assert counts[1] > 150  # control: 10 tensors of 20 pages, if they are large ones


STEPS = """
import statistics, sys, time
sys.path.insert(0, sys.argv[1])
import train
import torch
from model import PRESETS, Llama
from support.devices import choose_dtype
device = torch.device("cpu")
model = Llama(PRESETS["tiny"])
optimizer = train.make_optimizer(model, train.read_settings([]), device)
tokens = torch.randint(4096, (8, 129))
dtype = choose_dtype("auto", device)
durations = []
for step in range(40):
    start = time.monotonic()
    with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
        _, loss = model(tokens[:, :-1], tokens[:, 1:])
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    durations.append(time.monotonic() - start)
print(1000 * statistics.median(durations))
"""


def step_of_tiny(busy, **env):
    """Milliseconds of a step beside `busy` programs, the median of 40."""
    clean = {name: value for name, value in os.environ.items()
             if not name.startswith(("OMP_", "GOMP_"))}
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(busy)]
    try:
        printed = subprocess.run([sys.executable, "-c", STEPS, str(ROOT)], env={**clean, **env},
                                 capture_output=True, text=True, check=True).stdout
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()
    return float(printed)


@pytest.mark.row(49)
@pytest.mark.slow
@pytest.mark.skipif(os.cpu_count() != 2, reason="the figures are of two cores")
def test_a_busy_core_slows_a_step_little():
    """Catches: threads that wait in loops as long as they do by themselves, so that a step takes
    many times as long beside another program."""
    found = {}
    settings = {"PyTorch by itself": {"PLAIN_PYTORCH": "1"}, "with support/cpu.py": {},
                "passive": {"OMP_WAIT_POLICY": "PASSIVE"}}
    for name, env in settings.items():
        idle = step_of_tiny(busy=0, **env)
        busy = step_of_tiny(busy=1, **env)
        found[name] = busy / idle
        print(f"{name}: {idle:.0f} ms idle, {busy:.0f} ms beside one busy program")
    assert found["with support/cpu.py"] < 4


@pytest.mark.row(47)
def test_failing_figure_does_not_fail_the_run(data, tmp_path, capsys, monkeypatch):
    """Catches: a finished run that ends in a traceback of matplotlib."""
    def fail(argv):
        raise ValueError("no such backend")
    monkeypatch.setattr(plot_dynamics, "main", fail)
    assert run(data, tmp_path / "r", "--max_steps", 1) == 0
    printed = capsys.readouterr()
    assert "no such backend" in printed.out + printed.err
    assert rows(tmp_path / "r", "end", ("reason",)) == [("done",)]


# -------------------------------------------------------------------------------------------------
# Settings and mistakes

@pytest.mark.parametrize("preset", train.BY_PRESET)
def test_help_shows_the_values_of_the_preset(capsys, preset):
    """Catches: a help that crashes, or that shows the settings of another preset."""
    assert exit_code(train.main, ["--preset", preset, "--help"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    values = {"lr": 6e-4, **train.BY_PRESET[preset]}
    for name, value in values.items():
        entry = re.search(rf" --{name} [A-Z{{].*?(?= --|$)", printed).group()
        assert f"(default: {value})" in entry
    assert set(train.BY_PRESET) == set(PRESETS)  # "test" is in both


@pytest.mark.row(13, 17)
@pytest.mark.parametrize("flags, message", [
    (["--nonsense", 1], "unrecognized arguments: --nonsense"),
    (["--max_step", 5], "unrecognized arguments: --max_step"),  # not an abbreviation of another
    (["--preset", "huge"], "invalid choice: 'huge'"),
    (["--dtype", "int8"], "invalid choice: 'int8'"),
    (["--max_steps", "1e3"], "--max_steps: invalid int value: '1e3'"),
    (["--max_steps", 0], "--max_steps: 0 is out of range — it can be 1 to"),
    (["--lr", "fast"], "--lr: invalid float value: 'fast'"),
    (["--lr", "nan"], "--lr: nan is out of range"),
    (["--lr", "inf"], "--lr: inf is out of range"),
    (["--beta1", 1], "--beta1: 1 is out of range"),
    (["--seed", 2**40], "--seed: "),
    (["--keep_last", 1], "--keep_last: 1 is out of range — it can be 2 to"),
    (["--threads", 0], "--threads: 0 is out of range"),
    (["--resume", "--overwrite"], "argument --overwrite: not allowed with argument --resume"),
    (["--reset_optimizer", "--overwrite"], "--reset_optimizer is for --resume"),
    (["--rewarm_steps", 5], "--rewarm_steps is for --resume --reset_optimizer"),
    (["--n_heads", 3], "dim 32 is not divisible by n_heads 3 — give other sizes"),
    (["--n_layers", 3, "--resume"], "n_layers (saved None, given 3)"),
    (["--device", "cuda:77"], "no device cuda:77"),
    (["--device", "meta"], "no device meta"),
    (["--batch_tokens", 100], "use --batch_tokens 64 or 128"),
    (["--batch_tokens", 32], "use --batch_tokens 64, or another --micro_batch"),
    (["--data", "nowhere"], "no data of ours in nowhere — run: python prepare_data.py text"),
    (["--seq_len", 100_000, "--batch_tokens", 400_000], "do not fill one window"),
    (["--benchmark", "nowhere.jsonl"], "nowhere.jsonl: No such file"),
    (["--init_from", "nowhere"], "nowhere: no such run"),
    (["--lr", 0.5, "--resume"], "lr (saved 0.01, given 0.5)"),
    (["--max_steps", 19, "--resume"], "is at step 20 already — give a larger --max_steps"),
    (["--stop_at", 7, "--resume"], "is at step 20 already — give a larger --stop_at"),
])
def test_mistake_is_one_line_and_loses_nothing(data, finished, capsys, flags, message):
    """Catches: a traceback; a run that is deleted before its successor's settings are checked."""
    before = contents(finished)
    if "--resume" not in flags and "--overwrite" not in flags:
        flags = [*flags, "--overwrite"]
    assert run(data, finished, *flags) == 2
    line, = messages(capsys)
    assert line.startswith("train.py: ")
    assert message in line
    assert contents(finished) == before


ENVIRONMENTS = {
    "RANK alone": dict(RANK="1"),
    "WORLD_SIZE alone": dict(WORLD_SIZE="2"),
    "without an address": dict(RANK="0", WORLD_SIZE="2", LOCAL_RANK="0"),
    "without a local rank": dict(RANK="0", WORLD_SIZE="2", MASTER_ADDR="h", MASTER_PORT="1"),
    "RANK too large": dict(RANK="2", WORLD_SIZE="2", LOCAL_RANK="0", MASTER_ADDR="h",
                           MASTER_PORT="1"),
    "RANK below 0": dict(RANK="-1", WORLD_SIZE="2", LOCAL_RANK="0", MASTER_ADDR="h",
                         MASTER_PORT="1"),
    "not a number": dict(RANK="0", WORLD_SIZE="two", LOCAL_RANK="0", MASTER_ADDR="h",
                         MASTER_PORT="1"),
    "not a port": dict(RANK="0", WORLD_SIZE="2", LOCAL_RANK="0", MASTER_ADDR="h",
                       MASTER_PORT="70000"),
}


@pytest.mark.row(46)
@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_ranks_that_torchrun_did_not_set_are_refused(data, tmp_path, capsys, monkeypatch, name):
    """Catches: a process that does nothing and says "done", that waits for ever, or a traceback,
    because of variables that another program has left."""
    for variable, value in ENVIRONMENTS[name].items():
        monkeypatch.setenv(variable, value)
    assert run(data, tmp_path / "r") == 2
    line, = messages(capsys)
    assert "which is not what torchrun sets" in line
    assert not (tmp_path / "r").exists()


@pytest.mark.row(46)
@pytest.mark.parametrize("env", [dict(MASTER_ADDR="h"), dict(RANK="0"), dict(WORLD_SIZE="1"),
                                 dict(LOCAL_RANK="3")])
def test_harmless_variables_are_ignored(data, tmp_path, monkeypatch, env):
    """Catches: a guard that refuses a single process. The control of the test before."""
    for variable, value in env.items():
        monkeypatch.setenv(variable, value)
    assert run(data, tmp_path / "r", "--max_steps", 1) == 0


@pytest.mark.row(45)
def test_resume_takes_the_saved_settings_of_the_machine(data, tmp_path, one_thread_afterwards):
    """Catches: --threads and --deterministic that a resume logs and does not apply."""
    flags = ("--threads", 2, "--deterministic", "--stop_at", 1)
    assert run(data, tmp_path / "r", *flags) == 75
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(False)
    argv = ["--run", tmp_path / "r", "--resume", "--stop_at", 2]
    assert exit_code(train.main, argv) == 75
    env, = rows(tmp_path / "r", "resume", ("env",))[0]
    assert env["threads"] == 2
    assert torch.are_deterministic_algorithms_enabled()
    assert exit_code(train.main, [*argv, "--no-deterministic", "--stop_at", 3]) == 75  # control
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.row(44)
def test_resume_with_another_vocabulary_is_refused(data, tmp_path, capsys):
    """Catches: a tokenizer that its data folder changed, and ids outside the embedding."""
    folder = shutil.copytree(data, tmp_path / "data")
    assert run(folder, tmp_path / "r", "--stop_at", 1) == 75
    meta = (folder / "meta.json").read_text()
    (folder / "meta.json").write_text(meta.replace("300", "301").replace("299", "300"))
    assert run(folder, tmp_path / "r", "--resume") == 2
    assert "has a vocabulary of 301, the model of 300" in messages(capsys)[-1]
    (folder / "meta.json").write_text(meta)  # control
    assert run(folder, tmp_path / "r", "--resume", "--stop_at", 2) == 75


@pytest.mark.row(45)
def test_reset_without_a_state_is_refused(data, tmp_path, capsys):
    """Catches: a flag that does nothing."""
    assert run(data, tmp_path / "r", "--resume", "--reset_optimizer") == 2
    assert "no state to continue without its optimizer" in messages(capsys)[-1]
    assert run(data, tmp_path / "r", "--resume", "--max_steps", 1) == 0  # control


def test_linked_checkpoints_are_not_replaced(data, tmp_path, capsys):
    """Catches: a link to a large disk that --overwrite turns into a folder on a small one."""
    large = tmp_path / "large"
    large.mkdir()
    (tmp_path / "r").mkdir()
    (tmp_path / "r/checkpoints").symlink_to(large)
    assert run(data, tmp_path / "r", "--resume", "--max_steps", 2) == 0  # control
    kept = names(large)
    assert len(kept) == 3
    assert run(data, tmp_path / "r", "--overwrite") == 2
    assert "checkpoints is a link" in messages(capsys)[-1]
    assert names(large) == kept


def names(folder):
    return sorted(file.name for file in folder.iterdir())


@pytest.mark.row(47)
def test_a_run_that_fails_gives_everything_back(data, tmp_path, capsys, monkeypatch):
    """Catches: a notebook in which Ctrl-C has no effect after a failed run, or whose run folder
    stays locked."""
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    held = []

    def fail(self, step, log):
        held.append(signal.getsignal(signal.SIGINT))
        raise UserError("no evaluation")

    with monkeypatch.context() as patch:
        patch.setattr(train.Observer, "evaluate", fail)
        try:
            train.main([*FLAGS, "--data", str(data), "--run", str(tmp_path / "r")])
        except SystemExit as error:
            kept = error  # as a notebook keeps the last one, with all its frames
    assert kept.code == 2
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    assert held[0] not in before  # control
    assert run(data, tmp_path / "r", "--resume", "--max_steps", 20) == 0


@pytest.mark.row(47)
def test_runs_in_a_thread_too(data, tmp_path):
    """Catches: signal handlers, which only the main thread of a program may set."""
    codes = []
    thread = threading.Thread(
        target=lambda: codes.append(run(data, tmp_path / "r", "--max_steps", 1)))
    thread.start()
    thread.join()
    assert codes == [0]


def test_first_start_with_a_mistake_leaves_the_folder_unused(data, tmp_path):
    """Catches: a first start with a mistake after which the second one is refused."""
    assert run(data, tmp_path / "r", "--batch_tokens", 100) == 2
    assert run(data, tmp_path / "r", "--max_steps", 1) == 0


def allocate(*args, **kwargs):
    torch.empty(2**60, dtype=torch.uint8)  # the error of PyTorch itself on a CPU


def run_out_of_cuda(*args, **kwargs):
    raise torch.OutOfMemoryError("CUDA out of memory")


def run_out_of_cublas(*args, **kwargs):
    raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")


# The first update makes the optimizer's moments, twice the size of the weights.
PLACES = {"step": (Llama, "forward"), "update": (torch.optim.AdamW, "step"),
          "evaluation": (evaluate, "evaluate"), "sample": (evaluate, "continue_prompt")}


@pytest.mark.parametrize("fail", [allocate, run_out_of_cuda, run_out_of_cublas])
@pytest.mark.parametrize("place", PLACES)
def test_out_of_memory_is_one_line(data, tmp_path, capsys, monkeypatch, place, fail):
    """Catches: a traceback of PyTorch where a smaller micro-batch is the answer."""
    assert run(data, tmp_path / "r", "--stop_at", 0) == 75
    monkeypatch.setattr(*PLACES[place], fail)
    monkeypatch.setattr(train, "due", lambda step, every, last: place not in ("step", "update"))
    assert run(data, tmp_path / "r", "--resume") == 2
    line, = messages(capsys)
    assert "train.py: out of memory — use a smaller --micro_batch" in line
    assert newest(tmp_path / "r") == 0


@pytest.mark.parametrize("fail", [allocate, run_out_of_cuda])
def test_out_of_memory_in_sampling_is_one_line(whole, capsys, monkeypatch, fail):
    """Catches: a traceback of PyTorch in sample.py."""
    monkeypatch.setattr(Llama, "generate", fail)
    assert exit_code(sample.main, [whole]) == 2
    line, = messages(capsys)
    assert "sample.py: out of memory — use a smaller --micro_batch" in line


def test_other_errors_are_not_taken_for_out_of_memory(whole, monkeypatch):
    """Catches: a mistake in the code that is reported as one of the user. The control of the
    tests before."""
    def fail(*args, **kwargs):
        raise RuntimeError("shapes differ")
    monkeypatch.setattr(Llama, "generate", fail)
    with pytest.raises(RuntimeError, match="shapes differ"):
        exit_code(sample.main, [whole])
