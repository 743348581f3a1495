"""Random runs with random legal ops, on tiny pipelines whose tensors' places are written down by hand."""
