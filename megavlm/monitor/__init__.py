"""What a run reports: meters gathered over ranks, TensorBoard, the log."""
