"""Instructions as TVMScript expressions: what each computes beside how it is spelt."""
