"""alpaca.py — instructions in Alpaca's form, as alpaca-cleaned has them."""
from collections import Counter

from support import chat
from support.rows import listed

REPO = "yahma/alpaca-cleaned"
FIELDS = chat.FIELDS


def usable(rows):
    """Yield those of the rows, given as (place, row), that can be trained on: one without an
    answer, for example, cannot. Prints how many cannot."""
    bad = []
    unread = Counter()
    for place, row in rows:
        try:
            chat.messages_of(row)
            unread.update(chat.unread_in(row))
            yield row
        except ValueError as why:
            bad.append(f"{place}: {why}")
    if unread:
        print(f"sft.py will not read {listed(unread)}")
    if bad:
        print(f"{len(bad)} rows cannot be used and are left out; the first is {bad[0]}")
