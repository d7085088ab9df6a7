"""Prompts to images with a trained run."""
