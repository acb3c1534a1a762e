"""The backbone: decoder layers of a stock Hugging Face model driven by our own loop over stages, and what it reads."""
