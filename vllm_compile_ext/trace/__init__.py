"""FX and Dynamo only, no vLLM: trace each kind of layer once, split, fingerprint, plan.

structure   what of two layers corresponds, and what differs
regions     the Tracer: which calls share a trace, decided while Dynamo traces
hooks       the two places where Dynamo is hooked, and their undo
signature   what a call passes and returns
state       what of Python's state a trace has changed so far
stitch      the markers that the Tracer left become copies of the body
split       a graph cut at splitting ops into pieces
fingerprint pieces that may share compiled code
plan        one straight function instead of a split module; picklable
check       the oracle: is a stitched graph the full trace?
"""
