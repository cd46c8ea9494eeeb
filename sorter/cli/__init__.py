"""The command line: flags in; exit codes, tables, JSON and sentences out.

`main.py` lists the commands and `parser.py` makes an argparse from that list and from the settings. Each command has a
module of its own. This package may import everything; nothing imports it.
"""
