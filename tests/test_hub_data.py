"""prepare_data.py fineweb-edu, hellaswag and alpaca: files of every kind, kills, downloads."""
import gzip
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from datetime import datetime

import numpy as np
import pyarrow
import pyarrow.parquet as parquet
import pytest

import prepare_data
from conftest import ROOT, write_lines
from corpus import encode, tables
from data import DataFolder, Tokenizer
from evaluate import Benchmark
from hub_server import Hub
from support import chat, runs
from test_adopt import llmc
from test_prepare_data import contents, fails, killed_before, names_in, run

TOKENIZER = Tokenizer()
TEXTS = [f"Document {i}: {'the quick brown fox ' * (i % 7)}é😀 {i * i}." for i in range(300)]
TEXTS[5] = None
TEXTS[6] = ""
TEXTS[7] = "  \n\t "
TEXTS[250] = "<|endoftext|> is plain text here."


def write_parquet(path, texts=TEXTS, kind=None, column="text", **options):
    table = pyarrow.table({column: pyarrow.array(texts, type=kind or pyarrow.string()),
                           "id": list(range(len(texts)))})
    path.parent.mkdir(exist_ok=True)
    parquet.write_table(table, path, **options)
    return path


def rows_of(texts):
    return [{"text": text} for text in texts]


def stream(texts=TEXTS):
    """The tokens of all texts, written out: end-of-text, then the text."""
    ids = []
    for text in texts:
        if text is not None and text.strip():
            ids += [50_256, *TOKENIZER.encode(text)]
    return np.array(ids, dtype=np.uint16)


def tokens_of(folder):
    data = DataFolder(folder)
    data.check_content()
    return [np.array(shard.tokens) for shard in (*data.val, *data.train)]


def holds(folder, expected):
    """Whether the shards of a folder are, in order, these tokens."""
    return np.array_equal(np.concatenate(tokens_of(folder)), expected)


# -------------------------------------------------------------------------------------------------
# Files on this disk

KINDS = {
    "string": {"compression": "gzip", "row_group_size": 7},
    "large_string": {"kind": pyarrow.large_string()},
    "string_view": {"kind": pyarrow.string_view()},
    "dictionary": {"kind": pyarrow.dictionary(pyarrow.int32(), pyarrow.string()),
                   "compression": "zstd"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_parquet_becomes_tokens(tmp_path, kind):
    """Catches: a text lost, repeated or out of order; a null or a blank text as a document."""
    path = write_parquet(tmp_path / "in/a.parquet", **KINDS[kind])
    run("fineweb-edu", "--from", path, "--max_tokens", 4000, "--out", tmp_path / "out")
    assert [len(shard) for shard in tokens_of(tmp_path / "out")] == [200] * 20
    assert holds(tmp_path / "out", stream()[:4000])
    assert not holds(tmp_path / "out", stream(TEXTS[1:])[:4000])  # control


def test_each_source_gives_the_same_tokens(tmp_path, monkeypatch):
    """Catches: a source that is read in another way than the others; another result on more
    cores; a first --from that is forgotten for a second one."""
    folder = tmp_path / "in"
    write_parquet(folder / "a.parquet", TEXTS[:100])
    write_lines(folder / "b.jsonl", rows_of(TEXTS[100:200]))
    with gzip.open(folder / "c.jsonl.gz", "wt") as file:
        for row in rows_of(TEXTS[200:]):
            file.write(json.dumps(row) + "\n")
    for large in (prepare_data.LARGE, 0):  # with 0 in processes
        monkeypatch.setattr(prepare_data, "LARGE", large)
        for paths in ([folder], [folder / "a.parquet", folder / "b.jsonl", "--from",
                                 folder / "c.jsonl.gz"]):
            run("fineweb-edu", "--from", *paths, "--max_tokens", 4000, "--out", tmp_path / "out")
            assert holds(tmp_path / "out", stream()[:4000])


def test_first_shard_is_for_validation(tmp_path, monkeypatch):
    """Catches: another split than the paper's."""
    path = write_parquet(tmp_path / "in/a.parquet")
    argv = ("fineweb-edu", "--from", path, "--out", tmp_path / "out")
    run(*argv)
    val, train = tokens_of(tmp_path / "out")  # not one whole shard
    assert holds(tmp_path / "out", stream())
    assert len(val) == len(stream()) // 20
    monkeypatch.setattr(prepare_data, "SHARD_TOKENS", 2000)
    run(*argv)
    lengths = [len(shard) for shard in tokens_of(tmp_path / "out")]
    assert lengths[:-1] == [2000] * (len(lengths) - 1)
    assert len(DataFolder(tmp_path / "out").val) == 1


def test_what_took_hours_is_not_replaced_unasked(tmp_path, capsys, monkeypatch):
    """Catches: another --max_tokens that deletes the tokens that are there, though nobody named
    their folder."""
    monkeypatch.chdir(tmp_path)
    path = write_parquet(tmp_path / "in/a.parquet")
    run("fineweb-edu", "--from", path)
    before = contents(tmp_path / "data/fineweb-edu")
    message = fails(capsys, "fineweb-edu", "--from", path, "--max_tokens", 2000)
    assert "data/fineweb-edu holds what was prepared from" in message
    assert contents(tmp_path / "data/fineweb-edu") == before
    run("fineweb-edu", "--from", path, "--max_tokens", 2000, "--out", "data/fineweb-edu")
    assert contents(tmp_path / "data/fineweb-edu") != before  # control: it was asked for


def cut_in_half(path):
    os.truncate(path, path.stat().st_size // 2)


def damage_a_page(path):
    content = bytearray(path.read_bytes())
    content[200:260] = bytes(60)
    path.write_bytes(content)


NOT_UTF8 = pyarrow.array([b"good", b"\xff\xfe"]).view(pyarrow.string())


@pytest.mark.parametrize("change, expected", [
    (cut_in_half, "a.parquet: not a whole parquet file"),
    (damage_a_page, "damaged parquet file"),
    (lambda p: write_parquet(p, column="content"), 'no column "text", it has content, id'),
    (lambda p: write_parquet(p, list(range(9)), pyarrow.int64()), "holds int64, not text"),
    (lambda p: write_parquet(p, NOT_UTF8), "text that is not UTF-8"),
])
def test_a_file_that_cannot_be_read_is_refused(tmp_path, capsys, change, expected):
    """Catches: a traceback, or a file that is silently left out."""
    write_parquet(tmp_path / "in/0.parquet")
    change(write_parquet(tmp_path / "in/a.parquet", compression="none"))
    message = fails(capsys, "fineweb-edu", "--from", tmp_path / "in", "--out", tmp_path / "out")
    assert expected in message and "a.parquet" in message
    assert not (tmp_path / "out").exists()


@pytest.mark.row(58)
def test_rows_without_text_are_passed_over_and_counted(tmp_path, capsys):
    """Catches: a null or an absent text that ends the preparation, or is left out without a word;
    a table of other fields that is taken for one of empty texts."""
    write_lines(tmp_path / "a.jsonl", [*rows_of(TEXTS), {"title": "x"}])
    write_lines(tmp_path / "b.jsonl", [{"content": "a"}] * 9)
    for source in (["fineweb-edu", "--from"], ["text"]):
        runs.warn.cache_clear()
        out = tmp_path / source[0]
        run(*source, tmp_path / "a.jsonl", "--out", out)
        assert "4 of 301 rows have no text and are passed over" in capsys.readouterr().err
        assert 'no row has a string "text"' in fails(capsys, *source, tmp_path / "b.jsonl", "--out",
                                                     out)


@pytest.mark.row(59)
def test_columns_that_are_not_needed_are_not_read(tmp_path, capsys):
    """Catches: a traceback for a column that cannot be converted, or for two of one name."""
    rows = [{"instruction": f"Say {i}.", "output": f"{i}."} for i in range(20)]
    table = pyarrow.Table.from_pylist(rows)
    odd = pyarrow.array([2**62] * 20, type=pyarrow.timestamp("us"))  # Python has no such year
    parquet.write_table(table.append_column("when", odd), tmp_path / "odd.parquet")
    run("alpaca", "--from", tmp_path / "odd.parquet", "--out", tmp_path / "out")
    assert "fields that are not read: when (20 rows)" in capsys.readouterr().out
    twice = pyarrow.Table.from_arrays([table["output"], table["output"]], ["text", "text"])
    parquet.write_table(twice, tmp_path / "twice.parquet")
    assert 'two columns have the name "text"' in fails(
        capsys, "fineweb-edu", "--from", tmp_path / "twice.parquet", "--out", tmp_path / "twice")


MINE = """
import prepare_data
print("once")
prepare_data.LARGE = 0
prepare_data.prepare_text(["a.txt"], "out")
"""


@pytest.mark.row(66)
@pytest.mark.parametrize("argument", ["-", "mine.py"])
def test_preparation_works_from_anywhere(tmp_path, argument):
    """Catches: workers that run the user's script (from standard input, or a file without a guard)
    again and die "perhaps for lack of memory"."""
    (tmp_path / "a.txt").write_text("".join(f"Line {i} of my own text.\n" for i in range(9999)))
    (tmp_path / "mine.py").write_text(MINE)
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, argument], input=MINE, cwd=tmp_path, env=env,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("once") == 1
    run("text", tmp_path / "a.txt", "--out", tmp_path / "here")  # control: without processes
    assert contents(tmp_path / "out") == contents(tmp_path / "here")


@pytest.mark.row(69)
@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="only Linux has it")
def test_as_many_workers_as_cores_that_may_be_used():
    """Catches: two workers for the one core that a job may use."""
    allowed = os.sched_getaffinity(0)
    assert encode.usable_cores() == len(allowed)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        assert encode.usable_cores() == 1
        assert encode.start_workers(TOKENIZER) is None
    finally:
        os.sched_setaffinity(0, allowed)


@pytest.mark.row(60)
def test_system_without_semaphores_encodes_in_one_process(monkeypatch, capsys):
    """Catches: a preparation that ends where no processes can be started."""
    def no_processes(*args):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(encode, "usable_cores", lambda: 2)
    monkeypatch.setattr(encode, "ProcessPoolExecutor", no_processes)
    batches = [[(0, text, True)] for text in TEXTS[8:20]]
    found = [ids for _, (ids,) in encode.encode_all(batches, TOKENIZER, True)]
    assert np.array_equal(np.concatenate(found), stream(TEXTS[8:20]))
    assert "no other processes here" in capsys.readouterr().err


def test_bad_arguments_are_refused_in_one_line(tmp_path, capsys):
    """Catches: a traceback for a wrong path, or a flag that is silently without effect."""
    path = write_parquet(tmp_path / "a.parquet")
    for argv, expected in [
            (["--from", path, "--tokenized"], "--tokenized downloads"),
            (["--tokenized", "--sample", "100BT"], "for --sample 10BT only"),
            (["--tokenized", "--vocab_size", 4096], "leave out --vocab_size"),
            (["--from", path, "--max_tokens", 0], "out of range")]:
        assert expected in fails(capsys, "fineweb-edu", *argv, "--out", tmp_path / "out")


# -------------------------------------------------------------------------------------------------
# Kills

@pytest.mark.row(35)
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["parquet", "tokenized"])
def test_kill_leaves_the_same_shards(tmp_path, serve, kind):
    """Catches: half a shard that is taken for whole, tokens lost or repeated where a killed
    preparation went on."""
    out = tmp_path / "out"
    if kind == "parquet":
        write_parquet(tmp_path / "in/a.parquet", TEXTS[:150])
        write_parquet(tmp_path / "in/b.parquet", TEXTS[150:])
        argv = ["fineweb-edu", "--from", tmp_path / "in", "--max_tokens", 1600, "--out", out]
        env = None
        every = 11
    else:
        argv = ["fineweb-edu", "--tokenized", "--out", out]
        env = hub_environment(tokenized_hub(serve), tmp_path)
        every = 5
    assert not killed_before(10**9, argv, env)
    whole = contents(out)
    shutil.rmtree(out)
    kills = 0
    first = 1 + os.getpid() % every  # for lack of time not before each operation
    while killed_before(first + kills * every, argv, env):
        kills += 1
        if not out.exists():
            assert not killed_before(10**9, argv, env)
        found = contents(out)
        found.pop("progress.json", None)  # of a kill just after the rename
        assert found == whole
        shutil.rmtree(out)
    assert kills >= 5  # control


@pytest.mark.row(35)
def test_kill_and_go_on(tmp_path, capsys):
    """Catches: a preparation that begins again, that goes on with other settings, or that another
    command deletes; a damaged note of how far it is."""
    path = write_parquet(tmp_path / "in/a.parquet")
    out = tmp_path / "out"
    argv = ["fineweb-edu", "--from", path, "--out", out, "--max_tokens", 4000]
    run(*argv)
    whole = contents(out)
    shutil.rmtree(out)
    assert killed_before(30, argv)
    assert names_in(tmp_path) == [".out.preparing", "in"]
    message = fails(capsys, *argv[:-1], 3000)
    assert "unfinished preparation with other max_tokens" in message
    write_lines(tmp_path / "in/a.jsonl", rows_of(TEXTS))
    message = fails(capsys, "text", tmp_path / "in/a.jsonl", "--out", out)
    assert "holds a preparation that was stopped" in message
    progress = tmp_path / ".out.preparing/progress.json"
    good = progress.read_text()
    for bad in (good[:50], good.replace('"position": [', '"position": [99,'), "{}"):
        progress.write_text(bad)
        assert "progress.json is damaged" in fails(capsys, *argv)
    progress.write_text(good)
    run(*argv)
    assert "going on after " in capsys.readouterr().out
    assert contents(out) == whole


# A child process that tells when it calls a function.
TELLING = """
import prepare_data, sys

def telling(*args, **kwargs):
    print("begun", flush=True)
    return original(*args, **kwargs)

if __name__ == "__main__":
    original = getattr(prepare_data, sys.argv[1])
    setattr(prepare_data, sys.argv[1], telling)
    prepare_data.LARGE = 0
    sys.exit(prepare_data.main(sys.argv[2:]))
"""


@pytest.mark.row(35)
def test_interrupt_ends_all_processes(tmp_path):
    """Catches: a Ctrl-C that is swallowed, prints tracebacks of the workers, or leaves them:
    while they start, and when they have results."""
    path = write_parquet(tmp_path / "in/a.parquet", ["one very long text, " * 2500] * 2000)
    for moment in ("tqdm", "show_progress"):
        command = [sys.executable, "-c", TELLING, moment, "fineweb-edu", "--from", str(path),
                   "--out", str(tmp_path / moment)]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE,
                                   stderr=subprocess.PIPE, text=True, start_new_session=True)
        assert process.stdout.readline() == "begun\n"
        time.sleep(0.1)
        os.killpg(process.pid, signal.SIGINT)
        _, stderr = process.communicate(timeout=20)  # it ends when no process holds the pipe
        assert process.returncode == 130
        assert "Traceback" not in stderr
        assert not (tmp_path / moment).exists()


# -------------------------------------------------------------------------------------------------
# Downloads, from a server on this machine

@pytest.fixture
def serve():
    hubs = []

    def start(repo, files):
        hubs.append(Hub(repo, files))
        return hubs[-1]

    yield start
    for hub in hubs:
        hub.close()


def parquet_bytes(texts):
    buffer = io.BytesIO()
    parquet.write_table(pyarrow.table({"text": texts}), buffer)
    return buffer.getvalue()


def hub_environment(hub, tmp_path):
    """That of a process that takes the server for the hub."""
    env = {**os.environ, "HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "home"),
           "HF_HUB_DOWNLOAD_TIMEOUT": "2", "HF_HUB_ETAG_TIMEOUT": "2", "HF_HUB_DISABLE_XET": "1"}
    env.pop("HF_HUB_OFFLINE", None)
    return env


def from_hub(hub, tmp_path, *argv, code=0):
    """Run the script with the server for the hub, into the folder `out`; returns its last line."""
    command = [sys.executable, str(ROOT / "prepare_data.py"), *argv, "--out", str(tmp_path / "out")]
    process = subprocess.run(command, env=hub_environment(hub, tmp_path), capture_output=True,
                             text=True, timeout=120)
    assert process.returncode == code, process.stderr
    return process.stderr.strip().split("\n")[-1]


def fineweb_hub(serve):
    return serve("HuggingFaceFW/fineweb-edu", {
        "sample/10BT/000_00000.parquet": parquet_bytes(TEXTS[:150]),
        "sample/10BT/001_00000.parquet": parquet_bytes(TEXTS[150:]),
        "sample/100BT/000_00000.parquet": parquet_bytes(["another sample"]),
        "README.md": b"about"})


def test_download_becomes_tokens(tmp_path, serve):
    """Catches: another sample, a file twice, a download that stays on the disk; a traceback
    where there is no network."""
    hub = fineweb_hub(serve)
    from_hub(hub, tmp_path, "fineweb-edu")
    assert holds(tmp_path / "out", stream())
    assert sorted(hub.downloads()) == ["sample/10BT/000_00000.parquet",
                                       "sample/10BT/001_00000.parquet"]
    assert json.loads((tmp_path / "out/meta.json").read_text())["source"]["commit"] == hub.commit
    assert names_in(tmp_path / "out") == ["meta.json", "train_0000.npy", "val_0000.npy"]
    hub.close()
    line = from_hub(hub, tmp_path, "fineweb-edu", code=2)
    assert f"cannot be downloaded from {hub.address}" in line


@pytest.mark.row(34)
@pytest.mark.parametrize("fault", [pytest.param("cut", marks=pytest.mark.slow), "altered"])
def test_cut_or_altered_download_is_refused(tmp_path, serve, fault):
    """Catches: half a file, or another one, that is taken for whole; a rerun that cannot
    recover."""
    hub = fineweb_hub(serve)
    setattr(hub, fault, 100)
    line = from_hub(hub, tmp_path, "fineweb-edu", code=2)
    assert "run the same command again" in line
    assert not (tmp_path / "out").exists()
    setattr(hub, fault, 0)
    from_hub(hub, tmp_path, "fineweb-edu")
    assert holds(tmp_path / "out", stream())


PARTS = np.array_split(stream(), 3)


def tokenized_hub(serve):
    """A hub with files of tokens in llm.c's format."""
    names = ("web_val_000000.bin", "web_train_000001.bin", "web_train_000002.bin")
    files = {name: llmc(part) for name, part in zip(names, PARTS)}
    return serve("kjj0/finewebedu10B-gpt2", {**files, "README.md": b""})


@pytest.mark.row(24)
def test_tokenized_is_downloaded(tmp_path, serve):
    """Catches: tokens that are encoded again, a file in the wrong split or that is not verified,
    more files than --max_tokens needs; half a shard, or ids outside the vocabulary."""
    hub = tokenized_hub(serve)
    argv = ("fineweb-edu", "--tokenized")
    from_hub(hub, tmp_path, *argv)
    for found, part in zip(tokens_of(tmp_path / "out"), PARTS, strict=True):
        assert np.array_equal(found, part)
    from_hub(hub, tmp_path, *argv, "--max_tokens", str(len(PARTS[0]) + 1))
    assert names_in(tmp_path / "out") == ["meta.json", "web_train_000001.bin", "web_val_000000.bin"]
    hub.files["web_train_000002.bin"] = llmc(np.append(PARTS[2], np.uint16(65_535)))
    line = from_hub(hub, tmp_path, *argv, code=2)
    assert "web_train_000002.bin: token 65535 at offset" in line
    assert len(tokens_of(tmp_path / "out")) == 2  # the old one is still there


# -------------------------------------------------------------------------------------------------
# hellaswag, alpaca

QUESTION = {"activity_label": "Baking", "ctx_a": "Mix it.", "ctx_b": "then you",
            "ctx": "Mix it. then you", "endings": ["eat.", "sleep.", "run.", "wait."],
            "label": "3"}


def write_rows(folder, rows):
    """The same rows in all formats."""
    folder.mkdir()
    parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "rows.parquet", row_group_size=90)
    write_lines(folder / "rows.jsonl", rows)
    (folder / "rows.json").write_text(json.dumps(rows))
    return sorted(folder.iterdir())


def test_hellaswag_is_what_evaluate_reads(tmp_path, serve, capsys):
    """Catches: questions that evaluate.py refuses; the test split, which has no answers."""
    rows = [{**QUESTION, "label": str(i % 4)} for i in range(70)]
    for file in write_rows(tmp_path / "in", rows):
        run("hellaswag", "--from", file, "--out", tmp_path / "local")
        benchmark = Benchmark(tmp_path / "local/hellaswag.jsonl", TOKENIZER, 100, "harness")
        assert benchmark.labels.tolist() == [i % 4 for i in range(70)]
    hub = serve("Rowan/hellaswag", {
        "data/validation-00000.parquet": (tmp_path / "in/rows.parquet").read_bytes(),
        "data/test-00000.parquet": b"", "dataset_infos.json": b"{}"})
    from_hub(hub, tmp_path, "hellaswag")
    expected = (tmp_path / "local/hellaswag.jsonl").read_text()
    assert (tmp_path / "out/hellaswag.jsonl").read_text() == expected
    assert names_in(tmp_path / "out") == ["hellaswag.jsonl", "meta.json"]
    for change in ({"label": ""}, {"label": "4"}, {"endings": None}):
        write_lines(tmp_path / "bad.jsonl", [{**QUESTION, **change}])
        assert "bad.jsonl, line 1: not a question" in fails(
            capsys, "hellaswag", "--from", tmp_path / "bad.jsonl", "--out", tmp_path / "bad")


def test_alpaca_is_what_sft_reads(tmp_path, serve, capsys):
    """Catches: rows that sft.py refuses; a row with an answer that is left out; a file in Git, not
    in its large file storage, that is used unverified."""
    rows = [{"instruction": f"Say {i}.", "input": "", "output": f"{i}."} for i in range(20)]
    rows[7]["output"] = " "
    for file in write_rows(tmp_path / "in", rows):
        run("alpaca", "--from", file, "--out", tmp_path / "local")
        assert "1 rows cannot be used" in capsys.readouterr().out
        chats, _, bad, _ = chat.read_instructions(tmp_path / "local/alpaca.jsonl")
        assert (len(chats), bad) == (19, 0)
    hub = serve("yahma/alpaca-cleaned", {
        "alpaca_data_cleaned.json": (tmp_path / "in/rows.json").read_bytes(), "README.md": b""})
    from_hub(hub, tmp_path, "alpaca")
    assert len(chat.read_instructions(tmp_path / "out/alpaca.jsonl")[0]) == 19
    hub.altered = 1  # such a file is verified by Git's hash
    assert "was deleted" in from_hub(hub, tmp_path, "alpaca", code=2)
    now = datetime(2024, 5, 17)  # JSON has no dates
    said = [{"role": "user", "content": "Say it.", "at": now},
            {"role": "assistant", "content": "It.", "at": now}]
    parquet.write_table(pyarrow.Table.from_pylist([{"messages": said}]), tmp_path / "at.parquet")
    capsys.readouterr()
    run("alpaca", "--from", tmp_path / "at.parquet", "--out", tmp_path / "dated")
    assert "sft.py will not read " in capsys.readouterr().out
    assert len(chat.read_instructions(tmp_path / "dated/alpaca.jsonl")[0]) == 1
    (tmp_path / "bad.json").write_text("[]")
    assert "no usable row" in fails(capsys, "alpaca", "--from", tmp_path / "bad.json", "--out",
                                    tmp_path / "bad")


def test_reading_begins_at_any_row(tmp_path):
    """Catches: a row lost or read twice where a stopped preparation goes on."""
    for path in write_rows(tmp_path / "in", [{"text": f"{i}"} for i in range(200)]):
        for start in (0, 63, 64, 89, 90, 91, 199):
            rows = {}
            for first, values, share in tables.read_rows(path, ("text",), start):
                rows.update(enumerate((row["text"] for _, row in values), first))
                assert 0 < share <= 1
            assert rows == {i: f"{i}" for i in range(start, 200)}
            assert share == 1
        assert list(tables.read_rows(path, ("text",), 200)) == []  # control
