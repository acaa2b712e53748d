"""embedding: the token table, int8 rows with a scale each."""
