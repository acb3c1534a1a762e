"""From URLs to samples: tars, shards, formats."""
