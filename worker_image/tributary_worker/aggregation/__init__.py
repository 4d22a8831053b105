"""Combining the deltas of a round's clients into one model: NumPy alone, tensor by tensor."""
