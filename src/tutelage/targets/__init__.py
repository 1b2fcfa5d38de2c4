"""The store of teacher targets: estimator, codec, writer, reader."""
