"""bench/: what it refuses, what its tables follow from, and whole runs of tiny networks."""
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import bench.__main__ as bench
from bench import growth, measure, step
from conftest import exit_code, messages
from support import cpu
from support.runs import UserError

SIZES = ("--dim 32 --n_layers 1 --n_heads 2 --n_kv_heads 1 --intermediate_size 48 --vocab_size 100 "
         "--threads 1 --device cpu --seq_len 16 --micro_batch 2 --steps 1").split()

PLAIN = ["--only", "ours", "transformers"]  # those that are not compiled


@pytest.fixture(autouse=True)
def one_thread(one_thread_afterwards):
    torch.set_num_threads(1)


@pytest.fixture
def no_processes(monkeypatch):
    """Each fresh process would take seconds, and so would a large matrix product: numbers in their
    place. The list of what was started."""
    started = []

    def invented(command, **environment):
        started.append((command, environment))
        return {"first_step": 3.0, "seconds": 0.5, "peak_bytes": 10**9}
    monkeypatch.setattr(step, "in_fresh_process", invented)
    monkeypatch.setattr(growth, "in_fresh_process", invented)
    monkeypatch.setattr(step, "matmul_ceiling", lambda *args: 1e12)
    monkeypatch.setattr(growth, "matmul_rate", lambda *args: 1e12)
    return started


def cells(printed):
    """The rows of the Markdown table in a text, without the line of dashes."""
    rows = [line.strip("| ").split(" | ") for line in printed.splitlines() if line.startswith("|")]
    return [rows[0], *rows[2:]]


# -------------------------------------------------------------------------------------------------
# The comparison

def turn(seconds, first_step, peak_bytes):
    """What in_fresh_process returns."""
    return {"seconds": seconds, "first_step": first_step, "peak_bytes": peak_bytes}


def test_bench_training_table_follows_from_the_measurements():
    """Catches: seconds for rates, a ratio upside down or of medians, a peak that is not the
    highest, a warm start that is the cold one."""
    turns = {"ours": [turn(0.5, 9.04, 2e8), turn(0.25, 1.6, 3e8), turn(0.4, 1.4, 1e8)],
             "transformers": [turn(1.0, 4.0, 1.2e9), turn(1.0, 3.1, 1e9), turn(2.0, 2.9, 1e9)]}
    _, ours, theirs = step.table_of(turns, tokens=1000, flops=2e9, ceiling=1e13)
    # 1000 / 0.5, 1000 / 0.25, 1000 / 0.4; the rounds' ratios are 2, 4, 5; 2500 · 2e9 / 1e13
    assert ours == ["ours", "2,500 (2,000–4,000)", "4.00 (2.00–5.00)", "50.0%", "0.30 (0.25 ×)",
                    "9.0 s", "1.5 s"]
    assert theirs == ["transformers", "1,000 (500–1,000)", "1.00 (1.00–1.00)", "20.0%",
                      "1.20 (1.00 ×)", "4.0 s", "3.0 s"]


in_transformers = step.in_transformers


def with_other_theta(llama):
    """transformers' network with a mistake in its config."""
    config = llama.config
    llama.config = replace(config, rope_theta=10_000.0)
    network = in_transformers(llama)
    llama.config = config
    return network


def test_networks_that_differ_are_refused(no_processes, monkeypatch, capsys):
    """Catches: two networks compared that do not compute the same. (The runs below are the control:
    without the mistake they end with a table.)"""
    pytest.importorskip("transformers")
    monkeypatch.setattr(step, "in_transformers", with_other_theta)
    assert exit_code(bench.main, [*SIZES, *PLAIN]) == 2
    line = messages(capsys)[-1]
    assert "ours and transformers are different networks: model.layers.0." in line
    assert no_processes == []  # it was refused before anything was measured


@pytest.mark.parametrize("flags, plain", [("--dtype fp16", "1"),
                                          ("--dtype fp32 --same_settings", None)])
def test_bench_measures_a_training_step(flags, plain, no_processes, capsys):
    """Catches: a run that ends without its table; an implementation with weights of its own; all
    rounds of one, then all of the other; a cold start in
    each round; settings of ours for transformers unasked."""
    pytest.importorskip("transformers")
    argv = [*SIZES, "--rounds", "2", *PLAIN, *flags.split()]
    assert exit_code(bench.main, argv) is None
    _, ours, theirs = cells(capsys.readouterr().out)
    assert [ours[0], theirs[0]] == ["ours", "transformers"]
    assert ours[1] == "64 (64–64)"  # 2 x 16 tokens in 0.5 s
    caches = []
    names = ["ours", "transformers"] * 2
    for name, (command, environment) in zip(names, no_processes, strict=True):
        assert command == [sys.executable, "-m", "bench", *argv, "--alone", name]
        assert environment.get("PLAIN_PYTORCH") == (plain if name == "transformers" else None)
        caches.append(environment["TORCHINDUCTOR_CACHE_DIR"])
    assert caches[0] != caches[1]
    assert caches[:2] == caches[2:]
    assert not Path(caches[0]).parent.exists()  # nothing is left


def test_bench_runs_alone_in_a_fresh_process(monkeypatch, capsys):
    """Catches: flags that the fresh process does not get; seconds that are not its own; as its peak
    ru_maxrss, which on Linux it inherits from the process that started it."""
    monkeypatch.setattr(step, "matmul_ceiling", lambda *args: 1e12)
    large = bytearray(1_000_000_000)  # this process is larger than the fresh one
    assert exit_code(bench.main, [*SIZES, "--rounds", "1", "--only", "ours"]) is None
    _, ours = cells(capsys.readouterr().out)
    peak, cold = (float(text.split()[0]) for text in ours[-3:-1])
    assert 0.1 < peak < 0.9  # GB of Python with PyTorch; the network is tiny
    assert measure.peak_bytes(torch.device("cpu")) > len(large)  # control
    assert 0.5 < cold < 120


@pytest.mark.slow
def test_bench_measures_compiled_networks(capsys):
    """Catches: a compiled network that differs, or whose second start compiles again."""
    names = ["ours", "ours-compiled"]  # theirs would take minutes more
    assert exit_code(bench.main, [*SIZES, "--rounds", "2", "--only", *names]) is None
    rows = cells(capsys.readouterr().out)[1:]
    assert [row[0] for row in rows] == names
    cold, warm = (float(text.split()[0]) for text in rows[1][-2:])
    assert warm < 0.7 * cold


# -------------------------------------------------------------------------------------------------
# Fresh processes

# Reports as a peak the length of a variable of its environment, and 100 s until the first step.
REPORTS = """import json, os, time
print("other output")
print(json.dumps({"first_step_at": time.time() + 100, "seconds": 0.25,
                  "peak_bytes": len(os.environ["GIVEN"])}))"""


def test_a_fresh_process_reports(monkeypatch):
    """Catches: variables that do not reach the process, and settings of this one that do; seconds
    since 1970 for those of a start; a table without a row, or a traceback, if it fails."""
    command = [sys.executable, "-c", REPORTS]
    monkeypatch.setenv("GIVEN", "1234")
    found = measure.in_fresh_process(command)
    assert 100 < found.pop("first_step") < 130
    assert found == {"seconds": 0.25, "peak_bytes": 4}
    assert measure.in_fresh_process(command, GIVEN="")["peak_bytes"] == 0
    monkeypatch.setattr(cpu, "added", ["GIVEN"])
    with pytest.raises(UserError, match="exit code 1: KeyError: 'GIVEN'$"):
        measure.in_fresh_process(command)


# -------------------------------------------------------------------------------------------------
# What it needs, and mistakes

def test_no_transformers_is_one_line(no_processes, monkeypatch, capsys):
    """Catches: a traceback where an optional package is missing; needing it for --only ours."""
    monkeypatch.setitem(sys.modules, "transformers", None)  # as if it were not installed
    assert exit_code(bench.main, [*SIZES, *PLAIN]) == 2
    assert "pip install -r requirements-extras.txt" in messages(capsys)[-1]
    assert exit_code(bench.main, [*SIZES, "--only", "ours"]) is None  # control


def test_no_compiler_leaves_out_what_is_compiled(monkeypatch, capsys):
    """Catches: a failing compilation where there is no compiler; leaving it out in silence."""
    monkeypatch.setattr(bench, "can_compile", lambda device: False)
    assert bench.choose_names(None, torch.device("cpu")) == ["ours", "transformers"]
    assert capsys.readouterr().out == "left out: ours-compiled, transformers-compiled\n"
    monkeypatch.setattr(bench, "can_compile", lambda device: True)  # control
    assert bench.choose_names(None, torch.device("cpu")) == list(step.IMPLEMENTATIONS)


def test_a_preset_gives_the_sizes_and_a_flag_wins():
    """Catches: sizes of the preset that win over a flag, or a window that is not the preset's."""
    llama = bench.make_network(bench.read_arguments("--preset tiny --n_layers 2".split()))
    assert llama.config == replace(bench.PRESETS["tiny"], n_layers=2)


@pytest.mark.parametrize("flags, message", [
    ("--dim 65", "dim 65 is not divisible by n_heads 8 — give sizes that fit"),
    ("--rounds 0", "0 is out of range"),
    ("--device tpu", "device tpu cannot be used here ("),
    ("plan 2b", "invalid choice: '2b'"),
    ("decode", "unrecognized arguments: decode"),
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
    (tmp_path / "growth.jsonl").write_text(json.dumps(size(128, 256)))  # without the line's end
    table = growth.measure_growth(tmp_path, invented)
    assert measured == growth.POINTS[1:]
    (tmp_path / "growth.png").unlink()
    assert growth.measure_growth(tmp_path, invented) == table
    assert measured == growth.POINTS[1:]
    assert (tmp_path / "growth.png").stat().st_size > 10_000


@pytest.mark.parametrize("line", ['{"dim": 128', "7", json.dumps({"dim": 128})])
def test_damaged_growth_is_refused(tmp_path, line):
    """Catches: a traceback, or a figure of half a row."""
    file = tmp_path / "growth.jsonl"
    file.write_text(f"{json.dumps(size(256, 256))}\n{line}\n")
    with pytest.raises(UserError, match=r"growth\.jsonl, line 2: not a row"):  # 1 is right
        growth.read_rows(file)


def test_growth_table_follows_from_the_rows():
    """Catches: a bound of each row's own ceiling; memory without that of Python."""
    _, first, second = growth.growth_table([size(128, 256), size(256, 512, ceiling=4e12)])
    # 4e12 / 1.28e7; 2e8 + 128 · 9e6
    assert first == ["128", "256", "7,812", "312,500", "1.28", "1.35"]
    assert second == ["256", "512", "3,906", "156,250", "2.56", "2.50"]


def test_growth_measures_a_size(no_processes, monkeypatch):
    """Catches: sizes that do not reach the process; memory without the network."""
    monkeypatch.setattr(growth, "peak_of_step", lambda *counted: counted)
    args = bench.read_arguments(["--dtype", "fp32", "--threads", "1"])
    found = growth.measure_size(args, torch.device("cpu"), torch.float32, 64, 128)
    assert found["tok_per_s"] == 4096  # 2,048 in 0.5 s
    config = replace(step.DEFAULT, dim=64, n_heads=2, n_kv_heads=1, intermediate_size=192,
                     max_seq_len=128)
    assert found["computed_bytes"] == (config, 16)
    (command, _), (smallest, _) = no_processes
    args = bench.read_arguments(command[3:])
    assert bench.make_network(args).config == config
    assert [args.micro_batch, args.alone, args.dtype, args.threads] == [16, "ours", "fp32", 1]
    assert bench.read_arguments(smallest[3:]).n_layers == 1
