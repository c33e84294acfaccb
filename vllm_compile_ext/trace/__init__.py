"""FX and Dynamo only, no vLLM: trace each kind of layer once, split, fingerprint, plan.

tracer      the Tracer: which calls share a trace, decided while Dynamo traces
watch       what a trace looks at: the places where Dynamo is hooked, and their undo
kinds       Dynamo's kinds of sources and guards, and what each means for a copy; closed tables
values      what code can see of a value: its type, its bits and its parts; the one place that knows types
same_kind   are two layers the same in all that a trace could see?
call        a call as data: arguments, results, state, the body that it added to the graph, the marker for a copy
stitch      the markers become copies of the body; is that the graph that tracing every layer gives?
split       a graph cut at splitting ops into pieces
fingerprint pieces that may share compiled code
names       names for functions and constants of a graph, equal in any process
plan        one straight function instead of a split module, and the reader of the copies' tensors; plain data
"""
