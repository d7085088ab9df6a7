"""Metrics of generated images, one file each."""
