"""Where arrays live: the device mesh and the rules that map logical axis names to its axes."""
