"""Tensors in, tensors out: products, sparse codes, selection, losses, pursuits. No nn.Module, no config."""
