"""Scaling studies: laws fitted to the losses and metrics of many runs."""
