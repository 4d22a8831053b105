"""The inference server: an OpenAI-compatible completions API over one model."""
