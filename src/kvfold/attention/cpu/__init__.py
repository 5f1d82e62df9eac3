"""Attention in C++ on the CPU: kernels over codes, one pool of threads shared with torch."""
