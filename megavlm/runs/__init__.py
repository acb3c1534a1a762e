"""The run folder and what lies in it: checkpoints' manifests, status, exit codes, who owns it."""
