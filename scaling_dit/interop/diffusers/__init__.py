"""Models and pipelines in the folder layout of diffusers, read and written."""
