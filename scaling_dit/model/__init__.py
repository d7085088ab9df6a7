"""What one run is made of: codec, text encoder, backbone and noise schedule, built from its config."""
