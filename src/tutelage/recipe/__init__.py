"""The typed recipe: its tables, and how one is read."""
