"""model_card.py — README.md of the folders that convert_hf.py writes."""
from pathlib import Path

TEXTS = {  # what the sources of prepare_data.py are
    "pydocs": "the docstrings of Python's standard library and of the packages that it needs",
    "fineweb-edu": "FineWeb-Edu",
}
ABOUT = """\
A LLaMA made with vesper, after arXiv 2412.13335. MIT is the licence of the code that made it. The
texts that it has read have licences of their own, and so have weights that it was started from.
"""
SAY = """
```python
from transformers import pipeline
generate = pipeline("text-generation", "FOLDER")
print(generate("The function", max_new_tokens=40, do_sample=False)[0]["generated_text"])
```
"""
ASK = """
```python
from transformers import pipeline
generate = pipeline("text-generation", "FOLDER")
question = [{"role": "user", "content": "What is a list?"}]
answer = generate(question, max_new_tokens=60, do_sample=False)[0]["generated_text"][-1]
print(answer["content"])
```
"""
TUNE = """
To train it further: load it in float32 (`dtype=torch.float32`), and mask the labels of padding by
the attention mask. The padding token is end-of-text: a collator that masks it by its id also masks
the end of every answer, and the model then forgets how to stop.
"""
ADAPTERS = """\
---
library_name: peft
pipeline_tag: text-generation
---

# {name}

LoRA adapters, trained with vesper, for the model {base}, which is needed as a folder too.

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained("FOLDER OF THE BASE")
model = PeftModel.from_pretrained(model, "FOLDER")
tokenizer = AutoTokenizer.from_pretrained("FOLDER")
question = [{{"role": "user", "content": "What is a list?"}}]
ids = tokenizer.apply_chat_template(question, return_tensors="pt", return_dict=True)
out = model.generate(**ids, max_new_tokens=60, do_sample=False)
print(tokenizer.decode(out[0, ids["input_ids"].shape[1]:]))
```
"""


# What the table tells of a run, if it is known: of its settings, and of its evaluation.
PARENTS = {"imported_from": "imported from", "base": "tuned from", "init_from": "started from"}
SETTINGS = ("batch_tokens", "lr", "schedule", "lora")
SCORES = {"val_loss": "loss on held-out text, nats/token", "val_bpb": "the same in bits/byte",
          "heldout_loss": "loss on held-out answers, nats/token"}


def model_card(name, step, parameters, config, dtype, settings, source, score):
    """README.md of an exported folder: what it is and how it was made. settings: of the run.
    source: the name of its training text. score: its evaluation at this step, or {}."""
    head = ["---", "library_name: transformers", "pipeline_tag: text-generation", "license: other"]
    if source == "fineweb-edu":
        head += ["datasets:", "- HuggingFaceFW/fineweb-edu"]
    facts = {"parameters": f"{parameters:,}, here in {dtype}",
             "layers, width": f"{config.n_layers}, {config.dim}",
             "query heads, key/value heads": f"{config.n_heads}, {config.n_kv_heads}",
             "window, in tokens": config.max_seq_len,
             "tokenizer": f"GPT-2's, its first {config.vocab_size:,} ids",
             "text": TEXTS.get(source, source),
             "steps": f"{step:,}"}
    for key, fact in PARENTS.items():
        if settings.get(key) is not None:
            facts[fact] = Path(settings[key]).resolve().name
    facts.update({key: settings[key] for key in SETTINGS if settings.get(key) is not None})
    for key, fact in SCORES.items():
        if score.get(key) is not None:
            facts[fact] = f"{score[key]:.4f}"
    lines = [f"# {name}", "", ABOUT, "| | |", "|---|---|",
             *[f"| {fact} | {value} |" for fact, value in facts.items()], ""]
    if settings.get("system") is None:
        lines += ["It continues text; it was not tuned to answer.", SAY]
    else:
        lines += ["It was tuned to answer, in the template of Vicuna 1.1.", ASK]
    return "\n".join([*head, "---", "", *lines, TUNE.lstrip()])
