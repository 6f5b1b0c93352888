"""The demo: one early-stopped GAN, six ways to sample from it. Only the command line imports it."""
