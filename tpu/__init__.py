"""TPU VM jobs: installed as `scaling_dit.tpu`."""
