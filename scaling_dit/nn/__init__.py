"""Layers that backbones and encoders are made of: attention, norms, embeddings, scanned stacks."""
