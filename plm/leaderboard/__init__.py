"""The parts of a leaderboard: methods and baselines to fit, the cost of a run, results, tables and pictures."""
