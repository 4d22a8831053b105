"""The parts of the gate: integrity, fidelity to the parent, and the sequential test of non-inferiority."""
