"""What the trainers share: the order of rows, dropout, arguments, rows given later."""
