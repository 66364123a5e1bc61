"""Where text comes from, for prepare_data.py. Nothing in here imports from the root."""
