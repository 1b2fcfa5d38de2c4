"""Messages to token ids and loss masks."""
