"""CUDA graphs on demand: nothing is captured while vLLM starts, each shape when traffic first asks for it.

`policy` decides what is captured and when, `budget` how much memory graphs may take, `record` remembers both for the
next start, `coverage` says where stock's capture stays: none of the four knows torch.  `manager` adapts vLLM's
`ModelCudaGraphManager` to them, `capture` is the state in which it captures while requests are served, `profile` and
`memory` find what to keep free for graphs, `idle` captures between requests, `install` puts all that in place.
"""
