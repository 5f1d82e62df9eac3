"""What a compressed cache is asked: one file per task, every sample a function of seed, length and index."""
