"""Building blocks of backbones and encoders: attention, norms, embeddings, scanned stacks."""
