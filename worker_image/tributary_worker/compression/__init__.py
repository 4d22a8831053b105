"""Smaller weights for a public model, and the loading of models with either kind of weights."""
