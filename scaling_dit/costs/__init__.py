"""Parameters, multiply-accumulates and FLOPs of a backbone, counted from its traced program."""
