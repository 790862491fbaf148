"""Studies, the paper's tables and toy tasks: what the library is tried on, outside its wheel."""
