"""A run's model after training: reopen, export, model card, chat.

Other folders may import:

- chat: KEYS, chat, typed
- export: KEYS, export
"""
