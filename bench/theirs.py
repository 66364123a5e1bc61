"""theirs.py — transformers' LLaMA with the parameters of ours: for comparisons."""
from convert_hf import to_hf_config
from support.runs import UserError, first_line_of


def in_transformers(llama):
    """transformers' LlamaForCausalLM with the parameters of `llama`: our state_dict is theirs.
    Raises UserError if transformers is not installed."""
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError as error:
        raise UserError(f"{first_line_of(error)} — pip install -r requirements-extras.txt, or give "
                        f"--only ours") from None
    theirs = LlamaConfig.from_dict(to_hf_config(llama.config, "float32"))
    with llama.lm_head.weight.device:
        network = LlamaForCausalLM(theirs)
    network.load_state_dict(llama.state_dict(keep_vars=True), assign=True)
    return network


def their_loss(network, inputs, targets):
    """The mean loss from transformers' own loss function; inputs and targets are (B, T). (Given
    `labels` alone it would shift them by one token. In training a cache is of no use.)"""
    output = network(input_ids=inputs, labels=targets, shift_labels=targets,
                     num_items_in_batch=targets.numel(), use_cache=False)
    return output.loss
