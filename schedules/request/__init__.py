"""sample: a token for every row of logits."""
