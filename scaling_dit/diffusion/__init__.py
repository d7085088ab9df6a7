"""The diffusion process as pure functions: schedules, timesteps, objectives, samplers and guidance."""
