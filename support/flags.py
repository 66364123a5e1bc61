"""flags.py — the command line: argparse, with one-line errors and numbers that know their range."""
import argparse

from support.runs import UserError, is_argument


class Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """--help shows the default of a flag, if there is one."""

    def _get_help_string(self, action):
        if action.default is None or action.default is False:
            return action.help
        return super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """argparse, but an error is one line, and a flag is never abbreviated."""

    def __init__(self, **options):
        options.setdefault("formatter_class", Formatter)
        super().__init__(allow_abbrev=False, **options)

    def set_saved(self, saved):
        """Take the settings of a saved run as defaults. Raises UserError for a value that its flag
        could not have given."""
        for action in self._actions:
            if action.dest in saved and not can_give(action, saved[action.dest]):
                raise UserError(f"the saved {action.dest} {saved[action.dest]!r} is not a value "
                                f"that the flag can have — restore the checkpoint")
        self.set_defaults(**saved)

    def error(self, message):
        raise UserError(f"{message} — see --help")


def can_give(action, value):
    """Whether a flag can have this value."""
    if value is None:
        return action.default is None
    if not is_argument(value):
        return False
    if action.nargs == 0:  # a switch
        return isinstance(value, bool)
    try:
        parsed = (action.type or str)(str(value))
    except (ValueError, argparse.ArgumentTypeError):
        return False
    is_choice = action.choices is None or parsed in action.choices
    return is_choice and type(parsed) is type(value) and parsed == value


def number(kind, least, most):
    """A `type=` for argparse: int or float, in a range. NaN is in no range."""
    def parse(text):
        value = kind(text)
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(
                f"{text} is out of range — it can be {least} to {most}")
        return value
    parse.__name__ = kind.__name__  # argparse names it when the text is not a number at all
    return parse


count = number(int, 1, 2**40)
count_or_0 = number(int, 0, 2**40)
positive = number(float, 1e-9, 1e12)
positive_or_0 = number(float, 0, 1e12)
below_1 = number(float, 0, 0.999999)
seed = number(int, 0, 2**32 - 1)


def text(argument):
    """A `type=` for argparse: command-line bytes that are not valid UTF-8 become "?"."""
    return argument.encode("utf-8", errors="replace").decode()
