"""grouped_embedding: the token table where it is one with a head of 6 or 4 bits."""
