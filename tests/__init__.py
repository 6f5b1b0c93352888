"""A package, for torch-fidelity installs one of this name, which would be found instead."""
