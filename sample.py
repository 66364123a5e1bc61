"""sample.py — what a checkpoint says: continue a prompt, answer questions.

    python sample.py                                          # newest run, newest checkpoint
    python sample.py runs/tiny --prompt "The function" --prompt "A list" --samples 3
    python sample.py runs/tiny --step 64 --temperature 0      # an earlier one, likeliest tokens
    python sample.py --trajectory                             # one sample of every checkpoint kept
    python sample.py runs/tiny-sft --chat                     # talk to a model tuned by sft.py
    echo "What is a list?" | python sample.py runs/tiny-sft --chat --temperature 0
"""
import codecs
import contextlib
import sys
from pathlib import Path

import support.cpu  # before torch, which reads its settings once
import torch

from checkpoint import load_model
from evaluate import continue_prompt
from support.chat import SYSTEM, encode_chat
from support.devices import choose_device, choose_dtype, refuse_processes
from support.durable import checkpoints
from support.flags import Parser, count, number, text
from support.runs import (UserError, beginning, newest_run, note, quoted, script, settings_of,
                          trained_window, visible)


def stream(model, tokenizer, ids, max_new_tokens, args, generator):
    """Yield the continuation of `ids` as text, piece by piece.

    A character may be split over several tokens: its bytes wait until it is complete."""
    device = next(model.parameters()).device
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    new = model.generate(torch.tensor([ids], device=device), max_new_tokens, args.temperature,
                         args.top_k, args.top_p, tokenizer.eot, generator)
    for next_id in map(int, new):
        if next_id == tokenizer.eot:
            break
        yield visible(decoder.decode(tokenizer.decode_bytes([next_id])))
    yield decoder.decode(b"", final=True)


def continue_prompts(model, tokenizer, args, trained):
    """Print the continuations of all prompts. trained: tokens of the windows of training."""
    window = model.config.max_seq_len
    separator = ""
    for prompt in args.prompt or [""]:
        ids = tokenizer.encode(prompt) or [tokenizer.eot]  # end-of-text starts a new document
        if len(ids) > window:
            print(f"note: the prompt has {len(ids)} tokens, the model reads the last {window}",
                  file=sys.stderr)
        most = args.max_new_tokens or max(1, min(200, trained - len(ids)))
        if len(ids) + most > trained:
            print(f"note: the model was trained in windows of {trained} tokens; beyond that its "
                  f"text gets worse", file=sys.stderr)
        generator = torch.Generator().manual_seed(args.seed)  # the same for each prompt
        for _ in range(args.samples):
            print(f"{separator}{prompt}", end="", flush=True)
            separator = "---\n"
            for piece in stream(model, tokenizer, ids, most, args, generator):
                print(piece, end="", flush=True)
            print()


# -------------------------------------------------------------------------------------------------
# The trajectory: the same prompt and the same random numbers at every checkpoint

def trajectory(run, args, device, autocast):
    """Print one sample of every checkpoint kept, and append them to the run's evaluations.jsonl."""
    prompts = args.prompt or [settings_of(run).get("sample_prompt") or ""]
    began = beginning(run)
    names = ("max_new_tokens", "temperature", "top_k", "top_p", "seed")
    options = {name: getattr(args, name) for name in names}
    usable = 0
    for step in checkpoints(run):
        try:
            model, tokenizer, _ = load_model(run, step, device)
        except UserError:
            continue  # damaged: already reported on stderr
        usable += 1
        for prompt in prompts:
            sample = continue_prompt(model, tokenizer, prompt, autocast, **options)
            print(f"{step:>9,} | {prompt} | {visible(' '.join(sample['text'].split()))}",
                  flush=True)
            note(run, {"event": "sample", "step": step, "dtype": args.dtype, **sample, **options},
                 began)
    if usable == 0:
        raise UserError(f"{run}: no usable checkpoint — train it first: python train.py --run "
                        f"{quoted(run)}")


# -------------------------------------------------------------------------------------------------
# Chat

class Chat:
    """A conversation with a tuned model. It remembers as much as fits into the model's window."""

    def __init__(self, model, tokenizer, system, args, generator):
        self.model = model
        self.tokenizer = tokenizer
        self.system = system
        self.args = args
        self.generator = generator
        self.messages = []
        self.window = model.config.max_seq_len
        # At least a quarter of the window, or what was asked for, stays free for the answer.
        self.room = self.window - min(args.max_new_tokens, self.window // 4)
        if len(self.encode([{"role": "user", "content": ""}])) >= self.room:
            raise UserError("the system prompt leaves no room for a question in the window — give "
                            "a shorter --system")

    def encode(self, messages):
        ids, _ = encode_chat(self.tokenizer, messages, self.system)
        return ids

    def ask(self, question):
        """Yield the answer piece by piece. Raises UserError if the question is too long, and
        forgets nothing then."""
        messages = [*self.messages, {"role": "user", "content": question}]
        ids = self.encode(messages)
        while len(ids) > self.room and len(messages) > 1:
            messages = messages[2:]  # drop the oldest question and its answer
            ids = self.encode(messages)
        if len(ids) > self.room:
            raise UserError(f"the question has {len(ids)} tokens with the system prompt, and the "
                            f"window has room for {self.room} — ask a shorter one")
        answer = ""
        most = min(self.args.max_new_tokens, self.window - len(ids))
        for piece in stream(self.model, self.tokenizer, ids, most, self.args, self.generator):
            if answer == "":
                piece = piece.lstrip()  # the first token brings the space after "ASSISTANT:"
            answer += piece
            yield piece
        self.messages = [*messages, {"role": "assistant", "content": answer}]


def talk(chat):
    """Answer the questions on stdin, one after another; a line that ends with a backslash goes on
    in the next."""
    prompt = ""
    if sys.stdin.isatty():
        prompt = "\nyou: "
        with contextlib.suppress(ImportError):  # not on Windows
            import readline  # noqa: F401  arrow keys and history in input()
        print("Ask something; \\ at the end of a line: it goes on in the next. /reset forgets the "
              "conversation; /exit, Ctrl-D or Ctrl-C leave.")
    while True:
        try:
            question = input(prompt).rstrip()
            while question.endswith("\\"):
                question = f"{question[:-1]}\n{input('  ... ' if prompt else '').rstrip()}"
        except EOFError:
            return
        question = question.strip()
        if question == "/exit":
            return
        if question == "/reset":
            chat.messages = []
        elif question.startswith("/") and " " not in question:
            print(f"unknown command {question} — there are /reset and /exit", file=sys.stderr)
        elif question:
            try:
                for piece in chat.ask(question):
                    print(piece, end="", flush=True)
                print()
            except UserError as error:
                print(error, file=sys.stderr)


def system_prompt(run, args):
    """--system, or the one that the run was tuned with; a note if it was not tuned at all."""
    tuned = settings_of(run).get("system")
    if tuned is None:
        print(f"note: {run} was not tuned by sft.py; it may only continue the text — tune it: "
              f"python sft.py {quoted(run)}", file=sys.stderr)
        tuned = SYSTEM
    return tuned if args.system is None else args.system


# -------------------------------------------------------------------------------------------------
# The command line

def read_arguments(argv):
    """The command line as a namespace. Raises UserError for flags that do not go together."""
    parser = Parser(description="Continue a prompt with a checkpoint, or talk to it.")
    add = parser.add_argument
    add("run", nargs="?", help="run folder; without it the newest run")
    add("--step", type=int, help="checkpoint; without it the newest")
    add("--prompt", action="append", type=text, help="text to continue, may be given several "
        "times; without it a new document, with --trajectory the prompt of the run's own samples")
    add("--trajectory", action="store_true", help="one sample of every checkpoint kept, also into "
        "evaluations.jsonl")
    add("--chat", action="store_true", help="answer the lines of stdin in turn; a backslash at "
        "the end of a line: it goes on in the next; /reset, /exit")
    add("--system", type=text, help="how the conversation begins; without it as in the tuning")
    add("--samples", type=count, default=1, help="continuations of each prompt")
    add("--max_new_tokens", type=count, help="without it 200, or what the windows of training "
        "have room for; with --trajectory 80")
    add("--temperature", type=number(float, 0, 100), default=0.8, help="0: the likeliest token")
    add("--top_k", type=count, help="draw among the k likeliest tokens only")
    add("--top_p", type=number(float, 1e-6, 1), default=0.95,
        help="draw among the likeliest tokens that together have this probability")
    add("--seed", type=number(int, 0, 2**63 - 1), default=0,
        help="same seed and prompt, same text")
    add("--device", help="cpu, cuda, cuda:1 …; without it cuda if there is one")
    add("--dtype", choices=("fp32", "bf16", "fp16"), default="fp32", help="of matrix products; the "
        "shorter ones are faster on a GPU, and change the text")
    args = parser.parse_args(argv)
    if args.trajectory and (args.step is not None or args.samples > 1):
        raise UserError("--trajectory draws one sample at every step — leave out --step, --samples")
    if args.chat and (args.trajectory or args.prompt or args.samples > 1):
        raise UserError("--chat reads questions from standard input — leave out --prompt, "
                        "--samples and --trajectory")
    if args.system is not None and not args.chat:
        raise UserError("--system is for --chat — give both, or leave it out")
    if args.max_new_tokens is None and (args.trajectory or args.chat):
        args.max_new_tokens = 80 if args.trajectory else 200
    return args


@script
def main(argv=None):
    args = read_arguments(argv)
    refuse_processes()
    device = choose_device(args.device)
    dtype = choose_dtype(args.dtype, device)
    autocast = torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)
    run = Path(args.run) if args.run else newest_run()
    if args.trajectory:
        trajectory(run, args, device, autocast)
        return
    model, tokenizer, _ = load_model(run, args.step, device)
    if not args.chat:
        with autocast:
            trained = trained_window(settings_of(run), model.config.max_seq_len)
            continue_prompts(model, tokenizer, args, trained)
        return
    if sys.stdin is None:
        raise UserError("--chat reads questions from standard input, which is closed — open it, or "
                        "give a --prompt")
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="replace")  # bytes that are not UTF-8 become U+FFFD
    generator = torch.Generator().manual_seed(args.seed)
    chat = Chat(model, tokenizer, system_prompt(run, args), args, generator)
    with autocast:
        talk(chat)


if __name__ == "__main__":
    sys.exit(main())
