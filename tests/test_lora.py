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
from model import Llama, ModelConfig
from support import durable, lora


@pytest.fixture(scope="module", autouse=True)
def short_answers():
    """Answers of 4 tokens, as in trials.py: the time goes into what is tested."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sft.AnswerObserver, "LONGEST", 4)
        yield


def small(seed=0):
    torch.manual_seed(seed)
    model = Llama(ModelConfig(dim=32, n_layers=2, n_heads=2, n_kv_heads=1, intermediate_size=64,
                              vocab_size=300, max_seq_len=128))
    for parameter in model.parameters():  # far from the even guesses of a new model
        torch.nn.init.normal_(parameter, std=0.2)
    return model


TOKENS = torch.randint(0, 300, (2, 20), generator=torch.Generator().manual_seed(0))


# -------------------------------------------------------------------------------------------------
# Adapters

def test_fresh_adapters_change_nothing():
    """Catches: a B that does not start as zeros, so that tuning starts from another model."""
    model = small()
    before, _ = model(TOKENS)
    lora.add_adapters(model, 4, 16)
    assert torch.equal(model(TOKENS)[0], before)
    torch.nn.init.normal_(model.model.layers[0].mlp.up_proj.lora_B)
    assert not torch.allclose(model(TOKENS)[0], before)  # control


def test_adapters_are_for_linear_layers():
    """Catches: a part of a block that a reader has added, taken for a linear layer."""
    model = small()
    for block in model.model.layers:
        block.mlp.drop = torch.nn.Dropout(0.1)
        block.self_attn.norm = torch.nn.RMSNorm(16)
    lora.add_adapters(model, 4, 16)
    adapted = [m for m in model.modules() if isinstance(m, lora.LoRALinear)]
    assert len(adapted) == 2 * 7
    assert type(model.model.layers[0].mlp.drop) is torch.nn.Dropout


def test_only_adapters_are_trained():
    """Catches: a layer without adapters, a weight that is not frozen, a parameter's other name."""
    model = small()
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


@pytest.mark.parametrize("scale", [4.0, 2.0])
def test_merged_weights_equal_adapters(scale):
    """Catches: a merge without the scale, or into the wrong layer."""
    model = small()
    lora.add_adapters(model, 4, 16)  # alpha / rank = 4
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    adapters = {name: t.clone() for name, t in model.state_dict().items() if ".lora_" in name}
    for name in adapters:
        if name.endswith(".lora_scale"):
            adapters[name].fill_(scale)
    weights = small().state_dict()
    lora.merge(weights, adapters)
    merged = small(seed=1)
    merged.load_state_dict(weights)
    equal = torch.allclose(merged(TOKENS)[0], model(TOKENS)[0], rtol=1e-5, atol=1e-4)
    assert equal == (scale == 4.0)  # control: half of the scale


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
    """Catches: a checkpoint with the frozen weights, or moments of them."""
    folder = adapted / "checkpoints/step_00000012"
    weights = durable.load_file(folder / "model.pt")["model"]
    moments = durable.load_file(folder / "train_state.pt")["optimizer"]
    scales = {name for name in weights if name.endswith(".lora_scale")}
    assert len(scales) == 2 * 7
    assert weights.keys() - scales == moments.keys()
    assert all(".lora_" in name for name in moments)
    saved = sum(tensor.numel() for tensor in weights.values())
    base = sum(tensor.numel() for tensor in weights_of(whole).values())
    assert saved < 0.3 * base


def test_tuning_leaves_the_base_as_it_is(whole, instructions, tmp_path):
    """Catches: a base that is written to, or whose checkpoints are removed."""
    before = {file: file.read_bytes() for file in whole.rglob("*.pt")}
    assert tune(whole, instructions, tmp_path / "r", "--lora", 4, "--max_steps", 2) == 0
    assert before == {file: file.read_bytes() for file in whole.rglob("*.pt")}


def test_base_is_kept_as_a_link(whole, adapted):
    """Catches: a second copy of the weights on the disk, or those of another step."""
    assert os.path.samefile(adapted / "base.pt", whole / "checkpoints/step_00000020/model.pt")
    promised = durable.read_meta(whole / "checkpoints/step_00000020")["files"]["model.pt"]
    durable.verify(adapted, "base.pt", {"base.pt": promised})
    assert not equal(weights_of(adapted, 12), weights_of(whole))  # control: it is tuned
    assert equal(weights_of(adapted, 0), weights_of(whole))


def test_base_is_copied_where_links_are_impossible(whole, instructions, adapted, tmp_path,
                                                   monkeypatch):
    """Catches: a tuning that fails, or keeps no base, on another file system than its base's."""
    def refuse(*args):
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    monkeypatch.setattr(os, "link", refuse)
    folder = tmp_path / "r"
    assert tune(whole, instructions, folder, "--lora", 4) == 0
    original = whole / "checkpoints/step_00000020/model.pt"
    assert not os.path.samefile(folder / "base.pt", original)
    assert os.path.samefile(adapted / "base.pt", original)  # control
    assert (folder / "base.pt").read_bytes() == original.read_bytes()
    assert same(folder, adapted, 12)
    assert equal(weights_of(folder), weights_of(adapted))


def delete(base, data):
    shutil.rmtree(base)


def overwrite(base, data):
    assert run(data, base, "--overwrite", "--max_steps", 2, "--seed", 2) == 0


def train_on(base, data):
    assert run(data, base, "--resume", "--max_steps", 25) == 0


@pytest.mark.parametrize("change", [delete, overwrite, train_on])
def test_lora_run_survives_its_base(whole, data, instructions, adapted, tmp_path, change):
    """Catches: adapters that are merged into other weights than those they were trained on, or
    into none, after the base was deleted, overwritten or trained further."""
    base = tmp_path / "base"
    folder = tmp_path / "r"
    shutil.copytree(whole, base)
    assert tune(base, instructions, folder, "--lora", 4, "--stop_at", 6) == 75
    before = weights_of(folder)
    change(base, data)
    if base.exists():
        assert not equal(weights_of(base), weights_of(whole))  # control: the base has changed
    assert equal(weights_of(folder), before)
    assert resume(folder) == 0
    assert same(folder, adapted, 12)
    assert equal(weights_of(folder), weights_of(adapted))
    more = tmp_path / "more"
    assert tune(folder, instructions, more, "--lora", 2, "--stop_at", 0) == 75
    assert equal(weights_of(more), weights_of(adapted))


def test_lora_run_can_be_copied(adapted, tmp_path):
    """Catches: a run folder that holds a path to its base."""
    copy = tmp_path / "elsewhere"
    shutil.copytree(adapted, copy)
    assert equal(weights_of(copy), weights_of(adapted))
    assert resume(copy, "--max_steps", 13) == 0
    assert len(rows(copy)) == 13
    (copy / "base.pt").unlink()
    assert exit_code(sample.main, [copy]) == 2  # control: it is this file that is needed


def flip_a_bit(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.unlink()  # not through the link, which would damage the base too
    file.write_bytes(bytes(content))


def halve(file):
    content = file.read_bytes()
    file.unlink()
    file.write_bytes(content[:len(content) // 2])


def other_json(file):
    file.write_text('{"base.pt": 3}')


def foreign(file):
    file.write_bytes(b"\xff")


@pytest.mark.parametrize("name, damage", [
    ("base.pt", flip_a_bit), ("base.pt", halve), ("base.pt", os.unlink),
    ("base.json", halve), ("base.json", os.unlink), ("base.json", other_json),
    ("base.json", foreign),
])
def test_damaged_base_is_one_line(instructions, adapted, tmp_path, capsys, name, damage):
    """Catches: adapters that are merged into damaged weights, or a traceback."""
    folder = tmp_path / "r"
    shutil.copytree(adapted, folder)
    assert equal(weights_of(folder), weights_of(adapted))  # control: before the damage
    damage(folder / name)
    capsys.readouterr()
    codes = [exit_code(sample.main, [folder]),
             resume(folder, "--max_steps", 20),
             tune(folder, instructions, tmp_path / "more", "--lora", 2),
             tune(folder, instructions, tmp_path / "full")]
    assert codes == [2, 2, 2, 2]
    lines = messages(capsys)
    assert len(lines) == 4
    for line in lines:
        assert "/r: base.pt, the weights that its adapters are for, cannot be used" in line
        assert "restore it, or tune again" in line
    assert len(rows(folder)) == 12  # nothing was lost
    assert not (tmp_path / "more/metrics.jsonl").exists()


# -------------------------------------------------------------------------------------------------
# A LoRA run as the start of another run

def test_adapters_on_an_adapted_run_keep_merged_weights(instructions, adapted, tmp_path):
    """Catches: adapters upon adapters whose base.pt lacks the first ones."""
    folder = tmp_path / "r"
    assert tune(adapted, instructions, folder, "--lora", 2) == 0
    kept = durable.load_file(folder / "base.pt")["model"]
    assert equal(kept, weights_of(adapted))
    assert equal(weights_of(folder, 0), weights_of(adapted))
    assert not equal(weights_of(folder, 12), weights_of(adapted))  # control
    assert not equal(kept, durable.load_file(adapted / "base.pt")["model"])  # control


def test_adapted_run_can_start_any_run(data, instructions, adapted, tmp_path):
    """Catches: weights without their adapters when all weights are tuned or trained further."""
    assert tune(adapted, instructions, tmp_path / "full", "--stop_at", 0) == 75
    assert equal(weights_of(tmp_path / "full"), weights_of(adapted))
    assert not (tmp_path / "full/base.pt").exists()
    assert run(data, tmp_path / "trained", "--init_from", adapted, "--stop_at", 0) == 75
    assert equal(weights_of(tmp_path / "trained"), weights_of(adapted))
    assert run(data, tmp_path / "fresh", "--stop_at", 0) == 75
    assert not equal(weights_of(tmp_path / "fresh"), weights_of(adapted))  # control


def test_tuning_of_all_weights_removes_the_base_of_before(whole, instructions, adapted, tmp_path):
    """Catches: a base.pt that stays in a folder that was started over without adapters."""
    folder = tmp_path / "r"
    shutil.copytree(adapted, folder)
    (folder / "trajectory.md").write_text("old")
    assert tune(whole, instructions, folder, "--overwrite", "--stop_at", 1) == 75
    for name in ("base.pt", "base.json", "trajectory.md"):
        assert not (folder / name).exists()
    weights = durable.load_file(folder / "checkpoints/step_00000001/model.pt")["model"]
    assert equal(weights_of(folder), weights)


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
