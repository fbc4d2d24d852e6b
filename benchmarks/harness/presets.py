"""Architectures as published, by name: what `--model bert-base` means. They carry no weights."""

from typing import Any

# Hyper-parameters as published, by transformers' model type and argument names; what is not named is that type's
# default, which is the published value for dropout, initialisation and activation.
_BERT = {"vocab_size": 30522, "max_position_embeddings": 512, "type_vocab_size": 2, "pad_token_id": 0}
_ROBERTA = {
    "vocab_size": 50265,
    "max_position_embeddings": 514,  # 512 positions behind the two that padding takes
    "type_vocab_size": 1,
    "layer_norm_eps": 1e-5,
    "bos_token_id": 0,
    "pad_token_id": 1,
    "eos_token_id": 2,
}
_BASE = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
_LARGE = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
_LLAMA_2 = {
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
PRESETS: dict[str, tuple[str, dict[str, Any]]] = {
    # Devlin et al., NAACL 2019 (the uncased vocabulary)
    "bert-base": ("bert", _BERT | _BASE),
    "bert-large": ("bert", _BERT | _LARGE),
    # Liu et al., 2019, arXiv:1907.11692
    "roberta-base": ("roberta", _ROBERTA | _BASE),
    "roberta-large": ("roberta", _ROBERTA | _LARGE),
    # Radford et al., 2019 (the smallest of the four)
    "gpt2": (
        "gpt2",
        {
            "vocab_size": 50257,
            "n_positions": 1024,
            "n_embd": 768,
            "n_layer": 12,
            "n_head": 12,
            "bos_token_id": 50256,
            "eos_token_id": 50256,
        },
    ),
    # Zhang et al., 2024, arXiv:2401.02385
    "tinyllama-1.1b": (
        "llama",
        _LLAMA_2
        | {
            "max_position_embeddings": 2048,
            "hidden_size": 2048,
            "intermediate_size": 5632,
            "num_hidden_layers": 22,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
        },
    ),
    # Touvron et al., 2023, arXiv:2307.09288
    "llama-2-7b": (
        "llama",
        _LLAMA_2
        | {
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
        },
    ),
    "llama-2-13b": (
        "llama",
        _LLAMA_2
        | {
            "hidden_size": 5120,
            "intermediate_size": 13824,
            "num_hidden_layers": 40,
            "num_attention_heads": 40,
            "num_key_value_heads": 40,
        },
    ),
    "llama-2-70b": (
        "llama",
        _LLAMA_2
        | {
            "hidden_size": 8192,
            "intermediate_size": 28672,
            "num_hidden_layers": 80,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
        },
    ),
    # Grattafiori et al., 2024, arXiv:2407.21783 (Llama 3, context 8192)
    "llama-3-8b": (
        "llama",
        {
            "vocab_size": 128256,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "max_position_embeddings": 8192,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
            "bos_token_id": 128000,
            "eos_token_id": 128001,
            "tie_word_embeddings": False,
        },
    ),
    # Yang et al., 2024, arXiv:2412.15115
    "qwen-2.5-7b": (
        "qwen2",
        {
            "vocab_size": 152064,
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
            "bos_token_id": 151643,
            "eos_token_id": 151643,
            "tie_word_embeddings": False,
        },
    ),
    # Jiang et al., 2023, arXiv:2310.06825 (version 0.1, with its sliding window)
    "mistral-7b": (
        "mistral",
        {
            "vocab_size": 32000,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "max_position_embeddings": 32768,
            "sliding_window": 4096,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            "bos_token_id": 1,
            "eos_token_id": 2,
            "tie_word_embeddings": False,
        },
    ),
}
