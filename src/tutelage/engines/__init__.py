"""Samplers and scorers: what generates answers and what reads them."""
