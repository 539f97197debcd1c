"""What a leaderboard is made of: the opponents of the methods, the facts of a run, results, tables and pictures."""
