"""Identity, artifacts, locks, files, progress and errors; knows nothing of models or text."""
