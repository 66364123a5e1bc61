"""prepare_data.py fineweb-edu, hellaswag and alpaca: files of every kind, kills, downloads."""
import gzip
import io
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet as parquet
import pytest

import prepare_data
from conftest import exit_code
from corpus import encode, tables
from data import DataFolder, Tokenizer
from hub_server import Hub
from support import chat, runs
from test_prepare_data import KILLED, contents, fails, names_in

ROOT = Path(prepare_data.__file__).parent
TOKENIZER = Tokenizer()
LONG = "one very long text, " * 150_000  # 3 million characters
TEXTS = [f"Document {i}: {'the quick brown fox ' * (i % 7)}é😀 {i * i}." for i in range(300)]
TEXTS[5] = None
TEXTS[6] = ""
TEXTS[7] = "  \n\t "
TEXTS[250] = "<|endoftext|> is plain text here."


def prepare(*argv):
    return exit_code(prepare_data.main, argv) or 0


def write_parquet(path, texts=TEXTS, kind=None, column="text", row_group_size=100, **options):
    table = pyarrow.table({column: pyarrow.array(texts, type=kind or pyarrow.string()),
                           "id": list(range(len(texts))), "score": [0.5] * len(texts)})
    path.parent.mkdir(exist_ok=True)
    parquet.write_table(table, path, row_group_size=row_group_size, **options)
    return path


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


# -------------------------------------------------------------------------------------------------
# Files on this disk

KINDS = {
    "plain": {"use_dictionary": False, "compression": "none"},
    "snappy": {"compression": "snappy"},
    "zstd, one group": {"compression": "zstd", "row_group_size": 1000},
    "gzip, small groups": {"compression": "gzip", "row_group_size": 7},
    "large_string": {"kind": pyarrow.large_string()},
    "string_view": {"kind": pyarrow.string_view()},
    "dictionary": {"kind": pyarrow.dictionary(pyarrow.int32(), pyarrow.string())},
    "pages of version 2": {"data_page_version": "2.0", "data_page_size": 500},
}


@pytest.mark.parametrize("kind", KINDS)
def test_parquet_becomes_tokens(tmp_path, kind):
    """Catches: a text lost, repeated or out of order; a null or a blank text as a document."""
    path = write_parquet(tmp_path / "in/a.parquet", **KINDS[kind])
    assert prepare("fineweb-edu", "--from", path, "--max_tokens", 4000, "--out",
                   tmp_path / "out") == 0
    shards = tokens_of(tmp_path / "out")
    expected = stream()[:4000]
    assert [len(shard) for shard in shards] == [200] * 20
    assert np.array_equal(np.concatenate(shards), expected)
    assert not np.array_equal(np.concatenate(shards), stream(TEXTS[1:])[:4000])  # control
    assert names_in(tmp_path) == ["in", "out"]


def test_a_text_of_three_million_characters(tmp_path):
    """Catches: a long text that is cut, or that stops the reader."""
    texts = ["a", LONG, "b" * 3_000_000, "c"]
    path = write_parquet(tmp_path / "in/a.parquet", texts)
    assert prepare("fineweb-edu", "--from", path, "--max_tokens", 10**7, "--out",
                   tmp_path / "out") == 0
    assert np.array_equal(np.concatenate(tokens_of(tmp_path / "out")), stream(texts))


def test_json_lines_give_the_same_bytes(tmp_path, monkeypatch):
    """Catches: a source that is read in another way than the others; another result on more
    cores."""
    write_parquet(tmp_path / "a/1.parquet", TEXTS[:120])
    write_parquet(tmp_path / "a/2.parquet", TEXTS[120:])
    (tmp_path / "b").mkdir()
    lines = [json.dumps({"text": text}) + "\n" for text in TEXTS]
    (tmp_path / "b/1.jsonl").write_text("".join(lines[:200]))
    with gzip.open(tmp_path / "b/2.jsonl.gz", "wt") as file:
        file.write("".join(lines[200:]))
    (tmp_path / "c.json").write_text(json.dumps([{"text": text} for text in TEXTS]))
    found = []
    for name in ("a", "b", "c.json", "a"):
        assert prepare("fineweb-edu", "--from", tmp_path / name, "--max_tokens", 3000, "--out",
                       tmp_path / "out") == 0
        files = contents(tmp_path / "out")
        meta = json.loads(files.pop("meta.json"))
        assert meta["bytes"]["val"] + meta["bytes"]["train"] > 3000
        found.append(files)
        monkeypatch.setattr(prepare_data, "LARGE", 0)  # from now on in processes
    assert all(files == found[0] for files in found)


def test_first_shard_is_for_validation(tmp_path, monkeypatch, capsys):
    """Catches: another split than the paper's; a folder without text to train on."""
    path = write_parquet(tmp_path / "in/a.parquet")
    whole = stream()
    assert prepare("fineweb-edu", "--from", path, "--out", tmp_path / "out") == 0
    val, train = tokens_of(tmp_path / "out")  # not one whole shard
    assert np.array_equal(np.concatenate((val, train)), whole)
    assert len(val) == len(whole) // 20
    few = write_parquet(tmp_path / "in/few.parquet", ["a"] * 70)
    assert "too little text: 7 tokens for val" in fails(capsys, "fineweb-edu", "--from", few,
                                                        "--out", tmp_path / "few")
    monkeypatch.setattr(prepare_data, "SHARD_TOKENS", 2000)
    assert prepare("fineweb-edu", "--from", path, "--out", tmp_path / "out") == 0
    data = DataFolder(tmp_path / "out")
    assert np.array_equal(data.val[0].tokens, whole[:2000])
    assert [len(shard.tokens) for shard in data.train[:-1]] == [2000] * (len(data.train) - 1)
    assert len(np.concatenate(tokens_of(tmp_path / "out"))) == len(whole)
    source = json.loads((tmp_path / "out/meta.json").read_text())
    texts = [text for text in TEXTS if text and text.strip()]
    assert sum(source["bytes"].values()) == sum(len(text.encode()) for text in texts)


def cut_in_half(path):
    os.truncate(path, path.stat().st_size // 2)


def damage_a_page(path):
    content = bytearray(path.read_bytes())
    content[200:260] = bytes(60)
    path.write_bytes(content)


REFUSED = {
    "half a file": (cut_in_half, "a.parquet: not a whole parquet file"),
    "no parquet at all": (lambda p: p.write_text("text"), "a.parquet: not a whole parquet file"),
    "empty": (lambda p: p.write_bytes(b""), "a.parquet: not a whole parquet file"),
    "a damaged page": (damage_a_page, "damaged parquet file"),
    "another column": (lambda p: write_parquet(p, column="content"),
                       'no column "text", it has content, id, score'),
    "numbers": (lambda p: write_parquet(p, list(range(9)), pyarrow.int64()),
                'the column "text" holds int64, not text'),
    "bytes that are not UTF-8": (lambda p: write_parquet(p, not_utf8(), None),
                                 "text that is not UTF-8"),
}


def not_utf8():
    return pyarrow.array([b"good", b"\xff\xfe"]).view(pyarrow.string())


@pytest.mark.parametrize("name", REFUSED)
def test_a_file_that_cannot_be_read_is_named(tmp_path, capsys, name):
    """Catches: a traceback, or a file that is silently left out."""
    change, expected = REFUSED[name]
    good = write_parquet(tmp_path / "in/0.parquet")
    path = write_parquet(tmp_path / "in/a.parquet", compression="none")
    change(path)
    argv = ("fineweb-edu", "--from", tmp_path / "in", "--out", tmp_path / "out", "--max_tokens",
            10**6)
    message = fails(capsys, *argv)
    assert expected in message and "a.parquet" in message
    assert not (tmp_path / "out").exists()
    shutil.copy(good, path)
    shutil.rmtree(tmp_path / ".out.preparing", ignore_errors=True)
    assert prepare(*argv) == 0  # control


@pytest.mark.parametrize("line, expected", [
    ("{", "line 2: not valid JSON"), ("[1]", "line 2: not a JSON object"),
    ('{"text": 3}', 'line 2: expected a string "text"'),
    ('{"text": "\\ud800"}', 'line 2: expected a string "text"')])
def test_a_bad_line_is_named(tmp_path, capsys, line, expected):
    """Catches: a traceback in the third hour."""
    (tmp_path / "a.jsonl").write_text(f'{{"text": "good"}}\n{line}\n')
    assert expected in fails(capsys, "fineweb-edu", "--from", tmp_path / "a.jsonl", "--out",
                             tmp_path / "out")


@pytest.mark.row(57)
def test_files_of_a_folder_that_are_not_read_are_counted(tmp_path, capsys):
    """Catches: files left out without a word; a .json beside others read as text, or a lone one
    not."""
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    argv = ("fineweb-edu", "--from", folder, "--max_tokens", 2000, "--out", tmp_path / "out")
    assert prepare(*argv) == 0
    assert "not read" not in capsys.readouterr().out  # control
    whole = contents(tmp_path / "out")
    for name in ("info.json", "b.jsonl.zst", "c.txt", ".hidden.jsonl", ".DS_Store"):
        (folder / name).write_text("[]")
    assert prepare(*argv) == 0
    assert "4 files are not read (1 hidden, 1 .zst, 1 .txt, 1 .json)" in capsys.readouterr().out
    assert contents(tmp_path / "out") == whole
    for name in ("a.jsonl", "b.jsonl.zst"):
        (folder / name).unlink()
    (folder / "info.json").write_text(json.dumps([{"text": text} for text in TEXTS]))
    assert prepare(*argv) == 0
    assert np.array_equal(np.concatenate(tokens_of(tmp_path / "out")), stream()[:2000])


@pytest.mark.row(58)
def test_rows_without_text_are_passed_over_and_counted(tmp_path, capsys):
    """Catches: a null or an absent text that ends the preparation, or is left out without a word;
    a table of other fields that is taken for one of empty texts."""
    rows = [*[{"text": text} for text in TEXTS], {"text": None}, {"title": "x"}, {"text": " "}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for source in (["fineweb-edu", "--from"], ["text"]):
        runs.warn.cache_clear()
        name = source[0]
        assert prepare(*source, tmp_path / "a.jsonl", "--out", tmp_path / name) == 0
        assert "6 of 303 rows have no text and are passed over" in capsys.readouterr().err
        (tmp_path / "b.jsonl").write_text('{"content": "a"}\n' * 9)
        assert 'no row has a string "text"' in fails(capsys, *source, tmp_path / "b.jsonl", "--out",
                                                     tmp_path / name)


@pytest.mark.row(59)
def test_columns_that_are_not_needed_are_not_read(tmp_path, capsys):
    """Catches: a traceback for a column that cannot be converted, or for two of one name."""
    rows = [{"instruction": f"Say {i}.", "output": f"{i}."} for i in range(20)]
    table = pyarrow.Table.from_pylist(rows)
    odd = pyarrow.array([2**62] * 20, type=pyarrow.timestamp("us"))  # Python has no such year
    parquet.write_table(table.append_column("when", odd), tmp_path / "odd.parquet")
    assert prepare("alpaca", "--from", tmp_path / "odd.parquet", "--out", tmp_path / "out") == 0
    assert "fields that are not read: when (20 rows)" in capsys.readouterr().out
    twice = pyarrow.Table.from_arrays([table["output"], table["output"]], ["text", "text"])
    parquet.write_table(twice, tmp_path / "twice.parquet")
    for source in ("alpaca", "fineweb-edu"):
        assert 'two columns have the name "text"' in fails(
            capsys, source, "--from", tmp_path / "twice.parquet", "--out", tmp_path / source)


@pytest.mark.row(66)
@pytest.mark.parametrize("way", ["standard input", "a script without a guard"])
def test_preparation_works_from_anywhere(tmp_path, way):
    """Catches: workers that run the user's script again and die "perhaps for lack of memory"."""
    (tmp_path / "a.txt").write_text("".join(f"Line {i} of my own text.\n" for i in range(9999)))
    code = (f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
            f"import prepare_data\n"
            f"from pathlib import Path\n"
            f"print('once')\n"
            f"prepare_data.LARGE = 0\n"
            f"prepare_data.prepare_text([Path('a.txt')], 'out')\n")
    (tmp_path / "mine.py").write_text(code)
    argv = [sys.executable, "-"] if way == "standard input" else [sys.executable, "mine.py"]
    done = subprocess.run(argv, input=code, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("once") == 1
    prepare("text", tmp_path / "a.txt", "--out", tmp_path / "here")  # control: without processes
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
    def refused(*args):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(encode, "usable_cores", lambda: 2)
    monkeypatch.setattr(encode, "ProcessPoolExecutor", refused)
    batches = [[(text, text, True)] for text in TEXTS[8:20]]
    found = [ids for _, encoded in encode.encode_all(batches, TOKENIZER, True) for ids in encoded]
    assert np.array_equal(np.concatenate(found), stream(TEXTS[8:20]))
    assert "no other processes here" in capsys.readouterr().err


def test_bad_arguments_are_refused_in_one_line(tmp_path, capsys):
    """Catches: a traceback for a wrong path, or a flag that is silently without effect."""
    path = write_parquet(tmp_path / "a.parquet")
    (tmp_path / "b.bin").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    for argv, expected in [
            (["--from", tmp_path / "absent"], "no such file or folder"),
            (["--from", tmp_path / "empty"], "expected .parquet, .jsonl"),
            (["--from", path, tmp_path / "b.bin"], "b.bin: expected .parquet"),
            (["--from", path, "--tokenized"], "--tokenized downloads"),
            (["--tokenized", "--sample", "100BT"], "for --sample 10BT only"),
            (["--tokenized", "--vocab_size", 4096], "leave out --vocab_size"),
            (["--from", path, "--max_tokens", 0], "out of range"),
            (["--sample", "1BT"], "invalid choice")]:
        assert expected in fails(capsys, "fineweb-edu", *argv, "--out", tmp_path / "out")


# -------------------------------------------------------------------------------------------------
# Kills

def killed_before(n, argv, env=None):
    command = [sys.executable, "-c", KILLED, str(n), *map(str, argv)]
    return subprocess.run(command, capture_output=True, cwd=ROOT, text=True, env=env)


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
        every = 3
    else:
        argv = ["fineweb-edu", "--tokenized", "--out", out]
        env = hub_environment(tokenized_hub(serve, tmp_path / "in"), tmp_path)
        every = 7

    def whole_run():
        assert killed_before(10**9, argv, env).returncode == 0

    whole_run()
    whole = contents(out)
    shutil.rmtree(out)
    kills = 0
    for n in itertools.count(1, every):
        process = killed_before(n, argv, env)
        if process.returncode == 0:
            break
        assert process.returncode == -9, process.stderr
        kills += 1
        if not out.exists():
            whole_run()
        found = contents(out)
        found.pop("progress.json", None)  # of a kill just after the rename
        assert found == whole
        shutil.rmtree(out)
    assert kills >= 5  # control


@pytest.mark.row(35)
def test_kill_and_go_on(tmp_path, capsys):
    """Catches: a preparation that begins again, or that goes on with other settings."""
    path = write_parquet(tmp_path / "in/a.parquet")
    out = tmp_path / "out"
    argv = ["fineweb-edu", "--from", path, "--max_tokens", 4000, "--out", out]
    assert prepare(*argv) == 0
    whole = contents(out)
    shutil.rmtree(out)
    assert killed_before(30, argv).returncode == -9
    assert names_in(tmp_path) == [".out.preparing", "in"]
    capsys.readouterr()
    message = fails(capsys, *argv[:-3], 3000, *argv[-2:])
    assert "unfinished preparation with other max_tokens" in message
    story = tmp_path / "in/story.txt"
    story.write_text("A story. " * 999)
    assert "holds a preparation that was stopped" in fails(capsys, "text", story, "--out", out)
    assert prepare(*argv) == 0
    assert "going on after " in capsys.readouterr().out
    assert contents(out) == whole
    assert prepare("text", story, "--out", tmp_path / "other") == 0  # control
    progress = tmp_path / ".out.preparing/progress.json"
    assert killed_before(30, argv).returncode == -9
    good = progress.read_text()
    for bad in (good[:50], good.replace('"position": [', '"position": [99,'), "[]", "{}",
                good.replace('"bytes": ', '"bytes": -')):
        progress.write_text(bad)
        assert "progress.json is damaged" in fails(capsys, *argv)
    progress.write_text(good)
    (progress.parent / "val_0000.npy").write_bytes(b"")
    assert "delete" in fails(capsys, *argv)
    assert contents(out) == whole  # the old one is still there


@pytest.mark.row(35)
def test_interrupt_ends_all_processes(tmp_path):
    """Catches: a Ctrl-C that is swallowed, prints tracebacks of the workers, or leaves them."""
    path = write_parquet(tmp_path / "in/a.parquet", [f"{i} {LONG[:50_000]}" for i in range(2000)])
    command = [sys.executable, "-c", "import prepare_data as p, sys; p.LARGE = 0\n"
               "if __name__ == '__main__': sys.exit(p.main(sys.argv[1:]))",
               "fineweb-edu", "--from", str(path), "--max_tokens", "24000000", "--out"]
    for seconds in (0.8, 1.2, 1.6):
        process = subprocess.Popen([*command, str(tmp_path / f"out{seconds}")], cwd=ROOT,
                                   stderr=subprocess.PIPE, text=True, start_new_session=True)
        time.sleep(seconds)
        os.killpg(process.pid, signal.SIGINT)
        _, stderr = process.communicate(timeout=20)  # it ends when no process holds the pipe
        assert process.returncode == 130
        assert "Traceback" not in stderr
        assert not (tmp_path / f"out{seconds}").exists()


def test_files_of_the_user_stay(tmp_path, capsys):
    """Catches: a source that deletes or overwrites what the user has in the folder."""
    mine = tmp_path / "mine"
    (mine / ".downloads").mkdir(parents=True)
    (mine / "alpaca.jsonl").write_text(json.dumps({"instruction": "a", "output": "b"}) + "\n")
    before = (mine / "alpaca.jsonl").read_text()
    message = fails(capsys, "alpaca", "--from", mine / "alpaca.jsonl", "--out", mine)
    assert "which prepare_data.py did not write" in message
    assert names_in(mine) == [".downloads", "alpaca.jsonl"]
    assert (mine / "alpaca.jsonl").read_text() == before
    for _ in range(2):  # control: our own is replaced
        assert prepare("alpaca", "--from", mine / "alpaca.jsonl", "--out", tmp_path / "out") == 0


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
    env = {**os.environ, "HF_ENDPOINT": hub if isinstance(hub, str) else hub.address,
           "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": "secret", "HF_HUB_DOWNLOAD_TIMEOUT": "2",
           "HF_HUB_ETAG_TIMEOUT": "2", "HF_HUB_DISABLE_XET": "1"}
    env.pop("HF_HUB_OFFLINE", None)
    return env


def from_hub(hub, *argv, tmp_path):
    """The script with the server for the hub."""
    command = [sys.executable, str(ROOT / "prepare_data.py"), *map(str, argv)]
    return subprocess.run(command, env=hub_environment(hub, tmp_path), capture_output=True,
                          text=True, timeout=120)


def fineweb_hub(serve):
    return serve("HuggingFaceFW/fineweb-edu", {
        "sample/10BT/000_00000.parquet": parquet_bytes(TEXTS[:150]),
        "sample/10BT/001_00000.parquet": parquet_bytes(TEXTS[150:]),
        "sample/100BT/000_00000.parquet": parquet_bytes(["another sample"]),
        "README.md": b"about"})


def last_line(process):
    return process.stderr.strip().splitlines()[-1]


def test_download_becomes_tokens(tmp_path, serve):
    """Catches: another sample, a file twice, a download that stays on the disk."""
    hub = fineweb_hub(serve)
    out = tmp_path / "out"
    process = from_hub(hub, "fineweb-edu", "--max_tokens", 4000, "--out", out, tmp_path=tmp_path)
    assert process.returncode == 0, process.stderr
    assert np.array_equal(np.concatenate(tokens_of(out)), stream()[:4000])
    assert sorted(set(hub.downloads())) == ["sample/10BT/000_00000.parquet",
                                            "sample/10BT/001_00000.parquet"]
    for _, path, headers in hub.requests:
        sent = {name.lower(): value for name, value in headers.items()}
        assert "/datasets/" not in path or sent.get("authorization") == "Bearer secret"
    source = json.loads((out / "meta.json").read_text())["source"]
    assert source["commit"] == hub.commit
    assert names_in(out) == ["meta.json", *[f"train_{i:04d}.npy" for i in range(19)],
                             "val_0000.npy"]


@pytest.mark.row(34)
@pytest.mark.parametrize("fault", [pytest.param("cut", marks=pytest.mark.slow), "altered"])
def test_cut_or_altered_download_is_not_used(tmp_path, serve, fault):
    """Catches: half a file, or another one, that is taken for whole; a rerun that cannot
    recover."""
    hub = fineweb_hub(serve)
    setattr(hub, fault, 100)
    argv = ("fineweb-edu", "--max_tokens", 4000, "--out", tmp_path / "out")
    process = from_hub(hub, *argv, tmp_path=tmp_path)
    assert process.returncode == 2
    assert "run the same command again" in last_line(process)
    assert not (tmp_path / "out").exists()
    setattr(hub, fault, 0)
    process = from_hub(hub, *argv, tmp_path=tmp_path)
    assert process.returncode == 0, process.stderr
    assert np.array_equal(np.concatenate(tokens_of(tmp_path / "out")), stream()[:4000])


def test_without_network_one_line(tmp_path):
    """Catches: a traceback where there is no network."""
    for command in ("fineweb-edu", "hellaswag", "alpaca"):
        process = from_hub("http://127.0.0.1:9", command, "--out", tmp_path / "out",
                           tmp_path=tmp_path)
        assert process.returncode == 2
        assert "cannot be downloaded from http://127.0.0.1:9" in last_line(process)
        assert "Traceback" not in process.stderr


def tokenized_hub(serve, folder, damage=None):
    """A hub with files of tokens in llm.c's format."""
    folder.mkdir()
    parts = np.array_split(stream(), 3)
    names = ("web_val_000000", "web_train_000001", "web_train_000002")
    files = {"README.md": b""}
    for name, part in zip(names, parts):
        header = np.zeros(256, dtype="<i4")
        header[:3] = 20240520, 1, len(part)
        content = header.tobytes() + part.tobytes()
        if damage is not None and name == names[2]:
            content = damage(content)
        files[f"{name}.bin"] = content
    return serve("kjj0/finewebedu10B-gpt2", files)


def test_tokenized_is_downloaded(tmp_path, serve):
    """Catches: tokens that are encoded again, a file in the wrong split or that is not verified,
    more files than --max_tokens needs."""
    hub = tokenized_hub(serve, tmp_path / "in")
    argv = ("fineweb-edu", "--tokenized", "--out", tmp_path / "out")
    process = from_hub(hub, *argv, tmp_path=tmp_path)
    assert process.returncode == 0, process.stderr
    parts = np.array_split(stream(), 3)
    for found, part in zip(tokens_of(tmp_path / "out"), parts, strict=True):
        assert np.array_equal(found, part)
    process = from_hub(hub, *argv, "--max_tokens", len(parts[0]) + 1, tmp_path=tmp_path)
    assert process.returncode == 0, process.stderr
    assert names_in(tmp_path / "out") == ["meta.json", "web_train_000001.bin", "web_val_000000.bin"]
    hub.altered = 1
    process = from_hub(hub, *argv, tmp_path=tmp_path)
    assert process.returncode == 2
    assert "was deleted" in last_line(process)
    assert len(tokens_of(tmp_path / "out")) == 2  # the old one is still there


@pytest.mark.row(24)
@pytest.mark.parametrize("damage, expected", [
    (lambda content: content[:2000], "expected"),
    (lambda content: content[:-2] + b"\xff\xff", "token 65535 at offset"),
    (lambda content: b"no magic", "magic number")])
def test_damaged_token_files_are_named(tmp_path, serve, damage, expected):
    """Catches: half a shard, or ids outside the vocabulary, in the folder."""
    hub = tokenized_hub(serve, tmp_path / "in", damage)
    process = from_hub(hub, "fineweb-edu", "--tokenized", "--out", tmp_path / "out",
                       tmp_path=tmp_path)
    assert process.returncode == 2
    assert "web_train_000002.bin" in last_line(process) and expected in last_line(process)


# -------------------------------------------------------------------------------------------------
# hellaswag, alpaca

QUESTION = {"ind": 4, "activity_label": "Baking", "ctx_a": "Mix it.", "ctx_b": "then you",
            "ctx": "Mix it. then you", "endings": ["eat.", "sleep.", "run.", "wait."],
            "source_id": "x", "split": "val", "label": "3"}


def write_rows(folder, rows):
    """The same rows in all formats."""
    folder.mkdir()
    parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "validation.parquet")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "rows.json").write_text(json.dumps(rows))
    return sorted(folder.iterdir())


def test_hellaswag_is_what_evaluate_reads(tmp_path, serve, capsys):
    """Catches: questions that evaluate.py refuses; the test split, which has no answers."""
    from evaluate import Benchmark
    rows = [{**QUESTION, "label": str(i % 4)} for i in range(70)]
    for file in write_rows(tmp_path / "in", rows):
        assert prepare("hellaswag", "--from", file, "--out", tmp_path / "out") == 0
        for style in ("token", "harness"):
            benchmark = Benchmark(tmp_path / "out/hellaswag.jsonl", TOKENIZER, 100, style)
            assert benchmark.labels.tolist() == [i % 4 for i in range(70)]
            assert benchmark.name == "hellaswag"
    hub = serve("Rowan/hellaswag", {
        "data/validation-00000.parquet": (tmp_path / "in/validation.parquet").read_bytes(),
        "data/test-00000.parquet": b"", "dataset_infos.json": b"{}"})
    expected = (tmp_path / "out/hellaswag.jsonl").read_text()
    process = from_hub(hub, "hellaswag", "--out", tmp_path / "hub", tmp_path=tmp_path)
    assert process.returncode == 0, process.stderr
    assert (tmp_path / "hub/hellaswag.jsonl").read_text() == expected
    assert names_in(tmp_path / "hub") == ["hellaswag.jsonl", "meta.json"]
    for change in ({"label": ""}, {"label": "4"}, {"endings": None}, {"ctx_a": 3}):
        (tmp_path / "bad.jsonl").write_text(json.dumps({**QUESTION, **change}) + "\n")
        assert "bad.jsonl, line 1: not a question" in fails(
            capsys, "hellaswag", "--from", tmp_path / "bad.jsonl", "--out", tmp_path / "out")
    assert (tmp_path / "out/hellaswag.jsonl").read_text() == expected


def test_alpaca_is_what_sft_reads(tmp_path, serve, capsys):
    """Catches: rows that sft.py refuses; a row with an answer that is left out."""
    rows = [{"instruction": f"Say {i}.", "input": "", "output": f"{i}."} for i in range(20)]
    rows[7]["output"] = " "
    for file in write_rows(tmp_path / "in", rows):
        assert prepare("alpaca", "--from", file, "--out", tmp_path / "out") == 0
        assert "1 rows cannot be used" in capsys.readouterr().out
        chats, _, bad, _ = chat.read_instructions(tmp_path / "out/alpaca.jsonl")
        assert (len(chats), bad) == (19, 0)
    hub = serve("yahma/alpaca-cleaned", {
        "alpaca_data_cleaned.json": (tmp_path / "in/rows.json").read_bytes(), "README.md": b""})
    process = from_hub(hub, "alpaca", "--out", tmp_path / "hub", tmp_path=tmp_path)
    assert process.returncode == 0, process.stderr
    assert len(chat.read_instructions(tmp_path / "hub/alpaca.jsonl")[0]) == 19
    (tmp_path / "bad.json").write_text("[]")
    assert "no usable row" in fails(capsys, "alpaca", "--from", tmp_path / "bad.json", "--out",
                                    tmp_path / "out")
    # A file in Git, not in its large file storage, is verified by Git's hash.
    hub.altered = 1
    process = from_hub(hub, "alpaca", "--out", tmp_path / "hub", tmp_path=tmp_path)
    assert process.returncode == 2 and "was deleted" in last_line(process)


def test_reading_begins_at_any_row(tmp_path):
    """Catches: a row lost or read twice where a stopped preparation goes on."""
    paths = write_rows(tmp_path / "in", [{"text": f"{i}"} for i in range(500)])
    paths.append(write_parquet(tmp_path / "in/groups.parquet", [f"{i}" for i in range(500)],
                               row_group_size=90))
    for path in paths:
        for start in (0, 1, 63, 64, 89, 90, 91, 180, 499):
            rows = {}
            for first, values, share in tables.read_rows(path, ("text",), start):
                rows.update(enumerate((row["text"] for _, row in values), first))
                assert 0 < share <= 1
            assert rows == {i: f"{i}" for i in range(start, 500)}
        assert share == 1
        assert list(tables.read_rows(path, "text", 500)) == []  # control
