"""Graph passes, one rewrite a file. A pass never runs a kernel; a rewrite it refuses becomes a row of the skip list."""
