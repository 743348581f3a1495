"""Every public call with arguments that nobody should give: a table of calls, and the values that stand in for each."""
