"""Talking to a trained model: questions, drawings, batches from files, a page in the browser and an endpoint."""
