"""One engine a file, each run as a process by the interpreter of its own environment. None but bimo's imports bimo."""
