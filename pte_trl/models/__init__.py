"""A base model's files, looked at before its weights load: hub names, tokenizer, weights."""
