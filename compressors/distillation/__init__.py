"""The parts of `compressors.methods.distill`."""
