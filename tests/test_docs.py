"""README.md, docs/ and EXERCISES.md say what the logs and the code say."""
import ast
import copy
import importlib
import itertools
import re
import shlex
import textwrap
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import bench.__main__
import plot_dynamics
from bench import growth, plan
from conftest import ROOT
from model import PRESETS, flops_per_token
from support import flags
from support.runs import UserError

PAGES = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
         for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
EXERCISES = (ROOT / "EXERCISES.md").read_text(encoding="utf-8")
TESTS = "".join(path.read_text(encoding="utf-8")
                for path in (ROOT / "test_model.py", *(ROOT / "tests").glob("test_*.py")))


def read_log(name):
    return plot_dynamics.read_run(ROOT / "logs" / name)


def missing(claims):
    """Those that no page makes, wherever it breaks its lines."""
    text = " ".join(" ".join(PAGES.values()).split())
    return [claim for claim in claims if " ".join(claim.split()) not in text]


# -------------------------------------------------------------------------------------------------
# The default run

def claims_of_default(run):
    """What the docs tell about the default run, in its own words, from the log."""
    last = run.rows["eval"][-1]
    scores = run.rows["benchmark"][-1]
    words = plot_dynamics.summary(run)
    claims = [f"| steps, 1,024 tokens each | {words['steps']} |",
              f"| tokens/s (median) | {words['tokens/s (median)']} |",
              f"| seconds, training and evaluation | {words['seconds']} |",
              f"| of them evaluating | {words['of them evaluating']} |",
              f"| **{last['val_bpb']:.3f}** |",
              f"val loss {last['val_loss']:.4f} | {last['val_bpb']:.4f} bits/byte | context gain "
              f"{last['context_gain']:.3f} ± {last['context_gain_stderr']:.3f}"]
    for name in ("", "_norm", "_pmi"):
        share = 100 * scores[f"acc{name}"]
        claims.append(f"(acc{name}) | {share:.1f} ± {100 * scores[f'stderr{name}']:.1f} % |")
    losses = {row["step"]: row["val_loss"] for row in run.rows["eval"]}
    for row in run.rows["sample"]:
        step = row["step"]
        if step in (0, 64, 1024, run.steps[-1]):
            text = plot_dynamics.escape(row["text"])
            claims.append(f"| {step:,} | {losses[step]:.2f} | {text[:40]}")
    return claims


def test_docs_tell_of_the_logged_run():
    """Catches: a number or a sample in the docs that is not of logs/default."""
    run = read_log("default")
    assert missing(claims_of_default(run)) == []
    other = copy.deepcopy(run)  # control: a run that is a little different
    other.rows["eval"][-1]["val_bpb"] += 0.01
    other.rows["sample"][-1]["text"] = "The answer."
    other.rows["benchmark"][-1]["acc_pmi"] -= 0.01
    assert len(missing(claims_of_default(other))) == 4


@pytest.mark.parametrize("name", ["default", "sft", "lora8"])
def test_trajectory_of_a_log_is_redrawn(name):
    """Catches: a trajectory.md in logs/ that is not drawn from the log beside it."""
    written = (ROOT / "logs" / name / "trajectory.md").read_text(encoding="utf-8")
    run = read_log(name)
    assert plot_dynamics.trajectory([run]) == written
    next(iter(run.samples.values()))[-1]["text"] += " Or not."  # control
    assert plot_dynamics.trajectory([run]) != written


# -------------------------------------------------------------------------------------------------
# Growth

def claims_of_growth(rows):
    """What the docs tell about logs/growth, in its own words."""
    by_dim = {row["dim"]: row for row in rows if row["seq_len"] == 256}
    narrow = by_dim[128]
    wide = by_dim[1024]
    arithmetic = wide["flops_per_token"] / narrow["flops_per_token"]
    speed = narrow["tok_per_s"] / wide["tok_per_s"]
    of_limit = [row["tok_per_s"] * row["flops_per_token"] / growth.ceiling_of(rows)
                for row in (narrow, wide)]
    tenth = "a tenth" if round(speed) == 10 else f"1/{speed:.0f}"
    return [f"a token costs {arithmetic:.0f} times the arithmetic, and the speed falls to {tenth}",
            f"(from {100 * of_limit[0]:.0f} % to {100 * of_limit[1]:.0f} %)"]


def test_docs_tell_of_the_logged_growth():
    """Catches: a number in the docs that is not of logs/growth."""
    rows = growth.read_rows(ROOT / "logs/growth/growth.jsonl")
    assert sorted((row["dim"], row["seq_len"]) for row in rows) == sorted(growth.POINTS)
    assert missing(claims_of_growth(rows)) == []
    for row in rows:
        if row["dim"] == 1024:
            row["tok_per_s"] *= 1.1  # control
    assert len(missing(claims_of_growth(rows))) == 2


# -------------------------------------------------------------------------------------------------
# The two tunings

def claims_of_tunings(full, adapted):
    """The same of the two tunings: base, all weights, LoRA."""
    columns = [(full, 0), (full, -1), (adapted, -1)]
    ours = [run.rows["sft_eval"][i] for run, i in columns]
    scores = [plot_dynamics.percent(run.rows["benchmark"][i]) for run, i in columns]
    info = full.rows["instructions"][-1]
    rows = [
        ["loss on held-out answers", *[f"{row['heldout_loss']:.3f}" for row in ours]],
        ["their tokens right, given those before", *[f"{row['token_acc']:.1%}" for row in ours]],
        ["answers that end, of 32", *[f"{row['ended']:.0%}" for row in ours]],
        ["cloze: acc / acc_norm / acc_pmi, ± 2.8 %", *scores],
        ["seconds", "", f"{full.seconds:.0f}", f"{adapted.seconds:.0f}"],
    ]
    for question in info["questions"]:
        rows.append(row_of_answers(question, full, adapted))
    return [*[plot_dynamics.table_row(row) for row in rows],
            f"{info['rows']:,} questions",
            f"{info['useful']:.1%} of the tokens in a batch are not padding",
            f"“{info['frequent_answer']}” ({info['frequent_share']:.2%})"]


def row_of_answers(question, full, adapted):
    key = (question["question"], "")
    base = plot_dynamics.escape(full.samples[key][0]["text"])
    return [plot_dynamics.escape(question["question"]),
            textwrap.shorten(base, 64, placeholder=" …"),
            plot_dynamics.escape(full.samples[key][-1]["text"]),
            plot_dynamics.escape(adapted.samples[key][-1]["text"]),
            plot_dynamics.escape(question["answer"])]


def test_docs_tell_of_the_logged_tunings():
    """Catches: a number or an answer in the docs that is not of logs/sft and logs/lora8."""
    full = read_log("sft")
    adapted = read_log("lora8")
    assert missing(claims_of_tunings(full, adapted)) == []
    other = copy.deepcopy(adapted)  # control: a loss and an answer that are a little different
    other.rows["sft_eval"][-1]["heldout_loss"] += 0.01
    next(iter(other.samples.values()))[-1]["text"] += " Or not."
    assert len(missing(claims_of_tunings(full, other))) == 2


# -------------------------------------------------------------------------------------------------
# The GPU

def claims_of_gpu(table):
    """What the docs tell about speed on a GPU, from the rows of gpu_check.sh's table."""
    claims = []
    for name in ("small", "large"):
        found = re.search(rf"speed, {name} .*?([\d,]+) tok/s, MFU ([\d.]+%), ([\d.]+ GB)", table)
        claims.append(f"| {' | '.join(found.groups())} |")
    rate = int(found.group(1).replace(",", ""))
    return [*claims, f"At that speed 20B tokens are {20e9 / rate / 3600:.0f} hours"]


def test_docs_tell_of_the_logged_gpu():
    """Catches: a number in the docs that is not of logs/gpu."""
    table = (ROOT / "logs/gpu/table.md").read_text(encoding="utf-8")
    assert missing(claims_of_gpu(table)) == []
    assert len(missing(claims_of_gpu(table.replace("45,918", "55,918")))) == 2  # control


# -------------------------------------------------------------------------------------------------
# Commands

def commands_of(text):
    """The commands in a page's code, each a list of words. What the shell would fill in is 512."""
    fenced = r"^```(\w*)\n(.*?)^```"
    blocks = [block for language, block in re.findall(fenced, text, re.M | re.S) if not language]
    inline = re.findall(r"`([^`]+)`", re.sub(fenced, "", text, flags=re.M | re.S))
    pieces = [*blocks, *[" ".join(code.split()) for code in inline]]
    for line in "\n".join(pieces).replace("\\\n", "").splitlines():
        line = re.sub(r"\$\w+", "512", line.replace("$run ", "torchrun -- "))
        if re.search(r"\b(python|torchrun|bash|pip) \S", line):
            words = shlex.shlex(line, posix=True, punctuation_chars=";&|()")
            words.whitespace_split = True
            for is_mark, command in itertools.groupby(words, lambda word: word[0] in ";&|()"):
                command = [word for word in command if not re.match("do$|[A-Z_]+=", word)]
                if not is_mark and command and command[0] in ("python", "torchrun", "bash", "pip"):
                    yield command


def check_command(command):
    """Raises Parsed if one of our scripts understands its flags, and another error if it does not,
    or if a file or a test that is named is not there. Runs nothing."""
    program, *words = command
    if program == "torchrun":
        words = words[words.index("--") + 1:]
    if program == "bash":
        assert (ROOT / words[0]).is_file()
    elif program == "pip":
        assert all((ROOT / words[i + 1]).is_file() for i, word in enumerate(words) if word == "-r")
    elif words[:2] == ["-m", "pytest"]:
        files = [word.split("::")[0] for word in words if word.startswith("tests/")]
        assert all((ROOT / file).is_file() for file in files)
        assert "-k" not in words or words[words.index("-k") + 1] in TESTS
    elif words[:2] == ["-m", "bench"]:
        bench.__main__.main(words[2:])
    elif (ROOT / words[0]).is_file():
        module = importlib.import_module(Path(words[0]).stem)
        getattr(module, "read_settings", module.main)([w for w in words[1:] if w != "--help"])
    else:
        assert words[0] in ("-c", "-m") or words[0].startswith("llama_cpp_python-")  # not ours


class Parsed(BaseException):
    """The command line was understood."""


def test_commands_of_the_docs_are_understood(monkeypatch):
    """Catches: a command in the docs with a script, a flag or a test that is not there."""
    parse = flags.Parser.parse_args

    def parse_alone(self, args=None, namespace=None):
        parse(self, args, namespace)
        raise Parsed

    monkeypatch.setattr(flags.Parser, "parse_args", parse_alone)
    monkeypatch.syspath_prepend(ROOT / "experiments")
    commands = [command for text in [*PAGES.values(), EXERCISES] for command in commands_of(text)]
    understood = 0
    for command in commands:
        try:
            check_command(command)
        except Parsed:
            understood += 1
    assert understood > 80
    with pytest.raises(UserError):  # control
        check_command(["python", "train.py", "--no_such_flag"])


# -------------------------------------------------------------------------------------------------
# Promises, exercises, layout

def test_docs_tell_of_the_computed_plan():
    """Catches: hours in the docs that `python -m bench plan 1.7b` does not print."""
    config = PRESETS["1.7b"]
    hours = [sum(plan.hours(1_716_144_128, flops_per_token(config, 1024), gpus)) for gpus in (1, 8)]
    assert missing([f"| {hours[0]:.1f}, {hours[1]:.1f} |"]) == []
    assert missing([f"| {hours[0] + 1:.1f}, {hours[1]:.1f} |"]) != []  # control


def wrong_promises(text):
    """The tests named in a page that are not in their file, or not marked as slow as they are."""
    wrong = []
    for file, test, slow in re.findall(r"`(test_\w+\.py)::(test_\w+)`( \(slow\))?", text):
        tree = ast.parse(next(ROOT.glob(f"**/{file}")).read_text(encoding="utf-8"))
        marks = [[ast.unparse(mark) for mark in function.decorator_list] for function in tree.body
                 if isinstance(function, ast.FunctionDef) and function.name == test]
        if len(marks) != 1 or bool(slow) != ("pytest.mark.slow" in marks[0]):
            wrong.append(test)
    return wrong


def test_promised_tests_exist():
    """Catches: a promise in the docs whose test was renamed, moved, removed or became slow."""
    text = " ".join(" ".join(PAGES.values()).split())
    assert text.count(".py::test_") > 25
    assert re.findall(r"`(test_\w+)`", text) == []  # without its file
    assert wrong_promises(text) == []
    assert wrong_promises("`test_sft.py::test_nan_is_never_saved`") == ["test_nan_is_never_saved"]
    assert wrong_promises("`test_docs.py::test_promised_tests_exist` (slow)")  # control


def broken_links(page, text):
    """The links of a page that lead to no file of the repository, or to no heading of it."""
    broken = []
    for link, heading in re.findall(r"\]\(([^)#:]+)(?:#([^)]*))?\)", text):
        target = (ROOT / page).parent / link
        if not target.exists():
            broken.append(link)
        elif heading:
            headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.M)
            if heading not in [line.lower().replace(" ", "-") for line in headings]:
                broken.append(heading)
    return broken


def test_links_lead_somewhere():
    """Catches: a link or a picture in the docs whose file was moved or removed."""
    pages = PAGES | {name: (ROOT / name).read_text(encoding="utf-8")
                     for name in ("EXERCISES.md", "logs/README.md")}
    assert sum(text.count("](") for text in pages.values()) > 20
    for page, text in pages.items():
        assert broken_links(page, text) == []
    assert broken_links("docs/data.md", "[x](EXERCISES.md)") == ["EXERCISES.md"]  # control
    assert broken_links("README.md", "[x](docs/data.md#no-such)") == ["no-such"]


CHANGES = re.findall(r"```diff\n--- (\S+)\n(.*?)```", EXERCISES, re.S)


def test_exercises_change_existing_lines():
    """Catches: an exercise that removes a line which is not in the code (any more)."""
    assert len(CHANGES) >= 5
    for file, change in CHANGES:
        lines = change.splitlines()
        old = "".join(line[1:] + "\n" for line in lines if line[0] == "-")
        new = "".join(line[1:] + "\n" for line in lines if line[0] == "+")
        source = (ROOT / file).read_text(encoding="utf-8")
        assert source.count(old) == 1, change
        compile(source.replace(old, new), file, "exec")


# A file may import from its own folder, and from those of a lower level.
LEVELS = {"support": 0, "corpus": 1, "huggingface": 1, "": 2, "bench": 3, "experiments": 3}
MODULES = {".".join(file.relative_to(ROOT).with_suffix("").parts): file
           for folder in LEVELS for file in sorted((ROOT / folder).glob("*.py"))}


def imported(file):
    """The modules of this project that a file imports, wherever it does."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            names.add(node.module)
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names & set(MODULES)


def folder_of(module):
    """The folder that a module stands in, "" at the root."""
    return module.rpartition(".")[0]


def test_imports_go_one_way():
    """Catches: two files that need each other; a folder that needs the root, or one above it."""
    graph = {module: imported(file) for module, file in MODULES.items()}
    order = list(TopologicalSorter(graph).static_order())  # raises CycleError
    assert order.index("model") < order.index("checkpoint") < order.index("train")  # control
    for module, found in graph.items():
        own = folder_of(module)
        for folder in set(map(folder_of, found)) - {own}:
            assert LEVELS[folder] < LEVELS[own], module
    assert graph["model"] == set()


SCRIPTS = [*MODULES.values(), *sorted((ROOT / "tests").glob("*.py"))]


@pytest.mark.row(48)
@pytest.mark.parametrize("file", SCRIPTS, ids=[file.name for file in SCRIPTS])
def test_lines_fit_the_screen(file):
    """Catches: a line of more than 100 columns; an assert for input, which python -O removes."""
    source = file.read_text(encoding="utf-8")
    assert all(len(line) <= 100 for line in source.splitlines())
    if not file.name.startswith("test_") and file.parent.name != "tests":
        assert not any(isinstance(node, ast.Assert) for node in ast.walk(ast.parse(source)))
