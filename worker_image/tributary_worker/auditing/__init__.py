"""What adversaries can show about the running engine: a lower bound of epsilon."""
