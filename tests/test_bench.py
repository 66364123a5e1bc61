"""bench/: what it refuses, what its tables follow from, and whole runs of tiny networks."""
import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import bench.__main__ as bench
from bench import growth, measure, step
from bench.plan import peak_of_step
from conftest import ROOT, exit_code, messages
from model import flops_per_token
from support import cpu
from support.runs import UserError

TINY = ("--dim 32 --n_layers 1 --n_heads 2 --n_kv_heads 1 --intermediate_size 48 --vocab_size 100 "
        "--rounds 1 --threads 1 --device cpu").split()
SIZES = [*TINY, "--seq_len", "16", "--micro_batch", "2", "--steps", "1"]


@pytest.fixture(autouse=True)
def one_thread(one_thread_afterwards):
    torch.set_num_threads(1)


@pytest.fixture
def no_processes(monkeypatch):
    """Each fresh process would take seconds: numbers in their place."""
    started = []

    def invented(command, **environment):
        started.append((command, environment))
        return {"first_step": 3.0, "seconds": 0.5, "peak_bytes": 10**9}
    monkeypatch.setattr(step, "in_fresh_process", invented)
    return started


def cells(printed):
    """The rows of the Markdown table in a text, without the line of dashes."""
    rows = [line.strip("| ").split(" | ") for line in printed.splitlines() if line.startswith("|")]
    return [rows[0], *rows[2:]]


# -------------------------------------------------------------------------------------------------
# The tables

def turns(seconds, first_steps, peaks):
    """What in_fresh_process returned in each round."""
    rounds = zip(seconds, first_steps, peaks)
    return [dict(zip(("seconds", "first_step", "peak_bytes"), found)) for found in rounds]


OURS = turns([0.5, 0.25, 0.4], [9.04, 1.6, 1.4], [2e8, 3e8, 1e8])
THEIRS = turns([1.0, 1.0, 2.0], [4.0, 3.1, 2.9], [1.2e9, 1e9, 1e9])


def training(**changes):
    """A table from invented measurements."""
    measured = {"turns": {"ours": OURS, "transformers": THEIRS}, "tokens": 1000, "flops": 2e9,
                "ceiling": 1e13}
    return step.table_of(**{**measured, **changes})


def test_bench_training_table_follows_from_the_measurements():
    """Catches: seconds for rates, a ratio upside down or of medians, a peak that is not the
    highest, a warm start that is the cold one."""
    header, ours, theirs = training()
    assert header == ["implementation", "tokens/s", "× transformers", "utilisation", "peak GB",
                      "first step, cold", "warm"]
    # 1000 / 0.5, 1000 / 0.25, 1000 / 0.4; the rounds' ratios are 2, 4, 5; 2500 · 2e9 / 1e13
    assert ours == ["ours", "2,500 (2,000–4,000)", "4.00 (2.00–5.00)", "50.0%", "0.30 (0.25 ×)",
                    "9.0 s", "1.5 s"]
    assert theirs == ["transformers", "1,000 (500–1,000)", "1.00 (1.00–1.00)", "20.0%",
                      "1.20 (1.00 ×)", "4.0 s", "3.0 s"]
    assert training(ceiling=2e13)[1][3] == "25.0%"  # controls
    assert training(flops=1e9)[1][3] == "25.0%"
    assert training(tokens=2000)[1][1:4] == ["5,000 (4,000–8,000)", "4.00 (2.00–5.00)", "100.0%"]


def test_bench_table_without_transformers_has_no_ratios():
    """Catches: a run of --only ours that fails in its last line."""
    header, ours = training(turns={"ours": OURS[:1]})
    assert header[:3] == ["implementation", "tokens/s", "utilisation"]
    assert ours == ["ours", "2,000 (2,000–2,000)", "40.0%", "0.20", "9.0 s", "—"]  # one round


def test_bench_table_is_markdown():
    """Catches: a table that GitHub shows as text."""
    assert bench.markdown([["a", "b"], ["1", "2"]]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"


# -------------------------------------------------------------------------------------------------
# The same network

def with_other_theta(llama):
    """transformers' network with a mistake in its config."""
    config = llama.config
    llama.config = replace(config, rope_theta=10_000.0)
    network = in_transformers(llama)
    llama.config = config
    return network


in_transformers = step.in_transformers


def test_networks_that_differ_are_refused(no_processes, monkeypatch, capsys):
    """Catches: two networks compared that do not compute the same. (The runs below are the control:
    without the mistake they end with a table.)"""
    pytest.importorskip("transformers")
    monkeypatch.setattr(step, "in_transformers", with_other_theta)
    assert exit_code(bench.main, [*SIZES, "--no-compile"]) == 2
    printed = capsys.readouterr()
    assert "ours and transformers are different networks: model.layers.0." in printed.err
    assert printed.out == ""
    assert no_processes == []  # it was refused before anything was measured


def test_one_optimizer_trains_all_networks():
    """Catches: an implementation with weights of its own, that the rounds would move away."""
    pytest.importorskip("transformers")
    args = bench.read_arguments(SIZES)
    llama = bench.make_network(args)
    losses = {name: step.IMPLEMENTATIONS[name](llama) for name in ("ours", "transformers")}
    inputs, targets = step.random_batch(llama.config, 2, torch.device("cpu"))
    update = step.training_step(llama, inputs, targets, torch.float32)
    before = losses["ours"](inputs, targets).item()
    for name in ("ours", "transformers"):
        update(losses[name])
    after = losses["ours"](inputs, targets).item()
    assert losses["transformers"](inputs, targets).item() == pytest.approx(after, rel=1e-6)
    assert after < before - 1e-4  # control
    llama.lm_head.weight.requires_grad_(False).mul_(2)  # control: all of them see a change
    doubled = losses["ours"](inputs, targets).item()
    assert doubled != pytest.approx(after, rel=1e-6)
    assert losses["transformers"](inputs, targets).item() == pytest.approx(doubled, rel=1e-6)


# -------------------------------------------------------------------------------------------------
# Whole runs

@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_bench_measures_a_training_step(dtype, no_processes, capsys):
    """Catches: a run that ends without its table; fp16 gradients too small to be compared."""
    pytest.importorskip("transformers")
    assert exit_code(bench.main, [*SIZES, "--no-compile", "--dtype", dtype]) is None
    printed = capsys.readouterr().out
    header, ours, theirs = cells(printed)
    assert (ours[0], theirs[0]) == ("ours", "transformers")
    assert len(header) == len(ours) == len(theirs) == 7
    assert ours[1] == "64 (64–64)"  # 2 x 16 tokens in 0.5 s
    assert ours[4:] == ["1.00 (1.00 ×)", "3.0 s", "—"]
    assert "vocabulary 128" in printed  # 100, rounded up
    names = ["ours", "transformers"]
    argv = [*SIZES, "--no-compile", "--dtype", dtype]
    for name, (command, _) in zip(names, no_processes, strict=True):
        assert command == [sys.executable, "-m", "bench", *argv, "--alone", name]
    environments = [environment for _, environment in no_processes]
    assert [environment.get("PLAIN_PYTORCH") for environment in environments] == [None, "1"]
    caches = {environment["TORCHINDUCTOR_CACHE_DIR"] for environment in environments}
    assert len(caches) == 2


def test_rounds_take_turns_and_share_a_compile_cache(no_processes, capsys):
    """Catches: all rounds of one, then all of the other; a cold start in each round."""
    pytest.importorskip("transformers")
    flags = [*SIZES, "--rounds", "2", "--no-compile", "--same_settings"]
    assert exit_code(bench.main, flags) is None
    assert not any("PLAIN_PYTORCH" in environment for _, environment in no_processes)
    assert [command[-1] for command, _ in no_processes] == ["ours", "transformers"] * 2
    caches = [environment["TORCHINDUCTOR_CACHE_DIR"] for _, environment in no_processes]
    assert caches[:2] == caches[2:]
    assert not Path(caches[0]).parent.exists()  # nothing is left


def test_bench_runs_alone_in_fresh_processes(capsys):
    """Catches: flags that the fresh processes do not get; seconds that are not theirs."""
    assert exit_code(bench.main, [*SIZES, "--rounds", "2", "--only", "ours"]) is None
    header, ours = cells(capsys.readouterr().out)
    assert header[-3:] == ["peak GB", "first step, cold", "warm"]
    peak, cold, warm = (float(text.split()[0]) for text in ours[-3:])
    assert 0.1 < peak < 2  # Python with PyTorch; the network is tiny
    assert 0.5 < cold < 120
    assert 0.5 < warm < 120


@pytest.mark.slow
def test_bench_measures_compiled_networks(capsys):
    """Catches: a compiled network that differs, or whose second start compiles again."""
    pytest.importorskip("transformers")
    names = ["ours", "ours-compiled", "transformers"]  # theirs compiled would take two minutes more
    assert exit_code(bench.main, [*SIZES, "--rounds", "2", "--compile", "--only", *names]) is None
    rows = cells(capsys.readouterr().out)[1:]
    assert [row[0] for row in rows] == names
    for row in rows:
        cold = float(row[-2].split()[0])
        warm = float(row[-1].split()[0])
        if row[0].endswith("compiled"):
            assert warm < 0.7 * cold


# -------------------------------------------------------------------------------------------------
# Fresh processes

# Reports as a peak the length of a variable of its environment, and 100 s until the first step.
REPORTS = """import os, time
from bench.measure import report
import bench.measure
bench.measure.peak_bytes = lambda device: len(os.environ["GIVEN"])
print("other output")
report(time.time() + 100, 0.25, None)"""


def test_a_fresh_process_reports(monkeypatch):
    """Catches: variables that do not reach the process; seconds since 1970 for those of a start."""
    found = measure.in_fresh_process([sys.executable, "-c", REPORTS], GIVEN="1234")
    assert 100 < found.pop("first_step") < 130
    assert found == {"seconds": 0.25, "peak_bytes": 4}
    other = measure.in_fresh_process([sys.executable, "-c", REPORTS], GIVEN="")
    assert other["peak_bytes"] == 0  # control


def test_a_fresh_process_starts_from_the_environment_of_the_user(monkeypatch):
    """Catches: transformers with the settings that this process made for itself."""
    monkeypatch.setenv("GIVEN", "1234")
    command = [sys.executable, "-c", REPORTS]
    assert measure.in_fresh_process(command)["peak_bytes"] == 4  # what the user set stays
    monkeypatch.setattr(cpu, "added", ["GIVEN"])
    with pytest.raises(UserError, match="KeyError: 'GIVEN'"):
        measure.in_fresh_process(command)


def test_a_process_that_fails_is_one_line():
    """Catches: a table without a row, or the traceback of another process."""
    with pytest.raises(UserError, match="exit code 1: out of memory$") as raised:
        measure.in_fresh_process([sys.executable, "-c", "exit('a\\nout of memory')"])
    assert raised.value.code == 2


CHILD_PEAK = """import resource, sys, torch
from bench.measure import peak_bytes
filled = torch.ones(int(sys.argv[1]))
print(peak_bytes(torch.device("cpu")), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)"""


@pytest.mark.skipif(sys.platform != "linux", reason="the fault is that of Linux")
def test_peak_is_that_of_the_process_itself():
    """Catches: ru_maxrss, which a process inherits from the one that started it."""
    def peaks(floats):
        done = subprocess.run([sys.executable, "-c", CHILD_PEAK, str(floats)], cwd=ROOT,
                              capture_output=True, text=True, check=True)
        return [int(text) for text in done.stdout.split()]

    large = bytearray(1_000_000_000)  # this process is larger than the child
    peak, inherited = peaks(1)
    assert peak < 900_000_000
    assert inherited > len(large)  # control: the mistake shows
    assert peaks(50_000_000)[0] > peak + 150_000_000  # control: the child's own memory shows


# -------------------------------------------------------------------------------------------------
# What it needs, and mistakes

def test_no_transformers_is_one_line(no_processes, monkeypatch, capsys):
    """Catches: a traceback where an optional package is missing; needing it for --only ours."""
    monkeypatch.setitem(sys.modules, "transformers", None)  # as if it were not installed
    assert exit_code(bench.main, [*SIZES, "--no-compile"]) == 2
    assert "pip install -r requirements-extras.txt" in messages(capsys)[-1]
    assert no_processes == []
    assert exit_code(bench.main, [*SIZES, "--only", "ours"]) is None  # control


def test_no_compiler_leaves_out_what_is_compiled(monkeypatch, capsys):
    """Catches: a failing compilation where there is no compiler; leaving it out in silence."""
    def names(*argv):
        return bench.choose_names(bench.read_arguments(argv), torch.device("cpu"))

    all_four = list(step.IMPLEMENTATIONS)
    monkeypatch.setattr(bench, "can_compile", lambda device: True)
    assert names() == all_four  # control
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(bench, "can_compile", lambda device: False)
    assert names() == ["ours", "transformers"]
    assert capsys.readouterr().out == "left out: ours-compiled, transformers-compiled\n"
    assert names("--compile") == all_four


def test_a_preset_gives_the_sizes_and_a_flag_wins():
    """Catches: sizes of the preset that win over a flag, or a window that is not the preset's."""
    llama = bench.make_network(bench.read_arguments("--preset tiny --n_layers 2".split()))
    assert llama.config == replace(bench.PRESETS["tiny"], n_layers=2)
    assert bench.make_network(bench.read_arguments([])).config == step.DEFAULT


def test_gradients_of_zero_are_equal(no_processes):
    """Catches: windows of one token, where queries and keys have no gradient, taken for another
    network."""
    assert exit_code(bench.main, [*SIZES, "--seq_len", "1", "--only", "ours"]) is None


@pytest.mark.parametrize("flags, message", [
    ("--dim 65", "dim 65 is not divisible by n_heads 8 — give sizes that fit"),
    ("--only ours ours-compiled --no-compile", "--only names ours-compiled, and --no-compile"),
    ("--only theirs", "invalid choice: 'theirs'"),
    ("--rounds 0", "0 is out of range"),
    ("--device tpu", "no device tpu here"),
    ("--preset huge", "invalid choice: 'huge'"),
    ("growth --dim 64", "unrecognized arguments: --dim 64"),
    ("growth --device tpu", "no device tpu here"),
    ("plan 2b", "invalid choice: '2b'"),
    ("decode", "no command decode: there are growth and plan"),
])
def test_bench_mistakes_are_one_line(flags, message, capsys):
    """Catches: a traceback, or a run that begins with a wrong setting."""
    assert exit_code(bench.main, flags.split()) == 2
    [line] = messages(capsys)
    assert line.startswith("bench: ")
    assert message in line


# -------------------------------------------------------------------------------------------------
# Growth

def size(dim, seq_len, **changes):
    """A row of growth.jsonl, invented."""
    return {"dim": dim, "seq_len": seq_len, "tok_per_s": 1e6 / dim, "peak_bytes": dim * 1e7,
            "smallest_bytes": 2e8, "computed_bytes": dim * 9e6, "flops_per_token": dim * 1e5,
            "ceiling": 1e12, **changes}


def test_growth_measures_what_is_missing(tmp_path):
    """Catches: sizes that are measured twice or never; a figure that needs them measured again."""
    measured = []

    def invented(dim, seq_len):
        measured.append((dim, seq_len))
        return size(dim, seq_len)
    first = json.dumps(size(128, 256))
    (tmp_path / "growth.jsonl").write_text(first)  # without the end of the line
    table = growth.measure_growth(tmp_path, invented)
    assert measured == growth.POINTS[1:]
    assert len(table) == 1 + len(growth.POINTS)
    (tmp_path / "growth.png").unlink()
    measured.clear()
    assert growth.measure_growth(tmp_path, invented) == table
    assert measured == []
    assert (tmp_path / "growth.png").stat().st_size > 10_000


@pytest.mark.parametrize("line", ['{"dim": 128', "[1]", "7", "null", json.dumps({"dim": 128}),
                                  json.dumps(size(128, 256, tok_per_s=None)), "\xff",
                                  json.dumps(size(128, 256, ceiling=math.inf)),
                                  json.dumps(size(129, 256)), json.dumps(size(128, True))])
def test_damaged_growth_is_refused(tmp_path, line):
    """Catches: a traceback, or a figure of half a row."""
    good = json.dumps(size(256, 256))
    (tmp_path / "growth.jsonl").write_text(f"{good}\n{line}\n", encoding="latin-1")
    with pytest.raises(UserError, match=r"growth\.jsonl:2: not a row"):
        growth.measure_growth(tmp_path, size)
    (tmp_path / "growth.jsonl").write_text(f"{good}\n")
    growth.measure_growth(tmp_path, size)  # control


def test_growth_table_follows_from_the_rows():
    """Catches: a bound of each row's own ceiling; memory without that of Python."""
    header, first, second = growth.growth_table([size(128, 256), size(256, 512, ceiling=4e12)])
    # 4e12 / 1.28e7; 2e8 + 128 · 9e6
    assert first == ["128", "256", "7,812", "312,500", "1.28", "1.35"]
    assert second == ["256", "512", "3,906", "156,250", "2.56", "2.50"]
    assert growth.growth_table([size(128, 256)])[1][3] == "78,125"  # control


def test_growth_measures_a_size(monkeypatch):
    """Catches: sizes that do not reach the process; memory without the network."""
    commands = []

    def invented(command):
        commands.append(command)
        return {"first_step": 3.0, "seconds": 0.5, "peak_bytes": 10**9}
    monkeypatch.setattr(growth, "in_fresh_process", invented)
    args = bench.read_arguments(["--dtype", "fp32", "--threads", "1"])
    found = growth.measure_size(args, torch.device("cpu"), torch.float32, 64, 128)
    assert found["tok_per_s"] == 4096  # 2,048 in 0.5 s
    config = replace(step.DEFAULT, dim=64, n_heads=2, n_kv_heads=1, intermediate_size=192,
                     max_seq_len=128)
    assert found["flops_per_token"] == flops_per_token(config, 128)
    assert found["computed_bytes"] == peak_of_step(config, 16)
    args = bench.read_arguments(commands[0][3:])
    assert bench.make_network(args).config == config
    assert (args.micro_batch, args.alone) == (16, "ours")
    assert (args.dtype, args.threads) == ("fp32", 1)
    assert bench.read_arguments(commands[1][3:]).n_layers == 1
