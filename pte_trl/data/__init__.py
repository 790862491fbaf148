"""Problems from the hub or from files, made into prompts."""
