"""Files: atomic writes, and readers of files that may be anyone's.

Other folders may import:

- atomic: file_name, flush, write_whole
- terminal: safe
- untrusted: CONTROL, LONGEST, contents, inside, is_number, json_file, lines, parse,
  refuse_links_out, schema_file, text, yaml_mapping
"""
