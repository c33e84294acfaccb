"""The replacement for `vllm.compilation`, in the order of a start.

backends, decorators, wrapper: served under vLLM's names, thin.  rules: which models are vLLM's own business.  start: a
model is loaded, or else compiled and kept.  entry: its place in the store.  once: a cold compilation; scratch: the
folder that it works in.  functions: what vLLM compiles beside the models; hooks: how we are asked for it.
"""
