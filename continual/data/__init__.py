"""Examples, tasks and streams; templates from text to token ids; the token cache.

Other folders may import:

- template: CHAT, Encoder, TEMPLATES, Unfit, columns, lead, pieces
- token_cache: Tokens, tokenise
- types: Constraint, Encoded, Example, Message, Stream, Task
"""
