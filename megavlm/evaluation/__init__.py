"""Evaluation of a trained model: sampling with a cache, and metrics of understanding and generation."""
