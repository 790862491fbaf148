"""A base model's files, checked before its weights load: hub names, tokenizer, weights."""
