"""The promises about faults, by number, and that each has a test. A test carries its numbers as
`@pytest.mark.row(5)`; `python -m pytest --row 5 -m ""` runs those of one of them, slow ones too."""
import re

from conftest import ROOT

ROWS = {
    1: "a run that is stopped and resumed is the same to the bit",
    2: "and is not, if anything is missing from its state",
    3: "killed at any moment, rerun until it is done: the same to the bit",
    4: "after the first checkpoint there is always a whole one",
    5: "a checkpoint that is cut off is named, and the one before it is used",
    6: "so is one with a flipped bit",
    7: "so is one with a damaged meta.json",
    8: "a run without a good checkpoint never starts over by itself",
    9: "what a killed process left is removed",
    10: "a full disk while saving: the older checkpoint stays, exit 4",
    11: "a full disk while logging: no half line is taken for a whole one",
    12: "a folder or disk that cannot be used is named before the first step",
    13: "a resume with other settings of the experiment is refused",
    14: "the length of a run changes only on request",
    15: "the number of processes may change",
    16: "so may the micro-batch",
    17: "a batch that cannot be divided is refused, with sizes that can",
    18: "a stop signal finishes the step and saves, exit 75",
    19: "a signal to one process stops all of them",
    20: "when one process is killed, the others end",
    21: "a NaN ends the run before the update, with the good state saved",
    22: "a checkpoint never holds a NaN or infinity",
    23: "the loss scale of fp16 is restored",
    24: "a damaged shard is named, with what was expected and found",
    25: "other data on a resume is refused",
    26: "an id outside the vocabulary is named with its place",
    27: "bad rows of instructions are named, or counted and left out",
    28: "two processes never write into one run",
    29: "a folder with a run is not overwritten unasked",
    30: "a log that is longer than the checkpoint is cut back",
    31: "a checkpoint cannot run code",
    32: "a renamed or reshaped parameter is refused by name",
    33: "evaluating and saving do not change the training",
    34: "a download that is cut or altered is never used",
    35: "a killed preparation leaves no half data, and goes on to the same bytes",
    36: "another machine or number of threads is reported",
    37: "all of this holds in a tuning too",
    38: "readers skip damaged checkpoints, and refuse what is no run",
    39: "any prompt can be continued",
    40: "a Hugging Face folder that does not fit is refused by name",
    41: "what a step had to save was saved before its evaluation",
    42: "tokens of another tokenizer are refused",
    43: "the same text is never on both sides of the split",
    44: "a score on other data than the run's is refused, or noted as such",
    45: "an input or flag without effect is reported",
    46: "variables that another launcher left are refused; waiting is reported",
    47: "a library that fails in a side job does not fail the run",
    48: "refusals do not depend on assert",
    49: "a busy machine changes no decision, and is reported",
    50: "a stop signal that arrives twice still saves",
    51: "when one process fails, all end with its exit code",
    52: "of two writers of one folder one wins; nothing is mixed",
    53: "a state whose hash is right and whose content does not fit is refused",
    54: "a data folder whose meta.json does not fit its shards is refused",
    55: "JSON or arrays that were made to hurt end in one line",
    56: "what a row of instructions has more is used, or counted",
    57: "what a folder has more is counted, in the same words for every source",
    58: "null is as if the field were absent; rows without text are counted",
    59: "columns of one name are refused, and only needed ones are read",
    60: "what a file system refuses is said, and the work goes on",
    61: "a run that came to harm says so on the page",
    62: "many runs fit the page; figures are the same on every machine",
    63: "a new run takes the sizes of the weights it starts from",
    64: "text longer than the windows of training is said",
    65: "a clone with Windows line ends works",
    66: "a preparation works from a notebook, standard input, a script without a guard",
    67: "byte-order marks and gzip are read alike by every reader",
    68: "names with blanks, hidden names and names of the same kind lose nothing",
    69: "as many workers as cores that may be used; no bars in log files",
    70: "a chat takes several lines, and shows control codes as signs",
}


def rows_tested():
    """The numbers that the test files carry."""
    numbers = set()
    for file in (ROOT / "tests").glob("test_*.py"):
        for marked in re.findall(r"^@pytest\.mark\.row\(([\d, ]+)\)$",
                                 file.read_text(encoding="utf-8"), re.M):
            numbers |= {int(number) for number in marked.split(",")}
    return numbers


def test_each_promise_has_a_test():
    """Catches: a promise whose last test was removed; a number that stands for nothing."""
    assert rows_tested() == set(ROWS)
    assert rows_tested() != set(ROWS) | {99}  # control
