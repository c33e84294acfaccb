"""FX and Dynamo only, no vLLM: trace each kind of layer once, split, fingerprint, plan.

tracer      the Tracer: which calls share a trace, decided while Dynamo traces
watch       what a trace has looked at: the places where Dynamo is hooked, and their undo
values      what code can see of a value: its type, its bits and its parts; the one place that knows types
same_kind   are two layers the same in all that a trace could see?
kinds       Dynamo's kinds of sources and guards, and what each means for a copy; closed tables
signature   what a call passes and returns
state       what of Python's and torch's state a trace has changed so far
bodies      what the Tracer leaves for stitch: traced bodies, and calls of them that were not traced
stitch      the markers that the Tracer left become copies of the body
access      access expressions, and the function that reads the tensors of all copies
check       is a stitched graph the one that tracing every layer gives?
split       a graph cut at splitting ops into pieces
names       names for functions and constants of a graph, equal in any process
fingerprint pieces that may share compiled code
plan        one straight function instead of a split module; picklable
"""
