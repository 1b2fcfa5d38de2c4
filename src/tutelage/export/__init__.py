"""Files for the edge, and the runtimes that prove them."""
