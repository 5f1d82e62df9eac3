"""Several engines as one: prompts are read by some workers and answered by others, with KV pages between them."""
