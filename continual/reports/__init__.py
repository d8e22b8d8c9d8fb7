"""What continual.report is made of: reading run folders, charts, pages, tables.

Other folders may import:

- audits: FILE, load, show, solved
- figures: NONE, count, percent, seconds
- verify: verify
- write: tables, write
"""
