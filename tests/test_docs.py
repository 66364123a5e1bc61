"""README.md and EXERCISES.md say what the log and the code say."""
import copy
import re
import textwrap
from pathlib import Path

import pytest

import plot_dynamics

ROOT = Path(__file__).parent.parent
README, EXERCISES = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "EXERCISES.md"))


def claims(run):
    """What README says of the default run, in its own words, from the log."""
    last, scores, words = run.eval[-1], next(iter(run.benchmarks.values()))[-1], plot_dynamics.summary(run)
    loss = {row["step"]: row["val_loss"] for row in run.eval}
    return [f"{words['steps']} steps", f"{words['tokens/s (median)']} tokens/s", f"{words['seconds']} seconds", f"{words['of them evaluating']} of it evaluating",
            f"**{last['val_bpb']:.3f} bits per byte**", f"val loss {last['val_loss']:.4f} | {last['val_bpb']:.4f} bits/byte | context gain {last['context_gain']:.3f} ± {last['context_gain_stderr']:.3f}",
            *(f"{key} {100 * scores[key]:.1f} ± {100 * scores[key.replace('acc', 'stderr')]:.1f} %" for key in ("acc", "acc_norm", "acc_pmi")),
            *(f"| {row['step']:,} | {loss[row['step']]:.2f} | {plot_dynamics.escape(row['text'])[:40]}" for row in next(iter(run.samples.values()))
              if row["step"] in (0, 64, 1024, run.train[-1]["step"]))]


def claims_of_tuning(full, lora):
    """The same of the two tunings."""
    answers = {run.name: {prompt: plot_dynamics.escape(rows[-1]["text"]) for (prompt, _), rows in run.samples.items()} for run in (full, lora)}
    bases = {prompt: textwrap.shorten(plot_dynamics.escape(rows[0]["text"]), 64, placeholder=" …") for (prompt, _), rows in full.samples.items()}
    moments = (full, 0), (full, -1), (lora, -1)

    def row(name, text):
        return f"| {name} | " + " | ".join(text(run, i) for run, i in moments) + " |"
    return [row("loss on held-out answers", lambda run, i: f"{run.tuning[i]['heldout_loss']:.3f}"),
            row("their tokens right, given those before", lambda run, i: f"{run.tuning[i]['token_acc']:.1%}"),
            row("answers that end, of 32", lambda run, i: f"{run.tuning[i]['ended']:.0%}"),
            row("cloze: acc / acc_norm / acc_pmi, ± 2.8 %", lambda run, i: plot_dynamics.percent(next(iter(run.benchmarks.values()))[i])),
            *(f"| {plot_dynamics.escape(q)} | {bases[q]} | {answers[full.name][q]} | {answers[lora.name][q]} | {plot_dynamics.escape(question['answer'])} |"
              for question in full.asked["questions"] for q in [question["question"]]),
            f"{full.train[-1]['step']} steps, took {full.seconds:.0f} seconds, with adapters {lora.seconds:.0f}",
            f"“{full.asked['frequent_answer']}” ({full.asked['frequent_share']:.2%})", f"{full.asked['rows']:,} questions",
            f"{full.asked['useful']:.1%} of the tokens in a batch are useful"]


def test_the_readme_tells_of_another_tuning():
    full, lora = (plot_dynamics.read_run(ROOT / "logs" / name) for name in ("sft", "lora8"))
    text = " ".join(README.split())
    assert [claim for claim in claims_of_tuning(full, lora) if claim not in text] == []
    other = copy.deepcopy(lora)  # control: an answer and a loss that are a little different
    other.tuning[-1]["heldout_loss"] += 0.01
    next(iter(other.samples.values()))[-1]["text"] += " Or not."
    assert sum(claim not in text for claim in claims_of_tuning(full, other)) == 2
    for run in (full, lora):
        assert plot_dynamics.trajectory([run]) == (ROOT / "logs" / run.name / "trajectory.md").read_text(encoding="utf-8")


def test_the_readme_tells_of_another_run():
    run = plot_dynamics.read_run(ROOT / "logs/default")
    assert [claim for claim in claims(run) if claim not in README] == []
    other = copy.deepcopy(run)  # control: a run that is a little different
    other.eval[-1]["val_bpb"] += 0.01
    other.samples[next(iter(other.samples))][-1]["text"] = "The answer."
    next(iter(other.benchmarks.values()))[-1]["acc_pmi"] -= 0.01
    assert sum(claim not in README for claim in claims(other)) == 4
    assert plot_dynamics.trajectory([run]) == (ROOT / "logs/default/trajectory.md").read_text(encoding="utf-8")


def test_a_promise_has_no_test():
    tests = "".join(path.read_text(encoding="utf-8") for path in [ROOT / "test_model.py", *(ROOT / "tests").glob("test_*.py")])
    promised = re.findall(r"`(test_\w+)`", README)
    assert len(promised) >= 10 and [name for name in promised if f"def {name}(" not in tests] == []


@pytest.mark.parametrize("number, file, change", [(i, *found) for i, found in enumerate(re.findall(r"```diff\n--- (\S+)\n(.*?)```", EXERCISES, re.S))])
def test_an_exercise_changes_a_line_that_is_gone(number, file, change):
    source = (ROOT / file).read_text(encoding="utf-8")
    old, new = ("".join(line[1:] + "\n" for line in change.splitlines() if line[0] == sign) for sign in "-+")
    assert source.count(old) == 1 and change.strip().splitlines() == [line for line in change.strip().splitlines() if line[0] in "-+"]
    compile(source.replace(old, new), file, "exec")
