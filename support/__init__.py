"""What the scripts share and nobody has to read first. Nothing in here imports from the root."""
