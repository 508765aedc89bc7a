"""Programs that make the pocket model: corpus, tokenizer, trainer, conversion, evaluation, contrast pairs."""
