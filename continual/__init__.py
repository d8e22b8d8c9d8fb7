"""continual: continual instruction learning of language models."""
