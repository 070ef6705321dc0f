"""A budget for thinking: its end is forced when it is used up, and forbidden before its least."""
