"""``vllm-compile-ext bench``: starts of vLLM, stock and ours in turn, and what is shown of them."""
