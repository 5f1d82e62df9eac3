"""Bytes only: page formats, their packing, the page pool, page tables and the prefix index. Knows no method."""
