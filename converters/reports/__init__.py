"""Reports: what was found and done, for a terminal (`terminal`) and for programs (`documents`)."""
