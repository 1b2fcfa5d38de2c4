"""Sources of conversations and prompts."""
