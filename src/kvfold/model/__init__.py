"""Models: one decoder block configured from the Hugging Face config, and the loading of weights."""
