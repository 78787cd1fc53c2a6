"""Llama 1 to 3, DeepSeek Coder and LLM, Mistral with and without a window, and whatever else is stored as `llama`.

The GGUF converter permutes the rows of each query and key head so that RoPE rotates neighbours. With `expert_count` it
is Mixtral (Jiang et al. 2024), or models merged into its form: every layer has experts, of `feed_forward_length` each.
"""

from vai.models.family import Family

FAMILY = Family(
    architecture="llama",
    pairing="norm",
    qkv_bias="optional",
    rope_divisors=True,
    windows=True,
    experts="optional",
    renormalize=True,
)
