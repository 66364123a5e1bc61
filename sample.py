"""sample.py — what a checkpoint says: continue a prompt.

    python sample.py                                          # newest run, newest checkpoint
    python sample.py runs/tiny --prompt "The function" --prompt "A list" --samples 3
    python sample.py runs/tiny --step 64 --temperature 0      # an earlier moment, the likeliest words
"""
import argparse
import codecs
import sys

import torch

from checkpoint import load_model, newest_run
from errors import UserError, script
from evaluate import choose_device


def stream(model, tokenizer, ids, args, generator, device):
    """Print the continuation of `ids` as it is made. A character may be split over several tokens: its bytes wait until
    it is whole, so that no broken one is ever shown."""
    characters = codecs.getincrementaldecoder("utf-8")(errors="replace")
    new = model.generate(torch.tensor([ids], device=device), args.max_new_tokens, args.temperature, args.top_k, args.top_p,
                         tokenizer.eot, generator)
    for next_id in map(int, new):
        if next_id == tokenizer.eot:
            break
        print(characters.decode(tokenizer.decode_bytes([next_id])), end="", flush=True)
    print(characters.decode(b"", final=True))


@script
def main(argv=None):
    parser = argparse.ArgumentParser(description="Continue a prompt with a checkpoint.")
    parser.add_argument("run", nargs="?", help="run folder (default: the newest run)")
    parser.add_argument("--step", type=int, help="checkpoint (default: the newest)")
    parser.add_argument("--prompt", action="append", help="text to continue; may be given several times (default: none, a new document)")
    parser.add_argument("--samples", type=int, default=1, help="continuations of each prompt (default 1)")
    parser.add_argument("--max_new_tokens", type=int, default=200)
    parser.add_argument("--temperature", type=float, default=0.8, help="0: always the likeliest token (default 0.8)")
    parser.add_argument("--top_k", type=int, help="draw among the k likeliest tokens only")
    parser.add_argument("--top_p", type=float, default=0.95, help="draw among the likeliest tokens that together have this "
                        "probability (default 0.95)")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same text")
    parser.add_argument("--device", help="default: cuda if there is one")
    args = parser.parse_args(argv)
    for name, fine in (("temperature", args.temperature == 0 or 0.01 <= args.temperature <= 100), ("top_k", args.top_k is None or args.top_k >= 1),
                       ("top_p", 0 < args.top_p <= 1), ("samples", args.samples >= 1), ("seed", 0 <= args.seed < 2**63), ("max_new_tokens", args.max_new_tokens >= 1)):
        if not fine:
            raise UserError(f"--{name} {getattr(args, name)} makes no sense — see python sample.py --help")

    device = choose_device(args.device)
    model, tokenizer, step = load_model(args.run or newest_run(), args.step, device)
    generator = torch.Generator().manual_seed(args.seed)
    for number, prompt in enumerate(prompt for prompt in args.prompt or [""] for _ in range(args.samples)):
        # What is no UTF-8 on the command line arrives as lone surrogates, which no text holds: they become "?".
        prompt = prompt.encode("utf-8", errors="replace").decode()
        ids = tokenizer.encode(prompt) or [tokenizer.eot]  # end-of-text stands before each document: a new one
        if len(ids) > model.config.max_seq_len:
            print(f"note: the prompt has {len(ids)} tokens, the model sees the last {model.config.max_seq_len}", file=sys.stderr)
        print(("---\n" if number else "") + prompt, end="", flush=True)
        stream(model, tokenizer, ids, args, generator, device)
    return 0


if __name__ == "__main__":
    main()
