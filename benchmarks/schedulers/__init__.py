"""Schedulers of other systems on alisa's own store: the same kernels, the same bytes counted, other rules."""
