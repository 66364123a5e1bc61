"""The files beside the weights in a Hugging Face folder, for convert_hf.py. Nothing in here imports
from the root."""
