"""CUDA graphs on demand: nothing is captured while vLLM starts, but between requests, or when traffic asks for it.

replacements  what takes the place of stock's functions; `coverage` says where stock's capture stays
manager       vLLM's `ModelCudaGraphManager`, capturing one graph at a time between the steps of a serving engine
session       one model's graphs while it serves: when one is captured, and which a batch runs on
memory        how much is kept free for graphs, what earlier starts took and asked for, room for one more
ranks         what tensor parallel ranks have to agree on
"""
