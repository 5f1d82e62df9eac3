"""Which workers, how many and with which method meet a latency target: a latency model fitted from the real engine, a
discrete-event simulator with its page arithmetic, and a search over placements (DistServe, arXiv 2401.09670)."""
