"""The one training loop, its losses and its batches."""
