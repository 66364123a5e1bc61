"""support/lora.py: adapters, their merge, and a run folder that is whole without its base."""
import errno
import os
import shutil
import signal

import pytest
import torch

import checkpoint
import sample
import sft
from conftest import TUNE, exit_code, messages, rows, run, same, tune
from support import durable, lora


@pytest.fixture(scope="module", autouse=True)
def short_answers():
    """Answers of 4 tokens, as in trials.py: the time goes into what is tested."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sft.AnswerObserver, "LONGEST", 4)
        yield


TOKENS = torch.randint(0, 300, (2, 20), generator=torch.Generator().manual_seed(0))


def network(run):
    return checkpoint.load_model(run)[0]


# -------------------------------------------------------------------------------------------------
# Adapters

def test_only_adapters_of_linear_layers_are_trained(whole):
    """Catches: a layer without adapters, a weight that is not frozen, a parameter's other name; a
    part of a block that a reader has added, taken for a linear layer."""
    model = network(whole)
    model.model.layers[0].mlp.drop = torch.nn.Dropout(0.1)
    shapes = {name: p.shape for name, p in model.named_parameters()}
    lora.add_adapters(model, 4, 16)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(trained) == 2 * 7 * 2  # A and B of 7 layers in 2 blocks
    assert all(".lora_" in name for name in trained)
    frozen = {name: p.shape for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == shapes


def test_adapted_layer_is_the_formula():
    """Catches: a factor other than alpha / rank, or A and B in the wrong order."""
    linear = torch.nn.Linear(6, 5, bias=False)
    adapted = lora.LoRALinear(linear, rank=2, alpha=8)
    torch.nn.init.normal_(adapted.lora_B)
    x = torch.randn(3, 6)
    low_rank = adapted.lora_B @ adapted.lora_A  # (5, 6)
    assert torch.allclose(adapted(x), x @ (linear.weight + 4 * low_rank).T, atol=1e-6)
    assert not torch.allclose(adapted(x), x @ (linear.weight + low_rank).T, atol=1e-6)  # control


def test_merged_weights_equal_adapters(whole):
    """Catches: a B that does not start as zeros, so that tuning starts from another model; a merge
    without the scale, or into the wrong layer."""
    model = network(whole)
    before, _ = model(TOKENS)
    lora.add_adapters(model, 4, 16)
    assert torch.equal(model(TOKENS)[0], before)
    adapters = {name: t for name, t in model.state_dict().items() if ".lora_" in name}
    for name, tensor in adapters.items():
        if name.endswith(".lora_B"):
            torch.nn.init.normal_(tensor, std=0.1)
    after, _ = model(TOKENS)
    merged = network(whole)
    lora.merge(merged.state_dict(), adapters)  # in place: into the tensors of `merged`
    assert torch.allclose(merged(TOKENS)[0], after, rtol=1e-5, atol=1e-4)
    assert not torch.allclose(before, after, rtol=1e-5, atol=1e-4)  # control


# -------------------------------------------------------------------------------------------------
# A LoRA run is one folder

def weights_of(run, step=None):
    """The weights of a run as {name: tensor}, adapters merged."""
    return checkpoint.load_model(run, step)[0].state_dict()


def equal(a, b):
    assert a.keys() == b.keys()
    return all(torch.equal(a[name], b[name]) for name in a)


def resume(folder, *flags):
    return exit_code(sft.main, ["--run", folder, "--resume", *flags])


@pytest.fixture(scope="module")
def adapted(short_answers, whole, instructions, tmp_path_factory):
    """A LoRA run of 12 steps that was not disturbed."""
    folder = tmp_path_factory.mktemp("adapted") / "r"
    assert tune(whole, instructions, folder, "--lora", 4) == 0
    return folder


def test_lora_saves_adapters_only(whole, adapted):
    """Catches: a checkpoint with the frozen weights, or moments of them; a second copy of the
    base's weights on the disk, or those of another step."""
    folder = adapted / "checkpoints/step_00000012"
    weights = durable.load_file(folder / "model.pt")["model"]
    moments = durable.load_file(folder / "train_state.pt")["optimizer"]
    scales = {name for name in weights if name.endswith(".lora_scale")}
    assert len(scales) == 2 * 7
    assert weights.keys() - scales == moments.keys()
    assert all(".lora_" in name for name in moments)
    assert os.path.samefile(adapted / "base.pt", whole / "checkpoints/step_00000020/model.pt")
    assert equal(weights_of(adapted, 0), weights_of(whole))
    assert not equal(weights_of(adapted, 12), weights_of(whole))  # control: it is tuned


def test_base_is_copied_where_links_are_impossible(whole, instructions, tmp_path, monkeypatch):
    """Catches: a tuning that fails, or keeps no base, on another file system than its base's."""
    def refuse(*args):
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    monkeypatch.setattr(os, "link", refuse)
    folder = tmp_path / "r"
    assert tune(whole, instructions, folder, "--lora", 4, "--stop_at", 0) == 75
    original = whole / "checkpoints/step_00000020/model.pt"
    assert not os.path.samefile(folder / "base.pt", original)  # control
    assert (folder / "base.pt").read_bytes() == original.read_bytes()


def test_lora_run_survives_its_base(whole, data, instructions, adapted, tmp_path):
    """Catches: a base that a tuning writes to; adapters that are merged into other weights than
    those they were trained on, or into none, after the base was overwritten or deleted; a run
    folder that holds a path to itself."""
    base = tmp_path / "base"
    shutil.copytree(whole, base)
    assert tune(base, instructions, tmp_path / "r", "--lora", 4, "--stop_at", 6) == 75
    assert same(base, whole)
    before = weights_of(tmp_path / "r")
    assert run(data, base, "--overwrite", "--max_steps", 2, "--seed", 2) == 0
    assert not equal(weights_of(base), weights_of(whole))  # control
    assert equal(weights_of(tmp_path / "r"), before)
    shutil.rmtree(base)
    folder = (tmp_path / "r").rename(tmp_path / "elsewhere")
    assert resume(folder) == 0
    assert same(folder, adapted, 12)
    assert equal(weights_of(folder), weights_of(adapted))


def flip_a_bit(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.unlink()  # not through the link, which would damage the base too
    file.write_bytes(bytes(content))


def other_json(file):
    file.write_text('{"base.pt": 3}')


@pytest.mark.parametrize("name, damage", [
    ("base.pt", flip_a_bit), ("base.pt", os.unlink), ("base.json", other_json)])
def test_damaged_base_is_one_line(instructions, adapted, tmp_path, capsys, name, damage):
    """Catches: adapters that are merged into damaged weights, or a traceback."""
    folder = tmp_path / "r"
    shutil.copytree(adapted, folder)
    assert equal(weights_of(folder), weights_of(adapted))  # control: before the damage
    damage(folder / name)
    capsys.readouterr()
    assert exit_code(sample.main, [folder]) == 2
    assert resume(folder, "--max_steps", 20) == 2
    assert tune(folder, instructions, tmp_path / "more", "--lora", 2) == 2
    lines = messages(capsys)
    assert len(lines) == 3
    for line in lines:
        assert "/r: base.pt, the weights that its adapters are for, cannot be used" in line
    assert len(rows(folder)) == 12  # nothing was lost


# -------------------------------------------------------------------------------------------------
# A LoRA run as the start of another run

def test_adapted_run_can_start_any_run(whole, data, instructions, adapted, tmp_path):
    """Catches: weights without their adapters when all weights are tuned or trained further;
    adapters upon adapters whose base.pt lacks the first ones."""
    merged = weights_of(adapted)
    assert tune(adapted, instructions, tmp_path / "full", "--stop_at", 0) == 75
    assert tune(adapted, instructions, tmp_path / "more", "--lora", 2, "--stop_at", 0) == 75
    assert run(data, tmp_path / "trained", "--init_from", adapted, "--stop_at", 0) == 75
    for name in ("full", "more", "trained"):
        assert equal(weights_of(tmp_path / name), merged)
    assert equal(durable.load_file(tmp_path / "more/base.pt")["model"], merged)
    assert not equal(weights_of(whole), merged)  # control


def test_tuning_of_all_weights_removes_the_base_of_before(whole, instructions, adapted, tmp_path):
    """Catches: a base.pt that stays in a folder that was started over without adapters."""
    folder = tmp_path / "r"
    shutil.copytree(adapted, folder)
    assert tune(whole, instructions, folder, "--overwrite", "--stop_at", 0) == 75
    assert not (folder / "base.pt").exists()
    assert not (folder / "base.json").exists()
    assert equal(weights_of(folder), weights_of(whole))


@pytest.mark.slow
def test_lora_survives_kill_at_its_start(server, whole, instructions, tmp_path):
    """Catches: a base.pt or base.json that a kill left half, and that a resume believes."""
    folder = tmp_path / "r"
    flags = [whole, "--instructions", instructions, "--lora", 4, "--resume", "--run"]

    def start(run, **fault):
        return server(*flags, run, "--max_steps", 2, base=TUNE, script="sft", **fault)["code"]

    assert start(tmp_path / "whole") == 0
    found = set()
    operation = 0
    while not durable.checkpoints(folder):  # each start finds what the one before has left
        operation += 1
        assert start(folder, fault=["kill", operation]) == -signal.SIGKILL
        found.add((folder / "base.pt").exists())
    assert found == {False, True}  # control: killed before and after
    assert start(folder) == 0
    assert same(folder, tmp_path / "whole", 2)
    assert equal(weights_of(folder), weights_of(tmp_path / "whole"))
