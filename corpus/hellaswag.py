"""hellaswag.py — the questions of HellaSwag (Zellers et al. 2019, arXiv 1905.07830)."""
from support.runs import UserError

REPO = "Rowan/hellaswag"
SPLIT = "validation"  # the test split has no answers
FIELDS = ("ctx", "ctx_a", "ctx_b", "activity_label", "endings", "label")


def question_of(row, place):
    """The fields of a question that evaluate.py reads. Raises UserError if one is missing."""
    try:
        endings = row["endings"]
        label = int(str(row["label"]))  # a string in some releases; "" in the test split
        fits = (all(isinstance(row[name], str) for name in FIELDS[:4])
                and isinstance(endings, list)
                and all(isinstance(ending, str) and ending.strip() for ending in endings)
                and 0 <= label < len(endings)
                and len(endings) >= 2)
    except (KeyError, TypeError, ValueError):
        fits = False
    if not fits:
        raise UserError(f"{place}: not a question in HellaSwag's format with its answer — give the "
                        f"validation split")
    return {**{name: row[name] for name in FIELDS}, "label": label}
