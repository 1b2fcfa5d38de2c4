"""Tutelage: post-training of small language models under a teacher (arXiv 2509.26497)."""

__version__ = "0.1.0"
