"""The commands: flags in, exit codes, tables and sentences out. Imports everything; nothing imports it."""
