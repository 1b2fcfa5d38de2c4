"""One module a stage; stages meet only through artifacts."""
