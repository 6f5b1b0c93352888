"""The demo and the experiments behind the figures in the documentation, built on the public API."""
