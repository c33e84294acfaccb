"""The replacement for `vllm.compilation`, in the order of a start.

backends, decorators, wrapper: served under vLLM's names, thin.  rules: what is vLLM's own business.  start: a model is
loaded, or else compiled and kept.  once: a cold compilation.  functions: what vLLM compiles beside the models.
"""
