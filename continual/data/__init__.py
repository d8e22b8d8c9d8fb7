"""Examples, tasks and streams; templates from text to token ids; the token cache.

Other folders may import:

- template: CHAT, Encoder, Encoding, TEMPLATES, generation_prompt_suffix, index_tasks,
  render_segments, usable_examples
- token_cache: TokenCache, load_or_tokenize
- types: Constraint, Encoded, Example, Message, Stream, Task
"""
