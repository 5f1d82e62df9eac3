"""Attention over compressed pages: one small contract, one definition in torch, fast backends beside it."""
