"""Training on PyTorch: the only place that imports torch."""
