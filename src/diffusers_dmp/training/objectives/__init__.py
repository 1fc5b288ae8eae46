"""What a training minimises: losses, their weights, and the timesteps that they are drawn at."""
