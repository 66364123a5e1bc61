"""How fast and how large: `python -m bench`. It stands above the scripts at the root, which do not
need it."""
