"""From documents to batches: tokenizer, readers, shards, manifests, mixture, rows, batches."""
