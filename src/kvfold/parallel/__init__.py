"""One sequence over several ranks: prompts read and answers generated with a cache that no rank holds alone."""
