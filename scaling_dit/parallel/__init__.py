"""The device mesh, the sharding rules from logical axes to mesh axes, and the processes of a run."""
