"""alpaca.py — instructions in Alpaca's form, as alpaca-cleaned has them."""
from support import chat

REPO = "yahma/alpaca-cleaned"


def usable(rows):
    """Yield the fields that sft.py reads of each row, given as (place, row), that can be trained
    on: one without an answer, for example, cannot. Prints how many cannot."""
    bad = []
    for place, row in rows:
        row = {name: row[name] for name in ("instruction", "input", "output", "messages", "split")
               if name in row}
        try:
            chat.messages_of(row)
            if not isinstance(row.get("split"), str | None):
                raise ValueError('"split" must be a string')
            yield row
        except ValueError as why:
            bad.append(f"{place}: {why}")
    if bad:
        print(f"{len(bad)} rows cannot be used and are left out; the first is {bad[0]}")
