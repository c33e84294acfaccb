"""What is kept from one start to the next, and how damage to it is noticed.  Nothing here knows vLLM or torch."""
