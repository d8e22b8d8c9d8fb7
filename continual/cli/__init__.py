"""The command line.

Other folders may import:

- main: main
"""
