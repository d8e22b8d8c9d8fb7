"""A run's model after training: reopen, export, model card, chat.

Other folders may import:

- chat: CHAT_DEFAULTS, chat, input_lines
- export: EXPORT_DEFAULTS, export
"""
