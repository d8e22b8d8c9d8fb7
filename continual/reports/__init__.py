"""What continual.report is made of: reading run folders, charts, pages, tables.

Other folders may import:

- audits: AUDIT_FILE, load_audit, print_audit_table, solved_task_lines
- figures: NO_VALUE, format_count, format_percent, format_seconds
- verify: verify
- write: print_tables, write_report
"""
