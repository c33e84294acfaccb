"""May this code be used here?  Factors that are known before tracing, what the trace read, and the machine."""
