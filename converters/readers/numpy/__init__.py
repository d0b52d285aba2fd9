"""What numpy writes: archives of arrays, and pickles of them."""
