"""Training: one loop, its three seams, and what each system trains differently."""
