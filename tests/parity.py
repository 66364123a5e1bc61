"""What transformers says about an exported folder, in any environment: no code of ours is used.

    ENVIRONMENT/bin/python tests/parity.py FOLDER REQUEST ANSWER

REQUEST is a JSON file {"tokens": [[…]], "texts": […], "chats": […], "dtype": …}; the answer has the
same keys and more.
"""
import json
import os
import sys


def ask(folder, request):
    """{"logits", "greedy", "ids", "rendered", "problems", "version"} of a folder."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch
    import transformers
    from tokenizers import Tokenizer
    transformers.logging.set_verbosity_error()
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, request.get("dtype", "float32")), output_loading_info=True)
    model.eval()
    problems = {name: sorted(map(str, found)) for name, found in info.items() if found}
    tokens = torch.tensor(request["tokens"])
    half = tokens.shape[1] // 2
    new = tokens.shape[1] - half
    with torch.no_grad():
        logits = model(tokens).logits.float()
        greedy = []
        for row in tokens:
            out = model.generate(row[None, :half], attention_mask=torch.ones(1, half).long(),
                                 max_new_tokens=new, do_sample=False)
            greedy.append(out[0, half:].tolist())
    answer = {"logits": logits.tolist(), "greedy": greedy, "problems": problems,
              "version": transformers.__version__, "eos": model.generation_config.eos_token_id}
    if os.path.exists(os.path.join(folder, "tokenizer.json")):
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        answer["ids"] = [tokenizer(text, split_special_tokens=True)["input_ids"]
                         for text in request["texts"]]
        answer["decoded"] = [tokenizer.decode(ids) for ids in answer["ids"]]
        alone = Tokenizer.from_file(os.path.join(folder, "tokenizer.json"))
        answer["ids_alone"] = [alone.encode(text).ids for text in request["texts"]]
        answer["length"] = len(tokenizer)
        answer["special"] = [tokenizer.bos_token_id, tokenizer.eos_token_id,
                             tokenizer.pad_token_id, tokenizer.unk_token_id]
        if tokenizer.chat_template:
            answer["rendered"] = [tokenizer.apply_chat_template(chat, tokenize=False)
                                  for chat in request["chats"]]
            for chat, text in zip(request["chats"], answer["rendered"]):
                same = tokenizer.apply_chat_template(chat, tokenize=False,
                                                     add_generation_prompt=True)
                if same != text:
                    problems["generation prompt"] = [text, same]
    return answer


if __name__ == "__main__":
    _, folder, request, answer = sys.argv
    with open(request, encoding="utf-8") as file:
        found = ask(folder, json.load(file))
    with open(answer, "w", encoding="utf-8") as file:
        json.dump(found, file)
