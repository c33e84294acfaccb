"""Dynamo's code objects: the dump that people read, and the check on what a compiled callable may do.

Nothing here knows vLLM.
"""
