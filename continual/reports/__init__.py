"""What continual.report is made of: reading run folders, charts, pages, tables."""
