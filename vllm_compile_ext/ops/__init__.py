"""vLLM's light custom ops: which implementation of each runs here, and why."""
