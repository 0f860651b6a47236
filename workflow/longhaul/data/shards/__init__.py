"""Write token ids to shards, and read them."""
