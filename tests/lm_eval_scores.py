"""What lm-evaluation-harness says about an exported folder, in an environment that has it: no code
of ours is used. The questions take the place of HellaSwag's in its own task.

    ENVIRONMENT/bin/python tests/lm_eval_scores.py FOLDER QUESTIONS.jsonl RESULTS_FOLDER ANSWER
"""
import json
import os
import sys
from pathlib import Path

# The folder of this file is on the path; ours has an evaluate.py, and theirs imports another one.
sys.path.pop(0)


def main(folder, questions, results, answer):
    os.environ["HF_HUB_OFFLINE"] = "1"
    import lm_eval
    from lm_eval import tasks
    from lm_eval.loggers import EvaluationTracker
    own = Path(results) / "tasks"
    own.mkdir(parents=True)
    theirs = Path(tasks.__file__).parent / "hellaswag"
    text = (theirs / "hellaswag.yaml").read_text()
    text = text.replace("task: hellaswag", "task: ours")
    text = text.replace("dataset_path: Rowan/hellaswag", "dataset_path: json\ndataset_kwargs:\n"
                        f"  data_files:\n    validation: {questions}\n    train: {questions}")
    (own / "ours.yaml").write_text(text)
    (own / "utils.py").write_text((theirs / "utils.py").read_text())
    tracker = EvaluationTracker(output_path=results)
    found = lm_eval.simple_evaluate(
        model="hf", model_args=f"pretrained={folder},dtype=float32", tasks=["ours"], device="cpu",
        task_manager=tasks.TaskManager(include_path=str(own)), log_samples=True, batch_size=4,
        bootstrap_iters=0)
    samples = sorted(found["samples"]["ours"], key=lambda sample: sample["doc_id"])
    likelihoods = [[float(ending[0][0]) for ending in sample["resps"]] for sample in samples]
    found.pop("samples")
    tracker.save_results_aggregated(results=found, samples=None)
    scores = found["results"]["ours"]
    with open(answer, "w") as file:
        json.dump({"likelihoods": likelihoods, "acc": scores["acc,none"],
                   "acc_norm": scores["acc_norm,none"]}, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
