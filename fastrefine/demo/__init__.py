"""The demo: one early-stopped GAN, four ways to sample from it. Only the command line imports it."""
