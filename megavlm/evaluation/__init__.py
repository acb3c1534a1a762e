"""What a trained model can do: sampling with a cache, and metrics of understanding and generation."""
