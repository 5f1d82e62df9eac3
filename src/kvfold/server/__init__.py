"""The OpenAI-compatible server: an API process that talks HTTP and an engine process that computes."""
