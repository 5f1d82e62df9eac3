"""What a method must know of a model's keys and values, measured once on text and saved as one artifact."""
