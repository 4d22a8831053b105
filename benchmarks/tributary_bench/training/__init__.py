"""A training step of a model shaped like GPT-2 small: private, not private, and private with Opacus."""
