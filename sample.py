"""sample.py — what a checkpoint says: continue a prompt, answer questions.

    python sample.py                                          # newest run, newest checkpoint
    python sample.py runs/tiny --prompt "The function" --prompt "A list" --samples 3
    python sample.py runs/tiny --step 64 --temperature 0      # an earlier moment, the likeliest words
    python sample.py --trajectory                             # the same prompt and seed at every checkpoint kept
    python sample.py runs/tiny-sft --chat                     # talk to a model that sft.py has tuned; /reset, /exit
    echo "What is a list?" | python sample.py runs/tiny-sft --chat --temperature 0
"""
import argparse
import codecs
import contextlib
import sys
from pathlib import Path

import torch

from checkpoint import checkpoints, load_model
from data import SYSTEM, encode_chat
from devices import choose_device
from errors import UserError, script
from evaluate import continue_prompt
from log import note
from runs import newest_run, settings_of
from settings import whole_text


def stream(model, tokenizer, ids, max_new_tokens, args, generator, device):
    """Yields the continuation of `ids` as it is made, piece by piece. A character may be split over several tokens: its bytes
    wait until it is whole, so that no broken one is ever shown."""
    characters = codecs.getincrementaldecoder("utf-8")(errors="replace")
    new = model.generate(torch.tensor([ids], device=device), max_new_tokens, args.temperature, args.top_k, args.top_p, tokenizer.eot, generator)
    for next_id in map(int, new):
        if next_id == tokenizer.eot:
            break
        yield characters.decode(tokenizer.decode_bytes([next_id]))
    yield characters.decode(b"", final=True)


def fit(tokenizer, messages, system, room):
    """(messages, ids): of a conversation that ends with a question, the newest turns that make at most `room` tokens."""
    ids, _ = encode_chat(tokenizer, messages, system)
    while len(ids) > room and len(messages) > 1:
        messages = messages[2:]  # a question and its answer
        ids, _ = encode_chat(tokenizer, messages, system)
    return messages, ids


def chat(model, tokenizer, system, args, generator, device):
    """Answer the lines of stdin, one after another, remembering what was said as far as the window goes."""
    window, messages, prompt = model.config.max_seq_len, [], "\nyou: " if sys.stdin.isatty() else ""
    room = window - min(args.max_new_tokens, window // 4)  # the rest is for the answer
    if (n := len(encode_chat(tokenizer, [{"role": "user", "content": ""}], system)[0])) >= room:
        raise UserError(f"the system prompt makes {n} tokens, and the window has room for {room} — give a shorter --system")
    if prompt:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  lines can be edited and called back; not on Windows
        print("Ask something. /reset forgets what was said; /exit, Ctrl-D or Ctrl-C leave.")
    while True:
        question = input(prompt).strip()
        if question == "/exit":
            return
        if question == "/reset":
            messages = []
        elif question.startswith("/") and " " not in question:
            print(f"no command {question} — there are /reset and /exit", file=sys.stderr)
        elif question:
            asked, ids = fit(tokenizer, [*messages, {"role": "user", "content": question}], system, room)
            if len(ids) > room:
                print(f"the question makes {len(ids)} tokens with the system prompt, and the window has room for {room} — ask a shorter one", file=sys.stderr)
                continue
            answer = ""
            for piece in stream(model, tokenizer, ids, min(args.max_new_tokens, window - len(ids)), args, generator, device):
                piece = piece if answer else piece.lstrip()  # its first token brings the space after "ASSISTANT:"
                print(piece, end="", flush=True)
                answer += piece
            print()
            messages = [*asked, {"role": "assistant", "content": answer}]


def trajectory(run, prompts, args, device):
    """What the run said to each prompt at every checkpoint that it kept: on the screen and in its evaluations.jsonl."""
    drawn, used = {name: getattr(args, name) for name in ("max_new_tokens", "temperature", "top_k", "top_p", "seed")}, 0
    for step in checkpoints(run):
        try:
            model, tokenizer, _ = load_model(run, step, device)
        except UserError:
            continue  # damaged: named on stderr already
        used += 1
        for prompt in prompts:
            sample = continue_prompt(model, tokenizer, prompt, torch.autocast(device.type, enabled=False), **drawn)
            note(run, {"event": "sample", "step": step, **sample, **drawn})
            print(f"{step:>9,} | {prompt} | {' '.join(sample['text'].split())}", flush=True)
    if not used:
        raise UserError(f"{run}: no usable checkpoint — train it first: python train.py --run {run}")


@script
def main(argv=None):
    parser = argparse.ArgumentParser(description="Continue a prompt with a checkpoint.")
    parser.add_argument("run", nargs="?", help="run folder (default: the newest run)")
    parser.add_argument("--step", type=int, help="checkpoint (default: the newest)")
    parser.add_argument("--prompt", action="append", help="text to continue; may be given several times (default: none, "
                        "a new document; with --trajectory what the run's own samples continue)")
    parser.add_argument("--trajectory", action="store_true", help="the same from every checkpoint kept, also into evaluations.jsonl")
    parser.add_argument("--chat", action="store_true", help="answer the lines of stdin in turn, in the template of sft.py; /reset, /exit")
    parser.add_argument("--system", help="how the conversation begins (default: as the model was tuned)")
    parser.add_argument("--samples", type=int, default=1, help="continuations of each prompt (default 1)")
    parser.add_argument("--max_new_tokens", type=int, help="(default 200; with --trajectory 80)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0: always the likeliest token (default 0.8)")
    parser.add_argument("--top_k", type=int, help="draw among the k likeliest tokens only")
    parser.add_argument("--top_p", type=float, default=0.95, help="draw among the likeliest tokens that together have this "
                        "probability (default 0.95)")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same text")
    parser.add_argument("--device", help="default: cuda if there is one")
    args = parser.parse_args(argv)
    args.max_new_tokens = (80 if args.trajectory else 200) if args.max_new_tokens is None else args.max_new_tokens
    for name, fine in (("temperature", args.temperature == 0 or 0.01 <= args.temperature <= 100), ("top_k", args.top_k is None or args.top_k >= 1),
                       ("top_p", 0 < args.top_p <= 1), ("samples", args.samples >= 1), ("seed", 0 <= args.seed < 2**63),
                       ("max_new_tokens", args.max_new_tokens >= 1)):
        if not fine:
            raise UserError(f"--{name} {getattr(args, name)} makes no sense — see python sample.py --help")
    if args.trajectory and (args.step is not None or args.samples > 1):
        raise UserError("--trajectory takes one sample at every step — leave out --step and --samples")
    if args.chat and (args.trajectory or args.prompt or args.samples > 1) or args.system is not None and not args.chat:
        raise UserError("--chat asks you for the questions — leave out --prompt, --samples and --trajectory; --system is for --chat alone")

    device, run = choose_device(args.device), Path(args.run or newest_run())
    prompts = [whole_text(prompt) for prompt in args.prompt or []]
    if args.trajectory and checkpoints(run):
        return trajectory(run, prompts or [settings_of(run)["sample_prompt"]], args, device)
    model, tokenizer, step = load_model(run, args.step, device)
    generator = torch.Generator().manual_seed(args.seed)
    if args.chat:
        tuned = settings_of(run).get("system")
        if tuned is None:
            print(f"note: {run} was never tuned to answer; it will only go on with the text — tune it: python sft.py {run}", file=sys.stderr)
        if not sys.stdin:
            raise UserError("--chat reads questions from standard input, which is closed — open it, or give a --prompt")
        sys.stdin.reconfigure(errors="replace")
        with contextlib.suppress(EOFError, KeyboardInterrupt):  # Ctrl-D, the end of a pipe, Ctrl-C
            chat(model, tokenizer, next(whole_text(text) for text in (args.system, tuned, SYSTEM) if text is not None), args, generator, device)
        if sys.stdin.isatty():
            print()
        return 0
    for number, prompt in enumerate(prompt for prompt in prompts or [""] for _ in range(args.samples)):
        ids = tokenizer.encode(prompt) or [tokenizer.eot]  # end-of-text stands before each document: a new one
        if len(ids) > model.config.max_seq_len:
            print(f"note: the prompt has {len(ids)} tokens, the model sees the last {model.config.max_seq_len}", file=sys.stderr)
        print(("---\n" if number else "") + prompt, end="", flush=True)
        for piece in stream(model, tokenizer, ids, args.max_new_tokens, args, generator, device):
            print(piece, end="", flush=True)
        print()
    return 0


if __name__ == "__main__":
    main()
