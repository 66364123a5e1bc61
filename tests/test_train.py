"""train.py: a run is its full state. Stopped and resumed, evaluated often or rarely, in small
micro-batches or large ones, it is the same run.

Each comparison has a control: the same comparison with a mistake made on purpose, which must show.
What may happen to a run from outside is in test_faults.py.
"""
import argparse
import functools
import json
import math
import os
import platform
import shutil
import signal
import subprocess
import sys
import threading
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import checkpoint
import evaluate
import plot_dynamics
import train
from conftest import FLAGS, ROOT, TEST, exit_code, messages, rows, run, same
from model import Block, Llama, SwiGLU
from support import durable, memory, runs
from support.runs import UserError

pytestmark = pytest.mark.usefixtures("short_samples")


def steps(folder):
    return [row[0] for row in rows(folder)]


def contents(folder):
    """{path: bytes} of a folder, without the lock, which is made again at each start."""
    return {path: path.read_bytes() for path in folder.rglob("*")
            if path.is_file() and path.name != ".lock"}


def newest(folder):
    """The step of the newest full state."""
    return durable.step_of(durable.find(folder, full=True))


def vector(model):
    """All weights in one vector."""
    return torch.nn.utils.parameters_to_vector(model.parameters()).detach()


def weights(folder, step=None):
    return vector(checkpoint.load_model(folder, step)[0])


@pytest.fixture
def finished(whole, tmp_path):
    """A copy of the run `whole`."""
    return shutil.copytree(whole, tmp_path / "finished")


@pytest.fixture
def interrupted(finished):
    """The same, as if killed before its last save: a resume goes on from step 16."""
    durable.remove(durable.folder_of(finished, 20))
    return finished


# -------------------------------------------------------------------------------------------------
# Stop and resume

# 0: nothing trained, and the states that `whole` has read back are not; 3: in the warm-up; 8: an
# evaluation is due; 18: the next batch crosses the end of an epoch.
@pytest.mark.row(1)
@pytest.mark.parametrize("stop", [0, 1, 3, 8, 18])
def test_resume_is_bitwise(data, whole, tmp_path, stop):
    """Catches: state that a resume loses; a batch read twice or not at all; a run that is another
    one because its first states are read back."""
    folder = tmp_path / "r"
    assert run(data, folder, "--stop_at", stop) == 75
    assert steps(folder) == list(range(1, stop + 1))
    assert run(data, folder, "--resume") == 0
    assert same(folder, whole)
    assert steps(folder) == list(range(1, 21))


def zero_moments(state):
    for moments in state["optimizer"].values():
        moments["exp_avg"].zero_()


def skip_a_step(state):
    state["step"] += 1
    state["tokens"] += 128


def change_seed(state):
    state["config"]["seed"] += 1


def round_weights(state):
    for tensor in state["model"].values():
        tensor.copy_(tensor.half())


@pytest.mark.row(2)
@pytest.mark.parametrize("mistake", [zero_moments, skip_a_step, change_seed, round_weights])
def test_resume_differs_if_state_is_incomplete(data, whole, interrupted, mistake):
    """Catches: a comparison of runs that cannot fail. The control of test_resume_is_bitwise."""
    state = checkpoint.load(durable.find(interrupted, full=True))
    mistake(state)
    checkpoint.save(interrupted, state, keep_last=2, keep_every=0)
    assert run(data, interrupted, "--resume") == 0
    assert not same(interrupted, whole)


def test_reset_optimizer_forgets_the_moments(data, whole, interrupted, capsys):
    """Catches: a --reset_optimizer that does nothing, that the log does not tell, or that replaces
    the state on the disk before its first step; a new warm-up that starts at 0, is too short, or is
    forgotten when the run is stopped within it."""
    before = contents(interrupted / "checkpoints")
    reset = ("--resume", "--reset_optimizer", "--rewarm_steps", 4)
    capsys.readouterr()
    assert run(data, interrupted, *reset, "--stop_at", 16) == 75
    told = [capsys.readouterr().out]
    assert contents(interrupted / "checkpoints") == before
    assert run(data, interrupted, *reset, "--stop_at", 18) == 75
    assert checkpoint.load(durable.newest(interrupted))["updates"] == 2  # as the moments include
    capsys.readouterr()
    assert run(data, interrupted, "--resume") == 0  # without the flags
    told.append(capsys.readouterr().out)
    resumes = rows(interrupted, "resume", ("step", "restored_optimizer"))
    assert resumes == [(16, False), (18, True)]
    usual = np.array(rows(whole, keys=("lr",))).flatten()
    rates = np.array(rows(interrupted, keys=("lr",))).flatten()
    assert np.allclose(rates, usual * ([1.0] * 16 + [0.25, 0.5, 0.75, 1.0]))
    assert not np.allclose(rates, usual)  # control
    assert f"lr {usual[16]:.2e} as saved, {rates[16]:.2e} now" in told[0]
    assert f"lr {rates[18]:.2e} as saved, {rates[18]:.2e} now" in told[1]


def test_update_rms_is_that_of_the_weights(data, whole, tmp_path):
    """Catches: a logged update that is not what the step did, or that changes the run."""
    folder = tmp_path / "r"
    assert run(data, folder, "--log_update_rms", "--stop_at", 2) == 75
    assert rows(folder) == rows(whole)[:2]
    found = [rms for rms, in rows(folder, keys=("update_rms",))]
    for step, rms in enumerate(found):
        change = weights(folder, step + 1) - weights(folder, step)
        assert math.isclose(rms, change.square().mean().sqrt(), rel_tol=1e-4)
    assert not math.isclose(found[0], found[1], rel_tol=1e-2)  # control


def test_sizes_of_the_network_can_be_given(data, tmp_path):
    """Catches: a size that is ignored, or that a resume changes."""
    folder = tmp_path / "r"
    sizes = ("--n_layers", 1, "--dim", 48, "--n_heads", 3, "--intermediate_size", 80)
    assert run(data, folder, *sizes, "--stop_at", 1) == 75
    assert run(data, folder, "--resume", "--stop_at", 2) == 75
    model, _, _ = checkpoint.load_model(folder)
    assert model.config == replace(TEST, n_layers=1, dim=48, n_heads=3, intermediate_size=80)


@pytest.fixture
def dropout(monkeypatch):
    """A network with dropout behind each feed-forward part, as a reader may try it; a list that
    grows by one with each forward of one in training."""
    forward = SwiGLU.forward
    calls = []

    def with_dropout(self, x):
        if self.training:
            calls.append(1)
        return F.dropout(forward(self, x), 0.1, training=self.training)
    monkeypatch.setattr(SwiGLU, "forward", with_dropout)
    return calls


@pytest.mark.row(1)
def test_resume_with_dropout_is_bitwise(data, tmp_path, dropout, monkeypatch):
    """Catches: a random state that is not saved, or not restored."""
    short = ("--max_steps", 4, "--save_every", 0)
    assert run(data, tmp_path / "straight", *short) == 0
    assert run(data, tmp_path / "r", *short, "--stop_at", 2) == 75
    shutil.copytree(tmp_path / "r", tmp_path / "wrong")
    torch.manual_seed(0)  # as in another process
    assert run(data, tmp_path / "r", *short, "--resume") == 0
    assert same(tmp_path / "r", tmp_path / "straight", 4)
    # control: without the random state it is another run
    monkeypatch.setattr(torch, "set_rng_state", lambda state: None)
    assert run(data, tmp_path / "wrong", *short, "--resume") == 0
    assert rows(tmp_path / "wrong") != rows(tmp_path / "straight")


def test_finished_run_stays_as_it_is(data, finished, capsys):
    """Catches: a finished run that --resume evaluates again, draws again or writes into."""
    before = contents(finished)
    assert run(data, finished, "--resume") == 0
    assert "is finished: 20 steps" in capsys.readouterr().out
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
def test_folder_in_use_is_refused(data, finished, capsys):
    """Catches: two processes that write into one run. (That a killed process leaves no
    lock is tested by each kill in test_faults.py.)"""
    before = contents(finished)
    lock = runs.hold(finished)
    for flag in ("--resume", "--overwrite"):
        assert run(data, finished, flag) == 2
        assert "in use by another process" in messages(capsys)[-1]
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


@pytest.mark.row(63)
def test_init_from_takes_weights_and_sizes(data, tmp_path):
    """Catches: a new run that starts from random weights, or with the step of the other run; an
    imported network of other padding, angles, norms or heads that goes on as another network."""
    folder = tmp_path / "r"
    torch.manual_seed(0)
    llama = Llama(replace(TEST, padded_vocab_size=300, rope_theta=10_000.0, norm_eps=1e-6,
                          n_heads=4, n_kv_heads=2, tie_embeddings=True))
    files = {"model.pt": {"config": asdict(llama.config), "model": llama.state_dict()}}
    durable.write_checkpoint(tmp_path / "imported", 7, files)
    assert run(data, folder, "--init_from", tmp_path / "imported", "--stop_at", 1) == 75
    assert run(data, folder, "--resume", "--stop_at", 2) == 75
    assert steps(folder) == [1, 2]
    for step, is_equal in ((0, True), (2, False)):  # 2: control
        model, _, _ = checkpoint.load_model(folder, step)
        assert model.config == llama.config
        assert torch.equal(vector(model), vector(llama)) == is_equal


@pytest.mark.row(42, 44, 63)
def test_weights_of_another_vocabulary_are_refused(data, finished, tmp_path, capsys):
    """Catches: weights that fit, since both vocabularies are padded to 384, but whose ids mean
    something else; a size that is given, and is not that of the weights."""
    other = shutil.copytree(data, tmp_path / "data")
    meta = json.loads((data / "meta.json").read_text())
    (other / "meta.json").write_text(json.dumps({**meta, "vocab_size": 301, "eot": 300}))
    new = tmp_path / "r"
    for folder, text, flags, message in [
            (new, other, ("--init_from", finished), "has vocab_size 300, here 301"),
            (new, data, ("--init_from", finished, "--n_heads", 4), "has n_heads 2, here 4"),
            (finished, other, ("--resume", "--max_steps", 30), "has vocab_size 300, here 301")]:
        assert run(text, folder, *flags) == 2
        assert message in messages(capsys)[-1]
    assert run(other, new, "--stop_at", 0) == 75  # control


@pytest.mark.row(63)
def test_base_is_not_replaced_by_its_child(data, finished, capsys):
    """Catches: --overwrite that deletes the run whose weights were asked for."""
    before = contents(finished)
    assert run(data, finished, "--init_from", f"{finished}/", "--overwrite") == 2
    assert "is the run to start from" in messages(capsys)[-1]
    assert contents(finished) == before


# -------------------------------------------------------------------------------------------------
# Evaluating, sampling and saving

@pytest.mark.row(33)
def test_evaluation_does_not_change_training(data, whole, tmp_path):
    """Catches: an evaluation, a sample or a save that draws the run's random numbers or changes
    its weights; weights that are the same for every seed."""
    often = ("--eval_every", 1, "--sample_every", 2, "--save_every", 3, "--eval_tokens", 64)
    assert run(data, tmp_path / "often", *often, "--stop_at", 10) == 75
    assert rows(tmp_path / "often") == rows(whole)[:10]
    # control
    assert run(data, tmp_path / "other", "--seed", 1, "--stop_at", 1) == 75
    assert rows(tmp_path / "other")[0] != rows(whole)[0]
    assert not torch.equal(weights(tmp_path / "other", 0), weights(whole, 0))


def test_events_are_in_order(data, whole, tmp_path):
    """Catches: an event that is missing, doubled, or at another step; a run that is too short for
    its first questions and ends without any."""
    found = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    names = [f"{row['event']} {row['step']}" for row in found]
    assert names[:10] == ["start 0", "eval 0", "sample 0", "train 1", "eval 1", "sample 1",
                          "train 2", "eval 2", "benchmark 2", "sample 2"]
    assert names[-5:] == ["train 20", "eval 20", "benchmark 20", "sample 20", "end 20"]
    assert run(data, tmp_path / "r", "--benchmark_from", 100, "--max_steps", 3) == 0
    every = [(0,), (1,), (2,), (4,), (8,), (16,), (20,)]
    for event, steps_of_it in (("eval", every), ("sample", every), ("benchmark", every[2:])):
        assert rows(whole, event, ("step",)) == steps_of_it
    assert rows(tmp_path / "r", "benchmark", ("step",)) == [(3,)]


def test_checkpoints_follow_the_keep_rule(data, whole, tmp_path):
    """Catches: a trajectory with holes, too few full states to fall back on, a disk that fills."""
    flags = ("--save_every", 7, "--keep_every", 7, "--keep_last", 3, "--eval_every", 0)
    assert run(data, tmp_path / "r", *flags) == 0
    for folder, small, full in [(whole, [0, 1, 2, 4, 8], [16, 20]),
                                (tmp_path / "r", [0, 1, 2, 4, 7, 8], [14, 16, 20])]:
        found = durable.checkpoints(folder)
        assert list(found) == small + full  # the small ones hold weights alone
        assert [step for step in found if (found[step] / "train_state.pt").exists()] == full


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


def test_training_equals_a_plain_loop(data, tmp_path):
    """Catches: a batch of another step, a wrong mean over micro-batches, a skipped clip, the
    learning rate of another step, a decay of vectors or of nothing."""
    folder = tmp_path / "r"
    flags = ("--max_steps", 4, "--micro_batch", 2, "--grad_clip", 0.5, "--weight_decay", 10)
    assert run(data, folder, *flags) == 0
    found = rows(folder, keys=("loss", "lr", "grad_norm"))
    assert min(norm for _, _, norm in found) > 0.5  # every step is clipped

    def plain(clip, decay):
        """Numbers of each step; how far its weights are from ours, relative to what it moved."""
        model, _, _ = checkpoint.load_model(folder, step=0)
        numbers = plain_training(model, data, clip, decay)
        distance = (weights(folder) - vector(model)).norm()
        return numbers, distance / (vector(model) - weights(folder, 0)).norm()

    numbers, distance = plain(clip=0.5, decay=10.0)
    assert np.allclose(found, numbers, rtol=1e-4)
    assert distance < 1e-3
    assert plain(clip=math.inf, decay=10.0)[1] > 0.01  # control: without the clip
    assert plain(clip=0.5, decay=0.0)[1] > 0.01        # control: without the decay


@pytest.mark.row(16)
def test_micro_batch_changes_nothing_but_speed(data, whole, tmp_path):
    """Catches: micro-batches that count twice, or are averaged one by one."""
    stop = ("--stop_at", 6)
    assert run(data, tmp_path / "small", *stop, "--micro_batch", 1) == 75
    assert np.allclose(rows(tmp_path / "small"), rows(whole)[:6], rtol=1e-4)
    # control: half the batch
    assert run(data, tmp_path / "half", *stop, "--batch_tokens", 64) == 75
    assert not np.allclose(rows(tmp_path / "half"), rows(whole)[:6], rtol=1e-2)


def test_activation_checkpointing_changes_no_bit(data, tmp_path, dropout, monkeypatch):
    """Catches: a recomputation that gives other numbers, or draws other random numbers than the
    forward; a flag that does nothing."""
    short = ("--max_steps", 3, "--save_every", 0, "--no-fast")
    flag = "--activation_checkpointing"
    assert run(data, tmp_path / "plain", *short) == 0
    once = len(dropout)
    assert run(data, tmp_path / "r", *short, flag) == 0
    assert len(dropout) == once + 2 * once  # in the forward and in the backward
    assert same(tmp_path / "r", tmp_path / "plain", 3)
    # control
    forgetful = functools.partial(memory.keep_only_inputs, preserve_rng_state=False)
    monkeypatch.setattr(memory, "keep_only_inputs", forgetful)
    assert run(data, tmp_path / "wrong", *short, flag) == 0
    assert rows(tmp_path / "wrong")[0] != rows(tmp_path / "plain")[0]


# -------------------------------------------------------------------------------------------------
# Another optimizer, as a reader may try it: make_optimizer alone is edited

class MuonAndAdamW:
    """Muon for the matrices of the blocks, AdamW for the rest, as one optimizer."""

    def __init__(self, model, args):
        blocks = [p for p in model.model.layers.parameters() if p.dim() == 2]
        rest = [p for p in model.parameters() if p not in set(blocks)]
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

    def __init__(self, model, args):
        super().__init__(model.parameters(), lr=args.lr)

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
    "a number": Counting,
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
    short = ("--max_steps", 4, "--save_every", 0, "--no-fast")
    assert run(data, tmp_path / "straight", *short) == 0
    assert run(data, tmp_path / "r", *short, "--stop_at", 2) == 75
    shutil.copytree(tmp_path / "r", tmp_path / "forgetful")
    assert run(data, tmp_path / "r", *short, "--resume") == 0
    assert same(tmp_path / "r", tmp_path / "straight", 4)
    # control: without the state it is another run, if there is one
    assert run(data, tmp_path / "forgetful", *short, "--resume", "--reset_optimizer") == 0
    assert same(tmp_path / "forgetful", tmp_path / "straight", 4) == (name == "SGD")


def test_run_of_another_optimizer_is_refused(data, interrupted, capsys, optimizer):
    """Catches: moments of one optimizer that another one takes for its own."""
    optimizer(torch_optimizer("Adam"))  # whose state has the same names and shapes
    assert run(data, interrupted, "--resume") == 2
    assert "has the state of 'AdamW', and this code uses Adam" in messages(capsys)[-1]
    assert run(data, interrupted, "--resume", "--reset_optimizer") == 0  # as it says


class Odd(Llama):
    """Has frozen weights, a parameter that no loss depends on, and a block that is left out in some
    micro-batches: some parameters have no moments, and some have had fewer updates."""

    def __init__(self, config):
        super().__init__(config)
        self.model.embed_tokens.requires_grad_(False)
        self.unused = torch.nn.Parameter(torch.ones(3))
        forward = self.model.layers[-1].forward

        def sometimes(x, *args):
            return x if self.training and torch.rand(()) < 0.7 else forward(x, *args)
        self.model.layers[-1].forward = sometimes


def test_parameters_without_a_gradient_are_resumed_too(data, tmp_path, monkeypatch):
    """Catches: weights that are not saved because they are frozen; a state that cannot be restored
    because a parameter has no moments, or was updated less often."""
    folder = tmp_path / "r"
    short = ("--max_steps", 6, "--save_every", 0, "--no-fast")
    monkeypatch.setattr(train, "Llama", Odd)
    monkeypatch.setattr(checkpoint, "Llama", Odd)
    assert run(data, tmp_path / "straight", *short) == 0
    assert run(data, folder, *short, "--stop_at", 3) == 75
    moments = checkpoint.load(durable.find(folder, full=True))["optimizer"]
    updates = {float(each["step"]) if each else 0.0 for each in moments.values()}
    assert len(updates) > 2  # control: there are such parameters
    assert run(data, folder, *short, "--resume") == 0
    assert same(folder, tmp_path / "straight", 6)


class WithoutState(MuonAndAdamW, torch.optim.Optimizer):
    """As it is written first: an optimizer of its own, whose state is not that of its parts."""

    def __init__(self, model, args):
        MuonAndAdamW.__init__(self, model, args)
        torch.optim.Optimizer.__init__(self, self.param_groups, {})


class CountingItself(Counting):
    def step(self):
        super().step()
        self.k = getattr(self, "k", 0) + 1


class CountingInGroups(Counting):
    def step(self):
        super().step()
        for group in self.param_groups:
            group["k"] = group.get("k", 0) + 1


@pytest.mark.parametrize("kind, lost", [
    (WithoutState, "lm_head.weight.exp_avg"),
    (CountingItself, "changed: k"),
    (CountingInGroups, "param_groups.0.k"),
])
def test_run_that_cannot_be_resumed_ends_at_its_start(data, interrupted, tmp_path, capsys,
                                                      optimizer, kind, lost):
    """Catches: hours of training with an optimizer that keeps something where no checkpoint looks
    for it; also one that takes the place of another."""
    optimizer(kind)
    reset = ("--resume", "--reset_optimizer", "--save_every", 1)
    for folder, flags, last in ((tmp_path / "new", (), 2), (interrupted, reset, 18)):
        assert run(data, folder, *flags) == 2
        assert lost in messages(capsys)[-1]
        assert steps(folder)[-1] <= last


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
    assert "so it ends here; lost or changed: state." in messages(capsys)[-1]


def test_each_group_keeps_its_own_rate(data, interrupted, optimizer):
    """Catches: a schedule that gives all groups the same rate, also after a resume."""
    rates = []

    class AdamW(torch.optim.AdamW):
        def step(self, *args):
            rates.append([group["lr"] for group in self.param_groups])
            return super().step(*args)

    def make(model, args):
        groups = [{"params": model.lm_head.parameters(), "lr": 0.1 * args.lr},
                  {"params": model.model.parameters()}]
        return AdamW(groups, lr=args.lr)
    optimizer(make)
    assert run(data, interrupted, "--resume") == 0
    logged = rows(interrupted, keys=("lr",))[16:]
    # The first step makes the optimizer's state.
    assert np.allclose(rates[1:], np.array(logged) * [0.1, 1.0], rtol=1e-12)
    assert len(set(logged)) == 4  # control


# -------------------------------------------------------------------------------------------------
# The learning rate

def lr_at(step, **changes):
    """The rate of a run with round numbers: 10 steps of warm-up, 100 more, from 1.0 to 0.1."""
    settings = {"lr": 1.0, "min_lr": 0.1, "warmup_steps": 10, "max_steps": 110,
                "schedule": "cosine", **changes}
    return train.lr_at(step, argparse.Namespace(**settings))


@pytest.mark.parametrize("schedule, points", [
    ("cosine", {35: 0.1 + 0.9 * 0.8535534, 60: 0.55}),  # (1 + √½) / 2
    ("linear", {35: 0.1 + 0.9 * 0.75, 60: 0.55}),
    ("wsd", {60: 1.0, 88: 1.0, 99: 0.55}),  # the last 22 steps decay
])
def test_lr_follows_its_schedule(schedule, points):
    """Catches: a wrong shape, a warm-up that starts at 0, a decay that ends elsewhere."""
    expected = {0: 0.1, 4: 0.5, 9: 1.0, 10: 1.0, 110: 0.1, **points}
    found = {step: lr_at(step, schedule=schedule) for step in expected}
    assert found == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd"])
def test_lr_has_no_jump(schedule):
    """Catches: a warm-up that reaches into the decay of wsd, or over the end of the run."""
    for warmup in (0, 20, 90, 150):
        rates = [lr_at(step, schedule=schedule, warmup_steps=warmup, max_steps=100)
                 for step in range(101)]
        rise = 1 / max(1, warmup)
        decay_steps = max(1, min(20, 100 - warmup))  # of wsd, the shortest
        steepest = 0.9 * math.pi / 2 / decay_steps   # of a cosine that is as short
        assert np.abs(np.diff(rates)).max() <= max(rise, steepest) + 1e-9
        assert max(rates) <= 1.0


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
def test_resume_in_another_precision_goes_on(data, interrupted, capsys):
    """Catches: a loss scaler without a saved state, after a move to another machine; one that is
    saved and not needed any more."""
    for dtype, end in (("fp16", 18), ("fp32", 20)):
        assert run(data, interrupted, "--resume", "--dtype", dtype, "--stop_at", end) == 75
    assert "dtype float16 → float32" in capsys.readouterr().out
    assert steps(interrupted) == list(range(1, 21))


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
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [row["step"] for row in map(json.loads, lines) if "skipped" in row]


@pytest.mark.row(21)
def test_skipped_updates_are_printed_and_change_nothing(data, tmp_path, capsys, start_scale):
    """Catches: a skip that ends the run, that nobody sees, or that changes weights."""
    start_scale(2.0**27)
    assert run(data, tmp_path / "r", "--dtype", "fp16", "--stop_at", 9) == 75
    found = skipped(tmp_path / "r")
    assert found == list(range(1, len(found) + 1))
    assert 2 <= len(found) < 9
    assert capsys.readouterr().out.count("fp16 overflow, update skipped") == len(found)
    start = weights(tmp_path / "r", 0)
    assert torch.equal(weights(tmp_path / "r", 2), start)
    assert not torch.equal(weights(tmp_path / "r", 9), start)  # control


@pytest.mark.row(21)
def test_20_skipped_updates_in_a_row_end_the_run(data, tmp_path, capsys, start_scale):
    """Catches: a run that skips for ever, or one that cannot go on afterwards."""
    start_scale(2.0**44)
    flags = ("--dtype", "fp16", "--max_steps", 24, "--eval_every", 0)
    assert run(data, tmp_path / "r", *flags) == 3
    message, = messages(capsys)
    assert "step 20: loss" in message
    assert skipped(tmp_path / "r") == list(range(1, 20))
    assert newest(tmp_path / "r") == 19
    assert run(data, tmp_path / "r", *flags, "--resume") == 0


@pytest.mark.row(21)
def test_loss_scale_below_1_ends_the_run(data, tmp_path, capsys, start_scale):
    """Catches: gradients that no scale saves from an overflow."""
    flags = ("--dtype", "fp16", "--overwrite", "--stop_at", 1)
    for scale, code in ((0.5, 3), (1.0, 75)):  # 1.0: control
        start_scale(scale)
        assert run(data, tmp_path / "r", *flags) == code
        assert newest(tmp_path / "r") == (code == 75)
    assert "step 1: loss" in messages(capsys)[0]


# -------------------------------------------------------------------------------------------------
# The screen

@pytest.mark.row(49)
def test_screen_goes_by_the_fastest_steps(tmp_path, capsys):
    """Catches: a forecast from the first steps, which are slow; a machine that another program
    slows down, and nobody knows why; a remark about one slow step, or in every line."""
    def printed(durations):
        log = runs.Log(tmp_path, 0, max_steps=1020)
        for step, seconds in enumerate(durations, 1):
            log.train(step, 128 * step, 3.0, 0.1, 1.0, seconds, 128, skipped=False)
        (tmp_path / "metrics.jsonl").unlink()
        return capsys.readouterr().out

    remark = "times as long as the fastest"
    alternating = [0.6, 0.6, 3.0, 3.0] * 20
    text = printed([60.0] * 15 + [0.6] * 50 + alternating)
    assert "the training steps take 10.0 more minutes" in text  # 1,000 steps of 0.6 s
    assert remark not in text  # control
    assert printed([0.1] * 30 + [0.5] * 60 + [0.1] + [0.5] * 60).count(remark) == 1


# -------------------------------------------------------------------------------------------------
# The compiler, and settings of the machine

@pytest.mark.parametrize("flags, expected", [
    (["--max_steps", 500], True),
    (["--max_steps", 499], False),  # too short to earn it back
    (["--max_steps", 500, "--no-compile"], False),
    (["--max_steps", 500, "--no-fast"], False),
])
def test_long_runs_are_compiled(data, tmp_path, monkeypatch, flags, expected):
    """Catches: a default run at half its speed, a short one that spends its time compiling."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    monkeypatch.setattr(Block, "compile", lambda block: None)
    assert run(data, tmp_path / "r", *flags, "--stop_at", 1) == 75
    (env,), = rows(tmp_path / "r", "start", ("env",))
    assert ("blocks" in env["fast"]) == expected


def test_run_goes_on_without_a_compiler(data, whole, tmp_path, capsys, monkeypatch):
    """Catches: a run that ends because the machine has no C++ compiler, or is silently slower."""
    def fail(function):
        raise RuntimeError("no compiler found")
    monkeypatch.setattr(torch, "compile", fail)
    assert run(data, tmp_path / "r", "--compile", "--stop_at", 2) == 75
    assert "no compiler found" in capsys.readouterr().err
    assert rows(tmp_path / "r") == rows(whole)[:2]


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


# Prints what the environment is when torch is imported, instead of importing it.
LOOK = """
import os, sys
class Finder:
    def find_spec(name, *rest):
        if name == "torch":
            names = ("GOMP_SPINCOUNT", "THP_MEM_ALLOC_ENABLE")
            print(*map(os.environ.get, names), flush=True)
            os._exit(0)
sys.meta_path.insert(0, Finder)
import """


@pytest.mark.row(49)
@pytest.mark.parametrize("script, given, expected", [
    ("train", {}, "2000 1"),
    ("sft", {}, "2000 1"),
    ("evaluate", {}, "2000 1"),
    ("sample", {}, "2000 1"),
    ("bench.__main__", {}, "2000 1"),
    ("train", {"GOMP_SPINCOUNT": "7", "THP_MEM_ALLOC_ENABLE": "0"}, "7 0"),  # the user's stay
    ("train", {"OMP_WAIT_POLICY": "PASSIVE"}, "None 1"),
    ("train", {"PLAIN_PYTORCH": "1"}, "None None"),
])
def test_threads_and_memory_are_set_before_torch(script, given, expected):
    """Catches: a setting that is made after PyTorch has read it."""
    env = {"PATH": os.environ["PATH"], **given}
    printed = subprocess.run([sys.executable, "-c", LOOK + script], env=env, cwd=ROOT,
                             capture_output=True, text=True).stdout
    assert printed == f"{expected}\n"


# Counts the pages that Linux hands out for large blocks, as those of tensors, in a second round.
FAULTS = """
from support import cpu
import resource

def step():
    for i in range(10):
        b"x" * (4 * 10**7)

step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no mallopt")
def test_freed_memory_is_used_again():
    """Catches: large tensors whose memory Linux hands out anew in every step, page by page."""
    def faults(plain):
        printed = subprocess.run([sys.executable, "-c", FAULTS], cwd=ROOT, check=True,
                                 env={"PLAIN_PYTORCH": plain}, capture_output=True).stdout
        return int(printed)

    assert faults(plain="0") < 100
    assert faults(plain="1") > 150  # control: 10 blocks of 20 pages, if these are large ones


STEPS = """
import statistics, time
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
for step in range(24):
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


def step_of_tiny(busy, env):
    """Milliseconds of a step beside `busy` programs, the median of 24."""
    clean = {name: value for name, value in os.environ.items()
             if not name.startswith(("OMP_", "GOMP_"))}
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(busy)]
    try:
        printed = subprocess.run([sys.executable, "-c", STEPS], env={**clean, **env}, cwd=ROOT,
                                 capture_output=True, check=True).stdout
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
    for env in ({"PLAIN_PYTORCH": "1"}, {"OMP_WAIT_POLICY": "PASSIVE"}, {}):
        idle = step_of_tiny(0, env)
        busy = step_of_tiny(1, env)
        print(f"{env}: {idle:.0f} ms idle, {busy:.0f} ms beside one busy program")
    assert busy / idle < 4  # of the last, with support/cpu.py


@pytest.mark.row(45)
def test_resume_takes_the_saved_settings_of_the_machine(data, tmp_path, one_thread_afterwards):
    """Catches: --threads and --deterministic that a resume logs and does not apply."""
    folder = tmp_path / "r"
    assert run(data, folder, "--threads", 2, "--deterministic", "--stop_at", 0) == 75
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(False)
    resume = ["--run", folder, "--resume", "--stop_at", 0]
    assert exit_code(train.main, resume) == 75
    assert torch.get_num_threads() == 2
    assert torch.are_deterministic_algorithms_enabled()
    assert exit_code(train.main, [*resume, "--no-deterministic"]) == 75  # control
    assert not torch.are_deterministic_algorithms_enabled()


# -------------------------------------------------------------------------------------------------
# Mistakes, and what a run leaves behind in its process

def test_help_shows_the_values_of_the_preset(capsys):
    """Catches: a help that crashes, or that shows the settings of another preset."""
    assert exit_code(train.main, ["--preset", "1.7b", "--help"]) == 0
    assert "(default: 38147)" in capsys.readouterr().out


@pytest.mark.row(13, 17, 45)
@pytest.mark.parametrize("flags, message", [
    (["--lr", "nan"], "--lr: nan is out of range"),
    (["--schedule", "sqrt"], "--schedule sqrt has no branch in lr_at"),
    (["--resume", "--overwrite"], "--overwrite: not allowed with argument --resume"),
    (["--reset_optimizer"], "--reset_optimizer is for --resume"),
    (["--rewarm_steps", 5], "--rewarm_steps is for --resume --reset_optimizer"),
    (["--n_heads", 3], "dim 32 is not divisible by n_heads 3"),
    (["--device", "cuda:77"], "device cuda:77 cannot be used here ("),
    (["--batch_tokens", 100], "use --batch_tokens 64 or 128"),
    (["--batch_tokens", 32], "use --batch_tokens 64, or another --micro_batch"),
    (["--data", "nowhere"], "no data of ours in nowhere"),
    (["--seq_len", 100_000, "--batch_tokens", 400_000], "do not fill one window"),
    (["--benchmark", "nowhere.jsonl"], "nowhere.jsonl: No such file"),
    (["--init_from", "nowhere"], "nowhere: no such run"),
    (["--init_from", ""], "--init_from is empty"),  # of a shell variable that is not set
    (["--max_steps", 19, "--resume"], "is at step 20 already"),
])
def test_mistake_is_one_line_and_loses_nothing(data, finished, capsys, flags, message):
    """Catches: a traceback; a run that is deleted before its successor's settings are checked."""
    before = contents(finished)
    if "--resume" not in flags:
        flags = [*flags, "--overwrite"]
    assert run(data, finished, *flags) == 2
    line, = messages(capsys)
    assert line.startswith("train.py: ")
    assert message in line
    assert contents(finished) == before


RANK_1 = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "h",
          "MASTER_PORT": "1"}


@pytest.mark.row(46)
@pytest.mark.parametrize("env, code", [
    ({"RANK": "1"}, 2),
    ({**RANK_1, "RANK": "2"}, 2),
    ({**RANK_1, "RANK": "one"}, 2),
    ({"MASTER_ADDR": "h", "RANK": "0"}, 75),  # control: a single process may go on
])
def test_ranks_that_torchrun_did_not_set_are_refused(data, tmp_path, capsys, monkeypatch, env,
                                                     code):
    """Catches: a process that does nothing and says "done", that waits for ever, or a traceback,
    because of variables that another program has left."""
    for variable, value in env.items():
        monkeypatch.setenv(variable, value)
    assert run(data, tmp_path / "r", "--stop_at", 0) == code
    assert (tmp_path / "r").exists() == (code == 75)
    if code == 2:
        message, = messages(capsys)
        assert "which is not what torchrun sets" in message


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


@pytest.mark.row(47)
def test_a_run_that_fails_gives_everything_back(data, tmp_path, monkeypatch):
    """Catches: a notebook in which Ctrl-C has no effect after a failed run, or whose run folder
    stays locked."""
    before = signal.getsignal(signal.SIGINT)
    held = []

    def fail(self, step, log):
        held.append(signal.getsignal(signal.SIGINT))
        raise UserError("no evaluation")

    with monkeypatch.context() as patch:
        patch.setattr(train.Observer, "evaluate", fail)
        with pytest.raises(SystemExit) as kept:  # with all its frames, as a notebook keeps it
            train.main([*FLAGS, "--data", data, "--run", tmp_path / "r"])
    assert kept.value.code == 2
    assert signal.getsignal(signal.SIGINT) == before
    assert held[0] != before  # control
    assert run(data, tmp_path / "r", "--resume", "--stop_at", 0) == 75


@pytest.mark.row(47)
def test_runs_in_a_thread_too(data, tmp_path):
    """Catches: signal handlers, which only the main thread of a program may set."""
    codes = []
    thread = threading.Thread(
        target=lambda: codes.append(run(data, tmp_path / "r", "--stop_at", 0)))
    thread.start()
    thread.join()
    assert codes == [75]


def allocate(*args, **kwargs):
    torch.empty(2**60, dtype=torch.uint8)  # the error of PyTorch itself on a CPU


# The first update makes the optimizer's moments, twice the size of the weights.
@pytest.mark.parametrize("owner, name", [(Llama, "forward"), (torch.optim.AdamW, "step"),
                                         (evaluate, "evaluate")])
def test_out_of_memory_is_one_line(data, interrupted, capsys, monkeypatch, owner, name):
    """Catches: a traceback of PyTorch where a smaller micro-batch is the answer."""
    monkeypatch.setattr(owner, name, allocate)
    assert run(data, interrupted, "--resume") == 2
    assert "train.py: out of memory — use a smaller --micro_batch" in messages(capsys)[-1]
    assert newest(interrupted) == 16
