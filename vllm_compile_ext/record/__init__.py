"""Where a start goes: spans of all its processes in one small file, and what can be read from it."""
