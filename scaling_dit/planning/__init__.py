"""What a run needs and how fast it can be at best, compiled ahead of time for TPUs that are not attached."""
