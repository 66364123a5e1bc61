"""trees.py — what nested dicts, lists and objects hold: {path: value}, to compare two of them."""
import torch


def leaves(tree, path=""):
    """{path: value} of all values in nested dicts and lists. An empty one counts as a value."""
    found = {}
    for key, value in items_of(tree):
        found.update(leaves(value, f"{path}.{key}" if path else str(key)))
    return found or {path: tree}


def items_of(tree):
    """(key, value) of each entry of a dict or a list; nothing for another value."""
    if isinstance(tree, dict):
        return tree.items()
    if isinstance(tree, list | tuple):
        return enumerate(tree)
    return []


def named_tensors(tree):
    """{path: tensor} of all tensors in nested dicts and lists."""
    return {path: value for path, value in leaves(tree).items() if isinstance(value, torch.Tensor)}


def forms(tree):
    """{path: shape and dtype} of the tensors in nested dicts and lists; of other values, their
    type."""
    found = {}
    for path, value in leaves(tree).items():
        found[path] = type(value).__name__
        if isinstance(value, torch.Tensor):
            layout = "" if value.layout == torch.strided else f" {value.layout}"
            found[path] = f"{tuple(value.shape)} {value.dtype}{layout}".replace("torch.", "")
    return found


def differences(first, second):
    """The paths at which two nested dicts do not hold equal tensors or values."""
    first = leaves(first)
    second = leaves(second)
    paths = first.keys() | second.keys()
    return sorted(path for path in paths if not are_equal(first.get(path), second.get(path)))


def are_equal(a, b):
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a.cpu(), b.cpu())
    are_nan = a != a and b != b
    return a == b or are_nan


def contents_of(optimizer, model):
    """{path: text} of the numbers, strings and tensors in an optimizer: in its attributes, its
    groups, its state. A tensor is described by its shape and its sum. Parameters and learning rates
    are left out: they are not the optimizer's own."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return contents(optimizer, names, "", ())


def contents(thing, names, path, above):
    if isinstance(thing, torch.nn.Parameter) or id(thing) in above:
        return {}
    if isinstance(thing, torch.Generator):
        thing = thing.get_state()
    if isinstance(thing, torch.Tensor):
        part = thing.to_local() if hasattr(thing, "to_local") else thing  # of a sharded one
        return {path: f"{tuple(thing.shape)} {thing.dtype} {part.cpu().double().sum().item()}"}
    if isinstance(thing, int | float | str | None):
        return {path: repr(thing)}
    items = items_of(thing)
    if hasattr(thing, "__dict__") and not callable(thing) and not items:
        items = vars(thing).items()
    found = {}
    for key, value in list(items):
        place = names.get(id(key)) or str(key)
        if place != "lr":
            inner = f"{path}.{place}" if path else place
            found.update(contents(value, names, inner, (*above, id(thing))))
    return found
