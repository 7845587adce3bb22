"""From token shards to the batch of a step: shards, manifest, mixture, rows, batches."""
