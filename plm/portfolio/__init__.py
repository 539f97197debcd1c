"""PALM at work: objectives, the search for few policies, members that write, their study and report."""
