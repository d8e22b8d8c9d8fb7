"""Files: atomic writes, and readers of files that may be anyone's.

Other folders may import:

- atomic: task_file_name, write_atomically, write_folder_atomically
- terminal: escape_control
- untrusted: CONTROL, LONGEST, check_links_inside, is_inside, is_number, iter_lines, load_json,
  load_json_with_schema, load_yaml_mapping, parse_json, read_bytes, read_text
"""
