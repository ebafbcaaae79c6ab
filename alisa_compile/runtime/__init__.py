"""Where KV rows live and what happens around a step. Nothing here sees an FX graph."""
