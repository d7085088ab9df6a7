"""From captions and images to batches: sources, caption choice and the loader."""
