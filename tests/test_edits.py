"""What a reader may rely on: an edit made where the text shows it takes effect in every run, and
runs made before the edit stay usable.

Each edit is applied to a copy of the code, which then trains, compiled and not, and evaluates,
samples, resumes and tunes what the unedited code has made.
"""
import json
import shutil
import subprocess
import sys

import pytest

from conftest import ROOT, TEST, TEST_SETTINGS, rows

pytestmark = pytest.mark.slow

# A process that runs scripts of the copied code, and prints their exit codes.
CHILD = f"""
import json, sys
folder, commands, patch = json.loads(sys.argv[1])
sys.path.insert(0, folder)
from support import cpu
import importlib, model, train
from support import fast
model.PRESETS["test"] = model.ModelConfig(**{vars(TEST)})
train.BY_PRESET["test"] = {TEST_SETTINGS}
exec(patch)
codes = []
for script, *argv in commands:
    try:
        codes.append(importlib.import_module(script).main(argv))
    except SystemExit as error:
        codes.append(error.code)
print(json.dumps(codes))
"""

FLAGS = ("--preset test --max_steps 6 --seq_len 16 --batch_tokens 128 --micro_batch 4 "
         "--warmup_steps 2 --lr 0.01 --threads 1 --eval_every 0 --eval_tokens 256 "
         "--sample_every 0 --save_every 3").split()

TUNE = ("--max_steps 4 --system S. --threads 1 --dtype fp32 --batch_size 6 "
        "--micro_batch 3").split()


def run_all(folder, *commands, patch=""):
    """(exit codes, stderr and stdout) of commands, in one process of the code in `folder`."""
    commands = [[str(word) for word in command] for command in commands]
    request = json.dumps([str(folder), commands, patch])
    done = subprocess.run([sys.executable, "-c", CHILD, request], capture_output=True, text=True,
                          timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), done.stderr + done.stdout


def copy_of_code(folder, *changes):
    """A copy of the code with changes (file, old, new), each of a text that is there once."""
    folder.mkdir()
    for file in ROOT.glob("*.py"):
        shutil.copy(file, folder)
    shutil.copytree(ROOT / "support", folder / "support",
                    ignore=shutil.ignore_patterns("__pycache__"))
    for file, old, new in changes:
        source = (folder / file).read_text(encoding="utf-8")
        assert source.count(old) == 1, (file, old)
        (folder / file).write_text(source.replace(old, new), encoding="utf-8")
    return folder


def trained(data, run, dtype="fp32", *flags):
    return ["train", *FLAGS, "--data", data, "--run", run, "--dtype", dtype, *flags]


def losses(run):
    return [loss for loss, in rows(run, keys=("loss",))]


def scores(run):
    """What evaluate.py noted last."""
    lines = (run / "evaluations.jsonl").read_text().splitlines()
    return [json.loads(line)["val_loss"] for line in lines if '"val_loss"' in line][-1]


@pytest.fixture(scope="module")
def old(data, instructions, tmp_path_factory):
    """Runs of the unedited code: trained, compiled, stopped at step 4, in bf16, tuned, LoRA; and
    the score of the first."""
    folder = tmp_path_factory.mktemp("old")
    tune = ["sft", folder / "plain", *TUNE, "--instructions", instructions]
    codes, _ = run_all(
        ROOT, trained(data, folder / "plain"), trained(data, folder / "compiled", "fp32",
                                                       "--compile"),
        trained(data, folder / "half", "fp32", "--stop_at", 4), trained(data, folder / "bf16",
                                                                        "bf16"),
        [*tune, "--run", folder / "sft", "--stop_at", 2],
        [*tune, "--run", folder / "lora", "--stop_at", 2, "--lora", 4],
        ["evaluate", folder / "plain", "--eval_tokens", 256])
    assert codes == [0, 0, 75, 0, 75, 75, None]
    assert losses(folder / "compiled") == pytest.approx(losses(folder / "plain"), rel=1e-4)
    return folder


@pytest.fixture
def copied(old, tmp_path):
    """The same runs, to be resumed."""
    shutil.copytree(old, tmp_path / "old")
    return tmp_path / "old"


LOSS = ("        return F.cross_entropy(self.logits(hidden), targets, ignore_index=IGNORE, "
        'reduction="sum")\n')
LOGITS = '''        return self.lm_head(hidden).float()
'''
MLP = '''        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
'''
SMOOTHED = '''        return F.cross_entropy(self.logits(hidden), targets, ignore_index=IGNORE,
                               label_smoothing=0.1, reduction="sum")
'''
ACTIVATED = '''        gate = self.gate_proj(x)
        gate = F.gelu(gate) if self.activation == "gelu" else F.silu(gate)
        return self.down_proj(gate * self.up_proj(x))
'''

# name: (changes, whether the training changes, whether the score of the old weights changes)
EDITS = {
    "label smoothing": ([("model.py", LOSS, SMOOTHED)], True, False),
    "soft cap": ([("model.py", LOGITS, "        return 2 * (self.lm_head(hidden).float() / "
                                       "2).tanh()\n")], True, True),
    "scale": ([("model.py", "scores / math.sqrt(q.shape[-1])", "scores / q.shape[-1]")],
              True, True),
    "window": ([("model.py", "    return torch.full((size, size), -math.inf, device=device)."
                             "triu(1)\n",
                 "    window = torch.full((size, size), -math.inf, device=device).tril(-4)\n"
                 "    return window + torch.full_like(window, -math.inf).triu(1)\n")],
               True, True),
    "window in Decoder": ([("model.py", "        x = self.embed_tokens(tokens)  # (B, T, dim)\n",
                            "        mask = mask + torch.full_like(mask, -math.inf).tril(past - 4)"
                            "\n        x = self.embed_tokens(tokens)\n")], True, True),
    "dropout": ([("model.py", MLP, "        return F.dropout(self.down_proj(F.silu(self.gate_proj("
                                   "x)) * self.up_proj(x)), 0.3, self.training)\n")],
                True, False),
    "a part without weights": (
        [("model.py", "        self.down_proj = nn.Linear(",
          "        self.drop = nn.Dropout(0.0)\n        self.down_proj = nn.Linear("),
         ("model.py", MLP, "        return self.drop(self.down_proj(F.silu(self.gate_proj(x)) * "
                           "self.up_proj(x)))\n")], False, False),
    "config field": (
        [("model.py", "    tie_embeddings: bool = False",
          '    activation: str = "swiglu"\n    tie_embeddings: bool = False'),
         ("model.py", "        self.down_proj = nn.Linear(",
          "        self.activation = config.activation\n        self.down_proj = nn.Linear("),
         ("model.py", MLP, ACTIVATED)], False, False),
    "flag": (
        [("train.py", '    add("--fsdp",',
          '    add("--label_smoothing", type=float, default=0.0)\n    add("--fsdp",'),
         ("train.py", "    if args.fsdp:\n",
          "    model.label_smoothing = args.label_smoothing\n"
          "    if args.fsdp:\n"),
         ("model.py", "        self.model = Decoder(config)\n",
          "        self.label_smoothing = 0.0\n        self.model = Decoder(config)\n"),
         ("model.py", LOSS, SMOOTHED.replace("0.1", "self.label_smoothing"))], False, False),
}


@pytest.mark.parametrize("name", EDITS)
def test_edit_takes_effect_everywhere_and_old_runs_stay_usable(name, data, instructions, old,
                                                                copied, tmp_path):
    """Catches: an edit that works in a short trial and is lost in a compiled run, or in evaluation;
    runs that a new field or flag makes unusable."""
    changes, trains_otherwise, scores_otherwise = EDITS[name]
    code = copy_of_code(tmp_path / "code", *changes)
    codes, printed = run_all(
        code, trained(data, tmp_path / "plain"),
        trained(data, tmp_path / "compiled", "fp32", "--compile"),
        trained(data, tmp_path / "written", "fp32", "--no-fast"),
        ["evaluate", copied / "plain", "--eval_tokens", 256],
        ["sample", copied / "plain", "--max_new_tokens", 4],
        ["train", "--resume", "--run", copied / "half"],
        ["sft", "--resume", "--run", copied / "sft"],
        ["sft", "--resume", "--run", copied / "lora"],
        ["sft", copied / "plain", *TUNE, "--instructions", instructions, "--run", tmp_path / "t"],
        ["sample", copied / "lora", "--max_new_tokens", 4])
    assert codes == [0, 0, 0, None, None, 0, 0, 0, 0, None], printed
    assert "Traceback" not in printed
    plain = losses(tmp_path / "plain")
    before = losses(old / "plain")
    assert (plain != pytest.approx(before, rel=1e-4)) == trains_otherwise
    assert losses(tmp_path / "compiled") == pytest.approx(plain, rel=1e-4)
    assert losses(tmp_path / "written") == pytest.approx(plain, rel=1e-4)
    assert (scores(copied / "plain") != scores(old / "plain")) == scores_otherwise
    assert "model.py " in printed.split("changed since it was saved: ")[1].split("\n")[0]
    if name == "config field":
        assert "note: the checkpoint's config does not have activation 'swiglu'" in printed
    if name == "flag":
        assert "note: the run does not have the settings label_smoothing 0.0" in printed
        assert run_all(code, trained(data, tmp_path / "on", "fp32", "--compile",
                                     "--label_smoothing", "0.1"))[0] == [0]
        assert losses(tmp_path / "on") != pytest.approx(plain, rel=1e-4)


def test_without_the_comparison_of_texts_an_edit_is_lost(data, old, tmp_path):
    """Catches: a test of edits that could not fail. In bf16 a soft cap of 50 on the scores is
    within rounding, so no comparison of numbers sees that it is missing."""
    code = copy_of_code(tmp_path / "code",
                        ("model.py", "scores = scores.float() + mask ",
                         "scores = 50 * (scores.float() / 50).tanh() + mask "))
    blind = "fast.has_known_attention = lambda network: True"
    assert run_all(code, trained(data, tmp_path / "r", "bf16"))[0] == [0]
    assert run_all(code, trained(data, tmp_path / "blind", "bf16"), patch=blind)[0] == [0]
    assert losses(tmp_path / "blind") == losses(old / "bf16")
    assert losses(tmp_path / "r") != losses(old / "bf16")


def test_what_the_code_no_longer_knows_is_refused_by_name(data, old, copied, tmp_path):
    """Catches: an older network that an edited one continues in silence; a schedule that is
    another one; a value that trains and can never be loaded."""
    code = copy_of_code(
        tmp_path / "code",
        ("model.py", "        self.o_proj = nn.Linear(",
         "        self.q_norm = RMSNorm(config.head_dim, config.norm_eps)\n"
         "        self.o_proj = nn.Linear("),
        ("model.py", "        q = apply_rope(q,", "        q = apply_rope(self.q_norm(q),"))
    codes, printed = run_all(
        code, ["sample", copied / "plain"], ["train", "--resume", "--run", copied / "half"],
        trained(data, tmp_path / "r", "fp32", "--schedule", "sqrt"),
        trained(data, tmp_path / "new"),
        ["convert_hf", "export", tmp_path / "new", tmp_path / "hf"])
    assert codes == [2, 2, 2, 0, 2], printed
    assert printed.count("self_attn.q_norm.weight (absent saved, (16,) float32 in the code)") == 4
    assert "--schedule sqrt has no branch in lr_at" in printed
    assert not (tmp_path / "r" / "metrics.jsonl").exists()
    assert "Attention in model.py has another text" in printed
    assert "delete" not in printed
