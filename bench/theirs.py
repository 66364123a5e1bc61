"""theirs.py — transformers' LLaMA with the parameters of ours: for comparisons."""
from support.runs import UserError, first_line_of


def in_transformers(llama):
    """transformers' LlamaForCausalLM with the parameters of `llama`: our state_dict is theirs.
    Raises UserError if transformers is not installed."""
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError as error:
        raise UserError(f"{first_line_of(error)} — pip install -r requirements-extras.txt, or give "
                        f"--only ours") from None
    config = llama.config
    theirs = LlamaConfig(
        hidden_size=config.dim,
        num_hidden_layers=config.n_layers,
        num_attention_heads=config.n_heads,
        num_key_value_heads=config.n_kv_heads,
        intermediate_size=config.intermediate_size,
        vocab_size=config.padded_vocab_size,
        max_position_embeddings=config.max_seq_len,
        rms_norm_eps=config.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        hidden_act="silu",
        tie_word_embeddings=config.tie_embeddings,
        attn_implementation="sdpa",
        bos_token_id=None,
        eos_token_id=None,
    )
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
